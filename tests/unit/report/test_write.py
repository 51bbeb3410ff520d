from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.data.worth_knowing import length_note, overlap_note
from nemo_spin.errors import DataError
from nemo_spin.report.sources import PartSource, RunSource, StageTime
from nemo_spin.report.write import display_names, write_report
from nemo_spin.selfplay.run_directory import RunDirectory
from tests.unit.report.runs import Shape, write_run


def embedded(path: Path, name: str) -> Any:
    html = path.read_text(encoding="utf-8")
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def write(tmp_path: Path, *runs: RunSource) -> list[dict[str, Any]]:
    write_report(runs, tmp_path / "report.html")
    return list(embedded(tmp_path / "report.html", "summary")["runs"])


def test_a_run_in_numbers(tmp_path: Path) -> None:
    (run,) = write(tmp_path, write_run(tmp_path / "run", Shape(iterations=3, steps=20)))
    assert run["notes"] == []
    assert [model["label"] for model in run["models"]] == ["θ0", "θ1", "θ2", "θ3"]
    evaluation = json.loads((tmp_path / "run/iter_01/evaluation.json").read_text())
    assert run["models"][2]["values"]["greedy_score"] == evaluation["greedy"]["score"]
    assert run["models"][0]["values"]["loss"] is None
    training = run["parts"][0]["training"]
    per_token = training["heldout_policy_real_logps_per_token"]
    assert run["models"][1]["values"]["real_perplexity"] == pytest.approx(math.exp(-per_token))
    ratio = training["heldout_opponent_real_logps"] / training["heldout_policy_real_logps"]
    assert run["models"][0]["values"]["policy_real_logps_per_token"] == pytest.approx(per_token * ratio)
    assert run["models"][0]["values"]["real_perplexity"] == pytest.approx(math.exp(-per_token * ratio))
    assert run["models"][3]["values"]["seconds"] == 310 + 95 + 900 + 21 + 64
    assert [part["curves"]["steps"] for part in run["parts"]] == [20, 20, 20]
    assert run["parts"][1]["times"]["train"] == {"seconds": 840.0, "attempts": 2}
    assert [histogram["title"] for histogram in run["histograms"]][:2] == [
        "Response lengths",
        "Margins after the iteration",
    ]
    assert [part["guards"] for part in run["parts"]] == [
        [],
        [
            {"stage": "train", "guard": "real_fall", "level": "warn", "step": 7}
            | {"message": "demonstrations became <b>less</b> likely"}
        ],
        [],
    ]
    assert run["settings"]["spin.beta"] == 0.1
    assert run["settings"]["spin.lr"] == "[1e-06, 5e-07]"
    rows = {(row["where"], row["what"]): row["value"] for row in run["provenance"]}
    assert rows["generate, iteration 0", "opponent"] == "cd" * 32
    assert rows["θ0", "architectures"] == "LlamaForCausalLM"
    assert ("written with", "pyarrow") in rows
    cluster = ("nodes", "devices of each", "started on")
    assert [rows["cluster", what] for what in cluster] == ["2", "8", "node-7"]
    benchmarks = run["benchmarks"]
    assert [row["label"] for row in benchmarks["rows"]] == ["θ0", "θ1", "θ2", "θ3"]
    assert benchmarks["columns"] == ["gsm8k"] and benchmarks["rows"][2]["values"] == [pytest.approx(0.35)]
    assert benchmarks["published"][0] == {"label": "paper's θ0", "values": [pytest.approx(0.2676)]}


def test_several_runs_keep_their_order_and_get_names_that_differ(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a/run"), write_run(tmp_path / "b/run", Shape(seed=1))
    runs = write(tmp_path, second, first)
    assert [run["name"] for run in runs] == ["b/run", "a/run"]
    assert len(embedded(tmp_path / "report.html", "samples")) == 2


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/x/a", "/x/b"], ["a", "b"]),
        (["/x/a", "/y/a"], ["x/a", "y/a"]),
        (["/x/a", "/x/a"], ["a", "a"]),
        (["/a"], ["a"]),
    ],
)
def test_display_names(paths: list[str], names: list[str]) -> None:
    assert display_names([Path(path) for path in paths]) == names


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    source = RunSource(path=run.path, config_path=run.config_path, data_dir=run.data_dir, parts=())
    (summary,) = write(tmp_path, source)
    assert [model["label"] for model in summary["models"]] == ["θ0"]
    assert summary["notes"][0].startswith("settings: not in this report")


