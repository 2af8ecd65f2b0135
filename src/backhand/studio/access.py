"""Access to the page: who is answered, and how much a request may send.

A request is refused unless all of these hold:

- It names this server in `Host`. A page of the internet whose name is made to point to this machine does not.
- Its path starts with the server's own random name. Browsers send cookies of one host to all its ports, but only below
  the path that a cookie belongs to. Another program's server on this machine therefore does not receive ours.
- It has the session's cookie. The address with the token, which only the terminal shows, gives the cookie once.
- A request that changes something has this server's address as its `Origin`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import socket
from http import HTTPStatus
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backhand.studio.options import LOOPBACK

MAX_FORM_BYTES = 256 * 2**10
MAX_UPLOAD_BYTES = 2**30
BODY_WAIT_S = 20
"""Longest pause between two parts of a request's body."""
MAX_BODY_S = 1800

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SANDBOX_POLICY = (
    "sandbox allow-scripts allow-popups; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Policy of a run's report.html: it has an origin of its own, so that it reads nothing of this server."""

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Refused(Exception):
    """A refused request, with its status and the reason."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Access:
    """ASGI middleware that refuses requests from elsewhere, and limits the bodies of all others.

    Args:
        app: the pages, which are below `root`.
        token: the secret in the printed address. Path and cookie follow from it, so that a tab survives a restart.
        host, port: address on which the server listens.
    """

    def __init__(self, app: ASGIApp, *, token: str, host: str, port: int) -> None:
        self._app = app
        self._token = token
        self._host, self._port = host, port
        self.root = root_of(token)
        self._session = _derived(token, "session")
        self._cookie = f"backhand-{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # there are no web sockets

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            app = self._checked(scope)
        except Refused as refused:
            app = refusal(None, refused)
        await app(scope, _limited(scope, receive), send_with_headers)

    def _checked(self, scope: Scope) -> ASGIApp:
        """Return the application that answers. Raises Refused."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            raise Refused(HTTPStatus.FORBIDDEN, "this server answers to its own name only")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and POST are answered")
        if scope["method"] == "POST" and (
            headers.getlist("origin") != [f"http://{hosts[0].lower()}"]
            or headers.get("sec-fetch-site", "same-origin") != "same-origin"
        ):
            raise Refused(HTTPStatus.FORBIDDEN, "this request comes from another page")
        if not _equal(scope["path"][: len(self.root) + 1], f"{self.root}/"):
            raise Refused(HTTPStatus.FORBIDDEN, _UNKNOWN)
        (token,) = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[:1]
        if scope["method"] != "POST" and _equal(token, self._token):
            return self._welcome()  # also with a cookie, so that the token leaves the address bar
        if _equal(_cookie_in(headers, self._cookie), self._session):
            return self._app
        raise Refused(HTTPStatus.FORBIDDEN, _UNKNOWN)

    def _welcome(self) -> ASGIApp:
        """Return a page that sets the cookie and goes on by itself.

        A redirect of the server would not send the strict cookie if the link was opened from another site.
        """
        response = HTMLResponse(
            '<!doctype html><html lang="en"><title>Backhand</title><link rel="icon" href="data:,">'
            f'<p><a href="{self.root}/">Continue to Backhand</a></p></html>'
        )
        response.headers["Refresh"] = f"0;url={self.root}/"
        response.set_cookie(self._cookie, self._session, path=f"{self.root}/", httponly=True, samesite="strict")
        return response

    def _is_ours(self, host: str) -> bool:
        host = host.lower()
        # Browsers leave out the port 80. Colons in brackets belong to the name.
        name, port = host.rsplit(":", 1) if ":" in host.rpartition("]")[2] else (host, "80")
        if port != str(self._port):
            return False
        if self._host == LOOPBACK:
            return name in (LOOPBACK, "localhost")
        # An attacker can make a name point to this machine, but not a number.
        ours = (self._host.lower(), "localhost", socket.gethostname().lower())
        return name in ours or _is_address(name.strip("[]"))


def refusal(_request: object, refused: Refused) -> PlainTextResponse:
    """Return the answer to a refused request, the rest of which is not read."""
    return PlainTextResponse(f"{refused}\n", refused.status, {"Connection": "close"})


_UNKNOWN = (
    "the address lacks its token: open the file open.html in the studio's directory (usually ~/backhand), or copy the "
    "whole address that the terminal printed"
)


def root_of(token: str) -> str:
    """Return the path below which the pages are."""
    return f"/{_derived(token, 'path')[:20]}"


def _derived(token: str, purpose: str) -> str:
    return hmac.new(token.encode(), purpose.encode(), hashlib.sha256).hexdigest()


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _cookie_in(headers: Headers, name: str) -> str:
    parts = (part.strip().partition("=") for line in headers.getlist("cookie") for part in line.split(";"))
    return next((value for key, _, value in parts if key == name), "")


def _limited(scope: Scope, receive: Receive) -> Receive:
    """Return a `receive` that raises Refused for a body that is too long, pauses too long, or never ends."""
    most = MAX_UPLOAD_BYTES if scope["path"].endswith("/upload") else MAX_FORM_BYTES
    received = 0
    deadline = asyncio.get_running_loop().time() + MAX_BODY_S
    complete = False

    async def limited() -> Message:
        nonlocal received, complete
        if complete:
            return await receive()  # waits for the browser to disconnect
        wait_s = min(BODY_WAIT_S, deadline - asyncio.get_running_loop().time())
        try:
            message = await asyncio.wait_for(receive(), max(0.0, wait_s))
        except TimeoutError:
            raise Refused(HTTPStatus.REQUEST_TIMEOUT, "the request was not sent to its end") from None
        received += len(message.get("body", b""))
        if received > most:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request may send {most:,} bytes")
        complete = not message.get("more_body", False)
        return message

    return limited
