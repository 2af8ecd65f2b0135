"""Memory of a training step by part, and the micro-batch and recomputation that fit a budget.

Per token and block the decoder engine keeps, in elements of the compute dtype (d hidden, q heads · head_dim, k
key/value width, f feed-forward width, H heads, K key/value heads, R the ranks of the block's adapters in all):
    none    2d + 2q + 2k + 2f + R     and in float32 H + 2
    mlp     2d + 2q + 2k + R'         and in float32 H + 2            R' without gate's and up's ranks
    block   d                         and one block's `none` at a time while it is computed again
families with q/k norms H + K float32 more, with sandwich norms 2d and 2 float32 more. On top of what is kept come the
buffers of the block at work, one chunk of the head's logits and probabilities, and on the CPU the matrix kernels that
oneDNN compiles for each size of micro-batch (`batches.round_size` keeps these few).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from backhand.errors import ResourceError
from backhand.nn.family import DecoderConfig
from backhand.nn.lora_parameters import AdapterLayout
from backhand.ops.linear_cross_entropy import CHUNK_ROWS
from backhand.train.batches import round_size
from backhand.train.config import Recompute

FLOAT32_BYTES = 4
PREFERRED_TOKENS = 4096
# Measured with oneDNN 3.x on AVX512-BF16: 18 to 29 MB for the 35 products of a block, 930 MB once its cache is full.
KERNEL_BYTES = 24 << 20
ALL_KERNELS_BYTES = 930 << 20
_RECOMPUTE_COST: Mapping[Recompute, float] = {"none": 1.0, "mlp": 1.21, "block": 1.36}
_TOKENS_LOST_PER_PASS = 128
_MARGIN = 0.95


@dataclass(frozen=True)
class StepShape:
    """The micro-batches of a run under some number of rows.

    Attributes:
        tokens, supervised_tokens: of the largest one.
        sizes: how many different sizes there are.
    """

    tokens: int
    supervised_tokens: int
    sizes: int


@dataclass(frozen=True)
class ModelSize:
    """What the formula needs of a model and its adapter, per token where it says so.

    Attributes:
        dtype_bytes: of the compute dtype.
        weight_bytes: of all frozen weights in it.
        adapter_elements: trained elements.
        kept_bytes: per token, by recompute mode, of all blocks together.
        block_bytes: per token, of the buffers of the block at work, by recompute mode.
        stream_bytes: per token, of the residual stream and its gradient outside the blocks.
        head_row_bytes: per supervised token, of the head's input rows and their gradient.
        head_chunk_bytes: per row of a chunk of logits.
        kernel_bytes: compiled for each size of micro-batch.
    """

    dtype_bytes: int
    weight_bytes: int
    adapter_elements: int
    kept_bytes: Mapping[Recompute, int]
    block_bytes: Mapping[Recompute, int]
    stream_bytes: int
    head_row_bytes: int
    head_chunk_bytes: int
    kernel_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a step will take, and how it is cut.

    Attributes:
        micro_batch_rows: rows per forward and backward pass.
        recompute: what the backward pass computes again.
        parts: bytes by part, process included; they add up to `peak_bytes`.
    """

    micro_batch_rows: int
    recompute: Recompute
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """Highest resident memory to expect."""
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        """The parts in words, largest first."""
        ordered = sorted(self.parts.items(), key=lambda part: -part[1])
        return [f"{name}: {in_words(size)}" for name, size in ordered if size]


def decoder_size(config: DecoderConfig, layout: AdapterLayout, dtype_bytes: int) -> ModelSize:
    """The decoder engine's memory by its formula."""
    d, f = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads, config.num_key_value_heads
    q, k, layers = heads * config.head_dim, kv_heads * config.head_dim, len(config.layers)
    in_blocks = [slot for slot in layout.slots if slot.name.startswith("model.layers.")]
    ranks = sum(slot.rank for slot in in_blocks)
    gate_up_ranks = sum(slot.rank for slot in in_blocks if slot.name.endswith((".gate_proj", ".up_proj")))
    wide = heads + 2 + (heads + kv_heads if config.qk_norm else 0) + (2 if config.sandwich_norms else 0)
    halves = 2 * d + 2 * q + 2 * k + (2 * d if config.sandwich_norms else 0)
    mlp = layers * (halves * dtype_bytes + wide * FLOAT32_BYTES) + (ranks - gate_up_ranks) * dtype_bytes
    none = mlp + (layers * 2 * f + gate_up_ranks) * dtype_bytes
    at_work = (4 * f + 4 * d + q + 2 * k) * dtype_bytes + 2 * d * FLOAT32_BYTES
    block_weights = 2 * d * q + 2 * d * k + 3 * d * f
    # A table with trained rows is a copy of its own; a tensor trained in full has its gradient once beside the buffer.
    beside = sum(math.prod(tensor.shape) for tensor in layout.trained if tensor.token_ids is None)
    beside += config.vocab_size * d if any(tensor.token_ids is not None for tensor in layout.trained) else 0
    vocabulary = config.vocab_size * d * (1 if config.tied_head else 2)
    return ModelSize(
        dtype_bytes=dtype_bytes,
        weight_bytes=(layers * block_weights + vocabulary + beside) * dtype_bytes,
        adapter_elements=layout.element_count,
        kept_bytes={"none": none, "mlp": mlp, "block": layers * d * dtype_bytes},
        block_bytes={
            "none": at_work,
            "mlp": at_work + 2 * f * dtype_bytes,
            "block": at_work + none // max(1, layers),
        },
        stream_bytes=2 * d * dtype_bytes,
        head_row_bytes=3 * d * dtype_bytes,
        head_chunk_bytes=config.vocab_size * (dtype_bytes + FLOAT32_BYTES),
        kernel_bytes=KERNEL_BYTES,
    )


