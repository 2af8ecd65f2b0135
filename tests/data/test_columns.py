"""Columns by name: what is made of them, what is refused, and what a spreadsheet's names leave no doubt of."""

from __future__ import annotations

import datetime as dt
import json
import math
import re
import shlex
import subprocess
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from backhand.cli.option_fields import option_fields
from backhand.data.columns import ColumnReader
from backhand.data.forms import detect
from backhand.data.lint import lint
from backhand.data.options import (
    DataOptions,
    LintOptions,
    NamedColumns,
    RowSources,
    TemplateOptions,
    asking_options,
    parse_columns,
    reading_options,
    shell_quoted,
)
from backhand.data.prepare import prepare, prepare_prompts
from backhand.data.raw_rows import RawRow, RowErrors
from backhand.data.row_encoder import Prompt
from backhand.data.rows import Purpose
from backhand.errors import DataError, UsageError
from backhand.loop.embed import rows_of
from backhand.loop.evaluate import evaluate
from backhand.options.command_options import (
    ClassifyOptions,
    DecideOptions,
    EmbedOptions,
    EvaluateOptions,
    MineOptions,
    RankOptions,
)
from backhand.options.config import ModelOptions, TrainConfig
from tests.support.tokenizer_kinds import byte_level


def asked(path: Path, purpose: Purpose | None = "answers", **given: Any) -> tuple[list[Prompt], tuple[str, ...]]:
    prompts: list[Prompt] = []
    train, _ = prepare(DataOptions(data=(str(path),), **given), byte_level(), prompts=prompts, purpose=purpose)
    return prompts, train.report.notes


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


BOTH_EQUAL = "both texts of every row would be equal, which teaches nothing"
TICKETS = "id,subject,body,team\n7,Late,Where is it?,shipping\n8,Bill,,billing\n"


def test_an_undesirable_answer_is_no_reference_and_another_label_is_not_read(tmp_path: Path) -> None:
    (path := tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": "a", "completion": "b", "label": label}) + "\n" for label in (True, False))
    )
    rows = RowSources(data=(str(path),))
    prompts, _ = prepare_prompts(rows, TemplateOptions(), byte_level(), purpose="labelled")
    assert [prompt.reply for prompt in prompts] == ["b", None]
    path.write_text(path.read_text() + json.dumps({"prompt": "a", "completion": "c", "label": "unknown"}))
    prompts, _ = prepare_prompts(rows, TemplateOptions(), byte_level())
    assert [prompt.reply for prompt in prompts] == ["b", "b", "c"]


def test_the_options_that_read_other_rows_alike_can_be_pasted() -> None:
    data = DataOptions(prompt=r"{subject}\n{body}", completion="team")
    assert reading_options(data) == r" --prompt '{subject}\n{body}' --completion team"
    assert asking_options(data) == r" --prompt $'<subject>\n<body>'"
    assert (reading_options(DataOptions()), asking_options(DataOptions())) == ("", " --prompt '…'")
    for text in ("it's\nso \\n", "plain", "a b"):
        shell = subprocess.run(["bash", "-c", f"printf %s {shell_quoted(text)}"], capture_output=True, check=True)
        assert shell.stdout.decode() == text


def test_rows_of_no_form_are_refused_before_a_model_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", TICKETS)
    with pytest.raises(DataError, match="fit no form"):
        evaluate(EvaluateOptions(ModelOptions(model="no such model"), DataOptions(data=(str(path),))))


