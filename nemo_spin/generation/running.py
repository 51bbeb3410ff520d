"""What a stage that is answering looks like to those who wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable

from nemo_spin.generation.job import NothingToDo, SamplerJob
from nemo_spin.generation.replicas import ReplicasJob

RunningGeneration = SamplerJob | ReplicasJob | NothingToDo


def wait(job: RunningGeneration, *, poll_s: float = 0.1, on_poll: Callable[[], None] | None = None) -> None:
    """Returns when the job is done; ends it in every other case.

    Args:
        job: The running process.
        poll_s: Seconds between looks at it.
        on_poll: Called at each.

    Raises:
        NemoSpinError: It failed.
    """
    try:
        while job.poll() is None:
            if on_poll is not None:
                on_poll()
            time.sleep(poll_s)
    finally:
        job.stop()
