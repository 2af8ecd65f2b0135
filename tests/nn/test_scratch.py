"""Buffers that blocks share: one per name, without overlap, in the memory reserved for the logits if there is any."""

from __future__ import annotations

import pytest
import torch

from backhand.nn.scratch import Scratch

LIKE = torch.empty(0)


def storage(tensor: torch.Tensor) -> int:
    """Return the address of the tensor's memory, which other tensors may share."""
    return tensor.untyped_storage().data_ptr()


def test_a_name_is_one_buffer_until_it_is_let_go():
    scratch = Scratch()
    first = scratch.take("normed", (4, 3), LIKE).fill_(1)
    assert scratch.take("normed", (3, 3), LIKE).data_ptr() == first.data_ptr()
    assert scratch.take("product", (4, 3), LIKE).data_ptr() != first.data_ptr()
    assert scratch.take("normed", (5, 3), LIKE).shape == (5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_do_not_overlap_in_the_reserved_memory(dtype):
    scratch, like = Scratch(), LIKE.to(dtype)
    scratch.reserve((100, 20), like)
    names = ("normed", "attended", "product")
    buffers = [scratch.take(name, (7, 11), like).fill_(place) for place, name in enumerate(names)]
    assert len({storage(buffer) for buffer in buffers}) == 1
    assert [buffer.unique().tolist() for buffer in buffers] == [[0], [1], [2]]
    assert all(buffer.data_ptr() % 64 == 0 for buffer in buffers)
    scratch.release()
    logits = scratch.take("logits", (100, 20), like)
    assert storage(logits) == storage(buffers[0])


def test_a_tensor_without_room_is_allocated_separately():
    scratch = Scratch()
    scratch.reserve((10, 10), LIKE)
    inside, large = scratch.take("normed", (6, 10), LIKE), scratch.take("product", (6, 10), LIKE)
    wide = scratch.take("wide", (2, 2), LIKE.double())
    assert storage(inside) != storage(large)
    assert wide.dtype == torch.float64
    scratch.release(reserved=True)
    assert storage(scratch.take("normed", (6, 10), LIKE)) != storage(inside)
