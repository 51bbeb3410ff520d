from __future__ import annotations

from nemo_spin.data.overlap import PromptOverlap, prompt_hashes
from nemo_spin.data.worth_knowing import overlap_note


def count(train: list[str], heldout: list[str]) -> int:
    overlap = PromptOverlap()
    for split, texts in (("train", train), ("heldout", heldout)):
        for text in texts:  # a piece each
            overlap.add(split, prompt_hashes([text]))
    return overlap.count()


def test_held_out_rows_are_counted() -> None:
    assert count(["a", "b", "b", "Ü"], ["b", "c", "Ü", "b", "zz"]) == 3
    assert count(["a"], ["b"]) == count([], ["b"]) == count(["a"], []) == count([], []) == 0
    train = [f"prompt {number}" for number in range(1000)]
    assert count(train, [*train[500:], *(f"prompt {number}" for number in range(1000, 1700))]) == 500


def test_said_where_there_are_some() -> None:
    found = overlap_note({"train": {"rows": 9}, "heldout": {"rows": 4000, "also_in_train": 1234}})
    assert found is not None and found.startswith("heldout: 1,234 of 4,000 prompts are in data.train too")
    assert overlap_note({"heldout": {"rows": 4, "also_in_train": 0}}) is None
    assert overlap_note({"train": {"rows": 9}}) is None
    assert overlap_note({"heldout": {"rows": 4}}) is None  # prepared by an older version
