"""Imported last by the process from which others are forked: what is there is never collected, nor looked through.

Its path to here was for this import alone; what the forked processes start has no such path.
"""

from __future__ import annotations

import gc
import os

_, _, _path = os.environ.pop("PYTHONPATH", "").partition(os.pathsep)
if _path:
    os.environ["PYTHONPATH"] = _path
gc.collect()
gc.freeze()
os.fsync = lambda descriptor: None  # as in tests/conftest.py
