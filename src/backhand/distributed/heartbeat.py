"""Whether the other processes of a run are still there: each writes a number into a shared store, again and again.

A collective operation of torch waits for a peer until its timeout, and its errors name an address at best. So nobody
waits inside one: `distributed` starts it and looks here in between. A process that falls silent is named by its rank;
one that ends for a reason leaves the reason here, so that the others end with the same exit code and say whose it was.
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
"""Without a beat for so long a process, or the store, counts as lost: a busy machine may hold one up for seconds."""
BROKEN_AFTER_S = 4.0
"""Without a beat for so long, once a connection has been closed: then somebody is gone."""
LEAVE_S = 6.0


class StoppedElsewhere(BackhandError):
    """Another process ended for a reason of its own; this one ends with its exit code."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass
class _Peer:
    name: str
    value: bytes = b""
    changed_s: float = 0.0

    @property
    def left(self) -> dict[str, Any] | None:
        """Why it ended, where it has."""
        return json.loads(self.value) if self.value.startswith(b"{") else None


class Pulse:
    """Beats in a thread of its own as long as the process lives.

    Args:
        store: torch's, over a connection of its own: operations wait for one another.
        meeting_point: where the store is.
    """

    def __init__(self, store: Any, rank: int, names: list[str], meeting_point: str) -> None:
        self._store = store
        self._rank = rank
        self._peers = [_Peer(name, changed_s=time.monotonic()) for name in names]
        self._meeting_point = meeting_point
        self._reached_s = time.monotonic()
        self._lost_store: str | None = None
        self._last_word: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        store.set(self._key(rank), "0")
        self._thread.start()

    def _key(self, rank: int) -> str:
        return f"beat/{rank}"

    def _run(self) -> None:
        beats = 0
        while not self._ended.is_set():
            beats += 1
            try:
                self._store.set(self._key(self._rank), self._last_word or str(beats))
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
        """Raise if a process is lost or has ended for a reason.

        Raises:
            ResourceError: names the rank that has fallen silent.
            StoppedElsewhere: with the exit code of the process that ended.
        """
        patience_s = SILENT_AFTER_S if patience_s is None else patience_s
        for peer in self._others():
            if (word := peer.left) is not None and word["exit_code"] != 0:
                text = word["text"] if word["echo"] else f"{peer.name} stopped: {word['text']}"
                raise StoppedElsewhere(text, word["exit_code"])
        now = time.monotonic()
        if now - self._reached_s > patience_s:
            raise _lost(self._peers[0].name, f"nothing answers at {self._meeting_point}", self._lost_store)
        for peer in self._others():
            if peer.left is None and now - peer.changed_s > patience_s:
                raise _lost(peer.name, f"it has said nothing for {now - peer.changed_s:.0f} s", None)

    def _others(self) -> list[_Peer]:
        return [peer for rank, peer in enumerate(self._peers) if rank != self._rank]

    def explain(self, broken: str) -> BackhandError:
        """Why a connection was closed: waits until it is known who is gone, or gives up on knowing."""
        began = time.monotonic()
        while time.monotonic() - began < 2 * BROKEN_AFTER_S:
            try:
                self.check(BROKEN_AFTER_S)
            except BackhandError as error:
                return error
            time.sleep(BEAT_S / 5)
        return ResourceError("the exchange with the other processes broke off", why=broken, next_step=_CONTINUE)

    def leave(self, exit_code: int, text: str, *, echo: bool) -> bool:
        """Tell why this process ends, and wait until the others know: they end as well.

        Args:
            echo: whether another process is the reason.

        Returns:
            whether the first process says the same, so that this one need not.
        """
        self._last_word = json.dumps({"exit_code": exit_code, "text": text, "echo": echo})
        began = time.monotonic()
        while time.monotonic() - began < LEAVE_S and not self._all_left(silent_s=BROKEN_AFTER_S):
            time.sleep(BEAT_S / 5)
        self._end()
        first = self._peers[0].left
        return self._rank != 0 and first is not None and (echo or first["text"] == text)

    def close(self) -> None:
        """Wait until all processes are done; none ends before. Raises what `check` does."""
        self._last_word = json.dumps({"exit_code": 0, "text": "", "echo": False})
        while not self._all_left():
            if self._lost_store is not None and self._peers[0].left is not None:
                break  # the first process has seen that all are done, and took the store with it
            self.check()
            time.sleep(BEAT_S / 5)
        self._end()

    def _all_left(self, silent_s: float | None = None) -> bool:
        now = time.monotonic()
        if silent_s is not None and now - self._reached_s > silent_s:
            return True
        own = self._peers[self._rank].left is not None  # it has been written
        return own and all(
            peer.left is not None or (silent_s is not None and now - peer.changed_s > silent_s)
            for peer in self._others()
        )

    def _end(self) -> None:
        if self._rank == 0:
            time.sleep(2 * BEAT_S)  # the store may be this process's: the others read once more
        self._ended.set()
        with suppress(RuntimeError):
            self._thread.join(timeout=2 * BEAT_S)


_CONTINUE = "look after that machine and its network; continue from the newest checkpoint with --resume"


def _lost(name: str, what: str, why: str | None) -> ResourceError:
    return ResourceError(f"{name} is lost: {what}", why=why, next_step=_CONTINUE)
