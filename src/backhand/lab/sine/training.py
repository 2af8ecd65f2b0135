"""What is trained: the whole base, an adapter on one layer, or a full update of that layer; and the loop.

No autograd: each class fills arrays that it made once. The gradients are those of `ops/linear.py` and
`ops/lora_linear.py`, here for one network whose frozen parts are computed once: what an adapted layer multiplies, and
its output without the adapter, never change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from backhand.errors import CheckError
from backhand.lab.sine.network import FloatArray, Head, Network, Points

_CHUNK_EPOCHS = 1000


class BaseTraining:
    """The whole network.

    x and a column of ones stand side by side, so that layer 0 is one product:

        o2 = [x 1] [W₀ᵀ; b₀],    hence d[W₀ᵀ; b₀] = [x 1]ᵀ do2    (2, width), the sum over rows of do2 below.

    Args:
        network: initial numbers; copied.
    """

    def __init__(self, network: Network, points: Points) -> None:
        dtype = points.y.dtype
        inputs, width = points.x.shape[1], len(network.bias)
        shapes = {"layer0": (inputs + 1, width)}
        shapes |= {str(number): weight.shape for number, weight in enumerate(network.weights) if number}
        self.parameters = FlatParameters(shapes, dtype.name)
        self._layer0 = self.parameters.value("layer0")
        self._d_layer0 = self.parameters.gradient("layer0")
        self._layer0[:inputs] = network.weights[0].T
        self._layer0[inputs] = network.bias
        above = range(1, len(network.weights))
        for number in above:
            self.parameters.value(str(number))[:] = network.weights[number]
        self._x_ones = np.concatenate([points.x, np.ones_like(points.x[:, :1])], axis=1)
        self._x_ones_T = np.ascontiguousarray(self._x_ones.T)
        self.head = Head(
            [self.parameters.value(str(number)) for number in above],
            points.y,
            [self.parameters.gradient(str(number)) for number in above],
        )

    def forward(self) -> float:
        """The loss at the present values."""
        np.dot(self._x_ones, self._layer0, out=self.head.pre[0])
        return self.head.forward()

    def backward(self) -> None:
        """Fill the gradients for the last forward."""
        self.head.backward()
        np.dot(self._x_ones_T, self.head.d_pre[0], out=self._d_layer0)

    @property
    def network(self) -> Network:
        """A copy of the present values."""
        return self._as_network(self.parameters.value)

    @property
    def gradients(self) -> Network:
        """A copy of the gradients, each where its parameter is in a network."""
        return self._as_network(self.parameters.gradient)

    def _as_network(self, view: Callable[[str], FloatArray]) -> Network:
        layer0 = view("layer0")
        above = [view(str(number)).copy() for number in range(1, len(self.head.pre) + 1)]
        return Network((np.ascontiguousarray(layer0[:-1].T), *above), layer0[-1].copy())


class AdapterTraining:
    """lora_A and lora_B on one layer of a frozen network, the product applied as (x lora_Aᵀ) lora_Bᵀ.

        z = s x lora_Aᵀ,   h = x Wᵀ + z lora_Bᵀ (+ b₀ on layer 0)
        d_lora_B = d_hᵀ z,   d_z = d_h lora_B,   d_lora_A = s d_zᵀ x        (d_x is not needed: all below is frozen)

    The product lora_B lora_A, (out, in), is never formed.

    Args:
        network: the frozen base, whose arrays are used as they are.
        lora_A: initial (rank, in); copied.
        lora_B: initial (out, rank); copied.
        scaling: s.
    """

    def __init__(
        self,
        network: Network,
        layer: int,
        points: Points,
        lora_A: FloatArray,
        lora_B: FloatArray,
        scaling: float,
    ) -> None:
        dtype = points.y.dtype
        self.parameters = FlatParameters({"lora_A": lora_A.shape, "lora_B": lora_B.shape}, dtype.name)
        self.lora_A, self.lora_B = self.parameters.value("lora_A"), self.parameters.value("lora_B")
        self.d_lora_A, self.d_lora_B = self.parameters.gradient("lora_A"), self.parameters.gradient("lora_B")
        self.lora_A[:] = lora_A
        self.lora_B[:] = lora_B
        self.scaling = scaling
        self.x, self._frozen_h = _frozen_part(network, layer, points)
        self._scaling = dtype.type(scaling)
        self._z = np.empty((len(self.x), len(lora_A)), dtype)
        self._d_z = np.empty_like(self._z)
        self.head = Head(network.weights[layer + 1 :], points.y)

    def forward(self) -> float:
        """The loss at the present values."""
        h = self.head.pre[0]
        np.dot(self.x, self.lora_A.T, out=self._z)
        np.multiply(self._z, self._scaling, out=self._z)
        np.dot(self._z, self.lora_B.T, out=h)
        np.add(h, self._frozen_h, out=h)
        return self.head.forward()

    def backward(self) -> None:
        """Fill the gradients for the last forward."""
        self.head.backward()
        d_h = self.head.d_pre[0]
        np.dot(d_h.T, self._z, out=self.d_lora_B)
        np.dot(d_h, self.lora_B, out=self._d_z)
        np.dot(self._d_z.T, self.x, out=self.d_lora_A)
        np.multiply(self.d_lora_A, self._scaling, out=self.d_lora_A)

    @property
    def delta_weight(self) -> FloatArray:
        """scaling · lora_B @ lora_A, (out, in)."""
        product: FloatArray = self._scaling * (self.lora_B @ self.lora_A)
        return product


class FullUpdateTraining:
    """A full update D, zero at first, of one layer's weight in a frozen network: h = x (W + D)ᵀ, d_D = d_hᵀ x.

    Args:
        network: the frozen base, whose arrays are used as they are.
    """

    def __init__(self, network: Network, layer: int, points: Points) -> None:
        self.parameters = FlatParameters({"delta": network.weights[layer].shape}, points.y.dtype.name)
        self.delta_weight = self.parameters.value("delta")
        self._d_delta = self.parameters.gradient("delta")
        self.x, self._frozen_h = _frozen_part(network, layer, points)
        self.head = Head(network.weights[layer + 1 :], points.y)

    def forward(self) -> float:
        """The loss at the present values."""
        h = self.head.pre[0]
        np.dot(self.x, self.delta_weight.T, out=h)
        np.add(h, self._frozen_h, out=h)
        return self.head.forward()

    def backward(self) -> None:
        """Fill the gradients for the last forward."""
        self.head.backward()
        np.dot(self.head.d_pre[0].T, self.x, out=self._d_delta)


Trained = BaseTraining | AdapterTraining | FullUpdateTraining
"""What the loop sees: `forward` gives the loss, `backward` fills `parameters.gradients`."""


def _frozen_part(network: Network, layer: int, points: Points) -> tuple[FloatArray, FloatArray]:
    """What the layer multiplies, (points, in), and its output without any update, (points, out): constants."""
    x = network.layer_input(points.x, layer)
    h: FloatArray = x @ network.weights[layer].T
    return x, h + network.bias if layer == 0 else h


def train(
    trained: Trained,
    optimizer: Optimizer,
    epochs: int,
    *,
    observe: Callable[[int], None] | None = None,
    observe_epochs: Collection[int] = (),
    where: str = "sine",
) -> npt.NDArray[np.float64]:
    """Run the loop: forward, backward, update, `epochs` times.

    Args:
        observe: called with the epoch after its backward and before its update, for `observe_epochs`.

    Returns:
        (epochs,) the loss of each epoch, before its update.

    Raises:
        CheckError: the loss is not finite any more.
    """
    losses = np.empty(epochs)
    observed = frozenset(observe_epochs)
    forward, backward, step = trained.forward, trained.backward, optimizer.step
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, epochs, _CHUNK_EPOCHS):
            end = min(start + _CHUNK_EPOCHS, epochs)
            for epoch in range(start, end):
                losses[epoch] = forward()
                backward()
                if observe is not None and epoch in observed:
                    observe(epoch)
                step()
            if not math.isfinite(losses[end - 1]):
                _raise_diverged(losses[:end], where)
    return losses


def _raise_diverged(losses: npt.NDArray[np.float64], where: str) -> None:
    first = int(np.flatnonzero(~np.isfinite(losses))[0])
    raise CheckError(
        f"the loss is not finite from epoch {first} on",
        where=where,
        why="the steps overshoot: each makes the loss larger than the one before",
        next_step="give a smaller learning rate, or values of x and y that are closer to 1",
    )


# Trained arrays as views of one flat buffer, their gradients as views of a second, and the two ways to update them.
#
# One flat buffer makes an update two calls, however many arrays are trained.


class FlatParameters:
    """Named arrays in one flat buffer `values`, their gradients in `gradients`, both zero at first.

    Args:
        shapes: name to shape, in buffer order.
        dtype: `float32` or `float64`.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
        count = sum(int(np.prod(shape)) for shape in shapes.values())
        self.values: FloatArray = np.zeros(count, dtype)
        self.gradients: FloatArray = np.zeros(count, dtype)
        self._places: dict[str, tuple[slice, tuple[int, ...]]] = {}
        offset = 0
        for name, shape in shapes.items():
            end = offset + int(np.prod(shape))
            self._places[name] = (slice(offset, end), shape)
            offset = end

    def value(self, name: str) -> FloatArray:
        """A view of the array."""
        place, shape = self._places[name]
        return self.values[place].reshape(shape)

    def gradient(self, name: str) -> FloatArray:
        """A view of its gradient."""
        place, shape = self._places[name]
        return self.gradients[place].reshape(shape)


