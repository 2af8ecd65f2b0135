"""Write an adapter as a GGUF file for llama.cpp and Ollama; `adapters.gguf_adapter` describes and reads the format.

The format has one alpha, which is divided by each module's own rank. For plain LoRA, mixed ranks included, scaling =
alpha / rank therefore holds, and lora_B keeps its bits. Any other scaling (rank-stabilised, or an alpha of single
modules) is folded into the factor: lora_B · scaling · rank / alpha. Folded files have an integer alpha.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from backhand.adapters.gguf_adapter import ALPHA_KEY, FACTORS, RECORD_KEY, factors_digest
from backhand.adapters.module_factors import Factors, ModuleFactors
from backhand.adapters.record import AdapterRecord, record_bytes
from backhand.errors import ArtifactError, CheckError
from backhand.interop.opened_adapter import refuse
from backhand.nn.decoder.delta_mixer import L2_EPS
from backhand.nn.families.family import GPT_OSS_CLAMP, NO_MULTIPLIERS, PER_LAYER_MODEL, DecoderConfig
from backhand.nn.families.rotary import BETA_FAST, BETA_SLOW
from backhand.nn.loading.expert_tensors import parse_expert_name
from backhand.nn.loading.gguf_families import EXAONE4_32B_LAYERS, FULL_INTERVAL, GPT_OSS_INTERVAL, NO_ROPE_INTERVAL
from backhand.nn.loading.gguf_layouts import StoredSizes, layout
from backhand.nn.loading.gguf_tensors import GRANITE_HYBRID, gguf_names

_OUTPUT = "lm_head"
TIME_STEP_MIN = 0.001
"""Lowest time step of Nemotron-H's released models. Files do not state it, and llama.cpp has no limit."""


