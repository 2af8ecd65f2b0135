"""Read an adapter from a GGUF file of llama.cpp or Ollama into the form of PEFT's files.

    general.type = adapter, general.architecture, adapter.type = lora, adapter.lora.alpha
    <base tensor>.lora_a, <base tensor>.lora_b, such as blk.0.attn_q.weight.lora_a        [llama.cpp llama-adapter.cpp]

Shapes are PEFT's, (rank, in) and (out, rank), except that token_embd.weight.lora_a is (vocab, rank), and experts have
(experts, rank, in) and (experts, out, rank). Their gate and up are two tensors here, and one parameter with one lora_A
in PEFT. The scaling of a module is alpha / rank of that module; an alpha of 0, or none, means scaling 1. Rows of lora_b
and columns of lora_a have the order of the base tensor's, which is not always Hugging Face's (`gguf_tensors`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import AdapterContents, parse_json_object
from backhand.adapters.peft_config import PEFTConfig, written_pattern
from backhand.adapters.peft_keys import PREFIX, factor_of, factor_problems
from backhand.adapters.record import AdapterRecord, read_record
from backhand.errors import ArtifactError
from backhand.nn.loading.expert_tensors import expert_parameter, expert_parts, stack_layout
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.nn.loading.gguf_layouts import StoredSizes, layout, stored_sizes
from backhand.nn.loading.gguf_tensors import gguf_architecture, huggingface_name, huggingface_names
from backhand.nn.loading.gguf_values import dequantized
from backhand.nn.loading.unit_multipliers import has_multipliers
from backhand.reading import open_plain

ALPHA_KEY = "adapter.lora.alpha"
RECORD_KEY = "backhand.record"
EMBEDDING = "token_embd.weight"
FACTORS = "factors"
"""Name of the digest of alpha and tensors in the record of a GGUF adapter."""

_EMBEDDING_SUFFIXES = {"a": ".lora_embedding_A", "b": ".lora_embedding_B"}
_LINEAR_SUFFIXES = {"a": ".lora_A.weight", "b": ".lora_B.weight"}


def is_gguf_file(path: Path | str) -> bool:
    """Return True if the file begins with the magic of GGUF files."""
    try:
        with open_plain(path) as file:
            return file.read(4) == b"GGUF"
    except (OSError, ValueError):  # ValueError: a NUL character in the path
        return False


def read_gguf_adapter(path: Path | str, config: Mapping[str, Any]) -> AdapterContents:
    """Read the adapter in a GGUF file.

    Args:
        config: Hugging Face configuration of the base model, which determines the order of the rows of q and k.

    Returns:
        contents as of a directory in PEFT's format, with all problems so far.

    Raises:
        ArtifactError: if it is not a GGUF file, is damaged, is a model, or has another kind or architecture.
    """
    path = Path(path)
    file = GGUFFile(path)
    architecture = _check_kind(file, config)
    stacks: dict[str, dict[str, Tensor]] = {}
    tensors, stored_bytes, problems = _tensors(file, architecture, stored_sizes(config), stacks)
    if config.get("model_type") == "granitemoehybrid":
        tensors = {key.replace(".shared_experts.", ".mlp."): tensor for key, tensor in tensors.items()}
        tensors = _with_fused_mlp(tensors, problems)
    elif config.get("model_type") == "bamba":
        tensors = {key.replace(".mlp.", ".feed_forward."): tensor for key, tensor in tensors.items()}
        stored_bytes = {key.replace(".mlp.", ".feed_forward."): size for key, size in stored_bytes.items()}
    modules, parameters = _ranks(tensors), _take_experts(tensors, stacks, problems, config)
    described = _described(_alpha(file), modules, parameters)
    record = None
    try:
        record = _record(file, problems)
    except ArtifactError as error:
        problems.append(error.one_line)
    problems += factor_problems(tensors)
    return AdapterContents(path, described, bool(tensors), tensors, record, tuple(problems), stored_bytes)


def factors_digest(alpha: float, tensors: Mapping[str, bytes]) -> str:
    """Return the digest of alpha and of the names and stored bytes of the tensors."""
    described = hashlib.sha256(json.dumps([alpha, sorted(tensors)]).encode())
    for name in sorted(tensors):
        described.update(hashlib.sha256(tensors[name]).digest())
    return "sha256:" + described.hexdigest()


def _check_kind(file: GGUFFile, config: Mapping[str, Any]) -> str:
    where = str(file.path)
    if file.value("general.type") != "adapter":
        raise ArtifactError(
            "this GGUF file contains no adapter",
            where=where,
            next_step="give a base model as --model, not as --adapter",
        )
    kind = file.value("adapter.type")
    if kind != "lora":
        raise ArtifactError(f"an adapter of type {kind!r} cannot be used", where=where, why="only lora is known")
    if file.value("adapter.alora.invocation_tokens") is not None:
        raise ArtifactError("the adapter applies only after certain tokens, which is not supported", where=where)
    stated, wanted = file.value("general.architecture"), gguf_architecture(config)
    if wanted is None or stated != wanted:
        raise ArtifactError(
            f"the adapter is for models of architecture {stated!r}, and the base model is a {config.get('model_type')}",
            where=where,
            next_step="give the base that it was trained on as --model",
        )
    if has_multipliers(config):
        raise ArtifactError(
            "the adapter is for a GGUF file of this model",
            where=str(file.path),
            why="the weights of the file contain the model's multipliers, and those of the directory do not",
            next_step="give the GGUF file as --model",
        )
    return wanted


def _alpha(file: GGUFFile) -> float | None:
    """Return the stated alpha, or None if it is 0 or missing, for which llama.cpp uses the scaling 1."""
    alpha = file.value(ALPHA_KEY, 0.0)
    if not isinstance(alpha, int | float) or not 0 <= alpha < float("inf"):
        raise ArtifactError(f"{alpha!r} is not a number of at least 0", where=f"{file.path}: {ALPHA_KEY}")
    return float(alpha) or None


def _tensors(
    file: GGUFFile, architecture: str, sizes: StoredSizes, stacks: dict[str, dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, int], list[str]]:
    """Return factors under PEFT's names and in Hugging Face's row order, their sizes in the file, and problems.

    Factors of experts are put into `stacks`, by parameter and by a name such as `gate_proj.a`.
    """
    found: dict[str, Tensor] = {}
    stored_bytes: dict[str, int] = {}
    problems = []
    for name, stored in file.tensors.items():
        base, _, factor = name.rpartition(".lora_")
        ours = huggingface_name(architecture, base)
        if factor in ("a", "b") and (experts := huggingface_names(architecture, base, stored.shape)) and ours is None:
            values = dequantized(file.bytes_of(stored), stored.type_id).view(stored.shape)
            part = f"{experts[0].split('.')[-2]}.{factor}"
            stacks.setdefault(expert_parameter(experts[0]) or "", {})[part] = values
            continue
        if factor not in ("a", "b") or ours is None or not ours.endswith(".weight") or len(stored.shape) != 2:
            problems.append(f"unexpected: {name}, {stored.shape}; factors are <base tensor>.lora_a and .lora_b")
            continue
        values = dequantized(file.bytes_of(stored), stored.type_id).view(stored.shape)
        if base == EMBEDDING:
            values = values.T if factor == "a" else values
        else:
            how = layout(architecture, ours, sizes).factor_layouts["ab".index(factor)]
            misfit = how.misfit(values.shape)
            if misfit is not None:
                problems.append(f"{name}: {misfit}")
                continue
            values = how.to_huggingface(values)
        suffixes = _EMBEDDING_SUFFIXES if base == EMBEDDING else _LINEAR_SUFFIXES
        key = PREFIX + ours.removesuffix(".weight") + suffixes[factor]
        found[key] = values.contiguous()
        stored_bytes[key] = file.bytes_of(stored).nbytes
    return found, stored_bytes, problems


def _with_fused_mlp(tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, Tensor]:
    """Return Granite 4's factors, with gate and up as one module, from a file's separate gate and up."""
    ends = _LINEAR_SUFFIXES["a"], _LINEAR_SUFFIXES["b"]
    found = {key.replace(".mlp.down_proj.", ".shared_mlp.output_linear."): tensor for key, tensor in tensors.items()}
    gate, up = ".mlp.gate_proj", ".mlp.up_proj"
    for block in dict.fromkeys(key.partition(part)[0] for key in tensors for part in (gate, up) if part in key):
        gate_A, gate_B, up_A, up_B = (found.pop(f"{block}{part}{end}", None) for part in (gate, up) for end in ends)
        if gate_A is None or up_A is None or gate_B is None or up_B is None or not torch.equal(gate_A, up_A):
            layer = block.removeprefix(PREFIX)
            problems.append(f"{layer}: gate and up are one module of this model, and do not have one lora_A there")
            continue
        fused = f"{block}.shared_mlp.input_linear"
        found |= {f"{fused}{ends[0]}": gate_A, f"{fused}{ends[1]}": torch.cat([gate_B, up_B])}
    return found


def _take_experts(
    tensors: dict[str, Tensor],
    stacks: Mapping[str, Mapping[str, Tensor]],
    problems: list[str],
    config: Mapping[str, Any],
) -> dict[str, int]:
    """Add the experts' factors to the others under PEFT's names, and return the rank of each parameter."""
    ranks = {}
    for parameter, there in stacks.items():
        holder, _, own = parameter.rpartition(".")
        parts = expert_parts(own)
        if set(there) != {f"{part}.{letter}" for part in parts for letter in "ab"}:
            problems.append(f"{parameter}: the file has {', '.join(sorted(there))} of it")
            continue
        lora_A, *others = (there[f"{part}.a"] for part in parts)
        if not all(torch.equal(lora_A, other) for other in others):
            problems.append(
                f"{parameter}: gate and up have each a lora_a of their own, and here they are one parameter"
            )
            continue
        each_B = [there[f"{part}.b"] for part in parts]
        turns = stack_layout(config.get("model_type")).interleaved
        lora_B = torch.stack(each_B, dim=2).flatten(1, 2) if turns else torch.cat(each_B, dim=1)
        ranks[parameter] = lora_A.shape[1]
        inner = own == "gate_up_proj" and f"{holder}.down_proj" in stacks
        path = f"{PREFIX}{holder}.base_layer" if inner else f"{PREFIX}{holder}"
        tensors[path + _LINEAR_SUFFIXES["a"]] = lora_A.flatten(0, 1).contiguous()
        tensors[path + _LINEAR_SUFFIXES["b"]] = lora_B.permute(1, 2, 0).flatten(1).contiguous()
    return ranks


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the rank of every module by path."""
    found = ((factor_of(key) or ("", ""), tensor) for key, tensor in tensors.items())
    return {module: len(tensor) for (module, suffix), tensor in found if "_A" in suffix}


