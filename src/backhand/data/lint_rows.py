"""Rows that `backhand lint` checks, and the findings of a kind of rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from backhand.data.data_report import TruncationStats
    from backhand.data.raw_rows import RowErrors
    from backhand.data.stored_examples import PreparedData


class Check(NamedTuple):
    """Words of a kind of finding of `backhand lint`."""

    words: str  # label in a table
    what: str = ""  # follows the number of documents
    remedy: str = ""


ANSWER_CHECKS = {
    "no_end": Check(
        "no end token carries loss",
        "in which no end token carries loss, so the model does not learn to stop",
        "use a chat template that ends replies (--chat-template)",
    ),
    "empty_reply": Check("empty replies", "with an empty reply", "fill it in or remove the rows"),
    "equal_pair": Check("pairs of equal answers", "with equal answers, which teach nothing", "remove the rows"),
    "one_label": Check(
        "labels of one kind only",
        "of {:,} answers, each {}desirable: there is nothing to distinguish",
        "give answers of both kinds",
    ),
    "spelling": Check("labels that differ in case or spaces", "{}", "write each label the same way in all rows"),
    "doubled_bos": Check(
        "two begin-of-sequence tokens",
        "starting with two begin-of-sequence tokens",
        "remove the token from the rows or from the chat template",
    ),
}


class LintRows(NamedTuple):
    """Rows to check, and what their checks depend on."""

    train: PreparedData
    held_out: PreparedData | None
    tokenizer: Any
    truncation: TruncationStats
    settings: Mapping[str, Any]  # options of `backhand lint` that only some kinds of rows read
    unusable: RowErrors  # receives rows at which training stops whatever the options say
    # receives rows at which training stops, and which the option `RowKind.skip_option` with --skip-bad leaves out
    needs_option: RowErrors


class LintFindings(NamedTuple):
    """Problems of rows, and their notes."""

    problems: Sequence[tuple[Any, ...]] = ()  # name of a check, locations, values for its braces
    labels: Mapping[str, int] = {}
    notes: Sequence[str] = ()
    checks: Collection[str] | None = None  # names of the checks that concern these rows; None for all of the kind
