"""The words about pairs: order with its interval, log-probabilities, free answers, and when these got worse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from backhand.options.config import DataOptions, TrainConfig
from backhand.options.config_file import dump_config
from backhand.options.objectives import ObjectiveOptions
from backhand.runs.pair_results import answers_got_worse, chosen_change, held_out_pairs, pair_clauses
from backhand.runs.summary import AnswerLengths, RunSummary
from backhand.training.advice import answer_advice
from backhand.words import mean_interval
from tests.support.tiny_run import with_options

PAIRS = {
    "rewards/accuracies": 1.0,
    "rewards/margins": 2.5,
    "logps/chosen": -31.0,
    "logps/rejected": -190.0,
    "logps/chosen_before": -19.0,
    "logps/rejected_before": -120.0,
}


def lengths(base: float, adapted: float, *, chosen: float = 3.0, cut_off: float = 0.0) -> AnswerLengths:
    return AnswerLengths(
        rows=8,
        limit=64,
        base=base,
        adapted=adapted,
        chosen=chosen,
        rejected=40.0,
        base_cut_off=0.0,
        adapted_cut_off=cut_off,
    )


def test_the_words_name_order_margin_probabilities_and_lengths() -> None:
    order, probabilities, free = pair_clauses(PAIRS, 12, "dpo", lengths(6, 55, cut_off=1.0))
    ordered = "12 of 12 held-out pairs are ordered rightly (95 % interval 76–100 %; half of them by chance)"
    assert order == f"{ordered}, with a mean margin of 2.5 in reward"
    assert "chosen answers fell by 12 nats per answer, that of rejected ones fell by 70" in probabilities
    assert free.startswith("the model's own answers to 8 held-out prompts have a mean of 6 → 55 tokens")
    assert "(0% → 100% of them cut off at 64), chosen answers 3 and rejected answers 40" in free
    assert free.endswith("they got worse")


def test_changes_have_their_interval_over_the_rows() -> None:
    """Student's interval; where it contains 0, the words name no direction, and no advice follows."""

    def line(step: int, chosen: list[float], rejected: list[float]) -> dict[str, object]:
        means = {"eval_logps/chosen": sum(chosen) / 4, "eval_logps/rejected": sum(rejected) / 4}
        rows = {"row_chosen": chosen, "row_rejected": rejected}
        return {"step": step, "eval_loss": 1.0, "eval_rewards/margins": 1.0, **means, **rows}

    records = [
        line(0, [-9.0, -8.0, -7.0, -6.0], [-9.0] * 4),
        line(2, [-9.5, -9.0, -6.0, -7.0], [-13.0, -14.0, -13.0, -14.0]),
    ]
    figures = held_out_pairs(records, 2)
    assert figures is not None and chosen_change(figures) is None
    _, low, high = mean_interval([-0.5, -1.0, 1.0, -1.0])
    (_, words) = pair_clauses(figures, 4, "dpo", None)
    assert words == (
        f"the log-probability of chosen answers changed by -0.375 nats per answer (95 % interval {low:+.3g} to "
        f"{high:+.3g}: too few rows to tell whether it rose or fell), that of rejected ones fell by 4.5 (95 % interval "
        "-5.42 to -3.58)"
    )
    assert chosen_change(PAIRS) == -12.0, "as earlier versions recorded it"


def test_lengths_that_may_have_changed_by_chance_got_no_worse() -> None:
    moved = lengths(6, 55) | {"length_change": (49.0, -4.0, 102.0)}
    assert not answers_got_worse(moved)
    assert answers_got_worse(lengths(6, 55) | {"length_change": (49.0, 20.0, 78.0)})
    *_, free = pair_clauses(PAIRS, 12, "dpo", moved)
    assert "6 → 55 tokens (95 % interval of the change -4 to +102)" in free
    assert free.endswith(": too few to tell whether they got worse")
    *_, slightly = pair_clauses(PAIRS, 12, "dpo", lengths(6, 6) | {"length_change": (0.1, -0.1, 0.3)})
    assert "(95 % interval of the change -0.1 to +0.3)" in slightly
    *_, equal = pair_clauses(PAIRS, 12, "dpo", lengths(6, 6) | {"length_change": (0.0, 0.0, 0.0)})
    assert "6 → 6 tokens (the length of no answer changed)" in equal


