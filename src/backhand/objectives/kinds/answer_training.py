"""Runs of a model that answers in text: free answers at their end, and losses of the probabilities of answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from backhand.data.held_out import neutral_prompts
from backhand.data.packing import RowPacker
from backhand.generation.labels import Labels
from backhand.loop.measuring import HeldOut
from backhand.objectives.kinds.answer_loss import AnswerObjective, HeldOutObjective
from backhand.objectives.kinds.free_answers import (
    EXTRA_TOKENS,
    FEW_ROWS,
    MOST_ROWS,
    SHORT_TOKENS,
    FreeAnswers,
    answered_rows,
    are_long,
    free_answers,
    measured_answers,
)
from backhand.runs.directory import ANSWERS
from backhand.runs.records import MAX_NEW_TOKENS
from backhand.runs.summary import RunSummary
from backhand.training.hooks import Losses, RunContext, Training
from backhand.training.run_inputs import RunInputs
from backhand.training.work import Answers, Work


class AnswerTraining(Training):
    """Training of a model that answers in text. Answers to held-out and neutral prompts are generated at the end."""

    def work(self, inputs: RunInputs, rows_per_process: int) -> Work:
        return Work(end_answers=self.end_answers(inputs))

    def end_answers(self, inputs: RunInputs) -> tuple[Answers, ...]:
        """Return the generated answers at the end of a run with held-out rows."""
        config, held_out = inputs.config, inputs.held_out_examples
        if not config.run.answers or not held_out:
            return ()
        # Of each model, one batch has the neutral prompts, whose answers are long. Those of the adapter end like the
        # rows.
        adapted, base = (min(len(held_out), n) + len(neutral_prompts()) for n in self.answered_rows(inputs))
        shown = config.rewards.max_new_tokens if config.objective.traits.samples else longest_answer(inputs)
        return (
            Answers(adapted, min(shown, MAX_NEW_TOKENS), MAX_NEW_TOKENS, FEW_ROWS),
            Answers(base, MAX_NEW_TOKENS, at_least=FEW_ROWS),
        )

    def answered_rows(self, inputs: RunInputs) -> tuple[int, int]:
        """Return the largest number of held-out rows that are answered with the adapter, and with the model before."""
        return answered_rows(inputs.held_out_examples, inputs.config)

    def scores(self, run: RunContext, losses: Losses, summary: RunSummary) -> dict[str, Any] | None:
        if run.processes.stop_requested:
            return None
        answers, fields = self.answers(run, losses)
        run.directory.write(ANSWERS, answers.file(run.config.run.answers))
        fields |= {"neutral_answers": answers.neutral}
        measured = {} if summary.adapted_exact_match is not None else self.matches(run, summary)
        if not measured and run.processes.stop_requested:
            return None
        return fields | measured

    def answers(self, run: RunContext, losses: Losses) -> tuple[FreeAnswers, dict[str, Any]]:
        """Return the answers, and fields of summary.json on them."""
        answers = free_answers(
            *(run.bound, run.inputs.source, run.inputs.held_out_examples, run.config), start=run.start.values
        )
        return answers, {"same_answer": answers.same}

    def matches(self, run: RunContext, summary: RunSummary) -> dict[str, Any]:
        """Return fields of summary.json on the rows' own answers, if the model should give these."""
        return {}


def answer_losses(
    run: RunContext,
    made: Callable[[str, RowPacker], AnswerObjective],
    held_out: Callable[..., HeldOut] = HeldOutObjective,
) -> Losses:
    """Return the losses of objectives of answers.

    Args:
        made: makes the objective of a set of rows, `train` or `held_out`.
        held_out: class of the held-out rows.
    """
    train, packer = made("train", run.inputs.packer), run.inputs.held_out_packer
    if packer is None:
        return Losses(train)
    return Losses(train, held_out(made("held_out", packer), run.micro_batch_rows, run.caches.held_out))


def exact_match(run: RunContext, summary: RunSummary, labels: Labels) -> dict[str, Any]:
    """Return fields of summary.json on exact match; empty if an answer is long or a signal stopped the measurement.

    Args:
        labels: the labels of the training rows; empty if these have none.
    """
    return measured_answers(
        *(run.bound, run.inputs.source, run.inputs.held_out_examples, run.config, labels, summary.tokens),
        *(lambda: run.processes.stop_requested, run.start.values),
    )


def longest_answer(inputs: RunInputs) -> int:
    """Return the number of tokens of the longest held-out answer."""
    return int(inputs.held_out_examples.column("supervised").max(initial=0))


def exact_match_work(inputs: RunInputs) -> tuple[float, tuple[Answers, ...]]:
    """Return the number of evaluations over the held-out rows, and the answers, that `exact_match` computes.

    Losses, prompts and free answers are those of both models. Answers to texts end at the first difference.
    """
    held_out, longest = inputs.held_out_examples, longest_answer(inputs)
    if not held_out or not inputs.config.run.answers or longest > SHORT_TOKENS:
        return 0.0, ()
    rows, texts = min(len(held_out), MOST_ROWS), are_long(held_out.column("supervised").tolist())
    tokens = _EQUAL_TOKENS if texts else longest + EXTRA_TOKENS
    return (_OF_TEXTS if texts else _OF_LABELS) * rows / len(held_out), (Answers(rows, 2 * tokens),)


_OF_TEXTS, _OF_LABELS = 3, 5
"""Exact match of both models in evaluations: losses and prompts, and the probabilities of labels."""
_EQUAL_TOKENS = 4
"""Tokens after which a generated text differs from the row's own. Of labels, all tokens may be equal."""
