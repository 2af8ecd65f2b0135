"""The decoder's weights as an adapter has them: whole tensors it trains, and trained rows of the embedding, in place.

A tensor that stands alone (a norm, the head, the embedding) is the adapter's own in the compute dtype, without a copy;
one that lies in a stack with others (q, k, v; gate, up) is put into a new stack. Rows of the embedding are written into
one copy of the table, which is the output head too where that is tied. A tied head stays the base's own where the
embedding is trained in full, and the other way round, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from backhand.nn.block_adapter import EMBEDDING
from backhand.nn.decoder_weights import BlockWeights, DecoderWeights
from backhand.nn.family import DecoderConfig
from backhand.nn.lora_parameters import TOKENS, LoRAParameters

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_ALONE = {
    "self_attn.o_proj.weight": "output",
    "self_attn.o_proj.bias": "output_bias",
    "mlp.down_proj.weight": "down",
    "mlp.down_proj.bias": "down_bias",
    "input_layernorm.weight": "attention_norm",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "pre_feedforward_layernorm.weight": "mlp_norm",
    "post_feedforward_layernorm.weight": "after_mlp_norm",
}


class TrainedWeights:
    """Keeps the weights of one decoder up to date with the tensors that one adapter trains as they are.

    Args:
        base: the frozen weights.
        config: the family.
        lora: the adapter.
    """

    def __init__(self, base: DecoderWeights, config: DecoderConfig, lora: LoRAParameters) -> None:
        self._base = base
        self._config = config
        self._lora = lora
        self._table: Tensor | None = None

    def current(self) -> DecoderWeights:
        """The weights with the adapter's values as of the last `refresh_compute`."""
        lora, base = self._lora, self._base
        if not lora.trained:
            return base
        blocks = [self.block(layer, block) for layer, block in enumerate(base.blocks)]

        def own(name: str, weight: Tensor) -> Tensor:
            return lora.compute(name) if name in lora.trained else weight

        embedding, head = own(f"{EMBEDDING}.weight", base.embedding), own("lm_head.weight", base.head)
        if f"{EMBEDDING}.{TOKENS}" in lora.trained:
            embedding = self._with_rows()
            head = embedding if self._config.tied_head else head
        return DecoderWeights(embedding, blocks, own("model.norm.weight", base.final_norm), head)

    def block(self, layer: int, block: BlockWeights) -> BlockWeights:
        """One block's weights with the adapter's own in their place; `block` itself where it trains none of them."""
        prefix = f"model.layers.{layer}."
        own = [name for name in self._lora.trained if name.startswith(prefix)]
        if not own:
            return block
        return self._block(block, {name.removeprefix(prefix): self._lora.compute(name) for name in own})

    def _block(self, block: BlockWeights, trained: Mapping[str, Tensor]) -> BlockWeights:
        config = self._config
        q, k = config.num_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        ffn = config.intermediate_size
        before_mlp = "after_attention_norm" if config.sandwich_norms else "mlp_norm"
        alone = {**_ALONE, "post_attention_layernorm.weight": before_mlp}
        changes = {alone[part]: tensor for part, tensor in trained.items() if part in alone}
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            for field, parts, sizes in ((f"qkv{suffix}", _QKV, [q, k, k]), (f"gate_up{suffix}", _GATE_UP, [ffn, ffn])):
                stack = getattr(block, field)
                if any(f"{part}.{kind}" in trained for part in parts):
                    own = zip(parts, stack.split(sizes), strict=True)
                    changes[field] = torch.cat([trained.get(f"{part}.{kind}", view) for part, view in own])
        return replace(block, **changes)

    def _with_rows(self) -> Tensor:
        """The embedding table with the trained rows in it; one copy, kept."""
        name = f"{EMBEDDING}.{TOKENS}"
        rows = self._lora.compute(name)
        if self._table is None:
            self._table = self._base.embedding.clone()
        self._table[self._lora.token_ids(name)] = rows
        return self._table
