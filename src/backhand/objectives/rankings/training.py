"""Training of scores of documents and queries: of answers by a decoder, or of a head by an encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from backhand.adapters.classifier_config import padding_id
from backhand.data.data_report import DataReport
from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.data.ranking_examples import RankingFormat, documents_of_texts
from backhand.data.ranking_lint import have_one_target
from backhand.data.rows import INSTRUCTION, RankedTexts
from backhand.data.stored_examples import PreparedData, with_totals
from backhand.engines.decoder_engine import with_hidden_states
from backhand.errors import DataError, UsageError
from backhand.loop.rank import no_instruction
from backhand.loop.ranking_loss import check_targets, pair_format
from backhand.objectives.kinds.answer_loss import HeldOutObjective
from backhand.objectives.kinds.answer_training import answer_losses
from backhand.objectives.kinds.head import class_notes, head_losses, head_scores, starting_head
from backhand.objectives.rankings.loss import CrossEncoderObjective, RankObjective
from backhand.runs.summary import RunSummary
from backhand.training.hooks import KnownModel, KnownRows, Losses, RunContext, Training


class RankTraining(Training):
    """Training of rankings."""

    def with_model(self, model: KnownModel) -> KnownModel:
        instruction = model.config.objective.instruction
        if not model.trains_head:
            return replace(model, text_format=RankingFormat(instruction))
        model.config.check_states()
        if instruction != INSTRUCTION:
            raise no_instruction()
        text_format = pair_format(with_hidden_states(model.engine, "a score head").config, padding_id(model.source))
        return replace(model, text_format=text_format, notes=(*model.notes, *class_notes(model.source)))

    def assumed_rows(self, model: KnownModel, row: Example, count: int) -> PreparedData:
        row = replace(row, supervised=np.arange(len(row)) == len(row) - 1)
        row = replace(row, others=() if model.trains_head else (row,), facts=RankedTexts(0, (0,), (1.0,)))
        return with_totals([row] * count, DataReport()).with_note(documents_of_texts(head=model.trains_head))

    def with_rows(self, rows: KnownRows) -> KnownRows:
        for data in (rows.train, rows.held_out):
            if data is not None:
                check_targets(rows.config.objective, data.examples)
        if have_one_target(rows.train.examples.facts(RankedTexts)):
            raise DataError(
                "all documents of the rows have the same score, so there is nothing to rank",
                why="a model that says yes to everything has a loss of 0",
                next_step="add negatives, which backhand mine --data FILE finds; or train vectors, which need none: "
                "--objective embed",
            )
        head = starting_head(rows) if rows.trains_head else None
        if head is not None and head.outputs > 1:
            raise UsageError(
                f"the head of {head.origin} has {head.outputs} outputs",
                where="from_adapter",
                why="a score head has one",
                next_step="give an adapter of --objective rank, or leave out --from-adapter for a fresh adapter",
            )
        return rows.with_data_note(documents_of_texts(head=rows.trains_head))

    def losses(self, run: RunContext) -> Losses:
        options = run.config.objective

        def ranking(_name: str, packer: RowPacker) -> RankObjective:
            return RankObjective(packer, options=options)

        if not run.inputs.trains_head:
            return answer_losses(run, ranking)
        losses = head_losses(run, lambda packer: CrossEncoderObjective(packer, options=options))
        if options.ranking_loss == "pointwise":
            return losses
        # A softmax over the documents of a query does not change if the same bias is added to all scores.
        names = with_hidden_states(run.inputs.engine, "a score head").config.class_head.parameters
        unused = tuple(name for argument, name in names.items() if argument == "output_bias")
        return losses._replace(not_learned=unused)

    def scores(self, run: RunContext, losses: Losses, summary: RunSummary) -> dict[str, Any]:
        if run.inputs.trains_head:
            return head_scores(run, losses)
        assert isinstance(losses.held_out, HeldOutObjective)
        objective: RankObjective = losses.held_out.objective
        return objective.held_out_scores(run.bound, run.micro_batch_rows, run.start.values)
