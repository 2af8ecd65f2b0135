"""Types of the JSON files in a run directory that the report and a resumed run read back.

`facts.json` is one `RunFacts`. The lines of `metrics.jsonl` are `MetricsLine`s with further numbers, those of
`answers.jsonl` are `AnswerLine`s, and those of `proofs.jsonl` are `runs.directory.Proof`s.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict, get_type_hints

from backhand.json_shape import ShapeError, fitting


class _Step(TypedDict):
    step: int


class MetricsLine(_Step, total=False):
    """The entries of a line of metrics.jsonl that are not single numbers; the latter are declared by no type."""

    # computed_s, waited_s, computed_tokens: per rank
    computed_s: list[float]
    waited_s: list[float]
    computed_tokens: list[int]
    answers: dict[str, str]  # sampled answers of held-out rows, by the row's source
    # one value per held-out row, see `runs.row_changes` and `runs.pair_results`
    row_rewards: list[float]
    row_nats: list[float]
    row_tokens: list[int]
    row_chosen: list[float]
    row_rejected: list[float]
    row_scores: list[float]
    row_constant_scores: list[float]


def metrics_line(value: object) -> dict[str, Any]:
    """Return the entries of a line of metrics.jsonl that have the right type. Raises ShapeError: it has no step."""
    entries: dict[str, Any] = fitting(value, dict[str, Any])
    described = get_type_hints(MetricsLine)
    found = fitting({name: one for name, one in entries.items() if name in described}, MetricsLine)
    found |= fitting({name: one for name, one in entries.items() if name not in described}, dict[str, float | None])
    if "step" not in found:
        raise ShapeError("step is missing")
    return {name: found[name] for name in entries if name in found}


MAX_NEW_TOKENS = 64
"""Largest number of tokens of an answer in answers.jsonl."""


class AnswerLine(TypedDict, total=False):
    """A held-out row with the answers of the model before the run (base model or start adapter) and of the adapter."""

    source: str
    prompt: str
    prompt_parts: list[tuple[str, bool]] | None  # text, and True for control tokens
    # base, adapted: the answers; reference: the row's own
    base: str
    adapted: str
    reference: str
    rejected: str | None
    prompted: str | None  # the answer of the teacher in distillation
    # base_p, adapted_p: probability of each option of a decision, whose answers are options
    base_p: dict[str, float] | None
    adapted_p: dict[str, float] | None


class ModelFacts(TypedDict, total=False):
    """The base model."""

    name: str
    origin: str | None
    hub_id: str | None
    file: str | None
    architecture: str | None
    engine: str
    note: str | None  # why the decoder engine does not run it
    dtype: str
    base: str
    quantized: bool


class _Named(TypedDict):
    name: str


class ModuleFacts(_Named, total=False):
    """An adapted module."""

    in_features: int
    out_features: int
    rank: int
    scaling: float
    weight_norm: float | None  # Frobenius norm of the base weight


class MemoryFacts(TypedDict, total=False):
    """The predicted peak of memory and its parts."""

    predicted_bytes: int
    parts: dict[str, int]


LengthBin = TypedDict("LengthBin", {"from": int, "to": int, "documents": int})
"""The number of documents with `from` to `to` - 1 tokens."""


class SourceFacts(TypedDict):
    """A file or hub data set of rows."""

    source: str
    form: str
    rows: int


class ShownRow(TypedDict):
    """The first tokens of a document, each with its supervision."""

    source: str
    label: NotRequired[str]  # that a text learns as a whole, if no token is a target
    tokens: list[tuple[str, bool]]
    left_out: int


class RowFacts(TypedDict, total=False):
    """The rows of one side, training or held out: see `data.examples.DataReport`."""

    examples: int
    rows: int
    option_rows: int
    documents: int
    tokens: int
    supervised_tokens: int
    longest: int
    truncated: int
    dropped_long: int
    dropped_unsupervised: int
    skipped_bad: int
    repeated: int
    sources: list[SourceFacts]
    lengths: list[LengthBin]
    supervised: list[LengthBin]
    shown: list[ShownRow]
    notes: list[str]
    system: str | None
    bare: bool


class MachineFacts(TypedDict, total=False):
    """The machine that trained."""

    processor: str
    cores: int | None
    memory_bytes: int | None
    system: str
    accelerator: str | None


class RunFacts(TypedDict, total=False):
    """The contents of facts.json, known before the first step."""

    began: str
    total_steps: int
    model: ModelFacts
    modules: list[ModuleFacts]
    memory: MemoryFacts
    data: dict[str, RowFacts | None]
    labels: list[str]  # of the training rows of `sft`; empty if their answers are not labels
    digests: dict[str, Any]
    packages: dict[str, str]
    machine: MachineFacts
