from __future__ import annotations

import pytest

from nemo_spin.selfplay.doctor import collectives


def test_ranks_that_hang_are_an_error() -> None:
    (found,) = collectives.examine_collectives(timeout_s=0.05)
    assert found.status == "error"
    assert "did not finish within 0 s" in found.text


def test_a_rank_that_fails_is_named_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "_MODULE", "nemo_spin.no_such_module")
    (found,) = collectives.examine_collectives()
    assert found.status == "error"
    assert found.text.startswith("rank 0 ended with 1: ")
    assert "no_such_module" in found.text
