"""Problems of rows of decisions: unused options, options named alike, contradictions, duplicates, a frequent answer."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from backhand.data.decisions import Asked, DecisionRow
from backhand.words import label_text, name_list, shorten

MOST_FREQUENT = 0.9
"""Share of the rows with the same answer from which always giving it is nearly as good as deciding."""


def problems_of_decisions(rows: Iterable[DecisionRow], held_out: Iterable[DecisionRow] = ()) -> list[tuple[Any, ...]]:
    """Return (kind, locations, phrase) for each problem of each question of training rows, see `lint.CHECKS`.

    Args:
        rows: training rows.
        held_out: held-out rows, whose answers may be those of no training row.
    """
    asked_later: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # by question and option
    for row in held_out:
        for asked in row.asked:
            for key, target in zip(asked.question.keys, asked.targets or (), strict=False):
                if target > 0:
                    asked_later[asked.question.name][key].append(row.source)
    by_name: dict[str, list[tuple[DecisionRow, Asked]]] = defaultdict(list)
    firsts: dict[str, str] = {}  # location of the first row with these contents
    repeated: list[str] = []
    for row in rows:
        if (first := firsts.setdefault(row.key, row.source)) != row.source:
            repeated.append(f"{row.source} = {first}")
        for asked in row.asked:
            if asked.targets is not None:
                by_name[asked.question.name].append((row, asked))
    problems = [
        problem for name, answers in by_name.items() for problem in _of_question(name, answers, asked_later[name])
    ]
    return [*problems, ("duplicate", repeated)]


def _of_question(
    name: str, answers: list[tuple[DecisionRow, Asked]], held_out: Mapping[str, list[str]]
) -> Iterable[tuple[Any, ...]]:
    counts: Counter[str] = Counter()
    options: dict[str, str] = {}  # option → location of the first row that has it
    places: dict[str, list[str]] = defaultdict(list)  # option → locations of the rows with this answer
    answers_of: dict[str, tuple[str, str]] = {}  # state → the first answer with its location
    contradictions: list[str] = []
    for row, asked in answers:
        targets, keys = asked.targets or (), asked.question.keys
        for key, target in zip(keys, targets, strict=True):
            options.setdefault(key, row.source)
            counts[key] += target > 0
        answer = keys[targets.index(max(targets))]
        places[answer].append(row.source)
        first, where = answers_of.setdefault(row.state, (answer, row.source))
        if first != answer:
            contradictions.append(f"{row.source} ≠ {where}")
    untrained = [key for key in options if not counts[key] and key in held_out]
    if untrained:
        yield "untrained_answer", [place for key in untrained for place in held_out[key]], _listed(name, untrained)
    unused = [key for key in options if not counts[key] and key not in held_out]
    if unused:
        yield "unused_option", [options[key] for key in unused], _listed(name, unused)
    others_of: dict[str, list[str]] = defaultdict(list)
    for key, usual in named_alike({key: counts[key] for key in options}).items():
        others_of[usual].append(key)
    for usual, others in others_of.items():
        rows = [place for key in others for place in places[key] or [options[key]]]
        yield "alike_options", rows, f"{_listed(name, others)} next to {label_text(usual)}"
    if contradictions:
        yield "contradiction", contradictions, name
    ((most, count),) = counts.most_common(1)
    if count >= MOST_FREQUENT * len(answers):
        first_row = [row.source for row, _ in answers[:1]]
        yield "one_answer", first_row, f"{shorten(most)} in {count / len(answers):.0%} of the rows of {name}"


def named_alike(counts: Mapping[str, int]) -> dict[str, str]:
    """Return each name that differs from a more frequent one only in case, spaces or hyphens, with that name."""
    usual: dict[str, str] = {}
    alike = {}
    for name in sorted(counts, key=lambda name: -counts[name]):
        plain = re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", " ".join(name.split()))
        most = usual.setdefault(plain.casefold(), name)
        if most != name:
            alike[name] = most
    return alike


def _listed(name: str, keys: list[str]) -> str:
    return f"{name}: {name_list(map(label_text, keys))}"
