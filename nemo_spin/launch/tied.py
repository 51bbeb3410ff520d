"""Becomes another program that ends with the process that started it.

    python -m nemo_spin.launch.tied PARENT_PID srun ...

The kernel sends SIGTERM when the parent dies, however that happens; srun then ends its step. The
order survives `exec`. The kernel counts the thread that started this process as its parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def tied(command: Sequence[str]) -> list[str]:
    """`command` as a command that ends with this process."""
    return [sys.executable, "-P", "-m", __name__, str(os.getpid()), *command]


def main() -> None:
    """Becomes the program that the arguments after the first name."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(128 + signal.SIGTERM)  # it died before the kernel knew
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
