"""What a GGUF file of architecture gemma4 says beside what every file says: two kinds of layers, and what they share.

- `key_length` is the size of a head in full layers, `key_length_swa` in sliding ones. Key/value heads and widths of
  MLPs are a number, or a list with one for each layer: heads differ by kind of layer, widths double in layers that
  share.
- The last `shared_kv_layers` layers use keys and values of layers below. Files have attn_k and attn_v of these layers
  as the checkpoint has them, and llama.cpp reads over them, as is done here. A full layer without attn_v makes its
  values of its keys.
- `rope_freqs.weight` counts in full layers alone, and must be there. It divides the frequencies of the pairs that turn
  by one number and those of the others by 1e30: Gemma's rule `proportional`. Linear scaling is of full layers too.
- The table of layers' inputs has a row for each token. Logits are capped at 30 where nothing is said, and not where
  0 is.
"""

from __future__ import annotations

from typing import Any

from backhand.errors import ArtifactError
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.nn.loading.gguf_metadata import Metadata, layer_kinds, rotary_fraction, sliding_layers
from backhand.nn.loading.gguf_tensors import ROPE_FACTORS

NO_ROTATION = 1e30
"""What divides the frequency of a pair that does not turn."""
_NO_ROTATION_FROM = 1e20
"""From here on it does not, in any text."""
_PATTERN = 6
_TABLE = "per_layer_token_embd.weight"


def gemma4_config(config: dict[str, Any], metadata: Metadata, file: GGUFFile) -> None:
    """Add to a Hugging Face config in the making what Gemma 4 has of its own.

    Raises:
        ArtifactError: for metadata that no model has, and a table of frequencies that is missing or another rule's.
    """
    layers, full_size = config["num_hidden_layers"], config["head_dim"]
    slides = sliding_layers(metadata, layers, _PATTERN)
    if len(slides) != layers:
        raise ArtifactError(
            f"gemma4.attention.sliding_window_pattern does not say of each of {layers} layers whether it slides",
            where=str(file.path),
        )
    if slides[-1]:  # transformers takes the last layer for a full one whatever its config says
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
    as_values = not any(
        f"blk.{layer}.attn_v.weight" in file.tensors for layer in range(layers - shared) if not slides[layer]
    )
    cap = metadata.optional("final_logit_softcapping", float)
    del config["hidden_act"]
    config |= {
        "model_type": "gemma4_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": size,
        "global_head_dim": full_size,
        "attention_k_eq_v": as_values and not all(slides),
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
    """The angles of full layers, by the rule `proportional`."""
    if rotary["rope_type"] not in ("default", "linear", "longrope"):
        metadata.mark_unread("rope.scaling.type")
        return rotary
    divisors = rotary.get("short_factor", [rotary.get("factor", 1.0)] * (size // 2))
    turning = [divisor for divisor in divisors if divisor < _NO_ROTATION_FROM]
    if len(set(turning)) != 1 or divisors[: len(turning)] != turning:
        raise ArtifactError(
            f"{ROPE_FACTORS} divides frequencies in a way that Gemma 4 has not",
            where=str(file.path),
            why="the first pairs turn, each divided by one number, and the others stand still",
            next_step="use the model's Hugging Face directory",
        )
    rule = {
        "rope_type": "proportional",
        "rope_theta": rotary["rope_theta"],
        "partial_rotary_factor": rotary_fraction(2 * len(turning), size),
    }
    return rule if turning[0] == 1.0 else rule | {"factor": turning[0]}


def _add_key_value_heads(config: dict[str, Any], metadata: Metadata, slides: list[bool]) -> None:
    """Of sliding layers and, where values are made of keys, of full ones; a config cannot say other differences."""
    key = "attention.head_count_kv"
    counts = metadata.per_layer(key, len(slides), config["num_attention_heads"])
    sliding, full = ({count for count, here in zip(counts, slides, strict=True) if here == kind} for kind in (True, 0))
    config["num_key_value_heads"] = min(sliding or full)
    if max(map(len, (sliding, full))) > 1 or (sliding and full and full != sliding and not config["attention_k_eq_v"]):
        metadata.mark_unread(key)
    elif sliding and full and full != sliding:
        config["num_global_key_value_heads"] = min(full)


def _add_widths(config: dict[str, Any], metadata: Metadata) -> None:
    """Widths of MLPs: all alike, or doubled in the layers that share keys and values."""
    key, layers = "feed_forward_length", config["num_hidden_layers"]
    widths = metadata.per_layer(key, layers)
    first, own = widths[0], max(layers - config["num_kv_shared_layers"], 0)
    config["intermediate_size"] = first
    config["use_double_wide_mlp"] = doubled = widths != [first] * layers
    if doubled and widths != [first] * own + [2 * first] * (layers - own):
        metadata.mark_unread(key)
