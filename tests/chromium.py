"""A real browser, controlled over the Chrome DevTools Protocol."""

import contextlib
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from tests.processes import TIMEOUT, environment, started, wait_until

CHROMIUM = ["chromium", "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM += ["--disable-background-networking", "--disable-component-update"]
CHROMIUM += ["--no-sandbox"]  # which refuses root

needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")


class Tab:
    """A page, with the URLs that it requested and the errors that the browser reported."""

    def __init__(self, connection: ClientConnection) -> None:
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self._connection = connection
        self._numbers = itertools.count(1)
        self._session: dict[str, str] = {}
        (target,) = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """The result of a method of the protocol; events that arrive before it are recorded."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params, **self._session}))
        while True:
            message = json.loads(self._connection.recv(TIMEOUT))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._record(message.get("method"), message.get("params"))

    def _record(self, event: str, params: Any) -> None:
        if event == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif event in ("Log.entryAdded", "Runtime.exceptionThrown"):  # of the policy, failed requests, exceptions
            self.complaints.append(str(params))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(params["args"]))

    def open(self, url: str) -> None:
        assert "errorText" not in self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (script, found)
        return found["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Waits until the expression is true."""
        wait_until(lambda: self.evaluate(f"Boolean({script})"), script)

    def click(self, element: str) -> None:
        """Waits for the element that the expression finds, and clicks it."""
        self.wait_for(element)
        self.evaluate(f"{element}.click()")

    def type(self, element: str, text: str) -> None:
        """Replaces the text of the field that the expression finds."""
        self.wait_for(element)
        self.evaluate(f"(field => {{ field.focus(); field.select() }})({element})")
        self.call("Input.insertText", text=text)
        self.evaluate("document.activeElement.blur()")  # some forms read the field only then

    def press_enter(self, element: str) -> None:
        """Presses Enter in the field that the expression finds."""
        self.evaluate(f"{element}.focus()")
        self.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", text="\r", windowsVirtualKeyCode=13)


@contextlib.contextmanager
def browsing(folder: Path) -> Iterator[Tab]:
    """Runs a browser with a new profile in `folder`."""
    folder.mkdir()
    command = [*CHROMIUM, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    with started(command, folder, environment()) as process:
        url = process.wait_for(r"DevTools listening on (\S+)")
        with connect(url, max_size=None, compression=None) as connection:
            yield Tab(connection)


@contextlib.contextmanager
def serving_pages(folder: Path) -> Iterator[int]:
    """Serves the files of a folder. Yields the port."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    with started(command, folder, environment()) as process:
        yield int(process.wait_for(r"^Serving HTTP on \S+ port (\d+)"))
