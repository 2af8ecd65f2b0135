"""A merged model as a GGUF file, written tensor by tensor: nothing larger than one is in memory.

From a GGUF base the metadata are copied, and with `auto` every tensor that the adapter leaves alone keeps its bytes;
merged ones keep their type if it is a floating one, and are float32 if it is quantized. From a Hugging Face directory
they are made anew (`gguf_metadata`). Vectors are float32 in any case, and a matrix whose rows are no whole number of
the type's blocks is float16, as llama.cpp's converter has it.
"""

from __future__ import annotations

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
from backhand.export.gguf_metadata import add_model_metadata, rope_factors
from backhand.export.llama_cpp_limits import unknown_window, window_note
from backhand.export.merged_weights import MergedWeights
from backhand.nn.family_parsing import decoder_config
from backhand.nn.loading.gguf_dequantize import dequantized, native_dtype
from backhand.nn.loading.gguf_file import GGUFFile, GGUFTensor
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.gguf_tensors import (
    ROPE_FACTORS,
    Layout,
    gguf_architecture,
    gguf_name,
    head_dimension,
    is_skipped,
    layout,
)
from backhand.nn.loading.tied_head import HEAD_WEIGHT

TYPES = {
    "float32": StorageType.F32,
    "float16": StorageType.F16,
    "bfloat16": StorageType.BF16,
    "q8_0": StorageType.Q8_0,
    "q5_1": StorageType.Q5_1,
    "q5_0": StorageType.Q5_0,
    "q4_1": StorageType.Q4_1,
    "q4_0": StorageType.Q4_0,
}
_FILE_TYPES = {
    StorageType.F32: gguf.LlamaFileType.ALL_F32,
    StorageType.F16: gguf.LlamaFileType.MOSTLY_F16,
    StorageType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    StorageType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    StorageType.Q5_1: gguf.LlamaFileType.MOSTLY_Q5_1,
    StorageType.Q5_0: gguf.LlamaFileType.MOSTLY_Q5_0,
    StorageType.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    StorageType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}
_NOT_COPIED = ("general.architecture", "general.file_type", "split.no", "split.count", "split.tensors.count")
_DESCRIPTION = "general.description"
_BLOCK_ROWS = 2048
_SHOWN = 5

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class _Planned:
    """One tensor of the file: its name there, how it is laid out and stored, and its bytes if they are copied."""

    name: str
    ours: str
    layout: Layout
    storage: StorageType
    copied: _Bytes | None = None


def write_gguf_model(path: Path, weights: MergedWeights, *, dtype: str, description: str) -> list[str]:
    """Write the file; a plain one, not in one step.

    Args:
        path: of the file.
        weights: the merged model's tensors.
        dtype: a key of `TYPES`, or `auto`.
        description: general.description: what was merged into what.

    Returns:
        what people should know: matrices that the type cannot hold and that are float16, tokens that were left out,
        and a sliding window that llama.cpp does not have.

    Raises:
        ArtifactError: a base of which no GGUF file can be made here, or that llama.cpp cannot compute.
        CheckError: a merged value that is not finite in the type.
        OSError: from the disk.
    """
    source = weights.source
    architecture = gguf_architecture(source.config)
    if architecture is None:
        raise ArtifactError(f"there are no GGUF files of {source.config.get('model_type')} models that we know")
    planned = _plan(weights, architecture, TYPES.get(dtype))
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        left_out = _write(writer, weights, planned, description)
    wanted = TYPES.get(dtype, StorageType.F16)
    others = sum(one.storage == StorageType.F16 != wanted for one in planned)
    notes = []
    if others:
        notes.append(f"note: {others} matrices are float16: their rows do not divide into blocks of {dtype}")
    if left_out:
        names = ", ".join(left_out[:_SHOWN]) + (" …" if len(left_out) > _SHOWN else "")
        notes.append(f"note: {len(left_out)} tokens without a row in the model are not in the file: {names}")
    if window := unknown_window(decoder_config(source.config), architecture):
        notes.append(window_note(window, is_context=not isinstance(source, GGUFModel)))
    return notes


def _write(writer: gguf.GGUFWriter, weights: MergedWeights, planned: list[_Planned], description: str) -> list[str]:
    """Write everything, and return the tokens that were left out."""
    source = weights.source
    left_out: list[str] = []
    if isinstance(source, GGUFModel):
        _copy_metadata(writer, source.metadata)
    else:
        left_out = add_model_metadata(writer, source)
    if _DESCRIPTION not in writer.kv_data[0]:
        writer.add_description(description)
    elements: dict[StorageType, int] = {}
    for one in planned:
        size = int(np.prod(weights.shape(one.ours)))
        elements[one.storage] = elements.get(one.storage, 0) + size
    most = max(elements, key=lambda kind: elements[kind])
    if most in _FILE_TYPES:
        writer.add_file_type(_FILE_TYPES[most])
    extra = _untouched(source)
    for name, tensor in extra.items():
        writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes)
    for one in planned:
        _add_info(writer, one, weights.shape(one.ours))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in extra.values():
        writer.write_tensor_data(tensor)
    for one in planned:
        writer.write_tensor_data(_stored(weights, one))
    return left_out


