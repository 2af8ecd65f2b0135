"""Wrong versions of the loops, compiled into a library of the test's own: the cases of the ops notice each."""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess

import pytest
import torch

from backhand.kernels import build
from backhand.kernels.builds import Library, torch_form, usable, using
from backhand.kernels.library import POINTER, proving_kernels
from backhand.verify.measure import autograd_gradients, relative_error
from backhand.verify.runner import FLOAT64_BOUND, load_proofs
from tests.support.decode_steps import adapted, stepped
from tests.support.made_once import made_once

OPS_OF = {
    "rms_norm": ("rms_norm",),
    "glu": ("glu",),
    "adapted_glu": ("adapted_glu",),
    "rotary": ("rotary",),
    "softmax_losses": ("linear_cross_entropy",),
    "divergence": ("linear_divergence",),
    "attention": ("attention",),
    "low_rank": ("lora_group",),
    "low_rank_rows": ("lora_group",),
    "few rows": ("frozen_linear",),
    "dense_product": ("lora_group",),
    "panels": ("frozen_linear",),
    "causal_conv": ("causal_conv",),
    "gated_conv": ("gated_conv",),
    "gated_delta_rule": ("gated_delta_rule",),
}
FILES = sorted(path for path in build.SOURCES.iterdir() if path.suffix in (".cpp", ".h") and path.stem != "mutants")
SOURCES = [path.read_text(encoding="utf-8") for path in FILES]
ALL_MUTANTS = {name for text in SOURCES for name in re.findall(r'MUTATED\("([^"]+)"', text)}
OF_A_STEP = sorted(name for name in ALL_MUTANTS if name.startswith("decode step:") and "naive" not in name)
OF_CORNERS = sorted(name for name in ALL_MUTANTS if "corner" in name)
# Of these test_real_sizes.py takes care: in float64, and of few numbers, they are right.
NAIVE = sorted(name for name in ALL_MUTANTS if "naive" in name)
MUTANTS = sorted(ALL_MUTANTS.difference(OF_A_STEP, OF_CORNERS, NAIVE))
# What no op computes: heads that share keys and an adapter; caps, windows and norms after it; a multiplied sum; queries
# that grow with their position.
STEPPED = ("llama", "gemma2", "granite", "ministral3")

pytestmark = pytest.mark.skipif(
    build.find_compiler() is None or not usable(), reason="no C++ compiler, or no build of the library"
)


def compiled(factory, sources, *defined, dtype="double", build_name=None, optimized="-Og"):
    """A build for this machine, or of that name, in which a wrong version can be put in force, and how to.

    It has the loops over this type alone, which halves the time of compiling it, and is optimized little, which
    saves a third of the rest: what is computed here is small.
    """
    name = build_name or usable()[-1]
    flags = [*build.FLAGS, *build.INSTRUCTION_SETS[build.machine()][name], optimized, f'-DBACKHAND_ISA="{name}"']
    defines = [f"-D{name}" for name in ("BACKHAND_MUTANTS", f"BACKHAND_ONE_DTYPE={dtype}", *defined)]
    command = [build.find_compiler(), *flags, *defines, "-shared", *map(str, sources), "-o"]

    def make(folder):
        subprocess.run([*command, str(folder / "mutants.so")], check=True, capture_output=True)

    digest = hashlib.sha256("\0".join(map(str, sources)).encode()).hexdigest()[:12]
    place = made_once(factory, "-".join(["mutants", name, dtype, optimized, *defined, digest]), make)
    library = Library(place / "mutants.so")
    choose = library.function("backhand_set_mutant", (POINTER,))
    return library, lambda mutant: choose(mutant.encode())


@pytest.fixture(scope="module")
def spoilable(tmp_path_factory):
    """All loops."""
    return compiled(tmp_path_factory, sorted(build.SOURCES.glob("*.cpp")))


