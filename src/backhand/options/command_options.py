"""Options of `backhand evaluate`, `decide`, `classify`, `embed`, `mine`, `rank`, `plan` and `models`.

This file imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from backhand.bounds import Check, Count, CountFromZero, GivenTexts, OptionalPath, Options, Share, Text
from backhand.data.options import DataOptions, RowSources, Sources, TemplateOptions, check_ranking_system, no_data
from backhand.data.rows import PoolingName
from backhand.errors import UsageError
from backhand.generation.options import LabelNames
from backhand.nn.model_options import BaseModelOptions
from backhand.options.config import TrainConfig
from backhand.options.rewards import check_names, check_weights


@dataclass(frozen=True)
class EvaluateRunOptions(Options):
    """Adapter, measurements and output of an evaluation."""

    adapter: OptionalPath = None  # type: ignore[assignment]
    """Adapter to compare with the base model: a directory written by training or PEFT, or a GGUF file. Default: only
    the base model is evaluated."""

    max_new_tokens: Count = 256
    """Longest greedy completion, in tokens, that is compared with the row's last one or rewarded."""

    reward: Annotated[GivenTexts, Check(check_names)] = ()  # type: ignore[assignment]
    """Reward functions for greedy answers, measured instead of losses (as in training with `--objective grpo`)."""

    reward_weights: tuple[float, ...] = ()
    """Weight of each reward function in the sum. Default: 1 each."""

    vectors: bool = False
    """Score the vectors of texts (retrieval, or rank correlation) instead of answers, for rows as in training with
    `--objective embed`. Not needed with an adapter of this objective."""

    pooling: PoolingName | None = None
    """With `vectors`: as for `embed`. Default: as the adapter was trained, else as the model's files say."""

    query_prompt: str | None = None
    """With `vectors`: text in front of every query."""

    document_prompt: str | None = None
    """With `vectors`: text in front of every other text."""

    rankings: bool = False
    """Score the order of a query's documents instead of answers, for rows as in training with `--objective rank`. Not
    needed with an adapter of this objective."""

    micro_batch_rows: Count = 16
    """Rows per forward pass; of rankings, documents."""

    completions: bool = True
    """Also generate an answer for every row and measure exact match. If off, only the losses are measured."""

    labels: LabelNames = ()
    """Judge answers as labels, such as `yes,no`; `auto` takes those of the adapter's training rows, or where these had
    none, those of the rows, if they are few and short. Not given: as `auto`, where there are any; `none`: not."""

    json: bool = False
    """Print one JSON object instead of the table."""

    def refuse_vector_options(self) -> None:
        """Raise UsageError if an option of vectors is given, because none are measured."""
        for name in ("pooling", "query_prompt", "document_prompt"):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"{name} is given, but no vectors are measured",
                    where=name,
                    next_step=f"give --vectors as well, or leave {name} out",
                )


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """One evaluation: the model, the rows, and what to measure on them.

    Attributes:
        model: the base model and how it is computed.
        data: rows, template, lengths; `data` names the rows to evaluate.
        run: adapter and output.
    """

    model: BaseModelOptions = field(default_factory=BaseModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    run: EvaluateRunOptions = field(default_factory=EvaluateRunOptions)

    def _check_together(self) -> None:
        measures = ("vectors", "rankings", "reward")
        given = [name for name in measures if getattr(self.run, name)]
        if len(given) > 1:
            raise UsageError(f"{given[0]} and {given[1]} are both given", where=given[0], next_step="give one of them")
        check_weights(self.run.reward, self.run.reward_weights)
        if given != ["vectors"] and (given or self.run.adapter is None):
            self.run.refuse_vector_options()


@dataclass(frozen=True)
class DecideRunOptions(Options):
    """Adapter, questions and output."""

    adapter: OptionalPath = None  # type: ignore[assignment]
    """The adapter that decides, trained with `--objective decide`: a directory."""

    questions: OptionalPath = None  # type: ignore[assignment]
    """A JSON file of other questions than those that the adapter was trained on, in the protocol's form: by name
    `type`, `instructions` and `criteria`."""

    output: OptionalPath = None  # type: ignore[assignment]
    """File for the answers, one JSON object per state. Default: standard output."""

    overwrite: bool = False
    """Replace the file `output` if it exists."""

    micro_batch_rows: Count = 16
    """States per forward pass."""


@dataclass(frozen=True)
class StateOptions(TemplateOptions, RowSources):
    """States to decide."""

    state: Text | None = None
    """The state, as text. With `data`: the column of the states, or a text with columns in braces. Default: as in
    training."""


@dataclass(frozen=True)
class DecideOptions(Options):
    """Options of decisions.

    Attributes:
        run: adapter, questions and output.
        data: one state, or rows with states.
        model: the base model, device and dtype.
    """

    run: DecideRunOptions = field(default_factory=DecideRunOptions)
    data: StateOptions = field(default_factory=StateOptions)
    model: BaseModelOptions = field(default_factory=BaseModelOptions)

    def _check_together(self) -> None:
        if self.run.adapter is None:
            raise UsageError(
                "there is no adapter", where="adapter", next_step="give --adapter DIRECTORY, as training wrote it"
            )
        if not self.data.data and self.data.state is None:
            raise UsageError(
                "there is no state to decide", where="state", next_step="give --state TEXT, or --data FILE"
            )


@dataclass(frozen=True)
class ClassifyRunOptions(Options):
    """Adapter, texts and output."""

    adapter: OptionalPath = None  # type: ignore[assignment]
    """Adapter with a classification head, trained with `--objective classify` or as PEFT's SEQ_CLS: a directory."""

    text: Text | None = None
    """One text to classify, instead of `data`."""

    prompt: Text | None = None
    """The column of the texts, or a text with columns in braces. Default: as in training,
    else `text`."""

    output: OptionalPath = None  # type: ignore[assignment]
    """File for the answers, one JSON object per text. Default: standard output."""

    overwrite: bool = False
    """Replace the file `output` if it exists."""

    micro_batch_rows: Count = 16
    """Texts per forward pass."""


@dataclass(frozen=True)
class ClassifyOptions(Options):
    """Options of classification.

    Attributes:
        run: adapter, one text, and output.
        data: files with texts.
        model: the base model, device and dtype.
    """

    run: ClassifyRunOptions = field(default_factory=ClassifyRunOptions)
    data: RowSources = field(default_factory=RowSources)
    model: BaseModelOptions = field(default_factory=BaseModelOptions)

    def _check_together(self) -> None:
        if self.run.adapter is None:
            raise UsageError(
                "there is no adapter", where="adapter", next_step="give --adapter DIRECTORY, as training wrote it"
            )
        if bool(self.data.data) == (self.run.text is not None):
            raise UsageError(
                "give either one text or files", where="text", next_step="give --text TEXT, or --data FILE"
            )


@dataclass(frozen=True)
class VectorOptions:
    """From a text to its vector. Default: as the adapter was trained, else as the model's files say."""

    pooling: PoolingName | None = None
    """The vector of a text: the hidden state of its `last` token, of its first one (`cls`), or the `mean` of all."""

    query_prompt: str | None = None
    """Text in front of every query."""

    document_prompt: str | None = None
    """Text in front of every other text."""

    micro_batch_rows: Count = 16
    """Texts per forward pass."""


@dataclass(frozen=True)
class EmbedRunOptions(Options):
    """Adapter and output."""

    adapter: OptionalPath = None  # type: ignore[assignment]
    """Adapter that was trained with `--objective embed`: a directory. Default: the model alone."""

    prompt: Text | None = None
    """The column of the texts, or a text with columns in braces. Default: as in training,
    else `text`."""

    queries: bool = False
    """The texts are queries: put the query prompt in front of them, instead of the document prompt."""

    dims: Count | None = None
    """Cut the vectors to this length, for adapters that were trained with `matryoshka_dims`."""

    output: OptionalPath = None  # type: ignore[assignment]
    """File for the vectors, in the order of the rows: a NumPy array (texts, size) if the name ends in .npy, else JSON
    lines. Default: JSON lines on standard output."""

    overwrite: bool = False
    """Replace the file `output` if it exists."""


def _check_data(data: RowSources) -> None:
    if not data.data:
        raise no_data()


@dataclass(frozen=True)
class EmbedOptions(Options):
    """Options of vectors.

    Attributes:
        run: adapter and output.
        data: the texts.
        vectors: from a text to its vector.
        model: the base model, device and dtype.
    """

    run: EmbedRunOptions = field(default_factory=EmbedRunOptions)
    data: RowSources = field(default_factory=RowSources)
    vectors: VectorOptions = field(default_factory=VectorOptions)
    model: BaseModelOptions = field(default_factory=BaseModelOptions)

    def _check_together(self) -> None:
        _check_data(self.data)


@dataclass(frozen=True)
class MineRunOptions(Options):
    """Adapter, negatives and output."""

    adapter: OptionalPath = None  # type: ignore[assignment]
    """Adapter that computes the vectors: a directory. Default: the model alone."""

    prompt: Text | None = None
    """The column of the anchors, or a text with columns in braces. Default: as in training, else `anchor`."""

    completion: Text | None = None
    """The column of the positives, or a text with columns in braces. Default: as in training, else `positive`."""

    corpus: Sources = ()  # type: ignore[assignment]
    """Files with further texts that may be negatives, in addition to the positives of all rows. Default of the column:
    that of the positives of training, else `text`."""

    negatives: Count = 1
    """Largest number of negatives per row."""

    relative_margin: Share = 0.05
    """Leave out texts whose cosine with the anchor is above that of its positive, or within this share below it. Such
    texts are often right, but not in the rows."""

    output: OptionalPath = None  # type: ignore[assignment]
    """File for the rows, one JSON object each. Default: standard output."""

    overwrite: bool = False
    """Replace the file `output` if it exists."""


@dataclass(frozen=True)
class MineOptions(Options):
    """Options of mining.

    Attributes:
        run: adapter, negatives and output.
        data: rows of anchors and positives.
        vectors: from a text to its vector.
        model: the base model, device and dtype.
    """

    run: MineRunOptions = field(default_factory=MineRunOptions)
    data: RowSources = field(default_factory=RowSources)
    vectors: VectorOptions = field(default_factory=VectorOptions)
    model: BaseModelOptions = field(default_factory=BaseModelOptions)

    def _check_together(self) -> None:
        _check_data(self.data)


@dataclass(frozen=True)
class RankRunOptions(Options):
    """Adapter, query and output."""

    adapter: OptionalPath = None  # type: ignore[assignment]
    """Adapter that was trained with `--objective rank`: a directory. Default: the model alone, which should be a
    reranker."""

    query: Text | None = None
    """Rank the texts of `data` for this query. Default: the rows of `data` are a query with a
    document, or with a list of documents."""

    top: Count | None = None
    """With `query`, write only this many texts, the most relevant ones."""

    instruction: Text | None = None
    """The task in the prompt. Default: that of the adapter's training."""

    prompt: Text | None = None
    """The column of the queries, or a text with columns in braces. Default: as in training, else `query`. With `query`,
    it is the column of the texts. Default: the documents of training, else `text`."""

    completion: Text | None = None
    """The column of the documents, or a text with columns in braces. Default: as in training, else `document`,
    `passage`, `documents` or `docs`."""

    micro_batch_rows: Count = 16
    """Documents per forward pass."""

    output: OptionalPath = None  # type: ignore[assignment]
    """File for the scores, one JSON object per line. Default: standard output."""

    overwrite: bool = False
    """Replace the file `output` if it exists."""


@dataclass(frozen=True)
class RankOptions(Options):
    """Options of ranking.

    Attributes:
        run: adapter, query and output.
        data: the documents.
        template: the chat template.
        model: the base model, device and dtype.
    """

    run: RankRunOptions = field(default_factory=RankRunOptions)
    data: RowSources = field(default_factory=RowSources)
    template: TemplateOptions = field(default_factory=TemplateOptions)
    model: BaseModelOptions = field(default_factory=BaseModelOptions)

    def _check_together(self) -> None:
        _check_data(self.data)
        check_ranking_system(self.template.system)
        if self.run.top is not None and self.run.query is None:
            raise UsageError(
                "top is given without a query", where="top", next_step="give --query TEXT, or leave --top out"
            )


@dataclass(frozen=True)
class PlanRunOptions:
    """Measurements and output of a plan."""

    watch: bool = False
    """Include the memory of a second model, with which `backhand watch` answers while the run trains."""

    calibrate: bool = True
    """Measure this machine's speed on some of the model's blocks for about ten seconds. If off, only memory is
    planned."""

    sample: Count | None = None
    """Encode about this many rows of larger files, evenly spaced and with the longest ones, and estimate the figures
    of all rows from them. At least the rows of two steps are encoded. The plan of a large file then takes seconds."""

    show: CountFromZero = 0
    """Number of the longest documents to list with file, line and tokens. They determine the memory."""

    json: bool = False
    """Print one JSON object instead of the tables."""


@dataclass(frozen=True)
class PlanOptions(TrainConfig):
    """Options of a planned run; its other sections are those of `TrainConfig`.

    Attributes:
        plan: measurements and output. Without rows, rows of `max_length` tokens are assumed.
    """

    plan: PlanRunOptions = field(default_factory=PlanRunOptions)


@dataclass(frozen=True)
class ConvertOptions(Options):
    """The file to convert, and the output."""

    file: Path
    """Another tool's YAML file, of Axolotl, TRL, mlx-lm, Unsloth or LLaMA-Factory."""

    output: Path | None = None
    """TOML file to write. Default: standard output."""


@dataclass(frozen=True)
class ModelsOptions:
    """Places to search for models, and the output."""

    places: tuple[Path, ...] = ()
    """Folders or files to search. Default: the stores of Ollama, LM Studio, llama.cpp and Hugging Face."""

    json: bool = False
    """Print one JSON list instead of the table."""
