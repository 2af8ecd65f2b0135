from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from backhand.data.lint import FIRST_CHECKS, LAST_CHECKS, LintReport, lint
from backhand.data.mojibake import find_mojibake
from backhand.data.options import DataOptions
from backhand.data.prepare import prepare
from backhand.data.row_kind import row_kinds
from backhand.data.rows import Purpose
from backhand.data.template_report import default_system, describe_template
from backhand.data.token_view import token_lines, token_texts, view_tokens
from backhand.errors import DataError
from tests.support.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer
from tests.support.tokenizer_kinds import (
    ALTERNATING,
    INSTRUCTION_BRACKETS,
    RETHINKING,
    WITHOUT_END,
    byte_level,
    sentence_pieces,
)


def row(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def chat(*turns: str) -> dict[str, Any]:
    """User and assistant in turns."""
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, turns, strict=False)]}


def linted(tmp_path: Path, rows: list[Any], tokenizer: Any = None, **options: Any) -> LintReport:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in rows))
    context_length = options.pop("context_length", None)
    made = DataOptions(data=(str(path),), **options)
    report, _ = lint(made, tokenizer or byte_level(), context_length=context_length)
    assert json.loads(json.dumps(report.to_json()))["train"]["rows"] == report.train.rows
    return report


def places(report: LintReport) -> dict[str, list[str]]:
    """Lines of each kind of finding, without the file."""
    found: dict[str, list[str]] = {}
    for finding in report.findings:
        found.setdefault(finding.kind, []).extend(place.rpartition("rows.jsonl:")[2] for place in finding.where)
    return found


def test_good_rows_have_no_findings(tmp_path: Path) -> None:
    report = linted(tmp_path, [row(f"q{i}", "yes é") for i in range(4)])
    assert report.findings == ()
    assert report.errors == 0
    assert report.lengths["supervised tokens"]["least"] == report.lengths["supervised tokens"]["most"] > 1


@pytest.mark.parametrize(
    ("rows", "options", "kind", "lines"),
    [
        ([row("q", "a"), "{", row("p", "a"), '{"prompt": 3, "completion": "x"}'], {}, "malformed", ["2", "4"]),
        ([row("q", "a"), row("p", "no " * 60)], {"max_length": 40}, "truncated", ["2"]),
        ([row("q", "a"), row("p " * 60, "no")], {"max_length": 40}, "too_long", ["2"]),
        ([row("q", "a"), row("p", "no " * 60)], {"max_length": 40, "long_rows": "drop"}, "too_long", ["2"]),
        ([row("q", "a"), row("p", "b"), row("p", "")], {}, "empty_reply", ["3"]),
        ([row("q", "a"), row("p", "  ")], {}, "empty_reply", ["2"]),
        ([chat("q", "a", "p", "b"), chat("q", "", "p", "b"), chat("q", "a", "p", "")], {}, "empty_reply", ["2", "3"]),
        ([row("q", "cafÃ©"), row("p", "a")], {}, "mojibake", ["1"]),
        ([row(f"q{n}", "Billing" if n == 4 else "billing") for n in range(6)], {}, "spelling", ["5"]),
        ([row(f"q{n}", "bill  it" if n == 1 else "bill it") for n in range(6)], {}, "spelling", ["2"]),
        ([row("q", "a"), row("p", "no " * 60)], {"context_length": 40}, "context", ["2"]),
    ],
)
def test_each_finding_names_the_line_and_a_remedy(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], kind: str, lines: list[str]
) -> None:
    report = linted(tmp_path, rows, **options)
    assert places(report)[kind] == lines
    assert all(finding.remedy for finding in report.findings)
    assert not any(" of " in " ".join(finding.what.split()[:3]) for finding in report.findings)
    assert (report.errors > 0) == (kind == "malformed")


def test_a_length_that_the_model_does_not_have_is_no_remedy(tmp_path: Path) -> None:
    for context, advised in ((41, True), (40, False), (None, True)):
        report = linted(tmp_path, [row("q", "a"), row("p", "no " * 60)], max_length=40, context_length=context)
        remedy = next(finding.remedy for finding in report.findings if finding.kind == "truncated")
        assert remedy.startswith("raise --max-length, shorten" if advised else "shorten the rows")


