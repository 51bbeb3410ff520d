from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import nemo_spin.report
from nemo_spin.report.page import embeddable_json, render

ASSETS = Path(nemo_spin.report.__path__[0]) / "assets"
NASTY = [
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "]]> <![CDATA[",
    "%%SCRIPT%% %%",
    "\u2028\u2029\x00\r\n\t\\u003c",
    "𝔘𝔫𝔦 🦊 مرحبا",
]


class Elements(HTMLParser):
    """Texts of the script and style elements, as a browser's parser delimits them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[tuple[dict[str, str | None], str]] = []
        self._open: dict[str, str | None] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in ("script", "style"):
            self._open = {"tag": tag, **dict(attrs)}
            self.texts.append((self._open, ""))

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.texts[-1] = (self._open, self.texts[-1][1] + data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._open = None


@pytest.mark.parametrize("text", NASTY)
def test_no_text_can_end_the_data(text: str) -> None:
    page = Elements()
    page.feed(render({"name": text, text: 1}, [{"prompt": [text]}], title=text))
    data = {a["id"]: t for a, t in page.texts if a.get("type") == "application/json"}
    assert json.loads(data["summary"]) == {"name": text, text: 1}
    assert json.loads(data["samples"]) == [{"prompt": [text]}]
    assert page.tags.count("script") == 3
    assert "alert" not in page.tags


def test_a_lone_surrogate_and_numbers_that_json_lacks() -> None:
    text = embeddable_json({"a": [math.nan, math.inf, 1.5], "b": "\ud800"})
    assert json.loads(text) == {"a": [None, None, 1.5], "b": "?"}


def test_the_policy_allows_exactly_what_is_inside() -> None:
    html = render({}, [], title="t")
    page = Elements()
    page.feed(html)
    found = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert found is not None
    policy = found[1]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        (text,) = [t for a, t in page.texts if a["tag"] == kind and "type" not in a]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_the_assets_load_nothing_and_never_make_markup_of_a_text() -> None:
    for path in ASSETS.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path
        for forbidden in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "Function(",
        ):
            assert forbidden not in text, path
