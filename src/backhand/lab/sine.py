"""`backhand sine`: runs the experiment, prints it, and leaves its files."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from backhand.adapters.atomic_files import make_directory
from backhand.errors import CheckError
from backhand.lab.sine_files import summary, write_files
from backhand.lab.sine_options import SineOptions
from backhand.lab.sine_run import SineResult, run_sine
from backhand.lab.sine_tables import print_files, print_result
from backhand.terminal import console_for_tables, working


def sine_command(options: SineOptions) -> SineResult:
    """Run the experiment; print tables, or one JSON object with `json`; write files to `output`.

    Raises:
        UsageError: an option out of range, or `output` is a file.
        DataError: `target` or `start` name a file that cannot be used.
        ResourceError: `output` cannot be written.
        CheckError: a comparison with autograd is out of bounds, a frozen weight moved, or a loss is not finite. What
            was found is printed and written first.
    """
    options.validate()
    if options.output is not None:
        make_directory(options.output)  # a name that cannot be written is found out before the work, not after it
    console = console_for_tables()
    if options.json:
        result = run_sine(options)
    else:
        with working() as say:
            result = run_sine(options, say)
    names = write_files(options.output, options, result) if options.output is not None else []
    if options.json:
        found = summary(options, result) | {"check": [row.as_json() for row in result.check], "files": names}
        if options.step:
            found["step"] = {part.part: [asdict(line) for line in part.walk] for part in (result.base, result.lora)}
        sys.stdout.write(json.dumps(found, indent=2, allow_nan=False) + "\n")
    else:
        print_result(console, options, result)
        if options.output is not None:
            print_files(console, options.output, names)
    _raise_failures(options, result)
    return result


def _raise_failures(options: SineOptions, result: SineResult) -> None:
    if failed := result.failed_checks:
        worst = max(failed, key=lambda row: row.relative_error)
        raise CheckError(
            f"{len(failed)} of {len(result.check)} gradients differ from autograd's, most of all {worst.name}",
            where=f"{worst.part}, epoch {worst.epoch}",
            why=f"relative error {worst.relative_error:.3g} in {options.dtype}",
            next_step="compare in float64 (--dtype float64): what differs there as well is wrong",
        )
    if not result.frozen_unchanged:
        raise CheckError("a frozen weight changed in part 2", where="part 2, LoRA")
