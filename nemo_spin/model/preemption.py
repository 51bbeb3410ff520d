"""A request to leave the machine, noticed between two optimizer steps.

Slurm and its like send SIGTERM or SIGUSR1 some time before they kill. The handler only
remembers it; ranks agree at the next step, because all of them take part in saving.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import torch
from torch import distributed

from nemo_spin.megatron.runtime import Runtime

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Whether any rank was asked to save and end.

    Args:
        runtime: This rank's place.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._asked = False

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """Inside the block SIGTERM and SIGUSR1 are remembered and do nothing else.

        They wait until `take_over`: Lightning's own handler, which it sets when a training is
        set up, would end each rank at a step of its own.
        """
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def take_over(self) -> None:
        """Becomes the handler, and gets the signals that wait."""
        for number in _SIGNALS:
            signal.signal(number, self._remember)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def agreed(self) -> bool:
        """Whether it is time to save and end, the same on all ranks. All ranks must call."""
        asked = torch.tensor([int(self._asked)], dtype=torch.int32, device=self._runtime.device)
        distributed.all_reduce(asked, op=distributed.ReduceOp.MAX)
        return bool(asked.item())

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
