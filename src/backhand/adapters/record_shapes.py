"""The declared shape of every block of backhand.json, and the agreement of a block with the rest of the adapter.

A shape lists types and ranges (`json_shape`). A function next to it yields a sentence per contradiction between fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict, is_typeddict

from backhand.data.decisions import QuestionType, questions_of
from backhand.data.rows import NUMBER, SINGLE, PoolingName, ProblemType, RankingLossName
from backhand.errors import DataError
from backhand.json_shape import Rule, ShapeError, convert, known_keys
from backhand.words import shown

Count = Annotated[int, Rule(lambda value: value > 0, "an integer of at least 1")]
TokenId = Annotated[int, Rule(lambda value: value >= 0, "a token id")]
Factor = Annotated[float, Rule(lambda value: 0 < value < math.inf, "a finite number above 0")]


def _distinct(noun: str) -> Rule:
    """Return the rule for a list whose elements all differ."""
    return Rule(lambda values: len({*values}) == len(values), f"a list of different {noun}")


class Question(TypedDict):
    """A question in the protocol's form; `data.decisions.question_of` checks its criteria."""

    type: QuestionType
    instructions: str
    criteria: list[str | None] | dict[str, str | None]


class Decisions(TypedDict):
    """The questions that an adapter of `decide` was trained on, and their calibration."""

    prompt_version: Count
    state: NotRequired[str | None]  # the column or template of the states in tables
    questions: dict[str, Question]
    temperatures: dict[QuestionType, Factor]  # fitted to the held-out rows, by type of question


def _decisions(block: Mapping[str, Any], _: Mapping[str, Any]) -> Iterator[str]:
    try:
        questions_of(block["questions"], "")
    except DataError as error:
        yield f"decisions.questions: {error.what}"


class Embedding(TypedDict):
    """The way from a text to its vector, for an adapter of `embed`."""

    pooling: PoolingName
    query_prompt: str
    document_prompt: str
    max_length: NotRequired[Count]
    matryoshka_dims: NotRequired[Annotated[list[Count], _distinct("lengths")]]


