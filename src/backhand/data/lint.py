"""Find problems in rows before they are trained on. Each finding has locations and a remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from backhand.data.data_report import DataReport, TruncationStats
from backhand.data.held_out import overlap
from backhand.data.lint_rows import Check, LintRows
from backhand.data.options import DataOptions
from backhand.data.prepare import prepare
from backhand.data.raw_rows import RowErrors
from backhand.data.row_kind import row_kind
from backhand.data.rows import Purpose
from backhand.data.stored_examples import PreparedData, tokens_of_documents
from backhand.data.template_report import describe_template
from backhand.printing import reworded
from backhand.words import count_of

SHOWN_PLACES = 5
SHOWN_BAD_ROWS = 20
_LEFT_OUT = "nothing, since these rows are left out; to train on them, correct them"


FIRST_CHECKS = {
    "malformed": Check("malformed rows"),
    "truncated": Check(
        "truncated to max_length",
        "truncated to {:,} tokens",
        "{1}shorten the rows, or leave them out with --long-rows drop",
    ),
    "too_long": Check("longer than max_length, left out", "left out as too long", "{0}shorten the rows"),
    "unsupervised": Check(
        "without a supervised token, left out",
        "left out because no token carries loss",
        "add a reply with a weight other than 0",
    ),
    "context": Check("longer than the model's context", "longer than the model's {:,} tokens", "give --max-length {}"),
}
LAST_CHECKS = {
    "duplicate": Check("exact duplicates", "equal to an earlier one", "remove the duplicates"),
    "overlap": Check(
        "held-out documents in the training data", "also in the training data", "remove them from one of the two"
    ),
    "mojibake": Check(
        "text that looks wrongly decoded",
        "with text that looks wrongly decoded, such as {!r}",
        "decode the original file again, as UTF-8",
    ),
}
"""Kinds of findings of all rows, before and after those of the kind of rows. `_finding` fills in the braces."""

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One kind of problem."""

    kind: str  # stable name, for scripts
    severity: Severity  # `error` stops training unless `--skip-bad` is given, `warning` does not
    count: int  # rows or documents concerned
    what: str
    where: tuple[str, ...]  # the first few locations, `file:line`
    remedy: str


@dataclass(frozen=True)
class LintReport:
    """Result of `lint`."""

    train: DataReport
    held_out: DataReport | None
    lengths: dict[str, dict[str, int]]  # quantiles of tokens and of supervised tokens per training document
    template: tuple[str, ...]  # properties of the chat template, one sentence each
    findings: tuple[Finding, ...]
    not_checked: dict[str, str]  # kinds of findings that could not be checked, with the reason
    checked: Mapping[str, Check]  # kinds of findings that concern these rows
    labels: dict[str, int]  # training documents per answer, most frequent first; empty unless answers are labels
    # options that leave out every row at which training would stop, () if there are none
    skip_with: tuple[str, ...] = ("--skip-bad",)

    @property
    def errors(self) -> int:
        """Number of rows at which training would stop."""
        return sum(finding.count for finding in self.findings if finding.severity == "error")

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "train": _report_json(self.train),
            "held_out": None if self.held_out is None else _report_json(self.held_out),
            "lengths": self.lengths,
            "template": list(map(reworded, self.template)),
            "not_checked": self.not_checked,
            "labels": self.labels,
            "errors": self.errors,
            "skip_with": list(self.skip_with),
            "findings": [
                asdict(finding)
                | {name: reworded(getattr(finding, name)) for name in ("what", "remedy")}
                | {"where": list(map(reworded, finding.where))}
                for finding in self.findings
            ],
        }


