"""A headless Chromium, driven through pipes with its DevTools protocol."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time

import pytest

PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")


def browser() -> str:
    """Returns the path of a browser; the test is skipped if there is none."""
    for name in PROGRAMS:
        if path := shutil.which(name):
            return path
    pytest.skip(f"none of {', '.join(PROGRAMS)} is installed")


class Page:
    """One tab. `errors` are messages of the console, `addresses` all that it requested."""

    def __init__(self, send, receive):
        self.send, self.receive, self.session, self.number = send, receive, None, 0
        self.errors, self.addresses = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.send.write(json.dumps(message).encode() + b"\0")
        self.send.flush()
        while (answer := self.read()).get("id") != self.number:
            self.note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self) -> dict:
        text = bytearray()
        while (byte := self.receive.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        return json.loads(text)

    def note(self, event: dict) -> None:
        method, facts = event["method"], event["params"]
        if method == "Network.requestWillBeSent":
            self.addresses.append(facts["request"]["url"])
        elif method == "Runtime.exceptionThrown" or (
            method == "Log.entryAdded" and facts["entry"]["level"] == "error"
        ):
            self.errors.append(facts)

    def run(self, script: str):
        """Returns the value of an expression."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, script: str, seconds: float = 120.0):
        """Returns the value of an expression as soon as it is truthy."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script}: {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def choose(self, selector: str, file) -> None:
        """Chooses a file in an input of a form."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def screenshot(self, path) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def open_page(address: str, profile, *options: str):
    """Opens an address in a new browser, whose files are in the folder `profile`."""
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", *options]
    command += [f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    from_us, to_browser = os.pipe()
    from_browser, to_us = os.pipe()
    # The browser reads from descriptor 3 and writes to 4.
    script = f'exec 8<&{from_us} 9>&{to_us}; exec "$@" 3<&8 4>&9'
    process = subprocess.Popen(
        ["bash", "-c", script, "browser", *command],
        pass_fds=(from_us, to_us),
        stderr=subprocess.DEVNULL,
    )
    os.close(from_us)
    os.close(to_us)
    with os.fdopen(to_browser, "wb") as send, os.fdopen(from_browser, "rb") as receive:
        try:
            page = Page(send, receive)
            page.call("Page.navigate", url=address)
            page.wait("location.href != 'about:blank' && document.readyState == 'complete'")
            yield page
        finally:
            process.terminate()
            process.wait()