class GradientDescent:
    """values ← values − learning_rate · gradients."""

    def __init__(self, parameters: FlatParameters, learning_rate: float) -> None:
        self._values = parameters.values
        self._gradients = parameters.gradients
        self._change = np.empty_like(parameters.values)
        self._learning_rate = parameters.values.dtype.type(learning_rate)

    def step(self) -> None:
        """Update the values once."""
        np.multiply(self._gradients, self._learning_rate, out=self._change)
        np.subtract(self._values, self._change, out=self._values)


@dataclass(eq=False)
class Adam:
    """Adam without weight decay, its learning rate falling linearly to 0 over `epochs` steps [arXiv:1412.6980, alg. 1].

        m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²
        values ← values − lr_t · m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)

    with lr_t = learning_rate · (1 − (t − 1)/epochs), β₁ = 0.9, β₂ = 0.999 and ε = 10⁻⁸.
    """

    beta1: ClassVar = 0.9
    beta2: ClassVar = 0.999
    epsilon: ClassVar = 1e-8

    parameters: FlatParameters
    learning_rate: float
    epochs: int

    def __post_init__(self) -> None:
        self._steps = 0
        self._mean, self._square, self._change = (np.zeros_like(self.parameters.values) for _ in range(3))

    def step(self) -> None:
        """Update the values once."""
        gradients, change = self.parameters.gradients, self._change
        np.multiply(gradients, 1 - self.beta1, out=change)
        self._mean *= self.beta1
        self._mean += change
        np.multiply(gradients, gradients, out=change)
        change *= 1 - self.beta2
        self._square *= self.beta2
        self._square += change
        rate = self.learning_rate * (1 - self._steps / self.epochs)
        self._steps += 1
        np.divide(self._square, 1 - self.beta2**self._steps, out=change)
        np.sqrt(change, out=change)
        change += self.epsilon
        np.divide(self._mean, change, out=change)
        change *= rate / (1 - self.beta1**self._steps)
        self.parameters.values -= change


Optimizer = GradientDescent | Adam
"""`step` makes one update of the gradients that are in the buffer."""
