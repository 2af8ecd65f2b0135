"""Runs with a classification head: rows, losses, scores, resuming, several processes, and use of the adapter."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import backhand
from backhand.cli.main import main
from backhand.data.class_examples import names_of, problem_of, target_of
from backhand.data.lint import LintReport, lint
from backhand.data.options import DataOptions
from backhand.data.rows import MULTI, NUMBER, SINGLE, ClassLabel, ProblemType
from backhand.engines.machine import resolve_machine
from backhand.errors import ArtifactError, BackhandError, DataError, UsageError, not_none
from backhand.interop.command import export_command
from backhand.interop.merging import merge_command
from backhand.interop.options import ExportOptions, MergeOptions
from backhand.loop.class_scores import constant_logits, row_losses, score_classes
from backhand.loop.classify import Classifier, classify, classify_command, print_classes
from backhand.loop.evaluate import Evaluation, evaluate_command
from backhand.nn.loading.opening import open_model
from backhand.nn.model_options import BaseModelOptions
from backhand.objectives.classes.loss import loss_and_gradient
from backhand.options.command_options import ClassifyOptions, ClassifyRunOptions, EvaluateOptions, EvaluateRunOptions
from backhand.options.config import ModelOptions, TrainConfig
from backhand.options.objectives import ObjectiveOptions
from backhand.report.comparison import comparison_page
from backhand.report.headline import base_and_best, classes_of, headline, verdict
from backhand.report.page import live_values, run_page
from backhand.report.run_record import read_run
from backhand.runs.summary import read_summary
from backhand.training.advice import answer_advice
from backhand.training.console import closing_lines
from backhand.training.curves import Curves
from backhand.training.plan import plan_run
from backhand.training.run import train
from backhand.verify.command import prove_run
from backhand.words import interval_text, share_interval
from tests.support.page import Page
from tests.support.ranks import bits_of_several, start_ranks
from tests.support.tiny_encoders import tiny_encoder
from tests.support.tiny_models import save_tiny
from tests.support.tiny_run import StopAfter, TinyRun, final_bits, with_options

SHAPES: dict[ProblemType, Any] = {
    SINGLE: lambda words: "json" if "json" in words else "list" if "list" in words else "other",
    MULTI: lambda words: [word for word in ("json", "list", "one") if word in words],
    NUMBER: lambda words: words.count("json") + 0.5 * words.count("list") - 0.25,
}


def write_rows(path: Path, count: int, problem: ProblemType = SINGLE, seed: int = 0) -> str:
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = draw.choice(["user", "json", "list", "asks", "one", "a"], draw.integers(2, 6)).tolist()
        rows.append({"text": " ".join(words), "label": SHAPES[problem](words)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_named(path: Path, labels: list[Any]) -> str:
    """A row per label."""
    rows = [{"text": f"user asks {number}", "label": label} for number, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(tiny: TinyRun, place: Path, output: Path, problem: ProblemType = SINGLE, **options: Any) -> TrainConfig:
    """Four epochs of three steps of two micro-batches."""
    data = {
        "data": (write_rows(place / f"{problem}.jsonl", 24, problem),),
        "eval_data": (write_rows(place / f"{problem}_held_out.jsonl", 12, problem, seed=1),),
    }
    made = tiny.config(output, **data, eval_every=4, save_every=1, batch_rows=8, micro_batch_rows=4, epochs=4)
    return with_options(replace(made, objective=ObjectiveOptions("classify")), **options)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in line]


@pytest.fixture(scope="module")
def straight(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    place = tmp_path_factory.mktemp("classes")
    made = config(tiny, place, place / "run", prove_resume=3, epochs=8, learning_rate=1e-2)
    train(made)
    return made


@pytest.fixture(scope="module")
def of_bert(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    place = tmp_path_factory.mktemp("bert")
    model = save_tiny(tiny_encoder("bert", max_position_embeddings=96), place / "model")
    made = with_options(config(tiny, place, place / "run", MULTI, epochs=1), model=str(model))
    train(made)
    return made, model


def test_a_run_learns_labels(straight: TrainConfig) -> None:
    output = straight.run.output
    steps, evaluations = lines(output, "loss"), lines(output, "eval_loss")
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert all(0 <= line["eval_accuracy"] <= 1 and 0 <= line["eval_f1_macro"] <= 1 for line in evaluations)
    summary = read_summary(output / "summary.json")
    assert summary is not None and summary.base_classes is not None and summary.adapted_classes is not None
    assert summary.base_eval_loss == pytest.approx(summary.base_classes["nll"])  # of the best constant answer
    assert summary.adapted_classes["nll"] == pytest.approx(summary.best_eval_loss)
    assert sum(sum(row.values()) for row in summary.adapted_classes["confusion"].values()) == 12
    shown = closing_lines(summary)
    (loss,) = (line for line in shown if line.startswith("Held-out loss"))
    assert loss.startswith(f"Held-out loss {summary.base_eval_loss:.4f} (constant answer) → ")
    (scores,) = (line for line in shown if "of 12 held-out rows" in line)
    assert f"by a constant answer), macro F1 {summary.base_classes['f1_macro']:.3f} (constant answer) → " in scores
    gained = (
        f"Right answers changed by {100 * summary.adapted_classes['gain'][0]:+.1f} points from a constant answer (95"
    )
    (change,) = (line for line in shown if line.startswith(gained))
    assert change.endswith((", so it helped.", ": too few rows to be sure of the change."))
    assert any(line.startswith("Next: backhand classify") for line in shown)
    # The loss fell, but the labels are no better than those of a constant answer.
    unclear = replace(
        summary, rows=500, try_next=None, adapted_classes={**summary.adapted_classes, "gain": (0.0, -0.3, 0.3)}
    )
    found = answer_advice(straight, unclear, output)
    assert found is not None and ("labels themselves are not" in found[0] or "whether the labels" in found[0])
    integers = replace(straight, objective=replace(straight.objective, class_labels=("1", "2", "3")))
    found = answer_advice(integers, replace(unclear, try_next="backhand train …"), output)
    regression = "he 3 integers are read as names; to learn them as numbers, give --problem-type regression"
    assert found is not None and found[0] == f"The labels themselves are not clearly learnt. T{regression}."
    assert f"{output.name}/config.toml --problem-type regression --output " in str(found[1])
    several = replace(integers, objective=replace(integers.objective, problem_type="multi_label_classification"))
    assert regression not in str(answer_advice(several, unclear, output)), "a list is no number"
    assert not any("gguf" in line for line in shown)
    card = (output / "adapter" / "README.md").read_text()
    first = lines(output, "eval_loss")[0]["eval_loss"]  # of the random head, which is no baseline
    assert f"| held-out loss | {summary.base_eval_loss:.4f} (constant answer) → " in card and f"{first:.4f}" not in card
    assert "nats per row |" in card and "nats per row on 12 rows" in loss


def test_a_run_of_labels_without_an_end_is_compared_with_the_constant_answer(straight: TrainConfig) -> None:
    finished = read_run(straight.run.output)
    stopped = replace(finished, summary={})
    assert verdict(stopped) == verdict(finished) and base_and_best(stopped) == pytest.approx(base_and_best(finished))
    assert classes_of(stopped)[1]["gain"] == pytest.approx(finished.summary["adapted_classes"]["gain"])
    (tile,) = (tile for tile in live_values(stopped)["tiles"] if "held-out loss" in tile[1])
    assert "–" not in tile[0] and "not measured" not in tile[1]
    share = finished.summary["adapted_classes"]["accuracy"]
    for run in (stopped, finished):
        assert f" to {share:.3f} ({interval_text(share, 12)})" in headline(run)


def test_a_random_head_is_no_baseline_for_advice() -> None:
    records = [{"step": step, "eval_loss": loss} for step, loss in enumerate((2.4, 1.2, 1.09))]
    assert Curves.of(records).held_out[0] == (0, 2.4)
    assert Curves.of(records, 1.1).held_out == [(0, 1.1), (1, 1.2), (2, 1.09)]
    assert Curves.of(records, 3.0).held_out[0] == (0, 2.4), "the head of an adapter to start from may be better"


def test_the_adapter_names_its_labels(straight: TrainConfig) -> None:
    adapter = straight.run.output / "adapter"
    record = json.loads((adapter / "backhand.json").read_text())
    labels = ["json", "list", "other"]
    assert record["classification"] == {"problem_type": SINGLE, "labels": labels, "max_length": 128}
    written = json.loads((adapter / "config.json").read_text())
    assert written["id2label"] == {"0": "json", "1": "list", "2": "other"}
    assert written["label2id"] == {"json": 0, "list": 1, "other": 2} and written["problem_type"] == SINGLE
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_names_of_labels_that_were_changed_are_refused(straight: TrainConfig, tiny: TinyRun, tmp_path: Path) -> None:
    for number, (name, key, value, problem) in enumerate(
        (
            ("config.json", "id2label", {"0": "list", "1": "json", "2": "other"}, "config.json: not the bytes"),
            ("backhand.json", "classification", {"problem_type": MULTI, "labels": ["json"]}, "has 3 outputs"),
        )
    ):
        adapter = shutil.copytree(straight.run.output / "adapter", tmp_path / str(number))
        contents = json.loads((adapter / name).read_text())
        if name == "backhand.json":  # labels that the options do not contradict
            contents["config"] = {"objective.objective": "classify"}
        (adapter / name).write_text(json.dumps(contents | {key: value}))
        with pytest.raises(ArtifactError, match=problem):
            backhand.classify(prompts=["json"], adapter=adapter, model=tiny.model)


def test_transformers_and_peft_classify_padded_texts_alike(
    straight: TrainConfig, of_bert: tuple[TrainConfig, Path], tiny: TinyRun
) -> None:
    texts = ["user asks a list", "json", "one one one a list user", "asks json a"]
    for run, model in ((straight, tiny.model), of_bert):
        adapter = run.run.output / "adapter"
        ours = backhand.classify(prompts=texts, adapter=adapter, model=model, dtype="float32")
        theirs_config = transformers.AutoConfig.from_pretrained(adapter)
        base = transformers.AutoModelForSequenceClassification.from_pretrained(model, config=theirs_config)
        theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        tokenizer.pad_token_id = theirs_config.pad_token_id
        inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            logits = theirs(**inputs).logits
        several = theirs_config.problem_type == MULTI
        p = torch.sigmoid(logits) if several else torch.softmax(logits, 1)
        for answer, row in zip(ours, p.tolist(), strict=True):
            for number, label in theirs_config.id2label.items():
                assert answer[label] == pytest.approx(row[number], abs=1e-5)


def test_texts_are_read_and_proved_as_in_training(
    straight: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in Path(straight.data.eval_data[0]).read_text().splitlines()]
    named = tmp_path / "named.jsonl"
    named.write_text("".join(json.dumps({"review": row["text"], "stars": row["label"]}) + "\n" for row in rows))
    columns = {"prompt": "review", "completion": "stars"}
    data = {"data": (str(named),), "eval_data": (), "eval_fraction": 0.0}
    train(with_options(straight, output=tmp_path / "run", prove_resume=None, max_steps=1, **data, **columns))
    adapter, model = tmp_path / "run" / "adapter", BaseModelOptions(model=straight.model.model, dtype="float32")

    def classified(path: str) -> list[dict[str, Any]]:
        data = replace(ClassifyOptions().data, data=(path,))
        return classify(ClassifyOptions(ClassifyRunOptions(adapter), data, model))

    assert (exact := classified(str(named))) == classified(straight.data.eval_data[0])
    capsys.readouterr()
    classify_command(ClassifyOptions(ClassifyRunOptions(adapter, text=rows[0]["text"]), ClassifyOptions().data, model))
    printed = json.loads(capsys.readouterr().out)["scores"]
    assert printed == pytest.approx(exact[0]["scores"], rel=1e-5)
    assert all(p == float(f"{p:.6g}") for p in printed.values()) and printed != exact[0]["scores"]
    words = ["verify", "--model", str(straight.model.model), "--dtype", "float32", "--max-tokens", "40"]
    assert main([*words, "--adapter", str(adapter), "--data", str(named)]) == 0


def test_evaluation_scores_the_adapter_against_a_constant_answer(
    straight: TrainConfig, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, rows = straight.run.output / "adapter", straight.data.eval_data[0]
    options = EvaluateOptions(
        model=ModelOptions(model=tiny.model, dtype="float32"),
        data=DataOptions(data=(rows,)),
        run=EvaluateRunOptions(adapter=adapter),
    )
    evaluation = evaluate_command(options)
    assert isinstance(evaluation, Evaluation)
    found = evaluation.as_dict()
    summary = read_summary(straight.run.output / "summary.json")
    assert summary is not None and summary.adapted_classes is not None
    assert found["rows"] == 12
    scores = found["adapted"]["classes"]
    gain, low, high = scores["gain"]
    assert gain == pytest.approx(scores["values"]["accuracy"] - found["base"]["classes"]["values"]["accuracy"])
    assert low < gain < high and "row_scores" not in scores
    assert scores["accuracy_interval"] == share_interval(scores["values"]["accuracy"], 12)
    interval = interval_text(scores["values"]["accuracy"], 12)
    table = capsys.readouterr().out
    of_constant = found["base"]["classes"]["values"]["accuracy"]
    for name in ("right", "macro F1", "loss (nats per row)", f"({interval})", f"({interval_text(of_constant, 12)})"):
        assert name in table
    assert "nll" not in table and "f1_macro" not in table
    assert f"({interval})" in Page(run_page(read_run(straight.run.output))).one("section", id="answers").text
    assert found["adapted"]["classes"]["values"]["nll"] == pytest.approx(summary.adapted_classes["nll"], rel=1e-5)
    assert found["base"]["classes"]["values"]["nll"] == pytest.approx(summary.base_eval_loss)


def test_the_page_shows_the_scores_and_commands_that_accept_a_head(straight: TrainConfig) -> None:
    page = Page(run_page(read_run(straight.run.output)))
    uses = page.one("section", id="result").text
    assert "backhand classify --model" in uses and "AutoModelForSequenceClassification" in uses
    assert not [name for name in ("chat", "AutoModelForCausalLM", "export", "vllm", "ollama", "llama-") if name in uses]
    offered = page.one("section", id="proofs").text
    assert f"adapter {straight.run.output / 'adapter'} --to peft --output …" in offered and "gguf" not in offered
    text = page.one("section", id="answers").text
    assert "best constant answer" in text and "Rows with the largest losses" in text
    assert "answered before and after" not in text
    summary = read_summary(straight.run.output / "summary.json")
    assert summary is not None
    surprises = not_none(summary.adapted_classes)["surprises"]
    assert surprises and all(row["text"] and row["text"] in text for row in surprises)
    run = read_run(straight.run.output)
    several = run.summary["adapted_classes"] | {"problem_type": "multi_label_classification"}
    rule = "A label is given if its probability is above 50%. The answer none is no label."
    shown = run_page(replace(run, summary=run.summary | {"adapted_classes": several}))
    assert rule.encode() in shown and rule not in text
    assert (
        f"went from {summary.base_eval_loss:.3f} (the best constant answer) to" in page.one("section", id="result").text
    )
    assert "accuracy from" in page.one("section", id="result").text and "perplexity" not in page.one("body").text


def test_no_token_of_a_text_with_a_label_is_shown_as_a_target(
    straight: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokens that select hidden states were marked as learned, and the placeholder after a text was shown."""
    page = Page(run_page(read_run(straight.run.output)))
    rows = page.one("section", id="data")
    assert "supervised" not in rows.text and "carry loss" not in rows.text and "supervised" not in page.charts
    assert not list(page.every("span", class_="on"))
    first = json.loads(Path(straight.data.data[0]).read_text().splitlines()[0])
    assert page.every("p", class_="tokens")[0].text.strip().endswith(first["text"])
    assert f", line 1: {first['label']}" in rows.text
    summary = not_none(read_summary(straight.run.output / "summary.json"))
    assert "supervised" not in "".join(closing_lines(summary))
    command = [
        "lint",
        "--classes",
        "--show",
        "1",
        "--model",
        str(straight.model.model),
        "--data",
        straight.data.data[0],
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "of them supervised" not in shown and f":1: {first['label']}\n" in shown and "\n*" not in shown


def test_an_adapter_with_a_head_answers_no_prompts(straight: TrainConfig, tiny: TinyRun) -> None:
    with pytest.raises(UsageError, match="classification head"):
        backhand.generate("user", adapter=straight.run.output / "adapter", model=tiny.model)


def test_merged_models_have_the_head(
    straight: TrainConfig,
    of_bert: tuple[TrainConfig, Path],
    tiny: TinyRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number, (run, model) in enumerate(((straight, tiny.model), of_bert)):
        adapter, output = run.run.output / "adapter", tmp_path / str(number)
        merge_command(MergeOptions(adapter, output, str(model), quiet=True))
        merged, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
            output, output_loading_info=True
        )
        assert not loading["missing_keys"] and not loading["mismatched_keys"]
        theirs_config = transformers.AutoConfig.from_pretrained(adapter)
        base = transformers.AutoModelForSequenceClassification.from_pretrained(model, config=theirs_config)
        adapted = peft.PeftModel.from_pretrained(base, adapter).eval()
        assert merged.config.id2label == theirs_config.id2label
        ids = torch.tensor([[5, 9, 11, 7]])
        with torch.no_grad():
            assert torch.allclose(merged.eval()(ids).logits, adapted(ids).logits, atol=1e-5)
        export_command(ExportOptions(adapter, tmp_path / f"peft-{number}", str(model), to="peft"))
        code: dict[str, Any] = {}
        exec(textwrap.dedent("      " + capsys.readouterr().out.partition("next: ")[2]), code)
        assert isinstance(code["model"], peft.PeftModelForSequenceClassification)
        for name in ("adapter_model.safetensors", "config.json"):
            assert (tmp_path / f"peft-{number}" / name).read_bytes() == (adapter / name).read_bytes()
    card = (tmp_path / "peft-0" / "README.md").read_text()
    assert "| labels | json, list, other |" in card
    assert re.search(r"\| result \| Held-out loss .* right \(95 % interval .*(so it helped|of the change)", card)
    with pytest.raises(ArtifactError, match="head for classification, for which a GGUF file has no place"):
        merge_command(MergeOptions(adapter, tmp_path / "model.gguf", str(model), quiet=True))
    for to in ("gguf", "mlx"):
        with pytest.raises(ArtifactError) as refused:
            export_command(ExportOptions(adapter, tmp_path / to, str(model), to=to, quiet=True))
        assert refused.value.next_step == "give --to peft, or use backhand merge"


def test_verify_proves_the_gradients_of_a_decoders_head(straight: TrainConfig) -> None:
    report = prove_run(straight.run.output, max_tokens=80)
    proved = {result.case: result for result in report.results}
    assert proved["1 × gradient of the head = autograd's, float64"].error <= 1e-9
    assert proved["weighted sum of the logits = reference, float64"].passed


def test_a_run_starts_from_a_head(straight: TrainConfig, tiny: TinyRun, tmp_path: Path) -> None:
    again = with_options(
        straight,
        output=tmp_path / "run",
        from_adapter=str(straight.run.output / "adapter"),
        prove_resume=None,
        max_steps=1,
        learning_rate=1e-9,
    )
    train(again)
    summary, first = (read_summary(run / "summary.json") for run in (tmp_path / "run", straight.run.output))
    assert summary is not None and first is not None
    assert summary.first_eval_loss == pytest.approx(first.best_eval_loss, rel=1e-4)
    assert summary.base_eval_loss == pytest.approx(first.base_eval_loss)
    record = json.loads((tmp_path / "run" / "adapter" / "backhand.json").read_text())
    assert record["classification"]["labels"] == ["json", "list", "other"]
    others: list[dict[str, Any]] = [{"class_labels": ("json", "other", "list")}, {"problem_type": MULTI}]
    for number, options in enumerate(others):
        with pytest.raises(UsageError, match="does not fit this run"):
            train(with_options(again, output=tmp_path / f"{number}", **options))
    rows = write_named(tmp_path / "new.jsonl", ["json", "new"])
    with pytest.raises(UsageError, match="the rows have"):
        train(with_options(again, output=tmp_path / "new", data=(rows,), eval_data=()))
    with pytest.raises(UsageError, match="with a head, and --objective sft trains none") as refused:
        train(tiny.config(tmp_path / "sft", from_adapter=again.run.from_adapter))
    assert "give --objective classify" in not_none(refused.value.next_step)


def test_a_run_starts_from_the_head_of_an_encoder(of_bert: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    made, _ = of_bert
    start = str(made.run.output / "adapter")
    train(with_options(made, output=tmp_path / "run", from_adapter=start, max_steps=1))


def test_a_head_does_not_start_from_an_adapter_without_one(tiny: TinyRun, tmp_path: Path) -> None:
    train(tiny.config(tmp_path / "first", max_steps=1))
    start = str(tmp_path / "first" / "adapter")
    with pytest.raises(UsageError, match="has no classification head"):
        train(config(tiny, tmp_path, tmp_path / "run", from_adapter=start))
    options = ClassifyOptions(
        ClassifyRunOptions(adapter=Path(start), text="json"), model=BaseModelOptions(model=tiny.model)
    )
    with pytest.raises(UsageError, match="has no classification head") as refused:
        classify(options)
    assert "use backhand generate with this adapter" in not_none(refused.value.next_step)


def test_other_modules_are_trained_with_a_head(tiny: TinyRun, tmp_path: Path) -> None:
    made = config(tiny, tmp_path, tmp_path / "run", modules_to_save=("score",), max_steps=1)
    names = [one.name for one in plan_run(made, resolve_machine(made)).inputs.layout.full_tensors]
    assert names == ["score.weight"]


@pytest.mark.parametrize(
    ("trained", "held_out", "options", "labels"),
    [
        (["a", "b", "a"], ["c", "b"], {}, ("a", "b", "c")),
        (["1.0", "2.0"], [], {"class_labels": ("2.0", "1.0")}, ("2.0", "1.0")),
        (["1", "true", "a"], [], {"class_labels": ["a", 1, True]}, ("a", "1", "true")),
        (["+1", "-1"], [], {}, ("-1", "+1")),
        (["--1", "1"], [], {}, ("--1", "1")),
        (["0.5", "1"], [], {}, ()),
    ],
)
def test_labels_come_from_all_rows_and_options(
    trained: list[str],
    held_out: list[str],
    options: dict[str, Any],
    labels: tuple[str, ...],
    tiny: TinyRun,
    tmp_path: Path,
) -> None:
    data = (write_named(tmp_path / "rows.jsonl", trained),)
    eval_data = (write_named(tmp_path / "held_out.jsonl", held_out),) if held_out else ()
    made = config(tiny, tmp_path, tmp_path / "run", **options)
    made = with_options(made, data=data, eval_data=eval_data)
    inputs = plan_run(made, resolve_machine(made)).inputs
    assert inputs.config.objective.class_labels == labels
    assert any("not learned" in note for note in inputs.notes) == bool(held_out)


def test_rows_without_any_label_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    rows = write_named(tmp_path / "rows.jsonl", [[], []])
    with pytest.raises(DataError, match="no row has a label"):
        train(config(tiny, tmp_path, tmp_path / "run", data=(rows,), eval_data=()))


def test_a_head_classifies_the_rows_of_a_program(straight: TrainConfig, tiny: TinyRun, tmp_path: Path) -> None:
    texts = ["user asks a list", "json"]
    rows = [{"name": text} for text in texts]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"adapter": straight.run.output / "adapter", "model": tiny.model}
    of_texts = backhand.classify(prompts=texts, **common)
    for data in (rows, path):
        assert backhand.classify("name", data=data, **common) == of_texts
    # Without a name, the column of training.
    assert backhand.classify(data=[{"text": text} for text in texts], **common) == of_texts


def test_a_head_takes_no_other_labels(straight: TrainConfig, tiny: TinyRun) -> None:
    with pytest.raises(UsageError, match="its own labels") as caught:
        backhand.classify("user", labels=["a", "b"], adapter=straight.run.output / "adapter", model=tiny.model)
    assert caught.value.where == "labels"


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


def test_a_run_learns_numbers_on_a_quantized_base(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tiny, tmp_path, tmp_path / "run", NUMBER, epochs=6, learning_rate=1e-2, base="quantized")
    train(made)
    summary = read_summary(tmp_path / "run" / "summary.json")
    assert summary is not None and summary.base_classes is not None and summary.adapted_classes is not None
    assert summary.base_classes["r2"] == pytest.approx(0)
    assert summary.adapted_classes["mse"] < summary.base_classes["mse"]
    asked = ["--adapter", str(tmp_path / "run" / "adapter"), "--model", str(tiny.model), "--text", "json json"]
    monkeypatch.setattr(Classifier, "answer", lambda _self, _logits: {"value": 1234567.891})
    capsys.readouterr()
    assert main(["classify", *asked]) == 0
    assert json.loads(capsys.readouterr().out) == {"value": 1234567.891}, "all digits are printed"
    monkeypatch.undo()
    (answer,) = backhand.classify(prompts=["json json"], adapter=tmp_path / "run" / "adapter", model=tiny.model)
    assert list(answer) == ["value"]


def test_numbers_are_judged_by_the_squared_errors_of_the_rows(tiny: TinyRun, tmp_path: Path) -> None:
    rows = [{"text": "json " * (n % 4 + 1) + "user asks", "label": (n * 7 % 13) / 4} for n in range(24)]
    common: dict[str, Any] = {"model": tiny.model, "objective": "classify", "problem_type": "regression", "answers": 0}
    run = backhand.train(data=rows, eval_data=rows[:8], output=tmp_path / "run", max_steps=2, **common)
    assert run.adapted_classes is not None and run.loss_change is not None
    change, low, high = run.loss_change
    assert low < 0 < high and tuple(run.adapted_classes["gain"]) == (-change, -high, -low)
    text = headline(read_run(tmp_path / "run"))
    assert f"loss changed by {change:+.4f} in squared error per row (95 % interval" in text
    assert text.count("the best constant answer") == 1
    for name, words in (("r2", "R² is"), ("spearman", "Spearman's correlation")):
        least, most = run.adapted_classes["intervals"][name]
        value = run.adapted_classes[name]
        assert least < value < most
        said = f"(95 % interval {least:.3f} to {most:.3f})"
        assert any(f"{words} {value:.3f} {said}" in line for line in closing_lines(run))
        assert said in run_page(read_run(tmp_path / "run")).decode()
    assert "too few rows to be sure of the change" in text and "helped" not in text
    stopped = headline(replace(read_run(tmp_path / "run"), summary={}))
    assert text.partition("; loss changed")[2] in stopped and f"loss changed by {change:+.4f} in squared" in stopped
    evaluated = backhand.evaluate(data=rows[:8], adapter=tmp_path / "run/adapter", model=tiny.model)
    assert isinstance(evaluated, Evaluation) and evaluated.adapted is not None and evaluated.adapted.classes is not None
    assert evaluated.adapted.classes.gain == pytest.approx((-change, -high, -low))
    assert evaluated.loss_change == pytest.approx(run.loss_change)
    with pytest.raises(
        DataError, match=r"not a number\n  why: the adapter learned numbers\n  next: .* leave the row out$"
    ):
        backhand.evaluate(data=[{"text": "a", "label": "high"}], adapter=tmp_path / "run/adapter", model=tiny.model)
    mixed: list[dict[str, Any]] = [*rows[:8], {"text": "a", "label": "high"}]
    fitting = backhand.evaluate(data=mixed, adapter=tmp_path / "run/adapter", model=tiny.model, skip_bad=True)
    assert isinstance(fitting, Evaluation) and fitting.adapted is not None and fitting.adapted.classes is not None
    assert fitting.adapted.classes.gain == evaluated.adapted.classes.gain, "as without the row that does not fit"
    backhand.train(data=rows, eval_data=rows[:8], output=tmp_path / "other", max_steps=3, **common)
    page = comparison_page([read_run(tmp_path / name) for name in ("run", "other")]).decode()
    assert "in squared error per row; compared with " in page and "too few rows to be sure of the change" in page


def test_options_that_leave_bad_numbers_out_are_given_only_if_they_do(tiny: TinyRun) -> None:
    rows = [{"text": f"user asks {n}", "label": f"{n / 7:.2f}"} for n in range(1, 41)]
    common: dict[str, Any] = {"model": tiny.model, "classes": True, "eval_fraction": 0.0}
    for label, options in (("n/a", ["--problem-type=regression", "--skip-bad"]), ("1,234", [])):
        bad = [*rows, {"text": "a list", "label": label}]
        found = backhand.lint(data=bad, **common)
        assert (found["errors"], found["skip_with"]) == (1, options)
        left_out = backhand.lint(data=bad, problem_type="regression", skip_bad=True, **common)
        assert bool(left_out["errors"]) is not bool(options)


def test_numbers_far_from_all_others_are_found(tiny: TinyRun) -> None:
    rows = [{"text": f"user asks {n}", "label": n / 10} for n in range(1, 41)]
    for values, found in (((99,), ["99"]), ((99, 98), []), ((11,), [])):
        far = [{"text": f"a list of {value}", "label": float(value)} for value in values]
        findings = backhand.lint(data=[*rows, *far], model=tiny.model, classes=True)["findings"]
        said = [one["what"] for one in findings if one["kind"] == "far_number"]
        assert len(said) == len(found) and all(f"a number far from all others ({found[0]}" in one for one in said)


def test_numbers_far_from_0_are_noted_before_the_run_and_in_its_advice(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "json " * (n % 4 + 1) + "user asks", "label": 60 + 10 * (n % 4)} for n in range(12)]
    common: dict[str, Any] = {"data": rows, "model": tiny.model, "problem_type": "regression"}
    (finding,) = (one for one in backhand.lint(**common, classes=True)["findings"] if one["kind"] == "scale")
    assert "around 75 with a deviation of 11.18" in finding["what"]
    with pytest.raises(UsageError, match="problem_type is for texts with a label") as refused:
        backhand.lint(**common)
    assert "classes=True" in str(refused.value.next_step)
    (malformed,) = (
        one
        for one in backhand.lint(**{**common, "data": [*rows, {"text": "a", "label": "high"}]}, classes=True)[
            "findings"
        ]
        if one["kind"] == "malformed"
    )
    assert "the label is 'high', not a number" in malformed["what"] and malformed["where"] == ["data row 13"]
    assert "or problem_type says so" in malformed["what"], "in Python's words"
    run = backhand.train(
        **{**common, "data": [{"text": "a", "label": "high"}, *rows], "skip_bad": True},
        objective="classify",
        eval_data=rows[:8],
        output=tmp_path / "run",
        max_steps=6,
        eval_every=1,
        answers=0,
    )
    note = "the labels are numbers around 75 with a deviation of 11.18, which a new head reaches only slowly; subtract"
    printed = capsys.readouterr().err
    assert (run.rows, run.malformed_rows) == (12, 1), "a label that does not fit the chosen problem is skipped"
    assert f"warning: {note}" in printed and printed.index(note) < printed.index("step 1/6")
    assert str(run.advice).startswith(note.capitalize()) and run.try_next is None
    assert str(run.advice).endswith("on the answers.")
    score = backhand.evaluate(data=rows[:4], adapter=run.adapter, model=tiny.model)
    assert isinstance(score, Evaluation) and score.base.perplexity is None
    assert "perplexity" not in score.as_dict()["base"]


