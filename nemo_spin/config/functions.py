"""Functions of a user's own, named in the configuration: `place:function`.

The place is a file (`path/to/file.py`, relative to the working directory) or a module
(`package.module`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_spin.errors import ConfigError, explain

_FORM = "package.module:function or path/to/file.py:function"


def names_a_function(name: str) -> bool:
    """Whether `name` has the form `place:function`; whether it exists is not looked at."""
    return re.fullmatch(r".+:[A-Za-z_]\w*", name) is not None


def load_function(name: str, *, key: str) -> Callable[..., Any]:
    """The function that `name` names.

    Args:
        name: As in the configuration.
        key: The configuration key, for the messages.

    Raises:
        ConfigError: There is no such file, module or function, or it cannot be imported.
    """
    place, function_name = _parts(name, key)
    module = _load_file(name, place, key) if place.endswith(".py") else _import_module(name, place, key)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise unusable(name, f"there is no function {function_name} in {place}", key=key)
    found: Callable[..., Any] = function
    return found


def function_file(name: str, *, key: str) -> Path:
    """The source file of the function that `name` names, found without running it.

    Its hash belongs to the inputs of a stage that calls the function.

    Raises:
        ConfigError: There is no such file or module.
    """
    place, _ = _parts(name, key)
    if place.endswith(".py"):
        return _existing(name, place, key)
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError) as error:
        raise unusable(name, f"{place} cannot be imported ({error})", key=key) from error
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise unusable(name, f"there is no module {place}", key=key)
    return Path(spec.origin)


def unusable(name: str, found: str, *, key: str) -> ConfigError:
    """The error for a function that is not there, or does not do what it must."""
    return ConfigError(
        explain(
            f"{key}={name}",
            found=found,
            rule=f"names a function of your own as {_FORM}",
            remedy="correct the name or the function",
        )
    )


def _parts(name: str, key: str) -> tuple[str, str]:
    if not names_a_function(name):
        raise unusable(name, "is not a place and a function with a colon between them", key=key)
    place, _, function_name = name.rpartition(":")
    return place, function_name


def _existing(name: str, place: str, key: str) -> Path:
    path = Path(place).expanduser().absolute()
    if not path.is_file():
        raise unusable(name, f"there is no file {path}", key=key)
    return path


def _load_file(name: str, place: str, key: str) -> ModuleType:
    path = _existing(name, place, key)
    module_name = f"nemo_spin_user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickles look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        raise unusable(name, f"{path} raised {type(error).__name__}: {error}", key=key) from error
    return module


def _import_module(name: str, place: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except Exception as error:  # a user's module may raise anything
        raise unusable(
            name, f"{place} cannot be imported ({type(error).__name__}: {error})", key=key
        ) from error
