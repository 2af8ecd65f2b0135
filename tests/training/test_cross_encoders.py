"""Rankings by encoders with a score head: pairs, gradients against PEFT, whole runs, and use of the adapter."""

from __future__ import annotations

import json
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder

import backhand
from backhand.adapters.record import AdapterRecord
from backhand.data.data_report import TruncationStats
from backhand.data.examples import Example
from backhand.data.lint_command import lint_command
from backhand.data.options import DataOptions, LintOptions, LintRunOptions
from backhand.data.packing import RowPacker
from backhand.data.pair_examples import PairEncoder, PairFormat
from backhand.data.rows import RankingRow
from backhand.data.text_encoder import TextEncoder
from backhand.distributed.communicator import Communicator
from backhand.engines.machine import resolve_machine
from backhand.errors import ArtifactError, UsageError
from backhand.files import write_together
from backhand.interop.command import export_command
from backhand.interop.merging import merge_command
from backhand.interop.options import ExportOptions, MergeOptions
from backhand.loop.evaluate import evaluate_command
from backhand.loop.objective import MicroBatch
from backhand.loop.row_passes import head_logits
from backhand.nn.loading.opening import open_model
from backhand.objectives.rankings.loss import CrossEncoderObjective
from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions
from backhand.options.config import ModelOptions, TrainConfig
from backhand.options.objectives import ObjectiveOptions
from backhand.report.adapter_changes import changes_of
from backhand.report.page import run_page
from backhand.report.run_record import read_run
from backhand.runs.summary import RunSummary, read_summary
from backhand.training.console import closing_lines
from backhand.training.plan import plan_run
from backhand.training.run import train
from backhand.verify.command import prove_run, verify
from backhand.verify.options import VerifiedModelOptions, VerifyOptions, VerifyRunOptions
from tests.support.class_models import bound_model, class_model, their_gradients, their_model, wider
from tests.support.no_autograd import autograd_raises
from tests.support.page import Page
from tests.support.parity import relative_error, wholly_in_float64
from tests.support.tiny_encoders import tiny_encoder
from tests.support.tiny_run import StopAfter, TinyRun, final_bits, with_options
from tests.support.tiny_tokenizer import pair_tokenizer
from tests.training.test_rankings import LOSSES, TARGETS, options_of, write_rows

SCORES = {"labels": ["LABEL_0"], "problem_type": None}


