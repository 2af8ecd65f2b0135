"""The process that runs reward functions, a user's and the built-in ones. It never runs a model's text.

    python -P -m backhand.objectives.rewards.functions

It is started by `process.RewardProcess` and reads two kinds of requests, one per line:

1. The names of the functions. The answer is one line: the place and parameters of each, or the error of the first that
   cannot be loaded.
2. A batch of completions. The answer is one line before each function starts, and one line with all rewards.

Output of the functions goes to standard error, which `RewardProcess` shows. A watching process ends this one when
`RewardProcess` is gone, even if a function hangs. This file imports no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import regex

from backhand.errors import first_line
from backhand.options.rewards import GYM, NO_PROCESS, RewardName, parse_name
from backhand.printing import LONGEST_LINE
from backhand.reading import MAX_SETTINGS_BYTES, read_plain
from backhand.system import end_with_parent
from backhand.words import name_list, nearest_names, shorten

Batch = Mapping[str, Any]
"""Lists with one element per answer: prompts, completions, completion_ids, references, and the rows' other columns."""
RewardFunction = Callable[[Batch], Iterable[float | None]]

_NUMBER = regex.compile(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")
_CLOSE = 1e-9


GIVEN = ("prompts", "completions", "completion_ids")
"""Arguments of every function, in addition to the columns of the rows."""


def load_function(name: str) -> RewardFunction:
    """Load a reward function by its name. Raises whatever importing it raises."""
    parsed = parse_name(name)
    if parsed.kind in ("file", "module"):
        return _with_trl_signature(_imported(parsed))
    return _per_answer(_BUILT_IN[parsed.kind](parsed.place))


def _imported(name: RewardName) -> Callable[..., Any]:
    if name.kind == "module":
        module = importlib.import_module(name.place)
    else:
        path = Path(name.place).resolve()
        spec = importlib.util.spec_from_file_location(f"backhand_reward_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    function: Callable[..., Any] | None = getattr(module, name.function, None)
    if function is None:
        defined = [one for one, value in vars(module).items() if inspect.isfunction(value)]
        near = "".join(f"; did you mean {one}?" for one in nearest_names(name.function, defined, count=1))
        raise LookupError(f"{name.place} has no function {name.function}{near or f': it has {name_list(defined)}'}")
    if not callable(function):
        raise TypeError(f"{name.function} is not a function")
    return function


def _with_trl_signature(function: Callable[..., Any]) -> RewardFunction:
    """Wrap a function with TRL's signature: it is given the values that it has parameters for."""
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    def reward(batch: Batch) -> Iterable[float | None]:
        values = {name: batch[name] for name in GIVEN} | batch["columns"]
        arguments = {name: value for name, value in values.items() if takes_all or name in parameters}
        rewards: Iterable[float | None] = function(**arguments)
        return rewards

    reward.__wrapped__ = function  # type: ignore[attr-defined]  # as functools.wraps marks it
    return reward


def _described(reward: RewardFunction) -> dict[str, Any]:
    """Return the place of a user's function, and the parameters that it needs; empty for a built-in function."""
    function = getattr(reward, "__wrapped__", None)
    if function is None:
        return {"place": "", "needs": []}
    code = getattr(inspect.unwrap(function), "__code__", None)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    needs = [one.name for one in parameters if one.kind in kinds and one.default is one.empty]
    return {"place": f"{code.co_filename}:{code.co_firstlineno}" if code else "", "needs": needs}


Answer = Mapping[str, Any]
"""text, tokens, prompt, reference and columns of one answer."""


def _per_answer(score: Callable[[Answer], float]) -> RewardFunction:
    """Wrap a built-in function, which scores one answer at a time."""

    def reward(batch: Batch) -> list[float | None]:
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

    return reward


def _reference(answer: Answer) -> str:
    if answer["reference"] is None:
        raise ValueError("the row has no column that holds the right answer, such as answer or completion")
    return str(answer["reference"])


def _exact(_: str) -> Callable[[Answer], float]:
    return lambda answer: float(answer["text"].strip() == _reference(answer).strip())


def last_number(text: str) -> float | None:
    """Return the last number in a text, or None."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _number(_: str) -> Callable[[Answer], float]:
    """Score 1 if the last numbers of the answer and of the row are equal."""

    def score(answer: Answer) -> float:
        expected, given = last_number(_reference(answer)), last_number(answer["text"])
        if expected is None:
            raise ValueError(f"there is no number in {answer['reference']!r}")
        return float(given is not None and math.isclose(given, expected, rel_tol=_CLOSE, abs_tol=_CLOSE))

    return score


def _regex(pattern: str) -> Callable[[Answer], float]:
    compiled = regex.compile(pattern)
    return lambda answer: float(compiled.search(answer["text"]) is not None)


def _json(place: str) -> Callable[[Answer], float]:
    """Score 1 if the whole answer is JSON that fits the schema."""
    validator = _validator(place)

    def score(answer: Answer) -> float:
        try:
            value = json.loads(answer["text"], parse_constant=_no_json)
        except (ValueError, RecursionError):
            return 0.0
        try:
            return float(validator.is_valid(value))
        except RecursionError:
            if _depth(value) > _DEEP:
                return 0.0
            raise ValueError("the schema refers to itself without end, or is nested too deeply") from None

    return score


_DEEP = 16
"""Levels of an answer that every usable schema can follow."""


def _validator(place: str) -> Any:
    """Build the validator of a schema file. Nothing that the schema refers to is fetched.

    Raises:
        Exception: the file is no schema, or refers to something outside itself.
    """
    import jsonschema
    from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]
    from referencing import Resource
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    schema = json.loads(read_plain(place, MAX_SETTINGS_BYTES).decode("utf-8-sig"))
    if not isinstance(schema, dict | bool):
        raise TypeError("a schema is a JSON object, true or false")
    checker: Any = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    checker.check_schema(schema)

    def follow(resource: Any, resolver: Any) -> None:
        contents = resource.contents
        for word in ("$ref", "$dynamicRef", "$recursiveRef"):
            reference = contents.get(word) if isinstance(contents, dict) else None
            try:
                if isinstance(reference, str):
                    resolver.lookup(reference)
            except Unresolvable:
                raise ValueError(f"{word} {reference!r} leads nowhere in the schema, and nothing is fetched") from None
        for part in resource.subresources():
            follow(part, resolver.in_subresource(part))

    whole = Resource.from_contents(schema, default_specification=DRAFT202012)
    follow(whole, REGISTRY.resolver_with_root(whole))
    if isinstance(schema, dict):  # else a reference to the whole schema would be followed by jsonschema's own class
        schema = {word: value for word, value in schema.items() if word != "$schema"}
    own = {word: _multiple_of for word in ("multipleOf", "divisibleBy") if word in checker.VALIDATORS}
    return jsonschema.validators.extend(checker, own)(schema, registry=REGISTRY)


def _multiple_of(validator: Any, factor: float, value: Any, _: Any) -> Iterator[Exception]:
    """Yield an error unless the decimals of `value` are a multiple of those of `factor`, as in 0.3 = 3 x 0.1."""
    import jsonschema

    if not validator.is_type(value, "number"):
        return
    if value in (math.inf, -math.inf) or (_fraction(value) / _fraction(factor)).denominator != 1:
        yield jsonschema.ValidationError(f"{value!r} is not a multiple of {factor}")


def _fraction(number: float) -> Fraction:
    return Fraction(number if isinstance(number, int) else repr(number))


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _depth(value: Any) -> int:
    """Count the levels of lists and objects in a parsed answer."""
    level, depth = [value], 0
    while level := [
        part
        for one in level
        if isinstance(one, dict | list)
        for part in (one.values() if isinstance(one, dict) else one)
    ]:
        depth += 1
    return depth


def _length(tokens: str) -> Callable[[Answer], float]:
    """Score 1 up to this number of tokens, falling linearly to 0 at twice the number."""
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
    """Answer requests until their pipe ends.

    A request is a line: a random token, a space, and JSON. Every line of its answer begins with the same token, so text
    that a function writes to our descriptors is not taken for an answer. Both pipes are moved to descriptors that child
    processes do not inherit. Afterwards standard input is empty, and standard output is a copy of standard error.
    """
    with os.fdopen(os.dup(0), encoding="utf-8") as requests, os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, 0)
        os.close(empty)
        os.dup2(2, 1)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)

        def answer(token: str, **facts: Any) -> None:
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):  # a function may have closed or replaced it
                    stream.flush()
            answers.write(f"{token} {json.dumps(facts)}\n")
            answers.flush()

        token, _, text = requests.readline().partition(" ")
        names = json.loads(text or "[]")
        functions: list[RewardFunction] = []
        for name in names:
            try:
                functions.append(load_function(name))
            except BaseException as error:  # noqa: BLE001 - somebody else's file is run here, and may even exit
                answer(token, function=name, **_failure(error, name))
                return
        answer(token, ready=[_described(function) for function in functions])
        for line in requests:
            token, _, text = line.partition(" ")
            batch = json.loads(text)
            most = len(batch["completions"]) + 1  # one too many is an error already
            rewards = []
            for name, function in zip(names, functions, strict=True):
                answer(token, begins=name)
                try:
                    rewards.append(_rewards_in(function(batch), most))
                except _NoRewards as error:
                    answer(token, function=name, error=str(error), place="", traceback="", of_all=error.of_all)
                    break
                except BaseException as error:  # noqa: BLE001 - likewise
                    answer(token, function=name, **_failure(error, name))
                    break
            else:
                answer(token, rewards=rewards)


class _NoRewards(Exception):
    """A function returned something other than rewards.

    Args:
        how: the predicate of the error.
        of_all: True if it is not about one answer.
    """

    def __init__(self, how: str, *, of_all: bool) -> None:
        super().__init__(how)
        self.of_all = of_all


def _rewards_in(returned: Any, most: int) -> list[float | None]:
    """Return up to `most` rewards of a function's result. Raises _NoRewards if it is no list of numbers."""
    if isinstance(returned, str | bytes | Mapping) or not _can_iterate(returned):
        shown = shorten(repr(returned), LONGEST_LINE)
        raise _NoRewards(f"returned {shown}, not a list with one number per answer", of_all=True)
    return [None if value is None else _number_of(value) for value in islice(returned, most)]


def _can_iterate(returned: Any) -> bool:
    try:
        iter(returned)
    except TypeError:
        return False
    return True


def _number_of(value: Any) -> float:
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise _NoRewards(f"gave {shorten(repr(value), LONGEST_LINE)}, which is no number", of_all=False)


def _failure(error: BaseException, name: str) -> dict[str, str]:
    """Return how a function failed, the line of the user's code that failed, and the traceback without our frames.

    `missing` is the module that is not installed, or "".
    """
    how = f"raised {type(error).__name__}: {shorten(first_line(error), LONGEST_LINE)}"
    parsed, place = parse_name(name), ""
    trace = error.__traceback__
    while trace is not None and not _is_theirs(trace):
        trace = trace.tb_next
    frames = traceback.extract_tb(trace)
    if frames:
        module = sys.modules.get(parsed.place)
        own = str(Path(parsed.place).resolve()) if parsed.kind == "file" else getattr(module, "__file__", None)
        last = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
        place = f"{last.filename}:{last.lineno}, in {last.name}: {last.line}"
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}:{error.lineno}: {(error.text or '').strip()}"
    text = "".join(traceback.format_exception(error.with_traceback(trace)))
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return {
        "error": how,
        "place": shorten(place, LONGEST_LINE),
        "traceback": text[-_TRACEBACK_CHARACTERS:],
        "missing": "" if missing in sys.modules else missing,  # only a part of an installed package may be missing
    }


_TRACEBACK_CHARACTERS = 20_000


def _is_theirs(trace: TracebackType) -> bool:
    """Return True for a frame that is neither of this file nor of Python's imports."""
    file = trace.tb_frame.f_code.co_filename
    return file not in (__file__, importlib.__file__) and not file.startswith("<frozen importlib")


if __name__ == "__main__":
    try:
        end_with_parent()
    except OSError:
        sys.exit(NO_PROCESS)
    _serve()
