"""Convert the metadata of GGUF architecture gemma4 to its Hugging Face config.

- **Heads and widths.** `key_length` is the head size in full-attention layers, `key_length_swa` in sliding layers. The
  number of key/value heads and the width of MLPs are one number, or a list with one number per layer. Heads differ by
  the kind of layer, and widths double in layers with shared keys and values.
- **Shared keys and values.** The last `shared_kv_layers` layers use keys and values of earlier layers. Files still
  contain attn_k and attn_v of these layers, as the checkpoint does. llama.cpp ignores them, and so does Backhand. A
  full-attention layer without attn_v uses its keys as values.
- **Rotary.** `rope_freqs.weight` is required and applies to full-attention layers only. It divides the frequencies of
  the rotated pairs by one number and all others by 1e30, which is Gemma's rule `proportional`. Linear scaling also
  applies to full-attention layers only.
- **Other.** The per-layer embedding table has one row per token. Logits are capped at 30 by default, and not capped if
  the file says 0.
"""

from __future__ import annotations

from typing import Any

from backhand.errors import ArtifactError
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.nn.loading.gguf_metadata import Metadata, layer_kinds, rotary_fraction, sliding_layers
from backhand.nn.loading.gguf_tensors import ROPE_FACTORS

NO_ROTATION = 1e30
"""Divisor of the frequency of a pair that is not rotated."""
_NO_ROTATION_FROM = 1e20
"""Divisors from here on leave a pair unrotated at any position."""
_PATTERN = 6
_TABLE = "per_layer_token_embd.weight"


def gemma4_config(config: dict[str, Any], metadata: Metadata, file: GGUFFile) -> None:
    """Add Gemma 4's fields to a Hugging Face config under construction.

    Raises:
        ArtifactError: for metadata that no model has, or a table of frequencies that is missing or not proportional.
    """
    layers, full_size = config["num_hidden_layers"], config["head_dim"]
    slides = sliding_layers(metadata, layers, _PATTERN)
    if len(slides) != layers:
        raise ArtifactError(
            f"gemma4.attention.sliding_window_pattern has {len(slides)} values for {layers} layers",
            where=str(file.path),
        )
    if slides[-1]:  # transformers treats the last layer as full attention, whatever its config says
        metadata.mark_unread("attention.sliding_window_pattern")
    if ROPE_FACTORS not in file.tensors:
        raise ArtifactError(f"the tensor {ROPE_FACTORS} is missing", where=str(file.path))
    size = metadata.integer("attention.key_length_swa")
    metadata.accept_if_equal("attention.value_length_swa", size)
    metadata.accept_if_equal("rope.dimension_count_swa", size)
    if config.pop("partial_rotary_factor", None) is not None:
        metadata.mark_unread("rope.dimension_count")
    shared = metadata.optional("attention.shared_kv_layers", int) or 0
    width = metadata.optional("embedding_length_per_layer_input", int) or 0
    keys_as_values = not any(
        f"blk.{layer}.attn_v.weight" in file.tensors for layer in range(layers - shared) if not slides[layer]
    )
    cap = metadata.optional("final_logit_softcapping", float)
    del config["hidden_act"]
    config |= {
        "model_type": "gemma4_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": size,
        "global_head_dim": full_size,
        "attention_k_eq_v": keys_as_values and not all(slides),
        "num_kv_shared_layers": shared,
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": layer_kinds(slides),
        "rope_parameters": {
            "full_attention": _full_rotary(config["rope_parameters"], full_size, metadata, file),
            "sliding_attention": metadata.sliding_rope_parameters(10000.0),
        },
        "final_logit_softcapping": None if cap == 0 else 30.0 if cap is None else cap,
        "hidden_size_per_layer_input": width,
        "vocab_size_per_layer_input": file.tensors[_TABLE].shape[0] if _TABLE in file.tensors else config["vocab_size"],
    }
    _add_key_value_heads(config, metadata, slides)
    _add_widths(config, metadata)


def _full_rotary(rotary: dict[str, Any], size: int, metadata: Metadata, file: GGUFFile) -> dict[str, Any]:
    """Return the rope parameters of full-attention layers, by the rule `proportional`."""
    if rotary["rope_type"] not in ("default", "linear", "longrope"):
        metadata.mark_unread("rope.scaling.type")
        return rotary
    divisors = rotary.get("short_factor", [rotary.get("factor", 1.0)] * (size // 2))
    rotated = [divisor for divisor in divisors if divisor < _NO_ROTATION_FROM]
    if len(set(rotated)) != 1 or divisors[: len(rotated)] != rotated:
        raise ArtifactError(
            f"{ROPE_FACTORS} does not follow Gemma 4's rule for rotary frequencies",
            where=str(file.path),
            why="the first divisors must all be equal, and all others 1e20 or more",
            next_step="use the model's Hugging Face directory",
        )
    rule = {
        "rope_type": "proportional",
        "rope_theta": rotary["rope_theta"],
        "partial_rotary_factor": rotary_fraction(2 * len(rotated), size),
    }
    return rule if rotated[0] == 1.0 else rule | {"factor": rotated[0]}


def _add_key_value_heads(config: dict[str, Any], metadata: Metadata, slides: list[bool]) -> None:
    """Add the number of key/value heads.

    Full-attention layers may have another number only if their keys are also their values. A config cannot express
    other differences.
    """
    key = "attention.head_count_kv"
    counts = metadata.per_layer(key, len(slides), config["num_attention_heads"])
    by_layer = list(zip(counts, slides, strict=True))
    sliding, full = ({count for count, slides_here in by_layer if slides_here == kind} for kind in (True, False))
    config["num_key_value_heads"] = min(sliding or full)
    if max(map(len, (sliding, full))) > 1 or (sliding and full and full != sliding and not config["attention_k_eq_v"]):
        metadata.mark_unread(key)
    elif sliding and full and full != sliding:
        config["num_global_key_value_heads"] = min(full)


def _add_widths(config: dict[str, Any], metadata: Metadata) -> None:
    """Add the widths of MLPs: all equal, or doubled in the layers with shared keys and values."""
    key, layers = "feed_forward_length", config["num_hidden_layers"]
    widths = metadata.per_layer(key, layers)
    first, unshared = widths[0], max(layers - config["num_kv_shared_layers"], 0)
    config["intermediate_size"] = first
    config["use_double_wide_mlp"] = doubled = widths != [first] * layers
    if doubled and widths != [first] * unshared + [2 * first] * (layers - unshared):
        metadata.mark_unread(key)
