"""Every family on real gloo ranks: scores, gradients and round trips, against `transformers`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_spin.bridge.checkpoint_files import check_checkpoint, open_checkpoint
from tests.distributed import reference
from tests.distributed.bridge import ranks
from tests.distributed.harness import run_ranks
from tests.unit.bridge.checkpoints import CLASSES, COMMON, EXPERTS, as_saved, make_checkpoint

BETA = 0.1
SPLIT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
NEW = [family for family in CLASSES if family not in ("llama", "mistral", "qwen2", "qwen3")]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in CLASSES),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("gemma2", {"attention_bias": True, "tie_word_embeddings": False}),
    ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False, "tie_word_embeddings": True}),
]


def _name(value: object) -> str:
    return "-".join(value) or "plain" if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=_name)
def test_scores_and_gradients_are_those_of_transformers(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    _compare(tmp_path, family, SPLIT, settings)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_windows_caps_and_positions_reach_over_context_parallel_ranks(tmp_path: Path, family: str) -> None:
    _compare(tmp_path, family, {"context_parallel_size": 2}, {})


@pytest.mark.parametrize(
    ("family", "tp_size"), [("mixtral", 1), ("qwen2_moe", 1), ("qwen3_moe", 1), ("qwen2_moe", 2)]
)
def test_experts_of_other_ranks_are_those_of_one(tmp_path: Path, family: str, tp_size: int) -> None:
    """Of a microbatch more on one data-parallel rank than on the other, too."""
    split = {"tensor_model_parallel_size": tp_size, "sequence_parallel": tp_size > 1}
    _compare(tmp_path, family, {**split, "expert_model_parallel_size": 2}, {}, world_size=2)


def _compare(
    tmp_path: Path,
    family: str,
    model: dict[str, Any],
    settings: dict[str, Any],
    *,
    world_size: int | None = None,
) -> None:
    """Scores and one step's gradients against float64 without packing, tensor by tensor."""
    source = make_checkpoint(tmp_path / "source", family, std=0.1, **settings)
    table = reference.make_pairs(5, vocab_size=COMMON["vocab_size"])
    with torch.no_grad():
        expected = reference.logps(reference.load(source), table)
    opponent = expected + torch.from_numpy(np.random.default_rng(1).normal(size=expected.shape))
    table = reference.with_opponent(table, opponent)
    _, gradients = reference.spin_step(source, table, BETA)
    sizes = (
        model.get(f"{kind}_size", 1)
        for kind in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
    )
    scored = run_ranks(
        ranks.step, world_size or math.prod(sizes), model, source, table, tmp_path / "gradients"
    )
    assert (torch.tensor(scored, dtype=torch.float64) - expected).abs().max() < 1e-4
    computed, gradients = _tensors(tmp_path / "gradients"), as_saved(family, gradients)
    assert set(computed) == set(gradients)
    for name, gradient in gradients.items():
        scale = max(gradient.abs().max().item(), 1e-3)
        error = (computed[name].double() - gradient).abs().max().item()
        assert error < 1e-4 * scale, name


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _round_trip(tmp_path: Path, source: Path, layouts: list[tuple[int, int, int]]) -> None:
    """Imports at each layout what the one before exported; the last has every bit of the first."""
    first = source
    for tp_size, pp_size, ep_size in layouts:
        target = tmp_path / f"tp{tp_size}-pp{pp_size}-ep{ep_size}"
        world_size = max(tp_size, ep_size) * pp_size
        run_ranks(ranks.convert, world_size, tp_size, pp_size, source, target, {"ep_size": ep_size})
        source = target
    check_checkpoint(source)
    before, after = open_checkpoint(first), open_checkpoint(source)
    assert set(before.tensors) == set(after.tensors)
    for name, stored in before.tensors.items():
        assert (stored.dtype, stored.shape) == (after.tensors[name].dtype, after.tensors[name].shape)
        everything = tuple((0, size) for size in stored.shape)
        np.testing.assert_array_equal(before.read(name, everything), after.read(name, everything))


@pytest.mark.parametrize("family", NEW)
def test_a_round_trip_through_two_layouts_keeps_every_bit(tmp_path: Path, family: str) -> None:
    source = make_checkpoint(tmp_path / "source", family, dtype="bfloat16")
    ep_size = 2 if family in EXPERTS else 1
    _round_trip(tmp_path, source, [(2, 2, ep_size), (1, 1, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=_name)
def test_a_round_trip_through_all_layouts_keeps_every_bit(
    tmp_path: Path, family: str, settings: dict[str, Any], dtype: str
) -> None:
    source = make_checkpoint(tmp_path / "source", family, dtype=dtype, **settings)
    layouts = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1)]
    if family in EXPERTS:
        layouts += [(1, 1, 2), (2, 1, 2), (1, 2, 2), (2, 2, 2)]
    _round_trip(tmp_path, source, [*layouts, (1, 1, 1)])


def test_gpt2_without_the_usual_prefix_is_the_same_model(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "gpt2")
    tensors = _tensors(source)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a mask, as old checkpoints have it
    save_file(bare, source / "model.safetensors")
    run_ranks(ranks.convert, 1, 1, 1, source, tmp_path / "target", {})
    exported = _tensors(tmp_path / "target")
    assert set(exported) == set(tensors)
    assert all(torch.equal(tensors[name], exported[name]) for name in tensors)
