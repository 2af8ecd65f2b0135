"""`python -m backhand.studio.named_model NAME`: open a model by its name as JSON of the error, without a download.

A process of its own imports torch, and reads a file that may be damaged.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from huggingface_hub.constants import HF_HUB_OFFLINE

from backhand.errors import BackhandError
from backhand.nn.loading.hub import is_hub_id
from backhand.nn.loading.opening import open_model


def error_of(name: str, *, offline: bool = HF_HUB_OFFLINE) -> dict[str, str | None]:
    """Return `what`, `why` and `next_step` of the error that opening a model raises; {} if there is none.

    With a network, `owner/model` is not checked: only the hub knows whether it exists.
    """
    on_hub = "/" in name and is_hub_id(name)
    try:
        if offline or not on_hub or Path(name).exists():
            open_model(name if on_hub else Path(name))  # a path is never a name on the hub
    except BackhandError as error:
        return {"what": error.what, "why": error.why, "next_step": error.next_step}
    return {}


if __name__ == "__main__":
    print(json.dumps(error_of(sys.argv[1])))
