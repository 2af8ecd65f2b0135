"""What is left of the second attack, each as it ends now, and kinds of trouble that it did not come to."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_targets
from backhand.errors import UsageError
from backhand.files import FileLayer
from backhand.kernels import build, builds
from backhand.kernels.builds import usable
from backhand.loop.state import Saver
from backhand.options.config import TrainConfig
from backhand.training.run import train
from tests.hostile.conftest import World
from tests.support.faulty_files import InterceptedFiles, half_written
from tests.support.faulty_runs import observed_saves
from tests.support.limited import Ended, limited
from tests.support.processes import run, start
from tests.support.ranks import free_port
from tests.support.tiny_run import TinyRun, final_bits, with_options

# ---- a compiled library that is not as it was built --------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "cut at a page": lambda path: os.truncate(path, 4096 * (path.stat().st_size // 8192)),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"no library" * 1000),
    "one bit": one_bit,
    "another build": lambda path: shutil.copy(path.with_name("backhand_baseline.so"), path),
    "another library": lambda path: shutil.copy(Path(torch.__file__).parent / "lib" / "libc10.so", path),
    "without its stamp": lambda path: path.with_suffix(".stamp").unlink(),
    "a stamp of nothing": lambda path: path.with_suffix(".stamp").write_bytes(b"\xff\x00"),
}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    if len(usable()) < 2:
        pytest.skip("there are no two builds here")
    return Path(shutil.copytree(build.BUILT, tmp_path / "lib", ignore=shutil.ignore_patterns("tmp*", "sanitized")))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_build_gives_way_to_a_plainer_one(
    kind: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *plainer, widest = usable()
    DAMAGE[kind](copied / f"backhand_{widest}.so")
    assert usable.__wrapped__(copied) == tuple(plainer)
    (line,) = capsys.readouterr().err.splitlines()
    assert widest in line and "make kernels" in line


@pytest.mark.parametrize("kind", ["cut", "empty", "garbage", "one bit"])
def test_without_the_plainest_build_torch_computes(kind: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGE[kind](copied / "backhand_baseline.so")
    assert usable.__wrapped__(copied) == ()
    assert "torch computes" in capsys.readouterr().err


def trained_with(folder: str, words: list[str], place: str) -> None:
    """In a process of its own: a command whose compiled libraries lie in another folder."""
    os.chdir(place)
    os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT, 0o600), 2)
    builds.chosen.cache_clear()
    builds.usable.cache_clear()
    found = usable.__wrapped__
    builds.usable = lambda folder_=Path(folder): found(folder_)  # type: ignore[assignment]
    loaded = builds.load.__wrapped__
    builds.load = lambda name, folder_=Path(folder): loaded(name, folder_)  # type: ignore[assignment]
    from backhand.cli.main import main

    code = main(words)
    sys.stderr.flush()
    os._exit(code)


def test_a_command_says_it_in_one_line_and_goes_on(copied: Path, world: World, tmp_path: Path) -> None:
    cut(copied / f"backhand_{usable()[-1]}.so")
    words = [str(word) for word in world.train("run", steps=1)]
    assert run(trained_with, str(copied), words, str(tmp_path)) == 0
    said = (tmp_path / "said").read_text()
    assert said.count("are not used") == 1 and usable()[-2] in usable()


# ---- the last row of the table -----------------------------------------------------------------------------------


def adapter_with(world: World, place: Path, **fields: object) -> Path:
    copy = Path(shutil.copytree(world.adapter, place))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return copy


@pytest.mark.parametrize("name", ["n" * 100_000, "a/" * 50_000, "a" * 300 + "/b", "\0", "a\0b", "/" + "x" * 5000])
def test_a_base_that_no_file_can_be(name: str, world: World, tmp_path: Path) -> None:
    adapter_with(world, tmp_path / "a", base_model_name_or_path=name)
    ended = limited(["inspect", "a"], tmp_path)
    assert ended.code == 0 and "no norms of base weights" in ended.errors, ended.errors
    assert len(ended.errors) + len(ended.output) < 20_000
    ended = limited(world.ask(f"--model={name.replace(chr(0), '')}" if name != "\0" else "--model=x"), tmp_path)
    assert ended.code == 4, ended.errors


def test_a_merge_beyond_float32_advises_no_float32(world: World, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(world.adapter, tmp_path / "a"))
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, copy / "adapter_model.safetensors")
    for output in ("m", "m.gguf"):
        words = ["merge", "--model", world.model, "--adapter", "a", "--output", output, "--dtype", "float32"]
        ended = limited(words, tmp_path)
        assert ended.code == 6 and "not finite" in ended.what, ended.errors
        assert "--dtype float32" not in ended.errors and not (tmp_path / output).exists()


def in_a_deleted_directory(words: list[str], place: str) -> None:
    gone, errors = Path(place) / "gone", os.open(Path(place) / "said", os.O_WRONLY | os.O_CREAT, 0o600)
    gone.mkdir()
    os.chdir(gone)
    os.environ["PWD"] = str(gone)
    gone.rmdir()
    os.dup2(errors, 2)
    from backhand.cli.main import main

    code = main(words)
    sys.stderr.flush()
    os._exit(code)


@pytest.mark.parametrize("more", [[], ["--workers", "2"]])
def test_a_working_directory_that_was_deleted(more: list[str], world: World, tmp_path: Path) -> None:
    words = [str(word) for word in world.train(str(tmp_path / "run"), *more)]
    assert run(in_a_deleted_directory, words, str(tmp_path)) == 2
    said = (tmp_path / "said").read_text()
    assert "current directory does not exist" in said and str(tmp_path / "gone") in said and "next:" in said


@pytest.mark.parametrize(
    ("table", "key", "near"),
    [
        ("optimization", "early_stoping", "early_stopping"),
        ("model", "learning_rat", "learning_rate"),
        ("run", "rnak", "rank"),
        ("data", "overwrit", "overwrite"),
    ],
)
def test_a_key_that_is_wrong_in_two_ways(table: str, key: str, near: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f"[{table}]\n{key} = 1\n")
    ended = limited(["train", "run.toml"], tmp_path)
    assert ended.code == 2 and near in ended.errors and "in the table [" in ended.errors, ended.errors


@pytest.mark.parametrize("size", ["", " ", "x", "-1", "0", "1.5"])
def test_a_world_size_that_is_none(size: str, world: World, tmp_path: Path) -> None:
    for more in ({}, {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}):
        ended = limited(world.train("run"), tmp_path, environment={"WORLD_SIZE": size, **more})
        assert ended.code == 2 and "WORLD_SIZE" in ended.what, ended.errors


KEYS: dict[str, Callable[[int], str]] = {
    "names": lambda number: f"k{number}",
    "paths": lambda number: rf"^model\.layers\.{number}\.q",
    "expressions": lambda number: f"a{number}.*b",
}


@pytest.mark.parametrize("kind", KEYS)
def test_many_keys_of_a_pattern(kind: str, world: World, tmp_path: Path) -> None:
    """200,000 keys are 8 MB, all that a configuration may have; it took 7 s."""
    pattern = {KEYS[kind](number): 3 for number in range(150_000)}
    adapter_with(world, tmp_path / "a", rank_pattern=pattern)
    began = time.process_time()
    ended = limited(["inspect", "a"], tmp_path)
    assert time.process_time() - began < 3  # of this process; the command's own is bounded by `MATCH_LIMIT_S`
    assert ended.code == (4 if kind == "expressions" else 0), ended.errors


def test_patterns_go_to_the_same_modules_as_before() -> None:
    names = [f"model.layers.{n}.self_attn.{kind}" for n in range(3) for kind in ("q_proj", "k_proj", "a-b")]
    keys = {
        r"^model\.layers\.1\.self_attn\.q_proj": 7,
        "q_proj": 5,
        r"layers\.2\..*": 9,
        r"^model\.layers\.0\.self_attn\.a\-b": 4,
    }
    found = {one.name: one.rank for one in resolve_targets(LoRAConfig(rank_pattern=keys), names)}
    import re

    for name, rank in found.items():
        expected = next((r for key, r in keys.items() if re.match(rf"(.*\.)?({key})$", name)), LoRAConfig().rank)
        assert rank == expected, name
    with pytest.raises(UsageError, match="matches no"):
        resolve_targets(LoRAConfig(rank_pattern={r"^model\.layers\.9": 3}), names)


# ---- kills during a checkpoint's own write, again and again ------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("tiny"))


def killed_in_a_save(config: TrainConfig, call: int) -> None:
    """In a process of its own: train until a call of the second save, which is left half done."""
    files, saves, started = InterceptedFiles(), 0, 0

    def reported(what: str, _step: int) -> None:
        nonlocal saves, started
        saves += what == "begin"
        started = files.count if saves == 2 and what == "begin" else started

    def before(count: int, name: str, arguments: tuple[object, ...]) -> None:
        if started and count == started + call:
            half_written(name, arguments)
            os.kill(os.getpid(), signal.SIGKILL)

    files.before = before
    with observed_saves(reported):
        train(config, files=files)
    os._exit(0)


def test_killed_in_one_save_after_the_other(tiny: TinyRun, tmp_path: Path) -> None:
    """A loop of kills, each in the midst of a checkpoint: the run comes to its end, with the same bits."""
    draw, config = random.Random(26), tiny.config(tmp_path / "run", max_steps=14, save_every=1, eval_every=2)
    kills = 0
    while (code := run(killed_in_a_save, config, draw.randrange(1, 40))) != 0:
        assert code == -signal.SIGKILL and kills < 60
        kills += 1
        config = with_options(config, resume=True)
    assert kills >= 6
    train(tiny.config(tmp_path / "straight", max_steps=14, save_every=1, eval_every=2))
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")


# ---- a file that changes during a run ----------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.open("ab").write(b"x" * 4096),
    "overwritten": lambda path: path.write_bytes(path.read_bytes()[::-1]),
    "one byte": one_bit,
}


def changed_meanwhile(words: list[str], place: str, change: str, model: str) -> None:
    os.chdir(place)
    os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT, 0o600), 2)
    from backhand.cli.main import main
    from tests.support.held_runs import before_pass

    calls = []

    def first(*_: object) -> None:
        calls.append(None)
        if len(calls) == 1:
            CHANGES[change](Path(model))

    before_pass(first)
    code = main(words)
    sys.stderr.flush()
    os._exit(code)


@pytest.mark.parametrize("base", ["dense", "quantized"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_gguf_file_that_changes_during_a_run(change: str, base: str, world: World, tmp_path: Path) -> None:
    """It is reported by name, or nothing of it is in use any more; no signal, no wrong end."""
    shutil.copy(world.gguf, tmp_path / "m.gguf")
    words = [str(word) for word in world.train("run", "--base", base, steps=3)]
    words[words.index("--model") + 1] = "m.gguf"
    code = run(changed_meanwhile, words, str(tmp_path), change, "m.gguf")
    said = (tmp_path / "said").read_text()
    assert code in (0, 4) and "Traceback" not in said, said
    assert code == 0 or "m.gguf" in said


# ---- the disk of rank 0 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [0, 1])
def test_the_disk_of_one_rank_is_full(full: int, world: World, tmp_path: Path) -> None:
    """The run's is rank 0's; what rank 1 could not write stops nothing."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ended: dict[int, Ended] = {}

    def one(rank: int) -> None:
        here = tmp_path / str(rank)
        here.mkdir()
        ended[rank] = limited(
            world.train(str(tmp_path / "run")),
            here,
            file_bytes=6000 if rank == full else None,
            environment={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [ended[rank].code for rank in (0, 1)] == ([5, 5] if full == 0 else [0, 0]), ended
    if full == 0:
        assert "space" in ended[0].errors or "limit" in ended[0].errors


# ---- two runs into one directory ---------------------------------------------------------------------------------


def held_writer(words: list[str], place: str) -> None:
    """In a process of its own: a run that waits in its first step until a file is there."""
    os.chdir(place)
    from backhand.cli.main import main
    from tests.support.held_runs import before_pass

    def wait(*_: object) -> None:
        Path("started").touch()
        while not Path("go").exists():
            time.sleep(0.02)

    before_pass(wait)
    os._exit(main(words))


def test_two_runs_into_one_directory(world: World, tmp_path: Path) -> None:
    """Whatever comes second is refused, or only reads; the first is as it would have been alone."""
    first = start(held_writer, [str(word) for word in world.train("run")], str(tmp_path))
    while not (tmp_path / "started").exists():
        assert first.is_alive()
        time.sleep(0.02)
    again = ([], ["--overwrite"], ["--resume"], ["--overwrite", "--from-adapter", world.adapter])
    for more in again:
        ended = limited(world.train("run", *more), tmp_path)
        assert ended.code == 2, (more, ended.errors)
    for words in (["report", "run", "--output", "page.html"], ["inspect", "run"], ["verify", "--run", "run"]):
        assert limited(words, tmp_path).code in (0, 2, 4), words
    (tmp_path / "go").touch()
    first.join(240)
    assert first.exitcode == 0
    assert limited(world.train("alone"), tmp_path).code == 0
    one, other = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "alone"))
    assert one == other


