"""Proofs of one export: compare factors and outputs, print and record the result, and fail the command."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from backhand.adapters.loading import LoadedAdapter
from backhand.adapters.module_factors import Factors, ModuleFactors, parameters_of
from backhand.errors import CheckError, ResourceError, UsageError
from backhand.interop.opened_adapter import OpenedAdapter
from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.adapted_group import block_adapter
from backhand.nn.decoder.block import block_forward
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.trained_weights import TrainedWeights
from backhand.nn.decoder.weights import (
    BlockWeights,
    dense_views,
    empty_weights,
    linear_parts,
    load_weights,
)
from backhand.nn.families.family import DecoderConfig, split_layer
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.source import ModelSource, fill
from backhand.nn.lora_parameters import LoRAParameters
from backhand.printing import counting
from backhand.runs.directory import Proof, opened, proof_log, run_of
from backhand.runs.status import unfinished
from backhand.words import labelled, show_notes

WRITING = "writing and proving the output"
"""The activity of a command while it writes and proves its output."""


class Prover:
    """Collects the proofs of one output.

    Args:
        console: prints to the user; None prints nothing.
    """

    def __init__(self, command: Literal["merge", "export"], adapter: Path, console: Console | None) -> None:
        self.command: Literal["merge", "export"] = command
        self.proofs: list[Proof] = []
        self._run = run_of(adapter)
        self._console = console

    def say(self, text: str) -> None:
        """Print a line for the user."""
        if self._console is not None:
            self._console.print(text, soft_wrap=True)

    def say_notes(self, loaded: LoadedAdapter) -> None:
        """Print the notes of an adapter; forced actions are printed in any case."""
        show_notes(loaded.forced)
        left = unfinished(loaded.directory)
        for note in (*([] if left is None else [left.note]), *loaded.notes[len(loaded.forced) :]):
            self.say(labelled(note))

    def check(self, statement: str, value: float, bound: float, next_step: str, *, holds: bool | None = None) -> None:
        """Record a proof: `value` is at most `bound`, or `holds` if it is given.

        Raises:
            CheckError: if it does not hold. All proofs so far are written to the run before.
        """
        passed = value <= bound if holds is None else holds
        self.proofs.append(Proof(statement, passed, value, bound, self.command, self.command))
        self.say(f"{'proved' if passed else 'FAILED'}: {statement} ({value:.2g}, bound {bound:.2g})")
        if not passed:
            self.write()
            raise CheckError(
                f"does not hold: {statement}",
                why=f"{value:.3g} is more than the allowed {bound:.3g}; the output was removed",
                next_step=next_step,
            )

    def write(self) -> None:
        """Append the proofs to the run's proofs.jsonl, if the adapter belongs to a writable run."""
        if self._run is None:
            return
        try:
            with opened(self._run, resume=True, overwrite=False) as directory:
                log = proof_log(directory)
                for proof in self.proofs:
                    log(proof)
        except (UsageError, ResourceError) as error:
            self.say(f"note: not written to {self._run}: {error.one_line}")


FACTOR_BOUND = 1e-6
OUTPUT_BOUND = 1e-5
_REPORT = "report it with the adapter's configuration; the adapter itself is as it was"


def prove_export(prover: Prover, exported: Factors, read: Factors, opened: OpenedAdapter | None = None) -> None:
    """Compare every module's update in the file, and the probes' outputs with it, with those of the adapter.

    Args:
        opened: base and adapter for the outputs, None without a model.

    Raises:
        CheckError: if a module is missing, its factors differ, or outputs differ by more than float32 noise.
    """
    error = factor_error(exported, read)
    prover.check("every factor read back from the file gives the adapter's update", error, FACTOR_BOUND, _REPORT)
    if opened is None:
        return
    kind = opened.source.config.get("model_type")
    adapters = [None, *(parameters_of(factors, kind) for factors in (exported, read))]
    base, wanted, found = BlockWalk(opened.source, opened.documents, adapters).outputs()
    statement = (
        f"{opened.config.output_name} on {wanted.shape[0]} probe tokens equal those of the adapter that was exported"
    )
    prover.check(statement, difference(found, wanted, base).relative, OUTPUT_BOUND, _REPORT)


def factor_error(exported: Factors, read: Factors) -> float:
    """Return the largest relative difference of scaling · lora_B over the modules; infinite if anything else differs.

    lora_A must have the same bits. Ranks may be padded with zeros, and modules that are not in the adapter must have a
    zero factor.
    """
    return max((_module_error(exported.get(name), read.get(name)) for name in {*exported, *read}), default=0.0)


def _module_error(wanted: ModuleFactors | None, found: ModuleFactors | None) -> float:
    if wanted is None:
        return 0.0 if found is not None and not (found.lora_A.any() and found.lora_B.any()) else math.inf
    if found is None or found.rank < wanted.rank or found.kernel != wanted.kernel:
        return math.inf
    wanted = wanted.padded_to(found.rank)
    same_A = torch.equal(wanted.lora_A, found.lora_A.to(wanted.lora_A.dtype))
    if not same_A or wanted.lora_B.shape != found.lora_B.shape:
        return math.inf
    ours, theirs = (one.scaling * one.lora_B.double() for one in (wanted, found))
    distance, size = float((ours - theirs).norm()), float(ours.norm())
    if distance == 0:
        return 0.0
    return distance / size if size > 0 and math.isfinite(distance) else math.inf


