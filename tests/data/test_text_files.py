from __future__ import annotations

import contextlib
import gzip
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from backhand.data import text_files
from backhand.data.class_examples import ClassFormat
from backhand.data.options import DataOptions, NamedColumns
from backhand.data.prepare import prepare
from backhand.data.raw_rows import RawRow, RowErrors, number_of
from backhand.data.sources import read_rows
from backhand.errors import DataError
from backhand.loop.embed import rows_of
from tests.support.tokenizer_kinds import byte_level


def read(path: Path, *, skip_bad: bool = False) -> list[RawRow]:
    return list(read_rows(str(path), RowErrors(skip_bad)))


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def failure(path: Path, *, skip_bad: bool = False) -> DataError:
    with pytest.raises(DataError) as raised:
        read(path, skip_bad=skip_bad)
    return raised.value


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "a"}\n{"text": "b"}\n',
        b'{"text": "a"}\r\n{"text": "b"}',
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n',
        b'  {"text": "a"}  \n\n\r\n{"text": "b"}\n\n',
    ],
)
def test_json_lines_with_marks_carriage_returns_and_blank_lines(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "rows.jsonl", content)
    rows = read(path)
    assert [row.values for row in rows] == [{"text": "a"}, {"text": "b"}]
    line = content[: content.index(b'{"text": "b"}')].count(b"\n") + 1
    assert rows[1].source == f"{path}:{line}"


