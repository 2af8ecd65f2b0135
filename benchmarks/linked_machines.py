"""Two network namespaces that act as two machines, joined by a link of some rate and round trip. Root, Linux.

    rate         tc's token bucket holds each direction to it, headers of IP and TCP counted, as a wire would
    round trip   tc's netem, where this kernel has it: the link is then a pair of virtual Ethernet interfaces
                 else a tun device in each namespace, and for each direction a process that carries packets from one
                 to the other and holds each back for half the round trip

Nothing leaves this machine. Packets are of 1,500 bytes up to 100 Mbit/s and of 9,000 above: a process in Python
carries some 20,000 of them a second each way. What a link is really like is measured, not believed: see `probed`.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import multiprocessing
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HOSTS = ("10.77.0.1", "10.77.0.2")
_PORT = 29400
_PINGS = 100
_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
_PR_SET_TIMERSLACK = 29
_READY_S = 20.0
_HEADERS, _ETHERNET_HEADER = 52, 14
"""Bytes of a packet in addition to the data of TCP; tc counts Ethernet's where there is one."""


@dataclass(frozen=True)
class Link:
    """Two machines and what lies between them.

    Attributes:
        names: of the two namespaces.
        made_of: veth, netem or tun.
        payload_share: of the bytes that count for the rate, those that TCP carries.
        hosts: where they reach each other, through `eth0`.
    """

    names: tuple[str, str]
    made_of: str
    payload_share: float
    hosts: tuple[str, str] = HOSTS

    def inside(self, machine: int) -> list[str]:
        """What comes before a command that is to run on one of the machines."""
        return ["ip", "netns", "exec", self.names[machine]]

    def started(self, machine: int, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """A command on one of the machines, its output in pipes."""
        pipe = subprocess.PIPE
        whole = [*self.inside(machine), *command]
        return subprocess.Popen(whole, env={**os.environ, **environment}, stdout=pipe, stderr=pipe, text=True)

    def cut(self) -> None:
        """The second machine's cable is pulled out."""
        _must("ip", "-n", self.names[1], "link", "set", "eth0", "down")


@contextmanager
def linked_machines(rate_mbit: int | None = None, round_trip_s: float = 0.0) -> Iterator[Link]:
    """Make the namespaces and their link, and take them away at the end.

    Args:
        rate_mbit: of each direction; as fast as memory where it is None.
        round_trip_s: added to what the kernel takes.

    Raises:
        OSError: this system makes no namespaces or no such link; the text is what `ip` or `tc` said.
    """
    names = (f"backhand-{os.getpid()}-1", f"backhand-{os.getpid()}-2")
    mtu = 1500 if rate_mbit is None or rate_mbit <= 100 else 9000
    made: list[str] = []
    carriers: list[multiprocessing.process.BaseProcess] = []
    try:
        for name in names:
            _must("ip", "netns", "add", name)
            made.append(name)
        netem = round_trip_s > 0 and _has_netem(names[0])
        tun = round_trip_s > 0 and not netem
        if tun:
            ends = [
                _tun_end(name, f"bh{os.getpid() % 100000}{letter}") for name, letter in zip(names, "ab", strict=True)
            ]
            carriers = [_carrier(*pair, round_trip_s / 2) for pair in (ends, ends[::-1])]
            for end in ends:
                os.close(end)
        else:
            _veth_ends(names)
        for number, name in enumerate(names):
            other = ["peer", HOSTS[1 - number]] if tun else []
            _must(
                "ip", "-n", name, "addr", "add", HOSTS[number] if tun else f"{HOSTS[number]}/24", *other, "dev", "eth0"
            )
            _must("ip", "-n", name, "link", "set", "eth0", "mtu", str(mtu), "txqueuelen", "10000", "up")
            _must("ip", "-n", name, "link", "set", "lo", "up")
            parent = ["root"]
            if netem:
                delay = ["netem", "delay", f"{round_trip_s * 1e6 / 2:.0f}us", "limit", "100000"]
                _must("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "handle", "1:", *delay)
                parent = ["parent", "1:1"]
            if rate_mbit is not None:
                burst = max(2 * mtu, rate_mbit * 125)  # what a millisecond carries
                shape = ["tbf", "rate", f"{rate_mbit}mbit", "burst", str(burst), "latency", "50ms"]
                _must("tc", "-n", name, "qdisc", "add", "dev", "eth0", *parent, *shape)
        overhead = _HEADERS if tun else _HEADERS + _ETHERNET_HEADER
        share = (mtu - _HEADERS) / (mtu - _HEADERS + overhead)
        yield Link(names, "netem" if netem else "tun" if tun else "veth", share)
    finally:
        for carrier in carriers:
            carrier.terminate()
            carrier.join()
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _has_netem(name: str) -> bool:
    tried = subprocess.run(
        ["tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"],
        capture_output=True,
        check=False,
    )
    if tried.returncode == 0:
        _must("tc", "-n", name, "qdisc", "del", "dev", "lo", "root")
    return tried.returncode == 0


def _veth_ends(names: Sequence[str]) -> None:
    ends = _end_names()
    _must("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    for name, end in zip(names, ends, strict=True):
        _into(name, end)


def _end_names() -> list[str]:
    return [f"bh{os.getpid() % 100000}{letter}" for letter in "ab"]


def _tun_end(name: str, end: str) -> int:
    """What is written to the descriptor arrives in the namespace, and what leaves it is read from there."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22s", end.encode(), _TUN_WITHOUT_HEADER, b""))
    _into(name, end)
    return descriptor


def _into(name: str, end: str) -> None:
    _must("ip", "link", "set", end, "netns", name)
    _must("ip", "-n", name, "link", "set", end, "name", "eth0")


def _carrier(source: int, sink: int, delay_s: float) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_carry, args=(source, sink, delay_s), daemon=True)
    process.start()
    return process


def _carry(source: int, sink: int, delay_s: float) -> None:
    """Forward each packet from one descriptor to the other with a delay in seconds."""
    os.setpriority(os.PRIO_PROCESS, 0, -10)  # the machines compute on the same cores
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)  # wake within 1 us of the time, not 50
    waiting: deque[tuple[float, bytes]] = deque()
    while True:
        wait_s = None if not waiting else max(0.0, waiting[0][0] - time.monotonic())
        if select.select([source], [], [], wait_s)[0]:
            due = time.monotonic() + delay_s
            with suppress(BlockingIOError):
                for _ in range(64):
                    waiting.append((due, os.read(source, 1 << 16)))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            with suppress(OSError):  # the interface there is down: a packet is lost
                os.write(sink, waiting[0][1])
            waiting.popleft()


def _must(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def probed(link: Link, payload_bytes: int = 20_000_000) -> dict[str, float]:
    """What TCP finds between the two machines: seconds of a byte's round trip, Mbit/s of both directions at once."""
    words = [[sys.executable, str(Path(__file__)), role, str(payload_bytes)] for role in ("answer", "ask")]
    ends = [link.started(machine, command) for machine, command in enumerate(words)]
    texts = [end.communicate(timeout=600) for end in ends]
    if any(end.returncode for end in ends):
        raise RuntimeError(f"the link carries nothing: {texts}")
    found: dict[str, float] = json.loads(texts[1][0])
    return found


def _answer(payload_bytes: int) -> None:
    with socket.create_server(("", _PORT)) as server:
        connection, _ = server.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_PINGS):
            connection.sendall(connection.recv(1))
        _both_ways(connection, payload_bytes)


def _ask(payload_bytes: int) -> None:
    with _reached(HOSTS[0]) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        for _ in range(_PINGS):
            began = time.perf_counter()
            connection.sendall(b"p")
            connection.recv(1)
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        _both_ways(connection, payload_bytes)
        rate_mbit = payload_bytes * 8 / (time.perf_counter() - began) / 1e6
    print(json.dumps({"round_trip_s": statistics.median(times), "rate_mbit": rate_mbit}))


def _both_ways(connection: socket.socket, payload_bytes: int) -> None:
    sender = threading.Thread(target=connection.sendall, args=(bytes(payload_bytes),))
    sender.start()
    place, left = bytearray(1 << 20), payload_bytes
    while left:
        left -= connection.recv_into(place, min(left, len(place)))
    sender.join()


def _reached(host: str) -> socket.socket:
    end = time.monotonic() + _READY_S
    while True:
        try:
            return socket.create_connection((host, _PORT))
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    {"answer": _answer, "ask": _ask}[sys.argv[1]](int(sys.argv[2]))