def test_without_an_order_the_margin_is_named() -> None:
    (alone,) = pair_clauses({"rewards/margins": 0.4}, 12, "kto", None)
    assert alone == "desirable answers have 0.4 more reward than undesirable ones on average"


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        # Welch: variances 1 and 1/3 of 3 and 4 changes, 3 degrees of freedom, so t = 3.182
        (
            [1.0, 2.0, 3.0],
            [-1.0, 0.0, 0.0, -1.0],
            "0.25 more reward than 4 undesirable ones on average (95 % interval of the difference +0.0446 to +0.455)",
        ),
        (
            [1.0, -1.0, 3.0],
            [2.0, 1.5],
            "0.075 less reward than 2 undesirable ones on average (95 % interval of the difference -0.583 to +0.433:",
        ),
        (
            [2.0],
            [1.0, 0.0],
            "0.15 more reward than 2 undesirable ones on average (too few rows for an interval)",
        ),
        ([2.0, 1.0], [], "no held-out answer is undesirable, so their rewards are not compared"),
        ([0.0, 0.0], [0.0, 0.0], "the same reward as 2 undesirable ones"),
    ],
)
def test_labelled_answers_are_two_samples(good: list[float], bad: list[float], words: str) -> None:
    def line(step: int, *sides: list[float]) -> dict[str, object]:
        means = {name: sum(side) / len(side) for name, side in zip(("chosen", "rejected"), sides, strict=True) if side}
        figures: dict[str, object] = {f"eval_logps/{name}": mean for name, mean in means.items()}
        if len(means) == 2:
            figures["eval_rewards/margins"] = 0.1 * (means["chosen"] - means["rejected"])
        return {"step": step, "eval_loss": 0.5, **figures, "row_chosen": sides[0], "row_rejected": sides[1]}

    figures = held_out_pairs([line(0, [0.0] * len(good), [0.0] * len(bad)), line(2, good, bad)], 2, 0.1)
    assert figures is not None
    order, *probabilities = pair_clauses(figures, 7, "kto", None)
    first = f"{len(good)} desirable held-out answer{'s have' if len(good) > 1 else ' has'} "
    assert order.startswith(f"{first}{words}" if bad else words)
    assert all("of desirable answers" in one and "that of undesirable ones" in one for one in probabilities)


@pytest.mark.parametrize(
    ("answers", "worse"),
    [
        (lengths(6, 55), True),  # six tokens have become 55, and three were chosen
        (lengths(55, 6), False),
        (lengths(30, 30), False),
        (lengths(6, 5), False),
        (lengths(12, 14, chosen=12.0, cut_off=0.5), True),
        (lengths(64, 64, chosen=90.0, cut_off=1.0), False),  # chosen answers do not end within the limit either
    ],
)
def test_free_answers_get_worse_if_they_leave_the_chosen_ones(answers: AnswerLengths, worse: bool) -> None:
    assert answers_got_worse(answers) is worse


def test_figures_come_from_the_step_whose_adapter_is_kept() -> None:
    def line(step: int, margin: float) -> dict[str, float]:
        return {"step": step, "eval_loss": 1.0, "eval_rewards/margins": margin, "eval_logps/chosen": -1.0 - step}

    figures = held_out_pairs([line(0, 0.0), line(2, 3.0), line(4, 1.0)], 2)
    assert figures == {"rewards/margins": 3.0, "logps/chosen": -3.0, "logps/chosen_before": -1.0}
    assert held_out_pairs([{"step": 2, "eval_loss": 1.0}], 2) is None
    ordered = [
        line(step, margin) | {"eval_rewards/accuracies": share}
        for step, margin, share in ((0, -1.0, 0.25), (2, 1.0, 0.75))
    ]
    without_reference = held_out_pairs(ordered, 2)
    assert without_reference is not None
    said = pair_clauses(without_reference, 4, "orpo", None)[0]
    assert said.startswith("3 of 4 held-out pairs are ordered rightly (95 % interval 30–95 %; 1 before the first step)")
    assert said.endswith("a mean margin of 1 (-1 before) in reward")


def advised(
    summary: RunSummary, answers: AnswerLengths | None, run: Path = Path("runs/short"), **options: object
) -> tuple[str, str] | None:
    config = TrainConfig(objective=ObjectiveOptions(objective="dpo"), data=DataOptions(data=("my pairs.jsonl",)))
    config = with_options(config, **{"learning_rate": 2e-4, "epochs": 3, "eval_fraction": None, **options})
    return answer_advice(config, replace(summary, held_out_pairs=PAIRS, free_answers=answers), run)


