"""A base whose matrices are quantized as they are read: another model than its source, as a file of it would be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backhand.errors import UsageError
from backhand.kernels.dequantize import block_shape
from backhand.kernels.quantized_matrix import QuantizedMatrix, StoredRows
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class QuantizingSource(ModelSource):
    """A model with its matrices in blocks of one type; each is quantized once, when it is first asked for.

    Rows that are no whole blocks stay as they are, as converters leave them.

    Args:
        kind: name of a type that the gguf package can write, such as `q8_0`.

    Attributes:
        type_name: ggml's name of the type.

    Raises:
        UsageError: the source is a GGUF file, or has blocks of its own: what is quantized would be rounded twice.
    """

    def __init__(self, source: ModelSource, kind: str) -> None:
        from gguf import GGMLQuantizationType

        if isinstance(source, GGUFModel):
            raise UsageError(
                f"{source.origin} is a GGUF file, whose matrices are what they are",
                where="quantize",
                next_step="leave out --quantize, or give the model's Hugging Face directory",
            )
        if source.quantized:
            raise UsageError(
                f"{source.origin} has matrices in blocks already, which would be rounded twice",
                where="quantize",
                next_step="leave out --quantize, and give --base quantized to leave them in their blocks",
            )
        self.unquantized = source
        self.config, self.path, self.hub_id = source.config, source.path, source.hub_id
        self.origin = f"{source.origin}, quantized to {kind.upper()} on reading"
        self._kind = GGMLQuantizationType[kind.upper()]
        self.type_name = str(self._kind.name)
        self._stored: dict[str, StoredRows] = {}

    def tensor_names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors."""
        return self.unquantized.tensor_names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in Hugging Face layout."""
        return self.unquantized.shape(name)

    def load(self, name: str) -> Tensor:
        """The tensor; float32 where it is quantized: the numbers that its blocks stand for."""
        if not self._quantizes(name):
            return self.unquantized.load(name)
        return QuantizedMatrix([self.stored_rows(name)], torch.float32).dense()

    def dtype(self, name: str) -> torch.dtype:
        """The source's own, and float32 where it is quantized."""
        return torch.float32 if self._quantizes(name) else self.unquantized.dtype(name)

    def stored_rows(self, name: str) -> StoredRows:
        """A matrix in blocks."""
        if not self._quantizes(name):
            return self.unquantized.stored_rows(name)
        if name not in self._stored:
            from gguf.quants import quantize

            blocks = quantize(self.unquantized.load(name).float().contiguous().numpy(), self._kind)
            self._stored[name] = StoredRows(blocks.reshape(self.shape(name)[0], -1), int(self._kind))
        return self._stored[name]

    def stored_bytes(self, name: str) -> int:
        """Bytes of its blocks, known before it is quantized."""
        if not self._quantizes(name):
            return self.unquantized.stored_bytes(name)
        rows, columns = self.shape(name)
        values, size = block_shape(self._kind)
        return rows * (columns // values * size)

    @property
    def quantized(self) -> bool:
        """Whether some matrices are in blocks."""
        return any(self._quantizes(name) for name in self.tensor_names())

    def _quantizes(self, name: str) -> bool:
        shape = self.shape(name)
        return len(shape) == 2 and shape[1] % block_shape(self._kind)[0] == 0

    def _read_tokenizer(self) -> PreTrainedTokenizerFast:
        return self.unquantized.tokenizer()

    @property
    def generation_config(self) -> dict[str, Any]:
        """The source's own."""
        return self.unquantized.generation_config
