"""Training on questions with a fixed set of answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from backhand.data.decisions import DecisionRow
from backhand.data.packing import RowPacker
from backhand.data.stored_examples import PreparedData
from backhand.errors import UsageError
from backhand.loop.decision_scores import answer_counts, fit_temperatures
from backhand.objectives.decisions.loss import Decided, DecideObjective, HeldOutQuestions, decision_figures
from backhand.objectives.kinds.answer_training import AnswerTraining, answer_losses
from backhand.objectives.kinds.free_answers import FreeAnswers, HeldOutAnswer, free_answers, rows_to_show
from backhand.runs.records import MAX_NEW_TOKENS
from backhand.training.hooks import KnownRows, Losses, RunContext
from backhand.training.run_inputs import RunInputs
from backhand.training.work import Answers, Work
from backhand.words import name_list


class DecideTraining(AnswerTraining):
    """Training on decisions. The answers shown are the options, and only neutral prompts are answered in text."""

    def with_rows(self, rows: KnownRows) -> KnownRows:
        smoothing = rows.config.objective.label_smoothing
        if smoothing:
            _check_temperatures(smoothing, rows.train, rows.held_out)
        return rows

    def work(self, inputs: RunInputs, rows_per_process: int) -> Work:
        shown = bool(inputs.config.run.answers)
        return Work(end_evaluations=2.0 * shown, end_answers=(Answers(1, 2 * MAX_NEW_TOKENS),) * shown)

    def losses(self, run: RunContext) -> Losses:
        smoothing = run.config.objective.label_smoothing
        usual = answer_counts(run.inputs.packer.examples.facts(DecisionRow))

        def objective(name: str, packer: RowPacker) -> DecideObjective:
            if name == "train":
                return DecideObjective(packer, label_smoothing=smoothing)
            return DecideObjective(packer, usual=usual)

        return answer_losses(run, objective, HeldOutQuestions)

    def answers(self, run: RunContext, losses: Losses) -> tuple[FreeAnswers, dict[str, Any]]:
        held_out, start = losses.held_out, run.start.values
        assert isinstance(held_out, HeldOutQuestions)
        decisions = held_out.objective.held_out_outcomes(run.bound, run.micro_batch_rows, start)
        answers = free_answers(run.bound, run.inputs.source, (), run.config, start=start)
        shown = decided_answers(decisions, run.config.run.answers)
        return replace(answers, held_out=shown), decision_figures(decisions, held_out.objective.usual)


def _check_temperatures(label_smoothing: float, train: PreparedData, held_out: PreparedData | None) -> None:
    """Raise UsageError unless held-out rows ask every type of question, which has a temperature of its own."""
    missing = _question_types(train) - _question_types(held_out)
    if missing:
        only = "" if held_out is None else f" with a question of the type {name_list(sorted(missing))}"
        raise UsageError(
            f"label_smoothing {label_smoothing} makes probabilities too even",
            where="label_smoothing",
            why=f"the temperature that corrects them is fitted to held-out rows, and there are none{only}",
            next_step="give eval_data or eval_fraction as well, or leave out label_smoothing"
            if held_out is None
            else "hold out rows with all types of questions, by eval_data, or leave out label_smoothing",
        )


def _question_types(data: PreparedData | None) -> set[str]:
    rows = () if data is None else data.examples.facts(DecisionRow)
    return {asked.question.type for row in rows for asked in row.asked}


def decided_answers(decisions: Decided, count: int) -> tuple[HeldOutAnswer, ...]:
    """Return the decisions of base and adapter on up to `count` questions of rows, about half of them mistakes.

    The temperatures are fitted to the outcomes of the adapter.
    """
    rows, base, adapted = decisions
    prompts = [one.question.prompt(row.state, one.question.canonical_order) for row in rows for one in row.asked]
    temperatures = fit_temperatures(adapted)
    answers = []
    for prompt, before, after in zip(prompts, base, adapted, strict=True):
        names = after.question.option_names
        p = before.probabilities(1.0), after.probabilities(temperatures.get(after.question.type, 1.0))
        reference, of_base, of_adapted = (names[int(one.argmax())] for one in (after.targets, *p))
        base_p, adapted_p = (dict(zip(names, one.tolist(), strict=True)) for one in p)
        answers.append(
            HeldOutAnswer(
                *(after.source, prompt, ((prompt, False),), reference, of_base, of_adapted),
                base_p=base_p,
                adapted_p=adapted_p,
            )
        )
    numbers = rows_to_show([one.reference for one in answers], [one.adapted for one in answers], count)
    return tuple(answers[number] for number in numbers)
