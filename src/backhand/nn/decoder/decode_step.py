"""New tokens of all rows through all blocks in one compiled call (native/decode_step.cpp), for Llama-like families.

The products of a single token are small. Waking threads and calling ops between them costs more than the products. Here
threads are woken once per token, and one call computes `nn.decoder.block` with the same kernels as the ops: norms,
projections with their adapters, rotation, attention over the KV cache, gated units. Weights are read once for all rows.
A decoder with anything else (another mixer, experts, sinks, gates, DoRA) is computed block by block.

With AMX in bfloat16, a row has the same bits as in a training pass, except for a `QUICK_ROW`. Its products are summed
in the order of `kernels.dense_product`, and its attention is a task of `ops.attention`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.kernels.dequantize import is_compiled
from backhand.kernels.few_rows import QUICK_ROW
from backhand.kernels.library import INT, INT64, POINTER, KernelSignature, find_kernel
from backhand.kernels.quantized_matrix import StoredRows
from backhand.nn.decoder.adapted_group import BlockAdapter, GroupAdapter
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.kv_cache import KVCache
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.families.family import ATTENTION, DecoderConfig
from backhand.ops.frozen_matrix import is_worth_fusing
from backhand.ops.rotary import RotaryTable
from backhand.ops.weight_tiles import FrozenMatrix

_STEP = KernelSignature("backhand_decode_step", INT, POINTER, POINTER, INT64, POINTER, INT64, result=INT)
# Defined in native/decode_step.cpp.
_MOST_ADAPTERS = 4
# Defined in native/glu.h.
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


Tables = Sequence[tuple[RotaryTable | None, RotaryTable | None]]
"""For each layer, the angles of the tokens and of scaled queries; None without rotary embedding or scaling."""


class _StoredRows(ctypes.Structure):
    _fields_ = (*(("type", INT64), ("weight", POINTER), ("row_bytes", INT64), ("row_ids", POINTER)), ("outputs", INT64))


class _LowRank(ctypes.Structure):
    _fields_ = (
        *(("lora_A", POINTER), ("lora_B", POINTER), ("rank", INT64), ("first", INT64), ("outputs", INT64)),
        ("scaling", ctypes.c_double),
    )


class _Projection(ctypes.Structure):
    _fields_ = (
        *(("parts", POINTER), ("part_count", INT64), ("adapters", POINTER), ("adapter_count", INT64)),
        *(("bias", POINTER), ("inputs", INT64), ("outputs", INT64), ("apart", INT64)),
    )


_NORMS = ("attention_norm", "after_attention_norm", "mlp_norm", "after_mlp_norm", "q_norm", "k_norm")
_TABLES = ("cosines", "sines", "query_cosines", "query_sines")
_GROUPS = ("input", "output", "gate_up", "down")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Projection) for name in _GROUPS),
        *((name, POINTER) for name in (*_NORMS, *_TABLES, "keys", "values")),
        *(("pairs", INT64), ("window", INT64)),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", POINTER),
        *((name, INT64) for name in ("layer_count", "hidden", "heads", "kv_heads", "head_dim", "width")),
        *((name, INT64) for name in ("norm_over_heads", "activation", "most_ranks", "places")),
        *(("place_of", POINTER), ("capacity", INT64), ("quick_row", INT64)),
        *(
            (name, ctypes.c_double)
            for name in ("eps", "offset", "attention_scaling", "attention_cap", "residual_multiplier")
        ),
    )


class DecodeStep:
    """A decoder's blocks as arguments of the compiled call: addresses of its weights, of an adapter and of a cache.

    Args:
        decoder: a decoder for which `decode_step` does not return None.
        adapters: adapters of its blocks in the compute dtype.
        cache: the cache, whose rows in use receive one token each.

    Attributes:
        weights: the decoder's active weights at construction. With other weights, another object is needed.
    """

    def __init__(self, decoder: Decoder, adapters: Sequence[BlockAdapter], cache: KVCache) -> None:
        config = decoder.config
        self.weights = decoder.active
        self._decoder, self._cache = decoder, cache
        # Keeps alive the objects whose addresses are used, in addition to weights and cache.
        self._referenced: list[Any] = [adapters]
        self._tables: dict[int, list[Tensor]] = {}
        self._rows = 0
        self._layers = (_Layer * len(config.layers))()
        for place, block, adapter in zip(self._layers, self.weights.blocks, adapters, strict=True):
            for name in _GROUPS:
                setattr(place, name, self._projection(block, name, getattr(adapter, name)))
            for name in _NORMS:
                setattr(place, name, _address(getattr(block, name)))
        for place, layer in zip(self._layers, config.layers, strict=True):
            place.window = layer.window or 0
        groups = [getattr(adapter, name).lora for adapter in adapters for name in _GROUPS]
        self._model = _Model(
            layers=ctypes.addressof(self._layers),
            layer_count=len(config.layers),
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            width=config.intermediate_size,
            norm_over_heads=config.qk_norm == "width",
            activation=_ACTIVATIONS[config.activation],
            places=0,
            most_ranks=max(sum(len(factors.lora_A) for factors in group.factors) for group in groups),
            eps=config.norm_eps,
            offset=config.norm_offset,
            attention_scaling=config.attention_scaling,
            attention_cap=config.attention_cap or 0.0,
            residual_multiplier=config.residual_multiplier,
        )

    def __call__(self, x: Tensor, positions: Tensor, tables: Tables) -> bool:
        """Compute the tokens through all blocks and cache their keys and values.

        Return False without a compiled kernel.

        Args:
            x: (rows in use, hidden), the input of the first block. It receives the output of the last one.
            positions: (rows in use,) int64, number of tokens before each in its row. The cache must have room for it.
            tables: angles of each layer.

        Raises:
            MemoryError: no memory is left for the call.
        """
        kernel = find_kernel(_STEP, x)
        if kernel is None:
            return False
        self._point(len(x), tables)
        self._model.quick_row = QUICK_ROW.get()
        where = ctypes.addressof(self._model), x.data_ptr(), len(x), positions.data_ptr()
        status: int = kernel(*where, torch.get_num_threads())
        if status:
            raise MemoryError("no memory left for a token" if status == 2 else f"no room at {positions.tolist()}")
        return True

    def _point(self, rows: int, tables: Tables) -> None:
        """Update the addresses of keys, values and angles."""
        cache = self._cache
        self._model.place_of, self._model.capacity = cache.places.data_ptr(), cache.places.shape[1]
        if self._model.places != cache.keys[0].shape[1]:
            self._model.places = cache.keys[0].shape[1]
            for place, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
                place.keys, place.values = keys.data_ptr(), values.data_ptr()
        fresh = rows != self._rows
        if fresh:
            self._rows, self._tables = rows, {}
        copied: set[int] = set()
        for place, layer, (table, queries) in zip(self._layers, self._decoder.config.layers, tables, strict=True):
            if table is None or layer.rotary is None:
                continue
            angles = (table.cos, table.sin, *(queries or table)[:2])
            held = self._tables.setdefault(layer.rotary, [torch.empty_like(angle) for angle in angles])
            if layer.rotary not in copied:
                copied.add(layer.rotary)
                for place_of_angle, angle in zip(held, angles, strict=True):
                    place_of_angle.copy_(angle)
            if fresh:
                place.pairs = table.cos.shape[-1]
                for name, angle in zip(_TABLES, held, strict=True):
                    setattr(place, name, angle.data_ptr())

    def _projection(self, block: BlockWeights, name: str, adapter: GroupAdapter) -> _Projection:
        weight: FrozenMatrix = getattr(block, name)
        parts = not_none(_parts(weight))
        lows = [
            _LowRank(
                *(factors.lora_A.data_ptr(), factors.lora_B.data_ptr(), len(factors.lora_A), factors.column),
                *(len(factors.lora_B), factors.scaling),
            )
            for factors in adapter.lora.factors
        ]
        held_parts, held_lows = (_StoredRows * len(parts))(*parts), (_LowRank * max(len(lows), 1))(*lows)
        self._referenced += [held_parts, held_lows]
        return _Projection(
            *(ctypes.addressof(held_parts), len(parts), ctypes.addressof(held_lows), len(lows)),
            *(_address(getattr(block, f"{name}_bias")), weight.shape[1], weight.shape[0]),
            not is_worth_fusing(weight.shape[0], sum(len(factors.lora_A) for factors in adapter.lora.factors)),
        )


def decode_step(decoder: Decoder, adapters: Sequence[BlockAdapter], cache: KVCache) -> DecodeStep | None:
    """Return the compiled call for this decoder, or None if it has parts that the call does not compute."""
    if not _takes_family(decoder.config) or decoder.device.type != "cpu":
        return None
    for block, adapter in zip(decoder.active.blocks, adapters, strict=True):
        for name in _GROUPS:
            group, weight = getattr(adapter, name), getattr(block, name)
            if len(group.lora.factors) > _MOST_ADAPTERS:
                return None
            if group.extras is not None or weight.dtype != decoder.dtype or _parts(weight) is None:
                return None
            if not all(_lies_dense(factor) for one in group.lora.factors for factor in (one.lora_A, one.lora_B)):
                return None
        if not all(_lies_dense(getattr(block, name)) for name in _NORMS if getattr(block, name) is not None):
            return None
    return DecodeStep(decoder, adapters, cache)


def _takes_family(config: DecoderConfig) -> bool:
    return (
        config.activation in _ACTIVATIONS
        and not config.attention_gate
        and not config.value_norm
        and not config.layer_scalar
        and config.per_layer is None
        and not any(rotary.interleaved for rotary in config.rotary)
        and not config.sinks
        and all(layer.mixer == ATTENTION and not layer.experts and layer.sizes is None for layer in config.layers)
    )


def _parts(weight: FrozenMatrix) -> list[_StoredRows] | None:
    """Return the rows of a matrix in the call's form, or None if it cannot read them."""
    if isinstance(weight, Tensor):
        if weight.stride(1) != 1:
            return None
        return [_StoredRows(-1, weight.data_ptr(), weight.stride(0) * weight.element_size(), None, weight.shape[0])]
    return [_stored(part) for part in weight.parts] if all(map(_is_readable, weight.parts)) else None


def _is_readable(part: StoredRows) -> bool:
    order = part.order
    inside = order is None or not len(order) or 0 <= int(order.min()) <= int(order.max()) < len(part.blocks)
    plain = part.column_order is None and part.blocks.flags.c_contiguous
    return plain and inside and is_compiled(part.type_id) and (order is None or _lies_dense(order))


def _stored(part: StoredRows) -> _StoredRows:
    blocks = part.blocks
    return _StoredRows(part.type_id, blocks.ctypes.data, blocks.shape[1], _address(part.order), part.row_count)


def _lies_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.is_cpu


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
