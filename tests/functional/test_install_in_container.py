"""The pip steps of the GPU image, by a real pip: a stand-in for a container, an index of tiny wheels."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from tests.functional.commands import REPOSITORY

SCRIPT = REPOSITORY / "examples" / "install_in_container.py"
TORCH = "2.9.0a0+145a3a7bda.nv26.6"  # as NVIDIA's builds are numbered: on no index
LOGGER = "nv-one-logger-pytorch-lightning-integration"
PROJECT = """
[build-system]
requires = ["builder>=1"]
build-backend = "builder"

[project]
name = "nemo_spin"
dependencies = ["numpy>=1"]

[project.optional-dependencies]
train = ["torch>=2.6", "megatron-core>=0.16", "nemo-toolkit[common]>=3,<4", "lightning>=2"]
"""
BUILDER = """
import os, zipfile
def build_wheel(directory, config_settings=None, metadata_directory=None):
    name = "nemo_spin-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(directory, name), "w") as wheel:
        info = "nemo_spin-0.1.0.dist-info/"
        wheel.writestr("nemo_spin.py", "")
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: nemo_spin\\nVersion: 0.1.0\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "nemo_spin.py,,\\n")
    return name
"""


def add_wheel(
    index: Path, name: str, version: str, *, requires: Sequence[str] = (), source: str = "", extra: str = ""
) -> None:
    """A package of one module."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += [f"Provides-Extra: {extra}"] if extra else []
    metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
    with zipfile.ZipFile(index / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}.py", source)
        wheel.writestr(f"{info}/METADATA", "\n".join([*metadata, ""]))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class Container:
    """An environment with its own torch and a source tree of Megatron-Core, a project, an index."""

    def __init__(self, python: Path, directory: Path) -> None:
        self.python = python
        self.index, self.project, self.sources = (directory / name for name in ("index", "project", "src"))
        for path in (self.index, self.project / "examples", self.sources / "megatron" / "core"):
            path.mkdir(parents=True)
        (self.sources / "megatron" / "core" / "__init__.py").touch()
        shutil.copy(SCRIPT, self.project / "examples")
        (self.project / "pyproject.toml").write_text(PROJECT)
        add_wheel(self.index, "builder", "1.0", source=BUILDER)
        for version in ("2.4", "2.5"):
            add_wheel(self.index, "numpy", version)
        add_wheel(self.index, "torch", TORCH)
        add_wheel(self.index, "torch", "2.10.0")
        add_wheel(self.index, "megatron-core", "0.19.0")
        for version in ("1.0", "2.0"):
            add_wheel(self.index, "einops", version)
        for version in ("2.4", "2.5"):
            add_wheel(self.index, "lightning", version, requires=["numpy<2.4", "torch>=2"])
        add_wheel(self.index, LOGGER, "2.3", requires=["lightning"])
        common = [f'{line}; extra == "common"' for line in ("einops", "lightning<=2.4", LOGGER)]
        self.offer_nemo("3.0.0", "torch>=2.6", *common, 'absent; extra == "asr"')
        self.pip("install", f"torch=={TORCH}", "numpy==2.4")

    def offer_nemo(self, version: str, *requires: str) -> None:
        add_wheel(self.index, "nemo-toolkit", version, requires=requires, extra="common")

    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
        return kept | {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONPATH": str(self.sources),
        }

    def pip(self, *arguments: str) -> str:
        command = [str(self.python), "-m", "pip", *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, env=self.environment(), timeout=120
        ).stdout

    def install(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        script = self.project / "examples" / SCRIPT.name
        return subprocess.run(
            [str(self.python), str(script), *arguments],
            check=False,
            capture_output=True,
            text=True,
            env=self.environment() | environment,
            timeout=120,
        )

    def versions(self) -> dict[str, str]:
        lines = self.pip("list", "--format=freeze").split()
        return dict(line.split("==") for line in lines)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with nothing but pip, made once."""
    place = tmp_path_factory.mktemp("container") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True, capture_output=True, timeout=120)
    return place / "bin" / "python"


@pytest.fixture
def container(empty: Path, tmp_path: Path) -> Iterator[Container]:
    prepared = Container(empty, tmp_path)
    yield prepared
    found = [name for name in prepared.versions() if name not in ("pip", "setuptools", "wheel")]
    prepared.pip("uninstall", "--yes", *found)


def test_nemo_is_added_and_nothing_replaced(container: Container, tmp_path: Path) -> None:
    before = container.versions()
    result = container.install("--constraints", str(tmp_path / "kept.txt"))
    assert result.returncode == 0, result.stderr
    after = container.versions()
    assert after.items() >= before.items()
    added = {name.replace("_", "-") for name in after.keys() - before.keys()}
    assert added == {"builder", "einops", "lightning", "nemo-toolkit", "nemo-spin", LOGGER}, (
        "Megatron-Core is there as a source tree"
    )
    assert after["lightning"] == "2.4", "as NeMo wants it"
    assert "note: lightning asks for numpy<2.4, 2.4 stays" in result.stdout
    assert f"torch=={TORCH}" in (tmp_path / "kept.txt").read_text().splitlines()
    assert f"torch {TORCH}" in result.stdout and "vllm  is not there" in result.stdout
    again = container.install()
    assert again.returncode == 0, again.stderr


def test_a_nemo_that_needs_another_torch_is_refused(container: Container) -> None:
    (container.index / "nemo_toolkit-3.0.0-py3-none-any.whl").unlink()
    container.offer_nemo("3.1.0", "torch>=2.10")
    before = container.versions()
    result = container.install()
    assert result.returncode == 2
    assert "error: pip could not add" in result.stderr and "--may-change" in result.stderr
    assert container.versions().items() >= before.items()


def test_a_package_may_be_replaced_if_it_is_allowed_to(container: Container) -> None:
    project = container.project / "pyproject.toml"
    project.write_text(PROJECT.replace("numpy>=1", "numpy>=2.5"))
    assert container.install().returncode == 2
    assert container.install("--may-change", "NumPy").returncode == 2, "lightning wants an older one"
    lightning = container.index / "lightning-2.4-py3-none-any.whl"
    lightning.unlink()
    add_wheel(container.index, "lightning", "2.4", requires=["numpy"])
    container.pip("uninstall", "--yes", "lightning")
    result = container.install("--may-change", "NumPy")
    assert result.returncode == 0, result.stderr
    assert container.versions()["numpy"] == "2.5"
    assert container.versions()["torch"] == TORCH


def test_what_the_container_is_built_around_may_never_be(container: Container) -> None:
    result = container.install("--may-change", "numpy", "torch")
    assert result.returncode == 2 and "never replaced" in result.stderr
    assert "nemo-toolkit" not in container.versions()


def test_the_images_own_constraints_hold_for_what_it_lacks(container: Container, tmp_path: Path) -> None:
    own = tmp_path / "constraint.txt"
    own.write_text("# by the image\neinops<2  # reason\nnumpy==1.0\n")
    result = container.install(PIP_CONSTRAINT=str(own))
    assert result.returncode == 0, result.stderr
    assert container.versions()["einops"] == "1.0"
    assert container.versions()["numpy"] == "2.4", "what is installed decides"


def test_an_environment_without_torch_is_none_of_a_container(container: Container) -> None:
    container.pip("uninstall", "--yes", "torch")
    result = container.install()
    assert result.returncode == 2 and "has no torch" in result.stderr


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_in_container", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_replaced_version_or_place_is_noticed(script: ModuleType) -> None:
    before = {"versions": {"torch": "2.9+nv", "numpy": "2.4"}, "places": {"apex": "/opt/apex/__init__.py"}}
    after = {"versions": {"torch": "2.9", "numpy": "2.5", "einops": "1"}, "places": {}}
    assert script.changes(before, before | {"versions": {**before["versions"], "einops": "1"}}, set()) == []
    assert script.changes(before, after, {"numpy"}) == [
        "torch: 2.9+nv -> 2.9",
        "apex: /opt/apex/__init__.py -> gone",
    ]


def test_what_the_image_asks_for_is_what_pyproject_asks_for(script: ModuleType) -> None:
    wanted = {script.normalized(line) for line in script.requirements({"versions": {}, "places": {}})}
    assert {"nemo-toolkit", "megatron-core", "torch", "hatchling", "transformers"} <= wanted
    assert "apex" not in wanted and "vllm" not in wanted
