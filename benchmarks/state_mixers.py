"""Mixers with a state, forward and backward, compared with transformers' own without its GPU packages.

    python benchmarks/state_mixers.py [--mixer delta mamba] [--repeats 7]

`delta` is the gated delta rule as large as in Qwen3.5-0.8B, and `mamba` is Mamba-2 as large as in Granite 4 H 350M.
Both are without the projections around them. There are documents of several lengths, which transformers pads to the
longest as in training, and one long document without padding. Both sides take turns, after their results and gradients
have been found equal. Medians of the ratios go to benchmarks/results/state_mixers.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from machine import describe_machine
from torch import Tensor, nn
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridMambaLayer,
)
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, Qwen3_5TextConfig

from backhand.nn.batch import document_runs
from backhand.nn.decoder.adapted_group import BlockAdapter, GroupAdapter
from backhand.nn.decoder.delta_mixer import delta_backward, delta_forward
from backhand.nn.decoder.mixer import MixerSaved
from backhand.nn.decoder.ssm_mixer import ssm_backward, ssm_forward
from backhand.nn.families.family import NO_MULTIPLIERS, DeltaSizes, SSMSizes
from backhand.ops.lora_group import LoRAGroup

HERE = Path(__file__).parent
CASES = {"padded": (200, 130, 90, 300, 61, 150), "one": (1024,)}
TOLERANCE = 1e-5


class Given(nn.Module):
    """A projection that returns a fixed output."""

    given: Tensor

    def forward(self, _: Tensor) -> Tensor:
        """Return the fixed output."""
        return self.given


class Mixer(NamedTuple):
    """A mixer on both sides."""

    module: nn.Module  # transformers' mixer, whose input projections return given tensors
    given: list[Given]  # these projections
    inputs: tuple[int, ...]  # their output features
    width: int  # features of the mixer's output
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    weights: Any
    config: Any


def delta() -> Mixer:
    """Return the gated delta rule with 16 heads of 128."""
    heads, size = 16, 128
    sizes = DeltaSizes(heads, heads, size, size, 4)
    config = Qwen3_5TextConfig(
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        num_hidden_layers=2,
        hidden_size=8,
        intermediate_size=8,
    )
    module = Qwen3_5GatedDeltaNet(config, 0).requires_grad_(False)
    given = [Given() for _ in range(4)]
    module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a = given
    module.out_proj = nn.Identity()
    weights = SimpleNamespace(
        conv=module.conv1d.weight, log_rate=module.A_log, rate_bias=module.dt_bias, gated_norm=module.norm.weight
    )
    ours = SimpleNamespace(delta=sizes, norm_eps=config.rms_norm_eps)
    return Mixer(module, given, sizes.inputs, heads * size, delta_forward, delta_backward, weights, ours)


def mamba() -> Mixer:
    """Return Mamba-2 with 48 heads of 32 in one group and states of 128, and time steps of 0.001 to 0.1."""
    sizes = SSMSizes(heads=48, head_width=32, groups=1, state_width=128, taps=4)
    config = GraniteMoeHybridConfig(
        hidden_size=sizes.width // 2,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        mamba_n_heads=sizes.heads,
        mamba_d_head=sizes.head_width,
        mamba_d_state=sizes.state_width,
    )
    module = GraniteMoeHybridMambaLayer(config, 0).requires_grad_(False).eval()
    steps = torch.exp(torch.empty(sizes.heads).uniform_(-6.9, -2.3))
    module.dt_bias.copy_(torch.log(torch.expm1(steps)))
    given = [Given()]
    module.in_proj, module.out_proj = given[0], nn.Identity()
    weights = SimpleNamespace(
        conv=module.conv1d.weight,
        conv_bias=module.conv1d.bias,
        log_rate=module.A_log,
        rate_bias=module.dt_bias,
        skip=module.D,
        gated_norm=module.norm.weight,
    )
    ours = SimpleNamespace(ssm=sizes, ssm_path="mamba", norm_eps=config.rms_norm_eps, multipliers=NO_MULTIPLIERS)
    return Mixer(module, given, (sum(sizes.inputs),), sizes.width, ssm_forward, ssm_backward, weights, ours)


MIXERS = {"delta": delta, "mamba": mamba}


def sides(mixer: Mixer, lengths: tuple[int, ...]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return functions that compute forward and backward by hand, and as transformers does; checked to agree.

    Raises:
        SystemExit: they do not agree.
    """
    x, d_y = torch.randn(sum(lengths), sum(mixer.inputs)), torch.randn(sum(lengths), mixer.width)
    padded = nn.utils.rnn.pad_sequence(x.split(list(lengths)), batch_first=True).requires_grad_()
    d_padded = nn.utils.rnn.pad_sequence(d_y.split(list(lengths)), batch_first=True)

    def theirs() -> Tensor:
        padded.grad = None
        for part, values in zip(mixer.given, padded.split(mixer.inputs, dim=2), strict=True):
            part.given = values
        found: Tensor = mixer.module(padded[..., :8])
        found.backward(d_padded)
        return found.detach()

    context: Any = SimpleNamespace(config=mixer.config, segment_runs=document_runs(lengths))
    no_factors = x.new_empty(len(x), 0)
    no_group = GroupAdapter((), LoRAGroup())
    adapter = BlockAdapter(no_group, no_group, no_group, no_group)

    @torch.no_grad()
    def ours() -> tuple[Tensor, Tensor]:
        y, inner = mixer.forward(x, mixer.weights, context)
        saved = MixerSaved(None, x, None, inner, no_factors, no_factors, None)
        return y, mixer.backward(d_y, saved, mixer.weights, context, adapter, None)

    found, expected = ours(), theirs()
    assert padded.grad is not None
    for mine, rows in zip(found, (expected, padded.grad), strict=True):
        whole = torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])
        error = float((mine - whole).norm() / whole.norm())
        if not error < TOLERANCE:
            raise SystemExit(f"documents of {lengths} tokens: {error:.1e} apart")
    return ours, theirs


def seconds(run: Callable[[], object]) -> float:
    """Return the time of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    """Parse, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixer", nargs="*", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "state_mixers.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stored: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name in arguments.mixer:
        torch.manual_seed(0)
        mixer = MIXERS[name]()
        cases: dict[str, Any] = {}
        for case, lengths in CASES.items():
            ours, theirs = sides(mixer, lengths)
            rounds = [(seconds(ours), seconds(theirs)) for _ in range(arguments.repeats)]
            ratio = statistics.median(other / mine for mine, other in rounds)
            cases[case] = {
                "lengths": lengths,
                "backhand_s": [mine for mine, _ in rounds],
                "transformers_s": [other for _, other in rounds],
                "ratio": ratio,
            }
            print(f"{name}, {case}: {lengths} tokens, {ratio:.2f} times as fast as transformers")
        stored[name] = {"machine": describe_machine(), "threads": arguments.threads, "cases": cases}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
