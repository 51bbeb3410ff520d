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
from lightning.pytorch import Trainer
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
        """Inside the block SIGTERM and SIGUSR1 are remembered and do nothing else."""
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self._handle()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def take_over(self, trainer: Trainer) -> None:
        """Puts Lightning's own handler aside, which would end each rank at a step of its own.

        Lightning sets it while a training is set up; it calls the one before as well, so
        what came in the meantime is remembered here, and has to be forgotten there.
        """
        trainer._signal_connector.received_sigterm = False
        self._handle()

    def _handle(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._remember)

    def agreed(self) -> bool:
        """Whether it is time to save and end, the same on all ranks. All ranks must call."""
        asked = torch.tensor([int(self._asked)], dtype=torch.int32, device=self._runtime.device)
        distributed.all_reduce(asked, op=distributed.ReduceOp.MAX)
        return bool(asked.item())

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
