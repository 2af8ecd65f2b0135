"""`python -m backhand`, and the command `backhand`: both are `cli.main.main`."""

from __future__ import annotations

import gc
import sys

from backhand.safe_path import leave_out_first

_YOUNG_BEFORE_ALL = 100
"""So many collections of young objects before one of all; Python's own number is 10."""


def run() -> int:
    """Run this process's command line; nothing is imported from the current directory.

    What a command imports lives to its end, some hundred thousand objects: to look through all of them whenever a
    quarter more were there was a fifth of its start. Young objects are looked through as ever.
    """
    leave_out_first()
    gc.set_threshold(*gc.get_threshold()[:2], _YOUNG_BEFORE_ALL)
    from backhand.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