def transformers_size(
    config: Mapping[str, object], weight_elements: int, layout: AdapterLayout, dtype_bytes: int
) -> ModelSize:
    """A rough size under autograd: per token and block about 18 hidden widths, and whole rows of logits three times."""

    def number(*names: str, default: int) -> int:
        found = (config.get(name) for name in names)
        return next((value for value in found if isinstance(value, int)), default)

    d = number("hidden_size", "n_embd", "d_model", default=1024)
    layers = number("num_hidden_layers", "n_layer", "num_layers", default=24)
    vocabulary = number("vocab_size", default=50_000)
    kept = layers * 18 * d * dtype_bytes
    return ModelSize(
        dtype_bytes=dtype_bytes,
        weight_bytes=weight_elements * dtype_bytes,
        adapter_elements=layout.element_count,
        kept_bytes={"none": kept},
        block_bytes={"none": 12 * d * dtype_bytes},
        stream_bytes=2 * d * dtype_bytes,
        head_row_bytes=vocabulary * (dtype_bytes + 3 * FLOAT32_BYTES),
        head_chunk_bytes=0,
        kernel_bytes=KERNEL_BYTES,
    )


def parts_of(size: ModelSize, shape: StepShape, recompute: Recompute, process_bytes: int) -> dict[str, int]:
    """Bytes by part at the moment of a step when most is held."""
    adapter = size.adapter_elements * (4 * FLOAT32_BYTES + (size.dtype_bytes if size.dtype_bytes != 4 else 0))
    return {
        "process": process_bytes,
        "base weights": size.weight_bytes,
        "adapter, gradients and moments": adapter,
        "kept activations": shape.tokens * size.kept_bytes[recompute],
        "block at work": shape.tokens * (size.block_bytes[recompute] + size.stream_bytes),
        "head": shape.supervised_tokens * size.head_row_bytes
        + min(shape.supervised_tokens, CHUNK_ROWS) * size.head_chunk_bytes,
        "compiled kernels": min(ALL_KERNELS_BYTES, shape.sizes * size.kernel_bytes),
    }


def choose(
    size: ModelSize,
    shapes: Mapping[int, StepShape],
    *,
    budget_bytes: int | None,
    process_bytes: int,
    micro_batch_rows: int | None,
    recompute: Recompute,
    mean_tokens: float,
) -> MemoryPlan:
    """The fastest way to cut a step that fits.

    Args:
        size: of model and adapter.
        shapes: the run's largest micro-batch for each number of rows that may be chosen.
        budget_bytes: what the process may take in all; None for no limit.
        process_bytes: what it takes already, interpreter and libraries.
        micro_batch_rows, recompute: as asked for; None or `auto` to choose.
        mean_tokens: of a row, to weigh passes against each other.

    Raises:
        ResourceError: nothing fits; shows the smallest way by part, and what to change.
    """
    rows_options = sorted(shapes) if micro_batch_rows is None else [micro_batch_rows]
    modes = list(size.kept_bytes) if recompute == "auto" else [recompute]
    best: MemoryPlan | None = None
    best_cost = float("inf")
    smallest: MemoryPlan | None = None
    for mode in modes:
        for rows in rows_options:
            plan = MemoryPlan(rows, mode, parts_of(size, shapes[rows], mode, process_bytes))
            if smallest is None or plan.peak_bytes < smallest.peak_bytes:
                smallest = plan
            tokens = rows * mean_tokens
            if micro_batch_rows is None and rows > min(rows_options) and tokens > PREFERRED_TOKENS:
                continue
            cost = _RECOMPUTE_COST[mode] * (1 + _TOKENS_LOST_PER_PASS / max(1.0, tokens))
            if (budget_bytes is None or plan.peak_bytes <= _MARGIN * budget_bytes) and cost < best_cost:
                best, best_cost = plan, cost
    if best is not None:
        return best
    assert smallest is not None and budget_bytes is not None
    raise _does_not_fit(smallest, budget_bytes, asked_rows=micro_batch_rows, asked_recompute=recompute)


def _does_not_fit(
    plan: MemoryPlan, budget_bytes: int, *, asked_rows: int | None, asked_recompute: str
) -> ResourceError:
    freer = []
    if asked_rows is not None and asked_rows > 1:
        freer.append("--micro-batch-rows 1")
    if asked_recompute not in ("auto", "block"):
        freer.append("--recompute block")
    remedies = freer or ["a smaller --max-length or --rank, or --dtype bfloat16"]
    return ResourceError(
        f"training needs about {in_words(plan.peak_bytes)}, and {in_words(budget_bytes)} may be used",
        where="memory",
        why="; ".join(plan.lines()),
        next_step=f"give {' and '.join(remedies)}, or more memory with --memory",
    )


def largest_shapes(
    steps: Sequence[Sequence[int]], lengths: Sequence[int], supervised: Sequence[int], rows_options: Iterable[int]
) -> dict[int, StepShape]:
    """For each number of rows per micro-batch, what micro-batches these steps will make.

    Args:
        steps: row numbers of each step.
        lengths, supervised: tokens and supervised tokens of every row.
        rows_options: numbers of rows to look at.
    """
    shapes = {}
    ordered = [sorted(rows, key=lambda row: (-lengths[row], row)) for rows in steps]
    for count in rows_options:
        groups = [rows[start : start + count] for rows in ordered for start in range(0, len(rows), count)]
        sizes = {round_size(sum(lengths[row] for row in group)) for group in groups}
        largest_supervised = max(sum(supervised[row] for row in group) for group in groups)
        shapes[count] = StepShape(max(sizes), largest_supervised, len(sizes))
    return shapes


def in_words(size: int) -> str:
    """A number of bytes for people: 812 MB, 3.4 GB."""
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.0f} MB"