def lint(
    options: DataOptions,
    tokenizer: Any,
    *,
    seed: int = 0,
    purpose: Purpose | None = None,
    context_length: int | None = None,
    **settings: Any,
) -> tuple[LintReport, PreparedData]:
    """Prepare the rows as for training, without malformed ones, and report problems.

    Args:
        purpose: kind of the rows; None to detect it from their columns.
        context_length: the model's largest number of tokens, or None if unknown.
        settings: options that only some kinds of rows read, such as `problem_type`, `ranking_loss`, and `causal`,
            which is False for a model that attends in both directions.

    Raises:
        UsageError, DataError: as `prepare`, but a malformed row is a finding.
    """
    kind = row_kind(purpose)
    garbled: dict[str, str] = {}
    bad, truncation = RowErrors(skip_bad=True, keep=SHOWN_BAD_ROWS, garbled=garbled), TruncationStats()
    train, held_out = prepare(
        kind.lint_options(replace(options, skip_bad=True)),
        tokenizer,
        seed=seed,
        purpose=purpose,
        bad=bad,
        truncation=truncation,
        text_format=kind.lint_format(settings),
    )
    documents, tokens = train.examples.documents, tokens_of_documents(train.examples)
    longer = "raise --max-length" if options.max_length < (context_length or math.inf) else ""
    problems: list[tuple[Any, ...]] = [
        ("truncated", truncation.truncated, options.max_length, longer and f"{longer}, "),
        ("too_long", truncation.dropped_long, longer and f"{longer} or "),
        ("unsupervised", truncation.dropped_unsupervised),
        ("mojibake", [*garbled], next(iter(garbled.values()), "")),
    ]
    unusable, needs_option = (RowErrors(skip_bad=True, keep=SHOWN_BAD_ROWS) for _ in range(2))
    found = kind.lint(LintRows(train, held_out, tokenizer, truncation, settings, unusable, needs_option))
    problems += found.problems
    for note in found.notes:
        train = train.with_note(note)
    of_kind = {name: check for name, check in kind.checks.items() if found.checks is None or name in found.checks}
    checks = {**FIRST_CHECKS, **of_kind, **LAST_CHECKS}
    not_checked = {}
    if held_out is None:
        not_checked["overlap"] = "no held-out rows"
    else:
        problems.append(("overlap", [example.source for example in overlap(train.examples, held_out.examples)]))
    if context_length is None:
        not_checked["context"] = "the model does not state it"
    else:
        long = documents.take(tokens > context_length)
        problems.append(("context", [document.source for document in long], context_length))
    malformed = [*_malformed(needs_option, "error"), *_malformed(unusable, "error")]
    malformed += _malformed(bad, "warning" if options.skip_bad else "error")
    unit = train.report.cut_unit
    named = ((checks[name], unit, name, *rest) for name, *rest in problems if rest[0] and name in checks)
    findings = [*malformed, *(_finding(*one) for one in named)]
    lengths = {"tokens": tokens}
    if train.report.supervised_tokens:
        lengths["supervised tokens"] = documents.column("supervised")
    report = LintReport(
        train=train.report,
        held_out=None if held_out is None else held_out.report,
        lengths={name: _quantiles(values) for name, values in lengths.items()},
        template=tuple(describe_template(tokenizer, options)) if kind.is_rendered else (),
        findings=tuple(sorted(findings, key=lambda finding: finding.severity)),
        not_checked=not_checked,
        checked=checks,
        labels=dict(sorted(found.labels.items(), key=lambda label: -label[1])),
        skip_with=() if unusable.count else (*[kind.skip_option] * bool(needs_option.count), "--skip-bad"),
    )
    return report, train


def _malformed(bad: RowErrors, severity: Severity) -> list[Finding]:
    findings = []
    for what, count in bad.alike.items():
        errors = [error for error in bad.errors if error.what == what]
        said = what + (f": {errors[0].why}" if errors[0].why else "")
        places = tuple(str(error.where) for error in errors[:SHOWN_PLACES])
        remedy = errors[0].next_step or "correct the row, or leave bad rows out with --skip-bad"
        remedy = _LEFT_OUT if severity == "warning" else remedy
        findings.append(Finding("malformed", severity, count, said, places, remedy))
    if unseen := bad.count - bad.alike.total():
        what, last = f"{unseen:,} more malformed rows after this one", bad.errors[-1]
        findings.append(Finding("malformed", severity, unseen, what, (str(last.where),), findings[-1].remedy))
    return findings


def _finding(check: Check, unit: str, kind: str, places: list[str], *values: object) -> Finding:
    count = len(places)
    said = check.what.format(*values)
    # What is said of all rows has one place, as an example.
    what = said.removeprefix("of ") if said.startswith("of ") else f"{count_of(count, unit)} {said}"
    return Finding(kind, "warning", count, what, tuple(places[:SHOWN_PLACES]), check.remedy.format(*values))


def _quantiles(values: npt.NDArray[np.int32]) -> dict[str, int]:
    values = np.sort(values)
    at = {"least": 0.0, "half": 0.5, "9 in 10": 0.9, "most": 1.0}
    return {name: int(values[round(share * (len(values) - 1))]) for name, share in at.items()}


def _report_json(report: DataReport) -> dict[str, Any]:
    said = replace(report, bad_rows=(), notes=tuple(map(reworded, report.notes)))
    return {name: value for name, value in asdict(said).items() if name != "bad_rows"}
