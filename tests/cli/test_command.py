"""An options dataclass becomes a command: names, types, help, TOML under the command line, origins in errors."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path

import cyclopts
import pytest

from backhand.cli.command import Prepared, command
from backhand.cli.entry import Command
from backhand.cli.main import main, run_prepared
from backhand.errors import UsageError
from backhand.options.config import TrainConfig
from backhand.options.config_file import load_config
from tests.support import cli_commands
from tests.support.cli_commands import Files, Inner, Outer, end, files


def run(function: object, *words: str) -> object:
    app = cyclopts.App(name="try", result_action="return_value", exit_on_error=False, print_error=False)
    app.default(function)
    result = app(list(words))
    return run_prepared(result) if isinstance(result, Prepared) else result


def options(*words: str) -> Outer:
    run(end, *words)
    (parsed,) = cli_commands.last_options
    return parsed


def test_nothing_typed_gives_the_defaults() -> None:
    assert options() == Outer()


def test_options_of_every_type_reach_their_section() -> None:
    parsed = options(
        *("--rate", "2", "--mode", "how", "--careful", "--no-thorough", "--where", "there"),
        *("--size", "8", "--names", "a,b", "c", "--numbers", "x=1", "y=2"),
    )
    inner = Inner(size=8, names=("a", "b", "c"), numbers={"x": 1, "y": 2})
    assert parsed == Outer(rate=2.0, mode="how", careful=True, thorough=False, where=Path("there"), inner=inner)


def test_options_that_take_several_may_be_repeated() -> None:
    assert options("--names", "a", "--names", "b").inner.names == ("a", "b")


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('rate = 0.25\ncareful = true\n[inner]\nsize = 5\nnames = "a,b"\nnumbers = { x = 1 }\n')
    assert options(str(file)) == Outer(rate=0.25, careful=True, inner=Inner(5, ("a", "b"), {"x": 1}))
    typed = options(str(file), "--size", "6", "--careful=false", "--names", "c")
    assert typed == Outer(rate=0.25, careful=False, inner=Inner(6, ("c",), {"x": 1}))


def test_typed_held_out_rows_win_over_a_share_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[data]\neval_fraction = 0.1\n")
    seen: list[TrainConfig] = []
    run(
        command(Command("train", "", "", TrainConfig, seen.append, file=load_config)),
        str(file),
        "--eval-data",
        "held.jsonl",
    )
    assert (seen[0].data.eval_data, seen[0].data.eval_fraction) == (("held.jsonl",), None)


def test_an_option_typed_at_its_default_still_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("rate = 0.25\n")
    assert options(str(file), "--rate", "0.5").rate == 0.5


def test_a_refused_value_is_named_as_the_user_wrote_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as typed:
        options("--rate", "-1")
    assert typed.value.where == "--rate"
    file = tmp_path / "run.toml"
    file.write_text("rate = -1.0\n")
    with pytest.raises(UsageError) as in_file:
        options(str(file))
    assert in_file.value.where == f"{file}: rate"
    file.write_text("[inner]\nnumbers = { bad = 1 }\n")
    with pytest.raises(UsageError) as nested:
        options(str(file))
    assert nested.value.where == f"{file}: inner.numbers['bad']"


def test_positional_fields() -> None:
    cli_commands.last_files.clear()
    run(files, "join", "a.txt", "b.txt", "--weight", "3")
    assert cli_commands.last_files == [Files("join", (Path("a.txt"), Path("b.txt")), 3.0)]


def test_a_refused_positional_value_is_named_as_the_help_names_it() -> None:
    with pytest.raises(UsageError) as missing:
        run(files, "split")
    assert missing.value.where == "FILES"


def test_a_missing_required_field_is_a_usage_error() -> None:
    with pytest.raises(cyclopts.CycloptsError, match="VERB"):
        run(files)


def test_help_shows_each_docstring_and_other_fields_as_options(capsys: pytest.CaptureFixture[str]) -> None:
    run(end, "--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Size of the inner thing, in things. [default: 3]" in text
    assert "Rate of ending; see --how and --size." in text
    assert "Either how or fast." in text  # values keep their name, even where a field is called the same
    assert "Whether to take care." in text
    assert "--no-thorough" in text
    assert "--no-careful" not in text


def test_a_field_without_docstring_and_a_doubled_name_are_refused() -> None:
    @dataclass(frozen=True)
    class Silent:
        size: int = 1

    with pytest.raises(TypeError, match="size has no docstring"):
        command(Command("silent", "", "", Silent, print))

    @dataclass(frozen=True)
    class Twice:
        size: int = 1
        """Outer size."""
        inner: Inner = field(default_factory=Inner)

    with pytest.raises(TypeError, match="two fields named size"):
        command(Command("twice", "", "", Twice, print))


def test_defaults_pass_where_pydantic_is_loaded_as_loggers_load_it(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("pydantic")  # cyclopts looks whether somebody has imported it
    assert main(["train", "--data", "absent.jsonl", "--output", "run"]) == 3
    assert "absent.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--epochs", "1.9"],
            "--epochs: 1.9 is not a whole number\n  next: give a whole number; --max-steps ends a run",
        ),
        (
            ["--warmup-steps=0.1"],
            "--warmup-steps: 0.1 is not a whole number\n  next: give a whole number: it is a number of steps",
        ),
        (["--seed", "1.5"], "--seed: 1.5 is"),
        (["--layers-to-transform", "1", "3.5"], "--layers-to-transform: 3.5 is"),
    ],
)
def test_a_fraction_is_not_rounded(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_whole_number_may_have_a_point() -> None:
    assert options("--size", "8.0").inner.size == 8
