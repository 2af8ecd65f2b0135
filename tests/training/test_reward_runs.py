"""Whole runs on rewards: learnt, resumed, shared out, and ended by functions that fail; nothing is lost."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
from torch import Tensor

import backhand
from backhand.data.lint_command import lint_command
from backhand.data.options import DataOptions, LintOptions, LintRunOptions
from backhand.data.rows import Completion, PromptRow
from backhand.errors import CheckError, DataError, UsageError
from backhand.generation import sampling
from backhand.loop.evaluate import evaluate_command
from backhand.loop.observers import Observer
from backhand.objectives.rewards.guards import RewardGuard
from backhand.objectives.rewards.process import RewardInput, RewardProcess
from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions, PlanOptions, PlanRunOptions
from backhand.options.config import TrainConfig
from backhand.options.objectives import ObjectiveOptions
from backhand.options.rewards import RewardOptions
from backhand.report.page import page_values, run_page
from backhand.report.run_record import read_run
from backhand.runs.row_changes import recorded_gain
from backhand.runs.summary import read_summary
from backhand.training import loaded_run
from backhand.training import plan as run_plan
from backhand.training.console import closing_lines
from backhand.training.plan_command import plan
from backhand.training.run import train
from tests.support.ranks import bits_of_several, start_ranks
from tests.support.tiny_run import StopAfter, TinyRun, final_bits, with_options

FUNCTIONS = """
import math, os, time
calls = 0

def evens(prompts, completions, completion_ids, **columns):
    print("said while judging")
    assert len(prompts) == len(columns["completion"])
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

def short(completion_ids):
    return [1.0 if len(ids) < 9 else None for ids in completion_ids]

def level(completions, **_):
    return [1.0] * len(completions)

def level_or_not(completions, completion_ids, **_):
    held_out = len(completions) == 4
    return [1.0 if held_out else float(ids[0] % 7) for ids in completion_ids]

def _third(completions):
    global calls
    calls += 1
    return calls > 2

def raises(completions, completion_ids, **_):
    if _third(completions):
        raise KeyError("boo")
    return [float(ids[0] % 7) for ids in completion_ids]

def hangs(completions, completion_ids, **_):
    while _third(completions):
        time.sleep(0.1)
    return [float(ids[0] % 7) for ids in completion_ids]

def nan(completions, completion_ids, **_):
    third = _third(completions)
    return [math.nan if third else float(ids[0] % 7) for ids in completion_ids]

def misnamed(completion, *, answers, completion_ids):
    return [1.0] * len(completion)

def leaves(completions, completion_ids, **_):
    if _third(completions):
        os._exit(3)
    return [float(ids[0] % 7) for ids in completion_ids]

def few(completions, **_):
    return [1.0]

def none(completions, **_):
    return [None] * len(completions)

def single(completions, **_):
    return 1.0

def forgets(completions, **_):
    [1.0 for _ in completions]

def texts(completions, **_):
    return ["7" for _ in completions]

