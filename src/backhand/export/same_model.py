"""Whether a written model says of itself what its base says: sizes, rotary angles, windows, and how text is cut."""

from __future__ import annotations

from dataclasses import replace

import torch

from backhand.errors import ArtifactError
from backhand.nn.family import DecoderConfig
from backhand.nn.family_parsing import decoder_config
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
    ours, theirs = decoder_config(source.config), decoder_config(written.config)
    if _comparable(ours, untied) != _comparable(theirs, untied) or not _same_angles(ours, theirs):
        raise ArtifactError(
            "the format cannot hold this model's configuration",
            where=written.path.name,
            why="what was read back describes another model; nothing was left at the output",
            next_step="merge into a Hugging Face directory",
        )
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


def _comparable(config: DecoderConfig, untied: bool) -> DecoderConfig:
    # A file without windows does not say whether it is Llama's or Mistral's, and angles may be stated in several ways.
    return replace(config, family="", rotary=(), eos_token_ids=(), tied_head=config.tied_head and not untied)


def _same_angles(ours: DecoderConfig, theirs: DecoderConfig) -> bool:
    return len(ours.rotary) == len(theirs.rotary) and all(
        torch.allclose(
            inverse_frequencies(one, ours.head_dim), inverse_frequencies(other, theirs.head_dim), rtol=1e-6, atol=0
        )
        for one, other in zip(ours.rotary, theirs.rotary, strict=True)
    )
