"""`python -m backhand`, and the command `backhand`: both are `cli.main.main`."""

from __future__ import annotations

import gc
import sys

from backhand.safe_path import leave_out_first

_MIDDLE_BEFORE_ALL = 100
"""Collections of the middle generation before a full collection. Python's default is 10."""


def run() -> int:
    """Run this process's command line; nothing is imported from the current directory.

    What a command imports lives to its end, some hundred thousand objects: to look through all of them whenever a
    quarter more were there was up to a fifth of its start. Younger ones are looked through as ever, and all of them by
    Python's own number again while a run steps (`nn.compute.gc_frozen`).
    """
    leave_out_first()
    gc.set_threshold(*gc.get_threshold()[:2], _MIDDLE_BEFORE_ALL)
    from backhand.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
