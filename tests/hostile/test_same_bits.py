"""Promises of the same bits: one, two and three processes, equal numbers of threads, and another OpenMP library."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from backhand.errors import UsageError
from backhand.options.config import TrainConfig
from backhand.training.run import train
from tests.hostile.conftest import World
from tests.support.limited import limited
from tests.support.ranks import bits_of_several, start_ranks
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import tiny_model
from tests.support.tiny_run import TinyRun, final_bits, with_options, write_pairs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("tiny"))


# ---- processes ---------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "answers": {"dropout": 0.2},
    "two rows a micro-batch": {"micro_batch_rows": 2},
    "all layers recomputed": {"recompute": "block"},
    "DoRA": {"use_dora": True},
    "LoRA+": {"loraplus_lr_ratio": 8.0},
    "the upper layer": {"layers": "last:1"},
    "more than factors": {"modules_to_save": ("lm_head",)},
    "preferences": {"objective": "dpo"},
    "labelled answers": {"objective": "kto"},
    "odds ratio": {"objective": "orpo"},
    "rewards": {"objective": "grpo", "reward": ("length:4",), "group": 2, "max_new_tokens": 2, "temperature": 1.0},
    "a quantized base": {"base": "quantized"},
    "a schedule": {"schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1},
    "packed rows": {"batch_rows": 6, "micro_batch_rows": 3},
}
QUICK = ("answers", "the upper layer", "preferences", "a quantized base")


def config_of(name: str, tiny: TinyRun, place: Path) -> TrainConfig:
    options = {"micro_batch_rows": 1, "max_steps": 3, "eval_every": 3, "save_every": 1, **RUNS[name]}
    if options.get("objective") in ("dpo", "kto", "orpo"):
        pairs = write_pairs(place / "pairs.jsonl", 8, labelled=options["objective"] == "kto")
        options |= {"data": (str(pairs),), "eval_data": (), "eval_fraction": 0.25}
    if options.get("base") == "quantized":
        sizes = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = tiny_model("llama-tied", num_hidden_layers=2, intermediate_size=128, **sizes)
        path = write_tiny_gguf(model, place / "model.gguf", storage=GGMLQuantizationType.Q8_0)
        options["model"] = str(path)
    return tiny.config(place / "alone", **options)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=() if size == 3 and name in QUICK else pytest.mark.slow)
        for name, size in itertools.product(RUNS, (2, 3))
    ],
)
def test_several_processes_end_in_the_bits_of_one(name: str, size: int, tiny: TinyRun, tmp_path: Path) -> None:
    config = config_of(name, tiny, tmp_path)
    train(config)
    ranks = start_ranks([with_options(config, output=tmp_path / "run")] * size, tmp_path / "ranks")
    assert ranks.exit_codes() == [0] * size, ranks.said()
    assert untimed(tmp_path / "run") == untimed(tmp_path / "alone")


def untimed(run: Path) -> dict[str, bytes]:
    """The bits of a run, without the seconds in its metrics."""
    found = bits_of_several(run)
    lines = [
        {key: value for key, value in line.items() if key != "sampling_s"} for line in json.loads(found["metrics"])
    ]
    return {**found, "metrics": json.dumps(lines).encode()}


# ---- threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "threads", [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(7, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["answers", "a quantized base"])
def test_the_same_number_of_threads_gives_the_same_bits(name: str, threads: int, tiny: TinyRun, tmp_path: Path) -> None:
    """Also where there are more threads than cores; a run that was stopped goes on with the same number."""
    config = with_options(config_of(name, tiny, tmp_path), threads=threads, max_steps=3)
    train(config)
    train(with_options(config, output=tmp_path / "again"))
    assert final_bits(tmp_path / "again") == final_bits(tmp_path / "alone")
    last = max((tmp_path / "again" / "checkpoints").glob("step-*"))
    shutil.rmtree(last)
    (tmp_path / "again" / "summary.json").unlink()
    train(with_options(TrainConfig(), output=tmp_path / "again", resume=True))
    assert final_bits(tmp_path / "again") == final_bits(tmp_path / "alone")


@pytest.mark.parametrize(("before", "after"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_another_number_of_threads_does_not_continue_a_run(
    before: int, after: int, tiny: TinyRun, tmp_path: Path
) -> None:
    config = with_options(config_of("answers", tiny, tmp_path), threads=before)
    train(config)
    with pytest.raises(UsageError, match="threads"):
        train(with_options(config, threads=after, resume=True))


@pytest.mark.parametrize("variable", ["1", "2", "5"])
def test_the_environment_does_not_change_the_threads_of_a_run(variable: str, world: World, tmp_path: Path) -> None:
    words = world.train("run", "--save-every", 1)
    assert limited(words, tmp_path).code == 0
    usual = final_bits(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-2")
    (tmp_path / "run" / "summary.json").unlink()
    resume = ["train", "--resume", "--output", "run", "--quiet"]
    ended = limited(resume, tmp_path, environment={"OMP_NUM_THREADS": variable})
    assert ended.code == 0, ended.errors
    assert final_bits(tmp_path / "run") == usual


# ---- another OpenMP ----------------------------------------------------------------------------------------------

SHIMS = {
    "that gives one thread": "int omp_get_max_threads() { return 1; } int omp_get_num_procs() { return 1; }",
    "that gives a thousand threads": "int omp_get_max_threads() { return 1000; }",
    "that ignores the number of threads": "void omp_set_num_threads(int) {}",
    "without any function": "int nothing_of_openmp() { return 0; }",
}


def libraries() -> list[Path]:
    """OpenMP libraries of this machine other than torch's own: LLVM's, Intel's, and those that packages bring."""
    found: dict[str, Path] = {}
    places = [Path("/usr/lib"), *map(Path, sys.path)]
    for place in places:
        for pattern in ("**/libomp.so*", "**/libiomp5.so*", "**/libgomp*.so*"):
            for path in place.glob(pattern) if place.is_dir() else ():
                if path.is_file() and path.parent.name != "lib" and "torch" not in path.parts:
                    found.setdefault(path.resolve().name, path)
    return list(found.values())


