"""Write a merged model as a GGUF file, tensor by tensor: at most one tensor is in memory.

From a GGUF base the metadata are copied. With `auto`, every tensor that the adapter does not change keeps its bytes;
merged tensors keep a floating type, and become float32 if their type is quantized. For a Hugging Face directory the
metadata are made by `add_model_metadata`. Vectors are always float32. A matrix whose row length is not a multiple of
the type's block size is float16, as in llama.cpp's converter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as StorageType
from torch import Tensor

from backhand.errors import ArtifactError, CheckError
from backhand.interop.gguf_adapter_writer import llama_cpp_notes
from backhand.interop.gguf_metadata_writer import add_model_metadata, rope_factors
from backhand.interop.merged_weights import MergedWeights, wider_dtype
from backhand.nn.families.family import GPT_OSS_ROUTER, ROUTER
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.expert_tensors import parse_expert_name
from backhand.nn.loading.gguf_families import RECURRENT_LAYERS, prediction_block_count
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.nn.loading.gguf_layouts import Layout, StoredSizes, layout, stored_sizes
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.gguf_tensors import (
    GRANITE_HYBRID,
    gguf_architecture,
    gguf_names,
    huggingface_name,
    is_skipped,
)
from backhand.nn.loading.gguf_values import dequantized
from backhand.nn.loading.tied_head import HEAD_WEIGHT
from backhand.printing import counting

TYPES = {"float32": StorageType.F32, "float16": StorageType.F16, "bfloat16": StorageType.BF16} | {
    name: StorageType[name.upper()] for name in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
}
_FLOATING = {torch.float16: StorageType.F16, torch.bfloat16: StorageType.BF16}
"""Storage types of merged tensors by the base's dtype. Others, and quantized tensors, become float32."""
_FILE_TYPES = {kind: gguf.LlamaFileType[f"MOSTLY_{kind.name}"] for kind in TYPES.values() if kind != StorageType.F32}
_FILE_TYPES[StorageType.F32] = gguf.LlamaFileType.ALL_F32

_FLOAT32_NAMES = (f".{ROUTER}.weight", f".{GPT_OSS_ROUTER}.weight")
_FLOAT32_TENSORS = ("position_embd.weight", "token_types.weight")
_NOT_COPIED = ("general.architecture", "general.file_type", "split.no", "split.count", "split.tensors.count")
_DESCRIPTION = "general.description"
_BLOCK_ROWS = 2048
_SHOWN = 5
_Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_BYTE = np.dtype(np.uint8)


