"""Rendezvous of a run's processes: the environment of each process, and the store that all of them reach."""

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
"""Seconds to wait for all processes; seconds to look up a host name."""


@dataclass(frozen=True)
class DistributedEnv:
    """The variables that torchrun, and launchers compatible with it, set for each process."""

    rank: int
    world_size: int
    host: str  # MASTER_ADDR
    port: int  # MASTER_PORT
    local_rank: int
    agent_store: bool  # True if torchrun's agent serves the store
    attempt: str  # run id and restart count: a prefix of the keys in the store

    @classmethod
    def from_environment(cls) -> DistributedEnv:
        """Read the variables. Raises UsageError if they are incomplete or out of range."""
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
                raise UsageError(f"{name} is {environment.get(name)!r}, not a number", where="environment") from None
        rank, world_size, port = numbers["RANK"], numbers["WORLD_SIZE"], numbers["MASTER_PORT"]
        if not 0 <= rank < world_size or not 0 < port < 1 << 16:
            raise UsageError(
                f"RANK {rank} of WORLD_SIZE {world_size}, MASTER_PORT {port}: out of range", where="environment"
            )
        attempt = f"{environment.get('TORCHELASTIC_RUN_ID', '')}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        agent_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(rank, world_size, environment["MASTER_ADDR"], port, numbers["LOCAL_RANK"], agent_store, attempt)


def torch_distributed() -> Any:
    """Import torch.distributed, which takes half a second and only several processes need."""
    import torch.distributed

    return torch.distributed


def _check_name(host: str) -> None:
    """Raise ResourceError if the host name cannot be resolved; torch would retry for minutes."""
    failed: list[OSError | UnicodeError] = []
    resolved = threading.Event()

    def look_up() -> None:
        until = time.monotonic() + RESOLVE_S
        while not resolved.is_set():  # if machines start together, the name may exist a moment later
            try:
                socket.getaddrinfo(host, None)
                resolved.set()
            except (OSError, UnicodeError) as error:
                failed.append(error)
                if time.monotonic() > until or isinstance(error, UnicodeError):  # never a valid name
                    return
                time.sleep(0.5)

    thread = threading.Thread(target=look_up, name="look up", daemon=True)  # the resolver has a timeout of its own
    thread.start()
    thread.join(2 * RESOLVE_S)
    if not resolved.is_set():
        raise ResourceError(
            f"the name {host!r} has no address",
            where="MASTER_ADDR",
            why=short_reason(failed[-1]) if failed else f"the resolver has not answered within {2 * RESOLVE_S:.0f} s",
            next_step="correct it, or give the address of the machine that rank 0 runs on",
        )


def connected(env: DistributedEnv, address: str, *, server: bool) -> Any:
    """Connect to the shared store, which rank 0 serves if `server` is True. Raises UsageError, ResourceError."""
    server = server and env.rank == 0
    _check_name(env.host)
    try:
        return torch_distributed().TCPStore(
            env.host,
            env.port,
            is_master=server,
            timeout=timedelta(seconds=JOIN_S),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if server:
            raise UsageError(
                f"port {env.port} cannot be used",
                where="MASTER_PORT",
                why=short_reason(error),
                next_step="another run may hold it: give another MASTER_PORT, or torchrun another --master-port",
            ) from None
        raise ResourceError(
            f"rank {env.rank} resolved no store at {address} within {JOIN_S:.0f} s",
            where="MASTER_ADDR",
            why=short_reason(error),
            next_step="start rank 0 there, and make that port reachable from this machine",
        ) from None


def all_joined(store: Any, world_size: int, address: str) -> list[list[str]]:
    """Wait for all ranks and return [machine, process id] of each. Raises ResourceError naming the missing ranks."""
    keys = [f"joined/{rank}" for rank in range(world_size)]
    start_s = time.monotonic()
    try:
        while not store.check(keys):
            if time.monotonic() - start_s > JOIN_S:
                missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
                raise ResourceError(
                    f"{world_size - len(missing)} of {world_size} processes joined at {address} within {JOIN_S:.0f} s",
                    where="WORLD_SIZE",
                    why=f"missing: rank {', '.join(missing)}",
                    next_step="start all processes, each with its own RANK",
                )
            time.sleep(0.05)
        return [store.get(key).decode().rsplit(" ", 1) for key in keys]
    except RuntimeError as error:
        raise ResourceError(
            f"the store at {address} is gone", why=short_reason(error), next_step="read the error of rank 0"
        ) from None
