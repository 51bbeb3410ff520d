from __future__ import annotations

from pathlib import Path

import pytest

from nemo_spin.config.schema import Config
from nemo_spin.selfplay.doctor.finding import Finding
from nemo_spin.selfplay.doctor.packages import examine_packages


def named(findings: list[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


@pytest.fixture
def no_sampler() -> Config:
    """Asks nobody: an interpreter that is not there is the quickest."""
    config = Config()
    config.generation.python = "/nowhere/python"
    return config


def test_versions_and_places(no_sampler: Config) -> None:
    import torch

    found = named(examine_packages(no_sampler), "torch")
    assert found.status == "ok"
    assert found.text == f"{torch.__version__} ({Path(torch.__file__).parents[1]})"


@pytest.mark.parametrize(("is_nvidias", "status"), [(False, "error"), (True, "ok")])
def test_the_apex_of_the_public_index_is_recognised(
    *,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_sampler: Config,
    is_nvidias: bool,
    status: str,
) -> None:
    """Directories laid out as the two packages are; the real ones can be installed nowhere here."""
    package = tmp_path / "apex"
    (package / "optimizers").mkdir(parents=True)
    (package / "__init__.py").touch()
    if is_nvidias:
        (package / "optimizers" / "fused_adam.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = named(examine_packages(no_sampler), "apex")
    assert found.status == status
    assert str(package) in found.text
    assert ("pip uninstall apex" in found.remedy) is not is_nvidias


def test_a_sampler_that_is_not_there_is_an_error(no_sampler: Config) -> None:
    found = named(examine_packages(no_sampler), "sampler")
    assert found.status == "error"
    assert "/nowhere/python" in found.text
    assert found.remedy


def test_an_interpreter_without_vllm_is_an_error_unless_a_server_has_it() -> None:
    import sys

    here = Config()
    here.generation.python = sys.executable
    found = named(examine_packages(here), "sampler")
    assert found.status == "error"
    assert "nothing of vLLM" not in found.text, "it has torch"
    here.generation.engine, here.generation.server = "vllm_server", "http://127.0.0.1:1"
    assert named(examine_packages(here), "sampler").status == "ok"
