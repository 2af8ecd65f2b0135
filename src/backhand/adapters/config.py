"""What the adapter looks like: rank, alpha, which modules. The names and the meaning are PEFT's.

This file imports no torch: the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from backhand.errors import UsageError

ALL_LINEAR = "all-linear"
_PLAIN_NAMES = re.compile(r"[\w-]+(\.[\w-]+)*(,[\w-]+(\.[\w-]+)*)*")


@dataclass(frozen=True)
class LoRAConfig:
    """The adapter: how large, how strong, and on which modules.

    Raises:
        UsageError: from `validate`, never from the constructor, so that every value can be shown before it is judged.
    """

    rank: int = 16
    """Rank of the update: lora_A is (rank, in), lora_B is (out, rank). At least 1; 8 to 64 is usual."""

    alpha: float = 32.0
    """Strength of the update: it is multiplied by alpha / rank. Above 0."""

    dropout: float = 0.0
    """Probability that an input element of the low-rank branch is dropped in training, in [0, 1)."""

    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """Modules to adapt: `all-linear` (every linear layer but the output head), names such as `q_proj,v_proj`
    (matched against the end of the module path, on whole path parts), or one regular expression for the whole path."""

    exclude_modules: str | tuple[str, ...] = ()
    """Modules to leave alone although `target_modules` matches them: names, or one regular expression."""

    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some modules, as `NAME=RANK`: the first name or regular expression that matches the end of the
    module path wins."""

    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas for some modules, as `NAME=ALPHA`, matched as in `rank_pattern`."""

    use_rslora: bool = False
    """Rank-stabilised scaling: alpha / √rank in place of alpha / rank [arXiv:2312.03732]."""

    use_dora: bool = False
    """Train the length of every row of an adapted weight besides the low-rank update of its direction
    [arXiv:2402.09353]. Takes more time: the weight is multiplied once more in the backward pass."""

    lora_bias: bool = False
    """Give lora_B a trained bias. Not with `use_dora`, and not for embeddings."""

    modules_to_save: tuple[str, ...] = ()
    """Modules to train in full beside the adapter, such as `lm_head`, `embed_tokens` or `model.norm`: names matched
    against the end of the module path. A weight that is tied to another module's is untied from it."""

    trainable_token_indices: tuple[int, ...] = ()
    """Ids of tokens whose input embedding is trained as it is, such as those of new special tokens. With tied weights
    their rows of the output head are the same, and trained along."""

    layers_to_transform: tuple[int, ...] | None = None
    """Adapt only these layers, counted from 0: the first number in the module path. Not with a regular expression in
    `target_modules`."""

    layers_pattern: tuple[str, ...] = ()
    """Names of the layer list that `layers_to_transform` counts in, if it is not the first numbered one."""

    def validate(self) -> LoRAConfig:
        """Check every field by itself and against the others; what they match is checked by `resolve_slots`.

        Returns:
            self, so that calls chain.

        Raises:
            UsageError: names the field, its value and the range it must lie in.
        """
        check_rank("rank", self.rank)
        check_alpha("alpha", self.alpha)
        check_dropout("dropout", self.dropout)
        check_modules("target_modules", self.target_modules)
        if not self.target_modules:
            raise UsageError(
                "no modules to adapt",
                where="target_modules",
                next_step=f"give {ALL_LINEAR}, names such as q_proj,v_proj, or a regular expression",
            )
        check_modules("exclude_modules", self.exclude_modules)
        for key, rank in self.rank_pattern.items():
            check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in self.alpha_pattern.items():
            check_alpha(f"alpha_pattern[{key!r}]", alpha)
        for name in ("use_rslora", "use_dora", "lora_bias"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{getattr(self, name)!r} is neither true nor false", where=name)
        if self.use_dora and self.lora_bias:
            raise UsageError(
                "lora_bias and use_dora do not go together",
                where="lora_bias",
                why="PEFT has no such adapter, so nothing could read it",
                next_step="give one of them",
            )
        check_modules("modules_to_save", self.modules_to_save)
        check_tokens("trainable_token_indices", self.trainable_token_indices)
        self._validate_layers()
        return self

    def _validate_layers(self) -> None:
        layers = self.layers_to_transform
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
        if not layers or not all(is_layer_number(number) for number in layers):
            raise UsageError(
                f"{list(layers)!r} is not a list of layer numbers, 0 or above", where="layers_to_transform"
            )
        if isinstance(self.target_modules, str) and self.target_modules.lower() != ALL_LINEAR:
            raise UsageError(
                "layers_to_transform works with a list of names, not with a regular expression",
                where="target_modules",
                next_step="put the layer numbers into the regular expression",
            )

    def scaling_of(self, rank: int, alpha: float) -> float:
        """The multiplier of the low-rank branch: alpha / rank, or alpha / √rank if rank-stabilised."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def is_layer_number(number: object) -> bool:
    """Whether `number` can count a layer: an integer of at least 0."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def check_rank(where: str, rank: object) -> None:
    """Raise UsageError unless `rank` is an integer of at least 1."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UsageError(f"rank {rank!r} is not an integer of at least 1", where=where)


def check_alpha(where: str, alpha: object) -> None:
    """Raise UsageError unless `alpha` is a finite number above 0."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e30:
        raise UsageError(f"alpha {alpha!r} is not a finite number above 0", where=where)


def check_dropout(where: str, dropout: object) -> None:
    """Raise UsageError unless `dropout` is a number in [0, 1)."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UsageError(f"dropout {dropout!r} is not a number in [0, 1)", where=where)


def check_modules(where: str, modules: object) -> None:
    """Raise UsageError unless `modules` is a string or a sequence of non-empty strings."""
    if isinstance(modules, str):
        return
    if not isinstance(modules, tuple | list | set | frozenset) or any(
        not isinstance(name, str) or not name for name in modules
    ):
        raise UsageError(f"{modules!r} is neither a string nor a list of names", where=where)


def check_tokens(where: str, tokens: object) -> None:
    """Raise UsageError unless `tokens` is a list of token ids, none of them twice."""
    if not isinstance(tokens, tuple | list) or not all(is_layer_number(token) for token in tokens):
        raise UsageError(f"{tokens!r} is not a list of token ids, 0 or above", where=where)
    if twice := sorted({token for token in tokens if tokens.count(token) > 1}):
        raise UsageError(f"token {twice[0]} is given twice", where=where)


def parse_names(values: str | Iterable[str]) -> tuple[str, ...]:
    """Names from words that may hold several, separated by commas."""
    given = [values] if isinstance(values, str) else values
    return tuple(name.strip() for value in given for name in value.split(",") if name.strip())


def parse_modules(values: str | Iterable[str]) -> str | tuple[str, ...]:
    """What a command line or a TOML file gives for `target_modules` or `exclude_modules`, as the field wants it.

    `all-linear` stays as it is; `q_proj`, `q_proj,v_proj` and several values are names; one value with any other
    character than letters, digits, `_`, `-`, `.` and `,` is a regular expression.
    """
    given = [values] if isinstance(values, str) else list(values)
    if len(given) == 1:
        (only,) = given
        if only.lower() == ALL_LINEAR:
            return ALL_LINEAR
        if not _PLAIN_NAMES.fullmatch(only):
            return only
    return parse_names(given)


def parse_pattern(values: Iterable[str], where: str) -> dict[str, float]:
    """`NAME=NUMBER` strings as a mapping: integers where written so, for `rank_pattern` and `alpha_pattern`.

    Raises:
        UsageError: a value without `=`, with an empty name, or with something else than a number behind it.
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
