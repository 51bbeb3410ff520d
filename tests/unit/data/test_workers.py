from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_spin.config.schema import DataConfig
from nemo_spin.data.sources import Piece
from nemo_spin.data.templates import load_template
from nemo_spin.data.workers import Workers
from nemo_spin.errors import StageError
from tests.unit.data.tokenizers import conversations, save_tokenizer


def pieces(count: int, rows: int = 20) -> Iterator[tuple[Piece, int]]:
    records = [json.dumps(row).encode() for row in conversations(count * rows)]
    for start in range(0, len(records), rows):
        yield Piece(range(start, start + rows), records=records[start : start + rows]), len(records)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_processes_give_what_this_one_gives_in_order(tokenizer_dir: Path) -> None:
    template = load_template(DataConfig(), tokenizer_dir)
    results = []
    for num_workers in (1, 2):
        config = DataConfig(num_workers=num_workers)
        with Workers(config, tokenizer_dir=tokenizer_dir, template=template) as workers:
            results.append([piece.batch.to_pylist() for piece, _ in workers.encode(pieces(30))])
    assert results[0] == results[1]
    assert sum(map(len, results[0])) == 600


def test_little_work_starts_no_process(tokenizer_dir: Path) -> None:
    template = load_template(DataConfig(), tokenizer_dir)
    with Workers(DataConfig(num_workers=2), tokenizer_dir=tokenizer_dir, template=template) as workers:
        assert len(list(workers.encode(pieces(3)))) == 3
        assert workers._pool is None


def test_a_killed_process_is_an_error_and_no_hang(tokenizer_dir: Path) -> None:
    template = load_template(DataConfig(), tokenizer_dir)
    with Workers(DataConfig(num_workers=2), tokenizer_dir=tokenizer_dir, template=template) as workers:
        results = workers.encode(pieces(400))
        next(results)
        assert workers._pool is not None
        os.kill(next(iter(workers._pool._processes)), signal.SIGKILL)
        with pytest.raises(StageError, match=r"data\.num_workers"):
            list(results)


PARENT = """
import sys
from pathlib import Path
from nemo_spin.config.schema import DataConfig
from nemo_spin.data.templates import load_template
from nemo_spin.data.workers import Workers
from tests.unit.data.test_workers import pieces

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    template = load_template(DataConfig(), directory)
    with Workers(DataConfig(num_workers=2), tokenizer_dir=directory, template=template) as workers:
        results = workers.encode(pieces(60))
        next(results)
        print(*workers._pool._processes, flush=True)
        sys.stdin.read()
"""


def test_processes_end_with_a_killed_parent(tokenizer_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tokenizer_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert parent.stdout is not None
    children = [int(word) for word in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(_is_running(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"
