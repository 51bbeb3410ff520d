"""One HTML file that needs nothing else: style, code and data are inside.

Nothing of a run becomes markup. The data are JSON in `<script type="application/json">`,
with every `<` written as an escape, so that no text can end the element; the code puts
texts into the page as text nodes only. As a second wall, the page forbids itself
(Content-Security-Policy) to load anything, and to run any code but its own, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

_ASSETS = resources.files("nemo_spin.report") / "assets"
_SCRIPTS = ("dom.js", "plot.js", "overview.js", "training.js", "samples.js", "settings.js", "main.js")


def render(summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """The page.

    Args:
        summary: What is shown at once.
        samples: The texts, for each run; they come last and are read after the rest is shown.
        title: Of the page.
    """
    style = _asset("style.css")
    script = "'use strict';\n(() => {\n" + "\n".join(_asset(name) for name in _SCRIPTS) + "\n})();\n"
    parts = {
        "POLICY": f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_sha256(style)}'; script-src '{_sha256(script)}'",
        "TITLE": html.escape(title),
        "STYLE": style,
        "SUMMARY": embeddable_json(summary),
        "SCRIPT": script,
        "SAMPLES": embeddable_json(samples),
    }
    pieces = _asset("page.html").split("%%")  # text, NAME, text, NAME, ..., text
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def embeddable_json(value: Any) -> str:
    """Compact JSON that may stand in a script element; numbers that JSON lacks become null."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")
    return text.encode("utf-8", "replace").decode("utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(below) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(below) for below in value]
    return value


def _sha256(text: str) -> str:
    """The hash of an inline element's text, as a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
