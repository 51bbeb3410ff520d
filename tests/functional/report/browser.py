"""A real headless Chromium, driven through chromedriver's HTTP interface (W3C WebDriver).

Only what these tests need, on the standard library: no browser package to install, and
Debian's `chromium` and `chromium-driver` always fit each other.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # nothing may come from a network
)


def missing() -> str | None:
    """What keeps the tests from running; None where everything is there."""
    if _chromium() is None or shutil.which("chromedriver") is None:
        return "needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)"
    return None


def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


@contextlib.contextmanager
def open_browser(*, log: Path) -> Iterator[Browser]:
    """Starts a driver and a browser with an empty profile; ends both.

    Args:
        log: Gets the driver's output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, log.open("wb") as stream:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=stream, stderr=stream)
        try:
            browser = Browser(f"http://127.0.0.1:{port}", profile)
            try:
                yield browser
            finally:
                browser.quit()
        finally:
            driver.terminate()
            driver.wait(timeout=20)


class Browser:
    """One session with one tab.

    Args:
        url: Of the driver.
        profile: An empty directory.
    """

    def __init__(self, url: str, profile: str) -> None:
        self._driver = url
        self._wait_for_driver()
        options = {"binary": _chromium(), "args": [*_FLAGS, f"--user-data-dir={profile}"]}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        made = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"

    def _wait_for_driver(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                if self._send("GET", "/status")["ready"]:
                    return
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=240) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def quit(self) -> None:
        """Ends the browser."""
        self._send("DELETE", self._session)

    def open(self, path: Path) -> None:
        """Opens a file, as a double click does, and waits until everything that is unfolded is drawn."""
        self._send("POST", f"{self._session}/url", {"url": path.absolute().as_uri()})
        self.wait(
            "return document.querySelector('#sample-list .row, #sample-list .empty') !== null"
            " && [...document.querySelectorAll('.plot:empty')].every((e) => !e.checkVisibility())"
        )

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a JavaScript function's body."""
        return self._send(
            "POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)}
        )

    def wait(self, script: str, *, timeout_s: float = 60.0) -> Any:
        """Runs `script` until its value is true."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"still not true after {timeout_s} s: {script}"
            time.sleep(0.05)
        return value

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of Chrome's own protocol."""
        body = {"cmd": command, "params": parameters}
        return self._send("POST", f"{self._session}/goog/cdp/execute", body)

    def appear(self, *, width: int, height: int = 900, scheme: str = "light", phone: bool = False) -> None:
        """Sets the size of the page and the system's colour scheme."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])

    def type(self, selector: str, text: str) -> None:
        """Replaces what stands in an input by typing."""
        self.run("const e = document.querySelector(arguments[0]); e.value = ''; e.focus();", selector)
        self.devtools("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Clicks the first element that matches, with the mouse, after scrolling to it."""
        place = self.run(
            "const e = document.querySelector(arguments[0]);"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2];",
            selector,
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.devtools(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
            )

    def console(self) -> list[str]:
        """Warnings and errors since the last call, those of the browser itself included."""
        entries = self._send("POST", f"{self._session}/se/log", {"type": "browser"})
        return [f"{entry['level']}: {entry['message']}" for entry in entries if entry["level"] != "INFO"]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        entries = self._send("POST", f"{self._session}/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [message for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [str(message["params"]["request"]["url"]) for message in sent]

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Saves what is seen, or the whole page, as PNG."""
        picture = self.devtools("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))
