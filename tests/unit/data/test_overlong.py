"""Units longer than a packed row: counted by hand, and said in one line with a remedy."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa

from nemo_spin.data.datasets import Units
from nemo_spin.data.overlong import OverlongRows, RowLimit, training_note
from nemo_spin.data.packing import Layout

PROMPTS, REAL = np.array([10, 50, 80]), np.array([10, 30, 40])
LIMIT = RowLimit("shared_prompt", micro_batch_tokens=100, num_generations=2, max_tokens=20)


def counted(limit: RowLimit) -> OverlongRows:
    rows = OverlongRows(limit)
    rows.add(PROMPTS[:1], REAL[:1])
    rows.add(PROMPTS[1:], REAL[1:])
    return rows


def test_units_by_hand() -> None:
    """Shared: 20, 80, 120 and two answers of 1 to 20; pairs: three prompts in place of one."""
    shared = counted(LIMIT)
    assert (shared.possible, shared.certain, shared.longest) == (2, 1, 160)
    pairs = counted(replace(LIMIT, packing="pairs"))  # 40, 180, 280 and the answers
    assert (pairs.possible, pairs.certain, pairs.longest) == (2, 2, 320)
    alone = counted(replace(LIMIT, num_generations=0))  # plain fine-tuning
    assert (alone.possible, alone.certain, alone.longest) == (1, 1, 120)
    assert counted(replace(LIMIT, micro_batch_tokens=160)).possible == 0
    assert shared.summary() == {"micro_batch_tokens": 100, "possible": 2, "certain": 1, "longest": 160}


def test_the_note_has_counts_and_a_remedy() -> None:
    note = counted(LIMIT).note("train", 3)
    assert note is not None and "\n" not in note
    assert note.startswith("train: 2 of 3 rows may become longer than model.micro_batch_tokens=100 with 2 ")
    assert "(1 whatever the answers)" in note and "up to 160 tokens" in note
    assert "lower generation.max_tokens" in note
    assert counted(replace(LIMIT, micro_batch_tokens=160)).note("train", 3) is None
    plain = counted(replace(LIMIT, num_generations=0)).note("train", 3)
    assert plain is not None and "generation" not in plain and "1 of 3 rows are longer" in plain


def test_training_says_which_units_are_alone() -> None:
    def ids(lengths: list[int]) -> pa.Array:
        return pa.array([[1] * length for length in lengths], pa.list_(pa.int32()))

    table = pa.table({"prompt_ids": ids([4, 30]), "real_ids": ids([3, 20]), "generated_ids": ids([2, 10])})
    layout = Layout("shared_prompt", 59, micro_batch_size=2)
    note = training_note(layout, Units(table))
    assert note is not None and note.startswith("1 of 2 units are longer than model.micro_batch_tokens=59")
    assert "up to 60 tokens" in note
    assert training_note(replace(layout, micro_batch_tokens=60), Units(table)) is None
    pairs = training_note(replace(layout, packing="pairs", micro_batch_tokens=60), Units(table))
    assert pairs is not None and "up to 90 tokens" in pairs
    assert training_note(replace(layout, packing="none"), Units(table)) is None


def test_preparing_needs_no_torch() -> None:
    code = "import sys, nemo_spin.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
