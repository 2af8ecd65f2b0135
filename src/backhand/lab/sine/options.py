"""What the sine experiment can be told: everything that the original script fixes, and what to leave behind.

This file imports no torch: the command line reads the fields and their docstrings for its help.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from backhand.bounds import Bound, Count, CountFromZero, Options, Positive, Seed, several
from backhand.errors import UsageError

SineDType = Literal["float32", "float64"]


# A rank above any layer's size is a slip; the arrays it would make could be larger than the memory.
SineRank = Annotated[int, Bound(at_least=1, at_most=4096)]


@dataclass(frozen=True)
class ShiftedTargetOptions(Options):
    """The second experiment: an adapter on a square hidden layer, for a target that the base was not trained on."""

    shifted: bool = True
    """Also run the second experiment: a base with two hidden layers learns `target`, then adapters of several ranks on
    its square layer, and that whole layer, learn `shifted_target`."""

    shifted_target: str = "sin4"
    """What the adapters learn, named as in `target`."""

    shifted_widths: Annotated[tuple[Count, ...], several(at_least=2)] = (64, 64)
    """Hidden units of each layer; the adapter is on the weight between the first two."""

    shifted_ranks: Annotated[tuple[SineRank, ...], several()] = (1, 2, 4, 8)
    """Ranks to compare; a full update of the same layer is always run beside them."""

    shifted_scaling: Positive = 2.0
    """Scaling of the low-rank product, the same for every rank, as in the first experiment."""

    shifted_seeds: Annotated[int, Bound(at_least=2)] = 5
    """How many times everything is repeated, each with another base; the table shows mean and spread."""

    shifted_base_epochs: Count = 2000
    """Epochs of Adam for the base, learning rate falling linearly to 0."""

    shifted_epochs: Count = 2000
    """Epochs of Adam for each adapter and for the full update, learning rate falling linearly to 0."""

    shifted_base_learning_rate: Positive = 0.005
    """First learning rate of the base."""

    shifted_learning_rate: Positive = 0.0005
    """First learning rate of every adapter, whatever its rank."""

    shifted_full_learning_rate: Positive = 0.005
    """First learning rate of the full update."""


@dataclass(frozen=True)
class SineOptions(Options):
    """A small network learns sin x by plain gradient descent; then an adapter on its first layer goes on, all by hand.

    Raises:
        UsageError: from `validate`, never from the constructor.
    """

    output: Path | None = None
    """Directory for losses.csv, summary.json and the pictures; not given: only print."""

    start: Path | None = None
    """Initial numbers to begin from instead of drawing them: an .npz file with w0 (width, 1), b0 (width,),
    w2 (1, width), B (1, rank) and A (rank, width), B and A as in X·W + scaling·X·B·A."""

    check: bool = False
    """Compare every intermediate gradient with autograd at `check_epochs`, and fail where one differs."""

    check_epochs: tuple[int, ...] = (0, 1, 100, -1)
    """Epochs at which `check` compares, in each part that has them; negative ones count from the end."""

    step: bool = False
    """Walk through one epoch of each part, formula by formula with the numbers, as on paper."""

    step_epoch: CountFromZero = 1
    """Which epoch `step` walks through, from 0. (At 0 the product B·A is still zero, and with it the gradient of A.)"""

    json: bool = False
    """Print one JSON object, the summary (with `check` its table as well), instead of tables."""

    dtype: SineDType = "float64"
    """Numbers to compute with: float64, in which a comparison with autograd says most, or float32, as in the original
    script."""

    seed: Seed = 0
    """Seed of the initial weights: the original script draws the same ones after torch.manual_seed(seed)."""

    target: str = "sin"
    """What to learn: `sin`, `cos` or `square`, with a number for the frequency (`sin5` is sin 5x), on [0, 2π]; or a
    .csv file with two columns, x and y."""

    points: Annotated[int, Bound(at_least=2)] = 100
    """Points on [0, 2π], ends included; a .csv file brings its own."""

    widths: Annotated[tuple[Count, ...], several()] = (20,)
    """Hidden units of each layer. The first layer has a bias, the others none."""

    base_epochs: Count = 5000
    """Epochs of part 1, the base."""

    base_learning_rate: Positive = 0.01
    """Learning rate of part 1."""

    rank: SineRank = 8
    """Rank of the adapter on the first layer, part 2."""

    scaling: Positive = 2.0
    """Multiplier of the low-rank product."""

    lora_epochs: Count = 100_000
    """Epochs of part 2, the adapter; everything else is frozen."""

    lora_learning_rate: Positive = 0.001
    """Learning rate of part 2."""

    log_every: Count = 100
    """Epochs between two lines of losses.csv; the first and the last epoch of a part are always there."""

    second: ShiftedTargetOptions = field(default_factory=ShiftedTargetOptions)

    def _check_together(self) -> None:
        if self.step and self.step_epoch >= min(self.base_epochs, self.lora_epochs):
            raise UsageError(
                f"step_epoch {self.step_epoch} is past the last epoch of a part",
                where="step_epoch",
                why=f"part 1 has {self.base_epochs} epochs and part 2 {self.lora_epochs}, counted from 0",
            )
        parts = {"part 1": self.base_epochs, "part 2": self.lora_epochs} if self.check else {}
        for part, epochs in parts.items():  # each has one to compare at: else nothing would be proved of it
            if not any(-epochs <= epoch < epochs for epoch in self.check_epochs):
                raise UsageError(
                    f"none of the epochs to compare at is one of {part}",
                    where="check_epochs",
                    why=f"it has {epochs} epochs, counted from 0",
                    next_step="give 0 or -1, the first or the last epoch, as well",
                )
