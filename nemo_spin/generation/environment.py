"""Finds the interpreter that can run the sampler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import nemo_spin
from nemo_spin.config.schema import Config
from nemo_spin.errors import ConfigError, explain

_PYTHON = Path("bin") / "python"
_ENVIRONMENT = ".venv-vllm"


def sampler_python(config: Config) -> str:
    """The interpreter of the sampler's process; it needs no vLLM where a server has it.

    Raises:
        ConfigError: There is none.
    """
    generation, launcher = config.generation, config.launcher
    if launcher.name == "slurm" and launcher.slurm.container_image is not None:
        return generation.python or "python"  # of the container, which cannot be seen from here
    if generation.engine == "vllm_server" and generation.python is None:
        return sys.executable
    return find_python(generation.python)


def find_python(configured: str | None) -> str:
    """An interpreter that has vLLM.

    Args:
        configured: `generation.python`. None: the running interpreter if it has vLLM,
            else that of `.venv-vllm` beside the running environment, in the directory
            that holds this package, or in the working directory.

    Raises:
        ConfigError: There is none.
    """
    if configured is not None:
        found = shutil.which(os.path.expanduser(configured))
        if found is None:
            raise ConfigError(
                explain(
                    f"generation.python={configured}",
                    found="is not a program that can be run",
                    rule="the interpreter of an environment with vLLM",
                    remedy="check the path, or leave it out where .venv-vllm lies beside the environment",
                )
            )
        return os.path.abspath(found)
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    candidates = [parent / _ENVIRONMENT / _PYTHON for parent in _neighbourhood()]
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return str(candidate)
    raise ConfigError(
        explain(
            "generation.python=null",
            found="this interpreter has no vLLM, and there is no "
            + " or ".join(str(candidate.parent.parent) for candidate in candidates),
            rule="answers are sampled by vLLM, in an environment of its own",
            remedy="run `bash examples/install.sh`, or set generation.python to an interpreter with vLLM",
        )
    )


def _neighbourhood() -> list[Path]:
    """Where `.venv-vllm` may lie, without repetitions."""
    places = [Path(sys.prefix).parent, package_parent(), Path.cwd()]
    return list(dict.fromkeys(place.absolute() for place in places))


def package_parent() -> Path:
    """The directory that holds the running package."""
    return Path(nemo_spin.__file__).resolve().parent.parent


def python_path(python: str, scratch: Path) -> str:
    """The PYTHONPATH with which `python` finds this package, and nothing of another interpreter's.

    An installed package lies among the libraries of the running environment, which must
    not be seen by another one: there a directory with a link to the package is made.

    Args:
        python: The interpreter that is going to import the package.
        scratch: Where the directory may be made.
    """
    parent = package_parent()
    if os.path.abspath(python) == os.path.abspath(sys.executable):
        known = os.environ.get("PYTHONPATH")
        return f"{parent}{os.pathsep}{known}" if known else str(parent)
    is_shared = any((parent / name).exists() for name in ("omegaconf", "numpy", "pip"))
    if not is_shared:
        return str(parent)
    link = scratch / ".package" / "nemo_spin"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink() or link.resolve() != parent / "nemo_spin":
        link.unlink(missing_ok=True)
        link.symlink_to(parent / "nemo_spin", target_is_directory=True)
    return str(link.parent)
