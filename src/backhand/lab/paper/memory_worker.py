"""A process that holds what one optimizer step holds, and tells how much it grew: see `lab/paper/memory.py`.

python -m backhand.lab.paper.memory_worker FROZEN TRAINED BYTES_PER_FROZEN
"""

from __future__ import annotations

import json
import sys

import torch

from backhand.training.memory.process import peak_rss_bytes, rss_bytes

_WARM_UP_ELEMENTS = 1000


def main() -> None:
    """Make the tensors, take one step, print one JSON object."""
    frozen_elements, trained_elements, element_bytes = (int(word) for word in sys.argv[1:])
    torch.set_num_threads(1)
    _step(_WARM_UP_ELEMENTS)  # what the first step of a process loads is no memory of this one
    before = rss_bytes()
    dtype = {2: torch.bfloat16, 4: torch.float32}[element_bytes]
    frozen = torch.full((frozen_elements,), 0.5, dtype=dtype)
    _step(trained_elements)
    sys.stdout.write(json.dumps({"grown_bytes": peak_rss_bytes() - before, "frozen": frozen.numel()}))


def _step(elements: int) -> None:
    parameter = torch.nn.Parameter(torch.full((elements,), 0.5))
    parameter.grad = torch.full((elements,), 0.1)
    torch.optim.AdamW([parameter], fused=True).step()


if __name__ == "__main__":
    main()