def _plan(weights: MergedWeights, architecture: str, storage: StorageType | None) -> list[_Planned]:
    source = weights.source
    head_dim = head_dimension(source.config)
    planned = []
    for ours in weights.names():
        name = gguf_name(architecture, ours)
        if name is None:
            raise ArtifactError(f"files of architecture {architecture} have no tensor for {ours}")
        how = layout(architecture, ours, head_dim)
        shape = weights.shape(ours)
        is_new = ours == HEAD_WEIGHT and weights.unties_head
        in_base = source.stored_tensor(ours) if isinstance(source, GGUFModel) and not is_new else None
        if storage is None and in_base is not None and not weights.is_merged(ours):
            tensor, data = in_base
            planned.append(_Planned(name, ours, how, StorageType(tensor.type_id), data))
            continue
        kind = storage if storage is not None else _own_type(weights, ours, in_base)
        planned.append(_Planned(name, ours, how, _fitting(kind, shape)))
    return planned


def _own_type(weights: MergedWeights, ours: str, in_base: tuple[GGUFTensor, _Bytes] | None) -> StorageType:
    """The base's own floating type, float32 where it is quantized or float64."""
    if in_base is not None:
        tensor, _ = in_base
        return StorageType(tensor.type_id) if native_dtype(tensor.type_id) is not None else StorageType.F32
    dtype = weights.stored_dtype(ours)
    return {torch.float16: StorageType.F16, torch.bfloat16: StorageType.BF16}.get(dtype, StorageType.F32)


def _fitting(kind: StorageType, shape: tuple[int, ...]) -> StorageType:
    if len(shape) == 1:
        return StorageType.F32
    block_size, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block_size == 0 else StorageType.F16


def _add_info(writer: gguf.GGUFWriter, one: _Planned, shape: tuple[int, ...]) -> None:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[one.storage]
    byte_count = int(np.prod(shape)) // block_size * block_bytes
    byte_shape = (*shape[:-1], shape[-1] // block_size * block_bytes)
    writer.add_tensor_info(one.name, byte_shape, np.dtype(np.uint8), byte_count, raw_dtype=one.storage)


def _stored(weights: MergedWeights, one: _Planned) -> _Bytes:
    """The tensor's bytes in the file."""
    found: list[_Bytes] = []

    def rounded(tensor: Tensor) -> Tensor:
        """Also keeps the bytes, so that a tensor is quantized once."""
        data = one.copied if one.copied is not None else _quantized(one.layout.stored(tensor), one.storage)
        found[:] = [data]
        values = dequantized(data.reshape(-1).view(np.uint8), one.storage.value).view(tensor.shape)
        return one.layout.restored(values)

    weights.make(one.ours, rounded)
    (data,) = found
    if one.copied is None and one.storage in (StorageType.F32, StorageType.F16, StorageType.BF16):
        values = dequantized(data.reshape(-1).view(np.uint8), one.storage.value)
        if not bool(torch.isfinite(values).all()):
            raise CheckError(
                f"a merged value is not finite in {one.storage.name}", where=one.ours, next_step="give --dtype float32"
            )
    return data


def _quantized(values: Tensor, storage: StorageType) -> _Bytes:
    rows = values.float().contiguous().numpy()
    if rows.ndim == 1:
        rows = rows[None]
    starts = range(0, len(rows), _BLOCK_ROWS)
    with np.errstate(over="ignore"):  # what does not fit is infinite, and found by `_stored`
        pieces = [gguf.quants.quantize(rows[start : start + _BLOCK_ROWS], storage) for start in starts]
    return np.concatenate([piece.view(np.uint8).reshape(-1) for piece in pieces])


def _copy_metadata(writer: gguf.GGUFWriter, file: GGUFFile) -> None:
    for key in file:
        if key not in _NOT_COPIED:
            kind, items = file.type_of(key)
            writer.add_key_value(
                key,
                file.value(key),
                gguf.GGUFValueType(kind),
                None if items is None else gguf.GGUFValueType(items),
            )


def _untouched(source: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors of the file that are no weights: tables of rotary frequencies."""
    if not isinstance(source, GGUFModel):
        factors = rope_factors(source.config)
        return {} if factors is None else {ROPE_FACTORS: factors}
    return {
        name: dequantized(source.bytes_of(name), tensor.type_id).float().view(tensor.shape).numpy()
        for name, tensor in source.metadata.tensors.items()
        if is_skipped(name)
    }
