"""Processes that tokenize, in the order of the input, and end with the process that started them."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Self

from nemo_spin.config.schema import DataConfig
from nemo_spin.data.encode import EncodedPiece, encode_piece
from nemo_spin.data.sources import Piece
from nemo_spin.data.templates import Template, load_template
from nemo_spin.errors import StageError, explain

_MAX_DEFAULT_WORKERS = 16  # more than one reader can feed
_SMALL_PIECES = 8  # so few are done here sooner than processes start


class Workers:
    """Encodes pieces in processes, or here where there is little to do.

    The processes are started by need and end when the context is left. They are spawned,
    not forked: the caller may hold threads and locks.

    Args:
        config: Settings, handed to each process.
        tokenizer_dir: Each process reads the tokenizer itself.
        template: This process' own template.
    """

    def __init__(self, config: DataConfig, *, tokenizer_dir: Path, template: Template) -> None:
        self._config = config
        self._tokenizer_dir = tokenizer_dir
        self._template = template
        self._pool: ProcessPoolExecutor | None = None
        self.num_workers = config.num_workers or min(_cores(), _MAX_DEFAULT_WORKERS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, pieces: Iterator[tuple[Piece, int]]) -> Iterator[tuple[EncodedPiece, int]]:
        """Yields each piece's rows in the order of `pieces`, with the number that came with it.

        Raises:
            StageError: A process ended before its time.
        """
        first = list(itertools.islice(pieces, _SMALL_PIECES + 1))
        pieces = itertools.chain(first, pieces)
        if self.num_workers == 1 or len(first) <= _SMALL_PIECES:
            for piece, total in pieces:
                yield encode_piece(piece, self._template, self._config), total
            return
        pool = self._started()
        waiting: deque[tuple[Future[EncodedPiece], int]] = deque()
        try:
            for piece, total in pieces:
                waiting.append((pool.submit(_encode, piece), total))
                if len(waiting) > 2 * self.num_workers:
                    yield _result(waiting)
            while waiting:
                yield _result(waiting)
        except BrokenProcessPool as error:
            raise StageError(
                explain(
                    "prepare",
                    found="a tokenizing process ended before its time",
                    rule="the operating system ends processes when memory runs out",
                    remedy="start the same command again, with a smaller data.num_workers "
                    f"(it is {self.num_workers})",
                )
            ) from error

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.num_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self._config, self._tokenizer_dir),
            )
        return self._pool


def _result(waiting: deque[tuple[Future[EncodedPiece], int]]) -> tuple[EncodedPiece, int]:
    future, total = waiting.popleft()
    return future.result(), total


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# In the processes.

_state: tuple[Template, DataConfig] | None = None


def _start(config: DataConfig, tokenizer_dir: Path) -> None:
    """Makes this process ready to encode, and mortal."""
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for each process
    if not {"torch", "transformers"} & sys.modules.keys():
        # transformers imports torch with every tokenizer, for nothing here: without it a
        # process is ready a second sooner and a quarter of the size.
        sys.modules["torch"] = None  # type: ignore[assignment]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    _state = load_template(config, tokenizer_dir), config


def _encode(piece: Piece) -> EncodedPiece:
    assert _state is not None, "the process was not started by Workers"
    template, config = _state
    return encode_piece(piece, template, config)


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, however that came about."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