@pytest.mark.parametrize(
    ("values", "problem", "names"),
    [
        (["b", "a", "b"], SINGLE, ("a", "b")),
        (["10", "9", "-1"], SINGLE, ("-1", "9", "10")),
        ([0.5, "1"], NUMBER, ("LABEL_0",)),
        (["0.5", "1"], NUMBER, ("LABEL_0",)),
        (["0.5", "x"], SINGLE, ("0.5", "x")),
        ([2.0, 10.0, 1.0], SINGLE, ("1", "2", "10")),
        (["2.0", "10.0", "1.0"], SINGLE, ("1.0", "2.0", "10.0")),
        (["2.00", "10.00"], NUMBER, ("LABEL_0",)),
        (["0,5", "1", "12,25", "0,125"], NUMBER, ("LABEL_0",)),
        (["1,234", "2,5"], NUMBER, ("LABEL_0",)),
        ([*(n / 4 for n in range(1, 10)), "Infinity"], NUMBER, ("LABEL_0",)),
        ([*(n / 1e7 for n in range(1, 10)), "n/a"], NUMBER, ("LABEL_0",)),
        (["0.5", "1.5"] * 5 + ["x"], SINGLE, ("0.5", "1.5", "x")),
        ([*map(str, range(30)), "x"], SINGLE, (*sorted(map(str, range(30))), "x")),
        ([("b",), ()], MULTI, ("b",)),
    ],
)
def test_the_labels_decide_the_kind_of_problem(values: list[Any], problem: ProblemType, names: tuple[str, ...]) -> None:
    labels = [ClassLabel(value) for value in values]
    assert problem_of(labels) == problem
    assert names_of(labels, problem) == names


