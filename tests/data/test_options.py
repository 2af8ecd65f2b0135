from __future__ import annotations

import ast
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from backhand.data import options as options_file
from backhand.data.options import DataOptions, LintRunOptions, parse_template_args
from backhand.errors import UsageError


def test_defaults_are_valid_and_validate_chains() -> None:
    options = DataOptions(data=("rows.jsonl",))
    assert options.validate() is options


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", ("",)),
        ("data", ("a\0b",)),
        ("data", (3,)),
        ("eval_fraction", 1.0),
        ("eval_fraction", -0.1),
        ("eval_fraction", math.nan),
        ("eval_fraction", True),
        ("eval_fraction", "0.1"),
        ("max_length", 1),
        ("max_length", 2.5),
        ("max_length", True),
        ("long_rows", "split"),
        ("train_on", "prompts"),
        ("chat_template", 3),
        ("system", "\ud800"),
        ("template_args", ["a"]),
        ("template_args", {"tools": []}),
        ("template_args", {1: 2}),
        ("max_rows", 0),
        ("skip_bad", "yes"),
    ],
)
def test_values_out_of_range_name_the_field(field: str, value: object) -> None:
    with pytest.raises(UsageError) as raised:
        DataOptions(**{field: value}).validate()  # type: ignore[arg-type]
    assert raised.value.where == field


def test_two_ways_of_holding_out_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="eval_fraction"):
        DataOptions(data=("a.jsonl",), eval_data=("b.jsonl",), eval_fraction=0.1).validate()


def test_template_args_from_the_command_line() -> None:
    assert parse_template_args(["enable_thinking=false", "name=Ada", "n=3", "empty="]) == {
        "enable_thinking": False,
        "name": "Ada",
        "n": 3,
        "empty": "",
    }
    assert parse_template_args('{"a": {"b": null}}') == {"a": {"b": None}}
    for wrong in ("a", "=3", '{"a": '):
        with pytest.raises(UsageError) as raised:
            parse_template_args(wrong)
        assert raised.value.where == "template_args"


def test_a_file_as_a_system_message_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "style.txt"
    file.write_text("Be terse.")
    with pytest.raises(UsageError, match="is a file, and the message is expected itself") as raised:
        DataOptions(data=("rows.jsonl",), system=str(file)).validate()
    assert raised.value.where == "system" and raised.value.next_step == f'give its contents: --system "$(cat {file})"'
    DataOptions(data=("rows.jsonl",), system="style.txt").validate()


def test_every_field_has_a_docstring_below_it() -> None:
    source = Path(options_file.__file__).read_text(encoding="utf-8")
    documented = {
        before.target.id
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
        for before, after in zip(node.body, node.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    assert documented == {field.name for kind in (DataOptions, LintRunOptions) for field in fields(kind)}


def test_options_are_read_without_heavy_imports() -> None:
    code = (
        "import sys, backhand.data.options; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
