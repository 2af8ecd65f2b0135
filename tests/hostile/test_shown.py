"""Texts that a terminal obeys, in every name and value that is printed: they are written out, and nothing else changes.

Each of `TEXTS` at each of `PLACES`, in few children: a case is one command line. `make fuzz` looks at every command
that it runs in the same way.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from backhand.cli.exit_status import exit_status
from backhand.errors import DataError
from backhand.printing import show_what_libraries_say, visible, write_answer
from backhand.terminal import console
from tests.fuzz.child import Attempt, run_attempts
from tests.hostile.conftest import World

TEXTS = {
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "C1": "\x9b2Jcleared",
    "forged line": "x\nerror: forged\n  next: run this",
    "over": "x\r\x1b[1A\x08over",
    "override": "\u202egnp.exe\u202c",
    "isolate": "\u2067a\u2069\u200fb\u061c",
    "breaks": "a\u2028b\u2029c\x85d\x0be\ufeff\U000e0041",
}
HIDDEN = {character for text in TEXTS.values() for character in text if visible(character) != character}


def test_these_are_characters_of_every_kind() -> None:
    assert {"\x1b", "\x07", "\x9b", "\n", "\r", "\x08", "\u202e", "\u2067", "\u200f", "\u2028", "\x85"} <= HIDDEN


# ---- where a text from outside may come to be printed ------------------------------------------------------------

Place = Callable[[Path, str, World], list[object]]
"""Lays the text out in an empty directory, and gives the command that is to read it."""


def adapter_with(place: Path, world: World, name: str = "a", **fields: object) -> Path:
    copy = place / name
    shutil.copytree(world.adapter, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return copy


def rows(place: Path, *values: object, name: str = "rows.jsonl") -> str:
    (place / name).write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return f"--data=./{name}"


def lint(world: World, *words: object) -> list[object]:
    return ["lint", "--model", world.model, *words]


def stores(place: Path, text: str) -> None:
    """What is no model is listed too, with the reason; one that can be trained would be timed."""
    no_model = b"GGUF" + bytes(60)
    studio = place / "home" / ".lmstudio" / "models" / text / "m"
    studio.mkdir(parents=True)
    (studio / f"{text}.gguf").write_bytes(no_model)
    ollama = place / "home" / ".ollama" / "models"
    tag = ollama / "manifests" / "registry.ollama.ai" / "library" / text / text
    tag.parent.mkdir(parents=True)
    digest = "0" * 64
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    tag.write_text(json.dumps({"layers": [layer]}))
    (ollama / "blobs").mkdir()
    (ollama / "blobs" / f"sha256-{digest}").write_bytes(no_model)


def listed(place: Path, text: str, world: World) -> list[object]:
    stores(place, text)
    return ["models"]


def asked(kind: str) -> Place:
    def lay_out(place: Path, text: str, world: World) -> list[object]:
        stores(place, "tiny")
        return ["generate", f"--model={kind}:{text}", "--prompt", "x"]

    return lay_out


def in_toml(line: str) -> Place:
    def lay_out(place: Path, text: str, world: World) -> list[object]:
        (place / "run.toml").write_text(line.format(json.dumps(text)), encoding="utf-8")
        return ["train", "run.toml"]

    return lay_out


def template(place: Path, text: str, world: World) -> list[object]:
    (place / "t.jinja").write_text(f"{{{{ raise_exception({json.dumps(text)}) }}}}", encoding="utf-8")
    return lint(world, "--data", world.rows, "--chat-template", "t.jinja")


def named_run(place: Path, text: str, world: World) -> list[object]:
    words = [word for word in world.train(f"out/{text}", "--no-answers", steps=1) if word != "--quiet"]
    return [word for word in words if word != "--no-answers"]


PLACES: dict[str, tuple[Place, tuple[int, ...]]] = {
    "base of an adapter": (
        lambda p, t, w: ["inspect", adapter_with(p, w, base_model_name_or_path=t).name],
        (0,),
    ),
    "key of an adapter": (lambda p, t, w: ["inspect", adapter_with(p, w, **{t: t}).name], (0, 4)),
    "target of an adapter": (lambda p, t, w: ["inspect", adapter_with(p, w, target_modules=[t]).name], (4,)),
    "value of an adapter": (lambda p, t, w: ["inspect", adapter_with(p, w, r=t, peft_type=t).name], (4,)),
    "key of a pattern": (lambda p, t, w: ["inspect", adapter_with(p, w, rank_pattern={t: t}).name], (4,)),
    "adapter that is not there": (lambda p, t, w: ["inspect", f"a/{t}"], (2, 4)),
    "name of an adapter": (lambda p, t, w: ["inspect", f"./{adapter_with(p, w, t).name}"], (0,)),
    "two adapters": (
        lambda p, t, w: ["diff", f"./{adapter_with(p, w, t).name}", f"./{adapter_with(p, w, f'{t}2').name}"],
        (0,),
    ),
    "name of rows": (lambda p, t, w: lint(w, rows(p, {"text": "a"}, name=f"{t}.jsonl")), (0,)),
    "rows that are not there": (lambda p, t, w: lint(w, f"--data=./{t}.jsonl"), (3,)),
    "column": (lambda p, t, w: lint(w, rows(p, {"text": "a", t: "b"})), (0,)),
    "column alone": (lambda p, t, w: lint(w, rows(p, {t: "b"})), (3,)),
    "bad row": (lambda p, t, w: lint(w, rows(p, t), "--skip-bad"), (3,)),
    "role": (lambda p, t, w: lint(w, rows(p, {"messages": [{"role": t, "content": "a"}]})), (0, 3, 4)),
    "row that is shown": (lambda p, t, w: lint(w, rows(p, {"text": t}), "--show", 1), (0,)),
    "row as JSON": (lambda p, t, w: lint(w, rows(p, {"text": t, t: t}), "--show", 1, "--json"), (0,)),
    "template": (template, (3, 4)),
    "stores": (listed, (0,)),
    "stores as JSON": (lambda p, t, w: [*listed(p, t, w), "--json"], (0,)),
    "name of Ollama": (asked("ollama"), (4,)),
    "name of LM Studio": (asked("lmstudio"), (4,)),
    "model": (lambda p, t, w: ["generate", f"--model={t}", "--prompt", "x"], (4,)),
    "option": (lambda p, t, w: ["lint", f"--{t}"], (2,)),
    "command": (lambda p, t, w: [t], (2,)),
    "value of an option": (lambda p, t, w: ["lint", f"--long-rows={t}"], (2,)),
    "key of a configuration": (in_toml("[run]\n{0} = 1"), (2,)),
    "value of a configuration": (in_toml("[model]\ndtype = {0}"), (2,)),
    "run": (named_run, (0,)),
}


def test_a_text_that_a_terminal_obeys(world: World, tmp_path: Path) -> None:
    """`fuzz.child` fails a case that prints such a character, hangs, ends as a bug or touches what it reads."""
    cases = [(place, text) for place in PLACES for text in TEXTS]
    print(f"{len(cases)} cases of names and texts")
    assert len(cases) >= 200
    attempts = []
    for number, (place, text) in enumerate(cases):
        directory = tmp_path / str(number)
        directory.mkdir()
        command = PLACES[place][0](directory, TEXTS[text], world)
        attempts.append(Attempt([str(word) for word in command], directory))
    wrong = [
        (place, text, attempt.command, outcome)
        for (place, text), attempt, outcome in zip(cases, attempts, run_attempts(attempts), strict=True)
        if outcome.fault
        or outcome.code not in PLACES[place][1]
        or "\nerror: forged" in outcome.said
        or "\n  next: run this" in outcome.said
    ]
    assert not wrong, wrong


# ---- the one place, by itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_consoles_and_errors(text: str) -> None:
    shown = io.StringIO()
    on = console(file=shown, width=400)
    table = Table(title=TEXTS[text])
    table.add_column(TEXTS[text])
    table.add_row(TEXTS[text])
    on.print(TEXTS[text], Text(TEXTS[text]), table)
    error = DataError(TEXTS[text], where=TEXTS[text], why=TEXTS[text], next_step=TEXTS[text])
    said = [
        str(error),
        error.one_line,
        exit_status(error, [])[1],
        exit_status(ValueError(TEXTS[text]), [TEXTS[text]])[1],
    ]
    for one in (*said, shown.getvalue()):
        assert visible(one, "\n") == one
    assert len(str(error).splitlines()) == 3
    assert visible(TEXTS[text]).isprintable()


def test_what_a_list_of_problems_has_of_its_own_stays() -> None:
    error = DataError("x", why="\n    - one\nforged\n    - two")
    assert str(error) == "x\n  why: \n    - one\\nforged\n    - two"


@pytest.mark.parametrize("text", ["déjà vu", "日本語", "🙂", "a\u00a0b", "نام", "100 %"])
def test_other_texts_stay(text: str) -> None:
    assert visible(text) == text


def test_what_libraries_say(capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    import logging
    import warnings

    before = logging.getLogRecordFactory(), warnings.formatwarning
    try:
        show_what_libraries_say()
        logging.getLogger("somebody").warning("model of type %s", TEXTS["colour"])
        text = warnings.formatwarning(UserWarning(TEXTS["override"]), UserWarning, "x.py", 1)
        assert visible(text, "\n") == text and "\\u202e" in text
        record = logging.getLogRecordFactory()("n", 30, "p", 1, "of type %s", (TEXTS["colour"],), None)
        assert record.getMessage() == "of type \\x1b[31mred\\x1b[0m"
    finally:
        logging.setLogRecordFactory(before[0])
        warnings.formatwarning = before[1]


class OnTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_answer_stays_in_a_pipe_and_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts that need joiners and marks keep them: Persian, Hebrew, emoji of several."""
    answer = "a\x1b]0;x\x07\n\tb\u202ec\r \u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f469 \u05d0\u200e"
    for stream, expected in (
        (io.StringIO(), answer),
        (
            OnTerminal(),
            answer.replace("\x1b", "\\x1b").replace("\x07", "\\x07").replace("\u202e", "\\u202e").replace("\r", "\\r"),
        ),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        write_answer(answer)
        assert stream.getvalue() == expected