def write_gguf_adapter(
    path: Path,
    factors: Factors,
    *,
    architecture: str,
    sizes: StoredSizes,
    tied_head: bool,
    record: AdapterRecord | None = None,
    name: str | None = None,
) -> None:
    """Write the file at `path`, not atomically.

    Args:
        factors: of linear modules, and of the embedding, whose lora_A is transposed in the file; modules of experts in
            the order of the experts, all of a layer.
        sizes: of the base model; they determine the order of the rows of its matrices.
        tied_head: True if the base model's head is its embedding, so that its files have no tensor for the head.
        record: the adapter's training record, which llama.cpp ignores.

    Raises:
        ArtifactError: names modules for which the architecture has no tensor.
        CheckError: if a value is not finite in float32.
    """
    obstacles = {module: _obstacle(architecture, module, one, tied_head, sizes) for module, one in factors.items()}
    refuse("gguf", {module: reason for module, reason in obstacles.items() if reason is not None})
    alpha = file_alpha(factors)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    stacks: dict[str, list[np.ndarray[Any, Any]]] = {}
    for module, one in factors.items():
        names = gguf_names(architecture, f"{module}.weight", shared_mlp=sizes.shared_mlp)
        folded = one.scaled_to(alpha / one.rank)
        A_layout, B_layout = layout(architecture, f"{module}.weight", sizes).factor_layouts
        if parse_expert_name(f"{module}.weight") is not None:  # factors come in the order of the experts
            for letter, values in (("a", folded.lora_A), ("b", folded.lora_B)):
                stacks.setdefault(f"{names[0]}.lora_{letter}", []).append(values.float().contiguous().numpy())
            continue
        lora_A = folded.lora_A.T if one.embedding else A_layout.to_gguf(folded.lora_A)
        # If a file has a module's weight in several tensors, each gets the same lora_A and its own rows of lora_B.
        for stored, lora_B in zip(names, folded.lora_B.float().chunk(len(names)), strict=True):
            tensors[f"{stored}.lora_a"] = lora_A.float().contiguous().numpy()
            tensors[f"{stored}.lora_b"] = B_layout.to_gguf(lora_B).contiguous().numpy()
    tensors |= {name: np.stack(each) for name, each in stacks.items()}
    if bad := [name for name, values in tensors.items() if not np.isfinite(values).all()]:
        raise CheckError(f"{len(bad)} factors contain values that are not finite in float32", where=bad[0])
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(ALPHA_KEY, alpha)
        if name:
            writer.add_name(name)
        if record is not None:
            digest = factors_digest(alpha, {key: values.tobytes() for key, values in tensors.items()})
            writer.add_string(RECORD_KEY, record_bytes(replace(record, files={FACTORS: digest})).decode("utf-8"))
        for key, tensor in tensors.items():
            writer.add_tensor(key, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def file_alpha(factors: Factors) -> float:
    """Return the alpha of the file: that of all modules if it is one integer, else the largest rank."""
    # Undo the last bit that dividing alpha by the rank and multiplying again may have cost.
    first, *others = {round(one.scaling * one.rank, 9) for one in factors.values()}
    return first if not others and first.is_integer() else float(max(one.rank for one in factors.values()))


def _obstacle(architecture: str, module: str, one: ModuleFactors, tied_head: bool, sizes: StoredSizes) -> str | None:
    if one.embedding and tied_head:
        return "the embedding is the head's matrix, and llama.cpp would use the factors there too, and stop"
    if module == _OUTPUT and tied_head:
        return "the head is the embedding's matrix, and the file of the base has no tensor of its own for it"
    if architecture == "gemma4" and module == PER_LAYER_MODEL:
        return (
            "llama.cpp multiplies by this matrix as it is and would leave the factors out without a word; an adapter "
            "trained with --exclude-modules per_layer_model_projection has none of it"
        )
    if not gguf_names(architecture, f"{module}.weight", shared_mlp=sizes.shared_mlp):
        return f"files of architecture {architecture} have no tensor for it"
    return None


# Features of a model that a GGUF file can state and llama.cpp does not compute.
#
# llama.cpp refuses files with a tensor or a shape that the architecture does not have. It silently ignores a sliding
# window that the architecture does not have, so that every token attends to all tokens before it. Up to the length of
# the window the result is the same, and its server accepts no text longer than the context that the file states.

_LISTS_OF_FACTORS = ("llama3", "longrope")


def refuse_for_llama_cpp(config: DecoderConfig, architecture: str, where: str) -> None:
    """Check that llama.cpp can compute the model up to `context_length`.

    Raises:
        ArtifactError: lists the features that it lacks.
    """
    obstacles = [feature for missing, feature in _obstacles(config, architecture) if missing]
    if obstacles:
        raise ArtifactError(
            "llama.cpp cannot compute this model from a GGUF file",
            where=where,
            why=f"in files of architecture {architecture} it does not have {', nor '.join(obstacles)}",
            next_step="merge into a Hugging Face directory",
        )


def _obstacles(config: DecoderConfig, architecture: str) -> Iterator[tuple[bool, str]]:
    """Yield, for each feature that some architecture lacks, whether this model needs it and its name."""
    scalings = [dict(rotary.scaling or ()) for rotary in config.rotary]
    rules = [scaling.get("rope_type") for scaling in scalings]
    for rule in rules if architecture not in ("llama", "exaone4", "phi3") else ():
        yield rule in _LISTS_OF_FACTORS, f"{rule} rope scaling"
    two_lists = any(
        rule == "longrope" and (rotary.longest_short is not None or rotary.attention_factor != 1.0)
        for rule, rotary in zip(rules, config.rotary, strict=True)
    )
    yield two_lists and architecture != "phi3", "longrope rope scaling with two lists or an attention factor"
    biased = config.output_bias and architecture not in ("llama", "gpt-oss", "bert")
    yield biased, "a bias on the attention's output (attention_bias)"
    yarn = [scaling for scaling, rule in zip(scalings, rules, strict=True) if rule == "yarn"]
    yield any(scaling["truncate"] is False for scaling in yarn), "yarn rope scaling without truncate"
    if architecture.startswith("gemma"):
        yield bool(yarn), "yarn rope scaling"
    else:
        others = any((scaling["beta_fast"], scaling["beta_slow"]) != (BETA_FAST, BETA_SLOW) for scaling in yarn)
        yield others, f"yarn rope scaling with betas other than {BETA_FAST:g} and {BETA_SLOW:g}"
    width = config.num_heads * config.head_dim
    if architecture in ("qwen2", "olmo2", "exaone4", "phi3", "chatglm", "lfm2"):
        heads = f"heads that are {width} wide together where the model is {config.hidden_size}"
        yield width != config.hidden_size, heads
    if architecture == "smollm3":
        turning = [layer.rotary is not None for layer in config.layers]
        every_fourth = turning == [bool((index + 1) % NO_ROPE_INTERVAL) for index in range(len(turning))]
        yield not every_fourth, "layers without rotary embedding other than every fourth"
    slides = [layer.window is not None for layer in config.layers]
    if architecture in ("olmo2", "exaone4") and any(slides):
        three_of_four = [bool((index + 1) % FULL_INTERVAL) for index in range(len(slides))]
        yield slides != three_of_four, "full attention other than in every fourth layer"
        too_many = architecture == "exaone4" and len(slides) != EXAONE4_32B_LAYERS
        yield too_many, f"a sliding window in models of other than {EXAONE4_32B_LAYERS} layers"
    if architecture == "granite":
        unrotated = "layers without rotary embeddings, unless a flag says so that only its own converter writes"
        yield any(layer.rotary is None for layer in config.layers), unrotated
    yield architecture == GRANITE_HYBRID and config.ssm is None, "a Bamba without Mamba-2"
    if config.ssm is not None:
        lowest = None if config.family != "nemotron_h" else (TIME_STEP_MIN, inf)
        yield config.ssm.bias, "biases of the projections around Mamba-2"
        yield not config.ssm.conv_bias, "a convolution of Mamba-2 without bias"
        yield config.ssm.time_steps != lowest, "limits of Mamba-2's time step"
        yield config.ssm.norm == "before_gate", "a norm of Mamba-2 before the gate"
        scaled = config.multipliers != NO_MULTIPLIERS or (
            architecture == "falcon-h1" and (config.embedding_scaling != 1.0 or config.logits.scaling != 1.0)
        )
        yield scaled, "multipliers of the embedding and of logits with a tied head"
    if config.delta is not None:
        yield config.delta.key_width != config.delta.value_width, "value heads of another width than key heads"
        own_eps = f"an epsilon of its own, {L2_EPS:g}, for the delta rule's queries and keys"
        yield config.norm_eps != L2_EPS, own_eps
    if architecture in ("olmo2", "gpt-oss"):
        yield config.tied_head, "a head that is the embedding"
    if architecture == "olmo2":
        full, *sliding = config.rotary
        own = any(one.scaling is not None or one.theta != full.theta for one in sliding)
        yield own, "a rotary base or scaling of the sliding layers' own"
    if architecture in ("bert", "modern-bert"):
        yield config.activation != "gelu", f"the activation {config.activation}"
    if architecture == "modern-bert":
        yield config.norm_bias or config.mlp_bias, "a bias of norms or of the MLP (norm_bias, mlp_bias)"
        every = full_attention_interval(config)
        yield slides != [bool(index % every) for index in range(len(slides))], "full attention at irregular intervals"
    if architecture == "gemma4":
        # There, layers that share take the keys and values of the last two layers before them: full layers of the last.
        sharing = [layer for layer in config.layers if layer.kv_source is not None]
        last = len(config.layers) - len(sharing)
        elsewhere = any(layer.kv_source != last - (1 if layer.window is None else 2) for layer in sharing)
        yield elsewhere, "keys and values shared by other layers than the last two that have their own"
        fewer = config.per_layer is not None and config.per_layer.vocab_size != config.vocab_size
        yield fewer, "inputs of layers for another number of tokens than there are"
    if architecture == "gpt-oss":
        yield not config.output_bias, "attention without biases (attention_bias false)"
        every_second = [index % GPT_OSS_INTERVAL == 0 for index in range(len(slides))]
        yield slides != every_second, "a sliding window other than in every second layer"
        gain, limit = GPT_OSS_CLAMP
        other = config.mixture is not None and config.mixture.clamp != GPT_OSS_CLAMP
        yield other, f"swiglu_alpha other than {gain:g} and swiglu_limit other than {limit:g}"
    of_all = config.mixture is not None and config.mixture.of_all
    yield of_all, "experts weighed by their share among all (norm_topk_prob false)"
    if architecture == "qwen3moe":
        yield not all(layer.experts for layer in config.layers), "layers without experts"
    yield any(slides) and architecture in ("qwen2", "qwen3", "qwen3moe", "smollm3"), "a sliding window"


def full_attention_interval(config: DecoderConfig) -> int:
    """Return the distance between layers with full attention, the first of which is layer 0."""
    full = [index for index, layer in enumerate(config.layers) if layer.window is None]
    return full[1] if len(full) > 1 else len(config.layers)


def context_length(config: DecoderConfig, architecture: str) -> int:
    """Return the longest text for which llama.cpp computes what the model does; a new file states it as its context."""
    return unknown_window(config, architecture) or config.max_position_embeddings


def unknown_window(config: DecoderConfig, architecture: str) -> int | None:
    """Return a sliding window, shorter than the context, that llama.cpp ignores for this architecture, or None."""
    windows = [layer.window for layer in config.layers if layer.window is not None]
    window = min(windows, default=config.max_position_embeddings)
    there = architecture in ("llama", "phi3", "mistral3") and window < config.max_position_embeddings
    return window if there else None


def llama_cpp_notes(config: DecoderConfig, architecture: str, *, context_ends: bool) -> list[str]:
    """Return notes about texts for which llama.cpp computes something else.

    Args:
        context_ends: True if the file's context was limited to a sliding window that llama.cpp ignores.
    """
    notes = []
    if window := unknown_window(config, architecture):
        notes.append(
            f"note: the file states a context of {window} tokens, the model's sliding window: llama.cpp does not have "
            "the window, and would compute longer texts otherwise"
            if context_ends
            else f"note: llama.cpp does not have the model's sliding window, and computes texts of more than {window} "
            "tokens otherwise"
        )
    notes += [
        f"note: the model turns texts of up to {limit} tokens otherwise than longer ones, and llama.cpp goes by the "
        f"context that it is started with: give it at most {limit} tokens (-c {limit}) for such texts, more for others"
        for limit in config.length_limits
    ]
    if config.family == "nemotron_h":
        notes.append(
            f"note: llama.cpp does not have the model's lowest time step of Mamba-2, {TIME_STEP_MIN:g}, and computes "
            "tokens with a shorter one otherwise"
        )
    return notes