def test_labels_that_do_not_fit_are_named() -> None:
    for label, problem, words in (
        ("c", SINGLE, "none of the labels of the run"),
        (("a", "b"), SINGLE, "labels in a list"),
        ("high", NUMBER, "not a number"),
    ):
        with pytest.raises(DataError, match=words):
            target_of(ClassLabel(label), problem, ("a", "b"), "rows.jsonl:3")


@pytest.mark.parametrize("problem", SHAPES)
def test_losses_and_gradients_are_those_of_transformers(problem: ProblemType) -> None:
    outputs = 1 if problem == NUMBER else 3
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(7, outputs, generator=generator, dtype=torch.float64)
    targets = torch.randn(7, outputs, generator=generator, dtype=torch.float64)
    if problem == SINGLE:
        targets = torch.nn.functional.one_hot(targets.argmax(1), outputs).double()
    if problem == MULTI:
        targets = (targets > 0).double()
    labels = targets.argmax(1) if problem == SINGLE else targets[:, 0] if problem == NUMBER else targets
    config = transformers.LlamaConfig(num_labels=outputs, problem_type=problem)
    theirs = logits.clone().requires_grad_()
    expected = transformers.loss.loss_utils.ForSequenceClassificationLoss(labels, theirs, config)
    expected.backward()
    mean = float(expected.detach())
    total, d_logits = loss_and_gradient(logits, targets, problem)
    assert float(total) / 7 == pytest.approx(mean, rel=1e-12)
    assert torch.allclose(d_logits / 7, theirs.grad, rtol=1e-12, atol=1e-15)
    assert float(row_losses(logits, targets, problem).mean()) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("problem", SHAPES)
