"""Which shard a sampler does next: all in order if it is alone, else those nobody else is at."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator
from pathlib import Path

from nemo_spin.errors import DataError, GenerationError, NemoSpinError, explain
from nemo_spin.generation import status
from nemo_spin.generation.leases import Leases
from nemo_spin.generation.request import GenerationRequest, Pass, ShardPlan

Turn = tuple[Pass, ShardPlan]
_POLL_S = 0.2
_LONGEST_POLL_S = 4.0  # less than the others are given to see that nothing is left
_PATIENCE = 8  # the next look comes after an eighth of the wait so far: all who wait look at all leases
_LOOKS = 25  # in the time after which an owner is taken to be dead, at least


def turns(request: GenerationRequest, steps: status.StatusWriter) -> Iterator[Turn]:
    """The shards this process has to do; a shard is to be published before the next is asked for.

    With other samplers at work it ends when all shards are there, whoever did them: until
    then one may die, and leave one behind.

    Args:
        request: What it was asked.
        steps: Told of each.

    Raises:
        NemoSpinError: Leases cannot be made.
    """
    if request.leases is None:
        for generation, shard in missing(request):
            steps.step(status.SHARD, shard.file)
            yield generation, shard
        return
    try:
        with contextlib.closing(Leases(request.leases)) as leases:
            yield from _shared(request, steps, leases)
    except OSError as error:
        raise _no_leases(request.leases.directory, error) from error


def _shared(request: GenerationRequest, steps: status.StatusWriter, leases: Leases) -> Iterator[Turn]:
    assert request.leases is not None, "shards are shared by leases"
    out_dir = Path(request.out_dir)
    pending, waits, changed = missing(request), False, 0.0
    while pending:
        taken, num_pending = None, len(pending)
        left: list[Turn] = []
        for position, turn in enumerate(pending):
            name = turn[1].file
            if (out_dir / name).exists():
                continue
            if leases.take(name):
                if not (out_dir / name).exists():  # not published and given back just now
                    taken, left = turn, left + pending[position + 1 :]
                    break
                leases.release(name)
                continue
            left.append(turn)
        pending = left
        if taken is not None:
            waits = False
            steps.step(status.SHARD, taken[1].file)
            yield taken
            leases.release(taken[1].file)
        elif pending:
            if not waits:
                steps.step(status.WAIT, pending[0][1].file)
            if not waits or len(pending) < num_pending:
                changed = time.monotonic()
            waits = True
            time.sleep(_pause_s(time.monotonic() - changed, request.leases.silent_s))


def _pause_s(waited_s: float, silent_s: float) -> float:
    """Seconds until the next look, where nothing has changed for `waited_s`."""
    longest = min(_LONGEST_POLL_S, silent_s / _LOOKS)
    return max(_POLL_S, min(longest, waited_s / _PATIENCE))


def missing(request: GenerationRequest) -> list[Turn]:
    """What is not there yet, in the order in which it is to be done."""
    out_dir = Path(request.out_dir)
    planned = {
        shard.file: (generation, shard) for generation in request.passes for shard in generation.shards
    }
    names = request.order or tuple(planned)
    return [planned[name] for name in names if not (out_dir / name).exists()]


def num_answers(turns: list[Turn]) -> int:
    """Answers of all of them."""
    return sum(shard.rows * generation.num_generations for generation, shard in turns)


def _no_leases(directory: str, error: OSError) -> NemoSpinError:
    kind = DataError if error.errno in (errno.ENOSPC, errno.EDQUOT) else GenerationError
    return kind(
        explain(
            directory,
            found=f"no lease can be made there ({error.strerror or error})",
            rule="several samplers share the shards of a stage by leases",
            remedy="free some space, or mend the file system; generation.replicas=1 needs none",
        )
    )