def test_line_separators_inside_text_end_no_row(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x0bfour"
    path = write(tmp_path / "rows.jsonl", json.dumps({"text": text}, ensure_ascii=False))
    assert [row.values["text"] for row in read(path)] == [text]


def test_a_row_of_ten_megabytes(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", json.dumps({"text": "x" * 10_000_000}) + '\n{"text": "y"}\n')
    assert [len(row.values["text"]) for row in read(path)] == [10_000_000, 1]


def test_a_row_too_long_for_its_template_gets_the_blame(tmp_path: Path) -> None:
    large = "x" * (2**23 + 1)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tools = [{"type": "function", "function": {"name": "f", "description": large}}]
    template = "{{ (messages | tojson ~ tools | tojson) * 150 }}"
    for row in ({"prompt": large, "completion": "b"}, {"messages": talk, "tools": tools}):
        path = write(tmp_path / "rows.jsonl", json.dumps(row))
        with pytest.raises(DataError, match=r"this row makes a text of 8,388,[\d,]+ characters") as refused:
            prepare(DataOptions(data=(str(path),), chat_template=template), byte_level())
        assert refused.value.where == f"{path}:1"


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_line_without_end_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "LONGEST_ROW_BYTES", 20_000)
    row = {"rows.csv": "text\n", "rows.jsonl": '{"text": "a"}\n'}[name]
    path = write(tmp_path / name, gzip.compress(f"{row}{'x' * 40_000}".encode()))
    assert failure(path, skip_bad=True).where == f"{path}:2"


def test_the_time_to_read_many_columns_is_proportional_to_their_number(tmp_path: Path) -> None:
    began, names = time.process_time(), [f"c{number}" for number in range(40_000)]
    for header in (["prompt", "completion", *names], ["prompt", *names], names):
        table = [header, *([str(len(name) % 3) for name in header],) * 5]
        path = write(tmp_path / "rows.csv", "\n".join(map(",".join, table)))
        with contextlib.suppress(DataError):
            prepare(DataOptions(data=(str(path),)), byte_level())
    assert time.process_time() - began < 30


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b"{'text': 'a'}", "not valid JSON"),
        (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
        (b'["a", "b"]', "a list of 2"),
        (b'"a"', "the text 'a'"),
        (b"3", "the number 3"),
        (b"null", "null"),
        ('{"text": "caf\u00e9"}'.encode("latin-1"), "not UTF-8 (byte 0xe9)"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"te\\udc00xt": "a"}', "half of a surrogate pair"),
        (b'{"n": ' + b"1" * 5000 + b"}", "cannot be read"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_a_bad_line_is_named_or_counted(tmp_path: Path, line: bytes, said: str) -> None:
    path = write(tmp_path / "rows.jsonl", b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    error = failure(path)
    assert error.where == f"{path}:3"
    assert said in error.what
    assert error.next_step is not None
    bad = RowErrors(skip_bad=True)
    assert [row.values["text"] for row in read_rows(str(path), bad)] == ["a", "b"]
    assert bad.count == 1
    assert bad.errors[0].where == f"{path}:3"


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("{'text': 'a'}", "JSON has double quotes"),
        ('{"text": "it\'s", \'n\': 1}', "JSON has double quotes"),
        ('{"text":', "name the file .json"),
        ("{", "name the file .json"),
        ('{"text": "a",}', None),
        ('{"text": "a"', "name the file .json"),
        ('{"text": "a"},', "end the line after the }"),
        ('{"text": "a"}{"text": "b"} ', "end the line after the }"),
        ('{"text": tru', None),
    ],
)
def test_usual_slips_in_json_have_their_remedy(tmp_path: Path, line: str, remedy: str | None) -> None:
    path = write(tmp_path / "rows.jsonl", f"{line}\n")
    said = RowErrors(skip_bad=True)
    assert list(read_rows(str(path), said)) == []
    found = said.errors[0].next_step
    assert found is None if remedy is None else remedy in str(found)


_OFFICE_97 = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(16) + b">\0\x03\0\xfe\xff"


@pytest.mark.parametrize(
    ("name", "head", "what"),
    [
        ("rows.xlsx", b"PK\x03\x04rest", "spreadsheet"),
        ("rows.xls", _OFFICE_97, "Excel workbook"),
        ("rows.csv", _OFFICE_97, "Excel workbook"),
        ("rows.doc", _OFFICE_97, "Word document"),
    ],
)
def test_a_spreadsheet_is_called_one(name: str, head: bytes, what: str, tmp_path: Path) -> None:
    error = failure(write(tmp_path / name, head))
    assert what in error.what and "CSV UTF-8" in str(error.next_step)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        ('{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
        ('{"text": "a"}\n'.encode("utf-16-le"), "UTF-16LE"),
        ('{"text": "a"}\n'.encode("utf-16-be"), "UTF-16BE"),
        ('{"text": "a"}\n'.encode("utf-32"), "UTF-32"),
        (b"PK\x03\x04rest", "zip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\x7fELF\x02\x01\x01\0\0\0", "binary"),
        (b"\x1f\x8b not gzip at all", "cannot be read"),
        (gzip.compress(b'{"text": "a"}\n' * 100, mtime=0)[:40], "cannot be read"),
        (b"PAR1 but nothing more", "Parquet"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_files_without_text_are_refused_even_with_skip_bad(
    tmp_path: Path, content: bytes, said: str, suffix: str
) -> None:
    path = write(tmp_path / f"rows{suffix}", content)
    for skip_bad in (False, True):
        error = failure(path, skip_bad=skip_bad)
        assert said in error.what
        assert str(path) in str(error.where)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    assert "no such file" in failure(tmp_path / "absent.jsonl").what
    assert "folder" in failure(tmp_path).what
    locked = write(tmp_path / "locked.jsonl", b'{"text": "a"}')
    locked.chmod(0)
    if not os.access(locked, os.R_OK):
        assert "cannot be read" in failure(locked).what


def test_a_device_is_named_in_words() -> None:
    assert failure(Path(os.devnull)).why == "it is a device, not a plain file"


def test_gzip_is_unpacked_whatever_it_is_called(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "a"}\n' * 2000)
    for name in ("rows.jsonl.gz", "rows.jsonl"):
        path = write(tmp_path / name, packed)
        assert len(read(path)) == 2000


def test_a_pipe_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(b'{"text": "a"}\n' * 10_000))
    writer.start()
    assert len(read(pipe)) == 10_000
    writer.join()


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
def test_a_json_list_is_read_with_the_line_of_each_row(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, '\n[\n {"text":\n  "a"},\n\n {"text": "b"}\n]\n')
    rows = read(path)
    assert [row.values["text"] for row in rows] == ["a", "b"]
    assert [row.source for row in rows] == [f"{path}:3", f"{path}:6"]


@pytest.mark.parametrize("joined", [", ".join, "".join], ids=["list", "one after the other"])
def test_rows_on_one_line_are_distinguished(tmp_path: Path, joined: Callable[[list[str]], str]) -> None:
    """As `json.dump` writes a list: a row's source says which documents are one row's."""
    objects = joined([json.dumps({"text": text}) for text in "abc"])
    content = f'[{objects},\n{{"text": "d"}}]' if ", {" in objects else f'{objects}\n{{"text": "d"}}'
    path = write(tmp_path / "rows.json", content)
    rows = read(path)
    assert [row.values["text"] for row in rows] == list("abcd")
    assert [row.source for row in rows] == [f"{path}:1", f"{path}:1 row 2", f"{path}:1 row 3", f"{path}:2"]


def test_json_files_may_also_hold_objects_one_after_the_other(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", '{"text": "a"}\n{\n"text": "b"\n}\n')
    assert [(row.values["text"], row.source) for row in read(path)] == [("a", f"{path}:1"), ("b", f"{path}:2")]


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        ('[{"text": "a"},\n{"text": }]', 2, "not valid JSON"),
        ('[{"text": "a"},\n{"text": "b"}\n', 3, "closed"),
        ('[{"text": "a"},\n', 2, "closed"),
        ('[{"text": "a"}\n{"text": "b"}]', 2, "comma"),
        ('[{"text": "a"},\n]', 2, "not valid JSON"),
        ('[{"text": "a"}]\n{"text": "b"}', 2, "after the end"),
        ('[\n{"text": "a"},\n3]', 3, "the number 3"),
        ('{"text": "a"}\n{"text": "\xe9"}'.encode("latin-1"), 2, "not UTF-8"),
    ],
)
def test_a_broken_json_list_names_its_line(tmp_path: Path, content: str | bytes, line: int, said: str) -> None:
    path = write(tmp_path / "rows.json", content)
    error = failure(path)
    assert said in error.what
    assert error.where == f"{path}:{line}"


def test_an_empty_json_list_has_no_rows(tmp_path: Path) -> None:
    assert read(write(tmp_path / "rows.json", " [ ] ")) == []


def test_csv_with_quotes_line_breaks_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.csv",
        b'\xef\xbb\xbfprompt, completion\r\n"a, ""b""","two\nlines"\r\n\r\nplain,\xc3\xa9\r\n',
    )
    rows = read(path)
    assert rows[0].values == {"prompt": 'a, "b"', "completion": "two\nlines"}
    assert rows[1].values == {"prompt": "plain", "completion": "é"}
    assert [row.source for row in rows] == [f"{path}:2", f"{path}:5 (row 4)"], "a spreadsheet counts the blank row"


