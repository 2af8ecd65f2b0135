"""`backhand paper`."""

from __future__ import annotations

from backhand.cli.command import command
from backhand.cli.train import DATA_PARSERS
from backhand.lab.paper_options import PaperOptions


def _paper(options: PaperOptions) -> None:
    from backhand.lab.paper import paper_command

    paper_command(options)


paper = command(PaperOptions, _paper, parse=DATA_PARSERS)
