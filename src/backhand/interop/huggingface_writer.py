"""Write a merged model as a Hugging Face directory, tensor by tensor: at most one tensor is in memory.

    8 bytes length of the header, JSON header, tensors one after the other        [safetensors, docs of its format]

The header is known before any tensor is computed, so that a shard is never in memory.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from backhand.errors import CheckError
from backhand.files import write_atomically
from backhand.interop.merged_weights import MergedWeights, wider_dtype
from backhand.nn.loading.expert_tensors import hub_name, split_experts, stack_shape
from backhand.nn.loading.huggingface import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, HuggingFaceDirectory
from backhand.nn.loading.source import ModelSource
from backhand.nn.loading.wrappers import EncoderWrapper, Wrapper
from backhand.printing import counting

_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_CLASS = re.compile(r"(?:For\w+|Model)?$")
"""End of the name of a class of transformers, which says what the model is for."""

_COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
"""Files of a Hugging Face directory, other than weights, that contain no code and are copied unchanged."""


def write_huggingface(
    directory: Path, weights: MergedWeights, *, dtype: torch.dtype | None, max_shard_bytes: int, card: str
) -> None:
    """Write config.json, weights, tokenizer files and README.md into a new directory.

    Args:
        dtype: of all tensors; None for each tensor's own, float32 if it is quantized in the base.
        max_shard_bytes: largest size of a file, unless a single tensor is larger.

    Raises:
        CheckError: if a merged weight exceeds the dtype's range.
        OSError: if writing fails.
    """
    directory.mkdir()
    quantized = not isinstance(weights.source, HuggingFaceDirectory)
    dtypes = {name: dtype or (torch.float32 if quantized else weights.stored_dtype(name)) for name in weights.names()}
    shards = _shards(_tensors(weights, dtypes), max_shard_bytes)
    with counting("writing the merged model", sum(map(len, shards.values())), "tensors") as done:
        for file, tensors in shards.items():
            with (directory / file).open("xb") as out:
                _write_shard(out, tensors, weights, done)
    if len(shards) > 1:
        total_size = sum(tensor.byte_count for tensors in shards.values() for tensor in tensors)
        weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    _write_json(directory / CONFIG_FILE, _config(weights, dtypes))
    write_tokenizer(directory, weights.source)
    write_atomically(directory / "README.md", card.encode("utf-8"))


class _Stored(NamedTuple):
    """A tensor of the files: its name, shape and dtype, and our tensor or the stack of tensors that it contains."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ours: tuple[str, ...]

    @property
    def byte_count(self) -> int:
        """Size in the file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def _tensors(weights: MergedWeights, dtypes: Mapping[str, torch.dtype]) -> list[_Stored]:
    kind = weights.source.config.get("model_type")
    prefix = "" if weights.head is None else weights.head.prefix
    around: Wrapper = EncoderWrapper("", prefix) if prefix else Wrapper("", "model")
    found: dict[str, list[str]] = {}
    for name in weights.names():
        found.setdefault(around.wrapped_name(hub_name(kind, name)), []).append(name)
    tensors = []
    for name, ours in found.items():
        one = weights.shape(ours[0])
        shape = one if len(ours) == 1 else stack_shape(kind, name, len(ours), one)
        tensors.append(_Stored(name, shape, dtypes[ours[0]], tuple(ours)))
    return tensors


def _shards(tensors: Sequence[_Stored], most: int) -> dict[str, list[_Stored]]:
    """Return file names and the tensors of each file."""
    groups: list[list[_Stored]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.byte_count > most:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.byte_count
    if len(groups) == 1:
        return {WEIGHTS_FILE: groups[0]}
    count = len(groups)
    return {f"model-{number:05d}-of-{count:05d}.safetensors": names for number, names in enumerate(groups, 1)}


def _write_shard(out: BinaryIO, tensors: Sequence[_Stored], weights: MergedWeights, done: Callable[[], object]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.byte_count
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # aligns the tensors
    out.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        out.write(_bytes(_made(tensor, weights)))
        done()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _made(tensor: _Stored, weights: MergedWeights) -> Tensor:
    """Return the contiguous tensor; a stack is filled with its members."""
    kind = weights.source.config.get("model_type")
    stack: Tensor | None = None
    pieces = dict(split_experts(tensor.name, tensor.shape, kind)) if len(tensor.ours) > 1 else {}
    for name in tensor.ours:
        stored = weights.make(name, lambda values: values.to(tensor.dtype))
        if not bool(torch.isfinite(stored).all()):
            raise CheckError(
                f"a merged value is not finite in {str(tensor.dtype).removeprefix('torch.')}",
                where=name,
                next_step=wider_dtype(tensor.dtype == torch.float32),
            )
        piece = pieces.get(name)
        if piece is None:
            return stored.contiguous()
        stack = torch.empty(tensor.shape, dtype=tensor.dtype) if stack is None else stack
        piece.view(stack).copy_(stored)
    assert stack is not None
    return stack


def _config(weights: MergedWeights, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """Return the base's config.json with the dtype of most elements, and the head tied or untied as it is now."""
    config = with_older_names(weights.source.config)
    elements: Counter[torch.dtype] = Counter()
    for name, dtype in dtypes.items():
        elements[dtype] += math.prod(weights.shape(name))
    ((dtype, _),) = elements.most_common(1)
    config.pop("torch_dtype", None)  # its name before transformers 5
    config.pop("quantization_config", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if weights.unties_head:
        config["tie_word_embeddings"] = False
    if weights.head is not None:
        names = [str(name) for name in config.get("architectures") or ()]
        config["architectures"] = [_CLASS.sub("ForSequenceClassification", name, count=1) for name in names]
        config |= weights.head.fields
    return config


def write_tokenizer(directory: Path, source: ModelSource) -> None:
    """Write the tokenizer's files: copies of those of the base, if it is a Hugging Face directory."""
    if isinstance(source, HuggingFaceDirectory):
        for name in _COPIED:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, directory / name)
        return
    source.tokenizer().save_pretrained(directory)
    if source.generation_config:
        _write_json(directory / "generation_config.json", source.generation_config)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


# Rotary angles are also written under their names before transformers 5, for programs that know no others.
#
# MLX-LM 0.32, for example, reads `rope_theta` and `rope_scaling` of Llama and Qwen2 models, and uses its own default if
# they are missing. With `rope_parameters` alone, a model gives worse answers there, without an error.

_BASE_NAMES = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
}
"""By model_type: older names of the rotary bases of layers with full attention, and of those with a window."""


def with_older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with its `rope_parameters` also under their older names; existing older names are kept."""
    said = dict(config)
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or config.get("model_type") == "gemma4_text":  # it never had older names
        return said
    full = parameters.get("full_attention", parameters)  # Gemma 3, OLMo 3 and ModernBERT have two sets
    full_name, sliding_name = _BASE_NAMES.get(str(config.get("model_type")), ("rope_theta", None))
    older = {full_name: full.get("rope_theta"), "partial_rotary_factor": full.get("partial_rotary_factor")}
    if full.get("rope_type", "default") != "default":
        older["rope_scaling"] = full
    if "sliding_attention" in parameters and sliding_name is not None:  # OLMo 3 has no such name
        older[sliding_name] = parameters["sliding_attention"].get("rope_theta")
    for name, value in older.items():
        if value is not None and said.get(name) is None:
            said[name] = value
    return said
