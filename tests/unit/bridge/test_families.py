"""Family tables against the real classes of `transformers`."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_spin.bridge.families import architecture_of, families, family_of
from nemo_spin.errors import CheckpointError
from tests.unit.bridge.checkpoints import CLASSES, COMMON, config_of, edit_config

_DIRECTORY = tempfile.TemporaryDirectory()


def _directory(tmp_path: Path, family: str, **settings: Any) -> Path:
    config = config_of(family, architectures=[f"{CLASSES[family]}ForCausalLM"], **settings)
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", CLASSES)
def test_names_and_shapes_are_those_that_transformers_saves(tmp_path: Path, family: str, tied: bool) -> None:
    architecture = architecture_of(_directory(tmp_path, family, tie_word_embeddings=tied))
    with torch.device("meta"):
        model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(
            config_of(family, tie_word_embeddings=tied)
        )
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert family_of(architecture).stored_shapes(architecture) == expected


@pytest.mark.parametrize("family", CLASSES)
def test_the_configuration_is_read_completely(tmp_path: Path, family: str) -> None:
    architecture = architecture_of(
        _directory(tmp_path, family, rms_norm_eps=3e-5, eos_token_id=[5, 7], dtype="bfloat16")
    )
    assert (architecture.family, architecture.hf_architecture) == (family, f"{CLASSES[family]}ForCausalLM")
    assert architecture.num_layers == COMMON["num_hidden_layers"]
    assert architecture.ffn_hidden_size == COMMON["intermediate_size"]
    assert (architecture.num_attention_heads, architecture.num_query_groups) == (6, 2)
    assert architecture.head_dim == {"llama": 8, "mistral": 10, "qwen2": 4, "qwen3": 6}[family]
    assert architecture.norm_epsilon == 3e-5
    assert (architecture.bos_token_id, architecture.eos_token_ids) == (1, (5, 7))
    assert architecture.torch_dtype == "bfloat16"
    assert (architecture.qkv_bias, architecture.qk_norm) == (family == "qwen2", family == "qwen3")
    assert architecture.sliding_window is None  # Mistral's 4096 is longer than its 64 positions


@pytest.mark.parametrize("family", [family.name for family in families()])
def test_keys_left_out_mean_what_the_class_says(tmp_path: Path, family: str) -> None:
    config = getattr(transformers, f"{CLASSES[family]}Config")()
    counts = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    stated = {name: getattr(config, name) for name in counts}
    (tmp_path / "config.json").write_text(
        json.dumps({**stated, "architectures": [f"{CLASSES[family]}ForCausalLM"]})
    )
    architecture = architecture_of(tmp_path)
    assert architecture.num_query_groups == config.num_key_value_heads
    assert architecture.head_dim == (getattr(config, "head_dim", None) or 4096 // 32)
    assert architecture.max_position_embeddings == config.max_position_embeddings
    assert architecture.norm_epsilon == config.rms_norm_eps
    assert architecture.tie_word_embeddings == config.tie_word_embeddings
    assert architecture.bos_token_id == config.bos_token_id
    assert architecture.sliding_window == (4096 if family == "mistral" else None)
    assert architecture.rope.theta == 10000.0


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 4.5,
        "original_max_position_embeddings": 32,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "beta_fast": 30.0,
        "beta_slow": 2.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.25,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_old_and_new_spellings_of_rope_agree(tmp_path: Path, rope: dict[str, Any]) -> None:
    new = architecture_of(_directory(tmp_path, "llama", rope_parameters=dict(rope)))
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    old = architecture_of(
        edit_config(
            tmp_path,
            remove=("rope_parameters",),
            rope_theta=rope["rope_theta"],
            rope_scaling=None if rope["rope_type"] == "default" else {**scaling, "type": rope["rope_type"]},
        )
    )
    assert new.rope == old.rope
    assert new.rope.kind == rope["rope_type"]
    for key, value in scaling.items():
        assert getattr(new.rope, key) == value
    assert new.rope.theta == rope["rope_theta"]


def test_yarn_resolves_its_attention_factor_as_the_paper_does(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}
    read = architecture_of(_directory(tmp_path, "llama", rope_parameters=rope)).rope
    assert read.attention_factor == pytest.approx(1.2079441541679836, abs=1e-12)  # 0.1 ln 8 + 1
    assert read.original_max_position_embeddings == COMMON["max_position_embeddings"]


def test_generation_config_adds_ends_of_turns(tmp_path: Path) -> None:
    _directory(tmp_path, "llama", eos_token_id=3)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 3]}))
    assert architecture_of(tmp_path).eos_token_ids == (3, 4)


@pytest.mark.parametrize(
    ("family", "settings", "window"),
    [
        ("mistral", {"sliding_window": 16}, 16),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 64}, None),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, None),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, 16),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, None),
    ],
)
def test_a_window_is_recorded_where_some_layer_has_it(
    tmp_path: Path, family: str, settings: dict[str, Any], window: int | None
) -> None:
    assert architecture_of(_directory(tmp_path, family, **settings)).sliding_window == window


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.5}}, "attention_factor"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "architectures"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"torch_dtype": "float8_e4m3fn", "dtype": None}, "dtype"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_expressed_is_refused_by_its_name(
    tmp_path: Path, values: dict[str, Any], named: str
) -> None:
    edit_config(_directory(tmp_path, "llama"), **values)
    with pytest.raises(CheckpointError, match=named) as caught:
        architecture_of(tmp_path)
    assert "remedy:" in str(caught.value)


_KEYS = [
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "bos_token_id",
    "eos_token_id",
    "dtype",
    "torch_dtype",
    "architectures",
    "quantization_config",
    "partial_rotary_factor",
    "original_max_position_embeddings",
]
_ROPE_KEYS = [
    "rope_type",
    "rope_theta",
    "factor",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "beta_fast",
    "beta_slow",
]
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(_ROPE_KEYS), inner),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(CLASSES)),
    st.dictionaries(st.sampled_from(_KEYS), _VALUES, min_size=1, max_size=2),
    st.dictionaries(st.sampled_from(_ROPE_KEYS), _VALUES) | st.none(),
)
def test_a_value_of_any_kind_is_read_or_refused(
    family: str, values: dict[str, Any], rope: dict[str, Any] | None
) -> None:
    config: dict[str, Any] = {
        **COMMON,
        "architectures": [f"{CLASSES[family]}ForCausalLM"],
        "use_sliding_window": True,
    }
    if rope is not None:
        config["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0, **rope}
    directory = Path(_DIRECTORY.name)
    (directory / "config.json").write_text(json.dumps({**config, **values}))
    try:
        architecture = architecture_of(directory)
    except CheckpointError as error:
        outcome = str(error)
    else:
        outcome = architecture.family
    assert outcome == family or "config.json" in outcome


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"a": 1}', "\udcff"], ids=repr)
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        architecture_of(tmp_path)


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        architecture_of(tmp_path / "nowhere")
