"""`backhand studio` and `backhand watch`: open the address, print it, and answer until Ctrl-C."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import secrets
import shlex
import socket
import sys
import threading
import webbrowser
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backhand.errors import UsageError
from backhand.printing import may_be_silent, say
from backhand.report.run_record import read_run
from backhand.studio.options import LOOPBACK, StudioOptions, WatchOptions
from backhand.studio.workspace import Workspace
from backhand.system import install


@dataclass(frozen=True)
class Address:
    """Address of a server that runs."""

    host: str
    port: int
    root: str  # path below which the pages are
    token: str

    @property
    def origin(self) -> str:
        """Host and port, without the token."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def url(self) -> str:
        """The address for the browser, with the token."""
        return f"{self.origin}{self.root}/?token={self.token}"


def studio_command(options: StudioOptions) -> None:
    """Print the address, open the browser, and serve until Ctrl-C.

    Raises:
        UsageError: the directory contains other files, it has a server already, or the port is taken.
        ResourceError: the directory cannot be written.
    """
    options.validate()
    workspace = Workspace(options.directory, options.allow)
    with _ended_by_ctrl_c(), serving(workspace, host=options.host, port=options.port or workspace.port) as address:
        workspace.remember(address.port)
        say(f"Studio: {address.url}", f"Directory: {shlex.quote(str(workspace.root))}", file=sys.stdout)
        if not _is_loopback(options.host):
            say(
                f"warning: other machines can connect to {options.host}. Whoever has this address can read your rows "
                "and start runs, and the connection is not encrypted."
            )
        # Other users can see the words of a browser's process, so that they must not contain the token.
        page = workspace.opener(address.url).as_uri()
        if options.browser and _has_screen():
            threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()
        _wait()


def watch_command(options: WatchOptions) -> None:
    """Print the address of a run's page, and serve until Ctrl-C.

    Raises:
        UsageError: there is no run, or the port is taken.
        ArtifactError: the run's configuration cannot be read.
    """
    options.validate()
    read_run(options.run)
    with _ended_by_ctrl_c(), serving(options.run.resolve(), host=LOOPBACK, port=options.port) as address:
        say(f"Watching {options.run}: {address.url}", file=sys.stdout)
        _wait()


def _is_loopback(host: str) -> bool:
    """Return True if only this machine can connect to the host."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def _has_screen() -> bool:
    """Return True if a browser has a screen; without one, a browser for terminals would take this one."""
    return sys.platform in ("win32", "darwin") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print()


def _wait() -> None:
    say("Press Ctrl-C to stop. Runs go on without this page.", file=sys.stdout)
    with may_be_silent():
        threading.Event().wait()


@contextmanager
def serving(shown: Workspace | Path, *, host: str, port: int) -> Iterator[Address]:
    """Answer requests in a thread for the block.

    Args:
        shown: the studio's directory, or the one run to show.
        host, port: where to listen. If the port of a workspace is taken, any free one is used.

    Raises:
        UsageError: the port or host cannot be used, the packages of the extra are missing, or the workspace has a
            server already.
    """
    try:
        from backhand.studio.access import Access, root_of
        from backhand.studio.app import make_app
        from backhand.studio.server import serve
        from backhand.studio.site import Site
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the package {error.name} is not installed", next_step=install("'backhand[studio]'")
        ) from None
    with shown.locked() if isinstance(shown, Workspace) else nullcontext(_unannounced) as announce:
        token = secrets.token_urlsafe(24) if isinstance(shown, Path) else shown.token
        last_time = isinstance(shown, Workspace) and port == shown.port
        listener = _listener(host, port, any_port=last_time)
        address = Address(host, int(listener.getsockname()[1]), root_of(token), token)
        announce(address.origin)
        site = Site(address.root, shown)
        app = Access(make_app(site), token=token, host=host, port=address.port)
        stopping: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        server = serve(app, listener)
        thread = threading.Thread(target=lambda: asyncio.run(_until_stopped(server, stopping)), daemon=True)
        thread.start()
        loop, stop = stopping.result()
        try:
            yield address
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()


def _unannounced(_origin: str) -> None:
    """Write the address nowhere: a run may have several pages."""


async def _until_stopped(
    server: Coroutine[Any, Any, None], stopping: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]
) -> None:
    """Run the server until the event that becomes the result of `stopping` is set."""
    stop = asyncio.Event()
    task = asyncio.create_task(server)
    stopping.set_result((asyncio.get_running_loop(), stop))
    await stop.wait()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _listener(host: str, port: int, *, any_port: bool) -> socket.socket:
    """Return a listening socket. Raises UsageError."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        try:
            return socket.create_server(place[:2], family=family)
        except OSError:
            if not any_port:
                raise
            return socket.create_server((host, 0), family=family)
    except OSError as error:
        raise UsageError(
            f"port {port} of {host} cannot be used", where="port", why=error.strerror, next_step="leave out --port"
        ) from None