def test_bad_rows_are_each_a_finding_up_to_a_number(tmp_path: Path) -> None:
    report = linted(tmp_path, [row("q", "a"), *[f"{{{number}" for number in range(30)]])
    assert report.errors == 30
    assert len([finding for finding in report.findings if finding.kind == "malformed"]) == 21
    assert report.findings[0].severity == "error"


def test_one_fault_of_many_lines_is_one_finding(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt;completion\nq;a\n" + b"f\xfcr;a\n" * 30 + b"a;b;c\n")
    report, _ = lint(DataOptions(data=(str(path),)), byte_level())
    many, one = report.findings
    assert (many.count, len(many.where), many.where[0]) == (30, 5, f"{path}:3") and "iconv" in many.remedy
    assert (one.count, one.what) == (1, "1 more malformed rows after this one")


@pytest.mark.parametrize("purpose", ["classes", "embeddings", "decisions"])
def test_text_that_looks_wrongly_decoded_is_found_for_every_use(purpose: Purpose, tmp_path: Path) -> None:
    rows = [{"prompt": "cafÃ©" if n == 2 else f"q{n}", "completion": "ab"[n % 2]} for n in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    report, _ = lint(DataOptions(data=(str(path),), eval_fraction=0.0), tiny_tokenizer(), purpose=purpose)
    assert places(report)["mojibake"] == ["3"]


def test_numbers_as_answers_are_noted() -> None:
    for answers, noted in (([n / 8 for n in range(24)], True), ([*range(24)], False), (["1.5", "2.5"] * 12, False)):
        rows = [{"prompt": f"film {n}", "completion": str(answer)} for n, answer in enumerate(answers)]
        notes = lint(DataOptions(data=rows), byte_level())[0].train.notes
        assert any("learn them as numbers, train with --objective classify" in one for one in notes) == noted


def test_prompts_have_no_answers_to_check(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "how many?", "answer": "7"}\n' * 2 + '{"prompt": "schÃ¶n", "answer": "7"}\n')
    report, _ = lint(DataOptions(data=(str(path),)), byte_level(), purpose="prompts")
    assert [finding.kind for finding in report.findings] == ["mojibake", "duplicate"]
    assert {"no_end", "empty_reply", "spelling"}.isdisjoint(report.checked)
    assert (report.train.supervised_tokens, report.labels) == (0, {})


def test_repetitions_name_both_places(tmp_path: Path) -> None:
    report = linted(tmp_path, [row("q", "a"), row("p", "b"), row("q", "a"), row("q", "a")])
    (finding,) = report.findings
    path = tmp_path / "rows.jsonl"
    assert finding.where == (f"{path}:3 = {path}:1", f"{path}:4 = {path}:1")


def test_overlap_with_held_out_rows(tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(row("other", "x")) + "\n" + json.dumps(row("q", "a")) + "\n{\n")
    report = linted(tmp_path, [row("q", "a"), row("p", "no " * 60)], eval_data=(str(held),), max_length=40)
    kinds = {finding.kind: finding.where for finding in report.findings}
    assert kinds["overlap"] == (f"{held}:2",)
    assert kinds["malformed"] == (f"{held}:3",)
    assert report.held_out is not None
    assert (report.train.truncated, report.held_out.truncated) == (1, 0)
    assert (report.train.skipped_bad, report.held_out.skipped_bad) == (0, 1)


def test_replies_that_never_end_and_doubled_begin_tokens(tmp_path: Path) -> None:
    tokenizer = sentence_pieces()
    doubling = "{{ bos_token }}" + INSTRUCTION_BRACKETS
    assert places(linted(tmp_path, [row("q", "a")], tokenizer, chat_template=doubling))["doubled_bos"] == ["1"]
    trailing = INSTRUCTION_BRACKETS.replace("{{ eos_token }}", "{{ eos_token }}!")
    assert places(linted(tmp_path, [row("q", "a")], tokenizer, chat_template=trailing)) == {}


def test_what_stops_everything_is_still_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        linted(tmp_path, ["{"])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHAT_TEMPLATE, []),
        (RETHINKING, ["rewrites earlier replies"]),
        (ALTERNATING, ["trims white space", "refuses a system message"]),
        (WITHOUT_END, ["ends replies with no control token"]),
        ("none", ["no chat template"]),
        ("{{ raise_exception('never') }}", ["refuses a single user message"]),
        (CHAT_TEMPLATE.partition("{% if add_generation_prompt")[0], ["'<|im_start|>assistant\\n' carries loss"]),
        ("<|im_start|>system\nBe brief, please<|im_end|>\n" + CHAT_TEMPLATE, ["adds text"]),
        (CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>"), ["not the end-of-sequence token"]),
        (
            CHAT_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>' }}"),
            [],
        ),
        (
            CHAT_TEMPLATE.replace("assistant\n' }}", "assistant\nOK: ' }}"),
            ["does not continue the generation prompt"],
        ),
    ],
)
def test_habits_of_templates(template: str, said: list[str]) -> None:
    properties = describe_template(byte_level(), DataOptions(chat_template=template))
    assert len(properties) == len(said)
    assert all(words in text for words, text in zip(said, properties, strict=True))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("plain", False),
        ("café, naïve, Übung, ¿qué?, 日本語, “quoted” — yes… 😀 Ελλάδα", False),
        ("cafÃ©", True),
        ("donâ€™t", True),
        ("ä½ å¥½".replace(" ", "\xa0"), True),
        ("a\ufffdb", True),
    ],
)
def test_mojibake(text: str, found: bool) -> None:
    assert (find_mojibake(text) is not None) == found


