"""First stage of a run: model, adapter layout, rows and steps, before memory is planned and before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from backhand.adapters.base_facts import BaseFacts
from backhand.adapters.peft_config import peft_notes
from backhand.adapters.targets import in_numbers
from backhand.data.answer_lint import numbers_note
from backhand.data.context import TeacherPrompts
from backhand.data.data_report import DataReport
from backhand.data.decisions import DecisionRow
from backhand.data.examples import Example, check_vocabulary
from backhand.data.packing import RowPacker, Sampler
from backhand.data.prepare import prepare
from backhand.data.row_encoder import TextFormat
from backhand.data.rows import ClassLabel, PromptRow, RankedTexts, TextIdentities
from backhand.data.stored_examples import PreparedData, with_totals
from backhand.engines.decoder_engine import DecoderEngine, choose_engine, with_hidden_states
from backhand.engines.engine import Engine, RunCache
from backhand.engines.machine import Machine
from backhand.errors import UsageError
from backhand.loop.distillation import DistilledPacker, DistilledPrompts, Lesson
from backhand.loop.forgetting import ForgettingMeter
from backhand.loop.objectives.compared import check_answers_differ
from backhand.loop.rewards.process import check_references
from backhand.loop.sampled_answers import PromptPacker, check_context, prompt_of
from backhand.loop.step_plan import chosen_rate
from backhand.nn.decoder.adapted_group import HEAD
from backhand.nn.decoder.forward_backward import require_head
from backhand.nn.loading import open_model
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout
from backhand.options.config import OptimizationOptions, TrainConfig
from backhand.options.objectives import ObjectiveOptions
from backhand.training.class_inputs import (
    class_notes,
    head_format,
    output_count,
    set_outputs,
    trains_head,
    with_labels,
)
from backhand.training.contexts import count_contexts, with_context_text
from backhand.training.embedding_inputs import (
    check_positions,
    check_scores_differ,
    equal_text_notes,
    format_of,
    with_loss,
    with_pooling,
)
from backhand.training.starting_adapter import StartingAdapter
from backhand.words import name_list

_MATRICES_IN_SCALE = 8
_MOST_FORMS = 4
"""Largest number of orders in which the options of a row are shown. More epochs repeat them, to bound memory."""


@dataclass(frozen=True)
class RunInputs:
    """Model, adapter layout, rows and steps of a run."""

    config: TrainConfig  # with the adapter's final configuration; other options may still be open
    source: ModelSource
    engine: Engine
    layout: AdapterLayout
    train: PreparedData
    held_out: PreparedData | None
    packer: RowPacker  # of the training rows
    held_out_packer: RowPacker | None  # of the held-out rows
    sampler: Sampler  # assigns training rows to steps
    total_steps: int
    neutral: ForgettingMeter  # without texts if forgetting is not measured
    notes: tuple[str, ...]  # messages for the user
    trains_head: bool  # a head on hidden states is trained with the adapter
    base_facts: BaseFacts  # computed when the base's tensors are read
    unlearned_rows: int = 0  # held-out rows with labels that no training row has

    @property
    def held_out_examples(self) -> Sequence[Example]:
        """The held-out rows, or an empty sequence."""
        return () if self.held_out is None else self.held_out.examples

    def learning_rate(self, options: OptimizationOptions) -> tuple[float, str | None]:
        """Return the learning rate under these options, and the reason for it, or None if it was given."""
        return chosen_rate(options, self.config.objective, self.total_steps, self.weight_scale)

    def weight_scale(self) -> float:
        """Return `weight_scale` of the adapted matrices."""
        return weight_scale(scaled_matrices(self.source, self.layout), self.base_facts)

    def longest_prompt_and_answer(self) -> int:
        """Return the number of tokens of the longest prompt with an answer, over training and held-out rows."""
        assert isinstance(self.packer, PromptPacker)
        return _longest(self.packer, self.held_out_packer, self.config.rewards.max_new_tokens)


def read_inputs(
    config: TrainConfig,
    machine: Machine,
    typed: frozenset[str],
    run_cache: RunCache,
    *,
    assumed_rows: bool = False,
    are_sample: bool = False,
) -> RunInputs:
    """Open the model and prepare the rows.

    Args:
        config: validated; for a resumed run, the stored configuration.
        machine: of this process.
        typed: names of the options that the user gave explicitly.
        run_cache: shared with other runs of this process.
        assumed_rows: without `data`, assume rows of `max_length` tokens that are all supervised.
        are_sample: the rows are a sample of those of the run.

    Raises:
        UsageError, DataError, ArtifactError: each says what to do.
    """
    model = config.model
    source = run_cache.get_or_create(
        "source", (model.model, model.quantize), lambda: open_model(model.model, quantize=model.quantize)
    )
    engine = choose_engine(config.model, source, machine.dtype)
    has_head = trains_head(config.objective, engine)
    if has_head and isinstance(engine, DecoderEngine):
        set_outputs(engine, 1)  # The names of the head's modules are needed now, its real size follows from the rows.
    start: StartingAdapter | None = None
    notes: tuple[str, ...] = ()
    if config.run.from_adapter is not None:
        start = StartingAdapter(config.run.from_adapter, source, model.allow_pickle)
        if not has_head:
            start.check_no_head(config.objective.objective)
        config = replace(config, adapter=start.config(config.adapter, engine, typed))
        started, notes = start.objective(config.objective, typed)
        config = replace(config, objective=started)
    layout = engine.layout(config.adapter)
    objective = with_context_text(config.objective)
    config = replace(config, objective=objective)
    if objective.objective == "embed":
        config = replace(config, objective=with_pooling(objective, source, engine, layout))
    predicts_tokens = objective.traits.predicts_tokens and not has_head
    if predicts_tokens and isinstance(engine, DecoderEngine):
        require_head(engine.config)
    text_format = head_format(config, source, engine, layout) if has_head else format_of(config.objective)
    config = replace(config, adapter=in_numbers(config.adapter, [slot.name for slot in layout.slots]))
    notes += () if start is None else start.check(engine, layout, config.data, force_base=model.force_base)
    notes += peft_notes(source.config.get("model_type"), [slot.name for slot in layout.slots])
    notes += class_notes(source) if has_head else ()
    tokenizer, unlearned = source.tokenizer(), 0
    if assumed_rows and not config.data.data:
        train, held_out = _assumed_rows(config, has_head), None
    else:
        train, held_out = _read_rows(config, tokenizer, text_format, run_cache)
        # A resumed run states its epochs, and reads the rows of these only.
        train = train.up_to_epoch(config.epochs_of(len(train.examples)))
        purpose = config.objective.traits.rows
        if purpose in ("embeddings", "rankings"):
            config = replace(config, objective=with_loss(config.objective, train, held_out))
        if purpose == "rankings":
            check_scores_differ(train)
        if purpose == "embeddings":
            notes = (*notes, *equal_text_notes(config.objective, train, has_dropout=_has_dropout(layout)))
        head = None
        if has_head and start is not None and isinstance(engine, DecoderEngine):
            head = start.head(engine, objective.objective)
        if purpose == "classes":
            resolved, unlearned, said = with_labels(config.objective, train, held_out, head, are_sample=are_sample)
            config, notes = replace(config, objective=resolved), (*notes, *said)
        if purpose in ("pairs", "labels"):
            check_answers_differ(train)
        for prepared in filter(None, (train, held_out)):
            check_references(config.rewards.reward, prepared.examples.facts(PromptRow))
        config = replace(config, data=replace(config.data, eval_fraction=train.held_out_share))
    if has_head:
        set_outputs(engine, output_count(config.objective))
        layout = engine.layout(config.adapter)
    if config.run.early_stopping is not None and held_out is None:
        raise UsageError(
            f"early_stopping {config.run.early_stopping} needs held-out rows, but there are none",
            where="early_stopping",
            next_step="give eval_data or eval_fraction as well, or leave out early_stopping",
        )
    if objective.objective == "decide" and objective.label_smoothing:
        _check_temperatures(objective.label_smoothing, train, held_out)
    beyond = [data.examples.beyond(engine.vocab_size) for data in (train, held_out) if data is not None]
    packer, held_out_packer = _packers(config, train, held_out, engine, layout)
    for rows in (packer, held_out_packer):
        if rows is not None:
            check_positions(engine, int(rows.by_document.lengths.max(initial=0)))
    if isinstance(packer, DistilledPacker | DistilledPrompts):
        train = packer.rows
    if isinstance(held_out_packer, DistilledPacker | DistilledPrompts):
        held_out = held_out_packer.rows
    forms = len(train.of_all_epochs) // len(train.examples)
    compares_rows = objective.objective == "embed"
    batch_rows = config.optimization.batch_rows
    sampler = Sampler(len(train.examples), batch_rows, config.run.seed, forms, even=compares_rows)
    epochs = config.epochs_of(len(train.examples))
    total_steps = config.optimization.max_steps or epochs * sampler.steps_per_epoch
    averaged = config.average_share_of(total_steps)
    config = replace(config, optimization=replace(config.optimization, epochs=epochs, average_share=averaged))
    measures_forgetting = held_out is not None or config.run.max_forgetting is not None
    measures_forgetting = measures_forgetting and predicts_tokens
    neutral = ForgettingMeter.for_tokenizer(tokenizer) if measures_forgetting else ForgettingMeter(())
    inputs = RunInputs(
        config=config,
        source=source,
        engine=engine,
        layout=layout,
        train=train,
        held_out=held_out,
        packer=packer,
        held_out_packer=held_out_packer,
        sampler=sampler,
        total_steps=total_steps,
        neutral=neutral,
        notes=tuple(notes),
        trains_head=has_head,
        base_facts=run_cache.get_or_create("base facts", (model.model, model.quantize), lambda: BaseFacts(source)),
        unlearned_rows=unlearned,
    )
    texts = ((text.numpy(), "neutral_texts.txt") for text in neutral.documents)
    check_vocabulary(chain(*beyond, texts), engine.vocab_size, tokenizer)
    return inputs


def _check_temperatures(label_smoothing: float, train: PreparedData, held_out: PreparedData | None) -> None:
    """Raise UsageError unless held-out rows ask every type of question, which has a temperature of its own."""
    missing = _question_types(train) - _question_types(held_out)
    if missing:
        only = "" if held_out is None else f" with a question of the type {name_list(sorted(missing))}"
        raise UsageError(
            f"label_smoothing {label_smoothing} makes probabilities too even",
            where="label_smoothing",
            why=f"the temperature that corrects them is fitted to held-out rows, and there are none{only}",
            next_step="give eval_data or eval_fraction as well, or leave out label_smoothing"
            if held_out is None
            else "hold out rows with all types of questions, by eval_data, or leave out label_smoothing",
        )


def _question_types(data: PreparedData | None) -> set[str]:
    rows = () if data is None else data.examples.facts(DecisionRow)
    return {asked.question.type for row in rows for asked in row.asked}


def _read_rows(
    config: TrainConfig, tokenizer: Any, text_format: TextFormat | None, run_cache: RunCache
) -> tuple[PreparedData, PreparedData | None]:
    """Return training rows, and held-out rows or None. Runs that share a cache and these options read them once."""
    teacher = _teacher_prompts(config.objective)
    epochs = min(config.optimization.epochs or _MOST_FORMS, _MOST_FORMS)
    choices: dict[str, Any] = {"seed": config.run.seed, "purpose": config.objective.traits.rows, "teacher": teacher}
    choices |= {"text_format": text_format, "epochs": epochs}

    def read() -> tuple[PreparedData, PreparedData | None]:
        train, held_out = prepare(config.data, tokenizer, **choices)
        note = numbers_note(tokenizer, train.examples) if config.objective.objective == "sft" else None
        return train if note is None else train.with_note(note), held_out

    return run_cache.get_or_create("rows", (config.data, choices), read, only_newest=True)


def weight_scale(inputs: Mapping[str, int], base_facts: BaseFacts) -> float:
    """Return rms(W) √in, the geometric mean over matrices; 1 if there are none.

    If the entries of W are independent of x, rms(W) √in is rms(W x) / rms(x).

    Args:
        inputs: number of inputs per matrix, by its name in the base's file.
        base_facts: mean squares of the base's tensors.
    """
    squares = ((base_facts.mean_square(name), size) for name, size in inputs.items())
    logs = [0.5 * math.log(max(square, 1e-12) * size) for square, size in squares]
    return math.exp(sum(logs) / max(1, len(logs)))


def scaled_matrices(source: ModelSource, layout: AdapterLayout) -> dict[str, int]:
    """Map the names of the matrices in `RunInputs.weight_scale`, a few from the middle, to their number of inputs."""
    stored = set(source.tensor_names())
    inputs = [(name, slot.in_features) for slot in layout.slots if (name := f"{slot.name}.weight") in stored]
    first = max(0, (len(inputs) - _MATRICES_IN_SCALE) // 2)
    return dict(inputs[first : first + _MATRICES_IN_SCALE])


def _has_dropout(layout: AdapterLayout) -> bool:
    return any(slot.dropout > 0 for slot in layout.slots)


def _packers(
    config: TrainConfig, train: PreparedData, held_out: PreparedData | None, engine: Engine, layout: AdapterLayout
) -> tuple[RowPacker, RowPacker | None]:
    """Return the packers of training and held-out rows."""
    has_dropout = _has_dropout(layout)
    objective, options, shares = config.objective, config.rewards, engine.shares_prefixes
    lesson = None
    if objective.traits.has_teacher and config.data.data:
        lesson = Lesson.of(objective, count_contexts(objective))

    def packer(rows: PreparedData, share_prefixes: bool) -> RowPacker:
        sharing = {"share_prefixes": share_prefixes, "teacher_shares": shares}
        if lesson is not None and objective.traits.samples:
            return DistilledPrompts(rows, lesson, options.max_new_tokens, **sharing)
        if lesson is not None:
            return DistilledPacker(rows, lesson, **sharing)
        # A step of thousands of pairs has micro-batches of far more and far fewer tokens than the mean.
        return RowPacker(rows.of_all_epochs, share_prefixes=share_prefixes, even_tokens=objective.objective == "embed")

    if objective.traits.has_teacher:
        _check_distilled(engine, layout)
    of_held_out = None if held_out is None else packer(held_out, shares)
    of_train = packer(train, shares and not has_dropout)
    if objective.traits.rows == "prompts":
        of_train = PromptPacker(
            train.examples, options.group, options.max_new_tokens, share_prefixes=shares and not has_dropout
        )
    if not isinstance(of_train, PromptPacker):
        return of_train, of_held_out
    if not isinstance(engine, DecoderEngine):
        raise UsageError(
            "answers of this model cannot be sampled and trained on by the same computation",
            where="objective",
            why=engine.note,
            next_step="choose a model that the backhand engine supports (backhand models)",
        )
    longest = _longest(of_train, of_held_out, options.max_new_tokens)
    check_context(longest, engine.config.max_position_embeddings)
    return of_train, of_held_out


def _teacher_prompts(objective: ObjectiveOptions) -> TeacherPrompts | None:
    """Return the teacher's prompts, or None for an objective without a teacher."""
    if not objective.traits.has_teacher:
        return None
    return TeacherPrompts(
        context=objective.context,
        column=objective.context_column,
        template=objective.resolved().teacher_prompt_template or "",
        sampled=objective.traits.samples,
    )


