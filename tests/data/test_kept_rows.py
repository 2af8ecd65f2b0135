"""Prepared rows that are kept: the same examples, and never those of other rows, options or tokenizers."""

from __future__ import annotations

import json
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
    first = prepared(tmp_path / "rows.jsonl", ROWS)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-3], whole[:40], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        assert prepared(tmp_path / "rows.jsonl", ROWS).digest == first.digest
        assert file.read_bytes() == whole
    monkeypatch.setattr(kept_rows, "MOST_KEPT_BYTES", len(whole))
    prepared(tmp_path / "rows.jsonl", ROWS[:-1])
    assert len(list(cache.iterdir())) == 1


def test_nothing_is_kept_where_it_is_turned_off_or_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for where in ("off", str(tmp_path / "file" / "cache")):
        monkeypatch.setenv(kept_rows.VARIABLE, where)
        assert not any("prepare" in note for note in prepared(tmp_path / "rows.jsonl", ROWS).report.notes)
