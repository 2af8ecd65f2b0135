"""`python -m backhand`, and the command `backhand`: both are `cli.main.main`."""

from __future__ import annotations

import sys

from backhand.safe_path import leave_out_first


def run() -> int:
    """Run this process's command line; nothing is imported from the current directory."""
    leave_out_first()
    from backhand.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
