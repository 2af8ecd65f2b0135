"""The losses are those of the original script's arithmetic, from its own initial numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from backhand.lab.sine.experiment import run_sine
from backhand.lab.sine.network import draw_start
from backhand.lab.sine.options import ShiftedTargetOptions, SineOptions
from tests.support.original_script import original_losses, original_start

ONLY_PARTS = ShiftedTargetOptions(shifted=False)


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_draws_what_the_original_draws(seed: int) -> None:
    theirs = original_start(seed, width=6, rank=3, dtype=torch.float32)
    ours = draw_start((6,), 3, seed, "float32")
    assert np.array_equal(ours.network.weights[0], theirs.w0.numpy())
    assert np.array_equal(ours.network.bias, theirs.b0.numpy())
    assert np.array_equal(ours.network.weights[1], theirs.w2.numpy())
    assert np.array_equal(ours.lora_A, theirs.B.T.numpy())
    assert np.array_equal(ours.lora_B, theirs.A.T.numpy())


def test_losses_equal_in_every_epoch_of_both_parts() -> None:
    result = run_sine(SineOptions(seed=3, base_epochs=3000, lora_epochs=12_000, second=ONLY_PARTS))
    base, lora = original_losses(original_start(3), 3000, 12_000)
    np.testing.assert_allclose(result.base.losses, base, rtol=1e-9, atol=0)
    np.testing.assert_allclose(result.lora.losses, lora, rtol=1e-9, atol=0)


def test_losses_equal_from_a_start_file(tmp_path: Path) -> None:
    start = original_start(11)
    start.B = torch.randn(1, 8, dtype=torch.float64) / 10  # not zero, so that both factors move from the first epoch on
    np.savez(tmp_path / "start.npz", **{name: number.numpy() for name, number in vars(start).items()})
    options = SineOptions(start=tmp_path / "start.npz", base_epochs=400, lora_epochs=400, second=ONLY_PARTS)
    result = run_sine(options)
    base, lora = original_losses(start, 400, 400)
    np.testing.assert_allclose(result.base.losses, base, rtol=1e-12, atol=0)
    np.testing.assert_allclose(result.lora.losses, lora, rtol=1e-12, atol=0)
    assert lora[-1] < lora[0]


def test_float32_follows_within_its_rounding() -> None:
    result = run_sine(SineOptions(dtype="float32", base_epochs=500, lora_epochs=500, second=ONLY_PARTS))
    base, lora = original_losses(original_start(0, dtype=torch.float32), 500, 500)
    np.testing.assert_allclose(result.base.losses, base, rtol=1e-5, atol=0)
    np.testing.assert_allclose(result.lora.losses, lora, rtol=1e-5, atol=0)
