"""Scores of pairs: how often a model prefers the chosen answer, and its change by an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from backhand.data.packing import RowPacker
from backhand.distributed.communicator import Communicator
from backhand.errors import not_none
from backhand.generation.loading import LoadedModel
from backhand.loop.evaluate import EvaluationRows, Score
from backhand.loop.objective import means
from backhand.loop.row_passes import document_sums
from backhand.objectives.pairs.loss import PairObjective
from backhand.options.command_options import EvaluateRunOptions
from backhand.options.objectives import ObjectiveOptions
from backhand.printing import counting
from backhand.runs.pair_results import ROW_ANSWERS, change_bounds
from backhand.words import share_interval


def compared(
    loaded: LoadedModel, rows: EvaluationRows, run: EvaluateRunOptions, scores: Sequence[Score]
) -> list[Score]:
    """Return the scores of the base model and, if present, of the adapted model with `Score.pairs` filled in."""
    packer = RowPacker(rows.pairs, share_prefixes=loaded.model.shares_prefixes)
    with_pairs: list[Score] = []
    reference: Tensor | None = None
    by_row: list[Mapping[str, Tensor]] = []
    for number, one in enumerate(scores):
        loaded.model.use_adapter(bool(number))
        every = range(len(rows.pairs))
        with counting(f"{'adapted' if number else 'base'} model: pairs", len(every)) as done:
            sums = not_none(
                document_sums(loaded.model, packer, every, run.micro_batch_rows, Communicator(), on_row=done)
            )
        objective = PairObjective(packer, sums if reference is None else reference, options=ObjectiveOptions("dpo"))
        result = objective.of_sums(every, sums)
        measured = means([result.measured])
        by_row.append(result.by_row)
        shown = {name: value for name, value in measured.items() if number or name.startswith("logps/")}
        interval = None
        if number:
            interval = share_interval(shown["rewards/accuracies"], len(rows.pairs))
            before, after = by_row
            shown |= change_bounds([(before[name].tolist(), after[name].tolist()) for name in ROW_ANSWERS])
        with_pairs.append(replace(one, pairs=shown, pairs_interval=interval))
        reference = sums if reference is None else reference
    return with_pairs
