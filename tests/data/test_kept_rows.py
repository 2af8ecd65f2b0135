"""Prepared rows that are kept: the same examples, and never those of other rows, options or tokenizers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from backhand.data import kept_rows
from backhand.data.options import DataOptions
from backhand.data.prepare import prepare
from support.tiny_tokenizer import tiny_tokenizer
from support.tokenizer_kinds import byte_level

ROWS = [{"prompt": f"the user asks {i}", "completion": "yes" if i % 3 else "no"} for i in range(30)]
PAIRS = [{"prompt": f"q {i}", "chosen": "good", "rejected": "bad"} for i in range(9)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(kept_rows.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(kept_rows, "LEAST_BYTES", 1)
    return tmp_path / "cache"


def prepared(path: Path, rows: list[dict[str, Any]], tokenizer: Any = None, **options: Any) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepare(DataOptions(data=(str(path),), **options), tokenizer or byte_level(), purpose=None)[0]


@pytest.mark.parametrize("rows", [ROWS, PAIRS, [{"text": "ein Wörtchen"}]])
def test_what_is_read_again_is_what_was_made(rows: list[dict[str, Any]], tmp_path: Path, cache: Path) -> None:
    first, again = (prepared(tmp_path / "rows.jsonl", rows) for _ in range(2))
    assert "for the next run" in first.report.notes[-1] and "prepared before" in again.report.notes[-1]
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
    monkeypatch.setattr(kept_rows, "MOST_KEPT_BYTES", len(whole))
    prepared(tmp_path / "rows.jsonl", ROWS[:-1])
    assert len(list(cache.iterdir())) == 1


def test_nothing_is_kept_where_it_is_turned_off_or_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for where in ("off", str(tmp_path / "file" / "cache")):
        monkeypatch.setenv(kept_rows.VARIABLE, where)
        assert not any("prepare" in note for note in prepared(tmp_path / "rows.jsonl", ROWS).report.notes)


def test_what_is_kept_is_for_nobody_else_and_rows_held_out_do_not_matter(tmp_path: Path, cache: Path) -> None:
    prepared(tmp_path / "rows.jsonl", ROWS)
    (file,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700 and file.stat().st_mode & 0o777 == 0o600
    assert "prepared before" in prepared(tmp_path / "rows.jsonl", ROWS, eval_fraction=0.0).report.notes[-1]


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

    kept_rows.kept(make, DataOptions(data=(str(path),)), [str(path)], byte_level())
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
    assert "prepared before" in again.report.notes[-1] and not left.exists()
    assert [one.source for one in first.examples] == [one.source for one in again.examples]


def test_an_empty_variable_means_the_usual_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kept_rows.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    prepared(tmp_path / "rows.jsonl", ROWS)
    assert list((tmp_path / ".cache" / "backhand" / "rows").iterdir())
