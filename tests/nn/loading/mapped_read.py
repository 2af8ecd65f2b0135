"""Reads a mapped file after it was cut short, until the system sends a bus error: run by test_mapped_file.py."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from backhand.kernels.builds import library
from backhand.kernels.quantized_matrix import QuantizedMatrix, StoredRows
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.ops.frozen_matrix import frozen_linear


def read(path: Path, how: str, left: int, kernels: str, said: Path) -> None:
    """Read in a separate process with these kernels, and print "read" if the read succeeds.

    Args:
        how: it is read.
        left: how many bytes to leave of it.
        said: where standard output and standard error go, as `out` and `err`.
    """
    os.environ["BACKHAND_KERNELS"] = kernels
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(said / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
    in_use = library()
    assert kernels in ("auto", "none" if in_use is None else in_use.name)
    torch.set_num_threads(2)
    file = GGUFFile(path)
    tensor = file.tensors["big.weight"]
    blocks = file.bytes_of(tensor).reshape(tensor.shape[0], -1)
    matrix = QuantizedMatrix([StoredRows(blocks, tensor.type_id)], torch.bfloat16)
    x = torch.ones(2, tensor.shape[1], dtype=torch.bfloat16)
    x @ x.T  # what is mapped for the first product is none of the file's pages
    os.truncate(path, left)
    if how == "product":
        del file  # what reads is the matrix alone
        frozen_linear(x, matrix)
    elif how == "numpy":
        np.array(blocks).sum()
    elif how == "python":
        file.drop_pages(tensor)
        bytes(memoryview(blocks[-1]))
    elif how == "elsewhere":
        other = np.memmap(path.with_name("other"), np.uint8, mode="r")
        os.truncate(path.with_name("other"), 0)
        other.sum()
    print("read", flush=True)
