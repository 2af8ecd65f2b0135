"""Options of the sine experiment: everything that is fixed in the original script, and the files to write.

This file imports no torch, because the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from backhand.bounds import Bound, Count, CountFromZero, Options, Positive, Seed, several
from backhand.errors import UsageError

SineDType = Literal["float32", "float64"]


# A rank above any layer's size is a mistake, and its arrays could exceed the memory.
SineRank = Annotated[int, Bound(at_least=1, at_most=4096)]


@dataclass(frozen=True)
class ShiftedTargetOptions(Options):
    """The second experiment: an adapter on a square hidden layer for a target that the base has not learned."""

    shifted: bool = True
    """Also run the second experiment: a base with two hidden layers learns `target`, then adapters of several ranks on
    its square layer, and that whole layer, learn `shifted_target`."""

    shifted_target: str = "sin4"
    """Target of the adapters, named as in `target`."""

    shifted_widths: Annotated[tuple[Count, ...], several(at_least=2)] = (64, 64)
    """Hidden units of each layer. The adapter is on the weight between the first two layers."""

    shifted_ranks: Annotated[tuple[SineRank, ...], several()] = (1, 2, 4, 8)
    """Ranks to compare. A full update of the same layer is always compared as well."""

    shifted_scaling: Positive = 2.0
    """Scaling of the low-rank product, the same for every rank, as in the first experiment."""

    shifted_seeds: Annotated[int, Bound(at_least=2)] = 5
    """Number of repetitions, each with another base. The table shows mean and spread."""

    shifted_base_epochs: Count = 2000
    """Epochs of Adam for the base, with a learning rate that falls linearly to 0."""

    shifted_epochs: Count = 2000
    """Epochs of Adam for each adapter and for the full update, with a learning rate that falls linearly to 0."""

    shifted_base_learning_rate: Positive = 0.005
    """Initial learning rate of the base."""

    shifted_learning_rate: Positive = 0.0005
    """Initial learning rate of every adapter, the same for all ranks."""

    shifted_full_learning_rate: Positive = 0.005
    """Initial learning rate of the full update."""


@dataclass(frozen=True)
class SineOptions(Options):
    """A small network learns sin x by gradient descent, then an adapter on its first layer continues, all by hand.

    Raises:
        UsageError: from `validate`, never from the constructor.
    """

    output: Path | None = None
    """Directory for losses.csv, summary.json and the pictures. By default results are only printed."""

    start: Path | None = None
    """Initial values instead of random ones: an .npz file with w0 (width, 1), b0 (width,), w2 (1, width), B (1, rank)
    and A (rank, width), B and A as in X·W + scaling·X·B·A."""

    check: bool = False
    """Compare every intermediate gradient with autograd at `check_epochs`, and fail if one differs."""

    check_epochs: tuple[int, ...] = (0, 1, 100, -1)
    """Epochs at which `check` compares, in each part that has them. Negative epochs count from the end."""

    step: bool = False
    """Print one epoch of each part, formula by formula with the numbers, as on paper."""

    step_epoch: CountFromZero = 1
    """The epoch that `step` prints, from 0. (At 0 the product B·A is still zero, and so is the gradient of A.)"""

    json: bool = False
    """Print the summary as one JSON object instead of tables. With `check` it includes the comparisons."""

    dtype: SineDType = "float64"
    """Dtype of the computation: float64, for the most precise comparison with autograd, or float32, as in the original
    script."""

    seed: Seed = 0
    """Seed of the initial weights: the original script draws the same ones after torch.manual_seed(seed)."""

    target: str = "sin"
    """Target function: `sin`, `cos` or `square`, with a number for the frequency (`sin5` is sin 5x), on [0, 2π]; or a
    .csv file with two columns, x and y."""

    points: Annotated[int, Bound(at_least=2)] = 100
    """Number of points on [0, 2π], including both ends. Not used with a .csv file."""

    widths: Annotated[tuple[Count, ...], several()] = (20,)
    """Hidden units of each layer. Only the first layer has a bias."""

    base_epochs: Count = 5000
    """Epochs of part 1, the base."""

    base_learning_rate: Positive = 0.01
    """Learning rate of part 1."""

    rank: SineRank = 8
    """Rank of the adapter on the first layer, part 2."""

    scaling: Positive = 2.0
    """Multiplier of the low-rank product."""

    lora_epochs: Count = 100_000
    """Epochs of part 2, the adapter. Everything else is frozen."""

    lora_learning_rate: Positive = 0.001
    """Learning rate of part 2."""

    log_every: Count = 100
    """Epochs between two lines of losses.csv. The first and the last epoch of a part are always included."""

    second: ShiftedTargetOptions = field(default_factory=ShiftedTargetOptions)

    def _check_together(self) -> None:
        if self.step and self.step_epoch >= min(self.base_epochs, self.lora_epochs):
            raise UsageError(
                f"step_epoch {self.step_epoch} is past the last epoch of a part",
                where="step_epoch",
                why=f"part 1 has {self.base_epochs} epochs and part 2 {self.lora_epochs}, counted from 0",
            )
        parts = {"part 1": self.base_epochs, "part 2": self.lora_epochs} if self.check else {}
        for part, epochs in parts.items():  # without a common epoch nothing would be compared in this part
            if not any(-epochs <= epoch < epochs for epoch in self.check_epochs):
                raise UsageError(
                    f"none of the epochs to compare belongs to {part}",
                    where="check_epochs",
                    why=f"it has {epochs} epochs, counted from 0",
                    next_step="also give 0 or -1, the first or the last epoch",
                )
