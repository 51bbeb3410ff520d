from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_spin.config.schema import Config, GenerationConfig
from nemo_spin.errors import ConfigError
from nemo_spin.generation import environment
from nemo_spin.generation.environment import find_python, package_parent, python_path, sampler_python


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working directory, no vLLM, no environment near this package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "somewhere" / ".venv"))
    monkeypatch.setattr(environment, "package_parent", lambda: tmp_path / "checkout")
    return tmp_path


def _interpreter(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_the_running_interpreter_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda _name: object())
    assert find_python(None) == sys.executable


@pytest.mark.parametrize("place", ["somewhere", "checkout", "."])
def test_then_the_environment_nearby(without_vllm: Path, place: str) -> None:
    python = _interpreter(without_vllm / place / ".venv-vllm" / "bin" / "python")
    assert Path(find_python(None)) == python.absolute()


def test_without_one_the_message_says_where_it_was_looked_for(without_vllm: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_python(None)
    for place in ("somewhere", "checkout"):
        assert str(without_vllm / place / ".venv-vllm") in str(caught.value)
    assert "install.sh" in str(caught.value)


def test_a_configured_interpreter_is_taken(without_vllm: Path) -> None:
    python = _interpreter(without_vllm / "mine" / "python")
    assert find_python(str(python)) == str(python)
    assert find_python("mine/python") == str(python)
    assert os.path.isabs(find_python("sh"))


def test_a_configured_interpreter_must_be_there(without_vllm: Path) -> None:
    (without_vllm / "python").write_text("not to be run")
    for name in ("/no/such/python", "./python"):
        with pytest.raises(ConfigError, match=r"generation\.python"):
            find_python(name)


def test_a_checkout_is_found_where_it_is(tmp_path: Path) -> None:
    assert python_path("/other/python", tmp_path) == str(package_parent())


def test_the_running_interpreter_keeps_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/opt/vllm")
    assert python_path(sys.executable, tmp_path) == f"{package_parent()}{os.pathsep}/opt/vllm"
    assert python_path("/other/python", tmp_path) == str(package_parent())


def test_from_an_installed_package_another_interpreter_sees_the_package_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    (site / "numpy").mkdir(parents=True)
    (site / "nemo_spin").mkdir()
    (site / "nemo_spin" / "__init__.py").write_text("FOUND = 1\n")
    monkeypatch.setattr(environment, "package_parent", lambda: site)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert python_path(sys.executable, tmp_path) == str(site)
    for _ in range(2):  # the second time it is there
        path = Path(python_path("/other/python", tmp_path / "logs"))
        assert [entry.name for entry in path.iterdir()] == ["nemo_spin"]
    script = "import nemo_spin; assert nemo_spin.FOUND == 1"
    subprocess.run([sys.executable, "-P", "-c", script], env={"PYTHONPATH": str(path)}, check=True)


def test_a_server_s_client_needs_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_python", lambda configured: f"found {configured}")
    assert sampler_python(Config(generation=GenerationConfig(engine="vllm_server"))) == sys.executable
    assert (
        sampler_python(Config(generation=GenerationConfig(engine="vllm_server", python="mine")))
        == "found mine"
    )
    assert sampler_python(Config(generation=GenerationConfig())) == "found None"
