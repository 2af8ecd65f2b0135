"""Loading an adapter from PEFT's files, strictly: exactly what was saved, or one error that lists all that is wrong.

There is no loading in part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import AdapterContents, UnusableAdapterError
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_keys import FactorShapes, match_tensors, slot_shapes
from backhand.adapters.record import AdapterRecord
from backhand.adapters.targets import OUTPUT_HEADS, Target, module_values, resolve_targets, target_slot, trained_beside
from backhand.errors import UsageError
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot, TrainedTensor
from backhand.nn.module_shapes import embeddings_of, experts_of


def match_linear_adapter(
    contents: AdapterContents, module_shapes: Mapping[str, tuple[int, int]], *, heads: Collection[str] = OUTPUT_HEADS
) -> LoadedAdapter:
    """Hold an adapter of linear modules, embeddings and experts that has been read against a model.

    Args:
        module_shapes: (out, in) of every linear module of the model, by dotted path; a `ModuleShapes` also knows
            embeddings and what else can be trained.
        heads: what `all-linear` leaves out, should the file say that.

    Raises:
        UnusableAdapterError: an ArtifactError that lists every problem; see its `problems`.
    """
    config = contents.described.config

    def slots(targets: Sequence[Target]) -> list[LoRASlot]:
        return [target_slot(target, module_shapes, config) for target in targets]

    loaded = match_adapter(
        contents,
        [*module_shapes, *embeddings_of(module_shapes)],
        lambda targets: slot_shapes(slots(targets)),
        linear=module_shapes.keys(),
        heads=heads,
        parameters=list(experts_of(module_shapes)),
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
    parameters: Sequence[str] = (),
    differences: Callable[[Sequence[Target]], list[str]] | None = None,
    trained: Callable[[Sequence[Target]], Sequence[TrainedTensor]] = lambda _: (),
) -> LoadedAdapter:
    """Hold what was read against a model.

    Args:
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
            config = contents.described.config
            targets = resolve_targets(
                config, module_names, linear=linear, heads=heads, parameters=parameters, strict=False
            )
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


def check_base_copies(loaded: LoadedAdapter, base_weight: Callable[[str], Tensor]) -> None:
    """Refuse an adapter whose own copies of base weights are not the model's: it belongs to another or a resized base.

    Raises:
        UnusableAdapterError: names every module whose weight differs.
    """
    if problems := copy_differences(loaded.base_copies, base_weight):
        raise UnusableAdapterError(loaded.directory, problems)


def copy_differences(base_copies: Mapping[str, Tensor], base_weight: Callable[[str], Tensor]) -> list[str]:
    """A sentence for each module whose stored weight is not the model's.

    They are compared in the narrower of the two dtypes, since base and file may have been cast.
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
        described: configuration, base model and task as adapter_config.json has them.
        shapes: what each of them has in the file.
        factors: everything that was trained, by its name in `LoRAParameters`, on the CPU, in the dtype of the file.
        base_copies: whole base weights found beside factors of embeddings and heads, by module; to be compared with the
            base model by who has it.
        slots: for linear modules and embeddings, what `LoRAParameters` takes.
        forced: a sentence for each thing that is not as in training, where the user said to use the adapter anyway.
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
        """What the adapter looks like."""
        return self.described.config

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read over and may interest a person."""
        ranks = [(shape, shape.lora_A[0] // max(1, shape.experts)) for shape in self.shapes]
        wide = [
            f"{shape.name}: rank {rank} is above the smaller side of its weight {shape.weight}"
            for shape, rank in ranks
            if not shape.embedding and rank > min(shape.weight[:2])
        ]
        copies = [f"{name}: the file also holds the whole base weight" for name in self.base_copies]
        return (*self.forced, *self.described.notes, *wide, *copies, *self._overlapping())

    @property
    def beside(self) -> dict[str, str]:
        """By module, what it has that is no plain factors of a linear module; who knows only those must refuse it."""
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
        """Modules whose alpha depends on the order of alpha_pattern's keys, which PEFT loses when it writes."""
        reordered = replace(self.config, alpha_pattern=dict(reversed(list(self.config.alpha_pattern.items()))))
        others = module_values(reordered, [target.name for target in self.targets], strict=False)
        return [
            f"{target.name}: keys of alpha_pattern overlap; alpha {target.alpha:g} is read, as in PEFT, but "
            f"{other.alpha:g} may have been trained"
            for target, other in zip(self.targets, others, strict=True)
            if target.alpha != other.alpha
        ]

    def fill(self, parameters: LoRAParameters) -> None:
        """Copy everything into `parameters`, which must have been built from `slots` and `trained`."""
        if parameters.layout != (self.slots, self.trained):
            raise ValueError("the parameters were built from other slots than the adapter's")
        with torch.no_grad():
            for name, view in parameters.named_tensors():
                view.copy_(self.factors[name])

    def parameters(self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoRAParameters:
        """New `LoRAParameters` that hold the adapter."""
        parameters = LoRAParameters(self.slots, trained=self.trained, device=device, dtype=dtype)
        self.fill(parameters)
        return parameters