@dataclass(frozen=True)
class _Planned:
    """Tensors of the file that are written together: layout, storage type, and their bytes if they are copied.

    A stack of experts' matrices is one tensor of the file and several of ours, with copied bytes for each. Granite 4's
    gate and up are two tensors of the file and one of ours.
    """

    names: tuple[str, ...]
    ours: tuple[str, ...]
    layout: Layout
    storage: StorageType
    copied: tuple[_Bytes, ...] | None = None

    def shape(self, weights: MergedWeights) -> tuple[int, ...]:
        """Return the shape of each tensor in the file."""
        rows, *columns = self.layout.stored_shape(weights.shape(self.ours[0]))
        one = (rows // len(self.names), *columns)
        return one if parse_expert_name(self.ours[0]) is None else (len(self.ours), *one)


def write_gguf_model(
    path: Path,
    weights: MergedWeights,
    *,
    dtype: str,
    description: str,
    more: Callable[[gguf.GGUFWriter], None] | None = None,
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> list[str]:
    """Write the file at `path`, not atomically.

    Args:
        dtype: a key of `TYPES`, or `auto`.
        more: adds further metadata, or None.
        tensors: further tensors by their name in the file.

    Returns:
        notes: matrices that are float16 because their rows do not fit the type, tokens that were left out, and texts
        for which llama.cpp computes something else.

    Raises:
        ArtifactError: if no GGUF file can be made from the base, or llama.cpp cannot compute it.
        CheckError: if a merged value is not finite in the type.
        OSError: if writing fails.
    """
    source = weights.source
    architecture = gguf_architecture(source.config)
    if architecture is None:
        raise ArtifactError(
            f"no GGUF format of this {source.config.get('model_type')} is known",
            where=str(source.path),
            next_step="merge into a Hugging Face directory",
        )
    planned = _plan(weights, architecture, TYPES.get(dtype))
    weights.written_names = {
        one.ours[0]: tuple(str(huggingface_name(architecture, name)) for name in one.names)
        for one in planned
        if parse_expert_name(one.ours[0]) is None and architecture != GRANITE_HYBRID
    }
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        left_out = _write(writer, weights, planned, description, more, tensors or {})
    wanted = TYPES.get(dtype, StorageType.F16)
    others = sum(one.storage == StorageType.F16 != wanted for one in planned)
    notes = []
    if others:
        notes.append(f"note: {others} matrices are float16: their rows do not divide into blocks of {dtype}")
    if left_out:
        names = ", ".join(left_out[:_SHOWN]) + (" …" if len(left_out) > _SHOWN else "")
        notes.append(f"note: {len(left_out)} tokens without a row in the model are not in the file: {names}")
    is_new = not isinstance(source, GGUFModel)
    return notes + llama_cpp_notes(decoder_config(source.config), architecture, context_ends=is_new)


def _write(
    writer: gguf.GGUFWriter,
    weights: MergedWeights,
    planned: list[_Planned],
    description: str,
    more: Callable[[gguf.GGUFWriter], None] | None,
    tensors: Mapping[str, np.ndarray[Any, Any]],
) -> list[str]:
    """Write everything, and return the tokens that were left out."""
    source = weights.source
    left_out: list[str] = []
    if isinstance(source, GGUFModel):
        copy_metadata(writer, source.metadata)
    else:
        left_out = add_model_metadata(writer, source)
    if _DESCRIPTION not in writer.kv_data[0]:
        writer.add_description(description)
    if more is not None:
        more(writer)
    elements: Counter[StorageType] = Counter()
    for one in planned:
        elements[one.storage] += math.prod(one.shape(weights)) * len(one.names)
    ((most, _),) = elements.most_common(1)
    if most in _FILE_TYPES:
        writer.add_file_type(_FILE_TYPES[most])
    extra = {**_untouched(source), **tensors}
    for name, tensor in extra.items():
        writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes)
    for one in planned:
        shape, (block_size, block_bytes) = one.shape(weights), gguf.GGML_QUANT_SIZES[one.storage]
        byte_shape = (*shape[:-1], shape[-1] // block_size * block_bytes)
        for name in one.names:
            writer.add_tensor_info(name, byte_shape, _BYTE, math.prod(byte_shape), raw_dtype=one.storage)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in extra.values():
        writer.write_tensor_data(tensor)
    with counting("writing the merged model", len(planned), "tensors") as done:
        for one in planned:
            for data in np.split(_stored(weights, one), len(one.names)):
                writer.write_tensor_data(data)
            done()
    return left_out


def _plan(weights: MergedWeights, architecture: str, storage: StorageType | None) -> list[_Planned]:
    source = weights.source
    sizes = stored_sizes(source.config)
    new = () if weights.head is None else weights.head.parameters
    planned = []
    for names, members in _by_tensor(weights, architecture, sizes).items():
        ours = members[0]
        how = layout(architecture, ours, sizes)
        is_new = ours in new or (ours == HEAD_WEIGHT and weights.unties_head)
        if storage is None and isinstance(source, GGUFModel) and not (is_new or any(map(weights.is_merged, members))):
            stored = [part for member in members for part in source.stored_tensors(member)]
            if len({tensor.type_id for tensor, _ in stored}) == 1:
                data = _by_member([part for _, part in stored], len(members))
                planned.append(_Planned(names, members, how, StorageType(stored[0][0].type_id), data))
                continue
        kind = _FLOATING.get(weights.stored_dtype(ours), StorageType.F32) if storage is None else storage
        # Routers, positions and token types are float32, as in llama.cpp's converter.
        kind = StorageType.F32 if ours.endswith(_FLOAT32_NAMES) or names[0] in _FLOAT32_TENSORS else kind
        planned.append(_Planned(names, members, how, _fitting(kind, weights.shape(ours))))
    return planned


def _by_member(parts: list[_Bytes], members: int) -> tuple[_Bytes, ...]:
    """Return the bytes of each of our tensors. A fused tensor is in two tensors of the file."""
    each = len(parts) // members
    groups = [parts[start : start + each] for start in range(0, len(parts), each)]
    return tuple(group[0] if each == 1 else np.concatenate([part.reshape(-1) for part in group]) for group in groups)


def _by_tensor(weights: MergedWeights, architecture: str, sizes: StoredSizes) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Map the file's names of each tensor to our name, or to those of the matrices of all experts in order."""
    found: dict[tuple[str, ...], list[str]] = {}
    for ours in weights.names():
        names = gguf_names(architecture, ours, shared_mlp=sizes.shared_mlp)
        if not names:
            raise ArtifactError(
                f"files of architecture {architecture} have no tensor for {ours}",
                next_step="merge into a Hugging Face directory; llama.cpp may have a converter for it",
            )
        found.setdefault(names, []).append(ours)
    return {
        names: tuple(sorted(members, key=lambda ours: (parse_expert_name(ours) or ("", 0))[1]))  # by expert number
        for names, members in found.items()
    }


def _fitting(kind: StorageType, shape: tuple[int, ...]) -> StorageType:
    if len(shape) != 2:
        return StorageType.F32
    block_size, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block_size == 0 else StorageType.F16


def _stored(weights: MergedWeights, one: _Planned) -> _Bytes:
    """Return the tensor's bytes in the file."""
    parts = [_stored_part(weights, one, place) for place in range(len(one.ours))]
    return parts[0] if len(parts) == 1 else np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])