def save_model(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    pair_tokenizer(directory)
    return directory


def sizes() -> dict[str, int]:
    return {"vocab_size": 83, "type_vocab_size": 2}


# ---------------------------------------------------------------------------------------------------------------------
# Pairs.


@pytest.mark.parametrize("max_length", [100, 14, 9, 6, 5])
def test_pairs_are_those_of_the_tokenizer(max_length: int, tmp_path: Path) -> None:
    """Also those that are cut, with their token types."""
    tokenizer = pair_tokenizer(tmp_path)
    encoder = PairEncoder(TextEncoder(tokenizer), PairFormat("cls", 0, token_types=True), max_length)
    texts = ("user asks json", "a list of names", "json", "is json a name, a list or one of the numbers?")
    rows = [RankingRow(query, texts, (1.0, 0.0, 0.5, 0.0), "row") for query in texts]
    examples = [one for one in encoder.encode(rows, TruncationStats()) if isinstance(one, Example)]
    batch = RowPacker(examples, share_prefixes=False).packed(range(len(rows)), "cpu")
    assert batch.token_types is not None
    ours = [part.split(batch.lengths) for part in (batch.input_ids, batch.token_types)]
    pairs = [(query, document) for query in texts for document in texts]
    theirs = [tokenizer(*pair, truncation="longest_first", max_length=max_length) for pair in pairs]
    for number, expected in enumerate(theirs):
        found = [part[batch.ends[number]].tolist() for part in ours]
        assert found == [expected["input_ids"], expected["token_type_ids"]], pairs[number]


def test_long_pairs_are_counted_and_dropped(tmp_path: Path) -> None:
    encoder = TextEncoder(pair_tokenizer(tmp_path))
    rows = [RankingRow("json", ("a list", "a list of names and numbers"), (1.0, 0.0), "row")]
    stats = TruncationStats()
    assert PairEncoder(encoder, PairFormat("cls"), 9, drop=True).encode(rows, stats) == [None]
    (example,) = PairEncoder(encoder, PairFormat("cls"), 9).encode(rows, stats)
    assert isinstance(example, Example) and len(example.documents) == 2
    assert stats.dropped_long == stats.truncated == ["row"]
    with pytest.raises(UsageError, match="no room for two texts"):
        PairEncoder(encoder, PairFormat("cls"), 4)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients.


@pytest.mark.parametrize(("name", "loss"), [("bert", "pointwise"), ("modernbert", "listwise"), ("bert", "listnet")])
def test_scores_and_gradients_equal_transformers_and_peft(name: str, loss: str, tmp_path: Path) -> None:
    """Scores in float32 and float64, and every gradient, of two micro-batches."""
    types = sizes() if name == "bert" else {"vocab_size": 83}
    base = save_model(class_model(name, 1, **types), tmp_path / "model")
    bound = bound_model(base, torch.float32, 1)
    write_together(tmp_path / "adapter", bound.adapter_files(AdapterRecord(classification=SCORES), {}))
    theirs, tokenizer = their_model(base, tmp_path / "adapter"), pair_tokenizer(base)
    documents = ["a list", "json", "one of the names", "user asks"]
    rows = [
        RankingRow(query, tuple(documents[: len(t)]), t, query) for query, t in zip(documents, TARGETS, strict=True)
    ]
    text_format = PairFormat("cls", token_types=name == "bert")
    examples = PairEncoder(TextEncoder(tokenizer), text_format, 40).encode(rows, TruncationStats())
    packer = RowPacker([one for one in examples if isinstance(one, Example)], share_prefixes=False)
    inputs = [tokenizer([row.query] * len(row.documents), list(row.documents), padding=True) for row in rows]
    accepted = ("input_ids", "attention_mask", *(["token_type_ids"] if name == "bert" else []))
    batches = [{key: torch.tensor(one[key]) for key in accepted} for one in inputs]

    def scores() -> list[torch.Tensor]:
        return [theirs(**batch).logits[:, 0] for batch in batches]

    with torch.no_grad():
        expected = torch.cat(scores())
    ours = head_logits(bound.model, packer, 2, Communicator())
    assert ours is not None and relative_error(ours[:, 0], expected) <= 1e-4

    decoder, objective = wider(bound, base), CrossEncoderObjective(packer, options=options_of(loss))
    for dtype, model, bound_of in ((torch.float64, decoder, 1e-9), (torch.float32, bound.model, 1e-4)):
        theirs.to(dtype).zero_grad()
        context = wholly_in_float64() if dtype == torch.float64 else torch.enable_grad()
        with context:
            losses = [LOSSES[loss](s, s.new_tensor(t)) for s, t in zip(scores(), TARGETS, strict=True)]
            expected_loss = torch.stack(losses).mean()
            expected_loss.backward()
        model.lora.gradients.zero_()
        parts, total = ([0, 1], [2, 3]), 0.0
        with autograd_raises():
            for number, part in enumerate(parts):
                batch = packer.packed(part, "cpu")
                total += float(objective.gradients(model, part, MicroBatch(number, batch, 1 / 4, None)))
        assert total / 4 == pytest.approx(expected_loss.item(), rel=bound_of)
        gradients = their_gradients(theirs, decoder.config.class_head.prefix)
        for tensor, _ in model.lora.named_tensors():
            error = (model.lora.gradient(tensor) - gradients[tensor]).norm()
            assert error <= bound_of * max(gradients[tensor].norm(), 1e-3), tensor  # lists have no bias


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs.


def config(tiny: TinyRun, place: Path, model: Path, output: Path, **options: Any) -> TrainConfig:
    """Four epochs of three steps of two micro-batches."""
    data = {
        "model": str(model),
        "data": (write_rows(place / "rows.jsonl", 24),),
        "eval_data": (write_rows(place / "held_out.jsonl", 8, seed=1),),
        "max_length": 40,
    }
    made = tiny.config(output, **data, eval_every=4, save_every=1, batch_rows=8, micro_batch_rows=4, epochs=4)
    return with_options(replace(made, objective=ObjectiveOptions("rank")), learning_rate=1e-2, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_encoder("bert", **sizes()), tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def straight(tiny: TinyRun, model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    place = tmp_path_factory.mktemp("cross_encoder")
    made = config(tiny, place, model, place / "run", prove_resume=3)
    train(made)
    return made


@pytest.fixture(scope="module")
def merged(straight: TrainConfig, model: Path) -> Path:
    """The merged model, a cross-encoder of its own."""
    output, adapter = straight.run.output / "merged", straight.run.output / "adapter"
    export_command(ExportOptions(adapter, output, str(model), to="sentence-transformers", merge=True, quiet=True))
    return output


def summary_of(run: Path) -> RunSummary:
    summary = read_summary(run / "summary.json")
    assert summary is not None
    return summary


def test_a_run_learns_and_shows_its_scores(straight: TrainConfig) -> None:
    """The base has no head, so its loss is that of equal scores."""
    summary = summary_of(straight.run.output)
    assert summary.base_eval_loss == pytest.approx(np.log(2)) and summary.trains_head
    assert summary.best_eval_loss < 0.95 * summary.base_eval_loss
    assert summary.base_retrieval is None and summary.adapted_retrieval is not None
    shown = closing_lines(summary)
    assert any(line.startswith("Held-out rows: nDCG@10") and "→" not in line for line in shown)
    assert any(line.startswith("nDCG@10 differs from that of a random order by ") for line in shown)
    assert not any("gguf" in line for line in shown)
    assert any(line.startswith("Held-out loss 0.6931 (equal scores) → ") for line in shown)
    assert "| held-out loss | 0.6931 (equal scores) → " in (straight.run.output / "adapter" / "README.md").read_text()
    page = Page(run_page(read_run(straight.run.output)))
    assert "no score head" in page.one("section", id="answers").text
    uses = page.one("section", id="result").text
    assert "0.693 (the best equal scores) to" in uses
    assert "CrossEncoder('merged')" in uses and "AutoModelForSequenceClassification" in uses
    assert "backhand chat" not in uses and "gguf" not in uses and "vllm" not in uses
    changes = changes_of(read_run(straight.run.output)).modules
    assert changes and all(change.relative_norm for change in changes)


@pytest.mark.parametrize("loss", ["listwise", "listnet"])
def test_losses_of_lists_need_no_gradient_of_the_bias(loss: str, straight: TrainConfig, tmp_path: Path) -> None:
    """The softmax over two documents does not depend on it, so its gradient is exactly zero."""
    rows = tmp_path / "rows.jsonl"
    pairs = [{"query": f"user {word}", "positive": word, "negative": "json"} for word in "abcdefgh"]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    made = with_options(
        straight, output=tmp_path / "run", data=(str(rows),), eval_data=(), prove_resume=None, ranking_loss=loss
    )
    train(with_options(made, max_steps=3, eval_every=None))
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_stopped_run_ends_in_the_same_bits(straight: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(StopAfter.Stopped):
        train(with_options(straight, output=tmp_path / "run", prove_resume=None), callbacks=[StopAfter(3)])
    train(with_options(TrainConfig(), output=tmp_path / "run", resume=True, quiet=True))
    ours, expected = final_bits(tmp_path / "run"), final_bits(straight.run.output)
    assert {**ours, "README.md": b""} == {**expected, "README.md": b""}


QUERY, DOCUMENTS = "json", ["a json", "the list", "a name of the user"]


def test_peft_and_sentence_transformers_give_the_same_scores(
    straight: TrainConfig, model: Path, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = straight.run.output / "adapter"
    ours = backhand.rank(QUERY, DOCUMENTS, adapter=adapter, model=model, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    inputs = tokenizer([QUERY] * len(DOCUMENTS), DOCUMENTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = their_model(model, adapter)(**inputs).logits[:, 0]
    assert ours == pytest.approx(torch.sigmoid(logits).tolist(), abs=1e-6)
    pairs, exported = [(QUERY, document) for document in DOCUMENTS], straight.run.output / "exported"
    export_command(ExportOptions(adapter, exported, str(model), to="sentence-transformers"))
    code: dict[str, Any] = {}
    exec(textwrap.dedent("      " + capsys.readouterr().out.partition("next: ")[2]), code)
    for loaded in (CrossEncoder(str(merged)), code["model"]):
        assert ours == pytest.approx(loaded.predict(pairs).tolist(), abs=1e-6)
    assert ours == pytest.approx(backhand.rank(QUERY, DOCUMENTS, model=merged, dtype="float32"), abs=1e-6)


def test_evaluation_measures_the_head_of_the_adapter(straight: TrainConfig, model: Path, capsys: Any) -> None:
    adapter, rows = straight.run.output / "adapter", straight.data.eval_data[0]
    found = backhand.evaluate(data=rows, adapter=adapter, model=model, dtype="float32").as_dict()
    summary = summary_of(straight.run.output)
    assert found["adapted"]["loss"] == pytest.approx(summary.best_eval_loss, rel=1e-4)
    assert found["base"]["loss"] == pytest.approx(np.log(2)) and "retrieval" not in found["base"]
    assert found["adapted"]["retrieval"]["ndcg@10"] == pytest.approx(summary.adapted_retrieval["ndcg@10"])
    models = ModelOptions(model=str(model), dtype="float32")
    evaluate_command(EvaluateOptions(models, DataOptions(data=(rows,)), EvaluateRunOptions(adapter=adapter)))
    printed = capsys.readouterr().out
    equal = summary.adapted_retrieval["chance"]["loss"]
    assert f"The best equal scores have a loss of {equal:.4f}" in printed and "base (equal scores)" in printed


def test_the_head_of_a_cross_encoder_is_trained_further(straight: TrainConfig, merged: Path, tmp_path: Path) -> None:
    again = with_options(
        straight, model=str(merged), output=tmp_path / "run", prove_resume=None, max_steps=1, learning_rate=1e-9
    )
    train(again)
    summary, first = summary_of(tmp_path / "run"), summary_of(straight.run.output)
    for loss in (summary.base_eval_loss, summary.first_eval_loss, summary.best_eval_loss):
        assert loss == pytest.approx(first.best_eval_loss, rel=1e-4)
    assert summary.base_retrieval["ndcg@10"] == pytest.approx(first.adapted_retrieval["ndcg@10"])


def test_a_run_starts_from_an_adapter_with_a_head(straight: TrainConfig, tmp_path: Path) -> None:
    start = str(straight.run.output / "adapter")
    again = with_options(straight, output=tmp_path / "run", from_adapter=start, prove_resume=None, max_steps=1)
    train(with_options(again, learning_rate=1e-9))
    summary = summary_of(tmp_path / "run")
    assert summary.first_eval_loss == pytest.approx(summary_of(straight.run.output).best_eval_loss, rel=1e-4)


def test_a_plan_needs_no_rows(straight: TrainConfig) -> None:
    made = with_options(straight, data=(), eval_data=(), prove_resume=None)
    plan = plan_run(made, resolve_machine(made), assumed_rows=True)
    assert "classifier.weight" in [tensor.name for tensor in plan.inputs.layout.full_tensors]
    assert plan.memory.peak_bytes > 0


def test_lint_reads_pairs_without_a_prompt(straight: TrainConfig, model: Path, capsys: Any) -> None:
    data = DataOptions(data=straight.data.data)
    lint_command(LintOptions(data=data, lint=LintRunOptions(model=str(model), rankings=True, json=True)))
    report = json.loads(capsys.readouterr().out)
    assert max(report["lengths"]["tokens"].values()) < 12 and report["errors"] == 0


def test_verify_proves_the_gradients_of_the_head(straight: TrainConfig) -> None:
    report = prove_run(straight.run.output, max_tokens=80)
    proved = {result.case: result for result in report.results}
    head = proved["4 × gradient of the head = autograd's, float64"]
    assert head.passed and head.error <= 1e-9
    assert proved["merged = unmerged, final states"].passed
    assert any(case.startswith("packed = unpacked") for case in proved)


@pytest.mark.parametrize("name", ["model", "merged"])
def test_verify_proves_an_encoder_without_an_adapter(name: str, request: pytest.FixtureRequest) -> None:
    """Its vectors, with a random adapter with dropout, also of a cross-encoder with sentence-transformers' files."""
    encoder = str(request.getfixturevalue(name))
    made = VerifyOptions(
        model=VerifiedModelOptions(model=encoder, dtype="float32"), verify=VerifyRunOptions(max_tokens=80)
    )
    report = verify(made)
    assert report.passed
    assert any(result.case == "weighted sum of vectors = reference, float64" for result in report.results)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"instruction": "find it"}, "query and document alone"),
        ({"chat_template": "x"}, "rank does not use it"),
        ({"max_forgetting": 0.1}, "rank does not use it"),
        ({"max_length": 41}, None),
    ],
)
def test_options_that_do_not_fit_are_refused(
    straight: TrainConfig, tmp_path: Path, options: dict[str, Any], words: str | None
) -> None:
    made = with_options(straight, output=tmp_path / "run", prove_resume=None, max_steps=1, **options)
    if words is None:
        train(made)  # no pair is that long
        return
    with pytest.raises(UsageError, match=words):
        train(made)


def test_adapters_and_models_without_a_score_head_are_refused(
    straight: TrainConfig, model: Path, tmp_path: Path
) -> None:
    adapter = straight.run.output / "adapter"
    with pytest.raises(UsageError, match="no score head"):
        backhand.rank(QUERY, DOCUMENTS, model=model)
    with pytest.raises(UsageError, match="scores documents for a query"):
        backhand.classify("json", adapter=adapter, model=model)
    with pytest.raises(UsageError, match="query and document alone"):
        backhand.rank(QUERY, DOCUMENTS, adapter=adapter, model=model, instruction="find it")
    with pytest.raises(ArtifactError, match="cannot be expressed") as refused:
        export_command(ExportOptions(adapter, tmp_path / "adapter.gguf", str(model), to="gguf", quiet=True))
    assert "--merge" not in str(refused.value.next_step)


def score_adapter(name: str, place: Path, *, token_types: bool = False, **sizes: Any) -> tuple[Path, Path]:
    """An encoder with a random adapter that ranks: the directories of both."""
    overrides = {"vocab_size": 83, "max_position_embeddings": 256, **sizes}
    model = save_model(tiny_encoder(name, **overrides), place / "model")
    if not token_types:
        transformers.AutoTokenizer.from_pretrained(model, model_input_names=["input_ids"]).save_pretrained(model)
    bound = bound_model(model, torch.float32, 1)
    record = AdapterRecord(classification=SCORES, config={"objective.objective": "rank", "data.max_length": 12})
    write_together(place / "adapter", bound.adapter_files(record, {}))
    return model, place / "adapter"


@pytest.mark.parametrize(
    ("name", "sizes"), [("bert", {"type_vocab_size": 2}), ("modernbert", {"classifier_pooling": "mean"})]
)
def test_llama_cpp_gives_the_same_scores_of_an_encoder(
    name: str, sizes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export asks llama.cpp, and fails if a score differs. The file is a cross-encoder of its own."""
    model, adapter = score_adapter(name, tmp_path, **sizes)
    outputs = [tmp_path / "merged.gguf", tmp_path / "again.gguf"]
    export_command(ExportOptions(adapter, outputs[0], str(model), to="gguf", merge=True, dtype="float32"))
    assert "proved: llama.cpp's /v1/rerank gives the same scores of 3 documents" in capsys.readouterr().out
    ours = backhand.rank(QUERY, DOCUMENTS, adapter=adapter, model=model, dtype="float32")
    assert len({round(score, 3) for score in ours}) == len(DOCUMENTS)
    assert ours == pytest.approx(backhand.rank(QUERY, DOCUMENTS, model=outputs[0], dtype="float32"), abs=1e-5)
    # The head of a file is replaced by that of an adapter.
    merge_command(MergeOptions(adapter, outputs[1], str(outputs[0]), quiet=True, force_base=True))
    heads = [open_model(str(output)).head_tensor("classifier.weight") for output in outputs]
    assert torch.equal(*heads)


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("bert", {"type_vocab_size": 2, "token_types": True}, "both texts the token type 0"),
        ("modernbert", {"classifier_pooling": "cls"}, "pooling 'cls' instead of 'mean'"),
        ("modernbert", {"classifier_pooling": "mean", "classifier_bias": True}, "dense_bias True instead of False"),
    ],
)
def test_an_encoder_that_llama_cpp_scores_otherwise_is_refused(
    name: str, sizes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model, adapter = score_adapter(name, tmp_path, **sizes)
    with pytest.raises(ArtifactError, match="computes other scores") as refused:
        merge_command(MergeOptions(adapter, tmp_path / "model.gguf", str(model), quiet=True))
    assert words in str(refused.value.why) and "vLLM" in str(refused.value.next_step)


def test_a_head_of_one_label_is_no_score_head(model: Path, tmp_path: Path) -> None:
    known = {"labels": ["bad"], "problem_type": "multi_label_classification"}
    files = bound_model(model, torch.float32, 1).adapter_files(AdapterRecord(classification=known), {})
    write_together(tmp_path / "adapter", files)
    for merge in (False, True):
        options = ExportOptions(
            *(tmp_path / "adapter", tmp_path / "out", str(model)), to="sentence-transformers", merge=merge, quiet=True
        )
        with pytest.raises(UsageError, match="neither on vectors nor on the rankings"):
            export_command(options)


def test_an_exported_adapter_names_the_place_of_a_moved_base(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, moved = tmp_path / "before", tmp_path / "moved"
    shutil.copytree(model, before)
    files = bound_model(before, torch.float32, 1).adapter_files(AdapterRecord(classification=SCORES), {})
    write_together(tmp_path / "adapter", files)
    before.rename(moved)

    def export(name: str) -> Path:
        made = ExportOptions(tmp_path / "adapter", tmp_path / name, str(moved), to="sentence-transformers", quiet=True)
        return export_command(made)

    written = json.loads((export("exported") / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(moved)

    def fails(*_: object, **__: object) -> None:
        raise OSError("no such base")

    monkeypatch.setattr("sentence_transformers.CrossEncoder", fails)
    with pytest.raises(ArtifactError, match="cannot load the adapter with its base"):
        export("again")
