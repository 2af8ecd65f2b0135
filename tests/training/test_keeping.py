"""Hidden states that are kept over a run that is stopped and goes on, and over whatever happens to their file."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backhand.training.run import train
from support.faulty_files import InterceptedFiles, half_written
from support.kept_runs import Notes, begin_alike, config_of, resumed, stopped, watched
from support.tiny_models import save_tiny, tiny_model
from support.tiny_run import TinyRun, final_bits


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


def states_file(run: Path) -> Path:
    (file,) = (run / "states").iterdir()
    return file


def copied(run: Path, place: Path) -> Path:
    return Path(shutil.copytree(run, place))


def test_a_resumed_run_finds_its_states(half_way: Path, straight: dict[str, bytes], tmp_path: Path) -> None:
    bits, notes, computed = resumed(copied(half_way, tmp_path / "run"))
    assert (bits, notes, computed.rows) == (straight, [], {})
    assert not (tmp_path / "run" / "states").exists()


def test_what_is_no_longer_kept_on_the_disk_is_removed(
    half_way: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    bits, notes, _ = resumed(copied(half_way, tmp_path / "run"), cache_frozen="memory")
    assert (bits, notes) == (straight, [])
    assert not (tmp_path / "run" / "states").exists()


@pytest.mark.parametrize("then", ["memory", "off", "disk"])
def test_a_run_without_them_makes_them_anew(
    then: str, half_way: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    """In the middle of an epoch, so that batches of rows that are there and rows that are not come up."""
    run = copied(half_way, tmp_path / "run")
    shutil.rmtree(run / "states")
    bits, notes, computed = resumed(run, cache_frozen=then)
    assert (bits, notes) == (straight, [])
    assert all(len(rows) == len(set(rows)) for rows in computed.rows.values())


def test_states_of_other_rows_or_another_base_are_not_taken(
    four: TinyRun, half_way: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    rows = begin_alike(four.rows, tmp_path / "rows.jsonl")
    base = save_tiny(tiny_model("llama-tied", num_hidden_layers=4, seed=7), tmp_path / "base")
    for number, other in enumerate(({"data": (str(rows),)}, {"model": str(base)}, {"layers": "last:1"})):
        config = config_of(four, tmp_path / f"other-{number}", cache_frozen="disk", save_every=1, **other)
        run = copied(half_way, tmp_path / f"run-{number}")
        shutil.copy(states_file(stopped(config, 5)), states_file(run))
        bits, notes, computed = resumed(run)
        assert bits == straight
        assert len(notes) == 1 and "made for another base, other rows" in notes[0]
        assert computed.rows


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def zeros_behind(file: Path) -> None:
    file.write_bytes(file.read_bytes() + bytes(4096))


def replaced_by_a_link(file: Path) -> None:
    file.rename(file.parent.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent.parent / "elsewhere")


@pytest.mark.parametrize("damage", [cut_off, emptied, zeros_behind, replaced_by_a_link])
def test_a_file_that_is_not_whole_gives_way(
    damage: Callable[[Path], None], half_way: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    run = copied(half_way, tmp_path / "run")
    damage(states_file(run))
    elsewhere = tmp_path / "elsewhere"
    before = elsewhere.read_bytes() if elsewhere.exists() else None
    bits, notes, _ = resumed(run)
    assert bits == straight
    assert len(notes) == 1 and "made anew" in notes[0]
    assert before is None or elsewhere.read_bytes() == before


def test_changed_states_are_noticed_row_by_row(half_way: Path, straight: dict[str, bytes], tmp_path: Path) -> None:
    """One bit in each kilobyte, wherever it falls: in states, in a length, in a number, in a checksum."""
    size = states_file(half_way).stat().st_size
    for first in range(200, 1200, 250):
        run = copied(half_way, tmp_path / f"run-{first}")
        damaged = bytearray(states_file(run).read_bytes())
        for place in range(first, size, 1024):
            damaged[place] ^= 1 << (place % 8)
        states_file(run).write_bytes(damaged)
        bits, notes, computed = resumed(run)
        assert bits == straight
        assert notes and computed.rows


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_no_more_ends_the_keeping_and_not_the_run(
    code: int, four: TinyRun, straight: dict[str, bytes], tmp_path: Path
) -> None:
    opened: set[int] = set()

    def before(_: int, name: str, arguments: tuple[Any, ...]) -> None:
        # The third record fails, half of it written.
        if name == "write" and len(arguments[1]) > 2000 and b"checkpoint" not in bytes(arguments[1][:4000]):
            where = Path(f"/proc/self/fd/{arguments[0]}").readlink()
            if where.parent.name == "states":
                opened.add(len(opened))
                if len(opened) == 3:
                    half_written(name, arguments)
                    raise OSError(code, "no more")

    notes, output = Notes(), tmp_path / "run"
    files = InterceptedFiles(before)
    train(config_of(four, output, cache_frozen="disk", save_every=1), files=files, callbacks=[notes])
    assert len(opened) == 3
    assert final_bits(output) == straight
    assert [text for text in notes.texts if "no more hidden states are kept" in text and "no more" in text]
    assert not list((output / "states").glob("*"))


def test_a_directory_that_takes_no_file_ends_the_keeping(
    four: TinyRun, straight: dict[str, bytes], tmp_path: Path
) -> None:
    def before(_: int, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "make_directory" and arguments[0].name == "states":
            raise OSError(errno.EDQUOT, "quota")

    notes = Notes()
    config = config_of(four, tmp_path / "run", cache_frozen="disk", save_every=1)
    train(config, files=InterceptedFiles(before), callbacks=[notes])
    assert final_bits(tmp_path / "run") == straight
    assert [text for text in notes.texts if "no hidden states are kept" in text and "quota" in text]


def test_repeating_the_last_steps_computes_them_all(four: TinyRun, tmp_path: Path) -> None:
    """The proof of resuming goes without what is kept: its steps are the ordinary ones."""
    with watched() as computed:
        train(config_of(four, tmp_path / "run", cache_frozen="memory", prove_resume=2))
    assert computed.lower[True] == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "proofs.jsonl").read_text().splitlines()]
    assert [line["passed"] for line in lines if line["kind"] == "resume"] == [True]
