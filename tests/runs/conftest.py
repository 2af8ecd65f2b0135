"""One tiny model and its rows for all tests of this room."""

from tests.support.finished_runs import tiny

__all__ = ["tiny"]
