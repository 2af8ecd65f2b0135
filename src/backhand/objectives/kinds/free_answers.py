"""Answers at the end of a run: examples for answers.jsonl, and measurements of answers for the summary.

The prompt of a row is everything before its last supervised span, and that span is the reference answer. If a row is
plain text, all of it is supervised. Then the first half is the prompt and the second half is the reference.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.held_out import neutral_prompts
from backhand.data.options import TemplateOptions
from backhand.data.row_encoder import Prompt
from backhand.data.rows import PromptRow
from backhand.engines.engine import BoundModel, computing_with
from backhand.errors import CheckError, DataError, UsageError
from backhand.generation.completer import complete_greedily
from backhand.generation.labels import Labels, longest_label
from backhand.generation.loading import LoadedModel, stop_ids
from backhand.generation.session import GenerationSession
from backhand.loop.evaluate import EvaluationRows, score
from backhand.loop.measuring import HeldOut, evenly_spaced
from backhand.nn.loading.source import ModelSource
from backhand.options.command_options import EvaluateRunOptions
from backhand.options.config import TrainConfig
from backhand.printing import counting
from backhand.runs.records import MAX_NEW_TOKENS
from backhand.runs.row_changes import row_scores, share_gain
from backhand.runs.summary import NeutralAnswer

_LONGEST_PROMPT = 1024


@dataclass(frozen=True)
class HeldOutAnswer:
    """One line of answers.jsonl."""

    source: str  # file and line of the row
    prompt: str  # the prompt including control tokens
    prompt_parts: tuple[tuple[str, bool], ...]  # the prompt in parts of (text, True for control tokens)
    reference: str  # the row's own answer, truncated to the largest number of new tokens
    # base, adapted: greedy answers without control tokens, of the model before the run (the base model or the adapter
    # that the run started from) and with the adapter
    base: str
    adapted: str
    rejected: str | None = None  # the rejected answer of a pair; None for other rows
    prompted: str | None = None  # greedy answer of the teacher in distillation; None for other objectives
    # base_p, adapted_p: probability of each option of a decision, whose answers are options; None for other rows
    base_p: dict[str, float] | None = None
    adapted_p: dict[str, float] | None = None


class GeneratedAnswers(NamedTuple):
    """Greedy answers to held-out rows as token ids."""

    examples: Sequence[Example]  # the rows
    base: Sequence[Sequence[int]]  # empty if the run started from an adapter and no `compared_rows` are given
    adapted: Sequence[Sequence[int]]
    start: Sequence[Sequence[int]] | None  # of the adapter that the run started from; None without one
    stops: Collection[int]  # tokens that end an answer
    limit: int  # largest number of tokens of an answer


@dataclass(frozen=True)
class FreeAnswers:
    """Greedy answers at the end of a run, of the model before the run and with the adapter."""

    held_out: tuple[HeldOutAnswer, ...]
    neutral: tuple[NeutralAnswer, ...]  # empty if the chat template refuses the prompts
    generated: GeneratedAnswers

    @property
    def same(self) -> str | None:
        """The adapter's answer if it is the same for all rows, of which the rows' own differ, otherwise None."""
        given = {one.adapted.strip() for one in self.held_out}
        return given.pop() if len(given) == 1 and len({one.reference for one in self.held_out}) > 1 else None

    def file(self, count: int) -> str:
        """Return the contents of answers.jsonl: a line for each of up to `count` rows."""
        shown = (self.held_out[number] for number in evenly_spaced(len(self.held_out), count))
        return "".join(json.dumps(asdict(answer)) + "\n" for answer in shown)


def answered_rows(examples: Sequence[Example], config: TrainConfig, *, fixed: bool = False) -> tuple[int, int]:
    """Return the largest number of rows that `free_answers` answers with the adapter, and with the model before it.

    Args:
        examples: the held-out rows.
        config: the configuration of the run.
        fixed: True if the rows shown are evenly spaced, as in other files.
    """
    count = config.run.answers
    fixed = fixed or config.objective.traits.trains_on_samples
    short = not fixed and all(0 < end - begin <= _LABEL_TOKENS for begin, end in spans_of(examples))
    return _CANDIDATES * count if short else count, count


def answered_at_once(micro_batch_rows: int) -> int:
    """Return the number of rows that `free_answers` answers at once.

    The memory plan covers as many rows as a micro-batch has. A few short answers take less than a step.
    """
    return max(FEW_ROWS, micro_batch_rows)


def free_answers(
    bound: BoundModel,
    source: ModelSource,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    prompted: Mapping[int, str] = MappingProxyType({}),
    start: Tensor | None = None,
    compared_rows: int | None = None,
) -> FreeAnswers:
    """Answer evenly spaced held-out rows and the neutral prompts.

    If the rows have short answers, more rows are answered with the adapter, and half of those shown are mistakes.

    Args:
        bound: the model with the adapter to answer with, which is attached again afterwards.
        source: the model's files.
        examples: the held-out rows.
        config: the configuration of the run, with the number of rows that the report shows.
        prompted: answers of the teacher in distillation, by row.
        start: values of the adapter that the run started from, whose answers come first; None for the base model.
        compared_rows: answer this number of evenly spaced rows, also with the base model; None for those to show.
    """
    model, tokenizer, stops = bound.completer(), source.tokenizer(), stop_ids(source, config.data)
    new_tokens = max(1, min(MAX_NEW_TOKENS, model.context_tokens // 2))
    longest = min(_LONGEST_PROMPT, model.context_tokens - new_tokens)
    candidates = count = compared_rows or 0
    if compared_rows is None:
        candidates, count = answered_rows(examples, config, fixed=bool(prompted))
    chosen = {number: examples[number] for number in evenly_spaced(len(examples), candidates)}
    of_teacher = {example.source: prompted.get(number) for number, example in chosen.items()}
    every = ((example, *_parts(example, longest)) for example in chosen.values())
    parts = [part for part in every if len(part[1])]
    questions = _neutral_questions(LoadedModel(model, tokenizer, stops), config.data, longest)
    at_once = answered_at_once(config.optimization.micro_batch_rows or 1)

    def completions(adapter: bool, *, who: str = "", others: bool = True) -> list[list[int]]:
        prompts = [*(prompt.tolist() for _, prompt, _ in parts), *(ids for _, ids in questions if others)]
        model.use_adapter(adapter)
        who = who or ("adapted model" if adapter else "base model")
        with counting(f"{who}: answers for the report", len(prompts)) as done:
            return complete_greedily(
                model, prompts, max_new_tokens=new_tokens, stop_ids=stops, batch_size=at_once, on_done=done
            )

    try:
        adapted = completions(adapter=True)
        if candidates > count:
            references = [_decoded(tokenizer, reference[:new_tokens].tolist()) for _, _, reference in parts]
            given = [_decoded(tokenizer, ids) for ids in adapted[: len(parts)]]
            numbers = rows_to_show(references, given, count)
            adapted = [*(adapted[number] for number in numbers), *adapted[len(parts) :]]
            parts = [parts[number] for number in numbers]
        started = None
        if start is not None:
            with computing_with(bound.model, start):
                started = completions(adapter=True, who="adapter that the run started from")
        base = []
        if compared_rows is not None or start is None:
            base = completions(adapter=False, others=start is None)
        before = base if started is None else started
    finally:
        bound.model.attach(bound.lora)
    held_out = [
        _held_out_answer(tokenizer, example, prompt, [reference[:new_tokens].tolist(), old, new], new_tokens)
        for (example, prompt, reference), old, new in zip(parts, before, adapted, strict=False)
    ]
    held_out = [replace(answer, prompted=of_teacher[answer.source]) for answer in held_out]
    first = len(parts)
    neutral = [
        NeutralAnswer(
            prompt=question,
            base=_decoded(tokenizer, old),
            adapted=_decoded(tokenizer, new),
            base_cut_off=len(old) >= new_tokens,
            adapted_cut_off=len(new) >= new_tokens,
        )
        for (question, _), old, new in zip(questions, before[first:], adapted[first:], strict=True)
    ]
    generated = GeneratedAnswers(
        *([example for example, _, _ in parts], base[:first], adapted[:first]),
        *(None if started is None else started[:first], frozenset(stops), new_tokens),
    )
    return FreeAnswers(tuple(held_out), tuple(neutral), generated)


FEW_ROWS = 4
_LABEL_TOKENS = 16
"""Largest number of tokens of answers that are cheap to generate for more rows than are shown."""
_CANDIDATES = 4
"""Number of rows with short answers that are answered per row shown, to find mistakes."""


def rows_to_show(references: Sequence[str], answers: Sequence[str], count: int) -> list[int]:
    """Return the numbers of up to `count` rows, spread over the different references, about half of them mistakes.

    The first half does not depend on the answers, so that reports of several runs have rows in common.
    """
    by_reference: dict[str, list[int]] = {}
    for number, reference in enumerate(references):
        by_reference.setdefault(reference, []).append(number)
    rounds = itertools.zip_longest(*by_reference.values())
    spread = [number for one_of_each in rounds for number in one_of_each if number is not None]
    first, others = spread[: -(-count // 2)], spread[-(-count // 2) :]
    others.sort(key=lambda number: answers[number] == references[number])
    return sorted((first + others)[:count])


def spans_of(examples: Iterable[Example]) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each row's last answer, in tokens."""
    return (example.last_answer for example in examples)


