from __future__ import annotations

from collections import Counter

from nemo_spin.data.split_counts import percentiles


def test_percentiles_by_hand() -> None:
    assert percentiles(Counter({1: 50, 2: 40, 9: 9, 100: 1})) == {"p50": 1, "p90": 2, "p99": 9, "max": 100}
    assert percentiles(Counter({5: 1})) == {"p50": 5, "p90": 5, "p99": 5, "max": 5}
    assert percentiles(Counter()) == {}
