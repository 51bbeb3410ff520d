"""A stand-in for a node whose network file system shows a directory as it was some time ago.

On one machine all processes see a new file at once, so the other ranks' looks are doctored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock


@contextmanager
def only_rank_0_sees(*patterns: str) -> Iterator[None]:
    """Listings and looks of the other ranks leave out entries whose names match one of `patterns`.

    What they open by its name is there, as it is where a client asks the server for it.
    """
    if os.environ["RANK"] == "0":
        yield
        return
    glob, exists = Path.glob, Path.exists

    def hidden(path: Path) -> bool:
        return any(path.match(pattern) for pattern in patterns)

    def old_glob(self: Path, *args: Any, **kwargs: Any) -> Iterator[Path]:
        return (path for path in glob(self, *args, **kwargs) if not hidden(path))

    def old_exists(self: Path, **kwargs: Any) -> bool:
        return not hidden(self) and exists(self, **kwargs)

    with mock.patch.object(Path, "glob", old_glob), mock.patch.object(Path, "exists", old_exists):
        yield
