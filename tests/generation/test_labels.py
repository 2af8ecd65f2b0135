"""Labels: which rows have some, how probable each is, what is given, and how that is judged."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

from backhand.data.examples import Example
from backhand.data.options import DataOptions, RowSources
from backhand.errors import ArtifactError, DataError, UsageError
from backhand.generation.command import generate_command
from backhand.generation.labels import choose_labels, found_labels, label_log_probabilities, written_label
from backhand.generation.loading import loaded_model
from backhand.generation.options import AnswerOptions, GenerateOptions
from backhand.loop.evaluate import evaluate, evaluate_command
from backhand.loop.label_scores import label_score, mistaken_for
from backhand.nn.model_options import BaseModelOptions
from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions
from backhand.options.config import ModelOptions
from backhand.report.page import run_page
from backhand.report.run_record import read_run
from backhand.runs.summary import LabelFigures, read_summary
from backhand.training.console import closing_lines
from backhand.training.run import train
from backhand.words import interval_range, share_interval
from tests.support.page import Page
from tests.support.tiny_run import TinyRun

STOP = 9


class Letters:
    """A tokenizer of one letter a token, by its place in the alphabet."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(" abcdefgh"[one] for one in ids)


def answered(*ids: int, prompt: int = 3) -> Example:
    whole = np.array([8] * prompt + list(ids), dtype=np.int32)
    return Example(whole, np.arange(len(whole)) >= prompt, "row")


def found(*answers: Sequence[int]) -> dict[str, tuple[int, ...]]:
    return found_labels([answered(*ids) for ids in answers], Letters(), (STOP,))


def test_rows_have_labels_by_the_rule_alone() -> None:
    a, b = (1, STOP), (2, 3, STOP, 4)
    assert found(*[a, b] * 3) == {"a": (1, STOP), "bc": (2, 3, STOP)}, "what follows the end is none of it"
    assert found(a, b, a, b, a) == {}, "fewer than three rows a label"
    assert found(*[a] * 9) == {}, "one label decides nothing"
    assert found(*[a, (STOP,)] * 9) == {}, "an empty answer"
    assert found(*[a, (1,) * 61 + (STOP,)] * 9) == {}, "too long"
    assert found(*[a, b] * 3, (2, 3)) == {"a": (1, STOP), "bc": (2, 3, STOP)}, "a row cut before its end"
    assert found(*[a, b] * 3, (0, 1, STOP))["a"] == (1, STOP), "of two ways to write it the usual one"
    many = [(one, other, STOP) for one in range(1, 9) for other in range(1, 9)]
    assert len(found(*many * 3)) == 64 and found(*[*many, a] * 3) == {}
    plain = Example(np.array([1, 2, STOP], dtype=np.int32), np.array([False, True, True]), "text")
    assert found_labels([plain] * 9, Letters(), (STOP,)) == {}


RIGHT = ["a", "a", "a", "b", "b", "c"]
GIVEN = ["a", "a", "b", "b", "d", "a"]


def test_figures_are_those_worked_by_hand_and_scikit_learns() -> None:
    score = label_score(RIGHT, GIVEN, "abcde", ["a", "x", "x", "b", "y", "c"])
    assert score.accuracy == 3 / 6
    assert score.per_label["a"] == {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3}
    assert score.per_label["b"] == {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2}
    assert score.per_label["c"]["f1"] == 0, "a row of it, and none right"
    assert score.per_label["d"] == {"precision": 0, "recall": None, "f1": None, "support": 0}, (
        "given, but no row has it"
    )
    assert score.per_label["e"] == {"precision": None, "recall": None, "f1": None, "support": 0}
    assert score.f1_macro == pytest.approx((2 / 3 + 1 / 2 + 0) / 3), "d and e have no rows"
    assert score.confusion == {"a": {"a": 2, "b": 1}, "b": {"b": 1, "d": 1}, "c": {"a": 1}}
    assert (score.invented, score.inventions) == (3, {"x": 2, "y": 1})
    assert (mistaken_for(score, "b"), mistaken_for(score, "e")) == ("d 1", "")
    if importlib.util.find_spec("sklearn"):
        metrics = importlib.import_module("sklearn.metrics")
        with_rows: dict[str, Any] = {"labels": list("abc"), "zero_division": 0}
        assert score.f1_macro == pytest.approx(metrics.f1_score(RIGHT, GIVEN, average="macro", **with_rows))
        theirs = metrics.precision_recall_fscore_support(RIGHT, GIVEN, **with_rows)
        ours = [list(score.per_label[label].values()) for label in "abc"]
        assert np.allclose(ours, np.array(theirs).T, rtol=1e-12)


LABELS = ("json", "names", "a list of names", "number one")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, Path, Path]:
    """A run on rows of four labels, each determined by the prompt's first word: tiny run, rows, its directory."""
    place = tmp_path_factory.mktemp("labelled")
    tiny, draw = TinyRun(place / "tiny"), random.Random(0)
    rows = []
    for number in range(32):
        label = LABELS[number % 4]
        asked = f"{label.split()[0]} {label.split()[-1]} the user asks {draw.choice(['for', 'is', 'what'])}"
        rows.append({"prompt": asked, "completion": label})
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "data": (str(path),),
        "eval_data": (str(path),),
        "epochs": 12,
        "learning_rate": 2e-2,
        "rank": 8,
        "answers": 1,
    }
    train(tiny.config(place / "run", **options))
    return tiny, path, place / "run"


