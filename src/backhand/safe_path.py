"""Nothing is imported from the directory that a command is run in, or from the one that its script lies in.

Python puts the one or the other first in `sys.path`, so that a file named `queue.py` or `json.py` there would be run in
place of the library's. `leave_out_first` takes it out before anything else is imported, and says the same to every
Python that is started from here on, by us (`python_words`) or by a library. What PYTHONPATH names stays, but for empty
entries, which mean the current directory as well.

This file imports what every Python has imported before it begins, and not even `__future__`.
"""

import os
import sys

_left_out = False


def leave_out_first() -> None:
    """Take out what Python put first: for programs that begin here, and not for those that import the package."""
    global _left_out  # noqa: PLW0603 - what comes first afterwards is to stay
    if _left_out:
        return
    _left_out = True
    here = _here()
    if not sys.flags.safe_path and sys.path[:1] in ([""], [here], [os.path.dirname(os.path.realpath(sys.argv[0]))]):  # noqa: PTH120 - before pathlib is there
        del sys.path[0]
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if named != [""] and "" in named and here not in named:
        sys.path[:] = [path for path in sys.path if path not in ("", here)]
    os.environ.update(safe_environment())


def safe_environment() -> dict[str, str]:
    """Variables by which a Python that is started, and each that it starts, leaves its current directory out."""
    named = os.environ.get("PYTHONPATH")
    kept = {} if named is None else {"PYTHONPATH": os.pathsep.join(filter(None, named.split(os.pathsep)))}
    return {"PYTHONSAFEPATH": "1", **kept}


def python_words(module: str, *words: str) -> list[str]:
    """The command line of another Python that runs a module of ours; to be started with `safe_environment`."""
    return [sys.executable, "-P", "-m", module, *words]


def _here() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109 - as above
    except OSError:  # it has been deleted
        return None
