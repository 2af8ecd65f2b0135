"""Vectors of texts: gradients against sentence-transformers and one pass, and whole runs with their scores."""

from __future__ import annotations

import io
import json
import logging
import shlex
import shutil
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from torch import Tensor, nn

import backhand
from backhand.cli.main import main
from backhand.data.data_report import TruncationStats
from backhand.data.embedding_examples import EmbeddingEncoder, EmbeddingFormat
from backhand.data.examples import Example
from backhand.data.lint import lint
from backhand.data.options import DataOptions, RowSources
from backhand.data.packing import RowPacker, micro_batches
from backhand.data.prepare import prepare
from backhand.data.rows import EmbeddingRow, PoolingName, TextIdentities
from backhand.data.text_encoder import TextEncoder
from backhand.distributed.communicator import Communicator
from backhand.engines.machine import resolve_machine
from backhand.engines.memory_probe import TensorBytes
from backhand.errors import BackhandError, CheckError, DataError, UsageError, not_none
from backhand.interop.command import export_command
from backhand.interop.options import ExportOptions
from backhand.loop.embed import VectorEvaluation, embed, embed_command, hardest, mine_command, print_vectors
from backhand.loop.evaluate import evaluate_command
from backhand.loop.objective import MicroBatch
from backhand.loop.retrieval_scores import score_vectors, scores_text, spearman
from backhand.loop.row_passes import embed_batch, embed_rows
from backhand.loop.step import StepWork
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.nn.model_options import BaseModelOptions
from backhand.objectives.vectors.changes import BINS, cosine_histogram, drift, nearest_texts
from backhand.objectives.vectors.held_out import HeldOutEmbeddings
from backhand.objectives.vectors.loss import EmbedObjective, excluded_pairs
from backhand.options.command_options import (
    EmbedOptions,
    EmbedRunOptions,
    EvaluateOptions,
    EvaluateRunOptions,
    MineOptions,
    MineRunOptions,
    VectorOptions,
)
from backhand.options.config import ModelOptions, TrainConfig
from backhand.options.objectives import ObjectiveOptions
from backhand.report.comparison import comparison_page
from backhand.report.headline import headline, verdict
from backhand.report.page import run_page
from backhand.report.run_record import read_run
from backhand.runs.summary import read_summary
from backhand.training.advice import answer_advice
from backhand.training.console import closing_lines
from backhand.training.plan import plan_run
from backhand.training.run import train
from backhand.verify.command import prove_run
from backhand.words import share_interval
from tests.support.float64_reference import without_float32_casts
from tests.support.page import Page
from tests.support.parity import decoder_like, our_gradients, peft_gradients, relative_error
from tests.support.ranks import bits_of_several, start_ranks
from tests.support.tiny_encoders import tiny_encoder
from tests.support.tiny_models import VOCAB_SIZE, attach_lora, save_tiny, tiny_model
from tests.support.tiny_run import StopAfter, TinyRun, final_bits, with_options
from tests.support.tiny_tokenizer import word_piece_tokenizer

RANK, ALPHA, ROWS = 5, 8.5, 7
NOT_THE_HEAD = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
LOSSES: dict[str, Any] = {
    "infonce": lambda: theirs.MultipleNegativesRankingLoss(nn.Identity()),
    "symmetric": lambda: theirs.MultipleNegativesRankingLoss(
        nn.Identity(), directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    ),
    "triplet": lambda: theirs.TripletLoss(
        nn.Identity(), distance_metric=theirs.TripletDistanceMetric.COSINE, triplet_margin=0.5
    ),
    "cosent": lambda: theirs.CoSENTLoss(nn.Identity()),
}