def test_every_damaged_accent_is_found() -> None:
    for character in "éàèùâêîôûçëïüöäßñ’“…–€":
        try:
            damaged = character.encode().decode("cp1252")
        except UnicodeDecodeError:
            continue
        assert find_mojibake(f"x{damaged}y") == damaged


def test_the_system_message_of_a_template_by_default() -> None:
    tokenizer = byte_level()
    assert default_system(tokenizer) is None
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    tokenizer.chat_template = "{% if messages[0].role != 'system' %}<system>Be kind.{% endif %}" + plain
    assert default_system(tokenizer) == "Be kind."
    tokenizer.chat_template = "{% if messages[0].role != 'system' %}[intro]{% endif %}" + plain
    assert default_system(tokenizer) is None, "text that no system message writes"


def test_tokens_for_eyes(tmp_path: Path) -> None:
    tokenizer = byte_level()
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("é", "yes\n")))
    (example,) = prepare(DataOptions(data=(str(path),)), tokenizer)[0].examples
    viewed = view_tokens(example, tokenizer)
    assert [token.input_id for token in viewed] == example.input_ids.tolist()
    assert "".join(token.text for token in viewed if token.supervised) == "yes\n<|im_end|>"
    lines = token_lines(example, "", tokenizer)
    assert lines[0] == f"{path}:1"
    assert lines[-1].startswith("*") and lines[-1].endswith("'<|im_end|>'")
    assert lines[1].startswith(" ")
    whole = next(number for number, line in enumerate(lines) if line.endswith("'é'"))
    assert lines[whole + 1].endswith("(more of the same character)")
    pieces = WordPiece({"[UNK]": 0, "run": 1, "##ning": 2, "fast": 3}, unk_token="[UNK]")
    backend = Tokenizer(pieces)
    backend.decoder = decoders.WordPiece()
    words = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_texts([1, 2, 3, 2], words) == ["run", "ning", " fast", "ning"]
    assert token_texts(tokenizer("aé").input_ids[:2], tokenizer) == ["a", "Ã"], "a truncated one as it is spelt"


def test_every_problem_is_in_the_documentation() -> None:
    checks = [*FIRST_CHECKS, *(name for kind in row_kinds() for name in kind.checks), *LAST_CHECKS]
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    table = page.partition("## `backhand lint`")[2].partition("\n\nOnly problems")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [*dict.fromkeys(checks)]
