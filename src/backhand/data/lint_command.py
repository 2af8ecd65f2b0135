"""`backhand lint`: print rows as a model's tokenizer and chat template read them, and their problems."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from backhand.data.data_report import DataReport
from backhand.data.forms import check_options
from backhand.data.lint import Finding, LintReport, lint
from backhand.data.options import DataOptions, LintOptions, LintRunOptions
from backhand.data.row_kind import RowKind, row_kind, row_kinds
from backhand.data.token_view import ShownDocument, documents_to_show, token_lines, view_tokens
from backhand.errors import DataError
from backhand.nn.decoder.forward_backward import require_head
from backhand.nn.families.config_fields import UnsupportedModel
from backhand.nn.families.family import DecoderConfig
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading import open_model
from backhand.nn.loading.source import ModelSource
from backhand.objective.registry import recorded_traits
from backhand.printing import say, visible
from backhand.terminal import console_for_tables, table_of
from backhand.words import count_of, label_text


def lint_command(options: LintOptions) -> LintReport:
    """Check the rows and print the report: tables, or one JSON object with `json`.

    Raises:
        UsageError, DataError, ArtifactError: an option, the data as a whole, the model or the tokenizer is unusable.
        DataError: training would stop at malformed rows. The report is printed first.
    """
    report, shown, tokenizer = _checked(options)
    if options.lint.json:
        sys.stdout.write(json.dumps(_as_json(report, shown, tokenizer), indent=2) + "\n")
    else:
        print_lint(console_for_tables(), report)
        for example in shown:
            say("", *token_lines(*example, tokenizer), file=sys.stdout)
    if report.errors:
        stops = [finding for finding in report.findings if finding.severity == "error"]
        good = sum(part.rows for part in (report.train, report.held_out) if part is not None)
        needs_more = report.skip_with != ("--skip-bad",)
        of_column = report.errors == 1 and needs_more  # an error that counts the rows itself
        count = f"{report.errors:,} malformed row{'s' if report.errors > 1 else ''} in all"
        raise DataError(
            f"training would stop: {stops[0].what if of_column else count}",
            where=stops[0].where[0],
            next_step=stops[0].remedy
            if report.errors > good or needs_more  # the cause is that of the file, or the rows do not fit
            else "correct them, or leave them out with --skip-bad",
        )
    return report


def lint_as_json(options: LintOptions) -> dict[str, Any]:
    """Check the rows, and return what `backhand lint --json` prints. Malformed rows are findings.

    Raises:
        UsageError, DataError, ArtifactError: an option, the data as a whole or the tokenizer is unusable.
    """
    return _as_json(*_checked(options))


def _as_json(report: LintReport, shown: Sequence[ShownDocument], tokenizer: Any) -> dict[str, Any]:
    values = report.to_json()
    if shown:
        values["shown"] = [
            {"source": example.source, "tokens": [vars(token) for token in view_tokens(example, tokenizer)]}
            | ({"label": label} if label else {})
            for example, label in shown
        ]
    return values


def _checked(options: LintOptions) -> tuple[LintReport, Sequence[ShownDocument], Any]:
    """Check the rows, and return the report, the documents to show, and the tokenizer."""
    options.validate()
    source = open_model(options.lint.model)
    config = _engine_config(source)
    context = source.config.get("max_position_embeddings")
    tokenizer = source.tokenizer()
    purpose = next((kind.name for kind in row_kinds() if getattr(options.lint, kind.name, False)), None)
    kind = row_kind(purpose)
    _check_options(options.data, kind, purpose)
    if config is not None and kind.is_rendered:
        require_head(config)
    report, train = lint(
        options.data,
        tokenizer,
        seed=options.lint.seed,
        purpose=purpose,
        context_length=context if isinstance(context, int) else None,
        causal=config is None or config.causal,
        problem_type=options.lint.problem_type,
        ranking_loss=options.lint.ranking_loss,
    )
    return report, documents_to_show(train.examples, options.lint.show), tokenizer


def _check_options(data: DataOptions, kind: RowKind, purpose: str | None) -> None:
    """Raise UsageError for an option of columns that these rows do not have."""

    def give(objectives: str) -> str:
        rows = recorded_traits({"objective": objectives.split(maxsplit=1)[0]}).rows
        return f"give --{rows}" if hasattr(LintRunOptions, rows) else f"leave out --{purpose}"

    check_options(data, kind, "lint" if purpose is None else f"lint --{purpose}", give)


def _engine_config(source: ModelSource) -> DecoderConfig | None:
    """Return the engine's configuration of a model, or None if the engine cannot compute it."""
    try:
        return decoder_config(source.config)
    except UnsupportedModel:
        return None


