"""Which process is kept, and when it has to go; processes are stand-ins that count what befalls them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_spin.generation import keeper as keepers
from nemo_spin.generation.keeper import EngineKeeper
from nemo_spin.generation.process import Interpreter
from nemo_spin.generation.request import EngineSettings
from nemo_spin.generation.status import Opened

SETTINGS = EngineSettings("vllm", "/theta_0", "float32", 1, 64, 256, None, 512, 300, "a")
OTHER_WEIGHTS = replace(SETTINGS, model_dir="/theta_1", model_sha256="b")
OPENED = Opened("started", 9.0, "cpu", True)
MEMORY = 8 << 30


class Process:
    def __init__(self, resident: int | None = 1 << 30) -> None:
        self.interpreter = Interpreter("/bin/python", "/somewhere")
        self.stopped = False
        self.resident = resident

    def poll(self) -> int | None:
        return None

    def stop(self) -> None:
        self.stopped = True

    def resident_bytes(self) -> int | None:
        return self.resident


def put(process: Process, *, mode: str = "auto", opened: Opened = OPENED, **settings: Any) -> EngineKeeper:
    keeper = EngineKeeper()
    keeper.put(process, settings=replace(SETTINGS, **settings), opened=opened, mode=mode)  # type: ignore[arg-type]
    return keeper


def test_an_engine_serves_the_same_weights_and_others() -> None:
    for wanted in (SETTINGS, OTHER_WEIGHTS):
        process = Process()
        assert put(process).take(wanted, "/bin/python") is process
        assert not process.stopped


def test_an_engine_for_adapters_serves_others_beside_the_same_model_only() -> None:
    process, settings = Process(), {"max_adapter_rank": 16, "adapter_modules": ("q_proj",)}
    another = replace(SETTINGS, **settings, adapter_dir="/adapter_1", model_sha256="b")
    assert put(process, **settings).take(another, "/bin/python") is process
    assert put(process, **settings).take(replace(another, model_dir="/theta_1"), "/bin/python") is None
    assert process.stopped


@pytest.mark.parametrize(
    ("wanted", "python"),
    [
        (replace(OTHER_WEIGHTS, max_model_len=65), "/bin/python"),
        (replace(SETTINGS, dtype="bfloat16"), "/bin/python"),
        (SETTINGS, "/bin/other"),
    ],
)
def test_an_engine_with_other_settings_is_ended(wanted: EngineSettings, python: str) -> None:
    process = Process()
    assert put(process).take(wanted, python) is None
    assert process.stopped


def test_one_that_takes_no_other_weights_serves_its_own() -> None:
    stubborn = replace(OPENED, can_refresh=False)
    process = Process()
    assert put(process, opened=stubborn).take(SETTINGS, "/bin/python") is process
    assert put(process, opened=stubborn).take(OTHER_WEIGHTS, "/bin/python") is None
    assert process.stopped


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({}, True),
        ({"mode": "always", "opened": replace(OPENED, device="cuda")}, True),
        ({"opened": replace(OPENED, device="cuda")}, False),
        ({"opened": replace(OPENED, can_refresh=False)}, False),
        ({"tensor_parallel_size": 2}, False),
    ],
)
def test_before_training_an_engine_goes_unless_it_is_in_nobody_s_way(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], stays: bool
) -> None:
    monkeypatch.setattr(keepers, "memory_bytes", lambda: MEMORY)
    process = Process()
    put(process, **changes).make_room()
    assert process.stopped is not stays


@pytest.mark.parametrize(
    ("resident", "stays"), [(MEMORY // 4, True), (MEMORY // 4 + 1, False), (None, False)]
)
def test_before_training_an_engine_goes_that_holds_much_memory(
    monkeypatch: pytest.MonkeyPatch, resident: int | None, stays: bool
) -> None:
    monkeypatch.setattr(keepers, "memory_bytes", lambda: MEMORY)
    process = Process(resident)
    put(process).make_room()
    assert process.stopped is not stays


def test_never_keeps_none_and_another_one_takes_the_place_of_the_first() -> None:
    assert not EngineKeeper().put(Process(), settings=SETTINGS, opened=OPENED, mode="never")  # type: ignore[arg-type]
    first, second = Process(), Process()
    keeper = put(first)
    keeper.put(second, settings=SETTINGS, opened=OPENED, mode="auto")  # type: ignore[arg-type]
    assert (first.stopped, second.stopped) == (True, False)
    keeper.close()
    keeper.close()
    assert second.stopped
