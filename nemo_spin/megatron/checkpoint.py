"""Resume checkpoints: Megatron's distributed checkpoints, written so that one is whole or not there.

A checkpoint holds weights (of a model with adapters: those alone), optimizer state and a
small dictionary of the caller's. It can be loaded at any other tensor, pipeline or data-parallel
size, whether the optimizer is sharded or not. `checkpoint_files.py` says how a whole one is recognised.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException  # no Exception: a BaseException

from nemo_spin.data.files import sync_directory, sync_file
from nemo_spin.errors import CheckpointError, explain
from nemo_spin.megatron.checkpoint_files import (
    checkpoint_path,
    file_entry,
    keep_newest,
    partial_path,
    write_record,
)
from nemo_spin.megatron.compat import save_asynchronously
from nemo_spin.megatron.engine import Engine
from nemo_spin.megatron.lora_checkpoint import load_model_state, model_state
from nemo_spin.megatron.optimizer_state import num_updates, sharded_optimizer_state, take_loaded
from nemo_spin.megatron.phases import is_of_a_collective
from nemo_spin.megatron.runtime import Runtime, first_rank_writes

_UPDATES = "optimizer_updates"
_HASHES = ".hashes.json"
_OF_THE_CONTENT = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR)  # what a checkpoint lacks, whatever holds it


class CheckpointWriter:
    """Writes checkpoints, at once or while training goes on.

    A checkpoint in the making is copied to the CPU and written by processes of its own;
    `poll` gives it its final name when they are done on all ranks, and never earlier.

    Args:
        directory: Where checkpoints lie.
        keep: How many of the newest stay; older ones are removed when a newer one is whole.
        asynchronous: Whether `save` returns before the files are written.
        before_publishing: Called on the first rank before a checkpoint gets its name: makes durable
            what must not be older than the checkpoint after a power cut.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        asynchronous: bool = False,
        before_publishing: Callable[[], None] | None = None,
    ) -> None:
        self._directory = directory
        self._keep = keep
        self._asynchronous = asynchronous
        self._before_publishing = before_publishing
        self._calls = AsyncCallsQueue()  # forks a writer for each call: a copy of this moment's memory

    def save(self, engine: Engine, *, step: int, common: dict[str, Any]) -> None:
        """Writes the checkpoint after `step` optimizer steps. All ranks must call.

        Args:
            engine: Model and optimizer.
            step: Optimizer steps done.
            common: Plain containers, the same on all ranks, returned by `load_checkpoint`.

        Raises:
            CheckpointError: The disk is full, say; earlier checkpoints are unharmed. When saving in
                the background, this and the two calls below may raise it for the save before.
        """
        self.wait()
        with _unwritten_explained(self._directory):
            self._start(engine, checkpoint_path(self._directory, step), common)

    def poll(self) -> None:
        """Finishes the checkpoint in the making if its files are written. All ranks must call."""
        with _unwritten_explained(self._directory):
            self._calls.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Returns when no checkpoint is in the making. All ranks must call."""
        with _unwritten_explained(self._directory):
            self._calls.maybe_finalize_async_calls(blocking=True)

    def _start(self, engine: Engine, final: Path, common: dict[str, Any]) -> None:
        unfinished = partial_path(final)
        with first_rank_writes(engine.runtime) as writes:
            if writes:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
        state = _sharded_state(engine)
        if engine.optimizer is not None:
            state[_UPDATES] = num_updates(engine.optimizer)
        state["common"] = common
        request = save_asynchronously(state, unfinished)
        if request.async_fn is not None:
            hashed = partial(_write_and_hash, request.async_fn, unfinished, engine.runtime.rank)
            request = request._replace(async_fn=hashed)
        request.add_finalize_fn(partial(self._publish, engine.runtime, unfinished, final))
        if self._asynchronous:
            self._calls.schedule_async_request(request)
        else:
            request.execute_sync()

    def _publish(self, runtime: Runtime, unfinished: Path, final: Path) -> None:
        """Megatron's files are complete: records them and gives the directory its name."""
        with first_rank_writes(runtime) as writes:
            if writes:
                if self._before_publishing is not None:
                    self._before_publishing()
                write_record(unfinished, _take_hashes(unfinished))
                for entry in unfinished.iterdir():
                    sync_file(entry)
                sync_directory(unfinished)
                if final.exists():
                    shutil.rmtree(final)
                unfinished.rename(final)
                sync_directory(final.parent)
                keep_newest(final.parent, self._keep)


def save_checkpoint(engine: Engine, directory: Path, *, step: int, common: dict[str, Any], keep: int) -> None:
    """Writes one checkpoint to its end; see `CheckpointWriter`. All ranks must call."""
    CheckpointWriter(directory, keep=keep).save(engine, step=step, common=common)