def test_the_next_step_learns_the_chosen_answers_with_the_pairs(summary: RunSummary) -> None:
    """Two commands, the chosen answers and then the pairs, made chosen answers less probable than the first did."""
    suggested = advised(summary, lengths(6, 55), epochs=4)
    assert suggested is not None and "--objective orpo learns both" in suggested[0]
    assert suggested[1] == (
        "backhand train --model smollm2-135m --data 'my pairs.jsonl' --objective orpo --epochs 4 "
        "--output runs/short-again"
    )
    in_memory = advised(summary, lengths(6, 55), data=("python:0123",), model="base", max_steps=7, batch_rows=8)
    assert in_memory is not None and in_memory[1] == (
        "backhand.train(data=…, model='base', objective='orpo', max_steps=7, batch_rows=8, output='runs/short-again')"
    )
    form = {"rank": 8, "layers_to_transform": (28, 29), "target_modules": ("q_proj", "up_proj"), "use_rslora": True}
    shaped = advised(summary, lengths(6, 55), **form, rank_pattern={"q_proj": 4}, epochs=3)
    assert shaped is not None
    options = " --rank 8 --target-modules q_proj up_proj --rank-pattern q_proj=4 --use-rslora"
    assert f"{options} --layers-to-transform 28 29 --epochs 3 --output runs/short-again" in shaped[1]
    computed = {"quantize": "q8_0", "memory": "6GB", "dtype": "bfloat16", "base": "quantized", "tune_allocator": False}
    same = advised(summary, lengths(6, 55), **computed, schedule="cosine", eval_every=5, seed=3, from_adapter=None)
    assert same is not None
    options = "--dtype bfloat16 --base quantized --quantize q8_0 --no-tune-allocator --memory 6GB"
    further = "--epochs 3 --schedule cosine --eval-every 5 --seed 3"
    assert f"--objective orpo {options} {further} --output runs/short-again" in same[1]
    read = {"prompt": "{a}\n{b}", "columns": {"chosen": "short", "rejected": "long", "system": "rules"}}
    named = advised(summary, lengths(6, 55), **read, max_rows=60, eval_fraction=0.2, skip_bad=True)
    assert named is not None
    options = r"--max-rows 60 --skip-bad --prompt $'{a}\n{b}' --columns chosen=short rejected=long system=rules"
    assert f"--objective orpo {options} --eval-fraction 0.2" in named[1]
    in_memory = advised(
        summary, lengths(6, 55), data=("python:0123",), model="base", eval_data=("python:4",), eval_fraction=0.0, **read
    )
    assert in_memory is not None
    columns = r"columns={'chosen': 'short', 'rejected': 'long', 'system': 'rules'}"
    options = rf"objective='orpo', prompt='{{a}}\n{{b}}', {columns}, eval_data=…"
    assert f"backhand.train(data=…, model='base', {options}" in in_memory[1]
    assert advised(summary, lengths(30, 4)) is None, "near the chosen answers"
    separated = advised(replace(summary, best_eval_loss=0.0003, steps=40), lengths(30, 4))
    assert separated is not None and "chosen answers became less probable by 12 nats: fewer steps" in separated[0]
    assert separated[1] == "backhand train runs/short/config.toml --max-steps 20 --output runs/short-again"
    unchanged = advised(summary, lengths(54, 53))
    assert unchanged is not None and "--objective orpo" in str(unchanged[1])
    assert advised(summary, lengths(64, 64, chosen=200.0, cut_off=1.0)) is None, (
        "longer than the limit, like the chosen"
    )
    assert advised(summary, None) is None
    longer = advised(replace(summary, objective="orpo"), lengths(54, 53), objective="orpo", epochs=3)
    assert longer is not None and longer[1].endswith("config.toml --epochs 6 --output runs/short-again")
    for reason in ({"try_next": "backhand train config.toml --max-steps 20"}, {"stopped_because": "a callback"}):
        known = replace(summary, objective="orpo", **reason)
        assert advised(known, lengths(54, 53), objective="orpo") is None, "its curves ask for another run, or it ended"


def test_a_run_from_an_adapter_is_compared_with_it(summary: RunSummary, tmp_path: Path) -> None:
    """The answers came nearer to the chosen ones than those of the base model, but moved away from the first run's."""
    shorter = lengths(50, 8, chosen=20.0) | {"start": 16.0, "start_cut_off": 0.0}
    assert answers_got_worse(shorter)
    assert not answers_got_worse(lengths(50, 8, chosen=20.0))
    _, probabilities, free = pair_clauses(PAIRS, 12, "dpo", shorter)
    since = "since the adapter that the run started from"
    assert probabilities.endswith(f"that of rejected ones fell by 70 {since}")
    assert f"a mean of 16 → 8 tokens {since} (those of the base model 50), chosen answers 20" in free
    assert free.endswith("they got worse")
    lower = advised(summary, shorter, from_adapter="first")
    assert lower is not None and "a tenth of the rate stays nearer" in lower[0]
    assert "config.toml --from-adapter first --learning-rate 2e-05 " in lower[1]
    resumed = replace(TrainConfig(), run=replace(TrainConfig().run, from_adapter="first"))
    (tmp_path / "config.toml").write_text(dump_config(resumed))
    assert advised(summary, shorter, run=tmp_path, resume=True) == (
        lower[0],
        lower[1].replace("runs/short", str(tmp_path)),
    )
    near = lengths(50, 15, chosen=20.0) | {"start": 16.0, "start_cut_off": 0.0}
    assert advised(summary, near, from_adapter="first") is None
    separated = advised(replace(summary, best_eval_loss=0.0003, steps=40), near, from_adapter="first")
    assert separated is not None and "became less probable by 12 nats: a tenth of the rate" in separated[0]


@pytest.fixture
def summary() -> RunSummary:
    numbers = dict.fromkeys(("train_s", "steps", "skipped_steps", "tokens", "supervised_tokens", "tokens_per_s"), 1)
    more = dict.fromkeys(("peak_rss_bytes", "trained_parameters", "adapted_modules", "rows"), 1)
    texts = dict.fromkeys(("output", "adapter", "model", "engine", "dtype"), "")
    unknown = ("predicted_rss_bytes", "first_loss", "last_loss", "base_eval_loss", "best_eval_loss", "best_step")
    nothing = dict.fromkeys((*unknown, "stopped_because"))
    return RunSummary(**texts, **numbers, **more, **nothing, held_out_rows=12, malformed_rows=0)  # type: ignore[arg-type]
