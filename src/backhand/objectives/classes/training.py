"""Training of a classification head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from backhand.adapters.classifier_config import padding_id
from backhand.data.class_examples import ClassFormat
from backhand.data.data_report import DataReport
from backhand.data.examples import Example
from backhand.data.rows import ClassLabel
from backhand.data.stored_examples import PreparedData, with_totals
from backhand.engines.decoder_engine import with_hidden_states
from backhand.errors import UsageError
from backhand.loop.class_scores import add_texts
from backhand.nn.decoder.adapted_group import HEAD
from backhand.objectives.classes.labels import with_labels
from backhand.objectives.classes.loss import ClassifyObjective
from backhand.objectives.kinds.head import class_notes, head_losses, head_scores, starting_head
from backhand.runs.summary import RunSummary
from backhand.training.hooks import KnownModel, KnownRows, Losses, RunContext, Training


class ClassifyTraining(Training):
    """Training of a classification head."""

    def with_model(self, model: KnownModel) -> KnownModel:
        source, engine = model.source, model.engine
        decoder = with_hidden_states(engine, "a classification head needs the hidden states of the model").config
        if any(name.startswith(HEAD) for name in model.layout.names):
            raise UsageError(
                f"the adapter trains {HEAD}, which a classification head does not depend on",
                where="target_modules",
                next_step="leave it out of the adapter",
            )
        if source.wrapper is not None:
            raise UsageError(
                f"a classification head of a {source.wrapper.model_type} model is not supported",
                where="model",
                why="the class of the whole model and that of its text model have other names for the head",
                next_step="choose a text model, or train answers with --objective decide",
            )
        text_format = ClassFormat(decoder.class_head.pooling, padding_id(source), model.config.objective.problem_type)
        outputs = len(model.config.objective.class_labels) or 1
        return replace(model, text_format=text_format, outputs=outputs, notes=(*model.notes, *class_notes(source)))

    def assumed_rows(self, model: KnownModel, row: Example, count: int) -> PreparedData:
        last = np.arange(len(row)) == len(row) - 1
        return with_totals([replace(row, supervised=last, facts=ClassLabel("0"))] * count, DataReport())

    def with_rows(self, rows: KnownRows) -> KnownRows:
        objective, unlearned, notes = with_labels(
            *(rows.config.objective, rows.train, rows.held_out, starting_head(rows)), are_sample=rows.are_sample
        )
        config = replace(rows.config, objective=objective)
        outputs = len(objective.class_labels) or 1
        return replace(rows, config=config, outputs=outputs, unlearned_rows=unlearned, notes=(*rows.notes, *notes))

    def losses(self, run: RunContext) -> Losses:
        return head_losses(run, lambda packer: ClassifyObjective(packer, options=run.config.objective))

    def scores(self, run: RunContext, losses: Losses, summary: RunSummary) -> dict[str, Any]:
        scores = head_scores(run, losses)
        add_texts(scores, run.inputs.held_out_examples)
        return scores
