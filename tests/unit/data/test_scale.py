"""200,000 rows the size of chat data: memory of all processes together, and rows per second."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.data.tokenizers import CORPUS, byte_level, save_tokenizer

NUM_ROWS = 200_000
MEMORY_LIMIT = 2 << 30  # bytes

COMMAND = """
import sys
from pathlib import Path
from nemo_spin.config.schema import DataConfig
from nemo_spin.data.prepare import prepare

if __name__ == "__main__":
    data, tokenizer, out = sys.argv[1:]
    config = DataConfig(train=data, max_prompt_length=2048, max_response_length=2048)
    prepare(config, tokenizer_dir=Path(tokenizer), out_dir=Path(out))
"""


def write_rows(path: Path, count: int) -> None:
    """Seeded rows with log-normal lengths: prompts around 60 words, responses around 200."""
    generator = random.Random(0)
    letters = "etaoinshrdlucmfwyp"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(5000)]
    text = " ".join(generator.choices(words, k=200_000))
    with path.open("w") as stream:
        for number in range(count):
            lengths = [int(min(generator.lognormvariate(mean, 0.8), 6000)) + 5 for mean in (5.8, 7.0)]
            starts = [generator.randrange(len(text) - 7000) for _ in lengths]
            prompt, response = (text[a : a + n].strip() for a, n in zip(starts, lengths, strict=True))
            messages = [
                {"role": "user", "content": f"{number} {prompt}"},
                {"role": "assistant", "content": response},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_two_hundred_thousand_rows_in_under_two_gibibytes(
    tmp_path: Path, kind: str, record_property: pytest.RecordProperty
) -> None:
    psutil = pytest.importorskip("psutil")
    data = tmp_path / "rows.jsonl"
    write_rows(data, NUM_ROWS)
    data = _converted(data, kind)
    corpus = (tmp_path / "rows.jsonl").open().read(2_000_000).splitlines()
    tokenizer = save_tokenizer(
        tmp_path / "tokenizer", tokenizer=byte_level(vocab_size=8000, corpus=[*CORPUS, *corpus])
    )
    script = tmp_path / "prepare.py"
    script.write_text(COMMAND)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(script), str(data), str(tokenizer), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    watched = psutil.Process(process.pid)
    peak = 0
    most_processes = 0
    while process.poll() is None:
        family = [watched, *_children(psutil, watched)]
        peak = max(peak, sum(_memory(psutil, member) for member in family))
        most_processes = max(most_processes, len(family))
        time.sleep(0.05)
    seconds = time.monotonic() - started
    assert process.returncode == 0
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["train"]
    rate = NUM_ROWS / seconds
    record_property("rows_per_second", rate)
    tokens = counts["prompt_tokens"] + counts["real_tokens"]
    sys.stderr.write(
        f"\n{kind}: {rate:.0f} rows/s, {tokens / seconds / 1e6:.2f}M tokens/s, {seconds:.0f} s, "
        f"peak {peak / 2**20:.0f} MiB in {most_processes} processes\n"
    )
    assert counts["rows"] + counts["quarantined"] == NUM_ROWS
    assert most_processes > 2, "it did not run in parallel"
    assert peak < MEMORY_LIMIT


def _converted(path: Path, kind: str) -> Path:
    if kind == "json":
        target = path.with_suffix(".json")
        with path.open() as lines, target.open("w") as stream:
            for number, line in enumerate(lines):
                stream.write(("[" if number == 0 else ",") + line)
            stream.write("]")
        return target
    if kind == "parquet":
        import pyarrow.json as pj
        import pyarrow.parquet as pq

        target = path.with_suffix(".parquet")
        pq.write_table(pj.read_json(path), target, row_group_size=NUM_ROWS)  # the worst case: one group
        return target
    return path


def _children(psutil: object, process: object) -> list[object]:
    try:
        return list(process.children(recursive=True))  # type: ignore[attr-defined]
    except psutil.NoSuchProcess:  # type: ignore[attr-defined]
        return []


def _memory(psutil: object, process: object) -> int:
    """Resident bytes; pages that processes share are counted in each."""
    try:
        return int(process.memory_info().rss)  # type: ignore[attr-defined]
    except psutil.NoSuchProcess:  # type: ignore[attr-defined]
        return 0
