from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nemo_spin.generation.seeds import request_seed

_WHOLE = st.integers(0, 2**31)
_IDENTITY = st.tuples(_WHOLE, _WHOLE, st.text(), _WHOLE)


@given(st.lists(_IDENTITY, unique=True, min_size=2, max_size=20))
def test_different_requests_have_different_seeds(identities: list[tuple[int, int, str, int]]) -> None:
    assert len({request_seed(*identity) for identity in identities}) == len(identities)


@given(_IDENTITY)
def test_a_seed_has_63_bits(identity: tuple[int, int, str, int]) -> None:
    assert 0 <= request_seed(*identity) < 2**63


def test_a_seed_never_changes() -> None:
    # sha256 of "1234\x1f0\x1f0\x1frow-1", its first 8 bytes little-endian, halved
    assert request_seed(1234, 0, "row-1", 0) == 0x56F36B9F10F12702 >> 1
