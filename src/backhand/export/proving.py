"""Proofs of one export: printed, written to the run that the adapter belongs to, and failing the command."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console

from backhand.adapters.loaded_adapter import LoadedAdapter
from backhand.errors import CheckError, ResourceError, UsageError
from backhand.generate.notes import labelled, show_notes
from backhand.train.proofs import Proof, proof_log
from backhand.train.run_directory import ADAPTER, CONFIG, opened


class Prover:
    """Collects what was checked about one output.

    Args:
        command: `merge` or `export`.
        adapter: the adapter's directory or file.
        console: for people; None prints nothing.
    """

    def __init__(self, command: Literal["merge", "export"], adapter: Path, console: Console | None) -> None:
        self.command: Literal["merge", "export"] = command
        self.proofs: list[Proof] = []
        self._run = run_of(adapter)
        self._console = console

    def say(self, text: str) -> None:
        """A line for people."""
        if self._console is not None:
            self._console.print(text, soft_wrap=True)

    def say_notes(self, loaded: LoadedAdapter) -> None:
        """What a person should know of an adapter; what is done by force is said in any case."""
        show_notes(loaded.forced)
        for note in loaded.notes[len(loaded.forced) :]:
            self.say(labelled(note))

    def check(self, statement: str, value: float, bound: float, next_step: str, *, holds: bool | None = None) -> None:
        """Note a proof: that `value` is at most `bound`, or what `holds` says of it.

        Raises:
            CheckError: it does not hold. All proofs so far have been written to the run then.
        """
        passed = value <= bound if holds is None else holds
        self.proofs.append(Proof(statement, passed, value, bound, self.command, self.command))
        self.say(f"{'proved' if passed else 'FAILED'}: {statement} ({value:.2g}, bound {bound:.2g})")
        if not passed:
            self.write()
            raise CheckError(
                f"does not hold: {statement}",
                why=f"{value:.3g}, where at most {bound:.3g} is allowed; nothing was left at the output",
                next_step=next_step,
            )

    def write(self) -> None:
        """Append the proofs to the run's proofs.jsonl, if the adapter belongs to one that can be written to."""
        if self._run is None:
            return
        try:
            with opened(self._run, resume=True, overwrite=False) as directory:
                log = proof_log(directory)
                for proof in self.proofs:
                    log(proof)
        except (UsageError, ResourceError) as error:
            self.say(f"note: not written to {self._run}: {error.one_line}")


def run_of(adapter: Path | None) -> Path | None:
    """The run directory that holds this adapter, or None."""
    try:
        path = None if adapter is None else adapter.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL character: reading it says so
        path = None
    if path is None:
        return None
    for parent in (path, *path.parents)[:4]:
        if (parent / CONFIG).is_file() and (parent / ADAPTER).is_dir():
            return parent
    return None
