"""An adapter from files on the base model, tokenizer and chat template that it was trained with, or an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from backhand.adapters.adapter_record import AdapterRecord, check_base
from backhand.adapters.digests import base_digest, text_digest, tokenizer_digest
from backhand.adapters.peft_files import LoadedAdapter, load_adapter
from backhand.nn.loading.source import ModelSource


def load_adapter_for(
    source: ModelSource,
    directory: Path | str,
    module_shapes: Mapping[str, tuple[int, int]],
    *,
    chat_template: str | None = None,
    force_base: bool = False,
) -> LoadedAdapter:
    """Read an adapter of linear modules, check it completely, and hold the model at hand against its record.

    Args:
        source: the base model at hand.
        directory: of the adapter.
        module_shapes: (out, in) of every linear module of the model, by dotted path.
        chat_template: the template in use; None where there is none, or it does not matter.
        force_base: use the adapter whatever its record says of its base.

    Raises:
        UnusableAdapterError: an ArtifactError that lists every problem of the files.
        ArtifactError: the adapter was trained with another base model, tokenizer or chat template.
    """
    loaded = load_adapter(directory, module_shapes)
    if not force_base:
        names = (target.name for target in loaded.targets)
        check_source(loaded.record, str(loaded.directory), source, names, chat_template=chat_template)
    return loaded


def check_source(
    record: AdapterRecord | None,
    where: str,
    source: ModelSource,
    module_names: Iterable[str],
    *,
    chat_template: str | None = None,
) -> None:
    """Refuse a base model, tokenizer or chat template other than those of an adapter's record.

    Args:
        record: from backhand.json; None, as PEFT's own adapters have it, passes.
        where: the adapter's directory, for the error.
        source: the base model at hand.
        module_names: the adapted modules.
        chat_template: the template in use; None is not compared.

    Raises:
        ArtifactError: names everything that differs.
    """
    if record is None:
        return
    digests = source_digests(source, module_names, chat_template=chat_template)
    check_base(record, where, **digests)


def source_digests(
    source: ModelSource, module_names: Iterable[str], *, chat_template: str | None = None
) -> dict[str, str | None]:
    """base_digest, tokenizer_digest and chat_template_digest, as an adapter's record has them."""
    weights = list(weight_names(module_names, source.tensor_names()))
    return {
        "base_digest": base_digest(weights, source.load) if weights else None,
        "tokenizer_digest": tokenizer_digest(source.tokenizer()),
        "chat_template_digest": text_digest(chat_template),
    }


def weight_names(module_names: Iterable[str], tensor_names: Iterable[str]) -> Iterator[str]:
    """Names of the modules' weights in a model's files, which may leave out the beginning of a path, as GPT-2's do."""
    there = set(tensor_names)
    for module in module_names:
        name = f"{module}.weight"
        while name not in there and "." in name.removesuffix(".weight"):
            name = name.partition(".")[2]
        if name in there:
            yield name
