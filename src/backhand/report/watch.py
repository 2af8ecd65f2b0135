"""`backhand watch`: a local page of a run that follows the training and answers prompts."""

from __future__ import annotations

import hmac
import json
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from backhand.errors import BackhandError, UsageError
from backhand.printing import may_be_silent, say
from backhand.report.options import WatchOptions
from backhand.report.prompt_box import LiveRun, PromptBox


def watch_command(options: WatchOptions) -> None:
    """Print the address and serve until Ctrl-C.

    Raises:
        UsageError: there is no run, or the port is taken.
        ArtifactError: the run's configuration cannot be read.
    """
    with serving(options) as server:
        try:
            say(f"Watching {options.run}: {server.address}", "Press Ctrl-C to stop.", file=sys.stdout)
            with may_be_silent():
                threading.Event().wait()
        except KeyboardInterrupt:
            print()


@contextmanager
def serving(options: WatchOptions) -> Iterator[WatchServer]:
    """Run the server in threads of its own for the block.

    Raises:
        UsageError: there is no run, or the port is taken.
        ArtifactError: the run's configuration cannot be read.
    """
    options.validate()
    run = LiveRun(options.run)
    box = PromptBox(options.run, threads=options.threads, max_new_tokens=options.max_new_tokens)
    try:
        server = WatchServer(options.port, secrets.token_urlsafe(16), run, box)
    except OSError as error:
        box.close()
        raise UsageError(
            f"port {options.port} cannot be used", where="port", why=error.strerror, next_step="leave out --port"
        ) from None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        box.close()


# The server listens on this machine only. It refuses three kinds of requests:
#
# - requests without the token in their address,
# - requests to another host name, which a page could make point to 127.0.0.1,
# - prompts from a page of another origin.

HOST = "127.0.0.1"
LONGEST_QUESTION_BYTES = 64 * 1024
_LONGEST_LENGTH = 12
MOST_CONNECTIONS = 512

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

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, port: int, token: str, run: LiveRun, box: PromptBox) -> None:
        super().__init__((HOST, port), _Handler)
        self.token = token
        self.run = run
        self.box = box

    @property
    def address(self) -> str:
        """Address of the page, including the token."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a browser that disconnects during an answer."""


class _Refused(Exception):
    """A refused request, with the status and the reason."""


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    protocol_version = "HTTP/1.1"
    server_version = "backhand"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        """Send the page, or its version and state to an open page."""
        self._respond({"": self._page, "state": self._page})

    def do_POST(self) -> None:
        """Answer a prompt."""
        self._respond({"answer": self._answer})

    def _respond(self, places: Mapping[str, Callable[[str], None]]) -> None:
        try:
            place = self._allowed_place()
            if place not in places:
                raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
            places[place](place)
        except _Refused as refused:
            self._send_refusal(*refused.args)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - a browser gets an answer, whatever goes wrong
            traceback = f"`backhand report {self.server.run.path} --debug` shows the traceback"
            why = f"this is a bug in Backhand: {type(error).__name__}: {error}; {traceback}"
            self._send_refusal(HTTPStatus.INTERNAL_SERVER_ERROR, why)

    def _send_refusal(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True  # the rest of the request is not read
        self._send(status, f"{text}\n".encode("utf-8", "replace"), "text/plain; charset=utf-8")

    def _page(self, place: str) -> None:
        box = self.server.box.state()
        try:
            version, page = self.server.run.page(box)
        except (BackhandError, OSError) as error:
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from None
        if place == "":
            self._send(HTTPStatus.OK, page, "text/html; charset=utf-8")
        else:
            self._send_json(HTTPStatus.OK, {"version": version, "box": box})

    def _answer(self, _place: str) -> None:
        if not self._from_our_page():
            raise _Refused(HTTPStatus.FORBIDDEN, "this question comes from another page")
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or "Transfer-Encoding" in self.headers:
            # A proxy that trusts the other length, or the chunks, would see two requests.
            raise _Refused(HTTPStatus.BAD_REQUEST, "a question has one Content-Length")
        (length,) = lengths
        a_number = length.isascii() and length.isdigit() and len(length) <= _LONGEST_LENGTH
        if not a_number or int(length) > LONGEST_QUESTION_BYTES:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the question is too long")
        try:
            prompt = json.loads(self.rfile.read(int(length)))["prompt"]
            prompt.encode("utf-8")
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
            prompt = None  # a lone surrogate is no text
        if not isinstance(prompt, str):
            raise _Refused(HTTPStatus.BAD_REQUEST, "there is no prompt in the question")
        try:
            answer = self.server.box.answer(prompt)
        except BackhandError as error:
            self._send_json(HTTPStatus.CONFLICT, {"error": str(error)})
        else:
            self._send_json(HTTPStatus.OK, asdict(answer))

    def _allowed_place(self) -> str:
        """Return the part of the address after the token."""
        ours = {f"{HOST}:{self.server.server_port}", f"localhost:{self.server.server_port}"}
        if self.headers.get_all("Host", []) not in [[host] for host in ours]:
            raise _Refused(HTTPStatus.FORBIDDEN, "this server answers to its own name only")
        token, _, place = self.path.partition("?")[0].removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            why = "the address lacks its token; `backhand watch` printed the whole of it"
            raise _Refused(HTTPStatus.FORBIDDEN, why)
        return place

    def _from_our_page(self) -> bool:
        """Return True if a prompt comes from this server's page, or from a program that is no browser."""
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "same-origin")
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip()
        return (
            origin in (None, f"http://{self.headers['Host']}") and site == "same-origin" and kind == "application/json"
        )

    def _send_json(self, status: HTTPStatus, values: Any) -> None:
        self._send(status, json.dumps(values).encode(), "application/json")

    def _send(self, status: HTTPStatus, data: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the class above
        """Do not print requests."""
