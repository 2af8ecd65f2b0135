"""summary.json: the results of a run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from backhand.files import FileLayer
from backhand.reading import read_json
from backhand.runs.directory import METRICS, RunDirectory
from backhand.words import apart, count_of, label_text, name_list, short_repr, shorten


class LabelRow(TypedDict):
    """Scores of one label; `support` is the number of rows that have it.

    Without such rows, recall and F1 are None, and also the precision if no row was given the label.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    support: int


class LabelFigures(TypedDict):
    """Scores of rows whose answers are labels, as `evaluate --json` has them."""

    accuracy: float
    accuracy_interval: NotRequired[tuple[float, float]]  # 95 % interval; missing in older files
    # gains in accuracy over the model before the run and over the most frequent answer, with their 95 % intervals;
    # the model before the run and summaries of earlier versions have none
    gain: NotRequired[tuple[float, float, float]]
    gain_over_constant: NotRequired[tuple[float, float, float]]
    # majority: share of the most frequent label; inventions: the most frequent answers that are no label, with counts.
    # Both are missing in older files
    majority: NotRequired[float]
    f1_macro: float
    per_label: dict[str, LabelRow]
    confusion: dict[str, dict[str, int]]
    invented: int
    inventions: NotRequired[dict[str, int]]


class DecisionFigures(TypedDict):
    """Scores of the answers to one question, as `evaluate --json` has them."""

    rows: int
    accuracy: float
    # accuracy_interval, gain, gain_over_constant: as in `LabelFigures`
    accuracy_interval: NotRequired[tuple[float, float]]
    gain: NotRequired[tuple[float, float, float]]
    gain_over_constant: NotRequired[tuple[float, float, float]]
    # accuracy of always giving `majority_answer`, the most frequent one of the training rows. If it is None, or missing
    # as in older files, that of the most frequent answer of these rows
    majority: float
    majority_answer: NotRequired[str | None]
    f1_macro: float
    nll: float
    brier: float
    ece: float
    ece_interval: tuple[float, float]
    temperature: float
    constant: bool
    reliability: list[dict[str, float]]
    coverage: list[dict[str, float]]
    thresholds: list[dict[str, Any]]
    confusion: dict[str, dict[str, int]]
    surprises: list[dict[str, Any]]
    # share of decisions that change if the options come in a random order; None if it was not measured, missing in
    # older files
    flips: NotRequired[float | None]
    # highest accuracy and lowest NLL that the targets allow, 1 and 0 if every answer is certain; missing in older files
    ceiling: NotRequired[float]
    nll_floor: NotRequired[float]
    # constant_nll: NLL of always giving the shares of the answers in the training rows. nll_change: the difference from
    # it with its interval. ties: number of rows whose two most probable options are equal. Missing in older files
    constant_nll: NotRequired[float]
    nll_change: NotRequired[tuple[float, float, float] | None]
    ties: NotRequired[int]


class AnswerLengths(TypedDict):
    """Mean numbers of tokens of free answers to held-out prompts, and of the answers in these pairs."""

    rows: int  # number of prompts answered
    limit: int  # largest number of tokens of a free answer
    base: float
    adapted: float
    chosen: float
    rejected: float
    # base_cut_off, adapted_cut_off: share of the free answers that reached the limit
    base_cut_off: float
    adapted_cut_off: float
    # start, start_cut_off: figures of the adapter that the run started from, if any
    start: NotRequired[float]
    start_cut_off: NotRequired[float]
    # mean change of the number of tokens of an answer and its 95 % interval over the prompts; None for a single prompt,
    # missing in older files
    length_change: NotRequired[tuple[float, float, float] | None]


class DistilledFigures(TypedDict):
    """Figures of a distilled run on held-out rows. The teacher reads the prompt with a context or a demonstration."""

    tokens: int  # number of tokens in the agreement
    # base_kl, adapted_kl: mean KL(teacher ‖ model) in nats per token
    base_kl: float
    adapted_kl: float
    # base_top_1, adapted_top_1: share of tokens at which model and teacher have the same most probable next token
    base_top_1: float
    adapted_top_1: float
    # its change and the 95 % interval over the rows; None for fewer than two rows, missing in older files
    top_1_gain: NotRequired[tuple[float, float, float] | None]
    rows: int  # number of prompts answered greedily
    # base_equal, adapted_equal: share of answers that equal the teacher's; None if the teacher's answers are long
    base_equal: float | None
    adapted_equal: float | None
    # share of the teacher's sampled answers that reached the limit of tokens; missing if the rows contain the answers
    teacher_cut_off: NotRequired[float]
    # prompt_tokens, prompted_tokens: mean number of tokens before an answer, of the model and of the teacher
    prompt_tokens: float
    prompted_tokens: float
    # first_token_s, prompted_first_token_s: median seconds from the prompt to the first token, of model and teacher
    first_token_s: float
    prompted_first_token_s: float
    # seconds of the model over those of the teacher, in each of several pairs; missing in older files
    first_token_ratios: NotRequired[list[float]]


