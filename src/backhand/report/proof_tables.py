"""proofs.jsonl as tables: the proofs of a run by kind, each statement with its latest result."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from backhand.runs.directory import ProofKind

KINDS: Mapping[str, tuple[str, str]] = {
    "gradients": ("Gradients by hand against autograd", "backhand verify --run {run}"),
    "guards": ("Guards during training", "backhand train, at every start and end"),
    "invariances": ("What must not change the result", "backhand verify --run {run}"),
    "resume": ("Interrupted and resumed, the same bits", "backhand train … --prove-resume 5"),
    "merge": ("Merged into the base, the same model", "backhand verify --run {run}"),
    "export": ("The adapter in other programs", "{export}"),
}
"""Title of each table, and the command that fills it."""

_BY_COMMAND = {"export": "export", "merge": "merge", "verify": "gradients"}


@dataclass(frozen=True)
class ProofTable:
    """The statements of one kind."""

    kind: str  # key in KINDS
    title: str
    command: str  # "" if no command fills the table
    lines: tuple[Mapping[str, Any], ...]  # fields of `Proof`, missing ones filled in; empty if nothing was proved

    @property
    def failed(self) -> int:
        """Return the number of statements that do not hold."""
        return sum(line["passed"] is not True for line in self.lines)


def proof_tables(proofs: Iterable[Mapping[str, Any]], *, run: str, export: str) -> list[ProofTable]:
    """Return a table for every kind, including kinds without proofs.

    Args:
        proofs: lines of proofs.jsonl, oldest first.
        run: the run directory.
        export: the command that exports the adapter, "" if there is none.
    """
    newest: dict[tuple[str, str], Mapping[str, Any]] = {}
    for line in proofs:
        key = (_kind(line), str(line.get("proof")))
        newest.pop(key, None)
        newest[key] = line
    return [
        ProofTable(
            kind,
            title,
            command.format(run=shlex.quote(run), export=export),
            tuple({**_EMPTY, **line} for (of_kind, _), line in newest.items() if of_kind == kind),
        )
        for kind, (title, command) in KINDS.items()
    ]


_EMPTY = {"passed": False, "value": None, "bound": None, "proof": "", "command": "", "detail": ""}


def _kind(line: Mapping[str, Any]) -> str:
    """Return the line's kind, or that of its command if it has none, as in earlier versions."""
    kind = line.get("kind")
    if kind in get_args(ProofKind):
        return str(kind)
    return _BY_COMMAND.get(str(line.get("command")), "guards")
