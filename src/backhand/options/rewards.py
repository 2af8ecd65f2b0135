"""Options of sampling and rewarding answers, named as in TRL's GRPOConfig or accepting its names as well.

Names of reward functions are checked before anything is loaded; no function is imported or called here. This file
imports no torch, because `--help` imports it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import regex

from backhand.bounds import Also, Bound, Check, Count, GivenTexts, Options, Positive
from backhand.errors import UsageError
from backhand.words import name_list, nearest_names, shorten

NO_PROCESS = 75
"""Exit code of the functions' process where the system does not start the one that ends it with its parent."""
GYM = "reasoning_gym"
PLAIN = ("exact", "number")
WITH_ARGUMENT = ("regex", "json", "length", GYM)
_MOST_PATTERN_CHARACTERS = 20_000


class RewardName(NamedTuple):
    """Parts of a reward function's name."""

    kind: str  # `exact`, `number`, `regex`, `json`, `length`, `reasoning_gym`, `file` or `module`
    place: str = ""  # file or module before the last colon; argument of a built-in reward
    function: str = ""  # function in the file or module

    @property
    def shown(self) -> str:
        """Name in the metrics."""
        return self.function or self.kind


def parse_name(name: str) -> RewardName:
    """Split a name into its parts without checking them."""
    kind, _, argument = name.partition(":")
    if kind in PLAIN or kind in WITH_ARGUMENT:
        return RewardName(kind, argument)
    place, _, function = name.rpartition(":")
    return RewardName("file" if place.endswith(".py") else "module", place, function)


def shown_names(names: tuple[str, ...]) -> list[str]:
    """Return the names in the metrics, with a number appended to equal names."""
    shown = [parse_name(name).shown for name in names]
    return [one if shown.count(one) == 1 else f"{one}_{i + 1}" for i, one in enumerate(shown)]


def check_name(where: str, name: object) -> None:
    """Raise UsageError if this is not the name of a reward function, or if it names a file that does not exist."""
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"{name!r} is not the name of a reward function", where=where)
    found = parse_name(name)
    problem = why = None
    near: list[str] = []
    closest: list[str] = []
    if found.kind in WITH_ARGUMENT and not found.place:
        problem = f"{name} needs an argument after a colon"
    elif found.kind in PLAIN and ":" in name:
        problem = f"{found.kind} takes no argument after a colon"
    elif found.kind == "length" and not (found.place.isdecimal() and len(found.place) < 10 and int(found.place)):
        problem = f"{found.place!r} is not a number of tokens"
    elif found.kind == "regex" and len(found.place) > _MOST_PATTERN_CHARACTERS:
        problem = f"a pattern of {len(found.place):,} characters is longer than {_MOST_PATTERN_CHARACTERS:,}"
    elif found.kind == "regex":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # FutureWarning about sets whose meaning may change
                regex.compile(found.place)
        except (regex.error, RecursionError, OverflowError) as error:
            problem, why = f"{shorten(found.place)!r} is not a regular expression", str(error)
    elif found.kind in ("file", "json") and not Path(found.place).is_file():
        problem, place = f"there is no file {found.place}", Path(found.place)
        files = sorted(file.name for file in place.parent.glob(f"*{place.suffix}")) if place.suffix else []
        closest = nearest_names(place.name, files, count=1, cutoff=0.7)
        near = [str(place.parent / file) for file in closest or files]
    elif found.kind in ("file", "module") and not (found.place and found.function.isidentifier()):
        problem = f"{name!r} is neither a built-in reward nor of the form MODULE:FUNCTION or FILE.py:FUNCTION"
        near = closest = nearest_names(name.partition(":")[0], (*PLAIN, *WITH_ARGUMENT), count=1, cutoff=0.7)
    if problem is not None:
        raise UsageError(
            problem,
            where=where,
            why=why,
            next_step=f"did you mean {near[0]}?"
            if closest
            else f"the files there are {name_list(near)}"
            if near
            else "built in are exact, number, regex:PATTERN, json:SCHEMA.json, length:TOKENS, reasoning_gym:TASK",
        )


SAMPLING = ("max_new_tokens", "temperature", "top_p")
"""Options of sampling, which objectives without rewards use as well."""
Loss = Literal["grpo", "dr_grpo", "dapo", "rloo"]
ScaleRewards = Literal["group", "batch", "none"]
_Clip = Annotated[float, Bound(above=0, below=1)]


