from __future__ import annotations

from pathlib import Path

import pytest

from nemo_spin.errors import GenerationError
from nemo_spin.generation import capacity
from nemo_spin.generation.capacity import kv_cache_bytes, memory_bytes

GIB = 2**30


def _bytes(**overrides: object) -> int:
    # The quickstart's model: 4 layers x 2 key/value heads x 32 channels x (key and value)
    settings = {"dtype": "float32", "kv_numbers_per_token": 512, "max_model_len": 100, "max_num_seqs": 256}
    return kv_cache_bytes(**{**settings, "memory_bytes": 16 * GIB, **overrides})  # type: ignore[arg-type]


def test_all_answers_fit() -> None:
    # one block of 128 tokens for each answer, two to spare; 512 numbers of 4 bytes for a token
    assert _bytes() == (256 + 2) * 128 * 512 * 4
    assert _bytes(max_model_len=129) == (512 + 2) * 128 * 512 * 4
    assert _bytes(dtype="bfloat16") == (256 + 2) * 128 * 512 * 2


def test_a_quarter_of_the_machine_is_the_most() -> None:
    # Llama-3-8B at 4,096 tokens: 2 x 32 x 8 x 128 numbers for a token
    assert _bytes(kv_numbers_per_token=65536, max_model_len=4096) == 4 * GIB


def test_less_than_one_answer_is_refused() -> None:
    with pytest.raises(GenerationError, match=r"(?s)kv_cache_gib.*1\.00 GiB"):
        _bytes(kv_numbers_per_token=65536, max_model_len=16384, memory_bytes=4 * GIB)


def test_the_memory_of_this_machine_is_known() -> None:
    assert memory_bytes() > 2**28


@pytest.mark.parametrize(("limit", "expected"), [("1048576\n", 1048576), ("max\n", None), (str(2**62), None)])
def test_a_container_may_have_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int | None
) -> None:
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(capacity, "_CONTAINER_LIMIT", tmp_path / "nowhere")
    machine = memory_bytes()
    monkeypatch.setattr(capacity, "_CONTAINER_LIMIT", tmp_path / "memory.max")
    assert memory_bytes() == (expected or machine)
