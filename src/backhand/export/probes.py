"""Tokens on which models are compared, and how far two sets of logits on them are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backhand.data.split import neutral_texts
from backhand.errors import ArtifactError
from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.adapted_group import block_adapter
from backhand.nn.decoder.block import block_forward
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.weights import (
    BlockWeights,
    TrainedWeights,
    dense_views,
    empty_weights,
    linear_parts,
    load_weights,
)
from backhand.nn.loading.source import ModelSource, fill
from backhand.nn.lora_parameters import LoRAParameters

_RANDOM_TOKENS = 32


def probe_documents(source: ModelSource) -> list[list[int]]:
    """A few sentences, and one document of any tokens at all; the same for the same vocabulary.

    A model without a tokenizer is probed with the latter alone.
    """
    vocab = int(source.config["vocab_size"])
    documents = [torch.randint(vocab, (_RANDOM_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()]
    try:
        tokenizer = source.tokenizer()
    except ArtifactError:
        return documents
    texts = [list(tokenizer(text)["input_ids"]) for text in neutral_texts()]
    return [*documents, *(ids for ids in texts if ids and max(ids) < vocab)]


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
        return Difference(float("inf"), float("inf"), float("inf"))
    share = distance / effect if effect > 0 else float("inf") if distance > 0 else 0.0
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
