"""`backhand watch`: the run's page on this machine, up to date while it trains, with a box to try a prompt in."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from backhand.errors import UsageError
from backhand.report.live_run import LiveRun
from backhand.report.prompt_box import PromptBox
from backhand.report.watch_options import WatchOptions
from backhand.report.watch_server import WatchServer


def watch_command(options: WatchOptions) -> None:
    """Serve until Ctrl-C; print the address.

    Raises:
        UsageError: there is no run, or the port is taken.
        ArtifactError: the run's configuration cannot be read.
    """
    with serving(options) as server:
        try:
            print(f"Watching {options.run}: {server.address}\nCtrl-C ends it.", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


@contextmanager
def serving(options: WatchOptions) -> Iterator[WatchServer]:
    """The server, answering in threads of its own as long as the context lasts.

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
