"""How answers are sampled and what they are rewarded for; names as in TRL's GRPOConfig, or beside it.

What a reward function is called is checked before anything is loaded: names alone, nothing is imported or run. This
file imports no torch: the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import regex

from backhand.bounds import Also, Bound, Check, Count, Options, Positive
from backhand.errors import UsageError
from backhand.words import shorten

NO_PROCESS = 75
"""Exit code of the functions' process where the system does not start the one that ends it with its parent."""
GYM = "reasoning_gym"
PLAIN = ("exact", "number")
WITH_ARGUMENT = ("regex", "json", "length", GYM)
_MOST_PATTERN_CHARACTERS = 20_000


class RewardName(NamedTuple):
    """A name in its parts."""

    kind: str  # `exact`, `number`, `regex`, `json`, `length`, `reasoning_gym`, `file` or `module`
    place: str = ""  # what stands before the last colon: a file, a module; of a built-in one its argument
    function: str = ""  # of a file or module, the function in it

    @property
    def shown(self) -> str:
        """How metrics call it."""
        return self.function or self.kind


def parse_name(name: str) -> RewardName:
    """The parts of a name, whatever they are worth."""
    kind, _, argument = name.partition(":")
    if kind in PLAIN or kind in WITH_ARGUMENT:
        return RewardName(kind, argument)
    place, _, function = name.rpartition(":")
    return RewardName("file" if place.endswith(".py") else "module", place, function)


def shown_names(names: tuple[str, ...]) -> list[str]:
    """How metrics call each, a number behind those of the same name."""
    shown = [parse_name(name).shown for name in names]
    return [one if shown.count(one) == 1 else f"{one}_{i + 1}" for i, one in enumerate(shown)]


def check_name(where: str, name: object) -> None:
    """Raise UsageError for what is no name of a reward function, or names a file that is not there."""
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"{name!r} is not the name of a reward function", where=where)
    found = parse_name(name)
    problem = why = None
    if found.kind in WITH_ARGUMENT and not found.place:
        problem = f"{name} needs what comes behind a colon"
    elif found.kind in PLAIN and ":" in name:
        problem = f"{found.kind} takes nothing behind a colon"
    elif found.kind == "length" and not (found.place.isdecimal() and len(found.place) < 10 and int(found.place)):
        problem = f"{found.place!r} is not a number of tokens"
    elif found.kind == "regex" and len(found.place) > _MOST_PATTERN_CHARACTERS:
        problem = f"a pattern of {len(found.place):,} characters is longer than {_MOST_PATTERN_CHARACTERS:,}"
    elif found.kind == "regex":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # FutureWarning: of sets that may be read otherwise one day
                regex.compile(found.place)
        except (regex.error, RecursionError, OverflowError) as error:
            problem, why = f"{shorten(found.place)!r} is not a regular expression", str(error)
    elif found.kind in ("file", "json") and not Path(found.place).is_file():
        problem = f"there is no file {found.place}"
    elif found.kind in ("file", "module") and not (found.place and found.function.isidentifier()):
        problem = f"{name!r} is neither a built-in reward nor of the form MODULE:FUNCTION or FILE.py:FUNCTION"
    if problem is not None:
        raise UsageError(
            problem,
            where=where,
            why=why,
            next_step="built in are exact, number, regex:PATTERN, json:SCHEMA.json, length:TOKENS, reasoning_gym:TASK",
        )


Loss = Literal["grpo", "dr_grpo", "dapo", "rloo"]
ScaleRewards = Literal["group", "batch", "none"]
_Clip = Annotated[float, Bound(above=0, below=1)]


def check_names(where: str, names: Any) -> None:
    """Raise UsageError where not all of these are names of reward functions."""
    if not isinstance(names, tuple | list):
        raise UsageError(f"{names!r} is not a list of reward functions", where=where)
    for name in names:
        check_name(where, name)


@dataclass(frozen=True)
class RewardOptions(Options):
    """Rewards of answers that the model writes itself (`--objective grpo`)."""

    reward: Annotated[tuple[str, ...], Check(check_names)] = ()
    """What answers are rewarded by, one or several: a function with TRL's signature as `module:function` or
    `file.py:function`; or `exact`, `number`, `regex:PATTERN`, `json:SCHEMA.json`, `length:TOKENS`,
    `reasoning_gym:TASK`. See docs/rewards.md."""

    reward_weights: tuple[float, ...] = ()
    """Weight of each of `reward` in the sum of an answer; not given: 1 each."""

    reward_timeout: Positive = 60.0
    """Seconds that a reward function may take for the answers of a step; then the run ends, and says where."""

    group: Annotated[int, Bound(at_least=2), Also("num_generations")] = 8
    """Answers to each prompt, compared with one another."""

    max_new_tokens: Annotated[Count, Also("max_completion_length")] = 256
    """Longest answer, in tokens."""

    temperature: Annotated[float, Bound(above=0.01)] = 1.0
    """Divides the logits, where answers are sampled and where they are trained on alike."""

    top_p: Annotated[float, Bound(above=0, at_most=1)] = 1.0
    """Draw only from the likeliest tokens that together reach this probability; 1 draws from all."""

    loss: Loss = "dapo"
    """How the tokens of a step add up: `grpo` (arXiv 2402.03300), `dr_grpo` (2503.20783), `dapo` (2503.14476) or `rloo`
    (2402.14740); see `backhand.ops.grpo`."""

    scale_rewards: ScaleRewards | None = None
    """Divide what an answer is above its group's mean by the standard deviation of the `group`, of the whole `batch`,
    or by nothing, `none`; not given: `group`, and `none` for `dr_grpo` and `rloo`, as their papers have it."""

    epsilon: Annotated[_Clip, Also("clip")] = 0.2
    """How far the probability of a token may move in the updates of a batch before it has no more gradient."""

    epsilon_high: Annotated[float, Bound(above=0)] | None = None
    """The same upwards; not given: `epsilon`."""

    num_iterations: Annotated[Count, Also("updates")] = 1
    """Updates with the answers of one step; with one nothing is ever clipped."""

    def _check_together(self) -> None:
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise UsageError(
                f"{len(self.reward_weights)} weights for {len(self.reward)} reward functions",
                where="reward_weights",
                next_step="give one for each of --reward, in their order",
            )

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
        """Of each function."""
        return self.reward_weights or (1.0,) * len(self.reward)

    def given(self) -> Sequence[str]:
        """Names of the options that do not have their default value."""
        usual = RewardOptions()
        return [one.name for one in fields(self) if getattr(self, one.name) != getattr(usual, one.name)]
