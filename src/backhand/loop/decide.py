"""Decide states with an adapter: the calibrated probability of every answer, in one forward pass per batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from backhand.bounds import check_kind
from backhand.data.chat import thoughts_off
from backhand.data.columns import AS_TRAINED, columns_of_states
from backhand.data.decision_examples import DecisionEncoder
from backhand.data.decisions import PROMPT_VERSION, Asked, DecisionRow, Question, QuestionType, question_of
from backhand.data.documents import RowRenderer
from backhand.data.examples import Example, check_vocabulary
from backhand.data.given_rows import GivenRows
from backhand.data.options import DataOptions, NamedColumns, TemplateOptions
from backhand.data.packing import RowPacker
from backhand.data.prepare import prepare
from backhand.data.rows import Purpose
from backhand.data.sources import expand
from backhand.data.stored_examples import stored
from backhand.distributed.communicator import Communicator
from backhand.errors import ArtifactError, DataError, UsageError, not_none
from backhand.generation.command import check_output, rounded, write_lines
from backhand.generation.completer import require_finite
from backhand.generation.loading import LoadedModel, loaded_model
from backhand.loop.decision_scores import DecisionScore, Outcome, outcomes_of, score_questions
from backhand.loop.row_passes import document_sums
from backhand.nn.compute import resolve_device, resolve_dtype
from backhand.options.command_options import DecideOptions
from backhand.printing import counting, in_rounds
from backhand.reading import read_plain
from backhand.runs.label_results import constant_loss_words, never_given, soft_target_words, tie_words
from backhand.runs.row_changes import right_words
from backhand.terminal import console_for_tables, table_of, working
from backhand.words import count_of, name_list, shorten, show_notes

_ROWS_AT_ONCE = 256
RANDOM_ORDERS = 2
"""Number of random orders in which the options of a choice are shown to measure how many decisions change."""
MANY_FLIPS = 0.1
"""Share of decisions that change in random orders from which programs with orders of their own need a warning."""


@dataclass(frozen=True)
class Decider:
    """A model that decides questions about states.

    Attributes:
        loaded: the model with its adapter.
        questions: the questions that the adapter was trained on, by name.
        temperatures: temperature of each type of question; 1 for types without one.
        state: column or template of the states in tables, as in training; None without one.
    """

    loaded: LoadedModel
    questions: Mapping[str, Question]
    temperatures: Mapping[QuestionType, float]
    state: str | None
    encoder: DecisionEncoder
    micro_batch_rows: int

    @classmethod
    def of(cls, loaded: LoadedModel, template: TemplateOptions, micro_batch_rows: int) -> Decider:
        """Return the decider of a loaded adapter.

        Raises:
            UsageError: the model has no adapter that was trained to decide.
            ArtifactError: the adapter's record cannot be read.
        """
        record = loaded.decisions
        if not record:
            raise UsageError(
                "this adapter was not trained to decide",
                where="adapter",
                next_step=loaded.next_step("decide"),
            )
        version = record.get("prompt_version")
        if version != PROMPT_VERSION:
            raise ArtifactError(
                f"the adapter was trained on version {version} of the prompt, and this program has {PROMPT_VERSION}",
                where="backhand.json",
                next_step="use the version of Backhand that trained it",
            )
        questions = {name: question_of(name, spec, "backhand.json") for name, spec in record["questions"].items()}
        renderer = RowRenderer(loaded.tokenizer, thoughts_off(template, loaded.tokenizer))
        encoder = DecisionEncoder(renderer, loaded.model.context_tokens)
        return cls(loaded, questions, record["temperatures"], record.get("state"), encoder, micro_batch_rows)

    def outcomes(
        self, rows: Sequence[DecisionRow], *draw: int, on_row: Callable[[], None] = lambda: None
    ) -> Iterator[list[Outcome]]:
        """Yield the outcomes of each row's questions.

        Args:
            draw: numbers that determine random orders of options; none for the canonical order.
            on_row: called after each row.

        Raises:
            DataError: a prompt is longer than the model's context.
            CheckError: the model computes NaN or infinity.
        """
        model = self.loaded.model
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            examples = [
                _fitting(example, row, model.context_tokens)
                for example, row in zip(self.encoder.encode(part, *draw), part, strict=True)
            ]
            whole = stored(examples)
            check_vocabulary(whole.beyond(model.vocab_size), model.vocab_size, self.loaded.tokenizer)
            packer = RowPacker(whole, share_prefixes=model.shares_prefixes)
            every = range(len(part))
            at_once = self.micro_batch_rows
            sums = document_sums(model, packer, every, at_once, Communicator(), exact=True, on_row=on_row)
            require_finite(sums := not_none(sums))
            asked = iter(outcomes_of((one.facts_as(DecisionRow) for one in examples), sums.tolist()))
            for row in part:
                yield [next(asked) for _ in row.asked]

    def answers(
        self, rows: Sequence[DecisionRow], *, on_row: Callable[[], None] = lambda: None
    ) -> Iterator[dict[str, Any]]:
        """Yield the answers to each row's questions in the protocol's form. `on_row` is called after each row."""
        for outcomes in self.outcomes(rows, on_row=on_row):
            answers = {one.question.name: one.question.answer(self._probabilities(one)) for one in outcomes}
            yield {"answers": answers}

    def _probabilities(self, outcome: Outcome) -> list[float]:
        return [float(p) for p in outcome.probabilities(self.temperatures.get(outcome.question.type, 1.0))]

    def flips(self, rows: Sequence[DecisionRow], decided: Sequence[Sequence[Outcome]]) -> dict[str, float]:
        """Return the share of decisions of each choice that change if its options come in a random order.

        Args:
            decided: the outcomes in canonical order.
        """
        changed: dict[str, list[bool]] = {}
        numbers = _with_choices(rows)
        choices = [rows[n] for n in numbers]
        with counting("adapted model: decisions in random orders", RANDOM_ORDERS * len(numbers)) as done:
            for seed in range(1, RANDOM_ORDERS + 1):
                for number, turned in zip(numbers, self.outcomes(choices, seed, on_row=done), strict=True):
                    for one, other in zip(decided[number], turned, strict=True):
                        if one.question.type == "choice":
                            differs = bool(one.scores.argmax() != other.scores.argmax())
                            changed.setdefault(one.question.name, []).append(differs)
        return {name: sum(differ) / len(differ) for name, differ in changed.items()}


def _fitting(example: Example | None, row: DecisionRow, context_tokens: int) -> Example:
    if example is None:
        raise DataError(
            f"the state with its question is longer than the model's {context_tokens:,} tokens",
            where=row.source,
            next_step="shorten the state",
        )
    return example


def decided_rows(
    decider: Decider, data: DataOptions, questions: Mapping[str, Question], *, answered: bool
) -> list[DecisionRow]:
    """Read rows to decide, or rows with answers to evaluate.

    Raises:
        UsageError, DataError: see `data.prepare`. DataError also for rows that are too long.
    """
    named = decider.loaded.columns or NamedColumns()
    recorded = DataOptions(
        state=decider.state,
        question=dict.fromkeys(decider.questions, ""),
        **vars(named if answered else columns_of_states(named)),
    )
    data = replace(data, eval_data=(), eval_fraction=0.0)
    purpose: Purpose = "decisions" if answered else "states"
    prepared, _ = prepare(data, decider.loaded.tokenizer, purpose=purpose, questions=questions, recorded=recorded)
    as_trained = (note for note in prepared.report.notes if note.startswith(AS_TRAINED))
    show_notes([*prepared.report.left_out(), *as_trained])
    if prepared.report.dropped_long and not answered:
        raise DataError(
            f"a state with its question is longer than {data.max_length:,} tokens",
            where=prepared.report.first_cut[1],
            next_step="shorten it, or raise --max-length",
        )
    return prepared.examples.facts(DecisionRow)


def _with_choices(rows: Sequence[DecisionRow]) -> list[int]:
    """Return the numbers of the rows with a choice."""
    return [n for n, row in enumerate(rows) if any(one.question.type == "choice" for one in row.asked)]


def evaluate_decisions(
    loaded: LoadedModel, data: DataOptions, micro_batch_rows: int
) -> tuple[int, list[tuple[float, int, dict[str, DecisionScore]]]]:
    """Score the base model and the adapter on rows with answers.

    Returns:
        the number of rows; and per model the mean loss of an answer, the number of answers, and the scores by question.
        The base model has no temperatures.
    """
    decider = Decider.of(loaded, data, micro_batch_rows)
    rows = decided_rows(decider, data, decider.questions, answered=True)
    results = []
    of_orders = RANDOM_ORDERS * len(_with_choices(rows)) / len(rows)
    with in_rounds((False, True), costs=(1.0, 1.0 + of_orders)) as models:
        for adapter in models:
            loaded.model.use_adapter(adapter)
            who = "adapted model" if adapter else "base model"
            with counting(f"{who}: decisions", len(rows)) as done:
                by_row = list(decider.outcomes(rows, on_row=done))
            flips = decider.flips(rows, by_row) if adapter else {}
            every = [one for outcomes in by_row for one in outcomes]
            scores = score_questions(every, decider.temperatures if adapter else {}, flips)
            answers = sum(score.rows for score in scores.values())
            loss = sum(score.rows * score.nll for score in scores.values()) / answers
            results.append((loss, answers, scores))
    return len(rows), results


def print_decisions(model: str, scores: Mapping[str, DecisionScore]) -> None:
    """Print a table with one line per question, and sentences about each."""
    figures = ("rows", "accuracy", "majority", "macro F1", "NLL", "Brier", "ECE", "temperature", "flips")
    shown = table_of("question", *figures, right=figures, title=f"decisions, {model} model; 95 % intervals in brackets")
    for name, one in scores.items():
        low, high = one.ece_interval
        flips = "" if one.flips is None else f"{one.flips:.1%}"
        least, most = one.accuracy_interval
        right = f"{one.accuracy:.1%} ({least:.1%} to {most:.1%})"
        shares = right, f"{one.majority:.1%}", f"{one.f1_macro:.3f}"
        errors = f"{one.nll:.4f}", f"{one.brier:.4f}", f"{one.ece:.3f} ({low:.3f} to {high:.3f})"
        shown.add_row(name, f"{one.rows:,}", *shares, *errors, f"{one.temperature:.3f}", flips)
    console = console_for_tables()
    console.print(shown)
    for name, one in scores.items():
        for line in about_score(name, one):
            console.print(line, soft_wrap=True)


def about_score(name: str, score: DecisionScore) -> list[str]:
    """Return sentences about a question: gain, soft targets, thresholds of probability, the worst surprise, flips."""
    gained = [] if score.gain is None else [f"{name}: {right_words(score.gain, 'the base model')}"]
    if soft := soft_target_words({"ceiling": score.ceiling, "nll_floor": score.nll_floor}):
        gained.append(f"{name}: {soft}")
    ties = tie_words(count_of(score.ties, "row")) if score.ties else ""
    clauses = constant_loss_words(vars(score)), never_given(score.confusion), ties
    gained += [f"{name}: {clause}" for clause in clauses if clause]
    if score.constant:
        return [*gained, f"{name}: the model gives the same answer to all rows"]
    if score.majority == 1:
        return [*gained, f"{name}: all rows have the same answer, so that a constant answer is always right"]
    if score.accuracy <= score.majority:
        often = "as often" if score.accuracy == score.majority else "more often"
        return [
            *gained,
            f"{name}: always giving the most frequent answer of these rows is right {often} ({score.majority:.1%})",
        ]
    worst = score.surprises[0]
    thresholds = [_about_threshold(name, score.rows, point) for point in score.thresholds]
    surprise = (
        f"{name}: the most surprising answer is {shorten(worst['answer'])} at {worst['source']}, where the model "
        f"decides {shorten(worst['decision'])} and gives it {worst['probability']:.2%}"
    )
    lines = [*gained, *thresholds, surprise]
    if score.flips is not None and score.flips > MANY_FLIPS:
        lines.append(
            f"{name}: {score.flips:.0%} of the decisions change if the options come in another order: in other "
            "programs, sort them by name as here, or train with --option-order random"
        )
    return lines


def _about_threshold(name: str, rows: int, point: Mapping[str, Any]) -> str:
    decided = round(point["coverage"] * rows)
    low, _ = point["accuracy_interval"]
    return (
        f"{name}: for {point['wanted']:.0%} right, decide above a probability of {point['threshold']:.3f}, and pass "
        f"the other {1 - point['coverage']:.0%} of the rows on ({point['accuracy'] * decided:.4g} of "
        f"{count_of(decided, 'row')} right, 95 % interval from {low:.0%})"
    )


def decide(options: DecideOptions) -> list[dict[str, Any]]:
    """Decide one state, or the states of files.

    Returns:
        per state `{"answers": {question: answer}}`, with answers in the form of the decision protocol.

    Raises:
        UsageError, DataError, ArtifactError: an option, the states, the questions, the model or the adapter cannot be
            used.
    """
    check_kind("options", options, DecideOptions)
    options.validate()
    run, given = options.run, options.data
    expand(given.data, text_option="state")  # a missing file is reported before the model is loaded
    with loaded_model(options.model, run.adapter, template=given) as loaded:
        show_notes(loaded.notes)
        decider = Decider.of(loaded, given, run.micro_batch_rows)
        questions = decider.questions if run.questions is None else _read_questions(run.questions)
        if given.data:
            values = {field.name: getattr(given, field.name) for field in fields(given)}
            data = DataOptions(**values, max_length=loaded.model.context_tokens)
            rows = decided_rows(decider, data, questions, answered=False)
            show_notes(_json_notes(given.data, decider))
        else:
            asked = tuple(Asked(question, None) for question in _required(questions))
            rows = [DecisionRow(not_none(given.state), asked, "state")]
        with counting("decisions", len(rows)) as done:
            answers = list(decider.answers(rows, on_row=done))
        dtype = resolve_dtype(options.model, resolve_device(options.model))
        show_notes(_tie_notes(answers, "" if dtype.itemsize >= 4 else str(dtype).removeprefix("torch.")))
    return answers


def _json_notes(data: Sequence[str], decider: Decider) -> list[str]:
    """Return a note if dicts are given as states, although the states of training were made of the columns of rows."""
    states = [row["state"] for one in data if isinstance(one, GivenRows) and one.option for row in one.rows]
    of_columns = decider.state is not None or decider.loaded.columns not in (None, NamedColumns())
    if not of_columns or not any(isinstance(state, Mapping) for state in states):
        return []
    return ["a dict is a state in JSON here, with all its keys; give rows with the columns of training as --data FILE"]


def _tie_notes(lines: Sequence[Mapping[str, Any]], rounding: str) -> list[str]:
    """Return a note if the most probable options of a choice, or yes and no, have the same printed probability.

    Args:
        lines: the answers to each state.
        rounding: name of a compute dtype in which different scores become equal; "" for float32.
    """
    ties: dict[str, int] = {}
    for name, answer in (one for line in rounded(lines) for one in line["answers"].items()):
        p = answer["probabilities"].values() if "choice" in answer else [answer.get("noul", 0.0), 0.5]
        first, second, *_ = sorted(p, reverse=True)
        ties[name] = ties.get(name, 0) + (first == second)
    tied = name_list(f"{name} in {count_of(count, 'state')}" for name, count in ties.items() if count)
    more = f"; {rounding} rounds the scores, and --dtype float32 tells them apart" if rounding else ""
    return [f"{tie_words(tied)}{more}"] if tied else []


def decide_command(options: DecideOptions) -> list[dict[str, Any]]:
    """Run `decide` and write one JSON object per state, to `output` or to standard output."""
    check_output(options.run.output, overwrite=options.run.overwrite)
    with working("deciding"):
        answers = decide(options)
    write_lines(rounded(answers), options.run.output, "answer")
    return answers


def _required(questions: Mapping[str, Question]) -> Iterable[Question]:
    if not questions:
        raise UsageError(
            "the adapter was trained on questions that differ from row to row",
            where="questions",
            next_step="give --questions FILE, or rows with questions",
        )
    return questions.values()


def _read_questions(path: Path) -> dict[str, Question]:
    """Read a JSON file of questions in the protocol's form, with or without `questions` around them."""
    try:
        contents = json.loads(read_plain(path))
    except OSError as error:
        raise DataError(
            "the questions cannot be read",
            where=str(path),
            why=error.strerror,
            next_step="check the path, or give another file",
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError("the questions are not JSON", where=str(path), why=str(error)) from None
    if isinstance(contents, dict) and isinstance(contents.get("questions"), dict):
        contents = contents["questions"]
    if not isinstance(contents, dict) or not contents:
        raise DataError("the file is no table of questions by name", where=str(path))
    return {name: question_of(name, spec, str(path)) for name, spec in contents.items()}
