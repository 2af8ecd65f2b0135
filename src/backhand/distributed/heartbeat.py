"""Detect lost processes of a run: each process writes an increasing number into a shared store.

A collective operation of torch waits for a lost peer until its timeout, and its errors name an address at best.
`process_group` therefore starts operations asynchronously and calls `Heartbeat.check` while it waits. An error names
the rank that stopped beating. A process that ends with an error writes the error into the store. The other processes
then end with the same exit code and name that process.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from backhand.errors import BackhandError, ResourceError

BEAT_S = 0.5
SILENT_AFTER_S = 20.0
"""Seconds without a beat after which a process or the store is lost. A busy machine may delay a beat for seconds."""
BROKEN_AFTER_S = 4.0
"""The same limit once a connection has been closed, which means that a process has ended."""
LEAVE_S = 6.0
"""Seconds that a process with an error waits for the others to read its error."""


class StoppedElsewhere(BackhandError):
    """Another process ended with an error. This process ends with the same exit code."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass
class _Peer:
    name: str
    value: bytes = b""
    changed_s: float = 0.0

    @property
    def farewell(self) -> dict[str, Any] | None:
        """Exit code and text that the process wrote before it ended; None while it runs."""
        return json.loads(self.value) if self.value.startswith(b"{") else None


class Heartbeat:
    """Write this process's beats and read the others', in a separate thread.

    Args:
        store: a torch.distributed store with a connection of its own, because a store serializes its operations.
        rank: number of this process.
        names: of all processes, for messages.
        address: host and port of the store.
    """

    def __init__(self, store: Any, rank: int, names: list[str], address: str) -> None:
        self._store = store
        self._rank = rank
        self._peers = [_Peer(name, changed_s=time.monotonic()) for name in names]
        self._address = address
        self._reached_s = time.monotonic()
        self._lost_store: str | None = None
        self._farewell: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        store.set(self._key(rank), "0")
        self._thread.start()

    def _key(self, rank: int) -> str:
        return f"beat/{rank}"

    def _run(self) -> None:
        beats = 0
        while not self._ended.is_set():
            beats += 1
            try:
                self._store.set(self._key(self._rank), self._farewell or str(beats))
                values = self._store.multi_get([self._key(rank) for rank in range(len(self._peers))])
            except RuntimeError as error:
                self._lost_store = str(error).splitlines()[0]
                time.sleep(BEAT_S)
                continue
            now = time.monotonic()
            self._reached_s, self._lost_store = now, None
            for peer, value in zip(self._peers, values, strict=True):
                if value != peer.value:
                    peer.value, peer.changed_s = value, now
            self._ended.wait(BEAT_S)

    def check(self, patience_s: float | None = None) -> None:
        """Raise an error if another process is lost or has ended with an error.

        Raises:
            ResourceError: names the rank that stopped beating.
            StoppedElsewhere: with the exit code of the process that ended.
        """
        patience_s = SILENT_AFTER_S if patience_s is None else patience_s
        for peer in self._others():
            if (farewell := peer.farewell) is not None and farewell["exit_code"] != 0:
                text = farewell["text"] if farewell["echo"] else f"{peer.name} stopped: {farewell['text']}"
                raise StoppedElsewhere(text, farewell["exit_code"])
        now = time.monotonic()
        if now - self._reached_s > patience_s:
            raise _lost(self._peers[0].name, f"nothing answers at {self._address}", self._lost_store)
        for peer in self._others():
            if peer.farewell is None and now - peer.changed_s > patience_s:
                raise _lost(peer.name, f"no sign of life for {now - peer.changed_s:.0f} s", None)

    def _others(self) -> list[_Peer]:
        return [peer for rank, peer in enumerate(self._peers) if rank != self._rank]

    def explain(self, broken: str) -> BackhandError:
        """Return the error that closed a connection. Waits until the lost process is known, within a time limit."""
        start_s = time.monotonic()
        while time.monotonic() - start_s < 2 * BROKEN_AFTER_S:
            try:
                self.check(BROKEN_AFTER_S)
            except BackhandError as error:
                return error
            time.sleep(BEAT_S / 5)
        return ResourceError("the connection to the other processes was closed", why=broken, next_step=_CONTINUE)

    def leave(self, exit_code: int, text: str, *, echo: bool) -> bool:
        """Write why this process ends and wait until the others have ended as well.

        Args:
            exit_code: of this process.
            text: the error in one line.
            echo: True if the error is another process's.

        Returns:
            True if rank 0 reports the same error, so that this process need not.
        """
        self._farewell = json.dumps({"exit_code": exit_code, "text": text, "echo": echo})
        start_s = time.monotonic()
        while time.monotonic() - start_s < LEAVE_S and not self._all_left(silent_s=BROKEN_AFTER_S):
            time.sleep(BEAT_S / 5)
        self._end()
        first = self._peers[0].farewell
        return self._rank != 0 and first is not None and (echo or first["text"] == text)

    def close(self) -> None:
        """Wait until all processes have finished. Raises the errors of `check`."""
        self._farewell = json.dumps({"exit_code": 0, "text": "", "echo": False})
        while not self._all_left():
            if self._lost_store is not None and self._peers[0].farewell is not None:
                break  # rank 0, which served the store, has seen that all have finished and has ended
            self.check()
            time.sleep(BEAT_S / 5)
        self._end()

    def _all_left(self, silent_s: float | None = None) -> bool:
        now = time.monotonic()
        if silent_s is not None and now - self._reached_s > silent_s:
            return True
        written = self._peers[self._rank].farewell is not None
        return written and all(
            peer.farewell is not None or (silent_s is not None and now - peer.changed_s > silent_s)
            for peer in self._others()
        )

    def _end(self) -> None:
        if self._rank == 0:
            time.sleep(2 * BEAT_S)  # this process may serve the store: let the others read once more
        self._ended.set()
        with suppress(RuntimeError):
            self._thread.join(timeout=2 * BEAT_S)


_CONTINUE = "check that machine and its network; continue from the newest checkpoint with --resume"


def _lost(name: str, what: str, why: str | None) -> ResourceError:
    return ResourceError(f"{name} is lost: {what}", why=why, next_step=_CONTINUE)
