"""`nemo-spin plan` as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_spin import cli
from tests.unit.selfplay.planning import models


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return str(models.write(tmp_path / "my model", models.LLAMA_3_8B))


def test_tables(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", llama, "--gpus-per-node", "8", "--gpu", "H200"]) == 0
    said = capsys.readouterr().out
    assert "8.03B parameters, on 1 x 8 H200" in said
    for word in ("optimizer state", "head and loss", "generate", "score", "train", "export", "2 nodes"):
        assert word in said


def test_json_and_a_configuration_file(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"defaults: [spin, _self_]\nmodel: {{path: '{llama}'}}\ntrainer: {{devices: 8, num_nodes: 2}}\n"
    )
    arguments = ["plan", "--config", str(tmp_path / "mine.yaml"), "--json", "model.optim.name=adam"]
    assert cli.main([*arguments, "--pairs", "8000", "--generated-tokens", "100.5"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["cluster"]["nodes"] == 2 and data["cluster"]["gpus_per_node"] == 8
    assert data["pairs"] == 8000 and data["layout"]["work"]["generated"] == 100.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model.path"),
        (["--model", "missing"], "missing"),
        (["--gpu", "abacus"], "abacus"),
        (["--nodes", "0"], "--nodes"),
        (["--gpus-per-node", "1000"], "--gpus-per-node"),
        (["--pairs", "0"], "--pairs"),
        (["model.path"], "key=value"),
        (["model.nothing=1"], "model.nothing"),
    ],
)
def test_mistakes(llama: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [] if not arguments or "--model" in arguments else ["--model", llama]
    assert cli.main(["plan", *given, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_it_answers_without_torch(tmp_path: Path) -> None:
    model = models.write(tmp_path, models.LLAMA_2_70B)
    code = (
        "import sys; from nemo_spin import cli; "
        f"code = cli.main(['plan', '--model', {str(model)!r}, '--nodes', '32', '--gpus-per-node', '8']); "
        "heavy = {'torch', 'transformers', 'megatron.core', 'huggingface_hub'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
