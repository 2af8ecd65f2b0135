"""Predict the time of attention in documents that are longer than those of a measured pass.

All other parts of a pass take time in proportion to its tokens. Attention takes time in proportion to its pairs of a
query and a visible key, which grow with the square of a document's length. With s seconds per token without attention
and κ s seconds per pair, a pass over T tokens and N pairs takes

    s (T + κ N)

and T + κ N is called its work here, in tokens.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from backhand.engines.decoder_engine import DecoderEngine
from backhand.nn.decoder.adapted_group import backward_end
from backhand.nn.families.family import GATED_DELTA, MLP, SHORT_CONV, SSM
from backhand.nn.lora_parameters import AdapterLayout
from backhand.ops.attention import attention_backward, attention_forward
from backhand.ops.attention_blocks import Scores
from backhand.ops.document_groups import SegmentRun

MEASURED_TOKENS = 2048
"""Length of the document whose attention is measured. Its time per pair is that of longer documents within 10 %."""
_WITHOUT_ATTENTION = (SHORT_CONV, GATED_DELTA, SSM, MLP)


@dataclass(frozen=True)
class Attention:
    """The attention of a model's trained blocks.

    Args:
        engine: the engine of the model.
        layout: the adapter, which determines the lowest trained block.
    """

    engine: DecoderEngine
    layout: AdapterLayout

    def pairs(self, lengths: Sequence[int], parents: Sequence[int]) -> float:
        """Return the number of pairs of a query and a visible key in all trained blocks.

        A pair of a block with another `head_dim` than the model's counts in proportion to it.

        Args:
            lengths: number of tokens of each segment.
            parents: the segment that each segment continues, or -1; empty if no segment continues another.
        """
        config, ends = self.engine.config, list[int]()
        lowest = min(backward_end(self.layout, config).layer, len(config.layers) - 1)
        attending = [layer for layer in config.layers[lowest:] if layer.mixer not in _WITHOUT_ATTENTION]
        kinds = Counter((layer.window, config.at(layer).head_dim) for layer in attending)
        for number, length in enumerate(lengths):
            before = ends[parents[number]] if parents and parents[number] >= 0 else 0
            ends.append(before + length)
        pairs = 0.0
        for (window, head_dim), layers in kinds.items():
            spans = zip(ends, lengths, strict=True)
            seen = sum(_seen(end, window) - _seen(end - length, window) for end, length in spans)
            pairs += layers * seen * head_dim / config.head_dim
        return pairs if config.causal else 2 * pairs

    def pair_seconds(self, dtype: torch.dtype, device: torch.device, *, recompute: str, deadline: float) -> float:
        """Measure the seconds of one pair in forward and backward pass of one block.

        Args:
            dtype, device: of the computation.
            recompute: see `Decoder`; with `block`, the forward pass is computed twice.
            deadline: value of `time.perf_counter` after which no pass begins but the first.
        """
        config, n = self.engine.config, MEASURED_TOKENS
        heads, kv_heads, scores = config.num_heads, config.num_key_value_heads, Scores(config.attention_scaling)
        q, g = torch.randn(2, n, heads, config.head_dim, device=device).to(dtype)
        k, v = torch.randn(2, n, kv_heads, config.head_dim, device=device).to(dtype)
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(1 + (recompute == "block")):
                _, saved = attention_forward(q, k, v, (SegmentRun(0, 1, n),), scores)
            attention_backward(g, saved)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
            if time.perf_counter() > deadline:
                break
        return best / _seen(n, None)


def _seen(length: int, window: int | None) -> float:
    """Return the number of keys that all queries of a document see together, Σ min(i, window) over i = 1 … length."""
    inside = length if window is None else min(length, window)
    return inside * (inside + 1) / 2 + (length - inside) * inside
