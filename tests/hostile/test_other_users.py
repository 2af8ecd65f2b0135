"""Files of another user: unreadable, readable only, or in a folder where everybody may write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from backhand.training.run import train
from tests.hostile.conftest import World
from tests.support.faulty_runs import temporary
from tests.support.limited import Ended, limited
from tests.support.tiny_run import StopAfter, TinyRun

pytestmark = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="not run: making files of another user takes root"
)

OTHER = 65_534
"""Neither the user of the command, nor the one whose processes it counts for."""


def give(path: Path, *, folders: int = 0o700, files: int = 0o600) -> Path:
    """Give a file, or a folder with all that is in it, to the other user."""
    for place in [path, *path.rglob("*")] if path.is_dir() else [path]:
        place.chmod(folders if place.is_dir() else files)
        os.chown(place, OTHER, OTHER)
    return path


def command(words: list[object], place: Path, **environment: str) -> Ended:
    """Run it without root's right to read and write everything; it leaves nothing temporary."""
    ended = limited(words, place, unprivileged=True, environment=environment)
    assert "bug" not in ended.errors, ended.errors
    assert ended.code == 0 or (ended.what and "next: " in ended.errors), ended.errors
    return ended


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target)) if source.is_dir() else Path(shutil.copy(source, target))


@pytest.fixture(scope="module")
def run_once(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    ended = limited(world.train("run", "--save-every", 1, "--eval-fraction", 0.3), place)
    assert ended.code == 0, ended.errors
    return place / "run"


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after step 3, with a checkpoint of each step before."""
    place = tmp_path_factory.mktemp("stopped")
    config = TinyRun(place).config(place / "run", save_every=1)
    with pytest.raises(StopAfter.Stopped):
        train(config, callbacks=[StopAfter(3)])
    return place / "run"


def train_with(world: World, **other: object) -> list[object]:
    words = world.train("out")
    for option, value in other.items():
        words[words.index(f"--{option}") + 1] = value
    return words


READING: dict[str, tuple[int, Callable[[World, Path], list[object]]]] = {
    "a model": (4, lambda w, t: w.ask("--model", give(copied(w.model, t / "m")))),
    "the configuration of a model": (4, lambda w, t: w.ask("--model", one_of(copied(w.model, t / "m"), "config.json"))),
    "the weights of a model": (4, lambda w, t: w.ask("--model", one_of(copied(w.model, t / "m"), "model.safetensors"))),
    "a tokenizer": (4, lambda w, t: w.ask("--model", one_of(copied(w.model, t / "m"), "tokenizer.json"))),
    "a GGUF file": (4, lambda w, t: w.ask("--model", give(copied(w.gguf, t / "m.gguf")))),
    "a model to train": (4, lambda w, t: train_with(w, model=give(copied(w.model, t / "m")))),
    "rows": (3, lambda w, t: train_with(w, data=give(copied(w.rows, t / "rows.jsonl")))),
    "rows to lint": (3, lambda w, t: ["lint", "--model", w.model, "--data", give(copied(w.rows, t / "rows.jsonl"))]),
    "rows in a folder": (3, lambda w, t: train_with(w, data=give(folder_with(w.rows, t / "d")) / "rows.jsonl")),
    "an adapter": (4, lambda w, t: w.ask("--model", w.model, "--adapter", give(copied(w.adapter, t / "a")))),
    "the factors of an adapter": (4, lambda w, t: ["inspect", one_of(copied(w.adapter, t / "a"), FACTORS)]),
    "one of two adapters": (4, lambda w, t: ["diff", w.adapter, give(copied(w.adapter, t / "a"))]),
    "a configuration": (2, lambda w, t: ["train", give(written(t / "run.toml", "[adapter]\nrank = 2\n"))]),
    "a chat template": (2, lambda w, t: w.train("out", "--chat-template", give(written(t / "chat.jinja", "x")))),
    "an adapter to begin with": (4, lambda w, t: w.train("out", "--from-adapter", give(copied(w.adapter, t / "a")))),
    "a reward function": (
        2,
        lambda w, t: w.train("out", *reward(give(written(t / "r.py", "def f(**_): return [1]\n")))),
    ),
}
FACTORS = "adapter_model.safetensors"


def one_of(folder: Path, name: str) -> Path:
    give(folder / name)
    return folder


def folder_with(source: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(source, folder)
    return folder


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def reward(file: Path) -> list[object]:
    return ["--objective", "grpo", "--reward", f"{file}:f", "--group", 2, "--max-new-tokens", 2]


@pytest.mark.parametrize("kind", READING)
def test_what_may_not_be_read(kind: str, world: World, tmp_path: Path) -> None:
    code, words = READING[kind]
    ended = command(words(world, tmp_path), tmp_path)
    assert ended.code == code, ended.errors
    assert "ermission denied" in ended.errors or "may not be read" in ended.errors, ended.errors
    assert not (tmp_path / "out" / "adapter").exists()


# ---- the run of another user -------------------------------------------------------------------------------------

READABLE = {"folders": 0o755, "files": 0o644}
PRIVATE = {"folders": 0o700, "files": 0o600}


@pytest.fixture
def theirs(run_once: Path, tmp_path: Path) -> Path:
    """A finished run that everybody may read, and its owner alone may write."""
    return give(copied(run_once, tmp_path / "run"), **READABLE)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]], ids=["anew", "resumed", "replaced"])
def test_their_run_is_not_written_to(more: list[object], world: World, theirs: Path, tmp_path: Path) -> None:
    before = contents(theirs)
    ended = command(world.train("run", *more), tmp_path)
    assert ended.code == (2 if not more else 5), ended.errors
    assert contents(theirs) == before


@pytest.mark.parametrize(
    "words", [["report", "run", "--output", "page.html"], ["inspect", "run"]], ids=lambda it: it[0]
)
def test_their_run_is_read(words: list[object], theirs: Path, tmp_path: Path) -> None:
    before = contents(theirs)
    ended = command(words, tmp_path)
    assert ended.code == 0, ended.errors
    assert contents(theirs) == before


def test_their_adapter_is_used(world: World, theirs: Path, tmp_path: Path) -> None:
    assert command(world.ask("--model", world.model, "--adapter", "run"), tmp_path).code == 0


@pytest.mark.parametrize("words", [["report", "run"], ["verify", "--run", "run"]], ids=lambda it: it[0])
def test_what_would_be_written_into_their_run(words: list[object], theirs: Path, tmp_path: Path) -> None:
    before = contents(theirs)
    ended = command(words, tmp_path)
    assert ended.code in (2, 5), ended.errors
    assert contents(theirs) == before


@pytest.mark.parametrize(
    "words", [["report", "run"], ["inspect", "run"], ["verify", "--run", "run"]], ids=lambda it: it[0]
)
def test_a_private_run(words: list[object], run_once: Path, tmp_path: Path) -> None:
    give(copied(run_once, tmp_path / "run"), **PRIVATE)
    ended = command(words, tmp_path)
    assert ended.code in (2, 4, 5) and "ermission denied" in ended.errors, ended.errors


@pytest.mark.parametrize(
    "name", [".lock", "config.toml", "checkpoints", "checkpoints/step-2", "metrics.jsonl", "facts.json"]
)
def test_one_file_of_a_stopped_run_is_theirs(name: str, stopped_once: Path, tmp_path: Path) -> None:
    """The run itself is one's own: it goes on or says why it cannot, and none of its files is lost."""
    run = copied(stopped_once, tmp_path / "run")
    give(run / name, **PRIVATE)
    before = set(contents(run))
    ended = command(["train", "--resume", "--output", "run"], tmp_path)
    assert ended.code in (0, 2, 4, 5), ended.errors
    assert ended.code == 0 or "ermission denied" in ended.errors, ended.errors
    assert (ended.code == 0) == (name == "facts.json"), ended.errors
    if ended.code and name != "checkpoints/step-2":  # that one is given another name, and cannot be removed
        assert not before - set(contents(run)) and not temporary(run)


def test_a_record_of_an_adapter_that_may_not_be_read(run_once: Path, tmp_path: Path) -> None:
    adapter = copied(run_once / "adapter", tmp_path / "a")
    give(adapter / "backhand.json")
    ended = command(["inspect", "a"], tmp_path)
    assert ended.code == 4 and "ermission denied" in ended.errors, ended.errors


# ---- folders for everybody ---------------------------------------------------------------------------------------


def test_their_output_in_a_folder_for_everybody(world: World, tmp_path: Path) -> None:
    """In a sticky folder nobody replaces what another user has put there."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    os.chown(shared, OTHER, OTHER)
    give(folder_with(world.rows, shared / "run"), folders=0o755)
    ended = command(world.train("shared/run", "--overwrite"), tmp_path)
    assert ended.code == 2 and "rows.jsonl" in ended.errors, ended.errors
    assert command(world.train("shared/mine"), tmp_path).code == 0
    combined = ["combine", "add", world.adapter, world.adapter, "--output", "shared/run", "--overwrite"]
    assert command(combined, tmp_path).code in (2, 5)
    assert [path.name for path in sorted(shared.iterdir())] == ["mine", "run"]


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o500])
def test_a_folder_that_may_not_be_written_to(mode: int, world: World, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    give(closed, folders=mode)
    for words in (
        world.train("closed/run"),
        ["combine", "add", world.adapter, world.adapter, "--output", "closed/a"],
        ["merge", "--model", world.model, "--adapter", world.adapter, "--output", "closed/m"],
        ["export", "--model", world.model, "--adapter", world.adapter, "--to", "gguf", "--output", "closed/a.gguf"],
        ["generate", "--model", world.model, "--data", world.rows, "--output", "closed/answers.jsonl"],
    ):
        ended = command(words, tmp_path)
        assert ended.code in (2, 5), (words, ended.errors)
    assert not list(closed.iterdir())


@pytest.mark.parametrize("variable", ["TMPDIR", "HOME", "XDG_CACHE_HOME", "HF_HOME", "BACKHAND_ROWS_CACHE"])
def test_their_folders_of_the_environment(variable: str, world: World, tmp_path: Path) -> None:
    """The run is the same; what would be kept there is not."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    give(folder)
    large = tmp_path / "rows.jsonl"
    row = {"prompt": "what is", "completion": "a list", "note": "x" * 100_000}  # small files are not kept
    large.write_text(f"{json.dumps(row)}\n" * 45)
    more = {variable: str(folder), **({} if variable == "BACKHAND_ROWS_CACHE" else {"BACKHAND_ROWS_CACHE": "off"})}
    words = train_with(world, data=large if variable == "BACKHAND_ROWS_CACHE" else world.rows)
    ended = command(words, tmp_path, **more)
    assert ended.code == 0, ended.errors
    assert not list(folder.iterdir())


def test_models_in_their_folders_are_passed_over(world: World, tmp_path: Path) -> None:
    give(folder_with(world.gguf, tmp_path / "theirs"))
    folder_with(world.gguf, tmp_path / "mine")
    ended = command(["models", "theirs", "mine", "--json"], tmp_path, HOME=str(tmp_path / "none"))
    assert ended.code == 0 and "mine" in ended.output, ended.errors
    assert "ermission denied" in ended.errors
