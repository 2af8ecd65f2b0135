"""Proofs of one export: printed, written to the run that the adapter belongs to, and failing the command."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from backhand.adapters.loading import LoadedAdapter
from backhand.adapters.module_factors import Factors, ModuleFactors, parameters_of
from backhand.errors import CheckError, ResourceError, UsageError
from backhand.export.opened_adapter import OpenedAdapter
from backhand.export.probes import BlockWalk, difference
from backhand.runs.directory import ADAPTER, CONFIG, Proof, opened, proof_log
from backhand.words import labelled, show_notes


class Prover:
    """Collects what was checked about one output.

    Args:
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


FACTOR_BOUND = 1e-6
LOGIT_BOUND = 1e-5
_REPORT = "report it with the adapter's configuration; the adapter itself is as it was"


def prove_factors(prover: Prover, exported: Factors, read: Factors) -> None:
    """Every module's update, as the file has it, against the adapter's.

    Raises:
        CheckError: a module is missing, or its factors are others.
    """
    prover.check(
        "every factor read back from the file gives the adapter's update",
        factor_error(exported, read),
        FACTOR_BOUND,
        _REPORT,
    )


def prove_logits(prover: Prover, opened: OpenedAdapter, read: Factors) -> None:
    """Logits on the probes with what the file holds, against those with the adapter.

    Raises:
        CheckError: they differ by more than float32 noise.
    """
    kind = opened.source.config.get("model_type")
    exported, written = (parameters_of(factors, kind) for factors in (opened.factors, read))
    base, wanted, found = BlockWalk(opened.source, opened.documents, [None, exported, written]).logits()
    measured = difference(found, wanted, base)
    prover.check(
        f"logits on {wanted.shape[0]} probe tokens equal those of the adapter that was exported",
        measured.relative,
        LOGIT_BOUND,
        _REPORT,
    )


def factor_error(exported: Factors, read: Factors) -> float:
    """The largest relative difference of scaling · lora_B over the modules; infinite if anything else differs.

    lora_A must have the same bits; ranks may have been filled up with zeros, and modules that are not in the adapter
    must have a factor of nothing but zeros.
    """
    worst = 0.0
    for name in {*exported, *read}:
        if name not in read:
            return float("inf")
        found = read[name]
        if name not in exported:
            if found.lora_A.any() and found.lora_B.any():
                return float("inf")
            continue
        worst = max(worst, _module_error(exported[name], found))
    return worst


def _module_error(wanted: ModuleFactors, found: ModuleFactors) -> float:
    if found.rank < wanted.rank or found.kernel != wanted.kernel:
        return float("inf")
    wanted = wanted.padded_to(found.rank)
    if not torch.equal(wanted.lora_A, found.lora_A.to(wanted.lora_A.dtype)):
        return float("inf")
    if wanted.lora_B.shape != found.lora_B.shape:
        return float("inf")
    ours, theirs = _scaled(wanted), _scaled(found)
    distance, size = float((ours - theirs).norm()), float(ours.norm())
    if distance == 0:
        return 0.0
    return distance / size if size > 0 and math.isfinite(distance) else float("inf")


def _scaled(one: ModuleFactors) -> Tensor:
    return one.scaling * one.lora_B.double()
