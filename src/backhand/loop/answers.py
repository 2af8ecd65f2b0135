"""Held-out rows, answered at the end of a run: a few for people to compare, and how many are right.

In answers.jsonl a row is asked up to where its last supervised stretch begins, and that stretch is what it should say.
Of plain text, where everything is supervised, the first half is given and the second half is what comes next.
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
from backhand.generate.completer import complete_greedily
from backhand.generate.labels import Labels, longest_label
from backhand.generate.loading import LoadedModel
from backhand.loop.evaluate import EvaluationRows, score
from backhand.loop.measuring import HeldOut, spread
from backhand.nn.loading.source import ModelSource
from backhand.options.command_options import EvaluateRunOptions
from backhand.options.config import TrainConfig
from backhand.printing import counting

MAX_NEW_TOKENS = 64
_LONGEST_PROMPT = 1024


@dataclass(frozen=True)
class HeldOutAnswer:
    """One row of answers.jsonl."""

    source: str  # where the row stands
    prompt: str  # what was asked, as the model sees it, with control tokens
    # the same as [text, whether it is control tokens], so that people can be shown less of these
    prompt_parts: tuple[tuple[str, bool], ...]
    reference: str  # what the row says, cut to as many tokens as answers may have
    # base, adapted: greedy answers, without control tokens
    base: str
    adapted: str
    rejected: str | None = None  # of a pair, what it should not say; None elsewhere


def answers_file(bound: BoundModel, source: ModelSource, examples: Sequence[Example], config: TrainConfig) -> str:
    """answers.jsonl: as many rows as `config` wants, each with its answers, a line each.

    Args:
        bound: the model with its adapter, its values those to answer with; the adapter is attached afterwards.
    """
    answers = held_out_answers(bound, examples, source.tokenizer(), stop_ids(source, config.data), config.run.answers)
    return "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)


def stop_ids(source: ModelSource, template: TemplateOptions) -> tuple[int, ...]:
    """Tokens that end an answer."""
    return (*source.stop_token_ids(), *stopping_role_ids(source.tokenizer(), template))


def held_out_answers(
    bound: BoundModel, examples: Sequence[Example], tokenizer: Any, stop_ids: Collection[int], count: int
) -> Iterator[HeldOutAnswer]:
    """Answer some rows, evenly spread over those there are; the adapter is attached before and after.

    Args:
        bound: the model with its adapter, its values those to answer with.
    """
    model = bound.completer()
    new_tokens = max(1, min(MAX_NEW_TOKENS, model.context_tokens // 2))
    longest = min(_LONGEST_PROMPT, model.context_tokens - new_tokens)
    chosen = [examples[place] for place in spread(len(examples), count)]
    parts = [part for part in ((example, *_parts(example, longest)) for example in chosen) if len(part[1])]
    prompts = [prompt.tolist() for _, prompt, _ in parts]
    said_by: list[list[list[int]]] = []
    try:
        for adapter in (True, False):
            model.use_adapter(adapter)
            with counting("answers for the report", len(prompts)) as done:
                said = complete_greedily(model, prompts, max_new_tokens=new_tokens, stop_ids=stop_ids, on_done=done)
            said_by.append(said)
    finally:
        bound.model.attach(bound.lora)
    special = set(tokenizer.all_special_ids)
    for (example, _, reference), prompt, of_adapted, of_base in zip(parts, prompts, *said_by, strict=True):
        said = [reference[:new_tokens].tolist(), of_base, of_adapted]
        if example.rejected is not None:
            said.append(_parts(example.rejected, longest)[1][:new_tokens].tolist())
        decoded = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in said]
        if example.asked is not None:
            decoded[0] = example.asked.reference or ""
        runs = itertools.groupby(prompt, key=special.__contains__)  # of control tokens, and of text between them
        yield HeldOutAnswer(
            example.source,
            str(tokenizer.decode(prompt)),
            tuple((str(tokenizer.decode(list(run))), control) for control, run in runs),
            *decoded,
        )


_SHORT_TOKENS = 128
_BEHIND_ANSWERS = 8
"""Tokens behind the longest answer, so that one that goes on is told apart from one that ends."""
_FEWEST_ROWS, _MOST_ROWS = 16, 500
_SHARE_OF_TRAINING = 4
"""Rows are asked for one in so many of the tokens trained on, less than their evaluations take during the run."""


def measured_answers(
    bound: BoundModel,
    source: ModelSource,
    examples: Sequence[Example],
    config: TrainConfig,
    labels: Labels,
    trained_tokens: int,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Exact match of the base model and with the adapter, and their labels if rows have them, as summary.json has it.

    Measured on held-out rows with short answers, evenly spread over those that leave room for one; nothing where some
    answer is long, or rows are plain text or no answers to learn.

    Args:
        bound: the model with its adapter, its values those to answer with; the adapter is attached afterwards.
        labels: of the training rows; nothing where these have none.
        trained_tokens: of the run, which bounds how many rows are asked.
        stopped: asked before each of the two models answers; where it is so, nothing is told.
    """
    spans = [example.last_answer for example in examples]
    if config.objective.objective != "sft" or not all(0 < end - begin <= _SHORT_TOKENS for begin, end in spans):
        return {}
    model, new_tokens = bound.completer(), max(end - begin for begin, end in spans) + _BEHIND_ANSWERS
    examples = [
        one for one, (begin, _) in zip(examples, spans, strict=True) if begin + new_tokens <= model.context_tokens
    ]
    if not examples:
        return {}
    affordable = trained_tokens * len(examples) // (_SHARE_OF_TRAINING * sum(map(len, examples)))
    places = spread(len(examples), min(_MOST_ROWS, max(_FEWEST_ROWS, affordable)))
    chosen, tokenizer = [examples[place] for place in places], source.tokenizer()
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
        # No more rows at once than a training step has, whose memory is planned.
        scores = []
        for adapter in (False, True):
            if stopped():
                return {}
            scores.append(score(loaded, rows, run, adapter=adapter, answered=run.micro_batch_rows))
        base, adapted = scores
    except CheckError:  # nothing finite: the run has said so, and is over
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
    """Token ids of what is asked, its last `longest` ones, and of what should be answered."""
    ids, (begin, end) = example.input_ids, example.last_answer
    if not end:
        end = int(np.flatnonzero(example.supervised)[-1]) + 1
        begin = end // 2
    return ids[max(0, begin - longest) : begin], ids[begin:end]
