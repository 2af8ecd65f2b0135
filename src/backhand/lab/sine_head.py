"""All that follows one layer's output before its ReLU: ReLU, the layers above, mean squared error, and the way back.

    post₀ = max(pre₀, 0),  pre_k = post_{k−1} W_kᵀ,  post_k = max(pre_k, 0),  outputs = post_last W_lastᵀ
    diff = outputs − y,    L = Σ diff² / n                                       (n points)

Backward, by the derivations of `ops/mse.py`, `ops/linear.py` and `ops/elementwise.py`:

    d_outputs = 2 diff / n                       (n, 1)
    d_W_last  = d_outputsᵀ post_last             (1, width)
    d_post    = d_outputs W_last                 (n, width)
    d_pre_k   = d_post_k where pre_k > 0, else 0
    d_W_k     = d_pre_kᵀ post_{k−1}              (out, in)
    d_post_{k−1} = d_pre_k W_k

Every array is made once and filled again in each epoch: at 100 points and 20 units a call costs more than its
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backhand.lab.sine_points import FloatArray


class Head:
    """From `pre[0]`, which the caller fills, to the loss, and back to `d_pre[0]`.

    Args:
        weights: (out, in) of the layers above, the last one (1, width); read anew in each epoch.
        y: targets (points, 1).
        weight_gradients: where to write ∂L/∂weight of each; not given: the weights are frozen.

    Attributes:
        pre, post, d_pre, d_post: (points, width) of each hidden layer.
        outputs, diff, d_outputs: (points, 1).
    """

    def __init__(
        self,
        weights: Sequence[FloatArray],
        y: FloatArray,
        weight_gradients: Sequence[FloatArray] | None = None,
    ) -> None:
        points, dtype = len(y), y.dtype
        shapes = [(points, weight.shape[1]) for weight in weights]
        self.y = y
        self.pre = [np.empty(shape, dtype) for shape in shapes]
        self.post = [np.empty(shape, dtype) for shape in shapes]
        self.d_pre = [np.empty(shape, dtype) for shape in shapes]
        self.d_post = [np.empty(shape, dtype) for shape in shapes]
        self.outputs = np.empty_like(y)
        self.diff = np.empty_like(y)
        self.d_outputs = np.empty_like(y)
        self._flat_diff = self.diff.reshape(-1)
        self._masks = [np.empty(shape, np.bool_) for shape in shapes]
        self._weights = list(weights)
        self._weight_gradients = None if weight_gradients is None else list(weight_gradients)
        self._zero = dtype.type(0)
        self._slope = dtype.type(2 / points)

    def forward(self) -> float:
        """The loss for the numbers in `pre[0]`."""
        np.maximum(self.pre[0], self._zero, out=self.post[0])
        for below in range(len(self.pre) - 1):
            np.dot(self.post[below], self._weights[below].T, out=self.pre[below + 1])
            np.maximum(self.pre[below + 1], self._zero, out=self.post[below + 1])
        np.dot(self.post[-1], self._weights[-1].T, out=self.outputs)
        np.subtract(self.outputs, self.y, out=self.diff)
        return float(np.dot(self._flat_diff, self._flat_diff)) / len(self.y)

    def backward(self) -> None:
        """Fill `d_pre`, `d_post` and, unless frozen, the gradients of the weights, for the last `forward`."""
        np.multiply(self.diff, self._slope, out=self.d_outputs)
        if self._weight_gradients is not None:
            np.dot(self.d_outputs.T, self.post[-1], out=self._weight_gradients[-1])
        np.multiply(self.d_outputs, self._weights[-1], out=self.d_post[-1])  # (n, 1) @ (1, width) has one term a sum
        self._through_relu(-1)
        for below in range(len(self.pre) - 2, -1, -1):
            if self._weight_gradients is not None:
                np.dot(self.d_pre[below + 1].T, self.post[below], out=self._weight_gradients[below])
            np.dot(self.d_pre[below + 1], self._weights[below], out=self.d_post[below])
            self._through_relu(below)

    def _through_relu(self, number: int) -> None:
        np.greater(self.pre[number], self._zero, out=self._masks[number])
        np.multiply(self.d_post[number], self._masks[number], out=self.d_pre[number])
