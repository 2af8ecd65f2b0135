"""The predicted peak against the measured one, each run in a process of its own.

`--dtype auto` is bfloat16 where the processor multiplies it; where torch emulates it, a run takes ten times as long.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backhand.cli.main import main
from tests.support.peak_memory import WITHIN, peak_of, planned
from tests.support.tiny_models import EXPERT_PARAMETERS, save_tiny, tiny_model
from tests.support.tiny_run import write_rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measured and modelled on Linux")

MODELS = {
    "large-vocabulary": {"vocab_size": 49_152, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4},
    "deep": {"vocab_size": 4_000, "hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 10},
}
ADAPTED_EXPERTS = f"--target-parameters {','.join(EXPERT_PARAMETERS)}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and rows."""
    path = Path(tmp_path_factory.mktemp("prediction"))
    for name, sizes in MODELS.items():
        model = tiny_model("llama-tied", num_attention_heads=8, num_key_value_heads=4, head_dim=32, **sizes)
        save_tiny(model, path / name)
    save_tiny(tiny_model("gemma4_text"), path / "kinds-of-layers")
    save_tiny(tiny_model("qwen3_moe"), path / "many-experts")
    save_tiny(tiny_model("mixtral"), path / "few-experts")
    write_rows(path / "short.jsonl", 64, seed=0, words=(5, 20), completion=10)
    write_rows(path / "long.jsonl", 32, seed=1, words=(100, 140), completion=10)
    write_rows(path / "long-heads.jsonl", 32, seed=1, words=(40, 60), completion=70)
    return path


# By name; those that add least to the others take half a minute of every change, and are left to `make test-slow`.
RUNS = {
    "head-float32": ("large-vocabulary", "long", "--dtype float32 --recompute none --micro-batch-rows 8"),
    "head-auto": ("large-vocabulary", "long-heads", "--dtype auto --recompute mlp --micro-batch-rows 4"),
    "kept-auto": ("deep", "long", "--dtype auto --recompute none --micro-batch-rows 8"),
    "recomputed": ("deep", "long", "--dtype float32 --recompute block --micro-batch-rows 4"),
    "many-short-rows": ("deep", "short", "--dtype float32 --recompute none --micro-batch-rows 8 --rank 64"),
    "gemma4": ("kinds-of-layers", "short", "--dtype auto --answers 0"),
    "gemma4-one": ("kinds-of-layers", "short", "--dtype auto --target-modules per_layer_model_projection"),
    "experts": ("many-experts", "long", "--dtype auto"),
    "adapted-experts": ("many-experts", "long", f"--dtype auto {ADAPTED_EXPERTS}"),
    "experts-short-rows": ("many-experts", "short", "--dtype auto"),
    "few-experts": ("few-experts", "long", "--dtype auto"),
}
SLOW = {"kept-auto", "many-short-rows", "gemma4-one", "experts", "experts-short-rows", "few-experts"}


@pytest.mark.parametrize(
    ("model", "rows", "options"),
    [pytest.param(*run, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, run in RUNS.items()],
)
def test_the_peak_is_predicted(folder: Path, model: str, rows: str, options: str, tmp_path: Path) -> None:
    options += " --batch-rows 8 --max-steps 2"
    predicted, measured = peak_of(folder / model, folder / f"{rows}.jsonl", options, tmp_path / "run")
    assert predicted == pytest.approx(measured, rel=WITHIN), f"{predicted / measured:.2f} of {measured >> 20} MB"


ANSWERING = """
import sys
from backhand.cli.main import main
from backhand.system import peak_rss_bytes
assert main(sys.argv[1:]) == 0
print(peak_rss_bytes(), file=sys.stderr)
"""


def test_the_second_model_of_the_live_view_is_counted(folder: Path, tmp_path: Path) -> None:
    model, rows = folder / "large-vocabulary", folder / "short.jsonl"
    options = "--dtype float32 --batch-rows 4 --max-steps 1"
    predicted = planned(model, rows, f"{options} --watch")["live_view_bytes"]
    words = ["train", "--model", model, "--data", rows, "--output", tmp_path / "run", "--quiet", *options.split()]
    words += ["--answers", "0"]
    assert main([str(word) for word in words]) == 0
    words = ["generate", "--model", model, "--adapter", tmp_path / "run/adapter", "--dtype", "float32", "--threads", 1]
    words += [
        "--compare",
        "--greedy",
        "--max-new-tokens",
        8,
        "--quiet",
        "--prompt",
        "the user asks for a list of names",
    ]
    command = [sys.executable, "-c", ANSWERING, *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1500)
    assert predicted == pytest.approx(int(done.stderr), rel=WITHIN), done.stderr
