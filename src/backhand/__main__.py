"""`python -m backhand` is the command `backhand`."""

from __future__ import annotations

import sys

from backhand.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
