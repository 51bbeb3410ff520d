"""Adapters on real gloo ranks, against `transformers` in float64 with the adapters written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from tests.distributed import reference
from tests.distributed.harness import run_ranks
from tests.distributed.megatron import lora_ranks
from tests.distributed.megatron.test_engine import BETA

NUM_ROWS = 7
ENDS_ALONE = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
Placed = tuple[lora_ranks.Layout, dict[str, Any]]
ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def table(llama: Path) -> Any:
    """Pairs whose opponent is somewhere else."""
    pairs = reference.make_pairs(NUM_ROWS)
    with torch.no_grad():
        opponent = reference.logps(reference.load(llama), pairs)
    generator = torch.Generator().manual_seed(0)
    return reference.with_opponent(pairs, opponent + torch.randn(opponent.shape, generator=generator))


def ranks(layout: lora_ranks.Layout) -> int:
    return layout[0] * layout[1] * layout[2]


def adapter_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def one_rank(llama: Path, table: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A step in one process, and the reference's loss and gradients for its adapters."""
    directory = tmp_path_factory.mktemp("one_rank")
    result = run_ranks(lora_ranks.step, 1, llama, table, directory, (1, 1, 1, False), {}, {})
    loss, gradients = reference.spin_step(llama, table, BETA, adapter=directory / "adapter")
    return {**result, "directory": directory, "reference": loss, "gradients": gradients}


def check_gradients(expected: dict[str, torch.Tensor], directory: Path) -> None:
    written = adapter_tensors(directory)
    assert written.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (written[name].double() - gradient).norm() / gradient.norm()
        assert difference < 1e-5, f"{name}: relative difference {difference:.2g}"


def test_loss_and_gradients_are_those_of_transformers_in_float64(one_rank: dict[str, Any]) -> None:
    assert one_rank["loss"] == pytest.approx(one_rank["reference"], rel=1e-5)
    check_gradients(one_rank["gradients"], one_rank["directory"] / "gradients")
    names = {name.rsplit(".", 3)[1] for name in one_rank["gradients"]}
    assert names == ALL and len(one_rank["gradients"]) == 2 * 2 * len(ALL)


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ((2, 1, 1, False), {}),
        ((2, 1, 1, True), {}),
        ((1, 2, 1, False), {"recompute_granularity": "full"}),
        ((1, 1, 2, False), {}),
        ((2, 2, 1, True), {"recompute_granularity": "full"}),
    ],
    ids=["tp", "sp", "pp-recompute", "dp", "sp-pp-recompute"],
)
def test_no_layout_changes_adapters_loss_gradients_or_the_merged_model(
    llama: Path,
    table: Any,
    one_rank: dict[str, Any],
    tmp_path: Path,
    layout: lora_ranks.Layout,
    model: dict[str, Any],
) -> None:
    result = run_ranks(lora_ranks.step, ranks(layout), llama, table, tmp_path, layout, {}, model)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (one_rank["directory"] / name).read_bytes()
    assert result["loss"] == pytest.approx(one_rank["reference"], rel=1e-5)
    check_gradients(one_rank["gradients"], tmp_path / "gradients")
    assert result["merged"] == pytest.approx(one_rank["reference"], rel=1e-5)
    assert result["rounding"] == pytest.approx(one_rank["rounding"], rel=0.01)
    here, there = (load_file(d / "model/model.safetensors") for d in (tmp_path, one_rank["directory"]))
    for name, value in there.items():
        torch.testing.assert_close(here[name], value, rtol=0, atol=1e-7)


def test_the_merged_model_is_the_sum_and_has_the_same_loss(llama: Path, one_rank: dict[str, Any]) -> None:
    tensors = adapter_tensors(one_rank["directory"] / "adapter")
    merged = load_file(one_rank["directory"] / "model/model.safetensors")
    changed = 0
    for name, before in load_file(llama / "model.safetensors").items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{prefix}A.weight" not in tensors:
            assert torch.equal(merged[name], before)
            continue
        update = 2.0 * tensors[f"{prefix}B.weight"].double() @ tensors[f"{prefix}A.weight"].double()
        assert (merged[name].double() - before - update).abs().max() < 1e-6
        changed += 1
    assert changed == 2 * len(ALL)
    assert one_rank["before"] == pytest.approx(one_rank["reference"], rel=1e-5)
    assert one_rank["merged"] == pytest.approx(one_rank["reference"], rel=1e-5)
    assert 0 < one_rank["rounding"] < 1e-5, "float32 keeps what was learned"


def test_some_projections_of_a_fused_linear(llama: Path, table: Any, tmp_path: Path) -> None:
    lora = {"target_modules": ["v_proj", "q_proj", "up_proj"], "alpha": 1.5}
    layout = (2, 1, 1, True)
    result = run_ranks(lora_ranks.step, 2, llama, table, tmp_path, layout, lora, {})
    loss, gradients = reference.spin_step(llama, table, BETA, adapter=tmp_path / "adapter")
    assert {name.rsplit(".", 3)[1] for name in gradients} == {"q_proj", "v_proj", "up_proj"}
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["merged"] == pytest.approx(loss, rel=1e-5)
    check_gradients(gradients, tmp_path / "gradients")


