"""Options of `backhand studio` and `backhand watch`. This module imports neither torch nor the server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from backhand.bounds import Bound, Options, Text, given

LOOPBACK = "127.0.0.1"

Port = Annotated[int, Bound(at_least=0, at_most=65535)]


@dataclass(frozen=True)
class StudioOptions(Options):
    """Options of `backhand studio`."""

    directory: Path = Path("~/backhand")
    """Directory for uploaded rows, runs, the queue and exports. It is created, and only you can read it."""

    allow: tuple[Path, ...] = ()
    """Folders from which models and rows may be named by path, in addition to uploads and to the models that
    `backhand models` lists."""

    host: Annotated[Text, given("host is empty", "leave it out")] = LOOPBACK
    """Address to listen on. With an address of the network, other machines can connect, without encryption."""

    port: Port = 0
    """Port; 0 takes the one of the last time if it is free, otherwise any free one."""

    browser: bool = True
    """Open the page in the browser."""


@dataclass(frozen=True)
class WatchOptions(Options):
    """Options of `backhand watch`."""

    run: Path = Path("run")
    """Directory of a current or finished run."""

    port: Port = 0
    """Port on 127.0.0.1; 0 takes any free one."""
