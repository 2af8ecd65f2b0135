from __future__ import annotations

import numpy as np
import pytest

from backhand.data.chat import Document
from backhand.data.data_report import DataReport, TruncationStats
from backhand.data.examples import Example, encode_document, truncate
from backhand.data.options import DataOptions
from backhand.data.stored_examples import with_totals
from backhand.data.text_encoder import TextEncoder
from backhand.errors import DataError
from tests.support.tokenizer_kinds import byte_level, sentence_pieces


def example(length: int, *supervised: int, source: str = "f:1") -> Example:
    mask = np.zeros(length, dtype=np.bool_)
    mask[list(supervised)] = True
    return Example(np.arange(3, 3 + length, dtype=np.int32), mask, source)


def document(text: str, *spans: tuple[int, int], append_eos: bool = False, prefix: bool = False) -> Document:
    return Document(text, spans, None, append_eos, prefix, "f:1")


def supervised_text(made: Example, tokenizer: object) -> str:
    text = tokenizer.decode(made.input_ids[made.supervised])  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
def test_exactly_the_tokens_of_a_span_are_supervised(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    encoder = TextEncoder(tokenizer)
    text = "the user asks and the assistant answers"
    for start in range(1, len(text)):
        for end in (start + 1, min(start + 5, len(text)), len(text)):
            made = encode_document(document(text, (start, end)), encoder)
            assert supervised_text(made, tokenizer).replace(" ", "") == text[start:end].replace(" ", "")
            assert tokenizer.decode(made.input_ids) == text


def test_a_prompt_is_cut_into_tokens_as_at_generation() -> None:
    tokenizer = byte_level()
    encoder = TextEncoder(tokenizer)
    prompt, completion = "the ass", "istant"
    made = encode_document(document(prompt + completion, (len(prompt), len(prompt + completion))), encoder)
    prompt_ids = tokenizer.encode(prompt)
    assert made.input_ids.tolist() == prompt_ids + tokenizer.encode(completion)
    assert made.supervised.tolist() == [i >= len(prompt_ids) for i in range(len(made))]
    assert made.input_ids.tolist() != tokenizer.encode(prompt + completion), "joined they are cut otherwise"


def test_white_space_on_both_sides_of_a_span_is_parted() -> None:
    tokenizer = byte_level()
    encoder = TextEncoder(tokenizer)
    made = encode_document(document("a\n\nb", (2, 4)), encoder)
    assert supervised_text(made, tokenizer) == "\nb"


def test_the_first_token_is_never_supervised() -> None:
    made = encode_document(document("the", (0, 3)), TextEncoder(byte_level()))
    assert not made.supervised[0]


def test_begin_and_end_of_sequence_tokens() -> None:
    tokenizer = sentence_pieces()
    encoder = TextEncoder(tokenizer)
    made = encode_document(document("yes no", (0, 6), append_eos=True, prefix=True), encoder)
    assert made.input_ids.tolist() == [1, *tokenizer.encode("yes no", add_special_tokens=False), 2]
    assert made.supervised.tolist() == [False] + [True] * (len(made) - 1)
    unspanned = encode_document(document("yes no", (0, 3), append_eos=True), encoder)
    assert unspanned.input_ids[-1] == 2
    assert not unspanned.supervised[-1]


def test_an_end_of_sequence_token_that_does_not_exist_is_named() -> None:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode_document(document("yes", (0, 3), append_eos=True), TextEncoder(tokenizer))


def test_long_documents_keep_their_head_or_are_left_out() -> None:
    truncation = TruncationStats()
    long = example(10, 3, 9)
    kept = truncate(long, DataOptions(max_length=5), truncation)
    assert kept is not None
    assert kept.input_ids.tolist() == long.input_ids[:5].tolist()
    assert kept.supervised.tolist() == [False, False, False, True, False]
    assert truncate(long, DataOptions(max_length=3), truncation) is None
    assert truncate(long, DataOptions(max_length=9, long_rows="drop"), truncation) is None
    assert truncate(long, DataOptions(max_length=10, long_rows="drop"), truncation) is long
    assert truncate(example(4), DataOptions(), truncation) is None
    assert (truncation.truncated, truncation.dropped_long) == (["f:1"], ["f:1"] * 2)
    assert truncation.dropped_unsupervised == ["f:1"]


def test_sums_and_digest() -> None:
    data = with_totals([example(3, 2), example(5, 1, 2)], DataReport(rows=2, truncated=1))
    report = data.report
    assert (report.documents, report.tokens, report.supervised_tokens, report.longest) == (2, 8, 3, 5)
    assert (report.rows, report.truncated) == (2, 1)
    same = with_totals([example(3, 2, source="g:9"), example(5, 1, 2)], DataReport())
    assert data.digest == same.digest
    for other in ([example(5, 1, 2), example(3, 2)], [example(3, 1), example(5, 1, 2)], [example(3, 2)]):
        assert with_totals(other, DataReport()).digest != data.digest


def test_the_report_in_words() -> None:
    report = DataReport(
        documents=1, tokens=1200, supervised_tokens=7, longest=30, truncated=2, dropped_unsupervised=1,
        first_cut=("f:2", "", "f:9"), skipped_bad=1,
        bad_rows=(DataError("wrong", where="f:3"),), notes=("a note",),
    )  # fmt: skip
    assert report.lines() == [
        "1 document with 1,200 tokens, 7 of them supervised, the longest 30",
        "2 documents truncated to max_length, the first: f:2",
        "1 document without a supervised token, left out: f:9",
        "1 malformed row left out, the first: f:3: wrong",
        "a note",
    ]
    assert report.lines("prompt")[0] == "1 prompt with 1,200 tokens, the longest 30"
