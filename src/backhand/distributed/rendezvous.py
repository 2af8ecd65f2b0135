"""Where the processes of a run meet: what the environment says of each, and the store that all of them reach."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from backhand.errors import ResourceError, UsageError, short_reason

JOIN_S, RESOLVE_S = 120.0, 5.0


@dataclass(frozen=True)
class Place:
    """Where the environment says that a process belongs."""

    rank: int
    size: int
    host: str
    port: int
    local_rank: int
    agent_store: bool
    attempt: str

    @classmethod
    def of_environment(cls) -> Place:
        """Raises UsageError for an environment that says half of it."""
        environment = os.environ
        if not environment["WORLD_SIZE"].strip():
            raise UsageError(
                "WORLD_SIZE is empty",
                where="environment",
                next_step="set it to the number of processes, or unset it for a run of one",
            )
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing:
            raise UsageError(
                f"WORLD_SIZE is {environment['WORLD_SIZE']}, and {', '.join(missing)} not set",
                where="environment",
                next_step="start the run with torchrun or --workers, set all four variables, or unset WORLD_SIZE",
            )
        numbers = {}
        for name, default in (("RANK", ""), ("WORLD_SIZE", ""), ("MASTER_PORT", ""), ("LOCAL_RANK", "0")):
            try:
                numbers[name] = int(environment.get(name, default))
            except ValueError:
                raise UsageError(f"{name} is {environment.get(name)!r}, no number", where="environment") from None
        rank, size, port = numbers["RANK"], numbers["WORLD_SIZE"], numbers["MASTER_PORT"]
        if not 0 <= rank < size or not 0 < port < 1 << 16:
            raise UsageError(f"RANK {rank} of WORLD_SIZE {size}, MASTER_PORT {port}: out of range", where="environment")
        attempt = f"{environment.get('TORCHELASTIC_RUN_ID', '')}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        agent_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(rank, size, environment["MASTER_ADDR"], port, numbers["LOCAL_RANK"], agent_store, attempt)


def torch_distributed() -> Any:
    """Half a second to import, and for several processes only."""
    import torch.distributed

    return torch.distributed


def _check_name(host: str) -> None:
    """Raise ResourceError for a name that no address is found for, before torch looks for one again and again."""
    failed: list[OSError | UnicodeError] = []
    found = threading.Event()

    def look_up() -> None:
        until = time.monotonic() + RESOLVE_S
        while not found.is_set():  # where machines start together, a name may be there a moment later
            try:
                socket.getaddrinfo(host, None)
                found.set()
            except (OSError, UnicodeError) as error:
                failed.append(error)
                if time.monotonic() > until or isinstance(error, UnicodeError):  # a name that none can be
                    return
                time.sleep(0.5)

    thread = threading.Thread(target=look_up, name="look up", daemon=True)  # the system's resolver has its own patience
    thread.start()
    thread.join(2 * RESOLVE_S)
    if not found.is_set():
        raise ResourceError(
            f"the name {host!r} has no address",
            where="MASTER_ADDR",
            why=short_reason(failed[-1]) if failed else f"the resolver has not answered within {2 * RESOLVE_S:.0f} s",
            next_step="correct it, or give the address of the machine that rank 0 runs on",
        )


def connected(place: Place, point: str, *, server: bool) -> Any:
    """The shared store; the first process holds it, unless torchrun does. Raises UsageError, ResourceError."""
    server = server and place.rank == 0
    _check_name(place.host)
    try:
        return torch_distributed().TCPStore(
            place.host,
            place.port,
            is_master=server,
            timeout=timedelta(seconds=JOIN_S),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if server:
            raise UsageError(
                f"port {place.port} cannot be used",
                where="MASTER_PORT",
                why=short_reason(error),
                next_step="another run may hold it: give another MASTER_PORT, or torchrun another --master-port",
            ) from None
        raise ResourceError(
            f"rank {place.rank} found nobody at {point} within {JOIN_S:.0f} s",
            where="MASTER_ADDR",
            why=short_reason(error),
            next_step="start rank 0 there, and let this machine reach that port",
        ) from None


def all_joined(store: Any, size: int, point: str) -> list[list[str]]:
    """[machine, process] of every rank. Raises ResourceError naming those that do not come."""
    keys = [f"joined/{rank}" for rank in range(size)]
    began = time.monotonic()
    try:
        while not store.check(keys):
            if time.monotonic() - began > JOIN_S:
                missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
                raise ResourceError(
                    f"{size - len(missing)} of {size} processes came to {point} within {JOIN_S:.0f} s",
                    where="WORLD_SIZE",
                    why=f"nothing is heard of rank {', '.join(missing)}",
                    next_step="start all of them, each with its own RANK",
                )
            time.sleep(0.05)
        return [store.get(key).decode().rsplit(" ", 1) for key in keys]
    except RuntimeError as error:
        raise ResourceError(
            f"the meeting point {point} is gone", why=short_reason(error), next_step="look what rank 0 says"
        ) from None
