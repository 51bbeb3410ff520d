"""What a rank makes of `trainer.accelerator` and of the GPUs that it sees; their number is a stand-in's."""

from __future__ import annotations

import os

import pytest
import torch

from nemo_spin.errors import ConfigError
from nemo_spin.megatron import runtime


def test_the_cpu_hides_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    runtime.choose_accelerator("auto")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    runtime.choose_accelerator("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_gpus_that_are_asked_for_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"trainer\.accelerator: gpu, and(.|\n)*remedy"):
        runtime.choose_accelerator("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runtime.choose_accelerator("gpu")


def test_every_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        runtime._take_gpu()
    assert taken == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"trainer\.devices(.|\n)*local rank 2, and 2 GPUs visible"):
        runtime._take_gpu()
    assert taken == [0, 1]
