"""Train the whole base, an adapter on one layer, or a full update of that layer, without autograd.

The gradients are those of `ops/linear.py`, `ops/elementwise.py`, `ops/mse.py` and `ops/lora_linear.py`. Constants of a
frozen network are computed once: the input of the adapted layer, and its output without the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

from backhand.errors import CheckError
from backhand.lab.sine.network import FloatArray, Network
from backhand.lab.sine.points import Points


class Head:
    """Forward and backward from one layer's output before its ReLU to the mean squared error.

        post₀ = max(pre₀, 0),  pre_k = post_{k−1} W_kᵀ,  post_k = max(pre_k, 0),  outputs = post_last W_lastᵀ
        diff = outputs − y,    L = Σ diff² / n                                       (n points)

        d_outputs = 2 diff / n                       (n, 1)
        d_W_last  = d_outputsᵀ post_last             (1, width)
        d_post    = d_outputs W_last                 (n, width)
        d_pre_k   = d_post_k where pre_k > 0, else 0
        d_W_k     = d_pre_kᵀ post_{k−1}              (out, in)
        d_post_{k−1} = d_pre_k W_k

    Args:
        weights: (out, in) weights of the following layers, the last one (1, width). They are read in each epoch.
        y: targets (points, 1).
        weight_gradients: buffers for ∂L/∂weight of each layer, None for frozen weights.

    Attributes:
        pre, post, d_pre, d_post: (points, width) of each hidden layer.
        outputs, diff, d_outputs: (points, 1).
    """

    outputs: FloatArray
    diff: FloatArray
    d_outputs: FloatArray

    def __init__(
        self, weights: Sequence[FloatArray], y: FloatArray, weight_gradients: Sequence[FloatArray] | None = None
    ) -> None:
        self._weights, self._weight_gradients, self._y = weights, weight_gradients, y
        self.pre, self.post, self.d_pre, self.d_post = ([y] * len(weights) for _ in range(4))

    def forward(self, pre: FloatArray) -> float:
        """Return the loss, given the previous layer's output `pre` of shape (points, width)."""
        for layer, weight in enumerate(self._weights):
            self.pre[layer], self.post[layer] = pre, np.maximum(pre, 0)
            pre = np.dot(self.post[layer], weight.T)
        self.outputs, self.diff = pre, pre - self._y
        flat = self.diff.reshape(-1)
        return float(np.dot(flat, flat)) / len(flat)

    def backward(self) -> FloatArray:
        """Return ∂L/∂pre₀ of the last forward. Fills `d_pre`, `d_post` and, unless frozen, the weights' gradients."""
        d_above = self.d_outputs = self.diff * (2 / len(self._y))
        for layer in reversed(range(len(self._weights))):
            if self._weight_gradients is not None:
                np.dot(d_above.T, self.post[layer], out=self._weight_gradients[layer])
            self.d_post[layer] = np.dot(d_above, self._weights[layer])
            d_above = self.d_pre[layer] = self.d_post[layer] * (self.pre[layer] > 0)
        return d_above


class FlatParameters:
    """Arrays as views of one flat buffer `values`, and their gradients as views of `gradients`, initially zero.

    With flat buffers an update takes two calls, whatever the number of arrays.

    Args:
        initial: the arrays, all of the same dtype. They are copied.

    Attributes:
        arrays, array_gradients: the views, in the order of `initial`.
    """

    def __init__(self, *initial: FloatArray) -> None:
        self.values: FloatArray = np.concatenate([array.reshape(-1) for array in initial])
        self.gradients: FloatArray = np.zeros_like(self.values)
        ends = np.cumsum([array.size for array in initial])[:-1]
        self.arrays, self.array_gradients = (
            [part.reshape(array.shape) for part, array in zip(np.split(flat, ends), initial, strict=True)]
            for flat in (self.values, self.gradients)
        )


