"""The identity of a run: digests of its base model, tokenizer, chat template, rows and configuration.

Every checkpoint's manifest contains the digests, and a resumed run compares them. The adapter's backhand.json contains
them as well. A digest is computed when it is first needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from backhand.adapters.base_facts import BaseFacts
from backhand.adapters.loading import weight_names
from backhand.adapters.record import AdapterRecord, text_digest, tokenizer_digest
from backhand.data.chat import read_template
from backhand.data.decisions import PROMPT_VERSION, QuestionType
from backhand.data.stored_examples import PreparedData
from backhand.generation.labels import Labels, found_labels
from backhand.generation.loading import stop_ids
from backhand.nn.decoder.config_facts import config_facts, recorded_facts
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.source import ModelSource
from backhand.options.config import TrainConfig
from backhand.options.config_file import config_from_table, config_table

# Options that do not change the trained bits: paths, memory, and intervals of saving and printing.
FREE_OPTIONS = frozenset(
    f"{part}.{name}"
    for part, names in {
        "model": "model memory cache_frozen tune_allocator force_base allow_pickle",
        "data": "data eval_data",
        "run": "output save_every keep resume overwrite from_adapter log_every max_bad_steps prove_resume answers "
        "report_to workers quiet debug",
        "rewards": "reward_timeout",
    }.items()
    for name in names.split()
)


@dataclass(eq=False)
class Identity:
    """The digests of one run."""

    config: TrainConfig  # the resolved configuration
    source: ModelSource  # the base model's files
    modules: Sequence[str]  # names of the adapted modules
    train: PreparedData  # training rows
    held_out: PreparedData | None  # held-out rows, or None
    trains_head: bool  # a head on hidden states is trained with the adapter
    base_facts: BaseFacts  # computes digests of the base's tensors

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All digests and the options that determine the trained bits, for a checkpoint's manifest.

        The digest of the base covers the adapted tensors (`adapters.record`). It is None if their names in the files
        are unknown. The digests of rows cover every token and its supervision, in order.
        """
        source, settings = self.source, decisive_settings(self.config)
        names = list(weight_names(self.modules, source.tensor_names()))
        return {
            "base_digest": self.base_facts.digest(names),
            "model_config": config_facts(source),
            "tokenizer_digest": tokenizer_digest(source.tokenizer()),
            "chat_template_digest": text_digest(read_template(self.config.data.chat_template, source.tokenizer())),
            "data_digest": self.train.digest,
            "held_out_digest": None if self.held_out is None else self.held_out.digest,
            "rows": self.train.report.rows,
            "held_out_rows": 0 if self.held_out is None else self.held_out.report.rows,
            "settings_digest": settings_digest(settings),
            "settings": settings,
        }

    def record(self, temperatures: Mapping[QuestionType, float]) -> AdapterRecord:
        """Return the record for backhand.json.

        Args:
            temperatures: of decisions, fitted to the held-out rows; empty for other objectives and without such rows.
        """
        facts = self.facts
        return AdapterRecord(
            origin=self.source.origin,
            model_config=recorded_facts(facts["model_config"]),
            **{name: facts[name] for name in ("base_digest", "tokenizer_digest", "chat_template_digest")},
            data_digest=f"sha256:{facts['data_digest']}",
            run_digest=facts["settings_digest"],
            config=facts["settings"],
            labels=self.labels,
            system=self.train.report.system,
            bare=self.train.report.bare,
            decisions=self._decisions(temperatures),
            embedding=self._embedding,
            classification=self._classification,
        )

    @property
    def _embedding(self) -> dict[str, Any]:
        """The way from a text to its vector; empty for other objectives."""
        options = self.config.objective
        if options.objective != "embed":
            return {}
        names = ("pooling", "query_prompt", "document_prompt")
        kept = {name: getattr(options, name) for name in names}
        longest = min(self.config.data.max_length, decoder_config(self.source.config).max_position_embeddings)
        return {**kept, "max_length": longest, "matryoshka_dims": list(options.matryoshka_dims)}

    @property
    def _classification(self) -> dict[str, Any]:
        """The meaning of the logits of a head; empty without a head. A score of documents has no `problem_type`."""
        options = self.config.objective
        if not self.trains_head:
            return {}
        longest = min(self.config.data.max_length, decoder_config(self.source.config).max_position_embeddings)
        labels = list(options.class_labels) or ["LABEL_0"]
        return {"problem_type": options.problem_type, "labels": labels, "max_length": longest}

    def _decisions(self, temperatures: Mapping[QuestionType, float]) -> dict[str, Any]:
        """Return what programs need to ask the adapter's questions; empty for other objectives."""
        if self.config.objective.objective != "decide":
            return {}
        questions = {name: question.to_json() for name, question in self.train.questions.items()}
        return {
            "prompt_version": PROMPT_VERSION,
            "state": self.config.data.state,  # the template of states in tables
            "questions": questions,
            "temperatures": dict(temperatures),
        }

    @cached_property
    def labels(self) -> Labels:
        """The labels of the training rows; empty if they have none or the objective is not SFT."""
        if self.config.objective.objective != "sft":
            return {}
        return found_labels(self.train.examples, self.source.tokenizer(), stop_ids(self.source, self.config.data))


def decisive_settings(config: TrainConfig) -> dict[str, Any]:
    """Return all options except `FREE_OPTIONS`, `table.name` to a JSON value. Options that are None are left out."""
    # Parsing converts values to the fields' types, so that an alpha of 5 equals the 5.0 of a configuration file.
    table = config_table(config_from_table(config_table(config), "configuration"))
    return {
        f"{part}.{name}": value
        for part, options in table.items()
        for name, value in options.items()
        if f"{part}.{name}" not in FREE_OPTIONS
    }


def settings_digest(decisive: Mapping[str, Any]) -> str:
    """Return the SHA-256 of `decisive_settings`."""
    return "sha256:" + hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
