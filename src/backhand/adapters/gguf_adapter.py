"""Reading an adapter in a GGUF file, as llama.cpp and Ollama take it, into what PEFT's files give.

    general.type = adapter, general.architecture, adapter.type = lora, adapter.lora.alpha
    <base tensor>.lora_a, <base tensor>.lora_b, such as blk.0.attn_q.weight.lora_a        [llama.cpp llama-adapter.cpp]

Shapes are PEFT's, (rank, in) and (out, rank), but token_embd.weight.lora_a is (vocab, rank). The scaling of a module is
alpha / rank of that module; an alpha of 0 or none means 1. Rows of lora_b lie in the order of the base tensor's rows,
which for q and k of architecture `llama` is not Hugging Face's (`gguf_tensors`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from backhand.adapters.adapter_directory import AdapterContents
from backhand.adapters.adapter_record import AdapterRecord, read_record
from backhand.adapters.config import LoRAConfig
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_config_writer import written_pattern
from backhand.adapters.peft_keys import PREFIX, factor_problems
from backhand.adapters.strict_json import parse_json_object
from backhand.errors import ArtifactError
from backhand.nn.loading.gguf_dequantize import dequantized
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.nn.loading.gguf_tensors import gguf_architecture, head_dimension, huggingface_name, layout

ALPHA_KEY = "adapter.lora.alpha"
RECORD_KEY = "backhand.record"
EMBEDDING = "token_embd.weight"
FACTORS = "factors"
"""Under this name the record of a GGUF adapter holds the digest of alpha and tensors."""

_EMBEDDING_SUFFIXES = {"a": ".lora_embedding_A", "b": ".lora_embedding_B"}
_LINEAR_SUFFIXES = {"a": ".lora_A.weight", "b": ".lora_B.weight"}


def is_gguf_file(path: Path | str) -> bool:
    """Whether this is a file that begins as GGUF files do."""
    try:
        with Path(path).open("rb") as file:
            return file.read(4) == b"GGUF"
    except (OSError, ValueError):  # ValueError: a NUL character in the path
        return False


def read_gguf_adapter(path: Path | str, config: Mapping[str, Any]) -> AdapterContents:
    """Read the adapter in a GGUF file.

    Args:
        path: of the file.
        config: Hugging Face configuration of the base model, which says how the rows of q and k lie.

    Returns:
        contents as of a directory in PEFT's format, with every problem found so far.

    Raises:
        ArtifactError: not a GGUF file, a damaged one, a model instead of an adapter, or one of another kind or
            architecture.
    """
    path = Path(path)
    file = GGUFFile(path)
    architecture = _check_kind(file, config)
    tensors, stored_bytes, problems = _tensors(file, architecture, head_dimension(config))
    described = _described(_alpha(file), tensors)
    record = None
    try:
        record = _record(file, problems)
    except ArtifactError as error:
        problems.append(error.one_line)
    problems += factor_problems(tensors)
    return AdapterContents(path, described, bool(tensors), tensors, record, tuple(problems), stored_bytes)


def factors_digest(alpha: float, tensors: Mapping[str, bytes]) -> str:
    """Digest of what the file computes: alpha, names and bytes of the tensors as they are stored."""
    described = hashlib.sha256(json.dumps([alpha, sorted(tensors)]).encode())
    for name in sorted(tensors):
        described.update(hashlib.sha256(tensors[name]).digest())
    return "sha256:" + described.hexdigest()


def _check_kind(file: GGUFFile, config: Mapping[str, Any]) -> str:
    where = str(file.path)
    if file.value("general.type") != "adapter":
        raise ArtifactError(
            "this GGUF file holds no adapter", where=where, next_step="give a base model as --model, not as --adapter"
        )
    kind = file.value("adapter.type")
    if kind != "lora":
        raise ArtifactError(f"an adapter of type {kind!r} cannot be used", where=where, why="only lora is known")
    if file.value("adapter.alora.invocation_tokens") is not None:
        raise ArtifactError("the adapter applies only behind certain tokens, which is not supported", where=where)
    stated, wanted = file.value("general.architecture"), gguf_architecture(config)
    if wanted is None or stated != wanted:
        raise ArtifactError(
            f"the adapter is for models of architecture {stated!r}, and the base model is a {config.get('model_type')}",
            where=where,
            next_step="give the base that it was trained on as --model",
        )
    return wanted


def _alpha(file: GGUFFile) -> float | None:
    """As stated; None for the scaling 1 that llama.cpp gives an alpha of 0 or none."""
    alpha = file.value(ALPHA_KEY, 0.0)
    if not isinstance(alpha, int | float) or not 0 <= alpha < float("inf"):
        raise ArtifactError(f"{alpha!r} is not a number of at least 0", where=f"{file.path}: {ALPHA_KEY}")
    return float(alpha) or None


def _tensors(file: GGUFFile, architecture: str, head_dim: int) -> tuple[dict[str, Tensor], dict[str, int], list[str]]:
    """Factors under PEFT's names and in Hugging Face's row order, their sizes in the file, and what is wrong."""
    found: dict[str, Tensor] = {}
    stored_bytes: dict[str, int] = {}
    problems = []
    for name, stored in file.tensors.items():
        base, _, factor = name.rpartition(".lora_")
        ours = huggingface_name(architecture, base)
        if factor not in ("a", "b") or ours is None or not ours.endswith(".weight") or len(stored.shape) != 2:
            problems.append(f"unexpected: {name}, {stored.shape}; factors are <base tensor>.lora_a and .lora_b")
            continue
        values = dequantized(file.bytes_of(stored), stored.type_id).view(stored.shape)
        if base == EMBEDDING:
            values = values.T if factor == "a" else values
        elif factor == "b":
            how = layout(architecture, ours, head_dim)
            if how.pairs_per_head is not None and values.shape[0] % (2 * how.pairs_per_head):
                problems.append(f"{name}: {values.shape[0]} rows are no whole number of heads of {head_dim}")
                continue
            values = how.restored(values) if not how.offset else values
        suffixes = _EMBEDDING_SUFFIXES if base == EMBEDDING else _LINEAR_SUFFIXES
        key = PREFIX + ours.removesuffix(".weight") + suffixes[factor]
        found[key] = values.contiguous()
        stored_bytes[key] = file.bytes_of(stored).nbytes
    return found, stored_bytes, problems


def _described(alpha: float | None, tensors: Mapping[str, Tensor]) -> PEFTConfig:
    """The configuration that PEFT would have for these tensors: every module by its whole path."""
    ranks = {}
    for key, tensor in tensors.items():
        for suffix in (_LINEAR_SUFFIXES["a"], _EMBEDDING_SUFFIXES["a"]):
            if key.endswith(suffix):
                ranks[key.removeprefix(PREFIX).removesuffix(suffix)] = tensor.shape[0]
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    # Where llama.cpp takes a scaling of 1, alpha is each module's own rank.
    alphas = ranks if alpha is None else {}
    return PEFTConfig(
        LoRAConfig(
            rank=rank,
            alpha=float(rank) if alpha is None else alpha,
            target_modules=tuple(ranks),
            rank_pattern=written_pattern(ranks, rank),
            alpha_pattern=written_pattern({name: float(value) for name, value in alphas.items()}, float(rank)),
        ),
        task_type="CAUSAL_LM",
    )


def _record(file: GGUFFile, problems: list[str]) -> AdapterRecord | None:
    """What the writer knew of base, tokenizer and template; a problem if the tensors are no longer those it wrote."""
    text = file.value(RECORD_KEY)
    if text is None:
        return None
    where = f"{file.path}: {RECORD_KEY}"
    record = read_record(parse_json_object(str(text).encode("utf-8"), where), where)
    stored = {name: file.bytes_of(tensor).tobytes() for name, tensor in file.tensors.items()}
    if record.files.get(FACTORS) != factors_digest(float(file.value(ALPHA_KEY, 0.0)), stored):
        problems.append("the factors are not those that were written: the file has been changed or damaged")
    return record