def embedding_examples(pooling: PoolingName, texts: int, *, scored: bool = False) -> list[Example]:
    """Rows of token ids. All texts begin with the same tokens, and all are different."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(ROWS):
        documents = []
        for _ in range(texts):
            ids = [7] * 9 + draw.integers(3, VOCAB_SIZE, int(draw.integers(3, 12))).tolist() + [2, 0]
            supervised = np.full(len(ids), pooling == "mean")
            supervised[0], supervised[-1] = False, True
            documents.append(Example(np.array(ids, dtype=np.int32), supervised, "row"))
        identities = tuple(range(number * texts, (number + 1) * texts))
        embedding = TextIdentities(identities, number % 3 / 3 if scored else None)
        rows.append(replace(documents[0], others=tuple(documents[1:]), facts=embedding))
    return rows


def objective_of(loss: str, pooling: PoolingName, share: bool, **options: Any) -> EmbedObjective:
    rows = embedding_examples(pooling, 2 if loss in ("cosent", "symmetric") else 3, scored=loss == "cosent")
    chosen = ObjectiveOptions("embed", pooling=pooling, embedding_loss=loss, **options)  # type: ignore[arg-type]
    return EmbedObjective(RowPacker(rows, share_prefixes=share), options=chosen)


def our_step(decoder: Decoder, objective: EmbedObjective, rows: int, seeds: bool = False) -> float:
    """Add the gradients of a step in micro-batches of this many rows, and return its loss."""
    packer, every = objective.packer, range(ROWS)
    parts = micro_batches(every, packer.lengths, max_rows=rows)
    work = StepWork(
        packed=lambda number: packer.packed(parts[number], "cpu"),
        packed_tokens=[packer.packed_tokens(part) for part in parts],
        supervised_tokens=packer.supervised_tokens(every),
        dropout_seeds=[100 + number if seeds else None for number in range(len(parts))],
        mean_over=ROWS,
    )
    objective.prepare_step(decoder, every, Communicator(), work, parts)
    results = (
        objective.gradients(decoder, part, MicroBatch(n, work.packed(n), 1 / ROWS, work.dropout_seeds[n]))
        for n, part in enumerate(parts)
    )
    return sum(map(float, results)) / ROWS


def their_loss(adapted: Any, objective: EmbedObjective, loss: str) -> Tensor:
    """The loss of sentence-transformers on the last hidden states of one text at a time."""
    examples, trunk = objective.packer.examples, adapted.get_base_model().model
    columns: list[list[Tensor]] = [[] for _ in examples[0].documents]
    for example in examples:
        for column, document in zip(columns, example.documents, strict=True):
            ids = torch.from_numpy(document.input_ids[:-1].astype(np.int64))[None]
            states = trunk(input_ids=ids).last_hidden_state[0]
            column.append(states.mean(0) if objective.pooling == "mean" else states[-1])
    scores = torch.tensor([row.score or 0.0 for row in objective.identities(range(ROWS))], dtype=torch.float64)
    return LOSSES[loss]().compute_loss_from_embeddings([torch.stack(column) for column in columns], scores)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_sentence_transformers_in_float64(loss: str, pooling: PoolingName) -> None:
    objective = objective_of(loss, pooling, share=True)
    adapted = attach_lora(tiny_model("qwen3").double(), rank=RANK, alpha=ALPHA, target_modules=NOT_THE_HEAD)
    decoder = decoder_like(adapted, ALPHA / RANK, dtype=torch.float64)
    with without_float32_casts(adapted):
        expected = their_loss(adapted, objective, loss)
    expected.backward()
    assert our_step(decoder, objective, 2) == pytest.approx(expected.item(), rel=1e-9)
    ours, reference = our_gradients(decoder.lora), peft_gradients(adapted)
    worst = {name: relative_error(ours[name], reference[name]) for name in reference}
    assert max(worst.values()) <= 1e-9, sorted(worst.items(), key=lambda item: -item[1])[:3]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_gradients_equal_sentence_transformers_in_float32(family: str) -> None:
    objective = objective_of("infonce", "last", share=True)
    adapted = attach_lora(tiny_model(family), rank=RANK, alpha=ALPHA, target_modules=NOT_THE_HEAD)
    decoder = decoder_like(adapted, ALPHA / RANK)
    expected = their_loss(adapted, objective, "infonce")
    expected.backward()
    assert our_step(decoder, objective, 3) == pytest.approx(expected.item(), rel=1e-4)
    ours, reference = our_gradients(decoder.lora), peft_gradients(adapted)
    assert max(relative_error(ours[name], reference[name]) for name in reference) <= 1e-4


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("loss", "pooling"), [("infonce", "last"), ("symmetric", "mean"), ("cosent", "last")])
def test_micro_batches_give_the_gradient_of_one_pass(loss: str, pooling: PoolingName, share: bool) -> None:
    objective = objective_of(loss, pooling, share, matryoshka_dims=(16, 7))
    adapted = attach_lora(tiny_model("llama").double(), rank=RANK, alpha=ALPHA, target_modules=NOT_THE_HEAD)
    decoder = decoder_like(adapted, ALPHA / RANK, dtype=torch.float64)
    assert decoder.lora is not None
    one = our_step(decoder, objective, ROWS)
    expected = decoder.lora.gradients.double().clone()
    for rows in (1, 3):
        decoder.lora.gradients.zero_()
        assert our_step(decoder, objective, rows) == pytest.approx(one, rel=1e-12)
        assert relative_error(decoder.lora.gradients, expected) <= 1e-12
    assert objective.measured(Communicator()).keys() == {"cosine/pairs", "cosine/all"}


def test_vectors_are_gathered_in_little_more_than_their_memory() -> None:
    rows = [Example(np.array([7, 5, 2, 0], dtype=np.int32), np.arange(4) == 3, "row") for _ in range(3000)]
    pairs = [replace(row, others=(row,), facts=TextIdentities((0, 1), None)) for row in rows]
    packer = RowPacker(pairs, share_prefixes=False)
    adapted = attach_lora(tiny_model("qwen3"), rank=RANK, alpha=ALPHA, target_modules=NOT_THE_HEAD)
    decoder = decoder_like(adapted, ALPHA / RANK)
    embed_rows(decoder, RowPacker(pairs[:8], share_prefixes=False), "last", 8, Communicator())  # allocates what stays
    tracemalloc.start()
    try:
        with TensorBytes() as tensors:
            vectors = embed_rows(decoder, packer, "last", 8, Communicator())
        of_python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert vectors is not None and vectors.shape == (6000, decoder.config.hidden_size)
    assert tensors.peak_bytes + of_python < 2 * vectors.nbytes


def test_rows_with_one_positive_are_refused_before_the_first_step(tiny: TinyRun, tmp_path: Path) -> None:
    rows = [{"anchor": f"user asks {word}", "positive": "json"} for word in ("names", "one", "list")]
    (tmp_path / "alike.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = config(tiny, tmp_path, tmp_path / "run", data=(str(tmp_path / "alike.jsonl"),))
    with pytest.raises(DataError, match="no anchor has a negative"):
        train(made)
    assert not (tmp_path / "run").exists()


def test_the_loss_of_prefixes_is_the_sum_of_their_losses() -> None:
    objective = objective_of("infonce", "last", share=True)
    embeddings = torch.randn(ROWS * 3, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, small = objective.losses(range(ROWS), embeddings), objective.losses(range(ROWS), embeddings[:, :7])
    both = replace(objective, options=replace(objective.options, matryoshka_dims=(7,))).losses(range(ROWS), embeddings)
    assert torch.equal(both.losses, whole.losses + small.losses)
    assert torch.equal(both.d_embeddings[:, 7:], whole.d_embeddings[:, 7:])
    assert torch.equal(both.d_embeddings[:, :7], whole.d_embeddings[:, :7] + small.d_embeddings)


def test_both_passes_have_the_same_dropout_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of the second pass give the vectors of the first, to the bit."""
    objective = objective_of("infonce", "last", share=False)
    adapted = attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA, target_modules=NOT_THE_HEAD)
    decoder = decoder_like(adapted, ALPHA / RANK)
    assert decoder.lora is not None
    slots = [replace(slot, dropout=0.3) for slot in decoder.lora.slots.values()]
    lora = type(decoder.lora)(slots)
    lora.values.copy_(decoder.lora.values)
    decoder.attach(lora)
    first: list[Tensor] = []
    second: list[Tensor] = []

    def embedded(*given: Any) -> Tensor:
        first.append(embed_batch(*given))
        return first[-1]

    state_loss = EmbedObjective.state_loss

    def recorded(self: EmbedObjective, rows: Sequence[int], batch: Any, scaling: float) -> Any:
        loss, positions = state_loss(self, rows, batch, scaling)

        def wrapped(states: Tensor) -> Any:
            second.append(batch.per_document(states).clone())
            return loss(states)

        return wrapped, positions

    monkeypatch.setattr("backhand.objectives.vectors.loss.embed_batch", embedded)
    monkeypatch.setattr(EmbedObjective, "state_loss", recorded)
    our_step(decoder, objective, 2, seeds=True)
    assert len(first) == len(second) == 4
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    decoder.lora = None
    assert not torch.equal(first[0], embed_batch(decoder, objective.packer.packed([0, 1], "cpu"), "last"))


