"""The gated delta rule mixer of Qwen3.5, forward and backward, compared with transformers' own without its GPU package.

    python benchmarks/delta_mixer.py [--repeats 7]

As large as in Qwen3.5-0.8B, without the projections around it: documents of several lengths, which transformers pads to
the longest as in training, and one long document, of which nothing is padded. In turns, after results and gradients
have been found equal; medians of the ratios go to benchmarks/results/delta_mixer.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from machine import describe_machine
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, Qwen3_5TextConfig

from backhand.nn.batch import document_runs
from backhand.nn.decoder.delta_mixer import delta_backward, delta_forward
from backhand.nn.families.family import DeltaSizes

HERE = Path(__file__).parent
CASES = {"padded": (200, 130, 90, 300, 61, 150), "one": (1024,)}
HEADS, SIZE = 16, 128
TOLERANCE = 1e-5


class Given(torch.nn.Module):
    """A projection that returns a fixed output."""

    given: Tensor

    def forward(self, _: Tensor) -> Tensor:
        """The fixed output."""
        return self.given


def sides(lengths: tuple[int, ...]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Functions that compute forward and backward by hand, and as transformers does; checked to agree.

    Raises:
        SystemExit: they do not.
    """
    sizes = DeltaSizes(HEADS, HEADS, SIZE, SIZE, 4)
    config = Qwen3_5TextConfig(
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        num_hidden_layers=2,
        hidden_size=8,
        intermediate_size=8,
    )
    torch.manual_seed(0)
    module = Qwen3_5GatedDeltaNet(config, 0).requires_grad_(False)
    given = [Given() for _ in range(4)]
    module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a = given
    module.out_proj = torch.nn.Identity()
    x, d_y = torch.randn(sum(lengths), sum(sizes.inputs)), torch.randn(sum(lengths), HEADS * SIZE)
    padded = torch.nn.utils.rnn.pad_sequence(x.split(list(lengths)), batch_first=True).requires_grad_()
    d_padded = torch.nn.utils.rnn.pad_sequence(d_y.split(list(lengths)), batch_first=True)

    def theirs() -> Tensor:
        padded.grad = None
        for part, values in zip(given, padded.split(sizes.inputs, dim=2), strict=True):
            part.given = values
        found: Tensor = module(padded[..., :8])
        found.backward(d_padded)
        return found.detach()

    weights: Any = SimpleNamespace(
        conv=module.conv1d.weight, log_rate=module.A_log, rate_bias=module.dt_bias, gated_norm=module.norm.weight
    )
    options: Any = SimpleNamespace(delta=sizes, norm_eps=config.rms_norm_eps)
    context: Any = SimpleNamespace(config=options, runs=document_runs(lengths))
    adapter: Any = SimpleNamespace(norms={})

    @torch.no_grad()
    def ours() -> tuple[Tensor, Tensor]:
        y, own = delta_forward(x, weights, context)
        kept: Any = SimpleNamespace(own=own, input=x)
        return y, delta_backward(d_y, kept, weights, context, adapter)

    found, expected = ours(), theirs()
    assert padded.grad is not None
    for mine, rows in zip(found, (expected, padded.grad), strict=True):
        whole = torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])
        error = float((mine - whole).norm() / whole.norm())
        if not error < TOLERANCE:
            raise SystemExit(f"documents of {lengths} tokens: {error:.1e} apart")
    return ours, theirs


def seconds(run: Callable[[], object]) -> float:
    """Of the clock."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    """Parse, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "delta_mixer.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stored: dict[str, Any] = {"machine": describe_machine(), "threads": arguments.threads, "cases": {}}
    for name, lengths in CASES.items():
        ours, theirs = sides(lengths)
        rounds = [(seconds(ours), seconds(theirs)) for _ in range(arguments.repeats)]
        ratio = statistics.median(other / mine for mine, other in rounds)
        stored["cases"][name] = {
            "lengths": lengths,
            "backhand_s": [mine for mine, _ in rounds],
            "transformers_s": [other for _, other in rounds],
            "ratio": ratio,
        }
        print(f"{name}: {lengths} tokens, {ratio:.2f} times as fast as transformers")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
