"""Loading an adapter from PEFT's files, strictly: exactly what was saved, or one error that lists all that is wrong.

There is no loading in part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from backhand.adapters.adapter_directory import AdapterContents, UnusableAdapterError, read_adapter_directory
from backhand.adapters.loaded_adapter import LoadedAdapter
from backhand.adapters.peft_keys import FactorShapes, match_tensors, slot_shapes
from backhand.adapters.targets import OUTPUT_HEADS, Target, resolve_targets, target_slot, trained_beside
from backhand.errors import UsageError
from backhand.nn.lora_parameters import LoRASlot, TrainedTensor
from backhand.nn.module_shapes import embeddings_of


def load_adapter(
    directory: Path | str,
    module_shapes: Mapping[str, tuple[int, int]],
    *,
    heads: Collection[str] = OUTPUT_HEADS,
    allow_pickle: bool = False,
) -> LoadedAdapter:
    """Read an adapter of linear modules and embeddings, and check it completely.

    Args:
        directory: of the adapter, or one that holds a single adapter in a sub-folder.
        module_shapes: (out, in) of every linear module of the model, by dotted path; a `ModuleShapes` also knows
            embeddings and what else can be trained.
        heads: what `all-linear` leaves out, should the file say that.
        allow_pickle: also read adapter_model.bin, with torch's restricted unpickler.

    Raises:
        UnusableAdapterError: an ArtifactError that lists every problem; see its `problems`.
    """
    contents = read_adapter_directory(directory, allow_pickle=allow_pickle)
    return match_linear_adapter(contents, module_shapes, heads=heads)


def match_linear_adapter(
    contents: AdapterContents, module_shapes: Mapping[str, tuple[int, int]], *, heads: Collection[str] = OUTPUT_HEADS
) -> LoadedAdapter:
    """Hold an adapter of linear modules that has been read against a model; arguments and errors as `load_adapter`."""
    config = contents.described.config

    def slots(targets: Sequence[Target]) -> list[LoRASlot]:
        return [target_slot(target, module_shapes, config) for target in targets]

    loaded = match_adapter(
        contents,
        [*module_shapes, *embeddings_of(module_shapes)],
        lambda targets: [slot_shapes(slot) for slot in slots(targets)],
        linear=module_shapes.keys(),
        heads=heads,
        trained=lambda targets: trained_beside(config, module_shapes, [t.name for t in targets], strict=False),
    )
    return replace(loaded, slots=tuple(slots(loaded.targets)))


def match_adapter(
    contents: AdapterContents,
    module_names: Sequence[str],
    shapes: Callable[[Sequence[Target]], list[FactorShapes]],
    *,
    linear: Collection[str] | None = None,
    heads: Collection[str] = (),
    differences: Callable[[Sequence[Target]], list[str]] | None = None,
    trained: Callable[[Sequence[Target]], Sequence[TrainedTensor]] = lambda _: (),
) -> LoadedAdapter:
    """Hold what was read against a model.

    Args:
        contents: of the directory, with the problems found so far.
        module_names: every module that may be adapted.
        shapes: what targets must have in the file.
        linear, heads: for `all-linear`, see `targets.resolve_targets`.
        differences: what more is wrong with the targets, one sentence each; the tensors are then not looked at.
        trained: the tensors trained as they are, beside these targets.

    Raises:
        UnusableAdapterError: lists these problems and those found here.
    """
    problems = list(contents.problems)
    targets: list[Target] = []
    further: list[str] = []
    expected: list[FactorShapes] = []
    beside: Sequence[TrainedTensor] = ()
    if contents.config_usable:
        try:
            # What matches nothing is no problem in itself here: the tensors say what was adapted.
            targets = resolve_targets(contents.described.config, module_names, linear=linear, heads=heads, strict=False)
            further = differences(targets) if differences is not None else []
            if not further:
                expected, beside = shapes(targets), trained(targets)
        except UsageError as error:
            problems.append(error.one_line)
    matched = match_tensors(expected, contents.tensors, module_names, beside, contents.unusable or ())
    if expected and contents.unusable is not None:  # nothing is missing in a file that could not be read
        problems.extend(matched.problems)
    else:
        problems.extend(further)
    if problems:
        raise UnusableAdapterError(contents.directory, problems, contents.described.base_model)
    return LoadedAdapter(
        contents.directory,
        contents.described,
        tuple(targets),
        tuple(expected),
        matched.factors,
        matched.base_copies,
        contents.record,
        trained=tuple(beside),
    )