def test_no_constant_answer_is_better_than_the_best(problem: ProblemType) -> None:
    outputs = 1 if problem == NUMBER else 3
    draw = torch.rand(20, outputs, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    targets = draw if problem == NUMBER else torch.nn.functional.one_hot(draw.argmax(1), outputs).double()
    best = constant_logits(targets, problem)
    least = row_losses(best, targets, problem).mean()
    for number in range(outputs):
        other = best.clone()
        other[:, number] += 0.1
        assert row_losses(other, targets, problem).mean() > least
    scores = score_classes(best, targets, problem, ["a", "b", "c"][:outputs], ["row"] * 20)
    assert scores.constant and scores.loss == pytest.approx(float(least))


def test_labels_that_are_never_given_are_said(straight: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    targets, given = (torch.eye(3, dtype=torch.float64)[rows] for rows in ([0, 0, 1, 2, 2], [0, 0, 1, 0, 1]))
    scores = score_classes(given, targets, SINGLE, ["a", "b", "c"], ["row"] * 5)
    print_classes({"adapted": scores})
    assert "never given: 'c' (2 rows)" in capsys.readouterr().out
    summary = not_none(read_summary(straight.run.output / "summary.json"))
    figures = {"base_classes": not_none(summary.base_classes), "adapted_classes": scores.figures()}
    assert any("; never given: 'c' (2 rows)." in line for line in closing_lines(replace(summary, **figures)))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"engine": "transformers"}, UsageError, "backhand engine alone"),
        ({"system": "Be kind."}, UsageError, "classify does not use it"),
        ({"target_modules": ("lm_head",)}, UsageError, "does not depend on"),
        ({"class_labels": ("json", "other")}, DataError, "none of the labels of the run"),
        ({"problem_type": NUMBER}, DataError, "not a number"),
        ({"class_labels": ("a", "a")}, UsageError, "not different labels"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tiny: TinyRun, tmp_path: Path, options: dict[str, Any], error: type[BackhandError], words: str
) -> None:
    with pytest.raises(error, match=words):
        train(config(tiny, tmp_path, tmp_path / "run", **options))


