"""Context parallelism on real gloo ranks: scores, loss and gradients of `transformers` in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.megatron.test_engine import PACKINGS, check_scores, check_step, llama, step

__all__ = ["llama", "step"]  # fixtures

# tensor, pipeline, data parallel, sequence parallel; with two context-parallel ranks
LAYOUTS = [(1, 1, 1, False), (2, 1, 1, True), (1, 2, 1, False), (1, 1, 2, False)]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_that_share_a_row_compute_what_one_does(
    llama: Path, step: dict[str, Any], tmp_path: Path, layout: tuple[int, int, int, bool], packing: str
) -> None:
    model = {"packing": packing, "context_parallel_size": 2}
    check_step(step, llama, tmp_path / "gradients", layout, **model)
    if layout == (1, 1, 1, False):
        check_scores(llama, layout, **model)