def _neutral_questions(loaded: LoadedModel, template: TemplateOptions, longest: int) -> list[tuple[str, list[int]]]:
    """Return the neutral prompts with their token ids; an empty list if the chat template refuses them."""
    try:
        session = GenerationSession(loaded, template)
        questions = [(question, session.prompt_ids(question)) for question in neutral_prompts()]
    except (DataError, UsageError):
        return []
    return [(question, ids) for question, ids in questions if len(ids) <= longest]


def _held_out_answer(
    tokenizer: Any, example: Example, prompt: np.ndarray[Any, Any], answers: list[list[int]], new_tokens: int
) -> HeldOutAnswer:
    """Decode the prompt and its answers: reference, base, adapted."""
    if example.rejected is not None:
        answers = [*answers, _parts(example.rejected, len(prompt))[1][:new_tokens].tolist()]
    reference, base, adapted, *others = (_decoded(tokenizer, ids) for ids in answers)
    if isinstance(example.facts, PromptRow):
        reference = example.facts.reference or ""
    elif example.desirable is False:
        reference = ""
    special = set(tokenizer.all_special_ids)
    runs = itertools.groupby(prompt.tolist(), key=special.__contains__)  # alternating control tokens and text
    return HeldOutAnswer(
        example.source,
        str(tokenizer.decode(prompt)),
        tuple((str(tokenizer.decode(list(run))), control) for control, run in runs),
        *(reference, base, adapted),
        rejected=others[0] if others else None,
    )


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


