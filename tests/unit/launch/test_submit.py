"""`nemo-spin slurm`: what it writes, shows and submits."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_spin import cli
from nemo_spin.config.load import load_config, read_yaml
from nemo_spin.errors import ConfigError
from nemo_spin.launch.submit import combinations, compose, run_name

GIVEN = ["model.path=models/m", "data.train=train.jsonl"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dry_run_shows_the_script_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["slurm", "--dry-run", *GIVEN, "run_dir=runs/a b", "trainer.num_nodes=2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#!/usr/bin/env bash\n") and "#SBATCH --nodes=2\n" in shown
    assert f"'{place}/runs/a b/slurm/config.yaml'" in shown
    assert list(place.iterdir()) == []


def test_the_configuration_is_written_as_it_is_now(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine.yaml").write_text("defaults: [spin, _self_]\nseed: 7\nspin: {beta: 0.5}\n")
    assert cli.main(["slurm", "--config", "mine.yaml", *GIVEN, "run_dir=r", "model/optim=adam"]) == 0
    assert capsys.readouterr().out.endswith(f"sbatch {place}/r/slurm/job.sh\n")
    written = read_yaml(place / "r" / "slurm" / "config.yaml")
    assert (written.seed, written.spin.beta, written.model.optim.name) == (7, 0.5, "adam")
    assert (written.launcher.name, written.run_dir) == ("slurm", str(place / "r"))
    again = load_config(str(place / "r" / "slurm" / "config.yaml"), [], command="run")
    assert again == written, "`nemo-spin run --config` reads what was written"
    assert (place / "r" / "slurm" / "job.sh").read_text() == compose(
        "mine.yaml", [*GIVEN, "run_dir=r", "model/optim=adam"], []
    ).text


def test_a_sweep_is_an_array_of_runs(place: Path) -> None:
    submission = compose(None, [*GIVEN, "run_dir=r"], ["seed=1,2", "spin.lr=[1e-6,1e-7,1e-7],5e-7"])
    submission.write()
    names = ["000-seed=1,spin.lr=_1e-6,1e-7,1e-7_", "001-seed=1,spin.lr=5e-7"]
    assert [path.parts[-3] for path in submission.places.configurations][:2] == names
    assert "#SBATCH --array=0-3\n" in submission.text
    written = [read_yaml(path) for path in submission.places.configurations]
    assert [(config.seed, config.spin.lr) for config in written] == [
        (1, [1e-6, 1e-7, 1e-7]),
        (1, 5e-7),
        (2, [1e-6, 1e-7, 1e-7]),
        (2, 5e-7),
    ]
    assert len({config.run_dir for config in written}) == 4
    assert not list((place / "r").glob("*.yaml")), "the directory around the runs is no run"


def test_values_are_parted_outside_of_brackets_and_quotes() -> None:
    assert combinations([]) == [()]
    assert combinations(["a.b='x,y',{c: [1,2]},3"]) == [("a.b='x,y'",), ("a.b={c: [1,2]}",), ("a.b=3",)]
    assert run_name(3, ("model.path=/a b/$(c)",)) == "003-model.path=_a_b_c_"
    assert len(run_name(3, ("x=" + "y" * 500,))) == 120
    for wrong in ("seed", "seed=", "seed=1,,2"):
        with pytest.raises(ConfigError, match="is no key with values"):
            combinations([wrong])


def test_every_run_of_a_sweep_is_checked_beforehand(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["slurm", *GIVEN, "run_dir=r", "--sweep", "spin.beta=0.1,-1"]) == 2
    assert "spin.beta" in capsys.readouterr().err
    assert cli.main(["slurm", *GIVEN, "run_dir=r", "--sweep", "trainer.num_nodes=1,2"]) == 2
    assert "jobs of the same size" in capsys.readouterr().err
    assert cli.main(["slurm", *GIVEN, "run_dir=r", "launcher=local"]) == 2
    assert "writes jobs of the launcher slurm" in capsys.readouterr().err
    assert not Path("r").exists()


def test_a_machine_without_slurm_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(place))
    assert cli.main(["slurm", "--submit", *GIVEN, "run_dir=r"]) == 1
    assert "sbatch" in (message := capsys.readouterr().err) and "the script is written" in message
    assert (place / "r" / "slurm" / "job.sh").exists()
