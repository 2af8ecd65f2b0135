"""The state-space scan with states that begin and end somewhere: what generation needs."""

from __future__ import annotations

import pytest
import torch

from backhand.nn.batch import document_runs
from backhand.ops.document_groups import SegmentRun
from backhand.ops.ssd import ssd_forward, ssd_reference

GROUPS, HEADS, STATE_WIDTH, WIDTH = 2, 6, 5, 7


def inputs(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    b, c = normal(tokens, GROUPS, STATE_WIDTH), normal(tokens, GROUPS, STATE_WIDTH)
    return [normal(tokens, HEADS, WIDTH), normal(tokens, HEADS).abs(), b, c], [normal(HEADS), normal(HEADS)]


def zero_states(documents):
    return torch.zeros(documents, GROUPS, STATE_WIDTH, HEADS // GROUPS * WIDTH, dtype=torch.float64)


def rows(tensors, places):
    return [x[places] for x in tensors]


@pytest.mark.parametrize("cut", [1, 3, 4, 8, 10])
def test_a_document_in_two_pieces_is_the_document(cut):
    tokens, heads = inputs(11)
    expected = ssd_reference(*tokens, *heads, document_runs((11,)))
    states = zero_states(1)
    first, _ = ssd_forward(*rows(tokens, slice(0, cut)), *heads, document_runs((cut,)), states=states, chunk=4)
    rest = document_runs((11 - cut,))
    second, _ = ssd_forward(*rows(tokens, slice(cut, None)), *heads, rest, states=states, chunk=4)
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=1e-12, atol=1e-12)


def test_documents_of_several_lengths_then_token_by_token():
    lengths, more = (2, 9, 5), 3
    tokens, heads = inputs(sum(lengths) + more * len(lengths))
    total = [length + more for length in lengths]
    expected = ssd_reference(*tokens, *heads, document_runs(total))
    starts = [sum(total[:number]) for number in range(len(total))]
    states = zero_states(len(lengths))
    begin = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    y, _ = ssd_forward(*rows(tokens, begin), *heads, document_runs(lengths), states=states, chunk=4)
    torch.testing.assert_close(y, expected[begin], rtol=1e-12, atol=1e-12)
    for step in range(more):
        now = torch.tensor([start + n + step for start, n in zip(starts, lengths, strict=True)])
        y, _ = ssd_forward(*rows(tokens, now), *heads, document_runs((1,) * len(lengths)), states=states)
        torch.testing.assert_close(y, expected[now], rtol=1e-12, atol=1e-12)


def test_a_document_without_tokens_keeps_its_state():
    states, (tokens, heads) = zero_states(3).add_(1.5), inputs(5)
    runs = SegmentRun(0, 1, 2), SegmentRun(2, 1, 0), SegmentRun(2, 1, 3)
    ssd_forward(*tokens, *heads, runs, states=states, chunk=2)
    assert states[1].eq(1.5).all()
    assert states[0].ne(1.5).all()
    assert states[2].ne(1.5).all()


def test_a_segment_that_continues_another_begins_with_no_state():
    tokens, heads = inputs(5)
    with pytest.raises(ValueError, match="continues another"):
        ssd_forward(*tokens, *heads, document_runs((3, 2), (-1, 0)), states=zero_states(2))
