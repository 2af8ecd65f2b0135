"""A tiny model and its rows, made once."""

from support.finished_runs import tiny

__all__ = ["tiny"]
