"""The process that holds reward functions: those of a user and the built-in ones; it never runs what a model wrote.

    python -P -m backhand.training.rewards.functions

reads a line of JSON with the names of the functions, and answers with one that tells whether all of them are there;
then a line for each batch of answers, and answers with a line as soon as a function begins and one with all rewards.
What a function prints goes to standard error. `process.RewardProcess` is the other side. This file imports no torch.
A process beside it ends it as soon as the other side is gone, also where a function hangs.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import regex

from backhand.errors import first_line
from backhand.system import end_with_parent
from backhand.training.rewards.options import GYM, RewardName, parse_name

Batch = Mapping[str, Any]
"""prompts, completions, completion_ids and references of answers, and columns: each a list, one element an answer."""
Judging = Callable[[Batch], Sequence[float | None]]

_NUMBER = regex.compile(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")
_CLOSE = 1e-9


def judging(name: str) -> Judging:
    """The function of this name, as one of a batch. Raises whatever importing it does."""
    found = parse_name(name)
    if found.kind in ("file", "module"):
        return _of_user(_loaded(found))
    return _each(_BUILT_IN[found.kind](found.place))


def _loaded(name: RewardName) -> Callable[..., Any]:
    if name.kind == "module":
        module = importlib.import_module(name.place)
    else:
        path = Path(name.place).resolve()
        spec = importlib.util.spec_from_file_location(f"backhand_reward_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name.function)
    if not callable(function):
        raise TypeError(f"{name.function} is not a function")
    return function


def _of_user(function: Callable[..., Any]) -> Judging:
    """A function with TRL's signature, given what it has a parameter for."""
    taken = inspect.signature(function).parameters
    everything = any(one.kind is one.VAR_KEYWORD for one in taken.values())

    def judge(batch: Batch) -> Sequence[float | None]:
        given = {name: batch[name] for name in ("prompts", "completions", "completion_ids")} | batch["columns"]
        return list(function(**{name: value for name, value in given.items() if everything or name in taken}))

    return judge


Answer = Mapping[str, Any]
"""text, tokens, prompt, reference and columns of one answer."""


def _each(score: Callable[[Answer], float]) -> Judging:
    """A built-in one, which looks at each answer by itself."""

    def judge(batch: Batch) -> list[float | None]:
        scores: list[float | None] = []
        for number, completion in enumerate(batch["completions"]):
            columns = {name: values[number] for name, values in batch["columns"].items()}
            answer = {
                "text": completion if isinstance(completion, str) else completion[-1]["content"],
                "tokens": len(batch["completion_ids"][number]),
                "prompt": batch["prompts"][number],
                "reference": batch["references"][number],
                "columns": columns,
            }
            scores.append(score(answer))
        return scores

    return judge


def _reference(answer: Answer) -> str:
    if answer["reference"] is None:
        raise ValueError("the row has no column that holds the right answer, such as answer or completion")
    return str(answer["reference"])


def _exact(_: str) -> Callable[[Answer], float]:
    return lambda answer: float(answer["text"].strip() == _reference(answer).strip())


def _number(_: str) -> Callable[[Answer], float]:
    """The last number of the answer is that of the row."""

    def last(text: str) -> float | None:
        found = _NUMBER.findall(text)
        return float(found[-1].replace(",", "")) if found else None

    def score(answer: Answer) -> float:
        wanted, said = last(_reference(answer)), last(answer["text"])
        if wanted is None:
            raise ValueError(f"there is no number in {answer['reference']!r}")
        return float(said is not None and math.isclose(said, wanted, rel_tol=_CLOSE, abs_tol=_CLOSE))

    return score


def _regex(pattern: str) -> Callable[[Answer], float]:
    compiled = regex.compile(pattern)
    return lambda answer: float(compiled.search(answer["text"]) is not None)


def _json(schema: str) -> Callable[[Answer], float]:
    """The whole answer is JSON that fits the schema."""
    import jsonschema

    wanted = json.loads(Path(schema).read_text(encoding="utf-8"))
    checker: Any = jsonschema.validators.validator_for(wanted)
    checker.check_schema(wanted)
    validator = checker(wanted)

    def score(answer: Answer) -> float:
        try:
            return float(validator.is_valid(json.loads(answer["text"])))
        except (ValueError, RecursionError):
            return 0.0

    return score


def _length(tokens: str) -> Callable[[Answer], float]:
    """1 up to so many tokens, then less, and 0 from twice as many on."""
    most = int(tokens)
    return lambda answer: min(1.0, max(0.0, 2 - answer["tokens"] / most))


def _gym(task: str) -> Callable[[Answer], float]:
    import reasoning_gym

    name = task.partition(":")[0]
    verify: Callable[..., float] = reasoning_gym.get_score_answer_fn(name)

    def score(answer: Answer) -> float:
        entry = {"question": answer["prompt"], "answer": answer["reference"], **answer["columns"]}
        return float(verify(answer["text"].strip(), entry))

    return score


_BUILT_IN: Mapping[str, Callable[[str], Callable[[Answer], float]]] = {
    "exact": _exact,
    "number": _number,
    "regex": _regex,
    "json": _json,
    "length": _length,
    GYM: _gym,
}


def _serve() -> None:
    """Answer line by line until standard input ends."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def tell(**facts: Any) -> None:
            out.write(json.dumps(facts) + "\n")
            out.flush()

        names = json.loads(sys.stdin.readline() or "[]")
        functions: list[Judging] = []
        for name in names:
            try:
                functions.append(judging(name))
            except BaseException as error:  # noqa: BLE001 - somebody else's file is run here, and may even exit
                tell(function=name, error=f"raised {type(error).__name__}: {first_line(error)}")
                return
        tell(ready=True)
        for line in sys.stdin:
            batch = json.loads(line)
            rewards = []
            for name, function in zip(names, functions, strict=True):
                tell(begins=name)
                try:
                    found = function(batch)
                    rewards.append([None if value is None else float(value) for value in found])
                except BaseException as error:  # noqa: BLE001 - likewise
                    tell(function=name, error=f"raised {type(error).__name__}: {first_line(error)}")
                    break
            else:
                tell(rewards=rewards)


if __name__ == "__main__":
    end_with_parent()
    _serve()
