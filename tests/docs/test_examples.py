"""The example in every command's help works unchanged, on a few rows and SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backhand.cli.commands import COMMANDS
from backhand.cli.entry import Command
from tests.support.doc_world import World

# No model: these take seconds.
QUICK = {"convert", "verify"}
# Minutes of them all together: what the quick run of every change leaves to `make test-slow`.
SLOW = {
    "demo",
    "paper",
    "sine",
    "chat",
    "merge",
    "export",
    "plan",
    "combine",
    "diff",
    "compress",
    "report",
    "watch",
} | {"studio"}
# These serve until they are interrupted, once they have said where.
SERVERS = {"watch": "http://127.0.0.1:", "studio": "http://127.0.0.1:"}
# What is typed into a command that asks.
GIVEN = {"chat": "Hello\n"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One directory for all examples, as for a reader who tries one after the other."""
    return World(tmp_path_factory.mktemp("examples"))


def commands() -> list[Any]:
    marks = {**dict.fromkeys(QUICK, ()), **dict.fromkeys(SLOW, (pytest.mark.slow,))}
    return [
        pytest.param(command, id=command.name, marks=marks.get(command.name, (pytest.mark.smollm2,)))
        for command in COMMANDS
    ]


@pytest.mark.parametrize("command", commands())
def test_an_example_works(command: Command, world: World) -> None:
    if command.name in SERVERS:
        _line, code = world.serve(command.example, SERVERS[command.name])
        assert code in (0, 130)
        return
    printed = world.type(command.example, GIVEN.get(command.name, ""))
    silent = ("train", "search", "embed", "mine")  # whose results are files
    assert printed.strip() or command.name in silent, "an example that shows nothing explains nothing"


def test_an_example_that_does_not_work_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit code 2"):
        World(tmp_path).type("backhand verify --op lora_liner")


def test_a_server_is_interrupted_once_it_has_said_where(tmp_path: Path) -> None:
    world = World(tmp_path)
    program = "import time; print('at http://127.0.0.1:1/x', flush=True); time.sleep(600)\n"
    (world.directory / "serve.py").write_text(program)
    line, code = world.serve("python3 serve.py", "http://")
    assert line == "at http://127.0.0.1:1/x\n"
    assert code != 0
    with pytest.raises(AssertionError, match="was not printed"):
        world.serve("echo nowhere", "http://")