def test_a_run_in_the_middle_of_an_iteration(tmp_path: Path) -> None:
    source = write_run(tmp_path / "run")
    later = source.parts[1].paths
    for directory in (later.scored, later.train, later.evaluation):
        shutil.rmtree(directory)
    with later.metrics_path.open("a") as stream:
        stream.write('{"split": "train", "st')
    later.evaluation_path.unlink()
    (run,) = write(tmp_path, source)
    assert run["notes"] == []
    assert run["models"][2]["values"]["greedy_score"] is None
    assert run["parts"][1]["curves"]["steps"] == 20


def test_plain_fine_tuning(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "sft")
    run.path.mkdir()
    run.config_path.write_text("sft: {lr: 1.0e-5}\n")
    lines = [
        {"split": "train", "step": step, "loss": 2.0, "policy_real_logps_per_token": -2.0} for step in (0, 1)
    ]
    run.sft.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part = PartSource(None, run.sft, {"sft": StageTime(60.0)})
    source = RunSource(path=run.path, config_path=run.config_path, data_dir=run.data_dir, parts=(part,))
    (summary,) = write(tmp_path, source)
    assert summary["parts"][0]["label"] == "fine-tuning"
    assert [model["label"] for model in summary["models"]] == ["θ0", "θ1"]
    assert summary["notes"] == []


@pytest.mark.parametrize(
    "name",
    [
        "iter_00/generated/manifest.json",
        "iter_00/generated/train-shard-00000-of-00002.parquet",
        "iter_01/scored/train-iter_00-shard-00000-of-00001.parquet",
        "iter_00/train/manifest.json",
        "iter_00/evaluation/manifest.json",
        "iter_00/evaluation.json",
        "iter_00/metrics.jsonl",
        "data/manifest.json",
        "data/train.parquet",
        "config.yaml",
    ],
)
@pytest.mark.parametrize("content", [b"", b"\xff\x00 not it", b'{"stage": 1}', b'["x", 3]', b"null", b"a: ["])
def test_whatever_is_damaged_the_report_is_written(tmp_path: Path, name: str, content: bytes) -> None:
    source = write_run(tmp_path / "run", Shape(prompts=8, heldout=2, steps=3))
    (tmp_path / "run" / name).write_bytes(content)
    (run,) = write(tmp_path, source)
    assert len(run["models"]) == 3


def test_not_a_number_is_said(tmp_path: Path) -> None:
    source = write_run(tmp_path / "run")
    with source.parts[0].paths.metrics_path.open("a") as stream:
        stream.write('{"split": "train", "step": 20, "loss": NaN, "grad_norm": Infinity}\n')
    (run,) = write(tmp_path, source)
    assert run["notes"] == [
        "iteration 0: not a number (NaN or infinite): loss from step 20, grad_norm from step 20"
    ]


def test_what_prepared_data_shows_is_said(tmp_path: Path) -> None:
    source = write_run(tmp_path / "run")
    path = source.data_dir / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["counts"]["heldout"]["also_in_train"] = 3
    manifest["counts"]["train"]["real_length"] = {"p50": 20, "p90": 90, "p99": 99, "max": 99}
    path.write_text(json.dumps(manifest))
    with source.config_path.open("a") as stream:
        stream.write("generation: {max_tokens: 30}\n")
    (run,) = write(tmp_path, source)
    notes = [overlap_note(manifest["counts"]), length_note(manifest["counts"], max_tokens=30)]
    assert run["notes"] == notes and None not in notes


def test_an_unwritable_place_is_an_error_of_the_user(tmp_path: Path) -> None:
    source = dataclasses.replace(write_run(tmp_path / "run", Shape(prompts=4, heldout=2)), parts=())
    (tmp_path / "report.html").mkdir()
    with pytest.raises(DataError, match="could not be written"):
        write_report([source], tmp_path / "report.html")


def test_writing_a_report_needs_no_torch() -> None:
    code = (
        "import sys, nemo_spin.report.write, nemo_spin.selfplay.reporting; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
