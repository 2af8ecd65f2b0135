"""Prepared rows that are kept: the same examples, and never those of other rows, options or tokenizers."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backhand.data import prepared_cache, stored_examples
from backhand.data.options import DataOptions
from backhand.data.prepare import prepare
from backhand.data.stored_examples import RECORD
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.tokenizer_kinds import byte_level

ROWS = [{"prompt": f"the user asks {i}", "completion": "yes" if i % 3 else "no"} for i in range(30)]
PAIRS = [{"prompt": f"q {i}", "chosen": "good", "rejected": "bad"} for i in range(9)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(prepared_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(prepared_cache, "LEAST_BYTES", 1)
    return tmp_path / "cache"


def prepared(path: Path, rows: list[dict[str, Any]], tokenizer: Any = None, **options: Any) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepare(DataOptions(data=(str(path),), **options), tokenizer or byte_level(), purpose=None)[0]


@pytest.mark.parametrize("rows", [ROWS, PAIRS, [{"text": "ein Wörtchen"}]])
def test_what_is_read_again_is_what_was_made(rows: list[dict[str, Any]], tmp_path: Path, cache: Path) -> None:
    first, again = (prepared(tmp_path / "rows.jsonl", rows) for _ in range(2))
    assert "for the next run" in first.report.notes[-1] and "from the cache" in again.report.notes[-1]
    assert first.digest == again.digest and len(list(cache.iterdir())) == 1
    assert [example.source for example in first.examples] == [example.source for example in again.examples]
    assert first.report.sources == again.report.sources and first.report.lines()[:-1] == again.report.lines()[:-1]
    assert again.examples[0].input_ids.dtype == first.examples[0].input_ids.dtype


def test_other_rows_options_and_tokenizers_have_their_own(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "rows.jsonl"
    prepared(path, ROWS)
    prepared(path, ROWS[:-1])
    prepared(path, ROWS, train_on="all")
    prepared(path, ROWS, tiny_tokenizer())
    assert len(list(cache.iterdir())) == 4


def test_a_damaged_file_is_made_again_and_room_is_made(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = prepared(tmp_path / "rows.jsonl", ROWS).digest
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-3], whole[:40], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        file.unlink()  # and not written to, where rows are taken from it
        file.write_bytes(damaged)
        assert prepared(tmp_path / "rows.jsonl", ROWS).digest == digest
        assert file.read_bytes() == whole
    monkeypatch.setattr(prepared_cache, "MOST_KEPT_BYTES", len(whole))
    prepared(tmp_path / "rows.jsonl", ROWS[:-1])
    assert len(list(cache.iterdir())) == 1


def test_nothing_is_kept_where_it_is_turned_off_or_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "file" / "cache"
    place.parent.write_text("")
    for where, notes in (("off", ()), (str(place), (f"prepared rows are not cached in {place}: Not a directory",))):
        monkeypatch.setenv(prepared_cache.VARIABLE, where)
        assert prepared(tmp_path / "rows.jsonl", ROWS).report.notes == notes


def rewrite(file: Path, change: Callable[[dict[str, Any]], object], rest: Callable[[bytes], bytes] = bytes) -> None:
    """Change a kept file's header and what follows it, with the digest of what it holds then."""
    line, rest_of_file = file.read_bytes()[32:].split(b"\n", 1)
    header = json.loads(line)
    changed = change(header)
    data = json.dumps(header if changed is None else changed).encode() + b"\n" + rest(rest_of_file)
    file.write_bytes(hashlib.sha256(data).digest() + data)


def records_of(data: bytes, change: Callable[[Any], object]) -> bytes:
    """The tokens and records of a kept file, with changed records."""
    records = np.frombuffer(data[-RECORD.itemsize * 30 :], RECORD).copy()
    change(records)
    return data[: -RECORD.itemsize * 30] + records.tobytes()


def one_of(name: str, value: int, place: int = 3) -> Callable[[bytes], bytes]:
    return lambda data: records_of(data, lambda records: records[name].__setitem__(place, value))


FORGED: dict[str, tuple[Callable[[dict[str, Any]], object], Callable[[bytes], bytes]]] = {
    "a list": (lambda _: [], bytes),
    "an empty object": (lambda header: header.clear(), bytes),
    "deeply nested": (lambda header: header.update(report=json.loads("[" * 400 + "]" * 400)), bytes),
    **{
        f"tokens {value}": (lambda header, value=value: header.update(tokens=value), bytes)
        for value in (5, -5, "x", 10**12, None)
    },
    "an empty report": (lambda header: header.update(report=None), bytes),
    "another report": (lambda header: header["report"].update(documents=7), bytes),
    "sources of another form": (lambda header: header["report"].update(sources=[[]]), bytes),
    "rows left out": (lambda header: header["report"].update(skipped_bad=1), bytes),
    "no records": (lambda header: header.update(records=0), lambda data: data[: -RECORD.itemsize * 30]),
    "nothing": (lambda header: header.update(records=0, tokens=0), lambda _: b""),
    "records of random bytes": (
        lambda _: None,
        lambda data: data[: -RECORD.itemsize * 30] + random.Random(0).randbytes(RECORD.itemsize * 30),
    ),
    **{
        f"{name} {value}": (lambda _: None, one_of(name, value))
        for name, value in (
            *(("begin", 0), ("begin", -1), ("begin", 2**62), ("tokens", 2**30), ("tokens", -1), ("tokens", 0)),
            *(("source_bytes", -1), ("source_bytes", 2**30), ("place", 1), ("place", 2), ("place", 9), ("label", 9)),
            *(("supervised", 0), ("supervised", 99), ("input_tokens", 99), ("highest", 5), ("highest", 2**30)),
        )
    },
}


