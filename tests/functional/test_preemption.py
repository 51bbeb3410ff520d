"""Signals and kills in the middle of a training, for real: what is saved, and where it goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_spin.data.files import sha256_file
from tests.functional.commands import nemo_spin, start, write_config
from tests.functional.conftest import TinyData

STEPS = 150


@pytest.fixture(scope="module")
def config(tiny_model: Path, tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuning over two data-parallel ranks, which saves at the end only."""
    return write_config(
        tmp_path_factory.mktemp("preemption") / "tiny.yaml",
        {
            "model": {"path": str(tiny_model), "global_batch_size": 4},
            "sft": {"epochs": 50, "max_steps": STEPS, "lr": 1e-4},
            "data": {
                "train": str(tiny_data.train),
                "max_prompt_length": 64,
                "max_response_length": 32,
                "num_workers": 1,
            },
            "trainer": {"devices": 2, "save_interval": None},
            "exp_manager": {"create_tensorboard_logger": False},
        },
    )


def arguments(config: Path, output: Path, *more: str) -> list[str]:
    return ["sft", "--config", str(config), f"sft.output={output}", *more]


def model_sha256(output: Path) -> str:
    return sha256_file(output / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> str:
    """The sha256 of the weights of a training that nothing disturbs."""
    output = config.parent / "undisturbed"
    result = nemo_spin(*arguments(config, output))
    assert result.returncode == 0, result.stderr + result.stdout
    return model_sha256(output)


def steps_done(output: Path) -> int:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum('"train"' in line for line in lines)


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "train" / "checkpoints").glob("step-*"))


def wait(command: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def rank_of(command: subprocess.Popen[str], number: int) -> int:
    """The process of a rank, among the children of the command."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            names = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(parent) == command.pid and f"RANK={number}".encode() in names:
            return int(entry.name)
    raise AssertionError(f"rank {number} is not there")


def signalled(
    config: Path, output: Path, *, at_step: int, send: Callable[[subprocess.Popen[str]], None]
) -> str:
    """Starts the command, signals it in the middle of the training, and returns what it said at its end."""
    command = start(*arguments(config, output))
    try:
        wait(command, lambda: steps_done(output) >= at_step)
        send(command)
        _, errors = command.communicate(timeout=90)
    finally:
        command.kill()
    assert command.returncode == 75, errors
    assert "Traceback" not in errors
    state = json.loads((output / "state.json").read_text())
    assert state["status"] == "interrupted" and state["stages"]["sft"]["status"] == "interrupted"
    return errors


def twice(command: subprocess.Popen[str]) -> None:
    """As by a scheduler that asks again while the training saves."""
    command.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    command.send_signal(signal.SIGUSR1)


@pytest.fixture(scope="module")
def left(config: Path) -> tuple[Path, str]:
    """A training that was told to leave in its middle, and what it said. Do not write into it."""
    output = config.parent / "left"
    return output, signalled(config, output, at_step=5, send=twice)


def test_a_training_told_to_leave_saves_the_step_it_has_made(left: tuple[Path, str]) -> None:
    output, errors = left
    (saved,) = checkpoints(output)
    assert f"saved after step {int(saved[-8:])} of {STEPS}; the same command goes on from there" in errors
    assert 5 <= int(saved[-8:]) == steps_done(output) < STEPS


@pytest.mark.slow
def test_it_goes_on_however_often_it_is_told_to_leave(
    config: Path, left: tuple[Path, str], undisturbed: str
) -> None:
    """This time one of the ranks is told, and all follow."""
    output = config.parent / "told_again"
    shutil.copytree(left[0], output, symlinks=True)
    at_step = steps_done(output) + 5
    signalled(
        config, output, at_step=at_step, send=lambda command: os.kill(rank_of(command, 1), signal.SIGUSR1)
    )
    assert at_step <= int(checkpoints(output)[-1][-8:]) < STEPS
    result = nemo_spin(*arguments(config, output))
    assert result.returncode == 0, result.stderr + result.stdout
    assert f"resuming from {checkpoints(output)[-2]}" in result.stdout + result.stderr
    assert model_sha256(output) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("in_background", ["false", "true"])
def test_killed_in_the_middle_of_saving_it_goes_on_from_the_save_before(
    config: Path, undisturbed: str, in_background: str
) -> None:
    output = config.parent / f"killed_{in_background}"
    saving = arguments(config, output, "trainer.save_interval=5", f"trainer.async_save={in_background}")
    command = start(*saving)
    unfinished = ".partial"

    def saves_once_more() -> bool:
        names = checkpoints(output)
        return len(names) > 1 and names[-1].endswith(unfinished)

    try:
        wait(command, saves_once_more)
    finally:
        command.kill()
        command.communicate()
    time.sleep(1)  # the ranks are killed by the kernel when it tells them
    *whole, cut_short = checkpoints(output)
    assert cut_short.endswith(unfinished) and not whole[-1].endswith(unfinished)
    result = nemo_spin(*saving)
    assert result.returncode == 0, result.stderr + result.stdout
    assert f"resuming from {whole[-1]}" in result.stdout + result.stderr
    assert not list((output / "train" / "checkpoints").glob(f"*{unfinished}"))
    assert model_sha256(output) == undisturbed
