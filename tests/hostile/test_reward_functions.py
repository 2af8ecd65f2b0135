"""Reward functions, schemas and patterns that misbehave: every case ends with its documented outcome and exit code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from backhand.data.rows import Completion, PromptRow
from backhand.errors import BackhandError, CheckError, UsageError
from backhand.objectives.rewards.functions import load_function
from backhand.objectives.rewards.process import RewardInput, RewardProcess
from backhand.options.rewards import RewardOptions


def answers(*texts: str) -> list[RewardInput]:
    asked = PromptRow(Completion("a", None, "", None, "rows:1"), "7", {}, "rows:1")
    return [RewardInput(asked, text, list(range(len(text)))) for text in texts]


def rewards_of(name: str, *texts: str, timeout_s: float = 20.0) -> list[float]:
    RewardOptions(reward=(name,)).validate()
    with RewardProcess([name], timeout_s) as process:
        return process.rewards(answers(*texts))[0]


def function(place: Path, body: str, head: str = "") -> str:
    """The name of a reward function with this body."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    (place / "rewards.py").write_text(f"import os, sys\n{head}\ndef judge(completions, **_):\n{lines}")
    return f"{place / 'rewards.py'}:judge"


# ---- JSON schemas ------------------------------------------------------------------------------------------------

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
TREE = {"type": "array", "items": {"$ref": "#"}}
SLOW = "a" * 40 + "!"

USABLE: dict[str, tuple[Any, dict[str, float]]] = {
    "true": (True, {"1": 1, "{": 0}),
    "false": (False, {"1": 0}),
    "empty": ({}, {"null": 1, "": 0, "1 2": 0}),
    "byte order mark": ('\ufeff{"type": "object"}', {"{}": 1, "[]": 0}),
    "unknown draft": ({"$schema": "http://nowhere.invalid/", "type": "null"}, {"null": 1, "1": 0}),
    "definitions": ({"$defs": {"x": {"type": "null"}}, "$ref": "#/$defs/x"}, {"null": 1, "1": 0}),
    "definitions of draft 7": (
        {"$schema": DRAFT_7, "definitions": {"x": {"type": "null"}}, "properties": {"a": {"$ref": "#/definitions/x"}}},
        {'{"a": null}': 1, '{"a": 1}': 0},
    ),
    "anchor": ({"$defs": {"x": {"$anchor": "here", "type": "null"}}, "$ref": "#here"}, {"null": 1, "1": 0}),
    "own identifier": (
        {"$id": "http://a.invalid/s", "$defs": {"b": {"$id": "b.json", "type": "string"}}, "$ref": "b.json"},
        {'"a"': 1, "1": 0},
    ),
    "the specification": ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, {"{}": 1, '{"type": 5}': 0}),
    "tree": (TREE, {"[[], [[]]]": 1, "[1]": 0, "[" * 40 + "]" * 40: 1}),
    "tree, an answer too deep to follow": (TREE, {"[" * 400 + "]" * 400: 0}),
    "answer too deep to read": (TREE, {"[" * 100_000: 0, '{"a":' * 50_000: 0}),
    "not a number": ({"type": "number"}, {"NaN": 0, "Infinity": 0, "-Infinity": 0, "1.5": 1}),
    "number beyond float64": ({"multipleOf": 0.1}, {"1" * 400: 1, "1e999": 0, "1" * 400 + ".0": 0}),
    "multiple of a decimal": (
        {"multipleOf": 0.1},
        {"0.3": 1, "0.7": 1, "-1.1": 1, "1e22": 1, "3": 1, "0": 1, "0.35": 0, "1e-9": 0, '"0.35"': 1},
    ),
    "multiple of a decimal, by draft 3 and a reference to the whole": (
        {
            "$schema": "http://json-schema.org/draft-03/schema#",
            "divisibleBy": 0.01,
            "multipleOf": 5,
            "properties": {"price": {"$ref": "#"}},
        },
        {'{"price": 19.99}': 1, '{"price": 0.07}': 1, '{"price": 0.005}': 0},
    ),
    "number of too many digits": ({"type": "integer"}, {"9" * 5000: 0, "9" * 4000: 1}),
    "half a surrogate pair": ({"type": "string", "maxLength": 1}, {'"\\ud800"': 1}),
    "names that occur twice": ({"required": ["a"]}, {'{"a": 1, "a": 2}': 1}),
    "answer of two megabytes": ({"type": "array"}, {json.dumps(["x" * 98] * 20_000): 1, "x" * 2_000_000: 0}),
    "two hundred thousand values": ({"enum": list(range(200_000))}, {"199999": 1, "200000": 0}),
}