def real(words: list[object], place: Path, library: Path | None) -> tuple[int, str]:
    """The command in a process of its own, with this library loaded before all others."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= {"HF_HUB_OFFLINE": "1", **({} if library is None else {"LD_PRELOAD": str(library)})}
    program = [sys.executable, "-P", "-m", "backhand", *map(str, words)]
    done = subprocess.run(
        program, cwd=place, env=environment, capture_output=True, text=True, errors="replace", check=False, timeout=300
    )
    return done.returncode, done.stderr


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def usual(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """The adapter by number of threads, with torch's own library."""
    place = tmp_path_factory.mktemp("usual")
    found = {}
    for threads in (1, 2):
        words = world.train(f"run{threads}")
        words[words.index("--threads") + 1] = threads
        code, errors = real(words, place, None)
        assert code == 0, errors
        found[threads] = adapter(place / f"run{threads}")
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="not run: LD_PRELOAD is Linux's")
@pytest.mark.parametrize(
    ("kind", "threads"),
    # Torch itself reads and writes outside its buffers where a library starts more threads than it says that it would.
    [(kind, n) for kind in ("of this machine", *SHIMS) for n in (1, 2) if (kind, n) != ("that gives one thread", 2)],
)
def test_another_openmp_is_loaded_first(
    kind: str, threads: int, world: World, usual: dict[int, bytes], tmp_path: Path
) -> None:
    """The same bits as with torch's own, or an error that says what is wrong; never a crash or a hang."""
    others = libraries()
    if kind in SHIMS:
        source, shim = tmp_path / "shim.cpp", tmp_path / "libshim.so"
        source.write_text(f'extern "C" {{ {SHIMS[kind]} }}\n')
        compiler = shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            pytest.skip("not run: there is no compiler here")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(shim), str(source)], check=True)
        others = [shim]
    if not others:
        pytest.skip("not run: there is no other OpenMP library here")
    for number, library in enumerate(others):
        words = world.train(f"run{number}")
        words[words.index("--threads") + 1] = threads
        code, errors = real(words, tmp_path, library)
        assert code == 0, (library, errors)
        assert adapter(tmp_path / f"run{number}") == usual[threads], library
