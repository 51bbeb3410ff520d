from __future__ import annotations

import json

import pytest

from nemo_spin import cli
from nemo_spin.errors import MachineError
from nemo_spin.selfplay.doctor import command
from nemo_spin.selfplay.doctor.finding import Finding

FINDINGS = [
    Finding("disk", "full", "error", "free some space"),
    Finding("links", "slow", "warning", "see plan"),
    Finding("torch", "2.13"),
]


def test_lines_say_what_is_wrong_and_what_to_do() -> None:
    assert command.written(FINDINGS, as_data=False).splitlines() == [
        "x disk   full",
        "         remedy: free some space",
        "! links  slow",
        "         remedy: see plan",
        "  torch  2.13",
        "1 error, 1 warning",
    ]
    assert command.written(FINDINGS[2:], as_data=False).splitlines()[-1] == "all is well"


def test_data_holds_the_same() -> None:
    data = json.loads(command.written(FINDINGS, as_data=True))
    assert data[0] == {"name": "disk", "text": "full", "status": "error", "remedy": "free some space"}
    assert [entry["name"] for entry in data] == ["disk", "links", "torch"]


def test_errors_are_refused_and_warnings_are_not() -> None:
    command.refuse_errors(FINDINGS[1:])
    with pytest.raises(MachineError, match="because of: disk"):
        command.refuse_errors(FINDINGS)


def test_the_exit_code_is_for_scripts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is found is a stand-in; the real thing is run by the README's test."""
    monkeypatch.setattr(command, "examine", lambda config, *, quick: FINDINGS)
    assert cli.main(["doctor", "--quick", "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)[0]["status"] == "error"
    assert "a run would fail here" in printed.err
    monkeypatch.setattr(command, "examine", lambda config, *, quick: FINDINGS[1:])
    assert cli.main(["doctor"]) == 0