SHORT_TOKENS = 128
EXTRA_TOKENS = 8
"""Number of tokens that an answer may be longer than the longest reference, to detect answers that do not end."""
_FEWEST_ROWS, MOST_ROWS = 16, 500
_SHARE_OF_TRAINING = 4
"""The answered rows have at most 1 / 4 of the trained tokens, fewer than the run's evaluations."""


def measured_answers(
    bound: BoundModel,
    source: ModelSource,
    examples: Sequence[Example],
    config: TrainConfig,
    labels: Labels,
    trained_tokens: int,
    stopped: Callable[[], bool] = lambda: False,
    start: Tensor | None = None,
) -> dict[str, Any]:
    """Return the fields of summary.json on exact match and label scores, before the run and of the adapted model.

    The rows are evenly spaced among the held-out rows whose prompt leaves room for an answer. The result is empty if
    an answer is long, or if the rows are plain text.

    Args:
        bound: the model with the adapter to answer with, which is attached again afterwards.
        source: the model's files.
        examples: the held-out rows.
        config: the configuration of the run.
        labels: the labels of the training rows; empty if these have none.
        trained_tokens: number of tokens that the run has trained on, which limits the number of rows.
        stopped: returns True if the measurement is to stop. It is called before each of the two models.
        start: values of the adapter that the run started from; None for the base model.
    """
    spans = list(spans_of(examples))
    if not all(0 < end - begin <= SHORT_TOKENS for begin, end in spans):
        return {}
    model, new_tokens = bound.completer(), max(end - begin for begin, end in spans) + EXTRA_TOKENS
    examples = [
        one for one, (begin, _) in zip(examples, spans, strict=True) if begin + new_tokens <= model.context_tokens
    ]
    if not examples:
        return {}
    affordable = trained_tokens * len(examples) // (_SHARE_OF_TRAINING * sum(map(len, examples)))
    numbers = evenly_spaced(len(examples), min(MOST_ROWS, max(_FEWEST_ROWS, affordable)))
    chosen, tokenizer = [examples[number] for number in numbers], source.tokenizer()
    prompts = []
    for example in chosen:
        begin, end = example.last_answer
        reply = str(tokenizer.decode(example.input_ids[begin:end].tolist(), skip_special_tokens=True)).strip()
        prompts.append(Prompt(example.input_ids[:begin], "", reply, example.source))
    room = model.context_tokens - longest_label(labels)
    labels = labels if all(one.reply in labels and len(one.input_ids) <= room for one in prompts) else {}
    run = EvaluateRunOptions(max_new_tokens=new_tokens, micro_batch_rows=config.optimization.micro_batch_rows or 1)
    rows = EvaluationRows(HeldOut(chosen, run.micro_batch_rows), len(chosen), tuple(prompts), labels=labels)
    loaded = LoadedModel(model, tokenizer, stop_ids(source, config.data))
    try:
        # Answer at most as many rows at once as a micro-batch has, because the memory plan covers these.
        scores = []
        for before in (True, False):
            if stopped():
                return {}
            adapter = not before or start is not None
            with nullcontext() if start is None or not before else computing_with(bound.model, start):
                scores.append(score(loaded, rows, run, adapter=adapter, answered=run.micro_batch_rows))
        base, adapted = scores
    except CheckError:  # the loss is not finite, which the run has reported already
        return {}
    finally:
        bound.model.attach(bound.lora)
    return {
        "exact_match_rows": len(chosen),
        "free_texts": _are_free_texts(prompts, [end - begin for begin, end in spans_of(chosen)]),
        "base_exact_match": base.exact_match,
        "adapted_exact_match": adapted.exact_match,
        "exact_match_gain": share_gain(base.row_matches, adapted.row_matches) if base.row_matches else None,
        "base_labels": base.labels.to_json() if base.labels else None,
        "adapted_labels": adapted.labels.compared_with(base.labels).to_json() if adapted.labels else None,
        "row_scores": row_scores(adapted.labels.row_scores) if adapted.labels else (),
    }


def _are_free_texts(prompts: Sequence[Prompt], tokens: Sequence[int]) -> bool:
    """Return True if hardly any answer can equal the row's own: these are long, or each has several words of its own.

    Args:
        prompts: the rows with their replies.
        tokens: number of tokens of each reply.
    """
    replies = [one.reply or "" for one in prompts]
    several_words = median(len(reply.split()) for reply in replies) > 1
    return are_long(tokens) or (several_words and len({*replies}) == len(replies))


def are_long(tokens: Iterable[int]) -> bool:
    """Return True if most answers, of which these are the numbers of tokens, are longer than labels."""
    return median(tokens) > _LABEL_TOKENS


def _parts(example: Example, longest: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the token ids of the prompt, at most its last `longest` ones, and of the reference answer."""
    ids, (begin, end) = example.input_ids, example.last_answer
    if not end:
        end = int(np.flatnonzero(example.supervised)[-1]) + 1
        begin = end // 2
    return ids[max(0, begin - longest) : begin], ids[begin:end]
