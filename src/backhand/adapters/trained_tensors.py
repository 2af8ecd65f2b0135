"""Tensors that an adapter trains in addition to its factors: whole modules (`modules_to_save`) and embedding rows.

PEFT trains every module whose path ends with the letters of a name in `modules_to_save`, also within a word: `norm`
matches `input_layernorm` too. An adapter that PEFT wrote is read in this way. In our own configurations such a name is
an error, so that Backhand and PEFT train the same, intended modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from backhand.adapters.config import LoRAConfig
from backhand.errors import UsageError
from backhand.nn.lora_parameters import TOKENS, TrainedTensor
from backhand.nn.module_shapes import module_paths
from backhand.words import name_list, nearest_names


def resolve_trained(
    config: LoRAConfig,
    parameters: Mapping[str, tuple[int, ...]],
    embedding: str | None,
    *,
    tied: Mapping[str, str] | None = None,
    frozen: Collection[str] = (),
    targets: Collection[str] = (),
    strict: bool = True,
) -> list[TrainedTensor]:
    """Return the tensors that `config` trains directly on a model.

    Args:
        parameters: shape of every parameter by name.
        embedding: path of the input embedding; None if the model has none.
        tied: by name of a parameter, the name of the parameter that it is tied to.
        frozen: names of further parameters, for which there is no gradient.
        targets: paths of the modules with factors.
        strict: require that names match, and that they match whole parts of paths only.

    Returns:
        the tensors in the order of `parameters`, embedding rows last.

    Raises:
        UsageError: if a name matches nothing, too much, or a parameter without a gradient, a token exceeds the
            vocabulary, or the embedding is already trained or adapted.
    """
    saved = saved_modules(config.modules_to_save, module_paths([*parameters, *frozen]), strict=strict)
    if held := [name for name in frozen if any(name.startswith(f"{module}.") for module in saved)]:
        raise UsageError(
            f"{held[0]} cannot be trained by the decoder engine: it has no gradient for it",
            where="modules_to_save",
            next_step="leave it out, name the linear modules next to it, or use --engine transformers",
        )
    found = [
        TrainedTensor(name, tuple(shape))
        for name, shape in parameters.items()
        if any(name.startswith(f"{module}.") for module in saved)
    ]
    if config.trainable_token_indices:
        others = {*targets, *saved}
        found.append(_token_rows(config.trainable_token_indices, parameters, embedding, tied or {}, others))
    return found


def saved_modules(names: Collection[str], paths: Sequence[str], *, strict: bool = True) -> list[str]:
    """Return the paths of the modules that PEFT trains in full for these names, in the order of `paths`.

    Raises:
        UsageError: if `strict`, for a name that matches nothing, matches within a word, or whose module lies inside
            another one that is trained in full.
    """
    chosen: set[str] = set()
    for name in names:
        hits = [path for path in paths if path.endswith(name)]
        inside_words = [path for path in hits if path != name and not path.endswith(f".{name}")]
        if strict and not hits:
            near = nearest_names(name, paths)
            raise UsageError(
                f"{name!r} matches no module",
                where="modules_to_save",
                why=f"there are {name_list(dict.fromkeys(path.rpartition('.')[2] for path in paths))}",
                next_step=f"did you mean {' or '.join(near)}?" if near else None,
            )
        if strict and inside_words:
            whole = [path for path in hits if path not in inside_words]
            raise UsageError(
                f"{name!r} also ends {name_list(dict.fromkeys(path.rpartition('.')[2] for path in inside_words))}",
                where="modules_to_save",
                why="PEFT compares letters, and would train these as well",
                next_step=f"give whole paths: {name_list(whole)}" if whole else "give whole names",
            )
        chosen.update(hits)
    if strict:
        for path in sorted(chosen):
            if outer := [other for other in chosen if path.startswith(f"{other}.")]:
                raise UsageError(f"{path} lies inside {outer[0]}, which is trained in full", where="modules_to_save")
    return [path for path in paths if path in chosen]


def _token_rows(
    tokens: Sequence[int],
    parameters: Mapping[str, tuple[int, ...]],
    embedding: str | None,
    tied: Mapping[str, str],
    others: Collection[str],
) -> TrainedTensor:
    where = "trainable_token_indices"
    table = f"{embedding}.weight"
    if embedding is None or table not in parameters:
        raise UsageError("the model has no input embedding that is known", where=where)
    vocab, hidden = parameters[table]
    if beyond := [token for token in tokens if token >= vocab]:
        raise UsageError(f"token {beyond[0]} is beyond the vocabulary of {vocab:,}", where=where)
    holders = {embedding, *(name.removesuffix(".weight") for name, base in tied.items() if base == table)}
    if taken := sorted(holders & set(others)):
        raise UsageError(
            f"{taken[0]} is trained in another way already",
            where=where,
            why=f"its weight is the table of {embedding}" if taken[0] != embedding else None,
            next_step="leave it out of target_modules and modules_to_save, or leave the tokens out",
        )
    return TrainedTensor(f"{embedding}.{TOKENS}", (len(tokens), hidden), tuple(tokens))


# Modules of any model that are trained in full in addition to an adapter: PEFT's modules_to_save.
#
# Each of their parameters is replaced by a trained copy. A weight that was tied to another module's is thereby untied,
# and the base weight can be restored. The module's own forward runs, and torch differentiates it like the rest of the
# model.
#
# The trained parameters are those in the model. load_state_dict(assign=True) and some moves put new parameters there,
# which are adopted. A frozen one, or one of another shape, is an error, since it would not be trained.


class SavedModules:
    """The replaced parameters of one model.

    Args:
        model: its parameters are replaced, and become trainable.
        tensors: the parameters to replace; embedding rows among them are ignored.
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
        """Iterate over the trained parameters by name in the model.

        Raises:
            UsageError: if the model has replaced one by a frozen parameter, or by one of another shape.
        """
        for name in self._trained:
            if self._enabled and not self._take_over(name):
                raise UsageError(
                    f"{name} is no longer trained",
                    where="modules_to_save",
                    why="the model has put another parameter in its place, as tie_weights() does",
                    next_step="adapter.enable() restores the trained one",
                )
            yield name, self._trained[name]

    def enable(self) -> None:
        """Compute with the trained parameters.

        Raises:
            UsageError: if a parameter has another shape now; then nothing is replaced.
        """
        self._put(
            {name: self._trained[name] for name in self._trained if not (self._enabled and self._take_over(name))}
        )
        self._enabled = True

    def disable(self) -> None:
        """Compute with the base model's parameters, tied as they were.

        Raises:
            UsageError: if a parameter has another shape now; then nothing is replaced.
        """
        if self._enabled:
            for name in self._trained:
                self._take_over(name)
            self._put(self._base)
            self._enabled = False

    def _standing(self, name: str) -> nn.Parameter:
        """Return the parameter of this name that is currently in the model."""
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
        """Adopt the parameter in the model if it is trainable; return True if it is."""
        standing = self._standing(name)
        if standing is self._trained[name]:
            return True
        own = any(standing is other for other in self._trained.values())
        if own or not standing.requires_grad:
            return False
        self._trained[name] = standing
        return True

    def _put(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put these parameters into the model, on the device and in the dtype of the current ones."""
        leaving = {name: self._standing(name) for name in parameters}
        # A parameter that another module shares has already been moved with the model.
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
    """Return a sentence per parameter that training in full unties from another one.

    Args:
        tied: by name of a parameter, the name of the parameter that it is tied to.
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
