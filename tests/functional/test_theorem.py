"""The theorem's example runs, and its claims hold: all five seeds, about ten seconds alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "theorem"


def run(*arguments: str, path: Path = EXAMPLE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(path / "theorem.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    plot = tmp_path_factory.mktemp("theorem") / "theorem.svg"
    return run("--plot", str(plot)), plot


def test_all_claims_hold(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    result, _ = finished
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout and result.stdout.rstrip().endswith("no claims failed")


def test_the_readme_s_numbers_are_those_it_prints(
    finished: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    result, _ = finished
    readme = (EXAMPLE / "README.md").read_text()
    (count,) = re.findall(r"checks (\d+) claims", readme)
    assert result.stdout.count("\n  ok ") == int(count)
    folds = [int(fold) for fold in re.findall(r"each of five iterations, (\d+)-fold", result.stdout)]
    assert len(folds) == 5 and min(folds) >= 100
    assert f"{min(folds)}- to {max(folds)}-fold" in readme
    printed = {
        name.strip(): [float(value) for value in values.split()]
        for name, values in re.findall(r"^  logistic, (beta .*?)  +([\d. e-]+)$", result.stdout, re.MULTILINE)
    }
    for name, key in [
        ("to the end, beta 2", "beta 2, to the end"),
        ("to the end, beta 0.6", "beta 0.6, to the end"),
        ("to the end, beta 0.4", "beta 0.4, to the end"),
        ("to the end, beta 0.1", "beta 0.1, to the end"),
        ("20 RMSProp steps, beta 0.1", "beta 0.1, 20 steps"),
    ]:
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| {name} |")]
        told = [float(cell) for cell in line.split("|")[2:-1] if cell.strip()]
        assert told == pytest.approx(printed[key], rel=0.03, abs=6e-5)


def test_the_plot_is_drawn(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, plot = finished
    tree = ElementTree.parse(plot)
    lines = tree.findall(".//{*}polyline")
    texts = [text.text for text in tree.findall(".//{*}text")]
    assert len(lines) == 6 and "beta 0.4, to the end" in texts
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        assert all(0 <= x <= 720 and 0 <= y <= 440 for x, y in points)


def test_a_claim_that_does_not_hold_ends_it_with_an_error(tmp_path: Path) -> None:
    # The same program with a wrong theorem: the optimum at beta 2 as if it were at beta 1.
    for file in EXAMPLE.glob("*.py"):
        source = file.read_text()
        if file.name == "theorem.py":
            assert source.count("closed_form(before, world.data, 1 / 2.0)") == 1
            source = source.replace(
                "closed_form(before, world.data, 1 / 2.0)", "closed_form(before, world.data, 1.0)"
            )
        (tmp_path / file.name).write_text(source)
    result = run("--seeds", "1", path=tmp_path)
    assert result.returncode == 1
    assert result.stdout.count("FAILED") == 1 and "1 claims failed" in result.stdout
