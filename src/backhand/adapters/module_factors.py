"""The factors of an adapter by module, independent of the file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from backhand.adapters.contents import AdapterContents, UnusableAdapterError
from backhand.adapters.loading import LoadedAdapter
from backhand.adapters.peft_keys import FactorShapes, factor_of
from backhand.adapters.targets import Target, resolve_targets
from backhand.errors import UsageError
from backhand.nn.loading.expert_tensors import expert_parameter, expert_slices, stack_layout
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot, expert_factors


@dataclass(frozen=True)
class ModuleFactors:
    """One adapted module: delta_weight = scaling · lora_B @ lora_A."""

    lora_A: Tensor  # (rank, in); for a convolution `in` includes the kernel, for an embedding it is the vocabulary
    lora_B: Tensor  # (out, rank)
    scaling: float  # alpha / rank, or the rank-stabilised scaling
    # DoRA's m, (out,): the length of each row of weight + delta_weight after rescaling; None without DoRA
    magnitude: Tensor | None = None
    embedding: bool = False  # True if the weight is (in, out), as an embedding's is
    # sizes of a convolution's kernel, which are axes of lora_A and lora_B in a file; () for other modules
    kernel: tuple[int, ...] = ()

    @classmethod
    def from_file(
        cls, lora_A: Tensor, lora_B: Tensor, scaling: float, *, magnitude: Tensor | None = None, embedding: bool = False
    ) -> ModuleFactors:
        """Return the factors from a file, where those of a convolution have the axes of its kernel."""
        kernel = tuple(lora_A.shape[2:])
        return cls(lora_A.flatten(1), lora_B.flatten(1), scaling, magnitude, embedding, kernel)

    def in_file(self) -> tuple[Tensor, Tensor]:
        """Return lora_A and lora_B with the axes of a convolution's kernel."""
        lora_A = self.lora_A.reshape(self.rank, -1, *self.kernel)
        return lora_A, self.lora_B.reshape(*self.lora_B.shape, *(1 for _ in self.kernel))

    @property
    def rank(self) -> int:
        """The number of rows of lora_A."""
        return self.lora_A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the update."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the frozen weight in the model."""
        out_features, in_features = self.shape
        if self.embedding:
            return in_features, out_features
        return (out_features, in_features // prod(self.kernel), *self.kernel)

    def scaled_to(self, scaling: float) -> ModuleFactors:
        """Return the same delta_weight with another scaling; the quotient is folded into lora_B in float64.

        If both scalings are equal up to float64 rounding, lora_B keeps its bits.
        """
        quotient = self.scaling / scaling
        if abs(quotient - 1) < 1e-12:
            return replace(self, scaling=scaling)
        folded = (self.lora_B.double() * quotient).to(torch.promote_types(self.lora_B.dtype, torch.float32))
        return replace(self, lora_B=folded, scaling=scaling)

    def padded_to(self, rank: int) -> ModuleFactors:
        """Return the same delta_weight at a higher rank, padded with rows and columns of zeros."""
        more = rank - self.rank
        if more == 0:
            return self
        return replace(
            self,
            lora_A=torch.nn.functional.pad(self.lora_A, (0, 0, 0, more)),
            lora_B=torch.nn.functional.pad(self.lora_B, (0, more)),
        )


Factors = Mapping[str, ModuleFactors]
"""By dotted module path."""


def factors_of(loaded: LoadedAdapter) -> dict[str, ModuleFactors]:
    """Return the modules of a loaded adapter in float32 or wider, without tensors that are trained directly.

    A parameter of experts becomes one linear module per expert, by its name in files on the hub.
    """

    def factor(name: str) -> Tensor:
        tensor = loaded.factors[name]
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    found: dict[str, ModuleFactors] = {}
    for target, shape in zip(loaded.targets, loaded.shapes, strict=True):
        lora_A, lora_B = factor(f"{target.name}.lora_A"), factor(f"{target.name}.lora_B")
        if shape.experts:
            found |= _of_experts(target, lora_A, lora_B, shape)
            continue
        found[target.name] = ModuleFactors.from_file(
            lora_A,
            lora_B,
            target.scaling,
            magnitude=factor(f"{target.name}.lora_magnitude") if shape.magnitude is not None else None,
            embedding=shape.embedding,
        )
    return found


def factors_without_model(
    contents: AdapterContents,
) -> tuple[dict[str, ModuleFactors], list[Target], dict[str, Tensor]]:
    """Return the factors in an adapter's files, which are not compared with a model.

    Returns:
        modules by dotted path in the order of the file, in the stored dtype; rank, alpha and scaling of the same
        modules; and tensors that are no factors, by their name in the file.

    Raises:
        UnusableAdapterError: lists the problems of the files, and modules whose factors contradict each other or the
            configuration.
    """
    problems = list(contents.problems)
    factors: dict[str, dict[str, Tensor]] = {}
    embeddings, others = set(), {}
    for key, tensor in contents.tensors.items():
        module, suffix = factor_of(key) or ("", "")
        letter = "A" if "_A" in suffix else "B"
        if not suffix or letter in factors.get(module, ()):
            others[key] = tensor
            continue
        factors.setdefault(module, {})[letter] = tensor
        if "embedding" in suffix:
            embeddings.add(module)
    targets: list[Target] = []
    if factors and not problems:
        try:
            chosen = resolve_targets(contents.described.config, list(factors), heads=(), strict=False)
            targets = [target for target in chosen if target.name in factors]
        except UsageError as error:
            problems.append(error.one_line)
        unadapted = [] if problems else [name for name in factors if name not in {one.name for one in targets}]
        problems += [f"{name}: the configuration does not adapt this module" for name in unadapted]
    modules = {}
    for target in targets:
        lora_A, lora_B = factors[target.name]["A"], factors[target.name]["B"]
        paired = min(lora_A.dim(), lora_B.dim()) > 1 and prod(lora_B.shape[2:]) == 1 and len(lora_A) == lora_B.shape[1]
        if not paired:
            shapes = f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}"
            problems.append(f"{target.name}: {shapes} do not belong together")
        elif len(lora_A) != target.rank:
            problems.append(f"{target.name}: rank {len(lora_A)} in the file, {target.rank} by the configuration")
        else:
            is_embedding = target.name in embeddings
            modules[target.name] = ModuleFactors.from_file(lora_A, lora_B, target.scaling, embedding=is_embedding)
    if problems:
        raise UnusableAdapterError(contents.directory, problems)
    return modules, targets, others


