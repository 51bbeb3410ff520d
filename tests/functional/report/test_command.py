from __future__ import annotations

from pathlib import Path

import pytest

from nemo_spin.cli import main
from tests.unit.report.runs import Shape, write_run

SMALL = Shape(prompts=6, heldout=2, steps=3)


def test_the_report_of_a_run_lies_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", SMALL)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith(str(tmp_path / "run/report.html"))
    assert "θ" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def test_several_runs_and_a_place_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, SMALL)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a", "b"]) == 0
    assert main(["report", "a", "b", "--samples", "2", "--output", "out/both.html"]) == 0
    assert (tmp_path / "comparison.html").stat().st_size > (tmp_path / "out/both.html").stat().st_size
    assert not (tmp_path / "a/report.html").exists()


@pytest.mark.parametrize(("name", "words"), [(".", "holds no run"), ("nowhere", "no such directory")])
def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str) -> None:
    assert main(["report", str(tmp_path / name)]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