@pytest.mark.parametrize("name", USABLE)
def test_a_schema_that_can_be_used(name: str, tmp_path: Path) -> None:
    schema, expected = USABLE[name]
    path = tmp_path / "schema.json"
    path.write_text(schema if isinstance(schema, str) else json.dumps(schema), encoding="utf-8")
    batch = {"prompts": [""] * len(expected), "completions": list(expected), "columns": {}}
    batch |= {"completion_ids": [()] * len(expected), "references": [None] * len(expected)}
    assert list(load_function(f"json:{path}")(batch)) == list(expected.values())


UNUSABLE: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "JSONDecodeError"),
    "empty file": ("", "JSONDecodeError"),
    "no UTF-8": (b'{"title": "\xff"}', "UnicodeDecodeError"),
    "number": (5, "a schema is a JSON object, true or false"),
    "list": ([], "a schema is a JSON object, true or false"),
    "text": ('"object"', "a schema is a JSON object, true or false"),
    "unknown type": ({"type": "foo"}, "SchemaError"),
    "no pattern": ({"pattern": "("}, "SchemaError"),
    "no property pattern": ({"patternProperties": {"(": {}}}, "SchemaError"),
    "draft that is a list": ({"$schema": []}, "TypeError"),
    "draft that is a number": ({"$schema": 5}, "AttributeError"),
    "ten thousand brackets": ("[" * 10_000, "RecursionError"),
    "three thousand levels": ('{"not":' * 3000 + "{}" + "}" * 3000, "RecursionError"),
    "larger than settings are": (b'{"title": "' + b"x" * (8 << 20) + b'"}', "more than 8,388,608 bytes"),
    "remote reference": ({"$ref": "http://127.0.0.1:9/s.json"}, "nothing is fetched"),
    "remote reference in a property": ({"properties": {"a": {"$ref": "https://a.invalid/"}}}, "nothing is fetched"),
    "reference to a file": ({"items": {"$ref": "file:///etc/passwd"}}, "nothing is fetched"),
    "reference to nothing": ({"$ref": "#/definitions/x"}, "leads nowhere"),
    "relative reference": ({"$id": "http://a.invalid/s", "allOf": [{"$ref": "b.json"}]}, "leads nowhere"),
    "no such anchor": ({"$dynamicRef": "#nowhere"}, "leads nowhere"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_schema_that_cannot_be_used_is_refused_before_any_answer(name: str, tmp_path: Path) -> None:
    schema, says = UNUSABLE[name]
    path, text = tmp_path / "schema.json", schema if isinstance(schema, str | bytes) else json.dumps(schema)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match="cannot be loaded") as raised:
        rewards_of(f"json:{path}", "1")
    assert says in str(raised.value.why) and raised.value.exit_code == 2


