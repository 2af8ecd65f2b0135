"""Rankings: loss and gradients against autograd, the prompt of Qwen3-Reranker, and whole runs with their scores."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import backhand
from backhand import printing
from backhand.data.data_report import TruncationStats
from backhand.data.documents import RowRenderer
from backhand.data.examples import Example
from backhand.data.held_out import split
from backhand.data.lint import lint
from backhand.data.options import DataOptions, TemplateOptions
from backhand.data.packing import RowPacker
from backhand.data.prepare import prepare
from backhand.data.ranking_examples import SYSTEM, RankingEncoder, RankingFormat
from backhand.data.rows import RankedTexts, RankingRow
from backhand.errors import ArtifactError, CheckError, DataError, UsageError, not_none
from backhand.interop.command import export_command
from backhand.interop.options import ExportOptions
from backhand.loop.evaluate import Evaluation, evaluate, evaluate_command
from backhand.loop.rank import rank, rank_command
from backhand.loop.ranking_scores import score_rankings
from backhand.loop.retrieval_scores import scores_text
from backhand.nn.loading import open_model
from backhand.objectives.rankings.loss import RankObjective
from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions, RankOptions, RankRunOptions
from backhand.options.config import ModelOptions, TrainConfig
from backhand.options.objectives import ObjectiveOptions
from backhand.report.headline import headline, verdict
from backhand.report.page import run_page
from backhand.report.run_record import read_run
from backhand.runs.row_changes import score_words
from backhand.runs.summary import read_summary
from backhand.training.advice import answer_advice
from backhand.training.console import closing_lines
from backhand.training.curves import Curves
from backhand.training.run import train
from backhand.verify.command import prove_run
from backhand.verify.report import MODEL
from backhand.words import share_interval
from tests.support.float64_reference import without_float32_casts
from tests.support.page import Page
from tests.support.parity import decoder_like, our_gradients, peft_gradients, relative_error
from tests.support.ranks import bits_of_several, start_ranks
from tests.support.tiny_models import VOCAB_SIZE, attach_lora, save_tiny, tiny_model
from tests.support.tiny_run import StopAfter, TinyRun, final_bits, with_options
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.trl_templates import tokenizer_for

RANK, ALPHA, YES, NO = 5, 8.5, 5, 6
TARGETS = ((1.0, 0.0, 0.0), (1.0, 0.25), (0.0, 1.0, 0.5, 0.0), (0.75, 0.0))
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pointwise": lambda scores, targets: binary_cross_entropy_with_logits(
        scores, targets, pos_weight=scores.new_tensor(1.5)
    ),
    "listwise": lambda scores, targets: cross_entropy(scores, targets / targets.sum()),
    "listnet": lambda scores, targets: cross_entropy(scores, targets.softmax(0)),
}


def options_of(loss: str) -> ObjectiveOptions:
    return ObjectiveOptions(
        "rank",
        ranking_loss=loss,
        positive_weight=1.5 if loss == "pointwise" else 1.0,  # type: ignore[arg-type]
    )


def ranking_examples() -> list[Example]:
    """Rows of token ids. The documents of a row begin with the same tokens, those of its query."""
    draw = np.random.default_rng(0)
    rows = []
    for number, targets in enumerate(TARGETS):
        query = draw.integers(7, VOCAB_SIZE, int(draw.integers(33, 50)))
        documents = []
        for _ in targets:
            text = draw.integers(7, VOCAB_SIZE, int(draw.integers(3, 12)))
            for answer in (YES, NO):
                ids = np.concatenate((query, text, [answer])).astype(np.int32)
                documents.append(Example(ids, np.arange(len(ids)) == len(ids) - 1, "row"))
        texts = RankedTexts(number, tuple(range(len(targets))), targets)
        rows.append(replace(documents[0], others=tuple(documents[1:]), facts=texts))
    return rows


def their_loss(adapted: Any, examples: Sequence[Example], loss: str) -> Tensor:
    """The mean loss of the rows by torch's losses of the logits of both answers, one document at a time."""
    losses = []
    for example in examples:
        assert isinstance(example.facts, RankedTexts)
        prompts = [torch.from_numpy(one.input_ids[:-1].astype(np.int64)) for one in example.documents[::2]]
        logits = [adapted(input_ids=prompt[None]).logits[0, -1] for prompt in prompts]
        scores = torch.stack([of_document[YES] - of_document[NO] for of_document in logits])
        losses.append(LOSSES[loss](scores, torch.tensor(example.facts.targets, dtype=scores.dtype)))
    return torch.stack(losses).mean()


