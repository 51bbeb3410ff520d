"""Family tables against the real classes of `transformers`."""

import json
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_spin.bridge.families import architecture_of, families, family_of
from nemo_spin.errors import CheckpointError
from tests.unit.bridge.checkpoints import CLASSES, COMMON, as_saved, config_of, edit_config

_DIRECTORY = tempfile.TemporaryDirectory()


def _directory(tmp_path: Path, family: str, **settings: Any) -> Path:
    config = config_of(family, architectures=[CLASSES[family][1]], **settings)
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("family", "tied"), [(family, tied) for family in CLASSES for tied in (False, True)])
def test_names_and_shapes_are_those_that_transformers_saves(tmp_path: Path, family: str, tied: bool) -> None:
    architecture = architecture_of(_directory(tmp_path, family, tie_word_embeddings=tied))
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[family][1])(config_of(family, tie_word_embeddings=tied))
    saved = as_saved(family, dict(model.named_parameters()))
    expected = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    assert family_of(architecture).stored_shapes(architecture) == expected


HEAD_DIMS = {"llama": 8, "mistral": 10, "qwen3": 6, "qwen3_moe": 6, "gemma2": 10, "gemma3": 10}
LAYER_NORMS = ("gpt2", "gpt_neox", "gpt_neo")
OWN_KEYS = {"gpt2": "layer_norm_epsilon", "gpt_neo": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps"}
WINDOWS = {
    "mistral": (7, 7),
    "mixtral": (7, 7),
    "qwen2": (None, 6),
    "gemma2": (5, None),
    "gemma3": (None, 5),
    "phi3": (9, 9),
    "gpt_neo": (None, 5),
}


@pytest.mark.parametrize("family", CLASSES)
def test_the_configuration_is_read_completely(tmp_path: Path, family: str) -> None:
    epsilon = {OWN_KEYS.get(family, "rms_norm_eps"): 3e-5}
    architecture = architecture_of(
        _directory(tmp_path, family, eos_token_id=[5, 7], dtype="bfloat16", **epsilon)
    )
    assert (architecture.family, architecture.hf_architecture) == (family, CLASSES[family][1])
    assert architecture.num_layers == COMMON["num_hidden_layers"]
    assert architecture.ffn_hidden_size == 36
    has_groups = family not in LAYER_NORMS
    assert (architecture.num_attention_heads, architecture.num_query_groups) == (6, 2 if has_groups else 6)
    assert architecture.head_dim == HEAD_DIMS.get(family, 4)
    assert architecture.norm_epsilon == 3e-5
    assert (architecture.bos_token_id, architecture.eos_token_ids) == (1, (5, 7))
    assert architecture.torch_dtype == "bfloat16"
    assert architecture.qkv_bias == (family in ("qwen2", "qwen2_moe", "gpt2", "gpt_neox"))
    assert architecture.attention_output_bias == architecture.mlp_bias == (family in LAYER_NORMS)
    assert (architecture.qk_norm, architecture.whole_qk_norm) == (
        family in ("qwen3", "qwen3_moe", "gemma3"),
        family == "olmo2",
    )
    assert architecture.gated == (architecture.normalization == "rms") == (family not in LAYER_NORMS)
    assert architecture.windows == WINDOWS.get(family, ())
    assert architecture.max_position_embeddings == COMMON["max_position_embeddings"]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mixtral", (4, 2, 36, 0, True)),
        ("qwen2_moe", (4, 3, 20, 28, False)),
        ("qwen3_moe", (6, 2, 20, 0, True)),
        ("llama", (0, 0, 0, 0, False)),
    ],
)
def test_experts_are_read_completely(tmp_path: Path, family: str, expected: tuple[int, ...]) -> None:
    read = architecture_of(_directory(tmp_path, family))
    assert expected == (
        read.num_experts,
        read.experts_per_token,
        read.expert_ffn_hidden_size,
        read.shared_expert_ffn_hidden_size,
        read.renormalised_routing,
    )


