"""The ranks of one run as real processes that start in a moment, meet on this machine's loopback, and can be killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed

from backhand.cli.main import main
from backhand.distributed import heartbeat as pulse
from backhand.distributed import launch
from backhand.distributed import rendezvous as meeting
from backhand.distributed.process_group import ProcessGroup
from backhand.loop.step import AdapterOptimizer
from backhand.nn.decoder.decoder import Decoder
from backhand.options.config import TrainConfig
from backhand.options.config_file import dump_config
from tests.support.held_runs import before, hold
from tests.support.kept_runs import watched
from tests.support.processes import start
from tests.support.tiny_run import final_bits

_WAIT_S = 300
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = iter(range(12000 + 1000 * (_WORKER % 16) + os.getpid() % 500, 12000 + 1000 * (_WORKER % 16 + 1)))


@dataclass
class Ranks:
    """One process for each rank; what each printed is in a file of its own."""

    processes: list[BaseProcess]
    printed: list[Path]

    def exit_codes(self) -> list[int | None]:
        """When all have ended."""
        for process in self.processes:
            process.join(_WAIT_S)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def said(self) -> list[str]:
        return [path.read_text(encoding="utf-8") for path in self.printed]

    def send(self, rank: int, number: int) -> None:
        os.kill(self.pid(rank), number)

    def wait_until_stopped(self, rank: int) -> None:
        """Until this one has sent itself SIGSTOP."""
        end = time.monotonic() + _WAIT_S
        asked = ["ps", "-o", "state=", "-p", str(self.pid(rank))]
        while not subprocess.run(asked, check=False, capture_output=True, text=True).stdout.strip().startswith("T"):
            assert time.monotonic() < end and self.processes[rank].is_alive(), self.said()
            time.sleep(0.05)

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid


def bits_of_several(run: Path) -> dict[str, bytes]:
    """`final_bits` without what each process did and waited, which one process does not write."""
    found = final_bits(run)
    shares = ("computed_s", "waited_s", "computed_tokens")
    lines = [{k: v for k, v in line.items() if k not in shares} for line in json.loads(found["metrics"])]
    return {**found, "metrics": json.dumps(lines).encode()}


def free_port() -> int:
    """A port that nobody listens on.

    It is below the range from which the system takes the ports of connections, and other test processes try
    different ones, so that it is still free when it is used.
    """
    for port in _PORTS:
        with socket.socket() as taken:
            try:
                taken.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def start_ranks(
    configs: Sequence[TrainConfig],
    directory: Path,
    *,
    at_place: Mapping[int, tuple[str, str]] | None = None,
    environment: Mapping[str, str] | None = None,
    join_s: float = 60.0,
    silent_s: float = 60.0,
    quick: bool = True,
    port: int | None = None,
    absent: Sequence[int] = (),
    connected: bool = False,
    prepare: Mapping[int, Callable[[], None]] | None = None,
) -> Ranks:
    """Begin `backhand train` on as many ranks as there are configurations.

    Args:
        configs: of each rank.
        directory: for configurations and what is printed.
        at_place: for some ranks a place of `held_runs` and the signal that it sends itself there, or "pause" for one
            that is late by `PAUSE_S`; or ("adapter", "other") for one whose adapter is changed in every step,
            ("versions", "other") for one that has another torch, ("clock", "other") for one by whose clock a
            micro-batch takes a second, an exchange a quarter, and nothing else any time, and ("passes", "count") for
            one that prints last the number of passes through the lower layers for each set of rows.
        environment: for all of them.
        join_s, silent_s: patience of the ranks.
        quick: otherwise they are as patient as a user's are.
        port: to meet at.
        absent: ranks that never come.
        connected: by torch, before the run begins, as Ray Train does it.
        prepare: functions of a module, which some ranks call first.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port() if port is None else port
    processes, printed = [], []
    for rank, config in enumerate(configs):
        toml, log = directory / f"rank-{rank}.toml", directory / f"rank-{rank}.log"
        toml.write_text(dump_config(config), encoding="utf-8")
        log.touch()
        place = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(configs)),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
            **(environment or {}),
        }
        if rank not in absent:
            patience = (join_s, silent_s) if quick else None
            arguments = (
                str(toml),
                str(log),
                place,
                (at_place or {}).get(rank),
                patience,
                connected,
                (prepare or {}).get(rank),
            )
            processes.append(start(_train_as_rank, *arguments))
            printed.append(log)
    return Ranks(processes, printed)


_AT_THE_END = ("end", "summary")
_LED = ("save", "publish", *_AT_THE_END)
KILLED = [(rank, place) for place in ("load", "step", "exchange", "evaluation", *_LED) for rank in (0, 1)]
"""Each rank at each stage of a run; at the last four of these rank 0 alone has something to do."""


def start_and_kill(configs: Sequence[TrainConfig], directory: Path, rank: int, place: str, **how: object) -> Ranks:
    """Begin, and one of them is killed at the place; where only rank 0 comes there, another one while rank 0 is.

    At the end another one has nothing left to do, and would soon have said so.
    """
    if rank == 0 or place not in _LED:
        return start_ranks(configs, directory, at_place={rank: (place, "kill")}, **how)  # type: ignore[arg-type]
    stops = {0: (place, "stop")} | ({rank: ("close", "stop")} if place in _AT_THE_END else {})
    ranks = start_ranks(configs, directory, at_place=stops, **how)  # type: ignore[arg-type]
    for stopped in stops:
        ranks.wait_until_stopped(stopped)
    ranks.send(rank, signal.SIGKILL)
    ranks.send(0, signal.SIGCONT)
    return ranks


def _train_as_rank(
    toml: str,
    log: str,
    place: Mapping[str, str],
    at: tuple[str, str] | None,
    patience: tuple[float, float] | None,
    connected: bool,
    prepare: Callable[[], None] | None,
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process lives
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    os.environ.update(place)
    if prepare is not None:
        prepare()
    if patience is not None:
        meeting.JOIN_S, pulse.SILENT_AFTER_S = patience
        pulse.BEAT_S, pulse.BROKEN_AFTER_S = 0.1, 2.0
    if at == ("adapter", "other"):
        before(AdapterOptimizer, "step", lambda optimizer, *_: optimizer.values[3].add_(1e-3))
    elif at == ("versions", "other"):
        packages = launch.installed_packages()
        launch.installed_packages = lambda: {**packages, "torch": "0.0"}
    elif at == ("clock", "other"):
        took = []
        before(Decoder, "loss_and_gradients", lambda *_: took.append(1.0))
        before(ProcessGroup, "all_gather", lambda *_: took.append(0.25))
        time.perf_counter = lambda: sum(took)
    elif at == ("passes", "count"):
        with watched() as computed:
            code = main(["train", toml])
        print(json.dumps({count: [computed.passes[count], rows] for count, rows in computed.rows.items()}))
        sys.exit(code)
    elif at is not None:
        hold(at[0], _once(_ACTIONS[at[1]]))
    if connected:
        torch.distributed.init_process_group("gloo")
    sys.exit(main(["train", toml]))


PAUSE_S = 1.0


def _once(act: Callable[[], None]) -> Callable[[], None]:
    done = False

    def first() -> None:
        nonlocal done
        if not done:
            done = True
            act()

    return first


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "pause": lambda: time.sleep(PAUSE_S),
}
