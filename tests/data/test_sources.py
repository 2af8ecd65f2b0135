from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pyarrow.parquet import ParquetFile

from backhand.cli.main import main
from backhand.data import external_rows
from backhand.data.options import DataOptions, RowSources, TemplateOptions
from backhand.data.prepare import prepare, prepare_prompts
from backhand.data.raw_rows import RowErrors
from backhand.data.sources import expand, neighbouring_held_out, read_rows
from backhand.errors import DataError, UsageError
from tests.support.tokenizer_kinds import byte_level


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text('{"text": "a"}\n')


def test_a_folder_with_a_training_file_means_that_file(tmp_path: Path) -> None:
    make(tmp_path, "test.jsonl", "train.jsonl", "valid.jsonl", "notes.md")
    assert expand([str(tmp_path)]) == (str(tmp_path / "train.jsonl"),)
    assert neighbouring_held_out([str(tmp_path)]) == (str(tmp_path / "valid.jsonl"),)


def test_any_other_folder_means_all_its_data_files(tmp_path: Path) -> None:
    make(tmp_path, "b.jsonl", "a.csv.gz", "valid.jsonl", "notes.md")
    assert expand([str(tmp_path)]) == tuple(str(tmp_path / name) for name in ("a.csv.gz", "b.jsonl", "valid.jsonl"))
    assert neighbouring_held_out([str(tmp_path)]) == ()


def test_missing_names_and_empty_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file"):
        expand([str(tmp_path)])
    with pytest.raises(DataError, match="no such file"):
        expand(["folder/rows.jsonl"])
    with pytest.raises(DataError, match="no such file"):
        expand(["nowhere"])


@pytest.mark.parametrize(
    ("text", "prompts", "part", "rows"),
    [
        ("One.\nStill one.\n\n\nTwo: é.\n", False, "paragraph", ["One.\nStill one.", "Two: é."]),
        ("One.\n\nStill one.\n%\nTwo, 5 %\n%\n", False, "text between lines %", ["One.\n\nStill one.", "Two, 5 %"]),
        ("***\nIt's one.\n***\nTwo.", False, "text between lines ***", ["It's one.", "Two."]),
        ("One?\n\n  Two?\n", True, "line", ["One?", "  Two?"]),
    ],
)
def test_plain_text_is_answered_with_the_command_that_makes_rows(
    text: str, prompts: bool, part: str, rows: list[str], tmp_path: Path
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text(text)
    data = (str(notes),)
    of_prompts = partial(prepare_prompts, RowSources(data=data), TemplateOptions())
    with pytest.raises(DataError, match="plain text") as refused:
        (of_prompts if prompts else partial(prepare, DataOptions(data=data)))(byte_level())
    command = str(refused.value.next_step).partition(f"this makes one of each {part}: ")[2]
    subprocess.run(["sh", "-c", command.replace("python3", sys.executable)], cwd=tmp_path, check=True)
    column = "prompt" if prompts else "text"
    assert [row.values for row in read_rows(str(tmp_path / "notes.jsonl"), RowErrors())] == (
        [{column: row} for row in rows]
    )


def test_rows_of_other_kinds_on_standard_input_are_answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    piped = tmp_path / "piped"
    piped.write_text("text,label\na,b\n")
    monkeypatch.setattr("backhand.data.sources.STANDARD_INPUT", str(piped))
    with pytest.raises(DataError, match="standard input is not JSON lines") as refused:
        list(read_rows(str(piped), RowErrors()))
    assert "--data FILE" in str(refused.value.next_step)


def test_parquet_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    table = {
        "messages": [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]] * 3000,
        "n": list(range(3000)),
    }
    parquet.write_table(pa.table(table), path)
    rows = list(read_rows(str(path), RowErrors()))
    assert len(rows) == 3000
    assert rows[2999].values["n"] == 2999
    assert rows[2999].values["messages"][1] == {"role": "assistant", "content": "yo"}
    assert rows[2999].source == f"{path} row 3000"


def parquet_of(path: Path, texts: list[str], **options: Any) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": texts}), path, compression="zstd", **options)
    return str(path)


def test_a_row_that_unpacks_to_too_much_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_rows, "LONGEST_ROW_BYTES", 10**6)
    path = tmp_path / "rows.parquet"
    large = "x" * 3 * 10**6
    for texts, place in (([large], "row 1"), (["a"] * 9 + [large, "b"], "row 10"), ([large] * 2, "rows 1 to 2")):
        with pytest.raises(DataError, match=r"a row takes .* when it is unpacked") as refused:
            list(read_rows(parquet_of(path, texts), RowErrors(skip_bad=True)))
        assert refused.value.where == f"{path} {place}" and path.stat().st_size < 2000
    parquet_of(path, ["a", large, large], use_dictionary=False)
    monkeypatch.setattr(ParquetFile, "iter_batches", None)  # the average is compared before the rows are unpacked
    with pytest.raises(DataError, match="a row takes") as refused:
        list(read_rows(str(path), RowErrors()))
    assert refused.value.where == f"{path} rows 1 to 3"


