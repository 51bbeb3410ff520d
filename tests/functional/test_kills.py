"""A hundred kills at random over whole runs, of any process: each run ends with the undisturbed bytes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.data.files import read_manifest
from tests.counts import lasting
from tests.functional.commands import VLLM_PYTHON, nemo_spin, start, write_config
from tests.functional.conftest import TinyData
from tests.functional.history import assert_trained_on_history
from tests.functional.test_loop import descendants, is_running, wait_for

KILLS = 100
ITERATIONS = 2
LONGEST_SHARE = 0.25  # of an undisturbed run, between two kills: more than a stage takes, so runs get on
_KINDS = {
    "nemo_spin.cli": "driver",
    "nemo_spin.launch.rank": "rank",
    "nemo_spin.generation.worker": "sampler",
}


@pytest.fixture
def config(tiny_model: Path, tiny_data: TinyData, tmp_path: Path) -> Path:
    return write_config(
        tmp_path / "tiny.yaml",
        {
            "model": {"path": str(tiny_model), "micro_batch_size": 4, "global_batch_size": 16},
            "spin": {"iterations": ITERATIONS, "lr": 1e-4, "epochs": 1},
            "data": {
                "train": str(tiny_data.train),
                "max_prompt_length": 64,
                "max_response_length": 32,
                "num_workers": 1,
            },
            "generation": {"python": VLLM_PYTHON, "max_tokens": 16, "shard_rows": 8},
            "trainer": {"save_interval": 1},
        },
    )


def results(run_dir: Path) -> dict[str, Any]:
    """Of a finished run the hashes of all answers, log-probabilities and exported models, and what
    the trainings counted.
    """
    found: dict[str, Any] = {}
    for iteration in range(ITERATIONS):
        for stage in ("generated", "scored", "train", "model"):
            directory = run_dir / f"iter_{iteration:02d}" / stage
            manifest = read_manifest(directory)
            assert manifest is not None, f"{directory} is not done"
            if stage == "train":  # files of checkpoints hold the time of writing
                found[f"{iteration}/{stage}"] = lasting(manifest.counts)
                continue
            found |= {f"{iteration}/{stage}/{name}": file["sha256"] for name, file in manifest.files.items()}
    return found


def kind(pid: int) -> str:
    """What a process is, by its command line."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return next((_KINDS[word] for word in words if word in _KINDS), "helper")
    return "gone"


def kill_one(command: subprocess.Popen[str], chance: random.Random) -> str | None:
    """Kills the command or a process that it started, directly or not; returns which."""
    candidates = [command.pid, *(pid for pid, _ in descendants(command.pid))]
    by_kind: dict[str, list[int]] = {}
    for pid in candidates:
        by_kind.setdefault(kind(pid), []).append(pid)
    by_kind.pop("gone", None)
    if not by_kind:
        return None
    chosen = chance.choice(sorted(by_kind))  # kinds are equally likely, however many helpers there are
    with contextlib.suppress(ProcessLookupError):
        os.kill(chance.choice(by_kind[chosen]), signal.SIGKILL)
    return chosen


@pytest.mark.slow
@pytest.mark.vllm
def test_a_hundred_kills_of_any_process_change_no_byte(
    config: Path, tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    began = time.monotonic()
    result = nemo_spin("run", "--config", str(config), f"run_dir={tmp_path / 'undisturbed'}")
    assert result.returncode == 0, result.stderr + result.stdout
    undisturbed = results(tmp_path / "undisturbed")
    assert_trained_on_history(tmp_path / "undisturbed", iterations=ITERATIONS, epochs=1)
    took = time.monotonic() - began
    chance = random.Random(20240607)
    killed: Counter[str] = Counter()
    runs = starts = 0
    while killed.total() < KILLS:
        run_dir = tmp_path / f"run_{runs}"
        runs += 1
        done = False
        while not done:
            command = start("run", "--config", str(config), f"run_dir={run_dir}")
            starts += 1
            done = _disturb(command, chance, killed, longest_s=LONGEST_SHARE * took)
            with (tmp_path / "kills.log").open("a") as log:  # to look at meanwhile
                log.write(f"run {runs}, start {starts}: {killed}, {time.monotonic() - began:.0f} s\n")
        assert results(run_dir) == undisturbed
    assert {"driver", "rank", "sampler"} <= killed.keys()
    facts = {**killed, "runs": runs, "starts": starts, "undisturbed_s": took}
    for name, value in {**facts, "seconds": time.monotonic() - began}.items():
        record_testsuite_property(name, value)  # in --junit-xml


def _disturb(
    command: subprocess.Popen[str], chance: random.Random, killed: Counter[str], *, longest_s: float
) -> bool:
    """Kills something now and then until the command ends; returns whether it ended well."""
    children: set[tuple[int, int]] = set()
    due = time.monotonic() + chance.uniform(1, longest_s)
    while command.poll() is None:
        time.sleep(0.05)
        if time.monotonic() < due or killed.total() >= KILLS:
            continue
        children |= set(descendants(command.pid))
        killed.update(filter(None, [kill_one(command, chance)]))
        due = time.monotonic() + chance.uniform(1, longest_s)
    out, errors = command.communicate()
    wait_for(lambda: not any(map(is_running, children)), 60, "what was started ends")
    assert command.returncode in (0, 1, 2, 76, -signal.SIGKILL), out + errors
    assert not any(line.startswith("Traceback") for line in errors.splitlines()), errors
    return command.returncode == 0
