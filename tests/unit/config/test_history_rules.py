"""What `spin.mixture` may be."""

from __future__ import annotations

import pytest

from tests.unit.config.test_validate import accepted, refused


@pytest.mark.parametrize(
    ("mixture", "history"), [("null", 3), ("[1.0]", 0), ("[1.0,0.5]", 1), ("[50000,0]", 1)]
)
def test_allowed(mixture: str, history: int) -> None:
    accepted(f"spin.mixture={mixture}", f"spin.history={history}")


@pytest.mark.parametrize(
    ("mixture", "history", "found"),
    [
        ("[1.0]", 1, "has 1 values, with spin.history 1"),
        ("[1.0,1.5]", 1, "has 1.5, neither a share nor a count"),
        ("[0,1.0]", 1, "leaves out an iteration's own answers"),
        ("[1.0,-1]", 1, "must be a number of at least 0"),
    ],
)
def test_refused(mixture: str, history: int, found: str) -> None:
    text = refused(f"spin.mixture={mixture}", f"spin.history={history}")
    assert "spin.mixture" in text and found in text
