"""Any contents of a file of rows raise only errors of ours, and with skip_bad hardly any."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backhand.data.options import DataOptions
from backhand.data.prepare import prepare
from backhand.errors import DataError
from tests.support.tokenizer_kinds import ALTERNATING, RETHINKING, WITH_TOOLS, byte_level

TOKENIZER = byte_level()
SUFFIXES = st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".txt"])
TEXT = st.text(max_size=20) | st.sampled_from(["<|im_end|>", "\ud800", "[]", "{}", "\ue000<|im_start|>", "</think>"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "function_call", "nobody"]) | SCALARS
CALLS = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": TEXT, "arguments": TEXT | SCALARS})}), max_size=2
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES},
        optional={
            "content": SCALARS
            | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": SCALARS}), max_size=2),
            "from": ROLES,
            "value": SCALARS,
            "weight": SCALARS,
            "tool_calls": CALLS | SCALARS,
            "reasoning_content": SCALARS,
        },
    )
    | SCALARS,
    max_size=5,
)
COLUMNS = st.sampled_from(
    ("messages", "conversations", "prompt", "completion", "instruction", "output", "text", "tools", "system", "chosen")
)
LIKELY_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "assistant", "system", "tool"]), "content": TEXT},
        optional={"weight": st.sampled_from([0, 1, 1.0, True, None]), "tool_calls": CALLS},
    ),
    min_size=1,
    max_size=6,
)
LIKELY_ROWS = st.one_of(
    st.fixed_dictionaries({"messages": LIKELY_MESSAGES}, optional={"tools": CALLS, "system": TEXT}),
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}, optional={"system": TEXT}),
    st.fixed_dictionaries({"prompt": LIKELY_MESSAGES, "completion": LIKELY_MESSAGES}),
    st.fixed_dictionaries({"text": TEXT}),
)
ROWS = LIKELY_ROWS | st.dictionaries(COLUMNS, MESSAGES | SCALARS | CALLS, max_size=4) | SCALARS
TEMPLATES = st.sampled_from([None, RETHINKING, ALTERNATING, WITH_TOOLS, "none"])


def outcome(content: bytes, suffix: str, **options: Any) -> None:
    """Prepare one file; check what comes out, and that nothing but DataError is raised."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content)
        try:
            train, _ = prepare(DataOptions(data=(str(path),), max_length=64, **options), TOKENIZER)
        except DataError as raised:
            error = raised
        else:
            error = None
        assert error is None or str(path) in str(error.where)
        for made in train.examples if error is None else ():
            assert 2 <= len(made) <= 64
            assert made.supervised.any() and not made.supervised[0]
            assert made.input_ids.dtype == np.int32


@settings(max_examples=150)
@given(st.binary(max_size=200), SUFFIXES, st.booleans())
@example(b'{"text": "a"}\n\xff', ".jsonl", True)
def test_any_bytes(content: bytes, suffix: str, skip_bad: bool) -> None:
    outcome(content, suffix, skip_bad=skip_bad)


@settings(max_examples=300)
@given(st.lists(ROWS, min_size=1, max_size=4), TEMPLATES, st.booleans(), st.sampled_from(["completions", "all"]))
def test_any_rows(rows: list[Any], template: str | None, skip_bad: bool, train_on: str) -> None:
    content = "\n".join(json.dumps(row) for row in rows).encode()
    outcome(content, ".jsonl", skip_bad=skip_bad, chat_template=template, train_on=train_on)
    outcome(json.dumps(rows).encode(), ".json", skip_bad=skip_bad, chat_template=template, train_on=train_on)


@settings(max_examples=150)
@given(st.data(), st.booleans())
def test_good_rows_with_bytes_changed(data: st.DataObject, skip_bad: bool) -> None:
    good = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]}] * 3
    content = bytearray("\n".join(json.dumps(row) for row in good).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    outcome(bytes(content), ".jsonl", skip_bad=skip_bad)


@settings(max_examples=60)
@given(st.lists(st.lists(st.text(alphabet='a",;\n\r\x00é ', max_size=6), max_size=3), max_size=4), st.booleans())
def test_any_csv(table: list[list[str]], skip_bad: bool) -> None:
    lines = ["prompt,completion", *(",".join(cells) for cells in table), "q,yes"]
    outcome("\n".join(lines).encode(), ".csv", skip_bad=skip_bad)