@pytest.mark.parametrize(
    ("label", "words"), [([2, 1, 2], "a list of 3 labels, in which '2' is repeated"), ({"a": 0.5, "b": 0.5}, "a table")]
)
def test_votes_and_probabilities_are_no_labels(label: object, words: str, tiny: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "user asks", "label": label}) + "\n")
    made = config(tiny, tmp_path, tmp_path / "run", data=(str(tmp_path / "rows.jsonl"),))
    with pytest.raises(DataError, match=words) as refused:
        train(made)
    assert "--objective decide" in str(refused.value.next_step)


def test_a_plan_needs_no_rows(tiny: TinyRun, tmp_path: Path) -> None:
    made = config(tiny, tmp_path, tmp_path / "run", data=(), eval_data=())
    plan = plan_run(made, resolve_machine(made), assumed_rows=True)
    assert "score.weight" in [tensor.name for tensor in plan.inputs.layout.full_tensors]
    assert plan.memory.peak_bytes > 0


def test_one_label_in_all_rows_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("note,team\nuser asks,a\njson,a\n")
    made = config(tiny, tmp_path, tmp_path / "run", data=(str(rows),), eval_data=(), prompt="note", completion="team")
    with pytest.raises(DataError, match="all training rows have the label 'a'"):
        train(made)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_text_among_numbers_is_refused_before_anything_is_written(
    held_out: bool, tiny: TinyRun, tmp_path: Path
) -> None:
    given: list[dict[str, Any]] = [{"text": f"user asks {'one ' * n}", "label": n / 4} for n in range(1, 12)]
    common: dict[str, Any] = {"objective": "classify", "prompt": "text", "completion": "label", "model": tiny.model}
    for value in (float("inf"), "n/a"):
        wrong = [{"text": "json", "label": value}, *given[2:]]
        common |= {"data": given, "eval_data": wrong} if held_out else {"data": wrong}
        run, plan = partial(backhand.train, output=tmp_path / "run"), partial(backhand.plan, calibrate=False)
        for call in (run, plan):
            with pytest.raises(DataError, match="not a number") as refused:
                call(**common)
            assert refused.value.where == f"{'eval_data' if held_out else 'data'} row 1"
            assert 'problem_type="single_label_classification"' in str(refused.value.next_step)
            assert not (tmp_path / "run").exists()
        plan(**common, problem_type=SINGLE)


