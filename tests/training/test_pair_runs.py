"""Whole runs on pairs and on labelled answers: the reference kept, resumed, shared out; the same bits every way."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as StorageType

from backhand.cli.main import main
from backhand.data.options import DataOptions
from backhand.data.pack import pack
from backhand.errors import CheckError, DataError, UsageError
from backhand.loop.evaluate import evaluate_command
from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions
from backhand.options.config import ModelOptions, TrainConfig
from backhand.options.objectives import ObjectiveOptions
from backhand.report.page import run_page
from backhand.report.run_record import read_run
from backhand.runs.summary import read_summary
from backhand.training.console import closing_lines
from backhand.training.run import train
from backhand.verify.model_gradients import GradientProofs
from backhand.verify.model_setup import load_setup
from backhand.words import interval_text, share_interval
from tests.support.kept_runs import config_of
from tests.support.page import Page
from tests.support.ranks import bits_of_several, start_ranks
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import tiny_model
from tests.support.tiny_run import StopAfter, TinyRun, final_bits, with_options, write_pairs

KEPT = "the reference's log-probabilities, as stored, equal the computed ones"
SHOWN = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")} | {
    "logps/chosen",
    "logps/rejected",
}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("rows")
    return {
        "pairs": write_pairs(place / "pairs.jsonl", 11),
        "pairs_held_out": write_pairs(place / "pairs_held_out.jsonl", 4, seed=1),
        "labels": write_pairs(place / "labels.jsonl", 11, seed=2, labelled=True),
        "labels_held_out": write_pairs(place / "labels_held_out.jsonl", 5, seed=3, labelled=True),
    }


def config(tiny: TinyRun, rows: dict[str, Path], output: Path, objective: str = "dpo", **options: Any) -> TrainConfig:
    """Two epochs of three steps."""
    kind = "labels" if objective == "kto" else "pairs"
    data = {"data": (str(rows[kind]),), "eval_data": (str(rows[f"{kind}_held_out"]),)}
    made = tiny.config(output, **data, answers=2, eval_every=2, save_every=1, micro_batch_rows=2)
    return with_options(replace(made, objective=ObjectiveOptions(objective=objective)), **options)  # type: ignore[arg-type]


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in line]


def proofs(run: Path) -> list[bool]:
    found = [json.loads(line) for line in (run / "proofs.jsonl").read_text().splitlines()]
    return [line["passed"] for line in found if line["proof"] == KEPT]


@pytest.fixture(scope="session")
def straight(tiny: TinyRun, rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    made = config(tiny, rows, tmp_path_factory.mktemp("straight") / "run", prove_resume=3)
    train(made)
    return made


def test_a_run_learns_pairs_and_says_so_under_trls_names(straight: TrainConfig) -> None:
    run = straight.run.output
    steps, evaluations = lines(run, "loss"), lines(run, "eval_loss")
    assert all(step.keys() >= SHOWN for step in steps)
    assert all(line.keys() >= {f"eval_{name}" for name in SHOWN} for line in evaluations)
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # the model is its own reference
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["rewards/margins"] > 0.02 and steps[-1]["loss"] < 0.69
    summary = json.loads((run / "summary.json").read_text())
    assert summary["base_eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert summary["best_eval_loss"] < summary["base_eval_loss"]
    assert 0 <= summary["held_out_pairs"]["rewards/accuracies"] <= 1
    reported = read_summary(run / "summary.json")
    assert reported is not None
    words = "\n".join(closing_lines(reported))
    assert "of 4 held-out pairs are ordered rightly (95 % interval" in words and "log-probability of chosen" in words
    answers = summary["free_answers"]
    assert answers["rows"] == 4 and answers["rejected"] > answers["chosen"] > 0 and answers["adapted"] > 0
    assert "own answers to 4 held-out prompts" in words and f"chosen answers {answers['chosen']:.0f}" in words
    stored = (run / "config.toml").read_text()
    assert 'objective = "dpo"' in stored and "beta = 0.1" in stored and 'loss_type = "sigmoid"' in stored


def test_answers_are_next_to_both_sides(straight: TrainConfig, rows: dict[str, Path]) -> None:
    answers = [json.loads(line) for line in (straight.run.output / "answers.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in rows["pairs_held_out"].read_text().splitlines()]
    assert answers and {(a["reference"], a["rejected"]) for a in answers} <= {
        (row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in held_out
    }


def test_neither_page_nor_console_says_that_pairs_helped(straight: TrainConfig, tmp_path: Path) -> None:
    run = Path(shutil.copytree(straight.run.output, tmp_path / "run"))
    stored = json.loads((run / "summary.json").read_text())
    cut_off: dict[str, object] = {
        "base": 6.0,
        "adapted": 55.0,
        "chosen": 3.0,
        "base_cut_off": 0.0,
        "adapted_cut_off": 1.0,
    }
    cut_off["length_change"] = [49.0, 30.0, 68.0]
    stored["free_answers"] |= cut_off
    (run / "summary.json").write_text(json.dumps(stored))
    result = Page(run_page(read_run(run))).one("section", id="result").text
    assert "helped" not in result and "free answers got worse" in result
    assert (
        "6 → 55 tokens (95 % interval of the change +30 to +68) (0% → 100% of them cut off" in result
        and "are ordered rightly" in result
    )
    summary = read_summary(run / "summary.json")
    assert summary is not None and "they got worse" in "\n".join(closing_lines(summary))


def test_the_page_has_margins_accuracies_and_both_answers(straight: TrainConfig) -> None:
    page = Page(run_page(read_run(straight.run.output)))
    assert {"margins", "accuracies", "rewards"} <= set(page.charts)
    text = page.one("section", id="answers").text
    assert "chosen" in text and "rejected" in text


def test_a_quantized_base_gives_the_bits_of_the_dense_one(tiny: TinyRun, rows: dict[str, Path], tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    model = tiny_model("llama", num_hidden_layers=2, **sizes)
    path = str(write_tiny_gguf(model, tmp_path / "tiny.gguf", storage=lambda _: StorageType.Q8_0))
    for base in ("dense", "quantized"):
        train(config(tiny, rows, tmp_path / base, model=path, base=base, answers=0, epochs=1))
    dense, quantized = (json.loads((tmp_path / base / "reference.json").read_text()) for base in ("dense", "quantized"))
    assert quantized["train"] == dense["train"] and quantized["held_out"] == dense["held_out"]
    assert final_bits(tmp_path / "quantized")["state"] == final_bits(tmp_path / "dense")["state"]


@pytest.mark.parametrize("objective", ["ipo", "orpo", "simpo", "kto"])
def test_every_objective_runs_and_improves(
    objective: str, tiny: TinyRun, rows: dict[str, Path], tmp_path: Path
) -> None:
    whole = {"batch_rows": 11, "epochs": 6, "eval_every": 6, "save_every": 6}
    summary = train(config(tiny, rows, tmp_path / "run", objective, answers=0, **whole))
    assert summary.first_loss is not None and summary.last_loss is not None
    assert summary.last_loss < summary.first_loss
    step = lines(tmp_path / "run", "loss")[-1]
    assert ("kl" in step) == (objective == "kto") and ("nll_loss" in step) == (objective == "orpo")
    assert (tmp_path / "run" / "reference.json").exists() == (objective in ("ipo", "kto"))


def test_undesirable_answers_are_no_right_ones(
    tiny: TinyRun, rows: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config(tiny, rows, tmp_path / "run", "kto", answers=4, epochs=1)
    train(made)
    held_out = [json.loads(line) for line in rows["labels_held_out"].read_text().splitlines()]
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    desirable = {row["completion"][0]["content"] for row in held_out if row["label"]}
    assert answers and {answer["reference"] for answer in answers} <= desirable
    result = Page(run_page(read_run(tmp_path / "run"))).one("section", id="result").text
    assert "held-out loss per answer" in result and "of pairs" not in result
    assert "3 desirable held-out answers have" in result and "2 undesirable ones" in result
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text("".join(json.dumps({**row, "label": int(row["label"])}) + "\n" for row in held_out))
    given = ["--model", str(tiny.model), "--adapter", str(tmp_path / "run" / "adapter"), "--no-completions", "--json"]
    capsys.readouterr()
    for path, undesirable in ((numbers, 2), (rows["pairs"].with_name("good.jsonl"), None)):
        if undesirable is None:
            good = [{name: row[name] for name in ("prompt", "completion")} for row in held_out if row["label"]]
            path.write_text("".join(json.dumps(row) + "\n" for row in good))
        assert main(["evaluate", *given, "--data", str(path)]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert (printed["rows"], printed.get("undesirable")) == (3, undesirable)
    only_bad = tmp_path / "bad.jsonl"
    only_bad.write_text("".join(json.dumps(row) + "\n" for row in held_out if not row["label"]))
    train(with_options(made, output=tmp_path / "bad", eval_data=(str(only_bad),)))
    answers = [json.loads(line) for line in (tmp_path / "bad" / "answers.jsonl").read_text().splitlines()]
    assert answers and {answer["reference"] for answer in answers} == {""}


def test_a_stopped_run_goes_on_with_its_reference(
    straight: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_options(straight, output=tmp_path / "run", prove_resume=None)
    with pytest.raises(StopAfter.Stopped):
        train(made, callbacks=[StopAfter(3)])
    kept = (tmp_path / "run" / "reference.json").read_bytes()
    train(with_options(TrainConfig(), output=tmp_path / "run", resume=True, quiet=True))
    assert (tmp_path / "run" / "reference.json").read_bytes() == kept
    assert proofs(tmp_path / "run") == [True]
    assert _without_settings(final_bits(tmp_path / "run")) == _without_settings(final_bits(straight.run.output))


def _without_settings(bits: dict[str, bytes]) -> dict[str, bytes]:
    """prove_resume is no part of the settings; where the adapter came from is."""
    return {name: data for name, data in bits.items() if name != "README.md"}


@pytest.mark.parametrize("how", ["lost", "damaged", "a list", "of another run", "of an earlier version"])
def test_a_reference_that_is_of_no_use_is_computed_anew(how: str, straight: TrainConfig, tmp_path: Path) -> None:
    from backhand.training.reference import _checksum

    made = with_options(straight, output=tmp_path / "run", prove_resume=None)
    with pytest.raises(StopAfter.Stopped):
        train(made, callbacks=[StopAfter(3)])
    path = tmp_path / "run" / "reference.json"
    fresh = path.read_bytes()
    if how == "lost":
        path.unlink()
    elif how == "damaged":
        path.write_bytes(fresh[: len(fresh) // 2])
    elif how == "a list":
        path.write_text("[]")
    elif how == "of an earlier version":
        stored = json.loads(fresh)
        values = {name: stored[name] for name in stored if name not in ("digest", "sum", "start")}
        path.write_text(json.dumps({"digest": stored["digest"], "sum": _checksum(values), **values}))
    else:
        path.write_text(json.dumps({**json.loads(fresh), "digest": "0" * 64}))
    train(with_options(TrainConfig(), output=tmp_path / "run", resume=True, quiet=True))
    assert path.read_bytes() == fresh  # of the base, not of the adapter that the run goes on from
    assert final_bits(tmp_path / "run")["state"] == final_bits(straight.run.output)["state"]


@pytest.fixture(scope="module")
def stopped(straight: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of pairs that was stopped after step 3."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(StopAfter.Stopped):
        train(with_options(straight, output=run, prove_resume=None), callbacks=[StopAfter(3)])
    return run


def with_reference(stopped: Path, place: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a stopped run whose reference values are changed, with the checksum of what they are then."""
    from backhand.training.reference import _checksum

    path = Path(shutil.copytree(stopped, place)) / "reference.json"
    stored = json.loads(path.read_text())
    digest = stored.pop("digest")
    del stored["sum"]
    change(stored)
    path.write_text(json.dumps({"digest": digest, "sum": _checksum(stored), **stored}))
    return place


