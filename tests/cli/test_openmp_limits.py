"""Variables that give a parallel region fewer threads than torch asks for: oneDNN would compute a part of a product."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import backhand
from backhand.cli.openmp_limits import remove_limits
from backhand.nn import compute
from backhand.nn.compute import compute_settings
from backhand.nn.model_options import BaseModelOptions
from backhand.system import affinity_cores
from tests.support.for_each import for_each
from tests.support.tiny_models import save_tiny, tiny_model

TEXT = "what is the sum of all the numbers " * 16
DETAILS = ["--dtype", "bfloat16", "--pooling", "mean"]
CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(
    not compute.onednn_supports_bf16() or affinity_cores() < 2, reason="torch multiplies otherwise here"
)


@for_each(
    "given, left",
    [
        ({"OMP_DYNAMIC": "true", "OMP_MAX_ACTIVE_LEVELS": "0", "OMP_PLACES": "cores"}, {"OMP_PLACES": "cores"}),
        ({"OMP_DYNAMIC_ALL": "true", "OMP_MAX_ACTIVE_LEVELS_ALL": "0"}, {}),
        ({"OMP_THREAD_LIMIT": "1", "OMP_NUM_THREADS": "4,2"}, {"OMP_NUM_THREADS": "1"}),
        ({"OMP_THREAD_LIMIT": "8", "OMP_THREAD_LIMIT_ALL": "1", "OMP_NUM_THREADS": "4"}, {"OMP_NUM_THREADS": "4"}),
        ({"OMP_THREAD_LIMIT_ALL": "2", "OMP_NUM_THREADS": "4"}, {"OMP_NUM_THREADS": "2"}),
        ({"OMP_THREAD_LIMIT": "100000"}, {}),
        ({"OMP_THREAD_LIMIT": "few"}, {}),
    ],
)
def test_a_limit_becomes_the_default_number_of_threads(given: dict[str, str], left: dict[str, str]) -> None:
    environment = dict(given)
    remove_limits(environment)
    assert environment == left


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_model("llama", num_hidden_layers=2), tmp_path_factory.mktemp("limits") / "model")


def in_a_process(code: str, **environment: str) -> list[object]:
    """The lines of JSON that Python prints in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True, timeout=120)
    return [json.loads(line) for line in done.stdout.splitlines()]


def expected(model: Path, threads: int) -> np.ndarray:
    return backhand.embed([TEXT], model=model, dtype="bfloat16", pooling="mean", threads=threads)


@needs_onednn
def test_a_command_computes_whole_products(model: Path, tmp_path: Path) -> None:
    (rows := tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXT}))
    words = ["embed", "--data", str(rows), "--model", str(model), *DETAILS, "--threads", "2"]
    code = f"from backhand.cli.main import main; main({words})"
    vectors = in_a_process(code, OMP_THREAD_LIMIT="1", OMP_DYNAMIC="true", OMP_MAX_ACTIVE_LEVELS="0")
    assert np.array_equal(np.array([line["embedding"] for line in vectors], np.float32), expected(model, 2))


@needs_onednn
def test_a_limit_with_which_torch_was_loaded_is_respected_or_refused(model: Path) -> None:
    code = f"""
import json, torch, backhand
made = dict(model={str(model)!r}, dtype="bfloat16", pooling="mean")
print(json.dumps(backhand.embed([{TEXT!r}], **made).tolist()))
try:
    backhand.embed([{TEXT!r}], threads=2, **made)
except backhand.BackhandError as error:
    print(json.dumps(str(error)))
"""
    vectors, error = in_a_process(code, OMP_THREAD_LIMIT="1")
    assert np.array_equal(np.array(vectors, np.float32), expected(model, 1))
    assert "only a part of a matrix product with 2 threads" in str(error)
    assert "threads=1" in str(error) and "OMP_THREAD_LIMIT" in str(error)


@needs_onednn
@pytest.mark.skipif(compute._openmp("omp_get_dynamic") is None, reason="torch has no OpenMP here")
def test_settings_with_which_torch_was_loaded_are_suspended() -> None:
    before = [compute._openmp(f"omp_get_{name}") for name in ("dynamic", "max_active_levels")]
    try:
        compute._openmp("omp_set_dynamic", 1)
        compute._openmp("omp_set_max_active_levels", 0)
        with compute_settings(BaseModelOptions(), 2, torch.bfloat16, CPU):
            assert compute._openmp("omp_get_dynamic") == 0
            assert (torch.ones(128, 64).bfloat16() @ torch.ones(64, 64).bfloat16() == 64).all()
        assert [compute._openmp(f"omp_get_{name}") for name in ("dynamic", "max_active_levels")] == [1, 0]
    finally:
        compute._openmp("omp_set_dynamic", before[0])
        compute._openmp("omp_set_max_active_levels", before[1])
