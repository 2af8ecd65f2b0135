"""Write an adapter as PEFT's files: adapter_config.json, adapter_model.safetensors, README.md, and our backhand.json.

The same adapter gives the same bytes. Each file is written atomically, the record with the others' digests last.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.adapters.config import ALL_LINEAR
from backhand.adapters.contents import CARD_FILE, CLASSIFIER_FILE, CONFIG_FILE, RECORD_FILE, TENSOR_FILE, tensor_bytes
from backhand.adapters.peft_config import PEFTConfig, peft_config_bytes
from backhand.adapters.peft_keys import PREFIX, FactorShapes, slot_shapes, trained_key
from backhand.adapters.record import AdapterRecord, bytes_digest, installed_packages, record_bytes
from backhand.adapters.targets import Target, module_values, targeted_parameters
from backhand.errors import CheckError
from backhand.nn.loading.wrappers import TRUNK, EncoderWrapper, Wrapper
from backhand.nn.lora_parameters import LoRAParameters, TrainedTensor
from backhand.nn.model_options import peft_code


class AdapterParts(NamedTuple):
    """The parts of an adapter that its files contain."""

    described: PEFTConfig
    targets: Sequence[Target]
    shapes: Sequence[FactorShapes]
    factors: Mapping[str, Tensor]  # all trained tensors, by name in `LoRAParameters`
    trained: Sequence[TrainedTensor] = ()  # the tensors trained directly

    @classmethod
    def of(cls, described: PEFTConfig, parameters: LoRAParameters) -> AdapterParts:
        """Return the parts of an adapter of linear modules, embeddings and experts; its values are written in fp32."""
        targets = module_values(described.config, list(parameters.slots), strict=False)
        for target, slot in zip(targets, parameters.slots.values(), strict=True):
            if (target.rank, target.scaling) != (slot.rank, slot.scaling):
                raise ValueError(f"{slot.name} has rank and scaling other than the configuration's")
        shapes, trained = slot_shapes(parameters.slots.values()), list(parameters.full_tensors.values())
        return cls(described, targets, shapes, dict(parameters.named_tensors()), trained)


def adapter_files(
    parts: AdapterParts,
    *,
    record: AdapterRecord | None = None,
    card: Mapping[str, object] | None = None,
    module_names: Collection[str] | None = None,
    wrapper: Wrapper | None = None,
    classifier_config: bytes | None = None,
) -> dict[str, bytes]:
    """Return the files of an adapter by name, in the order in which to write them.

    Args:
        record: origin and digests for backhand.json; package versions and file digests are added here.
        module_names: all linear modules of the model in transformers; see `peft_config.written_targets`.
        wrapper: the image model that contains this text model, or the class of an encoder with a head; the files then
            use its names.
        classifier_config: config.json of an adapter with a head, see `adapters.classifier_config`.

    Raises:
        CheckError: if a value is not finite.
    """
    described, targets, shapes, factors, trained = parts
    if bad := [name for name, tensor in factors.items() if not bool(torch.isfinite(tensor).all())]:
        raise CheckError(
            f"{len(bad)} of {len(factors)} factors contain values that are not finite",
            where=bad[0],
            next_step="lower the learning rate; nothing was written",
        )
    tensors = {key: factors[name] for module in shapes for name, key, _ in module.tensors()}
    tensors |= {trained_key(tensor): factors[tensor.name] for tensor in trained}
    around = wrapper
    if around is None and described.task_type == HEADLESS_TASK and any(t.name.startswith("model.") for t in targets):
        around = TRUNK
    if isinstance(around, EncoderWrapper):
        described, targets, module_names = in_class(described, targets, around, module_names or ())
    elif around is not None:
        described, targets = in_wrapper(described, targets, around, module_names)
    if around is not None:
        tensors = {PREFIX + around.wrapped_name(key.removeprefix(PREFIX)): tensor for key, tensor in tensors.items()}
    elements = sum(tensor.numel() for tensor in tensors.values())
    contents = {
        CARD_FILE: model_card(described, targets, elements, card or {}, wrapper).encode("utf-8"),
        TENSOR_FILE: tensor_bytes(tensors),
        CONFIG_FILE: peft_config_bytes(described, targets, module_names),
    }
    if classifier_config is not None:
        contents = {CLASSIFIER_FILE: classifier_config, **contents}
    described_files = {name: bytes_digest(data) for name, data in contents.items() if name != CARD_FILE}
    record = replace(record or AdapterRecord(), files=described_files)
    if not record.packages:
        record = replace(record, packages=installed_packages())
    # Last, since it has the others' digests: after a crash in between, loading reports that they do not match.
    contents[RECORD_FILE] = record_bytes(record)
    return contents


HEADLESS_TASK, CLASS_TASK = "FEATURE_EXTRACTION", "SEQ_CLS"
"""PEFT's task types for a model without a head, whose class is AutoModel, and for sequence classification."""
CLASSIFIERS = ("classifier", "pooler", "head", "score")
"""Modules of classification heads. PEFT adds some of these names to `modules_to_save`, whether they exist or not."""
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    HEADLESS_TASK: "AutoModel",
    CLASS_TASK: "AutoModelForSequenceClassification",
}