def check_names(where: str, names: Any) -> None:
    """Raise UsageError unless all of these are names of reward functions."""
    for function in names if isinstance(names, tuple | list) else (names,):
        if callable(function):
            name = getattr(function, "__name__", "name")
            raise UsageError(
                f"{shorten(repr(function))} is a function, not the name of one",
                where=where,
                why="reward functions run in their own process, which imports them by name",
                next_step=f'write it to a file, and give {where}=["file.py:{name if name.isidentifier() else "name"}"]',
            )
    if not isinstance(names, tuple | list):
        raise UsageError(f"{names!r} is not a list of reward functions", where=where)
    for name in names:
        check_name(where, name)


def check_weights(reward: Sequence[str], weights: Sequence[float]) -> None:
    """Raise UsageError if there are weights, but not one for each reward function."""
    if weights and len(weights) != len(reward):
        raise UsageError(
            f"{len(weights)} weights for {len(reward)} reward functions",
            where="reward_weights",
            next_step="give one for each of --reward, in their order",
        )


@dataclass(frozen=True)
class RewardOptions(Options):
    """Answers that the model samples and their rewards (objectives `grpo`, `bake` and `sdft`)."""

    reward: Annotated[GivenTexts, Check(check_names)] = ()  # type: ignore[assignment]
    """Reward functions: functions with TRL's signature as `module:function` or `file.py:function`, or `exact`,
    `number`, `regex:PATTERN`, `json:SCHEMA.json`, `length:TOKENS`, `reasoning_gym:TASK`. See docs/rewards.md."""

    reward_weights: tuple[float, ...] = ()
    """Weight of each reward function in the sum. Default: 1 each."""

    reward_timeout: Positive = 60.0
    """Seconds that a reward function may take for the answers of one step. After that, the run ends with an error."""

    group: Annotated[int, Bound(at_least=2), Also("num_generations")] = 8
    """Number of sampled answers per prompt, which are compared with one another."""

    max_new_tokens: Annotated[Count, Also("max_completion_length")] = 256
    """Longest answer, in tokens."""

    temperature: Annotated[float, Bound(above=0.01)] = 1.0
    """Divisor of the logits, in sampling and in training alike."""

    top_p: Annotated[float, Bound(above=0, at_most=1)] = 1.0
    """Sample only from the most probable tokens that together reach this probability; 1 samples from all tokens."""

    loss: Loss = "dapo"
    """Normalization of the loss over the tokens of a step: `grpo` (arXiv 2402.03300), `dr_grpo` (2503.20783), `dapo`
    (2503.14476) or `rloo` (2402.14740); see `backhand.ops.grpo`."""

    scale_rewards: ScaleRewards | None = None
    """Divisor of an answer's advantage over the mean of its group: the standard deviation of the `group`, of the whole
    `batch`, or `none`. Default: `group`; for `dr_grpo` and `rloo` `none`, as in their papers."""

    epsilon: Annotated[_Clip, Also("clip")] = 0.2
    """Clipping range: largest relative decrease of a token's probability during the updates of a batch before its
    gradient is zero."""

    epsilon_high: Annotated[float, Bound(above=0)] | None = None
    """Clipping range for increases. Default: `epsilon`."""

    num_iterations: Annotated[Count, Also("updates")] = 1
    """Number of updates with the answers of one step. With one update, nothing is clipped."""

    def _check_together(self) -> None:
        check_weights(self.reward, self.reward_weights)

    def resolved(self) -> RewardOptions:
        """With what is chosen by default written down."""
        scaling: ScaleRewards = self.scale_rewards or ("none" if self.loss in ("dr_grpo", "rloo") else "group")
        return replace(
            self,
            scale_rewards=scaling,
            epsilon_high=self.epsilon if self.epsilon_high is None else self.epsilon_high,
            reward_weights=self.weights,
        )

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each reward function."""
        return self.reward_weights or (1.0,) * len(self.reward)

    def given(self) -> Sequence[str]:
        """Return the names of the options that do not have their default value."""
        usual = RewardOptions()
        return [one.name for one in fields(self) if getattr(self, one.name) != getattr(usual, one.name)]
