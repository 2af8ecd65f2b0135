"""Records in a file that only grows: what is read is what was written, or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backhand.files import FileLayer
from backhand.runs.record_file import RecordFile
from support.faulty_files import failing

RECORDS = {3: b"three", 0: bytes(range(40)), 7: b"\xff" * 9}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "rank-0.records"
    file = RecordFile(FileLayer(), path, "digest")
    assert (file.found, file.replaced) == (0, None)
    for number, data in RECORDS.items():
        file.append(number, data)
        assert file.read(number) == data
    file.close()
    return path


def reopened(path: Path, digest: str = "digest") -> RecordFile:
    return RecordFile(FileLayer(), path, digest)


def test_records_are_found_again(written: Path) -> None:
    file = reopened(written)
    assert (file.found, file.replaced) == (3, None)
    assert {number: file.read(number) for number in RECORDS} == RECORDS
    assert file.read(1) is None and 1 not in file and 3 in file
    file.append(1, memoryview(b"one"))
    file.append(3, b"another three")
    file.close()
    again = reopened(written)
    assert (again.read(1), again.read(3), again.found) == (b"one", b"another three", 4)
    again.close(remove=True)
    assert not written.exists()


def test_another_digest_is_another_file(written: Path) -> None:
    file = reopened(written, "digest2")
    assert file.found == 0 and "another base" in str(file.replaced)
    assert file.read(3) is None
    file.close()


def test_one_changed_bit_is_never_read(written: Path) -> None:
    """Of every byte of the file."""
    whole = written.read_bytes()
    outcomes = set()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        written.write_bytes(damaged)
        file = reopened(written)
        found = {number: file.read(number) for number in RECORDS}
        for number, data in found.items():
            assert data is None or data == RECORDS[number]
        assert None in found.values()
        outcomes.add(file.replaced is None)
        file.close()
    assert outcomes == {True, False}


def test_every_shorter_file_is_read_as_far_as_it_is_whole_or_not_at_all(written: Path) -> None:
    whole = written.read_bytes()
    kept = []
    for size in range(len(whole)):
        written.write_bytes(whole[:size])
        file = reopened(written)
        kept.append(file.found)
        assert all(file.read(number) in (None, data) for number, data in RECORDS.items())
        file.close()
    assert set(kept) == {0, 1, 2} and kept.count(1) == kept.count(2) == 1, "cut off exactly behind a record"


def test_a_record_that_changes_while_the_file_is_open_is_gone_and_may_come_again(written: Path) -> None:
    file = reopened(written)
    descriptor = os.open(written, os.O_WRONLY)
    os.pwrite(descriptor, b"X", written.read_bytes().index(b"three"))
    os.close(descriptor)
    assert file.read(3) is None and 3 not in file
    file.append(3, b"three")
    assert file.read(3) == b"three" and file.read(0) == RECORDS[0]
    file.close()


def test_a_link_is_removed_and_not_followed(written: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.records"
    link.symlink_to(written)
    file = reopened(link)
    assert file.replaced == "it is a link" and not link.is_symlink()
    file.append(1, b"one")
    file.close()
    there = reopened(written)
    assert there.found == 3
    there.close()


@pytest.mark.parametrize("number", [1, 2])
def test_a_file_that_cannot_be_made_is_an_error(number: int, tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="No space"):
        RecordFile(failing(number, 28), tmp_path / "rank-0.records", "digest")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
