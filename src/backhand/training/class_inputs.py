"""Choices and checks of a run with a classification head that depend on its model and its rows."""

from __future__ import annotations

from dataclasses import replace

from backhand.adapters.classifier_config import padding_id
from backhand.data.class_examples import NUMBER, SINGLE, ClassFormat, names_of, problem_of, target_of
from backhand.data.stored_examples import PreparedData
from backhand.engines.decoder_engine import DecoderEngine, with_hidden_states
from backhand.engines.engine import Engine
from backhand.errors import DataError, UsageError, not_none
from backhand.nn.decoder.adapted_group import HEAD
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout
from backhand.options.objectives import ObjectiveOptions
from backhand.words import count_of, name_list, shorten

_WITHOUT_CLASS = ("bamba", "falcon_h1", "gemma4_text", "granite", "granitemoehybrid", "lfm2")
"""Model types for which transformers has no class for sequence classification."""
_MOST_INTEGERS = 20


def class_format(source: ModelSource, engine: Engine, layout: AdapterLayout) -> ClassFormat:
    """Return the way from a text to its tokens for the head of this model.

    Raises:
        UsageError: the model or the adapter cannot be trained with a head.
    """
    config = with_hidden_states(engine, "a classification head needs the hidden states of the model").config
    if any(name.startswith(HEAD) for name in layout.names):
        raise UsageError(
            f"the adapter trains {HEAD}, which a classification head does not depend on",
            where="target_modules",
            next_step="leave it out of the adapter",
        )
    if source.wrapper is not None:
        raise UsageError(
            f"a classification head of a {source.wrapper.model_type} model is not supported",
            where="model",
            why="the class of the whole model and that of its text model have other names for the head",
            next_step="choose a text model, or train answers with --objective decide",
        )
    return ClassFormat(config.class_head.pooling, padding_id(source))


def class_notes(source: ModelSource) -> tuple[str, ...]:
    """Return a note if transformers cannot load the adapter."""
    kind = source.config.get("model_type")
    if kind not in _WITHOUT_CLASS:
        return ()
    return (f"transformers has no class for sequence classification of {kind} models; Backhand alone reads the head",)


def with_labels(
    options: ObjectiveOptions, train: PreparedData, held_out: PreparedData | None
) -> tuple[ObjectiveOptions, tuple[str, ...]]:
    """Return the options with the kind of problem and the labels filled in, and sentences about both.

    Raises:
        DataError: the label of a row does not fit, or all rows have the same label.
    """
    examples = train.examples
    found = [not_none(examples.class_label(row)) for row in range(len(examples))]
    problem = options.problem_type or problem_of(found)
    labels = options.class_labels or names_of(found, problem)
    for data in (train, held_out):
        rows = data.examples if data is not None else ()
        for row in rows:
            target_of(not_none(row.class_label), problem, labels, row.source)
    if problem == NUMBER:
        said = [f"a number is learned from {count_of(len(found), 'row')}, with squared error"]
    else:
        if len(labels) < 2 and problem == SINGLE:
            raise DataError(
                f"all rows have the label {labels[0]!r}, so that there is nothing to distinguish",
                where=train.report.sources[0].source,
                next_step="add rows with other labels, or give --problem-type regression for numbers",
            )
        kind = "one label per row" if problem == SINGLE else "several labels per row"
        said = [f"{kind}: {name_list(map(shorten, labels), limit=8)}"]
    if problem == SINGLE and len(labels) > _MOST_INTEGERS and all(label.lstrip("-").isdigit() for label in labels):
        said.append(f"the {len(labels)} integers are read as names; --problem-type regression learns them as numbers")
    return replace(options, problem_type=problem, class_labels=() if problem == NUMBER else labels), tuple(said)


def output_count(options: ObjectiveOptions) -> int:
    """Return the number of outputs of the head."""
    return len(options.class_labels) or 1


def set_outputs(engine: Engine, outputs: int) -> None:
    """Give the engine's adapters a head with this number of outputs."""
    assert isinstance(engine, DecoderEngine), "other engines are refused before"
    engine.labels = outputs