def test_duplicates_are_no_negatives_of_each_other() -> None:
    rows = [
        TextIdentities((1, 10, 20), None),
        TextIdentities((2, 10), None),  # the positive of the first anchor
        TextIdentities((1, 11, 2), None),  # the same anchor as the first; its negative is the second anchor
        TextIdentities((3, 1), None),  # its positive is the first anchor
    ]
    # Candidates: positives 10, 10, 11, 1, then negatives 20, 2.
    assert {tuple(pair) for pair in excluded_pairs(rows).tolist()} == {
        *((0, 1), (0, 2), (0, 3)),
        *((1, 0), (1, 5)),
        *((2, 0), (2, 1), (2, 3)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Scores.


def test_retrieval_scores_are_those_of_sentence_transformers() -> None:
    draw = np.random.default_rng(3)
    rows = [
        TextIdentities((int(draw.integers(12)), 100 + int(draw.integers(20)), 200 + number), None)
        for number in range(30)
    ]
    vectors = {text: draw.normal(size=9) for row in rows for text in row.texts}
    embeddings = torch.tensor(np.array([vectors[text] for row in rows for text in row.texts]))
    scores = score_vectors(rows, embeddings)
    queries = [*dict.fromkeys(row.texts[0] for row in rows)]
    corpus = [*dict.fromkeys(text for row in rows for text in row.texts[1:])]
    relevant = {str(one): {str(row.texts[1]) for row in rows if row.texts[0] == one} for one in queries}
    judge = InformationRetrievalEvaluator(
        {str(one): "" for one in queries}, {str(one): "" for one in corpus}, relevant, mrr_at_k=[10], ndcg_at_k=[10]
    )
    units = {one: vector / np.linalg.norm(vector) for one, vector in vectors.items()}
    hits = [[{"corpus_id": str(text), "score": float(units[one] @ units[text])} for text in corpus] for one in queries]
    expected = judge.compute_metrics([sorted(of_query, key=lambda hit: -hit["score"]) for of_query in hits])
    assert scores.values["recall@1"] == pytest.approx(expected["recall@k"][1])
    assert scores.values["recall@10"] == pytest.approx(expected["recall@k"][10])
    assert scores.values["mrr@10"] == pytest.approx(expected["mrr@k"][10])
    assert scores.values["ndcg@10"] == pytest.approx(expected["ndcg@k"][10])
    assert (scores.queries, scores.candidates) == (len(queries), len(corpus))
    low, high = scores.intervals["ndcg@10"]
    assert low < scores.values["ndcg@10"] < high
    cosines = [float(units[a] @ units[b]) for a in units for b in units if a != b]
    assert scores.mean_cosine == pytest.approx(np.mean(cosines))


@pytest.mark.parametrize("labelled", [False, True])
def test_scores_are_compared_with_those_of_a_random_order(labelled: bool) -> None:
    """The expected scores are the means over vectors that mean nothing, also where an anchor is its own candidate."""
    draw = np.random.default_rng(5)
    rows = [TextIdentities((number % 6, 4 + number), None, number % 3 if labelled else None) for number in range(14)]
    found = []
    for _ in range(600):
        vectors = {text: draw.normal(size=20) for row in rows for text in row.texts}
        embeddings = torch.tensor(np.array([vectors[text] for row in rows for text in row.texts]))
        found.append(score_vectors(rows, embeddings))
    chance = found[0].chance
    assert chance.keys() == found[0].values.keys() and found[0].to_json()["chance"] == chance
    for name, value in chance.items():
        assert value == pytest.approx(np.mean([one.values[name] for one in found]), abs=0.02), name
    shown = scores_text(found[0].to_json())
    assert f"; {chance['ndcg@10']:.3f} in random order)" in shown and f"; {chance['recall@1']:.3f} in random" in shown


def test_a_text_in_two_roles_has_the_vector_of_each_role() -> None:
    rows = [TextIdentities((1, 2), None), TextIdentities((2, 3), None)]
    # Text 2 as a candidate is near text 1, and as a query near text 3.
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert score_vectors(rows, embeddings).values["recall@1"] == 1.0


def test_a_share_of_anchors_has_its_wilson_interval() -> None:
    rows = [TextIdentities((2 * one, 2 * one + 1), None) for one in range(10)]
    units = torch.eye(10, dtype=torch.float64).repeat_interleave(2, 0)
    right = score_vectors(rows, units)
    assert set(right.values.values()) == {1.0} and set(right.intervals.values()) == {share_interval(1.0, 10)}
    changed = units.clone()
    changed[[1, 3]] = changed[[3, 1]]  # two anchors find each other's positive first
    some = score_vectors(rows, changed)
    assert some.values["recall@1"] == 0.8 and some.intervals["recall@1"] == share_interval(0.8, 10)
    assert some.intervals["ndcg@10"] != share_interval(some.values["ndcg@10"], 10)


def test_spearman_is_that_of_scipy() -> None:
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=40), draw.integers(5, size=40).astype(np.float64)
    assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert spearman(one, np.zeros(40)) == 0.0


def test_collapsed_vectors_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of("infonce", "last", share=True)
    held_out = HeldOutEmbeddings(objective, 4)
    vectors = [torch.randn(ROWS * 3, 8, generator=torch.Generator().manual_seed(1)), torch.ones(ROWS * 3, 8)]
    monkeypatch.setattr("backhand.objectives.vectors.held_out.embed_rows", lambda *_, **__: vectors.pop(0))
    decoder = decoder_like(attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA), ALPHA / RANK)
    assert held_out.loss(decoder, Communicator()) is not None
    with pytest.raises(CheckError, match="collapsed"):
        held_out.loss(decoder, Communicator())


def test_no_batch_of_held_out_rows_is_a_single_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have no negatives, and a loss of 0. Seven rows are divided into four and three, for 6 rows and for 4."""
    vectors = torch.randn(ROWS * 3, 8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("backhand.objectives.vectors.held_out.embed_rows", lambda *_, **__: vectors)
    decoder = decoder_like(attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA), ALPHA / RANK)
    objective = objective_of("infonce", "last", share=True)
    losses = []
    for size in (6, 4):
        monkeypatch.setattr("backhand.objectives.vectors.held_out.EVALUATED_ROWS", size)
        losses.append(HeldOutEmbeddings(objective, 4).loss(decoder, Communicator()))
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs.


def write_pairs(path: Path, count: int, seed: int = 0) -> str:
    draw = np.random.default_rng(seed)
    words = [f"{one} {other}" for one in ("user", "json", "list") for other in ("asks", "names", "one")]
    rows = []
    for _ in range(count):
        first, second, third = (" ".join(draw.choice(words, 3)) for _ in range(3))
        rows.append({"anchor": f"asks {first}", "positive": f"answers {first} {second}", "negative_1": third})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(tiny: TinyRun, place: Path, output: Path, **options: Any) -> TrainConfig:
    """Two epochs of three steps of two micro-batches."""
    data = {
        "data": (write_pairs(place / "rows.jsonl", 12),),
        "eval_data": (write_pairs(place / "held_out.jsonl", 6, seed=1),),
    }
    made = tiny.config(output, **data, eval_every=2, save_every=1, micro_batch_rows=2)
    chosen = ObjectiveOptions("embed", query_prompt="what is ", matryoshka_dims=(32,))
    return with_options(replace(made, objective=chosen), **options)


@pytest.fixture(scope="module")
def straight(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    place = tmp_path_factory.mktemp("vectors")
    made = config(tiny, place, place / "run", prove_resume=3, epochs=4, answers=2)
    train(made)
    return made


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in line]


def test_a_run_learns_and_scores_retrieval(straight: TrainConfig) -> None:
    steps, evaluations = lines(straight.run.output, "loss"), lines(straight.run.output, "eval_loss")
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert all(-1 <= step["cosine/pairs"] <= 1 and -1 <= step["cosine/all"] <= 1 for step in steps)
    assert all(0 <= line["eval_ndcg@10"] <= 1 for line in evaluations)
    summary = read_summary(straight.run.output / "summary.json")
    assert summary is not None and summary.base_retrieval is not None and summary.adapted_retrieval is not None
    assert summary.base_retrieval["ndcg@10"] == evaluations[0]["eval_ndcg@10"]
    assert summary.adapted_retrieval["queries"] == 6
    shown = closing_lines(summary)
    assert any("6 anchors among 12 candidates" in line for line in shown)
    assert sum(summary.row_scores) / 6 == pytest.approx(summary.adapted_retrieval["ndcg@10"], abs=1e-6)
    assert any(line.startswith("Next: backhand embed") for line in shown)


def test_the_held_out_loss_does_not_depend_on_the_rows_of_a_step(straight: TrainConfig, tmp_path: Path) -> None:
    """Its negatives are the other rows of a batch, so runs of different `batch_rows` are compared in equal batches."""
    first = [
        train(with_options(straight, output=tmp_path / str(rows), batch_rows=rows, max_steps=1, prove_resume=None))
        for rows in (2, 8)
    ]
    assert first[0].base_eval_loss == first[1].base_eval_loss


def test_a_run_from_an_adapter_is_compared_with_that_adapter(straight: TrainConfig, tmp_path: Path) -> None:
    """The scores before the run were the base model's, next to the loss of the adapter that the run started from."""
    start = straight.run.output / "adapter"
    given = {"from_adapter": str(start), "output": tmp_path / "run", "prove_resume": None}
    summary = train(
        with_options(straight, **given, learning_rate=0.5, schedule="constant", warmup_steps=0, max_steps=2)
    )
    before = lines(tmp_path / "run", "eval_loss")[0]
    assert summary.base_retrieval is not None and summary.compared_with_start
    assert summary.base_retrieval["ndcg@10"] == before["eval_ndcg@10"]
    assert summary.base_eval_loss != summary.first_eval_loss
    shown = closing_lines(summary)
    assert any("the first is that of the adapter it started from, and the base model alone has" in one for one in shown)
    assert any(one.startswith("Held-out rows, compared with the adapter it started from: nDCG@10 ") for one in shown)
    page = Page(run_page(read_run(tmp_path / "run")))
    assert "it helped" not in page.one("section", id="result").text.replace("not clear whether it helped", "")
    assert "(the adapter it started from)" in page.one("section", id="result").text
    assert "start adapter" in page.one("section", id="answers").text