def test_lint_reports_labels_that_contradict_and_labels_of_few_rows(tiny: TinyRun, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [("user asks", "a"), ("user asks", "b"), ("json", "b"), ("one", "b"), ("one list", "b"), ("two", "B ")]
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    report, _ = lint(DataOptions(data=(str(path),)), open_model(str(tiny.model)).tokenizer(), purpose="classes")
    assert {finding.kind: finding.where for finding in report.findings} == {
        "alike_labels": (f"{path}:6",),
        "contradicting_labels": (f"{path}:2",),
        "rare_label": (f"{path}:1", f"{path}:6"),
        "duplicate": (f"{path}:2 = {path}:1",),
    }
    assert report.labels == {"b": 4, "a": 1, "B": 1} and report.template == (), "no template is used"
    cut = DataOptions(data=(str(path),), max_length=2)
    report, _ = lint(cut, open_model(str(tiny.model)).tokenizer(), purpose="classes", context_length=2)
    assert report.train.longest == report.lengths["tokens"]["most"] == 2 and report.train.truncated
    assert "context" not in {finding.kind for finding in report.findings}
    stars = write_named(tmp_path / "stars.jsonl", [1, 2, 3, 4, 5, 5, 5, 5])
    options, tokenizer = DataOptions(data=(stars,)), open_model(str(tiny.model)).tokenizer()
    note = "the 5 integers are read as names; to learn them as numbers, give --problem-type regression"
    report, _ = lint(options, tokenizer, purpose="classes")
    assert note in report.train.notes and [one.remedy.endswith(note) for one in report.findings if "rare" in one.kind]
    report, _ = lint(options, tokenizer, purpose="classes", problem_type=SINGLE)
    assert "integers" not in str(report), "the kind of problem is chosen"


def test_integers_next_to_other_labels_are_noted(tiny: TinyRun, tmp_path: Path) -> None:
    rows = write_named(tmp_path / "rows.jsonl", [100, 90, 80, 70, "true"] * 4)
    made = config(tiny, tmp_path, tmp_path / "run", data=(rows,), eval_data=(), eval_fraction=0.0)
    said = "warning: most labels are numbers, but not those of 4 rows (true), so that all are read as names"
    (note,) = (one for one in plan_run(made, resolve_machine(made)).inputs.notes if one.startswith(said))
    assert "--problem-type regression --skip-bad" in note
    skipping = replace(with_options(made, skip_bad=True), objective=replace(made.objective, problem_type=NUMBER))
    report = plan_run(skipping, resolve_machine(skipping)).inputs.train.report
    assert (report.rows, report.skipped_bad) == (16, 4)
    chosen = replace(made, objective=replace(made.objective, problem_type=SINGLE))
    assert "most labels" not in str(plan_run(chosen, resolve_machine(chosen)).inputs.notes)


TAGS = ["law", "food", "love", "love, food", "law, age", "food, age"]


@pytest.mark.parametrize(
    ("labels", "what", "why", "next_step"),
    [
        (
            [*range(1, 25)],
            "24 of 24 training rows have a label that no other",
            "be learned",
            "--problem-type regression",
        ),
        ([f"{n}.01.2019" for n in range(22)] + ["none"] * 20, "22 of 42 training rows", "the column", "--completion"),
        ([*TAGS, *TAGS], "3 labels are made of others, such as 'love, food'", "its own", '["love", "food"]'),
        ([f"[{one.replace(',', ';')}]" for one in TAGS], "3 labels are made of others", "its own", '["love", "food"]'),
        (["law/age", "age/law", "age", "law"], "2 labels are made of others, such as", "its own", '["law", "age"]'),
        (["law|age", "age", "law"], "1 label is made of others, such as 'law|age'", "its own", '["law", "age"]'),
    ],
)
def test_labels_that_teach_something_else_stop_before_training(
    labels: list[Any], what: str, why: str, next_step: str, tiny: TinyRun, tmp_path: Path
) -> None:
    rows = write_named(tmp_path / "rows.jsonl", labels)
    made = config(tiny, tmp_path, tmp_path / "run", data=(rows,), eval_data=(), eval_fraction=0.0)
    options, tokenizer = DataOptions(data=(rows,), eval_fraction=0.0), open_model(str(tiny.model)).tokenizer()
    with pytest.raises(DataError, match=re.escape(what)) as refused:
        plan_run(made, resolve_machine(made))
    assert why in str(refused.value.why) and next_step in str(refused.value.next_step)
    assert "--problem-type single_label_classification" in str(refused.value.next_step)
    report, _ = lint(options, tokenizer, purpose="classes")
    (found,) = (finding for finding in report.findings if finding.severity == "error")
    assert what in found.what and found.remedy == refused.value.next_step and not report.skip_with
    chosen = replace(made, objective=replace(made.objective, problem_type=SINGLE))
    assert len(plan_run(chosen, resolve_machine(chosen)).inputs.config.objective.class_labels) == len(
        {*map(str, labels)}
    )
    assert lint(options, tokenizer, purpose="classes", problem_type=SINGLE)[0].errors == 0


@pytest.mark.parametrize(
    "labels",
    [
        [*range(1, 20)],  # a first try
        [*(str(n) for n in range(20)), *"ab" * 10],  # half of the rows
        ["rock, paper", "rock", "stone"],
        ["news", "news/sports", "news/sports/soccer"],
        [["law", "age"], ["law"], ["age"]],
    ],
)
def test_labels_that_may_be_meant_are_trained(labels: list[Any], tiny: TinyRun, tmp_path: Path) -> None:
    rows = write_named(tmp_path / "rows.jsonl", labels)
    made = config(tiny, tmp_path, tmp_path / "run", data=(rows,), eval_data=(), eval_fraction=0.0)
    notes = plan_run(made, resolve_machine(made)).inputs.notes
    assert ("rock, 'rock, paper', stone" in " ".join(notes)) == ("rock" in labels), "a label with a comma is quoted"


def test_a_run_whose_held_out_labels_are_not_trained_is_not_judged(tiny: TinyRun, tmp_path: Path) -> None:
    data = (write_named(tmp_path / "rows.jsonl", ["a", "b"] * 4),)
    held_out = (write_named(tmp_path / "held_out.jsonl", ["c"] * 5 + ["a"] * 3),)
    made = config(tiny, tmp_path, tmp_path / "run", data=data, eval_data=held_out, eval_every=1)
    said = "5 of 8 held-out rows have labels that no training row has"
    assert any(note.startswith(f"warning: {said}") for note in plan_run(made, resolve_machine(made)).inputs.notes)
    summary = train(made)
    assert (summary.unlearned_rows, summary.try_next) == (5, None)
    assert not_none(summary.advice).startswith(said) and "learning rate" not in not_none(summary.advice)
    assert verdict(read_run(made.run.output)) == "unclear"
    half = with_options(made, eval_data=(write_named(tmp_path / "half.jsonl", ["c", "a"]),))
    assert not any("no training row has" in note for note in plan_run(half, resolve_machine(half)).inputs.notes)


def test_a_plan_of_a_sample_does_not_count_its_labels(tiny: TinyRun, tmp_path: Path) -> None:
    rows = write_named(tmp_path / "rows.jsonl", [*range(40)])
    made = config(tiny, tmp_path, tmp_path / "run", data=(rows,), eval_data=(), eval_fraction=0.0)
    assert plan_run(made, resolve_machine(made), row_factor=2.0).inputs.config.objective.problem_type == SINGLE


def test_decimal_commas_are_read_as_numbers_or_answered(tiny: TinyRun, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "rows.csv", open_model(str(tiny.model)).tokenizer()

    def rows(path: Path, labels: Sequence[str]) -> tuple[str]:
        path.write_text("Entry;Effort\n" + "".join(f"text {n};{label}\n" for n, label in enumerate(labels)))
        return (str(path),)

    def linted(*labels: str, held_out: Sequence[str] = (), problem: ProblemType | None = None) -> LintReport:
        options = DataOptions(data=rows(path, labels), prompt="Entry", completion="Effort")
        if held_out:
            options = replace(options, eval_data=rows(tmp_path / "held_out.csv", held_out))
        return lint(options, tokenizer, purpose="classes", problem_type=problem)[0]

    numbers = [f"{n},{n % 10}5" for n in range(20)]
    report = linted(*numbers)
    assert not report.findings and not report.labels
    assert "the labels are read as numbers with a decimal comma, such as 0,05" in report.train.notes
    (finding,) = linted(*numbers, "n/a", "1,250").findings  # the others settle what its comma is
    assert finding.kind == "malformed" and "'n/a', not a number" in finding.what and finding.where == (f"{path}:22",)
    assert linted(*numbers, "1,250", held_out=["-1,685", "2,041"], problem=NUMBER).errors == 0
    assert linted(*(f"{n},685" for n in range(1, 21))).errors == 20
    (finding,) = (one for one in linted(*["0.5", "1.5"] * 9, "n/a").findings if one.kind == "not_numbers")
    assert finding.where == (f"{path}:20",) and "(n/a)" in finding.what
    integers = ["1", "2", "3", "3"] * 3
    report = linted(*integers, "n/a", "none", "none")
    (finding,) = (one for one in report.findings if one.kind == "not_numbers")
    assert (finding.count, "(n/a, none)" in finding.what) == (3, True)
    assert "--problem-type regression --skip-bad" in finding.remedy
    for few in (["0", "1", "1", "n/a"], [*integers[:4], *["n/a"] * 4]):
        assert "not_numbers" not in {one.kind for one in linted(*few).findings}, "most labels are names"
    for mixed, where in (
        (linted(*numbers, "1.250"), f"{path}:22"),
        (linted(*numbers, held_out=["1.250", "2.5"]), f"{tmp_path / 'held_out.csv'}:2"),
    ):
        (finding,) = (one for one in mixed.findings if one.severity == "error")
        assert (finding.kind, finding.where, mixed.errors) == ("malformed", (where,), 1)
        assert "other rows have a decimal comma" in finding.what and "with a decimal point" in finding.remedy
    with pytest.raises(DataError, match="'1,250', not a number") as refused:
        target_of(ClassLabel("1,250"), NUMBER, (), "here")
    assert "with a decimal point" in str(refused.value.next_step)


def test_the_rows_with_the_largest_losses_have_the_text_of_the_file(tiny: TinyRun, tmp_path: Path) -> None:
    texts = [f"user  ASKS json number {n} of many" for n in range(12)]
    rows = [{"text": text, "label": n / 4} for n, text in enumerate(texts)]
    common: dict[str, Any] = {"model": tiny.model, "objective": "classify", "problem_type": "regression", "answers": 0}
    run = backhand.train(data=rows, eval_data=rows[:4], output=tmp_path / "run", max_steps=1, max_length=6, **common)
    surprises = not_none(run.adapted_classes)["surprises"]
    assert surprises and {row["text"] for row in surprises} <= {*texts}, "also where the tokens are cut"
    assert ClassLabel("a", "one text") == ClassLabel("a") and repr(ClassLabel("a", "one text")) == repr(ClassLabel("a"))
