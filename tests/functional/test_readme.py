"""Every command in the README is run by a test: here, or where it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.config.schema import Config
from nemo_spin.data.files import read_manifest
from tests.functional.commands import REPOSITORY, VLLM_PYTHON, nemo_spin
from tests.functional.conftest import TinyData

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
ELSEWHERE = {
    "bash examples/quickstart.sh": "test_quickstart.py",
    "bash tests/run.sh": "it runs this test",
    "python -m examples.comparison": "test_comparison.py",
    "source .venv/bin/activate": "the tests run in that environment",
    "docker build --target cpu --build-arg PIP_EXTRA_INDEX_URL --tag nemo-spin:cpu .": "test_dockerfile.py",
    "docker build --tag nemo-spin .": "no engine runs here: test_dockerfile.py reads the instructions",
}
CONFIGURATION = "my.yaml"
# The README's model is larger than a test's: what makes it quick, and where vLLM is found.
QUICK = [
    "spin.iterations=1",
    "spin.beta=0.1",
    "spin.lr=5e-7",
    "spin.epochs=1",
    "model.global_batch_size=16",
    "generation.max_tokens=16",
    "data.num_workers=1",
    *([f"generation.python={VLLM_PYTHON}"] if VLLM_PYTHON else []),
]


def blocks(language: str) -> list[str]:
    """What stands between fences of this language; of none: ""."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def commands() -> Iterator[str]:
    for block in blocks("bash"):
        yield from (line for line in block.splitlines() if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: TinyData) -> Path:
    """A user's directory: the README's configuration, a model and data where it names them."""
    directory = tmp_path_factory.mktemp("readme")
    (example,) = (block for block in blocks("yaml") if CONFIGURATION in block)
    (directory / CONFIGURATION).write_text(example, encoding="utf-8")
    for place, source in (
        ("models/my-sft-model", tiny_model),
        ("data/train.jsonl", tiny_data.train),
        ("data/heldout.jsonl", tiny_data.heldout),
    ):
        (directory / place).parent.mkdir(exist_ok=True)
        (directory / place).symlink_to(source)
    return directory


def test_the_commands_that_cost_much_are_tested_elsewhere() -> None:
    found = list(commands())
    assert len(found) > 10
    for command in found:
        assert command.startswith("nemo-spin ") or command in ELSEWHERE, f"not run by a test: {command}"
    assert set(ELSEWHERE) <= set(found)
    assert "tests/run.sh" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    assert (Path(__file__).parent / ELSEWHERE["bash examples/quickstart.sh"]).exists()


def test_the_commands_do_what_the_readme_says(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    for command in commands():
        if command in ELSEWHERE:
            continue
        words = shlex.split(command)[1:]
        quick = QUICK if "--config" in words else []
        if words[0] == "validate-config":
            quick = []  # as it stands
        result = nemo_spin(*words, *quick)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    for place in places_of_results():
        assert (project / "runs" / "my-model" / place).exists(), f"the README promises {place}"
    assert read_manifest(project / "runs" / "theta_0" / "model") is not None


def places_of_results() -> list[str]:
    """The files that the README says lie in a run directory."""
    (tree,) = (block for block in blocks("") if "iter_00/" in block)
    places, prefix = [], ""
    for line in tree.splitlines()[1:]:
        names = [name for name in line.strip().split("   ")[0].split("  ") if name]
        if "…" in line.split("   ")[0]:
            continue
        if not line.startswith("    "):
            prefix = names[0] if names[0].startswith("iter_") else ""
        nested = line.startswith("    ")
        places += [(prefix if nested else "") + name for name in names]
    return places


def test_a_configuration_key_in_the_text_exists() -> None:
    """Dotted keys, in the text and in commands, are known to the schema."""
    sections = [field.name for field in fields(Config) if is_dataclass(getattr(Config(), field.name))]
    key = rf"(?<![\w./-])(?:{'|'.join(sections)})(?:\.[a-z_0-9]+)+(?![\w(/-])"
    found = set(re.findall(key, README)) - {"evaluation.json"}  # a file
    assert {name.partition(".")[0] for name in found} == set(sections)
    for dotted in found:
        value: Any = Config()
        for name in dotted.split("."):
            if not is_dataclass(value):
                assert isinstance(value, dict), f"{dotted} is no key"  # whose keys are of other programs
                break
            assert hasattr(value, name), f"{dotted} is no key"
            value = getattr(value, name)


def test_the_links_to_files_hold() -> None:
    for name in re.findall(r"`((?:examples|conf|tests)/[\w./-]+)`", README):
        assert (REPOSITORY / name).exists(), name


def test_continuous_integration_starts_the_tests() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    result = subprocess.run(["bash", "-n", str(script)], check=False)
    assert result.returncode == 0
    assert sys.version_info >= (3, 11)