_LAST_OF_MODEL, _LICENCE = "trained parameters", "licence"
"""Rows of a card before and after those of its run."""


def facts_of_card(directory: Path) -> dict[str, str]:
    """Return the rows about the run from the card that `model_card` wrote into a directory, {} without such a card."""
    try:
        text = (directory / CARD_FILE).read_text("utf-8")
    except (OSError, ValueError):
        return {}
    rows = re.findall(r"^\| (.+?) \| (.*) \|$", text.partition(f"| {_LAST_OF_MODEL} |")[2], re.MULTILINE)
    plain = ([re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in rows)
    facts = dict(itertools.takewhile(lambda row: row[0] != _LICENCE, plain))
    return facts if len(facts) < len(rows) else {}


def model_card(
    described: PEFTConfig,
    targets: Sequence[Target],
    parameters: int,
    facts: Mapping[str, object],
    wrapper: Wrapper | None = None,
) -> str:
    """Return the model card, without a date, so that the same adapter gives the same card.

    Args:
        facts: further rows of the table, such as losses and data, in their order.
    """
    base = described.base_model or ""
    header = ["library_name: peft", "license: unknown"]
    if base:
        header.insert(0, f"base_model: {json.dumps(base)}")
    tags = {"CAUSAL_LM": "text-generation", CLASS_TASK: "text-classification"}
    if described.task_type in tags:
        header.append(f"pipeline_tag: {tags[described.task_type]}")
    header.append('tags: ["lora", "backhand"]')
    table = {
        "base model": _code(base) if base else "not recorded",
        "adapted modules": len(targets),
        "module names": ", ".join(_code(end) for end in sorted({t.name.rpartition(".")[2] for t in targets})),
        "rank": _range(target.rank for target in targets),
        "scaling": _range(target.scaling for target in targets),
        _LAST_OF_MODEL: f"{parameters:,}",
        **{_text(name): _text(value) for name, value in facts.items()},
        _LICENCE: "not said yet: name one in the head of this file; the base model's terms hold as well",
    }
    rows = (f"| {name} | {value} |" for name, value in table.items())
    parts = ("---", *header, "---\n", "# LoRA adapter\n", "Written by Backhand; the files are in PEFT's format.\n")
    code = loading_code(described, wrapper, "path/to/this/directory", json.dumps)
    return "\n".join((*parts, "| | |", "|---|---|", *rows, "", f"```python\n{code}\n```\n"))


def loading_code(
    described: PEFTConfig, wrapper: Wrapper | None, adapter: str, quoted: Callable[[str], str] = repr
) -> str:
    """Return Python code that loads an adapter's directory with PEFT. The arguments are those of `peft_code`."""
    auto_class = _AUTO_CLASSES.get(described.task_type or "")
    if wrapper is not None and described.task_type != CLASS_TASK:
        auto_class = "AutoModelForImageTextToText"
    return peft_code(auto_class, described.base_model or None, adapter, quoted)


def _range(values: Iterable[float]) -> str:
    shown = [f"{value:.6g}" for value in sorted(set(values))]
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def _code(name: str) -> str:
    """Format a name as code, or as text if characters in it could end the code."""
    return f"`{name}`" if re.fullmatch(r"[\w./:-]+", name) else _text(name)


def _text(value: object) -> str:
    """Format a value as plain text of a table cell, in which nothing is HTML, a link or code."""
    return re.sub(r"[\\`*_<>\[\]|&!]", r"\\\g<0>", " ".join(str(value).split()))


# An adapter of a text model under the names of the image model around it, or of a decoder's class without its head.
#
# PEFT matches the names of target_modules against the ends of module paths, and an image model's vision part has a
# q_proj as well. For the whole model, a regular expression over the text model's paths is therefore written if it
# selects exactly the adapted modules, and full paths otherwise. The same holds without the head, since PEFT finds no
# layer number in `layers.0.mlp`.

_IN_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<end>.+)")
NO_OTHER_CHOICE: dict[str, Any] = {"exclude_modules": (), "layers_to_transform": None, "layers_pattern": ()}
"""Fields of a configuration in which target_modules alone selects the modules."""


