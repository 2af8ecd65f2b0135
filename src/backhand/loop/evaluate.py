"""`backhand evaluate`: loss, perplexity, exact match and labels on rows, of the base model and of the adapted one.

loss        = Σ nats / supervised tokens,   perplexity = e^loss
exact match = share of rows whose greedy completion, stripped, equals the row's last completion, which of a chat is all
              that the template writes of the last reply; the losses tell it of most rows that are right
              (`certain_replies`), only the others are decoded
labels      = the most probable of a few, where these are all that rows answer (`label_scores`)

With `--reward` it is what reward functions say of a model's answers, before training and after it.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from backhand.bounds import check_kind
from backhand.data.documents import RowRenderer
from backhand.data.examples import Example, check_vocabulary
from backhand.data.options import DataOptions
from backhand.data.packing import RowPacker
from backhand.data.prepare import Prompt, check_first_rows, prepare
from backhand.distributed.communicator import Communicator
from backhand.errors import CheckError, DataError, not_none
from backhand.generate.completer import complete_greedily
from backhand.generate.labels import (
    AUTO,
    NONE,
    RULE,
    Labels,
    check_labels,
    found_labels,
    label_log_probabilities,
    longest_label,
    named_labels,
)
from backhand.generate.loading import LoadedModel, loaded_model
from backhand.loop.certain_replies import certain_replies
from backhand.loop.evaluate_rewards import evaluate_rewards_command
from backhand.loop.label_scores import LabelScore, label_score, print_labels
from backhand.loop.measuring import HeldOut
from backhand.loop.objectives.compared import PairObjective
from backhand.loop.objectives.objective import document_sums, means
from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions
from backhand.options.objectives import ObjectiveOptions
from backhand.printing import counting, going_on
from backhand.terminal import console_for_tables, table_of, working
from backhand.words import count_of, name_list, shorten, show_notes


@dataclass(frozen=True)
class Score:
    """How well a model does on the rows."""

    loss: float  # mean nats per supervised token
    perplexity: float  # e^loss
    exact_match: float | None  # share of completions that are exactly right; None for plain text, or when not asked for
    supervised_tokens: int  # over which the loss is the mean
    labels: LabelScore | None = None  # of rows that answer with labels; None elsewhere
    # of rows that are pairs, whose chosen answers the rest is about: mean log-probabilities of both sides' answers, and
    # of an adapted model the rewards against the base, under TRL's names; None elsewhere
    pairs: dict[str, float] | None = None


@dataclass(frozen=True)
class Evaluation:
    """The rows that were measured, and the scores of the base and, if an adapter was given, of the adapted model."""

    rows: int
    base: Score
    adapted: Score | None


@dataclass(frozen=True)
class EvaluationRows:
    """The same rows twice: as documents with supervised tokens, and as prompts with the replies they should get."""

    held_out: HeldOut
    rows: int  # how many rows they were made from
    prompts: tuple[Prompt, ...]  # of the rows that end in a reply
    notes: tuple[str, ...] = ()  # what of the rows is not measured, a sentence each
    pairs: tuple[Example, ...] = ()  # the rows, where they are pairs
    # that all prompts are answered with; nothing where these are no labels
    labels: Labels = field(default_factory=dict)


def evaluation_rows(data: DataOptions, loaded: LoadedModel, run: EvaluateRunOptions) -> EvaluationRows:
    """Read the rows once for everything that is measured on them.

    Raises:
        UsageError, DataError: as `data.prepare`; DataError also for a token that the model does not have.
    """
    # Every row that is named is evaluated: what would hold rows out of training does not apply here.
    data = replace(data, eval_data=(), eval_fraction=0.0)
    found: list[Prompt] = []
    examples, _ = prepare(data, loaded.tokenizer, purpose=None, prompts=found if run.completions else None)
    prompts = tuple(prompt for prompt in found if prompt.reply is not None)
    vocab_size = loaded.model.vocab_size
    asked = ((prompt.input_ids, prompt.source) for prompt in prompts)
    check_vocabulary(chain(examples.examples.beyond(vocab_size), asked), vocab_size, loaded.tokenizer)
    notes = examples.report.left_out()
    if unasked := len(found) - len(prompts):
        notes.append(f"{count_of(unasked, 'row')} without a reply at the end: no exact match, the loss alone")
    rows = len(np.unique(examples.examples.column("source_digest")))
    pairs = tuple(example for example in examples.examples if example.rejected is not None)
    answers = [replace(example, rejected=None) for example in examples.examples]
    held_out = HeldOut(answers, run.micro_batch_rows)
    labels = {} if pairs else _labels(run.labels, data, loaded, answers, prompts)
    return EvaluationRows(held_out, rows, prompts, tuple(notes), pairs, labels)


def _labels(
    names: Sequence[str], data: DataOptions, loaded: LoadedModel, examples: Sequence[Example], prompts: Sequence[Prompt]
) -> Labels:
    """Return the labels to judge by, empty if answers are not judged as labels.

    Raises:
        UsageError: the model cannot answer with a label.
        DataError: labels are asked for, and a row does not answer with one, or has no room for one.
    """
    if tuple(names) == (NONE,) or not prompts:
        return {}
    named = () if tuple(names) == (AUTO,) else names

    def unlabelled(known: Collection[str]) -> Prompt | None:
        return next((prompt for prompt in prompts if (prompt.reply or "").strip() not in known), None)

    if named and (other := unlabelled(frozenset(named))):
        raise _no_label(other, named)
    found = found_labels(examples, loaded.tokenizer, loaded.stop_ids, named)
    if named:
        candidates = [named_labels(names, {**found, **loaded.labels}, lambda: RowRenderer(loaded.tokenizer, data))]
        check_labels(candidates[0], loaded.model)
    else:
        candidates = [loaded.labels, found]
    other = None
    for labels in filter(None, candidates):
        if (other := unlabelled(labels)) is not None:
            continue
        context, longest = loaded.model.context_tokens, longest_label(labels)
        long = next((prompt for prompt in prompts if len(prompt.input_ids) + longest > context), None)
        if long is None:
            return labels
        if names:
            raise DataError(
                f"the prompt has {len(long.input_ids):,} tokens, a label {longest:,}, and the model takes {context:,}",
                where=long.source,
                next_step="shorten the row, or leave it out",
            )
    if not names:
        return {}
    raise _no_label(other, tuple(candidates[0]))


def _no_label(other: Prompt | None, labels: Sequence[str]) -> DataError:
    return DataError(
        "the rows have no labels" if other is None else f"the answer {shorten(other.reply or '')!r} is no label",
        where="labels" if other is None else other.source,
        why=f"the labels are {name_list(map(shorten, labels))}" if labels else RULE,
        next_step="name all that rows answer with (--labels A,B,…), or leave --labels out",
    )


def compared(
    loaded: LoadedModel, rows: EvaluationRows, run: EvaluateRunOptions, scores: Sequence[Score]
) -> list[Score]:
    """The scores of the base and, perhaps, of the adapted model with what the two say of pairs."""
    packer = RowPacker(rows.pairs, share_prefixes=loaded.model.shares_prefixes)
    with_pairs: list[Score] = []
    reference: Tensor | None = None
    for number, one in enumerate(scores):
        loaded.model.use_adapter(bool(number))
        every = range(len(rows.pairs))
        sums = not_none(document_sums(loaded.model, packer, every, run.micro_batch_rows, Communicator()))
        objective = PairObjective(packer, sums if reference is None else reference, options=ObjectiveOptions("dpo"))
        measured = means([objective.of_sums(every, sums).measured])
        shown = {name: value for name, value in measured.items() if number or name.startswith("logps/")}
        with_pairs.append(replace(one, pairs=shown))
        reference = sums if reference is None else reference
    return with_pairs


def score(
    loaded: LoadedModel, rows: EvaluationRows, run: EvaluateRunOptions, *, adapter: bool, answered: int = 64
) -> Score:
    """Measure one model on the rows.

    Args:
        rows: from `evaluation_rows` of the same model.
        answered: rows answered at once.

    Raises:
        CheckError: the loss is not finite.
    """
    loaded.model.use_adapter(adapter)
    who = "adapted model" if adapter else "base model"
    nats, certain = _losses(loaded, rows, run.max_new_tokens, who)
    if not math.isfinite(nats):
        raise CheckError(
            f"the loss of the {who} on these rows is {nats}",
            why="the model computes NaN or infinity",
            next_step="try --dtype float32, or train the adapter again with a lower --learning-rate"
            if adapter
            else "try --dtype float32, or load the model again from its source",
        )
    exact_match = labels = None
    if rows.prompts:
        open_prompts = [prompt for prompt, sure in zip(rows.prompts, certain, strict=True) if not sure]
        if rows.labels:
            exact_match, labels = _judged(loaded, rows, run, open_prompts, answered, who)
        else:
            right = sum(certain) + exact_matches(loaded, open_prompts, run.max_new_tokens, answered, who)
            exact_match = right / len(rows.prompts)
    try:
        perplexity = math.exp(nats)
    except OverflowError:
        perplexity = math.inf  # a float64 cannot hold it
    return Score(nats, perplexity, exact_match, rows.held_out.supervised_tokens, labels)


_BEHIND_LABELS = 8
"""Tokens of a free answer that may follow where the longest label ends, so that people see what was invented."""


def _judged(
    loaded: LoadedModel,
    rows: EvaluationRows,
    run: EvaluateRunOptions,
    open_prompts: Sequence[Prompt],
    answered: int,
    who: str,
) -> tuple[float, LabelScore]:
    """Exact match of free answers, of which those to `open_prompts` have to be decoded, and what labels are given."""
    longest = max(map(len, rows.labels.values())) + _BEHIND_LABELS
    with counting(f"{who}: answers", len(open_prompts)) as done:
        said = complete_greedily(
            loaded.model,
            [prompt.input_ids.tolist() for prompt in open_prompts],
            max_new_tokens=min(longest, run.max_new_tokens),
            stop_ids=loaded.stop_ids,
            batch_size=answered,
            on_done=done,
        )
    right = [(prompt.reply or "").strip() for prompt in rows.prompts]
    decoded = {id(one): _text(loaded, ids).strip() for one, ids in zip(open_prompts, said, strict=True)}
    free = [decoded.get(id(one), reply) for one, reply in zip(rows.prompts, right, strict=True)]
    prompts = [prompt.input_ids.tolist() for prompt in rows.prompts]
    with going_on(f"{who}: labels of {count_of(len(prompts), 'row')}"):
        found = label_log_probabilities(loaded.model, prompts, rows.labels, batch_rows=run.micro_batch_rows)
    names = list(rows.labels)
    score = label_score(right, [names[place] for place in found.argmax(1).tolist()], names, free)
    return sum(one == reply for one, reply in zip(free, right, strict=True)) / len(right), score


def _losses(loaded: LoadedModel, rows: EvaluationRows, max_new_tokens: int, who: str) -> tuple[float, list[bool]]:
    """Mean nats per supervised token, and for each prompt whether its reply surely is what greedy decoding gives."""
    nats = 0.0
    by_source = defaultdict[str, list[tuple[Example, Tensor]]](list)
    with counting(f"{who}: losses", rows.rows) as done:
        for example, losses in rows.held_out.token_losses(loaded.model):
            nats += float(losses.sum(dtype=torch.float64))
            if example.source not in by_source:
                done()
            by_source[example.source].append((example, losses))
    certain = certain_replies(
        by_source,
        rows.prompts,
        text=lambda ids: _text(loaded, ids),
        stop_ids=loaded.stop_ids,
        max_new_tokens=max_new_tokens,
    )
    return nats / rows.held_out.supervised_tokens, certain


def _text(loaded: LoadedModel, ids: Sequence[int]) -> str:
    return str(loaded.tokenizer.decode(ids, skip_special_tokens=True))


def exact_matches(
    loaded: LoadedModel, prompts: Sequence[Prompt], max_new_tokens: int, at_once: int = 64, who: str = "model"
) -> int:
    """How many of the prompts, so many of them at once, the model completes greedily with exactly the reply."""
    replies = [(prompt.reply or "").strip() for prompt in prompts]

    def already_wrong(number: int, ids: Sequence[int]) -> bool:
        # The last token may be part of a character, which then shows as a replacement.
        return not replies[number].startswith(_text(loaded, ids).rstrip("\ufffd").strip())

    # A tokenizer that tidies spaces may change what it has decoded when more follows.
    tidies = getattr(loaded.tokenizer, "clean_up_tokenization_spaces", False)
    with counting(f"{who}: answers", len(prompts)) as done:
        completions = complete_greedily(
            loaded.model,
            [prompt.input_ids.tolist() for prompt in prompts],
            max_new_tokens=max_new_tokens,
            stop_ids=loaded.stop_ids,
            batch_size=at_once,
            on_done=done,
            give_up=None if tidies else already_wrong,
        )
    return sum(_text(loaded, ids).strip() == reply for ids, reply in zip(completions, replies, strict=True))


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Measure the base model, and the adapted one if there is an adapter.

    Raises:
        UsageError, DataError, ArtifactError: each says what to do.
    """
    check_kind("options", options, EvaluateOptions)
    options.validate()
    run, data = options.run, options.data
    check_first_rows(data)
    with loaded_model(options.model, run.adapter, template=data) as loaded:
        show_notes(loaded.notes)
        rows = evaluation_rows(data, loaded, run)
        show_notes(rows.notes)
        models = (False,) if run.adapter is None else (False, True)
        scores = [score(loaded, rows, run, adapter=adapter) for adapter in models]
        base, *adapted = compared(loaded, rows, run, scores) if rows.pairs else scores
    return Evaluation(rows.rows, base, adapted[0] if adapted else None)


