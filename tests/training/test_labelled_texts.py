"""Vectors of texts with labels: pairs, negatives, memory, and whole runs."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import backhand
from backhand.data.embedding_examples import EmbeddingFormat
from backhand.data.label_pairs import partners
from backhand.data.options import DataOptions
from backhand.data.packing import RowPacker
from backhand.data.prepare import prepare
from backhand.data.rows import TextIdentities
from backhand.errors import DataError, not_none
from backhand.loop.embed import mine
from backhand.loop.evaluate import evaluate
from backhand.loop.retrieval_scores import score_vectors
from backhand.nn.model_options import BaseModelOptions
from backhand.objectives.vectors.changes import nearest_texts
from backhand.objectives.vectors.loss import EmbedObjective, labels_of
from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions, MineOptions
from backhand.options.config import TrainConfig
from backhand.options.objectives import ObjectiveOptions
from backhand.runs.summary import read_summary
from backhand.training.run import train
from tests.support.tiny_run import TinyRun, with_options
from tests.support.tiny_tokenizer import tiny_tokenizer

_LABELS = ("json", "list", "names")


def write_rows(path: Path, count: int, seed: int = 0) -> str:
    """Texts that contain the word of their label."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = _LABELS[int(draw.integers(len(_LABELS)))]
        others = " ".join(draw.choice(["user", "asks", "one", "a", "the", "for"], 3))
        rows.append({"text": f"{others} {label} {label}", "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(path: Path, rows: list[dict[str, Any]]) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataOptions(data=(str(path),), eval_fraction=0.0)
    return prepare(data, tiny_tokenizer(), purpose="embeddings", text_format=EmbeddingFormat("mean"))[0]


def test_each_text_of_a_label_is_an_anchor_once_and_a_positive_once() -> None:
    draw = np.random.default_rng(0)
    labels, texts = draw.integers(4, size=60).tolist(), draw.permutation(60).tolist()
    others = partners(labels, texts)
    assert all(labels[one] == labels[other] and one != other for one, other in enumerate(others.tolist()))
    assert Counter(others.tolist()) == Counter(range(60))
    order = draw.permutation(60)  # the rows may have any order
    shuffled = partners([labels[one] for one in order], [texts[one] for one in order])
    assert [order[other] for other in shuffled] == others[order].tolist()


def test_equal_texts_are_no_pair_and_single_texts_have_none() -> None:
    others = partners([1, 1, 1, 2, 3, 3], [10, 10, 11, 10, 20, 20])
    assert others.tolist() == [2, 2, 0, -1, -1, -1]


def test_pairs_of_100_000_rows_take_flat_memory() -> None:
    """Two labels have 2.5 billion pairs of rows."""
    rows = 100_000
    labels, texts = (np.arange(rows) % 2).tolist(), range(rows)
    tracemalloc.start()
    try:
        others = partners(labels, texts)
        identities = [TextIdentities((one, other), None, 1 + one % 2) for one, other in enumerate(others.tolist())]
        found = labels_of(identities)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found is not None and len(found.candidates) == rows
    assert peak < 60e6


def test_rows_become_pairs_that_share_tokens(tmp_path: Path) -> None:
    rows = [{"text": f"user asks {word}", "label": number % 2} for number, word in enumerate("abcdef")]
    data = prepared(tmp_path / "rows.jsonl", [*rows, {"text": "alone", "label": "other"}])
    assert "1 row left out: no other text has its label" in data.report.notes
    assert len(data.examples) == 6 and data.report.documents == 12
    spans = {(int(one["begin"]), int(one["tokens"])) for one in data.examples.records}
    assert len(spans) == 6, "each text is stored once"
    for example in data.examples:
        assert len(example.documents) == len(example.facts_as(TextIdentities).texts) == 2
    assert len({example.key for example in data.examples}) == len(set(data.examples.column("key").tolist())) == 6


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "no two texts have the same label"),
        ([{"text": "a", "label": ["x"]}], "not a label"),
    ],
)
def test_rows_without_pairs_are_refused(rows: list[dict[str, Any]], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        prepared(tmp_path / "rows.jsonl", rows)


def test_texts_of_a_label_are_no_negatives(tmp_path: Path) -> None:
    """The loss is torch's cross-entropy over the positive and the texts of other labels."""
    rows = [{"text": f"user asks {word}", "label": "abbacca"[number]} for number, word in enumerate("abcdefg")]
    data = prepared(tmp_path / "rows.jsonl", rows)
    options = ObjectiveOptions("embed", pooling="mean", embedding_loss="infonce")
    objective = EmbedObjective(RowPacker(data.examples, share_prefixes=False), options=options)
    every = range(len(data.examples))
    vectors = torch.randn(14, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    units = torch.nn.functional.normalize(vectors, dim=1)
    labels = torch.tensor([hash(row.label) for row in objective.identities(every)])
    scores = 20 * units[::2] @ units[1::2].T
    alike = (labels[:, None] == labels).fill_diagonal_(False)
    expected = cross_entropy(scores.masked_fill(alike, -torch.inf), torch.arange(7), reduction="none")
    assert objective.losses(every, vectors).losses.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_all_other_texts_of_a_label_are_relevant() -> None:
    rows = [TextIdentities((one, other), None, label) for one, other, label in ((1, 2, 7), (2, 3, 7), (3, 1, 7))]
    rows += [TextIdentities((4, 5), None, 8), TextIdentities((5, 4), None, 8)]
    of_text = {1: (1.0, 0.0), 2: (0.9, 0.1), 3: (0.8, 0.1), 4: (0.0, 1.0), 5: (0.1, 1.0)}
    embeddings = torch.tensor([of_text[text] for row in rows for text in row.texts])
    values = score_vectors(rows, embeddings).values
    assert values["mrr@10"] == values["ndcg@10"] == values["recall@10"] == 1
    assert values["recall@1"] == pytest.approx((3 * 1 / 2 + 2) / 5)


def test_the_own_text_of_an_anchor_is_not_shown_as_its_nearest() -> None:
    rows = [TextIdentities((one, other), None, 7) for one, other in ((1, 2), (2, 3), (3, 1))]
    of_text = {1: (1.0, 0.0), 2: (0.9, 0.1), 3: (0.8, 0.1)}
    texts = [text for row in rows for text in row.texts]
    (found,) = nearest_texts(rows, torch.tensor([of_text[text] for text in texts]), [*map(str, texts)], [0])
    assert [(one["text"], one["right"]) for one in found] == [("2", True), ("3", True)]


def test_a_split_keeps_labels_of_few_texts_whole(tmp_path: Path) -> None:
    """Else most held-out texts would have no partner. Labels of many texts are on both sides."""
    few = [{"text": f"user asks {number} {which}", "label": number} for number in range(40) for which in "ab"]
    many = [{"text": f"user asks {number}", "label": number % 3} for number in range(90)]
    for rows, shares_labels in ((few, False), (many, True)):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataOptions(data=(str(tmp_path / "rows.jsonl"),), eval_fraction=0.3)
        sides = prepare(data, tiny_tokenizer(), purpose="embeddings", text_format=EmbeddingFormat("mean"))[:2]
        examples = [not_none(side).examples for side in sides]
        assert sum(map(len, examples)) == len(rows), "no text is left out"
        labels = [{one.facts_as(TextIdentities).label for one in side} for side in examples]
        assert bool(labels[0] & labels[1]) == shares_labels


@pytest.fixture(scope="module")
def straight(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    place = tmp_path_factory.mktemp("labelled")
    made = tiny.config(
        place / "run",
        data=(write_rows(place / "rows.jsonl", 40),),
        eval_data=(write_rows(place / "held_out.jsonl", 15, seed=1),),
        batch_rows=16,
        micro_batch_rows=8,
        epochs=4,
        learning_rate=1e-2,
        prove_resume=3,
    )
    made = replace(made, objective=ObjectiveOptions("embed", pooling="mean"))
    train(made)
    return made


def test_a_run_learns_labels(straight: TrainConfig, tiny: TinyRun) -> None:
    summary = read_summary(straight.run.output / "summary.json")
    assert summary is not None and summary.base_retrieval is not None and summary.adapted_retrieval is not None
    assert summary.best_eval_loss < summary.base_eval_loss
    assert summary.adapted_retrieval["ndcg@10"] > summary.base_retrieval["ndcg@10"]
    options = EvaluateOptions(
        run=EvaluateRunOptions(adapter=straight.run.output / "adapter"),
        data=DataOptions(data=straight.data.eval_data),
        model=BaseModelOptions(model=str(tiny.model), dtype="float32"),
    )
    found = evaluate(options).as_dict()
    for name, expected in (("base", summary.base_retrieval), ("adapted", summary.adapted_retrieval)):
        assert found[name]["retrieval"]["ndcg@10"] == pytest.approx(expected["ndcg@10"], abs=1e-3)


def test_other_files_of_vectors_are_read_by_the_columns_of_training(
    straight: TrainConfig, tiny: TinyRun, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in Path(straight.data.eval_data[0]).read_text().splitlines()]
    given = {"model": tiny.model, "dtype": "float32", "threads": 1}
    expected = backhand.evaluate(data=rows, adapter=straight.run.output / "adapter", **given).as_dict()
    adapter = Path(shutil.copytree(straight.run.output / "adapter", tmp_path / "adapter"))
    record = json.loads((adapter / "backhand.json").read_text())
    record["config"]["data.columns"] = {"text": "words", "label": "kind"}
    (adapter / "backhand.json").write_text(json.dumps(record))
    renamed = [{"words": row["text"], "kind": row["label"]} for row in rows]
    assert backhand.evaluate(data=renamed, adapter=adapter, vectors=True, **given).as_dict() == expected


def test_other_rows_and_one_label_are_refused(straight: TrainConfig, tiny: TinyRun, tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text("".join(json.dumps({"text": f"user {word}", "label": "x"}) + "\n" for word in "abc"))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"anchor": "user", "positive": "json"}) + "\n")
    again = with_options(straight, output=tmp_path / "run", prove_resume=None)
    for options, words in (
        ({"data": (str(one),), "eval_data": ()}, "the same label"),
        ({"data": (straight.data.data[0], str(pairs)), "eval_data": ()}, "others are pairs"),
        ({"eval_data": (str(pairs),)}, "different forms"),
    ):
        with pytest.raises(DataError, match=words):
            train(with_options(again, **options))
    single = tmp_path / "single.jsonl"
    single.write_text("".join(json.dumps({"text": f"user {word}", "label": word}) + "\n" for word in "abc"))
    scored = tmp_path / "scored.jsonl"
    scored.write_text(json.dumps({"sentence1": "user", "sentence2": "json", "score": 0.5}) + "\n")
    model = BaseModelOptions(model=str(tiny.model))
    for files, words in (
        ((str(single),), "no two texts"),
        ((straight.data.data[0], str(pairs)), "others are pairs"),
        ((str(pairs), str(scored)), "pairs without one"),
    ):
        with pytest.raises(DataError, match=words):
            evaluate(EvaluateOptions(model, DataOptions(data=files), EvaluateRunOptions(vectors=True)))
    with pytest.raises(DataError, match="all held-out texts have the same label"):
        train(with_options(again, eval_data=(str(one),)))
    with pytest.raises(DataError, match="a text with a label has no negatives"):
        mine(MineOptions(data=DataOptions(data=straight.data.data), model=model))