def lengthy(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]
"""


@pytest.fixture(scope="session")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("functions") / "rewards.py"
    path.write_text(FUNCTIONS)
    return path


def config(tiny: TinyRun, functions: Path, output: Path, function: str = "evens", **options: Any) -> TrainConfig:
    """Two epochs of three steps of four prompts with six answers each."""
    made = tiny.config(output, answers=2, eval_every=3, save_every=1, learning_rate=3e-2, max_length=64)
    rewards = RewardOptions(reward=(f"{functions}:{function}",), group=6, max_new_tokens=10, reward_timeout=9.0)
    return with_options(replace(made, objective=ObjectiveOptions(objective="grpo"), rewards=rewards), **options)


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.fixture(scope="session")
def straight(tiny: TinyRun, functions: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    place = tmp_path_factory.mktemp("straight") / "run"
    made = config(tiny, functions, place, num_iterations=2, beta=0.02, prove_resume=2, epochs=4)
    train(made)
    return made


def test_a_run_learns_what_is_rewarded(straight: TrainConfig) -> None:
    run = straight.run.output
    steps = [line for line in lines(run) if "loss" in line]
    evaluations = [line for line in lines(run) if "eval_loss" in line]
    shown = {"reward", "rewards/evens/mean", "kl", "completion_tokens", "no_gradient_groups", "sampling_gap", "entropy"}
    assert all(step.keys() >= shown for step in steps)
    assert steps[-1]["reward"] > steps[0]["reward"] + 0.2
    assert steps[0]["clip_ratio"] >= 0 and steps[-1]["kl"] > steps[0]["kl"] >= 0
    assert all(0 < step["sampling_gap"] < 1e-4 for step in steps)
    assert evaluations[-1]["eval_reward"] == -evaluations[-1]["eval_loss"] > evaluations[0]["eval_reward"]
    summary = read_summary(run / "summary.json")
    assert summary is not None
    assert (summary.first_reward, summary.last_reward) == (steps[0]["reward"], steps[-1]["reward"])
    assert summary.base_eval_reward == evaluations[0]["eval_reward"]
    assert summary.best_eval_reward == max(line["eval_reward"] for line in evaluations[1:])
    assert summary.reading == f" --reward {straight.rewards.reward[0]} --max-new-tokens 10"
    gain = recorded_gain(evaluations, summary.best_step)
    assert gain is not None and summary.reward_gain == gain
    assert gain[0] == pytest.approx(summary.best_eval_reward - summary.base_eval_reward)
    words = closing_lines(summary)
    assert any(
        line.startswith(f"Reward of its own answers to training rows {summary.first_reward:.4f} →") for line in words
    )
    unmeasured = closing_lines(replace(summary, base_eval_loss=None, best_eval_loss=None))
    assert not any("Training loss" in line for line in unmeasured), "the loss of rewards is always near 0"
    stored = (run / "config.toml").read_text()
    assert 'loss = "dapo"' in stored and 'scale_rewards = "group"' in stored and "epsilon_high = 0.2" in stored
    proofs = {line["proof"]: line for line in lines(run, "proofs.jsonl")}
    gap = proofs["every sampled token has the log-probability that the training pass gives it (nats)"]
    assert gap["passed"] and gap["value"] == max(step["sampling_gap"] for step in steps) and gap["bound"] == 1e-4
    assert any("end in the same bits" in proof and line["passed"] for proof, line in proofs.items())
    held_out = lines(run, "answers.jsonl")
    assert held_out and all(answer["reference"] for answer in held_out)


def test_its_page_shows_rewards_and_answers_over_time(straight: TrainConfig) -> None:
    run = straight.run.output
    evaluations = [line for line in lines(run) if "eval_loss" in line]
    held_out = lines(run, "answers.jsonl")
    assert all(line["answers"].keys() == {answer["source"] for answer in held_out} for line in evaluations)
    values = page_values(read_run(run))
    for shown in values["answers"]:
        assert [step for step, _ in shown["over_time"]] == [line["step"] for line in evaluations]
    assert run_page(read_run(run)).count(b"at every evaluation") == len(held_out) == 2
    assert values["charts"].keys() >= {
        *("reward", "reward-functions", "answer-length", "divergence", "no-gradient", "sampling-gap"),
    }


def test_evaluate_tells_the_rewards_of_base_and_adapter(straight: TrainConfig, functions: Path, capsys: Any) -> None:
    run, data = straight.run, replace(straight.data, data=straight.data.eval_data, eval_data=())
    asked = EvaluateRunOptions(
        adapter=run.output / "adapter", reward=straight.rewards.reward, max_new_tokens=10, json=True
    )
    evaluate_command(EvaluateOptions(straight.model, data, asked))
    reported = json.loads(capsys.readouterr().out)
    measured = [line["eval_reward"] for line in lines(run.output) if "eval_loss" in line]
    assert reported["rows"] == 4 and reported["base"]["reward"] == measured[0]
    assert reported["adapted"]["reward"] == reported["adapted"]["rewards/evens/mean"] == max(measured)
    weighted = replace(asked, reward_weights=(0.5,))
    evaluate_command(EvaluateOptions(straight.model, data, weighted))
    assert json.loads(capsys.readouterr().out)["adapted"]["reward"] == max(measured) / 2
    failing = replace(asked, reward=(f"{functions}:few",), max_new_tokens=1)
    with pytest.raises(CheckError) as raised:
        evaluate_command(EvaluateOptions(straight.model, data, failing))
    assert raised.value.next_step == "correct the function, and evaluate again"


def test_evaluate_reads_the_columns_of_training(straight: TrainConfig, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(straight.data.data[0]).read_text().splitlines()][:4]
    named, prompts = tmp_path / "named.jsonl", tmp_path / "prompts.jsonl"
    asked = [{"asked": row["prompt"], "said": row["completion"]} for row in rows]
    named.write_text("".join(json.dumps(row) + "\n" for row in asked))
    prompts.write_text("".join(json.dumps({"asked": row["asked"]}) + "\n" for row in asked))
    common: dict[str, Any] = {"model": straight.model.model, "dtype": "float32", "threads": 1, "max_new_tokens": 10}
    given = [{"prompt": one["asked"], "answer": one["said"]} for one in asked]
    columns = {"data": (str(named),), "eval_data": (), "eval_fraction": 0.0, "prompt": "asked", "max_steps": 1}
    made = with_options(straight, output=tmp_path / "rewarded", prove_resume=None, **columns)
    train(with_options(made, columns={"answer": "said"}, reward=("length:4",), reward_weights=(0.5,)))
    summary = read_summary(made.run.output / "summary.json")
    assert summary is not None and "--reward length:4 --reward-weights 0.5 --max-new-tokens 10" in str(summary.reading)
    answered = with_options(made, output=tmp_path / "answered", completion="said")
    train(replace(answered, objective=ObjectiveOptions(), rewards=RewardOptions()))
    reads = tmp_path / "reads.py"
    reads.write_text("def sevens(completions, answer, **_):\n    return [float(one == '7') for one in answer]\n")
    for run in ("rewarded", "answered"):
        common["adapter"] = tmp_path / run / "adapter"
        for reward in ("length:4", "exact"):
            expected = backhand.evaluate(data=given, reward=reward, **common)
            assert backhand.evaluate(data=named, reward=reward, **common) == expected
        assert backhand.evaluate(data=prompts, reward="length:4", **common).rows == 4
        # A column `answer` is read before the completions of training, unless `--columns answer=…` named another.
        others = backhand.evaluate(data=[one | {"answer": "7"} for one in asked], reward=f"{reads}:sevens", **common)
        assert others.base["reward"] == (run == "answered")
        with pytest.raises(DataError, match="compares with the right answer"):
            backhand.evaluate(data=prompts, reward="exact", **common)


def test_a_column_of_conversations_in_training_is_no_prompt(straight: TrainConfig, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(straight.data.data[0]).read_text().splitlines()][:4]
    talks = tmp_path / "talks.jsonl"
    roles = (("user", "prompt"), ("assistant", "completion"))
    said = [[{"role": role, "content": row[column]} for role, column in roles] for row in rows]
    both = ({"talk": one, "prompt": row["prompt"]} for one, row in zip(said, rows, strict=True))
    talks.write_text("".join(json.dumps(row) + "\n" for row in both))
    columns = {"data": (str(talks),), "eval_data": (), "eval_fraction": 0.0, "messages": "talk", "max_steps": 1}
    made = with_options(straight, output=tmp_path / "run", prove_resume=None, **columns)
    train(replace(made, objective=ObjectiveOptions(), rewards=RewardOptions()))
    common: dict[str, Any] = {"model": straight.model.model, "dtype": "float32", "threads": 1, "max_new_tokens": 10}
    measured = backhand.evaluate(data=talks, reward="length:4", adapter=tmp_path / "run" / "adapter", **common)
    assert measured.base == backhand.evaluate(data=rows, reward="length:4", **common).base


def test_evaluate_refuses_answers_after_the_context_before_any(straight: TrainConfig) -> None:
    data = replace(straight.data, data=straight.data.eval_data, eval_data=())
    asked = EvaluateRunOptions(reward=straight.rewards.reward, max_new_tokens=10**6)
    with pytest.raises(UsageError, match="the longest prompt and an answer come to"):
        evaluate_command(EvaluateOptions(straight.model, data, asked))


def test_evaluate_asks_for_the_reward_where_rows_have_no_answers(straight: TrainConfig, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the user asks"}\n')
    data = replace(straight.data, data=(str(prompts),), eval_data=())
    asked = EvaluateRunOptions(adapter=straight.run.output / "adapter")
    with pytest.raises(DataError) as raised:
        evaluate_command(EvaluateOptions(straight.model, data, asked))
    assert "--reward FILE.py:FUNCTION" in str(raised.value)


def test_lint_and_plan_know_rows_and_functions_of_rewards(tiny: TinyRun, functions: Path, tmp_path: Path) -> None:
    notes = plan(PlanOptions(**vars(config(tiny, functions, tmp_path / "run")), plan=PlanRunOptions(calibrate=False)))
    assert any("11 prompts with" in note and "supervised" not in note for note in notes.notes)
    (tmp_path / "asked.jsonl").write_text('{"prompt": "what?", "answer": "7"}\n{"text": "no question"}\n')
    rows = DataOptions(data=(str(tmp_path / "asked.jsonl"),))
    with pytest.raises(DataError, match="1 malformed row"):
        lint_command(LintOptions(LintRunOptions(model=str(tiny.model), prompts=True, json=True), rows))
    made = config(tiny, functions, tmp_path / "run", "missing")
    with pytest.raises(UsageError, match="cannot be loaded"):
        plan(PlanOptions(**vars(made)))


def test_the_plan_counts_a_prompts_keys_and_values_once(
    tiny: TinyRun, functions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled_tokens: dict[int, None] = {}
    choose = run_plan.choose

    def watched(size: Any, parts: Any, shapes: Any, **options: Any) -> Any:
        sampled_tokens.update(dict.fromkeys(shape.sampled_tokens for shape in shapes.values()))
        return choose(size, parts, shapes, **options)

    monkeypatch.setattr(run_plan, "choose", watched)
    for group in (6, 12):
        plan(PlanOptions(**vars(config(tiny, functions, tmp_path / "run", group=group))))
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(json.dumps({"prompt": "what? " * 9, "completion": "7"}) + "\n")
    plan(PlanOptions(**vars(config(tiny, functions, tmp_path / "run", eval_data=(str(held_out),)))))
    six, twelve, longer = sampled_tokens
    assert twelve - six == 4 * 6 * 10 < six, "four prompts with six more answers of ten tokens each"
    assert longer > six, "a held-out prompt is longer than those that are trained on"


def test_it_stops_early_by_the_held_out_reward(tiny: TinyRun, functions: Path, tmp_path: Path) -> None:
    train(config(tiny, functions, tmp_path / "run", "level_or_not", eval_every=1, early_stopping=2, epochs=9))
    measured = [line["eval_reward"] for line in lines(tmp_path / "run") if "eval_reward" in line]
    assert len(set(measured)) == 1 and len(measured) == 4  # before, the best one, and two that are no better


def test_a_stopped_run_goes_on_to_the_same_bits(straight: TrainConfig, tmp_path: Path) -> None:
    made = with_options(straight, output=tmp_path / "run", prove_resume=None)
    with pytest.raises(StopAfter.Stopped):
        train(made, callbacks=[StopAfter(4)])
    train(with_options(TrainConfig(), output=tmp_path / "run", resume=True, quiet=True))
    ours, theirs = (final_bits(run) for run in (tmp_path / "run", straight.run.output))
    assert _without_times(ours) == _without_times(theirs)


def test_what_the_guard_has_seen_is_known_to_a_run_that_goes_on(tiny: TinyRun, functions: Path, tmp_path: Path) -> None:
    with pytest.raises(StopAfter.Stopped):
        train(config(tiny, functions, tmp_path / "run", "level", epochs=9), callbacks=[StopAfter(4)])
    with pytest.raises(CheckError, match="nothing can be learnt"):  # the time of functions may change
        train(with_options(TrainConfig(), output=tmp_path / "run", resume=True, quiet=True, reward_timeout=20.0))
    taken = max(line["step"] for line in lines(tmp_path / "run") if "reward" in line)
    assert taken == 9, "the tenth flat step ends it, not the fourteenth"


def test_the_guard_takes_a_line_whose_entropy_was_no_number() -> None:
    guard, line = RewardGuard(lambda text: None), {"no_gradient_groups": 0.0, "reward": 1.0, "clipped_answers": 0.0}
    guard.remember({**line, "entropy": None})
    guard.judge(2, {**line, "entropy": 0.1})


@pytest.mark.parametrize(
    ("rewards", "says"),
    [
        ([1.0] * 10, "gives right and wrong answers different rewards; if it does, give harder rows"),
        ([0.1, 0.09999999999999999, 0.10000000000000002] * 3 + [0.1], "gives right and wrong answers"),  # by rounding
        ([0.0] * 10, "give easier rows"),
        ([-0.5] * 10, "give easier rows"),
        ([0.25, 0.5] * 5, "give easier rows"),  # the same for all answers to a row, but not for all rows
    ],
)
def test_the_advice_about_constant_rewards_depends_on_them(rewards: list[float], says: str) -> None:
    guard = RewardGuard(lambda text: None, ("mine.py:short",))
    line = {"no_gradient_groups": 1.0, "entropy": 0.1, "clipped_answers": 0.0}
    for step, reward in enumerate(rewards[:-1], 1):
        guard.judge(step, {**line, "reward": reward})
    with pytest.raises(CheckError, match="nothing can be learnt") as raised:
        guard.judge(len(rewards), {**line, "reward": rewards[-1]})
    assert says in str(raised.value.next_step) and "check that mine.py:short gives" in str(raised.value.next_step)


def _without_times(bits: dict[str, bytes]) -> dict[str, Any]:
    metrics = [{k: v for k, v in line.items() if k != "sampling_s"} for line in json.loads(bits["metrics"])]
    return {name: data for name, data in bits.items() if name not in ("README.md", "metrics")} | {"metrics": metrics}


@pytest.mark.parametrize("loss", ["grpo", "rloo"])
def test_two_processes_write_the_answers_of_one(loss: str, tiny: TinyRun, functions: Path, tmp_path: Path) -> None:
    options = {"micro_batch_rows": 1, "recompute": "none", "answers": 0, "epochs": 1, "loss": loss, "beta": 0.02}
    made = config(tiny, functions, tmp_path / "one", **options)
    train(made)
    ranks = start_ranks([with_options(made, output=tmp_path / "two")] * 2, tmp_path / "ranks")
    assert ranks.exit_codes() == [0, 0], ranks.said()
    one, two = ([line for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "two"))
    same = ("reward", "completion_tokens", "supervised_tokens", "no_gradient_groups")
    assert [[step[name] for name in same] for step in two] == [[step[name] for name in same] for step in one]
    if loss == "grpo":  # rloo's rewards hold log-probabilities as sampled, and so their last bits
        assert bits_of_several(tmp_path / "two")["state"] == bits_of_several(tmp_path / "one")["state"]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("raises", "raised KeyError: 'boo'"),
        ("hangs", "took more than"),
        ("nan", "gave nan"),
        ("leaves", "ended its process with exit code 3"),
        ("few", "gave 1 reward for 4 answers"),
        ("none", "nothing judges the answer"),
        ("single", r"returned 1\.0, not a list with one number per answer"),
        ("forgets", "returned None, not a list with one number per answer"),
        ("texts", "gave '7', which is no number"),
    ],
)
def test_a_function_that_fails_ends_the_run_and_nothing_is_lost(
    function: str, says: str, tiny: TinyRun, functions: Path, tmp_path: Path
) -> None:
    patience_s = 3.0 if function == "hangs" else 9.0
    with pytest.raises(CheckError, match=says) as raised:
        train(config(tiny, functions, tmp_path / "run", function, eval_every=6, reward_timeout=patience_s))
    assert function in raised.value.what and raised.value.exit_code == 6
    if function == "none":
        assert raised.value.why == "at least one reward function must give each answer a number"
    if function in ("few", "single", "forgets", "texts"):  # before the first step: held-out rows are judged first
        assert (raised.value.where is None) is (function != "texts")
        assert not (tmp_path / "run" / "summary.json").exists()
        return
    assert function == "none" or (raised.value.where or "").startswith((str(tiny.rows), str(tiny.held_out)))
    if function != "none":
        steps = [line["step"] for line in lines(tmp_path / "run") if "loss" in line]
        saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir())
        assert steps == [1] and saved[-1] == "step-1"


def test_the_advice_after_a_failure_before_the_first_step_can_be_followed(
    straight: TrainConfig, tiny: TinyRun, functions: Path, tmp_path: Path
) -> None:
    former, fresh = tmp_path / "former", tmp_path / "fresh"
    shutil.copytree(straight.run.output, former)
    failing = config(tiny, functions, former, "few", overwrite=True)
    for call, option in ((train, "--overwrite"), (backhand.train, "overwrite=True")):
        with pytest.raises(CheckError) as raised:
            call(failing)
        step = f"the former run was put back; correct the function, and train again with {option}"
        assert raised.value.next_step == step
        assert final_bits(former) == final_bits(straight.run.output)
    with pytest.raises(CheckError) as raised:
        train(with_options(failing, output=fresh))
    assert raised.value.next_step == "correct the function, and go on with --resume"
    with pytest.raises(UsageError, match="cannot be continued") as refused:
        train(config(tiny, functions, fresh, resume=True))
    other = f"start the run anew with --overwrite instead of --resume, or give --output {fresh}-2"
    assert refused.value.next_step == f"put them back, or {other}"


def line_of(functions: Path, text: str) -> str:
    """The place of the first line with this text, as the errors name it."""
    lines = functions.read_text().splitlines()
    return f"{functions}:{next(number for number, line in enumerate(lines, 1) if text in line)}"


def test_an_exception_names_the_users_line_and_debug_shows_their_traceback(
    tiny: TinyRun, functions: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckError) as raised:
        train(config(tiny, functions, tmp_path / "run", "raises", eval_every=6))
    place = f"""at {line_of(functions, 'KeyError("boo")')}, in raises: raise KeyError("boo")"""
    assert raised.value.why == place
    shown = "".join(traceback.format_exception(raised.value))
    theirs = shown[: shown.index("KeyError: 'boo'")]
    assert f'File "{functions}", line' in theirs and "in raises" in theirs and 'functions.py", line' not in theirs


@pytest.mark.parametrize("function", ["nan", "few", "hangs"])
def test_any_other_failure_names_the_place_of_the_function(
    function: str, tiny: TinyRun, functions: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckError) as raised:
        train(config(tiny, functions, tmp_path / "run", function, eval_every=6, reward_timeout=3.0))
    place = f"the function is at {line_of(functions, f'def {function}(')}"
    assert str(raised.value.why).endswith(place) and (raised.value.why == place) is (function == "hangs")
    if function == "hangs":
        assert "took more than 3 s for 24 answers, and more than 3 s for one of them: " in raised.value.what
        assert str(raised.value.next_step).startswith("raise --reward-timeout, or make the function faster, and go on")


def test_a_file_that_is_not_python_is_named_with_its_line(tiny: TinyRun, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import math\n\ndef right(completions:\n    return []\n")
    with pytest.raises(UsageError, match="cannot be loaded") as raised:
        rewards_of(f"{file}:right", answers("a"))
    assert f"{file}:3: def right(completions:" in str(raised.value.why)


def test_a_misspelt_function_leaves_nothing_that_blocks_the_corrected_command(
    tiny: TinyRun, functions: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="cannot be loaded") as raised:
        train(config(tiny, functions, tmp_path / "run", "evenz"))
    assert f"{functions} has no function evenz; did you mean evens?" in str(raised.value.why)
    assert raised.value.next_step == "correct its file or its name"
    assert not (tmp_path / "run").exists()
    train(config(tiny, functions, tmp_path / "run", "evens", max_steps=1))


def test_an_error_about_parameters_names_the_right_ones(tiny: TinyRun, functions: Path, tmp_path: Path) -> None:
    made = config(tiny, functions, tmp_path / "run", "misnamed")
    for fails in (lambda: train(made), lambda: plan(PlanOptions(**vars(made)))):
        with pytest.raises(UsageError, match="has a parameter answers, and nothing is given by this name") as raised:
            fails()
        assert raised.value.where == line_of(functions, "def misnamed(")
        assert "given are prompts, completions, completion_ids, completion:" in str(raised.value.why)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("reward", "answer", "says"),
    [
        ("exact", {"chosen": "7"}, "but the row has none"),
        ("exact", {"answer": None}, "but the row has none"),
        ("number", {"answer": "seven"}, "but 'seven' contains no number"),
        ("reasoning_gym:spell_backward", {}, "but the row has none"),
    ],
)
def test_rows_without_the_right_answer_are_refused_before_a_weight_is_read(
    reward: str, answer: dict[str, Any], says: str, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    asked = [{"prompt": "how many?", "answer": "7"}, {"prompt": "how much?", **answer}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    made = tiny.config(tmp_path / "run", data=(str(rows),), eval_data=(), max_length=64)
    rewards = RewardOptions(reward=(reward,), group=2, max_new_tokens=4)
    made = replace(made, objective=ObjectiveOptions(objective="grpo"), rewards=rewards)
    monkeypatch.setattr(loaded_run, "_load_weights", None)
    with pytest.raises(DataError, match=says) as raised:
        train(made)
    assert raised.value.where == f"{rows}:2" and reward in raised.value.what
    assert not (tmp_path / "run").exists()


def test_right_answers_are_read_from_a_named_column(tiny: TinyRun, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "how many?", "chosen": "7"}\n' * 4)
    made = tiny.config(tmp_path / "run", data=(str(rows),), eval_data=(), max_length=64, columns={"answer": "chosen"})
    rewards = RewardOptions(reward=("exact",), group=2, max_new_tokens=4)
    made = replace(made, objective=ObjectiveOptions(objective="grpo"), rewards=rewards)
    assert plan(PlanOptions(**vars(made))).rows == 4


def test_an_answer_is_quoted_without_the_part_of_a_character(functions: Path) -> None:
    with pytest.raises(CheckError, match="of the answer 'half'"):
        rewards_of(f"{functions}:none", answers("half\ufffd"))


def test_rewards_that_never_vary_end_the_run(tiny: TinyRun, functions: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="nothing can be learnt") as raised:
        train(config(tiny, functions, tmp_path / "run", "level", epochs=9))
    assert "harder rows" in str(raised.value.next_step), "every answer was given 1"
    assert {line["no_gradient_groups"] for line in lines(tmp_path / "run") if "loss" in line} == {1.0}


class Noted(Observer):
    """Stores the notes of a run."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def noted(self, text: str) -> None:
        self.said.append(text)


