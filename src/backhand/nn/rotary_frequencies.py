"""Inverse frequencies of the rotary embedding, with the scaling rules of long-context models.

    f_j = theta^(-2j / head_dim),   j = 0 … head_dim/2 - 1        [arXiv:2104.09864, §3.2.2]

in radians a token. Scaling changes f:
- `linear`: f / factor, as if positions were divided by it [arXiv:2306.15595].
- `llama3`: by wavelength λ = 2π / f against the original context length L. Short waves, λ < L / high_freq_factor, stay;
  long ones, λ > L / low_freq_factor, become f / factor; between, (1 - t) f / factor + t f with
  t = (L / λ - low_freq_factor) / (high_freq_factor - low_freq_factor).
- `longrope` with one list of factors: f_j / factor_j, which is how a GGUF file states any rule that leaves the length
  of cosines and sines alone.

Everything is computed in float32 on the CPU and in the order of transformers' modeling_rope_utils, so that the results
are equal bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from backhand.nn.family import RotaryConfig


def inverse_frequencies(config: RotaryConfig, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Frequencies in radians a token.

    Args:
        config: the base and the scaling rule.
        head_dim: even; all of it is rotated.
        device: where the result goes; the computation is on the CPU on every device.

    Returns:
        (head_dim / 2,) float32.

    Raises:
        ValueError: for a scaling rule that is none of these; `decoder_config` never lets one through.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    scaling: dict[str, Any] = dict(config.scaling or ())
    rule = scaling.get("rope_type", "default")
    if rule == "longrope":
        factors = torch.tensor(scaling["short_factor"], dtype=torch.float32, device="cpu")
        return (1.0 / (factors * config.theta**exponents)).to(device)
    frequencies = 1.0 / (config.theta**exponents)
    if rule == "linear":
        frequencies = frequencies / scaling["factor"]
    elif rule == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif rule != "default":
        raise ValueError(f"no rotary scaling rule {rule!r}")
    return frequencies.to(device)


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


def llama3_factors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> Tensor:
    """By how much the `llama3` rule divides each frequency, (head_dim / 2,) float32: GGUF's rope_freqs.weight."""
    plain = inverse_frequencies(RotaryConfig(theta), head_dim)
    return plain / _llama3(plain, scaling)
