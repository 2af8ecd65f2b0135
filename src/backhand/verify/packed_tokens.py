"""Relations between the tokens of a packed batch, for mutants and references."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.nn.batch import PackedBatch
from backhand.ops.document_groups import SegmentRun, segments


class TokenRelations(NamedTuple):
    """Relations between packed tokens. The matrices are bool, (tokens, tokens), with [i, j] about tokens i and j."""

    position: Tensor  # (tokens,) position of each token in its documents
    held: Tensor  # j is in the segment of i or in one of its ancestors
    siblings: Tensor  # i and j are in different segments that continue the same segment
    once: Tensor  # as `held`, but of several segments that continue one segment, only the first sees it


def token_relations(runs: tuple[SegmentRun, ...], device: torch.device) -> TokenRelations:
    """Return the relations between the tokens of these segments."""
    tokens = sum(run.number * run.length for run in runs)
    position = torch.zeros(tokens, dtype=torch.int64)
    held, siblings, once = (torch.zeros(tokens, tokens, dtype=torch.bool) for _ in range(3))
    children: dict[int, list[slice]] = {}  # last token of a segment → the segments that continue it so far
    for (start, stop), before in segments(runs):
        segment = slice(start, stop)
        position[segment] = len(before) + torch.arange(stop - start)
        held[segment, before] = held[segment, segment] = once[segment, segment] = True
        if before:
            last = before[-1]
            others = children.setdefault(last, [])
            # The first child sees whatever its parent sees and the parent's tokens. Later children omit the latter.
            once[segment] |= once[last] if not others else once[last] & ~(held[last] & held[:, last])
            for other in others:
                siblings[segment, other] = siblings[other, segment] = True
            others.append(segment)
    return TokenRelations(*(x.to(device) for x in (position, held, siblings, once)))


def unshare_prefixes(batch: PackedBatch) -> PackedBatch:
    """Return the same documents without shared prefixes, each as one segment."""
    paths = [batch.path(end) for end in batch.ends]
    starts = batch.offsets
    places = [place for path in paths for one in path for place in range(starts[one], starts[one + 1])]
    positions = torch.tensor(places, dtype=torch.int64, device=batch.input_ids.device)
    lengths = tuple(sum(batch.lengths[one] for one in path) for path in paths)
    return PackedBatch(batch.input_ids[positions], batch.labels[positions], lengths)
