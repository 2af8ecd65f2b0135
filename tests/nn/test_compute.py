"""Compute settings: the library for float32 products, checks without side effects, and garbage collection."""

from __future__ import annotations

import gc
import inspect
import weakref

import pytest
import torch
from torch import Tensor

from backhand.nn.compute import gc_frozen, medium_precision_pays
from tests.support.processes import forked_well, run


class Cycle:
    """Holds itself, so that only the garbage collector frees it."""

    itself: Cycle


def with_processor(monkeypatch: pytest.MonkeyPatch, capability: str, *, amx: bool = False) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize(("capability", "amx"), [("AVX2", False), ("DEFAULT", False), ("AVX512", True)])
def test_where_the_route_is_no_faster_or_less_exact_it_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capability: str, amx: bool
) -> None:
    with_processor(monkeypatch, capability, amx=amx)
    assert not medium_precision_pays()


@pytest.mark.parametrize(("error", "pays"), [(4e-7, True), (3e-6, False)])
def test_elsewhere_its_error_decides_and_the_setting_is_put_back(
    monkeypatch: pytest.MonkeyPatch, error: float, pays: bool
) -> None:
    with_processor(monkeypatch, "AVX512")
    before, during = torch.get_float32_matmul_precision(), []

    def norm(_: Tensor) -> Tensor:
        """First of the difference, then of the exact product."""
        during.append(torch.get_float32_matmul_precision())
        return torch.tensor(error if len(during) == 1 else 1.0)

    monkeypatch.setattr(torch.linalg, "vector_norm", norm)
    assert medium_precision_pays() is pays
    assert during == ["medium", "medium"] and torch.get_float32_matmul_precision() == before


def test_the_collector_leaves_what_is_loaded_alone_while_a_run_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there at the start is frozen, what comes later is collected, and afterwards all is as it was."""
    assert gc.isenabled() and gc.get_freeze_count() > 1_000, "in every process of tests, see tests/conftest.py"
    monkeypatch.setattr(gc, "get_freeze_count", inspect.unwrap(gc.get_freeze_count))  # see tests/conftest.py
    gc.unfreeze()
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], 100)  # as `__main__.run` does
    with gc_frozen():
        assert gc.get_threshold()[2] <= 10
        frozen = gc.get_freeze_count()
        assert frozen > 1_000
        cycle = Cycle()
        cycle.itself = cycle
        seen = weakref.ref(cycle)
        del cycle
        gc.collect()
        assert seen() is None
        # Of what is frozen a few may have ended meanwhile; nothing else is.
        with gc_frozen():  # left to whoever has frozen it
            assert 0.99 * frozen < gc.get_freeze_count() <= frozen
        assert 0.99 * frozen < gc.get_freeze_count() <= frozen
    assert gc.get_freeze_count() == 0
    assert gc.get_threshold()[2] in (100, 0)  # none in Python 3.14.0
    gc.set_threshold(*before)
    gc.freeze()  # as tests/conftest.py has it


def test_processes_of_tests_are_forked_from_one_that_has_imported_all() -> None:
    assert run(forked_well) == 0
