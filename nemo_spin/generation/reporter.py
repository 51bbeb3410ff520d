"""How far a sampler is: told to the user where it is alone, else to the process that adds up."""

from __future__ import annotations

import time

from nemo_spin.data.progress import Progress
from nemo_spin.generation.engine import Answer
from nemo_spin.generation.status import Share, StatusWriter

_SHARE_EVERY_S = 1.0


class Reporter:
    """Counts answers and tokens, and tells the progress file.

    Args:
        progress: Where it goes.
        total: Answers in all.
        done: Answers that were there already.
    """

    def __init__(self, progress: Progress, *, total: int, done: int) -> None:
        self._progress = progress
        self._total = total
        self._done = done
        self._in_shard = 0
        self._tokens = 0
        self._answers = 0
        self._began = time.monotonic()
        self._values: dict[str, float] = {}
        progress.update(done, total, "answers")

    def answered(self, count: int) -> None:
        """The engine has answered `count` more prompts."""
        self._in_shard += count
        done = min(self._done + self._in_shard, self._total)
        self._progress.update(done, self._total, "answers", **self._values)

    def shard_done(self, answers: list[Answer]) -> None:
        """A shard is written."""
        self._done += len(answers)
        self._in_shard = 0
        self._answers += len(answers)
        self._tokens += sum(len(answer.token_ids) for answer in answers)
        self._values = {
            "tokens_per_s": round(self._tokens / max(time.monotonic() - self._began, 1e-9), 1),
            "mean_length": round(self._tokens / max(self._answers, 1), 1),
        }
        self._progress.update(self._done, self._total, "answers", **self._values)


class ShareReporter:
    """Counts the answers of one of several samplers, and tells its status file.

    Args:
        steps: Where it goes.
    """

    def __init__(self, steps: StatusWriter) -> None:
        self._steps = steps
        self._share = Share()
        self._told = 0.0

    def answered(self, count: int) -> None:
        """See `Reporter.answered`."""
        self._share.in_shard += count
        if time.monotonic() - self._told > _SHARE_EVERY_S:
            self._tell()

    def shard_done(self, answers: list[Answer]) -> None:
        """See `Reporter.shard_done`."""
        self._share.in_shard = 0
        self._share.answers += len(answers)
        self._share.tokens += sum(len(answer.token_ids) for answer in answers)
        self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        self._steps.share(self._share)
