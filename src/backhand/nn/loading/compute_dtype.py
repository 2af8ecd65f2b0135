"""The dtype in which a machine computes a frozen decoder best."""

from __future__ import annotations

import torch


def default_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32.

    On the CPU that takes AVX512-BF16 or AMX (or bf16 on Arm): elsewhere oneDNN converts to float32 and back, which is
    slower than float32 itself. On CUDA it takes compute capability 8.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and onednn_takes_bf16() and _multiplies_bf16():
        return torch.bfloat16
    return torch.float32


def onednn_takes_bf16() -> bool:
    """Whether torch sends bfloat16 products on the CPU to oneDNN; elsewhere loops of its own compute them."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _multiplies_bf16() -> bool:
    """oneDNN takes bf16 on any AVX512; only these instructions multiply it."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return True
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check))
