"""Model, adapter layout, rows and steps of a run, and the learning rate that follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from backhand.adapters.base_facts import BaseFacts
from backhand.data.packing import RowPacker, Sampler
from backhand.data.stored_examples import PreparedData, StoredExamples, stored
from backhand.engines.engine import Engine
from backhand.loop.forgetting import ForgettingMeter
from backhand.loop.step_plan import chosen_rate
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout
from backhand.options.config import OptimizationOptions, TrainConfig

_MATRICES_IN_SCALE = 8


@dataclass(frozen=True)
class RunInputs:
    """Model, adapter layout, rows and steps of a run."""

    config: TrainConfig  # with the adapter's final configuration; other options may still be open
    source: ModelSource
    engine: Engine
    layout: AdapterLayout
    train: PreparedData
    held_out: PreparedData | None
    packer: RowPacker  # of the training rows
    held_out_packer: RowPacker | None  # of the held-out rows
    sampler: Sampler  # assigns training rows to steps
    total_steps: int
    neutral: ForgettingMeter  # without texts if forgetting is not measured
    notes: tuple[str, ...]  # messages for the user
    trains_head: bool  # a head on hidden states is trained with the adapter
    base_facts: BaseFacts  # computed when the base's tensors are read
    unlearned_rows: int = 0  # held-out rows with labels that no training row has

    @property
    def held_out_examples(self) -> StoredExamples:
        """The held-out rows, or no rows."""
        return stored(()) if self.held_out is None else self.held_out.examples

    def learning_rate(self, options: OptimizationOptions) -> tuple[float, str | None]:
        """Return the learning rate under these options, and the reason for it, or None if it was given."""
        return chosen_rate(options, self.config.objective, self.total_steps, self.weight_scale)

    def weight_scale(self) -> float:
        """Return `weight_scale` of the adapted matrices."""
        return weight_scale(scaled_matrices(self.source, self.layout), self.base_facts)


def weight_scale(inputs: Mapping[str, int], base_facts: BaseFacts) -> float:
    """Return rms(W) √in, the geometric mean over matrices; 1 if there are none.

    If the entries of W are independent of x, rms(W) √in is rms(W x) / rms(x).

    Args:
        inputs: number of inputs per matrix, by its name in the base's file.
        base_facts: mean squares of the base's tensors.
    """
    squares = ((base_facts.mean_square(name), size) for name, size in inputs.items())
    logs = [0.5 * math.log(max(square, 1e-12) * size) for square, size in squares]
    return math.exp(sum(logs) / max(1, len(logs)))


def scaled_matrices(source: ModelSource, layout: AdapterLayout) -> dict[str, int]:
    """Map the names of the matrices in `RunInputs.weight_scale`, a few from the middle, to their number of inputs."""
    stored = set(source.tensor_names())
    inputs = [(name, slot.in_features) for slot in layout.slots if (name := f"{slot.name}.weight") in stored]
    first = max(0, (len(inputs) - _MATRICES_IN_SCALE) // 2)
    return dict(inputs[first : first + _MATRICES_IN_SCALE])
