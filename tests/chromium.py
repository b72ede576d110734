"""A real browser, driven over the protocol of its developer tools."""

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from tests.processes import TIMEOUT, environment, started, wait_until

CHROMIUM = [
    "chromium",
    "--headless",
    "--no-sandbox",  # which refuses root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="a real browser needs chromium")


class Tab:
    """A page that somebody looks at, with whatever it asked for and whatever the browser complained of."""

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
        """What a method of the protocol returns; what happens meanwhile is noted."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params, **self._session}))
        while True:
            message = json.loads(self._connection.recv(TIMEOUT))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message.get("method"), message.get("params"))

    def _note(self, event: str, params: Any) -> None:
        if event == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif event == "Log.entryAdded":  # violations of a policy, and failed requests
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url')}")
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(params["args"]))
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))

    def show(self, width: int, scheme: str) -> None:
        """Gives the page a window of so many pixels, and a person who likes it light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=700, deviceScaleFactor=1, mobile=True)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url: str) -> None:
        assert "errorText" not in self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (script, found)
        return found["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Waits until the expression is true."""
        wait_until(lambda: self.evaluate(f"Boolean({script})"), script)

    def click(self, element: str) -> None:
        """Clicks what the expression finds, once it does."""
        self.wait_for(element)
        self.evaluate(f"{element}.click()")

    def type(self, element: str, text: str) -> None:
        """Puts text in place of what is in the field that the expression finds, and leaves the field."""
        self.wait_for(element)
        self.evaluate(f"(field => {{ field.focus(); field.select() }})({element})")
        self.call("Input.insertText", text=text)
        self.evaluate("document.activeElement.blur()")  # some forms take note only then


@contextlib.contextmanager
def browsing(folder: Path) -> Iterator[Tab]:
    """A browser that was never started before, and keeps what it keeps in `folder`."""
    folder.mkdir()
    command = [*CHROMIUM, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    with started(command, folder, environment()) as process:
        url = process.wait_for(r"DevTools listening on (\S+)")
        with connect(url, max_size=None, compression=None) as connection:
            yield Tab(connection)