def _embedding(block: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    for name in ("pooling", "query_prompt", "document_prompt", "matryoshka_dims"):
        yield from _other_than_option(f"embedding.{name}", block.get(name), f"objective.{name}", config)


class Classification(TypedDict):
    """The meaning of the logits of a head, for an adapter of `classify`, or of `rank` on an encoder."""

    problem_type: ProblemType | None  # None for scores of documents
    labels: Annotated[
        list[Annotated[str, Rule(lambda label: bool(label.strip()), "the name of a label")]],
        Rule(bool, "a list of one label or more"),
        _distinct("labels"),
    ]
    max_length: NotRequired[Count]


def _classification(block: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    problem, labels = block["problem_type"], block["labels"]
    if problem in (None, NUMBER) and len(labels) > 1:
        yield f"classification.labels has {len(labels)} names, and {problem or 'a score'} has one output"
    if problem == SINGLE and len(labels) < 2:
        yield f"classification.labels has one name, and {problem} chooses between several"
    yield from _other_than_option("classification.problem_type", problem, "objective.problem_type", config)
    yield from _other_than_option("classification.labels", labels, "objective.class_labels", config)


Labels = dict[str, Annotated[list[TokenId], Rule(bool, "a list of one token id or more")]]
"""Token ids of each label of the answers, including the final token."""


def _labels(block: Mapping[str, Sequence[int]], _: Mapping[str, Any]) -> Iterator[str]:
    names: dict[tuple[int, ...], str] = {}
    for name, ids in block.items():
        if (other := names.setdefault(tuple(ids), name)) != name:
            yield f"labels: {shown(other)} and {shown(name)} have the same token ids"


RunOptions = TypedDict(
    "RunOptions",
    {
        "objective.objective": str,
        "objective.instruction": str,
        "objective.ranking_loss": RankingLossName,
        "objective.positive_weight": Factor,
        "data.max_length": Count,
        "data.prompt": str,
        "data.completion": str,
        "data.messages": str,
        "data.columns": dict[str, str],
        "data.chat_template": str,
        "data.template_args": dict[str, Any],
        "data.system": str,
    },
    total=False,
)
"""Options of the run that commands read back. The record contains many others, which are only compared."""


def _other_than_option(place: str, value: Any, option: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence if the run was given another value of an option than a block contains."""
    if value is not None and config.get(option) not in (None, [], value):
        yield f"{place} is {shown(value)}, and config.{option} is {shown(config[option])}"


class Block(NamedTuple):
    """A part of the record that is empty for most objectives.

    Attributes:
        of: the objective whose record has the block.
        optional_for: objectives whose record can have it.
        shape: the type of a block that is not empty.
        contradictions: called with the block and the record's options of the run; yields a sentence per contradiction.
    """

    of: str | None
    optional_for: tuple[str, ...]
    shape: Any
    contradictions: Callable[[Any, Mapping[str, Any]], Iterator[str]]


BLOCKS: Mapping[str, Block] = {
    "decisions": Block("decide", (), Decisions, _decisions),
    "embedding": Block("embed", (), Embedding, _embedding),
    "classification": Block("classify", ("rank",), Classification, _classification),
    "labels": Block(None, ("sft",), Labels, _labels),
}


class Record(TypedDict):
    """The fields of the record whose meaning is the same for all objectives."""

    origin: str | None
    base_digest: str | None
    model_config: dict[str, Any]
    tokenizer_digest: str | None
    chat_template_digest: str | None
    data_digest: str | None
    run_digest: str | None
    config: RunOptions
    packages: dict[str, str]
    files: dict[str, str]
    system: str | None
    bare: bool


def record_problems(raw: Mapping[str, Any]) -> list[str]:
    """Return a sentence per field of a record that has another shape, or contradicts another field."""
    known = {**dict.fromkeys(known_keys(Record)), **BLOCKS}
    problems = [f"{name} is unknown" for name in sorted({*raw} - {*known})]
    problems += _misfit(raw, Record, "")
    if problems:
        return problems
    objective = raw["config"].get("objective.objective")
    for name, block in BLOCKS.items():
        if raw[name] != {}:
            problems += _misfit(raw[name], block.shape, name) or block.contradictions(raw[name], raw["config"])
        if objective is None or (raw[name] == {}) == (objective != block.of) or objective in block.optional_for:
            continue
        problems.append(
            f"{name} is {'missing' if objective == block.of else 'given'}, and the objective is {objective}"
        )
    return problems


_HEAD_OUTPUTS = ("score.weight", "classifier.weight")


def head_problems(classification: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return a sentence if a head has another number of outputs than `classification.labels` has names.

    Args:
        shapes: shape of each tensor of the adapter, by its name in transformers' class.
    """
    outputs = next((shapes[name][0] for name in _HEAD_OUTPUTS if name in shapes), 0)
    if not classification or len(classification["labels"]) == outputs:
        return []
    names = len(classification["labels"])
    return [f"classification.labels has {names} names, and the head in the adapter's tensors has {outputs} outputs"]


def label_problems(labels: Mapping[str, Sequence[int]], tokenizer: Any) -> list[str]:
    """Return a sentence per label whose token ids are another text in the tokenizer; white space does not count."""
    problems = []
    for name, ids in labels.items():
        if max(ids) >= len(tokenizer):
            problems.append(f"labels.{name} has token {max(ids)}, and the tokenizer has {len(tokenizer):,}")
        elif _joined(text := tokenizer.decode(ids[:-1], skip_special_tokens=True)) != _joined(name):
            problems.append(f"labels.{name} has the token ids of {shown(text)}")
    return problems


def _joined(text: str) -> str:
    return "".join(text.split())


def vector_problems(embedding: Mapping[str, Any], hidden_size: int, *, causal: bool) -> list[str]:
    """Return a sentence per field of the block on vectors that does not fit the base model."""
    problems = []
    if embedding.get("pooling") == "cls" and causal:
        problems.append("embedding.pooling is 'cls', but the attention of the model is causal")
    if (longest := max(embedding.get("matryoshka_dims", ()), default=0)) > hidden_size:
        problems.append(f"embedding.matryoshka_dims has {longest:,}, and the vectors have {hidden_size:,} numbers")
    return problems


def _misfit(value: Any, shape: Any, place: str) -> list[str]:
    """Return the first difference from a shape as a list of one sentence; empty without one."""
    try:
        convert(value, shape, place)
    except ShapeError as error:
        return [str(error)]
    unknown = {*value} - known_keys(shape) if place and is_typeddict(shape) else ()
    return [f"{place}.{key} is unknown" for key in sorted(unknown)]