def test_a_run_from_an_adapter_takes_its_way_from_a_text_to_a_vector(tiny: TinyRun, tmp_path: Path) -> None:
    train(config(tiny, tmp_path, tmp_path / "first", pooling="mean", max_steps=1))
    made = config(tiny, tmp_path, tmp_path / "run", from_adapter=str(tmp_path / "first" / "adapter"), max_steps=1)
    made = replace(made, objective=ObjectiveOptions("embed"))
    inputs = plan_run(made, resolve_machine(made)).inputs
    taken = inputs.config.objective
    assert (taken.pooling, taken.query_prompt, taken.matryoshka_dims) == ("mean", "what is ", (32,))
    assert not [note for note in inputs.notes if "goes on with" in note]
    with pytest.raises(UsageError, match="pooling: 'mean' in the adapter, 'last' given"):
        train(with_options(made, pooling="last"))
    other = with_options(made, query_prompt="find ", matryoshka_dims=(16,))
    notes = "; ".join(plan_run(other, resolve_machine(other)).inputs.notes)
    assert "--query-prompt 'what is ', and goes on with 'find '" in notes
    assert "--matryoshka-dims 32, and goes on with 16" in notes


def test_a_run_whose_held_out_loss_rose_has_not_helped(straight: TrainConfig) -> None:
    run = read_run(straight.run.output)
    base = {"ndcg@10": 0.2, "intervals": {"ndcg@10": [0.1, 0.3]}}
    adapted = {"ndcg@10": 0.8, "intervals": {"ndcg@10": [0.7, 0.9]}}
    summary = {**run.summary, "base_retrieval": base, "adapted_retrieval": adapted}
    losses = [{"step": 0, "eval_loss": 1.0}, {"step": 2, "eval_loss": 2.0}]
    assert verdict(replace(run, summary=summary)) == "helped"
    assert verdict(replace(run, summary=summary, metrics=losses)) == "unclear"


def test_a_score_that_got_worse_at_a_lower_loss_asks_for_a_lower_rate(straight: TrainConfig) -> None:
    summary = read_summary(straight.run.output / "summary.json")
    assert summary is not None
    base = {"ndcg@10": 0.8, "intervals": {"ndcg@10": [0.7, 0.9]}}
    adapted = {"ndcg@10": 0.2, "intervals": {"ndcg@10": [0.1, 0.3]}, "change": {"ndcg@10": [-0.6, -0.8, -0.4]}}
    more = "The held-out loss was still falling at the end.", "backhand train … --epochs 6"
    fell = {
        "base_eval_loss": 1.0,
        "first_eval_loss": 1.0,
        "best_eval_loss": 0.5,
        "advice": more[0],
        "try_next": more[1],
    }
    worse = replace(summary, base_retrieval=base, adapted_retrieval=adapted, **fell)
    config = replace(straight, optimization=replace(straight.optimization, learning_rate=3e-3))
    found = answer_advice(config, worse, Path("runs/one"))
    assert found is not None and "--learning-rate 0.0015 " in str(found[1])
    assert found[0] == "nDCG@10 got clearly worse although the held-out loss fell: a lower rate changes it less."
    for other in (replace(worse, adapted_retrieval=base | {"change": {}}), replace(worse, best_eval_loss=1.5)):
        assert answer_advice(config, other, Path("runs/one")) is None


