"""The blocks of backhand.json: every other type, range or contradiction is an error with the file and the key."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backhand.adapters.record import AdapterRecord, read_record, record_bytes
from backhand.adapters.record_shapes import head_problems, vector_problems
from backhand.errors import ArtifactError
from tests.support.for_each import for_each

RECORDS: dict[str, AdapterRecord] = {
    "decide": AdapterRecord(
        config={"objective.objective": "decide", "data.template_args": {"enable_thinking": False}},
        decisions={
            "prompt_version": 1,
            "state": None,
            "questions": {
                "team": {"type": "choice", "instructions": "Which?", "criteria": {"a": "first", "b": None}},
                "size": {"type": "score", "instructions": "", "criteria": ["low", "middle", None]},
                "late": {"type": "noul", "instructions": "Late?", "criteria": {}},
            },
            "temperatures": {"choice": 1.5, "noul": 1},
        },
    ),
    "embed": AdapterRecord(
        config={"objective.objective": "embed", "objective.pooling": "mean", "data.max_length": 64},
        embedding={
            "pooling": "mean",
            "query_prompt": "",
            "document_prompt": "text: ",
            "max_length": 64,
            "matryoshka_dims": [8, 4],
        },
    ),
    "classify": AdapterRecord(
        config={"objective.objective": "classify", "objective.class_labels": ["no", "yes"]},
        classification={"problem_type": "single_label_classification", "labels": ["no", "yes"], "max_length": 64},
    ),
    "rank": AdapterRecord(
        config={"objective.objective": "rank", "objective.ranking_loss": "pointwise", "data.columns": {"a": "b"}},
        classification={"problem_type": None, "labels": ["LABEL_0"]},
    ),
    "sft": AdapterRecord(
        config={"objective.objective": "sft", "data.prompt": "{a}"}, labels={"good": [5, 2], "bad": [7, 8, 2]}
    ),
}


@for_each("objective", RECORDS)
def test_a_record_is_read_back(objective: str) -> None:
    assert read_record(json.loads(record_bytes(RECORDS[objective])), "backhand.json") == RECORDS[objective]


MISSING = object()
TEMPERATURE, QUESTION = "decisions.temperatures.choice", "decisions.questions.team"
OTHERS: tuple[tuple[str, str, Any, str], ...] = (
    *(("decide", TEMPERATURE, value, f"{TEMPERATURE} is ") for value in (-1, 0, "1", None, float("inf"), True)),
    ("decide", "decisions.temperatures", MISSING, "decisions.temperatures is missing"),
    ("decide", "decisions.temperatures.chioce", 1, 'the key "chioce" of decisions.temperatures'),
    ("decide", "decisions.prompt_version", 0, "decisions.prompt_version is 0, not an integer of at least 1"),
    ("decide", "decisions.state", 5, "decisions.state is an integer"),
    ("decide", "decisions.questions", {}, "decisions.questions"),
    ("decide", f"{QUESTION}.type", "x", f"{QUESTION}.type"),
    ("decide", f"{QUESTION}.instructions", 5, f"{QUESTION}.instructions"),
    ("decide", f"{QUESTION}.criteria", {"a": None}, "decisions.questions: team has one answer only"),
    ("decide", f"{QUESTION}.criteria", ["a", "b"], "decisions.questions"),
    ("decide", "decisions", {}, "decisions is missing, and the objective is decide"),
    ("decide", "decisions.other", 1, "decisions.other is unknown"),
    ("decide", "config.data.template_args", 5, "config.data.template_args is an integer, not an object"),
    ("embed", "embedding.pooling", "x", "embedding.pooling"),
    ("embed", "embedding.pooling", "last", "embedding.pooling is 'last', and config.objective.pooling is 'mean'"),
    ("embed", "embedding.query_prompt", None, "embedding.query_prompt is null"),
    ("embed", "embedding.max_length", -5, "embedding.max_length is -5"),
    ("embed", "embedding.matryoshka_dims", [8, 0], "embedding.matryoshka_dims[1] is 0"),
    ("embed", "embedding.matryoshka_dims", [8, 8], "embedding.matryoshka_dims is [8, 8]"),
    ("embed", "config.data.max_length", "64", "config.data.max_length is a string"),
    ("classify", "classification.labels", ["no", "no"], "classification.labels"),
    ("classify", "classification.labels", ["yes"], "classification.labels has one name"),
    ("classify", "classification.labels", [], "classification.labels is []"),
    ("classify", "classification.labels", ["yes", "no"], "and config.objective.class_labels is"),
    ("classify", "classification.labels", ["no", 1], "classification.labels[1]"),
    ("classify", "classification.max_length", -5, "classification.max_length is -5"),
    ("classify", "classification.problem_type", "x", "classification.problem_type"),
    ("classify", "classification.problem_type", "regression", "classification.labels has 2 names"),
    ("classify", "config.objective.objective", "embed", "classification is given, and the objective is embed"),
    ("rank", "config.objective.ranking_loss", "x", "config.objective.ranking_loss"),
    ("rank", "config.data.columns", {"a": 1}, "config.data.columns.a is an integer"),
    ("sft", "labels.bad", [5, 2], "labels: 'bad' and 'good' have the same token ids"),
    ("sft", "labels.bad", [], "labels.bad is []"),
    ("sft", "labels.bad", [True], "labels.bad[0] is true or false"),
    ("sft", "labels.bad", [-1, 2], "labels.bad[0] is -1, not a token id"),
    ("sft", "labels", None, "labels is null"),
    ("sft", "files", {"a": 1}, "files.a is an integer"),
    ("sft", "bare", 0, "bare is an integer"),
    ("sft", "format_version", True, "format_version"),
    ("sft", "later", 0, "later is unknown"),
)


@for_each("objective, place, value, problem", OTHERS)
def test_a_record_of_another_shape_is_named(objective: str, place: str, value: Any, problem: str) -> None:
    raw = json.loads(record_bytes(RECORDS[objective]))
    first, _, rest = place.partition(".")
    *parents, last = [first, *([rest] if first == "config" and rest else rest.split(".") if rest else [])]
    inner = raw
    for name in parents:
        inner = inner[name]
    inner[last] = value
    if value is MISSING:
        del inner[last]
    with pytest.raises(ArtifactError) as raised:
        read_record(raw, "backhand.json")
    assert problem in raised.value.what
    assert (raised.value.where, raised.value.exit_code) == ("backhand.json", 4)


def test_blocks_fit_the_tensors_and_the_model() -> None:
    two = {"problem_type": "single_label_classification", "labels": ["no", "yes"]}
    assert not head_problems(two, {"score.weight": (2, 8)})
    for shapes, outputs in (({"classifier.weight": (3, 8)}, 3), ({}, 0)):
        (problem,) = head_problems(two, shapes)
        assert "classification.labels has 2 names" in problem and f"{outputs} outputs" in problem
    assert not vector_problems({"pooling": "cls", "matryoshka_dims": [4]}, 8, causal=False)
    assert len(vector_problems({"pooling": "cls", "matryoshka_dims": [4, 16]}, 8, causal=True)) == 2
