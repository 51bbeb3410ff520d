"""The command line: what it hands on, what it prints, how it exits, how fast it answers."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import nemo_spin
from nemo_spin import cli
from nemo_spin.config.compose import conf_dir
from nemo_spin.config.load import read_yaml
from nemo_spin.config.schema import Config
from nemo_spin.errors import ConfigError, StageError, explain
from nemo_spin.launch.local import LocalLauncher
from nemo_spin.selfplay.screen import Screen

GIVEN = ["run_dir=runs/x", "model.path=/models/m", "data.train=train.jsonl"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Records what reaches the loop, instead of running it."""
    from nemo_spin.selfplay import loop

    recorded: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    for name in ("run", "run_stage", "run_sft"):
        monkeypatch.setattr(
            loop, name, lambda *args, _name=name, **kwargs: recorded.append((_name, args, kwargs))
        )
    return recorded


def test_run_hands_the_configuration_to_the_loop(calls: list[Any]) -> None:
    assert cli.main(["run", "seed=7", *GIVEN]) == 0
    [(name, (config,), keywords)] = calls
    assert name == "run" and isinstance(config, Config) and config.seed == 7
    assert isinstance(keywords["launcher"], LocalLauncher) and isinstance(keywords["screen"], Screen)


@pytest.mark.parametrize("stage", ["generate", "score", "train", "export", "evaluate"])
def test_a_stage_takes_an_iteration(calls: list[Any], stage: str) -> None:
    assert cli.main([stage, *GIVEN, "--iteration", "2"]) == 0
    assert cli.main([stage, *GIVEN]) == 0
    assert [(name, args[1], keywords["iteration"]) for name, args, keywords in calls] == [
        ("run_stage", stage, 2),
        ("run_stage", stage, None),
    ]


@pytest.mark.parametrize("stage", ["prepare", "import-hf"])
def test_a_stage_without_iterations(calls: list[Any], stage: str) -> None:
    assert cli.main([stage, *GIVEN]) == 0
    [(name, args, keywords)] = calls
    assert (name, args[1], keywords["iteration"]) == ("run_stage", stage, None)


def test_sft_needs_its_own_output_and_no_run_directory(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sft", *GIVEN]) == 2
    assert "error: sft.output: is not set" in capsys.readouterr().err
    assert cli.main(["sft", *GIVEN[1:], "sft.output=runs/sft"]) == 0
    [(name, (config,), _)] = calls
    assert name == "run_sft" and config.sft.output == "runs/sft"


def test_options_may_stand_anywhere(calls: list[Any], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    orders = [
        ["--config", str(tmp_path / "mine.yaml"), *GIVEN, "--iteration", "1"],
        [GIVEN[0], "--config", str(tmp_path / "mine.yaml"), GIVEN[1], "--iteration=1", GIVEN[2]],
        ["--iteration", "1", *GIVEN, f"--config={tmp_path / 'mine.yaml'}"],
    ]
    for order in orders:
        assert cli.main(["train", *order]) == 0
    assert {(args[0].name, args[0].data.train, keywords["iteration"]) for _, args, keywords in calls} == {
        ("mine", "train.jsonl", 1)
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["rn"], "invalid choice: 'rn'"),
        (["run", "--foo"], "unrecognized arguments: --foo"),
        (["run", "--conf", "x"], "unrecognized arguments: --conf"),
        (["run", *GIVEN, "--iteration", "1"], "unrecognized arguments: --iteration"),
        (["status"], "the following arguments are required: RUN_DIR"),
        (["status", "a", "b"], "unrecognized arguments: b"),
        (["train", "--iteration", "-1"], "'-1' is not a whole number from 0"),
        (["train", "--iteration", "x"], "'x' is not a whole number from 0"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_mistakes_are_printed_without_a_traceback(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *GIVEN, "spin.bta=1", "spin.lr=[1,2]"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and not calls
    assert printed.err.splitlines() == [
        "error: 2 mistakes in the configuration",
        "- spin.bta: unknown key (from the override 'spin.bta=1')",
        "  rule:   only the keys of the schema can be set, all of which `nemo-spin validate-config` prints",
        "  remedy: did you mean `spin.beta`?",
        "- spin.lr: [1, 2] has 2 values, and there are 3 iterations",
        "  rule:   must be one value, or a list with one for each iteration",
        "  remedy: give 3 values, or set spin.iterations to 2",
    ]


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (
            ConfigError(explain("a", found=1, rule="b", remedy="c")),
            2,
            "error: a: 1\n  rule:   b\n  remedy: c\n",
        ),
        (StageError("train ended"), 1, "error: train ended\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here\n"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from nemo_spin.selfplay import loop

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(loop, "run", fail)
    assert cli.main(["run", *GIVEN]) == code
    assert capsys.readouterr().err == expected


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_spin.selfplay import loop

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", *GIVEN])


def test_validate_config_prints_what_read_yaml_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["validate-config", *GIVEN, "spin.beta=[1,2,3]"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["spin"]["beta"] == [1, 2, 3]
    (tmp_path / "config.yaml").write_text(text)
    assert read_yaml(tmp_path / "config.yaml").model.path == "/models/m"


def test_validate_config_checks_for_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate-config", "--for", "sft", *GIVEN[1:], "sft.output=o"]) == 0
    assert cli.main(["validate-config", *GIVEN[1:], "sft.output=o"]) == 2
    assert "run_dir: is not set" in capsys.readouterr().err


def test_status_prints_what_selfplay_describes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo_spin.selfplay import status

    monkeypatch.setattr(status, "describe", lambda run_dir: f"all about {run_dir}")
    assert cli.main(["status", "runs/x"]) == 0
    assert capsys.readouterr().out == "all about runs/x\n"


def run_command(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    root = path or Path(nemo_spin.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", "nemo_spin.cli", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["--version"], ["validate-config", *GIVEN], ["status", "."]]
)
def test_what_only_looks_answers_within_a_second_and_writes_nothing(
    arguments: list[str], tmp_path: Path
) -> None:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    done = run_command(*arguments, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    assert spent() - before < 1.0, "seconds of processor time; waiting for a busy machine does not count"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["run", "status"])
def test_starting_a_command_imports_neither_torch_nor_transformers(command: str) -> None:
    module = "loop, screen" if command == "run" else "status"
    code = (
        f"import sys; from nemo_spin.selfplay import {module}; import nemo_spin.launch.local\n"
        "heavy = {'torch', 'transformers', 'nemo', 'lightning', 'megatron', 'vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_installed_package_brings_its_configurations(tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(
        Path(nemo_spin.__file__).parent,
        site / "nemo_spin",
        ignore=shutil.ignore_patterns("__pycache__", "conf"),
    )
    shutil.copytree(conf_dir(), site / "nemo_spin" / "conf")
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n  - spin\n  - _self_\n  - override model/optim: adam\nname: mine\n"
    )
    done = run_command("validate-config", "--config", "mine.yaml", *GIVEN, cwd=tmp_path, path=site)
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load(done.stdout)
    assert printed["name"] == "mine" and printed["model"]["optim"]["name"] == "adam"
    bare = run_command("validate-config", *GIVEN, cwd=tmp_path, path=site)
    assert yaml.safe_load(bare.stdout)["name"] == "spin"


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    command = (
        f"{sys.executable} -m nemo_spin.cli validate-config {' '.join(GIVEN)} | true; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(nemo_spin.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, 141)
    assert done.stderr == ""
