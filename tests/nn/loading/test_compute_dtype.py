"""bfloat16 exactly where it is multiplied natively."""

from __future__ import annotations

import pytest
import torch

from backhand.nn.loading import default_dtype


@pytest.mark.parametrize(
    ("library", "capability", "bf16", "amx", "expected"),
    [
        (True, "AVX512", True, False, torch.bfloat16),
        (True, "AVX512", False, True, torch.bfloat16),
        # oneDNN takes it on any AVX512, by way of float32.
        (True, "AVX512", False, False, torch.float32),
        (False, "AVX512", True, True, torch.float32),
        (True, "AVX2", False, False, torch.float32),
        # Arm: the library's own answer counts.
        (True, "SVE256", False, False, torch.bfloat16),
        (False, "DEFAULT", False, False, torch.float32),
    ],
)
def test_cpu(
    library: bool, capability: str, bf16: bool, amx: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: library)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert default_dtype() == expected


def test_cpu_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert default_dtype("cpu") == torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_cuda(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return True if including_emulation else native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert default_dtype("cuda:0") == (torch.bfloat16 if native else torch.float32)


def test_other_devices() -> None:
    assert default_dtype(torch.device("meta")) == torch.float32


def test_this_machine_gives_one_of_the_two() -> None:
    assert default_dtype() in (torch.bfloat16, torch.float32)
