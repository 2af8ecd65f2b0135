"""The chat templates that TRL's package holds, and what its own training versions mark as the assistant's."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from tests.support.tiny_tokenizer import tiny_tokenizer

_TRAINING = "_training"
_ENDS = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": ("<bos>", "<eos>"),
    "gemma": ("<bos>", "<eos>"),
    "glm4": (None, "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
    "idefics3": ("<|begin_of_text|>", "<end_of_utterance>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llava": ("<s>", "</s>"),
    "muse": ("<|begin_of_text|>", "<|eot|>"),
    "nemotron": ("<s>", "<|im_end|>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "qwen": (None, "<|im_end|>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>"),
}
"""Begin and end of sequence of the tokenizers that the templates come with, by how the template's name begins."""

_CONTROL = re.compile(
    r"<[|｜][^|｜<>\s]+[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_(?:turn|utterance|image)>|\[gMASK\]|<sop>"
)
_PLAIN_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def _folder() -> Path:
    # Only its files are needed: importing the package takes seconds.
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "chat_templates"


def pair_names() -> list[str]:
    """Names of the templates that have a training version next to them."""
    return sorted(path.stem.removesuffix(_TRAINING) for path in _folder().glob(f"*{_TRAINING}.jinja"))


def template_names() -> list[str]:
    """Names of all templates in circulation."""
    return sorted(path.stem for path in _folder().glob("*.jinja") if not path.stem.endswith(_TRAINING))


@cache
def template_source(name: str, *, training: bool = False) -> str:
    return (_folder() / f"{name}{_TRAINING if training else ''}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """A tiny byte-level tokenizer that has the control tokens which the template writes."""
    template = template_source(name)
    bos, eos = next(ends for start, ends in _ENDS.items() if name.startswith(start))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        bos_token=bos,
        eos_token=eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
    control = sorted(set(_CONTROL.findall(template)))
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    plain = [text for text in _PLAIN_ADDED if text in template]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return tokenizer


def marked_spans(
    name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> list[tuple[str, str]] | None:
    """Return the text that the training version marks: (all text before, marked text), adjacent marks joined.

    Return None if it fails. Templates that read contents as parts only are given parts, as TRL's preparation for images
    does.
    """
    with_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    for form in (messages, with_parts):
        try:
            ((text,), (places,)) = render_jinja_template(
                conversations=[form],
                tools=tools,
                chat_template=template_source(name, training=True),
                return_assistant_tokens_mask=True,
                **tokenizer_for(name).special_tokens_map,
            )
        except Exception:  # noqa: BLE001 - a template raises whatever its expressions raise
            continue
        if messages[-1]["content"].strip() in text:
            break
    else:
        return None
    joined: list[tuple[int, int]] = []
    for start, end in places:
        if start == end:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return [(text[:start], text[start:end]) for start, end in joined]
