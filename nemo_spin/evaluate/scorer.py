"""A user's own measure of an answer: found by name, called with texts.

A scorer is a function `score(prompt: str, real: str, response: str) -> float`. It is named
`path/to/file.py:function` (relative to the working directory) or `package.module:function`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

from nemo_spin.config.functions import function_file, load_function, unusable
from nemo_spin.data.files import sha256_file, sha256_text
from nemo_spin.errors import ConfigError, explain

Scorer = Callable[[str, str, str], float]

_KEY = "evaluation.scorer"


def load_scorer(name: str) -> Scorer:
    """The function that `evaluation.scorer` names.

    Raises:
        ConfigError: There is no such file, module or function, it cannot be imported, or it does
            not take three texts.
    """
    scorer: Scorer = load_function(name, key=_KEY)
    try:
        inspect.signature(scorer).bind("prompt", "real", "response")
    except (TypeError, ValueError) as error:
        raise unusable(name, f"cannot be called with (prompt, real, response): {error}", key=_KEY) from error
    return scorer


def scorer_sha256(name: str | None) -> str | None:
    """Hash of the file that holds the scorer; None where there is no scorer.

    Raises:
        ConfigError: There is no such file or module.
    """
    if name is None:
        return None
    return sha256_text(f"{sha256_file(function_file(name, key=_KEY))}:{name.rpartition(':')[2]}")


def checked_score(scorer: Scorer, *, prompt: str, real: str, response: str) -> float:
    """The scorer's number for one answer.

    Raises:
        ConfigError: It raised an exception, or returned something else.
    """
    try:
        value = scorer(prompt, real, response)
    except Exception as error:  # a user's code may raise anything
        raise _failed(f"raised {type(error).__name__}: {error}", response) from error
    try:
        score = float(value)
    except (TypeError, ValueError) as error:
        raise _failed(f"returned {value!r:.60}", response) from error
    if not math.isfinite(score):
        raise _failed(f"returned {value!r}", response)
    return score


def _failed(found: str, response: str) -> ConfigError:
    return ConfigError(
        explain(
            _KEY,
            found=f"its function {found} for the response {response[:60]!r}",
            rule="score(prompt, real, response) returns a finite number for every answer",
            remedy="correct it, or set evaluation.scorer=null to evaluate without scores",
        )
    )
