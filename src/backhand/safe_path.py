"""Keep the current directory and the script's directory out of `sys.path`.

Python puts one of them first, so that a file named `queue.py` or `json.py` there would run instead of the library's.
`leave_out_first` removes it before anything else is imported. It also sets variables with which every Python started
later does the same, whether Backhand (`python_words`) or a library starts it. Entries of PYTHONPATH are kept, except
empty ones, which mean the current directory too.

This module imports only modules that Python itself has already imported, and not even `__future__`.
"""

import os
import sys

_left_out = False


def leave_out_first() -> None:
    """Remove the entry that Python put first. For Backhand's own programs, not for programs that import the package."""
    global _left_out  # noqa: PLW0603 - a second call would remove another entry
    if _left_out:
        return
    _left_out = True
    here = _here()
    if not sys.flags.safe_path and sys.path[:1] in ([""], [here], [os.path.dirname(os.path.realpath(sys.argv[0]))]):  # noqa: PTH120 - pathlib is not imported yet
        del sys.path[0]
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if named != [""] and "" in named and here not in named:
        sys.path[:] = [path for path in sys.path if path not in ("", here)]
    os.environ.update(safe_environment())


def safe_environment() -> dict[str, str]:
    """Return variables with which a new Python process and its children ignore their current directory."""
    named = os.environ.get("PYTHONPATH")
    kept = {} if named is None else {"PYTHONPATH": os.pathsep.join(filter(None, named.split(os.pathsep)))}
    return {"PYTHONSAFEPATH": "1", **kept}


def python_words(module: str, *words: str) -> list[str]:
    """Return the command line of a Python process that runs a module, to be started with `safe_environment`."""
    return [sys.executable, "-P", "-m", module, *words]


def _here() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109 - as above
    except OSError:  # the directory has been deleted
        return None
