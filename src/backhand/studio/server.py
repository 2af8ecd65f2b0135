"""The HTTP server: uvicorn's protocol with a limit on idle connections, on a socket that the command has opened.

uvicorn's own `Server` wakes up ten times per second. This one does nothing until a request comes.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from typing import Any

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

MAX_IDLE_CONNECTIONS = 64
"""Connections that wait for a request. A further one closes the oldest of them."""
REQUEST_WAIT_S = 30
"""Longest time from the start of a connection to its first whole request."""
_STOP_WAIT_S = 5
"""Longest time for the answers to end when the server stops: a file is closed, a command is stopped."""
_BACKLOG = 512
_MAX_HEAD_BYTES = 64 * 2**10

_numbers = itertools.count()


class BoundedProtocol(H11Protocol):
    """A connection that is closed if it sends no request, or if too many others wait."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._number = next(_numbers)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Close the oldest connections that wait, if there are too many."""
        super().connection_made(transport)
        waiting = [one for one in self.connections if isinstance(one, BoundedProtocol) and one.idle]
        for oldest in sorted(waiting, key=lambda one: one._number)[:-MAX_IDLE_CONNECTIONS]:
            oldest.transport.abort()
        self._timer = self.loop.call_later(REQUEST_WAIT_S, self._close_unless_used)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._timer.cancel()
        super().connection_lost(exc)

    @property
    def idle(self) -> bool:
        """True if no request is being answered."""
        return not self._used or self.cycle.response_complete

    @property
    def _used(self) -> bool:
        """True after the first whole request."""
        return self.scope is not None

    def _close_unless_used(self) -> None:
        if not self._used:
            self.transport.abort()


async def serve(app: ASGIApp, listener: socket.socket) -> None:
    """Answer requests until the task is cancelled."""
    config = Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=REQUEST_WAIT_S,
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
    )
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: BoundedProtocol(config, state, {}, loop), sock=listener, backlog=_BACKLOG
    )  # fmt: skip
    try:
        await server.serve_forever()
    finally:
        for connection in list(state.connections):
            if isinstance(connection, BoundedProtocol):
                connection.transport.abort()
        # Cancelled at the end of the loop, an answer could not close its file.
        if state.tasks:
            await asyncio.wait(state.tasks, timeout=_STOP_WAIT_S)