@pytest.mark.parametrize(
    ("layers", "layout", "model"),
    [
        (4, (1, 2, 1, False), {"virtual_pipeline_model_parallel_size": 2}),
        (4, (1, 1, 2, False), {"context_parallel_size": 2}),
        (1, (1, 3, 1, False), ENDS_ALONE),
    ],
    ids=["interleaved", "cp", "stages-without-layers"],
)
def test_chunks_of_a_pipeline_and_parts_of_rows(
    tmp_path: Path, table: Any, layers: int, layout: lora_ranks.Layout, model: dict[str, Any]
) -> None:
    """The embedding is the head too, on two stages; frozen, it has no gradient to be summed."""
    base = reference.make_model(tmp_path / "tied", num_hidden_layers=layers, tie_word_embeddings=True)
    result = run_ranks(lora_ranks.step, ranks(layout), base, table, tmp_path, layout, {}, model)
    loss, gradients = reference.spin_step(base, table, BETA, adapter=tmp_path / "adapter")
    assert len(gradients) == layers * 2 * len(ALL)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["merged"] == pytest.approx(loss, rel=1e-5)
    check_gradients(gradients, tmp_path / "gradients")


@pytest.mark.parametrize("layout", [(1, 1, 1, False), (2, 1, 1, True)], ids=["one", "sp"])
def test_the_first_loss_is_exactly_ln_2_with_dropout_too(
    llama: Path, layout: lora_ranks.Layout, table: Any
) -> None:
    pairs = reference.make_pairs(NUM_ROWS)
    loss = run_ranks(lora_ranks.first_loss, ranks(layout), llama, pairs, layout, 0.5)
    assert loss == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_draws_alike_where_inputs_are_alike(llama: Path, table: Any, sequence_parallel: bool) -> None:
    """Per layer: query/key/value, attention output, gate/up, down; two layers, three steps, evaluation."""
    layout = (2, 1, 1, sequence_parallel)
    first, second = run_ranks(lora_ranks.masks, 2, llama, table, layout)
    assert len(first) == len(second) == 4 * 2 * 4
    assert not any("True" in str(mask) for mask in first[24:] + second[24:]), "evaluation drops nothing"
    first, second = first[:24], second[:24]
    for number, (here, there) in enumerate(zip(first, second, strict=True)):
        is_column = number % 2 == 0
        assert (here == there) == (is_column and not sequence_parallel)
    assert first[:8] == first[8:16] and second[:8] == second[8:16], "a step repeats its draws"
    assert all(one != other for one, other in zip(first[8:16], first[16:], strict=True))
    assert len({str(mask) for mask in first[:8]}) == 8, "no two linears share a mask"


SAVED_AND_LOADED: list[tuple[Placed, list[Placed]]] = [
    (
        ((2, 2, 1, True), {}),
        [
            ((1, 1, 1, False), {}),
            ((2, 1, 2, False), {"use_distributed_optimizer": True}),
            ((1, 2, 1, False), {}),
        ],
    ),
    (((1, 4, 1, False), ENDS_ALONE), [((1, 4, 1, False), ENDS_ALONE), ((1, 1, 1, False), {})]),
]


@pytest.mark.parametrize(("saved_at", "others"), SAVED_AND_LOADED, ids=["split", "stages-without-layers"])
def test_a_checkpoint_holds_adapters_alone_and_continues_at_any_other_layout(
    llama: Path, table: Any, tmp_path: Path, saved_at: Placed, others: list[Placed]
) -> None:
    directory = tmp_path / "checkpoints"
    uninterrupted = run_ranks(lora_ranks.save_half_way, 4, llama, directory, table, *saved_at)
    assert len(set(uninterrupted)) == 8
    (path,) = directory.iterdir()
    tensors = FileSystemReader(path).read_metadata().state_dict_metadata
    adapters = {f"adapters.layers.{n}.{name}.{letter}" for n in (0, 1) for name in ALL for letter in "ab"}
    # Megatron-Core 0.19 keeps `common` among the tensors, as bytes; 0.16 in a file beside them
    besides = ("optimizer.", "common_state/")
    assert {name for name in tensors if not name.startswith(besides)} == adapters
    states = {name.removeprefix("optimizer.state.square_avg.") for name in tensors} - adapters
    assert not any("adapters" not in name for name in states if "optimizer.state" in name), states
    for layout, model in others:
        losses = run_ranks(lora_ranks.go_on, ranks(layout), llama, directory, table, layout, model)
        assert losses == pytest.approx(uninterrupted[4:], rel=1e-5), layout


def test_peft_loads_the_adapter(llama: Path, one_rank: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(
        reference.load(llama), str(one_rank["directory"] / "adapter"), autocast_adapter_dtype=False
    ).double()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found = model(ids).logits
        merged = reference.load(one_rank["directory"] / "model")(ids).logits
        plain = reference.load(llama)(ids).logits
    assert (found - merged).abs().max() < 1e-4
    assert (found - plain).abs().max() > 0.1, "the adapter does something"
