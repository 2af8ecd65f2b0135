"""Inverse frequencies of the rotary embedding, with the scaling rules of long-context models.

    f_j = theta^(-2j / head_dim),   j = 0 … head_dim/2 - 1        [arXiv:2104.09864, §3.2.2]

in radians per token. If only some features are rotated (`RotaryConfig.features`), head_dim is their number. Scaling
changes f:

- `linear`: f / factor, as if positions were divided by it [arXiv:2306.15595].
- `llama3`: by wavelength λ = 2π / f and original context length L. Short waves, λ < L / high_freq_factor, keep f. Long
  waves, λ > L / low_freq_factor, get f / factor. Waves in between get (1 - t) f / factor + t f with
  t = (L / λ - low_freq_factor) / (high_freq_factor - low_freq_factor).
- `yarn` [arXiv:2309.00071, §3.2]: pairs that rotate more than beta_fast times within the original length L keep f.
  Pairs that rotate fewer than beta_slow times get f / factor. In between, the share is linear in j. The j that rotates
  r times is head_dim ln(L / 2πr) / (2 ln theta); with `truncate` both bounds are rounded outward. Cosines and sines are
  multiplied by an attention factor.
- `longrope` [arXiv:2402.13753]: f_j / factor_j, with one list of factors for documents up to the original length and
  an optional second list for longer ones. Cosines and sines are multiplied by an attention factor. With one list, this
  is how a GGUF file states any rule without an attention factor.
- `proportional` (Gemma 4): f / factor for the first ⌊share · head_dim / 2⌋ pairs, and zero for the others, which are
  not rotated. Unlike with `RotaryConfig.features`, pairs and exponents refer to the whole head.

Everything is computed in float32 on the CPU and in the order of transformers' modeling_rope_utils, so that the results
are equal bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from backhand.nn.families.family import RotaryConfig
from backhand.ops.rotary import Frequencies


def inverse_frequencies(
    config: RotaryConfig, head_dim: int, device: torch.device | str = "cpu", length: int = 0
) -> Tensor:
    """Return the frequencies in radians per token.

    Args:
        head_dim: features of a head. It must be even if all features are rotated.
        device: device of the result. The computation is on the CPU on every device.
        length: length of the document, by which longrope with two lists selects one.

    Returns:
        (rotated features / 2,) float32.

    Raises:
        ValueError: an unknown scaling rule. `decoder_config` never returns one.
    """
    rotated = config.features or head_dim
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device="cpu") / rotated
    scaling: dict[str, Any] = dict(config.scaling or ())
    rule = scaling.get("rope_type", "default")
    if rule == "longrope":
        is_long = config.longest_short is not None and length > config.longest_short
        stated = scaling["long_factor" if is_long else "short_factor"]
        factors = torch.tensor(stated, dtype=torch.float32, device="cpu")
        return (1.0 / (factors * config.theta**exponents)).to(device)
    frequencies = 1.0 / (config.theta**exponents)
    if rule == "linear":
        frequencies = frequencies / scaling["factor"]
    elif rule == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif rule == "proportional":
        frequencies = frequencies / scaling["factor"]
        frequencies[int(scaling["share"] * rotated // 2) :] = 0.0
    elif rule == "yarn":
        frequencies = _yarn(config.theta, rotated, scaling)
    elif rule != "default":
        raise ValueError(f"no rotary scaling rule {rule!r}")
    return frequencies.to(device)


def frequencies_of(config: RotaryConfig, head_dim: int, device: torch.device | str) -> Frequencies:
    """Return the `inverse_frequencies` of a configuration, with those of long documents if they differ."""
    short, limit = inverse_frequencies(config, head_dim, device), config.longest_short
    if limit is None:
        return Frequencies(short, None, None, config.attention_factor, config.interleaved)
    long = inverse_frequencies(config, head_dim, device, limit + 1)
    return Frequencies(short, long, limit, config.attention_factor, config.interleaved)


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original_length = scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    blend = (original_length / wavelengths - low) / (high - low)
    is_long = wavelengths > original_length / low
    is_short = wavelengths < original_length / high
    scaled = torch.where(is_long, frequencies / factor, frequencies)
    blended = (1 - blend) * scaled / factor + blend * scaled
    return torch.where(~is_short & ~is_long, blended, scaled)


def _yarn(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> Tensor:
    def index_of(rotations: float) -> float:
        turns = scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(theta))

    low, high = index_of(scaling["beta_fast"]), index_of(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    powers = theta ** (torch.arange(0, head_dim, 2, device="cpu").to(torch.float32) / head_dim)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
    unscaled = 1 - ramp.clamp(0, 1)
    stretched: Tensor = 1.0 / (scaling["factor"] * powers)
    return stretched * (1 - unscaled) + 1.0 / powers * unscaled


def llama3_factors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> Tensor:
    """Return the divisors of the `llama3` rule, (head_dim / 2,) float32: GGUF's rope_freqs.weight."""
    plain = inverse_frequencies(RotaryConfig(theta), head_dim)
    return plain / _llama3(plain, scaling)


def yarn_length(factor: float, mscale: float = 1.0) -> float:
    """Return yarn's multiplier of queries and keys for positions divided by `factor` [arXiv:2309.00071, eq. 22]."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
