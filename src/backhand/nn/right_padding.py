"""Losses of a transformers model: rows of unequal length in one pass, padded on the right, without a mask.

In a causal model nothing attends to what comes after it, and convolutions, scans and recurrences of causal models do
not look ahead either: what stands behind a row's last token changes nothing before it. So the padding needs no mask,
whose attention kernels are slower, and only its positions are computed in vain. Rows are put together as long as these
stay few.

That is not so of every model that transformers loads as a causal one. Where what follows is looked at (attention in
both directions), or where the angles of the rotary embedding depend on the length of the longest row (`dynamic` and
`longrope`), rows of equal length alone are computed together. `why_equal_lengths` finds out: the former by computing a
few tokens with and without others behind them, the latter by the configuration. The output head sees the supervised
positions alone (`chosen_positions`).

With `dynamic` angles a model of transformers also remembers the longest row since it was made, and turns shorter ones
by that row's angles: what a row costs would depend on the rows before it, and a run that is resumed would end in other
bits. So every pass begins with the angles that the model was made with (`forget_lengths`).
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
"""Padding may be one position in four or so of what is computed: one more pass costs about as much as 64 tokens."""

_BY_LENGTH = ("dynamic", "longrope")
_PROBED = 5
_BEHIND = 4


def supervised_losses(model: nn.Module, batch: PackedBatch, pads: Callable[[], bool]) -> Iterator[Tensor]:
    """Pass after pass the nats of its supervised positions, (supervised,) float32, in the batch's order.

    Args:
        model: a causal language model of transformers, in evaluation mode, with an adapter or without.
        batch: documents behind one another, of which none shares anything.
        pads: whether rows of unequal length may stand together, see `why_equal_lengths`; asked where there are some.
    """
    padded = len(set(batch.lengths)) > 1 and pads()
    for input_ids, labels in rows_together(batch, padded=padded):
        losses = _losses(model, input_ids, labels)
        if losses is not None:
            yield losses


def _losses(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor | None:
    """Nats of every supervised position of (documents, length) ids; None where there is none."""
    supervised = labels != IGNORE_INDEX
    if not bool(supervised.any()):
        return None
    forget_lengths(model)
    with chosen_positions(model.get_output_embeddings(), supervised):
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    # A model that multiplies by the head's weight itself has computed every position.
    logits = logits[supervised] if logits.shape[:2] == supervised.shape else logits[0]
    return nn.functional.cross_entropy(logits.float(), labels[supervised], reduction="none")


def joined(losses: Iterable[Tensor], device: torch.device) -> Tensor:
    """Those of all passes, (supervised,), on this device where there are none."""
    found = list(losses)
    return torch.cat(found) if found else torch.zeros(0, device=device)


def rows_together(batch: PackedBatch, *, padded: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Documents of a batch as (documents, longest) ids and labels, in their order; those without a label are left out.

    Args:
        batch: documents behind one another, of which none shares anything.
        padded: whether neighbours of unequal length may stand together; what is added has no label.

    Raises:
        ValueError: documents of the batch share tokens.
    """
    if batch.parents:
        raise ValueError("transformers takes each document whole: those of a batch must not share tokens")
    ids, labels = batch.input_ids.split(batch.lengths), batch.labels.split(batch.lengths)
    supervised = (batch.labels != IGNORE_INDEX).cumsum(0).tolist()
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    counted = [0, *(supervised[end - 1] if end else 0 for end in ends)]
    left = [number for number in range(len(ids)) if counted[number + 1] > counted[number]]
    for group in _groups([len(ids[number]) for number in left], padded=padded):
        chosen = [left[number] for number in group]
        # Any token may stand there: it is looked at by nothing.
        yield (
            nn.utils.rnn.pad_sequence([ids[number] for number in chosen], batch_first=True),
            nn.utils.rnn.pad_sequence([labels[number] for number in chosen], True, IGNORE_INDEX),
        )


def _groups(lengths: list[int], *, padded: bool) -> Iterator[list[int]]:
    """Neighbours by number, with little to pad in each group."""
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
def why_equal_lengths(model: nn.Module) -> str | None:
    """Why rows of unequal length may not stand together in a pass of this model; None where they may.

    Args:
        model: of transformers, in evaluation mode, without an adapter or with it; it is computed three times, a few
            tokens each.
    """
    config: Any = getattr(model, "config", None)
    rule = None if config is None else _rule_by_length(config.to_dict())
    if rule is not None:
        return f"its rotary angles ({rule}) depend on the length of the longest row"
    known: Any = model
    vocabulary = int(known.get_input_embeddings().weight.shape[0])
    device = known.get_input_embeddings().weight.device
    drawn = torch.randint(vocabulary, (2, _PROBED + _BEHIND), generator=torch.Generator().manual_seed(0)).to(device)
    short = drawn[:, :_PROBED]

    def logits(ids: Tensor) -> Tensor:
        found: Tensor = known(input_ids=ids, use_cache=False).logits[:, :_PROBED]
        return found.double()

    alone = logits(short[:1])
    # Another number of rows or tokens is another order of sums: what that alone changes is no sign of anything.
    rounding = _distance(logits(short)[:1], alone)
    changed = _distance(logits(drawn)[:1], alone)
    if changed > max(8 * rounding, _TOLERANCE.get(known.dtype, 0.05)):
        return "what comes after a token changes what it computes for that token"
    return None


_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny))


def _rule_by_length(config: Mapping[str, object]) -> str | None:
    """A rotary rule anywhere in a configuration that looks at the length of what is computed."""
    for key, value in config.items():
        if key in ("rope_type", "type") and value in _BY_LENGTH:
            return str(value)
        if isinstance(value, Mapping) and (found := _rule_by_length(value)) is not None:
            return found
    return None


def forget_lengths(model: nn.Module) -> None:
    """Let `dynamic` rotary angles be those of the rows that come next, whatever was computed before; else nothing.

    Args:
        model: of transformers, whose rotary modules keep the angles they were made with as `original_inv_freq`, in
            models with several kinds of layers under the kind's name.
    """
    for module, prefix in _turning_by_length(model):
        module.register_buffer(f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"), persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", getattr(module, "original_max_seq_len", 0))


_DYNAMIC: WeakKeyDictionary[nn.Module, tuple[tuple[nn.Module, str], ...]] = WeakKeyDictionary()
"""What `_turning_by_length` found: looking through all modules takes longer than a pass of few tokens can spare."""


def _turning_by_length(model: nn.Module) -> tuple[tuple[nn.Module, str], ...]:
    """Modules of this model with `dynamic` angles, and how the names begin under which each keeps them."""
    if model not in _DYNAMIC:
        found = []
        for module in model.modules():
            rules = getattr(module, "rope_type", None)
            for kind, rule in (rules if isinstance(rules, Mapping) else {"": rules}).items():
                prefix = f"{kind}_" if kind else ""
                if rule == "dynamic" and getattr(module, f"{prefix}original_inv_freq", None) is not None:
                    found.append((module, prefix))
        _DYNAMIC[model] = tuple(found)
    return _DYNAMIC[model]


@contextmanager
def chosen_positions(head: nn.Module | None, chosen: Tensor) -> Iterator[None]:
    """Inside, a model's output head sees the chosen positions alone, and gives logits (1, chosen positions, vocab).

    Args:
        head: the module that makes logits of hidden states (rows, length, hidden); None does nothing.
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
