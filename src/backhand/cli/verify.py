"""`backhand verify`."""

from __future__ import annotations

from backhand.cli.command import command
from backhand.cli.train import DATA_PARSERS
from backhand.verify.options import VerifyOptions


def _verify(options: VerifyOptions) -> None:
    from backhand.report.writing import report_kept
    from backhand.verify.command import verify_command

    with report_kept(options.verify.run):
        verify_command(options)


verify = command(VerifyOptions, _verify, parse=DATA_PARSERS)
