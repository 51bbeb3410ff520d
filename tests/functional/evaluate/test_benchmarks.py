"""lm-eval through the real vLLM, on task files that lie beside this one and need no download."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.functional.commands import REPOSITORY, nemo_spin, write_config
from tests.functional.conftest import TinyData
from tests.functional.evaluate.tasks.backwards import rows

TASKS = Path(__file__).parent / "tasks"
PYTHON = Path(os.environ.get("NEMO_SPIN_EVAL_PYTHON", REPOSITORY / ".venv-eval" / "bin" / "python"))

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not PYTHON.exists(), reason=f"{PYTHON} is not there: bash examples/install.sh eval makes it"
    ),
]


@pytest.fixture(scope="module")
def config_path(tiny_model: Path, tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without held-out demonstrations: benchmarks are all that is evaluated."""
    directory = tmp_path_factory.mktemp("benchmarks")
    asked = {
        "backwards_choice": {"num_fewshot": 0, "metric": "acc"},
        "backwards_words": {"num_fewshot": 2},
    }
    return write_config(
        directory / "config.yaml",
        {
            "run_dir": str(directory / "run"),
            "model": {"path": str(tiny_model)},
            "data": {"train": str(tiny_data.train), "num_workers": 1},
            "generation": {"python": str(PYTHON), "kv_cache_gib": 0.02},
            "evaluation": {"benchmarks": {"tasks": asked, "include_path": str(TASKS), "max_length": 256}},
        },
    )


@pytest.fixture(scope="module")
def run_dir(config_path: Path) -> Path:
    """theta_0's evaluation, as the commands leave it."""
    for command in ("prepare", "evaluate"):
        done = nemo_spin(command, "--config", str(config_path))
        assert done.returncode == 0, done.stderr
    assert "backwards_choice" in done.stdout
    return Path(yaml.safe_load(config_path.read_text())["run_dir"])


def results(run_dir: Path) -> dict[str, Any]:
    evaluation: dict[str, Any] = json.loads((run_dir / "iter_00" / "opponent_evaluation.json").read_text())
    return evaluation


def choices_by_transformers(model_dir: Path) -> float:
    """Share of the questions whose right answer is the most likely one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    right = 0
    for row in rows():
        prompt = f"{row['prompt']}\nAnswer:"
        likelihoods = []
        for choice in row["choices"]:
            ids = tokenizer(f"{prompt} {choice}")["input_ids"]
            start = len(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            likelihoods.append(sum(float(logps[place - 1, ids[place]]) for place in range(start, len(ids))))
        right += likelihoods.index(max(likelihoods)) == row["right"]
    return right / len(rows())


def test_without_lm_eval_nothing_is_started(config_path: Path, tmp_path: Path) -> None:
    other = [f"generation.python={sys.executable}", f"run_dir={tmp_path / 'run'}"]
    refused = nemo_spin("run", "--config", str(config_path), *other)
    assert refused.returncode == 2
    assert f"{sys.executable} has no lm-eval" in refused.stderr and "pip install" in refused.stderr
    assert not (tmp_path / "run" / "data").exists()


def test_results_are_those_of_the_model(run_dir: Path, tiny_model: Path) -> None:
    found = results(run_dir)
    assert list(found) == ["benchmarks"]
    choice, words = (found["benchmarks"][name] for name in ("backwards_choice", "backwards_words"))
    share = choices_by_transformers(tiny_model)
    assert choice["value"] == pytest.approx(share)
    assert choice["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 11))  # of 12 questions
    assert (choice["metric"], choice["num_fewshot"], choice["questions"]) == ("acc,none", 0, 12)
    assert (words["metric"], words["num_fewshot"], words["value"]) == ("exact_match,none", 2, 0.0)
    assert choice["lm_eval"] and choice["limit"] is None
    assert list((run_dir / "iter_00" / "logs").glob("evaluate-theta_0-benchmarks.log"))


def test_status_and_report_show_them(run_dir: Path) -> None:
    value = results(run_dir)["benchmarks"]["backwards_choice"]["value"]
    status = nemo_spin("status", str(run_dir))
    assert f"theta_0          backwards_choice {100 * value:.2f}  backwards_words 0.00" in status.stdout
    assert "paper" not in status.stdout, "other tasks than the paper's"
    assert "backwards_choice" in (run_dir / "report.html").read_text()


def test_a_finished_task_is_not_asked_again(run_dir: Path, config_path: Path) -> None:
    """Without the manifest the command goes on from the results that are there; no engine is started."""
    directory, before = run_dir / "iter_00" / "opponent_evaluation", results(run_dir)
    (directory / "manifest.json").unlink()
    log = run_dir / "iter_00" / "logs" / "evaluate-theta_0-benchmarks.log"
    log.unlink()
    again = nemo_spin("evaluate", "--config", str(config_path))
    assert again.returncode == 0, again.stderr
    assert results(run_dir) == before and not log.exists()
