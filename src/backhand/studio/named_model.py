"""`python -m backhand.studio.named_model NAME`: open a model by its name, as JSON of the error and of what it can do.

A process of its own imports torch, and reads a file that may be damaged. It never starts for `owner/model` with a
network, which would download the model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from backhand.errors import BackhandError
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.opening import open_model
from backhand.studio.draft import is_owned


def error_of(name: str) -> dict[str, str | None]:
    """Return `what`, `why` and `next_step` of the error that opening a model raises; {} if there is none."""
    try:
        open_model(name if is_owned(name) else Path(name))  # a path is never a name on the hub
    except BackhandError as error:
        return {"what": error.what, "why": error.why, "next_step": error.next_step}
    return {}


def predicts_tokens(name: str) -> bool | None:
    """Return False for an encoder, which has no language-model head; None if that is not known."""
    try:
        return decoder_config(open_model(name if is_owned(name) else Path(name)).config).has_head
    except BackhandError:
        return None


if __name__ == "__main__":
    print(json.dumps({"error": error_of(sys.argv[1]), "answers": predicts_tokens(sys.argv[1])}))