def test_answers_that_run_to_their_limit_are_reported(tiny: TinyRun, functions: Path, tmp_path: Path) -> None:
    """The base has learnt to answer with three words, and is then rewarded for many."""
    reported, first = Noted(), tmp_path / "first"
    train(tiny.config(first, epochs=12, learning_rate=3e-2, save_every=99))
    options = {"max_new_tokens": 20, "temperature": 0.7, "eval_every": 99, "save_every": 99}
    made = config(tiny, functions, tmp_path / "run", "lengthy", from_adapter=str(first / "adapter"), **options)
    train(made, callbacks=[reported])
    (said,) = [text for text in reported.said if "run to their limit" in text]
    assert "length:TOKENS" in said and "--max-new-tokens" in said
    cut_off = [line["clipped_answers"] for line in lines(tmp_path / "run") if "loss" in line]
    assert cut_off[0] < 0.25 and max(cut_off) > 0.5


def test_a_model_that_leaves_its_base_is_reported_and_ends(tiny: TinyRun, functions: Path, tmp_path: Path) -> None:
    reported, options = Noted(), {"beta": 1e-6, "eval_every": 99, "save_every": 99}
    train(config(tiny, functions, tmp_path / "run", learning_rate=0.1, **options), callbacks=[reported])
    (said,) = [text for text in reported.said if "away from its base" in text]
    assert "lower --learning-rate or raise --beta" in said
    options |= {"learning_rate": 1.0, "num_iterations": 8, "epsilon": 0.9, "epsilon_high": 99.0}
    made = config(tiny, functions, tmp_path / "ended", **options)
    with pytest.raises(CheckError, match="nats a token away from its base") as raised:
        train(made)
    assert "higher --beta" in str(raised.value.next_step) and raised.value.exit_code == 6
    assert len([line for line in lines(tmp_path / "ended") if "loss" in line]) < 6


