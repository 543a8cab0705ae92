"""Headless Chromium, driven over its debugging pipe (Chrome DevTools Protocol): no driver, no websocket.

with Browser(executable) as browser:
    page = browser.open("http://127.0.0.1:8000/", width=1200, height=800)
    page.type("#message", "Hello")
    page.click("#send")
    page.wait_for("document.querySelector('.assistant').textContent.length > 3")
"""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The first Chromium on PATH."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser process with a profile of its own."""

    def __init__(self, executable: str) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()

        def connect() -> None:
            # The protocol's fixed numbers. First out of the way, lest one overwrites the other.
            commands, answers = os.dup(to_child), os.dup(from_child)
            os.dup2(commands, 3)
            os.dup2(answers, 4)

        flags = ["--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--mute-audio",
                 "--hide-scrollbars", "--disable-dev-shm-usage", "--disable-background-networking",
                 f"--user-data-dir={self._profile.name}"]  # fmt: skip
        if os.geteuid() == 0:
            flags.append("--no-sandbox")
        self._process = subprocess.Popen(
            [executable, *flags], close_fds=False, preexec_fn=connect, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_child)
        os.close(from_child)
        self._buffer, self._count = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self.call("Browser.close")
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def call(self, method: str, session: str | None = None, seconds: float = 300, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; what else comes is kept in `events`."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + seconds
        while True:
            while b"\0" in self._buffer:
                part, self._buffer = self._buffer.split(b"\0", 1)
                message = json.loads(part)
                if message.get("id") == self._count:
                    assert "error" not in message, (method, message["error"])
                    return message["result"]
                # An answer that came too late is not an event.
                if "id" not in message:
                    self.events.append(message)
            ready, _, _ = select.select([self._in], [], [], max(0, end - time.monotonic()))
            assert ready, f"{method}: the browser did not answer within {seconds} s"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has exited"
            self._buffer += data

    def open(self, url: str, width: int, height: int, phone: bool = False) -> "Page":
        """A new page of this size, loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.size(width, height, phone)
        page.call("Page.navigate", url=url)
        page.wait_for("document.readyState === 'complete'")
        return page


class Page:
    """What a person can do with a page."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to this page."""
        return self._browser.call(method, self._session, **params)

    def size(self, width: int, height: int, phone: bool = False) -> None:
        """Set the viewport, in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def close(self) -> None:
        """Close it, whatever its scripts are doing."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        message = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in message, message["exceptionDetails"]
        return message["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 300) -> None:
        """Wait until an expression is true; the limit is there so that a fault ends the test."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of what the selector finds."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'nearest'}}); "
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2, b.width]; })()"
        )
        assert box[2] > 0, f"{selector} cannot be seen"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Click a field and type into it."""
        self.click(selector)
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """A key by its name, such as Enter, Tab or ArrowLeft."""
        code = {"Enter": 13, "Tab": 9, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      modifiers=8 if shift else 0)  # fmt: skip
            if kind == "rawKeyDown" and key == "Enter":
                self.call("Input.dispatchKeyEvent", type="char", text="\r", key=key, windowsVirtualKeyCode=13)

    def problems(self) -> list[str]:
        """Errors the page logged since the last call: exceptions, refused content, failed requests."""
        self.evaluate("1")
        problems = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                problems.append(event["params"]["exceptionDetails"]["text"])
            if event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                problems.append(event["params"]["entry"]["text"])
        self._browser.events[:] = [e for e in self._browser.events if e["method"] == "Network.requestWillBeSent"]
        return problems

    def requests(self) -> list[str]:
        """Addresses the page asked for."""
        return [request["url"] for request in self._requests()]

    def sent(self, path: str) -> list[str]:
        """Bodies of the page's requests to addresses that end so, as they were sent."""
        requests = self._requests()
        return [one["postData"] for one in requests if one["url"].endswith(path) and "postData" in one]

    def _requests(self) -> list[dict[str, Any]]:
        self.evaluate("1")
        return [
            event["params"]["request"]
            for event in self._browser.events
            if event.get("sessionId") == self._session and event["method"] == "Network.requestWillBeSent"
        ]

    def download_to(self, folder: Path) -> None:
        """Where files that the page offers are written, under the names that it gives them."""
        self._browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def screenshot(self, path: Path) -> None:
        """A PNG of what can be seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
