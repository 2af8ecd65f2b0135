"""Tiny models and their rows for all tests of this room."""

from tests.support.finished_runs import finished, finished_once, tiny
from tests.support.kept_runs import four

__all__ = ["finished", "finished_once", "four", "tiny"]