def test_repeated_values_are_unpacked_a_few_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = ParquetFile.iter_batches

    def observed(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in original(*arguments, **options):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(ParquetFile, "iter_batches", observed)
    path = parquet_of(tmp_path / "rows.parquet", ["x" * 2**20] * 600)
    assert sum(1 for _ in read_rows(path, RowErrors())) == 600
    assert max(sizes) <= 2**28 and sum(sizes) > 2**29


def test_arguments_that_only_other_rows_have_are_not_padded_with_nulls(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def row(name: str, argument: str) -> dict[str, object]:
        call = {"function": {"name": name, "arguments": {argument: "x", "several": [None, 1]}}}
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]}

    rows = [row("f", "city"), row("g", "zone")]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist([*rows, {"messages": None}]), path)
    stored = parquet.read_table(path).to_pylist()
    assert stored[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["zone"] is None
    *read, empty = (raw.values for raw in read_rows(str(path), RowErrors()))
    assert read == rows
    assert empty == {"messages": None}


def test_a_cut_parquet_file_is_an_error(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": ["a" * 100, "b"]}), path)
    whole = path.read_bytes()
    for length in range(4, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="Parquet"):
            list(read_rows(str(path), RowErrors(skip_bad=True)))


@pytest.mark.parametrize(
    ("name", "asked", "held_out", "source"),
    [
        ("owner/name", ("owner/name", None, None), False, "owner/name:train row 1"),
        ("owner/name", ("owner/name", None, None), True, "owner/name:validation row 1"),
        ("owner/name@fr:test", ("owner/name", "fr", "test"), False, "owner/name@fr:test row 1"),
        ("owner/name:train[:10]", ("owner/name", None, "train[:10]"), False, "owner/name:train[:10] row 1"),
    ],
)
def test_hub_names(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[str | None, ...], held_out: bool, source: str
) -> None:
    import datasets

    calls = []
    rows = datasets.Dataset.from_list([{"text": "a"}])

    def load_dataset(path: str, config: str | None, split: str | None) -> object:
        calls.append((path, config, split))
        return rows if split else datasets.DatasetDict(test=rows, train=rows, validation=rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert expand([name]) == (name,)
    (row,) = read_rows(name, RowErrors(), held_out=held_out)
    assert calls == [asked]
    assert (row.values, row.source) == ({"text": "a"}, source)


def test_a_hub_data_set_without_the_split_lists_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    only = datasets.DatasetDict(extra=datasets.Dataset.from_list([{"text": "a"}]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: only)
    with pytest.raises(DataError) as raised:
        list(read_rows("owner/name", RowErrors()))
    assert "owner/name:extra" in str(raised.value.next_step)


def test_a_hub_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as raised:
        list(read_rows("owner/name", RowErrors()))
    assert raised.value.why == "ConnectionError: no network"


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError) as raised:
        list(read_rows("owner/name", RowErrors()))
    assert "pip install" in str(raised.value.next_step)


def test_a_file_of_nearly_that_name_is_proposed(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "my rows.jsonl").write_text("{}")
    (tmp_path / "held out.csv.gz").write_text("")
    for name in ("two.csv", "two.jsonl", "two.parquet"):
        (tmp_path / name).write_text("")
    for name, meant in (
        ("rosw.jsonl", "rows.jsonl"),
        ("my rows", "my rows.jsonl"),
        ("my rows.txt", "my rows.jsonl"),
        ("My Rows.csv.gz", "my rows.jsonl"),
        ("my rwos.txt", "my rows.jsonl"),
        ("rows.txt", "rows.jsonl"),
        ("held out.json", "held out.csv.gz"),
        ("two.jsonI", "two.jsonl"),
    ):
        with pytest.raises(DataError, match="no such file") as caught:
            expand([str(tmp_path / name)])
        assert caught.value.next_step == f"did you mean {tmp_path / meant}?"


@pytest.mark.parametrize(
    "name", ["my rows", "my rows.txt", "My Docs2/rows", "/absent/My Own Data Sets/train", "one of my files.csv"]
)
def test_a_missing_file_with_spaces_is_not_taken_for_a_text(name: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        expand([name])


def test_a_name_with_spaces_without_quotes_is_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my own rows.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"^my: there is no such file") as caught:
        expand(["my", "own", "rows.jsonl", "others.jsonl"])
    assert caught.value.next_step == "did you mean 'my own rows.jsonl'?"


@pytest.mark.parametrize(
    ("command", "name", "option"),
    [
        ("classify", "good phone", "--text 'good phone'"),
        ("generate", "It is good.", "--prompt 'It is good.'"),
        ("decide", "good phone", "--state 'good phone'"),
        ("classify", "the battery is very good", "--text 'the battery is very good'"),
        ("evaluate", "good phone", '{"text": "…"}'),
    ],
)
def test_a_text_given_as_a_file_is_answered_with_the_option_for_it(
    command: str, name: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = ["--adapter", "run"] if command in ("classify", "decide") else []
    assert main([command, *adapter, "--data", name]) == DataError.exit_code
    said = capsys.readouterr().err
    assert option in said
    assert ("if it is a file, check the path" in said) == (len(name.split()) < 4)