@pytest.mark.parametrize("engine", ["backhand", "transformers"])
def test_log_probabilities_are_transformers_own(labelled: tuple[TinyRun, Path, Path], engine: Any) -> None:
    """Compute in float32 with plain transformers, for prompts of unequal length, each followed by its labels alone."""
    from transformers import AutoModelForCausalLM

    tiny, _, _ = labelled
    prompts = [[5, 6, 7, 8] * 9, [3], [4, 5] * 20, [4, 5] * 20 + [7]]
    labels = {"a": (5, 2), "ab": (5, 6, 2), "b": (7, 2), "bcde": (7, 8, 9, 10, 2)}
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    expected = torch.zeros(len(prompts), len(labels), dtype=torch.float64)
    for row, prompt in enumerate(prompts):
        for column, ending in enumerate(labels.values()):
            ids = torch.tensor([[*prompt, *ending]])
            log_p = model(ids).logits[0].double().log_softmax(-1)
            expected[row, column] = log_p[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).sum()
    with loaded_model(BaseModelOptions(model=str(tiny.model), dtype="float32", engine=engine)) as loaded:
        for batch_rows in (1, 3, 16):
            done: list[int] = []
            on_done = partial(done.append, 1)
            ours = label_log_probabilities(*(loaded.model, prompts, labels), batch_rows=batch_rows, on_done=on_done)
            assert (ours - expected).abs().max() < 1e-4, batch_rows
            assert len(done) == len(prompts), "each prompt is counted once"
        for chosen in choose_labels(loaded.model, prompts, labels):
            assert sum(chosen.values()) == pytest.approx(1) and list(chosen.values()) == sorted(chosen.values())[::-1]


def test_a_run_judges_its_labels_and_writes_them_down(labelled: tuple[TinyRun, Path, Path]) -> None:
    _, _, run = labelled
    summary = json.loads((run / "summary.json").read_text())
    assert summary["exact_match_rows"] == 32 and summary["base_exact_match"] == 0
    score = summary["adapted_labels"]
    assert summary["adapted_exact_match"] > 0.9 < score["accuracy"] and score["invented"] <= 1
    assert list(score["per_label"]) == sorted(LABELS) and summary["base_labels"]["invented"] == 32
    reported = read_summary(run / "summary.json")
    assert {*summary["base_labels"], *score} == {*get_type_hints(LabelFigures)}
    assert reported is not None and any(
        "The accuracy" in line and "macro F1" in line for line in closing_lines(reported)
    )
    record = json.loads((run / "adapter" / "backhand.json").read_text())
    assert list(record["labels"]) == sorted(LABELS)
    page = Page(run_page(read_run(run)))
    (table,) = page.every("table", class_="confusion")
    cells = [element.text for element in table.all() if element.attributes.get("class") == "cell right"]
    assert cells == [str(score["confusion"][name].get(name, "")) for name in sorted(LABELS)]
    for name in LABELS:
        one, chosen = score["per_label"][name], sum(given.get(name, 0) for given in score["confusion"].values())
        assert interval_range(one["recall"], one["support"]) in table.text
        assert interval_range(one["precision"], chosen) in table.text


def evaluated(tiny: TinyRun, path: Path, adapter: Path | None = None, **options: Any) -> EvaluateOptions:
    model = ModelOptions(model=str(tiny.model), dtype="float32")
    run = EvaluateRunOptions(adapter=adapter, **options)
    return EvaluateOptions(model=model, data=DataOptions(data=(str(path),)), run=run)