def test_base_and_adapter_are_compared_by_the_changes_of_each_query(
    straight: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gain in nearly every query was not clear, because the scores of the queries differ by more than the gain."""
    draw, rows = np.random.default_rng(3), [TextIdentities((2 * one, 2 * one + 1), None) for one in range(100)]
    anchors, noise = draw.normal(size=(2, 100, 12))
    near = draw.uniform(0.2, 1.2, (100, 1))
    before, after = (
        score_vectors(rows, torch.tensor(np.stack((anchors, (near + more) * anchors + noise), 1).reshape(200, 12)))
        for more in (0.0, 0.06)
    )
    assert after.intervals["ndcg@10"][0] < before.values["ndcg@10"]
    scores = after.to_json(before)
    change, low, high = scores["change"]["ndcg@10"]
    assert change == pytest.approx(after.values["ndcg@10"] - before.values["ndcg@10"]) and 0 < low < change < high
    unchanged, low_of_none, high_of_none = before.to_json(before)["change"]["ndcg@10"]
    assert unchanged == 0 and -0.1 < low_of_none < -0.01 and 0.01 < high_of_none < 0.1, "other queries may change"
    words = f"nDCG@10 changed by {change:+.3f} (95 % interval {low:+.3f} to {high:+.3f}), so it helped"
    for base, adapted, shown in ((before, scores, words), (after, before.to_json(after), "so it did not help")):
        found = {"base_retrieval": base.to_json(), "adapted_retrieval": adapted}
        run = read_run(straight.run.output)
        assert shown in headline(replace(run, summary=run.summary | found))
        summary = not_none(read_summary(straight.run.output / "summary.json"))
        assert any(shown in line for line in closing_lines(replace(summary, **found)))
    page = Page(run_page(replace(run, summary=run.summary | {"adapted_retrieval": scores})))
    assert f"{change:+.3f} ({low:+.3f} to {high:+.3f})" in page.one("section", id="answers").text
    print_vectors(VectorEvaluation(100, {"retrieval": before.to_json()}, {"retrieval": scores}))
    assert words.removesuffix(", so it helped") in capsys.readouterr().out


def test_runs_of_vectors_are_compared_by_the_scores_of_each_query(straight: TrainConfig) -> None:
    """A lower loss, which depends on the loss type and on the temperature, said that a run was better."""
    run = read_run(straight.run.output)
    rows = np.linspace(0.2, 0.7, 20)

    def lead(name: str, *shifts: float, of_rows: bool = True, spread: float = 0.0) -> str:
        made = []
        for number, shift in enumerate(shifts):
            each = rows + shift + spread * (-1) ** np.arange(20) * number
            value, interval = float(each.mean()), [float(each.mean()) + side for side in (-0.1, 0.1)]
            one = {name: value, "queries": 20, "intervals": {name: interval}, "chance": {}}
            found = {"base_retrieval": {}, "adapted_retrieval": one, "row_scores": each.tolist() if of_rows else []}
            objective = run.config["objective"] | {"loss_type": ("info_nce", "triplet")[number]}
            summary, config = run.summary | found, run.config | {"objective": objective}
            made.append(replace(run, path=run.path / "ab"[number], summary=summary, config=config))
        return Page(comparison_page(made)).one("p", class_="lead").text

    clear = lead("ndcg@10", 0.0, 0.05, spread=0.01)
    assert clear.startswith("b has clearly the highest nDCG@10 on the same held-out rows: b 0.500 (95 % interval 0.400")
    assert "a 0.450 (95 % interval 0.350 to 0.550); they differ by +0.050 (95 % interval +0.045 to +0.055)" in clear
    assert lead("ndcg@10", 0.0, 0.05, spread=0.2).startswith("No run has clearly the highest nDCG@10")
    assert lead("ndcg@10", 0.0, 0.05, of_rows=False).startswith("No run has clearly"), "the intervals overlap"
    assert lead("spearman", 0.25, 0.0, of_rows=False).startswith("a has clearly the highest Spearman")


def test_correlations_are_compared_on_the_same_resampled_pairs() -> None:
    draw = np.random.default_rng(4)
    given, noise = draw.uniform(size=80), draw.normal(size=80)
    rows = [TextIdentities((2 * one, 2 * one + 1), float(score)) for one, score in enumerate(given)]
    angles = ((1 - given) + 0.5 * abs(noise), (1 - given) + 0.42 * abs(noise))
    before, after = (
        score_vectors(
            rows,
            torch.tensor(np.stack((np.eye(2)[[0] * 80], np.stack((np.cos(one), np.sin(one)), 1)), 1).reshape(160, 2)),
        )
        for one in angles
    )
    change, low, high = after.to_json(before)["change"]["spearman"]
    assert change == pytest.approx(after.values["spearman"] - before.values["spearman"]) and 0 < low < change < high
    assert after.intervals["spearman"][0] < before.values["spearman"]
    assert before.to_json(before)["change"] == {"spearman": [0.0, 0.0, 0.0]}


def test_no_step_is_a_single_row(straight: TrainConfig) -> None:
    made = with_options(straight, batch_rows=11)
    sampler = plan_run(made, resolve_machine(made)).inputs.sampler
    assert [len(sampler.rows_of(step)) for step in range(2)] == [6, 6]


def test_verify_proves_the_gradients_of_vectors(straight: TrainConfig) -> None:
    report = prove_run(straight.run.output, max_tokens=80)
    proved = {result.case: result for result in report.results}
    assert proved["weighted sum of vectors = reference, float64"].error <= 1e-9
    assert proved["merged = unmerged, final states"].passed


def test_commands_for_other_programs_give_vectors(
    straight: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report's exports are accepted. Ollama needs --merge for the pooling, llama.cpp for the end of texts."""
    monkeypatch.chdir(tmp_path)
    result = Page(run_page(read_run(straight.run.output))).one("section", id="result")
    page = "\n".join(pre.text for pre in result.all() if pre.tag == "pre")
    assert not [name for name in ("AutoModelForCausalLM", "llama-cli", "ollama", "backhand chat") if name in page]
    exports = [line for line in page.splitlines() if line.startswith("backhand export")]
    summary = read_summary(straight.run.output / "summary.json")
    assert summary is not None and exports[1] in closing_lines(summary)[-1]
    for export in exports:
        assert main(shlex.split(export)[1:]) == 0
    assert "next: llama-server --embedding -m merged.gguf" in capsys.readouterr().out
    adapter, model = f"--adapter={straight.run.output / 'adapter'}", f"--model={straight.model.model}"
    assert main(["export", adapter, model, "--to", "gguf", "--output", "lora.gguf"]) == 0
    said = capsys.readouterr().out
    assert "does not end texts as in training" in said and "add --merge" in said and "llama" not in said
    assert main(["export", adapter, model, "--to", "ollama", "--output", "ollama"]) == 4
    assert "next: give --merge" in capsys.readouterr().err
    assert main(["export", adapter, model, "--to", "ollama", "--merge", "--output", "ollama"]) == 0
    assert "      curl http://localhost:11434/api/embed -d" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_llama_cpp_gives_the_same_vectors_of_an_encoder(
    tiny: TinyRun, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tiny_encoder(kind, max_position_embeddings=256), tmp_path / "model")
    if kind == "bert":
        word_piece_tokenizer().save_pretrained(model)
    made = config(tiny, tmp_path, tmp_path / "run", max_steps=2)
    train(replace(made, model=replace(made.model, model=str(model))))
    adapter, output = made.run.output / "adapter", tmp_path / "merged.gguf"
    export_command(ExportOptions(adapter, tmp_path / "lora.gguf", str(model), to="gguf"))
    assert f"next: llama-server --embedding --pooling mean -m BASE.gguf --lora {tmp_path}" in capsys.readouterr().out
    export_command(ExportOptions(adapter, output, str(model), to="gguf", merge=True, dtype="float32", quiet=True))
    proofs = [json.loads(line) for line in (made.run.output / "proofs.jsonl").read_text().splitlines()]
    (proof,) = [one for one in proofs if "/v1/embeddings" in one["proof"]]
    assert proof["passed"] and proof["value"] <= 1e-5
    # The file is a model of its own, with the same tokens and vectors.
    texts = ["User asks, json!", "a déjà-vu of names"]
    base, written = (
        backhand.embed(texts, model=path, adapter=given, pooling="mean", dtype="float32", document_prompt="")
        for path, given in ((model, adapter), (output, None))
    )
    assert written == pytest.approx(base, abs=1e-5)


def test_an_encoder_trains_on_vectors_alone_and_is_exported(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = io.StringIO()
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [logging.StreamHandler(logged)])
    model = save_tiny(tiny_encoder("bert", max_position_embeddings=96), tmp_path / "model")
    made = config(tiny, tmp_path, tmp_path / "run", epochs=1)
    made = replace(made, model=replace(made.model, model=str(model)))
    train(made)
    written = json.loads((made.run.output / "adapter" / "adapter_config.json").read_text())
    assert written["task_type"] == "FEATURE_EXTRACTION"
    export_command(
        ExportOptions(
            *(made.run.output / "adapter", tmp_path / "merged", str(model)),
            to="sentence-transformers",
            merge=True,
            quiet=True,
        )
    )
    proofs = [json.loads(line) for line in (made.run.output / "proofs.jsonl").read_text().splitlines()]
    exported = [proof for proof in proofs if proof["command"] == "export"]
    assert len(exported) == 3 and all(proof["passed"] for proof in exported)
    merged, loading = transformers.AutoModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    base = transformers.AutoModel.from_pretrained(model)  # whose pooler no vector depends on
    assert torch.equal(merged.pooler.dense.weight, base.pooler.dense.weight)
    assert "LOAD REPORT" not in logged.getvalue()
    adapter, unmerged = made.run.output / "adapter", tmp_path / "unmerged"
    export_command(ExportOptions(adapter, unmerged, str(model), to="sentence-transformers", quiet=True))
    expected = backhand.embed(["user asks json"], adapter=adapter, model=model, dtype="float32")
    assert SentenceTransformer(str(unmerged)).encode(["user asks json"]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UsageError, match="this bert model has no language-model head"):
        train(with_options(tiny.config(tmp_path / "sft"), model=str(model)))
    short = save_tiny(tiny_encoder("bert", max_position_embeddings=8), tmp_path / "short")
    with pytest.raises(UsageError, match="and the model takes 8"):
        train(with_options(replace(made, run=replace(made.run, output=tmp_path / "cut")), model=str(short)))


def test_figures_of_vectors_are_those_of_all_cosines() -> None:
    draw = torch.Generator().manual_seed(0)
    base, adapted = (nn.functional.normalize(torch.randn(15, 6, generator=draw), dim=1) for _ in range(2))
    rows = [TextIdentities((3 * n, 3 * n + 1, 3 * n + 2), None) for n in range(5)]
    cosines = base[::3] @ base[1::3].T
    histogram = cosine_histogram(base, [3] * 5)
    apart = cosines[~torch.eye(5, dtype=torch.bool)]
    for name, values in (("pairs", cosines.diagonal()), ("others", apart)):
        expected = np.histogram(values.numpy(), BINS, (-1, 1))[0] / len(values)
        assert histogram[name] == pytest.approx(expected)
    changes = (base @ base.T - adapted @ adapted.T).abs()[~torch.eye(15, dtype=torch.bool)]
    assert drift(base, adapted) == pytest.approx(float(changes.mean()))
    (found,) = nearest_texts(rows, base, [str(n) for n in range(15)], [2])
    of_anchor = base[6] @ base.T
    order = sorted((n for n in range(15) if n % 3), key=lambda n: -float(of_anchor[n]))
    assert [one["text"] for one in found] == [str(n) for n in order[:3]]
    assert [one["right"] for one in found] == [n == 7 for n in order[:3]]
    scored = [TextIdentities((2 * n, 2 * n + 1), 0.0) for n in range(5)]
    (found,) = nearest_texts(scored, base[:10], [str(n) for n in range(10)], [0])
    assert not any(one["right"] for one in found), "a score may say that the texts differ"


def test_the_page_shows_the_scores_of_base_and_adapter(straight: TrainConfig) -> None:
    page = Page(run_page(read_run(straight.run.output)))
    assert {"retrieval", "cosines", "loss", "similarities"} <= set(page.charts)
    assert "Nearest texts" in page.one("section", id="answers").text
    assert "Cosines of neutral texts" in page.one("section", id="answers").text
    text = page.one("section", id="answers").text
    assert "Each of 6 anchors ranks 12 candidates" in text and "answered before and after" not in text
    assert "nDCG@10 from" in page.one("section", id="result").text and "perplexity" not in page.one("body").text


def test_the_adapter_says_how_a_text_becomes_a_vector(straight: TrainConfig) -> None:
    record = json.loads((straight.run.output / "adapter" / "backhand.json").read_text())
    assert record["embedding"] == {
        "pooling": "last",
        "query_prompt": "what is ",
        "document_prompt": "",
        "max_length": 128,  # the model takes no more; the limit of the rows is 2,048
        "matryoshka_dims": [32],
    }


def test_a_stopped_run_ends_in_the_same_bits(straight: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(StopAfter.Stopped):
        train(with_options(straight, output=tmp_path / "run", prove_resume=None), callbacks=[StopAfter(3)])
    train(with_options(TrainConfig(), output=tmp_path / "run", resume=True, quiet=True))
    ours, expected = final_bits(tmp_path / "run"), final_bits(straight.run.output)
    assert {**ours, "README.md": b""} == {**expected, "README.md": b""}


def test_two_processes_end_in_the_bits_of_one(tiny: TinyRun, tmp_path: Path) -> None:
    made = config(tiny, tmp_path, tmp_path / "one", recompute="none", epochs=1, dropout=0.1)
    train(made)
    ranks = start_ranks([with_options(made, output=tmp_path / "two")] * 2, tmp_path / "ranks")
    assert ranks.exit_codes() == [0, 0], ranks.said()
    assert bits_of_several(tmp_path / "two") == bits_of_several(tmp_path / "one")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"pooling": "cls"}, UsageError, "causal"),
        ({"matryoshka_dims": (60,)}, UsageError, "60 numbers"),
        ({"engine": "transformers"}, UsageError, "backhand engine alone"),
        ({"system": "Be kind."}, UsageError, "embed does not use it"),
        ({"batch_rows": 1, "micro_batch_rows": 1}, UsageError, "nothing to compare"),
        ({"embedding_loss": "cosent"}, DataError, "0 of 18 rows have a score"),
        ({"triplet_margin": 0.1}, UsageError, "not triplet"),
        ({"target_modules": ("lm_head",)}, UsageError, "vectors do not depend on"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tiny: TinyRun, tmp_path: Path, options: dict[str, Any], error: type[BackhandError], words: str
) -> None:
    with pytest.raises(error, match=words):
        train(config(tiny, tmp_path, tmp_path / "run", **options))


