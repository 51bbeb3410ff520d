"""The whole loop with its real parts: Megatron trains, vLLM answers, and anything is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_spin.data.files import read_manifest
from tests.functional.commands import VLLM_PYTHON, nemo_spin, start, write_config
from tests.functional.conftest import TinyData

STAGES = ("prepare", "generate", "score", "train", "export", "evaluate")
RESULTS = ("data", "iter_00/generated", "iter_00/scored", "iter_00/model", "iter_00/evaluation")


@pytest.fixture(scope="module")
def config(tiny_model: Path, tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One iteration over few pairs, with a checkpoint after every optimizer step."""
    return write_config(
        tmp_path_factory.mktemp("loop") / "tiny.yaml",
        {
            "model": {"path": str(tiny_model), "micro_batch_size": 4, "global_batch_size": 8},
            "spin": {"iterations": 1, "lr": 1e-4, "epochs": 1},
            "data": {
                "train": str(tiny_data.train),
                "heldout": str(tiny_data.heldout),
                "max_prompt_length": 64,
                "max_response_length": 32,
                "num_workers": 1,
            },
            "generation": {"python": VLLM_PYTHON, "max_tokens": 16, "shard_rows": 8},
            "trainer": {"save_interval": 1},
            "evaluation": {"num_prompts": 4},
        },
    )


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """The run directory of an undisturbed run. Do not write into it."""
    run_dir = config.parent / "undisturbed"
    result = nemo_spin("run", "--config", str(config), f"run_dir={run_dir}")
    assert result.returncode == 0, result.stderr + result.stdout
    return run_dir


def hashes(run_dir: Path) -> dict[str, str]:
    found = {}
    for name in RESULTS:
        manifest = read_manifest(run_dir / name)
        assert manifest is not None, f"{name} is not done"
        found |= {f"{name}/{file}": entry["sha256"] for file, entry in manifest.files.items()}
    return found


def processes_of(run_dir: Path) -> list[str]:
    """Command lines of processes that work on `run_dir`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if str(run_dir) in command and state not in "ZX" and int(entry.name) != os.getpid():
            found.append(command)
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.05)


def current_stage(run_dir: Path) -> str | None:
    """The stage that runs, apart from the evaluation of theta_0."""
    try:
        state = json.loads((run_dir / "state.json").read_text())
    except (OSError, ValueError):
        return None
    if state["status"] != "running" or (state["stage"] == "evaluate" and state["iteration"] is None):
        return None
    return str(state["stage"])


def wait_until_stage_runs(command: subprocess.Popen[str], run_dir: Path, stage: str) -> None:
    wait_for(lambda: current_stage(run_dir) == stage or command.poll() is not None, 300, f"{stage} begins")
    assert command.poll() is None, command.communicate()


def test_everything_is_there_and_done_again_within_seconds(config: Path, finished: Path) -> None:
    for name in ("config.yaml", "state.json", "iter_00/evaluation.json", "iter_00/metrics.jsonl"):
        assert (finished / name).stat().st_size > 0
    steps = [json.loads(line) for line in (finished / "iter_00" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["split"] == "train"] == list(range(6))
    before = hashes(finished)
    began = time.monotonic()
    again = nemo_spin("run", "--config", str(config), f"run_dir={finished}")
    assert time.monotonic() - began < 15
    assert again.returncode == 0
    assert "theta_1" in again.stdout
    assert hashes(finished) == before


def test_status_of_a_finished_run(finished: Path) -> None:
    status = nemo_spin("status", str(finished))
    assert status.returncode == 0
    assert status.stdout.startswith(f"{finished}: done\n")
    assert "train done (" in status.stdout


def test_another_configuration_is_refused(config: Path, finished: Path) -> None:
    result = nemo_spin("run", "--config", str(config), f"run_dir={finished}", "spin.beta=1.0")
    assert result.returncode == 2
    assert "spin.beta: was 0.1, is 1.0  (train of iteration 0)" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) < 10


def test_a_damaged_shard_is_refused(config: Path, finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, symlinks=True)
    shard = next((run_dir / "iter_00" / "scored").glob("train-*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    result = nemo_spin("run", "--config", str(config), f"run_dir={run_dir}")
    assert result.returncode == 2
    assert f"{shard}: has sha256" in result.stderr
    assert "Traceback" not in result.stderr


def test_killed_in_every_stage_it_ends_with_the_same_bytes(config: Path, finished: Path) -> None:
    run_dir = config.parent / "killed"
    chance = random.Random(20240101)
    took = json.loads((finished / "state.json").read_text())["stages"]
    for stage in STAGES:
        entry = took[stage if stage == "prepare" else f"iter_00/{stage}"]
        command = start("run", "--config", str(config), f"run_dir={run_dir}")
        wait_until_stage_runs(command, run_dir, stage)
        time.sleep(chance.uniform(0.1, 0.9) * entry["seconds"])
        command.kill()
        command.communicate()
        wait_for(lambda: not processes_of(run_dir), 10, f"the processes of {stage} end with the command")
        status = nemo_spin("status", str(run_dir))
        assert "interrupted in" in status.stdout.splitlines()[0], status.stdout
    result = nemo_spin("run", "--config", str(config), f"run_dir={run_dir}")
    assert result.returncode == 0, result.stderr + result.stdout
    assert hashes(run_dir) == hashes(finished)
    state = json.loads((run_dir / "state.json").read_text())
    assert sum(entry["attempts"] for entry in state["stages"].values()) >= len(state["stages"]) + len(STAGES)
    stages = {path.name for path in run_dir.rglob("*.partial")}
    assert not stages, "what killed writers left behind is removed"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_ends_the_children(
    config: Path, finished: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, symlinks=True)
    for name in ("scored", "train", "model", "evaluation"):
        shutil.rmtree(run_dir / "iter_00" / name)
    command = start("run", "--config", str(config), f"run_dir={run_dir}")
    wait_for(lambda: len(processes_of(run_dir)) > 1, 120, "the ranks start")
    time.sleep(1)
    began = time.monotonic()
    command.send_signal(number)
    _, errors = command.communicate(timeout=30)
    assert command.returncode == code
    assert time.monotonic() - began < 12
    assert "Traceback" not in errors
    assert processes_of(run_dir) == []
    status = nemo_spin("status", str(run_dir)).stdout
    assert status.startswith(f"{run_dir}: interrupted in score of iteration 0")
    assert not (run_dir / "run.lock").exists()


def test_a_second_command_is_refused(config: Path, finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, symlinks=True)
    shutil.rmtree(run_dir / "iter_00" / "scored")
    command = start("run", "--config", str(config), f"run_dir={run_dir}")
    try:
        wait_until_stage_runs(command, run_dir, "score")
        second = nemo_spin("run", "--config", str(config), f"run_dir={run_dir}")
        assert second.returncode == 2
        assert f"is held by process {command.pid} on" in second.stderr
        assert "running score of iteration 0" in nemo_spin("status", str(run_dir)).stdout
    finally:
        command.terminate()
        command.communicate(timeout=30)


def test_fine_tuning_gives_a_model_to_start_from(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "sft"
    result = nemo_spin("sft", "--config", str(config), f"sft.output={output}", "sft.max_steps=2")
    assert result.returncode == 0, result.stderr + result.stdout
    assert "sft: 2 steps" in result.stdout
    assert (output / "model" / "model.safetensors").exists()
    again = nemo_spin("sft", "--config", str(config), f"sft.output={output}", "sft.max_steps=2")
    assert again.returncode == 0
    assert "sft" not in again.stdout
