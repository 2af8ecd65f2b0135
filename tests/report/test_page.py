"""The report of a run: every section, what it says, and that it is one file."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backhand.errors import ArtifactError, CheckError, UsageError
from backhand.loop.observers import Observer
from backhand.report import command
from backhand.report.headline import headline
from backhand.report.page import SECTIONS, result_sentence, run_page
from backhand.report.run_record import read_run
from backhand.report.train import train
from backhand.runs.interruption import Interrupted
from backhand.words import interval_text, upper_first
from tests.support.page import Page
from tests.support.tiny_run import TinyRun


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_training_leaves_a_page_with_every_section(finished: Path) -> None:
    data = (finished / "report.html").read_bytes()
    assert len(data) < 1_500_000
    page = Page(data)
    assert [section.attributes["id"] for section in page.every("section")] == list(SECTIONS)
    for link in page.every("a"):
        target = link.attributes["href"]
        assert target is not None
        if target.startswith("#"):
            assert page.every("section", id=target[1:])
    assert set(page.charts) == {
        "loss", "learning-rate", "grad-norm", "tokens-per-s", "memory", "forgetting",
        "moved", "effective-rank", "spectra", "lengths", "supervised",
    }  # fmt: skip
    for name in page.charts:
        assert page.one("div", id=f"chart-{name}").attributes["class"] == "chart"


_COUNTS = {"queries": 13, "candidates": 13, "mean_cosine": 0.3}


def _rankings(*scores: tuple[float, float, float]) -> dict[str, Any]:
    """Return the fields of a summary: the score of the base and its interval, and those of the adapted model."""
    return {
        f"{model}_retrieval": {"ndcg@10": value, "intervals": {"ndcg@10": [low, high]}, **_COUNTS}
        for model, (value, low, high) in zip(("base", "adapted"), scores, strict=True)
    }


def test_the_result_in_one_sentence(finished: Path) -> None:
    run = read_run(finished)
    changed = r"nats per token \(95 % interval of the change -\d\.\d+ to -\d\.\d+\)"
    assert re.fullmatch(rf"held-out loss \d+\.\d+ → \d+\.\d+ {changed}: it helped\.", result_sentence(run))
    decided = {"accuracy": 0.4, "majority": 0.4, "rows": 100}
    values = {"base_decisions": {"team": decided}, "adapted_decisions": {"team": decided | {"accuracy": 0.9}}}
    sentences = {
        "right answers 40% → 90% (95 % interval 83–94 %): it helped.": values,
        "right answers 40% → 90% (95 % interval 83–94 %): clearly better than the base model, but not than a constant "
        "answer.": {
            "base_decisions": {"team": decided},
            "adapted_decisions": {"team": decided | {"accuracy": 0.9, "majority": 0.85}},
        },
        "right answers 25% → 50% (95 % interval 40–60 %): it helped.": {
            "base_classes": {"accuracy": 0.25},
            "adapted_classes": {"accuracy": 0.5, "rows": 100},
        },
        "nDCG@10 0.250 → 0.500: it helped.": _rankings((0.25, 0.15, 0.35), (0.5, 0.4, 0.6)),
        "nDCG@10 0.500 → 0.250: it did not help.": _rankings((0.5, 0.4, 0.6), (0.25, 0.15, 0.35)),
        "nDCG@10 0.972 → 1.000: not clear whether it helped.": _rankings((0.972, 0.9, 1.0), (1.0, 1.0, 1.0)),
        "nDCG@10 0.972 → 0.972: not clear whether it helped.": _rankings((0.972, 0.9, 1.0), (0.972, 0.9, 1.0)),
    }
    for sentence, summary in sentences.items():
        assert result_sentence(replace(run, summary=summary)) == sentence
        assert upper_first(sentence)[:4] in ("Righ", "nDCG")  # as the list of runs shows it
    of_labels = replace(run, config=run.config | {"objective": {"objective": "classify"}}, summary=run.summary)
    of_labels.summary.update(base_classes={"accuracy": 0.25}, adapted_classes={"accuracy": 0.5, "rows": 100})
    assert "25% → 50%, compared with a constant answer (95 %" in result_sentence(of_labels)
    few = {"base_classes": {"accuracy": 0.1}, "adapted_classes": {"accuracy": 0.0, "rows": 20}, "base_eval_loss": 1e-9}
    assert "it did not help" in result_sentence(replace(of_labels, summary=of_labels.summary | few))
    few["base_eval_loss"] = 1e9
    assert "not clear whether it helped" in result_sentence(replace(of_labels, summary=of_labels.summary | few))
    unclear = replace(run, summary=summary, config=run.config | {"objective": {"objective": "embed"}})
    assert (
        headline(unclear)
        .split(" (embed)")[1]
        .startswith(
            ", and nDCG@10 from 0.972 to 0.972; nDCG@10 changed by +0.000 (95 % interval -0.100 to +0.100): too"
        )
    )
    assert "held-out loss: not clear whether it helped" in Page(run_page(unclear)).one("section", id="result").text
    pairs = replace(
        run,
        summary={"held_out_pairs": {"rewards/accuracies": 0.75}},
        config=run.config | {"objective": {"objective": "dpo"}},
    )
    interval = interval_text(0.75, 4)
    assert result_sentence(pairs) == f"pairs in the right order 75% of 4 ({interval})."
    assert result_sentence(replace(run, summary={}, metrics=[])) == ""


def test_the_page_is_one_file_that_its_policy_keeps_shut(finished: Path) -> None:
    page = Page((finished / "report.html").read_bytes())
    assert not [e for e in page.root.all() if "src" in e.attributes or e.tag in ("iframe", "object", "embed", "form")]
    assert [link.attributes["href"] for link in page.every("link")] == ["data:,"]
    policy = next(m for m in page.every("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy")
    text = policy.attributes["content"]
    assert text is not None and text.startswith("default-src 'none';") and "connect-src 'none'" in text
    assert "unsafe-eval" not in text
    allowed = re.findall(r"'sha256-([^']+)'", text)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    assert digests == allowed and len(digests) == 2


def test_the_sentence_at_the_top(finished: Path, tiny: TinyRun) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    lead = Page(run_page(read_run(finished))).one("p", class_="lead").text
    base, best = summary["base_eval_loss"], summary["best_eval_loss"]
    assert f"on 11 rows of {tiny.rows.name}" in lead and "for 12 steps" in lead
    assert f"from {base:.3f} to {best:.3f} nats per token" in lead and "so it helped" in lead
    assert str(finished / "adapter") in lead
    run = read_run(finished)
    losses = [(0, 12.0, [119.0, 120.0, 121.0, 120.0]), (6, 9.0, [88.0, 90.0, 92.0, 90.0])]
    weak = [{"step": step, "eval_loss": loss, "row_nats": nats, "row_tokens": [10] * 4} for step, loss, nats in losses]
    assert "right answer has a probability of 0.012% instead of 0.00061%" in headline(replace(run, metrics=weak))
    classes = {"base_classes": {"accuracy": 0.25}, "adapted_classes": {"accuracy": 0.5, "rows": 100}}
    config = run.config | {"objective": {"objective": "classify"}}
    for started, of_loss in ((True, "the adapter it started from"), (False, "the best constant answer")):
        words = "and accuracy from 0.250 (the best constant answer) to 0.500 (95 % interval 40–60 %), so it helped"
        summary = run.summary | classes | {"compared_with_start": started}
        sentence = headline(replace(run, config=config, summary=summary))
        assert words in sentence and f" ({of_loss}) to {best:.3f} nats per row" in sentence


def test_a_run_that_did_not_help_says_so(finished: Path) -> None:
    first = lines(finished / "metrics.jsonl")[0]

    def lead(*rises: float) -> str:
        def line_of(line: dict[str, Any]) -> dict[str, Any]:
            if "eval_loss" not in line:
                return line
            nats = [old + rise * line["step"] for old, rise in zip(first["row_nats"], rises, strict=True)]
            return line | {"row_nats": nats, "eval_loss": sum(nats) / sum(first["row_tokens"])}

        changed = [line_of(line) for line in lines(finished / "metrics.jsonl")]
        (finished / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
        return Page(run_page(read_run(finished))).one("p", class_="lead").text

    assert "so it did not help" in lead(1.0, 1.1, 0.9, 1.0)
    for few in (lead(1.0, -3.0, 0.5, 0.1), lead(-1.0, 3.0, -0.5, -3.0)):
        assert "too few rows to be sure of the change" in few and "so it" not in few
    older = [
        {name: one for name, one in line.items() if name != "row_nats"} for line in lines(finished / "metrics.jsonl")
    ]
    (finished / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in older))
    assert "it is not clear whether it helped" in Page(run_page(read_run(finished))).one("p", class_="lead").text


def test_commands_for_other_programs_name_adapter_and_base(finished: Path, tiny: TinyRun) -> None:
    text = Page(run_page(read_run(finished))).one("section", id="result").text
    for program in ("PEFT", "llama.cpp", "vLLM", "Ollama"):
        assert program in text
    assert f"PeftModel.from_pretrained(base, '{finished / 'adapter'}')" in text
    assert f"AutoModelForCausalLM.from_pretrained('{tiny.model}')" in text
    assert "quantized weights" not in text
    run = read_run(finished)
    quantized = replace(run, facts=run.facts | {"model": run.facts["model"] | {"quantized": True}})
    assert Page(run_page(quantized)).one("section", id="result").text.count("Training used quantized weights") == 2


def test_a_run_that_trains_is_not_judged(finished: Path) -> None:
    run = read_run(finished)
    assert run.status is not None
    summary = run.summary | {"advice": "It learned nothing.", "try_next": "backhand train x"}
    training = replace(run, status=replace(run.status, state="running"), summary=summary)
    result = Page(run_page(training)).one("section", id="result").text
    assert "so far" in result and "the run has not ended" in result
    assert "helped" not in result and "Try:" not in result and "backhand train x" not in result
    first = replace(training, metrics=(), summary={})
    assert "nothing was held out" not in Page(run_page(first)).one("section", id="result").text


def test_forgetting_is_a_share_in_words(finished: Path) -> None:
    run = read_run(finished)
    page = Page(run_page(replace(run, summary=run.summary | {"forgotten_nats": 0.9})))
    result = page.one("section", id="result").text
    assert "41%" in result and "of the former probability of a word in given unrelated texts" in result


def test_answers_of_base_and_adapter_side_by_side(finished: Path, tiny: TinyRun) -> None:
    recorded = lines(finished / "answers.jsonl")
    assert [line["source"] for line in recorded] == [f"{tiny.held_out}:{number}" for number in (1, 2, 3, 4)]
    expected = [row["completion"] for row in lines(tiny.held_out)]
    assert [line["reference"] for line in recorded] == expected
    assert any(line["base"] != line["adapted"] for line in recorded)
    # Written afresh, with answers that differ.
    answer = recorded[0] | {"base": "red green blue", "adapted": "red grey blue", "reference": "red grey blue"}
    (finished / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    section = Page(run_page(read_run(finished))).one("section", id="answers")
    assert [mark.text for mark in (e for e in section.all() if e.tag == "mark")] == ["green", "grey"]
    assert "= expected answer" in section.text and answer["prompt"] in section.text
    (finished / "answers.jsonl").write_text(json.dumps(answer | {"reference": ""}) + "\n")
    assert "expected answer" not in Page(run_page(read_run(finished))).one("section", id="answers").text
    # Control tokens are distinguished from the question.
    control = [span.text for span in section.all() if span.attributes.get("class") == "control"]
    asked = lines(tiny.held_out)[0]["prompt"]
    assert control and all(text in answer["prompt"] for text in control)
    assert not any(asked in text for text in control)
    # A long prompt is folded; its two ends and its length stay visible.
    answer["prompt_parts"] = [["start " + "long " * 200 + "the question", False]]
    (finished / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    section = Page(run_page(read_run(finished))).one("section", id="answers")
    (folded,) = [one for one in section.all() if one.tag == "summary" and "characters" in one.text]
    assert folded.text.startswith("start long") and "the question (1,018 characters)" in folded.text
    del answer["prompt_parts"]  # as before there were any
    (finished / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    assert answer["prompt"] in Page(run_page(read_run(finished))).one("section", id="answers").text


def test_curves_hold_the_figures_of_metrics(finished: Path) -> None:
    recorded = lines(finished / "metrics.jsonl")
    charts = Page(run_page(read_run(finished))).charts
    loss = charts["loss"]["data"]["values"]
    assert [(row["step"], row["value"]) for row in loss if row["series"] == "training rows"] == [
        (line["step"], line["loss"]) for line in recorded if "loss" in line
    ]
    assert [(row["step"], row["value"]) for row in loss if row["series"] == "held-out rows"] == [
        (line["step"], line["eval_loss"]) for line in recorded if "eval_loss" in line
    ]
    facts = json.loads((finished / "facts.json").read_text())
    predicted = [row["value"] for row in charts["memory"]["data"]["values"] if row["series"] == "predicted peak"]
    assert predicted == [facts["memory"]["predicted_bytes"] / 2**20] * 2
    tooltip = charts["loss"]["layer"][-1]["encoding"]["tooltip"]
    assert {entry["field"] for entry in tooltip} == {"step", "value", "series"}


def test_what_each_process_did_and_waited(finished: Path) -> None:
    curves = Page(run_page(read_run(finished))).one("section", id="curves")
    assert "rank 0" not in curves.text
    for line in (recorded := lines(finished / "metrics.jsonl")):
        if "loss" in line:
            line |= {"computed_s": [3.0, 1.0], "waited_s": [1.0, 3.0]}
    (finished / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in recorded))
    text = Page(run_page(read_run(finished))).one("section", id="curves").text
    assert "25% waited" in text[text.index("rank 0") : text.index("rank 1")] and "75% waited" in text


def test_the_rows_token_by_token(finished: Path, tiny: TinyRun) -> None:
    section = Page(run_page(read_run(finished))).one("section", id="data")
    shown = [element for element in section.all() if element.attributes.get("class") == "tokens"]
    row = lines(tiny.rows)[0]
    marked = "".join(span.text for span in shown[0].children if span.attributes.get("class") == "on")
    assert row["prompt"] in shown[0].text and row["prompt"] not in marked
    assert row["completion"] in marked
    recorded = json.loads((finished / "facts.json").read_text())["data"]["train"]
    assert sum(one["documents"] for one in recorded["lengths"]) == 11


def test_what_is_needed_to_repeat_it(finished: Path) -> None:
    section = Page(run_page(read_run(finished))).one("section", id="repeat")
    facts = json.loads((finished / "facts.json").read_text())
    assert (finished / "config.toml").read_text() in section.text
    for value in (facts["digests"]["data_digest"], facts["packages"]["torch"], facts["machine"]["processor"]):
        assert value in section.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_has_its_page(number: signal.Signals, tiny: TinyRun, tmp_path: Path) -> None:
    class Stop(Observer):
        def stepped(self, record: Any) -> None:
            if record["step"] == 3:
                signal.raise_signal(number)

    with pytest.raises(Interrupted):
        train(tiny.config(tmp_path / "run", eval_every=2, batch_rows=2, epochs=1), callbacks=[Stop()])
    page = Page((tmp_path / "run" / "report.html").read_bytes())
    lead = page.one("p", class_="lead").text
    assert "3 of 6 steps until it was interrupted, on 6 of 11 rows" in lead
    assert re.search(r" to [\d.]+ at step 2 nats per token", lead) and "; the adapter of that step is in " in lead
    assert page.one("p", class_="state").text.startswith("Interrupted:")
    assert len(page.charts["loss"]["data"]["values"]) > 3 and "moved" in page.charts
    # Continued, the page is that of the whole run.
    train(tiny.config(tmp_path / "run", eval_every=2, batch_rows=2, epochs=1, resume=True))
    page = Page((tmp_path / "run" / "report.html").read_bytes())
    assert "for 6 steps" in page.one("p", class_="lead").text and not page.every("p", class_="state")


def test_a_run_stopped_by_a_check_says_why(tiny: TinyRun, tmp_path: Path) -> None:
    class Check(Observer):
        def stepped(self, record: Any) -> None:
            if record["step"] == 2:
                raise CheckError("the loss is above what I allow")

    with pytest.raises(CheckError):
        train(tiny.config(tmp_path / "run", save_every=1), callbacks=[Check()])
    page = Page((tmp_path / "run" / "report.html").read_bytes())
    assert page.one("p", class_="state bad").text == "Stopped by an error: the loss is above what I allow."
    assert "2 of 6 steps until a check or an error stopped it" in page.one("p", class_="lead").text


def test_a_run_without_held_out_rows(tiny: TinyRun, tmp_path: Path) -> None:
    train(tiny.config(tmp_path / "run", eval_data=(), max_steps=2))
    page = Page((tmp_path / "run" / "report.html").read_bytes())
    assert "nothing was held out" in page.one("p", class_="lead").text
    assert "Not recorded" in page.one("section", id="answers").text and "forgetting" not in page.charts


def test_a_run_of_an_older_version_without_the_new_files(finished: Path) -> None:
    for name in ("facts.json", "answers.jsonl", "status.json", "summary.json", "proofs.jsonl"):
        (finished / name).unlink()
    page = Page(run_page(read_run(finished)))
    assert [section.attributes["id"] for section in page.every("section")] == list(SECTIONS)
    assert "loss" in page.charts


def test_a_page_that_cannot_be_written_takes_nothing_from_the_run(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Block(Observer):
        def ended(self, summary: Any) -> None:
            (tmp_path / "run" / "report.html").mkdir()

    summary = train(tiny.config(tmp_path / "run", max_steps=1), callbacks=[Block()])
    assert summary.steps == 1
    assert "the report could not be written" in capsys.readouterr().err

    def full(_run: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/report.html")

    monkeypatch.setattr(command, "write_report", full)
    train(tiny.config(tmp_path / "other", max_steps=1))
    said = "the report could not be written: /runs/report.html: No space left on device\n"
    assert said in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run in"):
        read_run(tmp_path)
    (tmp_path / "config.toml").write_text("[[")
    with pytest.raises(UsageError) as refused:
        read_run(tmp_path / "adapter")
    assert str(refused.value.next_step).endswith(f", such as {tmp_path}")
    with pytest.raises(ArtifactError, match=r"config\.toml"):
        read_run(tmp_path)


def test_many_steps_are_thinned_by_averaging(finished: Path) -> None:
    step = lines(finished / "metrics.jsonl")[-2]
    with (finished / "metrics.jsonl").open("w") as file:
        for number in range(1, 5001):
            file.write(json.dumps(step | {"step": number, "loss": float(number)}) + "\n")
    values = Page(run_page(read_run(finished))).charts["loss"]["data"]["values"]
    assert len(values) == 1000 and values[0] == {"step": 5, "value": 3.0, "series": "training rows"}


def test_llama_cpp_is_given_the_file_that_there_is(finished: Path, tmp_path: Path) -> None:
    recorded = read_run(Path(shutil.copytree(finished, tmp_path / "my run")))

    def typed(model: dict[str, str]) -> str:
        run = replace(recorded, facts={"model": model}, config={"model": {"model": "hub/name"}})
        commands = [pre.text for pre in Page(run_page(run)).one("section", id="result").all() if pre.tag == "pre"]
        return next(text for text in commands if "llama-cli" in text)

    assert typed({"file": "/some where/b.gguf"}).endswith("llama-cli -m '/some where/b.gguf' --lora adapter.gguf")
    assert f"--adapter '{recorded.adapter}' --merge --to gguf" in typed({}) and typed({}).endswith("-m merged.gguf")
    of_earlier_versions = {name: value for name, value in recorded.summary.items() if name != "base_architecture"}
    recorded = replace(recorded, summary=of_earlier_versions)
    assert typed({}).endswith("-m merged.gguf")


@pytest.mark.parametrize("labelled", [False, True])
def test_an_adapter_of_labels_is_not_offered_for_a_chat(labelled: bool, finished: Path) -> None:
    labels = {"accuracy": 1.0, "f1_macro": 1.0, "per_label": {}, "confusion": {}, "invented": 0}
    summary = json.loads((finished / "summary.json").read_text())
    summary |= {"adapted_labels": labels if labelled else None, "asking": " --prompt '<text>'"}
    summary["labels"] = ["a", "b"] if labelled else []
    (finished / "summary.json").write_text(json.dumps(summary))
    text = Page(run_page(read_run(finished))).root.text
    assert "backhand generate " in text and ("--labels auto --compare --prompt '<text>'" in text) == labelled
    assert ("backhand chat " in text) != labelled