def test_columns_by_name_and_negatives_are_read_and_others_are_named(tiny: TinyRun, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("title,negative_2,body,negative_1,date\nuser,for,asks json,is,1\nlist,,a name,one,2\n")
    data = DataOptions(data=(str(path),), prompt="title", completion="body", eval_fraction=0.0)
    tokenizer = open_model(str(tiny.model)).tokenizer()
    rows, _ = prepare(data, tokenizer, purpose="embeddings", text_format=EmbeddingFormat("mean"))
    assert rows.report.notes == ("not read: the column date",)
    words = [[tokenizer.decode(one.input_ids[:-1]).strip() for one in row.documents] for row in rows.examples]
    assert words == [["user", "asks json", "is", "for"], ["list", "a name", "one"]]


def test_equal_texts_are_a_pair_by_the_masks_of_dropout(tiny: TinyRun, tmp_path: Path) -> None:
    made = config(tiny, tmp_path, tmp_path / "run", max_steps=4, eval_data=(), eval_fraction=0.0)
    columns = {"anchor": "anchor", "positive": "anchor"}
    made = with_options(made, columns=columns, query_prompt="", learning_rate=0.05)
    with pytest.raises(DataError, match="every positive is its anchor") as refused:
        train(made)
    assert "--dropout 0.1" in str(refused.value.next_step)
    train(with_options(made, dropout=0.3))
    cosines = [line["cosine/pairs"] for line in lines(tmp_path / "run", "loss")]
    assert cosines[0] == pytest.approx(1) and cosines[-1] < 0.999, "lora_B is 0 in the first step only"


def test_lint_reports_texts_that_teach_nothing_or_the_wrong_thing(tiny: TinyRun, tmp_path: Path) -> None:
    rows = [
        {"anchor": "user asks", "positive": "user asks"},
        {"anchor": "json", "positive": "a list"},
        {"anchor": "json", "positive": "a name", "negative": "a list"},
        {"anchor": "json", "positive": "a list"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, _ = lint(DataOptions(data=(str(path),)), open_model(str(tiny.model)).tokenizer(), purpose="embeddings")
    assert {finding.kind: finding.where for finding in report.findings} == {
        "equal_positive": (f"{path}:1",),
        "positive_negative": (f"{path}:3",),
        "duplicate": (f"{path}:4 = {path}:2",),
    }
    path.write_text("".join(json.dumps({"anchor": "json", "positive": f"name {n}"}) + "\n" for n in range(40)))
    report, _ = lint(DataOptions(data=(str(path),)), open_model(str(tiny.model)).tokenizer(), purpose="embeddings")
    assert [finding.kind for finding in report.findings] == ["few_anchors"]


def test_texts_are_encoded_as_sentence_transformers_encodes_them(tiny: TinyRun) -> None:
    tokenizer = open_model(str(tiny.model)).tokenizer()
    encoder, stats = TextEncoder(tokenizer), TruncationStats()
    row = EmbeddingRow(("user asks", "the assistant answers in json"), None, "row")
    last = EmbeddingEncoder(encoder, EmbeddingFormat("last", "what is ", "a "), 6)
    (example,) = last.encode([row], stats)
    assert isinstance(example, Example)
    whole = [tokenizer(text)["input_ids"] for text in ("what is user asks", "a the assistant answers in json")]
    ends = [[] if ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id] for ids in whole]
    expected = [(ids[: 6 - len(end)] + end) for ids, end in zip(whole, ends, strict=True)]
    assert [document.input_ids[:-1].tolist() for document in example.documents] == expected
    assert stats.truncated == (["row"] if max(map(len, whole)) + len(ends[0]) > 6 else [])
    assert [document.supervised_tokens for document in (replace(example, others=()), *example.others)] == [1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Vectors in use.

TEXTS = ["user asks json", "the assistant answers", "a list of names and one number is what the user asks for"]


def embed_options(straight: TrainConfig, rows: Path, **run: Any) -> EmbedOptions:
    return EmbedOptions(
        run=EmbedRunOptions(adapter=straight.run.output / "adapter", **run),
        data=RowSources(data=(str(rows),)),
        model=BaseModelOptions(model=straight.model.model, dtype="float32", threads=1),
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    path.write_text("text\n" + "".join(f"{text}\n" for text in TEXTS))
    return path


def test_a_merged_model_gives_the_same_vectors_in_sentence_transformers(
    straight: TrainConfig, texts: Path, tmp_path: Path
) -> None:
    """The export proves it for neutral texts, too."""
    output, adapter = tmp_path / "merged", tmp_path / "adapter"
    shutil.copytree(straight.run.output / "adapter", adapter)
    record = json.loads((adapter / "backhand.json").read_text())
    record["embedding"]["max_length"] = 2048  # more than the model takes
    (adapter / "backhand.json").write_text(json.dumps(record))
    export_command(
        ExportOptions(
            *(adapter, output, straight.model.model),
            to="sentence-transformers",
            merge=True,
            dtype="float32",
            quiet=True,
        )
    )
    model = SentenceTransformer(str(output), device="cpu")
    assert model.prompts == {"query": "what is ", "document": ""} and model.max_seq_length == 128
    for queries, encode in ((False, model.encode_document), (True, model.encode_query)):
        ours = embed(embed_options(straight, texts, queries=queries))
        assert float((ours - torch.from_numpy(encode(TEXTS))).abs().max()) <= 1e-5
    # As a base model, the written files say how a text becomes a vector.
    again = EmbedOptions(
        data=RowSources(data=(str(texts),)), model=BaseModelOptions(model=str(output), dtype="float32", threads=1)
    )
    assert float((embed(again) - torch.from_numpy(model.encode_document(TEXTS))).abs().max()) <= 1e-5


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_llama_cpp_gives_the_same_vectors_of_a_gguf_file(
    straight: TrainConfig, tiny: TinyRun, tmp_path: Path, pooling: PoolingName
) -> None:
    """The export asks llama.cpp, and fails if a vector differs."""
    adapter = straight.run.output / "adapter"
    if pooling == "mean":
        train(config(tiny, tmp_path, tmp_path / "run", pooling="mean", max_steps=2))
        adapter = tmp_path / "run" / "adapter"
    output = tmp_path / "merged.gguf"
    export_command(
        ExportOptions(adapter, output, straight.model.model, to="gguf", merge=True, dtype="float32", quiet=True)
    )
    proofs = [json.loads(line) for line in (adapter.parent / "proofs.jsonl").read_text().splitlines()]
    (proof,) = [one for one in proofs if "/v1/embeddings" in one["proof"]]
    assert proof["passed"] and proof["value"] <= 1e-5


def test_evaluating_vectors_gives_the_scores_of_the_run(
    straight: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    options = EvaluateOptions(
        model=ModelOptions(model=straight.model.model, dtype="float32", threads=1),
        data=DataOptions(data=straight.data.eval_data),
        run=EvaluateRunOptions(adapter=straight.run.output / "adapter", vectors=True, json=True),
    )
    capsys.readouterr()
    evaluate_command(options)
    shown = json.loads(capsys.readouterr().out)
    summary = read_summary(straight.run.output / "summary.json")
    assert summary is not None and shown["rows"] == 6
    for name, expected in (("base", summary.base_retrieval), ("adapted", summary.adapted_retrieval)):
        assert expected is not None
        assert shown[name]["retrieval"]["ndcg@10"] == pytest.approx(expected["ndcg@10"])
        assert shown[name]["retrieval"]["mean_cosine"] == pytest.approx(expected["mean_cosine"], rel=0.05)
    assert "change" not in shown["base"]["retrieval"] and len(shown["adapted"]["retrieval"]["change"]["ndcg@10"]) == 3
    evaluate_command(replace(options, run=replace(options.run, json=False)))
    printed = capsys.readouterr().out
    assert "6 anchors among 12 candidates; 95 % intervals in brackets" in printed and "nDCG@10 changed by " in printed
    assert "ndcg@10" not in printed


def test_the_vectors_of_a_base_model_are_scored_with_the_pooling_that_is_given(straight: TrainConfig) -> None:
    rows, model = straight.data.eval_data, {"model": straight.model.model, "dtype": "float32", "threads": 1}
    result = backhand.evaluate(data=rows, vectors=True, pooling="last", query_prompt="what is ", **model)
    summary = read_summary(straight.run.output / "summary.json")
    assert summary is not None and summary.base_retrieval is not None and result.adapted is None
    assert result.base["retrieval"]["ndcg@10"] == pytest.approx(summary.base_retrieval["ndcg@10"])
    other = backhand.evaluate(data=rows, vectors=True, pooling="mean", **model)
    assert other.base["retrieval"]["mean_cosine"] != result.base["retrieval"]["mean_cosine"]
    refused = "pooling is given, but no vectors are measured\n  next: give vectors=True as well, or"
    for measured in ({}, {"rankings": True}, {"reward": "exact"}):
        with pytest.raises(UsageError) as raised:
            backhand.evaluate(data=rows, pooling="mean", **measured, **model)
        assert str(raised.value).startswith(refused)


def test_vectors_are_written_as_an_array_or_as_json_lines(
    straight: TrainConfig, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = embed_command(embed_options(straight, texts, output=tmp_path / "vectors.npy", dims=32)).numpy()
    assert np.array_equal(np.load(tmp_path / "vectors.npy"), vectors) and vectors.shape == (3, 32)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), rel=1e-6)
    capsys.readouterr()
    embed_command(embed_options(straight, texts, dims=32))
    shown = [json.loads(line)["embedding"] for line in capsys.readouterr().out.splitlines()]
    assert np.array_equal(np.array(shown, dtype=np.float32), vectors)
    with pytest.raises(UsageError, match="60 numbers"):
        embed(embed_options(straight, texts, dims=61))
    model: dict[str, Any] = {
        "model": straight.model.model,
        "adapter": straight.run.output / "adapter",
        "dtype": "float32",
    }
    in_python = backhand.embed(data=texts, dims=32, **model)
    assert np.array_equal(in_python, vectors)
    one, several = backhand.embed("list", dims=32, **model), backhand.embed(["list", "user asks"], dims=32, **model)
    assert one.shape == (32,) and several == pytest.approx(np.stack([one, several[1]]), abs=1e-6)
    with pytest.raises(UsageError, match="either texts or data"):
        backhand.embed(**model)
    with pytest.raises(UsageError, match="returns the vectors"):
        backhand.embed("list", output="vectors.npy", **model)


def test_options_other_than_those_of_the_training_are_noted(
    straight: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    model: dict[str, Any] = {"model": straight.model.model, "adapter": straight.run.output / "adapter"}
    backhand.embed(TEXTS, **model, dims=32, queries=True, query_prompt="what is ")
    assert "note" not in capsys.readouterr().err
    backhand.embed(TEXTS, **model, pooling="mean", dims=20, query_prompt="what is ")
    said = capsys.readouterr().err
    assert 'trained with pooling="last", not pooling="mean"' in said
    assert "query_prompt is not used, because the texts are no queries: give queries" in said
    assert "trained with matryoshka_dims=32" in said and "cut to 20 numbers" in said
    backhand.embed(TEXTS, **model, queries=True, document_prompt="")
    assert "document_prompt is not used" in capsys.readouterr().err


def test_a_model_without_a_pooling_is_refused(straight: TrainConfig, texts: Path) -> None:
    options = replace(embed_options(straight, texts), run=EmbedRunOptions())
    with pytest.raises(UsageError, match="neither the adapter nor the model says"):
        embed(options)
    scored = EvaluateOptions(
        straight.model, DataOptions(data=straight.data.eval_data), EvaluateRunOptions(vectors=True)
    )
    with pytest.raises(UsageError, match="neither the adapter nor the model says") as raised:
        evaluate_command(scored)
    assert str(raised.value.next_step).startswith("give --pooling last or --pooling mean, or --adapter")
    with pytest.raises(UsageError, match="causal"):
        embed(replace(options, vectors=VectorOptions(pooling="cls")))
    assert embed(replace(options, vectors=VectorOptions(pooling="mean"))).shape == (3, 60)


def test_the_hardest_negatives_are_those_of_a_full_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backhand.loop.embed.BLOCK_SCORES", 3 * 20)  # blocks of three anchors
    generator = torch.Generator().manual_seed(0)
    anchors, candidates = (
        nn.functional.normalize(torch.randn(count, 5, generator=generator), dim=1) for count in (8, 20)
    )
    positives, own = [[n, n + 1] for n in range(8)], [None, 12, *[None] * 6]
    found = [*hardest(anchors, candidates, positives, own, 3, 0.1)]
    for number, negatives in enumerate(found):
        scores = (candidates @ anchors[number]).tolist()
        nearest = max(scores[place] for place in positives[number])
        limit = nearest - 0.1 * abs(nearest)
        left = [n for n in range(20) if n not in (*positives[number], own[number]) and scores[n] <= limit]
        assert negatives == sorted(left, key=lambda n: -scores[n])[:3]


def test_texts_and_pairs_are_read_as_in_training(straight: TrainConfig, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(straight.data.eval_data[0]).read_text().splitlines()]
    pairs = [{"asked": row["anchor"], "said": row["positive"]} for row in rows]
    held_out, texts = tmp_path / "named.jsonl", tmp_path / "further.jsonl"
    held_out.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    texts.write_text("".join(json.dumps({"said": text}) + "\n" for text in TEXTS))
    named = {"data": (str(held_out),), "eval_data": (), "eval_fraction": 0.0, "prompt": "asked", "completion": "said"}
    train(with_options(straight, output=tmp_path / "run", prove_resume=None, max_steps=1, **named))
    made: dict[str, Any] = {"model": straight.model.model, "adapter": tmp_path / "run" / "adapter", "dtype": "float32"}
    for queries, column in ((True, "asked"), (False, "said")):
        expected = backhand.embed([pair[column] for pair in pairs], queries=queries, **made)
        assert np.array_equal(backhand.embed(data=held_out, queries=queries, **made), expected)
        assert np.array_equal(backhand.embed(data=held_out, prompt=column, queries=queries, **made), expected)
    mined = backhand.mine(data=held_out, corpus=texts, negatives=3, relative_margin=0.0, **made)
    given = [{"anchor": row["anchor"], "positive": row["positive"]} for row in rows]
    corpus = [{"text": text} for text in TEXTS]
    assert mined == backhand.mine(data=given, corpus=corpus, negatives=3, relative_margin=0.0, **made)


def test_mined_rows_have_negatives_of_other_rows_and_of_the_corpus(
    straight: TrainConfig, texts: Path, tmp_path: Path
) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl", 5, seed=2)
    output = tmp_path / "mined.jsonl"
    options = MineOptions(
        run=MineRunOptions(
            *(straight.run.output / "adapter",), corpus=(str(texts),), negatives=3, relative_margin=0.0, output=output
        ),
        data=RowSources(data=(rows,)),
        model=BaseModelOptions(model=straight.model.model, dtype="float32", threads=1),
    )
    mined = mine_command(options)
    assert mined == [json.loads(line) for line in output.read_text().splitlines()]
    given = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    positives = {row["positive"] for row in given}
    for row, before in zip(mined, given, strict=True):
        assert (row["anchor"], row["positive"]) == (before["anchor"], before["positive"])
        negatives = [row[name] for name in row if name.startswith("negative")]
        assert {*negatives} <= (positives | {*TEXTS}) - {row["positive"], row["anchor"]}
    assert any(len(row) > 2 for row in mined)