def _described(alpha: float | None, modules: Mapping[str, int], parameters: Mapping[str, int]) -> PEFTConfig:
    """Return PEFT's configuration for modules and parameters of these ranks, each by its full path."""
    ranks = {**modules, **parameters}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    # If llama.cpp uses a scaling of 1, alpha equals each module's rank.
    alphas = ranks if alpha is None else {}
    return PEFTConfig(
        LoRAConfig(
            rank=rank,
            alpha=float(rank) if alpha is None else alpha,
            target_modules=tuple(modules),
            target_parameters=tuple(parameters),
            rank_pattern=written_pattern(ranks, rank),
            alpha_pattern=written_pattern({name: float(value) for name, value in alphas.items()}, float(rank)),
        ),
        task_type="CAUSAL_LM",
    )


def _record(file: GGUFFile, problems: list[str]) -> AdapterRecord | None:
    """Return the record of base, tokenizer and template; add a problem if the tensors have changed since."""
    text = file.value(RECORD_KEY)
    if text is None:
        return None
    where = f"{file.path}: {RECORD_KEY}"
    record = read_record(parse_json_object(str(text).encode("utf-8"), where), where)
    stored = {name: file.bytes_of(tensor).tobytes() for name, tensor in file.tensors.items()}
    if record.files.get(FACTORS) != factors_digest(float(file.value(ALPHA_KEY, 0.0)), stored):
        problems.append("the factors are not those that were written: the file has been changed or damaged")
    return record
