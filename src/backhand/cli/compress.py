"""`backhand compress`."""

from __future__ import annotations

from backhand.arithmetic.look_options import CompressOptions
from backhand.cli.command import command


def _compress(options: CompressOptions) -> None:
    from backhand.arithmetic.compress import compress_command

    compress_command(options)


compress = command(CompressOptions, _compress, positional=("adapter",))
