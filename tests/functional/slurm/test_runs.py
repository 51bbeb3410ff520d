"""Runs under a real Slurm with two nodes: what it kills, and what comes of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_spin.data.files import sha256_file
from tests.functional.commands import REPOSITORY, VLLM_PYTHON, environment, nemo_spin, write_config
from tests.functional.slurm.cluster import Cluster

NAME = "a \"b' $(touch harm);#"  # of the job and of its directory
# After how many seconds a node is lost: of small stages, some have to start processes first.
STAGES = {"prepare": 0.0, "generate": 0.0, "score": 2.0, "train": 4.0, "export": 2.0, "evaluate": 1.0}
SFT = ("pretrain", "sft")  # configurations of the quickstart that lead to theta_0


@pytest.fixture(scope="module")
def given(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose answers come with the demonstrations: nothing is sampled."""
    directory = tmp_path_factory.mktemp("given")
    turn = {"role": "user", "content": "Say backwards: red green blue"}
    pairs = [
        {
            "real": [turn, {"role": "assistant", "content": f"blue green red {number}"}],
            "generated": [turn, {"role": "assistant", "content": f"red blue {number}"}],
        }
        for number in range(48)
    ]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return write_config(
        directory / "given.yaml",
        {
            "model": {"path": str(tiny_model), "global_batch_size": 4},
            "spin": {"iterations": 1, "lr": 1e-4, "epochs": 5},
            "selfplay": {"stop": False},
            "data": {
                "train": str(directory / "pairs.jsonl"),
                "format": "spin",
                "use_generations": True,
                "max_prompt_length": 64,
                "max_response_length": 32,
                "num_workers": 1,
            },
            "trainer": {"save_interval": None, "accelerator": "cpu"},
            "evaluation": {"enabled": False},
            "exp_manager": {"create_tensorboard_logger": False},
        },
    )


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a quickstart that has come to theta_0, on the rows of its small form."""
    directory = tmp_path_factory.mktemp("quickstart")
    sizes = ("--pretrain", "512", "--train", "128", "--heldout", "64")
    examples = REPOSITORY / "examples" / "quickstart"
    for words in (
        (str(examples / "task.py"), str(directory / "data"), *sizes),
        (str(examples / "base_model.py"), str(directory / "data" / "train.jsonl"), str(directory / "random")),
        *(("-m", "nemo_spin.cli", "sft", "--config", str(examples / f"{name}.yaml")) for name in SFT),
    ):
        subprocess.run(
            [sys.executable, *words],
            env={**environment(), "QUICKSTART_DIR": str(directory)},
            cwd=REPOSITORY,
            check=True,
        )
    return directory


def submit(cluster: Cluster, config: Path, run_dir: Path, *more: str) -> str:
    """Hands the run to Slurm as a user does; returns the job's number."""
    words = ["slurm", "--submit", "--config", str(config), f"run_dir={quoted(str(run_dir))}"]
    command = [sys.executable, "-m", "nemo_spin.cli", *words, "trainer.num_nodes=2", *more]
    answer = cluster.ask(*command, cwd=run_dir.parent)
    return answer.rpartition(" ")[2]


def quoted(value: str) -> str:
    """A value as Hydra's overrides quote it."""
    return "'" + value.replace("'", "\\'") + "'"


def log_of(run_dir: Path) -> str:
    return "".join(path.read_text() for path in sorted((run_dir / "slurm").glob("*.log")))


def wait(cluster: Cluster, run_dir: Path, condition: Callable[[], object], timeout_s: float = 200) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{cluster.ask('squeue')}\n{log_of(run_dir)}"
        time.sleep(0.1)


def is_over(cluster: Cluster, number: str) -> bool:
    """Not by what else there is: a job that is being warned is SIGNALING, one that goes back REQUEUED."""
    return cluster.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def model_sha256(run_dir: Path, iteration: int = 0) -> str:
    return sha256_file(run_dir / f"iter_{iteration:02d}" / "model" / "model.safetensors")


def state(run_dir: Path, stage: str) -> str | None:
    """What state.json says about a stage, such as `iter_00/train`."""
    try:
        stages = json.loads((run_dir / "state.json").read_text())["stages"]
    except (OSError, ValueError):
        return None
    return stages[stage]["status"] if stage in stages else None


def local_result(config: Path, *more: str) -> str:
    run_dir = config.parent / "-".join(["local", *more])
    result = nemo_spin("run", "--config", str(config), f"run_dir='{run_dir}'", "trainer.devices=2", *more)
    assert result.returncode == 0, result.stderr + result.stdout
    return model_sha256(run_dir)


def steps_done(run_dir: Path) -> int:
    path = run_dir / "iter_00" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum('"train"' in line for line in lines)


def test_a_job_that_is_warned_goes_back_into_the_queue_and_ends_as_it_would_have(
    cluster: Cluster, given: Path, tmp_path: Path
) -> None:
    """Two nodes; the warning is the one that Slurm sends before a time limit, sent by hand."""
    run_dir = tmp_path / NAME
    number = submit(
        cluster, given, run_dir, f"name={quoted(NAME)}", "launcher.slurm.environment={GLOO_SOCKET_IFNAME: lo}"
    )
    wait(cluster, run_dir, lambda: steps_done(run_dir) >= 2)
    assert cluster.ask("squeue", "--noheader", "--format=%j", f"--jobs={number}") == NAME
    cluster.ask("scancel", "--signal=USR1", "--batch", number)
    wait(cluster, run_dir, lambda: "the run ended with exit code 75" in log_of(run_dir))
    wait(cluster, run_dir, lambda: is_over(cluster, number))
    assert cluster.job(number)["JobState"] == "COMPLETED", log_of(run_dir)
    assert cluster.job(number)["Restarts"] == "1"
    assert "resuming from" in log_of(run_dir)
    assert model_sha256(run_dir) == local_result(given)
    wait(cluster, run_dir, lambda: not cluster.ask("squeue", "--noheader"), timeout_s=30)  # nor another job
    assert not list(tmp_path.rglob("harm"))
    logs = [(run_dir / "iter_00" / "logs" / f"train-of-iteration-0.rank_{rank}.log") for rank in range(2)]
    assert all(log.exists() for log in logs)


