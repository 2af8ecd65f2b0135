"""Whether an exported adapter, loaded again, is the one that was exported: factor by factor, and by its logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backhand.adapters.module_factors import Factors, ModuleFactors, parameters_of
from backhand.export.opened_adapter import OpenedAdapter
from backhand.export.probes import difference, probe_logits
from backhand.export.proving import Prover

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
    base, wanted, found = probe_logits(
        opened.source, opened.documents, [None, parameters_of(opened.factors), parameters_of(read)]
    )
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
