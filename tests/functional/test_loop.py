"""The whole loop with its real parts: Megatron trains, vLLM answers, and anything is killed."""

from __future__ import annotations

import contextlib
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

from nemo_spin.data.files import read_manifest, verify_manifest
from tests.functional.commands import VLLM_PYTHON, nemo_spin, start, write_config
from tests.functional.conftest import TinyData

STAGES = {
    "prepare": "data",
    "generate": "iter_00/generated",
    "score": "iter_00/scored",
    "train": "iter_00/train",
    "export": "iter_00/model",
    "evaluate": "iter_00/evaluation",
}


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
    for stage, name in STAGES.items():
        if stage == "train":  # checkpoints hold times and versions; the export holds their weights
            continue
        manifest = read_manifest(run_dir / name)
        assert manifest is not None, f"{name} is not done"
        found |= {f"{name}/{file}": entry["sha256"] for file, entry in manifest.files.items()}
    return found


def descendants(pid: int) -> list[tuple[int, int]]:
    """The processes that `pid` started, directly or not: number and time of start."""
    parents: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            _, *fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            parents[int(entry.name)] = int(fields[0]), int(fields[18])
    found = [pid]
    for parent in found:  # grows while it is walked over
        found += [child for child, (its_parent, _) in parents.items() if its_parent == parent]
    return [(child, parents[child][1]) for child in found[1:]]