def compare(loss: str, adapted: Any, dtype: torch.dtype, *, share: bool, bound: float) -> None:
    examples = ranking_examples()
    expected = their_loss(adapted, examples, loss)
    expected.backward()
    decoder = decoder_like(adapted, ALPHA / RANK, dtype=dtype)
    packer = RowPacker(examples, share_prefixes=share)
    objective, rows, total = RankObjective(packer, options=options_of(loss)), len(examples), 0.0
    for number, group in enumerate(([0, 1], [2, 3])):
        batch = packer.packed(group, "cpu")
        total += float(decoder.loss_and_gradients(batch, 1 / rows, token_loss=objective.token_loss(number, group)))
    assert total / rows == pytest.approx(expected.item(), rel=bound)
    ours, theirs = our_gradients(decoder.lora), peft_gradients(adapted)
    worst = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    assert max(worst.values()) <= bound, sorted(worst.items(), key=lambda item: -item[1])[:3]
    assert all(bool(gradient.any()) for gradient in ours.values())


@pytest.mark.parametrize(("loss", "share"), [("pointwise", True), ("listwise", False), ("listnet", True)])
def test_float64_equals_autograd(loss: str, share: bool) -> None:
    adapted = attach_lora(tiny_model("qwen3").double(), rank=RANK, alpha=ALPHA)
    with without_float32_casts(adapted):
        compare(loss, adapted, torch.float64, share=share, bound=1e-9)


