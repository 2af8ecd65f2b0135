"""A browser's part in the conversation with the studio: address, cookie, origin, forms."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from urllib.parse import urlencode

from backhand.studio.command import Address

Reply = tuple[int, str, dict[str, str]]


class Client:
    """Sends requests to a server, with its cookie once `enter` has been called."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.cookie = ""

    def enter(self) -> Client:
        status, _, headers = self.ask(f"{self.address.root}/?token={self.address.token}")
        assert status == 200
        self.cookie = headers["set-cookie"].partition(";")[0]
        return self

    def get(self, place: str, **headers: str) -> Reply:
        return self.ask(f"{self.address.root}/{place}", **headers)

    def post(self, place: str, body: bytes | None = None, **fields: str) -> Reply:
        form = {"Content_Type": "application/x-www-form-urlencoded"} if body is None else {}
        data = urlencode(fields).encode() if body is None else body
        return self.ask(f"{self.address.root}/{place}", method="POST", body=data, Origin=self.origin, **form)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.address.port}"

    def ask(self, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str) -> Reply:
        status, data, answered = self.ask_bytes(path, method=method, body=body, **headers)
        return status, data.decode(), answered

    def ask_bytes(
        self, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """Send one request; headers have underscores for hyphens, and an empty one is left out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.address.port, timeout=60)
        connection.putrequest(method, path, skip_host=True)
        sent = {"Host": f"127.0.0.1:{self.address.port}", "Cookie": self.cookie}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            sent = {"Content-Length": str(len(body))} | sent
        for name, value in sent.items():
            if value:
                connection.putheader(name, value)
        connection.endheaders(body)
        reply = connection.getresponse()
        result = reply.status, reply.read(), {name.lower(): value for name, value in reply.getheaders()}
        connection.close()
        return result


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.1)