def commandline(pid: int) -> bytes:
    """The words a process was started with."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_running(process: tuple[int, int]) -> bool:
    """Whether the very process of `descendants` is alive."""
    try:
        state, *fields = (
            Path(f"/proc/{process[0]}/stat").read_text(errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return False
    return state not in "ZX" and int(fields[18]) == process[1]


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


def test_everything_is_there_and_done_again_within_seconds(
    config: Path, finished: Path, tiny_model: Path
) -> None:
    for name in ("config.yaml", "state.json", "iter_00/evaluation.json", "iter_00/metrics.jsonl"):
        assert (finished / name).stat().st_size > 0
    steps = [json.loads(line) for line in (finished / "iter_00" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["split"] == "train"] == list(range(6))
    exported = finished / "iter_00" / "model"
    manifest = read_manifest(exported)
    assert manifest is not None
    verify_manifest(exported, manifest)
    assert {path.name for path in exported.iterdir()} == {*manifest.files, "manifest.json"}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= manifest.files.keys()
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (exported / name).read_bytes() == (tiny_model / name).read_bytes()
    card = (exported / "README.md").read_text()
    for line in (
        "iteration | 0",
        "spin.beta | 0.1",
        "generation.max_tokens | 16",
        "steps | 6",
        "train rows | 48",
    ):
        assert f"| {line} |" in card
    assert "| heldout_margin |" in card
    assert str(config.parent) not in card
    before = hashes(finished)
    began = time.monotonic()
    again = nemo_spin("run", "--config", str(config), f"run_dir={finished}")
    assert time.monotonic() - began < 60
    assert again.returncode == 0
    assert "theta_1" in again.stdout
    assert hashes(finished) == before


def test_one_engine_answers_in_all_stages_and_megatron_agrees_with_it(finished: Path) -> None:
    """theta_0 is evaluated and answers, theta_1 is evaluated; how is in the manifests and the metrics."""
    stages = ("opponent_evaluation", "generated", "evaluation")
    manifests = [read_manifest(finished / "iter_00" / stage) for stage in stages]
    engines = [manifest.notes["engine"] for manifest in manifests if manifest is not None]
    assert [engine["way"] for engine in engines] == ["started", "kept", "refreshed"]
    assert engines[2]["seconds"] < engines[0]["seconds"] / 3
    canary = json.loads((finished / "iter_00" / "canary.json").read_text())
    assert len(canary["texts"]) == engines[2]["canary_texts"] == 8
    assert engines[2]["canary_difference"] < 1e-4
    lines = [json.loads(line) for line in (finished / "iter_00" / "metrics.jsonl").read_text().splitlines()]
    told = [(line["stage"], line["way"], line["step"]) for line in lines if line["split"] == "engine"]
    assert told == [("evaluate", "started", -1), ("generate", "kept", -1), ("evaluate", "refreshed", 5)]


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


def kill_in(stage: str, config: Path, run_dir: Path, *, delay_s: float) -> None:
    """Starts the command and kills it `delay_s` after the stage began (sooner, if it ends sooner)."""
    for attempt in range(4):
        command = start("run", "--config", str(config), f"run_dir={run_dir}")
        wait_until_stage_runs(command, run_dir, stage)
        time.sleep(delay_s / 2**attempt)
        children = descendants(command.pid)
        command.kill()
        command.communicate()
        wait_for(lambda: not any(map(is_running, children)), 10, f"what {stage} started ends")  # noqa: B023
        if current_stage(run_dir) == stage:
            return
        for name in list(STAGES)[list(STAGES).index(stage) :]:  # it was over: once more, and sooner
            shutil.rmtree(run_dir / STAGES[name], ignore_errors=True)
    raise AssertionError(f"{stage} was always over")


def test_killed_in_every_stage_it_ends_with_the_same_bytes(config: Path, finished: Path) -> None:
    run_dir = config.parent / "killed"
    chance = random.Random(20240101)
    took = json.loads((finished / "state.json").read_text())["stages"]
    for stage in STAGES:
        seconds = took[stage if stage == "prepare" else f"iter_00/{stage}"]["seconds"]
        kill_in(stage, config, run_dir, delay_s=chance.uniform(0.1, 0.9) * seconds)
        status = nemo_spin("status", str(run_dir))
        assert f"interrupted in {stage}" in status.stdout.splitlines()[0], status.stdout
    result = nemo_spin("run", "--config", str(config), f"run_dir={run_dir}")
    assert result.returncode == 0, result.stderr + result.stdout
    assert hashes(run_dir) == hashes(finished)
    stages = json.loads((run_dir / "state.json").read_text())["stages"]
    assert {entry["status"] for entry in stages.values()} == {"done"}
    assert not list(run_dir.rglob("*.partial")), "what killed writers left behind is removed"


@pytest.mark.parametrize(
    ("stage", "number", "code"),
    [("score", signal.SIGINT, 130), ("generate", signal.SIGUSR1, 75), ("export", signal.SIGTERM, 75)],
)
def test_a_stop_ends_the_children(
    config: Path, finished: Path, tmp_path: Path, *, stage: str, number: signal.Signals, code: int
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, symlinks=True)
    for name in list(STAGES)[list(STAGES).index(stage) :]:
        shutil.rmtree(run_dir / STAGES[name])
    command = start("run", "--config", str(config), f"run_dir={run_dir}")
    wait_until_stage_runs(command, run_dir, stage)
    wait_for(lambda: bool(descendants(command.pid)), 60, f"{stage} starts processes")
    time.sleep(3)
    children = descendants(command.pid)
    command.send_signal(number)
    _, errors = command.communicate(timeout=30)
    assert command.returncode == code, errors
    assert "Traceback" not in errors
    assert not any(map(is_running, children))
    status = nemo_spin("status", str(run_dir)).stdout
    assert status.startswith(f"{run_dir}: interrupted in {stage} of iteration 0")
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


@pytest.mark.slow
def test_a_rank_that_hangs_is_ended_and_the_stage_done_again(
    config: Path, finished: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, symlinks=True)
    shutil.rmtree(run_dir / "iter_00" / "scored")
    settings = ["launcher.hang_timeout_s=20", "launcher.backoff_s=0.5"]
    command = start("score", "--config", str(config), f"run_dir={run_dir}", *settings)
    alive = run_dir / "iter_00" / "logs" / "score.progress.jsonl.rank-00000.alive"
    wait_for(lambda: alive.exists() and "loading" in alive.read_text(), 120, "the rank loads its model")
    ranks = [pid for pid, _ in descendants(command.pid) if b"launch.rank" in commandline(pid)]
    os.kill(ranks[0], signal.SIGSTOP)
    out, errors = command.communicate(timeout=300)
    assert command.returncode == 0, out + errors
    assert 'rank 0 in "loading the opponent" gave no sign of life for 20 s' in out
    assert "score of iteration 0 failed (ranks hung): attempt 2 of 3 in 0.5 s" in out
    assert hashes(run_dir) == hashes(finished)
    assert json.loads((run_dir / "state.json").read_text())["stages"]["iter_00/score"]["attempts"] == 3


def test_fine_tuning_gives_a_model_to_start_from(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "sft"
    result = nemo_spin("sft", "--config", str(config), f"sft.output={output}", "sft.max_steps=2")
    assert result.returncode == 0, result.stderr + result.stdout
    assert "sft: 2 steps" in result.stdout
    assert (output / "model" / "model.safetensors").exists()
    again = nemo_spin("sft", "--config", str(config), f"sft.output={output}", "sft.max_steps=2")
    assert again.returncode == 0
    assert "sft" not in again.stdout


def test_a_full_disk_stops_it_and_room_lets_it_go_on(config: Path, finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "small disk"
    run_dir.mkdir()
    used = sum(path.stat().st_size for path in finished.rglob("*") if path.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={used // 2}", "tmpfs", str(run_dir)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        result = nemo_spin("run", "--config", str(config), f"run_dir={run_dir}")
        assert result.returncode == 2, result.stderr + result.stdout
        assert "No space left" in result.stderr
        assert "free some space" in result.stderr
        assert "Traceback" not in result.stderr
        subprocess.run(["mount", "-o", f"remount,size={used * 3}", str(run_dir)], check=True)
        result = nemo_spin("run", "--config", str(config), f"run_dir={run_dir}")
        assert result.returncode == 0, result.stderr + result.stdout
        assert hashes(run_dir) == hashes(finished)
    finally:
        subprocess.run(["umount", "--lazy", str(run_dir)], check=True)