@pytest.mark.parametrize(("family", "loss"), [("llama", "pointwise"), ("gemma2", "listwise")])
def test_float32_equals_autograd(family: str, loss: str) -> None:
    compare(loss, attach_lora(tiny_model(family), rank=RANK, alpha=ALPHA), torch.float32, share=True, bound=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and prompts.


def answering_tokenizer() -> Any:
    """The tiny tokenizer, to which both answers are one token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["yes", "no"])
    return tokenizer


def encoder(max_length: int = 1000, *, drop: bool = False) -> RankingEncoder:
    return RankingEncoder(
        RowRenderer(answering_tokenizer(), TemplateOptions()), RankingFormat("find it"), max_length, drop=drop
    )


def encoded(row: RankingRow, stats: TruncationStats | None = None, **limits: Any) -> Example | None:
    (example,) = encoder(**limits).encode([row], TruncationStats() if stats is None else stats)
    assert not isinstance(example, DataError), example
    return example


def text_of(document: Example) -> str:
    return str(answering_tokenizer().decode(document.input_ids))


def test_the_prompt_is_that_of_qwen3_reranker() -> None:
    """The two answers to a prompt are documents next to each other."""
    example = encoded(RankingRow("what is json", ("a list", "one name"), (1.0, 0.0), "row"))
    assert example is not None
    prompts = [
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<Instruct>: find it\n<Query>: what is json\n"
        f"<Document>: {text}<|im_end|>\n<|im_start|>assistant\n"
        for text in ("a list", "one name")
    ]
    assert [*map(text_of, example.documents)] == [prompt + answer for prompt in prompts for answer in ("yes", "no")]
    assert all(one.supervised.tolist() == [False] * (len(one) - 1) + [True] for one in example.documents)


@pytest.mark.parametrize(("name", "begin", "end"), [("qwen3", "", "<think>\n\n</think>\n\n"), ("gemma", SYSTEM, "")])
def test_templates_with_thoughts_or_without_system_messages_fit_it(name: str, begin: str, end: str) -> None:
    """The answer follows the empty thought, and the system message moves into the prompt where it is refused."""
    tokenizer = copy.deepcopy(tokenizer_for(name))
    tokenizer.add_tokens(["yes", "no"])
    encoder = RankingEncoder(RowRenderer(tokenizer, TemplateOptions()), RankingFormat("find it"), 1000)
    (example,) = encoder.encode([RankingRow("what is json", ("a list",), (1.0,), "row")], TruncationStats())
    assert isinstance(example, Example) and encoder.prompt_end == end
    shown = [str(tokenizer.decode(one.input_ids)) for one in example.documents]
    assert shown[0].endswith(f"{end}yes") and shown[1] == f"{shown[0].removesuffix('yes')}no"
    assert f"{begin}\n\n<Instruct>: find it\n" in shown[0] if begin else f"<|im_start|>system\n{SYSTEM}" in shown[0]


def test_a_tokenizer_without_the_answers_is_refused() -> None:
    with pytest.raises(DataError, match="not one token each"):
        RankingEncoder(RowRenderer(tiny_tokenizer(), TemplateOptions()), RankingFormat(), 1000)


def test_a_long_document_loses_its_end_and_keeps_the_answer() -> None:
    whole = encoded(RankingRow("what is json", ("a list " * 9, "one name"), (1.0, 0.0), "row"))
    assert whole is not None
    stats = TruncationStats()
    cut = encoded(
        RankingRow("what is json", ("a list " * 9, "one name"), (1.0, 0.0), "row"), stats, max_length=len(whole) - 5
    )
    assert cut is not None and len(cut) == len(whole) - 5 and stats.truncated == ["row"]
    assert text_of(cut).endswith("<|im_end|>\n<|im_start|>assistant\nyes")
    assert np.array_equal(cut.others[1].input_ids, whole.others[1].input_ids), "short documents are unchanged"
    assert (
        encoded(
            RankingRow("what is json", ("a list " * 9,), (1.0,), "row"), stats, max_length=len(whole) - 5, drop=True
        )
        is None
    )
    assert encoded(RankingRow("json " * 40, ("a list",), (1.0,), "row"), stats, max_length=200) is None
    assert stats.dropped_long == ["row", "row"]


def prepared(path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataOptions(data=(str(path),), eval_fraction=0.0, **options)
    return prepare(data, answering_tokenizer(), purpose="rankings", text_format=RankingFormat())[0]


@pytest.mark.parametrize(
    ("row", "documents", "targets"),
    [
        ({"query": "q", "positive": "a", "negative": "b"}, 2, (1.0, 0.0)),
        ({"anchor": "q", "positive": "a", "negative_1": "b", "negative_2": None}, 2, (1.0, 0.0)),
        ({"question": "q", "answer": "a", "negatives": ["b", "c"]}, 3, (1.0, 0.0, 0.0)),
        ({"query": "q", "document": "a", "score": 0.5}, 1, (0.5,)),
        ({"query": "q", "document": "a", "label": True}, 1, (1.0,)),
        ({"sentence1": "q", "sentence2": "a", "label": 0}, 1, (0.0,)),
        ({"query": "q", "docs": ["a", "b"], "labels": [3, 0]}, 2, (3.0, 0.0)),
    ],
)
def test_forms_of_sentence_transformers_are_read(
    row: dict[str, Any], documents: int, targets: tuple[float, ...], tmp_path: Path
) -> None:
    (example,) = prepared(tmp_path / "rows.jsonl", [row]).examples
    assert example.facts.targets == targets and len(example.documents) == 2 * documents


def test_columns_of_a_table_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("asked,page,label\nwhat is json,a list,1\nwhat is json,a name,0\n")
    data = DataOptions(data=(str(path),), eval_fraction=0.0, prompt="asked", completion="page")
    rows, _ = prepare(data, answering_tokenizer(), purpose="rankings", text_format=RankingFormat())
    texts = rows.examples.facts(RankedTexts)
    assert [one.targets for one in texts if one] == [(1.0,), (0.0,)]
    assert texts[0] is not None and texts[1] is not None and texts[0].query == texts[1].query


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"query": "q", "positive": " "}, "positive is empty"),
        ({"query": "q", "docs": ["a", "b"], "labels": [1]}, "2 documents and 1 scores"),
        ({"query": "q", "document": "a", "score": "high"}, "not a number"),
        ({"query": "q", "document": "a", "score": "1,234"}, "may be a number with a decimal comma"),
        ({"text": "a"}, "do not fit rankings"),
    ],
)
def test_rows_without_texts_or_numbers_are_errors(row: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=what):
        prepared(tmp_path / "rows.jsonl", [row])


def test_the_rows_of_a_query_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"query": f"q{n % 5}", "document": f"text {n}", "label": n % 2} for n in range(20)]
    train_rows, held_out = split(prepared(tmp_path / "rows.jsonl", rows), 0.4, seed=0)
    queries = [{row.query for row in one.examples.facts(RankedTexts)} for one in (train_rows, held_out)]
    assert queries[0].isdisjoint(queries[1]) and len(queries[1]) == 2


def test_lint_finds_relevant_negatives_and_documents_given_twice(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "positive": "a", "negative_1": "b", "negative_2": "b"},
        {"query": "q", "positive": "c", "negative_1": "a", "negative_2": "d"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, _ = lint(DataOptions(data=(str(path),)), answering_tokenizer(), purpose="rankings")
    found = {finding.kind: finding.where for finding in report.findings}
    assert found == {"twice": (f"{path}:1",), "relevant_negative": (f"{path}:2",)}
    assert report.train.documents == 12 and "two documents, which end in yes and in no" in report.train.notes[-1]
    path.write_text("".join(json.dumps({"query": "q", "positive": text}) + "\n" for text in "abc"))
    report, _ = lint(DataOptions(data=(str(path),)), answering_tokenizer(), purpose="rankings")
    assert [(finding.kind, finding.count) for finding in report.findings] == [("one_score", 3)]


# ---------------------------------------------------------------------------------------------------------------------
# Scores.


def test_scores_are_those_of_sentence_transformers() -> None:
    draw = np.random.default_rng(0)
    evaluator = CrossEncoderRerankingEvaluator([{"query": "q", "positive": ["a"], "negative": ["b"]}], write_csv=False)
    rows, scores, expected = [], [], []
    for query in range(12):
        relevant, others = int(draw.integers(1, 4)), int(draw.integers(2, 20))
        targets = [1.0] * relevant + [0.0] * others
        of_row = draw.normal(size=len(targets))
        expected.append(evaluator.compute_metrics(targets, of_row))
        # the documents of a query may be in several rows
        rows += [
            RankedTexts(query, (0,), (1.0,)),
            RankedTexts(query, tuple(range(1, len(targets))), tuple(targets[1:])),
        ]
        scores += of_row.tolist()
    found = score_rankings(rows, scores)
    mrr, ndcg, _ = np.array(expected).mean(0)
    assert found.values == pytest.approx({"mrr@10": mrr, "ndcg@10": ndcg}) and found.queries == 12
    low, high = found.intervals["ndcg@10"]
    assert low < found.values["ndcg@10"] < high


def test_queries_that_are_all_ranked_perfectly_leave_an_interval() -> None:
    """Resampling ten equal values gives 1.0 to 1.0, whatever the number of queries."""
    rows = [RankedTexts(query, (0, 1, 2), (1.0, 0.0, 0.0)) for query in range(10)]
    found = score_rankings(rows, [1.0, 0.0, 0.0] * 10)
    assert found.values == {"mrr@10": 1.0, "ndcg@10": 1.0}
    assert set(found.intervals.values()) == {share_interval(1.0, 10)} and share_interval(1.0, 10)[0] < 0.75
    second = score_rankings(rows, [0.5, 1.0, 0.0] * 10)
    low, high = second.intervals["mrr@10"]
    assert low < 0.3 < second.values["mrr@10"] == 0.5 < 0.7 < high
    assert "95 % interval 0.722 to 1.000" in scores_text(found.to_json())
    ordered = [RankedTexts(query, (0,), (query / 12,)) for query in range(12)]
    right, wrong = (score_rankings(ordered, scores) for scores in (list(range(12)), list(range(12))[::-1]))
    low, high = right.intervals["spearman"]
    assert low < 0.5 and high == pytest.approx(1.0)
    change, low, high = right.to_json(wrong)["change"]["spearman"]
    assert 0 < low < 1.5 and (change, high) == pytest.approx((2.0, 2.0))


def test_equal_scores_have_the_worst_order_and_single_documents_a_correlation() -> None:
    constant = score_rankings([RankedTexts(0, (0, 1, 2, 3), (1.0, 0.0, 0.0, 0.0))], [0.5] * 4)
    assert constant.values["mrr@10"] == 0.25 and constant.spread == 0
    alone = [RankedTexts(query, (0,), (query / 4,)) for query in range(4)]
    assert score_rankings(alone, [-1.0, 0.0, 2.0, 1.0]).values == pytest.approx({"spearman": 0.8})


def test_constant_scores_end_a_run() -> None:
    objective = RankObjective(RowPacker(ranking_examples(), share_prefixes=False))
    documents = 2 * sum(map(len, TARGETS))
    apart = torch.arange(documents, dtype=torch.float64) ** 2
    losses, scores = objective.evaluated(range(4), apart, torch.ones(4))
    assert scores["spread"] > 0 and losses.tolist() == [1.0] * 4
    with pytest.raises(CheckError, match="the scores are constant"):
        objective.evaluated(range(4), torch.ones(documents), torch.ones(4))


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs.

_WORDS = ["user", "json", "list", "name", "number"]


def write_rows(path: Path, count: int, seed: int = 0) -> str:
    """Queries with a document that contains their word, and two that contain others."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        right, *wrong = (_WORDS[int(number)] for number in draw.permutation(len(_WORDS))[:3])
        rows.append({"query": right, "positive": f"a {right}", "negatives": [f"a {word}" for word in wrong]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_answering(model: Any, directory: Path) -> Path:
    """Write a model with a tokenizer that has both answers, and positions for the prompt."""
    model.config.max_position_embeddings = 512
    save_tiny(model, directory, tokenizer=False)
    answering_tokenizer().save_pretrained(directory)
    return directory


def config(tiny: TinyRun, place: Path, output: Path, **options: Any) -> TrainConfig:
    """Two epochs of three steps, of a model whose tokenizer has both answers."""
    model = save_answering(tiny_model("llama-tied", num_hidden_layers=2), place / "model")
    data = {
        "model": str(model),
        "data": (write_rows(place / "rows.jsonl", 11),),
        "eval_data": (write_rows(place / "held_out.jsonl", 6, seed=1),),
    }
    made = tiny.config(output, **data, eval_every=2, save_every=1, micro_batch_rows=2)
    return with_options(replace(made, objective=ObjectiveOptions("rank", instruction="find it")), **options)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in line]


@pytest.fixture(scope="module")
def straight(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    place = tmp_path_factory.mktemp("rankings")
    made = config(tiny, place, place / "run", prove_resume=3, epochs=3)
    train(made)
    return made


def test_a_run_learns_and_shows_its_scores(straight: TrainConfig) -> None:
    run = straight.run.output
    steps, evaluations = lines(run, "loss"), lines(run, "eval_loss")
    assert evaluations[-1]["eval_loss"] < 0.9 * evaluations[0]["eval_loss"]
    assert all(0 <= step["hit@1"] <= 1 and "margin" in step for step in steps)
    summary = read_summary(run / "summary.json")
    assert summary is not None and summary.base_retrieval is not None and summary.adapted_retrieval is not None
    assert summary.adapted_retrieval["ndcg@10"] == pytest.approx(
        min(evaluations, key=lambda line: line["eval_loss"])["eval_ndcg@10"]
    )
    shown = closing_lines(summary)
    assert any(line.startswith("Held-out rows: nDCG@10") and "relevance on average" in line for line in shown)
    assert any(line.startswith("Next: backhand rank") for line in shown)
    page = Page(run_page(read_run(run)))
    assert "Not recorded" not in page.one("section", id="answers").text
    assert {"retrieval", "relevance"} <= set(page.charts)
    answers = page.one("section", id="answers").text
    assert "Rankings of held-out rows" in answers and "nDCG@10" in answers and "ndcg@10" not in answers


def test_scores_are_compared_with_a_random_order_and_the_base_rate(straight: TrainConfig) -> None:
    rows = [RankedTexts(n, tuple(range(5)), (1.0, 0.0, 0.0, 0.0, 0.0)) for n in range(4)]
    draw = np.random.default_rng(0)
    orders = [score_rankings(rows, draw.normal(size=20).tolist()) for _ in range(500)]
    chance = orders[0].chance["ndcg@10"]
    assert chance == pytest.approx(0.590, abs=5e-4)
    assert np.mean([one.values["ndcg@10"] for one in orders]) == pytest.approx(chance, abs=0.02)
    summary = read_summary(straight.run.output / "summary.json")
    assert summary is not None and summary.adapted_retrieval is not None
    measured = summary.adapted_retrieval["chance"]
    held_out = [json.loads(line) for line in Path(straight.data.eval_data[0]).read_text().splitlines()]
    assert held_out and 0 < measured["loss"] < np.log(2)  # that of the score 0
    shown = "\n".join(closing_lines(summary))
    assert "in random order" in shown and f"the best equal scores have {measured['loss']:.4f}" in shown
    run = read_run(straight.run.output)
    assert "in random order" in headline(run)
    assert b"in random order" in run_page(run)
    base = {"ndcg@10": 0.2, "intervals": {"ndcg@10": [0.1, 0.3]}}
    adapted = {"ndcg@10": 0.55, "intervals": {"ndcg@10": [0.45, 0.65]}, "chance": {"ndcg@10": 0.59}}
    below = {**run.summary, "base_retrieval": base, "adapted_retrieval": adapted}
    assert verdict(replace(run, summary=below)) == "unclear"
    assert verdict(replace(run, summary={**below, "adapted_retrieval": {**adapted, "chance": {}}})) == "helped"


@pytest.mark.parametrize(
    ("gain", "steps", "words"),
    [
        (
            (0.02, -0.04, 0.09),
            60,
            "loss was lowest after step 15 already: more rows come before more steps.",
        ),
        ((0.02, -0.04, 0.09), 8, "not clearly learnt after 8 steps; such rows have"),
        ((0.04, -0.02, 0.1), 60, "2 held-out rows are too few to tell whether the rankings are learnt"),
        ((0.04, 0.01, 0.1), 60, None),
    ],
)
def test_a_ranking_that_may_be_chance_asks_for_no_fewer_steps(
    gain: tuple[float, float, float], steps: int, words: str | None, straight: TrainConfig
) -> None:
    summary = not_none(read_summary(straight.run.output / "summary.json"))
    scores = not_none(summary.adapted_retrieval) | {"change": {"ndcg@10": gain}}
    measured = replace(summary, adapted_retrieval=scores, held_out_rows=2, steps=steps, try_next="… --max-steps 19")
    rose = Curves([(steps * part // 4, loss) for part, loss in enumerate((0.69, 0.642, 0.66, 0.67, 0.68))], [])
    advised = answer_advice(straight, measured, straight.run.output, rose)
    assert advised is None if words is None else advised is not None and words in advised[0]


def test_rows_that_rank_nothing_are_refused_and_have_no_scores(straight: TrainConfig, tmp_path: Path) -> None:
    """Spearman's correlation with equal targets was 0.000, and the fall of the loss was called help."""
    rows = [{"query": f"asks {n}", "positive": f"answer {n}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = with_options(straight, output=tmp_path / "run", max_steps=2, prove_resume=None)
    alike = (str(tmp_path / "rows.jsonl"),)
    with pytest.raises(DataError, match="there is nothing to rank") as refused:
        train(with_options(made, data=alike))
    assert "backhand mine --data FILE finds" in str(refused.value.next_step) and not (tmp_path / "run").exists()
    summary = train(with_options(made, eval_data=alike))
    assert summary.adapted_retrieval is not None and not summary.adapted_retrieval["intervals"]
    assert "Held-out rows: no score, since all documents are equally relevant." in closing_lines(summary)
    assert verdict(read_run(tmp_path / "run")) == "unclear"
    assert b"nothing to rank" in run_page(read_run(tmp_path / "run"))


def test_a_stopped_run_ends_in_the_same_bits(straight: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(StopAfter.Stopped):
        train(with_options(straight, output=tmp_path / "run", prove_resume=None), callbacks=[StopAfter(3)])
    train(with_options(TrainConfig(), output=tmp_path / "run", resume=True, quiet=True))
    ours, theirs = final_bits(tmp_path / "run"), final_bits(straight.run.output)
    assert {name: data for name, data in ours.items() if name != "README.md"} == {
        name: data for name, data in theirs.items() if name != "README.md"
    }


def test_two_processes_end_in_the_bits_of_one(tiny: TinyRun, tmp_path: Path) -> None:
    made = config(tiny, tmp_path, tmp_path / "one", micro_batch_rows=1, recompute="none", epochs=1)
    made = with_options(made, ranking_loss="listwise")
    train(made)
    ranks = start_ranks([with_options(made, output=tmp_path / "two")] * 2, tmp_path / "ranks")
    assert ranks.exit_codes() == [0, 0], ranks.said()
    assert bits_of_several(tmp_path / "two") == bits_of_several(tmp_path / "one")


def test_a_quantized_base_learns(straight: TrainConfig, tmp_path: Path) -> None:
    made = with_options(
        straight, output=tmp_path / "run", quantize="q8_0", base="quantized", prove_resume=None, epochs=1
    )
    train(made)
    first, *_, last = lines(tmp_path / "run", "eval_loss")
    assert last["eval_loss"] < first["eval_loss"]


def test_verify_proves_the_loss_of_a_run(straight: TrainConfig) -> None:
    report = prove_run(straight.run.output, max_tokens=128)
    (loss,) = (proof for proof in report.of(MODEL) if proof.case.startswith("loss of rankings"))
    assert report.passed and loss.error < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# Ranking and evaluating.


def model_of(straight: TrainConfig) -> ModelOptions:
    return ModelOptions(model=straight.model.model, dtype="float32", threads=1)


def test_a_query_ranks_the_texts_of_a_file(
    straight: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a user", "a list", "a json"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    adapter = straight.run.output / "adapter"
    given = RankOptions().data, RankRunOptions(adapter=adapter, query="json", top=2, micro_batch_rows=2)
    options = RankOptions(data=replace(given[0], data=(str(path),)), run=given[1], model=model_of(straight))
    said, pack = list[str](), RowPacker.packed

    def packed(*given: Any) -> Any:
        said.append(printing.now())
        return pack(*given)

    monkeypatch.setattr(RowPacker, "packed", packed)
    rank_command(options)
    monkeypatch.undo()
    assert said == ["rankings, 0 of 3 texts", "rankings, 2 of 3 texts"]
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = backhand.rank("json", texts, adapter=adapter, model=straight.model.model, dtype="float32", threads=1)
    best = sorted(range(3), key=lambda number: -scores[number])[:2]
    assert [line["index"] for line in shown] == best and [line["document"] for line in shown] == [
        texts[n] for n in best
    ]
    assert [line["relevance_score"] for line in shown] == pytest.approx([scores[n] for n in best], rel=1e-5)
    assert all(0 < score < 1 for score in scores)


def test_rows_are_scored_in_their_order(straight: TrainConfig, tmp_path: Path) -> None:
    path, output = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    path.write_text('{"query": "json", "document": "a list"}\n{"query": "json", "document": "a json"}\n')
    run = RankRunOptions(adapter=straight.run.output / "adapter", output=output)
    data = replace(RankOptions().data, data=(str(path),))
    rank_command(RankOptions(data=data, run=run, model=model_of(straight)))
    expected = backhand.rank(
        "json", ["a list", "a json"], adapter=run.adapter, model=straight.model.model, dtype="float32", threads=1
    )
    assert [json.loads(line)["score"] for line in output.read_text().splitlines()] == pytest.approx(expected, rel=1e-5)


def test_rank_and_evaluate_read_rows_as_training_did(straight: TrainConfig, tmp_path: Path) -> None:
    named, usual = tmp_path / "named.jsonl", tmp_path / "usual.jsonl"
    rows = [("json", "a list", 0), ("json", "a json", 1), ("user", "a user", 1), ("user", "a list", 0)]
    for path, columns in ((named, ("q", "d", "label")), (usual, ("query", "document", "label"))):
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    made = with_options(straight, output=tmp_path / "run", prove_resume=None, epochs=1, eval_data=())
    made = with_options(made, data=(str(named),), prompt="q", completion="d", positive_weight=3.0, eval_fraction=0.0)
    train(made)
    adapter = tmp_path / "run" / "adapter"

    def ranked(path: Path) -> list[dict[str, Any]]:
        data = replace(RankOptions().data, data=(str(path),))
        return rank(RankOptions(data=data, run=RankRunOptions(adapter=adapter), model=model_of(straight)))

    def evaluated(path: Path, adapter: Path | None = adapter) -> Evaluation:
        run = EvaluateRunOptions(adapter=adapter, rankings=True)
        return evaluate(EvaluateOptions(model=model_of(straight), data=DataOptions(data=(str(path),)), run=run))

    assert ranked(named) == ranked(usual)
    weighted, plain = evaluated(named), evaluated(usual, None)
    assert weighted.base.loss > plain.base.loss, "the loss has the weight of training"
    assert weighted.adapted is not None and evaluated(usual).adapted == weighted.adapted

    def of_query(path: Path) -> list[float]:
        run = RankRunOptions(adapter=adapter, query="json")
        data = replace(RankOptions().data, data=(str(path),))
        return [line["relevance_score"] for line in rank(RankOptions(data=data, run=run, model=model_of(straight)))]

    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": document}) + "\n" for _, document, _ in rows))
    assert of_query(named) == of_query(texts)


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        ("rank", {"embed": "vectors: use backhand.rank", "rewards": "prompts: use backhand.rank"}),
        ("embed", dict.fromkeys(("rank", "rankings", "rewards"), ": use backhand.embed")),
        ("grpo", {"rank": "use backhand.generate", "embed": "use backhand.generate", "rankings": "use backhand.gen"}),
    ],
)
def test_an_adapter_for_another_command_is_named(
    trained: str, said: dict[str, str], straight: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(straight.run.output / "adapter", adapter)
    record = json.loads((adapter / "backhand.json").read_text())
    record["config"]["objective.objective"] = trained
    if trained == "embed":
        record["embedding"] = {"pooling": "last", "query_prompt": "", "document_prompt": ""}
    (adapter / "backhand.json").write_text(json.dumps(record))
    (tmp_path / "zero.py").write_text("def reward(completions, **_):\n    return [0.0] * len(completions)\n")
    model = {"adapter": adapter, "model": straight.model.model, "dtype": "float32", "threads": 1}
    of_prompts = {"data": [{"prompt": "json"}], "reward": f"{tmp_path / 'zero.py'}:reward", "max_new_tokens": 1}
    calls = {
        "rank": lambda: backhand.rank("json", ["a list"], **model),
        "embed": lambda: backhand.embed("json", pooling="last", **model),
        "rankings": lambda: backhand.evaluate(data=straight.data.eval_data, rankings=True, **model),
        "rewards": lambda: backhand.evaluate(**of_prompts, **model),
    }
    for name, call in calls.items():
        capsys.readouterr()
        call()
        shown = capsys.readouterr().err
        assert shown.count("was trained with objective=") == (name in said)
        assert said.get(name, "") in shown


def test_a_system_message_is_refused(straight: TrainConfig, tmp_path: Path) -> None:
    data = replace(RankOptions().data, data=straight.data.eval_data)
    with pytest.raises(UsageError, match="rank has its own"):
        rank(RankOptions(data=data, template=TemplateOptions(system="be brief"), model=model_of(straight)))
    of_evaluation = DataOptions(data=straight.data.eval_data, system="be brief")
    run = EvaluateRunOptions(adapter=straight.run.output / "adapter")
    with pytest.raises(UsageError, match="rank has its own"):
        evaluate(EvaluateOptions(model=model_of(straight), data=of_evaluation, run=run))


def test_evaluate_scores_base_and_adapter(straight: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run = EvaluateRunOptions(adapter=straight.run.output / "adapter", json=True)
    options = EvaluateOptions(model=model_of(straight), data=DataOptions(data=straight.data.eval_data), run=run)
    evaluate_command(options)
    result = json.loads(capsys.readouterr().out)
    summary = read_summary(straight.run.output / "summary.json")
    assert summary is not None and result["rows"] == 6
    for name, expected in (("base", summary.base_retrieval), ("adapted", summary.adapted_retrieval)):
        assert expected is not None
        assert result[name]["retrieval"]["ndcg@10"] == pytest.approx(expected["ndcg@10"], rel=1e-5)
    assert result["adapted"]["loss"] == pytest.approx(summary.best_eval_loss, rel=1e-4)
    change = result["adapted"]["retrieval"]["change"]["ndcg@10"]
    assert change == pytest.approx(summary.adapted_retrieval["change"]["ndcg@10"], abs=1e-5)
    words = score_words(summary.base_retrieval, summary.adapted_retrieval, "ndcg@10")
    assert any(line.startswith(words) for line in closing_lines(summary))
    assert words in headline(read_run(straight.run.output))
    evaluate_command(replace(options, run=replace(run, json=False)))
    assert words in capsys.readouterr().out
    evaluate_command(replace(options, run=replace(run, json=False, adapter=None, rankings=True)))
    printed = capsys.readouterr().out
    equal = result["base"]["retrieval"]["chance"]["loss"]
    assert "base: nDCG@10" in printed and f"The best equal scores have a loss of {equal:.4f}" in printed


def test_llama_cpp_gives_the_same_scores_of_a_gguf_file(
    straight: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export asks llama.cpp, which has a score head for Qwen3 models, and fails if a score differs."""
    model, output = (
        save_answering(tiny_model("qwen3", num_hidden_layers=2), tmp_path / "model"),
        tmp_path / "merged.gguf",
    )
    train(with_options(straight, model=str(model), output=tmp_path / "run", prove_resume=None, epochs=1, eval_data=()))
    adapter = tmp_path / "run" / "adapter"
    page = Page(run_page(read_run(tmp_path / "run"))).one("section", id="result").text
    assert "--merge --to gguf --output merged.gguf\nllama-server --reranking" in page and "llama-cli" not in page
    assert "--merge --to gguf" not in Page(run_page(read_run(straight.run.output))).one("section", id="result").text
    of_llama = straight.run.output / "adapter", tmp_path / "adapter.gguf", straight.model.model
    export_command(ExportOptions(*of_llama, to="gguf"))
    shown = capsys.readouterr().out
    assert "llama.cpp cannot rank with this base: use backhand rank" in shown and "--merge" not in shown
    options = ExportOptions(adapter, output, str(model), to="gguf", dtype="float32", merge=True)
    with pytest.raises(ArtifactError, match="for which Ollama cannot use it"):
        export_command(replace(options, to="ollama"))
    export_command(options)
    assert f"next: llama-server --reranking -m {output}" in capsys.readouterr().out
    proofs = [json.loads(line) for line in (tmp_path / "run" / "proofs.jsonl").read_text().splitlines()]
    (proof,) = [one for one in proofs if "/v1/rerank" in one["proof"]]
    assert proof["passed"] and proof["value"] <= 1e-5
    assert np.array_equal(  # the score head is not a weight of the model
        open_model(str(output)).load("lm_head.weight"), open_model(str(model)).load("lm_head.weight")
    )


def test_rows_must_fit_the_loss(straight: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "json", "docs": ["a list", "a json"], "labels": [0, 3]}\n' * 2)
    made = with_options(straight, data=(str(path),), eval_data=(), eval_fraction=0.0, output=tmp_path / "run")
    with pytest.raises(DataError, match="a score is not from 0 to 1"):
        train(made)
    options = DataOptions(data=(str(path),), eval_fraction=0.0)
    found = lint(options, answering_tokenizer(), purpose="rankings")[0]
    (finding, *_) = found.findings
    assert (finding.severity, found.errors, found.skip_with) == ("error", 2, ())
    assert finding.what.startswith("a score is not from 0 to 1: the first one is 3") and finding.count == 2
    assert "by (score - smallest) / (largest - smallest), or give --ranking-loss listnet" in finding.remedy
    assert not lint(options, answering_tokenizer(), purpose="rankings", ranking_loss="listnet")[0].errors
    path.write_text('{"query": "json", "document": "a list", "label": 1}\n' * 2)
    with pytest.raises(DataError, match="one document in this row"):
        train(with_options(made, ranking_loss="listwise"))
    with pytest.raises(UsageError, match="listwise does not use it"):
        ObjectiveOptions("rank", ranking_loss="listwise", positive_weight=2.0).validate()
    with pytest.raises(UsageError, match="rank has its own"):
        train(with_options(made, system="be brief"))