ENDLESS: dict[str, tuple[Any, str, str]] = {
    "itself": ({"$ref": "#"}, "1", "refers to itself without end"),
    "itself by an anchor": ({"$anchor": "top", "$ref": "#top"}, "1", "refers to itself without end"),
    "one another": (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        "1",
        "end",
    ),
    "all of itself": ({"properties": {"a": {"allOf": [{"$ref": "#/properties/a"}]}}}, '{"a": 1}', "without end"),
    "repeated choice": ({"pattern": "^(a|a)*$"}, json.dumps(SLOW), "took more than"),
    "repeated options": ({"pattern": "^(a?){30}a{30}$"}, '"' + "a" * 30 + '"', "took more than"),
    "overlapping words": ({"pattern": r"^(\w+\s?)*$"}, json.dumps(SLOW), "took more than"),
    "property pattern": ({"patternProperties": {"^(a+)+$": {}}}, json.dumps({SLOW: 1}), "took more than"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_schema_without_end_names_itself_and_the_answer(name: str, tmp_path: Path) -> None:
    schema, answer, says = ENDLESS[name]
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    with pytest.raises(CheckError, match=says) as raised:
        rewards_of(f"json:{tmp_path / 'schema.json'}", answer, timeout_s=1.0)
    assert raised.value.exit_code == 6 and raised.value.where == "rows:1"


# ---- patterns ----------------------------------------------------------------------------------------------------

PATTERNS = {
    "repeated choice": "^(a|a)*$",
    "nested repeats": "^(a+)+$",
    "lazy repeats": "^(a*?)*?$",
    "possessive repeats": "^(a++)++$",
    "lookbehind of any width": "(?<=(a+)+)b",
    "three repeats of words": r"^(\w*)*(\w*)*(\w*)*$",
    "overlapping choices": "^(a|aa|aaa)*(a|aa)*$",
    "back-references": r"^(a*)*(a*)*\1\2$",
    "errors allowed": "^(?:aaab){e<=9}$",
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_that_backtracks(name: str) -> None:
    """The regex package sees of some that they cannot match; the others end with the row that was judged."""
    ended: list[float] | CheckError
    try:
        ended = rewards_of(f"regex:{PATTERNS[name]}", SLOW, timeout_s=1.0)
    except CheckError as error:
        ended = error
    if not isinstance(ended, CheckError):
        assert ended == [0.0]
        return
    assert "took more than 1 s for 1 answer: " in ended.what
    assert ended.exit_code == 6 and ended.where == "rows:1"


REFUSED: dict[str, tuple[str, str]] = {
    "five thousand groups": ("regex:" + "(" * 5000 + ")" * 5000, "is not a regular expression"),
    "million letters": ("regex:" + "a" * 1_000_000, "is longer than 20,000"),
    "too many repeats": ("regex:a{99999999999999999999}", "is not a regular expression"),
    "unknown property": (r"regex:\p{Nothing}", "is not a regular expression"),
    "no group": (r"regex:\9", "is not a regular expression"),
    "length of five thousand digits": ("length:" + "9" * 5000, "is not a number of tokens"),
    "length of another script": ("length:²", "is not a number of tokens"),
    "directory as a schema": ("json:.", "there is no file"),
    "device as a schema": ("json:/dev/zero", "there is no file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_is_refused_before_anything_is_read(name: str) -> None:
    given, says = REFUSED[name]
    with pytest.raises(UsageError, match=says) as raised:
        RewardOptions(reward=(given,)).validate()
    assert raised.value.exit_code == 2 and len(str(raised.value)) < 2000


# ---- functions ---------------------------------------------------------------------------------------------------

FORGED = "line = b'{\"rewards\": [[9.0]]}\\n'\nfor number in range(3, 64):\n    try:\n        os.write(number, line)\n"
FORGED += "    except OSError:\n        pass\n"
UNPRINTABLE = "class Silent(Exception):\n    def __str__(self):\n        raise ValueError('no')\n"
FAILING: dict[str, tuple[str, str, str]] = {
    "forges an answer": (FORGED + "return [1.0]", "", "wrote into the pipe"),
    "forges an error": (
        FORGED.replace('"rewards": [[9.0]]', '"error": "x"') + "return [1.0]",
        "",
        "wrote into the pipe",
    ),
    "writes words": (FORGED.replace('{"rewards": [[9.0]]}', "now") + "return [1.0]", "", "wrote into the pipe"),
    "writes half a line": (FORGED.replace("}\\n", "") + "return [1.0]", "", "wrote into the pipe"),
    # The descriptor before the answers' own ends the process with its parent: a write to it would wait.
    "writes three megabytes": ("os.write(5, b'x' * 3_000_000)\nreturn [1.0]", "", "wrote into the pipe"),
    "closes every descriptor": ("os.closerange(3, 64)\nreturn [1.0]", "", "ended its process"),
    "raises what cannot be shown": ("raise Silent", UNPRINTABLE, "raised Silent: Silent"),
    "raises a megabyte": ("raise ValueError('x' * 1_000_000)", "", "raised ValueError: xxx"),
    "raises escapes": ("raise ValueError('\\x1b[31m')", "", re.escape(r"raised ValueError: \x1b[31m")),
    "exits": ("sys.exit(0)", "", "raised SystemExit"),
    "never ends to give": (
        "import itertools\nreturn itertools.repeat(1.0)",
        "",
        "gave at least 2 rewards",
    ),
    "gives an integer too large": ("return [10 ** 400]", "", "raised OverflowError"),
    "gives text": ("return ['good']", "", "gave 'good', which is no number"),
    "gives nothing": ("return None", "", "returned None, not a list with one number per answer"),
    "gives infinity": ("return [float('inf')]", "", "gave inf"),
    "calls itself": ("return judge(completions)", "", "raised RecursionError"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_function_that_fails(name: str, tmp_path: Path) -> None:
    body, head, says = FAILING[name]
    with pytest.raises(CheckError, match=says) as raised:
        rewards_of(function(tmp_path, body, head), "7")
    assert raised.value.exit_code == 6 and len(str(raised.value)) < 3000 and "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    ("trains", "step"),
    [
        (True, "raise --reward-timeout, or make the function faster, and go on with --resume"),
        (False, "make the function faster, and evaluate again"),
    ],
)
def test_a_function_too_slow_for_all_answers_together_names_the_limit(trains: bool, step: str, tmp_path: Path) -> None:
    name = function(tmp_path, "time.sleep(0.4 * len(completions))\nreturn [1.0] * len(completions)", "import time")
    with RewardProcess([name], 1.0, trains=trains) as process, pytest.raises(CheckError) as raised:
        process.rewards(answers("1", "2", "3"))
    assert raised.value.what == f"the reward function {name} took more than 1 s for 3 answers"
    assert raised.value.where is None and raised.value.next_step == step


@pytest.mark.parametrize("at_call", [False, True])
def test_a_missing_module_is_named_with_its_package(at_call: bool, tmp_path: Path) -> None:
    importing = "import no_such_module.part"
    body, head = (f"{importing}\nreturn [1.0]", "") if at_call else ("return [1.0]", importing)
    with pytest.raises(CheckError if at_call else UsageError) as raised:
        rewards_of(function(tmp_path, body, head), "7")
    step = "install the package of the module no_such_module, for example with "
    assert isinstance(raised.value, BackhandError) and str(raised.value.next_step).startswith(step)
    (tmp_path / "no_such_module.py").write_text("")
    with pytest.raises(BackhandError) as raised:
        rewards_of(function(tmp_path, body, head), "7")
    assert f"set PYTHONPATH={tmp_path}" in str(raised.value.next_step)
    with pytest.raises(UsageError, match="cannot be loaded") as raised:
        rewards_of("no_such_module:judge", "7")
    assert "name a file.py:function" in str(raised.value.next_step), "the module itself is missing"


HARMLESS: dict[str, str] = {
    "reads standard input": "assert sys.stdin.read() == ''\nreturn [1.0]",
    "starts a program that reads": "import subprocess as s\nassert not s.run(['cat'], stdout=-1).stdout\nreturn [1.0]",
    "closes standard output": "sys.stdout.close()\nreturn [1.0]",
    "replaces standard output": "sys.stdout = None\nreturn [1.0]",
    "gives a generator": "return (1.0 for _ in completions)",
    "prints half a pair": "print('\\ud800')\nreturn [1.0]",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_function_that_does_no_harm(name: str, tmp_path: Path) -> None:
    assert rewards_of(function(tmp_path, HARMLESS[name]), "7") == [1.0]


def test_a_module_that_writes_into_the_pipe_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be loaded") as raised:
        rewards_of(function(tmp_path, "return [1.0]", FORGED), "7")
    assert "wrote into the pipe" in str(raised.value.why)


@pytest.mark.parametrize("descriptor", [1, 2])
def test_what_a_function_prints_is_readable_and_obeyed_by_no_terminal(
    descriptor: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = f"for text in completions:\n    os.write({descriptor}, (text + '\\n').encode())\nreturn [1.0] * 2"
    assert rewards_of(function(tmp_path, body), "plain ünï\twords", "\x1b[31mred\u202e\x07") == [1, 1]
    said = capfd.readouterr()
    assert said.out == "" and "reward: plain ünï       words\n" in said.err
    assert r"reward: \x1b[31mred\u202e\x07" in said.err and "\x1b" not in said.err


def test_print_shows_what_was_printed_before_a_function_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckError, match="ended its process"):
        rewards_of(function(tmp_path, "print('before', end='')\nsys.stdout.flush()\nos._exit(3)"), "7")
    assert "reward: before\n" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["\x1b[31m" * 5_000_000, "\n" * 1_000_000, ("x" * 50 + "\n") * 100_000])
def test_what_a_function_prints_is_bounded(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(text)
    body = f"print(open({str(tmp_path / 'text')!r}).read())\nreturn [1.0]"
    assert rewards_of(function(tmp_path, body), "7") == [1]
    said = capfd.readouterr().err
    assert len(said) < 1_000_000 and "more bytes left out" in said
