"""Long sums of the loops: a naive one, compiled into a library of the test's own, is noticed at real size."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from backhand.kernels import build
from backhand.kernels.builds import torch_form, usable, using
from backhand.nn.decoder.decoding import IncrementalDecoder
from backhand.verify import real_sizes
from backhand.verify.measure import relative_error
from tests.kernels.test_loop_mutants import NAIVE, compiled
from tests.support.decode_steps import adapted

# By op and a word of the case's name: each naive sum, and the tensor in which it shows.
SHOWN_IN = {
    ("linear_cross_entropy", "151,936 words, peaked"): {"softmax_losses: naive sum": "y"},
    ("rms_norm", "wide"): {"rms_norm: naive sum": "y"},
    ("rms_norm", "many positions"): {"rms_norm: naive sum of rows": "d_weight"},
    ("attention", "keys"): {"attention: naive sum": "y"},
    ("frozen_linear", "one row"): {"few rows: naive sum": "y"},
    ("lora_group", "many positions"): {"low_rank: naive sum": "d_lora_A 0"},
}
WITH_NAIVE_SUMS = "attention", "decode_step", "few_rows", "low_rank", "rms_norm", "softmax_losses"
CALLED = "dequantize", "library", "low_rank_backward", "mutants"

pytestmark = pytest.mark.skipif(
    build.find_compiler() is None or not usable(), reason="no C++ compiler, or no build of the library"
)


@pytest.fixture(scope="module")
def spoilable(tmp_path_factory):
    """The files that hold a naive sum, and what they call."""
    sources = [build.SOURCES / f"{name}.cpp" for name in (*WITH_NAIVE_SUMS, *CALLED)]
    return compiled(tmp_path_factory, sources, dtype="float", build_name="baseline", optimized="-O1")


def test_every_naive_sum_of_a_loop_is_shown():
    assert {name for shown in SHOWN_IN.values() for name in shown} == {
        name for name in NAIVE if not name.startswith("decode step:")
    }


@functools.cache
def cases_of_sums():
    """The cases of `SHOWN_IN`, drawn together, and none after the last; their own naive sums are not tried."""
    found = {}
    for size in real_sizes.real_sizes():
        for op, word in SHOWN_IN:
            if size.op.name == op and word in size.case.name:
                assert (op, word) not in found
                found[op, word] = replace(size, naive=None)
        if len(found) == len(SHOWN_IN):
            return found
    raise AssertionError(f"not there: {SHOWN_IN.keys() - found.keys()}")


@pytest.mark.parametrize(("op", "word"), SHOWN_IN)
def test_a_naive_sum_is_noticed(spoilable, op, word, monkeypatch):
    library, choose = spoilable
    shown, case = SHOWN_IN[op, word], cases_of_sums()[op, word]

    def load(name):
        choose("" if name == "right" else name)
        return library

    monkeypatch.setattr(real_sizes, "usable", lambda: ("right", *shown))
    monkeypatch.setattr(real_sizes, "load", load)
    try:
        found = list(real_sizes.rows_in(case, torch.float32))
    finally:
        choose("")
    for mutant, tensor in shown.items():
        right, spoiled = (next(r for r in found if (r.form, r.tensor) == (form, tensor)) for form in ("right", mutant))
        assert right.passed
        assert not spoiled.passed, f"{spoiled.error:.1e} within {spoiled.bound:.1e}"


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
    assert found[""] <= bound, (found, bound)
    # Only where torch's own sum is as wrong as the mutant's, the kernel's error replaces torch's in the bound.
    naive = found["decode step: naive sum"]
    assert naive > (bound if bound < 2 * naive else 2 * found[""]), (found, bound)
