"""The real command line: fast help without torch, every command explained by an example that parses, `python -m`."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import inspect
import io
import shlex
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import backhand.__main__
from backhand.cli import commands
from backhand.cli.commands import COMMANDS
from backhand.cli.entry import Command
from backhand.cli.main import main, make_app
from tests.support import cli_commands

PROJECT = Path(__file__).parents[2]
names = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], check=False, capture_output=True, text=True, timeout=60)


def option_class(command: Command) -> type:
    module, _, name = str(command.options).partition(":")
    found: type = getattr(importlib.import_module(module), name)
    return found


def test_help_stays_small() -> None:
    script = "import sys; from backhand.cli.main import main; main(['--help']); sys.exit(f'{len(sys.modules)} modules')"
    count = int(run("-c", script).stderr.split()[-2])
    # What its time goes by, and no noise of a machine: 320 modules answer in 0.2 s.
    assert count < 360


def test_no_help_imports_torch_or_other_heavy_packages() -> None:
    script = (
        "import sys; from backhand.cli.main import main\n"
        f"for words in {[['--help'], ['--version'], *([command.name, '--help'] for command in COMMANDS)]!r}:\n"
        "    assert main(words) == 0, words\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'pyarrow', 'matplotlib', 'gguf', 'peft'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    finished = run("-c", script)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_importing_the_package_imports_nothing_heavy() -> None:
    finished = run("-c", "import sys, backhand; sys.exit('torch' in sys.modules or 'cyclopts' in sys.modules)")
    assert finished.returncode == 0


def test_python_dash_m_is_the_command() -> None:
    finished = run("-m", "backhand", "--version")
    assert (finished.returncode, finished.stdout.strip()) == (0, backhand.__version__)


def test_version_is_the_projects() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert backhand.__version__ == project["version"]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"│ {command.name} " in text


@names
def test_help_of_a_command_ends_with_its_example(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command.name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.endswith(f"Example: {command.example}")
    assert " ".join(command.summary.split()) in text


@names
def test_the_function_of_a_command_takes_its_options(command: Command) -> None:
    """An entry names both as text, which no type checker follows."""
    module, _, name = str(command.function).partition(":")
    called = getattr(importlib.import_module(module), name)
    first, *others = inspect.signature(called).parameters.values()
    assert first.annotation == option_class(command).__name__
    assert ("typed" in {parameter.name for parameter in others}) == command.tell_typed
    assert set(command.positional) <= {field.name for field in dataclasses.fields(option_class(command))}


@names
def test_the_example_of_a_command_parses(command: Command) -> None:
    program, *words = shlex.split(command.example)
    assert program == "backhand"
    assert words[0] == command.name
    make_app().parse_args(words)


@names
def test_an_unknown_option_names_the_nearest(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command.name, "--debgu"]) == 2
    assert "Did you mean --debug?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lr", "--learning-rate"),
        ("--lr=1e-4", "--learning-rate"),
        ("--wd", "--weight-decay"),
        ("--raank", "--rank"),
    ],
)
def test_an_option_is_found_by_its_initials_too(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", typed, "1"]) == 2
    assert f"Did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("name", backhand.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert name == "__version__" or callable(getattr(backhand, name))
    assert name in dir(backhand)


def test_nothing_else_is_shown() -> None:
    assert set(dir(backhand)) == set(backhand.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        backhand.trian  # noqa: B018 - the access is the test


@pytest.mark.parametrize("name", sorted({entry.name for entry in commands.COMMANDS} - {*backhand.__all__}))
def test_a_command_that_is_no_function_is_an_attribute_error_with_the_command(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute {name!r}: .* in a terminal: backhand {name}"):
        backhand.__getattr__(name)


@pytest.mark.parametrize(
    ("name", "same"), [("status", "backhand watch runs/mine"), ("resume", "backhand train --resume --output runs/mine")]
)
def test_another_tool_s_command_is_an_attribute_error_with_its_equivalent(name: str, same: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute {name!r}. Its equivalent in a terminal is {same}"):
        backhand.__getattr__(name)


@pytest.mark.parametrize("name", ["report", "search", "studio", "verify"])
def test_a_command_is_an_attribute_error_after_the_import_of_a_package_of_its_name(name: str) -> None:
    assert importlib.import_module(f"backhand.{name}") is getattr(backhand, name)
    with pytest.raises(AttributeError, match=f"no attribute {name!r}: .* in a terminal: backhand {name}"):
        getattr(backhand, name)("runs/mine")


@pytest.mark.parametrize("value", ["-", "- a list", "-5 + 3 = ?", "--- title ---"])
def test_a_value_may_begin_with_a_hyphen_where_it_cannot_be_an_option(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "COMMANDS", (cli_commands.END,))
    assert main(["end", "--how", value, "--size", "4"]) == 0
    (options,) = cli_commands.last_options
    assert (options.how, options.inner.size) == (value, 4)


def test_a_flag_before_an_option_whose_value_has_a_space_stays_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "COMMANDS", (cli_commands.END,))
    assert main(["end", "--careful", "--where=my run"]) == 0
    (options,) = cli_commands.last_options
    assert (options.careful, options.where) == (True, Path("my run"))


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(closed: str) -> None:
    script = (
        "import sys\n"
        "from backhand.cli import commands, main\n"
        "from tests.support.cli_commands import END\n"
        "commands.COMMANDS = (END,)\n"
        "sys.exit(main.main(['end', '--how', 'print']) or sys.stdin.closed)\n"
    )
    words = shlex.join([sys.executable, "-c", script])
    finished = subprocess.run(
        ["sh", "-c", f"{words} {closed}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=PROJECT,
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


@pytest.mark.skipif((3, 14) <= sys.version_info < (3, 14, 5), reason="Python has no such number there")
def test_a_command_looks_through_all_objects_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gc.get_threshold()
    monkeypatch.setattr("backhand.__main__.leave_out_first", lambda: None)
    monkeypatch.setattr("backhand.cli.main.main", gc.get_threshold)
    try:
        young, middle, old = backhand.__main__.run()
    finally:
        gc.set_threshold(*before)
    assert (young, middle) == before[:2] and old >= 10 * before[2]


@pytest.mark.parametrize("module", ["backhand.cli.commands", "cyclopts.group"])
def test_an_interruption_while_the_command_line_is_imported_ends_quietly(module: str) -> None:
    """The interruption comes from within the import: of its own modules, or in the middle of its parser's."""
    script = (
        "import os, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "            signal.sigtimedwait([], 10)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from backhand.__main__ import run\n"
        "sys.exit(run())\n"
    )
    finished = run("-c", script)
    assert (finished.returncode, finished.stdout, finished.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    "swallows",
    [
        "except KeyboardInterrupt: raise RuntimeError('it cannot be imported') from None",
        "except KeyboardInterrupt: pass\n            raise ImportError('it cannot be imported')",
    ],
    ids=["within", "after"],
)
def test_an_interruption_that_a_library_makes_an_error_of_is_one_all_the_same(swallows: str) -> None:
    """As extensions written in C do, whose import fails by whatever happens within it."""
    script = (
        "import os, signal, sys\n"
        "class Swallows:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'backhand.cli.commands':\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "                signal.sigtimedwait([], 10)\n"
        f"            {swallows}\n"
        "sys.meta_path.insert(0, Swallows())\n"
        "from backhand.__main__ import run\n"
        "sys.exit(run())\n"
    )
    finished = run("-c", script)
    assert (finished.returncode, finished.stdout, finished.stderr) == (130, "", "interrupted\n")


