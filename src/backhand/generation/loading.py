"""Loading a base model with an optional adapter to complete prompts, in the decoder engine or in transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backhand.adapters.base_model import open_base
from backhand.adapters.classifier_config import padding_id
from backhand.adapters.loading import LoadedAdapter, check_source, load_adapter_for, read_adapter
from backhand.adapters.peft_saving import CLASS_TASK
from backhand.adapters.record import AdapterRecord
from backhand.data.chat import NO_TEMPLATE, OWN_TEMPLATE, read_template, stopping_role_ids
from backhand.data.options import NamedColumns, TemplateOptions, system_option
from backhand.data.rows import NUMBER, SINGLE
from backhand.errors import UsageError
from backhand.generation.completer import Completer, EngineCompleter
from backhand.generation.held_base import stays_quantized
from backhand.generation.labels import Labels
from backhand.nn.compute import compute_settings, resolve_device, resolve_dtype, resolve_threads
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.families.config_fields import UnsupportedModel
from backhand.nn.families.family import DecoderConfig
from backhand.nn.loading.source import ModelSource
from backhand.nn.model_options import BaseModelOptions
from backhand.printing import going_on
from backhand.runs.status import unfinished

_PURPOSES = {"generate": "answer prompts", "embed": "compute vectors", "rank": "rank documents"}
"""The purpose of a command that can use the adapters of every objective."""
_COMMANDS = ("classify", "decide", "embed", "rank")
"""Objectives with a command of the same name. Adapters of the others answer prompts."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that completes prompts, with its tokenizer and the adapter's record."""

    model: Completer  # with the adapter, if one is given
    tokenizer: Any
    stop_ids: tuple[int, ...]  # tokens that end an answer
    notes: tuple[str, ...] = ()  # sentences for the user about the engine and the adapter's files
    # labels in the adapter's record; empty if their tokens are not in this model's vocabulary
    labels: Labels = field(default_factory=dict)
    system: str | None = None  # system message of all rows that the adapter was trained on, from its record
    # questions that the adapter decides, with their temperatures, see `AdapterRecord.decisions`
    decisions: Mapping[str, Any] = field(default_factory=dict)
    embedding: Mapping[str, Any] = field(default_factory=dict)  # see `AdapterRecord.embedding`
    # instruction, loss and longest prompt of an adapter that ranks, from its record; empty for other adapters
    ranking: Mapping[str, Any] = field(default_factory=dict)
    # see `AdapterRecord.classification`; with the names LABEL_0, LABEL_1, … for an adapter that PEFT wrote
    classification: Mapping[str, Any] = field(default_factory=dict)
    padding_id: int | None = None  # of the model, see `adapters.classifier_config`
    path: Path | None = None  # file or directory of the base model
    base: str = ""  # name of the base model, as given or from its source
    columns: NamedColumns | None = None  # columns that the adapter was trained on, from its record
    objective: str | None = None  # objective that the adapter was trained with, from its record
    template: TemplateOptions = field(default_factory=TemplateOptions)  # chat template and system message in use

    def purpose_notes(self, command: str = "generate") -> list[str]:
        """Return a note if the adapter was trained for another command than this one; else an empty list."""
        trained = self.objective if self.objective in _COMMANDS else "generate"
        if self.objective is None or trained == command:
            return []
        what = f"the adapter was trained with --objective {self.objective}, not to {_PURPOSES[command]}"
        return [f"{what}: use backhand {trained}"]

    def next_step(self, objective: str) -> str:
        """Return what to do next if a command needs an adapter of this objective and this one is of another."""
        records: dict[str, object] = {"decide": self.decisions, "rank": self.ranking, "classify": self.classification}
        records |= {"embed": self.embedding, "generate --labels auto": self.labels, "generate": self.objective}
        use = next(
            (f"use backhand {command} with this adapter, or " for command, is_of in records.items() if is_of), ""
        )
        return f"{use}train one with --objective {objective}"

    def missing_system(self, given: str | None) -> list[str]:
        """Return a note if the adapter was trained with a system message and `given` is None; else an empty list."""
        if self.system is None or given is not None:
            return []
        how = system_option(self.system) or f" --system TEXT, its {len(self.system):,} characters are in backhand.json"
        return [f"all rows that the adapter was trained on had the same system message, which prompts here lack:{how}"]