class NeutralAnswer(TypedDict):
    """Greedy answers to a prompt that is unrelated to the rows."""

    prompt: str
    base: str  # of the model before the run: the base model, or the adapter that the run started from
    adapted: str
    # base_cut_off, adapted_cut_off: True if the answer reached the limit of tokens; missing in older files
    base_cut_off: NotRequired[bool]
    adapted_cut_off: NotRequired[bool]


@dataclass(frozen=True)
class RunSummary:
    """Results of a run. `summary.json` contains these fields; the demo adds further ones."""

    output: str  # the run directory
    adapter: str  # the adapter's directory
    model: str  # name of the base model, as given
    engine: str  # `backhand` or `transformers`
    dtype: str  # the compute dtype
    train_s: float  # seconds spent in training steps
    steps: int  # optimizer steps done
    skipped_steps: int  # steps skipped for a non-finite loss or gradient
    tokens: int  # number trained on
    supervised_tokens: int
    tokens_per_s: float  # tokens / train_s
    # peak_rss_bytes, predicted_rss_bytes: highest memory of the process, and the prediction before the first step. The
    # prediction is None if the process had reached its highest memory before the run: they cannot be compared.
    peak_rss_bytes: int
    predicted_rss_bytes: int | None
    # first_loss, last_loss: loss of the first and last step: mean nats per supervised token, or the objective's per row
    first_loss: float | None
    last_loss: float | None
    # base_eval_loss, best_eval_loss, best_step: held-out loss of the base (of the best constant answer for a new head),
    # lowest one, and its step; None without rows
    base_eval_loss: float | None
    best_eval_loss: float | None
    best_step: int | None
    # trained_parameters, adapted_modules: the adapter's number of parameters and of modules
    trained_parameters: int
    adapted_modules: int
    # rows, held_out_rows: number of documents to train on and held out
    rows: int
    held_out_rows: int
    malformed_rows: int  # rows left out under `skip_bad`
    stopped_because: str | None  # why the run ended before its last step, or None
    # why the decoder engine was not used, at what cost, and how to change that; None if it was used, or transformers
    # was requested
    engine_note: str | None = None
    base: str = "dense"  # or `quantized`
    world_size: int = 1  # processes at the end of the run; peak_rss_bytes is that of one process
    objective: str = "sft"  # value of `--objective`
    trains_head: bool = False  # the adapter has a head on hidden states
    base_file: str | None = None  # GGUF file of the base model, None for a directory
    base_architecture: str | None = ""  # of the base model in GGUF files, see `TrainedAdapter`; empty in older files
    adapter_form: str = "factors"  # in which other programs than PEFT read the adapter, see `TrainedAdapter`
    option_rows: int = 0  # number of `rows` that were added, whose text is the name of an option
    too_long: str | None = None  # clause on rows that were left out because of `max_length`, or None
    repeated_rows: int = 0  # number of held-out rows that also occur in the training data
    rows_seen: int | None = None  # number of different `rows` in the steps done; None in older files
    # held-out loss before the first step; differs from base_eval_loss if the run started from an adapter
    first_eval_loss: float | None = None
    # the figures below named base_… are those of the adapter that the run started from, not of the base model; those of
    # a classification head are always those of the best constant answer
    compared_with_start: bool = False
    # base_exact_match, adapted_exact_match: share of the `exact_match_rows` held-out rows that the base model and the
    # adapter answer exactly right; None if an answer is long, or no rows are held out
    base_exact_match: float | None = None
    adapted_exact_match: float | None = None
    exact_match_rows: int | None = None
    # gain in exact match, and the ends of its 95 % interval over the rows; None in older files
    exact_match_gain: tuple[float, float, float] | None = None
    free_texts: bool = False  # most of these answers are texts that hardly any answer repeats, see `exact_match_says`
    # base_labels, adapted_labels: scores of these rows; None if their answers are not labels
    base_labels: LabelFigures | None = None
    adapted_labels: LabelFigures | None = None
    # base_decisions, adapted_decisions: scores of held-out decisions by question; None for other objectives
    base_decisions: dict[str, DecisionFigures] | None = None
    adapted_decisions: dict[str, DecisionFigures] | None = None
    # base_retrieval, adapted_retrieval: scores of the vectors or rankings of held-out rows, see `loop.retrieval_scores`
    # and `loop.ranking_scores`; None for other objectives. An encoder without a score head has no base_retrieval
    base_retrieval: dict[str, Any] | None = None
    adapted_retrieval: dict[str, Any] | None = None
    # nearest texts of some held-out anchors, as the base model and the adapted one rank them
    neighbours: tuple[dict[str, Any], ...] = ()
    # mean absolute change of the cosines of neutral texts; None for other objectives
    neutral_drift: float | None = None
    # base_classes, adapted_classes: scores of a classification head on held-out rows, see `loop.class_scores`; base is
    # the best constant answer. None for other objectives
    base_classes: dict[str, Any] | None = None
    adapted_classes: dict[str, Any] | None = None
    unlearned_rows: int = 0  # held-out rows with labels that no training row has
    # scores with the adapter, by which runs are compared: 1 for each right and 0 for each wrong answer, nDCG@10 of each
    # query, or minus the squared error of each number. Empty for other rows, and above `row_changes.MOST_RECORDED` rows
    row_scores: tuple[float, ...] = ()
    distilled: DistilledFigures | None = None  # None for other objectives, or if no answers were generated
    evaluations: int = 0  # number of evaluations after the first step, the best of which chose the adapter
    # figures of held-out pairs, see `runs.pair_results`; None for other rows
    held_out_pairs: dict[str, float] | None = None
    same_answer: str | None = None  # free answer to all held-out rows shown, of which the rows' own differ, or None
    free_answers: AnswerLengths | None = None  # of pairs; None for other rows, or if no answers were generated
    # change of the held-out loss per token until the best step, or of the squared error of numbers, and the ends of its
    # 95 % interval over the rows; None for other losses, or on fewer than two rows
    loss_change: tuple[float, float, float] | None = None
    # first_reward, last_reward: mean reward of sampled answers in the first and in the last tenth of the logged steps.
    # base_eval_reward, best_eval_reward: mean reward of greedy answers to held-out prompts. None without rewards
    first_reward: float | None = None
    last_reward: float | None = None
    # last_cut_off: share of these last answers that reached the limit of tokens.
    last_cut_off: float | None = None
    base_eval_reward: float | None = None
    best_eval_reward: float | None = None
    # mean gain in held-out reward per row until the best step, and the ends of its 95 % interval; None if not measured
    reward_gain: tuple[float, float, float] | None = None
    neutral_answers: tuple[NeutralAnswer, ...] = ()  # empty if no answers were generated
    # rise of the loss on neutral texts with the adapter that is kept; None if it was not measured
    forgotten_nats: float | None = None
    # reading, asking: options of `evaluate` for rows of the same columns (None if such rows need no answers), and of
    # `generate` for the same kind of prompt
    reading: str | None = ""
    asking: str = " --prompt '…'"
    system: str | None = None  # system message of all training rows, or None
    labels: tuple[str, ...] = ()  # the labels of the training rows; empty if their answers are not labels
    unmeasured: bool = False  # True until the answers or scores of held-out rows, which `--resume` measures, are known
    # advice, try_next: a conclusion from the run's curves and the command to try next, or None
    advice: str | None = None
    try_next: str | None = None

    @property
    def constant_loss(self) -> float | None:
        """The held-out loss of the best constant answer, which is that of the base; None without a head."""
        return self.base_eval_loss if self.trains_head else None

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, which is read from `output`: one per logged step and per evaluation."""
        return list(RunDirectory(Path(self.output), FileLayer()).lines(METRICS))

    @property
    def losses(self) -> dict[int, float]:
        """The loss of each logged step, by the step's number. Steps that were skipped have none."""
        return _by_step(self.records, "loss")

    @property
    def eval_losses(self) -> dict[int, float]:
        """The held-out loss of each evaluation, by the step's number; 0 is the model before the first step."""
        return _by_step(self.records, "eval_loss")

    def __repr__(self) -> str:
        return short_repr(self, [one.name for one in dataclasses.fields(self)])

    def __fspath__(self) -> str:
        """Return the adapter's directory, so that a summary can be given where an adapter is expected."""
        return self.adapter

    def to_json(self) -> str:
        """Return the text of summary.json."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def _by_step(records: Iterable[Mapping[str, Any]], key: str) -> dict[int, float]:
    return {record["step"]: record[key] for record in records if record.get(key) is not None}


_LOSS_UNITS = {
    "sft": "nats per token",
    "bake": "nats per token of divergence from its teacher",
    "sdft": "nats per token of divergence from its teacher",
    "decide": "nats per answer, without names of options",
    "kto": "per answer (kto)",
    "embed": "per row (embed)",
    "rank": "per row (rank)",
    "classify": "nats per row",
    "grpo": "per answer",
}


def loss_unit(objective: str, classes: Mapping[str, Any] | None = None) -> str:
    """Return the unit of a loss, or its objective if it has no common unit.

    Args:
        objective: value of `--objective`.
        classes: the figures of a classification head, which say what kind of labels it learned.
    """
    kind = (classes or {}).get("problem_type")
    special = {"regression": "in squared error per row", "multi_label_classification": "nats per label"}
    return special.get(kind or "", _LOSS_UNITS.get(objective, f"per pair ({objective})"))


CLASS_SCORES = {
    "accuracy": "right",
    "f1_macro": "macro F1",
    "nll": "loss",
    "mse": "squared error",
    "r2": "R²",
    "spearman": "Spearman",
}
"""Names of the scores of a classification head, in the order of tables."""


def interval_of(scores: Mapping[str, Any], name: str) -> str:
    """Return the 95 % interval of R² or Spearman's correlation, such as ` (95 % interval 0.6 to 0.8)`, or ""."""
    if (interval := scores.get("intervals", {}).get(name)) is None:
        return ""
    low, high = interval
    return f" (95 % interval {low:.3f} to {high:.3f})"