def _stored_part(weights: MergedWeights, one: _Planned, place: int) -> _Bytes:
    """Return the bytes of one of our tensors."""
    if one.copied is not None:
        weights.keep(one.ours[place])
        return one.copied[place]
    found: list[_Bytes] = []

    def rounded(tensor: Tensor) -> Tensor:
        """Round, and save the bytes, so that a tensor is quantized once."""
        found.append(_quantized(one.layout.to_gguf(tensor), one.storage))
        values = dequantized(found[0], one.storage.value)
        floating = one.storage in (StorageType.F32, StorageType.F16, StorageType.BF16)
        if floating and not bool(torch.isfinite(values).all()):
            raise CheckError(
                f"a merged value is not finite in {one.storage.name}",
                where=one.ours[place],
                next_step=wider_dtype(one.storage == StorageType.F32),
            )
        return one.layout.to_huggingface(values.view(one.layout.stored_shape(tuple(tensor.shape))))

    weights.make(one.ours[place], rounded)
    return found[0]


def _quantized(values: Tensor, storage: StorageType) -> _Bytes:
    rows = values.float().contiguous().numpy()
    if rows.ndim == 1:
        rows = rows[None]
    starts = range(0, len(rows), _BLOCK_ROWS)
    with np.errstate(over="ignore"):  # values out of range become infinite, which `_stored` detects
        pieces = [gguf.quants.quantize(rows[start : start + _BLOCK_ROWS], storage) for start in starts]
    return np.concatenate([piece.view(np.uint8).reshape(-1) for piece in pieces])


def copy_metadata(writer: gguf.GGUFWriter, file: GGUFFile) -> None:
    """Copy a file's metadata, except for those that the writer adds: architecture, types and parts."""
    changed = _without_prediction(file, writer.arch)
    for key in file:
        if key not in _NOT_COPIED and changed.get(key, ...) is not None:
            kind, items = file.type_of(key)
            writer.add_key_value(
                key,
                changed.get(key, file.value(key)),
                gguf.GGUFValueType(kind),
                None if items is None else gguf.GGUFValueType(items),
            )


def _without_prediction(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """Return metadata changes for a model without its multi-token prediction blocks; None removes a key."""
    count = prediction_block_count(file, architecture)
    if not count:
        return {}
    key, recurrent = f"{architecture}.block_count", f"{architecture}.{RECURRENT_LAYERS}"
    layers, listed = file.value(key) - count, file.value(recurrent)
    changed = {key: layers, f"{architecture}.nextn_predict_layers": None}
    return changed | ({recurrent: listed[:layers]} if isinstance(listed, list) else {})


def _untouched(source: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return tensors of the file that are not weights: tables of rotary frequencies."""
    if not isinstance(source, GGUFModel):
        return rope_factors(source.config)
    return {
        name: dequantized(source.bytes_of(name), tensor.type_id).float().view(tensor.shape).numpy()
        for name, tensor in source.metadata.tensors.items()
        if is_skipped(source.architecture, name)
    }
