"""Which route float32 products take, and that asking changes nothing."""

from __future__ import annotations

import pytest
import torch

from backhand.nn.compute import medium_precision_pays


def with_processor(monkeypatch: pytest.MonkeyPatch, capability: str, *, amx: bool = False) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize(("capability", "amx"), [("AVX2", False), ("DEFAULT", False), ("AVX512", True)])
def test_where_the_route_is_no_faster_or_less_exact_it_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capability: str, amx: bool
) -> None:
    with_processor(monkeypatch, capability, amx=amx)
    assert not medium_precision_pays()


def test_elsewhere_a_product_is_measured_and_the_setting_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with_processor(monkeypatch, "AVX512")
    before = torch.get_float32_matmul_precision()
    assert medium_precision_pays(), "oneDNN's float32 products are float32 on every processor without AMX"
    assert torch.get_float32_matmul_precision() == before

    exact = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda x: exact(x) + 1e-2 * x.numel())
    assert not medium_precision_pays(), "a relative error of a tenth is too much"
    assert torch.get_float32_matmul_precision() == before