def _of_experts(target: Target, lora_A: Tensor, lora_B: Tensor, shape: FactorShapes) -> dict[str, ModuleFactors]:
    """Return the experts' linear modules; modules of one expert with the same input share lora_A."""
    each_A, each_B = expert_factors(lora_A, lora_B, shape.experts)
    matrices = expert_slices(target.name, shape.experts, lora_B.shape[0], interleaved=shape.interleaved)
    return {
        module: ModuleFactors(each_A[piece.expert], piece.view(each_B), target.scaling) for module, piece in matrices
    }


def parameters_of(factors: Factors, model_type: object) -> LoRAParameters:
    """Return the parameters of the decoder engine for models of this type, on the CPU in float32."""
    turns = stack_layout(model_type).interleaved
    modules: dict[str, ModuleFactors] = {}
    experts: dict[str, dict[str, ModuleFactors]] = {}
    for name, one in factors.items():
        parameter = expert_parameter(f"{name}.weight")
        if parameter is None:
            modules[name] = one
        else:
            experts.setdefault(parameter, {})[name] = one
    slots = [
        LoRASlot(name, one.lora_A.shape[1], one.lora_B.shape[0], one.rank, one.scaling, embedding=one.embedding)
        for name, one in modules.items()
    ]
    parameters = LoRAParameters([*slots, *(_expert_slot(name, members, turns) for name, members in experts.items())])
    for name, one in modules.items():
        parameters.lora_A(name).copy_(one.lora_A)
        parameters.lora_B(name).copy_(one.lora_B)
    for name, members in experts.items():
        slot = parameters.slots[name]
        lora_A, lora_B = expert_factors(parameters.lora_A(name), parameters.lora_B(name), slot.experts)
        for module, piece in expert_slices(name, slot.experts, slot.out_features, interleaved=slot.interleaved):
            lora_A[piece.expert] = members[module].lora_A
            piece.view(lora_B).copy_(members[module].lora_B)
    return parameters


def _expert_slot(parameter: str, members: Factors, turns: bool) -> LoRASlot:
    """Return the slot of one parameter's experts, whose linear modules share lora_A if they share their input."""
    one = next(iter(members.values()))
    parts = len({name.rpartition(".")[2] for name in members})
    out_features, experts = parts * one.lora_B.shape[0], len(members) // parts
    interleaved, in_features = turns and parts > 1, one.lora_A.shape[1]
    return LoRASlot(
        parameter, in_features, out_features, one.rank, one.scaling, experts=experts, interleaved=interleaved
    )
