"""What `nemo-spin plan` predicts, against what real Megatron ranks hold and multiply."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from nemo_spin.bridge.families import architecture_of
from nemo_spin.megatron.costs import head_activation_bytes, training_memory, unit_flops
from nemo_spin.megatron.sizes import Numerics, ParallelLayout, Work, shape_of
from tests.distributed import reference
from tests.distributed.harness import run_ranks
from tests.distributed.megatron.held import measure

PROMPT, REAL, GENERATED = 30, 40, 50
UNITS_PER_STEP = 6
WORK = Work(
    prompt=PROMPT,
    real=REAL,
    generated=GENERATED,
    longest_unit=PROMPT + REAL + GENERATED,
    micro_batch_tokens=240,  # two units with shared prompts
    padded_row=PROMPT + GENERATED,
    micro_batch_size=2,
    global_batch_size=UNITS_PER_STEP,
)
PAIRS = replace(WORK, packing="pairs", longest_unit=150, micro_batch_tokens=150)  # one unit


def rows(number: int) -> pa.Table:
    """Units of one length, so that every microbatch is as large as the prediction takes it to be."""
    generator = np.random.default_rng(0)

    def column(size: int) -> pa.Array:
        ids = generator.integers(3, reference.VOCAB_SIZE, (number, size))
        return pa.array(ids.tolist(), reference.IDS)

    table = {"prompt_ids": column(PROMPT), "real_ids": column(REAL), "generated_ids": column(GENERATED)}
    return reference.with_opponent(pa.table(table), reference.torch.zeros(number, 2))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def model(family: str = "llama", **settings: Any) -> Path:
        name = f"{family}-{settings}"
        if name not in made:
            sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, **settings}
            made[name] = reference.make_model(tmp_path_factory.mktemp(family), family, **sizes)
        return made[name]

    return model


pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what is predicted is what the CPU's kernels keep for backward"
)


def compare(
    model_dir: Path, layout: ParallelLayout, work: Work, *, half: bool = False, optimizer: str = "rmsprop"
) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """(measured, predicted) of each rank; one data-parallel rank of each place is predicted."""
    numerics = Numerics(
        bytes_per_number=2 if half else 4,
        optimizer=optimizer,
        vocabulary_multiple=1,
    )
    model = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "sequence_parallel": layout.sequence_parallel,
        "context_parallel_size": layout.context,
        "num_layers_in_first_pipeline_stage": layout.layers[0] if layout.layers else None,
        "recompute_granularity": None if layout.recompute == "none" else layout.recompute,
        "recompute_modules": list(layout.recompute_modules),
        "recompute_method": layout.recompute_method,
        "recompute_num_layers": layout.recompute_num_layers,
        "use_distributed_optimizer": layout.distributed_optimizer,
        "packing": work.packing,
        "micro_batch_tokens": work.micro_batch_tokens,
        "micro_batch_size": work.micro_batch_size,
    }
    shape = shape_of(architecture_of(model_dir))
    size = layout.tensor * layout.pipeline * layout.context * layout.data
    table = rows(work.global_batch_size)
    measured = run_ranks(measure, size, model_dir, table, model, {"name": optimizer}, half)
    result = []
    for rank, found in enumerate(measured):
        stage = rank // (layout.tensor * layout.context * layout.data)
        memory = training_memory(shape, layout, work, numerics, stage=stage)
        predicted = dict(vars(memory))
        if stage == layout.pipeline - 1:
            predicting = work.slots / work.unit_tokens * work.response_tokens
            predicted["activations"] += head_activation_bytes(
                shape, layout, work, numerics, predicting=predicting
            )
        result.append((found, predicted))
    return result


def check_weights(found: dict[str, Any], predicted: dict[str, float]) -> None:
    for part in ("parameters", "gradients", "main_weights", "optimizer_state"):
        assert found[part] == predicted[part], part


LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tensor=2, pipeline=2, sequence_parallel=True),
    ParallelLayout(tensor=2, pipeline=2),
    ParallelLayout(pipeline=2),
]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.tensor}x{layout.pipeline}")
def test_weights_are_predicted_exactly_and_activations_closely(
    models: Any, layout: ParallelLayout, half: bool
) -> None:
    optimizer = "adam" if half else "rmsprop"
    for found, predicted in compare(models(), layout, PAIRS, half=half, optimizer=optimizer):
        check_weights(found, predicted)
        assert predicted["activations"] == pytest.approx(found["activations"], rel=0.03)
        assert found["left"] == 0, "something is kept after the step: the count cannot be right"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4, "intermediate_size": 96}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_other_models(models: Any, family: str, settings: dict[str, Any]) -> None:
    for layout in (ParallelLayout(), ParallelLayout(pipeline=2)):
        for found, predicted in compare(models(family, **settings), layout, PAIRS):
            check_weights(found, predicted)
            assert predicted["activations"] == pytest.approx(found["activations"], rel=0.05)


@pytest.mark.parametrize("packing", ["shared_prompt", "none"])
def test_activations_of_other_packings(models: Any, packing: str) -> None:
    work = replace(WORK, packing=packing)
    for found, predicted in compare(models(), ParallelLayout(), work):
        assert predicted["activations"] == pytest.approx(found["activations"], rel=0.06)


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(recompute="full"),
        ParallelLayout(recompute="full", recompute_num_layers=2),
        ParallelLayout(recompute="selective", recompute_modules=("core_attn", "mlp")),
        ParallelLayout(context=2, recompute="selective"),
    ],
    ids=["layers", "two-layers", "parts", "attention-of-shared-rows"],
)
def test_what_is_computed_again_is_there_in_full_for_a_while(models: Any, layout: ParallelLayout) -> None:
    """By the time something is computed again the head's share is gone; the plan adds it all the same."""
    shape = shape_of(architecture_of(models()))
    numerics = Numerics(bytes_per_number=4, vocabulary_multiple=1)
    head = head_activation_bytes(shape, layout, PAIRS, numerics, predicting=REAL + GENERATED)
    for found, predicted in compare(models(), layout, PAIRS):
        check_weights(found, predicted)
        assert predicted["activations"] - head == pytest.approx(found["activations"], rel=0.05)


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(recompute="full", recompute_method="block", recompute_num_layers=3),
        ParallelLayout(context=2),
        ParallelLayout(pipeline=2, layers=(1, 3)),
    ],
    ids=["block", "context", "uneven"],
)
def test_layers_kept_as_a_whole_and_rows_and_layers_split_otherwise(
    models: Any, layout: ParallelLayout
) -> None:
    """Runs that context parallelism cuts have masks on a CPU, and none on a GPU: they are added here."""
    # Row of 152, its halves and theirs: queries x keys, from the start of their run, of what follows a cut
    masks = (36 * 80, 32 * 70 + 38 * 44) if layout.context == 2 else (0, 0)
    for rank, (found, predicted) in enumerate(compare(models(), layout, PAIRS)):
        check_weights(found, predicted)
        predicted["activations"] += 4 * 4 * masks[rank]  # float32, in each of four layers
        assert predicted["activations"] == pytest.approx(found["activations"], rel=0.05)