def constant_name(objective: str, *, article: bool = False) -> str:
    """Return the name of the best constant answer, whose loss a new head is compared with: it gives equal scores."""
    return "equal scores" if objective == "rank" else f"{'a ' * article}constant answer"


NOT_FINITE = "there is no finite held-out loss before and after training, so it is not known whether it helped"
NOT_EVALUATED = "the held-out rows were not evaluated after a step, so it is not known whether it helped"
FORGOTTEN_NATS = 0.5
"""Rise of the loss per token of neutral texts from which it is reported in words."""


def forgotten_nats(
    records: Iterable[Mapping[str, Any]], best_step: int | None, *, since_base: bool = False
) -> float | None:
    """Return the rise of the loss on neutral texts since the run began, in nats per token, with the adapter it keeps.

    Args:
        records: lines of metrics.jsonl.
        best_step: the step whose adapter is kept; None for the newest.
        since_base: return the rise since the base model, also of a run that started from an adapter.
    """
    measured = [(one["step"], nats) for one in records if (nats := one.get("forgetting_nats")) is not None]
    # that of the adapter that the run started from
    before = next((nats for step, nats in measured if step == 0 and not since_base), 0.0)
    after = next((nats for step, nats in reversed(measured) if best_step in (None, step)), None)
    return None if after is None else after - before


