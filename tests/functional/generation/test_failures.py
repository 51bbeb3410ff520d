"""What happens when the sampler fails: nothing hangs, nothing is lost, the message says what to do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nemo_spin.errors import CheckpointError, ConfigError, DataError, GenerationError
from nemo_spin.generation.job import SamplerJob
from nemo_spin.generation.running import wait
from tests import models, prepared
from tests.functional.generation.harness import Stage, configuration


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(condition: object, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def stage(tiny_model: Path, prepared_dir: Path, tmp_path: Path) -> Stage:
    return Stage(tiny_model, prepared_dir, tmp_path)


def test_loading_that_takes_too_long_is_ended(stage: Stage) -> None:
    stage.config = configuration(load_timeout_s=1.5)
    job = stage.start()
    assert isinstance(job, SamplerJob)
    with pytest.raises(GenerationError, match=r"(?s)loading .*generate\.log.*generation\.load_timeout_s"):
        wait(job)
    assert not is_alive(job.pid)


def test_a_shard_that_takes_too_long_is_ended(stage: Stage) -> None:
    stage.config = configuration(shard_timeout_s=0.2, shard_rows=40, num_generations=40)
    job = stage.start()
    assert isinstance(job, SamplerJob)
    with pytest.raises(GenerationError, match=r"answering train-shard-00000-of-00001.parquet"):
        wait(job)
    assert not is_alive(job.pid)
    assert not list(stage.out_dir.glob("*.parquet"))


def test_an_engine_that_refuses_the_model_is_quoted(stage: Stage) -> None:
    stage.config = configuration(kv_cache_gib=1e-6)
    with pytest.raises(GenerationError) as caught:
        wait(stage.start())
    assert "could not be loaded into vllm" in str(caught.value)
    assert "No available memory" in str(caught.value)
    assert str(stage.log_path) in str(caught.value)


def test_a_sampler_that_is_killed_is_reported_with_its_log(stage: Stage) -> None:
    job = stage.start()
    assert isinstance(job, SamplerJob)
    _wait_until(lambda: stage.log_path.stat().st_size > 0)
    os.kill(job.pid, signal.SIGKILL)
    with pytest.raises(GenerationError, match=r"(?s)SIGKILL.*log: +/"):
        wait(job)


def test_stop_ends_the_whole_group(stage: Stage) -> None:
    job = stage.start()
    assert isinstance(job, SamplerJob)
    job.stop()
    assert not is_alive(job.pid)
    job.stop()  # harmless


def test_the_sampler_ends_with_its_parent(stage: Stage, tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from tests.functional.generation.harness import Stage
        model_dir, prepared, directory = {[str(stage.model_dir), str(stage.prepared), str(tmp_path)]}
        job = Stage(Path(model_dir), Path(prepared), Path(directory)).start()
        Path(directory, "pid").write_text(str(job.pid))
        time.sleep(600)
        """)
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        _wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 60)
        pid = int((tmp_path / "pid").read_text())
        _wait_until(lambda: (stage.log_path.with_name("generate.log.status")).exists(), 60)
        assert is_alive(pid)
    finally:
        parent.kill()
        parent.wait()
    _wait_until(lambda: not is_alive(pid))


def _break_nan(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, path, {"format": "pt"})


def _break_missing(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.layers.0.self_attn.v_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


def _break_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (_break_nan, "model.layers.1.mlp.up_proj.weight"),
        (_break_missing, "model.layers.0.self_attn.v_proj.weight"),
        (_break_truncated, "model.safetensors"),
    ],
)
def test_a_damaged_model_never_reaches_the_engine(
    stage: Stage, tmp_path: Path, harm: object, named: str
) -> None:
    stage.model_dir = shutil.copytree(stage.model_dir, tmp_path / "model")
    harm(stage.model_dir / "model.safetensors")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=named):
        stage.start()
    assert not stage.log_path.exists()


def test_a_prompt_without_room_for_an_answer_is_refused_beforehand(stage: Stage, tmp_path: Path) -> None:
    rows = prepared.rows(5, seed=3)
    rows[3]["prompt_ids"] = [7] * 128
    stage.prepared = prepared.write(tmp_path / "data", train=rows)
    with pytest.raises(DataError, match=r"(?s)row-3-3 with 128 tokens.*128.*data\.max_prompt_length"):
        stage.start()
    assert not stage.log_path.exists()


def test_an_id_outside_the_vocabulary_is_refused_beforehand(stage: Stage, tmp_path: Path) -> None:
    rows = prepared.rows(5, seed=3)
    rows[2]["prompt_ids"] = [7, models.VOCAB_SIZE + 1000]
    stage.prepared = prepared.write(tmp_path / "data", train=rows)
    with pytest.raises(DataError, match="vocabulary"):
        stage.start()


def test_a_stop_id_outside_the_vocabulary_is_refused_beforehand(stage: Stage) -> None:
    stage.config = configuration(stop_token_ids=[5, 70000])
    with pytest.raises(ConfigError, match=r"generation\.stop_token_ids: 70000"):
        stage.start()


def test_data_that_was_not_prepared_is_refused(stage: Stage, tmp_path: Path) -> None:
    stage.prepared = tmp_path / "nothing"
    with pytest.raises(DataError, match="prepare"):
        stage.start()


def test_an_interpreter_without_the_engine_is_named(stage: Stage) -> None:
    stage.config = configuration(python="/bin/no-such-python")
    with pytest.raises(ConfigError, match=r"generation\.python=/bin/no-such-python"):
        stage.start()
    stage.config = configuration(python=sys.executable)
    with pytest.raises(GenerationError, match="No module named 'vllm'"):
        wait(stage.start())
