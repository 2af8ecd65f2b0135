"""README.md of a saved adapter, in the form that model hubs read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.targets import Target

_AUTO_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM"}


def model_card(described: PEFTConfig, targets: Sequence[Target], parameters: int, facts: Mapping[str, object]) -> str:
    """The card's text; it holds no date, so that the same adapter gives the same card.

    Args:
        described: configuration, base model and task.
        targets: the adapted modules.
        parameters: trained elements in all.
        facts: further rows of the table, such as losses and data, in the order they should stand.
    """
    base = described.base_model or ""
    header = ["library_name: peft"]
    if base:
        header.insert(0, f"base_model: {json.dumps(base)}")
    if described.task_type == "CAUSAL_LM":
        header.append("pipeline_tag: text-generation")
    header.append('tags: ["lora", "backhand"]')
    table = {
        "base model": _code(base) if base else "not recorded",
        "adapted modules": len(targets),
        "module names": ", ".join(_code(end) for end in sorted({t.name.rpartition(".")[2] for t in targets})),
        "rank": _range(target.rank for target in targets),
        "scaling": _range(target.scaling for target in targets),
        "trained parameters": f"{parameters:,}",
        **{_text(name): _text(value) for name, value in facts.items()},
    }
    rows = [f"| {name} | {value} |" for name, value in table.items()]
    return "\n".join(
        [
            "---",
            *header,
            "---",
            "",
            "# LoRA adapter",
            "",
            "Written by Backhand; the files are in PEFT's format.",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            *_usage(described),
            "",
        ]
    )


def _usage(described: PEFTConfig) -> list[str]:
    auto_class = _AUTO_CLASSES.get(described.task_type or "")
    if auto_class is None or not described.base_model:
        return [
            "```python",
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base, "path/to/this/directory")',
            "```",
        ]
    return [
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        f"base = {auto_class}.from_pretrained({json.dumps(described.base_model)})",
        'model = PeftModel.from_pretrained(base, "path/to/this/directory")',
        "```",
    ]


def _range(values: Iterable[float]) -> str:
    shown = [f"{value:.6g}" for value in sorted(set(values))]
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def _code(name: str) -> str:
    """A name as code, or, where signs in it could end that, as text."""
    return f"`{name}`" if re.fullmatch(r"[\w./:-]+", name) else _text(name)


def _text(value: object) -> str:
    """A value as text that stays in its table cell: nothing in it is HTML, a link or code."""
    return re.sub(r"[\\`*_<>\[\]|&!]", r"\\\g<0>", " ".join(str(value).split()))
