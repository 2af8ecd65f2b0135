from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backhand.data.options import RowSources
from backhand.errors import UsageError
from backhand.generation.options import AnswerOptions, ChatOptions, GenerateOptions, SamplingOptions, TalkOptions


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("greedy", "yes"),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", 0),
        ("top_k", 2.5),
        ("seed", -1),
        ("seed", 2**63),
        ("max_new_tokens", 0),
        ("stop", ("a", "")),
        ("stop", ("\ud800",)),
    ],
)
def test_values_out_of_range_are_named(field: str, value: Any) -> None:
    sampling = SamplingOptions(**{field: value})
    for options in (GenerateOptions(AnswerOptions(prompt="a"), sampling=sampling), ChatOptions(sampling=sampling)):
        with pytest.raises(UsageError) as caught:
            options.validate()
        assert caught.value.where == field


@pytest.mark.parametrize(
    ("answer", "data", "where"),
    [
        ({}, (), "prompt"),
        ({"prompt": "a", "compare": True}, (), "compare"),
        ({"prompt": "a", "output": Path("o")}, (), "output"),
        ({"overwrite": True}, ("rows.jsonl",), "overwrite"),
        ({"batch_rows": 0}, ("rows.jsonl",), "batch_rows"),
        ({"prompt": "\ud800"}, (), "prompt"),
    ],
)
def test_what_contradicts_itself_is_refused(answer: dict[str, Any], data: tuple[str, ...], where: str) -> None:
    with pytest.raises(UsageError) as caught:
        GenerateOptions(AnswerOptions(**answer), RowSources(data=data)).validate()
    assert caught.value.where == where


def test_sensible_options_pass() -> None:
    options = GenerateOptions(AnswerOptions(prompt="-", adapter=Path("a"), compare=True))
    assert options.validate() is options
    rows = GenerateOptions(AnswerOptions(output=Path("o"), overwrite=True), RowSources(data=("rows.jsonl",)))
    assert rows.validate() is rows
    chat = ChatOptions(TalkOptions(Path("a")), SamplingOptions(temperature=0.0, top_p=1.0, top_k=1, stop=("\n",)))
    assert chat.validate() is chat


def test_options_are_frozen_and_read_without_torch() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingOptions().seed = 3  # type: ignore[misc]
    code = "import sys, backhand.generation.options; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
