"""Our decoder and a transformers + PEFT model with the same weights and adapter, and how far they are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backhand.kernels.builds import kernels_available
from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot
from tests.support.in_memory import InMemoryModel
from tests.support.tiny_models import expert_count

_PREFIX = "base_model.model."


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """‖ours - theirs‖ / ‖theirs‖ in float64; the norm itself where theirs is zero."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / (theirs.norm() if theirs.norm() > 0 else 1.0))


def lora_from_peft(adapted: Any, scaling: float, dtype: torch.dtype = torch.float32) -> LoRAParameters:
    """PEFT's factors in our flat buffer; the slots follow the model's order."""
    factors = {_our_name(name, adapted): tensor for name, tensor in adapted.named_parameters() if "lora_" in name}
    slots = []
    for name, lora_A in factors.items():
        if name.endswith(".lora_A"):
            lora_B = factors[name[: -len("A")] + "B"]
            experts = expert_count(adapted.get_base_model().config) if ".experts." in name else 0
            rank, module = lora_A.shape[0] // max(1, experts), name.removesuffix(".lora_A")
            turns = module.endswith("gate_up_proj") and adapted.get_base_model().config.model_type == "gpt_oss"
            sizes = lora_A.shape[1], lora_B.shape[0]
            slots.append(LoRASlot(module, *sizes, rank, scaling, experts=experts, interleaved=turns))
    lora = LoRAParameters(slots, dtype=dtype)
    for name, view in lora.named_tensors():
        view.copy_(factors[name].detach())
    return lora


def peft_gradients(adapted: Any) -> dict[str, Tensor]:
    """`<module>.lora_A|lora_B` → gradient."""
    return {_our_name(name, adapted): tensor.grad for name, tensor in adapted.named_parameters() if "lora_" in name}


def _our_name(name: str, adapted: Any) -> str:
    """`<module>.lora_A|lora_B`; PEFT's wrappers around one module's parameters name theirs alone."""
    path, _, rest = name.removeprefix(_PREFIX).partition(".lora_")
    module = path.removesuffix(".base_layer")
    if module.endswith(".mlp.experts"):
        wrapper = adapted.get_submodule(_PREFIX + path)
        module = f"{module}.{wrapper.parameter_name}"
    return f"{module}.lora_{rest.removesuffix('.default.weight')}"


def our_gradients(lora: LoRAParameters) -> dict[str, Tensor]:
    """The same keys, views of the flat buffer."""
    return {f"{name}.lora_A": lora.d_lora_A(name) for name in lora.slots} | {
        f"{name}.lora_B": lora.d_lora_B(name) for name in lora.slots
    }


def supervise(documents: Sequence[Tensor], *, share: float = 0.6, seed: int = 3) -> PackedBatch:
    """Pack documents with a random part of their tokens supervised (always at least one token of a longer document)."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for document in documents:
        targets = torch.full_like(document, IGNORE_INDEX)
        chosen = torch.rand(len(document), generator=generator) < share
        chosen[-2:-1] = True
        targets[:-1] = torch.where(chosen[:-1], document[1:], targets[:-1])
        labels.append(targets)
    return PackedBatch(torch.cat(list(documents)), torch.cat(labels), tuple(len(d) for d in documents))


def peft_loss(adapted: Any, batch: PackedBatch) -> Tensor:
    """Σ nats over supervised positions, each document on its own, in the model's dtype with float32 cross-entropy.

    In float32 torch's cross-entropy rounds 1 - p of a token that is nearly certain to nothing, and torch's form of ours
    with it. The compiled loop does not, so that it is held against float64 there.
    """
    total = torch.zeros((), dtype=torch.float64)
    documents = zip(
        batch.input_ids.split(list(batch.lengths)),
        batch.labels.split(list(batch.lengths)),
        strict=True,
    )
    for ids, labels in documents:
        logits = adapted(input_ids=ids[None]).logits[0]
        wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if wide.dtype == logits.dtype == torch.float32 and kernels_available():
            wide = logits.double()
        total = (
            total + torch.nn.functional.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum").double()
        )
    return total


class _Widening(TorchFunctionMode):
    """Replace float32 by float64 in every call of torch that names it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        widened = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **widened)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def wholly_in_float64() -> Iterator[None]:
    """Let transformers compute norms, angles and softmax in float64 too, for which it names float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widening():
            yield
    finally:
        torch.set_default_dtype(before)


def decoder_like(adapted: Any, scaling: float, *, dtype: torch.dtype = torch.float32, **options: Any) -> Decoder:
    """Our decoder with the base weights and the adapter of a PEFT model."""
    base = adapted.get_base_model()
    clean = {
        name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items() if "lora_" not in name
    }
    source = InMemoryModel(base.config.to_dict(), clean)
    decoder = Decoder.from_source(source, dtype=dtype, **options)
    decoder.attach(lora_from_peft(adapted, scaling, torch.float64 if dtype == torch.float64 else torch.float32))
    return decoder