@pytest.mark.slow
def test_the_quickstart_loses_a_node_in_every_stage_and_meets_its_time_limit(
    cluster: Cluster, quickstart: Path
) -> None:
    """Two iterations. In the first, power off in the middle of each stage, now of the node with the
    command, now of the other; the second is left to the limit of the job's time."""
    config = REPOSITORY / "examples" / "quickstart" / "quickstart.yaml"
    settings = ["spin.iterations=2", "launcher.omp_num_threads=1"]  # on which the last bits depend
    if VLLM_PYTHON is not None:
        settings.append(f"generation.python={VLLM_PYTHON}")
    run_dir = quickstart / "spin"
    job = ["launcher.slurm.time='00:02:00'", "launcher.slurm.signal_s=40", "launcher.preemption_grace_s=30"]
    job += [
        "trainer.num_nodes=2",
        "trainer.devices=1",
        "trainer.accelerator=cpu",
        "launcher.slurm.environment={GLOO_SOCKET_IFNAME: lo}",
    ]
    command = ["-m", "nemo_spin.cli", "slurm", "--submit", "--config", str(config), *job, *settings]
    variable = f"QUICKSTART_DIR={quickstart}"
    number = cluster.ask("env", variable, sys.executable, *command, cwd=REPOSITORY).rpartition(" ")[2]
    for stage, node in zip(STAGES, ("node1", "node2") * 3, strict=True):
        name = stage if stage == "prepare" else f"iter_00/{stage}"
        wait(cluster, run_dir, lambda name=name: state(run_dir, name) == "running", timeout_s=400)
        time.sleep(STAGES[stage])
        cluster.kill_node(node)
        assert state(run_dir, name) == "running", f"{stage} was over before {node} was off"
        wait(cluster, run_dir, lambda: cluster.job(number)["JobState"] == "PENDING")
        cluster.revive_node(node)
    restarts = int(cluster.job(number)["Restarts"])
    assert restarts >= len(STAGES)
    wait(cluster, run_dir, lambda: is_over(cluster, number), timeout_s=900)
    assert cluster.job(number)["JobState"] == "COMPLETED", log_of(run_dir)
    assert int(cluster.job(number)["Restarts"]) > restarts, "the limit of its time was never met"
    assert "the run ended with exit code 75" in log_of(run_dir)
    local = quickstart / "local"
    words = ["run", "--config", str(config), f"run_dir={local}", *settings]
    done = subprocess.run(
        [sys.executable, "-m", "nemo_spin.cli", *words],
        env={**environment(), "QUICKSTART_DIR": str(quickstart)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    for iteration in range(2):
        assert model_sha256(run_dir, iteration) == model_sha256(local, iteration)
        name = f"iter_{iteration:02d}/evaluation.json"
        assert (run_dir / name).read_text() == (local / name).read_text()


@pytest.mark.slow
def test_what_is_cut_off_without_a_warning_the_next_job_goes_on_with(
    cluster: Cluster, given: Path, tmp_path: Path
) -> None:
    """The batch script itself is killed: neither it nor Slurm puts the job back."""
    run_dir = tmp_path / "run"
    number = submit(cluster, given, run_dir, "launcher.slurm.environment={GLOO_SOCKET_IFNAME: lo}")
    wait(cluster, run_dir, lambda: steps_done(run_dir) >= 1)
    cluster.kill_batch_script()
    wait(cluster, run_dir, lambda: is_over(cluster, number))
    assert cluster.job(number)["JobState"] == "FAILED"
    wait(cluster, run_dir, lambda: not cluster.ask("squeue", "--noheader"), timeout_s=300)
    assert model_sha256(run_dir) == local_result(given)


@pytest.mark.slow
def test_a_cancelled_run_stays_cancelled(cluster: Cluster, given: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    number = submit(cluster, given, run_dir, "launcher.slurm.environment={GLOO_SOCKET_IFNAME: lo}")
    wait(cluster, run_dir, lambda: steps_done(run_dir) >= 1)
    cluster.ask("scancel", number)
    wait(cluster, run_dir, lambda: not cluster.ask("squeue", "--noheader"), timeout_s=60)
    assert cluster.job(number)["JobState"] == "CANCELLED"
    assert not (run_dir / "iter_00" / "model" / "manifest.json").exists()


@pytest.mark.slow
def test_under_torchrun_the_result_is_the_same(given: Path, tmp_path: Path) -> None:
    """No Slurm here: torchrun starts the command twice, and the second follows the first."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "nemo_spin.cli", "run", "--config", str(given), f"run_dir={tmp_path}"]
    done = subprocess.run(
        [*torchrun, *command, "launcher=external", "trainer.devices=2"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert model_sha256(tmp_path) == local_result(given)
