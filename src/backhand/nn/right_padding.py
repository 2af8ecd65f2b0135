"""Losses of a transformers model: rows of different lengths in one pass, padded on the right, without a mask.

In a causal model nothing attends to later tokens, and convolutions, scans and recurrences do not look ahead either.
Tokens after a row's last token therefore change nothing before them, and padding needs no mask. Attention kernels with
a mask are slower. The only cost is that padding is computed. Rows are grouped as long as this cost is small.

This does not hold for every model that transformers loads as a causal one. Some models attend in both directions. In
others the rotary angles depend on the length of the longest row (`dynamic` and `longrope`). For those, only rows of
equal length are computed together. `padding_obstacle` detects both: the former by computing a few tokens with and
without others after them, the latter from the configuration. The output head computes the supervised positions only
(`head_on_positions`).

With `dynamic` angles, a transformers model remembers the longest row since its creation and rotates shorter ones by
that row's angles. The loss of a row would depend on the rows before it, and a resumed run would have other bits. Every
pass therefore starts with the initial angles (`reset_dynamic_rope`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from backhand.nn.batch import IGNORE_INDEX, PackedBatch

_FEW_POSITIONS = 64
_PART_PADDED = 4
"""Padding may be about a quarter of the computed positions: one more pass costs about as much as 64 tokens."""

_BY_LENGTH = ("dynamic", "longrope")
_PROBED = 5
_PROBED_AFTER = 4


def supervised_losses(model: nn.Module, batch: PackedBatch, pads: Callable[[], bool]) -> Iterator[Tensor]:
    """Yield, for each pass, the nats of its supervised positions, (supervised,) float32, in the batch's order.

    Args:
        model: a causal language model of transformers, in evaluation mode, with or without an adapter.
        batch: packed documents that share nothing.
        pads: returns True if rows of different lengths may be computed together, see `padding_obstacle`. It is called
            only if there are such rows.
    """
    padded = len(set(batch.lengths)) > 1 and pads()
    for input_ids, labels in padded_groups(batch, padded=padded):
        losses = _losses(model, input_ids, labels)
        if losses is not None:
            yield losses


def _losses(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor | None:
    """Return the nats of every supervised position of (documents, length) ids, or None if there are none."""
    supervised = labels != IGNORE_INDEX
    if not bool(supervised.any()):
        return None
    reset_dynamic_rope(model)
    with head_on_positions(model.get_output_embeddings(), supervised):
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    # A model that multiplies by the head's weight directly has computed every position.
    logits = logits[supervised] if logits.shape[:2] == supervised.shape else logits[0]
    return nn.functional.cross_entropy(logits.float(), labels[supervised], reduction="none")


def concat_losses(losses: Iterable[Tensor], device: torch.device) -> Tensor:
    """Concatenate the losses of all passes, (supervised,). `device` is that of an empty result."""
    parts = list(losses)
    return torch.cat(parts) if parts else torch.zeros(0, device=device)


def padded_groups(batch: PackedBatch, *, padded: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield documents of a batch as (documents, longest) ids and labels, in order.

    Documents without a label are left out.

    Args:
        batch: packed documents that share nothing.
        padded: neighbours of different lengths may be grouped. Padding has no label.

    Raises:
        ValueError: documents of the batch share tokens.
    """
    if batch.parents:
        raise ValueError("transformers computes each document separately: documents of a batch must not share tokens")
    ids, labels = batch.input_ids.split(batch.lengths), batch.labels.split(batch.lengths)
    supervised = (batch.labels != IGNORE_INDEX).cumsum(0).tolist()
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    counted = [0, *(supervised[end - 1] if end else 0 for end in ends)]
    labelled = [number for number in range(len(ids)) if counted[number + 1] > counted[number]]
    for group in _groups([len(ids[number]) for number in labelled], padded=padded):
        chosen = [labelled[number] for number in group]
        # Any token can be the padding, because nothing attends to it.
        yield (
            nn.utils.rnn.pad_sequence([ids[number] for number in chosen], batch_first=True),
            nn.utils.rnn.pad_sequence([labels[number] for number in chosen], True, IGNORE_INDEX),
        )


