"""What is said of a checkpoint that could not be loaded: whether it is at fault, and so what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from traceback import StackSummary

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron import checkpoint
from nemo_spin.selfplay.faults import worth_another_try

PATH = Path("/run/iter_00/train/checkpoints/step-00012000")
EVICTED = OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN), f"{PATH}/__37_0.distcp")


def gathered(error: BaseException) -> CheckpointException:
    """As torch raises on every rank what rank 37 met."""
    return CheckpointException("read", {37: (error, StackSummary())})


def of_libraries(cause: Exception) -> Exception:
    """A library's own words for it."""
    error = RuntimeError("PytorchStreamReader failed reading file data/3: file read failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [EVICTED, gathered(EVICTED), of_libraries(EVICTED)])
def test_a_file_system_that_fails_is_no_fault_of_the_checkpoint(error: BaseException) -> None:
    with pytest.raises(CheckpointError) as caught, checkpoint._explained(PATH):
        raise error
    message = str(caught.value)
    assert f"__37_0.distcp: could not be read ({os.strerror(errno.ESHUTDOWN)})" in message
    assert "remove" not in message
    assert worth_another_try(caught.value) == "the file system did not answer"


@pytest.mark.parametrize(
    "error",
    [
        gathered(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{PATH}/__37_0.distcp")),
        KeyError("model.decoder.layers.0.mlp.linear_fc1.weight"),
        gathered(ValueError("Size mismatch")),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_a_reason_to_remove_it(error: BaseException) -> None:
    with pytest.raises(CheckpointError, match=f"remove {PATH}") as caught, checkpoint._explained(PATH):
        raise error
    assert worth_another_try(caught.value) is None


def test_a_rank_that_is_gone_is_no_fault_of_the_checkpoint() -> None:
    """The worker says then which ranks still have a word to say (`megatron/phases.py`)."""
    gone = RuntimeError("[/pytorch/third_party/gloo/pair.cc:534] Connection closed by peer [10.1.0.7]:3345")
    for error in (gone, gathered(gone)):
        with pytest.raises(RuntimeError) as caught, checkpoint._explained(PATH):
            raise error
        assert caught.value is gone
    with pytest.raises(RuntimeError) as caught, checkpoint._unwritten_explained(PATH.parent):
        raise gathered(gone)
    assert caught.value is gone


def test_what_could_not_be_written_for_now_is_tried_again() -> None:
    with pytest.raises(CheckpointError) as caught, checkpoint._unwritten_explained(PATH.parent):
        raise gathered(EVICTED)
    assert worth_another_try(caught.value) == "the file system did not answer"
