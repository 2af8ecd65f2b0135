"""An adapter from files on the base model, tokenizer and chat template that it was trained with, or an error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from backhand.adapters.contents import AdapterContents, read_adapter_directory
from backhand.adapters.gguf_adapter import is_gguf_file, read_gguf_adapter
from backhand.adapters.loading import LoadedAdapter, copy_differences, match_linear_adapter
from backhand.adapters.record import (
    AdapterRecord,
    base_differences,
    base_digest,
    other_template_args,
    text_digest,
    tokenizer_digest,
    wrong_base,
)
from backhand.adapters.targets import OUTPUT_HEADS
from backhand.adapters.wrapped_names import of_the_text_model
from backhand.errors import ArtifactError, UsageError
from backhand.nn.loading.expert_tensors import matrices_within, may_hold_experts
from backhand.nn.loading.source import ModelSource

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


def load_adapter_for(
    source: ModelSource,
    directory: Path | str,
    module_shapes: Mapping[str, tuple[int, int]],
    *,
    chat_template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    force_base: bool = False,
    allow_pickle: bool = False,
) -> LoadedAdapter:
    """Read an adapter of linear modules, check it completely, and hold the model at hand against its record.

    Args:
        module_shapes: (out, in) of every linear module of the model, by dotted path.
        chat_template: the template in use; None where there is none, or it does not matter.
        template_args: variables it is given; None where they do not matter.
        force_base: use the adapter whatever its files say of its base; what differs stands in its notes.
        allow_pickle: also read adapter_model.bin, with torch's restricted unpickler.

    Raises:
        UnusableAdapterError: an ArtifactError that lists every problem of the files.
        ArtifactError: the adapter was trained with another base model, tokenizer or chat template.
    """
    loaded = match_linear_adapter(read_adapter(directory, source, allow_pickle=allow_pickle), module_shapes)
    forced = check_source(
        loaded.record,
        str(loaded.directory),
        source,
        [target.name for target in loaded.targets],
        chat_template=chat_template,
        template_args=template_args,
        base_copies=loaded.base_copies,
        force_base=force_base,
    )
    return replace(loaded, forced=forced)


def read_adapter(path: Path | str, source: ModelSource | None, *, allow_pickle: bool = False) -> AdapterContents:
    """Read an adapter, in PEFT's format or in a GGUF file, as far as that goes without the model's modules.

    Args:
        source: the base model; PEFT's files are read without it.

    Raises:
        UsageError: a GGUF file, and no base model.
        ArtifactError: there is no adapter, or its configuration cannot be read.
    """
    if is_gguf_file(path):
        if source is None:
            raise UsageError(
                "an adapter in a GGUF file is read beside its base model, and none is given",
                where=str(path),
                why="the names of its modules and the order of their rows are the base model's",
                next_step="give --model",
            )
        return read_gguf_adapter(path, source.config)
    return of_the_text_model(read_adapter_directory(path, allow_pickle=allow_pickle))


def check_source(
    record: AdapterRecord | None,
    where: str,
    source: ModelSource,
    module_names: Iterable[str],
    *,
    chat_template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    base_copies: Mapping[str, Tensor] | None = None,
    force_base: bool = False,
) -> tuple[str, ...]:
    """Refuse a base model, tokenizer or chat template other than those an adapter was trained with.

    Args:
        record: from backhand.json; None, as PEFT's own adapters have it, says nothing.
        chat_template: the template in use; None is not compared.
        template_args: variables it is given, for a note; None is not compared.
        base_copies: whole base weights that the adapter's file holds, by module.

    Returns:
        a sentence for each thing that differs, for people to see: other variables, and with `force_base` all else.

    Raises:
        ArtifactError: names everything that differs.
    """
    different = []
    if record is not None:
        compared = module_names if record.base_digest is not None else ()
        different += base_differences(record, source_digests(source, compared, chat_template=chat_template))
    different += copy_differences(base_copies or {}, lambda module: source.load(base_weight_name(source, module)))
    if different and not force_base:
        raise wrong_base(different, where)
    notes = other_template_args(record, template_args) if record is not None else ()
    return (*(f"used by force: {sentence}" for sentence in different), *notes)


def source_digests(
    source: ModelSource, module_names: Iterable[str], *, chat_template: str | None = None
) -> dict[str, str | None]:
    """base_digest, tokenizer_digest and chat_template_digest, as an adapter's record has them."""
    weights = list(weight_names(module_names, source.tensor_names()))
    return {
        "base_digest": base_digest(weights, source.load_in_pieces) if weights else None,
        "tokenizer_digest": tokenizer_digest(source.tokenizer()),
        "chat_template_digest": text_digest(chat_template),
    }


def base_weight_name(source: ModelSource, module: str) -> str:
    """The name in a model's files of a module's weight. Raises ArtifactError: there is none."""
    for name in weight_names([module], source.tensor_names()):
        return name
    raise ArtifactError(f"the base model has no weight of {module}", where=str(source.path))


def weight_names(module_names: Iterable[str], tensor_names: Iterable[str]) -> Iterator[str]:
    """Names of the modules' weights in a model's files; what is not found there is left out.

    Files may leave out the beginning of a path, as GPT-2's do, and of a tied output head they hold only the embedding.
    A parameter of experts is the matrices of all of them.
    """
    names = list(tensor_names)
    there = set(names)
    for module in module_names:
        if may_hold_experts(module):
            yield from sorted(matrices_within(module, names))
            continue
        name = _named(f"{module}.weight", there)
        if name is None and module in OUTPUT_HEADS:
            name = next((name for name in sorted(there) if name.endswith(_EMBEDDINGS)), None)
        if name is not None:
            yield name


def _named(name: str, there: Collection[str]) -> str | None:
    """The longest end of a dotted name that is there; its last two parts at least."""
    while name not in there:
        if name.count(".") < 2:
            return None
        name = name.partition(".")[2]
    return name
