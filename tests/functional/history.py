"""What the files of a finished run say about the rows that its iterations were trained on."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nemo_spin.data.columns import GENERATED
from nemo_spin.data.files import read_manifest
from nemo_spin.data.pairs import training_rows
from nemo_spin.selfplay.run_directory import RunDirectory
from tests.distributed import reference

_SCORED_ROWS = 48  # so many are computed anew


def assert_trained_on_history(run_dir: Path, *, iterations: int, epochs: int, history: int = 1) -> None:
    """Each iteration has all rows of itself and `history` before it, scored by its own opponent.

    The opponent is the model that the iteration before wrote, its log-probabilities are computed
    anew in float64, and training has seen as many pairs as there are rows.
    """
    run = RunDirectory(run_dir)
    for number in range(iterations):
        here = run.iteration(number)
        rows = training_rows(here.scored, "train")
        answers = pa.concat_tables(
            pq.read_table(path, partitioning=None)
            for earlier in range(max(0, number - history), number + 1)
            for path in sorted(run.iteration(earlier).generated.glob("train-*.parquet"))
        ).sort_by([(name, "ascending") for name in ("iteration", "id", "sample")])  # as they are trained on
        assert answers.num_rows > 0 and rows.select(GENERATED.names).cast(GENERATED).equals(answers)
        if number:
            weights = run.iteration(number - 1).model / "model.safetensors"
            assert (here.opponent / weights.name).read_bytes() == weights.read_bytes()
        chosen = rows.take(list(range(0, rows.num_rows, -(-rows.num_rows // _SCORED_ROWS))))
        with torch.no_grad():
            expected = reference.logps(reference.load(here.opponent), chosen)
        for column, name in enumerate(("opponent_real_logps", "opponent_generated_logps")):
            found = torch.tensor(chosen[name].to_pylist(), dtype=torch.float64)
            torch.testing.assert_close(found, expected[:, column], rtol=1e-5, atol=1e-4)
        trained = read_manifest(here.train)
        assert trained is not None
        pairs = zip(rows["real_ids"].to_pylist(), rows["generated_ids"].to_pylist(), strict=True)
        different = sum(real != answer for real, answer in pairs)
        assert trained.counts["pairs"] == epochs * different > 0