def perplexities(before: float, after: float) -> tuple[str, str]:
    """Format the perplexity, which is exp(loss), of two losses so that different ones look different."""
    losses = before, after
    values = [math.exp(min(loss, _LARGEST)) for loss in losses]
    if max(values) < _LARGE:
        return apart(values[0], values[1], 2)
    first, second = ("above " * (loss > _LARGEST) + f"{value:.3g}" for value, loss in zip(values, losses, strict=True))
    return first, second


_LARGE = 1e6
"""Perplexity from which on it is written with an exponent."""
_LARGEST = 700.0
"""Loss whose exp a float64 can hold."""


def before_name(compared_with_start: bool) -> str:
    """Return the name of the model that the scores before the run are those of."""
    return "the adapter it started from" if compared_with_start else "the base model"


def since_start(compared_with_start: bool) -> str:
    """Return a clause that names the adapter whose scores come first, or "" if they are those of the base model."""
    return f", compared with {before_name(compared_with_start)}" if compared_with_start else ""


def changed_answers(answers: Sequence[NeutralAnswer]) -> str:
    """Return a clause about the answers to neutral prompts that changed, and about those that were cut off, if any."""
    changed = sum(one["base"] != one["adapted"] for one in answers)
    before = sum(one.get("base_cut_off", False) for one in answers)
    after = sum(one.get("adapted_cut_off", False) for one in answers)
    cut_off = f" ({before} → {after} of them cut off at their limit of tokens)" if before or after else ""
    return f"{changed} of {count_of(len(answers), 'free answer')} to unrelated prompts changed{cut_off}"


