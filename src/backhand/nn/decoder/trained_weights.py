"""The decoder's weights with the tensors that an adapter trains without factors.

A tensor that is not stacked with others (a norm, the head, the embedding) is the adapter's own in the compute dtype,
without a copy. A tensor in a stack (q, k, v; gate, up) is copied into a new stack. Trained rows of the embedding are
written into one copy of the table, which is also the output head if the head is tied. As in PEFT, a tied head keeps
the base's weight if the embedding is trained in full, and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backhand.nn.decoder.adapted_group import HEAD
from backhand.nn.decoder.weights import BlockWeights, DecoderWeights, block_parts, part_views
from backhand.nn.families.family import DecoderConfig
from backhand.nn.lora_parameters import TOKENS, LoRAParameters
from backhand.ops.weight_tiles import FrozenMatrix, frozen_dense


@dataclass(eq=False)
class TrainedWeights:
    """The weights of one decoder with the current values of the tensors that an adapter trains without factors."""

    _base: DecoderWeights
    _config: DecoderConfig
    _lora: LoRAParameters
    _table: Tensor | None = None

    def current(self) -> DecoderWeights:
        """Return the weights with the adapter's values as of the last `refresh_compute`."""
        lora, base = self._lora, self._base
        if not lora.full_tensors:
            return base
        blocks = [self.block(layer, block) for layer, block in enumerate(base.blocks)]

        def current(name: str, weight: FrozenMatrix) -> FrozenMatrix:
            return lora.compute(name) if name in lora.full_tensors else weight

        table = self._config.embedding
        embedding, head = current(f"{table}.weight", base.embedding), current(f"{HEAD}.weight", base.head)
        norm = f"{self._config.final_norm}.weight"
        final_norm = lora.compute(norm) if norm in lora.full_tensors else base.final_norm
        if f"{table}.{TOKENS}" in lora.full_tensors:
            embedding = self._with_rows()
            head = embedding if self._config.tied_head else head
        return replace(base, embedding=embedding, blocks=blocks, final_norm=final_norm, head=head)

    def block(self, layer: int, block: BlockWeights) -> BlockWeights:
        """Return one block's weights with the adapter's tensors in it, or `block` itself if it trains none of them."""
        lora, prefix = self._lora, f"{self._config.block_path(layer)}."
        names = [name for name in lora.full_tensors if name.startswith(prefix)]
        trained = {name.removeprefix(prefix): lora.compute(name) for name in names}
        changes: dict[str, Tensor] = {}
        for part in block_parts(self._config, self._config.layers[layer]) if trained else ():
            if len(part.names) == 1 and part.names[0] in trained:
                changes[part.field] = trained[part.names[0]]
            elif any(name in trained for name in part.names):
                views = part_views(block, part)
                changes[part.field] = torch.cat(
                    [trained[name] if name in trained else frozen_dense(view) for name, view in views]
                )
        return replace(block, **changes) if trained else block

    def _with_rows(self) -> Tensor:
        """Return the embedding table with the trained rows written into one cached copy."""
        name = f"{self._config.embedding}.{TOKENS}"
        rows = self._lora.compute(name)
        if self._table is None:
            table = frozen_dense(self._base.embedding)
            self._table = table.clone() if table is self._base.embedding else table
        self._table[self._lora.token_ids(name)] = rows
        return self._table
