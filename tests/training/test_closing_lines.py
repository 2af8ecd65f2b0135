"""The end of a run in words, and its report: pairs counted once, forgetting, nothing better than the base."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
import transformers

from backhand import printing
from backhand.data.held_out import neutral_prompts
from backhand.data.options import DataOptions
from backhand.generation.command import generate_command
from backhand.generation.options import AnswerOptions, GenerateOptions
from backhand.loop import evaluate as evaluation
from backhand.loop.evaluate import Evaluation, Score, evaluate
from backhand.loop.label_scores import label_score
from backhand.nn.model_options import BaseModelOptions, pretrained_arguments
from backhand.objectives.kinds.free_answers import rows_to_show
from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions
from backhand.options.config import ModelOptions
from backhand.options.config_file import load_config
from backhand.options.objectives import ObjectiveOptions
from backhand.report.comparison import comparison_page
from backhand.report.headline import headline, verdict
from backhand.report.page import VERDICTS, live_values, result_sentence, run_page
from backhand.report.run_record import RunRecord, read_run
from backhand.runs.label_results import Accuracies, lacks_held_out_rows
from backhand.runs.records import RowFacts
from backhand.runs.row_changes import gain_words, mean_gain, recorded_gain, share_gain, unpaired_gain
from backhand.runs.summary import LabelFigures, LabelRow, NeutralAnswer, RunSummary, forgotten_nats
from backhand.terminal import _Now, console, working
from backhand.training.advice import answer_advice
from backhand.training.console import closing_lines
from backhand.training.curves import Curves
from backhand.training.run import train
from backhand.words import share_interval
from tests.support.page import Page
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import tiny_model
from tests.support.tiny_run import TinyRun, write_pairs


@pytest.fixture(scope="module")
def ended(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    return train(tiny.config(tmp_path_factory.mktemp("ended") / "run", max_steps=2, eval_every=1))


def test_labels_of_a_run_without_an_end_are_not_judged_by_their_loss(ended: RunSummary) -> None:
    run = read_run(Path(ended.output))
    assert run.facts["labels"] == []
    stopped = replace(run, summary={}, facts=run.facts | {"labels": ["no", "yes"]})
    assert verdict(replace(run, summary={})) == "helped" and verdict(stopped) == "unclear"
    assert "right answers are counted at the end of the run" in headline(stopped)
    unmeasured = replace(ended, labels=("no", "yes"))
    said = "he labels of held-out rows were not measured, so it is not known whether it helped"
    ending = f"T{said}. Measure the labels with backhand evaluate --data FILE."
    assert ending in closing_lines(unmeasured) and said not in "".join(closing_lines(ended))
    finished = replace(run, summary=json.loads(unmeasured.to_json()))
    assert verdict(finished) == "unclear" and f"; t{said}" in headline(finished)
    assert ending.partition(". ")[2] in Page(run_page(finished)).one("section", id="result").text
    nothing = [line for line in run.metrics if "loss" in line]
    assert verdict(replace(finished, metrics=nothing)) == "unknown", "nothing is held out"


def test_the_repr_of_a_summary_is_short(ended: RunSummary) -> None:
    shown = repr(replace(ended, base_decisions={"team": {}}, skipped_steps=0))  # type: ignore[typeddict-item]
    assert shown.startswith("RunSummary(output=") and shown.endswith(", …)") and len(shown) < 1500
    assert "skipped_steps=0" in shown and "None" not in shown and "decisions" not in shown
    evaluation = repr(Evaluation(4, Score(1.5, None, None, 7, pairs={"margin": 1.0})))
    assert evaluation == "Evaluation(rows=4, base=Score(loss=1.5, supervised_tokens=7, …), adapted=None, undesirable=0)"


def test_equal_answers_stand_next_to_the_loss(ended: RunSummary) -> None:
    run = read_run(Path(ended.output))
    given = {line["adapted"].strip() for line in run.answers}
    assert (ended.same_answer is not None) == (len(given) == 1)
    same = replace(ended, same_answer="the")
    said = "ll free answers to held-out rows that are shown are the same: 'the'"
    lines = closing_lines(same)
    assert lines[lines.index(f"A{said}.") - 1].startswith(("Held-out loss", "Loss changed")), "next to the loss"
    for summary, shown in ((same, True), (replace(ended, same_answer=None), False)):
        assert (f"; a{said}" in headline(replace(run, summary=json.loads(summary.to_json())))) is shown


def test_held_out_rows_of_the_training_data_are_counted_next_to_the_figures(tiny: TinyRun, tmp_path: Path) -> None:
    given = tiny.config(tmp_path / "run", max_steps=1, answers=0)
    (held_out,) = given.data.eval_data
    told = "also occur in the training data, so the figures of held-out rows are too good."
    summary = train(replace(given, data=replace(given.data, data=(*given.data.data, held_out))))
    assert summary.repeated_rows == summary.held_out_rows == 4
    lines = closing_lines(summary)
    assert lines[lines.index(f"4 held-out rows {told}") - 1].startswith(("Held-out loss", "Loss changed"))
    assert f"4 held-out rows {told}" in Page(run_page(read_run(tmp_path / "run"))).one("section", id="result").text
    alone = train(replace(given, run=replace(given.run, output=tmp_path / "alone")))
    assert alone.repeated_rows == 0 and not any(told in line for line in closing_lines(alone))


def test_the_share_by_which_the_loss_fell_stands_next_to_the_loss(ended: RunSummary) -> None:
    fell = replace(ended, base_eval_loss=5.2471, first_eval_loss=None, best_eval_loss=4.0182)
    (line,) = (line for line in closing_lines(fell) if line.startswith("Held-out loss"))
    assert "5.2471 → 4.0182 nats per token, 23% lower (perplexity 190.01 → 55.60) on " in line


def test_small_changes_do_not_look_like_none_or_all(ended: RunSummary) -> None:
    def shown(before: float, after: float, **more: Any) -> str:
        summary = replace(ended, base_eval_loss=before, first_eval_loss=None, best_eval_loss=after, **more)
        return "\n".join(closing_lines(summary))

    assert "(perplexity above 1.01e+304 → 7.23e+86)" in shown(1200.0, 200.0)
    assert "2.30000 → 2.29999 nats per token, 0.0004% lower (perplexity 9.9742 → 9.9741)" in shown(2.3, 2.29999)
    assert "2.0000 → 0.0010 nats per token, 99.95% lower" in shown(2.0, 0.001)
    changed = shown(2.3, 2.29999, loss_change=(-1e-5, -2e-5, -1e-6))
    assert "Loss changed by -1e-05 nats per token (95 % interval -2e-05 to -1e-06)." in changed
    assert "Loss changed by -0.0200 nats per token (95 % interval -0.0400 to +0.0000)" in shown(
        2.3, 2.28, loss_change=(-0.02, -0.04, -0.0)
    )


def test_figures_that_are_not_known_or_equal_are_not_judged(ended: RunSummary) -> None:
    run = read_run(Path(ended.output))
    unknown = "here is no finite held-out loss before and after training, so it is not known whether it helped"
    assert f"T{unknown}." in closing_lines(replace(ended, best_eval_loss=None, best_step=None))
    before = replace(run, metrics=[line | {"eval_loss": None} if line["step"] else line for line in run.metrics])
    assert f"; t{unknown}" in headline(before) and verdict(before) == "unknown"
    once = replace(run, metrics=[line for line in run.metrics if not line["step"] or "loss" in line], summary={})
    assert "; the held-out rows were not evaluated after a step, so it is not known" in headline(once)
    assert {"held-out loss before training; none after a step"} <= {tile[1] for tile in live_values(once)["tiles"]}
    many = run.facts | {"data": {"held_out": {"examples": 3000}}}
    losses = [{"step": 0, "eval_loss": 5.0004}, {"step": 1, "eval_loss": 5.0}]
    little = replace(run, facts=many, metrics=losses)  # type: ignore[arg-type]
    assert "(perplexity 148.47 to 148.41)" in headline(little)
    assert result_sentence(little) == "held-out loss 5.0004 → 5.0000 nats per token: it helped."
    equal = [line | {"eval_loss": 5.0} for line in losses]
    assert verdict(replace(little, metrics=equal)) == "unclear"


def test_pairs_are_rows_and_measured_where_some_are_held_out(tiny: TinyRun, tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "pairs.jsonl", 9)
    made = tiny.config(tmp_path / "run", data=(str(rows),), eval_data=(), max_steps=1)
    summary = train(replace(made, objective=ObjectiveOptions(objective="dpo")))
    record = read_run(tmp_path / "run")
    assert " on 4 of 9 rows of pairs.jsonl" in headline(record)
    assert " on 4 of 9 rows of pairs.jsonl" in headline(replace(record, summary={})), "before it is over"
    (line,) = (line for line in closing_lines(summary) if "nothing was held out" in line)
    unknown = "so the margins, the accuracy and the length of its free answers on other rows are not known"
    assert line.endswith(f"{unknown}: train with --eval-data FILE to measure them."), "a tenth of 9 rows is none"
    many = "\n".join(closing_lines(replace(summary, rows=50)))
    assert "train with --eval-fraction 0.1 or --eval-data FILE to measure them." in many
    rewarded = closing_lines(replace(summary, objective="grpo", first_reward=0.1, last_reward=0.2))
    assert any(line.startswith("Nothing was held out, so its rewards on") for line in rewarded)


def test_no_evaluation_better_than_the_base(ended: RunSummary) -> None:
    assert any("best after step" in line for line in closing_lines(ended))
    worse = replace(ended, base_eval_loss=1.0, first_eval_loss=1.0, best_eval_loss=1.5, best_step=2)
    lines = " ".join(closing_lines(worse))
    assert "no evaluation was better than the base model" in lines and "best after step" not in lines
    rewarded = " ".join(closing_lines(replace(worse, objective="grpo")))
    assert "no evaluation was better than the base model" in rewarded


def with_forgetting(run: RunRecord, *nats: float | None) -> RunRecord:
    lines = [
        {
            "step": step,
            "eval_loss": loss,
            "forgetting_nats": rise,
            "row_nats": [10 * loss + row for row in range(4)],
            "row_tokens": [10] * 4,
        }
        for step, (loss, rise) in enumerate(zip((3.0, 1.0, 2.0), nats, strict=True))
    ]
    return replace(run, metrics=lines)


def test_forgetting_is_said_in_words(ended: RunSummary) -> None:
    run = read_run(Path(ended.output))
    assert ended.forgotten_nats is not None and ended.forgotten_nats < 0.5
    assert "forgot" not in headline(run) + " ".join(closing_lines(ended))
    forgot = "on neutral texts the loss rose by 1.26 nats per token"
    assert forgot in headline(with_forgetting(run, 0.0, 1.26, 0.1)), "at the best evaluation, whose adapter is kept"
    assert "forgot" not in headline(with_forgetting(run, 0.0, 0.5, 9.0))
    assert "forgot" not in headline(with_forgetting(run, None, None, None))
    answers = (NeutralAnswer(prompt="What is the capital of France?", base="It is\nParis.", adapted="politics"),)
    forgetful = replace(ended, forgotten_nats=1.26, advice="All is well.", neutral_answers=answers)
    (line,) = (line for line in closing_lines(forgetful) if line.startswith(f"It forgot: {forgot}."))
    assert "--learning-rate" in line and "--max-forgetting" in line
    assert "  What is the capital of France?  “It is Paris.” → “politics”" in closing_lines(forgetful)
    assert "1 of 1 free answer to unrelated prompts changed:" in closing_lines(forgetful)
    assert not any("capital" in line for line in closing_lines(replace(forgetful, forgotten_nats=0.1)))
    records: list[dict[str, Any]] = [{"step": step, "forgetting_nats": step / 4} for step in range(5)]
    assert (forgotten_nats(records, 2), forgotten_nats(records, None), forgotten_nats([], 2)) == (0.5, 1.0, None)


def test_the_result_that_helped_and_forgot_says_both(ended: RunSummary) -> None:
    run = read_run(Path(ended.output))
    forgetful = with_forgetting(run, 0.0, 0.67, 0.1)
    assert result_sentence(forgetful).endswith(": it helped, and it forgot.")
    assert "held-out loss: it helped, and it forgot" in Page(run_page(forgetful)).one("section", id="result").text
    assert result_sentence(with_forgetting(run, 0.0, 0.4, 0.9)).endswith(": it helped.")


def test_the_change_of_the_loss_has_its_interval_over_the_rows(ended: RunSummary) -> None:
    change = ended.loss_change
    assert change is not None and ended.first_eval_loss is not None and ended.best_eval_loss is not None
    assert change[0] == pytest.approx(ended.best_eval_loss - ended.first_eval_loss, rel=1e-6)
    assert [line["step"] for line in ended.records if "row_tokens" in line] == [0], "they never change"
    clear, unclear = (replace(ended, loss_change=one) for one in ((-0.2, -0.3, -0.1), (-0.2, -0.5, 0.1)))
    assert "Loss changed by -0.2000 nats per token (95 % interval -0.3000 to -0.1000)." in closing_lines(clear)
    assert any(line.endswith("+0.1000): too few rows to be sure of the change.") for line in closing_lines(unclear))
    evaluated = evaluate(
        EvaluateOptions(
            model=ModelOptions(model=ended.model, dtype="float32", threads=1),
            data=DataOptions(data=load_config(Path(ended.output) / "config.toml").data.eval_data),
            run=EvaluateRunOptions(adapter=Path(ended.adapter), completions=False),
        )
    )
    assert isinstance(evaluated, evaluation.Evaluation)
    assert evaluated.loss_change == pytest.approx(change, rel=1e-3)


def test_no_exact_match_of_free_texts_is_said(ended: RunSummary) -> None:
    """No answer repeats a style word by word, so 0 % says nothing about the run."""
    measured = replace(ended, base_exact_match=0.0, adapted_exact_match=0.0, exact_match_rows=25)
    record = read_run(Path(ended.output))

    def shown(summary: RunSummary) -> str:
        page = run_page(replace(record, summary=record.summary | vars(summary))).decode()
        return "\n".join([*closing_lines(summary), page]).lower()

    assert shown(replace(measured, free_texts=False)).count("exactly right") == 2
    gained = replace(measured, adapted_exact_match=0.4, exact_match_gain=(0.4, 0.1, 0.7))
    change = "right answers changed by +40.0 points from the base model (95 % interval +10.0 to +70.0)"
    assert shown(gained).count(change) == 2
    assert "exactly right" not in shown(replace(measured, free_texts=True))
    assert shown(replace(measured, adapted_exact_match=0.04, free_texts=True)).count("exactly right") == 2


@pytest.mark.parametrize(
    ("answers", "free"),
    [
        ([f"the {number} is here" for number in range(16)], True),
        ([str(number) for number in range(16)], False),
        (["good one", "bad one"] * 8, False),
        ([f"{'very ' * 12}good"] * 16, True),
    ],
)
def test_free_texts_are_long_or_differ_in_several_words(
    answers: list[str], free: bool, tiny: TinyRun, tmp_path: Path
) -> None:
    rows = [{"prompt": f"say {number}", "completion": answer} for number, answer in enumerate(answers)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = train(tiny.config(tmp_path / "run", data=(str(path),), eval_data=(str(path),), max_steps=1, answers=1))
    assert summary.exact_match_rows == 16 and summary.free_texts is free


def test_answers_of_a_run_from_an_adapter_are_compared_with_its_answers(tiny: TinyRun, tmp_path: Path) -> None:
    options = {"max_steps": 1, "learning_rate": 1e-9, "answers": 4}
    train(tiny.config(tmp_path / "fresh", **options))
    train(tiny.config(tmp_path / "first", epochs=40, learning_rate=1e-2, answers=0, eval_every=120))
    again = train(tiny.config(tmp_path / "again", from_adapter=str(tmp_path / "first" / "adapter"), **options))
    train(tiny.config(tmp_path / "mute", from_adapter=str(tmp_path / "first" / "adapter"), max_steps=1, answers=0))
    assert "(the adapter it started from)" in headline(read_run(tmp_path / "mute"))
    record = read_run(tmp_path / "again")
    assert again.compared_with_start and all(line["base"] == line["adapted"] for line in record.answers)
    assert all(one["base"] == one["adapted"] for one in again.neutral_answers)
    of_base = {line["source"]: line["base"] for line in read_run(tmp_path / "fresh").answers}
    assert len(record.answers) == 4 and all(of_base[line["source"]] != line["base"] for line in record.answers)
    for page in (run_page(record), comparison_page([record, record])):
        section = Page(page).one("section", id="answers").text
        assert "start adapter" in section and "base model" not in section


def test_neutral_prompts_are_answered_before_and_after(finished: Path) -> None:
    stored = json.loads((finished / "summary.json").read_text())
    assert [one["prompt"] for one in stored["neutral_answers"]] == neutral_prompts()
    assert any(one["base"] != one["adapted"] for one in stored["neutral_answers"])
    section = Page(run_page(read_run(finished))).one("section", id="answers").text
    changed = sum(one["base"] != one["adapted"] for one in stored["neutral_answers"])
    count = len(stored["neutral_answers"])
    result = Page(run_page(read_run(finished))).one("section", id="result").text
    assert f"given unrelated texts is left; {changed} of {count} free answers to unrelated prompts changed" in result
    cut = [sum(one[f"{name}_cut_off"] for one in stored["neutral_answers"]) for name in ("base", "adapted")]
    assert f"prompts changed ({cut[0]} → {cut[1]} of them cut off at their limit of tokens)" in result and any(cut)
    none = replace(read_run(finished), summary=stored | {"neutral_answers": []})
    assert "is left; free answers were not compared" in Page(run_page(none)).one("section", id="result").text
    assert "Unrelated prompts" in section and "What is the capital of France?" in section


def test_shares_carry_their_interval_and_say_what_their_rows_chose(ended: RunSummary) -> None:
    labels = label_figures(1.0, spam=15, ham=10)
    measured = replace(
        ended,
        base_exact_match=0.0,
        adapted_exact_match=0.92,
        exact_match_rows=25,
        base_labels=labels,
        adapted_labels=labels,
    )
    text = "\n".join(closing_lines(measured))
    assert "Exactly right answers 0.0% → 92.0% (95 % interval 75–98 %) of 25 held-out rows." in text
    assert "from 100.0% (95 % interval 87–100 %) to 100.0% (95 % interval 87–100 %)" in text
    memory = replace(ended, peak_rss_bytes=1028 << 20, predicted_rss_bytes=955 << 20)
    assert "Peak memory 1.0 GiB, 8% more than the predicted 955 MiB." in closing_lines(memory)
    chosen = "The same held-out rows chose the best step"
    assert ended.evaluations == 2 and chosen in text
    assert chosen not in "\n".join(closing_lines(replace(measured, evaluations=1)))


def label_figures(accuracy: float, **supports: int) -> LabelFigures:
    rows = {label: LabelRow(precision=1.0, recall=1.0, f1=1.0, support=count) for label, count in supports.items()}
    return LabelFigures(accuracy=accuracy, f1_macro=1.0, per_label=rows, confusion={}, invented=0)


@pytest.mark.parametrize(
    ("base", "adapted", "words", "verdict"),
    [
        (0.25, 0.425, "not clearly better than the base model (+17.5 points, 95 % interval", "unclear"),
        (0.25, 0.90, "clearly better than the base model (+", "helped"),
        (0.90, 0.25, "the base model is better", "hurt"),
    ],
)
def test_a_lower_loss_helped_only_if_the_labels_are_clearly_better(
    base: float, adapted: float, words: str, verdict: str, ended: RunSummary
) -> None:
    """The loss of labels falls as soon as the form of the answers is learnt."""
    before, after = (label_figures(share, animals=11, happy=10, sad=10, sport=9) for share in (base, adapted))
    measured = replace(
        ended,
        base_exact_match=0.0,
        adapted_exact_match=adapted,
        exact_match_rows=40,
        base_labels=before,
        adapted_labels=after,
    )
    (line,) = (line for line in closing_lines(measured) if line.startswith("The accuracy"))
    assert (
        words in line
        and "always answering 'animals', the most frequent of these rows, is right in 27.5%" in line
        and f"{base:.1%} (95 %" in line
    )
    stored = json.loads(Path(ended.output, "summary.json").read_text()) | json.loads(measured.to_json())
    run = replace(read_run(Path(ended.output)), summary=stored)
    assert " nats per token; loss changed by " in headline(run)
    page = Page(run_page(run)).one("section", id="result").text
    assert words in page and "so it helped" not in page
    assert VERDICTS[verdict][0] in page
    config = load_config(Path(ended.output) / "config.toml")
    suggested = answer_advice(config, replace(measured, try_next=None), Path("runs/one"))
    assert (suggested is None) is (verdict == "helped")
    # The sentence of the curves belongs to their command.
    assert answer_advice(config, replace(measured, try_next="backhand train …"), Path("runs/one")) is None
    rose = Curves([(ended.steps * part // 4, loss) for part, loss in enumerate((1.34, 1.27, 1.3, 1.36, 1.39))], [])
    suggested = answer_advice(config, replace(measured, try_next=None), Path("runs/one"), rose)
    assert suggested is None or (suggested[1] is None and "more steps," not in suggested[0])
    assert verdict != "hurt" or (suggested is not None and "held-out loss was lowest after step" in suggested[0])
    stopped = replace(measured, try_next=None, stopped_because="a callback returned False")
    suggested = answer_advice(config, stopped, Path("runs/one"))
    assert suggested is None or ("more steps" not in suggested[0] and suggested[1] is None)


def test_too_few_held_out_labels_ask_for_more_of_them(ended: RunSummary) -> None:
    """No number of steps makes the labels of five rows clearly better."""
    before, after = (label_figures(share, animals=3, sport=2) for share in (0.4, 1.0))
    few = {"base_labels": before, "adapted_labels": after, "exact_match_rows": 5, "try_next": None}
    measured = replace(ended, held_out_rows=5, rows=45, stopped_because=None, **few)
    config = load_config(Path(ended.output) / "config.toml")
    further = "more rows are needed, for example as --eval-data FILE."
    separate = "5 held-out rows are too few to tell whether the labels are learnt: "
    assert answer_advice(config, measured, Path("runs/one")) == (f"{separate}{further}", None)
    for rows in (17, 12):  # a quarter, or a half of the rows are held out: 0.3 of them would not be clearly more
        few_left = replace(measured, rows=rows, held_out_rows=24 - rows)
        suggested = answer_advice(replace(config, data=replace(config.data, eval_data=())), few_left, Path("runs/one"))
        assert suggested is not None and suggested[0].endswith(further)
    drawn = replace(config, data=replace(config.data, eval_data=()))
    share = "--eval-fraction 0.3 or --eval-data FILE holds out more."
    assert answer_advice(drawn, measured, Path("runs/one")) == (f"{separate}{share}", None)
    known = label_figures(1.0, animals=3, sport=2)
    suggested = answer_advice(config, replace(measured, base_labels=known), Path("runs/one"))
    assert suggested is not None and suggested[0].startswith("All 5 held-out answers were right before the run already")
    worse = replace(measured, base_labels=known, adapted_labels=before)
    assert answer_advice(config, worse, Path("runs/one")) is None, "all was right before"
    assert not lacks_held_out_rows(Accuracies.of(1.0, {"accuracy": 1.0}, 0.6, 5)), "no number of rows helps"
    # 9 → 14 of 21 rows, of which one label has 5: clear with more held-out rows, and already better than a constant.
    before, after = (label_figures(right / 21, animals=5, sport=5, sad=5, happy=6) for right in (9, 14))
    after["gain_over_constant"] = 8 / 21, 0.05, 0.6
    risen = {"base_exact_match": 0.0, "adapted_exact_match": 14 / 21, "exact_match_rows": 21}
    measured = replace(measured, held_out_rows=21, base_labels=before, adapted_labels=after, **risen)  # type: ignore[arg-type]
    suggested = answer_advice(config, measured, Path("runs/one"))
    assert suggested is not None and suggested[0].startswith("21 held-out rows are too few")
    (line,) = (
        line for line in closing_lines(measured) if "not clearly better than the base model (+23.8 points" in line
    )
    assert "21 rows are too few to be sure" in line


def test_few_rows_do_not_tell_a_higher_accuracy_from_chance(ended: RunSummary) -> None:
    """With 3 of 6 rows that became right, the interval of the gain contains 0."""
    assert share_gain([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [1.0] * 6)[1] < 0
    assert [share_gain([0.0] * rows, [1.0] * rows)[1] > 0 for rows in (4, 6)] == [False, True]
    before, after = label_figures(0.5, spam=3, ham=3), label_figures(1.0, spam=3, ham=3, other=0)
    right = {"base_exact_match": 0.0, "adapted_exact_match": 1.0, "exact_match_rows": 6}
    measured = replace(ended, base_labels=before, adapted_labels=after, **right)  # type: ignore[arg-type]
    words = "or a constant answer (+50.0 points, 95 % interval "
    assert any(words in line and "; 6 rows are too few to be sure" in line for line in closing_lines(measured))
    run = replace(read_run(Path(ended.output)), summary=json.loads(measured.to_json()))
    result = Page(run_page(run)).one("section", id="result").text
    assert words in result and "not clear whether it helped" in result and "it helped;" not in result
    assert result_sentence(run) == "right answers 50% → 100% (95 % interval 61–100 %): not clear whether it helped."
    line = next(line for line in run_page(run).decode().splitlines() if "<tr><th>other</th>" in line)
    assert line.count('<td class="number">–</td>') == 2, "neither recall nor F1 without rows"
    assert (
        "| held-out rows | 4, too few to tell how much it helps on others |"
        in Path(ended.adapter, "README.md").read_text()
    )


def test_the_loss_before_a_run_is_that_of_the_adapter_it_starts_from(ended: RunSummary) -> None:
    continued = replace(ended, objective="dpo", base_eval_loss=2.2304, first_eval_loss=0.6931, best_eval_loss=0.0003)
    (line,) = (line for line in closing_lines(continued) if line.startswith("Held-out loss"))
    assert line.startswith("Held-out loss 0.6931 → 0.0003 per pair (dpo)") and line.endswith(
        "the base model alone has 2.2304."
    )
    worse = " ".join(closing_lines(replace(continued, best_eval_loss=0.7)))
    assert "no evaluation was better than the adapter it started from" in worse


def test_rows_that_no_step_contained_are_not_counted_as_trained_on(ended: RunSummary) -> None:
    assert ended.rows == 11 and ended.rows_seen == 8, "two steps of four rows"
    assert " on 8 of 11 rows: 2 steps" in closing_lines(ended)[0]
    run = read_run(Path(ended.output))
    assert " on 8 of 11 rows of " in headline(run)
    # A file of 90 rows, of which 9 are held out, and the names of options as further rows.
    train: RowFacts = {**run.rows, "option_rows": 20}
    run = replace(run, facts={**run.facts, "data": {"train": train}})
    for seen, line, name in (
        (101, " on 81 rows and 20 names of options: ", " on 81 rows of rows.jsonl and 20 names of options"),
        (16, " on 16 of 101 examples (81 rows and 20 names of options): ", " on 16 of 101 examples (81 rows of rows"),
    ):
        summary = replace(ended, rows=101, rows_seen=seen, option_rows=20)
        assert line in closing_lines(summary)[0]
        assert name in headline(replace(run, summary=json.loads(summary.to_json())))


def test_rewards_of_a_short_run_are_not_compared(ended: RunSummary) -> None:
    rewarded = replace(
        ended, objective="grpo", first_reward=0.307, last_reward=0.1404, reading=" --reward rew.py:right"
    )
    lines = closing_lines(rewarded)
    (line,) = (line for line in lines if "too few to tell a change from chance" in line)
    assert line.endswith("too few to tell a change from chance).")
    clause = line[1:-1]
    record = read_run(Path(ended.output))
    record = replace(record, summary=vars(rewarded), config={**record.config, "objective": {"objective": "grpo"}})
    assert clause in headline(record), "the report says the same"
    assert any("backhand evaluate" in line and line.endswith("--reward rew.py:right") for line in lines)
    assert not any("too few to tell" in line for line in closing_lines(replace(rewarded, steps=200)))
    assert any("backhand export" in line for line in lines)
    assert not any("cut off" in line for line in lines)
    (cut,) = (line for line in closing_lines(replace(rewarded, last_cut_off=0.62)) if "cut off" in line)
    assert cut.startswith("62% of the last answers were cut off") and "--max-new-tokens" in cut


def test_a_gain_of_reward_has_an_interval() -> None:
    base = [0.5] * 4
    unclear = gain_words(mean_gain(base, [0.8, 0.3, 0.6, 0.4]))
    assert unclear.startswith("reward gained per row +0.025 (95 % interval -0.3278 to +0.3778)")
    assert unclear.endswith("too few rows to be sure of the change")
    assert "too few" not in gain_words(mean_gain(base, [0.6] * 4))
    assert "too few" in gain_words(mean_gain(base[:1], base[:1]))
    assert gain_words(mean_gain(base, base)) == "the reward of no held-out row changed"
    two = mean_gain(base[:2], [0.6] * 2)
    assert two is not None and two[1] < 0 < two[2] == pytest.approx(0.1), "two equal gains prove nothing"
    assert "too few" in gain_words(two)


@pytest.mark.parametrize("rows", [2, 3, 8, 11, 12, 40, 400])
def test_the_interval_of_a_gain_is_that_of_student(rows: int) -> None:
    """With 1.96 deviations, gains of 0.1 and 0.3 seemed to prove a gain."""
    gains = [0.1 + 0.2 * (row % 2) for row in range(rows)]
    half = float(scipy.stats.t.ppf(0.975, rows - 1)) * statistics.stdev(gains) / math.sqrt(rows)
    gain = mean_gain([0.0] * rows, gains)
    assert gain is not None and gain[1:] == pytest.approx((gain[0] - half, gain[0] + half), abs=2e-3 * half)
    assert ("too few" in gain_words(gain)) == (rows < 4)


def test_a_reward_that_may_have_risen_by_chance_did_not_help(ended: RunSummary) -> None:
    records = [
        {"step": step, "eval_loss": -sum(rewards) / 4, "row_rewards": rewards}
        for step, rewards in enumerate(([0.5] * 4, [0.8, 0.3, 0.6, 0.4], [0.7, 0.6, 0.6, 0.7]))
    ]
    run = replace(read_run(Path(ended.output)), metrics=records)

    def judged(best_step: int) -> tuple[str, str, str]:
        gain = recorded_gain(records, best_step)
        assert gain is not None
        summary = {**run.summary, "objective": "grpo", "reward_gain": list(gain)}
        one = replace(run, summary=summary, config={**run.config, "objective": {"objective": "grpo"}})
        (line,) = (
            line
            for line in closing_lines(replace(ended, objective="grpo", reward_gain=gain))
            if line.startswith("Reward gained per row")
        )
        return result_sentence(one), headline(one), line

    result, sentence, line = judged(1)
    assert result.endswith(": not clear whether it helped.") and "so it" not in sentence
    assert "too few rows to be sure" in sentence and line.endswith("too few rows to be sure of the change.")
    result, sentence, line = judged(2)
    assert result.endswith(": it helped.") and ", so it helped" in sentence and "too few" not in line
    assert recorded_gain(records, None) is None and recorded_gain(records[1:], 2) is None


def test_the_rows_shown_are_spread_over_answers_and_mistakes() -> None:
    references = ["animals"] * 6 + ["happy", "sad", "happy", "sad"]
    shown = rows_to_show(references, ["animals"] * 10, 4)
    assert [references[number] for number in shown].count("animals") == 1
    assert len(set(shown)) == 4 and {"happy", "sad"} <= {references[number] for number in shown}
    assert len(rows_to_show(["a"] * 5, ["a"] * 5, 4)) == 4
    wrong = rows_to_show(["a"] * 8, ["a"] * 7 + ["b"], 2)
    assert wrong == [0, 7]


@pytest.mark.parametrize(
    ("share", "rows", "low", "high"),
    [(0.0, 10, 0.0, 0.2775), (1.0, 25, 0.8668, 1.0), (0.5, 100, 0.4038, 0.5962), (0.7, 0, 0.0, 1.0)],
)
def test_the_interval_is_wilsons(share: float, rows: int, low: float, high: float) -> None:
    assert share_interval(share, rows) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_a_gain_is_that_of_the_changed_rows() -> None:
    """Bonett and Price: with b rows only right before and c only after, of n, p = (b + 1, c + 1) / (n + 2)."""
    rows = [(0.0, 1.0)] * 12 + [(1.0, 0.0)] * 2 + [(1.0, 1.0)] * 386
    before, after = (list(side) for side in zip(*rows, strict=True))
    lost, won = 3 / 402, 13 / 402
    half = 1.96 * math.sqrt((lost + won - (won - lost) ** 2) / 402)
    assert share_gain(before, after) == pytest.approx((10 / 400, won - lost - half, won - lost + half), abs=2e-4)
    apart = unpaired_gain(388 / 400, share_interval(388 / 400, 400), 398 / 400, share_interval(398 / 400, 400))
    assert apart[1] < 0 < share_gain(before, after)[1], "the same accuracies of different rows say less"
    for same in ([1.0] * 9, [0.0] * 9, [0.0, 1.0, 0.4] * 3):
        gain, low, high = share_gain(same, same)
        assert gain == 0 and low == pytest.approx(-high) and 0.1 < high < 0.7
    assert share_gain([1.0] * 9, [0.0] * 9)[:2] == (-1, -1) and share_gain([1.0] * 9, [0.0] * 9)[2] < -0.4


def test_the_same_accuracies_are_clear_if_few_rows_changed(ended: RunSummary) -> None:
    """29 → 39 of 60 rows, and no row became wrong: the intervals of both accuracies overlap."""
    right = ["a", "b", "c"] * 20
    base = label_score(right, right[:29] + ["d"] * 31, "abcd", right)
    nested, other = right[:39] + ["d"] * 21, ["d"] * 21 + right[21:]
    for given, words in (
        (nested, "that is clearly better than the base model (+16.7 points, 95 % interval "),
        (other, "not clearly better than the base model (+16.7 points, 95 % interval "),
    ):
        adapted = label_score(right, given, "abcd", right).compared_with(base).to_json()
        assert json.loads(json.dumps(adapted))["accuracy"] == 0.65 and "row_scores" not in adapted
        measured = {"base_labels": base.to_json(), "adapted_labels": adapted, "exact_match_rows": 60}
        stated = replace(ended, base_exact_match=0.0, adapted_exact_match=0.65, **measured)  # type: ignore[arg-type]
        assert any(words in line for line in closing_lines(stated))


def test_labels_come_with_what_they_lack(ended: RunSummary) -> None:
    lacks = "with one of billing, shipping, also a text that fits none of them"
    lines = closing_lines(replace(ended, labels=("billing", "shipping")))
    assert any(lacks in line for line in lines) and any("--labels auto" in line for line in lines)
    assert not any("fits none" in line for line in closing_lines(ended))
    stored = json.loads(Path(ended.output, "summary.json").read_text()) | {"labels": ["billing", "shipping"]}
    run = replace(read_run(Path(ended.output)), summary=stored)
    assert lacks in Page(run_page(run)).one("section", id="result").text


def test_a_gguf_base_in_other_programs(tiny: TinyRun, tmp_path: Path) -> None:
    file = write_tiny_gguf(tiny_model("llama-tied", num_hidden_layers=2), tmp_path / "it's a.gguf")
    summary = train(tiny.config(tmp_path / "run", model=str(file), max_steps=1))
    arguments = pretrained_arguments(str(file))
    card = (Path(summary.adapter) / "README.md").read_text()
    assert f"from_pretrained({pretrained_arguments(str(file), json.dumps)})" in card
    uses = Page(run_page(read_run(tmp_path / "run"))).one("section", id="result").text
    assert f"AutoModelForCausalLM.from_pretrained({arguments})" in uses
    assert "vllm serve merged" in uses and "--enable-lora" not in uses
    loaded = eval(f"load({arguments})", {"load": transformers.AutoModelForCausalLM.from_pretrained})
    assert isinstance(loaded, torch.nn.Module)
    assert pretrained_arguments("owner/model") == "'owner/model'"
    assert pretrained_arguments("models/A.GGUF") == "'models', gguf_file='A.GGUF'"


def test_compared_probabilities_say_whose_they_are(
    ended: RunSummary, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = AnswerOptions(adapter=Path(ended.adapter), prompt="the user", labels=("one", "for"), compare=True)
    generate_command(GenerateOptions(answer=answer, model=BaseModelOptions(model=str(tiny.model), dtype="float32")))
    said = [line for line in capsys.readouterr().err.splitlines() if " 0." in line]
    assert len(said) == 2
    assert said[0].startswith("base model: ") and said[1].startswith(f"with {ended.adapter}: ")


def test_evaluating_counts_its_rows(
    ended: RunSummary, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through a pipe it is printed every ten seconds, on a terminal next to the spinner."""
    heard: list[str] = []
    before = printing.now()
    real = evaluation.complete_greedily

    def listening(*arguments: Any, on_done: Any, **options: Any) -> Any:
        def done(number: int) -> None:
            on_done(number)
            heard.append(printing.now())

        return real(*arguments, on_done=done, **options)

    monkeypatch.setattr(evaluation, "complete_greedily", listening)
    losses = evaluation.HeldOut.token_losses

    def reported(self: Any, model: Any) -> Any:
        for one in losses(self, model):
            yield one
            heard.append(printing.now())

    monkeypatch.setattr(evaluation.HeldOut, "token_losses", reported)
    run = EvaluateRunOptions(adapter=Path(ended.adapter))
    data = DataOptions(data=(str(tiny.rows),))
    found = evaluate(EvaluateOptions(ModelOptions(model=str(tiny.model), dtype="float32"), data, run))
    assert found.rows == 11
    for who in ("base model", "adapted model"):
        assert f"{who}: losses, 11 of 11 rows" in heard and f"{who}: answers, 11 of 11 rows" in heard
    assert printing.now() == before
    with working("outer"), printing.counting("answers", 3) as done:
        done()
        shown = console(force_terminal=True, width=80)
        shown.print(_Now())
    assert "answers, 1 of 3 rows" in capsys.readouterr().out
