"""`backhand paper`: runs the analyses, prints them, and leaves pictures and tables."""

from __future__ import annotations

import json
import sys

from backhand.adapters.atomic_files import make_directory
from backhand.errors import CheckError
from backhand.generate.notes import show_notes
from backhand.lab.paper_files import paper_summary, write_paper
from backhand.lab.paper_first_update import LARGEST_STANDARD_ERRORS, largest_disagreement
from backhand.lab.paper_options import PaperOptions
from backhand.lab.paper_run import PaperResult, run_paper
from backhand.lab.paper_tables import print_paper
from backhand.lab.sine_tables import print_files
from backhand.terminal import console_for_tables, working


def paper_command(options: PaperOptions) -> PaperResult:
    """Run the chosen analyses; print tables, or one JSON object with `json`; write files to `output`.

    Raises:
        UsageError: an option out of range, `output` is a file, or the adapters have no module in common.
        ArtifactError: model or adapter cannot be read, or do not belong together.
        ResourceError: `output` cannot be written.
        CheckError: a claim about the optimizer does not hold. What was found is printed and written first.
    """
    options.validate()
    if options.run.output is not None:
        make_directory(options.run.output)
    if options.run.json:
        result = run_paper(options)
    else:
        with working() as say:
            result = run_paper(options, say)
    show_notes(result.notes)
    names = write_paper(options.run.output, result) if options.run.output is not None else []
    if options.run.json:
        sys.stdout.write(json.dumps(paper_summary(result) | {"files": names}, indent=2, allow_nan=False) + "\n")
    else:
        console = console_for_tables()
        print_paper(console, result)
        if options.run.output is not None:
            print_files(console, options.run.output, names)
    _raise_failures(result)
    return result


def _raise_failures(result: PaperResult) -> None:
    if result.updates is None or result.paths is None:
        return
    apart = largest_disagreement(result.updates)
    if apart > LARGEST_STANDARD_ERRORS:
        raise CheckError(
            f"the mean first update depends on the rank: two means lie {apart:.1f} standard errors apart",
            where="updates",
            next_step="repeat with another --seed and more --update-seeds: chance does this once in a thousand times",
        )
    for path in result.paths:
        if not path.passed:
            raise CheckError(
                f"Adam's path changes under p = {path.p:g}, q = {path.q:g}",
                where="updates",
                why=f"the updates differ by {path.difference:.2g}, the control by {path.control:.2g}",
            )
