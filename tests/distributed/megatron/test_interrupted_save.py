"""A save that does not come to its end, by a kill or a full disk: the one before it is gone on from."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.distributed import reference
from tests.distributed.harness import run_ranks
from tests.distributed.megatron.test_checkpoint import _pairs, _steps
from tests.distributed.megatron.test_engine import _engine

SAVED_AT, ONE_RANK = (2, 1, 1, False), (1, 1, 1, False)
WHOLE, CUT_SHORT = "step-00000004", "step-00000008.partial"


def _engine_and_writer(model_dir: Path, directory: Path, *, asynchronous: bool) -> tuple[Any, Any]:
    from nemo_spin.megatron.checkpoint import CheckpointWriter

    engine, _ = _engine(model_dir, SAVED_AT)
    return engine, CheckpointWriter(directory, keep=2, asynchronous=asynchronous)


def _killed_while_saving(model_dir: Path, directory: Path, table: pa.Table, asynchronous: bool) -> None:
    """Saves after step 4; SIGKILL takes rank 0 and its writers when the next save has begun to write."""
    engine, writer = _engine_and_writer(model_dir, directory, asynchronous=asynchronous)
    _steps(engine, table, 0, 4)
    writer.save(engine, step=4, common={})
    losses = _steps(engine, table, 4, 8)
    writer.wait()
    if engine.runtime.is_first_rank:
        (directory / "losses.json").write_text(json.dumps(losses))
        threading.Thread(target=_kill_once_writing, args=(directory / CUT_SHORT,)).start()
    writer.save(engine, step=8, common={})
    time.sleep(60)  # what is saved in the background is not published before somebody asks


def _kill_once_writing(unfinished: Path) -> None:
    while not list(unfinished.glob("__0_*")):
        time.sleep(0.0005)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _go_on(model_dir: Path, directory: Path, table: pa.Table) -> tuple[str, list[str], list[float]]:
    from nemo_spin.megatron.checkpoint import load_checkpoint
    from nemo_spin.megatron.checkpoint_files import newest_whole_checkpoint

    notes: list[str] = []
    engine, _ = _engine(model_dir, ONE_RANK)
    path = newest_whole_checkpoint(directory, runtime=engine.runtime, note=notes.append)
    assert path is not None
    load_checkpoint(engine, path)
    return path.name, notes, _steps(engine, table, 4, 8)


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_saving_it_goes_on_from_the_save_before(
    tmp_path: Path, asynchronous: bool
) -> None:
    model_dir, table, directory = reference.make_model(tmp_path / "model"), _pairs(), tmp_path / "saved"
    with pytest.raises(AssertionError, match=r"rank \d failed"):
        run_ranks(_killed_while_saving, 2, model_dir, directory, table, asynchronous)
    assert {path.name for path in directory.glob("step-*")} == {WHOLE, CUT_SHORT}
    name, notes, losses = run_ranks(_go_on, 1, model_dir, directory, table)
    assert (name, notes) == (WHOLE, [])
    assert losses == pytest.approx(json.loads((directory / "losses.json").read_text()), rel=1e-5)
    assert {path.name for path in directory.glob("step-*")} == {WHOLE}


def _without_room(model_dir: Path, directory: Path, asynchronous: bool) -> tuple[str, list[str], list[str]]:
    """What is said, and which directories there are, when no file may exceed 64 KiB, and afterwards."""
    from nemo_spin.errors import CheckpointError

    engine, writer = _engine_and_writer(model_dir, directory, asynchronous=asynchronous)
    writer.save(engine, step=4, common={})
    writer.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            writer.save(engine, step=8, common={})
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = sorted(path.name for path in directory.iterdir())
    _, again = _engine_and_writer(model_dir, directory, asynchronous=asynchronous)
    again.save(engine, step=8, common={})
    again.wait()
    return str(caught.value), left, sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_without_room_is_an_error_and_harms_no_other(tmp_path: Path, asynchronous: bool) -> None:
    """A limit on the size of files stands in for a full disk: both end in an OSError of `write`."""
    model_dir = reference.make_model(tmp_path / "model", vocab_size=4096)  # half a MiB of embeddings
    directory = tmp_path / "saved"
    message, left, afterwards = run_ranks(_without_room, 2, model_dir, directory, asynchronous)
    assert "a checkpoint could not be written" in message and "free some space" in message
    assert left == [WHOLE, CUT_SHORT]
    assert afterwards == [WHOLE, "step-00000008"]
