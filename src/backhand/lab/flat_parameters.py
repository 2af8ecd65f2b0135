"""Trained arrays as views of one flat buffer, their gradients as views of a second, and the two ways to update them.

One flat buffer makes an update two calls, however many arrays are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from backhand.lab.sine_points import FloatArray


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


class Optimizer(Protocol):
    """Turns the gradients that are in the buffer into one update."""

    def step(self) -> None:
        """Update the values once."""


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


class Adam:
    """Adam without weight decay, its learning rate falling linearly to 0 over `epochs` steps [arXiv:1412.6980, alg. 1].

        m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²
        values ← values − lr_t · m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)

    with lr_t = learning_rate · (1 − (t − 1)/epochs), β₁ = 0.9, β₂ = 0.999 and ε = 10⁻⁸.
    """

    beta1 = 0.9
    beta2 = 0.999
    epsilon = 1e-8

    def __init__(self, parameters: FlatParameters, learning_rate: float, epochs: int) -> None:
        self._parameters = parameters
        self._learning_rate = learning_rate
        self._epochs = epochs
        self._steps = 0
        self._mean = np.zeros_like(parameters.values)
        self._square = np.zeros_like(parameters.values)
        self._change = np.empty_like(parameters.values)

    def step(self) -> None:
        """Update the values once."""
        gradients, change = self._parameters.gradients, self._change
        np.multiply(gradients, 1 - self.beta1, out=change)
        self._mean *= self.beta1
        self._mean += change
        np.multiply(gradients, gradients, out=change)
        change *= 1 - self.beta2
        self._square *= self.beta2
        self._square += change
        rate = self._learning_rate * (1 - self._steps / self._epochs)
        self._steps += 1
        np.divide(self._square, 1 - self.beta2**self._steps, out=change)
        np.sqrt(change, out=change)
        change += self.epsilon
        np.divide(self._mean, change, out=change)
        change *= rate / (1 - self.beta1**self._steps)
        self._parameters.values -= change
