"""The labels of a classification run: their kind and order, and checks of the rows against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from backhand.data.class_examples import decimal_comma_note, names_of, not_numbers, problem_of, target_of
from backhand.data.class_lint import check_names, scale_note, texts_at
from backhand.data.label_names import integers_note, unlearned_note, unlearned_rows
from backhand.data.rows import NUMBER, SINGLE, ClassLabel, ProblemType
from backhand.data.stored_examples import PreparedData
from backhand.errors import DataError, UsageError
from backhand.objectives.kinds.head import StartingHead
from backhand.options.objectives import ObjectiveOptions
from backhand.words import count_of, label_text, name_list


def with_labels(
    options: ObjectiveOptions,
    train: PreparedData,
    held_out: PreparedData | None,
    start: StartingHead | None = None,
    *,
    are_sample: bool = False,
) -> tuple[ObjectiveOptions, int, tuple[str, ...]]:
    """Return the options with the kind of problem and the labels, a number of held-out rows, and sentences about these.

    The number is that of the held-out rows with labels that are not learned, see `label_names.unlearned_rows`.

    Args:
        start: the head that the run starts from, whose labels it takes over.
        are_sample: the rows are a sample of those of the run.

    Raises:
        DataError: the label of a row does not fit, all training rows have the same label or none, or the names of
            labels speak against them, see `class_lint.check_names`.
        UsageError: the labels are not those of the head to start from.
    """
    learned = _labels_of(train)
    found = learned if held_out is None else [*learned, *_labels_of(held_out)]
    problem = options.problem_type or (start and start.problem) or problem_of(found)
    if problem == NUMBER and options.class_labels and not options.problem_type:
        problem = SINGLE
    labels = options.class_labels or (start and start.labels) or names_of(found, problem)
    if start is not None:
        _check_start(start, problem, labels, names_of(found, problem))
    of_train, of_held_out = ([*data.examples] if data is not None else [] for data in (train, held_out))
    for row in (*of_train, *of_held_out):
        target_of(row.facts_as(ClassLabel), problem, labels, row.source)
    if problem == NUMBER:
        commas = decimal_comma_note((row.facts_as(ClassLabel), row.source) for row in (*of_train, *of_held_out))
        said = [f"a number is learned from {count_of(len(learned), 'row')}, with squared error"]
        said += [commas] if commas else []
        said += ["--class-labels are not used, because a number has no labels"] if options.class_labels else []
        if start is None and (note := scale_note(learned)):
            said.append(f"warning: {note}")
        return replace(options, problem_type=problem, class_labels=()), 0, tuple(said)
    trained = names_of(learned, problem)
    if not trained:
        raise DataError(
            "no row has a label",
            where=train.report.sources[0].source,
            why="the list of labels of every row is empty",
            next_step="add rows with labels",
        )
    chosen = options.class_labels or start is not None
    if not chosen and options.problem_type is None:
        check_names(problem, of_train, of_held_out, are_sample=are_sample)
    if problem == SINGLE and len(labels if chosen else trained) < 2:
        raise DataError(
            f"all training rows have the label {trained[0]!r}, so that there is nothing to distinguish",
            where=train.report.sources[0].source,
            next_step="add rows with other labels, or give --problem-type regression for numbers",
        )
    kind = "one label per row" if problem == SINGLE else "several labels per row"
    said = [f"{kind}: {name_list(map(label_text, labels), limit=8)}"]
    if start is None and (untrained := [name for name in labels if name not in set(trained)]):
        said.append(
            f"labels of no training row, which are not learned: {name_list(map(label_text, untrained), limit=8)}"
        )
    in_held_out = [label.names for label in found[len(learned) :]]
    unlearned = (
        0 if start is not None or are_sample else unlearned_rows((label.names for label in learned), in_held_out)
    )
    if note := unlearned_note(unlearned, len(in_held_out)):
        said.append(f"warning: {note}")
    if problem == SINGLE and not chosen and options.problem_type is None and (others := not_numbers(learned)):
        said.append(
            f"warning: most labels are numbers, but not those of {count_of(len(others), 'row')} "
            f"({texts_at(others, learned)}), so that all are read as names; to leave these rows out and learn "
            "numbers, give --problem-type regression --skip-bad"
        )
    if problem == SINGLE and not chosen and options.problem_type is None and (note := integers_note(labels)):
        said.append(note)
    return replace(options, problem_type=problem, class_labels=labels), unlearned, tuple(said)


def _labels_of(data: PreparedData) -> list[ClassLabel]:
    return data.examples.facts(ClassLabel)


def _check_start(start: StartingHead, problem: ProblemType, labels: Sequence[str], found: Sequence[str]) -> None:
    """Raise UsageError unless the head to start from has this kind of problem and these labels, in this order."""
    different = []
    if start.problem is not None and problem != start.problem:
        different.append(f"problem_type: {start.problem} in the adapter, {problem} in this run")
    if start.labels and tuple(labels) != start.labels and problem != NUMBER:
        in_adapter, given = (name_list(map(label_text, names), limit=8) for names in (start.labels, labels))
        different.append(f"class_labels: {in_adapter} in the adapter, {given} given")
    elif len(labels) != start.outputs:
        different.append(f"{count_of(start.outputs, 'output')} in the adapter, {count_of(len(labels), 'label')} here")
    elif problem != NUMBER and (others := [name for name in found if name not in labels]):
        different.append(
            f"the rows have {name_list(map(label_text, others), limit=8)}, which the adapter does not know"
        )
    if different:
        raise UsageError(
            f"the head of {start.origin} does not fit this run: {'; '.join(different)}",
            where="from_adapter",
            why="training continues with the adapter's own labels, in their order",
            next_step="leave out these options or rows, or leave out from_adapter for a fresh head",
        )