def test_an_entropy_that_collapses_is_reported(tiny: TinyRun, functions: Path, tmp_path: Path) -> None:
    reported, options = Noted(), {"epochs": 3, "eval_every": 99, "save_every": 99}
    train(config(tiny, functions, tmp_path / "run", learning_rate=0.2, **options), callbacks=[reported])
    (said,) = [text for text in reported.said if "entropy of a token has fallen" in text]
    assert "raise --temperature" in said and "--early-stopping" in said


@pytest.mark.parametrize(("tokens", "apart"), [(1, 5.0), (None, 0.3)], ids=["one token", "every token"])
def test_the_certificate_ends_a_bfloat16_run(
    tokens: int | None, apart: float, tiny: TinyRun, functions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where log-probabilities are not those of the training pass: of one token by much, or of all by a little."""
    kept = sampling.draw

    def wrong(logits: Tensor, uniform: Sequence[float], top_p: float) -> sampling.Drawn:
        drawn = kept(logits, uniform, top_p)
        drawn.log_p[:tokens] -= apart * (len(uniform) == 24)  # a step's answers, while all of them go on
        return drawn

    made = config(tiny, functions, tmp_path / "run", dtype="bfloat16")
    train(with_options(made, output=tmp_path / "right"))
    monkeypatch.setattr(sampling, "draw", wrong)
    with pytest.raises(CheckError, match="apart between sampler and training pass") as raised:
        train(made)
    assert raised.value.where == "sampling_gap" and "two models" in str(raised.value.why)
    (proof,) = [line for line in lines(tmp_path / "run", "proofs.jsonl") if "every sampled token" in line["proof"]]
    assert not proof["passed"] and proof["value"] == pytest.approx(apart, abs=0.3)
    assert not [line for line in lines(tmp_path / "run") if "loss" in line]


def answers(*texts: str, **columns: Any) -> list[RewardInput]:
    def asked(number: int) -> PromptRow:
        question = Completion("how many?", None, "", None, f"rows:{number}")
        return PromptRow(question, "how many?", {"answer": "7 of 12", **columns}, f"rows:{number}")

    return [RewardInput(asked(number), text, list(range(len(text)))) for number, text in enumerate(texts)]


def rewards_of(name: str, given: list[RewardInput]) -> list[float]:
    with RewardProcess([name], 5.0) as process:
        return process.rewards(given)[0]


def test_built_in_rewards(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "required": ["a"], "additionalProperties": false, "properties": {"a": {}}}')
    assert rewards_of("exact", answers("7 of 12", " 7 of 12\n", "7 of 1")) == [1, 1, 0]
    assert rewards_of("number", answers("it is 12", "12.0 or 7", "1,2", "none", "12.00")) == [1, 0, 1, 0, 1]
    assert rewards_of("regex:^[0-9]+$", answers("12", "12 ", "x12")) == [1, 0, 0]
    assert rewards_of(f"json:{schema}", answers('{"a": 1}', '{"b": 1}', "{", "[" * 99_999)) == [1, 0, 0, 0]
    assert rewards_of("length:4", answers("1234", "123456", "12345678", "1" * 20)) == [1, 0.5, 0, 0]
    entry = {"metadata": {"source_dataset": "spell_backward"}}
    assert rewards_of("reasoning_gym:spell_backward", answers("7 of 12", "no", **entry)) == [1, 0]


@pytest.mark.parametrize("hangs", ["re.match('(a+)+b', 'a' * 60)", "time.sleep(600)"])
def test_a_function_that_hangs_ends_with_a_run_that_is_killed(hangs: str, tmp_path: Path) -> None:
    """Also where it holds the interpreter's lock."""
    (tmp_path / "hanging.py").write_text(
        "import fcntl, pathlib, re, time\n"
        "def hangs(completions, **_):\n"
        "    global held\n"
        "    held = open(pathlib.Path(__file__).with_name('lock'), 'w')\n"
        "    fcntl.flock(held, fcntl.LOCK_EX)\n"
        "    pathlib.Path(__file__).with_name('started').touch()\n"
        f"    {hangs}\n"
    )
    script = (
        "from backhand.data.rows import PromptRow, Completion\n"
        "from backhand.objectives.rewards.process import RewardProcess, RewardInput\n"
        "asked = PromptRow(Completion('a', None, '', None, 'rows:1'), 'a', {}, 'rows:1')\n"
        f"with RewardProcess([{str(tmp_path / 'hanging.py') + ':hangs'!r}], 600.0) as process:\n"
        "    process.rewards([RewardInput(asked, 'a', [1])])\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.DEVNULL)
    try:
        _wait_until((tmp_path / "started").exists)
    finally:
        run.kill()
        run.wait()
    with (tmp_path / "lock").open() as lock:
        _wait_until(lambda: _is_free(lock))


def _wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_free(lock: IO[str]) -> bool:
    """The system frees what a process held when it ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_what_interrupts_a_run_does_not_reach_the_functions() -> None:
    with RewardProcess(["exact"], 5.0) as process:
        assert process._process is not None and os.getsid(process._process.pid) == process._process.pid


def test_several_functions_with_weights_and_none(functions: Path) -> None:
    with RewardProcess([f"{functions}:short", "length:4"], 5.0) as process:
        found = process.rewards(answers("1234", "1" * 12))
    assert found[0][0] == 1 and found[0][1] != found[0][1] and found[1] == [1, 0]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing", "neither a built-in"),
        ("regex:(", "not a regular expression"),
        ("length:x", "not a number of tokens"),
        ("json:missing.json", "there is no file"),
        ("missing.py:f", "there is no file"),
        ("exact:x", "takes no argument"),
        ("module:not a name", "neither a built-in"),
    ],
)
def test_names_are_checked_before_anything_is_read(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        RewardOptions(reward=(name,)).validate()


def test_the_current_directory_is_no_place_to_import_from(
    functions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(functions.parent)
    with pytest.raises(UsageError, match="cannot be loaded") as raised:
        rewards_of("rewards:evens", answers("a"))
    assert "ModuleNotFoundError" in str(raised.value.why)
    with pytest.raises(UsageError, match="cannot be loaded"):
        rewards_of(f"{functions}:missing", answers("a"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"objective": "sft"}, "has no rewards"),
        ({"reward": ()}, "grpo rewards nothing"),
        ({"dropout": 0.1}, "another model than the one that samples"),
        ({"engine": "transformers"}, "by the backhand engine alone"),
        ({"reward_weights": (1.0, 2.0)}, "2 weights for 1"),
        ({"group": 1}, "group 1 is"),
        ({"beta": -1.0}, "beta"),
        ({"max_new_tokens": 5000}, "and the model takes"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    options: dict[str, Any], says: str, tiny: TinyRun, functions: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        train(config(tiny, functions, tmp_path / "run", **options))


def test_a_held_out_prompt_beyond_the_context_is_refused_before_the_first_step(
    tiny: TinyRun, functions: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a " * 60, "completion": "b"}) + "\n")
    made = config(tiny, functions, tmp_path / "run", max_length=100, max_new_tokens=60)
    train(with_options(made, output=tmp_path / "fits", max_steps=1))
    with pytest.raises(UsageError, match="the longest prompt and an answer come to") as raised:
        train(with_options(made, eval_data=(str(tmp_path / "long.jsonl"),)))
    assert raised.value.where == "max_new_tokens"


def test_rows_without_a_prompt_are_refused(tiny: TinyRun, functions: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "no question"}\n')
    with pytest.raises(DataError, match="do not fit prompts"):
        train(config(tiny, functions, tmp_path / "run", data=(str(tmp_path / "text.jsonl"),)))
