"""Proofs of one export: how far logits are apart, printed, written to the adapter's run, and failing the command."""

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
from backhand.export.opened_adapter import OpenedAdapter
from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.adapted_group import block_adapter
from backhand.nn.decoder.block import block_forward
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.trained_weights import TrainedWeights
from backhand.nn.decoder.weights import (
    BlockWeights,
    dense_views,
    empty_weights,
    linear_parts,
    load_weights,
)
from backhand.nn.loading.source import ModelSource, fill
from backhand.nn.lora_parameters import LoRAParameters
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
    if adapter is None:
        return None
    try:
        path = adapter.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL character: reading it says so
        return None
    parents = (path, *path.parents)[:4]
    return next((one for one in parents if (one / CONFIG).is_file() and (one / ADAPTER).is_dir()), None)


FACTOR_BOUND = 1e-6
LOGIT_BOUND = 1e-5
_REPORT = "report it with the adapter's configuration; the adapter itself is as it was"


def prove_export(prover: Prover, exported: Factors, read: Factors, opened: OpenedAdapter | None = None) -> None:
    """Every module's update as the file has it, and the probes' logits with it, against the adapter's.

    Args:
        opened: what the logits are computed from; None where there is no model.

    Raises:
        CheckError: a module is missing, its factors are others, or logits differ by more than float32 noise.
    """
    error = factor_error(exported, read)
    prover.check("every factor read back from the file gives the adapter's update", error, FACTOR_BOUND, _REPORT)
    if opened is None:
        return
    kind = opened.source.config.get("model_type")
    adapters = [None, *(parameters_of(factors, kind) for factors in (exported, read))]
    base, wanted, found = BlockWalk(opened.source, opened.documents, adapters).logits()
    statement = f"logits on {wanted.shape[0]} probe tokens equal those of the adapter that was exported"
    prover.check(statement, difference(found, wanted, base).relative, LOGIT_BOUND, _REPORT)


def factor_error(exported: Factors, read: Factors) -> float:
    """The largest relative difference of scaling · lora_B over the modules; infinite if anything else differs.

    lora_A must have the same bits; ranks may have been filled up with zeros, and modules that are not in the adapter
    must have a factor of nothing but zeros.
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
    """How far logits are from those they should be."""

    relative: float  # ‖found − wanted‖ / ‖wanted‖
    # ‖found − wanted‖ / ‖wanted − base‖, of what the adapter does at all; infinite where it does nothing and something
    # differs
    share: float
    largest: float


def difference(found: Tensor, wanted: Tensor, base: Tensor) -> Difference:
    """Compare logits, (tokens, vocab) each; what is not finite is infinitely far away.

    Summed in float64 over a few tokens at a time: with a large vocabulary three copies in float64 would be more than
    all else that a merge holds.
    """
    distance = effect = size = largest = 0.0
    for rows in zip(*(logits.split(_ROWS) for logits in (found, wanted, base)), strict=True):
        there, right, plain = (logits.double() for logits in rows)
        distance += float((there - right).square().sum())
        effect += float((right - plain).square().sum())
        size += float(right.square().sum())
        largest = max(largest, float((there - right).abs().max()))
    distance, effect, size = distance**0.5, effect**0.5, size**0.5
    if distance != distance:
        return Difference(math.inf, math.inf, math.inf)
    share = distance / effect if effect > 0 else math.inf if distance > 0 else 0.0
    return Difference(distance / size, share, largest)


_ROWS = 16


# Logits of a model that is never in memory as a whole: block after block is read, used and dropped.
#
# It takes one block in float32; of embedding and head, which stay as they are stored, rows and tiles.
# Several adapters are computed side by side, and whoever writes the model meanwhile takes the block's tensors from
# here, so that each is read and unpacked once for all of them.


class BlockWalk:
    """Goes through a model's blocks once.

    Args:
        documents: token ids, at least one each.
        adapters: None for the base model itself.

    Raises:
        UnsupportedModel: for a configuration that the engine does not compute exactly.
        ArtifactError: for tensors that are missing or of another shape, here or in what follows.
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
        self._states = [decoder.embed(ids) for decoder in self._decoders]
        # Each of its own, since layers may share keys and values within a pass.
        self._contexts = [decoder.contexts(batch) for decoder in self._decoders]
        self._layer = -1
        self._views: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor | None:
        """A block's tensor, dense in float32; the walk goes on to this block.

        None for what is no block's, and for a block that the walk has left behind.
        """
        layer = layer_of(name)
        while layer is not None and self._layer < layer and self._step():
            pass
        return self._views.get(name)

    @torch.no_grad()
    def logits(self) -> list[Tensor]:
        """One (tokens, vocab) tensor for each of the adapters, documents behind one another; the walk ends here."""
        while self._step():
            pass
        self._views = {}
        return [decoder.head(x) for decoder, x in zip(self._decoders, self._states, strict=True)]

    @torch.no_grad()
    def _step(self) -> bool:
        """Read the next block and compute it; False where there is none."""
        self._views = {}  # before the next one is there
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
    """The block that a tensor is of, by its Hugging Face name; None for one outside the blocks."""
    rest = name.removeprefix(_BLOCKS)
    return None if rest == name else int(rest.partition(".")[0])


def _block_weights(source: ModelSource, config: DecoderConfig, layer: int) -> tuple[BlockWeights, dict[str, Tensor]]:
    """A block, and its tensors by their names in the source."""
    # A model of this one layer, whose embedding of one row and final norm are left unfilled.
    own = config.per_layer and config.per_layer._replace(layers=1, vocab_size=1)
    single = replace(config, layers=(config.layers[layer],), vocab_size=1, tied_head=True, per_layer=own)
    weights = empty_weights(single, torch.float32)
    first, this = f"{_BLOCKS}0.", f"{_BLOCKS}{layer}."
    views = {
        this + name.removeprefix(first): view for name, view in dense_views(weights, single) if name.startswith(first)
    }
    fill(source, views.items())
    return weights.blocks[0], views


_BLOCKS = "model.layers."