# ---- variables of the environment --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "0", "-1", "x", "1,2", "1.5", "999999", " 2 ", "4294967297", "٣", "\x1b[31m"])
def test_odd_numbers_of_threads(value: str, world: World, tmp_path: Path) -> None:
    words = world.train("run", steps=1)
    del words[(place := words.index("--threads")) : place + 2]
    ended = limited(words, tmp_path, environment={"OMP_NUM_THREADS": value})
    assert ended.code in (0, 2) and "\x1b" not in ended.errors, ended.errors
    assert ended.code == 0 or "OMP_NUM_THREADS" in ended.errors


@pytest.mark.parametrize("value", ["", "/no/such/folder", "relative", "\udcff", "/dev/null"])
def test_folders_for_temporary_files_that_are_none(value: str, world: World, tmp_path: Path) -> None:
    ended = limited(world.train("run", steps=1), tmp_path, environment={"TMPDIR": value})
    assert ended.code == 0, ended.errors


def real(words: list[object], place: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user's shell starts it."""
    there = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    there |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    program = [sys.executable, "-P", "-m", "backhand", *map(str, words)]
    return subprocess.run(program, cwd=place, env=there, capture_output=True, text=True, errors="replace", check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "tr_TR.UTF-8"},
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "no_SUCH.locale"},
        {"OMP_NUM_THREADS": "0"},
        {"OMP_NUM_THREADS": "x"},
        {"OMP_NUM_THREADS": "999999"},
        {"LD_PRELOAD": "/no/such/libiomp5.so"},
    ],
    ids=str,
)
def test_the_environment_of_a_real_process(variables: dict[str, str], world: World, tmp_path: Path) -> None:
    """The same adapter, to the bit, as in the usual one."""
    assert limited(world.train("usual"), tmp_path).code == 0
    done = real(world.train("run"), tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    one, other = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "usual"))
    assert one == other


@pytest.mark.slow
def test_another_openmp_is_loaded_first(world: World, tmp_path: Path) -> None:
    others = [path for path in Path(sys.prefix).rglob("lib*omp*.so*") if "torch" not in path.parts]
    others += [path for path in Path("/usr/lib").rglob("lib*omp*.so*") if path.is_file()]
    if not others:
        pytest.skip("there is no other OpenMP library here")
    for other in others[:2]:
        done = real(world.train("run", "--overwrite"), tmp_path, LD_PRELOAD=str(other))
        assert done.returncode == 0, (other, done.stderr)


@pytest.mark.slow
def test_workers_without_a_folder_for_temporary_files(world: World, tmp_path: Path) -> None:
    done = real(world.train("run", "--workers", 2), tmp_path, TMPDIR="/no/such/folder")
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_is_a_save_of_the_file_layer() -> None:
    """What the kills above look at."""
    assert hasattr(Saver, "save") and hasattr(FileLayer, "rename")
