"""Tensors that blocks read in addition to the residual stream, and their gradients.

Some families have layers that read more than the output of the layer below them (Gemma 4). Two kinds of tensors cross
layers: keys and values that several layers use (`nn.decoder.shared_attention`), and per-layer embeddings
(`nn.decoder.ple_inputs`). The gradients of shared keys and values are summed over all layers that use them. The layer
that computed them comes last in the backward pass and reads the sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class KeysAndValues(NamedTuple):
    """k and v of shape (T, key/value heads, head_dim) each, or their gradients."""

    k: Tensor
    v: Tensor


class CrossLayer:
    """Cross-layer tensors of one pass over one batch, or of the new tokens of a generation step.

    Args:
        kv_sources: numbers of the layers whose keys and values other layers use.
        ple: per-layer embeddings, (T, layers, width), or None.

    Attributes:
        d_ple: ∂L/∂ple, of the shape of `ple`, filled layer by layer; None if it is not needed.
    """

    def __init__(self, kv_sources: Iterable[int] = (), ple: Tensor | None = None) -> None:
        self.kv_sources = frozenset(kv_sources)
        self.ple = ple
        self.d_ple: Tensor | None = None
        self._shared: dict[int, KeysAndValues] = {}
        self._gradients: dict[int, KeysAndValues] = {}

    def publish(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the keys and values of `layer` if other layers use them."""
        if layer in self.kv_sources:
            self._shared[layer] = KeysAndValues(k, v)

    def shared_kv(self, layer: int) -> KeysAndValues:
        """Return the keys and values that `layer` published in this pass."""
        return self._shared[layer]

    def accumulate_grad(self, layer: int, d_k: Tensor, d_v: Tensor) -> None:
        """Add the gradient from one layer that uses the keys and values of `layer`. Sums are float32 or wider."""
        wide = torch.promote_types(d_k.dtype, torch.float32)
        total = self._gradients.get(layer)
        if total is None:
            self._gradients[layer] = KeysAndValues(d_k.to(wide, copy=True), d_v.to(wide, copy=True))
            return
        total.k.add_(d_k)
        total.v.add_(d_v)

    def pop_grad(self, layer: int) -> KeysAndValues | None:
        """Return and drop the accumulated gradient of `layer`, or None if no layer uses its keys and values."""
        return self._gradients.pop(layer, None)

    def grad(self, layer: int) -> KeysAndValues | None:
        """Return the gradient of `layer` accumulated so far, or None."""
        return self._gradients.get(layer)
