"""Keeps a sampler's process between stages, so that its engine is loaded once.

Evaluating theta_{t+1} and generating with it need the same weights, and the next
iteration's differ in their values alone. What training needs itself is given back first.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_spin.generation.capacity import memory_bytes
from nemo_spin.generation.process import SamplerProcess
from nemo_spin.generation.request import EngineSettings
from nemo_spin.generation.status import Opened

NEVER, AUTO, ALWAYS = "never", "auto", "always"
_MEMORY_SHARE = 4  # an engine that waits beside the training holds a quarter of the memory at most


@dataclass(frozen=True)
class _Idle:
    process: SamplerProcess
    settings: EngineSettings
    opened: Opened
    mode: str


class EngineKeeper:
    """Holds one process that waits for another request, or none."""

    def __init__(self) -> None:
        self._idle: _Idle | None = None

    def put(self, process: SamplerProcess, *, settings: EngineSettings, opened: Opened, mode: str) -> bool:
        """Takes over a process that has served its request; returns whether it does.

        Args:
            process: It is ended by this object from now on.
            settings: Of its engine.
            opened: What it said about its engine.
            mode: `generation.keep_engine`.
        """
        if mode == NEVER:
            return False
        self.close()
        self._idle = _Idle(process, settings, opened, mode)
        return True

    def take(self, settings: EngineSettings, python: str) -> SamplerProcess | None:
        """Hands over the process if its engine can serve `settings`; one that cannot is ended.

        Args:
            settings: What is needed.
            python: The interpreter it has to run under.
        """
        idle = self._idle
        if idle is None:
            return None
        same_weights = idle.settings.model_sha256 == settings.model_sha256
        if (
            idle.process.poll() is None
            and idle.process.interpreter.python == python
            and idle.settings.fits(settings)
            and (same_weights or idle.opened.can_refresh)
        ):
            self._idle = None
            return idle.process
        self.close()
        return None

    def make_room(self) -> None:
        """Ends the process where others need what it holds: called before ranks are started.

        With `auto` it stays on a CPU alone, if its engine takes other weights, is one
        process (several would go on spinning) and holds little memory.
        """
        idle = self._idle
        if idle is None or idle.mode == ALWAYS:
            return
        resident = idle.process.resident_bytes()
        stays = (
            idle.opened.device == "cpu"
            and idle.opened.can_refresh
            and idle.settings.tensor_parallel_size == 1
            and resident is not None
            and resident <= memory_bytes() // _MEMORY_SHARE
        )
        if not stays:
            self.close()

    def close(self) -> None:
        """Ends the process, if there is one, within seconds."""
        idle, self._idle = self._idle, None
        if idle is not None:
            idle.process.stop()
