"""Mean squared error over rows.

    L = 1/n Σ_rows Σ_features (p − t)²      p predictions, t targets, n the number of rows

All axes but the last are rows. With one feature this is `torch.nn.MSELoss()`; with more, it is that times the number of
features, so that the gradient of a row does not depend on its number of features.

Backward. dL = 1/n Σ 2 (p − t) (dp − dt), hence with the scalar g = ∂(anything)/∂L
    ∂L/∂p = g 2 (p − t) / n       (..., features)
    ∂L/∂t = −∂L/∂p                (..., features)

Saved: the difference p − t, which both gradients need; p and t themselves are not saved. Without rows L is 0.
The squares are summed in float32 at least, so that a low-precision loss is rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class MSESaved(NamedTuple):
    """Saved for the backward: difference (..., features) in float32 at least, the number of rows, the input dtypes."""

    difference: Tensor
    rows: int
    prediction_dtype: torch.dtype
    target_dtype: torch.dtype


class MSEGrads(NamedTuple):
    """d_prediction and d_target, both (..., features)."""

    d_prediction: Tensor
    d_target: Tensor


def mse_forward(prediction: Tensor, target: Tensor) -> tuple[Tensor, MSESaved]:
    """Compute the loss, 0-d and in the dtype of prediction, from prediction and target, both (..., features)."""
    rows = _rows(prediction)
    compute_dtype = torch.promote_types(prediction.dtype, torch.float32)
    difference = prediction.to(compute_dtype) - target.to(compute_dtype)
    loss = (difference * difference).sum() / max(rows, 1)
    return loss.to(prediction.dtype), MSESaved(difference, rows, prediction.dtype, target.dtype)


def mse_backward(d_loss: Tensor, saved: MSESaved) -> MSEGrads:
    """Map d_loss, 0-d, to the gradients derived in the module docstring."""
    difference, rows, prediction_dtype, target_dtype = saved
    d_prediction = d_loss.to(difference.dtype) * (2 / max(rows, 1)) * difference
    return MSEGrads(d_prediction.to(prediction_dtype), (-d_prediction).to(target_dtype))


def mse_reference(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the same loss by `torch.nn.functional.mse_loss`, summed and divided by the rows."""
    return functional.mse_loss(prediction, target, reduction="sum") / max(_rows(prediction), 1)


def _rows(prediction: Tensor) -> int:
    return prediction.shape[:-1].numel()
