"""Hidden states that are kept in a run that is stopped and goes on, and on a disk that takes no more."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from backhand.training.run import train
from tests.support.faulty_files import InterceptedFiles, half_written
from tests.support.kept_runs import Notes, config_of, resumed, stopped, watched
from tests.support.tiny_run import TinyRun, final_bits


@pytest.fixture(scope="module")
def straight(four: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("straight") / "run"
    train(config_of(four, output, cache_frozen="off", save_every=1))
    return final_bits(output)


@pytest.fixture(scope="module")
def half_way(four: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped in the middle of the second epoch, its states on the disk."""
    config = config_of(four, tmp_path_factory.mktemp("half") / "run", cache_frozen="disk", save_every=1)
    return stopped(config, 5)


def copied(run: Path, place: Path) -> Path:
    return Path(shutil.copytree(run, place))


@pytest.mark.parametrize("then", ["memory", "off", "disk"])
def test_a_run_that_goes_on_makes_them_anew(
    then: str, half_way: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    """In the middle of an epoch, so that batches of rows that are there and rows that are not come up."""
    bits, notes, computed = resumed(copied(half_way, tmp_path / "run"), cache_frozen=then)
    assert (bits, notes) == (straight, [])
    assert all(len(rows) == len(set(rows)) for rows in computed.rows.values())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_no_more_ends_the_keeping_and_not_the_run(
    code: int, four: TinyRun, straight: dict[str, bytes], tmp_path: Path
) -> None:
    opened: set[int] = set()

    def before(_: int, name: str, arguments: tuple[Any, ...]) -> None:
        # From the third row on states fail, half of them written.
        if name == "write" and Path(f"/proc/self/fd/{arguments[0]}").readlink().name.endswith("(deleted)"):
            opened.add(len(opened))
            if len(opened) >= 3:
                half_written(name, arguments)
                raise OSError(code, "no more")

    notes, output = Notes(), tmp_path / "run"
    files = InterceptedFiles(before)
    train(config_of(four, output, cache_frozen="disk", save_every=1), files=files, callbacks=[notes])
    assert len(opened) == 4, "of the held-out rows, then of the others"
    assert final_bits(output) == straight
    assert [text for text in notes.texts if "hidden states are no longer cached" in text]


def test_a_directory_that_takes_no_file_ends_the_keeping(
    four: TinyRun, straight: dict[str, bytes], tmp_path: Path
) -> None:
    def before(_: int, name: str, _arguments: tuple[Any, ...]) -> None:
        if name == "open_unnamed":
            raise OSError(errno.EDQUOT, "quota")

    notes = Notes()
    config = config_of(four, tmp_path / "run", cache_frozen="disk", save_every=1)
    train(config, files=InterceptedFiles(before), callbacks=[notes])
    assert final_bits(tmp_path / "run") == straight
    assert [text for text in notes.texts if "hidden states are not cached" in text and "quota" in text]


def test_repeating_the_last_steps_computes_them_all(four: TinyRun, tmp_path: Path) -> None:
    """The proof of resuming goes without what is kept: its steps are the ordinary ones."""
    with watched() as computed:
        train(config_of(four, tmp_path / "run", cache_frozen="memory", prove_resume=2))
    assert computed.lower[True] == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "proofs.jsonl").read_text().splitlines()]
    assert [line["passed"] for line in lines if line["kind"] == "resume"] == [True]