class BaseTraining:
    """Training of the whole network.

    x is concatenated with a column of ones, so that layer 0 is one product:

        o2 = [x 1] [W₀ᵀ; b₀],    hence d[W₀ᵀ; b₀] = [x 1]ᵀ do2    (2, width), the last row is the sum over rows of do2.

    Args:
        network: initial values, which are copied.
    """

    def __init__(self, network: Network, points: Points) -> None:
        layer0 = np.concatenate([network.weights[0].T, network.bias[None]])
        self.parameters = FlatParameters(layer0, *network.weights[1:])
        self._x_ones = np.concatenate([points.x, np.ones_like(points.x)], axis=1)
        self._x_ones_T = np.ascontiguousarray(self._x_ones.T)
        arrays, gradients = self.parameters.arrays, self.parameters.array_gradients
        self._layer0, self._d_layer0 = arrays[0], gradients[0]
        self.head = Head(arrays[1:], points.y, gradients[1:])

    def forward(self) -> float:
        """The loss at the present values."""
        return self.head.forward(np.dot(self._x_ones, self._layer0))

    def backward(self) -> None:
        """Fill the gradients for the last forward."""
        np.dot(self._x_ones_T, self.head.backward(), out=self._d_layer0)

    @property
    def network(self) -> Network:
        """Copy of the current values."""
        return _network(*self.parameters.arrays)

    @property
    def gradients(self) -> Network:
        """Copy of the gradients, in the layout of the network."""
        return _network(*self.parameters.array_gradients)


def _network(layer0: FloatArray, *above: FloatArray) -> Network:
    return Network((np.ascontiguousarray(layer0[:-1].T), *(weight.copy() for weight in above)), layer0[-1].copy())


class _OneLayer:
    """Training of one layer of a frozen network, whose output without an update is `frozen_h` (points, out)."""

    def __init__(self, network: Network, layer: int, points: Points, *initial: FloatArray) -> None:
        self.network = network
        self.parameters = FlatParameters(*initial)
        self.x = network.layer_input(points.x, layer)
        self.frozen_h = self.x @ network.weights[layer].T + (network.bias if layer == 0 else 0)
        self.head = Head(network.weights[layer + 1 :], points.y)


