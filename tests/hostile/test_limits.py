"""Limits of the system: processes, open files, lengths of files, memory, and processor time."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from backhand.options.config_file import dump_config
from backhand.runs.status import read_status
from backhand.training.run import train
from tests.hostile.conftest import World
from tests.support.faulty_runs import temporary
from tests.support.limited import Ended, limited
from tests.support.tiny_run import TinyRun, final_bits, with_options

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="not run: limits are Linux's")

Words = Callable[[World], list[object]]


def on_threads(words: list[object], threads: int) -> list[object]:
    place = words.index("--threads") + 1
    return [*words[:place], threads, *words[place + 1 :]]


def with_rewards(world: World) -> list[object]:
    return world.train("out", "--objective", "grpo", "--reward", "length:4", "--group", 2, "--max-new-tokens", 2)


def assert_resources(ended: Ended, remedy: str) -> None:
    """It ends with exit code 5, says why, and what to raise."""
    assert ended.code == 5, ended.errors
    assert ended.what and "why: " in ended.errors and remedy in ended.errors, ended.errors
    assert "bug" not in ended.errors


COMMANDS: dict[str, Words] = {
    "train": lambda world: world.train("out"),
    "train on two threads": lambda world: on_threads(world.train("out"), 2),
    "train on rewards": with_rewards,
    "generate": lambda world: world.ask("--model", world.model),
    "evaluate": lambda world: ["evaluate", "--model", world.model, "--data", world.rows, "--threads", 2],
    "lint": lambda world: ["lint", "--model", world.model, "--data", world.rows],
}


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        *((name, 1) for name in COMMANDS),
        *((name, 2) for name in COMMANDS if name != "lint"),
        *((name, count) for name in ("train on two threads", "train on rewards") for count in (3, 4)),
    ],
)
def test_no_more_processes_or_threads(name: str, processes: int, world: World, tmp_path: Path) -> None:
    """The system counts threads as processes."""
    limits = {resource.RLIMIT_NPROC: processes}
    ended = limited(COMMANDS[name](world), tmp_path, limits=limits, unprivileged=True)
    assert_resources(ended, "(ulimit -u)")
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize("name", ["train", "generate"])
def test_a_worker_and_two_threads_suffice_one_that_computes(name: str, world: World, tmp_path: Path) -> None:
    limits = {resource.RLIMIT_NPROC: 4}
    ended = limited(COMMANDS[name](world), tmp_path, limits=limits, unprivileged=True)
    assert ended.code == 0, ended.errors


def quantized(world: World) -> list[object]:
    words = world.train("out", "--base", "quantized")
    words[words.index("--model") + 1] = world.gguf
    return words


FILES: dict[str, Words] = {
    "train": COMMANDS["train"],
    "a GGUF file": quantized,
    "generate": COMMANDS["generate"],
    "an adapter": lambda world: world.ask("--model", world.model, "--adapter", world.adapter),
    "inspect": lambda world: ["inspect", world.adapter],
    "merge": lambda world: ["merge", "--model", world.model, "--adapter", world.adapter, "--output", "out"],
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("files", [3, 9, 10, 12])
def test_no_more_open_files(files: int, name: str, world: World, tmp_path: Path) -> None:
    """A process that multiprocessing has started holds eight or so."""
    ended = limited(FILES[name](world), tmp_path, limits={resource.RLIMIT_NOFILE: files})
    if ended.code != 0:
        assert_resources(ended, "(ulimit -n)")
        assert not (tmp_path / "out" / "adapter").exists() and not temporary(tmp_path)
    else:
        assert files > 8


WRITING: dict[str, Words] = {
    "train": COMMANDS["train"],
    "merge": FILES["merge"],
    "merge to GGUF": lambda world: [*FILES["merge"](world)[:-1], "out.gguf"],
    "export": lambda world: ["export", "--to", "gguf", *FILES["merge"](world)[1:]],
    "combine": lambda world: ["combine", "add", world.adapter, world.adapter, "--output", "out"],
    "compress": lambda world: ["compress", world.adapter, "--error", 0.5, "--output", "out"],
}


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("length", [2_000, 8_000])
def test_no_longer_files(length: int, name: str, world: World, tmp_path: Path) -> None:
    """Nothing half written is left; a run keeps what says that it failed."""
    ended = limited(WRITING[name](world), tmp_path, file_bytes=length)
    assert_resources(ended, "(ulimit -f)")
    assert not temporary(tmp_path) and not list(tmp_path.glob(".*.tmp"))
    assert not (tmp_path / "out" / "adapter").exists()
    assert name == "train" or not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_answers_to_a_file_that_may_not_be_longer(world: World, tmp_path: Path) -> None:
    words = ["generate", "--model", world.model, "--data", world.rows, "--output", "answers.jsonl", "--threads", 1]
    ended = limited([*words, "--max-new-tokens", 2], tmp_path, file_bytes=600)
    assert ended.code == 5, ended.errors
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("kind", ["addresses", "data"])
@pytest.mark.parametrize("name", ["train", "generate", "merge", "evaluate"])
def test_no_more_memory(name: str, kind: str, world: World, tmp_path: Path) -> None:
    words = (COMMANDS | FILES)[name](world)
    more = 2**25 if kind == "addresses" else 2**22
    ended = limited(words, tmp_path, **{"memory_bytes" if kind == "addresses" else "data_bytes": more})  # type: ignore[arg-type]
    assert ended.code in (0, 5), ended.errors
    if ended.code == 5:
        assert_resources(ended, "next: ")
        assert not (tmp_path / "out").exists() or not temporary(tmp_path / "out")


@pytest.mark.parametrize("kibibytes", [256, 1024])
def test_a_small_stack(kibibytes: int, world: World, tmp_path: Path) -> None:
    """The stacks of new threads are as small as the limit says."""
    words = on_threads(world.train("out"), 2)
    ended = limited(words, tmp_path, limits={resource.RLIMIT_STACK: kibibytes << 10})
    assert ended.code in (0, 5), ended.errors
    assert ended.code == 5 or (tmp_path / "out" / "adapter" / "adapter_config.json").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
def test_processor_time_that_runs_out_is_a_kill_and_the_run_goes_on(tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", max_steps=200, save_every=5, eval_every=200, epochs=100)
    (tmp_path / "run.toml").write_text(dump_config(config))
    ended = limited(["train", "run.toml"], tmp_path, limits={resource.RLIMIT_CPU: 1})
    assert ended.code in (-signal.SIGXCPU, -signal.SIGKILL)
    status = read_status(tmp_path / "run")
    assert status is None or status.state == "killed"
    train(with_options(config, resume=(tmp_path / "run" / "config.toml").exists()))
    train(with_options(config, output=tmp_path / "straight"))
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")