@pytest.mark.parametrize("which", ["all", "training rows after the first eight", "the last held-out row"])
def test_a_reference_that_was_changed_with_its_checksum_ends_the_run(which: str, stopped: Path, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        begin = {"all": 0, "training rows after the first eight": 8}.get(which, len(values["train"]))
        values["train"][begin:] = [value - 0.25 for value in values["train"][begin:]]
        if begin == len(values["train"]):
            values["held_out"][-1] -= 0.25

    run = with_reference(stopped, tmp_path / "run", change)
    with pytest.raises(CheckError, match=r"off by 0\.25"):
        train(with_options(TrainConfig(), output=run, resume=True, quiet=True))


MALFORMED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no train": lambda values: values.pop("train"),
    "no held_out": lambda values: values.pop("held_out"),
    "another set": lambda values: values.update(more=[1.0]),
    "null": lambda values: values.update(train=None),
    "strings": lambda values: values.update(train=[str(one) for one in values["train"]]),
    "nulls": lambda values: values.update(held_out=[None] * len(values["held_out"])),
    "too short": lambda values: values["train"].pop(),
    "too long": lambda values: values["held_out"].append(-1.0),
    "NaN": lambda values: values["train"].__setitem__(0, math.nan),
    "a list of lists": lambda values: values.update(train=[[one] for one in values["train"]]),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_reference_with_its_checksum_is_computed_anew(
    change: Callable[[dict[str, Any]], object], stopped: Path, straight: TrainConfig, tmp_path: Path
) -> None:
    run = with_reference(stopped, tmp_path / "run", change)
    train(with_options(TrainConfig(), output=run, resume=True, quiet=True))
    assert (run / "reference.json").read_bytes() == (stopped / "reference.json").read_bytes()
    assert final_bits(run)["state"] == final_bits(straight.run.output)["state"]


def test_answers_first_then_pairs(straight: TrainConfig, tiny: TinyRun, rows: dict[str, Path], tmp_path: Path) -> None:
    """The reference is the adapter that the run starts from, also where it goes on after a stop and has lost it."""
    train(tiny.config(tmp_path / "answers", epochs=1, answers=0))
    start = str(tmp_path / "answers" / "adapter")
    made = config(tiny, rows, tmp_path / "pairs", from_adapter=start, answers=0)
    train(with_options(made, answers=1))
    first = lines(tmp_path / "pairs", "loss")[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    reference = (tmp_path / "pairs" / "reference.json").read_bytes()
    of_base = json.loads((straight.run.output / "reference.json").read_text())["train"]
    assert json.loads(reference)["train"] != pytest.approx(of_base, abs=1e-3)
    with pytest.raises(StopAfter.Stopped):
        train(with_options(made, output=tmp_path / "again"), callbacks=[StopAfter(3)])
    other = Path(shutil.copytree(straight.run.output / "adapter", tmp_path / "other"))
    moved = Path(start).rename(tmp_path / "moved")
    other.rename(start)
    with pytest.raises(CheckError, match="the adapter that the run began from is another one now"):
        train(with_options(TrainConfig(), output=tmp_path / "again", resume=True, quiet=True))
    Path(start).rename(other)
    moved.rename(start)
    (tmp_path / "again" / "reference.json").unlink()
    train(with_options(TrainConfig(), output=tmp_path / "again", resume=True, quiet=True))
    assert (tmp_path / "again" / "reference.json").read_bytes() == reference
    assert final_bits(tmp_path / "again")["state"] == final_bits(tmp_path / "pairs")["state"]


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_a_run_from_an_adapter_measures_the_answers_of_both(
    objective: str, tiny: TinyRun, rows: dict[str, Path], tmp_path: Path
) -> None:
    train(tiny.config(tmp_path / "answers", epochs=40, answers=0, learning_rate=1e-2, eval_every=120))
    start = tmp_path / "answers" / "adapter"
    made = config(tiny, rows, tmp_path / "pairs", objective, from_adapter=str(start), max_steps=1, learning_rate=1e-9)
    first = train(made)
    answers = first.free_answers
    assert answers is not None and answers["start"] == answers["adapted"] != answers["base"]
    assert answers["start_cut_off"] == answers["adapted_cut_off"]
    stored = read_summary(tmp_path / "pairs" / "summary.json")
    assert stored is not None and stored.free_answers == answers
    assert "tokens since the adapter that the run started from" in "\n".join(closing_lines(stored))


@pytest.mark.parametrize("answers", [0, 1])
def test_a_run_that_only_compares_with_an_adapter_goes_on_without_the_adapter_it_started_from(
    answers: int, tiny: TinyRun, rows: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny.config(tmp_path / "answers", epochs=1, answers=0))
    start = str(tmp_path / "answers" / "adapter")
    made = config(tiny, rows, tmp_path / "pairs", "simpo", from_adapter=start, answers=answers)
    with pytest.raises(StopAfter.Stopped):
        train(made, callbacks=[StopAfter(3)])
    shutil.rmtree(tmp_path / "answers")
    summary = train(with_options(TrainConfig(), output=tmp_path / "pairs", resume=True))
    assert "scores and answers are not compared with those of the adapter" in capsys.readouterr().err
    assert not summary.compared_with_start
    assert (summary.free_answers is not None) == bool(answers)
    assert not answers or "start" not in (summary.free_answers or {})


def test_the_advice_for_pairs_of_message_lists_reads_them(tiny: TinyRun, tmp_path: Path) -> None:
    """`--completion chosen` was refused where both sides begin with the prompt."""
    path = tmp_path / "pairs.jsonl"
    pairs = [json.loads(line) for line in write_pairs(path, 20).read_text().splitlines()]
    whole = [{side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")} for pair in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in whole))
    made = tiny.config(tmp_path / "run", data=(str(path),), eval_data=(), eval_fraction=0.2, answers=1, max_steps=1)
    summary = train(replace(made, objective=ObjectiveOptions(objective="dpo")))
    assert summary.try_next is not None and "--objective orpo" in summary.try_next
    assert "--dtype float32 --threads 1 --max-steps 1 --batch-rows 4 --eval-every 6 --answers 1" in summary.try_next
    words = shlex.split(summary.try_next)[1:]
    assert main([*words, "--quiet"]) == 0
    again = read_summary(tmp_path / "run-again" / "summary.json")
    assert again is not None and again.objective == "orpo" and again.held_out_pairs is not None


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_two_processes_end_in_the_bits_of_one(
    objective: str, tiny: TinyRun, rows: dict[str, Path], tmp_path: Path
) -> None:
    made = config(tiny, rows, tmp_path / "one", objective, micro_batch_rows=1, recompute="none", answers=0, epochs=1)
    train(made)
    ranks = start_ranks([with_options(made, output=tmp_path / "two")] * 2, tmp_path / "ranks")
    assert ranks.exit_codes() == [0, 0], ranks.said()
    assert bits_of_several(tmp_path / "two") == bits_of_several(tmp_path / "one")
    assert (tmp_path / "two" / "reference.json").read_bytes() == (tmp_path / "one" / "reference.json").read_bytes()


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_kept_hidden_states_serve_reference_and_steps(
    objective: str, four: TinyRun, rows: dict[str, Path], tmp_path: Path
) -> None:
    kind = "labels" if objective == "kto" else "pairs"
    data = {"data": (str(rows[kind]),), "eval_data": (str(rows[f"{kind}_held_out"]),), "eval_every": 2}
    for where in ("off", "memory", "disk"):
        made = config_of(four, tmp_path / where, cache_frozen=where, **data)
        train(replace(made, objective=ObjectiveOptions(objective=objective)))  # type: ignore[arg-type]
    for where in ("memory", "disk"):
        assert final_bits(tmp_path / where) == final_bits(tmp_path / "off")
        assert (tmp_path / where / "reference.json").read_bytes() == (tmp_path / "off" / "reference.json").read_bytes()


def test_transformers_trains_pairs_to_the_same_losses(
    straight: TrainConfig, tiny: TinyRun, rows: dict[str, Path], tmp_path: Path
) -> None:
    train(config(tiny, rows, tmp_path / "run", engine="transformers", answers=0))
    ours, theirs = lines(straight.run.output, "loss"), lines(tmp_path / "run", "loss")
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], rel=1e-3)
    assert theirs[-1]["rewards/margins"] == pytest.approx(ours[-1]["rewards/margins"], rel=1e-2)


def test_rows_of_another_kind_are_refused(tiny: TinyRun, rows: dict[str, Path], tmp_path: Path) -> None:
    pairs, labels = str(rows["pairs"]), str(rows["labels"])
    with pytest.raises(DataError, match="preference pairs") as raised:
        train(tiny.config(tmp_path / "run", data=(pairs,), eval_data=()))
    assert "--objective dpo" in str(raised.value.next_step)
    for objective, data in (("dpo", labels), ("kto", pairs)):
        made = config(tiny, rows, tmp_path / "run", objective, data=(data,), eval_data=())
        with pytest.raises(DataError, match="these columns do not fit"):
            train(made)
    with pytest.raises(UsageError, match="compares answers"):
        train(config(tiny, rows, tmp_path / "run", train_on="all"))


def test_resuming_with_another_objective_is_refused(straight: TrainConfig, tmp_path: Path) -> None:
    run = Path(shutil.copytree(straight.run.output, tmp_path / "run"))
    given = with_options(TrainConfig(), output=run, resume=True, quiet=True, beta=0.5, objective="dpo")
    with pytest.raises(UsageError, match="beta"):
        train(given)


def test_evaluate_tells_rewards_against_the_base(
    straight: TrainConfig, rows: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = EvaluateOptions(
        model=ModelOptions(model=straight.model.model, dtype="float32", threads=1),
        data=DataOptions(data=(str(rows["pairs_held_out"]),)),
        run=EvaluateRunOptions(adapter=straight.run.output / "adapter", completions=False, json=True),
    )
    evaluate_command(options)
    found = json.loads(capsys.readouterr().out)
    last = lines(straight.run.output, "eval_loss")[-1]
    assert found["rows"] == 4 and found["base"]["pairs"].keys() == {"logps/chosen", "logps/rejected"}
    for name in SHOWN:
        assert found["adapted"]["pairs"][name] == pytest.approx(last[f"eval_{name}"], rel=1e-3, abs=1e-4), name
    reference = json.loads((straight.run.output / "reference.json").read_text())["held_out"]
    assert found["base"]["pairs"]["logps/chosen"] == pytest.approx(sum(reference[::2]) / 4, rel=1e-4)
    after, low_high = found["adapted"]["pairs"], found["adapted"]["pairs_interval"]
    assert low_high == list(share_interval(after["rewards/accuracies"], 4)) and "pairs_interval" not in found["base"]
    evaluate_command(replace(options, run=replace(options.run, json=False)))
    printed = capsys.readouterr().out
    change = after["logps/chosen"] - found["base"]["pairs"]["logps/chosen"]
    words = f"The log-probability of chosen answers {'rose' if change > 0 else 'fell'} by {abs(change):.3g} nats per"
    right = round(4 * after["rewards/accuracies"])
    assert f"{right} of 4 held-out pairs are ordered rightly ({interval_text(right / 4, 4)}; half of" in printed
    assert words in printed and "rewards/chosen" not in printed
    evaluate_command(replace(options, run=replace(options.run, json=False, adapter=None)))
    assert f"of chosen answers is {found['base']['pairs']['logps/chosen']:.3f} nats" in capsys.readouterr().out


def test_verify_proves_the_loss_of_pairs(tiny: TinyRun, rows: dict[str, Path]) -> None:
    setup = load_setup(
        ModelOptions(model=str(tiny.model), dtype="float32"), DataOptions(data=(str(rows["pairs"]),)), None, 128
    )
    assert len(setup.examples) == 2 * len(setup.rows) > 0
    batch = pack(setup.examples)
    proofs = [*GradientProofs(setup.decoder, batch, setup.dropout_seed, setup.rows).by_block()]
    assert proofs[0].case == "loss of pairs (DPO) = reference, float64"
    assert all(proof.passed for proof in proofs)
    # A pair the wrong way round has another loss.
    wrong = GradientProofs(setup.decoder, batch, setup.dropout_seed, setup.rows)
    assert wrong.step.row_loss is not None
    wrong.step.row_loss = replace(wrong.step.row_loss, owners=wrong.step.row_loss.owners ^ 1)
    assert not next(iter(wrong.by_block())).passed


ALIKE = [{"prompt": f"the user asks {number}", "chosen": "a list", "rejected": "a list"} for number in range(8)]
BOTH_WAYS = [
    {"prompt": f"the user asks {number // 2}", "completion": "a list", "label": bool(number % 2)} for number in range(8)
]
LONG = "a list of names " * 40
CUT = [{"prompt": "the user", "chosen": f"{LONG} {number}", "rejected": LONG} for number in range(8)]


@pytest.mark.parametrize(
    ("objective", "given", "says", "why"),
    [
        ("dpo", ALIKE, "both answers are the same in every pair", "no gradient"),
        ("ipo", ALIKE, "both answers are the same in every pair", "no gradient"),
        ("simpo", ALIKE, "both answers are the same in every pair", "no gradient"),
        ("orpo", ALIKE, "both answers are the same in every pair", "no gradient"),
        ("kto", BOTH_WAYS, "labelled true as often as false", "take back"),
        ("dpo", CUT, "both answers are the same in every pair", "cut to --max-length"),
    ],
)
def test_rows_that_compare_nothing_are_refused_before_training(
    objective: Any, given: list[Any], says: str, why: str, tiny: TinyRun, tmp_path: Path
) -> None:
    """Before, a guard said after three steps: raise --learning-rate, or leave these modules out."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    made = tiny.config(tmp_path / "run", data=(str(tmp_path / "rows.jsonl"),), eval_data=(), max_length=64)
    with pytest.raises(DataError, match=says) as raised:
        train(replace(made, objective=ObjectiveOptions(objective=objective)))
    assert why in str(raised.value.why) and raised.value.exit_code == 3 and not (tmp_path / "run").exists()


def test_one_pair_of_different_answers_is_enough(tiny: TinyRun, tmp_path: Path) -> None:
    rows = [*ALIKE, {**ALIKE[0], "rejected": "one number"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = tiny.config(tmp_path / "run", data=(str(tmp_path / "rows.jsonl"),), eval_data=(), eval_fraction=0.0)
    train(replace(made, objective=ObjectiveOptions(objective="dpo")))
