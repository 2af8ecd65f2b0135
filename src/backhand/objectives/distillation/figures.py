"""Figures at the end of a distilled run, on held-out prompts: agreement with the teacher, and what a call saves.

The teacher answers the prompts greedily with its context, and the base model and the adapted one without it. The
seconds to the first token are measured with one prompt at a time, by model and teacher in turns, since other programs
may slow a whole minute.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from itertools import chain, cycle, islice
from statistics import fmean, median
from typing import Any

from torch import Tensor

from backhand.data.examples import Example
from backhand.engines.engine import computing_with
from backhand.generation.completer import complete_greedily
from backhand.generation.session import decode
from backhand.loop.measuring import evenly_spaced
from backhand.nn.decoder.decoder import Decoder
from backhand.objectives.distillation.packers import DistilledPacker, agreement
from backhand.runs.distilled_results import top_1_gain
from backhand.runs.records import MAX_NEW_TOKENS
from backhand.runs.summary import DistilledFigures

MOST_ANSWERED = 64
"""Largest number of prompts that are answered."""
TIMED = 5
"""Number of pairs of prompts of which the seconds to the first token are measured."""


def distilled_figures(
    model: Decoder,
    packer: DistilledPacker,
    start: Tensor | None,
    tokenizer: Any,
    stop_ids: Collection[int],
    micro_batch_rows: int,
    shown: int,
) -> tuple[DistilledFigures | None, dict[int, str]]:
    """Measure the model before the run and the attached adapter against the teacher.

    Args:
        model: the model with the adapter, which is attached again afterwards.
        packer: the held-out rows with the teacher's states.
        start: values of the adapter that the run started from, which is the teacher's; None for the base model.
        tokenizer: decodes answers.
        stop_ids: tokens that end an answer.
        micro_batch_rows: number of rows that are computed at once.
        shown: number of rows that the report shows, evenly spaced.

    Returns:
        the figures, or None if no prompt leaves room for an answer; and the teacher's answers by row.
    """
    rows = len(packer.examples)
    documents = {row: (packer.examples[row], packer.teachers[row]) for row in range(rows)}
    prompts = {row: (_prompt(student), _prompt(teacher)) for row, (student, teacher) in documents.items()}
    context = model.config.max_position_embeddings
    prompts = {row: both for row, both in prompts.items() if min(map(len, both)) and len(both[1]) < context}
    numbers = sorted({*evenly_spaced(rows, MOST_ANSWERED), *evenly_spaced(rows, shown)} & prompts.keys())
    if not numbers:
        return None, {}
    students, teachers = ([prompts[number][side] for number in numbers] for side in (0, 1))
    limit = min(MAX_NEW_TOKENS, context - max(map(len, teachers)))

    def answers(asked: Sequence[Sequence[int]]) -> list[list[int]]:
        return complete_greedily(
            model, asked, max_new_tokens=limit, stop_ids=stop_ids, batch_size=max(micro_batch_rows, TIMED)
        )

    adapted = answers(students)
    adapted_kl, adapted_same = agreement(model, packer, micro_batch_rows)
    with computing_with(model, start):
        base = answers(students)
        base_kl, base_same = agreement(model, packer, micro_batch_rows)
    with computing_with(model, start):
        of_teacher: dict[int, list[int]] = {}
        for group in packer.groups:  # the context is computed once
            chosen = [row for row in group if row in numbers]
            of_teacher |= zip(chosen, answers([prompts[row][1] for row in chosen]), strict=True)
        expected = [of_teacher[number] for number in numbers]
    seconds = _first_token_s(model, list(zip(students, teachers, strict=True)), start)
    first_s, prompted_s = zip(*seconds, strict=True)
    short = all(len(answer) < limit for answer in expected)

    def equal(given: Sequence[list[int]]) -> float | None:
        return fmean(one == other for one, other in zip(given, expected, strict=True)) if short else None

    tokens = sum(packer.state_tokens)
    figures: DistilledFigures = {
        "tokens": tokens,
        "base_kl": base_kl,
        "adapted_kl": adapted_kl,
        "base_top_1": sum(base_same) / tokens,
        "adapted_top_1": sum(adapted_same) / tokens,
        "top_1_gain": top_1_gain(base_same, adapted_same, tokens),
        "rows": len(numbers),
        "base_equal": equal(base),
        "adapted_equal": equal(adapted),
        "prompt_tokens": fmean(map(len, students)),
        "prompted_tokens": fmean(map(len, teachers)),
        "first_token_s": median(first_s),
        "prompted_first_token_s": median(prompted_s),
        "first_token_ratios": [one / other for one, other in seconds],
    }
    return figures, {row: decode(tokenizer, ids).strip() for row, ids in zip(numbers, expected, strict=True)}


def _prompt(example: Example) -> list[int]:
    begin, _ = example.last_answer
    ids: list[int] = example.input_ids[:begin].tolist()
    return ids


def _first_token_s(
    model: Decoder, prompts: Sequence[tuple[list[int], list[int]]], start: Tensor | None
) -> list[tuple[float, float]]:
    """Return the seconds from a prompt to the first token of its answer, of model and teacher in `TIMED` pairs.

    Args:
        prompts: of model and teacher. The first pair is computed once more before, and not counted.
        start: as in `distilled_figures`.
    """

    def seconds(prompt: list[int]) -> float:
        began_s = time.perf_counter()
        complete_greedily(model, [prompt], max_new_tokens=1, stop_ids=())
        return time.perf_counter() - began_s

    measured = []
    for student, teacher in islice(chain(prompts[:1], cycle(prompts)), TIMED + 1):
        of_student = seconds(student)
        with computing_with(model, start):
            measured.append((of_student, seconds(teacher)))
    return measured[1:]
