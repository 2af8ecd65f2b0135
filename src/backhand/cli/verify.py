"""`backhand verify`."""

from __future__ import annotations

from backhand.cli.command import command
from backhand.cli.train import DATA_PARSERS
from backhand.verify.options import VerifyOptions


def _verify(options: VerifyOptions) -> None:
    from backhand.verify.command import verify_command

    verify_command(options)


verify = command(VerifyOptions, _verify, parse=DATA_PARSERS)
