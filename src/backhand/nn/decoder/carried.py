"""What a pass carries from layer to layer beside the stream, in families where layers read more than their input.

Keys and values that several layers use (`shared_attention`), and the per-layer inputs (`per_layer_input`). Both come
with their gradients on the way back: those of shared keys and values add up over all layers that use them, and the
layer that made the keys and values, which comes last in the backward pass, takes the sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class KeysAndValues(NamedTuple):
    """k and v, (T, key/value heads, head_dim) each, or their gradients."""

    k: Tensor
    v: Tensor


class Carried:
    """Of one pass over one batch, or of new tokens when text is generated.

    Args:
        lenders: numbers of the layers whose keys and values others use.
        inputs: (T, layers, width), what each layer is given of its own, or None.

    Attributes:
        d_inputs: receives ∂L/∂inputs layer by layer, of the shape of `inputs`; None where it is not needed.
    """

    def __init__(self, lenders: Iterable[int] = (), inputs: Tensor | None = None) -> None:
        self.lenders = frozenset(lenders)
        self.inputs = inputs
        self.d_inputs: Tensor | None = None
        self._lent: dict[int, KeysAndValues] = {}
        self._gradients: dict[int, KeysAndValues] = {}

    def lend(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep a layer's keys and values for those that use them, if any does."""
        if layer in self.lenders:
            self._lent[layer] = KeysAndValues(k, v)

    def lent(self, layer: int) -> KeysAndValues:
        """What `layer` has lent in this pass."""
        return self._lent[layer]

    def give_back(self, layer: int, d_k: Tensor, d_v: Tensor) -> None:
        """Add one user's gradient to that of what `layer` has lent; the sum is kept in float32 or wider."""
        wide = torch.promote_types(d_k.dtype, torch.float32)
        held = self._gradients.get(layer)
        if held is None:
            self._gradients[layer] = KeysAndValues(d_k.to(wide, copy=True), d_v.to(wide, copy=True))
            return
        held.k.add_(d_k)
        held.v.add_(d_v)

    def returned(self, layer: int) -> KeysAndValues | None:
        """The sum of what the users of `layer` gave back, which is let go here; None without users."""
        return self._gradients.pop(layer, None)

    def held(self, layer: int) -> KeysAndValues | None:
        """The sum so far, which stays."""
        return self._gradients.get(layer)