def test_evaluate_judges_labels_where_rows_have_them(
    labelled: tuple[TinyRun, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, path, run = labelled
    evaluate_command(evaluated(tiny, path, run / "adapter", json=True))
    found, summary = json.loads(capsys.readouterr().out), json.loads((run / "summary.json").read_text())
    for name in ("base", "adapted"):
        assert found[name]["labels"] == summary[f"{name}_labels"]
        for scores, share in ((found[name], "exact_match"), (found[name]["labels"], "accuracy")):
            assert scores[f"{share}_interval"] == [*share_interval(scores[share], found["rows"])]
        assert found[name]["exact_match"] == summary[f"{name}_exact_match"]
    few = tmp_path / "few.jsonl"  # fewer rows than the rule asks for: the adapter knows its labels
    few.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert evaluate(evaluated(tiny, few, run / "adapter")).adapted.labels.per_label.keys() == set(LABELS)
    assert evaluate(evaluated(tiny, few)).base.labels is None
    assert evaluate(evaluated(tiny, path, labels=("none",))).base.labels is None
    named = evaluate(evaluated(tiny, few, labels=(*LABELS, "for"))).base.labels
    assert named is not None and "for" in named.per_label
    with pytest.raises(DataError, match="is no label"):
        evaluate(evaluated(tiny, few, labels=("json", "for")))
    with pytest.raises(DataError, match="have no labels"):
        evaluate(evaluated(tiny, few, labels=("auto",)))
    evaluate_command(evaluated(tiny, path, run / "adapter"))
    shown = capsys.readouterr().out
    assert "macro F1" in shown and "base: exact match 95 % interval" in shown and "adapted: exact match" in shown
    assert (
        "Always answering" in shown and "that is clearly better than the base model (+" in shown and "sure" not in shown
    )


def test_other_files_are_read_by_the_columns_of_training(labelled: tuple[TinyRun, Path, Path], tmp_path: Path) -> None:
    tiny, path, run = labelled
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    table = tmp_path / "held.jsonl"
    table.write_text(
        "".join(json.dumps({"text": row["prompt"], "label": row["completion"]}) + "\n" for row in rows[:8])
    )
    with pytest.raises(DataError, match="label would not be read"):
        evaluate(evaluated(tiny, table, run / "adapter"))
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    record = json.loads((adapter / "backhand.json").read_text())
    record["config"] |= {"data.prompt": "{text}", "data.completion": "label"}
    (adapter / "backhand.json").write_text(json.dumps(record))
    found = evaluate(evaluated(tiny, table, adapter)).adapted
    assert found is not None and found.labels is not None and found.labels.accuracy > 0.5


def test_generate_answers_with_a_label_and_its_probability(
    labelled: tuple[TinyRun, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, path, run = labelled

    def generate(**options: Any) -> None:
        rows = RowSources(data=options.pop("data", ()))
        model = BaseModelOptions(model=str(tiny.model), dtype="float32")
        generate_command(GenerateOptions(model=model, rows=rows, answer=AnswerOptions(**options)))

    generate(prompt="json json the user asks for", adapter=run / "adapter", labels=("auto",))
    said = capsys.readouterr()
    assert said.out == "json\n" and said.err.startswith(("json 1.000, ", "json 0.9"))
    output = tmp_path / "answers.jsonl"
    generate(data=(str(path),), adapter=run / "adapter", labels=("auto",), output=output, quiet=True)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert sum(line["completion"] == line["reference"] for line in lines) >= 30
    for line in lines:
        assert sum(line["probabilities"].values()) == pytest.approx(1) and set(line["probabilities"]) == set(LABELS)
        assert all(p == float(f"{p:.6g}") for p in line["probabilities"].values())
        assert line["probability"] == max(line["probabilities"].values()) == line["probabilities"][line["completion"]]
    generate(prompt="json", labels=(1, "for"))
    assert capsys.readouterr().out.strip() in ("1", "for")
    with pytest.raises(UsageError, match="there is no adapter whose record names them"):
        generate(prompt="json", labels=("auto",))
    record = json.loads((run / "adapter" / "backhand.json").read_text())
    tampered = Path(shutil.copytree(run / "adapter", tmp_path / "tampered"))
    exchanged = {"json": record["labels"]["names"], "names": record["labels"]["json"]}
    for labels in (exchanged, {"json": [1 << 40, 2]}, {"json": ["json"]}, {"json": []}):
        (tampered / "backhand.json").write_text(json.dumps(record | {"labels": labels}))
        with pytest.raises(ArtifactError, match=r"labels\.json") as raised:
            generate(prompt="json", adapter=tampered, labels=("auto",))
        assert "backhand.json" in str(raised.value)
    for wrong in (("one",), ("one", "one"), ("one", "")):
        with pytest.raises(UsageError):
            generate(prompt="json", labels=wrong)


@pytest.mark.smollm2
def test_smollm2s_labels_are_as_rows_have_them_and_as_probable_as_transformers_says(tmp_path: Path) -> None:
    from backhand.data.documents import RowRenderer
    from backhand.data.prepare import prepare
    from backhand.nn.loading import open_model
    from backhand.nn.loading.transformers_model import load_transformers_model

    names = ("billing", "not spam", "spam", "shipping and returns")
    rows = [{"prompt": f"Message: I was charged {n} times.\nCategory:", "completion": names[n % 4]} for n in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataOptions(data=(str(path),))
    with loaded_model(BaseModelOptions(dtype="float32")) as loaded:
        examples = prepare(data, loaded.tokenizer)[0].examples
        labels = found_labels(examples, loaded.tokenizer, loaded.stop_ids)
        renderer = RowRenderer(loaded.tokenizer, data)
        assert labels == {name: written_label(renderer, name) for name in names}
        prompts = [example.input_ids[: example.last_answer[0]].tolist() for example in examples[:2]]
        ours = label_log_probabilities(loaded.model, prompts, labels)
    model = load_transformers_model(open_model("smollm2-135m"), dtype=torch.float32)
    for row, prompt in enumerate(prompts):
        for column, ending in enumerate(labels.values()):
            ids = torch.tensor([[*prompt, *ending]])
            with torch.no_grad():
                log_p = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            assert abs(ours[row, column] - log_p.gather(1, ids[0, len(prompt) :, None]).sum()) < 1e-4
