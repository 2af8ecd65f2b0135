"""`backhand evaluate`: loss, perplexity, exact match and labels on rows, of the base model and of the adapted one.

    loss        = Σ nats / supervised tokens,   perplexity = e^loss
    exact match = share of rows whose stripped greedy completion equals the row's last completion
    labels      = the most probable label of each row, if every row answers with one of a few labels (`label_scores`)

In a chat, the last completion is everything that the template writes for the last reply. For most correct rows the
losses already prove the exact match (`certain_replies`). Only the other rows are decoded.

With `--reward`, `evaluate_rewards` measures the rewards of the model's answers instead.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from backhand.bounds import check_kind
from backhand.data.documents import RowRenderer
from backhand.data.examples import Example, check_vocabulary
from backhand.data.options import DataOptions
from backhand.data.prepare import check_first_rows, prepare
from backhand.data.row_encoder import Prompt
from backhand.data.rows import NUMBER, Purpose
from backhand.data.stored_examples import count_sources
from backhand.errors import CheckError, DataError, UsageError, not_none
from backhand.generation.completer import EngineCompleter, complete_greedily
from backhand.generation.labels import (
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
from backhand.generation.loading import LoadedModel, loaded_model
from backhand.loop.certain_replies import certain_replies
from backhand.loop.class_scores import ClassScores
from backhand.loop.classify import evaluate_classes, print_classes
from backhand.loop.decide import evaluate_decisions, print_decisions
from backhand.loop.decision_scores import DecisionScore
from backhand.loop.embed import VectorEvaluation, evaluate_vectors, print_vectors
from backhand.loop.label_scores import LabelScore, label_score, print_labels
from backhand.loop.measuring import HeldOut
from backhand.loop.rank import evaluate_rankings
from backhand.loop.retrieval_scores import scores_text
from backhand.objective.registry import part
from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions
from backhand.printing import counting, in_rounds
from backhand.runs.label_results import Accuracies, constant_answer, verdict_words
from backhand.runs.pair_results import pair_clauses
from backhand.runs.row_changes import (
    as_loss,
    loss_change,
    loss_words,
    main_score,
    right_words,
    score_words,
    share_gain,
)
from backhand.terminal import console_for_tables, table_of, working
from backhand.words import (
    capitalized,
    count_of,
    interval_text,
    label_text,
    name_list,
    share_interval,
    short_repr,
    shorten,
    show_notes,
)


@dataclass(frozen=True)
class Score:
    """The scores of one model on the rows. For pairs, all but `pairs` is about the chosen answers."""

    loss: float  # mean nats per supervised token
    perplexity: float | None  # e^loss, if the loss is that of tokens; None for other losses
    exact_match: float | None  # share of exactly correct completions; None for plain text or if not requested
    supervised_tokens: int  # number of tokens in the mean of the loss
    labels: LabelScore | None = None  # None if the rows have no labels
    exact_match_interval: tuple[float, float] | None = None  # 95 % interval of `exact_match`, or None without it
    # None if the rows are no pairs. Otherwise the mean log-probabilities of the chosen and rejected answers and, for an
    # adapted model, the rewards relative to the base. The keys are TRL's names.
    pairs: dict[str, float] | None = None
    pairs_interval: tuple[float, float] | None = None  # 95 % interval of the share of pairs that are ordered rightly
    # by question; None unless the adapter decides. The loss is then the mean loss of an answer
    decisions: dict[str, DecisionScore] | None = None
    # scores of rankings, see `loop.ranking_scores`; None for other rows, and for an encoder without a score head. The
    # loss is then the mean loss of a row
    retrieval: dict[str, Any] | None = None
    # None unless the adapter has a classification head. The loss is then the mean loss of a row, and base is the best
    # constant answer
    classes: ClassScores | None = None
    # nats and number of supervised tokens of each row, by its place; empty if the loss is not that of tokens
    row_losses: dict[str, tuple[float, int]] = field(default_factory=dict, repr=False)
    row_matches: tuple[bool, ...] = field(default=(), repr=False)  # `exact_match` of each row

    def __repr__(self) -> str:
        return short_repr(self, [one.name for one in fields(self) if one.repr])

    def compared_with(self, base: Score) -> Score:
        """Return these scores with their gains over those of the base model on the same rows."""
        before = base.decisions or {}
        decisions = {name: one.compared_with(before.get(name)) for name, one in (self.decisions or {}).items()}
        return replace(
            self,
            labels=self.labels and self.labels.compared_with(base.labels),
            classes=self.classes and self.classes.compared_with(base.classes),
            decisions=decisions or None,
        )


@dataclass(frozen=True)
class Evaluation:
    """The scores of the base model and of the adapted model on the same rows."""

    rows: int  # number of rows
    base: Score
    adapted: Score | None = None  # None without an adapter
    undesirable: int = field(default=0, kw_only=True)  # number of answers left out as they are labelled undesirable

    @property
    def exact_match_gain(self) -> tuple[float, float, float] | None:
        """Gain in exact match by the adapter and the ends of its 95 % interval; None if not measured."""
        if self.adapted is None or not self.base.row_matches:
            return None
        return share_gain(self.base.row_matches, self.adapted.row_matches)

    @property
    def loss_change(self) -> tuple[float, float, float] | None:
        """Change of the loss by the adapter and the ends of its 95 % interval; None if not measured on several rows."""
        classes = None if self.adapted is None else self.adapted.classes
        if classes is not None and classes.problem_type == NUMBER and classes.gain is not None:
            return as_loss(classes.gain)
        if self.adapted is None or len(self.base.row_losses) < 2:
            return None
        pairs = [(self.base.row_losses[place], after) for place, after in self.adapted.row_losses.items()]
        base, adapted, tokens = zip(*((before, nats, count) for (before, _), (nats, count) in pairs), strict=True)
        return loss_change(base, adapted, tokens)

    def as_dict(self) -> dict[str, Any]:
        """Return what `evaluate --json` prints, without labels, pairs, decisions and rankings if there are none."""
        adapted = None if self.adapted is None else _json_values(self.adapted)
        values = {"rows": self.rows, "base": _json_values(self.base), "adapted": adapted}
        if self.undesirable:
            values["undesirable"] = self.undesirable
        if self.loss_change is not None:
            values["loss_change"], *values["loss_change_interval"] = self.loss_change
        if self.exact_match_gain is not None:
            values["exact_match_gain"], *values["exact_match_gain_interval"] = self.exact_match_gain
        return values


def _json_values(score: Score) -> dict[str, Any]:
    """Return scores as JSON values without the parts that they lack."""
    values = asdict(score)
    del values["row_losses"], values["row_matches"]
    for name in ("labels", "classes"):
        if (one := getattr(score, name)) is not None:
            values[name] = one.to_json()
    if score.decisions is not None:
        values["decisions"] = {name: one.to_json() for name, one in score.decisions.items()}
    optional = ("perplexity", "labels", "pairs", "pairs_interval", "decisions", "retrieval", "classes")
    return {name: value for name, value in values.items() if value is not None or name not in optional}


@dataclass(frozen=True)
class EvaluationRows:
    """The same rows in two forms: documents with supervised tokens, and prompts with their expected replies."""

    held_out: HeldOut
    rows: int  # number of rows
    prompts: tuple[Prompt, ...]  # one for each row that ends in a reply
    notes: tuple[str, ...] = ()  # one sentence for each part of the rows that is not measured
    pairs: tuple[Example, ...] = ()  # the rows if they are pairs, else empty
    labels: Labels = field(default_factory=dict)  # the labels of all replies; empty if the replies are no labels
    undesirable: int = 0  # number of rows that are left out because their answer is labelled undesirable


def evaluation_rows(data: DataOptions, loaded: LoadedModel, run: EvaluateRunOptions) -> EvaluationRows:
    """Read the rows once for all measurements.

    Raises:
        UsageError, DataError: see `data.prepare`. DataError also for a token that the model does not have.
    """
    # every given row is evaluated and none held out
    data = replace(data, eval_data=(), eval_fraction=0.0, chat_template=loaded.template.chat_template)
    all_prompts: list[Prompt] = []
    prompts_of_rows = all_prompts if run.completions else None
    purpose: Purpose | None = "labelled" if loaded.objective == "kto" else None
    try:
        examples, _ = prepare(data, loaded.tokenizer, purpose=purpose, prompts=prompts_of_rows, recorded=loaded.columns)
    except DataError as error:
        if loaded.objective == "grpo":
            error.next_step = "rows of prompts only: measure the model's own answers with --reward FILE.py:FUNCTION"
        elif loaded.objective == "bake" and error.next_step and "--as-rows" in error.next_step:
            error.next_step = (
                "add a column with the right answers and name it (--completion COLUMN), or write the teacher's answers "
                "with the base model first: backhand generate --data FILE --context CONTEXT --as-rows"
            )
        raise
    undesirable = {example.source for example in examples.examples if example.desirable is False}
    all_prompts = [prompt for prompt in all_prompts if prompt.source not in undesirable]
    prompts = tuple(prompt for prompt in all_prompts if prompt.reply is not None)
    vocab_size = loaded.model.vocab_size
    prompt_ids = ((prompt.input_ids, prompt.source) for prompt in prompts)
    check_vocabulary(chain(examples.examples.beyond(vocab_size), prompt_ids), vocab_size, loaded.tokenizer)
    notes = [*examples.report.left_out(), *examples.report.notes]
    if without_reply := len(all_prompts) - len(prompts):
        notes.append(f"{count_of(without_reply, 'row')} without a reply at the end: no exact match, the loss alone")
    rows = count_sources(examples.examples) - len(undesirable)
    if undesirable:
        are = "is" if len(undesirable) == 1 else "are"
        notes.append(f"{count_of(len(undesirable), 'answer')} labelled undesirable {are} left out")
    if not rows:
        raise DataError(
            "every answer is labelled undesirable",
            where=examples.report.sources[0].source,
            why="loss and exact match are those of desirable answers",
            next_step="give rows with desirable answers",
        )
    pairs = tuple(example for example in examples.examples if example.rejected is not None)
    answers = [replace(one, rejected=None) for one in examples.examples if one.desirable is not False]
    held_out = HeldOut(answers, run.micro_batch_rows)
    labels = {} if pairs else _labels(run.labels, data, loaded, answers, prompts)
    return EvaluationRows(held_out, rows, prompts, tuple(notes), pairs, labels, len(undesirable))


def _labels(
    names: Sequence[str], data: DataOptions, loaded: LoadedModel, examples: Sequence[Example], prompts: Sequence[Prompt]
) -> Labels:
    """Return the labels of the replies, or an empty mapping if the replies are not evaluated as labels.

    Raises:
        UsageError: the model cannot answer with a label.
        DataError: labels are requested, but a row's reply is no label, or the context has no room for one.
    """
    if tuple(names) == (NONE,) or not prompts:
        return {}
    named = () if tuple(names) == (AUTO,) else names

    def unlabelled(known: Collection[str]) -> Prompt | None:
        return next((prompt for prompt in prompts if (prompt.reply or "").strip() not in known), None)

    if named and (other := unlabelled(frozenset(named))):
        raise _no_label(other, named)
    labels_of_rows = found_labels(examples, loaded.tokenizer, loaded.stop_ids, named)
    if named:
        known_labels = {**labels_of_rows, **loaded.labels}
        candidates = [named_labels(names, known_labels, lambda: RowRenderer(loaded.tokenizer, data))]
        check_labels(candidates[0], loaded.model)
    else:
        candidates = [loaded.labels, labels_of_rows]
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
        why=f"the labels are {name_list(map(label_text, labels))}" if labels else RULE,
        next_step="name every label (--labels A,B,…), or leave --labels out",
    )


def score(
    loaded: LoadedModel, rows: EvaluationRows, run: EvaluateRunOptions, *, adapter: bool, answered: int = 64
) -> Score:
    """Measure one model on the rows.

    Args:
        rows: from `evaluation_rows` of the same model.
        answered: number of prompts per batch of completions.

    Raises:
        CheckError: the loss is not finite.
    """
    loaded.model.use_adapter(adapter)
    who = "adapted model" if adapter else "base model"
    row_losses, certain = _losses(loaded, rows, run.max_new_tokens, who)
    nats = math.fsum(of_row for of_row, _ in row_losses.values()) / rows.held_out.supervised_tokens
    if not math.isfinite(nats):
        raise CheckError(
            f"the loss of the {who} on these rows is {nats}",
            why="the model computes NaN or infinity",
            next_step="try --dtype float32, or train the adapter again with a lower --learning-rate"
            if adapter
            else "try --dtype float32, or load the model again from its source",
        )
    labels: LabelScore | None = None
    matches: list[bool] = []
    if rows.prompts:
        open_prompts = [prompt for prompt, sure in zip(rows.prompts, certain, strict=True) if not sure]
        if rows.labels:
            matches, labels = _judged(loaded, rows, run, open_prompts, answered, who)
        else:
            decoded = iter(exact_matches(loaded, open_prompts, run.max_new_tokens, answered, who))
            matches = [sure or next(decoded) for sure in certain]
    exact_match = sum(matches) / len(matches) if matches else None
    interval = None if exact_match is None else share_interval(exact_match, len(matches))
    return Score(
        *(nats, _perplexity(nats), exact_match, rows.held_out.supervised_tokens, labels, interval),
        row_losses=row_losses,
        row_matches=tuple(matches),
    )


_EXTRA_TOKENS = 8
"""Number of tokens that a free answer may be longer than the longest label, so that an invented answer is readable."""


def _judged(
    loaded: LoadedModel,
    rows: EvaluationRows,
    run: EvaluateRunOptions,
    open_prompts: Sequence[Prompt],
    answered: int,
    who: str,
) -> tuple[list[bool], LabelScore]:
    """Return True for each free answer that is exactly right, and the label scores.

    Only `open_prompts` need decoding.
    """
    longest = max(map(len, rows.labels.values())) + _EXTRA_TOKENS
    with counting(f"{who}: answers", len(open_prompts)) as done:
        completions = complete_greedily(
            loaded.model,
            [prompt.input_ids.tolist() for prompt in open_prompts],
            max_new_tokens=min(longest, run.max_new_tokens),
            stop_ids=loaded.stop_ids,
            batch_size=answered,
            on_done=done,
        )
    right = [(prompt.reply or "").strip() for prompt in rows.prompts]
    decoded = {id(one): _text(loaded, ids).strip() for one, ids in zip(open_prompts, completions, strict=True)}
    free = [decoded.get(id(one), reply) for one, reply in zip(rows.prompts, right, strict=True)]
    prompts = [prompt.input_ids.tolist() for prompt in rows.prompts]
    with counting(f"{who}: labels", len(prompts)) as done:
        log_p = label_log_probabilities(
            *(loaded.model, prompts, rows.labels), batch_rows=run.micro_batch_rows, on_done=done
        )
    names = list(rows.labels)
    score = label_score(right, [names[label] for label in log_p.argmax(1).tolist()], names, free)
    return [one == reply for one, reply in zip(free, right, strict=True)], score


def _losses(
    loaded: LoadedModel, rows: EvaluationRows, max_new_tokens: int, who: str
) -> tuple[dict[str, tuple[float, int]], list[bool]]:
    """Return `Score.row_losses` and, per prompt, whether greedy decoding certainly gives its reply."""
    by_source = defaultdict[str, list[tuple[Example, Tensor]]](list)
    with counting(f"{who}: losses", rows.rows) as done:
        for example, losses in rows.held_out.token_losses(loaded.model):
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
    row_losses = {}
    for source, documents in by_source.items():
        of_row = [losses for _, losses in documents]
        row_losses[source] = float(sum(one.sum(dtype=torch.float64) for one in of_row)), sum(map(len, of_row))
    return row_losses, certain


def _text(loaded: LoadedModel, ids: Sequence[int]) -> str:
    return str(loaded.tokenizer.decode(ids, skip_special_tokens=True))


def exact_matches(
    loaded: LoadedModel, prompts: Sequence[Prompt], max_new_tokens: int, at_once: int = 64, who: str = "model"
) -> list[bool]:
    """Return True for each prompt whose greedy completion is exactly the reply.

    Args:
        at_once: number of prompts per batch.
        who: name of the model in the progress line.
    """
    replies = [(prompt.reply or "").strip() for prompt in prompts]

    def already_wrong(number: int, ids: Sequence[int]) -> bool:
        # If the last token is a part of a character, the decoded text ends with a replacement character.
        return not replies[number].startswith(_text(loaded, ids).rstrip("\ufffd").strip())

    # A tokenizer that cleans up spaces may change decoded text when more tokens follow. A prefix then proves nothing.
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
    return [_text(loaded, ids).strip() == reply for ids, reply in zip(completions, replies, strict=True)]


def evaluate(options: EvaluateOptions) -> Evaluation | VectorEvaluation:
    """Evaluate the base model and, if an adapter is given, the adapted model.

    Returns:
        the scores of vectors with `vectors` or with an adapter that was trained to embed, otherwise those of answers.

    Raises:
        UsageError, DataError, ArtifactError: an option, the rows, the model or the adapter cannot be used.
    """
    check_kind("options", options, EvaluateOptions)
    options.validate()
    run, data = options.run, options.data
    if data.state is None and run.adapter is None and not run.rankings:
        check_first_rows(data, "embeddings" if run.vectors else None)  # the record of an adapter may name the columns
    with loaded_model(options.model, run.adapter, template=data, takes_heads=not run.vectors) as loaded:
        asked = [name for name, given in (("embed", run.vectors), ("rank", run.rankings)) if given]
        show_notes([*loaded.notes, *(note for command in asked for note in loaded.purpose_notes(command))])
        if run.vectors or (loaded.embedding and not run.rankings):
            return evaluate_vectors(loaded, data, run)
        run.refuse_vector_options()
        ranks = bool(loaded.ranking) or run.rankings
        if loaded.classification and not ranks:
            count, of_classes = evaluate_classes(loaded, data, run.micro_batch_rows)
            scored = (Score(loss, None, None, count, classes=one) for loss, one in of_classes)
            return Evaluation(count, *_compared(*scored))
        if loaded.decisions:
            count, results = evaluate_decisions(loaded, data, run.micro_batch_rows)
            return Evaluation(count, *_compared(*(_of_decisions(*result) for result in results)))
        if ranks:
            count, ranked = evaluate_rankings(
                *(loaded, data, data, data, run.micro_batch_rows), adapted=run.adapter is not None
            )
            return Evaluation(count, *(_of_rankings(*result) for result in ranked))
        if isinstance(loaded.model, EngineCompleter) and not loaded.model.decoder.config.has_head:
            raise UsageError(
                "this model has no head, so there is nothing to evaluate",
                where="model",
                why="it computes vectors of texts",
                next_step="give an adapter with a head: --adapter DIRECTORY; or measure the vectors with --vectors",
            )
        rows = evaluation_rows(data, loaded, run)
        show_notes(rows.notes)
        of_pairs = 4.0 if rows.pairs else 0.0  # two answers of each row by two models
        costs = (1.0,) if run.adapter is None else (1.0, 1.0 + of_pairs)
        with in_rounds((False, True)[: len(costs)], costs) as models:
            scores = [score(loaded, rows, run, adapter=adapter) for adapter in models]
            if rows.pairs:
                scores = part("backhand.objectives.pairs.evaluation:compared")(loaded, rows, run, scores)
    return Evaluation(rows.rows, *_compared(*scores), undesirable=rows.undesirable)


def _compared(base: Score, adapted: Score | None = None) -> tuple[Score, Score | None]:
    return base, adapted and adapted.compared_with(base)


def _of_decisions(loss: float, answers: int, scores: dict[str, DecisionScore]) -> Score:
    return Score(loss, None, None, answers, decisions=scores)


def _of_rankings(loss: float, documents: int, scores: dict[str, Any] | None) -> Score:
    return Score(loss, None, None, documents, retrieval=scores)


def _perplexity(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf  # a float64 cannot hold it


def evaluate_command(options: EvaluateOptions) -> Any:
    """Run `evaluate` and print a table, or one JSON object with `json`; or measure rewards instead."""
    if options.run.reward:
        return part("backhand.objectives.rewards.evaluation:evaluate_rewards_command")(options.validate())
    with working("evaluating"):
        result = evaluate(options)
    if options.run.json:
        sys.stdout.write(json.dumps(result.as_dict()) + "\n")
        return result
    if isinstance(result, VectorEvaluation):
        print_vectors(result)
        return result
    if result.adapted is not None and result.base.classes and result.adapted.classes:
        print_classes({"constant answer": result.base.classes, "adapted": result.adapted.classes})
        return result
    labelled = ("accuracy", "macro F1", "invented") if result.base.labels else ()
    base = result.base
    of_what, parts = ("answer", "answers") if base.decisions else ("token", "supervised tokens")
    ranked = base.retrieval or (result.adapted and result.adapted.retrieval)
    base_name = "base (equal scores)" if ranked and not base.retrieval else "base"  # an encoder without a score head
    of_what, parts = ("row", "documents") if ranked else (of_what, parts)
    of_tokens = ("perplexity",) if base.perplexity is not None else ()
    matches = ("exact match",) if base.exact_match is not None else ()
    columns = (
        f"loss (nats per {of_what})",
        *of_tokens,
        *matches,
        *labelled,
    )
    title = f"{count_of(result.rows, 'row')}, {base.supervised_tokens:,} {parts}"
    shown = table_of("model", *columns, right=columns, title=title)
    measured = [(name, one) for name, one in ((base_name, base), ("adapted", result.adapted)) if one]
    for name, one in measured:
        perplexity = () if one.perplexity is None else (f"{one.perplexity:.3f}",)
        match = () if one.exact_match is None else (f"{one.exact_match:.1%}",)
        labels = one.labels
        of_labels = (f"{labels.accuracy:.1%}", f"{labels.f1_macro:.3f}", f"{labels.invented:,}") if labels else ()
        shown.add_row(name, f"{one.loss:.4f}", *perplexity, *match, *of_labels)
    console_for_tables().print(shown)
    for name, one in measured:
        shares = {"exact match": one.exact_match, "accuracy": None if one.labels is None else one.labels.accuracy}
        known = [f"{what} {interval_text(share, result.rows)}" for what, share in shares.items() if share is not None]
        if known:
            console_for_tables().print(f"{name}: {', '.join(known)}", soft_wrap=True)
    if (change := result.loss_change) is not None:
        console_for_tables().print(loss_words(change, "nats per token"), soft_wrap=True)
    if (gain := result.exact_match_gain) is not None and (base.exact_match or gain[0]):
        console_for_tables().print(f"exactly {right_words(gain, 'the base model')}", soft_wrap=True)
    name, last = measured[-1]
    if last.labels:
        print_labels(name, last.labels)
        before = None if last is base else base.labels
        line = constant_answer(last.labels.per_label)
        if before is not None:
            figures, majority = last.labels.to_json(), last.labels.majority
            line += f": {verdict_words(Accuracies.of(before.accuracy, figures, majority, result.rows))}"
        console_for_tables().print(capitalized(line), soft_wrap=True)
    for name, one in measured:
        for clause in _pair_clauses(result) if one is last and one.pairs else ():
            console_for_tables().print(capitalized(clause), soft_wrap=True)
        if one.retrieval is not None:
            console_for_tables().print(f"{name}: {scores_text(one.retrieval)}", soft_wrap=True)
            if one is not base and (main := main_score(one.retrieval)) is not None:
                words = score_words(base.retrieval or {}, one.retrieval, main)
                console_for_tables().print(words, soft_wrap=True)
            if one is last:
                loss = one.retrieval["chance"]["loss"]
                console_for_tables().print(f"The best equal scores have a loss of {loss:.4f}", soft_wrap=True)
        if one.decisions is not None:
            print_decisions(name, one.decisions)
    return result


def _pair_clauses(result: Evaluation) -> list[str]:
    """Return clauses about the pairs, in the words of the end of a run; without an adapter, only probabilities."""
    before, after = not_none(result.base.pairs), result.adapted and result.adapted.pairs
    if not after:
        chosen, rejected = (f"{before[f'logps/{side}']:.3f}" for side in ("chosen", "rejected"))
        return [f"the log-probability of chosen answers is {chosen} nats per answer, that of rejected ones {rejected}"]
    figures = after | {f"{name}_before": value for name, value in before.items()}
    return pair_clauses(figures, result.rows, "dpo", None)
