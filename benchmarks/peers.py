"""What is compared in the training-step benchmark: each peer holds a model and makes one optimizer step at a time.

All start from the same base weights, the same adapter numbers and the same tokens. A peer is built in a process of
its own (see `worker.py`), so that allocator settings and caches of one cannot help or hurt another.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANK, ALPHA, LEARNING_RATE = 16, 32.0, 2e-4


@dataclass(frozen=True)
class Workload:
    """rows sequences of length tokens, all supervised; the same seed gives the same tokens and adapter everywhere."""

    model: str
    rows: int
    length: int
    dtype: str
    seed: int = 0

    def tokens(self, vocab_size: int) -> Tensor:
        """(rows, length) int64."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(vocab_size, (self.rows, self.length), generator=generator)


class Peer(Protocol):
    """One way to train."""

    def step(self) -> tuple[float, float]:
        """One optimizer step; (mean loss in nats, gradient norm)."""
        ...


def tune_process() -> None:
    """What a run of ours sets at its start, here for tuned peers too: the allocator, and the faster float32 route."""
    from backhand.nn.compute import keep_freed_memory, medium_precision_pays

    keep_freed_memory()
    if medium_precision_pays():
        torch.set_float32_matmul_precision("medium")


def initial_factor(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the same starting numbers for every peer. lora_B is not zero, so that every gradient is at work.

    Args:
        name: of the factor, such as `model.layers.0.self_attn.q_proj.lora_A`.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * 0.02


class BackhandPeer:
    """This project's decoder engine with its own optimizer wrapper."""

    def __init__(self, workload: Workload, recompute: str = "none", *, quantized: bool = False) -> None:
        from backhand.nn.decoder.decoder import Decoder
        from backhand.nn.loading import open_model
        from backhand.nn.lora_parameters import LoRAParameters, LoRASlot

        tune_process()
        decoder = Decoder.from_source(
            open_model(workload.model), dtype=DTYPES[workload.dtype], recompute=recompute, quantized=quantized
        )
        lora = LoRAParameters(
            LoRASlot(name, i, o, RANK, ALPHA / RANK)
            for name, (o, i) in decoder.module_shapes().items()
            if name != "lm_head"
        )
        self.train(decoder, lora, workload, decoder.config.vocab_size)

    def train(self, model: Any, lora: Any, workload: Workload, vocab_size: int) -> None:
        """Give the adapter its numbers, and make batch and optimizer."""
        from backhand.loop.step import AdapterOptimizer
        from backhand.nn.batch import IGNORE_INDEX, PackedBatch
        from backhand.options.config import OptimizationOptions

        self.model, self.lora = model, lora
        for name, view in self.lora.named_tensors():
            view.copy_(initial_factor(workload.seed, name, tuple(view.shape)))
        self.model.attach(self.lora)
        # Its moments are part of the step's memory, as torch.optim's are, which appear in the first step.
        self.make_optimizer = lambda: AdapterOptimizer(self.lora, OptimizationOptions(learning_rate=LEARNING_RATE))
        self.optimizer: AdapterOptimizer | None = None
        self.first = True
        ids = workload.tokens(vocab_size)
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[:, :-1] = ids[:, 1:]
        self.batch = PackedBatch(ids.flatten(), labels.flatten(), (workload.length,) * workload.rows)

    def step(self) -> tuple[float, float]:
        """Forward, backward by hand, clipping, AdamW, and the cast of the factors to the compute dtype."""
        supervised = self.batch.supervised_tokens
        self.optimizer = optimizer = self.optimizer or self.make_optimizer()
        optimizer.clear()
        loss = self.model.loss_and_gradients(self.batch, 1 / supervised)
        norm = optimizer.clip()
        optimizer.step(LEARNING_RATE)
        self.lora.refresh_compute(self.model.dtype)
        if self.first:
            from backhand.nn.compute import release_freed_memory

            # What the first step compiles settles among its buffers; a run gives the gaps back as well
            # (`training.machine.MemoryKeeper`).
            release_freed_memory()
            self.first = False
        return float(loss) / supervised, norm


class TransformersPeer(BackhandPeer):
    """This project's way through transformers and autograd, for models that the decoder engine does not know."""

    def __init__(self, workload: Workload) -> None:
        from backhand.adapters.config import LoRAConfig
        from backhand.engines.transformers_engine import TransformersModel
        from backhand.nn.lora_parameters import LoRAParameters

        tune_process()
        model = TransformersModel(transformers_model(workload.model, DTYPES[workload.dtype]))
        slots, _ = model.inject(LoRAConfig(rank=RANK, alpha=ALPHA, dropout=0.0))
        self.train(model, LoRAParameters(slots), workload, model.vocab_size)


class PeftPeer:
    """transformers + PEFT + autograd.

    Args:
        workload: model and batch.
        tuned: allocator settings, adapters in the base's dtype and a fused optimizer; else as PEFT's documentation
        has it. checkpointing: gradient checkpointing as transformers turns it on. nf4: the base in bitsandbytes' four
        bits, the scales quantized as well; then the model is a Hugging Face directory.
    """

    def __init__(
        self, workload: Workload, *, tuned: bool = False, checkpointing: bool = False, nf4: bool = False
    ) -> None:
        import peft

        if tuned:
            tune_process()
        load = nf4_model if nf4 else transformers_model
        base = load(workload.model, DTYPES[workload.dtype])
        config = peft.LoraConfig(
            r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        self.model = peft.get_peft_model(base, config, autocast_adapter_dtype=not tuned)
        self.model.train()
        if checkpointing:
            self.model.gradient_checkpointing_enable()
            self.model.enable_input_require_grads()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    own = name.removeprefix("base_model.model.").removesuffix(".default.weight")
                    parameter.copy_(initial_factor(workload.seed, own, tuple(parameter.shape)))
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=LEARNING_RATE, weight_decay=0.0, **({"fused": True} if tuned else {})
        )
        self.ids = workload.tokens(base.config.vocab_size)

    def step(self) -> tuple[float, float]:
        """Forward, autograd's backward, clipping and AdamW."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return float(loss.detach()), float(norm)


def transformers_model(name: str, dtype: torch.dtype) -> Any:
    """The same base weights in a transformers model."""
    from backhand.nn.loading import open_model
    from backhand.nn.loading.transformers_model import load_transformers_model

    return load_transformers_model(open_model(name), dtype=dtype)


def nf4_model(directory: str, dtype: torch.dtype) -> Any:
    """A Hugging Face directory quantized by bitsandbytes as it is read, as its documentation has it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )
    return model.requires_grad_(False)


