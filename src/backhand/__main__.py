"""`python -m backhand`, and the command `backhand`: both are `cli.main.main`."""

from __future__ import annotations

import sys

from backhand.cli.main import main

run = main

if __name__ == "__main__":
    sys.exit(run())
