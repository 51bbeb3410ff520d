"""A user's own measure of an answer: found by name, called with texts.

A scorer is a function `score(prompt: str, real: str, response: str) -> float`. It is named
`path/to/file.py:function` (relative to the working directory) or `package.module:function`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from nemo_spin.data.files import sha256_file, sha256_text
from nemo_spin.errors import ConfigError, explain

Scorer = Callable[[str, str, str], float]

_RULE = "path/to/file.py:function or package.module:function, a function score(prompt, real, response)"


def load_scorer(name: str) -> Scorer:
    """The function that `evaluation.scorer` names.

    Raises:
        ConfigError: There is no such file, module or function, or it cannot be imported.
    """
    place, function_name = _parts(name)
    module = _load_file(name, Path(place)) if place.endswith(".py") else _import_module(name, place)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise _unusable(name, f"there is no function {function_name} in {place}")
    scorer: Scorer = function
    return scorer


def scorer_sha256(name: str | None) -> str | None:
    """Hash of the file that holds the scorer; None where there is no scorer.

    Raises:
        ConfigError: There is no such file or module.
    """
    if name is None:
        return None
    place, function_name = _parts(name)
    if place.endswith(".py"):
        path = _existing(name, Path(place))
    else:
        try:
            found = importlib.util.find_spec(place)
        except (ImportError, ValueError) as error:
            raise _unusable(name, f"{place} cannot be imported ({error})") from error
        if found is None or found.origin is None or not Path(found.origin).is_file():
            raise _unusable(name, f"there is no module {place}")
        path = Path(found.origin)
    return sha256_text(f"{sha256_file(path)}:{function_name}")


def checked_score(scorer: Scorer, *, prompt: str, real: str, response: str) -> float:
    """The scorer's number for one answer.

    Raises:
        ConfigError: It raised an exception, or returned something else.
    """
    try:
        value = scorer(prompt, real, response)
        score = float(value)
    except Exception as error:  # a user's code may raise anything
        raise _unusable(
            "its function", f"raised {type(error).__name__}: {error}, at response {response[:60]!r}"
        ) from error
    if not math.isfinite(score):
        raise _unusable("its function", f"returned {value!r} for the response {response[:60]!r}")
    return score


def _parts(name: str) -> tuple[str, str]:
    place, colon, function_name = name.rpartition(":")
    if not colon or not place or not function_name.isidentifier():
        raise _unusable(name, "is not a place and a function, with a colon between them")
    return place, function_name


def _existing(name: str, path: Path) -> Path:
    absolute = path.expanduser().absolute()
    if not absolute.is_file():
        raise _unusable(name, f"there is no file {absolute}")
    return absolute


def _load_file(name: str, path: Path) -> ModuleType:
    absolute = _existing(name, path)
    module_name = f"nemo_spin_scorer_{sha256_text(str(absolute))[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, absolute)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickles look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _unusable(name, f"{absolute} cannot be imported ({type(error).__name__}: {error})") from error
    return module


def _import_module(name: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise _unusable(name, f"{place} cannot be imported ({type(error).__name__}: {error})") from error


def _unusable(name: str, found: str) -> ConfigError:
    return ConfigError(
        explain(
            f"evaluation.scorer={name}",
            found=found,
            rule=f"{_RULE} -> float",
            remedy="correct it, or set evaluation.scorer=null to evaluate without scores",
        )
    )
