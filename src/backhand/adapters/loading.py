"""Load an adapter from files strictly: exactly the saved adapter, on the base that it was trained with.

An error lists all problems; nothing is loaded in part.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.adapters.base_model import recorded_bases
from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import RECORD_FILE, AdapterContents, UnusableAdapterError, read_adapter_directory
from backhand.adapters.gguf_adapter import is_gguf_file, read_gguf_adapter
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_keys import PREFIX, FactorShapes, factor_of, match_tensors, slot_shapes
from backhand.adapters.peft_saving import CLASS_TASK, NO_OTHER_CHOICE
from backhand.adapters.record import (
    AdapterRecord,
    base_differences,
    base_digest,
    damaged_record,
    other_model_config,
    other_template_args,
    text_digest,
    tokenizer_digest,
    wrong_base,
)
from backhand.adapters.record_shapes import label_problems, vector_problems
from backhand.adapters.targets import OUTPUT_HEADS, Target, adapter_layout, module_values, resolve_targets
from backhand.errors import ArtifactError, UsageError
from backhand.nn.decoder.config_facts import config_facts
from backhand.nn.families.config_fields import UnsupportedModel
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.expert_tensors import expert_matrices, may_hold_experts
from backhand.nn.loading.source import ModelSource
from backhand.nn.loading.wrappers import text_name
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot, TrainedTensor
from backhand.nn.module_shapes import ModuleShapes
from backhand.words import name_list


class Expected(NamedTuple):
    """The tensors that a configuration requires on a model."""

    targets: Sequence[Target]
    shapes: Sequence[FactorShapes]
    trained: Sequence[TrainedTensor] = ()  # tensors trained directly, in addition to the targets
    slots: Sequence[LoRASlot] = ()
    problems: Sequence[str] = ()  # of the targets; without shapes the tensors are not checked


def match_linear_adapter(
    contents: AdapterContents, module_shapes: Mapping[str, tuple[int, int]], base: str | None = None
) -> LoadedAdapter:
    """Check the contents of an adapter of linear modules, embeddings and experts against a model.

    Args:
        module_shapes: (out, in) of every linear module of the model, by dotted path; a `ModuleShapes` also has
            embeddings and other trainable parameters.
        base: the model's name, for an error; None for a module of the caller.

    Raises:
        UnusableAdapterError: lists every problem; see its `problems`.
    """
    shapes = ModuleShapes.of(module_shapes)
    if shapes.class_head is not None and contents.described.task_type == CLASS_TASK:
        contents = _of_the_class(contents, shapes.class_head[0].prefix)
        in_file = {key.removeprefix(PREFIX): tuple(tensor.shape) for key, tensor in contents.tensors.items()}
        shapes = shapes.with_class_head(in_file)
    modules, experts = [*shapes, *shapes.embeddings], list(shapes.experts)
    holders = {name.rpartition(".")[0] for name in experts}
    contents = _of_the_whole_model(_without_unused(contents, shapes.outside), {*modules, *holders})

    def expected(config: LoRAConfig) -> Expected:
        # Names that match nothing are no problem in themselves: the tensors determine the adapted modules.
        targets = resolve_targets(config, modules, linear=shapes, parameters=experts, strict=False)
        slots, trained = adapter_layout(config, shapes, targets, strict=False)
        return Expected(targets, slot_shapes(slots), trained, slots)

    return match_adapter(contents, modules, expected, base)


def _without_unused(contents: AdapterContents, outside: Collection[str]) -> AdapterContents:
    """Leave out the factors of modules that only transformers computes, if they change nothing.

    PEFT adapts BERT's pooler with `dense`. A loss of mean or first states gives it no gradient, so lora_B stays zero.
    """
    factors = {key: factor for key in contents.tensors if (factor := factor_of(key)) and factor[0] in outside}
    changed = {
        module for key, (module, part) in factors.items() if "lora_B" in part and contents.tensors[key].any().item()
    }
    unused = {key for key, (module, _) in factors.items() if module not in changed}
    if not unused:
        return contents
    return replace(contents, tensors={key: x for key, x in contents.tensors.items() if key not in unused})


def match_adapter(
    contents: AdapterContents,
    module_names: Sequence[str],
    expected_by: Callable[[LoRAConfig], Expected],
    base: str | None = None,
) -> LoadedAdapter:
    """Check the contents of an adapter against a model.

    Args:
        expected_by: returns the tensors that a configuration requires; it may raise UsageError.
        base: the model's name, for an error; None for a module of the caller.

    Raises:
        UnusableAdapterError: lists the problems of the files and those of the match.
    """
    problems = list(contents.problems)
    expected = Expected((), ())
    if contents.config_usable:
        try:
            expected = expected_by(contents.described.config)
        except UsageError as error:
            problems.append(error.one_line)
    there = contents.unusable or ()
    matched = match_tensors(expected.shapes, contents.tensors, module_names, expected.trained, there)
    # Missing tensors are not reported for a file that could not be read.
    problems += matched.problems if expected.shapes and contents.unusable is not None else expected.problems
    if problems:
        raise unusable_adapter(contents, problems, module_names, expected.shapes, base)
    return LoadedAdapter(
        contents.directory,
        contents.described,
        tuple(expected.targets),
        tuple(expected.shapes),
        matched.factors,
        matched.base_copies,
        contents.record,
        tuple(expected.slots),
        trained=tuple(expected.trained),
    )


def unusable_adapter(
    contents: AdapterContents,
    problems: Sequence[str],
    module_names: Sequence[str],
    shapes: Sequence[FactorShapes] = (),
    base: str | None = None,
) -> UnusableAdapterError:
    """Return the error for an adapter that does not fit a model.

    If most modules in files without a problem are not in the model, or have another size there, the adapter is that of
    another model. The error then names both models, and no single tensors.

    Args:
        problems: those of the files, and those of the match.
        shapes: shapes that the configuration requires on the model.
        base: the model's name, None for a module of the caller.
    """
    known = {*module_names, *(shape.path or shape.name for shape in shapes)}
    sizes = dict(pair for one in shapes for pair in zip(one.keys(), (one.lora_A[1:], one.lora_B[:1]), strict=True))
    fits: dict[str, bool] = {}
    for key, tensor in contents.tensors.items():
        if found := factor_of(key):
            size = tuple(tensor.shape[1:] if "_A" in found[1] else tensor.shape[:1])
            fits[found[0]] = fits.get(found[0], True) and found[0] in known and size == sizes.get(key, size)
    others = [module for module, fit in fits.items() if not fit]
    if contents.problems or 2 * len(others) <= len(fits):
        return UnusableAdapterError(contents.directory, problems, contents.described.base_model)
    (name, *_) = [*recorded_bases(contents.described, contents.record), None]
    trained_on = f"it was trained on {name}; " if name else ""
    return UnusableAdapterError(
        contents.directory,
        problems,
        what="the adapter does not belong to this model",
        why=f"{trained_on}{len(others)} of {len(fits)} adapted modules are not in {base or 'this model'}, or have "
        f"another size there: {name_list(others, limit=3)}",
        next_step=f"give --model {shlex.quote(name)}" if base and name else "give the model that it was trained on",
    )


def check_base_copies(loaded: LoadedAdapter, base_weight: Callable[[str], Tensor]) -> None:
    """Refuse an adapter whose copies of base weights differ from the model's: it belongs to another or a resized base.

    Raises:
        UnusableAdapterError: names every module whose weight differs.
    """
    if problems := copy_differences(loaded.base_copies, base_weight):
        raise UnusableAdapterError(loaded.directory, problems)


def copy_differences(base_copies: Mapping[str, Tensor], base_weight: Callable[[str], Tensor]) -> list[str]:
    """Return a sentence per module whose stored weight differs from the model's.

    Weights are compared in the narrower of the two dtypes, since base and file may have been cast.
    """
    problems = []
    for name, stored in base_copies.items():
        weight = base_weight(name).detach().cpu()
        dtype = min(stored.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(stored.to(dtype), weight.to(dtype)):
            problems.append(
                f"{name}: the file holds a base weight of its own, and it is not the model's; the adapter was trained "
                "on another base, or with resized embeddings"
            )
    return problems


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter from files, checked completely against a model's modules.

    Attributes:
        described: configuration, base model and task in adapter_config.json.
        shapes: shapes of each target's tensors in the file.
        factors: all trained tensors, by name in `LoRAParameters`, on the CPU, in the dtype of the file.
        base_copies: whole base weights that the file contains next to factors of embeddings and heads, by module; a
            caller with the base model compares them.
        slots: the arguments of `LoRAParameters` for linear modules and embeddings.
        forced: a sentence per difference from training, if the user forced the use of the adapter.
    """

    directory: Path
    described: PEFTConfig
    targets: tuple[Target, ...]
    shapes: tuple[FactorShapes, ...]
    factors: Mapping[str, Tensor]
    base_copies: Mapping[str, Tensor]
    record: AdapterRecord | None
    slots: tuple[LoRASlot, ...] = ()
    forced: tuple[str, ...] = ()
    trained: tuple[TrainedTensor, ...] = ()

    @property
    def config(self) -> LoRAConfig:
        """The adapter's configuration."""
        return self.described.config

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about ignored contents."""
        ranks = [(shape, shape.lora_A[0] // max(1, shape.experts)) for shape in self.shapes]
        wide = [
            f"{shape.name}: rank {rank} is above the smaller side of its weight {shape.weight}"
            for shape, rank in ranks
            if not shape.embedding and rank > min(shape.weight[:2])
        ]
        copies = [f"{name}: the file also holds the whole base weight" for name in self.base_copies]
        return (*self.forced, *self.described.notes, *wide, *copies, *self._overlapping())

    @property
    def beyond_factors(self) -> dict[str, str]:
        """Modules with more than the plain factors of a linear module, and what else they have."""
        kinds = {tensor.name.rpartition(".")[0]: "it is trained in full, or in single rows" for tensor in self.trained}
        for shape in self.shapes:
            if shape.magnitude is not None:
                kinds[shape.name] = "DoRA rescales the sum of base weight and update"
            elif shape.lora_bias is not None:
                kinds[shape.name] = "lora_B has a bias"
            elif shape.embedding:
                kinds[shape.name] = "it is an embedding"
            elif shape.experts:
                kinds[shape.name] = "it holds the matrices of several experts"
        return kinds

    def _overlapping(self) -> list[str]:
        """Return modules whose alpha depends on the order of alpha_pattern's keys, which PEFT does not preserve."""
        reordered = replace(self.config, alpha_pattern=dict(reversed(list(self.config.alpha_pattern.items()))))
        others = module_values(reordered, [target.name for target in self.targets], strict=False)
        return [
            f"{target.name}: keys of alpha_pattern overlap; alpha {target.alpha:g} is read, as in PEFT, but "
            f"{other.alpha:g} may have been trained"
            for target, other in zip(self.targets, others, strict=True)
            if target.alpha != other.alpha
        ]

    def fill(self, parameters: LoRAParameters) -> None:
        """Copy all tensors into `parameters`, which must have been built from `slots` and `trained`."""
        if parameters.layout != (self.slots, self.trained):
            raise ValueError("the parameters were built from other slots than the adapter's")
        with torch.no_grad():
            for name, view in parameters.named_tensors():
                view.copy_(self.factors[name])

    def parameters(self, *, device: torch.device | str = "cpu") -> LoRAParameters:
        """Return new `LoRAParameters` with the adapter's values."""
        parameters = LoRAParameters(self.slots, full_tensors=self.trained, device=device)
        self.fill(parameters)
        return parameters


