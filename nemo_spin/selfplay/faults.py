"""Which failures of a stage are worth another try: those of the surroundings, which may pass.

A retry costs what the stage has not saved, and hides nothing: the command says what failed,
and every attempt is in state.json. What would fail again the same way stops at once: mistakes
of the configuration, gates and guards, full disks, exhausted memory of a GPU, errors in a program.
Where a message speaks of both, it stops.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

from nemo_spin.errors import CheckpointError, DataError, ExportError, GenerationError, StageError

_NCCL = "docs.nvidia.com/deeplearning/nccl/user-guide/docs/api/types.html"
_C10D = "torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp"


@dataclass(frozen=True)
class Fault:
    """A kind of failure.

    Attributes:
        pattern: What its message says (a regular expression).
        retry: Whether another try may go well.
        what: In a few words.
        source: Where the message comes from, or is documented.
        of_storage: Whether it is about files.
    """

    pattern: str
    retry: bool
    what: str
    source: str
    of_storage: bool = False


def _storage(numbers: tuple[int, ...], what: str, source: str, *, retry: bool) -> Fault:
    words = "|".join(rf"{re.escape(os.strerror(number))}|\[Errno {number}\]" for number in numbers)
    return Fault(words, retry, what, source, of_storage=True)


# The first that fits decides: those that stop come first.
FAULTS: tuple[Fault, ...] = (
    Fault(r"ncclInvalid(Usage|Argument)", False, "NCCL was called wrongly", _NCCL),
    Fault(r"ncclInternalError", False, "NCCL failed in itself", _NCCL),
    Fault(r"(CUDA|HIP) out of memory", False, "a GPU's memory is exhausted", "torch.cuda.OutOfMemoryError"),
    Fault(
        r"uncorrectable (NVLink|ECC) error",
        False,
        "a GPU is broken",
        "cudaErrorECCUncorrectable, cudaError_t",
    ),
    Fault(
        r"an illegal memory access was encountered|device-side assert triggered",
        False,
        "a program of a GPU is wrong",
        "cudaErrorIllegalAddress, cudaErrorAssert, cudaError_t",
    ),
    _storage((errno.ENOSPC, errno.EDQUOT), "the disk is full", "write(2)", retry=False),
    _storage((errno.EROFS, errno.EACCES, errno.EPERM), "writing is not allowed", "open(2)", retry=False),
    Fault(r"gave no sign of life", True, "ranks hung", "selfplay/watchdog.py"),
    Fault(r"did not reach the phase|broke off in the phase", True, "ranks hung", "megatron/phases.py"),
    Fault(
        r"(killed|ended) by SIGKILL|: Killed \(often|srun: error: \S+: tasks? [\d,-]+: Killed",
        True,
        "a process was killed",
        "signal(7), srun(1)",
    ),
    Fault(
        r"srun: error: .*(Socket timed out on send/recv|Unable to contact slurm controller"
        r"|Communication connection failure|Zero Bytes were transmitted|Node failure on)",
        True,
        "Slurm did not answer, or lost a node",
        "slurm/slurm_errno.h, slurm_strerror(3); srun(1)",
    ),
    Fault(r"ncclSystemError|ncclRemoteError", True, "the network of NCCL failed", _NCCL),
    Fault(
        r"Watchdog caught collective operation timeout|watchdog got stuck for \d+ seconds",
        True,
        "a collective hung",
        f"{_C10D}/ProcessGroupNCCL",
    ),
    Fault(r"Timed out waiting \d+ms for (send|recv|recv/send)", True, "a collective hung", "gloo/transport"),
    Fault(r"Connection (closed|reset) by peer", True, "a connection broke", "gloo/transport/tcp"),
    Fault(r"Dist(Network|Store|Backend)Error", True, "a connection broke", "torch.distributed"),
    Fault(r"Address already in use|EADDRINUSE", True, "a port was taken", "bind(2)"),
    _storage(
        (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EREMOTEIO),
        "the file system did not answer",
        "nfs(5); Lustre Operations Manual, 'Eviction'",
        retry=True,
    ),
    Fault(
        r"ended by SIGBUS|\b(on|tasks?) \S+: Bus error\b",
        True,
        "a mapped file could not be read",
        "mmap(2), signal(7), srun(1)",
    ),
    Fault(r"ended by SIGABRT|\b(on|tasks?) \S+: Aborted\b", True, "a process aborted", "signal(7), srun(1)"),
    Fault(r"not done after .* the sampler was ended", True, "the sampler hung", "generation/job.py"),
)


def fault_in(text: str) -> Fault | None:
    """What a message, or a line of a log, speaks of; None where it is nothing known."""
    return next((fault for fault in FAULTS if re.search(fault.pattern, text)), None)


def _storage_fault_in(text: str) -> Fault | None:
    """The same, of what concerns files."""
    return next((fault for fault in FAULTS if fault.of_storage and re.search(fault.pattern, text)), None)


def worth_another_try(error: BaseException) -> str | None:
    """What failed, in a few words, where the same stage may go well next time; else None."""
    if type(error) in (CheckpointError, ExportError):  # files that are wrong, unless they could not be read
        found = _storage_fault_in(str(error))
    elif type(error) in (StageError, GenerationError, DataError) or isinstance(error, OSError):
        found = fault_in(str(error))
    else:
        return None
    return found.what if found is not None and found.retry else None