def evaluate_command(options: EvaluateOptions) -> Evaluation | Sequence[dict[str, float]]:
    """`evaluate`, printed as a table, or as one JSON object with `json`; with `reward` what answers are worth."""
    if options.run.reward:
        return evaluate_rewards_command(options.validate())
    with working("evaluating"):
        result = evaluate(options)
    if options.run.json:
        told = asdict(result)
        for found in filter(None, (told["base"], told["adapted"])):
            for name in ("labels", "pairs"):
                if found[name] is None:
                    del found[name]
        sys.stdout.write(json.dumps(told) + "\n")
        return result
    labelled = ("accuracy", "macro F1", "invented") if result.base.labels else ()
    columns = ("loss (nats per token)", "perplexity", "exact match", *labelled)
    title = f"{result.rows:,} rows, {result.base.supervised_tokens:,} supervised tokens"
    shown = table_of("model", *columns, right=columns, title=title)
    measured = [(name, found) for name, found in (("base", result.base), ("adapted", result.adapted)) if found]
    for name, found in measured:
        match = "" if found.exact_match is None else f"{found.exact_match:.1%}"
        judged = found.labels
        of_labels = (f"{judged.accuracy:.1%}", f"{judged.f1_macro:.3f}", f"{judged.invented:,}") if judged else ()
        shown.add_row(name, f"{found.loss:.4f}", f"{found.perplexity:.3f}", match, *of_labels)
    console_for_tables().print(shown)
    if judged := measured[-1][1].labels:
        print_labels(measured[-1][0], judged)
    for name, found in measured:
        if found.pairs is not None:
            said = ", ".join(f"{what} {value:.4g}" for what, value in found.pairs.items())
            console_for_tables().print(f"pairs, {name}: {said}", soft_wrap=True)
    return result
