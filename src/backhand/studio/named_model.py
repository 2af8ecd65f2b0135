"""`python -m backhand.studio.named_model NAME`: open a model by its name as JSON of the error.

A process of its own imports torch, and reads a file that may be damaged. It never starts for `owner/model` with a
network, which would download the model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from backhand.errors import BackhandError
from backhand.nn.loading.opening import open_model
from backhand.studio.draft import is_owned


def error_of(name: str) -> dict[str, str | None]:
    """Return `what`, `why` and `next_step` of the error that opening a model raises; {} if there is none."""
    try:
        open_model(name if is_owned(name) else Path(name))  # a path is never a name on the hub
    except BackhandError as error:
        return {"what": error.what, "why": error.why, "next_step": error.next_step}
    return {}


if __name__ == "__main__":
    print(json.dumps(error_of(sys.argv[1])))
