"""Configuration of an adapter: rank, alpha and target modules, with PEFT's names and meanings.

This file imports no torch: the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from backhand.bounds import Bound, Check, GivenTexts, Options, TextOrTexts, Words, comma_list
from backhand.errors import UsageError

ALL_LINEAR = "all-linear"
_LAYER_WORDS = re.compile(r"(last|first):[1-9]\d{0,5}|\d{1,6}(-\d{1,6})?")
_PLAIN_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


def _is_number_from_zero(number: object) -> bool:
    """Return True if `number` is a valid layer number or token id."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _check_layers(where: str, layers: object) -> None:
    if not isinstance(layers, tuple | list) or not layers or not all(_is_number_from_zero(layer) for layer in layers):
        raise UsageError(f"{layers!r} is not a list of layer numbers, 0 or above", where=where)


def _check_layer_words(where: str, words: object) -> None:
    parts = map(str.strip, words.split(",")) if isinstance(words, str) else ()
    if not isinstance(words, str) or (words and not all(map(_LAYER_WORDS.fullmatch, parts))):
        raise UsageError(
            f"{words!r} does not name layers",
            where=where,
            next_step="for example last:8, first:4, 8-15, or numbers from 0, separated by commas",
        )


def _check_modules(where: str, modules: object) -> None:
    if not isinstance(modules, str):
        _check_names(where, modules, "neither a string nor a list of names")


def _check_names(where: str, names: object, problem: str = "not a list of names") -> None:
    if not isinstance(names, tuple | list | set | frozenset) or any(
        not isinstance(name, str) or not name for name in names
    ):
        raise UsageError(f"{names!r} is {problem}", where=where)


def _check_tokens(where: str, tokens: object) -> None:
    if isinstance(tokens, dict):
        problem = f"rows of {len(tokens)} modules are trained, only the input embedding's can be"
        raise UsageError(problem, where=where)
    if not isinstance(tokens, tuple | list) or not all(_is_number_from_zero(token) for token in tokens):
        raise UsageError(f"{tokens!r} is not a list of token ids, 0 or above", where=where)
    if twice := sorted({token for token in tokens if tokens.count(token) > 1}):
        raise UsageError(f"token {twice[0]} is given twice", where=where)


def parse_names(values: str | Iterable[str]) -> tuple[str, ...]:
    """Split words at commas into names.

    Raises:
        UsageError: if words are given and contain no name, such as an empty shell variable.
    """
    given = [values] if isinstance(values, str) else list(values)
    names = tuple(name for value in given for name in comma_list(value))
    if given and not names:
        raise UsageError(f"{','.join(given)!r} contains no name", next_step="give names, or leave the option out")
    return names


def parse_modules(values: str | Iterable[str]) -> str | tuple[str, ...]:
    """Parse `target_modules` or `exclude_modules` from a command line or a TOML file.

    `all-linear` is kept. `q_proj`, `q_proj,v_proj` and several values are names. A single value is a regular expression
    if a part between its commas has any character other than letters, digits, `_`, `-` and `.`.
    """
    given = [values] if isinstance(values, str) else list(values)
    if len(given) == 1:
        (only,) = given
        if only.lower() == ALL_LINEAR:
            return ALL_LINEAR
        if not all(map(_PLAIN_NAME.fullmatch, comma_list(only) or [only])):
            return only
    return parse_names(given)


def parse_pattern(values: Iterable[str], where: str) -> dict[str, float]:
    """Parse `NAME=NUMBER` strings for `rank_pattern` and `alpha_pattern`; integers stay integers.

    Raises:
        UsageError: if a value has no `=`, an empty name, or no number after it.
    """
    pattern: dict[str, float] = {}
    for value in values:
        name, equals, number = value.rpartition("=")
        try:
            parsed: float = int(number) if re.fullmatch(r"\s*-?\d+\s*", number) else float(number)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise UsageError(f"{value!r} is not of the form NAME=NUMBER", where=where)
        pattern[name] = parsed
    return pattern


Rank = Annotated[int, Bound(at_least=1, noun="rank")]


# Products with it must stay finite in float32.
Alpha = Annotated[float, Bound(above=0, below=1e30, noun="alpha")]
Dropout = Annotated[float, Bound(at_least=0, below=1, noun="dropout")]
Modules = Annotated[TextOrTexts, Check(_check_modules), Words(parse_modules)]
ModuleNames = Annotated[GivenTexts, Check(_check_names), Words(parse_names)]
TokenIds = Annotated[tuple[int, ...], Check(_check_tokens)]


