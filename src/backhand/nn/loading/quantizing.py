"""A base model whose matrices are quantized when they are read (`--quantize`).

The result is a different model from its source, as a quantized GGUF file of it would be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.errors import UsageError
from backhand.kernels.dequantize import block_shape
from backhand.kernels.quantized_matrix import QuantizedMatrix, StoredRows
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.source import DerivedSource, ModelSource


class QuantizingSource(DerivedSource):
    """A model whose matrices are quantized to one type. Each matrix is quantized once, on first access.

    Matrices whose rows do not divide into whole blocks stay as they are, as in llama.cpp's converter.

    Args:
        kind: name of a type that the gguf package can write, such as `q8_0`.

    Attributes:
        type_name: ggml's name of the type.

    Raises:
        UsageError: if the source is a GGUF file or already has quantized blocks, which would be rounded twice.
    """

    def __init__(self, source: ModelSource, kind: str) -> None:
        from gguf import GGMLQuantizationType

        if isinstance(source, GGUFModel):
            raise UsageError(
                f"{source.origin} is a GGUF file, whose matrices already have their types",
                where="quantize",
                next_step="leave out --quantize, or give the model's Hugging Face directory",
            )
        if source.quantized:
            raise UsageError(
                f"{source.origin} already has quantized matrices, which would be rounded twice",
                where="quantize",
                next_step="leave out --quantize, and give --base quantized to keep the stored blocks",
            )
        super().__init__(source)
        self.origin = f"{source.origin}, quantized to {kind.upper()} on reading"
        self._kind = GGMLQuantizationType[kind.upper()]
        self.type_name = str(self._kind.name)
        self._stored: dict[str, StoredRows] = {}

    def load(self, name: str) -> Tensor:
        """Return the tensor. A quantized matrix is returned as its dequantized float32 values."""
        if not self._quantizes(name):
            return self.source.load(name)
        return QuantizedMatrix(self.stored_parts(name), torch.float32).dense()

    def head_tensor(self, name: str) -> Tensor | None:
        """Return a parameter of a head for classification, which is not quantized; None if it is not there."""
        return self.source.head_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return float32 for a quantized matrix, and the source's dtype for any other tensor."""
        return torch.float32 if self._quantizes(name) else super().dtype(name)

    def stored_parts(self, name: str) -> list[StoredRows]:
        """Return a matrix in quantized blocks."""
        if not self._quantizes(name):
            return self.source.stored_parts(name)
        if name not in self._stored:
            from gguf.quants import quantize

            blocks = quantize(self.source.load(name).float().contiguous().numpy(), self._kind)
            self._stored[name] = StoredRows(blocks.reshape(self.shape(name)[0], -1), int(self._kind))
        return [self._stored[name]]

    def stored_bytes(self, name: str) -> int:
        """Return the size of a tensor's blocks in bytes, without quantizing it."""
        if not self._quantizes(name):
            return self.source.stored_bytes(name)
        rows, columns = self.shape(name)
        values, size = block_shape(self._kind)
        return rows * (columns // values * size)

    @property
    def quantized(self) -> bool:
        """True if some matrices are quantized."""
        return any(self._quantizes(name) for name in self.tensor_names())

    def _quantizes(self, name: str) -> bool:
        shape = self.shape(name)
        return len(shape) == 2 and shape[1] % block_shape(self._kind)[0] == 0
