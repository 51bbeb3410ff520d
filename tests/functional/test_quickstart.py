"""The quickstart, as a user starts it, on a handful of rows."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.functional.commands import REPOSITORY

QUICKSTART = REPOSITORY / "examples" / "quickstart"


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, QUICKSTART / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kind", "right"), [("ascending", "abcxyz"), ("descending", "zyxcba"), ("backwards", "zbxyca")]
)
def test_the_right_answer(kind: str, right: str) -> None:
    assert "".join(load("task").answer(kind, list("acyxbz"))) == right


def test_files_follow_from_the_seed_and_share_no_instruction(tmp_path: Path) -> None:
    sizes = ["--pretrain", "300", "--train", "200", "--heldout", "100"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        command = [sys.executable, str(QUICKSTART / "task.py"), str(tmp_path / name), *sizes, "--seed", seed]
        subprocess.run(command, check=True)
    prompts: list[str] = []
    for split in ("pretrain", "train", "heldout"):
        text = (tmp_path / "a" / f"{split}.jsonl").read_text()
        assert text == (tmp_path / "b" / f"{split}.jsonl").read_text()
        assert text != (tmp_path / "c" / f"{split}.jsonl").read_text()
        prompts += [json.loads(line)["messages"][0]["content"] for line in text.splitlines()]
    assert len(prompts) == len(set(prompts)) == 600


def test_half_of_the_unreliable_answers_are_wrong(tmp_path: Path) -> None:
    task = load("task")
    source = task.instructions(5)
    right = dict(next(source) for _ in range(1000))
    generator = task.random.Random(7)
    answers = [(text, task.careless(text, generator, 0.5)) for text in right.values()]
    wrong = sum(given != text for text, given in answers)
    assert 430 < wrong < 570
    assert all(sorted(given) == sorted(text) for text, given in answers)


def test_the_scorer_forgives_white_space_only() -> None:
    score = load("exact_match").score
    assert score("p", "a b", " a b\n") == 1.0
    assert score("p", "a b", "a b c") == 0.0
    assert score("p", "a b", "b a") == 0.0


@pytest.mark.skipif(
    Path(sys.prefix).resolve() != (REPOSITORY / ".venv").resolve(),
    reason="the quickstart installs .venv, and this is another environment: use bash tests/run.sh",
)
def test_it_runs_and_finds_everything_done_the_second_time(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "QUICKSTART_SMALL": "1", "QUICKSTART_DIR": "results"}
    command = ["bash", str(REPOSITORY / "examples" / "quickstart.sh")]

    def start() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=environment, cwd=elsewhere, capture_output=True, text=True, timeout=900, check=False
        )

    first = start()
    assert first.returncode == 0, first.stdout + first.stderr
    table = json.loads((elsewhere / "results" / "comparison.json").read_text())
    assert [row["model"] for row in table] == [
        "theta_0",
        "theta_0 at temperature 0.5",
        "theta_1 (self-play)",
        "continued fine-tuning",
    ]
    assert [row["steps"] for row in table] == [0, 0, 4, 4]
    assert all(0 <= row["sampled"] <= 1 for row in table)
    models = [elsewhere / "results" / name / "model" for name in ("theta_0", "spin/iter_00", "continued_sft")]
    written = [(model / "manifest.json").stat().st_mtime_ns for model in models]

    began = time.monotonic()
    second = start()
    assert second.returncode == 0, second.stdout + second.stderr
    assert time.monotonic() - began < 60
    assert second.stdout.splitlines()[-9:] == first.stdout.splitlines()[-9:]
    assert [(model / "manifest.json").stat().st_mtime_ns for model in models] == written
