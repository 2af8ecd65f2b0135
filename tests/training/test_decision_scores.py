"""Scores of decisions against scikit-learn, and temperatures against known ones."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, f1_score, log_loss

from backhand.data.decisions import Asked, DecisionRow, Question
from backhand.loop.decide import about_score
from backhand.loop.decision_scores import (
    RESAMPLES,
    Outcome,
    answer_counts,
    expected_calibration_error,
    fit_temperatures,
    score_questions,
    thresholds,
)
from backhand.runs.label_results import decision_clause, soft_target_words
from backhand.words import share_interval

KEYS = ("a", "b", "c")
QUESTION = Question("team", "choice", "", KEYS, (None,) * 3)


def drawn(rows: int, sharpness: float, seed: int = 0) -> list[Outcome]:
    """Rows whose answers are drawn from softmax(scores / sharpness)."""
    draw = np.random.default_rng(seed)
    outcomes = []
    for number in range(rows):
        scores = 3 * draw.normal(size=3)
        p = np.exp(scores / sharpness)
        answer = draw.choice(3, p=p / p.sum())
        outcomes.append(Outcome(QUESTION, scores, np.eye(3)[answer], f"rows:{number}"))
    return outcomes


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 2.5])
def test_the_temperature_of_drawn_answers_is_found(sharpness: float) -> None:
    (temperature,) = fit_temperatures(drawn(6000, sharpness)).values()
    assert temperature == pytest.approx(sharpness, rel=0.06)


def test_the_temperature_minimizes_the_loss_with_one_more_answer_drawn_from_all_options() -> None:
    outcomes = drawn(60, 1.8)
    fitted = fit_temperatures(outcomes)
    smoothed = [one._replace(targets=(60 * one.targets + 1 / 3) / 61) for one in outcomes]
    best = score_questions(smoothed, fitted)["team"].nll
    for factor in (0.97, 1.03):
        other = {kind: factor * temperature for kind, temperature in fitted.items()}
        assert score_questions(smoothed, other)["team"].nll > best


def test_every_type_has_its_own_temperature() -> None:
    cold = drawn(3000, 0.5)
    scored = Question("mood", "score", "", ("0", "1", "2"), KEYS)
    hot = [one._replace(question=scored) for one in drawn(3000, 2.0, seed=1)]
    found = fit_temperatures([*cold, *hot])
    assert found["choice"] == pytest.approx(0.5, rel=0.1) and found["score"] == pytest.approx(2.0, rel=0.1)


def test_temperatures_are_bounded() -> None:
    right = [one._replace(targets=np.eye(3)[one.scores.argmax()]) for one in drawn(20, 1.0)]
    wrong = [one._replace(targets=np.eye(3)[one.scores.argmin()]) for one in right]
    assert fit_temperatures(wrong)["choice"] == pytest.approx(4)
    assert fit_temperatures(right * 50)["choice"] == pytest.approx(0.25)


@pytest.mark.parametrize("rows", [20, 100])
def test_rows_that_are_all_right_leave_the_doubt_of_one_answer(rows: int) -> None:
    right = [Outcome(QUESTION, np.array([5.0, 0.0, 0.0]), np.eye(3)[0], "row")] * rows
    p = right[0].probabilities(fit_temperatures(right)["choice"])
    assert p[0] == pytest.approx((rows + 1 / 3) / (rows + 1))


def test_scores_equal_those_of_scikit_learn() -> None:
    outcomes = drawn(300, 1.4)
    score = score_questions(outcomes, {"choice": 1.3})["team"]
    p = np.stack([one.probabilities(1.3) for one in outcomes])
    answers = np.array([one.targets.argmax() for one in outcomes])
    assert score.accuracy == (p.argmax(1) == answers).mean()
    assert score.accuracy_interval == share_interval(score.accuracy, 300)
    assert score.majority == np.bincount(answers).max() / 300
    assert score.nll == pytest.approx(log_loss(answers, p))
    assert score.f1_macro == pytest.approx(f1_score(answers, p.argmax(1), average="macro"))
    of_options = [brier_score_loss(answers == option, p[:, option]) for option in range(3)]
    assert score.brier == pytest.approx(sum(of_options))
    low, high = score.ece_interval
    assert low < high and low < score.ece + 0.02
    assert [point["rows"] for point in score.reliability] == [30] * 10
    confidences = [point["confidence"] for point in score.reliability]
    assert confidences == sorted(confidences)


def test_the_calibration_error_of_rows_that_are_all_right_has_an_interval() -> None:
    """Resampled rows are all right as well, which says nothing about the rows that may be wrong."""
    outcomes = [one for one in drawn(400, 1.0) if one.probabilities(0.1).argmax() == one.targets.argmax()][:12]
    score = score_questions(outcomes, {"choice": 0.1})["team"]
    assert score.accuracy == 1 and score.ece < 0.1
    low, high = score.ece_interval
    mean = 1 - score.ece
    assert low == 0 and high == pytest.approx(mean - share_interval(1.0, 12)[0]) and high > 0.15


def test_the_calibration_error_of_other_rows_has_their_confidence() -> None:
    """The interval of 1,000 right rows contains the error of their mean confidence, about 0.009."""
    outcomes = [one for one in drawn(4000, 1.0) if one.probabilities(1.0).argmax() == one.targets.argmax()][:1000]
    score = score_questions(outcomes, {})["team"]
    half = 1.96 * float(np.std([one.probabilities(1.0).max() for one in outcomes])) / 1000**0.5
    low, high = score.ece_interval
    assert score.accuracy == 1 and high == pytest.approx(score.ece + half, rel=0.02)
    assert low == pytest.approx(score.ece - half, rel=0.02)


@pytest.mark.parametrize(("rows", "temperature", "calibrated"), [(21, 1.0, True), (400, 1.0, True), (400, 0.3, False)])
def test_the_interval_of_the_calibration_error_contains_it(rows: int, temperature: float, calibrated: bool) -> None:
    """The errors of resampled rows are larger than those of the rows, whose own error is itself too large."""
    score = score_questions(drawn(rows, 1.0), {"choice": temperature})["team"]
    low, high = score.ece_interval
    assert 0 < score.accuracy < 1 and low <= score.ece <= high and (low == 0) is calibrated


def test_the_interval_of_the_calibration_error_is_that_of_resampled_rows() -> None:
    """Resampled rows may end a bin between two copies of a row, and the numbers of rows per bin differ by one."""
    outcomes = [one._replace(targets=np.roll(one.targets, number % 3)) for number, one in enumerate(drawn(57, 1.0))]
    score = score_questions(outcomes, {})["team"]
    p = np.stack([one.probabilities(1.0) for one in outcomes])
    order = np.argsort(p.max(1), kind="stable")
    confidence = p.max(1)[order]
    hits = np.array([one.targets[one.scores.argmax()] for one in outcomes])[order]
    draw = np.random.Generator(np.random.Philox(0))
    picks = [draw.integers(57, size=57) for _ in range(RESAMPLES)]
    errors = [expected_calibration_error(confidence[pick], hits[pick]) for pick in picks]
    least, most = np.quantile(errors, [0.025, 0.975])
    parts = [np.abs(confidence[part].sum() - hits[part].sum()) for part in np.array_split(np.arange(57), 10)]
    assert score.ece == pytest.approx(sum(parts) / 57)
    assert score.ece_interval == pytest.approx((2 * score.ece - most, 2 * score.ece - least))


def test_the_calibration_error_of_calibrated_rows_is_small() -> None:
    outcomes = drawn(20_000, 1.0)
    scores = {temperature: score_questions(outcomes, {"choice": temperature})["team"] for temperature in (1.0, 0.4)}
    assert scores[1.0].ece < 0.012 < 0.08 < scores[0.4].ece


def test_the_calibration_error_of_a_known_case() -> None:
    """Two bins of five rows would hide it; ten bins of one row each show |1 - 0.8| and |0 - 0.8|."""
    confidence, hits = np.full(10, 0.8), np.array([1.0] * 8 + [0.0] * 2)
    assert expected_calibration_error(confidence, hits) == pytest.approx(0.8 * 0.2 + 0.2 * 0.8)


def test_a_constant_model_is_named() -> None:
    outcomes = [one._replace(scores=np.array([2.0, 1.0, 0.0])) for one in drawn(50, 1.0)]
    score = score_questions(outcomes, {})["team"]
    assert score.constant and score.accuracy <= score.majority


def test_the_threshold_of_an_accuracy_has_the_largest_coverage() -> None:
    """The 80 confident rows are right in 95 %, the 20 others in half. Only the first 15 are all right."""
    confidence = np.concatenate([np.linspace(0.99, 0.91, 80), np.linspace(0.6, 0.5, 20)])
    hits = np.array([1.0] * 15 + [0.0] * 2 + [1.0] * 61 + [0.0] * 2 + [0.0, 1.0] * 10)
    wanted = {point["wanted"]: point for point in thresholds(confidence, hits)}
    assert hits.mean() == 0.86 and [*wanted] == [0.9, 0.95, 0.99]  # all rows together reach 80 %
    assert wanted[0.95]["accuracy"] >= 0.95 and wanted[0.95]["threshold"] == pytest.approx(0.91, abs=0.003)
    assert wanted[0.9]["coverage"] > wanted[0.95]["coverage"] > wanted[0.99]["coverage"] == 0.15
    for point in wanted.values():
        decided = confidence >= point["threshold"]
        assert hits[decided].mean() == point["accuracy"] >= point["wanted"] and decided.mean() == point["coverage"]
        assert point["accuracy_interval"] == [*share_interval(point["accuracy"], int(decided.sum()))]


def test_rows_of_equal_confidence_are_on_the_same_side_of_a_threshold() -> None:
    assert thresholds(np.array([0.9] * 40 + [0.5] * 10), np.array([1.0] * 30 + [0.0] * 20)) == []


def test_few_rows_have_no_threshold() -> None:
    assert thresholds(np.linspace(0.9, 0.5, 20), np.array([1.0] * 5 + [0.0] * 15)) == []


def test_the_coverage_ends_with_all_rows() -> None:
    score = score_questions(drawn(500, 1.0), {})["team"]
    assert score.coverage[-1]["coverage"] == 1 and score.coverage[-1]["accuracy"] == pytest.approx(score.accuracy)


def test_surprises_are_the_least_probable_answers() -> None:
    outcomes = drawn(100, 1.0)
    score = score_questions(outcomes, {})["team"]
    of_answers = sorted(float(one.probabilities(1.0)[one.targets.argmax()]) for one in outcomes)
    assert [one["probability"] for one in score.surprises] == pytest.approx(of_answers[:5])


def test_soft_targets_bound_the_accuracy_and_the_loss() -> None:
    votes = [np.array(shares) for shares in ((0.7, 0.3, 0.0), (0.5, 0.25, 0.25), (0.1, 0.9, 0.0))]
    perfect = [Outcome(QUESTION, np.log(np.maximum(one, 1e-300)), one, f"rows:{n}") for n, one in enumerate(votes)]
    score = score_questions(perfect, {})["team"]
    assert score.accuracy == score.ceiling == pytest.approx(2.1 / 3)
    entropy = -sum(float(p) * np.log(p) for one in votes for p in one if p) / 3
    assert [score.nll, score.nll_floor] == pytest.approx([entropy, entropy])
    assert score.majority == pytest.approx((0.3 + 0.25 + 0.9) / 3)  # of the option with the most votes, b
    assert score.constant_scores == pytest.approx([0.3, 0.25, 0.9])
    words = soft_target_words(score.to_json())
    assert "at most 70.0% can be right" in words and f"{score.nll_floor:.4f}" in words
    assert any(words in line for line in about_score("team", score))


def test_certain_answers_have_no_bounds() -> None:
    score = score_questions(drawn(40, 1.0), {})["team"]
    assert (score.ceiling, score.nll_floor, soft_target_words(score.to_json())) == (1.0, 0.0, "")


def test_equal_options_and_answers_that_are_never_given_are_said() -> None:
    right, given = [0] * 6 + [1] * 6 + [2] * 2, [0, 1] * 7
    outcomes = [Outcome(QUESTION, np.eye(3)[g], np.eye(3)[key], "row") for g, key in zip(given, right, strict=True)]
    score = score_questions(outcomes, {})["team"]
    clause = decision_clause("team", None, score.to_json())
    assert score.ties == 0 and "equal:" not in clause and "; never given: 'c' (2 rows)" in clause
    assert "team: never given: 'c' (2 rows)" in about_score("team", score)
    score = score_questions([outcomes[0]._replace(scores=np.array([2.0, 1.0, 2.0])), *outcomes], {})["team"]
    said = "the two most probable answers are equal: 1 row; the first one is given"
    assert score.ties == 1 and f"team: {said}" in about_score("team", score)
    assert f"; {said}" in decision_clause("team", None, score.to_json())


def test_answers_are_compared_with_the_most_frequent_one_of_the_training_rows() -> None:
    """The split of balanced rows makes the rarer answer of the training rows the more frequent one held out."""
    rows = [DecisionRow("", (Asked(QUESTION, tuple(np.eye(3)[key])),), "row") for key in (0, 1, 1, 2)]
    held_out = [Outcome(QUESTION, np.eye(3)[key], np.eye(3)[key], "row") for key in [0] * 14 + [1] * 3 + [2] * 3]
    wrong = [one._replace(scores=np.eye(3)[2]) for one in held_out]
    usual = answer_counts(rows)
    assert usual == {"team": {"a": 1, "b": 2, "c": 1}}
    base, adapted = (score_questions(outcomes, {}, usual=usual)["team"] for outcomes in (wrong, held_out))
    assert (adapted.majority, adapted.majority_answer) == (0.15, "b")
    figures = adapted.compared_with(base).to_json()
    clause = decision_clause("team", base.to_json(), figures)
    assert "; 15.0% by always answering 'b', the most frequent answer of the training rows)" in clause
    assert "clearly better than the base model (+85.0" in clause and " and a constant answer (+85.0" in clause
    shares = np.array([1 + 1 / 3, 2 + 1 / 3, 1 + 1 / 3]) / 5
    losses = [-np.log(shares[key]) for key in [0] * 14 + [1] * 3 + [2] * 3]
    assert adapted.constant_nll == pytest.approx(np.mean(losses)) and adapted.nll_change is not None
    assert adapted.nll_change[0] == pytest.approx(adapted.nll - adapted.constant_nll)
    said = f"; the loss is {adapted.nll:.4f}, and {adapted.constant_nll:.4f} by always giving the answers' shares of "
    assert f"{said}the training rows (difference -" in clause and "95 % interval -" in clause
    unknown = score_questions(held_out, {})["team"].compared_with(base).to_json()
    assert unknown["constant_nll"] < adapted.constant_nll, "of their own shares"
    assert unknown["majority"] == 0.7
    words = decision_clause("team", base.to_json(), unknown | {"gain_over_constant": (0.3, -0.1, 0.7)})
    assert "70.0% by the most frequent answer): that is clearly better than the base model (+85.0 points" in words
    assert (
        ", but not clearly better than a constant answer (+30.0" in words and "20 rows are too few to be sure" in words
    )
