"""Tiny models and their rows for all tests of this room."""

from support.finished_runs import tiny
from support.kept_runs import four

__all__ = ["four", "tiny"]
