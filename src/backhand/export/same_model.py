"""Whether a written model says of itself what its base says: sizes, rotary angles, windows, and how text is cut."""

from __future__ import annotations

from dataclasses import replace

import torch

from backhand.errors import ArtifactError
from backhand.export.llama_cpp_limits import context_length
from backhand.nn.config_fields import UnsupportedModel
from backhand.nn.family import DecoderConfig
from backhand.nn.family_parsing import decoder_config
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.source import ModelSource
from backhand.nn.rotary_frequencies import inverse_frequencies
from backhand.train.forgetting import neutral_texts


def check_same_model(source: ModelSource, written: ModelSource, *, untied: bool) -> None:
    """Compare all but the weights.

    Args:
        source: the base.
        written: what was written, read again.
        untied: whether the head was made a matrix of its own.

    Raises:
        ArtifactError: a configuration or a tokenizer that the format cannot hold.
    """
    ours = decoder_config(source.config)
    if isinstance(written, GGUFModel) and not isinstance(source, GGUFModel):
        ours = replace(ours, max_position_embeddings=context_length(ours, written.architecture))
    try:
        theirs = decoder_config(written.config)
    except UnsupportedModel as error:
        raise _cannot_hold(written, f"what was read back has {'; '.join(error.problems)}") from None
    if _comparable(ours, untied) != _comparable(theirs, untied) or not _same_angles(ours, theirs):
        raise _cannot_hold(written, "what was read back describes another model")
    try:
        tokenizer = source.tokenizer()
    except ArtifactError:
        return
    for text in neutral_texts():
        if list(tokenizer(text)["input_ids"]) != list(written.tokenizer()(text)["input_ids"]):
            raise ArtifactError(
                "the tokenizer that was written gives other tokens",
                where=written.path.name,
                why=f"for {text[:60]!r}",
                next_step="merge into a Hugging Face directory",
            )


def _cannot_hold(written: ModelSource, why: str) -> ArtifactError:
    return ArtifactError(
        "the format cannot hold this model's configuration",
        where=written.path.name,
        why=f"{why}; nothing was left at the output",
        next_step="merge into a Hugging Face directory",
    )


def _comparable(config: DecoderConfig, untied: bool) -> DecoderConfig:
    # A file without windows does not say whether it is Llama's or Mistral's, and angles may be stated in several ways.
    # Special ids are the config's here and the tokenizer's there; what the model computes does not depend on them.
    return replace(
        config, family="", rotary=(), eos_token_ids=(), padding_id=None, tied_head=config.tied_head and not untied
    )


def _same_angles(ours: DecoderConfig, theirs: DecoderConfig) -> bool:
    return len(ours.rotary) == len(theirs.rotary) and all(
        torch.allclose(
            inverse_frequencies(one, ours.head_dim), inverse_frequencies(other, theirs.head_dim), rtol=1e-6, atol=0
        )
        for one, other in zip(ours.rotary, theirs.rotary, strict=True)
    )
