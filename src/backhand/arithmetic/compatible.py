"""Whether the updates of adapters can be added at all: what their files hold, which base they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backhand.adapters.checked_base import check_source, source_digests
from backhand.adapters.contents import UnusableAdapterError
from backhand.adapters.peft_keys import PREFIX
from backhand.adapters.record import AdapterRecord
from backhand.arithmetic.adapter_factors import AdapterFactors
from backhand.errors import ArtifactError
from backhand.nn.loading.source import ModelSource
from backhand.words import name_list

BASE_COPY = ".base_layer.weight"

_WHAT = {
    ".lora_magnitude_vector": "DoRA scales the sum of base weight and update, which is no update that could be added",
    ".lora_B.bias": "a trained bias beside the factors",
    ".trainable_tokens_delta": "trained rows of an embedding",
}

_DIGESTS = {
    "base_digest": "base model: their adapted weights are not the same",
    "tokenizer_digest": "tokenizer: their tokens or merges are not the same",
    "chat_template_digest": "chat template: it is not the same",
}


def refuse_more_than_factors(adapter: AdapterFactors) -> None:
    """Refuse an adapter that is more than a ΔW for each of its modules.

    A copy of a base weight beside the factors of an embedding or head is no part of the update, and passes.

    Raises:
        UnusableAdapterError: an ArtifactError that names every part.
    """
    problems = [f"{key.removeprefix(PREFIX)}: {_meaning(key)}" for key in adapter.others if not key.endswith(BASE_COPY)]
    if problems:
        raise UnusableAdapterError(
            adapter.directory,
            problems,
            next_step="merge it into its base instead: backhand merge",
        )


def _meaning(key: str) -> str:
    known = next((meaning for suffix, meaning in _WHAT.items() if key.endswith(suffix)), None)
    return known or "a whole module trained beside the factors, which has no update to add"


def check_shapes(adapters: Sequence[AdapterFactors]) -> None:
    """Refuse adapters whose updates of one module are of different sizes or kinds.

    Raises:
        ArtifactError: lists every module, with both shapes.
    """
    first_of: dict[str, AdapterFactors] = {}
    problems = []
    for adapter in adapters:
        for name, module in adapter.modules.items():
            other = first_of.setdefault(name, adapter).modules[name]
            if (module.weight_shape, module.embedding) != (other.weight_shape, other.embedding):
                problems.append(
                    f"{name}: a weight of {other.weight_shape} in {first_of[name].label}, "
                    f"of {module.weight_shape} in {adapter.label}"
                )
    if problems:
        raise ArtifactError(
            f"the adapters do not fit each other in {len(problems)} modules",
            why=name_list(problems, limit=12),
            next_step="combine adapters of one base model",
        )


def common_record(
    adapters: Sequence[AdapterFactors], source: ModelSource | None, *, force_base: bool
) -> tuple[AdapterRecord, tuple[str, ...]]:
    """What backhand.json of a combination says of its base, and what a person should know.

    Args:
        adapters: of one base model, as far as their files tell; that is checked here.
        source: the base model, if it is at hand: then the adapters are held against it.
        force_base: go on where they belong to different ones, and say what differs.

    Raises:
        ArtifactError: they belong to different base models, tokenizers or chat templates; names what differs.
    """
    notes: list[str] = []
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    different = _differences(adapters)
    if different and not force_base:
        raise ArtifactError(
            "the adapters do not belong to the same model",
            why="; ".join(different),
            next_step="combine adapters of one base model, or --force-base to do it all the same",
        )
    notes += [f"combined by force: {sentence}" for sentence in different]
    records = [adapter.record or AdapterRecord() for adapter in adapters]
    agreed: dict[str, Any] = {field: _common([getattr(record, field) for record in records]) for field in _DIGESTS}
    if any(set(adapter.modules) != set(names) for adapter in adapters):
        agreed["base_digest"] = None
    origin = _common([record.origin for record in records])
    if source is not None:
        for adapter in adapters:
            notes += check_source(
                adapter.record, str(adapter.directory), source, adapter.modules, force_base=force_base
            )
        digests = source_digests(source, names)
        agreed |= {"base_digest": digests["base_digest"], "tokenizer_digest": digests["tokenizer_digest"]}
        origin = source.origin
    elif agreed["base_digest"] is None and any(record.base_digest for record in records):
        notes.append("the new adapter does not know its base model's digest: give --model to record it")
    return AdapterRecord(origin=origin, **agreed), tuple(notes)


def _differences(adapters: Sequence[AdapterFactors]) -> list[str]:
    """A sentence for each thing in which the adapters' own files contradict each other."""
    found = []
    for field, sentence in _DIGESTS.items():
        by_digest: dict[str, str] = {}
        for adapter in adapters:
            digest = getattr(adapter.record, field, None)
            # Digests of different sets of weights say nothing about each other.
            comparable = field != "base_digest" or set(adapter.modules) == set(adapters[0].modules)
            if digest is not None and comparable:
                by_digest.setdefault(digest, adapter.label)
        if len(by_digest) > 1:
            each = ", ".join(f"{label}: {digest[7:15]}…" for digest, label in by_digest.items())
            found.append(f"{sentence} ({each})")
    proven = _common([getattr(adapter.record, "base_digest", None) for adapter in adapters]) is not None
    by_name: dict[str, str] = {}
    for adapter in adapters:
        if adapter.described.base_model is not None:
            by_name.setdefault(adapter.described.base_model, adapter.label)
    if len(by_name) > 1 and not proven and not any(sentence.startswith("base model") for sentence in found):
        found.append(f"base model: {'; '.join(f'{name} of {label}' for name, label in by_name.items())}")
    return found


def _common(values: Sequence[str | None]) -> str | None:
    """The value that all have, None if they have not."""
    return values[0] if len(set(values)) == 1 else None