class AdapterTraining(_OneLayer):
    """Training of lora_A and lora_B on one layer of a frozen network, applied as (x lora_Aᵀ) lora_Bᵀ.

        z = s x lora_Aᵀ,   h = x Wᵀ + z lora_Bᵀ (+ b₀ on layer 0)
        d_lora_B = d_hᵀ z,   d_z = d_h lora_B,   d_lora_A = s d_zᵀ x    (d_x is not needed, all layers below are frozen)

    The product lora_B lora_A of shape (out, in) is never formed.

    Args:
        network: the frozen base, whose arrays are not copied.
        lora_A: initial (rank, in), which is copied.
        lora_B: initial (out, rank), which is copied.
        scaling: s.
    """

    z: FloatArray

    def __init__(
        self, network: Network, layer: int, points: Points, lora_A: FloatArray, lora_B: FloatArray, scaling: float
    ) -> None:
        super().__init__(network, layer, points, lora_A, lora_B)
        self.lora_A, self.lora_B = self.parameters.arrays
        self.d_lora_A, self.d_lora_B = self.parameters.array_gradients
        self.scaling = scaling

    def forward(self) -> float:
        """The loss at the present values."""
        self.z = np.dot(self.x, self.lora_A.T) * self.scaling
        return self.head.forward(np.dot(self.z, self.lora_B.T) + self.frozen_h)

    def backward(self) -> None:
        """Fill the gradients for the last forward."""
        d_h = self.head.backward()
        np.dot(d_h.T, self.z, out=self.d_lora_B)
        np.dot(np.dot(d_h, self.lora_B).T, self.x, out=self.d_lora_A)
        self.d_lora_A *= self.scaling

    @property
    def delta_weight(self) -> FloatArray:
        """The update scaling · lora_B @ lora_A of shape (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)


class FullUpdateTraining(_OneLayer):
    """Training of a full update D of one layer's weight in a frozen network: h = x (W + D)ᵀ, d_D = d_hᵀ x.

    D is initially zero.

    Args:
        network: the frozen base, whose arrays are not copied.
    """

    def __init__(self, network: Network, layer: int, points: Points) -> None:
        super().__init__(network, layer, points, np.zeros_like(network.weights[layer]))
        (self.delta_weight,), (self._d_delta,) = self.parameters.arrays, self.parameters.array_gradients

    def forward(self) -> float:
        """The loss at the present values."""
        return self.head.forward(np.dot(self.x, self.delta_weight.T) + self.frozen_h)

    def backward(self) -> None:
        """Fill the gradients for the last forward."""
        np.dot(self.head.backward().T, self.x, out=self._d_delta)


Trained = BaseTraining | AdapterTraining | FullUpdateTraining
"""Argument of the loop: `forward` returns the loss, and `backward` fills `parameters.gradients`."""


class GradientDescent:
    """Gradient descent: values ← values − learning_rate · gradients."""

    def __init__(self, parameters: FlatParameters, learning_rate: float) -> None:
        self._values, self._gradients = parameters.values, parameters.gradients
        self._learning_rate = learning_rate

    def step(self) -> None:
        """Update the values once."""
        self._values -= self._learning_rate * self._gradients


class Adam:
    """Adam without weight decay, and with a learning rate that falls linearly to 0 [arXiv:1412.6980, alg. 1].

        m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²
        values ← values − lr_t · m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)

    with lr_t = learning_rate · (1 − (t − 1)/epochs), β₁ = 0.9, β₂ = 0.999 and ε = 10⁻⁸.
    """

    beta1, beta2, epsilon = 0.9, 0.999, 1e-8

    def __init__(self, parameters: FlatParameters, learning_rate: float, epochs: int) -> None:
        self._parameters, self._learning_rate, self._epochs = parameters, learning_rate, epochs
        self._steps = 0
        self._mean, self._square = np.zeros_like(parameters.values), np.zeros_like(parameters.values)

    def step(self) -> None:
        """Update the values once."""
        gradients = self._parameters.gradients
        self._mean = self.beta1 * self._mean + (1 - self.beta1) * gradients
        self._square = self.beta2 * self._square + (1 - self.beta2) * (gradients * gradients)
        rate = self._learning_rate * (1 - self._steps / self._epochs)
        self._steps += 1
        root = np.sqrt(self._square / (1 - self.beta2**self._steps)) + self.epsilon
        self._parameters.values -= (rate / (1 - self.beta1**self._steps)) * (self._mean / root)


def train(
    trained: Trained,
    optimizer: GradientDescent | Adam,
    epochs: int,
    *,
    observe: Callable[[int], None] | None = None,
    observe_epochs: Collection[int] = (),
    where: str = "sine",
) -> npt.NDArray[np.float64]:
    """Run the loop: forward, backward, update, `epochs` times.

    Args:
        observe: called with the epoch after its backward and before its update, for the epochs in `observe_epochs`.

    Returns:
        The loss of each epoch before its update, (epochs,).

    Raises:
        CheckError: if the loss becomes infinite or NaN.
    """
    losses = np.empty(epochs)
    with np.errstate(over="ignore", invalid="ignore"):
        for epoch in range(epochs):
            losses[epoch] = loss = trained.forward()
            if not math.isfinite(loss):
                raise CheckError(
                    f"the loss is not finite from epoch {epoch} on",
                    where=where,
                    why="the steps are too large: each one increases the loss",
                    next_step="give a smaller learning rate, or values of x and y closer to 1",
                )
            trained.backward()
            if observe is not None and epoch in observe_epochs:
                observe(epoch)
            optimizer.step()
    return losses
