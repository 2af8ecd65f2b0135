"""Long sums of the loops: a naive one, compiled into a library of the test's own, is noticed at real size."""

from __future__ import annotations

import pytest
import torch

from backhand.kernels import build
from backhand.kernels.builds import torch_form, usable, using
from backhand.nn.decoder.decoding import IncrementalDecoder
from backhand.verify import real_sizes
from backhand.verify.measure import relative_error
from backhand.verify.runner import Row
from kernels.test_loop_mutants import NAIVE, compiled
from support.decode_steps import adapted

# The op, a word of the case's name, and the tensor in which it shows.
SHOWN_IN = {
    "softmax_losses: naive sum": ("linear_cross_entropy", "151,936 words, peaked", "y"),
    "rms_norm: naive sum": ("rms_norm", "wide", "y"),
    "rms_norm: naive sum of rows": ("rms_norm", "many positions", "d_weight"),
    "attention: naive sum": ("attention", "keys", "y"),
    "attention: naive sums of columns": ("attention", "keys", "d_q"),
    "few rows: naive sum": ("frozen_linear", "one row", "y"),
    "low_rank: naive sum": ("lora_group", "many positions", "d_lora_A 0"),
}

pytestmark = pytest.mark.skipif(
    build.find_compiler() is None or not usable(), reason="no C++ compiler, or no build of the library"
)


@pytest.fixture(scope="module")
def spoilable(tmp_path_factory):
    return compiled(tmp_path_factory, sorted(build.SOURCES.glob("*.cpp")), build_name="baseline")


def row_of(library, case, tensor, monkeypatch):
    monkeypatch.setattr(real_sizes, "usable", lambda: ("spoilable",))
    monkeypatch.setattr(real_sizes, "load", lambda _name: library)
    found = real_sizes.rows_in(case, torch.float32)
    (row,) = [one for one in found if isinstance(one, Row) and one.form == "spoilable" and one.tensor == tensor]
    return row


def test_every_naive_sum_of_a_loop_is_shown():
    assert set(SHOWN_IN) == {name for name in NAIVE if not name.startswith("decode step:")}


@pytest.mark.parametrize("mutant", sorted(SHOWN_IN))
def test_a_naive_sum_is_noticed(spoilable, mutant, monkeypatch):
    library, choose = spoilable
    op, word, tensor = SHOWN_IN[mutant]
    (case,) = [one for one in real_sizes.real_sizes() if one.op.name == op and word in one.case.name]
    choose("")
    assert row_of(library, case, tensor, monkeypatch).passed
    choose(mutant)
    try:
        row = row_of(library, case, tensor, monkeypatch)
    finally:
        choose("")
    assert not row.passed, f"{row.error:.1e} within {row.bound:.1e}"


def step_over_many_keys(dtype):
    """Logits of a token before which the cache holds as many keys as a long prompt's."""
    state = IncrementalDecoder(adapted("llama", dtype), capacity=real_sizes.KEYS + 1)
    cache, generator = state.cache, torch.Generator().manual_seed(0)
    cache.reserve(cache.add_rows(1), [real_sizes.KEYS])
    for layer, heads in enumerate(cache.keys):
        shape = real_sizes.KEYS, heads.shape[0], heads.shape[2]
        keys, values = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        cache.write(layer, cache.places[0, : real_sizes.KEYS], keys, 1 + values)
    cache.lengths[0], cache.tokens[0] = real_sizes.KEYS, [3] * real_sizes.KEYS
    return state.step([5])


def test_a_naive_sum_of_a_step_is_noticed(spoilable):
    library, choose = spoilable
    with torch_form():
        truth, usual = step_over_many_keys(torch.float64), step_over_many_keys(torch.float32)
    bound = 2 * relative_error(usual, truth)
    found = {}
    for mutant in ("", "decode step: naive sum"):
        choose(mutant)
        try:
            with using(library):
                found[mutant] = relative_error(step_over_many_keys(torch.float32), truth)
        finally:
            choose("")
    assert found[""] <= bound < found["decode step: naive sum"], (found, bound)
