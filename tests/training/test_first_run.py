"""What a run does for a user who gives no options: the rate, the held-out rows, and what to do next."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import backhand
from backhand.adapters.base_facts import BaseFacts
from backhand.cli.main import main
from backhand.data.data_report import DataReport
from backhand.data.options import DataOptions, shell_quoted
from backhand.errors import UsageError
from backhand.loop.observers import Observer, RunStart
from backhand.loop.step_plan import COMPARING_RATE, HIGHEST_RATE, RATE, chosen_rate, rate_note
from backhand.nn.loading import open_model
from backhand.nn.lora_parameters import AdapterLayout, LoRASlot
from backhand.options.config import OptimizationOptions, TrainConfig
from backhand.options.config_file import config_from_table, load_config
from backhand.options.objectives import ObjectiveOptions
from backhand.options.rewards import RewardOptions
from backhand.report.headline import headline
from backhand.report.run_record import read_run
from backhand.runs.interruption import Interrupted
from backhand.runs.row_changes import recorded_rise, training_reward_words
from backhand.training.advice import advice, too_few_rows
from backhand.training.console import closing_lines
from backhand.training.curves import Curves, Until, first_finding, rates_until
from backhand.training.run import train
from backhand.training.run_inputs import scaled_matrices, weight_scale
from tests.support.tiny_run import TinyRun, with_options, write_pairs, write_rows


class Heard(Observer):
    def started(self, start: RunStart) -> None:
        self.facts = start.facts


@pytest.mark.parametrize("kind", ["answers", "text", "pairs"])
def test_a_tenth_of_fifty_rows_is_held_out(tiny: TinyRun, tmp_path: Path, kind: str) -> None:
    rows = tmp_path / "rows.jsonl"
    write_pairs(rows, 50) if kind == "pairs" else write_rows(rows, 50, seed=2, words=(8, 12))
    if kind == "text":
        texts = [json.loads(line)["prompt"] for line in rows.read_text().splitlines()]
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"data": (str(rows),), "eval_data": (), "objective": "dpo" if kind == "pairs" else "sft", "max_steps": 2}
    heard = Heard()
    summary = train(tiny.config(tmp_path / "run", **options), callbacks=[heard])
    assert (summary.rows, summary.held_out_rows) == (45, 5) and summary.best_eval_loss is not None
    (held_out,) = (line for line in heard.facts if line.startswith("held out: "))
    assert "5 of these 50 rows" in held_out
    assert any("--eval-fraction 0" in line for line in heard.facts)
    assert load_config(tmp_path / "run" / "config.toml").data.eval_fraction == 0.1
    assert train(tiny.config(tmp_path / "all", **options, eval_fraction=0.0)).held_out_rows == 0


def test_the_next_command_continues_texts_as_they_were_trained_on(tiny: TinyRun, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the user asks for a name"}\n' * 4)
    options: dict[str, Any] = {"data": (str(rows),), "eval_data": (), "max_steps": 1}
    (following,) = (line for line in closing_lines(train(tiny.config(tmp_path / "run", **options))) if "Next: " in line)
    assert following.endswith(" --prompt '…' --chat-template none")
    rows.write_text('{"text": "<|im_start|>user\\nfor a name<|im_end|>"}\n' * 4)
    (rendered,) = (line for line in closing_lines(train(tiny.config(tmp_path / "c", **options))) if "Next: " in line)
    assert rendered.endswith(" --prompt '…'")
    write_rows(rows, 4, seed=2, words=(8, 12))
    (asking,) = (line for line in closing_lines(train(tiny.config(tmp_path / "two", **options))) if "Next: " in line)
    assert asking.endswith(" --prompt '…'")
    joined = {"prompt": r"Q: {prompt}\nA:", "completion": "completion", "chat_template": "none"}
    template = train(tiny.config(tmp_path / "three", **options, **joined)).asking
    assert template == f" --prompt {shell_quoted('Q: <prompt>' + chr(10) + 'A:')} --chat-template none"


def test_an_adapter_of_bare_texts_is_evaluated_talked_to_and_exported_without_a_template(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, rows = tmp_path / "texts.jsonl", write_rows(tmp_path / "rows.jsonl", 3, seed=2, words=(8, 12))
    texts.write_text('{"text": "the user asks for a name"}\n' * 4)
    train(tiny.config(tmp_path / "run", data=(str(texts),), eval_data=(), max_steps=1))
    adapter, model = tmp_path / "run" / "adapter", str(tiny.model)

    def loss(**template: str) -> float:
        scores = backhand.evaluate(adapter=adapter, model=model, data=rows, **template).adapted
        assert scores is not None
        return scores.loss

    assert loss() == loss(chat_template="none") != loss(chat_template="default")
    chat = ["chat", "--adapter", str(adapter)]
    capsys.readouterr()
    for named in ([], ["--model", model]):
        assert main([*chat, *named]) == 2
        said = capsys.readouterr().err
        command = " ".join(["backhand generate", *named, *chat[1:], "--prompt"])
        assert "completes texts" in said and f"next: {command}" in said
    monkeypatch.setattr("sys.stdin", io.StringIO("name"))
    assert main([*chat, "--chat-template", "default", "--max-new-tokens", "1"]) == 0
    capsys.readouterr()
    for to, use in (("gguf", "llama-completion -no-cnv -m BASE.gguf --lora"), ("ollama", "ollama run mine '…'")):
        backhand.export(adapter, model=model, to=to, output=tmp_path / to)
        assert use in capsys.readouterr().out
    lines = (tmp_path / "ollama" / "Modelfile").read_text().splitlines()
    assert lines[1:] == ["ADAPTER ./adapter.gguf", 'TEMPLATE """{{ .Prompt }}"""']


@pytest.mark.parametrize("objective", ["grpo", "dpo", "sdft", "bake"])
def test_training_without_a_template_is_recorded_for_all_objectives(
    objective: str, tiny: TinyRun, tmp_path: Path
) -> None:
    answers = {"chosen": "a name", "rejected": "the user"} if objective == "dpo" else {"completion": "a name"}
    rows, rewards = tmp_path / "rows.jsonl", tmp_path / "rewards.py"
    rows.write_text(json.dumps({"prompt": "the user asks for ", **answers}) + "\n")
    rewards.write_text("def size(completions, **_):\n    return [float(len(one)) for one in completions]\n")
    options: dict[str, Any] = {"context": "be brief"} if objective == "bake" else {}
    made = tiny.config(tmp_path / "run", data=(str(rows),), eval_data=(), objective=objective, max_steps=1, **options)
    sampled = RewardOptions() if objective == "dpo" else RewardOptions(max_new_tokens=4)
    if objective == "grpo":
        sampled = replace(sampled, reward=(f"{rewards}:size",), group=2)
    for template, bare in (("none", True), (None, False)):
        output = tmp_path / str(template)
        train(replace(with_options(made, chat_template=template, output=output), rewards=sampled))
        assert json.loads((output / "adapter" / "backhand.json").read_text()).get("bare", False) is bare


def test_few_rows_are_all_trained_on_and_many_lose_no_more_than_500(tiny: TinyRun, tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", 49, seed=2, words=(8, 12))
    summary = train(tiny.config(tmp_path / "run", data=(str(few),), eval_data=(), max_steps=1))
    assert (summary.rows, summary.held_out_rows) == (49, 0)
    assert load_config(tmp_path / "run" / "config.toml").data.eval_fraction == 0.0
    many = write_rows(tmp_path / "many.jsonl", 6000, seed=3, words=(8, 12))
    made = tiny.config(tmp_path / "many", data=(str(many),), eval_data=(), max_steps=1, batch_rows=1)
    summary = train(made)
    assert summary.held_out_rows == pytest.approx(500, abs=5) and summary.rows > 5000


def test_early_stopping_without_held_out_rows_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs held-out rows"):
        train(tiny.config(tmp_path / "run", eval_data=(), early_stopping=2))
    assert not (tmp_path / "run" / "config.toml").exists()


def test_the_chosen_rate_is_said_stored_and_kept_by_a_resumed_run(tiny: TinyRun, tmp_path: Path) -> None:
    made = {"learning_rate": "auto", "epochs": 2}
    heard = Heard()
    train(tiny.config(tmp_path / "whole", **made), callbacks=[heard])
    rate = load_config(tmp_path / "whole" / "config.toml").optimization.learning_rate
    assert isinstance(rate, float)
    assert any(
        said.startswith(f"note: learning rate: {rate:g}, chosen by the size of the frozen weights; ")
        for said in heard.facts
    )
    with pytest.raises(Interrupted):
        train(tiny.config(tmp_path / "parts", **made), pause_at=3)
    train(tiny.config(tmp_path / "parts", **made, resume=True))
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert adapters[0] == adapters[1]


def test_a_number_stays_and_other_words_are_refused() -> None:
    assert chosen_rate(OptimizationOptions(learning_rate=3e-5), ObjectiveOptions(), 1, lambda: 1.0) == (3e-5, None)
    assert config_from_table({"optimization": {"learning_rate": "auto"}}, "x").optimization.learning_rate == "auto"
    for value in ("fast", True, 0.0):
        with pytest.raises(UsageError, match="learning_rate"):
            OptimizationOptions(learning_rate=value).validate()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rate", "objective", "said"),
    [
        (0.8, "sft", "far above the usual ones of sft, so that training probably diverges"),
        (1e-9, "dpo", "far below the usual ones of dpo, so that the adapter hardly changes"),
        (HIGHEST_RATE, "sft", None),
        (1e-5, "embed", None),
        ("auto", "sft", None),
    ],
)
def test_a_rate_far_from_the_usual_ones_is_a_warning(rate: float | str, objective: str, said: str | None) -> None:
    note = rate_note(rate, ObjectiveOptions(objective))
    assert note is None if said is None else note is not None and note.startswith("warning: ") and said in note


def test_the_rate_follows_the_weights() -> None:
    def rate(gain: float, objective: str = "sft", steps: int = 1) -> float:
        return chosen_rate(OptimizationOptions(), ObjectiveOptions(objective), steps, lambda: gain)[0]

    assert rate(1.0) == RATE and rate(6.25) == 2.5 * RATE
    assert rate(100.0) == HIGHEST_RATE
    assert rate(100.0, "dpo") == COMPARING_RATE
    assert rate(6.25, "bake") == rate(6.25, "sdft") == 2.5 * RATE, "2e-4 left them far from their teachers"
    of_decide = [rate(6.25, "decide", steps) for steps in (1, 100, 130, 200, 1000)]
    assert of_decide == [2.6e-3, 2.6e-3, 2e-3, 1.3e-3, 1.3e-3], "labels must be learned in few steps"


def test_the_weight_scale_is_that_of_the_adapted_matrices_in_the_file() -> None:
    source = open_model("smollm2-135m")
    slots = [LoRASlot(f"model.layers.{layer}.self_attn.q_proj", 576, 576, 4, 2.0) for layer in (3, 4)]
    products = [source.load(f"{slot.name}.weight") @ torch.randn(576, 4000) for slot in slots]
    expected = [float(product.square().mean().sqrt()) for product in products]
    scale = weight_scale(scaled_matrices(source, AdapterLayout(tuple(slots))), BaseFacts(source))
    assert scale == pytest.approx(math.sqrt(expected[0] * expected[1]), rel=0.03)
    unnamed = AdapterLayout((replace(slots[0], name="none"),))
    assert weight_scale(scaled_matrices(source, unnamed), BaseFacts(source)) == 1.0


def even(steps: int) -> Until:
    return rates_until(OptimizationOptions(schedule="linear", warmup_steps=0), steps)


CLEARLY_WORSE = {"step": 60, "eval_loss": 0.9, "row_scores": [0.0] * 36}
FALLING = [2.0, 1.0, 0.6, 0.5, 0.48, 0.475]
SPIKED = [2.0, 1.9, 1.5, 1.0, 0.9, 0.8, 3.0, 0.7, 0.6, 0.5]  # a hard batch, if the held-out loss does not rise as well


@pytest.mark.parametrize(
    ("finding", "losses", "more"),
    [
        ("fine", FALLING, {}),
        ("still falling", [2.0, 1.8, 1.6, 1.4, 1.2, 1.0], {}),
        ("hardly moved", [2.0, 1.999, 1.998, 1.997, 1.996, 1.995], {}),
        ("rose", [2.0, 1.0, 0.6, 0.7, 0.8, 0.85], {}),
        ("hardly moved", [2.0, 2.001, 2.002, 2.001, 2.002, 2.003], {}),
        ("not better", [2.0, 3.0, 2.9, 2.8, 2.6, 2.4], {}),
        ("not better", [2.0, 1.99, 2.1, 2.2, 2.3, 2.4], {}),
        ("unsteady", [2.0, 1.0, 0.6, 0.8, 0.5, 0.475], {"training": SPIKED}),
        ("fine", FALLING, {"training": SPIKED}),
        ("rose", [2.0, 1.0, 0.6, 0.7, 0.8, 0.85], {"training": SPIKED}),
        ("hardly moved", [2.0, 1.999, 1.998, 1.997, 1.996, 1.995], {"training": SPIKED}),
        ("forgot", FALLING, {"forgotten_nats": 2.5}),
        ("late", [1.75, 1.74, 1.74, 1.72, 0.90, 0.889], {}),
        ("fine", [3.0, 2.9, None, None, 1.01, 1.0], {}),  # nothing tells in which half it fell
        ("late", [0.529, 0.528, 0.527, 0.48, 0.56, 0.488], {}),  # it ended above an earlier loss
        (None, [2.0, 1.0], {}),
    ],
)
def test_what_the_curves_say(finding: str | None, losses: Sequence[float | None], more: dict[str, Any]) -> None:
    held_out = [(10 * number, loss) for number, loss in enumerate(losses) if loss is not None]
    curves = Curves(held_out, **{"training": [], **more})
    assert first_finding(curves, even(50)) == finding


def test_a_low_rate_without_another_finding_is_reported() -> None:
    curves = Curves([(10 * number, loss) for number, loss in enumerate(FALLING)], [])
    assert [first_finding(curves, even(50), share) for share in (0.33, 0.34, 3.0)] == ["low", "fine", "fine"]
    rose = Curves([(10 * number, loss) for number, loss in enumerate([0.7, 0.69, 0.65, 0.64, 0.65, 0.67])], [])
    assert [first_finding(rose, even(50), share) for share in (0.33, 0.34)] == ["low", "rose"]


def test_a_step_or_two_at_the_end_do_not_hide_that_the_loss_was_falling() -> None:
    losses = [11.64, 8.0, 5.5, 3.7, 3.15, 3.11]
    assert first_finding(Curves(list(zip((0, 4, 8, 12, 16, 17), losses, strict=True)), []), even(17)) == "still falling"


def test_a_loss_that_has_come_to_rest_is_not_falling() -> None:
    losses = [3.002, 2.1, 1.9, 1.77, 1.702, 1.699]
    assert first_finding(Curves(list(zip((0, 8, 16, 24, 32, 36), losses, strict=True)), []), even(36)) == "fine"


@pytest.mark.parametrize(
    ("losses", "steps"),
    [([2.19, 1.42, 0.855, 0.640, 0.602], 12), ([2.19, 0.9, 0.4, 0.25, 0.1716, 0.1266], 40)],
)
def test_a_loss_of_which_little_is_left_is_falling_if_much_of_that_goes(losses: Sequence[float], steps: int) -> None:
    curves = Curves([(steps * place // (len(losses) - 1), loss) for place, loss in enumerate(losses)], [])
    assert first_finding(curves, even(steps)) == "still falling"


def test_what_rose_is_tried_with_as_much_learning_as_it_was_best_with(tmp_path: Path) -> None:
    def tried(losses: Sequence[float], steps: int, run: str = "one", **options: Any) -> str | None:
        plan = {"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 0, **options}
        config = with_options(TrainConfig(), epochs=3, **plan)
        held_out = [(steps * place // (len(losses) - 1), loss) for place, loss in enumerate(losses)]
        found = advice(config, Curves(held_out, []), steps, 1e-3, tmp_path / run)
        assert found is not None and "rose after" in found[0]
        return found[1] and found[1].split(" ", 3)[3]

    rose = [2.0, 1.0, 0.6, 0.7, 0.8, 0.9]
    assert tried(rose, 100) == f"--max-steps 64 --eval-every 13 --output {tmp_path / 'one-again'}"
    assert (
        tried(rose, 100, schedule="constant", run="one-again")
        == f"--max-steps 40 --eval-every 8 --output {tmp_path / 'one-again-2'}"
    )
    assert tried(rose, 100, learning_rate=2e-3, run="one-again-2") == (
        f"--learning-rate 0.001 --output {tmp_path / 'one-again-3'}"
    )
    assert tried([2.0, 1.5, 1.0, 0.8, 0.6, 0.63], 100) is None
    assert "--max-steps 91 --eval-every" in str(tried(rose, 200, warmup_steps=90))
    others = {
        "play-against-x": "play-against-x-again",
        "r-again-again": "r-again-again-2",
        "a-again-2b": "a-again-2b-again",
    }
    for name, again in others.items():
        assert str(tried(rose, 100, run=name)).endswith(f" --output {tmp_path / again}")
    assert "-again" in str(tried(rose, 100, run="two\nlines"))


def test_a_loss_that_is_not_finite_is_no_evaluation() -> None:
    records = [{"step": step, "eval_loss": loss} for step, loss in enumerate([2.0, 1.0, math.nan, 0.9])]
    assert Curves.of(records).held_out == [(0, 2.0), (1, 1.0), (3, 0.9)]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((0.686, 0.623, 0.55, 0.502, 0.489, 0.487), "above constant"),
        ((0.686, 0.623, 0.55, 0.487, 0.6, 0.72), "not better"),
        ((0.686, 0.623, 0.55, 0.4, 0.35, 0.3), "still falling"),
    ],
)
def test_a_head_that_is_not_better_than_a_constant_answer_needs_steps_if_its_loss_fell(
    losses: Sequence[float], expected: str
) -> None:
    records = [{"step": 10 * number, "eval_loss": loss} for number, loss in enumerate(losses)]
    assert first_finding(Curves.of(records, constant_loss=0.472), even(50)) == expected


def test_the_advice_is_in_summary_and_report_and_can_be_pasted(tiny: TinyRun, tmp_path: Path) -> None:
    output = tmp_path / "a run"
    summary = train(tiny.config(output, learning_rate=1e-7, overwrite=True, eval_every=3))
    assert not load_config(output / "config.toml").run.overwrite
    assert summary.advice is not None and "changed by less than 2%" in summary.advice and summary.try_next is not None
    assert summary.try_next.startswith(f"backhand train '{output}/config.toml' --learning-rate ")
    assert json.loads((output / "summary.json").read_text())["try_next"] == summary.try_next
    assert "a token of the right answer has a probability" in headline(read_run(output))


def test_the_next_run_on_rows_of_a_program_is_a_call(tmp_path: Path) -> None:
    """The command line cannot have the rows."""
    config = TrainConfig(
        data=DataOptions(data=[{"prompt": "a", "completion": "b"}]),
        optimization=OptimizationOptions(learning_rate=1e-3, max_steps=50, warmup_steps=2),
    )
    held_out = [(step, 3.0 - 0.04 * step) for step in range(0, 51, 10)]
    found = advice(config, Curves(held_out, []), 50, 1e-3, tmp_path / "run")
    assert found is not None and found[1] is not None
    assert found[1].startswith(f"backhand.train(data=…, max_steps=100, output='{tmp_path}/run-again')")


def test_few_held_out_rows_and_rows_not_seen_change_the_advice(tmp_path: Path) -> None:
    def said(losses: Sequence[float], objective: str = "sft", **counts: Any) -> tuple[str, str | None] | None:
        config = with_options(
            TrainConfig(objective=ObjectiveOptions(objective=objective)), epochs=3, learning_rate=1e-3
        )
        held_out = [(10 * number, loss) for number, loss in enumerate(losses)]
        return advice(config, Curves(held_out, []), 50, 1e-3, tmp_path, **counts)

    few = said([2.0, 1.0, 0.6, 0.7, 0.8, 0.85], few_rows=5)
    assert few is not None and few[0].startswith("Only 5 rows are held out, too few") and few[1] is None
    assert few[0].endswith(": more rows are needed, for example as --eval-data FILE."), "0.3 of few rows are few"
    config = with_options(TrainConfig(), epochs=3, learning_rate=1e-3)
    brief = advice(config, Curves([(0, 6.0), (3, 4.0), (6, 3.0)], []), 6, 1e-3, tmp_path, few_rows=6)
    assert (
        brief is not None and "still falling at the end of only 6 steps" in brief[0] and "--epochs 6" in str(brief[1])
    )
    right = [[1.0] * 24 + [0.0] * 12, [1.0] * 22 + [0.0] * 14]
    records = [{"step": step, "eval_loss": 0.7, "row_scores": one} for step, one in zip((20, 50), right, strict=True)]
    rows = {"rise": recorded_rise(records, 20), "held_out_rows": 36, "all_rows": 360}
    unclear = said([2.0, 1.0, 0.6, 0.6, 0.61, 0.63], **rows)
    assert unclear is not None and unclear[0] == (
        "36 held-out rows are too few to tell whether it got worse after step 20, whose adapter is kept: "
        "--eval-fraction 0.3 or --eval-data FILE holds out more."
    )
    clear = said([2.0, 1.0, 0.6, 0.6, 0.61, 0.63], **rows | {"rise": recorded_rise([*records, CLEARLY_WORSE], 20)})
    assert clear is not None and clear[0].endswith("whose adapter is kept: fewer steps would do.")
    cut = said(
        [2.0, 1.0, 0.6, 0.7, 0.8, 0.85], few_rows=5, too_long="9 of 14 rows are longer than --max-length and left out"
    )
    assert cut is not None and cut[0].endswith(
        ": 9 of 14 rows are longer than --max-length and left out, and a larger one keeps more."
    )
    many = said([2.0, 1.0, 0.6, 0.7, 0.8, 0.85], few_rows=5, all_rows=60)
    assert many is not None and "--eval-fraction 0.3" in many[0]
    still, worse = [2.0, 1.999, 1.998, 1.997, 1.996, 1.995], [2.0, 1.99, 2.1, 2.2, 2.3, 2.4]
    for losses in (still, worse):
        for rows, chance in ((0, False), (5, True)):
            found = said(losses, few_rows=rows)
            assert found is not None and (found[1] is None and "held out, too few" in found[0]) is chance
    diverged = said([2.0, 2.9, 3.5, 4.0, 4.0, 4.0], few_rows=5)
    assert diverged is not None and "--learning-rate" in str(diverged[1]), "six rows do not fail so by chance"
    assert too_few_rows(DataReport(rows=5, documents=25, supervised_tokens=25)) == 5
    assert too_few_rows(DataReport(rows=5, documents=5, supervised_tokens=9000)) == 0
    unseen = said(FALLING, unseen_rows=116)
    assert unseen is not None and unseen[0].startswith("116 rows were not trained on yet")
    assert unseen[1] is not None and "--epochs 6" in unseen[1]
    fine = said([*FALLING[:-1], 0.481], unseen_rows=116)
    assert fine is not None and fine[0].startswith("Nothing in its curves")
    assert said([-0.5, -0.6], "grpo") is None
    assert said(FALLING, stopped=True) is None, "more steps would be stopped again"
    assert said([-0.5, -0.4], "grpo", stopped=True) is None
    fell = said([-0.5, -0.4], "grpo")
    assert fell is not None and "did not rise" in fell[0]
    assert said([*FALLING[:-1], 0.481], few_rows=5, stopped=True) is not None, "which says nothing of more steps"


def test_a_run_on_rewards_without_any_gradient_is_no_question_of_chance(tmp_path: Path) -> None:
    config = TrainConfig(objective=ObjectiveOptions(objective="grpo"), rewards=RewardOptions(reward=("mine.py:short",)))
    config = with_options(config, max_steps=3, learning_rate=1e-5)
    line = {"reward": 0.0, "no_gradient_groups": 1.0, "grad_norm": 0.0, "clipped_answers": 0.9, "loss": 0.0}
    said = advice(config, Curves.of([line] * 3), 3, 1e-5, tmp_path, stopped=True)
    assert said is not None and said[1] is None and said[0].startswith("No weight changed")
    assert "check that mine.py:short gives right" in said[0] and "a larger --max-new-tokens, easier rows" in said[0]
    said = advice(config, Curves.of([line | {"reward": 1.0}] * 3), 3, 1e-5, tmp_path)
    assert said is not None and "give harder rows" in said[0]
    unknown: dict[str, Any] = line | {"grad_norm": None, "reward": None}
    for other in (line | {"grad_norm": 0.1}, unknown):
        assert advice(config, Curves.of([line, other]), 2, 1e-5, tmp_path) is None
    assert Curves.of([line, unknown]).rewards == [0.0]
    assert training_reward_words(0.0, 0.0, 3).endswith("0.0000, at first and at last")
    assert "too few" in training_reward_words(0.0, 0.1, 3)


@pytest.mark.parametrize(("steps", "rate", "changes"), [(4, 1e-3, "--max-steps 8"), (4, 1e-4, "--learning-rate 0.001")])
def test_few_steps_say_little_about_a_usual_rate(steps: int, rate: float, changes: str, tmp_path: Path) -> None:
    config = with_options(TrainConfig(), max_steps=steps, learning_rate=rate)
    curves = Curves([(step, 2.0 - step / 1000) for step in range(steps + 1)], [])
    found = advice(config, curves, steps, 1e-3, tmp_path)
    assert (
        found is not None
        and found[0].startswith("The held-out loss changed by less than 2%: ")
        and f" {changes} " in str(found[1])
    )


@pytest.mark.parametrize(
    ("objective", "losses", "first_loss", "said"),
    [
        ("embed", (2.0, 2.2), None, "The held-out loss is no lower than before: "),
        ("rank", (0.5, 0.9), 0.7, "The held-out loss is no lower than that of equal scores: "),
        ("rank", (0.5, 0.51), 0.7, "The held-out loss fell from 0.7 to 0.51, but not clearly below the 0.5 of equal"),
        ("classify", (0.5, 0.51), 0.7, "The held-out loss fell from 0.7 to 0.51, but not clearly below the 0.5 of a c"),
    ],
)
def test_advice_names_what_the_loss_of_the_objective_is_compared_with(
    objective: str, losses: tuple[float, float], first_loss: float | None, said: str, tmp_path: Path
) -> None:
    before, after = losses
    config = with_options(TrainConfig(), objective=objective, epochs=3, learning_rate=1e-3)
    curves = Curves([(step, after if step else before) for step in range(0, 60, 10)], [], first_loss=first_loss)
    found = advice(config, curves, 50, 1e-3, tmp_path)
    assert found is not None and found[0].startswith(said)


def test_curves_of_a_run_that_forgot_are_not_called_fine(tmp_path: Path) -> None:
    """The summary says that it forgot, and what to do."""
    config = with_options(TrainConfig(), epochs=3, learning_rate=1e-3)
    held_out = [(10 * number, loss) for number, loss in enumerate(FALLING)]
    said = [advice(config, Curves(held_out, [], nats), 50, 1e-3, tmp_path) for nats in (None, 0.49, 0.53)]
    assert [found and found[0].split(" in its")[0] for found in said] == ["Nothing", "Nothing", None]
    late = advice(config, Curves([(0, 1.75), (20, 1.74), (40, 0.9), (50, 0.889)], []), 50, 1e-3, tmp_path)
    assert late is not None and late[0].startswith("Most of what it learnt came after step 20 of 50: ")


def test_rewards_that_teach_nothing_ask_for_right_answers_first(tmp_path: Path) -> None:
    config = with_options(TrainConfig(objective=ObjectiveOptions(objective="grpo")), epochs=3, learning_rate=1e-3)
    step = {"loss": 0.0, "no_gradient_groups": 0.95, "grad_norm": 0.1, "reward": 0.0, "clipped_answers": 0.0}
    steps = [{"step": number, **step} for number in range(1, 5)]

    def said(reward: float, steps: list[dict[str, float]] = steps) -> tuple[str, str | None] | None:
        records = [{"step": 0, "eval_loss": -reward}, *steps, {"step": 4, "eval_loss": -reward}]
        return advice(config, Curves.of(records), 4, 1e-3, tmp_path)

    none = said(0.0)
    assert none is not None and none[1] is None, "more of the same teaches nothing"
    assert "the same reward in 95% of the groups" in none[0] and "--objective sft" in none[0]
    always = said(1.0)
    assert always is not None and always[1] is None and "give other rows" in always[0]
    some = said(0.0, [step | {"no_gradient_groups": 0.5} for step in steps])
    assert some is not None and "more steps" in some[0] and some[1] is not None


def test_twice_the_steps_of_a_short_run_of_decide_have_a_lower_rate(tmp_path: Path) -> None:
    """The rate keeps its relation to that of `auto`, which falls from 100 to 200 steps."""
    config = with_options(TrainConfig(objective=ObjectiveOptions(objective="decide")), epochs=3, learning_rate=1e-3)
    for steps, changes in ((50, "--epochs 6 --output"), (100, "--epochs 6 --learning-rate 0.0005 --output")):
        held_out = [(steps // 5 * number, loss) for number, loss in enumerate(FALLING)]
        found = advice(config, Curves(held_out, []), steps, 1e-3, tmp_path, unseen_rows=1)
        assert found is not None and changes in str(found[1])


def test_a_short_run_is_not_repeated_with_one_step_less(tmp_path: Path) -> None:
    config = with_options(TrainConfig(), epochs=3, learning_rate=1e-3, schedule="linear", warmup_steps=0)
    found = advice(config, Curves([(0, 2.0), (3, 0.7), (6, 0.62), (9, 0.67)], []), 9, 1e-3, tmp_path)
    assert found is not None and "nearly all of its steps" in found[0] and found[1] is None


def test_no_sequence_of_advice_leads_back_to_a_rate(tmp_path: Path) -> None:
    """After a rate that was too high came a third of it, and after that a raised one: the first again."""
    kinds = [
        Curves([(10 * number, loss) for number, loss in enumerate(losses)], training, nats)
        for losses, training, nats in (
            ([2.0, 3.0, 2.9, 2.8, 2.6, 2.4], [], None),
            ([2.0, 1.999, 1.998, 1.997, 1.996, 1.995], [], None),
            ([2.0, 1.0, 0.6, 0.8, 0.5, 0.475], SPIKED, None),
            ([2.0, 1.0, 0.6, 0.7, 0.8, 0.85], [], None),
            (FALLING, [], 2.5),
        )
    ]

    def follow(tried: list[float]) -> None:
        assert len(tried) == len({*tried}), tried
        for curves in kinds:
            config = with_options(TrainConfig(), epochs=3, learning_rate=tried[-1])
            found = advice(config, curves, 50, 1.08e-3, tmp_path)
            if found is not None and "--learning-rate " in str(found[1]):
                follow([*tried, float(str(found[1]).partition("--learning-rate ")[2].split()[0])])

    for rate in (2e-5, 3.6e-4, 5e-4, 1.08e-3, 2e-3, 2e-2):
        follow([rate])


@pytest.mark.parametrize("problem", [None, "regression"])
def test_chance_and_memorised_rows_are_no_question_of_the_rate(problem: str | None, tmp_path: Path) -> None:
    def said(losses: Sequence[float], training: Sequence[float] = (), **known: Any) -> tuple[str, str | None]:
        options = {"objective": "classify", "problem_type": problem} if problem else {}
        config = with_options(TrainConfig(), epochs=3, learning_rate=1e-3, **options)
        curves = Curves([(10 * number, loss) for number, loss in enumerate(losses)], training, first_loss=2.2)
        found = advice(config, curves, 50, 1e-3, tmp_path, held_out_rows=16, all_rows=80, **known)
        assert found is not None
        return found

    overshot, unsteady = [2.0, 2.6, 1.99, 2.3, 2.2, 2.15], [2.0, 1.0, 0.6, 0.8, 0.5, 0.475]
    for losses in (overshot, unsteady):
        sentence, command = said(losses, SPIKED, change=(0.05, -0.4, 0.5))
        assert sentence.startswith("16 held-out rows are too few to tell the change of their loss from chance: more")
        assert command is None
    for clear in ((0.05, 0.02, 0.08), (0.005, -0.01, 0.02)):  # not by chance, or known to be small
        sentence, command = said(overshot, change=clear)
        assert sentence.endswith("of a constant answer: the learning rate is too high." if problem else "is too high.")
        assert "--learning-rate 0.0005 " in str(command)
    sentence, command = said(overshot, [2.0] * 5 + [0.01] * 20, change=(0.05, -0.4, 0.5))
    reason = "their texts do not tell the number" if problem else "they say little about other rows"
    assert sentence == (
        "The training loss fell to 0.01, and the held-out loss did not follow: the rows are memorised. Either "
        f"{reason}, or the rows are too few."
    )
    assert command is None


def test_a_low_rate_is_raised_before_steps_are_added(tmp_path: Path) -> None:
    curves = Curves([(number, 2.0 - 0.2 * number) for number in range(6)], [])
    usual = 1e-3
    low = with_options(TrainConfig(), epochs=3, learning_rate=usual / 10)
    said = [
        advice(config, curves, 60, usual, tmp_path)
        for config in (low, replace(low, optimization=OptimizationOptions(epochs=3, learning_rate=usual)))
    ]
    assert [one and one[1] and one[1].split()[3] for one in said] == ["--learning-rate", "--epochs"]


def test_a_training_loss_that_falls_steeply_at_the_end_is_said_where_held_out_rows_tell_nothing(tmp_path: Path) -> None:
    """Losses of runs that baked a prompt, of which 24 steps at a fifth of the best rate taught a part."""
    low = [4.63, 4.14, 4.12, 4.36, 2.07, 1.61, 1.95, 1.86, 1.58, 1.08, 1.64, 1.37, 1.53, 1.01, 1.05, 1.1, 0.72, 0.73]
    low += [0.68, 0.76, 0.63, 0.995, 0.81, 0.69]
    best = [5.12, 2.88, 1.88, 1.22, 0.77, 0.62, 0.47, 0.33, 0.38, 0.43, 0.34, 0.31, 0.32, 0.26, 0.35, 0.55, 0.31, 0.15]
    best += [0.13, 0.2, 0.16, 0.27, 0.21, 0.16]
    config = with_options(TrainConfig(), objective="bake", context="be brief", epochs=3, learning_rate=2e-4)

    def said(training: Sequence[float], held_out: Sequence[float] = (), **counts: Any) -> tuple[str, str | None] | None:
        curves = Curves([(6 * number, loss) for number, loss in enumerate(held_out)], training)
        return advice(config, curves, 24, 2e-4, tmp_path / "run", **counts)

    expected = "The training loss was still falling steeply at the end, from 1.39 at step 13 to 0.781: more steps may"
    found = said(low, all_rows=64)
    assert found is not None and found[0].startswith(expected)
    assert "--epochs 6 --eval-fraction 0.3 --output" in str(found[1])
    assert said(best) is said(low, stopped=True) is said(low[:4]) is said([]) is said([1.0, 0.7] * 12) is None
    few = said(low, [4.6, 2.0, 1.4, 1.1, 0.95], few_rows=13)
    assert few is not None and "at step 13" in few[0] and "Only 13 rows are held out" in few[0]
    assert "--epochs 6 --output" in str(few[1])
    rose = said(low, [4.6, 2.0, 1.4, 1.1, 1.3], few_rows=13)
    assert rose is not None and rose[0].startswith("Only 13 rows") and rose[1] is None


def test_rewards_that_still_rise_at_the_end_are_said(tmp_path: Path) -> None:
    config = with_options(TrainConfig(), objective="grpo", epochs=3, learning_rate=1e-3)

    def said(rewards: Sequence[float], **counts: Any) -> tuple[str, str | None] | None:
        curves = Curves([(10 * number, -reward) for number, reward in enumerate(rewards)], [])
        return advice(config, curves, 50, 1e-3, tmp_path / "run", **counts)

    rising = said([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert rising is not None and rising[0] == "The reward of held-out prompts was still rising at the end."
    assert "--epochs 6" in str(rising[1])
    assert said([0.2, 0.3, 0.4, 0.5, 0.6, 0.7], few_rows=5) is said([0.2, 0.5, 0.7, 0.7, 0.7, 0.7]) is None