def test_a_bug_after_an_interruption_that_a_command_has_dealt_with_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(_: list[str]) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("backhand.cli.main.make_app", lambda: app)
    assert main(["chat"]) == 1
    assert "unexpected ZeroDivisionError: a bug" in capsys.readouterr().err


def test_streams_that_are_none_of_python_s_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        encoding: Any = None

        def reconfigure(self) -> None:
            """Takes nothing that Python's take."""

    monkeypatch.setattr("sys.stdout", stream := Stream())
    assert main(["--version"]) == 0
    assert stream.getvalue().strip() == backhand.__version__


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("ascii:replace", "ascii replace"),
        ("latin-1", "iso8859-1 backslashreplace"),
        (":replace", "utf-8 replace"),
        ("", "utf-8 backslashreplace"),
    ],
)
def test_what_the_environment_names_for_streams_stays(named: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", named)
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("PYTHONCOERCECLOCALE", "0")
    monkeypatch.setenv("LC_ALL", "C")
    code = "import codecs, sys; from backhand.cli.main import main; main(['--version']); out = sys.stdout"
    reported = run("-c", f"{code}; print(codecs.lookup(out.encoding).name, out.errors)").stdout
    assert reported.splitlines()[-1] == found


def test_the_whole_version_names_what_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKHAND_KERNELS", "none")
    finished = run("-m", "backhand", "--version", "--verbose")
    assert finished.returncode == 0
    for word in ("backhand ", "torch ", "transformers ", "cores, ", "--dtype auto is", "compiled kernels: none"):
        assert word in finished.stdout
