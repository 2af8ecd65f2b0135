"""The old run stays until the new one is whole, and what did not train does not end well."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from backhand.runs.directory import CHECKPOINTS, REPLACED, opened
from tests.hostile.conftest import World
from tests.support.limited import limited
from tests.support.processes import start


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def run(world: World, tmp_path: Path) -> Path:
    assert limited(world.train("run"), tmp_path).code == 0
    return tmp_path / "run"


def test_a_full_disk_leaves_the_old_run(world: World, run: Path) -> None:
    before = contents(run)
    ended = limited(world.train("run", "--overwrite", "--seed", 3), run.parent, file_bytes=8000)
    assert ended.code == 5, ended.errors
    assert contents(run) == before
    assert limited(world.train("run", "--overwrite", "--seed", 3), run.parent).code == 0
    assert contents(run) != before and not (run / REPLACED).exists()


@pytest.mark.parametrize("option", ["--from-adapter", "--chat-template", "--eval-data"])
def test_an_input_inside_the_output_is_refused(option: str, world: World, run: Path) -> None:
    before = contents(run)
    inside = {"--from-adapter": "run/adapter", "--chat-template": "run/config.toml", "--eval-data": "run/metrics.jsonl"}
    ended = limited(world.train("run", "--overwrite", option, inside[option]), run.parent)
    assert ended.code == 2 and "part of what --overwrite replaces" in ended.what
    assert contents(run) == before


def test_a_link_to_an_input_inside_is_seen_through(world: World, run: Path) -> None:
    (run.parent / "link").symlink_to(run / "adapter")
    ended = limited(world.train("run", "--overwrite", "--from-adapter", "link"), run.parent)
    assert ended.code == 2 and (run / "adapter").is_dir()


def kill_before_the_first_checkpoint(words: list[str], place: str) -> None:
    os.chdir(place)
    from backhand.cli.main import main
    from backhand.runs.checkpoint import CheckpointStore

    CheckpointStore.save = lambda *_: os.kill(os.getpid(), 9)  # type: ignore[method-assign, assignment]
    main(words)


@pytest.mark.parametrize("how", ["--overwrite", "--resume"])
def test_killed_while_it_replaces(how: str, world: World, run: Path) -> None:
    before = contents(run)
    words = [str(word) for word in world.train("run", "--overwrite", "--seed", 3)]
    process = start(kill_before_the_first_checkpoint, words, str(run.parent))
    process.join()
    assert process.exitcode == -9
    assert contents(run / REPLACED) == before
    if how == "--overwrite":
        with opened(run, resume=False, overwrite=True):
            assert contents(run) == before
    else:  # the new run is the one that goes on
        assert limited(["train", "--resume", "--output", "run", "--quiet"], run.parent).code == 0
        assert not (run / REPLACED).exists() and any((run / CHECKPOINTS).glob("step-2"))
        assert contents(run) != before


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_killed_while_files_are_moved_aside(moved: int, run: Path) -> None:
    before = contents(run)
    (run / ".replacing").mkdir()
    for name in ("config.toml", "adapter", "checkpoints")[:moved]:
        (run / name).rename(run / ".replacing" / name)
    with opened(run, resume=True, overwrite=False):
        assert contents(run) == before and not (run / ".replacing").exists()


def test_a_run_whose_last_steps_were_skipped_ends_with_6(world: World, tmp_path: Path) -> None:
    ended = limited(world.train("run", "--learning-rate", "1e30", steps=3), tmp_path)
    assert ended.code == 6 and "not finite" in ended.what
    again = limited(["train", "--resume", "--output", "run", "--quiet"], tmp_path)
    assert again.code == 6
    adapter = ["--model", world.model, "--adapter", "run/adapter"]
    assert limited(world.ask(*adapter), tmp_path).code == 6
    assert limited(world.ask(*adapter, "--greedy"), tmp_path).code == 6
    evaluated = limited(["evaluate", *adapter, "--data", world.rows, "--dtype", "float32", "--threads", 1], tmp_path)
    assert evaluated.code == 6 and "adapted model" in evaluated.what


@pytest.mark.parametrize("operation", [["add", "A", "B"], ["svd", "A", "--rank", "1"]])
def test_a_full_disk_leaves_the_old_adapter(operation: list[str], world: World, tmp_path: Path) -> None:
    for name in "AB":
        (tmp_path / name).symlink_to(world.adapter)
    words = ["combine", *operation, "--output", "new"]
    assert limited(words, tmp_path).code == 0
    before = contents(tmp_path / "new")
    ended = limited([*words, "--overwrite"], tmp_path, file_bytes=4000)
    assert ended.code == 5 and contents(tmp_path / "new") == before
    ended = limited(["combine", *operation, "--output", "deep/other"], tmp_path, file_bytes=4000)
    assert ended.code == 5 and not (tmp_path / "deep").exists()


def test_an_adapter_is_not_made_of_what_it_replaces(world: World, tmp_path: Path) -> None:
    for name in "AB":
        (tmp_path / name).mkdir()
        for path in world.adapter.iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    before = contents(tmp_path / "A")
    ended = limited(["combine", "add", "A", "B", "--output", "A", "--overwrite"], tmp_path)
    assert ended.code == 2 and contents(tmp_path / "A") == before
    ended = limited(["compress", "A", "--output", "A", "--overwrite"], tmp_path)
    assert ended.code == 2 and contents(tmp_path / "A") == before


def test_answers_do_not_replace_the_rows(world: World, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "what", "completion": "a"}))
    words = ["generate", "--model", world.model, "--data", "rows.jsonl", "--output", "rows.jsonl", "--overwrite"]
    ended = limited(words, tmp_path)
    assert ended.code == 2 and "completion" in rows.read_text()
