"""What an adapter trains beside its factors: whole modules (`modules_to_save`) and single embedding rows.

PEFT trains every module whose path ends in the letters of a name in `modules_to_save`, within a word too: `norm` is
`input_layernorm` as well. An adapter that PEFT wrote is read so; for one of our own a name that would end a word
elsewhere is an error, so that what was meant is what is trained, here and there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

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
    """The tensors that `config` trains as they are on a model.

    Args:
        parameters: shape of every parameter by its name.
        embedding: path of the input embedding; None if the model has none.
        tied: names of parameters that are another one, by name.
        frozen: names of further parameters, for which there is no gradient.
        targets: paths of the modules with factors.
        strict: whether a name must match something, and nothing but whole parts of paths.

    Returns:
        in the order of `parameters`, embedding rows last.

    Raises:
        UsageError: a name that matches nothing or too much or something without a gradient, a token beyond the
            vocabulary, or rows of a table that is trained or adapted already.
    """
    saved = saved_modules(config.modules_to_save, module_paths([*parameters, *frozen]), strict=strict)
    if held := [name for name in frozen if any(name.startswith(f"{module}.") for module in saved)]:
        raise UsageError(
            f"{held[0]} cannot be trained by the decoder engine: it has no gradient for it",
            where="modules_to_save",
            next_step="leave it out, name the linear modules beside it, or use --engine transformers",
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
    """Paths of the modules that PEFT trains in full for these names, in the order of `paths`.

    Raises:
        UsageError: while `strict`, for a name that matches nothing, that ends a word elsewhere, or whose module lies
            inside another one that is trained in full.
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
