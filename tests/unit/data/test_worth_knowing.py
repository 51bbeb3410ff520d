from __future__ import annotations

from collections import Counter

import pytest

from nemo_spin.data.split_counts import percentiles
from nemo_spin.data.worth_knowing import length_note, overlap_note


def test_prompts_in_both_splits() -> None:
    found = overlap_note({"train": {"rows": 9}, "heldout": {"rows": 4000, "also_in_train": 1234}})
    assert found is not None and found.startswith("heldout: 1,234 of 4,000 prompts are in data.train too")
    assert overlap_note({"heldout": {"rows": 4, "also_in_train": 0}}) is None
    assert overlap_note({"train": {"rows": 9}}) is None
    assert overlap_note({"heldout": {"rows": 4}}) is None  # prepared by an older version


@pytest.mark.parametrize(
    ("longer", "words"),
    [(0, None), (10, None), (11, "more than a tenth"), (50, "a tenth"), (51, "more than half")],
)
def test_demonstrations_longer_than_an_answer_may_be(longer: int, words: str | None) -> None:
    lengths = Counter({256: 100 - longer, 700: longer})
    found = length_note({"train": {"real_length": percentiles(lengths)}}, max_tokens=256)
    assert (found is None) == (words is None)
    if found is not None and words is not None:
        assert words in found and "longest 700" in found
    assert length_note({"train": {"real_length": percentiles(lengths)}}, max_tokens=700) is None


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert length_note({}, max_tokens=1) is length_note({"train": {"real_length": {}}}, max_tokens=1) is None
