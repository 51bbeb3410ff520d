from __future__ import annotations

from pathlib import Path

import pytest

from nemo_spin.errors import ConfigError
from nemo_spin.generation import placement
from nemo_spin.generation.placement import on_this_machine


def devices(replicas: int, size: int) -> list[str | None]:
    place = on_this_machine(replicas=replicas, tensor_parallel_size=size)
    return [place(index).environment.get("CUDA_VISIBLE_DEVICES") for index in range(replicas)]


def test_each_sampler_has_devices_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7, 5,GPU-8932f937,1")
    assert devices(2, 2) == ["7,5", "GPU-8932f937,1"]
    assert devices(3, 1) == ["7", "5", "GPU-8932f937"]
    assert devices(1, 2) == [None], "one alone sees what we see"
    with pytest.raises(ConfigError, match=r"(?s)3 x .* 2, and 4 GPUs.*set it to 2"):
        devices(3, 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for name in ("0000:0f:00.0", "0000:11:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(placement, "_NVIDIA", tmp_path)
    assert devices(2, 1) == ["0", "1"]
    monkeypatch.setattr(placement, "_NVIDIA", tmp_path / "none")
    assert devices(2, 1) == [None, None], "without a GPU there is nothing to share out"
    assert on_this_machine(replicas=2, tensor_parallel_size=1)(1).neighbours == 2
