"""More prompt tokens at once than vLLM computes in one step."""

from __future__ import annotations

from pathlib import Path

from tests import prepared
from tests.functional.generation.harness import Stage, configuration


def test_prompts_that_do_not_fit_into_one_step_are_answered(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {**row, "prompt_ids": (list(row["prompt_ids"]) * 64)[:64]}  # type: ignore[call-overload]
        for row in prepared.rows(160, seed=3)
    ]
    data = prepared.write(tmp_path / "data", train=rows)
    config = configuration(num_generations=1, shard_rows=160, max_num_seqs=256, max_tokens=4)
    stage = Stage(tiny_model, data, tmp_path / "run", config=config)
    stage.run()
    assert 160 * 64 > 8192, "the test needs more tokens than a step takes"
    assert stage.table().num_rows == 160
