"""Heads of transformers' classes for sequence classification, by family of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from backhand.ops.pooling import Pooling


class ClassHead(NamedTuple):
    """The head of transformers' class for sequence classification (`ops.class_head`), which is not part of the base.

    Attributes:
        output: name of the last linear layer.
        output_bias: this layer has a bias.
        pooling: the vector of a text that the head reads, see `ops.pooling`.
        dense: name of the dense layer before it; empty without one.
        dense_bias: the dense layer has a bias.
        activation: activation after the dense layer.
        norm: name of the layer norm after the activation; empty without one.
        norm_bias: this norm has a bias.
        prefix: path of the encoder in transformers' class; empty if the class has the names of the base.
    """

    output: str = "score"
    output_bias: bool = False
    pooling: Pooling = "last"
    dense: str = ""
    dense_bias: bool = False
    activation: str = "tanh"
    norm: str = ""
    norm_bias: bool = False
    prefix: str = ""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of its modules for `modules_to_save`."""
        return (self.output, *([self.dense.partition(".")[0]] if self.dense else ()))

    @property
    def parameters(self) -> dict[str, str]:
        """Names of its parameters, by the argument of `class_head_forward`."""
        parts = ("output", self.output, self.output_bias), ("dense", self.dense, self.dense_bias)
        names = {}
        for argument, module, bias in (*parts, ("norm", self.norm, self.norm_bias)):
            if module:
                names[argument] = f"{module}.weight"
                names |= {f"{argument}_bias": f"{module}.bias"} if bias else {}
        return names

    def shapes(self, hidden: int, labels: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter by name."""
        by_argument = {"output": (labels, hidden), "output_bias": (labels,), "dense": (hidden, hidden)}
        return {name: by_argument.get(argument, (hidden,)) for argument, name in self.parameters.items()}

    def labels_of(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return the number of labels of a head with these shapes of parameters by name; 0 without a head."""
        return next(iter(shapes.get(f"{self.output}.weight", (0,))))


DECODER_CLASS_HEAD = ClassHead()
"""`score`, on the state of the last token."""
BERT_CLASS_HEAD = ClassHead("classifier", True, "cls", "pooler.dense", True, "tanh", prefix="bert")
"""The pooler and `classifier`, on the state of the first token."""
