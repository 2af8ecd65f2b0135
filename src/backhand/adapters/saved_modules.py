"""Modules of any model trained in full beside an adapter: PEFT's `modules_to_save`.

Each of their parameters is exchanged for a copy that is trained, so that a weight that was tied to another module's is
so no longer, and the base weight comes back as it was. The module's own forward runs, and torch differentiates it, as
it does the rest of the model.

What is trained is what stands in the model: `load_state_dict(assign=True)` and some moves put new parameters there,
which are taken over; a frozen one, or one of another shape, is an error, since the adapter would train nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from backhand.errors import UsageError
from backhand.nn.lora_parameters import TrainedTensor


class SavedModules:
    """The exchanged parameters of one model.

    Args:
        model: whose parameters are exchanged; they become trainable.
        tensors: which; embedding rows among them are passed over.
    """

    def __init__(self, model: nn.Module, tensors: Sequence[TrainedTensor]) -> None:
        self._model = model
        self._shapes = {tensor.name: torch.Size(tensor.shape) for tensor in tensors if tensor.token_ids is None}
        self._base = {name: self._standing(name) for name in self._shapes}
        self._trained = {name: nn.Parameter(base.detach().clone()) for name, base in self._base.items()}
        self._put_as: dict[str, tuple[torch.device, torch.dtype]] = {}
        self._put(self._trained)
        self._enabled = True

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters by their names in the model.

        Raises:
            UsageError: a frozen parameter stands in the place of one, or one of another shape.
        """
        for name in self._trained:
            if self._enabled and not self._take_over(name):
                raise UsageError(
                    f"{name} is no longer trained",
                    where="modules_to_save",
                    why="the model has put another parameter in its place, as tie_weights() does",
                    next_step="adapter.enable() puts the trained one back",
                )
            yield name, self._trained[name]

    def enable(self) -> None:
        """Compute with the trained parameters.

        Raises:
            UsageError: a parameter has another shape now; nothing is exchanged then.
        """
        self._put(
            {name: self._trained[name] for name in self._trained if not (self._enabled and self._take_over(name))}
        )
        self._enabled = True

    def disable(self) -> None:
        """Compute with the base model's own, which are what they were, tied where they were.

        Raises:
            UsageError: a parameter has another shape now; nothing is exchanged then.
        """
        if self._enabled:
            for name in self._trained:
                self._take_over(name)
            self._put(self._base)
            self._enabled = False

    def _standing(self, name: str) -> nn.Parameter:
        """The parameter of this name in the model as it is now."""
        path, _, attribute = name.rpartition(".")
        try:
            standing = self._model.get_submodule(path)._parameters.get(attribute)
        except AttributeError:
            standing = None
        if standing is None or standing.shape != self._shapes[name]:
            now = "no parameter" if standing is None else str(tuple(standing.shape))
            raise UsageError(
                f"{name} is {now} now and was {tuple(self._shapes[name])} when the adapter was injected",
                where="modules_to_save",
                next_step="change the model first, as with resize_token_embeddings(), and then inject",
            )
        return standing

    def _take_over(self, name: str) -> bool:
        """Whether a trainable parameter stands in the model; the adapter's own from now on."""
        standing = self._standing(name)
        if standing is self._trained[name]:
            return True
        own = any(standing is other for other in self._trained.values())
        if own or not standing.requires_grad:
            return False
        self._trained[name] = standing
        return True

    def _put(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Exchange what stands in the model for these, which follow where it has been moved meanwhile."""
        leaving = {name: self._standing(name) for name in parameters}
        # A parameter that another module holds as well has been moved with the model already.
        registered = {id(parameter) for parameter in self._model.parameters()}
        for name, parameter in parameters.items():
            now = leaving[name].device, leaving[name].dtype
            if id(parameter) not in registered and self._put_as.get(name, now) != now:
                parameter.data = parameter.data.to(*now)
            registered.add(id(parameter))
            path, _, attribute = name.rpartition(".")
            self._model.get_submodule(path)._parameters[attribute] = parameter
            self._put_as[name] = parameter.device, parameter.dtype

    @torch.no_grad()
    def reset(self) -> None:
        """Set the trained parameters back to the base model's values."""
        for name, parameter in self.named_parameters():
            parameter.copy_(self._base[name])


def tied_notes(tensors: Sequence[TrainedTensor], tied: Mapping[str, str]) -> list[str]:
    """A sentence for each parameter that training in full unties from another one.

    Args:
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