def in_wrapper(
    described: PEFTConfig, targets: Sequence[Target], wrapper: Wrapper, module_names: Collection[str] | None
) -> tuple[PEFTConfig, tuple[Target, ...]]:
    """Return configuration and targets under the names of the whole model, or of `TRUNK`.

    Args:
        described: configuration and names of the text model.
        module_names: all linear modules of the text model, None if they are not known.
    """
    renamed = tuple(replace(target, name=wrapper.wrapped_name(target.name)) for target in targets)
    names = [target.name for target in targets]
    parameters = set(targeted_parameters(described.config, names))
    modules = [name for name in names if name not in parameters]
    config = replace(
        described.config,
        target_modules=_expression(modules, wrapper, module_names or ()),
        target_parameters=tuple(map(wrapper.wrapped_name, described.config.target_parameters)),
        modules_to_save=tuple(map(wrapper.wrapped_name, described.config.modules_to_save)),
        **NO_OTHER_CHOICE,
    )
    return replace(described, config=config), renamed


def in_class(
    described: PEFTConfig, targets: Sequence[Target], wrapper: EncoderWrapper, module_names: Collection[str]
) -> tuple[PEFTConfig, tuple[Target, ...], tuple[str, ...]]:
    """Return configuration, targets and modules under the names of an encoder's class with a head.

    Lists of names match the ends of paths and stay as they are. An expression has to match the whole path.
    """

    def renamed(given: str | tuple[str, ...]) -> str | tuple[str, ...]:
        is_expression = isinstance(given, str) and given and given.lower() != ALL_LINEAR
        return rf"(?:{re.escape(wrapper.prefix)}\.)?(?:{given})" if is_expression else given

    config = replace(
        described.config,
        target_modules=renamed(described.config.target_modules),
        exclude_modules=renamed(described.config.exclude_modules),
    )
    names = tuple(map(wrapper.wrapped_name, module_names))
    described = replace(described, config=config)
    return described, tuple(replace(target, name=wrapper.wrapped_name(target.name)) for target in targets), names


def _expression(names: Sequence[str], wrapper: Wrapper, module_names: Collection[str]) -> str | tuple[str, ...]:
    """Return an expression or paths that select these modules of the text model and no others of the whole model."""
    whole = tuple(sorted(wrapper.wrapped_name(name) for name in names))
    parts = [_IN_LAYER.fullmatch(name) for name in names]
    ends: dict[str, set[str]] = {}
    for match in parts:
        if match is None:
            return whole
        ends.setdefault(match["end"], set()).add(match["layer"])
    layers = set().union(*ends.values())
    if not layers or any(numbers != layers for numbers in ends.values()):
        return whole
    everywhere = {match["layer"] for name in module_names if (match := _IN_LAYER.fullmatch(name))}
    numbers = r"\d+" if layers == everywhere else f"(?:{'|'.join(sorted(layers, key=int))})"
    inside = "|".join(re.escape(end) for end in sorted(ends))
    return rf"{re.escape(wrapper.wrapped_name('model.layers'))}\.{numbers}\.(?:{inside})"
