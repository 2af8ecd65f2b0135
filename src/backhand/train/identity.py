"""What a run is made of, as digests: base, tokenizer, template, rows, configuration; each computed when first needed.

They stand in every checkpoint's manifest, where a resumed run compares them, and in the adapter's backhand.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from backhand.adapters.adapter_record import AdapterRecord
from backhand.adapters.checked_base import weight_names
from backhand.adapters.digests import base_digest, text_digest, tokenizer_digest
from backhand.data.chat import read_template
from backhand.data.examples import PreparedData
from backhand.nn.loading.source import ModelSource
from backhand.train.config import TrainConfig
from backhand.train.config_file import config_from_table, config_table

# Options that leave the trained bits as they are: where things lie, how often they are saved and shown.
FREE_OPTIONS = frozenset(
    {
        "model.model",
        "model.memory",
        "model.tune_allocator",
        "model.force_base",
        "model.allow_pickle",
        "data.data",
        "data.eval_data",
        "run.output",
        "run.save_every",
        "run.keep",
        "run.resume",
        "run.overwrite",
        "run.from_adapter",
        "run.log_every",
        "run.max_bad_steps",
        "run.prove_resume",
        "run.answers",
        "run.report_to",
        "run.quiet",
        "run.debug",
    }
)


class Identity:
    """The digests of one run.

    Args:
        config: resolved.
        source: the opened base model.
        modules: dotted paths of the adapted modules.
        train, held_out: the rows.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: ModelSource,
        modules: Sequence[str],
        train: PreparedData,
        held_out: PreparedData | None,
    ) -> None:
        self._config = config
        self._source = source
        self._modules = modules
        self._train = train
        self._held_out = held_out

    @cached_property
    def base(self) -> str | None:
        """Of the adapted base tensors, see `digests.base_digest`; None where their names in the files are not known."""
        names = list(weight_names(self._modules, self._source.tensor_names()))
        return base_digest(names, self._source.load) if names else None

    @cached_property
    def tokenizer(self) -> str:
        """Of what turns text into tokens."""
        return tokenizer_digest(self._source.tokenizer())

    @cached_property
    def chat_template(self) -> str | None:
        """Of the chat template in use."""
        return text_digest(read_template(self._config.data.chat_template, self._source.tokenizer()))

    @cached_property
    def data(self) -> str:
        """Of every training token and its supervision, in order."""
        return self._train.digest

    @cached_property
    def held_out(self) -> str | None:
        """Likewise of the held-out rows."""
        return None if self._held_out is None else self._held_out.digest

    @cached_property
    def settings(self) -> str:
        """Of all options that decide the trained bits."""
        return settings_digest(self.decisive_settings)

    @cached_property
    def decisive_settings(self) -> dict[str, Any]:
        """All options that decide the trained bits, `table.name` to a value that JSON holds."""
        return decisive_settings(self._config)

    def facts(self) -> dict[str, Any]:
        """For a checkpoint's manifest."""
        return {
            "base_digest": self.base,
            "tokenizer_digest": self.tokenizer,
            "chat_template_digest": self.chat_template,
            "data_digest": self.data,
            "held_out_digest": self.held_out,
            "settings_digest": self.settings,
            "settings": self.decisive_settings,
        }

    def record(self) -> AdapterRecord:
        """For backhand.json."""
        return AdapterRecord(
            origin=self._source.origin,
            base_digest=self.base,
            tokenizer_digest=self.tokenizer,
            chat_template_digest=self.chat_template,
            data_digest=f"sha256:{self.data}",
            run_digest=self.settings,
            config=self.decisive_settings,
        )


def decisive_settings(config: TrainConfig) -> dict[str, Any]:
    """All options but `FREE_OPTIONS`, `table.name` to a value that JSON holds; those that are None are left out."""
    # Once through the types of the fields, so that an alpha of 5 and one of 5.0, as a file has it, are the same.
    table = config_table(config_from_table(config_table(config), "configuration"))
    return {
        f"{part}.{name}": value
        for part, options in table.items()
        for name, value in options.items()
        if f"{part}.{name}" not in FREE_OPTIONS
    }


def settings_digest(decisive: Mapping[str, Any]) -> str:
    """SHA-256 over `decisive_settings`."""
    return "sha256:" + hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
