"""A system message that all training rows have: kept with the adapter, and part of the commands that are suggested."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from backhand.adapters.contents import read_adapter_directory
from backhand.data.options import LONGEST_TYPED, DataOptions, asking_options, shell_quoted
from backhand.data.prepare import prepare
from backhand.generation.chat import chat_command
from backhand.generation.command import generate_command
from backhand.generation.options import AnswerOptions, ChatOptions, GenerateOptions, SamplingOptions, TalkOptions
from backhand.interop.other_formats import MODELFILE, write_modelfile
from backhand.nn.model_options import BaseModelOptions
from backhand.printing import visible
from backhand.report.page import run_page
from backhand.report.run_record import read_run
from backhand.training.console import closing_lines
from backhand.training.run import train
from tests.support.page import Page
from tests.support.tiny_run import TinyRun
from tests.support.tiny_tokenizer import tiny_tokenizer

SYSTEM = "answer in the user's list\nof names"


def rows_with(path: Path, *systems: str | None) -> Path:
    lines = []
    for number in range(9):
        system = systems[number % len(systems)]
        messages = [{"role": "user", "content": f"name {number}"}, {"role": "assistant", "content": "a list"}]
        own = [] if system is None else [{"role": "system", "content": system}]
        lines.append(json.dumps({"messages": [*own, *messages]}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(
    ("systems", "given", "common"),
    [
        ((SYSTEM,), None, SYSTEM),
        ((SYSTEM, "another"), None, None),
        ((SYSTEM, None), None, None),
        ((SYSTEM, None), SYSTEM, SYSTEM),
        ((None,), "given", "given"),
        ((None,), None, None),
    ],
)
def test_what_all_rows_have(
    systems: tuple[str | None, ...], given: str | None, common: str | None, tmp_path: Path
) -> None:
    rows = rows_with(tmp_path / "rows.jsonl", *systems)
    train_rows, _ = prepare(DataOptions(data=(str(rows),), system=given, eval_fraction=0.3), tiny_tokenizer())
    assert train_rows.report.system == common


def test_it_is_reported_wherever_the_adapter_is_asked(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_with(tmp_path / "rows.jsonl", SYSTEM)
    made = tiny.config(tmp_path / "run", data=(str(rows),), eval_data=(), max_steps=1)
    summary = train(made)
    adapter, option = Path(summary.adapter), f" --system {shell_quoted(SYSTEM)}"
    assert any(line.startswith("Next: ") and option in line for line in closing_lines(summary))
    record = read_adapter_directory(adapter).record
    assert record is not None and record.system == SYSTEM
    chat = Page(run_page(read_run(tmp_path / "run"))).root.text
    assert f"backhand chat --model {shlex.quote(str(tiny.model))} --adapter {shlex.quote(str(adapter))}{option}" in chat
    card = (adapter / "README.md").read_text()
    assert f"| system message of every row | {len(SYSTEM)} characters" in card and "user's list" not in card

    model, few = BaseModelOptions(model=str(tiny.model), dtype="float32"), SamplingOptions(max_new_tokens=2)
    asked = GenerateOptions(answer=AnswerOptions(adapter=adapter, prompt="name 1"), model=model, sampling=few)
    capsys.readouterr()
    generate_command(asked)
    found = capsys.readouterr()
    assert found.err.count(f"had the same system message, which prompts here lack:{option}") == 1
    assert "system" not in found.out
    chatted = ChatOptions(chat=TalkOptions(adapter=adapter, prompt="name 1"), model=model, sampling=few)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    chat_command(chatted)
    assert option in capsys.readouterr().err
    for options in (asked, chatted):
        object.__setattr__(options.template, "system", SYSTEM)
    generate_command(asked)
    chat_command(chatted)
    assert "system message" not in capsys.readouterr().err


def test_one_too_long_to_type_is_reported(tiny: TinyRun, tmp_path: Path) -> None:
    long = "a list " * LONGEST_TYPED
    rows = rows_with(tmp_path / "rows.jsonl", long)
    summary = train(tiny.config(tmp_path / "run", data=(str(rows),), eval_data=(), max_steps=1, max_length=9000))
    lines = closing_lines(summary)
    assert not any("a list a list" in line for line in lines)
    assert any("--system" in line and f"{len(long):,} characters" in line for line in lines)


def test_a_modelfile_has_it(tmp_path: Path) -> None:
    write_modelfile(tmp_path, "base", adapter="adapter.gguf", system=SYSTEM)
    assert (tmp_path / MODELFILE).read_text() == f'FROM base\nADAPTER ./adapter.gguf\nSYSTEM """{SYSTEM}"""\n'
    for ends_it in ('a """ b', 'say "a"', 'say ""'):
        write_modelfile(tmp_path, "base", system=ends_it)
        assert "SYSTEM" not in (tmp_path / MODELFILE).read_text()


@pytest.mark.parametrize(
    "text",
    [
        "Be kind.\nDon't; echo INJECTED #",
        "a\ttab",
        "\U0001f469\u200d\U0001f4bb and \u202e",
        "\\ back\nslash \\n",
        "plain 'quotes'",
        "é\u2028x",
    ],
)
def test_a_message_from_rows_comes_through_a_shell_as_it_is(text: str) -> None:
    typed = shell_quoted(text)
    assert typed.isprintable() and visible(typed) == typed
    bash = subprocess.run(["bash", "-c", f"printf %s {typed}"], capture_output=True, check=True)
    assert bash.stdout.decode() == text
    plain = subprocess.run(["sh", "-c", f"printf %s {typed}"], capture_output=True, check=True)
    assert not plain.stdout.startswith(b"INJECTED") and b"\nINJECTED" not in plain.stdout


def test_the_rows_own_message_goes_before_the_option() -> None:
    assert asking_options(DataOptions(system="given"), "rows'").endswith(
        f" --system {shell_quoted(chr(114) + 'ows' + chr(39))}"
    )
    assert "--system" not in asking_options(DataOptions(system="given"), "long" * LONGEST_TYPED)
    assert asking_options(DataOptions(system="given")).endswith(" --system given")
