"""Tiny image models with a text model inside, as transformers makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.support.tiny_models import randomise, tiny_config
from tests.support.tiny_tokenizer import tiny_tokenizer

_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_IMAGE_TOKEN = 300

# By model_type, perhaps with a second text model after a comma: the text variant of tiny_models, the type of the
# vision part, and what else the wrapper needs.
_WRAPPERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        "siglip_vision_model",
        {"mm_tokens_per_image": 4, "image_token_index": _IMAGE_TOKEN, "boi_token_index": 301, "eoi_token_index": 302},
    ),
    "gemma4": (
        "gemma4_text",
        "gemma4_vision",
        {
            "image_token_id": _IMAGE_TOKEN,
            "boi_token_id": 301,
            "eoi_token_id": 302,
            "video_token_id": 303,
            "audio_token_id": 304,
            "boa_token_id": 305,
            "eoa_token_index": 306,
            "audio_config": None,
        },
    ),
    "mistral3": ("mistral", "pixtral", {"image_token_index": _IMAGE_TOKEN}),
    "mistral3, ministral3": ("ministral3", "pixtral", {"image_token_index": _IMAGE_TOKEN}),
    "llava": ("llama", "clip_vision_model", {"image_token_index": _IMAGE_TOKEN}),
    "internvl": ("qwen2", "internvl_vision", {"image_token_id": _IMAGE_TOKEN}),
    "lfm2_vl": ("lfm2", "siglip2_vision_model", {"image_token_id": _IMAGE_TOKEN, "downsample_factor": 1}),
    "qwen3_5": ("qwen3_5_text", "qwen3_5_vision", {"image_token_id": _IMAGE_TOKEN}),
    "smolvlm": ("llama-tied", "smolvlm_vision", {"image_token_id": _IMAGE_TOKEN, "scale_factor": 2}),
}

KINDS: tuple[str, ...] = tuple(_WRAPPERS)


def tiny_wrapper(kind: str, *, seed: int = 0, tied: bool | None = None) -> PreTrainedModel:
    """A random image model in evaluation mode, computed by the plain attention."""
    text, vision, more = _WRAPPERS[kind]
    inside = tiny_config(text)
    tied = inside.tie_word_embeddings if tied is None else tied
    vision_size = {"image_size": [16, 16], "patch_size": [8, 8]} if kind == "internvl" else {}
    if kind == "gemma4":
        vision_size = {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 64}
    config = transformers.AutoConfig.for_model(
        kind.partition(",")[0],
        text_config=inside.to_dict(),
        vision_config={"model_type": vision, **_VISION, **vision_size},
        tie_word_embeddings=tied,
        **more,
    )
    with torch.device("cpu"):
        model: PreTrainedModel = transformers.AutoModelForImageTextToText.from_config(
            config, attn_implementation="eager"
        )
    randomise(model, seed=seed)
    model.tie_weights()
    if type(inside).__name__.startswith("Gemma3"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "language_model" in name and name.endswith("norm.weight"):
                    parameter.sub_(1.0)  # drawn around 1 where Gemma multiplies by 1 + weight
    return model.eval()


def save_wrapper(model: PreTrainedModel, directory: Path, *, modules_names: bool = False) -> Path:
    """Write a Hugging Face directory with a tokenizer.

    Args:
        model: an image model.
        directory: where to.
        modules_names: tensors by the names of the modules, as some checkpoints have them, and not transformers' own.
    """
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    if modules_names:
        path = directory / "model.safetensors"
        stored = load_file(path)
        tied = set() if stored.keys() & {"language_model.lm_head.weight", "lm_head.weight"} else {"lm_head.weight"}
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
        save_file(tensors, path, metadata={"format": "pt"})
    return directory
