"""A real Chromium without a window, driven over its debugging pipe: opens a file, presses keys, tells what scripts and networks did.
Knows nothing of what a page holds."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

SECONDS_MAX = 30
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--window-size=1200,1000",
]


def program() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page. Protocol: JSON messages that end in a zero byte, to descriptor 3 and from descriptor 4 of the browser."""

    def __init__(self, profile: Path):
        (to_read, self.to), (self.back, back_write) = os.pipe(), os.pipe()
        # Away from 3 and 4, so that the shell can put one there without closing the other.
        theirs = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (to_read, back_write)]
        shell = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
        command = ["bash", "-c", shell, "bash", program(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=theirs)
        for one in (to_read, back_write, *theirs):
            os.close(one)
        self.unread, self.number, self.session = b"", 0, None
        self.complaints, self.requests, self.events = [], [], []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # no window has the focus, and elements are told nothing without

    def call(self, method: str, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (reply := self.message()).get("id") != self.number:
            self.note(reply)
        assert "error" not in reply, (method, reply["error"])
        return reply["result"]

    def message(self) -> dict:
        deadline = time.monotonic() + SECONDS_MAX
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.back], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"the browser said nothing for {SECONDS_MAX} s"
            part = os.read(self.back, 1 << 16)
            assert part, f"the browser ended with {self.process.wait(SECONDS_MAX)}"
            self.unread += part
        text, self.unread = self.unread.split(b"\0", 1)
        return json.loads(text)

    def note(self, event: dict):
        method, params = event.get("method"), event.get("params", {})
        self.events.append(method)
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening"):
            self.complaints.append(params)
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, file: Path):
        self.call("Page.navigate", url=file.resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self.note(self.message())

    def evaluate(self, script: str):
        """The value of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str):
        code = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def point(self, x: float, y: float):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.to)
        os.close(self.back)
