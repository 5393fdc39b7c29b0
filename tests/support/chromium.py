"""Drive the distribution's Chromium over the DevTools protocol; no driver to install."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless=new --hide-scrollbars --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --mute-audio "
    "--disable-background-networking --disable-component-update --disable-sync --disable-extensions "
    "--autoplay-policy=user-gesture-required --remote-debugging-port=0"
)


# an element's middle after the next picture is drawn, and whether a click there meets the element
_PLACE = """new Promise((done) => requestAnimationFrame(() => {
  const element = document.querySelector(%s);
  element.scrollIntoView({ block: "center" });  // the page may have grown since
  const { x, y, width, height } = element.getBoundingClientRect();
  const place = [x + width / 2, y + height / 2];
  done([...place, element.contains(document.elementFromPoint(...place))]);
}))"""


_NAVIGATING = re.compile("navigated or closed|context was destroyed|Cannot find context")


class Navigating(RuntimeError):
    """The page went elsewhere, or was loaded again, while it was asked."""


class Page:
    """One tab of a headless Chromium of its own."""

    def __init__(self, folder: Path, width: int = 1200, height: int = 900) -> None:
        arguments = [EXECUTABLE, *_FLAGS.split(), f"--user-data-dir={folder}", f"--window-size={width},{height}"]
        self._process = subprocess.Popen(
            [*arguments, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        port_file = folder / "DevToolsActivePort"
        self.errors: list[str] = []
        self._number = 0
        self.wait(lambda: port_file.exists() and len(port_file.read_text().splitlines()) == 2, 60)
        port = port_file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            target = next(t for t in json.load(answer) if t["type"] == "page")
        self._stack = contextlib.ExitStack()
        self._socket = self._stack.enter_context(connect(target["webSocketDebuggerUrl"], max_size=None))
        for domain in ("Page", "Runtime", "DOM", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def call(self, method: str, **parameters: Any) -> dict:
        """Send one command and return its result; note what the page complains about meanwhile."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._number:
                if "error" in message:
                    problem = f"{method}: {message['error']['message']}"
                    raise (Navigating if _NAVIGATING.search(problem) else RuntimeError)(problem)
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.errors.append(f"{message['params']['entry']['text']} {message['params']['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(lambda: self.run("document.readyState") == "complete" and self.run("location.href") != "about:blank")

    def run(self, script: str) -> Any:
        """Evaluate an expression, awaiting a promise, and return its value."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def wait(self, condition: Any, timeout_s: float = 60) -> None:
        """Wait until a function, or an expression in the page, is true."""
        deadline = time.monotonic() + timeout_s

        def holds() -> bool:
            try:
                return condition() if callable(condition) else self.run(condition)
            except Navigating:  # ask what comes next
                return False

        while not holds():
            if time.monotonic() > deadline:
                seen = self.run("document.body.innerText") if self._number else ""
                raise TimeoutError(f"{condition} isn't true after {timeout_s} s: {self.errors}\n{seen}")
            time.sleep(0.05)

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def click(self, selector: str) -> None:
        """Click with the mouse in an element's middle, once it keeps its place and nothing lies over it."""
        place: list = []

        def still() -> bool:
            last, place[:] = place[:], self.run(_PLACE % json.dumps(selector))
            return place == last and place[2]

        self.wait(still)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def key(self, name: str) -> None:
        code = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        text = {"text": "\r"} if name == "Enter" else {"text": name} if len(name) == 1 else {}
        number = code.get(name) or ord(name.upper())
        common = {"key": name, "windowsVirtualKeyCode": number, "code": "Space" if name == " " else name}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def look(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Take a screen's width and colours."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, whole: bool = True, kind: str = "png") -> None:
        quality = {} if kind == "png" else {"quality": 80}
        data = self.call("Page.captureScreenshot", format=kind, captureBeyondViewport=whole, **quality)["data"]
        path.write_bytes(base64.b64decode(data))