def exact_match_says(summary: Mapping[str, Any]) -> bool:
    """Return True if the exact match of summary.json says something about the run.

    No answer to rows that ask for a style repeats the row's own words, whatever the run has learnt.
    """
    before, after = summary.get("base_exact_match"), summary.get("adapted_exact_match")
    return after is not None and bool(before or after or not summary.get("free_texts"))


def same_answers(summary: Mapping[str, Any]) -> str:
    """Return a clause if all free answers are the same, which no loss tells, otherwise ""."""
    same = summary.get("same_answer")
    return "" if same is None else f"all free answers to held-out rows that are shown are the same: {shorten(same)!r}"


def labels_unmeasured(summary: Mapping[str, Any]) -> str:
    """Return a clause if the run learned labels and those of held-out rows are not in summary.json, otherwise ""."""
    if not summary.get("labels") or summary.get("adapted_labels"):
        return ""
    return "the labels of held-out rows were not measured, so it is not known whether it helped"


def measuring_labels(summary: Mapping[str, Any]) -> str:
    """Return a sentence that says how to measure labels that the run has not measured."""
    return f"Measure the labels with backhand evaluate --data FILE{summary.get('reading') or ''}."


def has_fresh_head(summary: Mapping[str, Any]) -> bool:
    """Return True if the adapter has a head that the model before the run does not have."""
    before = summary.get("base_retrieval") or summary.get("compared_with_start")
    return bool(summary.get("trains_head")) and not before


def rows_trained_on(rows: float, seen: float | None, option_rows: float = 0, files: str = "") -> str:
    """Return the rows that the steps contained, such as `64 of 180 rows` or `81 rows of a.csv and 20 names of options`.

    Args:
        rows: number of rows.
        seen: number of different rows in the steps; None for all.
        option_rows: number of rows that are names of options.
        files: names of the files; "" to leave them out.
    """
    given = count_of(rows - option_rows, "row") + (f" of {files}" if files else "")
    if option_rows:
        given += f" and {count_of(option_rows, 'name')} of options"
    if seen is None or seen >= rows:
        return given
    return f"{seen:,} of {rows:,} examples ({given})" if option_rows else f"{seen:,} of {given}"


def forgetting(nats: float | None) -> str:
    """Return a clause about the rise of `forgotten_nats`, or "" if it is small or unknown."""
    if nats is None or nats <= FORGOTTEN_NATS:
        return ""
    return f"it forgot: on neutral texts the loss rose by {nats:.2f} nats per token"


REMEMBERING = (
    "A lower --learning-rate or fewer --epochs forget less, and --max-forgetting 0.5 stops a run that forgets more."
)


def repeated_rows(rows: int) -> str:
    """Return a sentence about held-out rows that also occur in the training data, of which there is at least one."""
    which = f"{count_of(rows, 'held-out row')} also {'occurs' if rows == 1 else 'occur'} in the training data"
    return f"{which}, so the figures of held-out rows are too good."


def chosen_by(reading: str | None) -> str:
    """Return a remark on the rows that chose the best step. `reading` is that of `RunSummary`."""
    measure = "" if reading is None else " Measure them with backhand evaluate."
    return f"The same held-out rows chose the best step, so other rows may do worse.{measure}"


def no_label_fits(labels: Sequence[str]) -> str:
    """Return a sentence about texts that fit none of an adapter's labels."""
    return (
        f"The adapter answers every text with one of {name_list(map(label_text, labels), limit=4)}, also a text "
        "that fits none of them. If no label is for such texts, add some of them to the rows with the answer other."
    )


def read_summary(path: Path) -> RunSummary | None:
    """Return the summary in a file, or None if there is no readable one. Further entries are ignored."""
    try:
        return read_json(path, RunSummary)
    except (OSError, ValueError):
        return None


def add_to_summary(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of an existing summary.json together with further ones, as the demo needs."""
    return {**read_json(path, dict[str, Any]), **values}
