"""Every code block of the documentation is run unchanged, or is listed in blocks.toml with the reason why not."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from backhand.cli.main import make_app
from tests.support.doc_blocks import PAGES, Block, blocks, parse
from tests.support.doc_world import World

LISTED: dict[str, Any] = tomllib.loads((Path(__file__).parent / "blocks.toml").read_text(encoding="utf-8"))
NOT_RUN: list[dict[str, str]] = LISTED["not_run"]
QUICK: list[str] = LISTED["quick_pages"]
SLOW: list[str] = LISTED["slow_pages"]
PYTHON_BEFORE: dict[str, str] = LISTED["python_before"]


def entry(block: Block) -> dict[str, str] | None:
    """The line of the list that is about this block."""
    return next(
        (listed for listed in NOT_RUN if (listed["page"], listed["begins"]) == (block.page, block.first_line)), None
    )


def pages() -> list[Any]:
    """Each page with blocks to run, under its marker: what is not known to be quick may need the model."""
    found = []
    for page in PAGES:
        if any(entry(block) is None for block in blocks(page)):
            marks = () if page in QUICK else (pytest.mark.slow,) if page in SLOW else (pytest.mark.smollm2,)
            found.append(pytest.param(page, marks=marks, id=page))
    return found


@pytest.mark.parametrize("page", pages())
def test_a_page_can_be_typed(page: str, tmp_path: Path) -> None:
    world = World(tmp_path)
    exec(PYTHON_BEFORE.get(page, ""), world.names)
    for block in blocks(page):
        if entry(block) is None:
            world.run(block)


def test_what_is_listed_is_there_and_has_a_reason() -> None:
    there = {(block.page, block.first_line) for page in PAGES for block in blocks(page)}
    gone = [listed for listed in NOT_RUN if (listed["page"], listed["begins"]) not in there]
    assert gone == [], "these blocks are no longer there: take them off blocks.toml"
    assert all(listed["reason"] in LISTED["reasons"] for listed in NOT_RUN)
    assert len(NOT_RUN) == LISTED["count"], "a block more or less that is not run: count it in blocks.toml"


def test_a_block_that_nothing_can_run_is_listed() -> None:
    languages = {"sh", "console", "python", "json", "jsonl", "toml", "yaml"}
    stray = [
        block.place for page in PAGES for block in blocks(page) if block.language not in languages and not entry(block)
    ]
    assert stray == [], "give the block a language that is run, or list it in blocks.toml with its reason"


def test_no_two_listed_blocks_of_a_page_begin_alike() -> None:
    for page in PAGES:
        begins = [block.first_line for block in blocks(page) if entry(block)]
        assert len(begins) == len(set(begins)), page


def test_the_pages_named_are_there() -> None:
    assert {*QUICK, *SLOW, *PYTHON_BEFORE} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_parses(page: str) -> None:
    for block in blocks(page):
        for words in block.command_lines:
            make_app().parse_args(words)


def test_fenced_and_indented_blocks_are_found_with_their_lines() -> None:
    text = "a\n\n```sh\nbackhand train \\\n  --rank 4  # four\n```\n\n- b\n\n      x = 1\n\n"
    text += '```jsonl title="r.jsonl"\n{}\n```\n'
    shell, indented, rows = parse("p.md", text)
    assert (shell.line, shell.language, shell.command_lines) == (3, "sh", [["train", "--rank", "4"]])
    assert (indented.line, indented.language, indented.text) == (10, "", "x = 1\n")
    assert (rows.language, rows.title) == ("jsonl", "r.jsonl")


def test_what_a_console_shows_must_be_printed(tmp_path: Path) -> None:
    world = World(tmp_path)
    shown = "$ printf 'loss │ 0.25 │ yes\\nrank │ 1e-3\\nend\\n'\nloss   │ 0.31 │ no\n───\nrank │ 2e-12\n"
    world.run(Block("page.md", 7, "console", "", shown))
    # Digests of what was computed are another processor's own.
    digests = "".join(f"$ printf 'SHA-256 {'0a' * 32}\\n'\nSHA-256 {digits * 32}\n" for digits in ("0a", "f1"))
    world.run(Block("page.md", 7, "console", "", digests))
    for wrong in (shown.replace("loss   ", "lost "), shown + "loss │ 0.25\n", shown + "more\n"):
        with pytest.raises(AssertionError, match="not printed"):
            world.run(Block("page.md", 7, "console", "", wrong))


def test_a_block_that_fails_says_where(tmp_path: Path) -> None:
    world = World(tmp_path)
    for language, text in (("sh", "false\ntrue\n"), ("python", "1 / 0\n"), ("jsonl", "{}\n{\n"), ("perl", "1;\n")):
        with pytest.raises(AssertionError, match=r"page\.md:7"):
            world.run(Block("page.md", 7, language, "", text))


def test_an_adapter_is_trained_only_where_nothing_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    monkeypatch.setattr(World, "_train", lambda _world, run: trained.append(run))
    script = "true --output runs/own\ntrue runs/own/adapter --output runs/both\n"
    World(tmp_path).type(script + "true runs/one/adapter --output runs/one/merged\n")
    assert trained == ["one"]


def test_blocks_see_what_those_before_them_left(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.run(Block("page.md", 1, "jsonl", "own.jsonl", '{"text": "a"}\n'))
    world.run(
        Block("page.md", 2, "python", "", "from pathlib import Path\nsize = len(Path('own.jsonl').read_text())\n")
    )
    world.run(Block("page.md", 3, "python", "", "assert size == 14\n"))
    world.run(Block("page.md", 4, "sh", "", "grep -q text own.jsonl && test -e docs/data.md\n"))
