"""Keeps samplers' processes between stages, so that their engines are loaded once.

Evaluating theta_{t+1} and generating with it need the same weights, and the next
iteration's differ in their values alone. What training needs itself is given back first.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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
    """Holds processes that wait for another request: at most one in each slot.

    Of several samplers each has a slot, and so the same devices in all stages.
    """

    def __init__(self) -> None:
        self._idle: dict[int, _Idle] = {}

    def put(
        self, process: SamplerProcess, *, settings: EngineSettings, opened: Opened, mode: str, slot: int = 0
    ) -> bool:
        """Takes over a process that has served its request; returns whether it does.

        Args:
            process: It is ended by this object from now on.
            settings: Of its engine.
            opened: What it said about its engine.
            mode: `generation.keep_engine`.
            slot: Where it is kept; what was there is ended.
        """
        if mode == NEVER:
            return False
        self._close([slot])
        self._idle[slot] = _Idle(process, settings, opened, mode)
        return True

    def take(self, settings: EngineSettings, python: str, *, slot: int = 0) -> SamplerProcess | None:
        """Hands over the process of a slot if its engine can serve `settings`; one that cannot is ended.

        Args:
            settings: What is needed.
            python: The interpreter it has to run under.
            slot: Where it was kept.
        """
        idle = self._idle.get(slot)
        if idle is None:
            return None
        same_weights = idle.settings.model_sha256 == settings.model_sha256
        if (
            idle.process.poll() is None
            and idle.process.interpreter.python == python
            and idle.settings.fits(settings)
            and (same_weights or idle.opened.can_refresh)
        ):
            return self._idle.pop(slot).process
        self._close([slot])
        return None

    def make_room(self) -> None:
        """Ends processes where others need what they hold: called before ranks are started.

        With `auto` they stay on a CPU alone, if their engines take other weights, are one
        process each (several would go on spinning) and hold little memory together.
        """
        leaving = [slot for slot, idle in self._idle.items() if idle.mode != ALWAYS]
        sizes = [self._idle[slot].process.resident_bytes() for slot in leaving]
        are_small = sum(size or 0 for size in sizes) <= memory_bytes() // _MEMORY_SHARE
        self._close(
            [
                slot
                for slot, size in zip(leaving, sizes, strict=True)
                if size is None or not are_small or not _is_in_nobodys_way(self._idle[slot])
            ]
        )

    def close(self) -> None:
        """Ends all processes, within seconds."""
        self._close(list(self._idle))

    def _close(self, slots: list[int]) -> None:
        leaving = [self._idle.pop(slot).process for slot in slots if slot in self._idle]
        if leaving:
            with ThreadPoolExecutor(len(leaving)) as pool:
                list(pool.map(lambda process: process.stop(), leaving))


def _is_in_nobodys_way(idle: _Idle) -> bool:
    return idle.opened.device == "cpu" and idle.opened.can_refresh and idle.settings.tensor_parallel_size == 1