@pytest.mark.parametrize("option", ["prompt", "completion"])
def test_a_name_of_no_column_is_refused_before_any_row(option: str, tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", TICKETS)
    names = {"prompt": "body", "completion": "team", option: ""}
    with pytest.raises(UsageError, match="'' names no column") as raised:
        prepare(DataOptions(data=(str(path),), **names), byte_level())
    assert f"give --{option} COLUMN" in str(raised.value)


def test_columns_of_a_spreadsheet_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", TICKETS)
    prompts, notes = asked(path, prompt=r"{subject}\n{body} {{x}}", completion="team")
    assert ["Late\nWhere is it? {x}" in one.text for one in prompts] == [True, False]
    assert [one.reply for one in prompts] == ["shipping", "billing"]
    assert notes[-1] == "not read: the column id"
    prompts, _ = asked(path, prompt="subject", completion="{team}!", system="{body}, in {curly} braces")
    assert prompts[0].reply == "shipping!" and "Where is it?, in {curly} braces" in prompts[0].text


@pytest.mark.parametrize(
    ("table", "purpose", "given", "texts"),
    [
        (
            "asked,good,bad\nhow?,so,not so\n",
            "pairs",
            {"prompt": "asked", "columns": {"chosen": "good", "rejected": "bad"}},
            ["how?", "so", "not so"],
        ),
        (
            "asked,said,fine\nhow?,so,true\nhow?,not so,false\n",
            "labels",
            {"prompt": "asked", "completion": "said", "columns": {"label": "fine"}},
            ["how?", "so", "not so"],
        ),
    ],
)
def test_columns_of_any_form_by_name(
    table: str, purpose: Purpose, given: dict[str, Any], texts: list[str], tmp_path: Path
) -> None:
    data = DataOptions(data=(str(written(tmp_path / "t.csv", table)),), **given)
    tokenizer = byte_level()
    train, _ = prepare(data, tokenizer, purpose=purpose)
    read = "".join(tokenizer.decode(one.input_ids) for example in train.examples for one in example.documents)
    assert all(text in read for text in texts) and not any("not read" in note for note in train.report.notes)
    with pytest.raises(UsageError, match="there is no column 'sad'") as raised:
        prepare(DataOptions(data=data.data, columns={"rejected": "sad"}), tokenizer, purpose=purpose)
    assert raised.value.where == "columns"
    for misspelt, near in {"choosen": "chosen", "lable": "label", "zzz": "docs/data.md"}.items():
        with pytest.raises(UsageError, match=f"no form of rows reads {misspelt}") as raised:
            prepare(DataOptions(data=data.data, columns={misspelt: "asked"}), tokenizer, purpose=purpose)
        assert near in str(raised.value.next_step)
    assert all(f" --columns {name}={column}" in reading_options(data) for name, column in given["columns"].items())


def test_a_named_column_keeps_its_value_and_may_be_a_template() -> None:
    columns = {"sentence1": "{a} {b}", "sentence2": "b", "score": "how near", "negative": "none"}
    raw = RawRow({"a": "x", "b": "y", "how near": 0.5, "none": None}, "f:1")
    (row,) = ColumnReader(NamedColumns(columns=columns)).rows(iter([raw]), RowErrors())
    assert [row.values[name] for name in columns] == ["x y", "y", 0.5, None]
    (row,) = ColumnReader(NamedColumns(), recorded=NamedColumns(columns=columns)).rows(iter([raw]), RowErrors())
    assert row.values["score"] == 0.5


def test_columns_name_a_prompt_as_its_option_does(tmp_path: Path) -> None:
    row = {"asked": "how?", "said": "so", "messages": [{"role": "user", "content": "x"}]}
    data = (str(written(tmp_path / "t.jsonl", json.dumps(row) + "\n")),)
    columns = {"prompt": "asked", "completion": "said"}
    named, by_option = (
        prepare(DataOptions(data=data, **given), byte_level())[0].examples[0].input_ids.tolist()
        for given in ({"columns": columns}, columns)
    )
    assert named == by_option
    with pytest.raises(UsageError, match="prompt is named twice"):
        DataOptions(data=data, prompt="said", columns=columns).validate()


@pytest.mark.parametrize("words", [["chosen"], ["=a"], ["chosen="]])
def test_columns_need_a_name_and_a_column(words: list[str]) -> None:
    with pytest.raises(UsageError, match="NAME=COLUMN"):
        parse_columns(words)
    with pytest.raises(UsageError, match="given twice"):
        parse_columns(["chosen=a", "chosen=b"])
    assert parse_columns(["chosen=a b", "rejected={a}={b}"]) == {"chosen": "a b", "rejected": "{a}={b}"}


def test_a_prompt_of_one_column_may_be_messages_and_numbers_are_text(tmp_path: Path) -> None:
    row = {"turns": [{"role": "user", "content": "hi"}], "score": 5, "messages": None, "label": "x"}
    path = written(tmp_path / "t.jsonl", json.dumps(row) + "\n")
    prompts, _ = asked(path, prompt="turns", completion="score")
    assert "hi" in prompts[0].text and prompts[0].reply == "5"
    row["talk"] = [*row["turns"], {"role": "assistant", "content": "yes"}]  # type: ignore[misc]
    prompts, _ = asked(written(path, json.dumps(row) + "\n"), messages="talk")
    assert prompts[0].reply == "yes"


def test_generate_asks_by_name_and_needs_no_answer(tmp_path: Path) -> None:
    rows = DataOptions(data=(str(written(tmp_path / "t.csv", TICKETS)),))
    prompts, _ = prepare_prompts(rows, rows, byte_level(), NamedColumns(prompt="About {subject}"))
    assert "About Late" in prompts[0].text and prompts[0].reply is None


def test_an_unknown_column_is_answered_with_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", TICKETS)
    with pytest.raises(UsageError) as raised:
        asked(path, prompt="{subjct}", completion="team")
    assert raised.value.where == "prompt" and "did you mean subject?" in (raised.value.next_step or "")


def test_a_refused_row_says_which_forms_fit_and_how_to_name_columns() -> None:
    with pytest.raises(DataError) as raised:
        detect(RawRow({"subject": "a", "body": "b", "the team": "c"}, "f:1"))
    assert r"--prompt '{subject}\n{body}' --completion 'the team'" in (raised.value.next_step or "")
    with pytest.raises(DataError) as raised:
        detect(RawRow({"instruction": "a", "category": "c"}, "f:1"))
    assert (raised.value.next_step or "") == r"--prompt '{instruction}' --completion category"


FACES = "title,face,origin,category\n" + "".join(f"face {i},:-{i},old,{('joy', 'anger')[i % 2]}\n" for i in range(8))


def test_columns_with_one_value_are_not_suggested(tmp_path: Path) -> None:
    faces = written(tmp_path / "faces.csv", FACES)
    with pytest.raises(DataError, match="fit no form") as raised:
        prepare(DataOptions(data=faces), byte_level())
    assert str(raised.value.next_step).endswith(r"--prompt '{title}\n{face}' --completion category")
    texts = written(tmp_path / "texts.csv", FACES.replace("face,", "text,", 1))
    with pytest.raises(DataError, match="category would not be read") as raised:
        prepare(DataOptions(data=texts), byte_level())
    assert r"add: --prompt '{title}\n{text}' --completion category" in str(raised.value.next_step)
    long = "word " * 10
    other = written(tmp_path / "long.csv", "a,b,c\n" + "".join(f"{i},{long}{i},{i}\n" for i in range(8)))
    with pytest.raises(DataError, match="fit no form") as raised:
        prepare(DataOptions(data=other), byte_level())
    assert r"--prompt '{a}\n{b}' --completion c" in str(raised.value.next_step), "long values may differ at their end"


def test_a_table_for_decisions_is_answered_with_the_options_that_read_it(tmp_path: Path) -> None:
    faces = written(tmp_path / "faces.csv", FACES)
    with pytest.raises(DataError, match="do not fit decisions") as raised:
        prepare(DataOptions(data=faces), byte_level(), purpose="decisions")
    assert str(raised.value.next_step).startswith(r"add --state '{title}\n{face}' --question category;")
    options = DataOptions(data=faces, state=r"{title}\n{face}", question={"category": ""}, option_rows=0)
    assert prepare(options, byte_level(), purpose="decisions")[0].report.rows == 8
    for given, advice in (
        ({"question": {"category": "Which?"}}, r"add --state '{title}\n{face}'"),
        ({"question": {"title": ""}}, r"add --state '{face}\n{category}'"),
        ({"state": "title"}, "add --question category; --question COLUMN='…' also puts the question into words"),
    ):
        with pytest.raises(DataError, match="do not fit decisions") as raised:
            prepare(DataOptions(data=faces, **given), byte_level(), purpose="decisions")
        assert raised.value.next_step == advice, "the options given stay"
    other = written(tmp_path / "other.csv", "a,b\n" + "".join(f"{i},{i}\n" for i in range(8)))
    with pytest.raises(DataError, match="do not fit decisions") as raised:
        prepare(DataOptions(data=other), byte_level(), purpose="decisions")
    assert str(raised.value.next_step).endswith("--state COLUMN --question COLUMN")


@pytest.mark.parametrize(
    ("columns", "given", "advice"),
    [
        ("package,summary,section", {"prompt": "summary"}, "--prompt summary --completion section"),
        ("package,summary,section", {"prompt": "{summary}!"}, "--prompt '{summary}!' --completion section"),
        (
            "package,summary,section",
            {"completion": "section"},
            r"--prompt '{package}\n{summary}' --completion section",
        ),
        ("question,accepted,refused", {}, "--prompt '{question}' --completion accepted"),
        ("question,accepted,refused", {"prompt": "question"}, "--prompt question --completion accepted"),
        ("question,accepted,refused", {"completion": "accepted"}, "--prompt '{question}' --completion accepted"),
        ("question,refused", {}, None),
        ("Nr.,Text,Category", {}, "--prompt '{Text}' --completion Category"),
        ("Text,Category", {}, "--prompt '{Text}' --completion Category"),
        ("Category,Text", {}, "--prompt '{Text}' --completion Category"),
    ],
)
def test_a_suggestion_reads_the_rows_when_it_is_pasted(
    columns: str, given: dict[str, str], advice: str | None, tmp_path: Path
) -> None:
    names = columns.split(",")
    path = written(tmp_path / "t.csv", f"{columns}\n{','.join(name[0] for name in names)}\n")
    with pytest.raises(DataError) as raised:
        asked(path, **given)
    said = raised.value.next_step or ""
    assert said.endswith(advice) if advice else "--prompt" not in said
    if advice:
        _, _, prompt, _, completion = shlex.split("x " + advice)
        prompts, _ = asked(path, prompt=prompt, completion=completion)
        assert prompts[0].reply == completion[0]


def test_a_class_is_the_suggested_answer_unless_the_last_column_has_texts(tmp_path: Path) -> None:
    for last, answer in (("f", "package"), ("a long text of more than forty characters, ", "body")):
        rows = "".join(f"about {n},{'ab'[n % 2]},{last.strip(', ')}{n}\n" for n in range(8))
        path = written(tmp_path / "t.csv", f"docstring,package,body\n{rows}")
        with pytest.raises(DataError) as refused:
            prepare(DataOptions(data=path), byte_level())
        assert str(refused.value).endswith(f"--completion {answer}")


@pytest.mark.parametrize(
    ("columns", "advice"),
    [
        ("name,section,lead,size", r"or name the columns: --prompt '{name}\n{lead}' --completion section"),
        (
            "name,rating,section,lead,size",
            r"or name the columns: --prompt '{name}\n{lead}' --completion section",
        ),
        (
            "name,section,size,home,more,lead,needs",
            r"for example --prompt '{name}\n{home}\n{more}\n{lead}' --completion section",
        ),
        ("name,lead,section,note", r"or name the columns: --prompt '{name}\n{lead}' --completion section"),
        ("name,section,needs", r"section, or --prompt '{name}\n{section}' --completion needs"),
        ("name,lead,home,size", r"or name the columns: for example --prompt '{name}\n{lead}' --completion home"),
        ("lead,size", "or name the columns: for example --prompt '{lead}' --completion size"),
        ("width,size,section", r"or name the columns: --prompt '{width}\n{size}' --completion section"),
    ],
)
def test_advice_for_unknown_columns_names_the_class_or_is_an_example(columns: str, advice: str, tmp_path: Path) -> None:
    cell = {
        "section": lambda n: "ab"[n % 2],
        "rating": lambda n: f"{n % 2}",
        "size": lambda n: f"{n * 7}",
        "width": lambda n: f"-{n}.5",
        "note": lambda n: "" if n % 4 else "seen",
        "needs": lambda n: f"a text {n} of more words than a class has in any table of rows",
    }
    rows = ((cell.get(name, lambda n, name=name: f"{name} {n}")(n) for name in columns.split(",")) for n in range(8))
    path = written(tmp_path / "t.csv", "\n".join([columns, *map(",".join, rows)]) + "\n")
    with pytest.raises(DataError) as trained:
        prepare(DataOptions(data=path), byte_level())
    assert advice in str(trained.value.next_step)
    with pytest.raises(DataError, match="8 malformed") as linted:
        lint(DataOptions(data=path), byte_level())
    assert linted.value.next_step == trained.value.next_step, "lint gives the same advice"
    with pytest.raises(DataError) as asked_of:
        prepare_prompts(RowSources(data=(str(path),)), TemplateOptions(), byte_level())
    assert "--prompt" in str(asked_of.value.next_step) and "--completion" not in str(asked_of.value.next_step)


@pytest.mark.parametrize(
    ("purpose", "options"),
    [
        *(
            (purpose, kind)
            for purpose in ("decisions", "embeddings", "rankings", "classes")
            for kind in (TrainConfig, EvaluateOptions)
        ),
        ("labels", LintOptions),
        ("prompts", EvaluateOptions),
        ("pairs", TrainConfig),
        *(("texts", kind) for kind in (EmbedOptions, ClassifyOptions, RankOptions)),
        ("embeddings", MineOptions),
        ("candidates", RankOptions),
        ("states", DecideOptions),
    ],
)
def test_advice_about_columns_names_options_of_the_command(purpose: Purpose, options: type) -> None:
    with pytest.raises(DataError, match="do not fit") as raised:
        detect(RawRow({"one": "a", "two": "b"}, "f:1"), purpose=purpose)
    named = set(re.findall(r"--[a-z-]+", f"{raised.value.why} {raised.value.next_step}"))
    assert named and named <= {field.option for field in option_fields(options)}


@pytest.mark.parametrize(
    ("purpose", "recorded", "columns", "what", "named"),
    [
        ("answers", {"prompt": "Sort: {a}", "completion": "b"}, "a,c", "'b', .* --completion b", "'Sort: {a}' --comp"),
        ("classes", {"prompt": "{a}: {b}", "completion": "c"}, "a,c", "'b', .* --prompt '{a}: {b}'", "'{a}: {COLUMN}'"),
        ("texts", {"prompt": "a"}, "b,c", "'a', .* --prompt a", "--prompt COLUMN"),
        (
            "embeddings",
            {"columns": {"anchor": "a", "positive": "b"}},
            "a,c",
            "'b', .* --columns positive=b",
            "--columns anchor=a --columns positive=COLUMN",
        ),
    ],
)
def test_rows_without_a_column_of_the_training_are_answered_with_it(
    purpose: Purpose, recorded: dict[str, Any], columns: str, what: str, named: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "rows.csv", f"{columns}\n1,2\n")
    with pytest.raises(DataError, match=f"no column {what}") as raised:
        rows_of(RowSources(data=(path,)), NamedColumns(), purpose, NamedColumns(**recorded))
    assert "rename the column of these rows to" in str(raised.value.next_step)
    assert named in str(raised.value.next_step) and raised.value.where == f"{path}:2"


def test_prompts_of_preference_pairs_are_answered(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert detect(RawRow(pair, "f:1"), allow_prompts=True)[1].name == "prompt"
    path = written(tmp_path / "rows.csv", "ask,good,bad\n1,2,3\n")
    with pytest.raises(DataError, match="preference pairs") as named:
        prepare(DataOptions((str(path),), columns={"prompt": "ask", "chosen": "good", "rejected": "bad"}), byte_level())
    assert str(named.value.next_step).endswith("with --prompt ask --completion good instead of --columns")
    with pytest.raises(DataError) as raised:
        detect(RawRow({"chosen": "c", "rejected": "r"}, "f:1"), allow_prompts=True)
    assert "--objective" not in str(raised.value.next_step) and "--completion" not in str(raised.value.next_step)


@pytest.mark.parametrize(
    ("columns", "chosen", "rejected", "asked"),
    [
        ("question,short,long", "short", "long", ""),
        ("question,bad,good", "good", "bad", ""),
        ("id,instruction,better,other", "better", "other", "--prompt instruction "),
    ],
)
def test_two_answers_to_one_prompt_may_be_a_pair(
    columns: str, chosen: str, rejected: str, asked: str, tmp_path: Path
) -> None:
    rows = (",".join(f"{name} of row {n}" for name in columns.split(",")) for n in range(8))
    path = written(tmp_path / "t.csv", "\n".join([columns, *rows]) + "\n")
    options = f"{asked}--columns chosen={chosen} --columns rejected={rejected}"
    with pytest.raises(DataError) as linted:
        lint(DataOptions(data=(str(path),)), byte_level())
    assert f"they are a pair, for --objective dpo: {options}" in str(linted.value.next_step)
    with pytest.raises(DataError, match="do not fit pairs") as trained:
        prepare(DataOptions(data=(str(path),)), byte_level(), purpose="pairs")
    assert trained.value.next_step == f"name the columns, for example {options}"
    question = "instruction" if asked else "question"
    written(path, path.read_text() + ",".join(len(columns.split(",")) * ["a longer text" * 9]) + "\n")
    with pytest.raises(DataError) as named:
        lint(DataOptions(data=(str(path),), prompt=question), byte_level())
    assert str(named.value.next_step).endswith(f"for --objective dpo: {options.removeprefix(asked)}")


def test_an_empty_column_is_not_suggested(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "Headline,Lead,Answer\n,words,x\n")
    with pytest.raises(DataError) as raised:
        asked(path)
    assert (raised.value.next_step or "").endswith("--prompt '{Lead}' --completion Answer")


@pytest.mark.parametrize(
    ("header", "understood"),
    [
        ("Question,Reply", True),
        ("id,Prompt,Output", True),
        ("Question,Answer,Reply", False),
        ("Question,Answer,Comment", False),
        ("Subject,Reply", False),
    ],
)
def test_usual_names_are_understood_where_nothing_is_doubtful(tmp_path: Path, header: str, understood: bool) -> None:
    cells = ",".join("abc"[: header.count(",") + 1])
    path = written(tmp_path / "t.csv", f"{header}\n{cells}\n")
    if not understood:
        with pytest.raises(DataError):
            asked(path)
        return
    prompts, notes = asked(path)
    assert prompts[0].reply == cells[-1]
    assert any("is read as the prompt" in note for note in notes)


def test_a_class_next_to_a_text_is_found_by_its_name_or_its_values(tmp_path: Path) -> None:
    def refused(text: str) -> str:
        with pytest.raises(DataError, match="would not be read") as raised:
            asked(written(tmp_path / "t.csv", text), None)
        return str(raised.value.next_step)

    assert "is the answer, add: --prompt '{text}' --completion label\n" in refused("text,label\nhello,good\n")
    rows = "".join(f"{i},text {i},{'ab'[i % 2]}\n" for i in range(8))
    assert "--prompt '{text}' --completion Section" in refused(f"id,text,Section\n{rows}")
    _, notes = asked(written(tmp_path / "t.csv", f"id,text,Split\n{rows}"))
    assert notes[-1].endswith("not read: the columns id, Split")  # which says where a row belongs, not what it is
    _, notes = asked(written(tmp_path / "t.csv", "text,author\n" + "".join(f"t,{i}\n" for i in range(8))))
    assert notes[-1].endswith("not read: the column author")


def test_whole_texts_are_not_learned_by_mistake_next_to_their_class(tmp_path: Path) -> None:
    news = "".join(f"Headline {i},{'long ' * 20}{i},{('sport', 'politics')[i % 2]}\n" for i in range(8))
    path = written(tmp_path / "news.csv", f"title,text,section\n{news}")
    with pytest.raises(DataError, match="text would be read as it is, and section would not be read") as raised:
        prepare(DataOptions(data=path), byte_level())
    assert raised.value.why == "section has few, short values, as a class has: sport, politics"
    _, learns, whole = str(raised.value.next_step).split("\n    - ")
    assert learns == "if section is the answer, add: --prompt '{title}\\n{text}' --completion section"
    assert whole == "if whole texts are meant, add: --train-on text"
    for options in (
        {"train_on": "text"},
        {"train_on": "all"},
        {"prompt": "{title}\\n{text}", "completion": "section"},
    ):
        train, _ = prepare(DataOptions(data=path, **options), byte_level())
        assert len(train.examples) == 8
    with pytest.raises(DataError, match="section would not be read"):
        lint(DataOptions(data=path), byte_level())
    rows = RowSources(data=(str(path),))
    with pytest.raises(DataError, match="section would not be read") as raised:
        prepare_prompts(rows, TemplateOptions(), byte_level())
    assert "--prompt '{title}\\n{text}'\n" in str(raised.value.next_step)
    other = written(tmp_path / "other.jsonl", '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="the rows have the form prompt/completion, and train_on 'text' reads texts"):
        prepare(DataOptions(data=other, train_on="text"), byte_level())


def test_a_column_of_numbers_next_to_a_text_and_lists_is_proposed_as_a_number() -> None:
    rows: list[dict[str, Any]] = [{"text": f"film {i}", "label": i / 8, "votes": [i, 2]} for i in range(40)]
    with pytest.raises(DataError, match="label would not be read") as raised:
        prepare(DataOptions(data=rows), byte_level())
    assert raised.value.why == "label has the name of an answer, and values such as 0.0, 0.125, 0.25, 0.375"
    _, number, digits, _ = str(raised.value.next_step).split("\n    - ")
    assert number.endswith("number label, add: --objective classify --prompt '{text}' --completion label")
    assert digits == "to learn its digits as text, add: --prompt '{text}' --completion label"
    renamed = [{"film": row["text"], "rating": row["label"], "votes": row["votes"]} for row in rows]
    with pytest.raises(DataError, match="fit no form") as raised:
        prepare(DataOptions(data=renamed), byte_level())
    assert str(raised.value.next_step).endswith("--prompt '{film}' --completion rating")


@pytest.mark.parametrize("options", [{"prompt": "{text}", "completion": "section"}, {"messages": "text"}])
def test_whole_texts_and_named_columns_contradict(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="reads the column text, and other columns are named"):
        DataOptions(data="news.csv", train_on="text", **options).validate()


@pytest.mark.parametrize(
    ("row", "given", "missing"),
    [
        ({"question": "q", "answer": "a", "label": "l"}, {"completion": "label"}, "prompt"),
        ({"text": "t", "label": "l"}, {"prompt": "text"}, "completion"),
        ({"question": "q", "answer": "a"}, {"prompt": "{question}!"}, "completion"),
    ],
)
def test_an_option_that_the_form_would_leave_unread_is_refused(
    row: dict[str, Any], given: dict[str, str], missing: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="would be ignored") as raised:
        asked(written(tmp_path / "t.jsonl", json.dumps(row) + "\n"), **given)
    assert f"with --{missing}" in (raised.value.next_step or "")


def test_an_evaluation_names_columns_of_the_file_and_the_option_that_it_does_not_read(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", '{"body": "a", "team": "b"}\n')
    with pytest.raises(UsageError, match="--state is given, but an evaluation of classes does not") as unread:
        asked(path, "classes", state="body")
    assert "use an adapter of --objective decide" in (unread.value.next_step or "")
    with pytest.raises(DataError, match=r"do not fit classes: body, team\n"):
        asked(path, "classes", columns={"completion": "team"})


def test_a_completion_is_not_passed_over_among_pairs() -> None:
    pair = {"prompt": "p", "chosen": "c", "rejected": "r", "completion": "x"}
    assert detect(RawRow(pair, "f:1"), purpose=None, named={"completion": "completion"})[1].columns[1] == "completion"
    with pytest.raises(DataError, match="--completion would be ignored"):
        detect(RawRow(pair, "f:1"), purpose="pairs", named={"completion": "completion"})


def test_one_option_is_used_where_the_row_fits_other_forms_too(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "text": "t", "completion": "c", "messages": []}
    path = written(tmp_path / "t.jsonl", json.dumps(row) + "\n")
    rows = DataOptions(data=(str(path),))
    prompts, _ = prepare_prompts(rows, rows, byte_level(), NamedColumns(prompt="{question} Be brief:"))
    assert "q Be brief:" in prompts[0].text
    assert asked(path, prompt="{question}")[0][0].reply == "c"


def test_a_row_keeps_its_own_system_message(tmp_path: Path) -> None:
    rows = [{"q": "a", "a": "b", "system": own, "name": "Ann"} for own in ("mine", "")]
    path = written(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    first, second = (one.text for one in asked(path, prompt="q", completion="a", system="for {name}")[0])
    assert "mine" in first and "Ann" not in first and "for Ann" in second


def test_cells_of_other_types_are_text_and_nan_is_empty(tmp_path: Path) -> None:
    cells: list[Any] = [dt.date(2024, 5, 1), Decimal("1.50"), math.nan, b"x", [dt.date(2024, 5, 1)]]
    raws = [RawRow({"q": "when", "a": cell}, f"f:{number}") for number, cell in enumerate(cells)]
    bad = RowErrors(skip_bad=True)
    found = list(ColumnReader(NamedColumns(prompt="q", completion="{a}!")).rows(iter(raws), bad))
    assert [row.values["completion"] for row in found] == ["2024-05-01!", "1.50!", '["2024-05-01"]!']
    assert [error.where for error in bad.errors] == ["f:2", "f:3"]


def test_columns_of_training_are_read_if_no_others_are_named(tmp_path: Path) -> None:
    recorded = NamedColumns(prompt="{text}", completion="label")
    path = written(tmp_path / "held.csv", "text,label\nhello,good\nbye,bad\n")
    options = DataOptions(data=(str(path),))
    prompts: list[Prompt] = []
    train, _ = prepare(options, byte_level(), purpose=None, prompts=prompts, recorded=recorded)
    assert [prompt.reply for prompt in prompts] == ["good", "bad"]
    assert any("as in the adapter's training: --prompt '{text}' --completion label" in n for n in train.report.notes)
    read, _ = prepare_prompts(options, options, byte_level(), recorded=recorded)
    assert [prompt.reply for prompt in read] == ["good", "bad"]
    typed, _ = prepare_prompts(options, options, byte_level(), NamedColumns(prompt="label"), recorded=recorded)
    assert "good" in typed[0].text and "hello" not in typed[0].text
    unanswered = written(tmp_path / "new.jsonl", '{"text": "hello", "id": 1}\n')
    (asked_of,), _ = prepare_prompts(
        RowSources(data=(str(unanswered),)), TemplateOptions(), byte_level(), recorded=recorded
    )
    assert asked_of.reply is None and "hello" in asked_of.text
    other = written(tmp_path / "other.jsonl", '{"prompt": "a", "completion": "b"}\n')
    train, _ = prepare(DataOptions(data=(str(other),)), byte_level(), recorded=recorded)
    assert len(train.examples) == 1 and not train.report.notes


def test_advice_for_prompts_without_answers_names_columns_of_the_file(tmp_path: Path) -> None:
    """The columns may be named by an option or by an adapter's record."""
    recorded = NamedColumns(prompt="asked")
    alone = written(tmp_path / "alone.csv", "asked\nwhere\nwhen\n")
    more = written(tmp_path / "more.csv", "asked,right\nwhere,here\nwhen,now\n")
    for path, ending in (
        (
            alone,
            "name it (--completion COLUMN), or write answers first: backhand generate --data FILE --as-rows",
        ),
        (more, "--prompt asked --completion right"),
    ):
        for options, record in ((DataOptions(data=path, prompt="asked"), None), (DataOptions(data=path), recorded)):
            with pytest.raises(DataError, match="asked is named as the prompt, and no completion") as raised:
                prepare(options, byte_level(), purpose=None, recorded=record)
            assert str(raised.value).endswith(ending)


def test_a_column_that_was_named_is_not_another_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,headline,lead\n1,a,b\n2,c,d\n")
    with pytest.raises(DataError) as raised:
        prepare(DataOptions(data=(str(tmp_path / "t.csv"),), prompt="headline"), byte_level())
    assert "headline" not in str(raised.value.why) and "lead" in str(raised.value.why)
    with pytest.raises(UsageError, match="no column 'headlin'") as wrong:
        prepare(DataOptions(data=(str(tmp_path / "t.csv"),), prompt="headlin", completion="lead"), byte_level())
    assert "did you mean headline" in str(wrong.value.next_step) and "brace" not in str(wrong.value.next_step)


@pytest.mark.parametrize(
    ("prompt", "completion"), [("body", "body"), ("{body}", "body"), ("Text: {body}", "Text: {body}")]
)
def test_one_text_as_prompt_and_as_completion_is_refused(prompt: str, completion: str, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", "body,team\nthe mail,billing\nthe parcel,delivery\n")
    with pytest.raises(UsageError, match="prompt and completion are the same text") as refused:
        asked(path, prompt=prompt, completion=completion)
    assert refused.value.where == "completion" and "rows.csv:2 has body, team" in str(refused.value)
    _, _, typed = str(refused.value.next_step).partition("instead of both: --train-on text --columns ")
    (column,) = shlex.split(typed)
    prepared, _ = prepare(DataOptions(data=(str(path),), train_on="text", columns=parse_columns(column)), byte_level())
    assert prepared.report.rows == 2, "the advice reads whole texts"


@pytest.mark.parametrize(
    ("purpose", "columns", "why"),
    [
        ("classes", {"prompt": "body", "completion": "body"}, BOTH_EQUAL),
        ("classes", {"columns": ("text=body", "label=body")}, None),
        ("embeddings", {"columns": ("anchor=team", "positive=body", "negative=body")}, BOTH_EQUAL),
        ("embeddings", {"columns": ("sentence1=body", "sentence2=body", "score=n")}, BOTH_EQUAL),
        ("embeddings", {"columns": ("sentence1=body", "sentence2=team", "score=body")}, None),
        ("pairs", {"prompt": "n", "columns": ("chosen=body", "rejected=body")}, BOTH_EQUAL),
    ],
)
def test_one_text_for_two_columns_of_a_form_is_refused(
    purpose: Purpose, columns: Any, why: str | None, tmp_path: Path
) -> None:
    path = written(tmp_path / "rows.csv", "body,team,n\nthe mail,billing,1\nthe parcel,delivery,0\n")
    columns = {**columns, "columns": parse_columns(columns.get("columns", ()))}
    with pytest.raises(UsageError, match="are the same text, 'body'") as refused:
        lint(DataOptions(data=(str(path),), **columns), byte_level(), purpose=purpose)
    assert "rows.csv:2 has body, team, n" in str(refused.value) and "--train-on" not in str(refused.value)
    assert refused.value.why == why


@pytest.mark.parametrize(
    ("by", "mistyped", "looked_up"),
    [("ABCDE", 0, True), ("ABCDEFG", 0, False), ("ABCDE", 1, True), ("ABCDE", 2, False)],
)
def test_a_column_whose_values_each_have_one_answer_is_not_proposed_and_noted(
    by: str, mistyped: int, looked_up: bool, tmp_path: Path
) -> None:
    lines = [f"the speech {n},Mr {by[n % len(by)]},{'LR'[n % 5 % 2]}\n" for n in range(60)]
    lines[:mistyped] = [line.replace(",L", ",left").replace(",R", ",right") for line in lines[:mistyped]]
    path = written(tmp_path / "rows.csv", "".join(["text,speaker,side\n", *lines]))
    rows = DataOptions(data=(str(path),))
    with pytest.raises(DataError) as refused:
        lint(rows, byte_level(), purpose="classes")
    assert (r"{text}\n{speaker}" in str(refused.value)) is not looked_up
    named = replace(rows, prompt=r"{text}\n{speaker}", completion="side", max_rows=50)
    notes = lint(named, byte_level(), purpose="classes")[0].train.notes
    told = "each speaker has only one side, but for a few rows at most, so that the model learns these values"
    assert any(told in note for note in notes) is looked_up


def test_an_answer_inside_the_prompt_or_the_state_is_noted(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", "body,team\nthe mail,billing\nthe parcel,delivery\n")
    _, notes = asked(path, prompt="{body} {team}", completion="team")
    assert any(note.startswith("warning: the answer team is also in --prompt, so that") for note in notes)
    _, notes = asked(path, prompt="{body}", completion="{body}: {team}")
    assert not any("before it answers" in note for note in notes)
    decides = {"purpose": "decisions", "question": {"team": "Which?"}}
    _, notes = asked(path, state="{body} {team}", **decides)
    assert any(note.startswith("warning: the answer team is also in --state, so that") for note in notes)
    with pytest.raises(UsageError, match="state and question are the same text, 'team'"):
        asked(path, state="team", **decides)


def test_an_error_calls_a_renamed_column_by_its_name_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "completion.jsonl"
    path.write_text('{"review": "good", "ratings": [3, 4], "stars": 3}\n')
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}:1: ratings is a list of 2, not text"):
        prepare(DataOptions(data=(str(path),), prompt="review", completion="ratings"), byte_level())
    with pytest.raises(DataError, match="stars is the number 3, not text") as raised:
        prepare(DataOptions(data=(str(path),), columns={"text": "stars"}), byte_level())
    assert raised.value.next_step == "write stars in quotes"


def test_a_misspelt_question_of_rows_without_a_state_is_corrected(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"review": "good", "ratings": "high"}\n{"review": "bad", "ratings": "low"}\n')
    with pytest.raises(DataError) as raised:
        prepare(DataOptions(data=(str(path),), question={"ratngs": ""}), byte_level(), purpose="decisions")
    assert raised.value.next_step == "did you mean ratings? Also add --state '{review}'"
