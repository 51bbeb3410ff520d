from __future__ import annotations

from nemo_spin.data.overlap import PromptOverlap, prompt_hashes


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
