"""Problems of rows for a classification head: names of labels, contradictions, frequencies, the scale of numbers."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from backhand.data.class_examples import misfit, not_numbers
from backhand.data.decision_lint import MOST_FREQUENT, named_alike
from backhand.data.examples import Example
from backhand.data.label_names import as_list, integers_note, joined_labels, refuse_labels_of_one_row
from backhand.data.lint_rows import Check
from backhand.data.raw_rows import RowErrors, has_unclear_comma, number_of
from backhand.data.rows import NUMBER, SINGLE, ClassLabel, ProblemType
from backhand.errors import DataError
from backhand.words import count_of, label_text, name_list, shorten

_FEWEST_ROWS = 4
_FEWEST_NUMBERS, _TIMES_AS_FAR = 20, 5
_FAR = 10.0
"""Mean or deviation of numbers from which a new head, whose outputs are near 0, is far from them."""


def add_misfits(examples: Iterable[Example], problem: ProblemType, bad: RowErrors, no_numbers: RowErrors) -> None:
    """Count the rows whose label does not fit the kind of problem as malformed.

    Args:
        bad: where no option leaves the rows out.
        no_numbers: where `--problem-type regression` with `--skip-bad` leaves them out.
    """
    for one in examples:
        label = one.facts_as(ClassLabel)
        if error := misfit(label, problem, one.source):
            (bad if problem != NUMBER or has_unclear_comma(label.value) else no_numbers).add(error)


def problems_of_classes(
    examples: Iterable[Example], problem: ProblemType, *, chosen: bool
) -> tuple[list[tuple[Any, ...]], dict[str, int]]:
    """Return (kind, locations, phrases) for each kind of problem, see `lint.CHECKS`, and the rows of each label.

    Args:
        problem: the kind of problem.
        chosen: False if the labels determine it.
    """
    rows = [(one.source, one.facts, one.input_ids.tobytes()) for one in examples if isinstance(one.facts, ClassLabel)]
    labels = [label for _, label, _ in rows]
    if problem == NUMBER:
        far, scale = far_numbers(labels), scale_of(labels)
        of_scale = [("scale", [rows[0][0]], *scale)] if scale else []
        return [("far_number", [rows[place][0] for place in far], texts_at(far, labels)), *of_scale], {}
    others = [] if chosen else not_numbers(labels)
    label_of: dict[bytes, ClassLabel] = {}
    contradicting = [source for source, label, ids in rows if label_of.setdefault(ids, label) != label]
    counts = Counter(name for _, label, _ in rows for name in label.names)
    rare = {name: count for name, count in counts.items() if count < _FEWEST_ROWS}
    of_rare = [source for source, label, _ in rows if rare.keys() & set(label.names)]
    names = name_list(map(label_text, rare), limit=5)
    integers = "" if chosen or problem != SINGLE else f"; {note}" if (note := integers_note(counts)) else ""
    alike = named_alike(counts)
    of_alike = [source for source, label, _ in rows if alike.keys() & set(label.names)]
    both = name_list((f"{label_text(name)} next to {label_text(usual)}" for name, usual in alike.items()), limit=5)
    problems: list[tuple[Any, ...]] = [
        ("alike_labels", of_alike, both),
        ("contradicting_labels", contradicting),
        ("rare_label", of_rare, _FEWEST_ROWS, names, integers),
        ("not_numbers", [rows[place][0] for place in others], texts_at(others, labels)),
    ]
    most, count = counts.most_common(1)[0] if counts else ("", 0)
    if problem == SINGLE and count >= MOST_FREQUENT * len(rows):
        problems.append(("one_class", [rows[0][0]], f"{shorten(most)} in {count / len(rows):.0%} of the rows"))
    return problems, dict(counts)


def texts_at(places: Iterable[int], labels: Sequence[ClassLabel]) -> str:
    """Return the different labels at these places, the first ones."""
    return name_list(dict.fromkeys(shorten(str(labels[place].value)) for place in places), limit=5)


def check_names(
    problem: ProblemType, trained: Sequence[Example], held_out: Iterable[Example], *, are_sample: bool = False
) -> None:
    """Check labels that nobody has chosen with an option.

    Args:
        problem: the kind of problem that the labels pose.
        trained: training rows.
        held_out: held-out rows.
        are_sample: the rows are a sample of more rows, in which a label may repeat.

    Raises:
        DataError: labels are made of other labels, or most training rows have a label that no other row has.
    """
    keep = f"or give --problem-type {problem}"
    places: dict[str, str] = {}  # label → location of the first row that has it
    for one in (*trained, *held_out):
        for name in one.facts_as(ClassLabel).names:
            places.setdefault(name, one.source)
    if joined := joined_labels(places):
        name = next(iter(joined))
        raise DataError(
            f"{count_of(len(joined), 'label')} {'is' if len(joined) == 1 else 'are'} made of others, such as {name!r}",
            where=places[name],
            why="each would be learned as a label of its own",
            next_step=f"{as_list(joined[name])}; {keep} to learn these labels as they are",
        )
    if are_sample:
        return
    rows = [(one.facts_as(ClassLabel).names, one.source) for one in trained]
    numbers = all(number_of(name) is not None for names, _ in rows for name in names)
    learned = "or, if they are quantities rather than row numbers, give --problem-type regression, " * numbers
    refuse_labels_of_one_row(rows, f"name another column with --completion, {learned}{keep} to train all the same")


def far_numbers(labels: Sequence[ClassLabel]) -> list[int]:
    """Return the indices of numbers that are far from the others, such as 99 for a missing score from 0 to 5.

    They are at most one in 50, and five times as far from the median as the farthest other number.
    """
    numbers = [(place, number) for place, one in enumerate(labels) if (number := number_of(one.value)) is not None]
    if len(numbers) < _FEWEST_NUMBERS:
        return []
    median = statistics.median(number for _, number in numbers)
    distances = sorted((abs(number - median), place) for place, number in numbers)
    few = max(1, len(distances) // 50)
    most = distances[-few - 1][0]
    return sorted(place for distance, place in distances[-few:] if distance > _TIMES_AS_FAR * most > 0)


def scale_of(labels: Iterable[ClassLabel]) -> tuple[float, float] | None:
    """Return mean and deviation of numbers that are far from the first outputs of a new head, or None if they are near.

    Labels that are no numbers do not count.
    """
    numbers = [number for label in labels if (number := number_of(label.value)) is not None]
    mean, deviation = (statistics.fmean(numbers), statistics.pstdev(numbers)) if numbers else (0.0, 0.0)
    return (mean, deviation) if max(abs(mean), deviation) > _FAR else None


SCALE = Check(
    "numbers far from 0",
    "of numbers around {:.4g} with a deviation of {:.4g}, which a new head reaches only slowly",
    "subtract the mean from the numbers of the rows and divide by the deviation, and undo it on the answers",
)


def scale_note(labels: Iterable[ClassLabel]) -> str | None:
    """Return a sentence about numbers that a new head reaches only slowly, with the remedy, or None."""
    if (scale := scale_of(labels)) is None:
        return None
    return f"the labels are {SCALE.what.removeprefix('of ').format(*scale)}; {SCALE.remedy}"
