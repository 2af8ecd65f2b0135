"""CONTRIBUTING's five steps add an op: done as they say, to a copy of the package, with the op they name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.doc_blocks import PROJECT

OP = '''"""Soft cap: values pressed into (-κ, κ).

    y = κ tanh(x / κ)

Backward. tanh′ = 1 - tanh², so with G = ∂L/∂y
    ∂L/∂x = G (1 - (y / κ)²)      (shape of x)

Saved: y and κ.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SoftcapSaved(NamedTuple):
    """y, and κ."""

    y: Tensor
    cap: float


class SoftcapGrads(NamedTuple):
    """d_x, of the shape of x."""

    d_x: Tensor


def softcap_forward(x: Tensor, cap: float) -> tuple[Tensor, SoftcapSaved]:
    y = cap * torch.tanh(x / cap)
    return y, SoftcapSaved(y, cap)


def softcap_backward(d_y: Tensor, saved: SoftcapSaved) -> SoftcapGrads:
    return SoftcapGrads(d_y * (1 - (saved.y / saved.cap) ** 2))


def softcap_reference(x: Tensor, cap: float) -> Tensor:
    grown = torch.exp(2 * x / cap)
    return cap * (grown - 1) / (grown + 1)
'''

CASES = '''"""Soft cap: cases and mutants."""

from backhand.verify.mutants import wrong
from backhand.verify.scaffold import ROWS, Axis, Op

OP = Op("softcap", {"x": "*lead n", "d_y": "*lead n"}, {"lead": ROWS, "n": Axis(7, 96), "cap": 1.7})
CASES = (*OP.standard_cases(), OP.case("low cap", cap=0.2))
MUTANTS = (
    OP.perturb("cap forgotten", "d_x", cap=1.0),
    wrong("square forgotten", "d_x", lambda g, s: g * (1 - s.y / s.cap)),
)
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and of the op's tests, after steps 1 to 4."""
    project = tmp_path_factory.mktemp("five_steps")
    package = project / "src" / "backhand"
    shutil.copytree(PROJECT / "src" / "backhand", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROJECT / "tests" / "ops", project / "tests" / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "ops" / "softcap.py").write_text(OP)
    registry = package / "ops" / "registry.py"
    registry.write_text(
        registry.read_text().replace('    "mse": "mse",\n', '    "mse": "mse",\n    "softcap": "softcap",\n')
    )
    (package / "verify" / "cases" / "softcap.py").write_text(CASES)
    return project


def run(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy / "src")}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=copy, env=environment, check=False, capture_output=True, text=True, timeout=600)


def test_the_new_op_is_proved_with_its_mutants(copy: Path) -> None:
    finished = run(copy, "backhand", "verify", "--op", "softcap")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for mistake in ("sign", "factor 1 + 1e-6", "cap forgotten", "square forgotten"):
        assert mistake in finished.stdout


def test_the_tests_pick_it_up_by_themselves(copy: Path) -> None:
    finished = run(copy, "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_registry.py", "-k", "softcap")
    assert finished.returncode == 0, finished.stdout
    assert " passed" in finished.stdout


def test_a_mistake_in_it_is_found(copy: Path) -> None:
    op = copy / "src" / "backhand" / "ops" / "softcap.py"
    op.write_text(OP.replace("** 2)", "** 2 * (1 + 1e-9))"))
    finished = run(copy, "backhand", "verify", "--op", "softcap")
    op.write_text(OP)
    assert finished.returncode == 6
    assert "softcap" in finished.stderr
