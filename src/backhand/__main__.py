"""The command `backhand`, and `python -m backhand`: Ctrl-C ends it quietly from its first moment on."""

from __future__ import annotations

import sys


def run() -> int:
    """Run the command line of this process and return its exit code.

    Importing the command line takes a tenth of a second; `cli.main` handles every interruption after that.
    """
    try:
        from backhand.cli.main import main
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(run())
