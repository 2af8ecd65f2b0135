"""Finished runs of a tiny model for all tests of this room."""

from __future__ import annotations

from tests.support.finished_runs import finished, finished_once, tiny

__all__ = ["finished", "finished_once", "tiny"]