@pytest.fixture(scope="module")
def spoilable_corners(tmp_path_factory):
    """Attention that leaves out corners in float64 as it does where AMX's tiles multiply bfloat16."""
    sources = [build.SOURCES / f"{name}.cpp" for name in ("attention", "library", "mutants")]
    return compiled(tmp_path_factory, sources, "BACKHAND_CORNERS")


@functools.cache
@torch_form()
def truths_of(op):
    """An op's proof, and every case of it with the right output and gradients."""
    (proof,) = load_proofs(op)
    cases = []
    for case in proof.cases:
        with torch.no_grad():
            names = list(case.run_manual(case.tensors, proof.backward).gradients)
        y, gradients = autograd_gradients(case.reference, case.tensors, names)
        cases.append((case, y, gradients))
    return proof, cases


def largest_error(proof, cases, enough=float("inf")):
    """Over the cases, until one exceeds `enough`."""
    worst = 0.0
    for case, right_y, right in cases:
        with torch.no_grad():
            y, gradients = case.run_manual(case.tensors, proof.backward)
        errors = [relative_error(gradients[name], right[name], 1.0) for name in gradients]
        worst = max(worst, relative_error(y, right_y, 1.0), *errors)
        if worst > enough:
            break
    return worst


def test_there_are_mutants_of_every_loop():
    assert {name.partition(":")[0] for name in MUTANTS} == set(OPS_OF)


@pytest.mark.parametrize("by_parts", [False, True])
def test_without_one_the_same_build_is_right(spoilable, by_parts, monkeypatch):
    monkeypatch.setattr("backhand.kernels.low_rank.by_parts_of_rows", lambda dtype: by_parts)
    library, choose = spoilable
    choose("")
    with using(library), proving_kernels():
        for op in sorted({op for ops in OPS_OF.values() for op in ops}):
            assert largest_error(*truths_of(op)) < FLOAT64_BOUND


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_loop_is_noticed(spoilable, mutant, monkeypatch):
    by_parts = mutant.startswith("low_rank_rows:")
    monkeypatch.setattr("backhand.kernels.low_rank.by_parts_of_rows", lambda dtype: by_parts)
    library, choose = spoilable
    choose(mutant)
    try:
        with using(library), proving_kernels():
            error = max(largest_error(*truths_of(op), enough=1e-7) for op in OPS_OF[mutant.partition(":")[0]])
    finally:
        choose("")
    assert error > 1e-7, "far above what rounding could explain"


def test_attention_with_corners_is_right(spoilable_corners):
    library, choose = spoilable_corners
    choose("")
    assert len(OF_CORNERS) > 2
    with using(library), proving_kernels():
        assert largest_error(*truths_of("attention")) < FLOAT64_BOUND


@pytest.mark.parametrize("mutant", OF_CORNERS)
def test_a_wrong_corner_is_noticed(spoilable_corners, mutant):
    library, choose = spoilable_corners
    choose(mutant)
    try:
        with using(library), proving_kernels():
            error = largest_error(*truths_of("attention"), enough=1e-7)
    finally:
        choose("")
    assert error > 1e-7


@pytest.fixture(scope="module")
def steps():
    """Decoders, and what a token gives them block by block."""
    return [(adapted(variant), stepped(adapted(variant), whole=False)) for variant in STEPPED]


def largest_step_error(steps):
    return max(relative_error(stepped(decoder, whole=True), right, 1.0) for decoder, right in steps)


def test_there_are_mutants_of_a_step(spoilable, steps):
    library, choose = spoilable
    choose("")
    assert len(OF_A_STEP) > 5
    with using(library), proving_kernels():
        assert largest_step_error(steps) < FLOAT64_BOUND


@pytest.mark.parametrize("mutant", OF_A_STEP)
def test_a_wrong_step_is_noticed(spoilable, steps, mutant):
    library, choose = spoilable
    choose(mutant)
    try:
        with using(library), proving_kernels():
            error = largest_step_error(steps)
    finally:
        choose("")
    assert error > 1e-7