@contextmanager
def loaded_model(
    options: BaseModelOptions,
    adapter: Path | str | None = None,
    *,
    template: TemplateOptions | None = None,
    one_at_a_time: bool = False,
    takes_heads: bool = False,
) -> Iterator[LoadedModel]:
    """Load a model, and compute with the options' threads inside the block.

    Args:
        options: the base model, device and dtype.
        adapter: directory of an adapter, or a GGUF file.
        template: chat template and system message, which are compared with the adapter's record; None if no template
            is used. Without any, an adapter that was trained on texts without a chat template gets none either.
        one_at_a_time: prompts are completed one by one, so a quantized base stays quantized.
        takes_heads: an adapter with a head can be used. Such an adapter answers no prompts.

    Raises:
        ArtifactError: model, tokenizer or adapter cannot be read, or do not fit together.
        UsageError: the device or the template cannot be used.
    """
    device = resolve_device(options)
    dtype = resolve_dtype(options, device)
    with compute_settings(options, resolve_threads(options), dtype, device), ExitStack() as reading:
        reading.enter_context(going_on("reading the base model"))
        source = open_base(options.model, adapter, quantize=options.quantize)
        tokenizer = source.tokenizer()
        used_template, pickle = template or TemplateOptions(), options.allow_pickle
        checks: dict[str, Any] = {"chat_template": read_template(used_template.chat_template, tokenizer)}
        checks |= {"template_args": template and template.template_args, "force_base": options.force_base}

        classification: Mapping[str, Any] = {}

        def by_engine() -> _Loaded:
            nonlocal classification
            quantized = stays_quantized(options, source, dtype, device, one_at_a_time=one_at_a_time)
            decoder = Decoder.from_source(source, dtype=dtype, device=device, quantized=quantized)
            if adapter is None:
                return EngineCompleter(decoder), (), None
            shapes = decoder.module_shapes()
            loaded = load_adapter_for(source, adapter, shapes, **checks, allow_pickle=pickle)
            classification = classification_of(loaded, decoder.config)
            if classification and not takes_heads:
                head, use = "classification head", "give texts labels with backhand classify"
                if classification["problem_type"] is None:
                    head, use = "score head", "give documents scores with backhand rank"
                raise UsageError(
                    f"this adapter has a {head}, and computes no answers and no vectors",
                    where="adapter",
                    next_step=use,
                )
            decoder.attach(loaded.parameters(device=device))
            return EngineCompleter(decoder), loaded.notes, loaded.record

        def by_transformers() -> _Loaded:
            from backhand.adapters.inject import inject_contents
            from backhand.generation.transformers_completer import TransformersCompleter
            from backhand.nn.loading.transformers_model import load_transformers_model

            model = load_transformers_model(source, dtype=dtype, device=device)
            if adapter is None:
                return TransformersCompleter(model), (), None
            contents = read_adapter(adapter, source, allow_pickle=pickle)
            injected = inject_contents(model, contents, source.origin)
            names = [target.name for target in injected.targets]
            forced = check_source(contents.record, str(adapter), source, names, **checks)
            return TransformersCompleter(model, injected), (*forced, *injected.notes), contents.record

        try:
            model, notes, record = by_transformers() if options.engine == "transformers" else by_engine()
        except UnsupportedModel as error:
            if options.engine == "backhand":
                raise
            model, notes, record = by_transformers()
            reason = error.problems[0] if error.problems else error.what
            notes = (f"transformers computes this model, more slowly than the engine would: {reason}", *notes)
        given = used_template.chat_template, used_template.template_args, used_template.system
        uses_template = template is not None and checks["chat_template"] is not None
        if uses_template and record is not None and record.bare and not any(given):
            used_template = replace(used_template, chat_template=NO_TEMPLATE)
            said = "the adapter was trained on texts without a chat template, and prompts get none either"
            notes = (*notes, f"{said}; for the tokenizer's own: --chat-template {OWN_TEMPLATE}")
        stops = stop_ids(source, used_template)
        if (left := unfinished(adapter)) is not None:
            notes = (left.note, *notes)
        labels = {} if record is None else record.labels
        known = all(0 <= token < model.vocab_size for ids in labels.values() for token in ids)
        system = None if record is None else record.system
        decisions, embedding = ({}, {}) if record is None else (record.decisions, record.embedding)
        columns = None if record is None else columns_of(record)
        reading.close()
        yield LoadedModel(
            *(model, tokenizer, stops, notes, labels if known else {}, system, decisions, embedding),
            ranking={} if record is None else ranking_of(record),
            classification=classification,
            padding_id=padding_id(source),
            path=source.path,
            base=options.model or source.origin,
            columns=columns,
            objective=None if record is None else record.config.get("objective.objective"),
            template=used_template,
        )


def stop_ids(source: ModelSource, template: TemplateOptions) -> tuple[int, ...]:
    """Return the tokens that end an answer."""
    return (*source.stop_token_ids(), *stopping_role_ids(source.tokenizer(), template))


def classification_of(loaded: LoadedAdapter, config: DecoderConfig) -> Mapping[str, Any]:
    """Return the meaning of the logits of an adapter with a head; empty for other adapters."""
    if loaded.described.task_type != CLASS_TASK:
        return {}
    if loaded.record is not None and loaded.record.classification:
        return loaded.record.classification
    outputs = config.class_head.labels_of({one.name: one.shape for one in loaded.trained})
    names = [f"LABEL_{number}" for number in range(outputs)]
    return {"problem_type": NUMBER if outputs == 1 else SINGLE, "labels": names}


def columns_of(record: AdapterRecord) -> NamedColumns:
    """Return the columns that the rows of training were read from."""
    texts = {option: record.config.get(f"data.{option}") for option in ("prompt", "completion", "messages")}
    columns = record.config.get("data.columns")
    return NamedColumns(
        **{option: text for option, text in texts.items() if isinstance(text, str)},
        columns=columns if isinstance(columns, dict) else {},
    )


def recorded_template(record: AdapterRecord) -> TemplateOptions:
    """Return the options with which the adapter's rows were rendered."""
    names = ("chat_template", "template_args", "system")
    return TemplateOptions(**{name: record.config[f"data.{name}"] for name in names if f"data.{name}" in record.config})


def ranking_of(record: AdapterRecord) -> dict[str, Any]:
    """Return the options of training that scores of documents depend on; empty for other objectives."""
    if record.config.get("objective.objective") != "rank":
        return {}
    names = ("objective.instruction", "objective.ranking_loss", "objective.positive_weight", "data.max_length")
    return {name.partition(".")[2]: record.config[name] for name in names if name in record.config}


_Loaded = tuple[Completer, tuple[str, ...], AdapterRecord | None]
"""The model, its notes, and the adapter's record."""