def _check_distilled(engine: Engine, layout: AdapterLayout) -> None:
    """Raise UsageError unless the model is computed by the decoder engine, with a frozen embedding and head."""
    engine = with_hidden_states(engine, "distillation needs the hidden states of the teacher")
    if ends := [name for name in layout.names if name.startswith((HEAD, engine.config.embedding))]:
        raise UsageError(
            f"distillation trains the blocks of a model, not {name_list(ends)}",
            where="target_modules",
            why="teacher and adapted model share the head, so that a hidden state determines a distribution",
            next_step="leave the embedding and the head out of the adapter",
        )


def _longest(packer: PromptPacker, held_out: RowPacker | None, new_tokens: int) -> int:
    if held_out is None or isinstance(held_out, PromptPacker):
        return max(packer.longest, 0 if held_out is None else held_out.longest)
    return max((packer.longest, *(len(prompt_of(example)) + new_tokens for example in held_out.examples)))


def _assumed_rows(config: TrainConfig, has_head: bool) -> PreparedData:
    """Return the rows of one step with the largest length, all supervised.

    No real rows need more memory, except rows of vectors with more negatives than the loss needs.
    """
    length, count = config.data.max_length, config.optimization.batch_rows
    supervised = np.ones(length, dtype=np.bool_)
    supervised[0] = False
    row = Example(np.ones(length, dtype=np.int32), supervised, "assumed")
    if config.objective.traits.rows == "pairs":
        row = replace(row, rejected=row)
    if config.objective.traits.rows == "embeddings":
        if config.objective.pooling == "last":
            row = replace(row, supervised=np.arange(length) == length - 1)
        texts = 3 if config.objective.embedding_loss == "triplet" else 2

        def text(number: int) -> Example:  # no two texts begin alike, so that none share a prefix
            return replace(row, input_ids=np.full(length, number, dtype=np.int32))

        identities = TextIdentities(tuple(range(texts)), None)
        rows = [[text(number * texts + place) for place in range(texts)] for number in range(count)]
        examples = [replace(first, others=tuple(others), facts=identities) for first, *others in rows]
        return with_totals(examples, DataReport())
    if config.objective.traits.rows == "rankings":
        row = replace(row, supervised=np.arange(length) == length - 1)
        row = replace(row, others=() if has_head else (row,), facts=RankedTexts(0, (0,), (1.0,)))
    if config.objective.traits.rows == "classes":
        row = replace(row, supervised=np.arange(length) == length - 1, facts=ClassLabel("0"))
    return with_totals([row] * count, DataReport())