@dataclass(frozen=True)
class LoRAConfig(Options):
    """Configuration of an adapter: size, strength and target modules.

    Raises:
        UsageError: from `validate`, never from the constructor, so that every value can be shown before it is checked.
    """

    rank: Rank = 16
    """Rank of the update: lora_A is (rank, in), lora_B is (out, rank); 8 to 64 is usual."""

    alpha: Alpha = 32.0
    """Strength of the update: it is multiplied by alpha / rank."""

    dropout: Dropout = 0.0
    """Probability that an input element of the low-rank branch is dropped in training."""

    target_modules: Modules = ALL_LINEAR  # type: ignore[assignment]
    """Modules to adapt: `all-linear` (every linear layer but the output head), names such as `q_proj,v_proj`
    (matched against the end of the module path, on whole path parts), or one regular expression for the whole path."""

    target_parameters: ModuleNames = ()  # type: ignore[assignment]
    """Parameters with the matrices of all experts of a layer, to adapt in addition to the modules, such as
    `mlp.experts.gate_up_proj,mlp.experts.down_proj`: names matched against the end of the path. Each expert gets
    factors of its own. Without dropout, DoRA and bias."""

    exclude_modules: Modules = ()  # type: ignore[assignment]
    """Modules to exclude although `target_modules` matches them: names, or one regular expression."""

    rank_pattern: Annotated[Mapping[str, Rank], Words(partial(parse_pattern, where="rank_pattern"))] = field(
        default_factory=dict
    )
    """Other ranks for some modules, as `NAME=RANK`: the first name or regular expression that matches the end of the
    module path wins."""

    alpha_pattern: Annotated[Mapping[str, Alpha], Words(partial(parse_pattern, where="alpha_pattern"))] = field(
        default_factory=dict
    )
    """Other alphas for some modules, as `NAME=ALPHA`, matched as in `rank_pattern`."""

    use_rslora: bool = False
    """Rank-stabilised scaling: alpha / √rank instead of alpha / rank [arXiv:2312.03732]."""

    use_dora: bool = False
    """Train the length of every row of an adapted weight in addition to the low-rank update of its direction
    [arXiv:2402.09353]. Slower: the backward pass multiplies by the weight once more."""

    lora_bias: bool = False
    """Give lora_B a trained bias. Not with `use_dora`, and not for embeddings."""

    modules_to_save: ModuleNames = ()  # type: ignore[assignment]
    """Modules to train in full in addition to the adapter, such as `lm_head`, `embed_tokens` or `model.norm`: names
    matched against the end of the module path. A weight that is tied to another module's is untied from it."""

    trainable_token_indices: TokenIds = ()
    """Ids of tokens whose input embedding is trained directly, such as those of new special tokens. With tied weights,
    the same rows of the output head are trained too."""

    layers: Annotated[str, Check(_check_layer_words)] = ""
    """Adapt only these layers: `last:8`, `first:4`, `8-15`, numbers from 0, or several of them separated by commas.
    Below the lowest adapted layer, nothing is saved and no gradient is computed. A run stores the layer numbers."""

    layers_to_transform: Annotated[tuple[int, ...], Check(_check_layers)] | None = None
    """Adapt only these layers, counted from 0: the first number in the module path. Not with a regular expression in
    `target_modules`."""

    layers_pattern: ModuleNames = ()  # type: ignore[assignment]
    """Names of the layer list in which `layers_to_transform` counts, if it is not the first numbered one."""

    def _check_together(self) -> None:
        if self.use_dora and self.lora_bias:
            raise UsageError(
                "lora_bias and use_dora do not go together",
                where="lora_bias",
                why="PEFT has no such adapter, so that no program could read it",
                next_step="give one of them",
            )
        if not self.target_modules and not self.target_parameters:
            raise UsageError(
                "no modules to adapt",
                where="target_modules",
                next_step=f"give {ALL_LINEAR}, names such as q_proj,v_proj, or a regular expression",
            )
        for name in ("dropout", "use_dora", "lora_bias"):
            if self.target_parameters and getattr(self, name):
                raise UsageError(
                    f"{name} does not go together with target_parameters",
                    where=name,
                    why="PEFT has no such adapter of experts, so that no program could read it",
                    next_step="give one of them",
                )
        self._validate_layers()

    def _validate_layers(self) -> None:
        layers = self.layers_to_transform
        if self.layers and layers is not None:
            raise UsageError(
                "layers and layers_to_transform are both given", where="layers", next_step="give one of them"
            )
        if self.layers and self._targets_are_a_pattern:
            raise _no_layers_of_a_pattern("layers")
        if layers is None:
            if self.layers_pattern:
                raise UsageError(
                    f"{list(self.layers_pattern)!r} is given without layers_to_transform",
                    where="layers_pattern",
                    next_step="give layers_to_transform as well, or leave both out",
                )
            return
        if any(not re.fullmatch(r"[\w-]+", name) for name in self.layers_pattern):
            raise UsageError(
                f"{list(self.layers_pattern)!r} are not plain names of a layer list", where="layers_pattern"
            )
        if self._targets_are_a_pattern:
            raise _no_layers_of_a_pattern("layers_to_transform")

    @property
    def _targets_are_a_pattern(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() != ALL_LINEAR

    def scaling_of(self, rank: int, alpha: float) -> float:
        """Return the multiplier of the low-rank branch: alpha / rank, or alpha / √rank if rank-stabilised."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _no_layers_of_a_pattern(option: str) -> UsageError:
    return UsageError(
        f"{option} works with a list of names, not with a regular expression",
        where="target_modules",
        next_step="put the layer numbers into the regular expression",
    )