def test_older_files_of_qwen_3_call_their_experts_otherwise(tmp_path: Path) -> None:
    edit_config(_directory(tmp_path, "qwen3_moe"), remove=("num_local_experts",), num_experts=12)
    assert architecture_of(tmp_path).num_experts == 12


@pytest.mark.parametrize(
    ("key", "value"), [("decoder_sparse_step", 2), ("mlp_only_layers", [0]), ("num_experts_per_tok", 7)]
)
def test_experts_in_some_layers_or_too_many_at_once_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    edit_config(_directory(tmp_path, "qwen3_moe"), **{key: value})
    with pytest.raises(CheckpointError, match=key):
        architecture_of(tmp_path)


def test_gemma_is_read_completely(tmp_path: Path) -> None:
    read = architecture_of(_directory(tmp_path, "gemma2"))
    assert (read.attention_logit_cap, read.logit_cap) == (3.0, 4.0)
    assert read.embedding_scale == pytest.approx(4.898979485566356)  # sqrt 24
    assert read.softmax_scale == pytest.approx(0.24253562503633297)  # 1 / sqrt 17
    assert (read.activation, read.zero_centered_norms, read.pre_norms, read.post_norms) == (
        "gelu_tanh",
        True,
        True,
        True,
    )
    assert read.windowed_rope is None
    other = architecture_of(_directory(tmp_path, "gemma3"))
    assert (other.attention_logit_cap, other.logit_cap) == (None, 5.0)
    assert (other.rope.kind, other.rope.factor, other.rope.theta) == ("linear", 2.0, 1e6)
    assert other.windowed_rope is not None
    assert (other.windowed_rope.kind, other.windowed_rope.theta) == ("default", 5e3)


def test_old_spellings_of_gemma_3s_two_rotary_embeddings(tmp_path: Path) -> None:
    _directory(tmp_path, "gemma3", num_hidden_layers=4, layer_types=["full_attention"] * 4)
    edit_config(
        tmp_path,
        remove=("rope_parameters", "layer_types"),
        rope_theta=2e6,
        rope_local_base_freq=3e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=3,
    )
    read = architecture_of(tmp_path)
    assert read.windows == (5, 5, None, 5)
    assert (read.rope.theta, read.rope.kind, read.rope.factor) == (2e6, "linear", 8.0)
    assert read.windowed_rope is not None
    assert (read.windowed_rope.theta, read.windowed_rope.kind) == (3e4, "default")


def test_longrope_is_read_for_the_original_context(tmp_path: Path) -> None:
    read = architecture_of(_directory(tmp_path, "phi3"))
    assert (read.rope.kind, read.rope.short_factors) == ("longrope", (1.3,))
    assert read.rope.partial_rotary_factor == 0.5
    # sqrt(1 + ln(64 / 48) / ln 48)
    assert read.rope.attention_factor == pytest.approx(1.0364909, abs=1e-6)
    assert read.longest_sequence is not None
    assert read.longest_sequence[0] == 48


def test_old_spellings_of_neox(tmp_path: Path) -> None:
    _directory(tmp_path, "gpt_neox")
    edit_config(tmp_path, remove=("rope_parameters",), rotary_pct=0.5, rotary_emb_base=2e4)
    read = architecture_of(tmp_path)
    assert (read.rope.theta, read.rope.partial_rotary_factor) == (2e4, 0.5)
    assert read.parallel_residual


def test_learned_positions_end_where_they_were_learned(tmp_path: Path) -> None:
    for family, scale in (("gpt2", 1.0), ("gpt_neo", 1.0)):
        read = architecture_of(_directory(tmp_path, family))
        assert read.learned_positions
        assert read.softmax_scale == scale
        assert read.longest_sequence is not None
        assert read.longest_sequence[0] == 64
    edit_config(tmp_path, intermediate_size=None)
    assert architecture_of(tmp_path).ffn_hidden_size == 96


