"""Answers to held-out rows at the end of a run: examples for answers.jsonl, and the exact match for the summary.

The prompt of a row is everything before its last supervised span, and that span is the reference answer. If a row is
plain text, all of it is supervised. Then the first half is the prompt and the second half is the reference.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from backhand.data.chat import stopping_role_ids
from backhand.data.examples import Example
from backhand.data.options import TemplateOptions
from backhand.data.prepare import Prompt
from backhand.engines.engine import BoundModel
from backhand.errors import CheckError
from backhand.generation.completer import complete_greedily
from backhand.generation.labels import Labels, longest_label
from backhand.generation.loading import LoadedModel
from backhand.loop.evaluate import EvaluationRows, score
from backhand.loop.measuring import HeldOut, evenly_spaced
from backhand.nn.loading.source import ModelSource
from backhand.options.command_options import EvaluateRunOptions
from backhand.options.config import TrainConfig
from backhand.printing import counting

MAX_NEW_TOKENS = 64
_LONGEST_PROMPT = 1024


@dataclass(frozen=True)
class HeldOutAnswer:
    """One line of answers.jsonl."""

    source: str  # file and line of the row
    prompt: str  # the prompt including control tokens
    prompt_parts: tuple[tuple[str, bool], ...]  # the prompt in parts of (text, True for control tokens)
    reference: str  # the row's own answer, truncated to the largest number of new tokens
    # base, adapted: greedy answers without control tokens
    base: str
    adapted: str
    rejected: str | None = None  # the rejected answer of a pair; None for other rows


def answers_file(bound: BoundModel, source: ModelSource, examples: Sequence[Example], config: TrainConfig) -> str:
    """Return the contents of answers.jsonl: one line for each of `config.run.answers` rows.

    Args:
        bound: the model with the adapter to answer with, which is attached again afterwards.
        source: the model's files.
        examples: the held-out rows.
        config: the configuration of the run.
    """
    answers = held_out_answers(bound, examples, source.tokenizer(), stop_ids(source, config.data), config.run.answers)
    return "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)


def stop_ids(source: ModelSource, template: TemplateOptions) -> tuple[int, ...]:
    """Return the tokens that end an answer."""
    return (*source.stop_token_ids(), *stopping_role_ids(source.tokenizer(), template))


def held_out_answers(
    bound: BoundModel, examples: Sequence[Example], tokenizer: Any, stop_ids: Collection[int], count: int
) -> Iterator[HeldOutAnswer]:
    """Yield the answers to `count` evenly spaced rows.

    Args:
        bound: the model with the adapter to answer with, which is attached again afterwards.
        examples: the rows.
        tokenizer: a transformers tokenizer.
        stop_ids: tokens that end an answer.
        count: number of rows.
    """
    model = bound.completer()
    new_tokens = max(1, min(MAX_NEW_TOKENS, model.context_tokens // 2))
    longest = min(_LONGEST_PROMPT, model.context_tokens - new_tokens)
    chosen = [examples[number] for number in evenly_spaced(len(examples), count)]
    parts = [part for part in ((example, *_parts(example, longest)) for example in chosen) if len(part[1])]
    prompts = [prompt.tolist() for _, prompt, _ in parts]
    completions: list[list[list[int]]] = []
    try:
        for adapter in (True, False):
            model.use_adapter(adapter)
            with counting("answers for the report", len(prompts)) as done:
                ids = complete_greedily(model, prompts, max_new_tokens=new_tokens, stop_ids=stop_ids, on_done=done)
            completions.append(ids)
    finally:
        bound.model.attach(bound.lora)
    special = set(tokenizer.all_special_ids)
    for (example, _, reference), prompt, of_adapted, of_base in zip(parts, prompts, *completions, strict=True):
        answers = [reference[:new_tokens].tolist(), of_base, of_adapted]
        if example.rejected is not None:
            answers.append(_parts(example.rejected, longest)[1][:new_tokens].tolist())
        decoded = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers]
        if example.prompt_row is not None:
            decoded[0] = example.prompt_row.reference or ""
        runs = itertools.groupby(prompt, key=special.__contains__)  # alternating control tokens and text
        yield HeldOutAnswer(
            example.source,
            str(tokenizer.decode(prompt)),
            tuple((str(tokenizer.decode(list(run))), control) for control, run in runs),
            *decoded,
        )


_SHORT_TOKENS = 128
_EXTRA_TOKENS = 8
"""Number of tokens that an answer may be longer than the longest reference, to detect answers that do not end."""
_FEWEST_ROWS, _MOST_ROWS = 16, 500
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
) -> dict[str, Any]:
    """Return the fields of summary.json on exact match and label scores, of the base model and of the adapted one.

    The rows are evenly spaced among the held-out rows whose prompt leaves room for an answer. The result is empty if
    an answer is long, if the rows are plain text, or if the objective is not SFT.

    Args:
        bound: the model with the adapter to answer with, which is attached again afterwards.
        source: the model's files.
        examples: the held-out rows.
        config: the configuration of the run.
        labels: the labels of the training rows; empty if these have none.
        trained_tokens: number of tokens that the run has trained on, which limits the number of rows.
        stopped: returns True if the measurement is to stop. It is called before each of the two models.
    """
    spans = [example.last_answer for example in examples]
    if config.objective.objective != "sft" or not all(0 < end - begin <= _SHORT_TOKENS for begin, end in spans):
        return {}
    model, new_tokens = bound.completer(), max(end - begin for begin, end in spans) + _EXTRA_TOKENS
    examples = [
        one for one, (begin, _) in zip(examples, spans, strict=True) if begin + new_tokens <= model.context_tokens
    ]
    if not examples:
        return {}
    affordable = trained_tokens * len(examples) // (_SHARE_OF_TRAINING * sum(map(len, examples)))
    numbers = evenly_spaced(len(examples), min(_MOST_ROWS, max(_FEWEST_ROWS, affordable)))
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
        for adapter in (False, True):
            if stopped():
                return {}
            scores.append(score(loaded, rows, run, adapter=adapter, answered=run.micro_batch_rows))
        base, adapted = scores
    except CheckError:  # the loss is not finite, which the run has reported already
        return {}
    finally:
        bound.model.attach(bound.lora)
    return {
        "exact_match_rows": len(chosen),
        "base_exact_match": base.exact_match,
        "adapted_exact_match": adapted.exact_match,
        "base_labels": asdict(base.labels) if base.labels else None,
        "adapted_labels": asdict(adapted.labels) if adapted.labels else None,
    }


def _parts(example: Example, longest: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the token ids of the prompt, at most its last `longest` ones, and of the reference answer."""
    ids, (begin, end) = example.input_ids, example.last_answer
    if not end:
        end = int(np.flatnonzero(example.supervised)[-1]) + 1
        begin = end // 2
    return ids[max(0, begin - longest) : begin], ids[begin:end]