def _groups(lengths: list[int], *, padded: bool) -> Iterator[list[int]]:
    """Yield groups of neighbours, by number, that need little padding."""
    group: list[int] = []
    longest = tokens = 0
    for number, length in enumerate(lengths):
        most, sum_ = max(longest, length), tokens + length
        padding = most * (len(group) + 1) - sum_
        if group and padding > (max(_FEW_POSITIONS, sum_ // _PART_PADDED) if padded else 0):
            yield group
            group, most, sum_ = [], length, length
        group.append(number)
        longest, tokens = most, sum_
    if group:
        yield group


@torch.no_grad()
def padding_obstacle(model: nn.Module) -> str | None:
    """Return the reason why rows of different lengths must not be computed together by this model, or None.

    Args:
        model: a transformers model in evaluation mode, with or without an adapter. It is called three times with a few
            tokens.
    """
    config: Any = getattr(model, "config", None)
    rule = None if config is None else _rule_by_length(config.to_dict())
    if rule is not None:
        return f"its rotary angles ({rule}) depend on the length of the longest row"
    known: Any = model
    vocabulary = int(known.get_input_embeddings().weight.shape[0])
    device = known.get_input_embeddings().weight.device
    drawn = torch.randint(vocabulary, (2, _PROBED + _PROBED_AFTER), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    short = drawn[:, :_PROBED]

    def logits(ids: Tensor) -> Tensor:
        output: Tensor = known(input_ids=ids, use_cache=False).logits[:, :_PROBED]
        return output.double()

    alone = logits(short[:1])
    # Another number of rows or tokens changes the order of sums. This difference alone is no sign of looking ahead.
    rounding = _distance(logits(short)[:1], alone)
    changed = _distance(logits(drawn)[:1], alone)
    if changed > max(8 * rounding, _TOLERANCE.get(known.dtype, 0.05)):
        return "what comes after a token changes what it computes for that token"
    return None


_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny))


def _rule_by_length(config: Mapping[str, object]) -> str | None:
    """Return a rotary rule in the configuration that depends on the length of the input, or None."""
    for key, value in config.items():
        if key in ("rope_type", "type") and value in _BY_LENGTH:
            return str(value)
        if isinstance(value, Mapping) and (rule := _rule_by_length(value)) is not None:
            return rule
    return None


def reset_dynamic_rope(model: nn.Module) -> None:
    """Reset `dynamic` rotary angles to their initial values. Other models are not changed.

    Args:
        model: a transformers model. Its rotary modules store the initial angles as `original_inv_freq`; in models with
            several kinds of layers, with the kind as prefix.
    """
    for module, prefix in _dynamic_rope_modules(model):
        module.register_buffer(f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"), persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", getattr(module, "original_max_seq_len", 0))


_DYNAMIC: WeakKeyDictionary[nn.Module, tuple[tuple[nn.Module, str], ...]] = WeakKeyDictionary()
"""Results of `_dynamic_rope_modules`: searching all modules takes longer than a short pass."""


def _dynamic_rope_modules(model: nn.Module) -> tuple[tuple[nn.Module, str], ...]:
    """Return the modules of this model with `dynamic` angles, and the prefix of the names of their angles."""
    if model not in _DYNAMIC:
        modules = []
        for module in model.modules():
            rules = getattr(module, "rope_type", None)
            for kind, rule in (rules if isinstance(rules, Mapping) else {"": rules}).items():
                prefix = f"{kind}_" if kind else ""
                if rule == "dynamic" and getattr(module, f"{prefix}original_inv_freq", None) is not None:
                    modules.append((module, prefix))
        _DYNAMIC[model] = tuple(modules)
    return _DYNAMIC[model]


@contextmanager
def head_on_positions(head: nn.Module | None, chosen: Tensor) -> Iterator[None]:
    """Inside the context, the output head computes only the chosen positions: logits (1, chosen positions, vocab).

    Args:
        head: the module that computes logits from hidden states (rows, length, hidden). Nothing happens for None.
        chosen: (rows, length) bool.
    """
    if head is None:
        yield
        return

    def choose(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        return (hidden[chosen][None], *inputs[1:]) if hidden.shape[:2] == chosen.shape else inputs

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
