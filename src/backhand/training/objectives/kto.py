"""KTO: answers that are desirable or not. What the model says of others' answers is the yardstick of a step.

    z₀ = max(0, mean over the step's rows of Σ log π(y'|x) - log π_ref(y'|x))

with x of the row and y' the answer of the row before it in the data (of the first row the last one's), which rows hold
it and in what order a step comes to them decides nothing: so π_ref(y'|x) is computed once in a run. TRL turns the
answers within each batch, whose rows stay together in all epochs; of one batch that holds all rows it is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.errors import present
from backhand.ops.kto import KTORule, kto_backward, kto_forward
from backhand.training.engine import Trainable
from backhand.training.objectives.objective import Documents, Objective, RowLosses, document_sums
from backhand.training.objectives.options import ObjectiveOptions
from backhand.training.step import Processes


def mismatched(examples: Sequence[Example], max_length: int) -> Iterator[Example]:
    """Each row's prompt with the answer of the row before it, at most so many tokens; never without an answer."""
    before = examples[-1]
    for example in examples:
        prompt, begin = min(example.prompt_tokens, max_length - 1), before.prompt_tokens
        room = max_length - prompt
        ids = np.concatenate((example.input_ids[:prompt], before.input_ids[begin : begin + room]))
        supervised = np.concatenate((np.zeros(prompt, dtype=np.bool_), before.supervised[begin : begin + room]))
        yield replace(example, input_ids=ids, supervised=supervised)
        before = example


@dataclass
class KTOObjective(Objective):
    """The loss of labelled answers."""

    options: ObjectiveOptions = field(default_factory=ObjectiveOptions)  # its numbers
    others: RowPacker | None = None  # of the mismatched answers; None for `apo_zero_unpaired`, which does without
    others_reference: Tensor | None = None  # their s under the model that the run starts from
    kl: float = 0.0  # z₀ of the rows that come next

    def before(self, model: Trainable, rows: Sequence[int], processes: Processes, micro_batch_rows: int) -> None:
        """Measure z₀ of the rows that come next, without gradients."""
        if self.others is None:
            return
        sums = present(document_sums(model, self.others, rows, micro_batch_rows, processes))
        self.kl = max(0.0, float((sums - present(self.others_reference)[list(rows)]).mean()))

    def losses(self, rows: Sequence[int], documents: Documents) -> RowLosses:
        """See `Objective.losses`."""
        options, examples = self.options, self.packer.examples
        desirable = torch.tensor([bool(examples[row].desirable) for row in rows], dtype=torch.bool)
        ratios = documents.sums - present(documents.reference)
        rule = KTORule(options.strength, options.desirable_weight, options.undesirable_weight)
        losses, saved = kto_forward(ratios, desirable, torch.tensor(self.kl, dtype=torch.float64), rule)
        (d_sums,) = kto_backward(torch.ones_like(losses), saved)
        measured = {"kl": (self.kl * len(rows), len(rows))}
        for name, which in (("chosen", desirable), ("rejected", ~desirable)):
            measured[f"rewards/{name}"] = (float(options.strength * ratios[which].sum()), int(which.sum()))
            measured[f"logps/{name}"] = (float(documents.sums[which].sum()), int(which.sum()))
        return RowLosses(losses, d_sums, measured)
