"""`backhand lint`: rows as a model's tokenizer and chat template read them, and everything that is wrong with them."""

from __future__ import annotations

import json
import sys
from typing import Any

from backhand.data.lint import LintReport, lint
from backhand.data.lint_options import LintOptions
from backhand.data.lint_tables import print_lint
from backhand.data.token_view import token_lines, view_tokens
from backhand.errors import DataError
from backhand.nn.loading import open_model
from backhand.terminal import console_for_tables


def lint_command(options: LintOptions) -> LintReport:
    """Look at the rows and print what was found: tables, or one JSON object with `json`.

    Raises:
        UsageError, DataError, ArtifactError: an option, the data as a whole or the tokenizer cannot be used.
        DataError: rows that training would stop at; the report is printed first.
    """
    options.validate()
    source = open_model(options.lint.model)
    context = source.config.get("max_position_embeddings")
    tokenizer = source.tokenizer()
    report, train = lint(
        options.data, tokenizer, seed=options.lint.seed, context_length=context if isinstance(context, int) else None
    )
    shown = train.examples[: options.lint.show]
    if options.lint.json:
        found: dict[str, Any] = report.to_json()
        if shown:
            found["shown"] = [
                {"source": example.source, "tokens": [vars(token) for token in view_tokens(example, tokenizer)]}
                for example in shown
            ]
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    else:
        print_lint(console_for_tables(), report)
        for example in shown:
            sys.stdout.write("\n" + "\n".join(token_lines(example, tokenizer)) + "\n")
    if report.errors:
        stops = [finding for finding in report.findings if finding.severity == "error"]
        raise DataError(
            f"training would stop here: {report.errors:,} malformed row{'s' if report.errors > 1 else ''} in all",
            where=stops[0].where[0],
            why=stops[0].what,
            next_step="correct them, or leave them out of training with --skip-bad",
        )
    return report
