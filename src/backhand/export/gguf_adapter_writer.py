"""Writing an adapter as a GGUF file, for llama.cpp and Ollama; `adapters.gguf_adapter` has the format and reads it.

The reader knows one alpha and divides it by each module's own rank, so that scaling = alpha / rank holds there for
plain LoRA, mixed ranks included, and lora_B keeps its bits. Anything else (rank-stabilised scaling, an alpha for some
modules) is folded: lora_B · scaling · rank / alpha. Folded files state a whole alpha.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from backhand.adapters.adapter_record import AdapterRecord, record_bytes
from backhand.adapters.gguf_adapter import ALPHA_KEY, FACTORS, RECORD_KEY, factors_digest
from backhand.adapters.module_factors import Factors, ModuleFactors
from backhand.errors import CheckError
from backhand.export.refusal import refuse
from backhand.nn.loading.gguf_tensors import gguf_name, layout

_OUTPUT = "lm_head"


def write_gguf_adapter(
    path: Path,
    factors: Factors,
    *,
    architecture: str,
    head_dim: int,
    tied_head: bool,
    record: AdapterRecord | None = None,
    name: str | None = None,
) -> None:
    """Write the file; a plain one, not in one step.

    Args:
        path: of the file.
        factors: of linear modules, and of the embedding, whose lora_A the file holds transposed.
        architecture: general.architecture of the base model's files.
        head_dim: of the base model: how its q and k rows lie.
        tied_head: whether the base model's head is its embedding, so that its files have no tensor for it.
        record: what the adapter was trained with, for those who can compare; llama.cpp reads over it.
        name: general.name.

    Raises:
        ArtifactError: modules that the architecture has no tensor for, by name.
        CheckError: a value is not finite in float32.
    """
    obstacles = {module: _obstacle(architecture, module, one, tied_head) for module, one in factors.items()}
    refuse("gguf", {module: reason for module, reason in obstacles.items() if reason is not None})
    alpha = file_alpha(factors)
    tensors = {}
    for module, one in factors.items():
        stored = gguf_name(architecture, f"{module}.weight")
        folded = one.scaled_to(alpha / one.rank)
        ours = layout(architecture, f"{module}.weight", head_dim)
        lora_A = folded.lora_A.T if one.embedding else folded.lora_A
        tensors[f"{stored}.lora_a"] = lora_A.float().contiguous().numpy()
        lora_B = folded.lora_B.float()
        tensors[f"{stored}.lora_b"] = (ours.stored(lora_B) if not ours.offset else lora_B).contiguous().numpy()
    if bad := [name for name, values in tensors.items() if not np.isfinite(values).all()]:
        raise CheckError(f"{len(bad)} factors hold values that are not finite in float32", where=bad[0])
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        _write(writer, tensors, alpha, record, name)


def _write(
    writer: gguf.GGUFWriter,
    tensors: dict[str, np.ndarray[Any, Any]],
    alpha: float,
    record: AdapterRecord | None,
    name: str | None,
) -> None:
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(ALPHA_KEY, alpha)
    if name:
        writer.add_name(name)
    if record is not None:
        digest = factors_digest(alpha, {key: values.tobytes() for key, values in tensors.items()})
        described = AdapterRecord(**{**vars(record), "files": {FACTORS: digest}})
        writer.add_string(RECORD_KEY, record_bytes(described).decode("utf-8"))
    for key, values in tensors.items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


def file_alpha(factors: Factors) -> float:
    """The one alpha of the file: every module's own where that is one whole number, else the largest rank."""
    alphas = {_alpha(one) for one in factors.values()}
    (only,) = alphas if len(alphas) == 1 else (None,)
    if only is not None and only.is_integer():
        return only
    return float(max(one.rank for one in factors.values()))


def _alpha(one: ModuleFactors) -> float:
    """alpha as plain LoRA has it, without the last bit that dividing by the rank and multiplying again may cost."""
    return round(one.scaling * one.rank, 9)


def _obstacle(architecture: str, module: str, one: ModuleFactors, tied_head: bool) -> str | None:
    if one.embedding and tied_head:
        return "the embedding is the head's matrix, and llama.cpp would use the factors there too, and stop"
    if module == _OUTPUT and tied_head:
        return "the head is the embedding's matrix, and the file of the base has no tensor of its own for it"
    if gguf_name(architecture, f"{module}.weight") is None:
        return f"files of architecture {architecture} have no tensor for it"
    return None
