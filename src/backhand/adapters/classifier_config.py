"""config.json next to an adapter with a head: the base model's configuration with the names of the labels.

PEFT's configuration has no place for them. With this file `AutoConfig.from_pretrained(adapter)` gives everything that
`AutoModelForSequenceClassification.from_pretrained(base, config=…)` needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from backhand.nn.families.config_fields import token_ids
from backhand.nn.loading.source import ModelSource


def classifier_config_bytes(source: ModelSource, classification: Mapping[str, Any]) -> bytes:
    """Return the contents of the file.

    Args:
        classification: as in `AdapterRecord.classification`.
    """
    config = {key: value for key, value in source.config.items() if " " not in key and key != "architectures"}
    config |= head_fields(source, classification)
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def head_fields(source: ModelSource, classification: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json on the head, and the padding token.

    Args:
        classification: as in `AdapterRecord.classification`.
    """
    labels = classification["labels"]
    config = {
        "problem_type": classification["problem_type"],
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    if classification["problem_type"] is None:  # without it, some versions of sentence-transformers return logits
        config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
    if (padding := padding_id(source)) is not None:
        config["pad_token_id"] = padding
    return config


def padding_id(source: ModelSource) -> int | None:
    """Return the token that fills batches: that of the model, else of the tokenizer, else the one that ends a text.

    transformers reads the state of the last token that is not this one, and refuses batches if there is none.
    """
    ends = token_ids(source.config.get("eos_token_id"))
    tokenizer = source.tokenizer()
    for known in (source.config.get("pad_token_id"), tokenizer.pad_token_id, *ends[:1], tokenizer.eos_token_id):
        if isinstance(known, int) and known >= 0:
            return known
    return None
