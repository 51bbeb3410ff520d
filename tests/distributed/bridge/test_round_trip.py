"""Hugging Face -> Megatron -> Hugging Face in real processes, bit for bit, at every layout."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from nemo_spin.bridge.checkpoint_files import check_checkpoint, open_checkpoint, weights_sha256
from nemo_spin.data.files import read_manifest, verify_manifest
from tests.distributed import reference
from tests.distributed.bridge import ranks
from tests.distributed.harness import run_ranks
from tests.unit.bridge.checkpoints import CLASSES, edit_config, make_checkpoint

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
ODD: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    ("mistral", {"dtype": "bfloat16", "shards": True}),
    ("qwen2", {"tie_word_embeddings": True, "dtype": "bfloat16"}),
    ("qwen2", {"tie_word_embeddings": False, "dtype": "float16"}),
    ("qwen3", {"tie_word_embeddings": True, "shards": True}),
]


def _names(settings: Any) -> str:
    return settings if isinstance(settings, str) else "-".join(f"{v}" for v in settings.values())


def _hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize(("family", "settings"), ODD, ids=_names)
def test_every_layout_writes_the_same_bytes_and_the_source_values(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    first = make_checkpoint(tmp_path / "source", family, **settings)
    (first / "tokenizer.json").write_text("{}")
    options = {"extra": {"iteration": 1, "inputs": {"a": "b"}}}
    source = first
    hashes = []
    for tp_size, pp_size in LAYOUTS:  # each imports what the layout before exported
        target = tmp_path / f"tp{tp_size}-pp{pp_size}"
        manifest = run_ranks(ranks.convert, tp_size * pp_size, tp_size, pp_size, source, target, options)
        hashes.append(_hashes(target))
        verify_manifest(target, manifest)
        assert read_manifest(target) == manifest
        source = target
    assert manifest.inputs == {"a": "b"}
    assert manifest.counts["base_model"] == "source"
    assert all(entry == hashes[0] for entry in hashes)
    assert len([name for name in hashes[0] if name.endswith(".safetensors")]) > 1
    before, after = open_checkpoint(first), open_checkpoint(source)
    assert set(before.tensors) == set(after.tensors)
    for name, stored in before.tensors.items():
        assert (stored.dtype, stored.shape) == (after.tensors[name].dtype, after.tensors[name].shape)
        everything = tuple((0, size) for size in before.tensors[name].shape)
        np.testing.assert_array_equal(before.read(name, everything), after.read(name, everything))
    check_checkpoint(source)
    assert weights_sha256(source) == weights_sha256(tmp_path / "tp1-pp1")


@pytest.mark.parametrize(
    ("family", "sizes", "num_ranks"),
    [("llama", {}, 2), ("llama", {"tp": 2}, 4), ("qwen3_moe", {"ep": 2}, 4)],
    ids=["two replicas", "two of two ranks", "experts in groups of their own"],
)
def test_replicas_share_what_is_read(
    tmp_path: Path, family: str, sizes: dict[str, int], num_ranks: int
) -> None:
    """Every value once for each rank of a replica that holds it; all replicas have it afterwards."""
    source = make_checkpoint(tmp_path / "source", family)
    for reading in run_ranks(ranks.shared_reading, num_ranks, sizes, source):
        everything = [region for regions in reading for region in regions]
        shared = [region for region in everything if everything.count(region) > 1]
        copied = {name for name, _ in shared}  # by tensor-parallel ranks, which all hold them
        assert all("norm" in name for name in copied) if "tp" in sizes else not copied
        assert {name for name, _ in everything} == set(open_checkpoint(source).tensors)
        assert all(reading), "none only waits"


def test_an_export_through_a_link_lands_where_the_link_points(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    for _ in range(2):  # into nothing, then over an export
        run_ranks(ranks.convert, 1, 1, 1, source, tmp_path / "link", {})
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]
    check_checkpoint(tmp_path / "disk" / "model")


def test_an_export_over_its_own_source(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", shards=True)
    (source / "tokenizer.json").write_text("{}")
    before = weights_sha256(make_checkpoint(tmp_path / "copy", shards=True))
    run_ranks(ranks.convert, 2, 2, 1, source, source, {"max_shard_bytes": 10**9})
    assert sorted(path.name for path in source.glob("*.safetensors")) == ["model.safetensors"]
    assert (source / "tokenizer.json").read_text() == "{}"
    assert weights_sha256(source) != before
    check_checkpoint(source)


def test_transformers_loads_an_export_with_the_same_weights(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "qwen2", dtype="bfloat16", tie_word_embeddings=True)
    run_ranks(ranks.convert, 2, 2, 1, source, tmp_path / "target", {})
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path) for path in (source, tmp_path / "target")
    ]
    assert models[1].dtype == torch.bfloat16
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name])


def test_another_dtype_is_written_when_asked_for(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    run_ranks(ranks.convert, 2, 1, 2, source, tmp_path / "target", {"dtype": "bfloat16"})
    assert check_checkpoint(tmp_path / "target").torch_dtype == "bfloat16"
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "target")
    for name, stored in before.tensors.items():
        shape = tuple((0, size) for size in stored.shape)
        values = torch.from_numpy(before.read(name, shape)).view(torch.float32)
        written = torch.from_numpy(after.read(name, shape)).view(torch.bfloat16)
        assert torch.equal(values.to(torch.bfloat16), written)


def test_the_dtype_of_the_weights_decides_where_the_configuration_says_none(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype="bfloat16")
    edit_config(source, remove=("dtype", "torch_dtype"))
    run_ranks(ranks.convert, 1, 1, 1, source, tmp_path / "target", {})
    assert {stored.dtype for stored in open_checkpoint(tmp_path / "target").tensors.values()} == {"BF16"}


def test_one_data_parallel_replica_writes(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    run_ranks(ranks.convert, 2, 1, 1, source, tmp_path / "two", {})
    run_ranks(ranks.convert, 1, 1, 1, source, tmp_path / "one", {})
    assert _hashes(tmp_path / "two") == _hashes(tmp_path / "one")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_rank_may_hold_nothing_but_padding(tmp_path: Path, tied: bool) -> None:
    source = make_checkpoint(tmp_path / "source", tie_word_embeddings=tied)
    run_ranks(ranks.convert, 1, 1, 1, source, tmp_path / "plain", {})
    # 89 tokens in 2 x 128 rows
    run_ranks(ranks.convert, 4, 2, 2, source, tmp_path / "padded", {"vocab_multiple": 128})
    assert _hashes(tmp_path / "padded") == _hashes(tmp_path / "plain")


def test_half_precision_parameters_keep_half_precision_weights(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype="bfloat16")
    for params_dtype in ("bfloat16", "float32"):
        run_ranks(ranks.convert, 2, 2, 1, source, tmp_path / params_dtype, {"params_dtype": params_dtype})
    assert _hashes(tmp_path / "bfloat16") == _hashes(tmp_path / "float32")


def test_rows_that_pad_the_vocabulary_are_zero(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", tie_word_embeddings=False)
    # 89 tokens in 2 x 45 rows: the second rank holds one row more than there are tokens.
    assert run_ranks(ranks.padded_rows, 2, 2, source) == [-1.0, -1.0, 0.0, 0.0]


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize(
    ("family", "rope", "tp_size"),
    [
        *((family, "default", 2) for family in CLASSES),
        *(("llama", rope, 1) for rope in ROPES),
    ],
)
def test_logits_are_those_of_transformers(tmp_path: Path, family: str, rope: str, tp_size: int) -> None:
    source = make_checkpoint(
        tmp_path / "source", family, rope_parameters=ROPES[rope], tie_word_embeddings=family == "qwen2"
    )
    generator = np.random.default_rng(5)
    ids = generator.integers(0, 89, (3, 40)).tolist()
    model = reference.load(source)
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(run_ranks(ranks.logits, tp_size, tp_size, source, ids), expected, atol=1e-4)