def load_checkpoint(engine: Engine, path: Path) -> dict[str, Any]:
    """Loads weights and, if the engine has one, the optimizer. All ranks must call.

    Returns:
        What was saved as `common`; nothing where another program saved.

    Raises:
        CheckpointError: The checkpoint cannot be read or is of another model.
        RuntimeError: Another rank is late or gone.
    """
    state = _sharded_state(engine)
    with _explained(path):
        loaded = dist_checkpointing.load(state, str(path))
        for key, module in _modules(engine).items():
            load_model_state(module, loaded.get(key, {}))  # nothing, of a frozen chunk without layers
        if engine.optimizer is not None:
            take_loaded(engine.optimizer, updates=loaded[_UPDATES])
    common: dict[str, Any] = loaded.get("common", {})  # Megatron's own have none
    return common


def load_optimizer_state(engine: Engine, path: Path) -> None:
    """Loads the optimizer's moments and step count, and no weights. All ranks must call.

    Args:
        engine: Its weights, and their float32 copies, stay what they are.
        path: A checkpoint of another training of a model of the same shape.

    Raises:
        CheckpointError: The checkpoint cannot be read or is of another model or optimizer.
    """
    assert engine.optimizer is not None, "an engine without optimizer has no optimizer state"
    state = sharded_optimizer_state(engine.optimizer, _model_state(engine), with_main_weights=False)
    with _explained(path):
        loaded = dist_checkpointing.load({"optimizer": state}, str(path))
        take_loaded(engine.optimizer, updates=loaded[_UPDATES])


def _modules(engine: Engine) -> dict[str, Any]:
    modules = [getattr(chunk, "module", chunk) for chunk in engine.chunks]
    if len(modules) == 1:
        return {"model": modules[0]}
    return {f"model{index}": module for index, module in enumerate(modules)}


def _model_state(engine: Engine) -> dict[str, Any]:
    engine.settle()
    return {key: model_state(module, {}) for key, module in _modules(engine).items()}


def _sharded_state(engine: Engine) -> dict[str, Any]:
    """Weights and optimizer state as `dist_checkpointing` takes them, to save or to load into."""
    state = _model_state(engine)
    if engine.optimizer is not None:
        state["optimizer"] = sharded_optimizer_state(engine.optimizer, dict(state))
    return state


def _write_and_hash(write: Callable[..., None], directory: Path, rank: int, *arguments: Any) -> None:
    """Writes this rank's files and hashes them while they are in memory; may run in a writer process."""
    write(*arguments)
    with suppress(OSError):  # what could not be written is reported by Megatron
        entries = {path.name: file_entry(path) for path in directory.glob(f"__{rank}_*")}
        (directory / f"{rank}{_HASHES}").write_text(json.dumps(entries), encoding="utf-8")


def _take_hashes(directory: Path) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for path in directory.glob(f"*{_HASHES}"):
        entries |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    return entries


@contextmanager
def _unwritten_explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException) as error:
        _raise_of_a_collective(error)
        raise CheckpointError(
            explain(
                str(directory),
                found=f"a checkpoint could not be written ({_last_line(error)})",
                rule="the directory can be written to and has room",
                remedy="free some space (or mend the permissions) and start the same command again; "
                "it goes on from the checkpoint before",
            )
        ) from error


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:
        for cause in _causes(error):
            if isinstance(cause, OSError) and cause.errno not in (None, *_OF_THE_CONTENT):
                raise _unreadable(path, cause) from error
        _raise_of_a_collective(error)
        raise CheckpointError(
            explain(
                str(path),
                found=f"cannot be loaded ({type(error).__name__}: {_last_line(error)})",
                rule="a resume checkpoint belongs to the same model and is complete",
                remedy=f"remove {path}; the run goes on from the checkpoint before it",
            )
        ) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    """The checkpoint may be sound, and is not to be removed."""
    return CheckpointError(
        explain(
            str(error.filename or path),
            found=f"could not be read ({error.strerror})",
            rule="every rank can read the files of a resume checkpoint",
            remedy="look at the file system, on all nodes; the same command goes on where it was",
        )
    )


def _raise_of_a_collective(error: BaseException) -> None:
    """Raises what is left of a collective whose other ranks are late or gone, if that is behind it."""
    for cause in _causes(error):
        if is_of_a_collective(cause):
            raise cause


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it follows from, and what torch has gathered from the ranks."""
    following: BaseException | None = error
    while following is not None:
        yield following
        if isinstance(following, CheckpointException):
            for cause, _ in following.failures.values():
                yield from _causes(cause)
        context = None if following.__suppress_context__ else following.__context__
        following = following.__cause__ or context


def _last_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[-1] if lines else ""
