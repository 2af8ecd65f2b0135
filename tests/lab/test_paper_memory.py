from __future__ import annotations

import pytest

from backhand.errors import ResourceError
from backhand.lab.paper import memory as paper_memory
from backhand.lab.paper.memory import MemoryResult, StepMemory, measure_memory


def test_a_step_holds_what_is_computed() -> None:
    result = measure_memory(6_000_000, 250_000, 1_000_400, element_bytes=2, runs=1)
    assert result.adapter.computed_bytes == 6_000_000 * 2 + 250_000 * 16
    assert result.full.computed_bytes == 6_000_000 * 16
    for memory in (result.adapter, result.full):
        (measured,) = memory.measured_bytes
        assert measured == pytest.approx(memory.computed_bytes, rel=0.15)
    assert result.memory_ratio == pytest.approx(6, rel=0.2)
    assert result.stored_ratio == pytest.approx(24_000_000 / 1_000_400)


def test_what_does_not_fit_is_computed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_memory, "available_bytes", lambda: 50_000_000)
    result = measure_memory(10**9, 1000, 4000, element_bytes=4)
    assert result.full.measured_bytes == () and result.full.bytes == 16e9


def test_what_is_too_small_has_no_ratio() -> None:
    tiny, large = StepMemory(3488, 347_648, (0, 4096, 0)), StepMemory(6_000_000, 96_000_000, (97_000_000,))
    assert tiny.bytes is None and large.bytes == 97_000_000
    assert MemoryResult(tiny, large, 17_408, 24_000_000).memory_ratio is None
    assert MemoryResult(large, tiny, 17_408, 24_000_000).memory_ratio is None


def test_a_process_that_fails_says_so() -> None:
    with pytest.raises(ResourceError, match="could not be measured"):
        measure_memory(1000, 10, 40, element_bytes=3, runs=1)