@pytest.mark.parametrize("family", [family.name for family in families()])
def test_keys_left_out_mean_what_the_class_says(tmp_path: Path, family: str) -> None:
    config = getattr(transformers, CLASSES[family][0])()
    own = family_of(_stub(family)).keys
    names = [
        own.get(name, name)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    ]
    if family not in ("gpt2", "gpt_neo"):
        names.append("intermediate_size")
    stated = {name: getattr(config, name) for name in names}
    (tmp_path / "config.json").write_text(json.dumps({**stated, "architectures": [CLASSES[family][1]]}))
    architecture = architecture_of(tmp_path)
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert architecture.num_query_groups == groups
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert architecture.head_dim == head_dim
    assert architecture.max_position_embeddings == config.max_position_embeddings
    assert architecture.norm_epsilon == getattr(config, own.get("rms_norm_eps", "rms_norm_eps"))
    assert architecture.tie_word_embeddings == config.tie_word_embeddings
    assert architecture.bos_token_id == config.bos_token_id
    first = {"mistral": 4096, "gemma2": 4096, "gemma3": 4096, "gpt_neo": None}.get(family)
    assert next(iter(architecture.windows), None) == first
    if family == "gpt_neo":
        assert architecture.windows == (None, 256) * 12
    if family == "gemma3":
        assert architecture.windows == ((4096,) * 5 + (None,)) * 4 + (4096, 4096)
    assert architecture.rope.theta == (1e6 if family in ("gemma3", "mixtral") else 10000.0)
    assert architecture.rope.partial_rotary_factor == (0.25 if family == "gpt_neox" else 1.0)


def _stub(family: str) -> Any:
    return types.SimpleNamespace(family=family)


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
    ("family", "settings", "windows"),
    [
        ("mistral", {"sliding_window": 16}, (16, 16)),
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {"sliding_window": 64}, ()),  # as long as the context: hides nothing
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, ()),
        (
            "qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
            (None, 16),
        ),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, ()),
        ("gemma3", {"layer_types": ["sliding_attention", "full_attention"]}, (5, None)),
    ],
)
def test_each_layer_has_its_window(
    tmp_path: Path, family: str, settings: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert architecture_of(_directory(tmp_path, family, **settings)).windows == windows


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": "yes"}, "attention_bias"),
        (
            {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["chunked_attention"]},
            "layer_types",
        ),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"model_type": "mistral"}, "model_type"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config"),
        ({"speculators_config": {"verifier": {"name_or_path": "/elsewhere"}}}, "speculators_config"),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "short_factor"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.5}}, "attention_factor"),
        ({"architectures": ["BloomForCausalLM"]}, "BloomForCausalLM"),
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


@pytest.mark.parametrize(
    ("family", "values", "named"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_act"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"attn_logit_softcapping": -1}, "attn_logit_softcapping"),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2}}}, "rope_param"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1, 2, 3]}}, "short_factor"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": ["a"] * 2}}, "short_factor"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"activation_function": "tanh"}, "hidden_act"),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, "attention_types"),
        ("gpt_neo", {"attention_types": [[["near"], 2]]}, "attention_types"),
        ("gpt_neo", {"attention_types": 5}, "attention_types"),
        ("gpt_neo", {"window_size": "wide"}, "window_size"),
        ("gpt_neox", {"use_parallel_residual": "yes"}, "use_parallel_residual"),
    ],
)
def test_what_cannot_be_expressed_of_a_family_is_refused_by_its_name(
    tmp_path: Path, family: str, values: dict[str, Any], named: str
) -> None:
    edit_config(_directory(tmp_path, family), **values)
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
    "sliding_window_pattern",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
    "attention_types",
    "window_size",
    "n_embd",
    "n_inner",
    "rotary_pct",
    "use_parallel_residual",
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
    "short_factor",
    "original_max_position_embeddings",
    "full_attention",
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
        "architectures": [CLASSES[family][1]],
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
