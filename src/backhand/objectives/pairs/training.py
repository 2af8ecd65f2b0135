"""Training on pairs of answers, and on answers that are labelled desirable or undesirable."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from backhand.data.data_report import DataReport
from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.data.stored_examples import PreparedData, with_totals
from backhand.errors import not_none
from backhand.objectives.kinds.answer_training import AnswerTraining, answer_losses
from backhand.objectives.kinds.free_answers import FEW_ROWS, FreeAnswers, GeneratedAnswers, free_answers
from backhand.objectives.pairs.loss import KTOObjective, PairObjective, check_answers_differ, mismatched
from backhand.runs.records import MAX_NEW_TOKENS
from backhand.runs.summary import AnswerLengths
from backhand.training.hooks import KnownModel, KnownRows, Losses, RunContext
from backhand.training.reference import packed_sets, reference_sums
from backhand.training.run_inputs import RunInputs
from backhand.training.work import Answers
from backhand.words import mean_interval

_MEASURED_PAIRS = 8
"""Number of pairs whose free answers are measured, if the report shows fewer."""


class _ComparedTraining(AnswerTraining):
    def with_rows(self, rows: KnownRows) -> KnownRows:
        check_answers_differ(rows.train)
        return rows


class PairTraining(_ComparedTraining):
    """Training on pairs. The lengths of free answers are measured."""

    def with_rows(self, rows: KnownRows) -> KnownRows:
        report = super().with_rows(rows).train.report
        if report.documents != 2 * report.rows:
            return rows
        return rows.with_data_note("each row has two documents, with the chosen and with the rejected answer")

    def assumed_rows(self, model: KnownModel, row: Example, count: int) -> PreparedData:
        return with_totals([replace(row, rejected=row)] * count, DataReport())

    def answered_rows(self, inputs: RunInputs) -> tuple[int, int]:
        count = max(inputs.config.run.answers, _MEASURED_PAIRS)
        return count, count

    def end_answers(self, inputs: RunInputs) -> tuple[Answers, ...]:
        answers = super().end_answers(inputs)
        if not answers or inputs.config.run.from_adapter is None:
            return answers
        return *answers, Answers(answers[-1].rows, MAX_NEW_TOKENS, at_least=FEW_ROWS)  # of the base model as well

    def losses(self, run: RunContext) -> Losses:
        options = run.config.objective
        sums = reference_sums(run, packed_sets(run)) if options.traits.has_reference else {}
        return answer_losses(run, lambda name, packer: PairObjective(packer, sums.get(name), options=options))

    def answers(self, run: RunContext, losses: Losses) -> tuple[FreeAnswers, dict[str, Any]]:
        answers = free_answers(
            *(run.bound, run.inputs.source, run.inputs.held_out_examples, run.config),
            start=run.start.values,
            compared_rows=max(run.config.run.answers, _MEASURED_PAIRS),
        )
        return answers, {"same_answer": answers.same, "free_answers": _lengths(answers.generated)}


class LabelledTraining(_ComparedTraining):
    """Training on answers that are labelled desirable or undesirable."""

    def losses(self, run: RunContext) -> Losses:
        options, inputs = run.config.objective, run.inputs
        sets, others = packed_sets(run), {}
        if options.form == "kto":
            for name, (packer, _) in sets.items():
                rows = mismatched(packer.examples, run.config.data.max_length)
                others[name] = RowPacker(rows, share_prefixes=inputs.engine.shares_prefixes)
        sums = reference_sums(run, {**sets, **{f"{name}_others": (packer, None) for name, packer in others.items()}})

        def objective(name: str, packer: RowPacker) -> KTOObjective:
            of_others: Tensor | None = sums.get(f"{name}_others")
            return KTOObjective(
                packer, sums[name], options=options, others=others.get(name), others_reference=of_others
            )

        return answer_losses(run, objective)

    def answers(self, run: RunContext, losses: Losses) -> tuple[FreeAnswers, dict[str, Any]]:
        examples = run.inputs.held_out_examples
        desirable = [example for example in examples if example.desirable]  # an undesirable answer is no reference
        answers = free_answers(
            *(run.bound, run.inputs.source, desirable or examples, run.config), start=run.start.values
        )
        return answers, {"same_answer": answers.same}


def _lengths(generated: GeneratedAnswers) -> AnswerLengths | None:
    """Return the mean lengths of free answers and of the answers in pairs; None if no pair was answered."""
    pairs, base, adapted, started, stops, limit = generated
    if not pairs:
        return None

    def mean(counts: Iterable[int]) -> float:
        return sum(counts) / len(pairs)

    def tokens(example: Example) -> int:
        begin, end = example.last_answer
        return sum(1 for _ in itertools.takewhile(lambda token: token not in stops, example.input_ids[begin:end]))

    def cut_off(answers: Sequence[Sequence[int]]) -> float:
        return mean(len(ids) >= limit for ids in answers)

    lengths = AnswerLengths(
        rows=len(pairs),
        limit=limit,
        base=mean(map(len, base)),
        adapted=mean(map(len, adapted)),
        chosen=mean(map(tokens, pairs)),
        rejected=mean(tokens(not_none(example.rejected)) for example in pairs),
        base_cut_off=cut_off(base),
        adapted_cut_off=cut_off(adapted),
    )
    if started is not None:
        lengths |= {"start": mean(map(len, started)), "start_cut_off": cut_off(started)}
    before = base if started is None else started
    changes = [len(new) - len(old) for old, new in zip(before, adapted, strict=True)]
    lengths["length_change"] = mean_interval(changes) if len(changes) > 1 else None
    return lengths