SHOWN_LABELS = 20
_STYLES = {"error": "bold red", "warning": "yellow"}


def print_lint(console: Console, report: LintReport) -> None:
    """Print tables of the data and the checks, then the problems, errors first."""
    sources = table_of("file", "form", "rows", "used for", right=("rows",))
    train, held_out = report.train, report.held_out
    parts: list[tuple[str, DataReport]] = [("training", train)]
    if held_out is not None and held_out.sources != train.sources:
        parts.append(("held out", held_out))
    for use, part in parts:
        for source in part.sources:
            sources.add_row(source.source, source.form, f"{source.rows:,}", use)
    console.print(sources)
    held = "" if held_out is None else f"; {held_out.size('held-out document')}"
    supervised = f", {train.supervised_tokens:,} of them supervised" if train.supervised_tokens else ""
    console.print(f"{train.size('training document')} with {count_of(train.tokens, 'token')}{supervised}{held}")
    columns = tuple(dict.fromkeys(name for quantiles in report.lengths.values() for name in quantiles))
    lengths = table_of("per document", *columns, right=columns)
    for name, quantiles in report.lengths.items():
        lengths.add_row(name, *(f"{quantiles[column]:,}" for column in columns))
    console.print(lengths)
    if report.labels:
        shown = [f"{label_text(label)} {count:,}" for label, count in list(report.labels.items())[:SHOWN_LABELS]]
        more = f", {len(report.labels) - SHOWN_LABELS:,} others" if len(report.labels) > SHOWN_LABELS else ""
        console.print(Text(visible(f"documents per answer: {', '.join(shown)}{more}")), soft_wrap=True)
    console.print(_checks(report))
    for note in (*train.notes, *report.template):
        console.print(note if note.startswith("warning: ") else f"note: {note}", soft_wrap=True)
    for remedy, findings in groupby(report.findings, lambda finding: finding.remedy):
        for finding in findings:
            console.print(_problem(finding), soft_wrap=True)
        console.print(Text(f"  next: {visible(remedy)}"), soft_wrap=True)
    if not report.errors:  # else the error follows
        console.print(_verdict(report))


def _checks(report: LintReport) -> Table:
    table = table_of("check", "found", right=("found",))
    for kind, check in report.checked.items():
        findings = [finding for finding in report.findings if finding.kind == kind]
        count = sum(finding.count for finding in findings)
        if kind in report.not_checked:
            cell = Text(report.not_checked[kind])
        else:
            cell = Text(f"{count:,}", style=_STYLES[findings[0].severity]) if count else Text("none", style="green")
        table.add_row(check.words, cell)
    return table


def _problem(finding: Finding) -> Text:
    more = finding.count - len(finding.where)
    places = ", ".join(finding.where) + (f" and {more:,} more" if more > 0 else "")
    return Text.assemble(
        (finding.severity, _STYLES[finding.severity]),
        visible(f": {places}: {finding.what}"),
    )


def _verdict(report: LintReport) -> Text:
    warnings = sum(finding.severity == "warning" for finding in report.findings)
    warnings += sum(note.startswith("warning: ") for note in report.train.notes)
    if warnings:
        return Text(f"training can start; {count_of(warnings, 'kind')} of problems to look at", style="yellow")
    return Text("no problems found", style="bold green")
