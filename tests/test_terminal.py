"""The terminal shows names, paths and rows literally, whatever they contain."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from backhand.cli.main import main
from backhand.terminal import console, console_for_tables, working
from tests.support.tiny_run import TinyRun

# To rich: a closing tag of nothing, a colour, an emoji, a link, and style that is never closed.
MARKUP = "a[/b] [red]x :smile: [link=https://example.com]y [bold]"
PLACE = "m[/ark]up :smile: [red]"


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (console(), console_for_tables()):
        shown.print(MARKUP, soft_wrap=True)
        assert capsys.readouterr().out == f"{MARKUP}\n"
    with working(MARKUP) as say:
        say(MARKUP)


def test_every_console_is_of_this_kind() -> None:
    package = Path(__file__).parents[1] / "src" / "backhand"
    made = re.compile(r"\bConsole\((?!markup=False, emoji=False)[^)]*\)")
    found = [
        f"{path.relative_to(package)}: {call}"
        for path in package.rglob("*.py")
        for call in made.findall(path.read_text(encoding="utf-8"))
        if not ("markup=False" in call and "emoji=False" in call)
    ]
    assert found == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, rows and a finished run, all of them in folders whose names would be markup."""
    folder = Path(tmp_path_factory.mktemp("names")) / PLACE
    folder.mkdir(parents=True)
    tiny = TinyRun(folder)
    with tiny.rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": MARKUP, "completion": MARKUP}) + "\n")
    arguments = ["--model", str(tiny.model), "--data", str(tiny.rows), "--eval-data", str(tiny.held_out)]
    assert main(["train", *arguments, "--output", str(folder / "run"), "--max-steps", "1", "--rank", "2"]) == 0
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "lint --model {m} --data {r} --show 12",
        "plan --model {m} --data {r} --no-calibrate",
        "evaluate --model {m} --data {r} --adapter {a}",
        "verify --run {run} --max-tokens 24",
        "merge --model {m} --adapter {a} --output {out}",
        "export --model {m} --adapter {a} --to gguf --output {out}.gguf",
        "inspect {a}",
        "diff {a} {a}",
        "compress {a} --error 0.1 --output {out}",
        "combine scale {a} --weights 2 --output {out}",
        "report {run}",
        "paper --analyses similarity --adapter {a} {a} --output {out}",
    ],
)
def test_commands_take_any_name(words: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = place / f"out {words.split(maxsplit=1)[0]}"
    names = {"m": place / "model", "r": place / "rows.jsonl", "a": place / "run" / "adapter", "run": place / "run"}
    names["out"] = output
    assert main([str(word.format(**names)) for word in words.split()]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "😄" not in shown
    if "--output" in words:
        assert str(output) in shown
        shutil.rmtree(output, ignore_errors=True)
