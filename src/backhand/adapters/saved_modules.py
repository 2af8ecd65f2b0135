"""Modules of any model trained in full beside an adapter: PEFT's `modules_to_save`.

Each of their parameters is exchanged for a copy that is trained, so that a weight that was tied to another module's is
so no longer, and the base weight comes back as it was. The module's own forward runs, and torch differentiates it, as
it does the rest of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from backhand.nn.lora_parameters import TrainedTensor


class SavedModules:
    """The exchanged parameters of one model.

    Args:
        model: whose parameters are exchanged; they become trainable.
        tensors: which; embedding rows among them are passed over.
    """

    def __init__(self, model: nn.Module, tensors: Sequence[TrainedTensor]) -> None:
        self._places: list[tuple[nn.Module, str]] = []
        self._base: list[nn.Parameter] = []
        self._trained: dict[str, nn.Parameter] = {}
        for tensor in tensors:
            if tensor.token_ids is not None:
                continue
            path, _, attribute = tensor.name.rpartition(".")
            owner = model.get_submodule(path)
            base = owner._parameters[attribute]
            assert base is not None
            self._places.append((owner, attribute))
            self._base.append(base)
            self._trained[tensor.name] = nn.Parameter(base.detach().clone())
        self.enable()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters by their names in the model."""
        yield from self._trained.items()

    def enable(self) -> None:
        """Compute with the trained parameters."""
        self._put(list(self._trained.values()))

    def disable(self) -> None:
        """Compute with the base model's own, which are what they were, tied where they were."""
        self._put(self._base)

    def _put(self, parameters: Sequence[nn.Parameter]) -> None:
        for (owner, attribute), parameter in zip(self._places, parameters, strict=True):
            owner._parameters[attribute] = parameter

    @torch.no_grad()
    def reset(self) -> None:
        """Set the trained parameters back to the base model's values."""
        for base, parameter in zip(self._base, self._trained.values(), strict=True):
            parameter.copy_(base)


def tied_notes(tensors: Sequence[TrainedTensor], tied: Mapping[str, str]) -> list[str]:
    """A sentence for each parameter that training in full unties from another one.

    Args:
        tensors: what is trained.
        tied: names of parameters that are another one, by name.
    """
    names = {tensor.name for tensor in tensors}
    notes = []
    for name, base in tied.items():
        for trained, other in ((name, base), (base, name)):
            if trained in names:
                notes.append(
                    f"{trained}: it is tied to {other}; training it in full unties them, and {other} "
                    f"{'is trained on its own' if other in names else 'stays as it is'}"
                )
    return notes