def test_a_first_line_of_excel_is_the_delimiter(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "\ufeffsep=;\r\nEntry;Effort, in hours, days\r\na;1,21\r\n")
    (row,) = read(path)
    assert row.values == {"Entry": "a", "Effort, in hours, days": "1,21"}
    assert row.source == f"{path}:3 (row 2)"


def test_the_delimiter_is_the_one_that_fits_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "One, two, three and four;a\nfive, six;b\nseven;a\n")
    assert [row.values["a"] for row in read(path)] == ["b", "a"]
    path = write(tmp_path / "rows.csv", "Entry^Effort\na^1,21\n")
    with pytest.raises(DataError, match="this row has 2 cells, the header has 1") as raised:
        read(path)
    assert "write a line before it that is sep= and the character" in str(raised.value.next_step)
    write(path, "sep=^\n" + path.read_text())
    assert [row.values for row in read(path)] == [{"Entry": "a", "Effort": "1,21"}]


def test_rows_of_empty_cells_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text;label\na;x\n;\nb;y\n ; \n;;;;\n")
    bad = RowErrors()
    assert [row.values["text"] for row in read_rows(str(path), bad)] == ["a", "b"]
    assert (bad.empty_rows, bad.count) == (3, 0)
    options = DataOptions(data=(str(path),))
    prepared, _ = prepare(options, byte_level(), purpose="classes", text_format=ClassFormat("last"))
    assert "3 rows without a value left out" in prepared.report.left_out()


def test_rows_of_empty_cells_are_named_where_each_row_has_an_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.csv", "text;label\na;x\n;\nb;y\n")
    rows = rows_of(DataOptions(data=(str(path),)), NamedColumns(), "texts")
    assert len(rows) == 2
    assert "1 row without a value left out" in capsys.readouterr().err


