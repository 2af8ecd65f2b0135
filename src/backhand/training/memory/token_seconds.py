"""How long a model of any size takes for a token of training here, from its sizes alone: nothing of it is read.

    seconds = products(shapes) + r Σ_blocks (2d + 2q + 2k + 3f)

The products with the frozen matrices, forward and backward, are timed in the model's own shapes: how many operations a
second a processor makes of them depends on the shape and on its instructions (bfloat16 with AMX or without), while all
else in a block does not: norms, rotation, attention, activation, the factors of the adapter. That takes r seconds for
each number that a token has there (d hidden, q and k widths of queries and keys or what another mixer has in their
place, f feed-forward width, of experts those that a token goes to), and a share of the step that is larger the faster
the products are. r is timed on the blocks of a small model, of which the products are taken off:

    r = (t(n + 1 blocks) - t(1 block)) / n - products of a block, over the numbers of a token in a block

The softmax of the logits and the longer attention of longer rows are left out.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_adapter
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.weights import dense_views, empty_weights, module_shapes
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.frozen_matrix import frozen_input_gradient, frozen_linear
from backhand.training.memory.coarse import mixer_width, mlp_width
from backhand.training.memory.speed import Clock

ROWS, ROW_TOKENS = 4, 256
_FEW, _MORE = 1, 3
_SMALL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": _MORE,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": ROW_TOKENS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
_PIECE_VALUES = 1 << 23
_ROUNDS = 3
_ENOUGH_TOKENS = 256
"""From here on a product takes about as long a token."""
Matrices = Counter[tuple[int, int]]
"""(out, in) of the frozen matrices that a token is multiplied with, and how many such there are."""


class TokenSeconds:
    """Measures as it is asked; a second model of the same shapes measures nothing again.

    Args:
        dtype: the compute dtype.
        clock: seconds of all threads together.
    """

    def __init__(self, dtype: torch.dtype, clock: Clock = time.process_time) -> None:
        self._dtype = dtype
        self._clock = clock
        self._measured: dict[tuple[int, int], float] = {}

    def of(self, config: DecoderConfig) -> float:
        """Seconds of a token of training, in a micro-batch of 4 × 256, all of them supervised."""
        head = Counter({(config.vocab_size, config.hidden_size): 1})
        return self._products_s(matrices_of(config) + head) + self._rest_s * numbers_in_blocks(config)

    def _products_s(self, matrices: Matrices) -> float:
        """Seconds of a token's products with all frozen matrices, forward and backward."""
        return sum(count * self._matrix_s(*shape) for shape, count in matrices.items())

    def _matrix_s(self, outputs: int, inputs: int) -> float:
        """Seconds of a token's two products with a matrix, from those with its first rows."""
        if (outputs, inputs) not in self._measured:
            rows = min(outputs, max(1, _PIECE_VALUES // inputs))
            weight, x = _drawn(self._dtype, rows, inputs), _drawn(self._dtype, _ENOUGH_TOKENS, inputs)
            (taken_s,) = self._fastest([lambda: frozen_input_gradient(frozen_linear(x, weight), weight)])
            self._measured[outputs, inputs] = taken_s / _ENOUGH_TOKENS * outputs / rows
        return self._measured[outputs, inputs]

    @cached_property
    def _rest_s(self) -> float:
        """r: of one number that a token has in a block, besides the products."""
        whole = decoder_config(dict(_SMALL))
        few, more = (_small_decoder(whole, layers, self._dtype) for layers in (_FEW, _MORE))
        tokens = ROWS * ROW_TOKENS
        ids = torch.randint(whole.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
        batch = PackedBatch(ids, ids.roll(-1), (ROW_TOKENS,) * ROWS)
        few_s, more_s = self._fastest([partial(model.loss_and_gradients, batch, 1.0, 0) for model in (few, more)])
        block = matrices_of(replace(whole, layers=whole.layers[:1]))
        rest_s = (more_s - few_s) / (_MORE - _FEW) / tokens - self._products_s(block)
        return max(0.0, rest_s) * _MORE / numbers_in_blocks(whole)

    def _fastest(self, works: Sequence[Callable[[], object]]) -> list[float]:
        """Seconds of the fastest of a few times of each, in turns, after one that compiles kernels and reads pages."""
        best = [math.inf] * len(works)
        for done in range(1 + _ROUNDS):
            for number, work in enumerate(works):
                began = self._clock()
                work()
                if done:
                    best[number] = min(best[number], self._clock() - began)
        return [taken / torch.get_num_threads() for taken in best]


def matrices_of(config: DecoderConfig) -> Matrices:
    """Of a family's blocks, as they lie stacked; of a layer's experts as many rows as those that a token goes to."""
    found: Matrices = Counter()
    for layer, block in zip(config.layers, empty_weights(config, torch.float32, "meta").blocks, strict=True):
        for field in fields(block):
            matrix = getattr(block, field.name)
            if isinstance(matrix, Tensor) and matrix.dim() == 2:
                rows, columns = matrix.shape
                if layer.experts and config.mixture is not None and field.name in ("gate_up", "down"):
                    rows = rows // config.mixture.experts * config.mixture.chosen
                found[rows, columns] += 1
    return found


def numbers_in_blocks(config: DecoderConfig) -> int:
    """What a token has in all blocks, where every module's input and output is counted once; of experts, its own."""
    return sum(
        2 * config.hidden_size + mixer_width(config, layer) + 3 * mlp_width(config, layer) for layer in config.layers
    )


def _drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers like those of weights; with zeros or denormals a processor may be faster or slower."""
    return torch.empty(shape).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).to(dtype)


def _small_decoder(whole: DecoderConfig, layers: int, dtype: torch.dtype) -> Decoder:
    """Random weights, and the adapter that a run has by default."""
    config = replace(whole, layers=whole.layers[:layers])
    weights = empty_weights(config, dtype)
    for _, view in dense_views(weights, config):
        view.copy_(_drawn(dtype, *view.shape))
    decoder = Decoder(config, weights)
    lora = LoRAParameters(resolve_adapter(LoRAConfig(), module_shapes(config)).slots)
    lora.initialise(torch.Generator().manual_seed(0))
    decoder.attach(lora)
    lora.refresh_compute(dtype)
    return decoder
