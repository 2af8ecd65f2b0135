"""What a file is taken for by its first bytes."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save

from backhand.reading import kind_of


def header_of_length(length: int) -> bytes:
    """A safetensors file whose header has this length, a multiple of 8."""
    for filler in range(length):
        data = save({"x": torch.ones(1)}, {"filler": "x" * filler} if filler else None)
        if int.from_bytes(data[:8], "little") == length:
            return data
    raise AssertionError("no such header")


# 640 = 0x0280 begins as a pickle does (0x80, protocol 2), 1152 = 0x0480 as one of protocol 4.
@pytest.mark.parametrize("length", [640, 1152])
def test_the_length_of_a_header_is_not_taken_for_a_pickle(length: int) -> None:
    data = header_of_length(length)
    assert data[0] == 0x80
    assert kind_of(data[:300]) is None


def test_nor_for_any_other_kind_of_file() -> None:
    for beginning in (b"\x1f\x8b\x01\x00", b"BZh\x00", b"PK\x03\x04"):
        assert kind_of(beginning + b"\0\0\0\0{}") is None


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_are_still_called_by_their_name(protocol: int) -> None:
    for value in ({}, {"x": [1, 2]}, 0, torch.Size((3, 4))):
        assert "pickle" in str(kind_of(pickle.dumps(value, protocol)))