# Checks of the base model, tokenizer and chat template that the adapter was trained with.


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
    """Read an adapter of linear modules, check it completely, and compare the model with the adapter's record.

    Args:
        module_shapes: (out, in) of every linear module of the model, by dotted path.
        chat_template: the template in use; None if there is none, or it does not matter.
        template_args: the template's variables; None if they do not matter.
        force_base: use the adapter even if its files name another base; its notes list the differences.
        allow_pickle: also read adapter_model.bin, with torch's restricted unpickler.

    Raises:
        UnusableAdapterError: lists every problem of the files.
        ArtifactError: if the adapter was trained with another base model, tokenizer or chat template.
    """
    contents = read_adapter(directory, source, allow_pickle=allow_pickle)
    return checked_adapter(
        contents,
        source,
        module_shapes,
        chat_template=chat_template,
        template_args=template_args,
        force_base=force_base,
    )


def checked_adapter(
    contents: AdapterContents,
    source: ModelSource,
    module_shapes: Mapping[str, tuple[int, int]],
    *,
    chat_template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    force_base: bool = False,
) -> LoadedAdapter:
    """Check an adapter that has been read. Arguments and errors are those of `load_adapter_for`."""
    loaded = match_linear_adapter(contents, module_shapes, source.origin)
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
    """Read an adapter, in PEFT's format or in a GGUF file, as far as possible without the model's modules.

    Args:
        source: the base model; not needed for PEFT's files.

    Raises:
        UsageError: if it is a GGUF file and there is no base model.
        ArtifactError: if there is no adapter, or its configuration cannot be read.
    """
    if is_gguf_file(path):
        if source is None:
            raise UsageError(
                "an adapter in a GGUF file needs its base model, and none is given",
                where=str(path),
                why="the names of its modules and the order of their rows depend on the base model",
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
        record: from backhand.json; None for PEFT's own adapters, for which nothing is compared.
        chat_template: the template in use; None is not compared.
        template_args: the template's variables, for a note; None is not compared.
        base_copies: whole base weights in the adapter's file, by module.

    Returns:
        notes: a sentence per difference in the base's configuration or the template's variables, and with
        `force_base` per difference of any kind.

    Raises:
        ArtifactError: lists all differences, or the fields of the record that do not fit model and tokenizer.
    """
    different = []
    if record is not None:
        compared = module_names if record.base_digest is not None else ()
        digests = source_digests(source, compared, chat_template=chat_template)
        different += base_differences(record, digests)
        same_tokenizer = record.tokenizer_digest in (None, digests["tokenizer_digest"])
        if problems := _contradictions(record, source, same_tokenizer=same_tokenizer):
            raise damaged_record(problems, f"{where}: {RECORD_FILE}")
    different += copy_differences(base_copies or {}, lambda module: source.load(base_weight_name(source, module)))
    if different and not force_base:
        raise wrong_base(different, where)
    notes: tuple[str, ...] = ()
    if record is not None:
        notes = (*other_model_config(record, config_facts(source)), *other_template_args(record, template_args))
    return (*(f"used by force: {sentence}" for sentence in different), *notes)


def _contradictions(record: AdapterRecord, source: ModelSource, *, same_tokenizer: bool) -> list[str]:
    """Return a sentence per field of a record that the model or the tokenizer of its training contradicts."""
    problems = []
    if record.labels and same_tokenizer:
        problems += label_problems(record.labels, source.tokenizer())
    with suppress(UnsupportedModel):  # no other engine computes vectors
        config = decoder_config(source.config)
        problems += vector_problems(record.embedding, config.hidden_size, causal=config.causal)
    return problems


def source_digests(
    source: ModelSource, module_names: Iterable[str], *, chat_template: str | None = None
) -> dict[str, str | None]:
    """Return base_digest, tokenizer_digest and chat_template_digest, as in an adapter's record."""
    weights = list(weight_names(module_names, source.tensor_names()))
    return {
        "base_digest": base_digest(weights, source.load_in_pieces) if weights else None,
        "tokenizer_digest": tokenizer_digest(source.tokenizer()),
        "chat_template_digest": text_digest(chat_template),
    }


def base_weight_name(source: ModelSource, module: str) -> str:
    """Return the name of a module's weight in a model's files. Raises ArtifactError if there is none."""
    for name in weight_names([module], source.tensor_names()):
        return name
    raise ArtifactError(f"the base model has no weight of {module}", where=str(source.path))


def weight_names(module_names: Iterable[str], tensor_names: Iterable[str]) -> Iterator[str]:
    """Iterate over the names of the modules' weights in a model's files; missing weights are left out.

    Files may omit the first parts of a path, as GPT-2's do, and contain only the embedding of a tied output head. A
    parameter of experts stands for the matrices of all of them.
    """
    names = list(tensor_names)
    there = set(names)
    for module in module_names:
        if may_hold_experts(module):
            yield from sorted(expert_matrices(module, names))
            continue
        name = _named(f"{module}.weight", there)
        if name is None and module in OUTPUT_HEADS:
            name = next((name for name in sorted(there) if name.endswith(_EMBEDDINGS)), None)
        if name is not None:
            yield name


def _named(name: str, there: Collection[str]) -> str | None:
    """Return the longest suffix of a dotted name that exists, of at least two parts."""
    while name not in there:
        if name.count(".") < 2:
            return None
        name = name.partition(".")[2]
    return name


# An adapter of an image model's text part, under the text model's names.
#
# It counts as one of the text model if the names in its file lie inside the text model, with either form of the prefix:
# the tensors determine the adapted modules. Tensors of other parts keep their names, and are reported as unexpected.

_IN_A_PATTERN = re.compile(r"(?:model(?:\\?\.))?(?:language_model|text_model)(?:\\?\.)(?:model(?:\\?\.))?")


def of_the_text_model(contents: AdapterContents) -> AdapterContents:
    """Rename the contents to the text model's names if they adapt the text part of an image model."""
    return _renamed(contents, _inside, lambda key: _IN_A_PATTERN.sub(r"model\\.", key))


def _of_the_whole_model(contents: AdapterContents, modules: Collection[str]) -> AdapterContents:
    """Rename the contents if they adapt the class of a decoder without its head, whose names lack `model.`."""
    adapted = {factor[0].replace(".base_layer", "") for key in contents.tensors if (factor := factor_of(key))}
    if not adapted or not all(name not in modules and f"model.{name}" in modules for name in adapted):
        return contents
    # Without `^`, a pattern matches the end of a path, and therefore the longer path as well.
    return _renamed(
        contents,
        lambda key: f"{PREFIX}model.{key.removeprefix(PREFIX)}",
        lambda key: re.sub(r"^\^(?!model\b)", r"^model\\.", key),
    )


def _of_the_class(contents: AdapterContents, prefix: str) -> AdapterContents:
    """Rename the contents of an encoder's class with a head for classification to the names of the encoder."""
    start = f"{PREFIX}{prefix}."
    return _renamed(
        contents,
        lambda key: PREFIX + key.removeprefix(start) if prefix and key.startswith(start) else None,
        lambda key: re.sub(rf"^\^{prefix}\\?\.", "^", key),
    )


def _renamed(
    contents: AdapterContents, name_of: Callable[[str], str | None], pattern_of: Callable[[str], str]
) -> AdapterContents:
    """Return the contents under other names.

    Args:
        name_of: returns the new name of a tensor, or None for a name that stays.
        pattern_of: returns a key of rank_pattern or alpha_pattern, perhaps a regular expression, for the new names.
    """
    names = {key: name_of(key) for key in (*contents.tensors, *(contents.unusable or ()))}
    if all(name is None or name == key for key, name in names.items()):
        return contents

    def renamed(key: str) -> str:
        return names[key] or key

    config = contents.described.config
    modules = {found[0] for key in names if (found := factor_of(renamed(key)))}
    config = replace(
        config,
        target_modules=tuple(sorted(modules)),
        **NO_OTHER_CHOICE,
        rank_pattern={pattern_of(key): value for key, value in config.rank_pattern.items()},
        alpha_pattern={pattern_of(key): value for key, value in config.alpha_pattern.items()},
        modules_to_save=tuple(text_name(name) or name for name in config.modules_to_save),
    )
    return replace(
        contents,
        described=replace(contents.described, config=config),
        tensors={renamed(key): tensor for key, tensor in contents.tensors.items()},
        stored_bytes={renamed(key): size for key, size in contents.stored_bytes.items() if key in names},
        unusable=None if contents.unusable is None else [renamed(key) for key in contents.unusable],
    )


def _inside(key: str) -> str | None:
    if not key.startswith(PREFIX):
        return None
    name = text_name(key.removeprefix(PREFIX))
    return None if name is None else PREFIX + name
