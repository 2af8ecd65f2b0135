"""The server behind `backhand watch`: this machine only, behind a token, and deaf to other pages in the browser.

Refused is whatever lacks the token in its address; whatever was sent to another host name than ours, as a page does
that has its own name point to 127.0.0.1; and any question that another origin's page sent.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from backhand.errors import BackhandError
from backhand.report.live_run import LiveRun
from backhand.report.prompt_box import PromptBox

HOST = "127.0.0.1"
LONGEST_QUESTION_BYTES = 64 * 1024
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class WatchServer(ThreadingHTTPServer):
    """Serves one run.

    Args:
        port: 0 for any free one.
        token: what every address must begin with.
        run: the page.
        box: answers prompts.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, token: str, run: LiveRun, box: PromptBox) -> None:
        super().__init__((HOST, port), _Handler)
        self.token = token
        self.run = run
        self.box = box

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away in the middle of an answer is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    protocol_version = "HTTP/1.1"
    server_version = "backhand"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        """The page, or its version and state for a page that is open."""
        place = self._allowed_place()
        if place is None:
            return
        if place not in ("", "state"):
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")
            return
        box = self.server.box.state()
        try:
            version, page = self.server.run.page(box)
        except BackhandError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
            return
        if place == "":
            self._send(HTTPStatus.OK, page, "text/html; charset=utf-8")
        else:
            self._send_json(HTTPStatus.OK, {"version": version, "box": box})

    def do_POST(self) -> None:
        """A prompt to answer."""
        place = self._allowed_place()
        if place is None:
            return
        if place != "answer":
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")
        elif not self._from_our_page():
            self._refuse(HTTPStatus.FORBIDDEN, "this question comes from another page")
        else:
            self._answer()

    def _answer(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or int(length) > LONGEST_QUESTION_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the question is too long")
            return
        try:
            prompt = json.loads(self.rfile.read(int(length)))["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            self._refuse(HTTPStatus.BAD_REQUEST, "there is no prompt in the question")
            return
        try:
            answer = self.server.box.answer(prompt)
        except BackhandError as error:
            self._send_json(HTTPStatus.CONFLICT, {"error": str(error)})
        else:
            self._send_json(HTTPStatus.OK, asdict(answer))

    def _allowed_place(self) -> str | None:
        """What follows the token in the address; None where the request has been refused."""
        ours = {f"{HOST}:{self.server.server_port}", f"localhost:{self.server.server_port}"}
        if self.headers.get_all("Host", []) not in [[host] for host in ours]:
            self._refuse(HTTPStatus.FORBIDDEN, "this server answers to its own name only")
            return None
        token, _, place = self.path.partition("?")[0].removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            self._refuse(HTTPStatus.FORBIDDEN, "the address lacks its token; `backhand watch` printed the whole of it")
            return None
        return place

    def _from_our_page(self) -> bool:
        """Whether a question was sent by the page this server gave out, or by a program that is no browser."""
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "same-origin")
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip()
        return (
            origin in (None, f"http://{self.headers['Host']}") and site == "same-origin" and kind == "application/json"
        )

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        # What the client still sends is not read.
        self.close_connection = True
        self._send(status, f"{text}\n".encode("utf-8", "replace"), "text/plain; charset=utf-8")

    def _send_json(self, status: HTTPStatus, values: Any) -> None:
        self._send(status, json.dumps(values).encode(), "application/json")

    def _send(self, status: HTTPStatus, data: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the class above
        """The terminal shows the address, not every request."""