def test_the_distributed_optimizer_shares_out_main_weights_and_state(models: Any) -> None:
    layout = ParallelLayout(data=2, distributed_optimizer=True)
    compared = compare(models(), layout, replace(PAIRS, global_batch_size=4), half=True, optimizer="adam")
    for found, predicted in compared:
        assert found["parameters"] == predicted["parameters"]
        # Megatron rounds the size of a buffer up so that all ranks have equal, aligned shares
        assert 0 <= found["gradients"] - predicted["gradients"] < 4 * 2 * 1024
    for part in ("main_weights", "optimizer_state"):
        total = sum(found[part] for found, _ in compared)
        assert total == sum(predicted[part] for _, predicted in compared)
        assert max(found[part] for found, _ in compared) <= predicted[part] + 4 * 2 * 1024


def test_products_of_matrices_are_counted_exactly(models: Any) -> None:
    """PyTorch counts them while they run, but for attention and the head's gradients, added in place."""
    shape = shape_of(architecture_of(models()))
    [(found, _)] = compare(models(), ParallelLayout(), PAIRS)
    flops = unit_flops(shape, PAIRS)
    head = 2 * flops.head  # logits, and logits again
    assert found["flops"]["aten.mm"] == UNITS_PER_STEP * (3 * flops.layers + head)