MOST_ACTIVATION_BYTES = 2**30
"""Size of the activations that `CeilingPeer` holds, of at least one layer."""

ATTENTION_PRODUCTS = 7
"""Products of attention's forward (S, O) and backward (S again, ∂L/∂P, ∂L/∂V, ∂L/∂Q, ∂L/∂K)."""


def attention_columns(length: int, window: int | None, width: int, hidden_size: int) -> int:
    """Return the columns of a dense product with as many multiplications per token as attention's products.

    Only visible pairs of queries and keys count. A row of n tokens has Σ min(i, window) of them for i = 1 … n.

    Args:
        length: n, the tokens of a row.
        window: the number of keys that a query sees, including itself; None for all.
        width: heads · head_dim.
        hidden_size: the rows of the dense product's weight.
    """
    seen = length if window is None else min(window, length)
    pairs = seen * (seen + 1) // 2 + (length - seen) * seen
    return round(ATTENTION_PRODUCTS * pairs * width / (length * hidden_size))


class CeilingPeer:
    """The matrix products of a step alone: forward and input gradients, rank-sized ones and attention's included.

    Attention's products are replaced by one dense product with as many multiplications, so that they have the rate of
    the linear layers' products.
    """

    def __init__(self, workload: Workload) -> None:
        from backhand.nn.families.family_parsing import decoder_config
        from backhand.nn.loading import open_model

        tune_process()
        config = decoder_config(open_model(workload.model).config)
        dtype, self.layers = DTYPES[workload.dtype], len(config.layers)
        tokens = workload.rows * workload.length
        d, f = config.hidden_size, config.intermediate_size
        q, k = config.num_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        shapes = [(d, q + 2 * k, 3), (q, d, 1), (d, 2 * f, 2), (f, d, 1)]

        def operands(rows: int, n_in: int, n_out: int, members: int) -> tuple[Tensor, ...]:
            new = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
            rank = RANK * members
            return new(rows, n_in), new(n_out, n_in), new(rows, n_out), new(rank, n_in), new(n_out, rank)

        # Weights of their own for each layer: the real step reads each from memory once forward and once backward.
        # Layers share activations that would not fit into memory; what is left is larger than any cache.
        layer_bytes = tokens * sum(i + o for i, o, _ in shapes) * dtype.itemsize
        distinct = max(1, min(self.layers, MOST_ACTIVATION_BYTES // layer_bytes))
        self.products: list[tuple[Tensor, ...]] = []
        for layer in range(self.layers):
            for j, (i, o, m) in enumerate(shapes):
                x, weight, g, lora_A, lora_B = operands(tokens if layer < distinct else 0, i, o, m)
                if layer >= distinct:
                    x, _, g, _, _ = self.products[layer % distinct * len(shapes) + j]
                self.products.append((x, weight, g, lora_A, lora_B))
        self.head = operands(256, d, config.vocab_size, 1)
        self.chunks = (tokens + 255) // 256
        columns = [attention_columns(workload.length, one.window, q, d) for one in config.layers]
        self.attention = [torch.randn(n, d).to(dtype) for n in columns]

    @torch.no_grad()
    def step(self) -> tuple[float, float]:
        """Every product of one step once."""
        for x, weight, g, lora_A, lora_B in self.products:
            h = x @ lora_A.T
            (x @ weight.T).addmm_(h, lora_B.T)
            d_h = g @ lora_B
            (g @ weight).addmm_(d_h, lora_A)
            d_h.T @ x
            g.T @ h
        x, weight, g, _, _ = self.head
        for _ in range(self.chunks):
            x @ weight.T
            g @ weight
            for attention in self.attention:
                x @ attention.T
        return float("nan"), float("nan")


PEERS = {
    "backhand": BackhandPeer,
    "backhand-recompute-mlp": lambda w: BackhandPeer(w, "mlp"),
    "backhand-recompute-block": lambda w: BackhandPeer(w, "block"),
    "backhand-transformers": TransformersPeer,
    "backhand-quantized": lambda w: BackhandPeer(w, quantized=True),
    "backhand-quantized-torch": lambda w: BackhandPeer(w, quantized=True),
    "backhand-quantized-recompute-block": lambda w: BackhandPeer(w, "block", quantized=True),
    "peft": PeftPeer,
    "peft-nf4": lambda w: PeftPeer(w, nf4=True),
    "peft-nf4-checkpointing": lambda w: PeftPeer(w, nf4=True, checkpointing=True),
    "peft-tuned": lambda w: PeftPeer(w, tuned=True),
    "peft-tuned-openmp": lambda w: PeftPeer(w, tuned=True),
    "peft-checkpointing": lambda w: PeftPeer(w, checkpointing=True),
    "products-alone": CeilingPeer,
}