def test_an_integer_too_large_for_a_float_is_no_number() -> None:
    assert number_of(10**400) is None


@pytest.mark.parametrize(
    ("head", "what"),
    [
        ("Products;;\nEntry;Effort;Team\na;1;x\n", "2 columns of the header have no name"),
        ("Products\nEntry;Effort\na;1\n", "fit no form of row: Products"),
        ("sep=;\nProducts\nEntry;Effort\na;1\n", "this row has 2 cells, the header has 1"),
        ("Products;\nEntry;Effort\na;1\n", "fit no form of row: , Products"),
        ("Products\nEntry,Effort\na,1\n", "this row has 2 cells, the header has 1"),
    ],
)
def test_a_title_above_the_column_names_is_answered(head: str, what: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", head)
    with pytest.raises(DataError) as caught:
        prepare(DataOptions(data=(str(path),)), byte_level())
    assert what in caught.value.what
    assert "remove it: the first row must have the column names" in str(caught.value.next_step)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_seen_in_the_header(tmp_path: Path, delimiter: str) -> None:
    path = write(tmp_path / "rows.csv", f"prompt{delimiter}completion\na{delimiter}b\n")
    assert read(path)[0].values == {"prompt": "a", "completion": "b"}


def test_tab_separated_and_single_column_files(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.tsv", "prompt\tcompletion\na, b\tc\n"))[0].values["prompt"] == "a, b"
    assert [row.values for row in read(write(tmp_path / "b.csv", "text\nhello\n"))] == [{"text": "hello"}]


@pytest.mark.parametrize(
    ("bad_line", "said"),
    [
        (b"a,b,c", "3 cells"),
        (b"a", "1 cells"),
        (b'"a"b,c', "not valid CSV"),
        (b"caf\xe9,b", "not UTF-8"),
    ],
)
def test_a_bad_csv_row_is_named_or_counted(tmp_path: Path, bad_line: bytes, said: str) -> None:
    path = write(tmp_path / "rows.csv", b"prompt,completion\n1,2\n" + bad_line + b"\n3,4\n")
    error = failure(path)
    assert error.where == f"{path}:3"
    assert said in error.what
    bad = RowErrors(skip_bad=True)
    assert [row.values["prompt"] for row in read_rows(str(path), bad)] == ["1", "3"]
    assert bad.count == 1


def test_an_unclosed_quote_and_a_repeated_header_are_named(tmp_path: Path) -> None:
    unclosed = failure(write(tmp_path / "a.csv", 'prompt,completion\na,b\n"c,d\ne,f\n'))
    assert "CSV" in unclosed.what and "lines 3 to 4 are read as one row" in str(unclosed.why)
    until_the_next = failure(write(tmp_path / "c.csv", 'prompt,completion\n"c,d\ne,f\ng,"h"\n'))
    assert "a quote that is not closed? lines 2 to 4 are read as one row" in str(until_the_next.why)
    error = failure(write(tmp_path / "b.csv", "text,text\na,b\n"), skip_bad=True)
    assert "'text' twice" in error.what
    assert "rename one of both columns" in str(error.next_step)
    assert error.where == f"{tmp_path / 'b.csv'}:1"


@pytest.mark.parametrize("name", ["rows.txt", "copyright", "notes.log"])
@pytest.mark.parametrize(
    "text", ["hello\n", "a,b\n", "Dear you,\nall is well, and fine, here.\n", "root:x:0\nbin:x:1\n"]
)
def test_plain_text_with_any_name_is_answered_with_a_command(name: str, text: str, tmp_path: Path) -> None:
    error = failure(write(tmp_path / name, text))
    assert "plain text" in error.what and "python3 -c" in str(error.next_step)


@pytest.mark.parametrize(
    "text", ['a,b\n"x, y",z\n', "a\tb\n1\t2", "a;b\n" + "x" * 3000 + ";y\nlong;" + "z" * 3000 + "\n"]
)
def test_a_table_of_unknown_kind_asks_for_an_ending(text: str, tmp_path: Path) -> None:
    error = failure(write(tmp_path / "rows", text))
    assert "table" in error.what and ".csv" in str(error.next_step)
