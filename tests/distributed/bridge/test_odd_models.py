"""Families in odd settings: logits, and the way through Megatron's checkpoints to another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import reference
from tests.distributed.bridge import ranks, through_megatron
from tests.distributed.harness import run_ranks
from tests.unit.bridge.checkpoints import CLASSES, make_checkpoint

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in CLASSES),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6}),
    ("llama", {"head_dim": 14, "rope_parameters": YARN}),
    ("mistral", {"num_key_value_heads": 6, "rope_parameters": LLAMA3}),
    ("qwen2", {"max_window_layers": 0, "rope_parameters": YARN}),
    ("qwen3", {"attention_bias": True, "rope_parameters": YARN}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("gemma2", {"attention_bias": True, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3", {"attention_bias": True, "final_logit_softcapping": None}),
    ("olmo2", {"attention_bias": True, "rope_parameters": LINEAR}),
    ("gpt2", {"scale_attn_weights": True, "n_inner": None}),
    ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False}),
    ("gpt_neo", {"intermediate_size": None, "window_size": 3}),
]
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS = [{TP: 1, PP: 1}, {TP: 2, PP: 1}, {TP: 1, PP: 2}, {TP: 2, PP: 2}]


def _name(value: object) -> str:
    return "-".join(value) or "plain" if isinstance(value, dict) else str(value)


def _logits_agree(source: Path, tp_size: int) -> None:
    """float32 on the ranks against float64 in `transformers`."""
    ids = np.random.default_rng(5).integers(0, 89, (3, 40)).tolist()
    with torch.no_grad():
        expected = reference.load(source)(torch.tensor(ids)).logits.numpy()
    computed = run_ranks(ranks.logits, tp_size, tp_size, source, ids)
    assert np.abs(computed - expected).max() < 1e-4


@pytest.mark.parametrize("family", ["gemma3", "phi3"])  # two rotary embeddings; one by parts and by length
def test_logits_with_a_familys_own_positions(tmp_path: Path, family: str) -> None:
    _logits_agree(make_checkpoint(tmp_path, family), 1)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=_name)
def test_logits_of_odd_models(tmp_path: Path, family: str, settings: dict[str, Any], tied: bool) -> None:
    _logits_agree(make_checkpoint(tmp_path, family, tie_word_embeddings=tied, **settings), 2)


def _world_size(layout: dict[str, int]) -> int:
    return layout[TP] * layout[PP]


def _through_megatron(tmp_path: Path, imported: dict[str, int], exported: list[dict[str, int]]) -> None:
    """Into a distributed checkpoint at one layout and out of it at others; every bit is that of `source`."""
    source, checkpoint = tmp_path / "source", tmp_path / "megatron"
    run_ranks(through_megatron.write, _world_size(imported), imported, source, checkpoint)
    expected = load_file(source / "model.safetensors")
    for layout in exported:
        target = tmp_path / "target"
        run_ranks(through_megatron.read, _world_size(layout), layout, source, checkpoint, target)
        found = {name: t for file in target.glob("*.safetensors") for name, t in load_file(file).items()}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), (name, layout)


def test_a_megatron_checkpoint_is_exported_at_another_layout(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source", "gemma2", num_hidden_layers=4)  # its embeddings are tied
    interleaved = {TP: 1, PP: 2, "virtual_pipeline_model_parallel_size": 2}
    uneven = {TP: 2, PP: 2, "num_layers_in_first_pipeline_stage": 1}
    _through_megatron(tmp_path, interleaved, [uneven])


@pytest.mark.slow
@pytest.mark.parametrize("imported", LAYOUTS, ids=lambda layout: "x".join(map(str, layout.values())))
@pytest.mark.parametrize(("family", "settings"), VARIANTS[: len(CLASSES) + 1], ids=_name)
def test_a_megatron_checkpoint_is_exported_at_all_other_layouts(
    tmp_path: Path, family: str, settings: dict[str, Any], imported: dict[str, int]
) -> None:
    make_checkpoint(tmp_path / "source", family, **settings)
    _through_megatron(tmp_path, imported, [layout for layout in LAYOUTS if layout != imported])