@dataclass(frozen=True)
class Difference:
    """Differences between computed and expected outputs."""

    relative: float  # ‖found − wanted‖ / ‖wanted‖; infinite if only the numerator is not 0
    # ‖found − wanted‖ / ‖wanted − base‖, relative to the adapter's effect; infinite if only the numerator is not 0
    share: float
    largest: float


def difference(found: Tensor, wanted: Tensor, base: Tensor) -> Difference:
    """Compare outputs, (tokens, vocab or hidden) each; values that are not finite differ infinitely.

    Sums are in float64 over a few tokens at a time: with a large vocabulary, three copies in float64 would take more
    memory than the rest of a merge.
    """
    distance = effect = size = largest = 0.0
    for rows in zip(*(outputs.split(_ROWS) for outputs in (found, wanted, base)), strict=True):
        there, right, plain = (outputs.double() for outputs in rows)
        distance += float((there - right).square().sum())
        effect += float((right - plain).square().sum())
        size += float(right.square().sum())
        largest = max(largest, float((there - right).abs().max()))
    distance, effect, size = distance**0.5, effect**0.5, size**0.5
    if distance != distance:
        return Difference(math.inf, math.inf, math.inf)
    return Difference(_ratio(distance, size), _ratio(distance, effect), largest)


def _ratio(distance: float, size: float) -> float:
    return distance / size if size > 0 else math.inf if distance > 0 else 0.0


_ROWS = 16


# Outputs of a model that is never in memory as a whole: one block after another is read, used and dropped.
#
# One block is in memory in float32; rows and tiles of embedding and head are read as they are stored. Several adapters
# are computed together, and the writer of the merged model takes the block's tensors from here, so that each tensor is
# read and dequantized once.


class BlockWalk:
    """One pass through a model's blocks.

    Args:
        documents: token ids, at least one each.
        adapters: None for the base model itself.

    Raises:
        UnsupportedModel: if the engine does not compute the configuration exactly.
        ArtifactError: if tensors are missing or have another shape; its methods raise it too.
    """

    def __init__(
        self,
        source: ModelSource,
        documents: Sequence[Sequence[int]],
        adapters: Sequence[LoRAParameters | None] = (None,),
    ) -> None:
        self._source = source
        self._adapters = adapters
        self._config = config = decoder_config(source.config)
        self._outer = load_weights(source, replace(config, layers=()), torch.float32, quantized=True)
        self._decoders = [Decoder(config, self._outer) for _ in adapters]
        for decoder, lora in zip(self._decoders, adapters, strict=True):
            if lora is not None:
                decoder.attach(lora)  # checks the shapes, and casts the factors
        ids = torch.tensor([token for document in documents for token in document])
        batch = PackedBatch(ids, torch.full_like(ids, IGNORE_INDEX), tuple(len(document) for document in documents))
        self._states = [decoder.input_states(batch) for decoder in self._decoders]
        # One per adapter, since layers may share keys and values within a pass.
        self._contexts = [decoder.contexts(batch) for decoder in self._decoders]
        self._layer = -1
        self._views: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor | None:
        """Advance to the tensor's block, and return the tensor, dense in float32.

        Returns None for a tensor outside the blocks, or of a block that the walk has passed.
        """
        layer = layer_of(name)
        while layer is not None and self._layer < layer and self._step():
            pass
        return self._views.get(name)

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """Complete the walk, and return the outputs per adapter, with concatenated documents.

        These are the logits, (tokens, vocab). For a model without a head they are the final states, (tokens, hidden).
        """
        blocks = len(self._config.layers)
        with counting(f"computing the probes' {self._config.output_name}", blocks - 1 - self._layer, "blocks") as done:
            while self._step():
                done()
            self._views = {}
            return [decoder.output(x) for decoder, x in zip(self._decoders, self._states, strict=True)]

    @torch.no_grad()
    def _step(self) -> bool:
        """Read and compute the next block; return False if there is none."""
        self._views = {}  # freed before the next block is read
        layer = self._layer + 1
        if layer == len(self._config.layers):
            return False
        block, self._views = _block_weights(self._source, self._config, layer)
        for index, lora in enumerate(self._adapters):
            own = block if lora is None else TrainedWeights(self._outer, self._config, lora).block(layer, block)
            adapter = block_adapter(lora, self._config, layer, None, linear_parts(own, self._config, layer))
            context = self._contexts[index][layer]
            self._states[index], _ = block_forward(self._states[index], own, adapter, context, "block")
        self._layer = layer
        return True


def layer_of(name: str) -> int | None:
    """Return the block of a tensor by its Hugging Face name, or None for a tensor outside the blocks."""
    place = split_layer(name)
    return None if place is None else place[0]


def _block_weights(source: ModelSource, config: DecoderConfig, layer: int) -> tuple[BlockWeights, dict[str, Tensor]]:
    """Return a block, and its tensors by their names in the source."""
    # Built as a model of this one layer, whose embedding of one row and final norm are never filled.
    own = config.per_layer and config.per_layer._replace(layers=1, vocab_size=1)
    single = replace(config, layers=(config.layers[layer],), vocab_size=1, tied_head=True, per_layer=own)
    weights = empty_weights(single, torch.float32)
    views = {
        f"{config.block_path(layer)}.{place[1]}": view
        for name, view in dense_views(weights, single)
        if (place := split_layer(name)) is not None
    }
    fill(source, views.items())
    return weights.blocks[0], views