@pytest.mark.parametrize("name", FORGED)
def test_a_file_with_a_right_digest_and_other_contents_is_made_again(name: str, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "rows.jsonl"
    digest = prepared(path, ROWS).digest
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    rewrite(file, *FORGED[name])
    assert file.read_bytes() != whole
    again = prepared(path, ROWS)
    assert again.digest == digest and file.read_bytes() == whole
    assert f"the cached rows in {file} are not used" in again.report.notes[-2]


def test_a_source_that_is_no_text_is_shown_with_what_it_has(tmp_path: Path, cache: Path) -> None:
    first = prepared(tmp_path / "rows.jsonl", ROWS)
    (file,) = cache.iterdir()
    source = first.examples[0].source.encode()
    rewrite(file, lambda _: None, lambda data: data.replace(source[:9], b"\xff\xfe" + source[2:9], 1))
    again = prepared(tmp_path / "rows.jsonl", ROWS)
    assert again.examples[0].source == f"\ufffd\ufffd{source[2:].decode()}" and again.digest == first.digest


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX alone has such files")
@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_what_is_no_plain_file_is_replaced_unread(kind: str, tmp_path: Path, cache: Path) -> None:
    digest = prepared(tmp_path / "rows.jsonl", ROWS).digest
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.unlink()
    (tmp_path / "elsewhere").write_bytes(whole)
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero" if kind == "device" else tmp_path / "elsewhere")
    again = prepared(tmp_path / "rows.jsonl", ROWS)
    assert again.digest == digest and f"in {file} are not used" in again.report.notes[-2]
    assert file.read_bytes() == whole and not file.is_symlink()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX alone has owners in the status")
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to_is_left_alone(mode: int, tmp_path: Path, cache: Path) -> None:
    prepared(tmp_path / "rows.jsonl", ROWS)
    (file,) = cache.iterdir()
    before = file.stat()
    cache.chmod(mode)
    (note,) = prepared(tmp_path / "rows.jsonl", ROWS).report.notes
    assert note == f"prepared rows are not cached in {cache}: another user owns it or may write to it"
    assert file.stat() == before and list(cache.iterdir()) == [file]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX alone has owners in the status")
def test_files_and_folders_of_another_user_are_not_used(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = prepared(tmp_path / "rows.jsonl", ROWS).digest
    (file,) = cache.iterdir()
    file.chmod(0o666)
    again = prepared(tmp_path / "rows.jsonl", ROWS)
    assert again.digest == digest and "may write to it" in again.report.notes[-2]
    assert file.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    if cache.stat().st_uid == 0:  # files of root are trusted by everybody
        os.chown(cache, 12345, 12345)
    (note,) = prepared(tmp_path / "rows.jsonl", ROWS).report.notes
    assert "another user owns it" in note


def test_rows_are_whole_where_their_file_is_cut_short_meanwhile(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_examples, "_IN_MEMORY_BYTES", 100)
    first = prepared(tmp_path / "rows.jsonl", ROWS)
    again = prepared(tmp_path / "rows.jsonl", ROWS)
    (file,) = cache.iterdir()
    os.truncate(file, 0)
    assert [one.input_ids.tolist() for one in again.examples] == [one.input_ids.tolist() for one in first.examples]
    assert "from the cache" in again.report.notes[-1]


def test_what_is_kept_is_for_nobody_else_and_rows_held_out_do_not_matter(tmp_path: Path, cache: Path) -> None:
    prepared(tmp_path / "rows.jsonl", ROWS)
    (file,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700 and file.stat().st_mode & 0o777 == 0o600
    assert "from the cache" in prepared(tmp_path / "rows.jsonl", ROWS, eval_fraction=0.0).report.notes[-1]


def test_rows_that_change_while_they_are_read_are_not_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]))
    made = prepare(DataOptions(data=(str(path),)), byte_level())[0]
    for file in cache.iterdir():
        file.unlink()

    def make() -> Any:
        path.write_text(json.dumps(ROWS[1]))
        return made

    prepared_cache.cached(make, DataOptions(data=(str(path),)), [str(path)], byte_level())
    assert not list(cache.iterdir())


def test_a_template_that_tells_the_date_keeps_nothing(tmp_path: Path, cache: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    prepared(tmp_path / "rows.jsonl", ROWS, chat_template=str(template))
    assert not cache.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_not_utf8_is_kept_and_what_was_left_goes(tmp_path: Path, cache: Path) -> None:
    cache.mkdir()
    (left := cache / ".x.rows.1.tmp").mkdir()
    os.utime(left, (0, 0))
    first, again = (prepared(tmp_path / os.fsdecode(b"r\xff.jsonl"), ROWS) for _ in range(2))
    assert "from the cache" in again.report.notes[-1] and not left.exists()
    assert [one.source for one in first.examples] == [one.source for one in again.examples]


def test_an_empty_variable_means_the_usual_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(prepared_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    prepared(tmp_path / "rows.jsonl", ROWS)
    assert list((tmp_path / ".cache" / "backhand" / "rows").iterdir())
