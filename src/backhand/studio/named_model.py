"""`python -m backhand.studio.named_model NAME`: open a model by its name, as JSON of the error and of what it can do.

A process of its own imports torch, and reads a file that may be damaged. It never starts for `owner/model` with a
network, which would download the model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from backhand.errors import BackhandError
from backhand.nn.families.family_parsing import predicts_tokens
from backhand.nn.loading.opening import open_model
from backhand.studio.draft import is_owned


def facts_of(name: str) -> dict[str, Any]:
    """Return `error`, the parts of the error that opening a model raises or {}, and `answers`.

    `answers` is False for an encoder, which has no language-model head, and None if that is not known.
    """
    try:
        source = open_model(name if is_owned(name) else Path(name))  # a path is never a name on the hub
    except BackhandError as error:
        return {"error": {"what": error.what, "why": error.why, "next_step": error.next_step}, "answers": None}
    return {"error": {}, "answers": predicts_tokens(source.config)}


if __name__ == "__main__":
    print(json.dumps(facts_of(sys.argv[1])))
