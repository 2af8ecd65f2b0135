"""Runs on several processes as users start them: `--workers`, torchrun with restarts, two namespaces as machines."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from backhand.options.config import TrainConfig
from backhand.options.config_file import dump_config
from backhand.runs.status import read_status
from backhand.training.run import train
from tests.support.ranks import KILLED, bits_of_several, free_port, start_and_kill, start_ranks
from tests.support.smollm2 import NAME
from tests.support.tiny_run import TinyRun, with_options, write_rows

pytestmark = pytest.mark.slow
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]


@pytest.fixture
def config(tiny: TinyRun, tmp_path: Path) -> TrainConfig:
    """Long enough to be met in the middle."""
    return tiny.config(tmp_path / "run", max_steps=60, save_every=5, eval_every=60, micro_batch_rows=1, answers=0)


def started(config: TrainConfig, *before: str, prefix: Sequence[str] = (), **more: str) -> subprocess.Popen[str]:
    toml = config.run.output.with_suffix(".toml")
    toml.write_text(dump_config(config), encoding="utf-8")
    command = [*prefix, sys.executable, *before, "-m", "backhand", "train", str(toml)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def steps_of(run: Path) -> int:
    """Lines of its metrics."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for_steps(run: Path, count: int) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if steps_of(run) >= count:
            return
        time.sleep(0.1)
    raise AssertionError("the run does not begin")


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def test_workers_ctrl_c_and_a_killed_one(config: TrainConfig, tmp_path: Path) -> None:
    """The launcher leaves nothing in the directory for temporary files, however the run ends."""
    several, temporary = with_options(config, workers=2), tmp_path / "temporary"
    temporary.mkdir()
    run = started(several, TMPDIR=str(temporary))
    wait_for_steps(config.run.output, 7)
    run.send_signal(signal.SIGINT)
    code, errors = ended(run)
    assert code == 130 and errors.count("everything up to it is saved") == 1
    assert "death signal" not in errors  # what torch's launcher logs
    there = steps_of(config.run.output)  # a quick machine has done more than was waited for
    assert not list(temporary.iterdir())
    again = started(with_options(several, resume=True), TMPDIR=str(temporary))
    wait_for_steps(config.run.output, there + 5)
    os.kill(children(again)[-1], signal.SIGKILL)
    code, errors = ended(again)
    assert code == 5 and "rank 1 (process " in errors and "was killed by SIGKILL" in errors
    assert ended(started(with_options(several, resume=True), TMPDIR=str(temporary)))[0] == 0
    assert not list(temporary.iterdir())
    assert ended(started(with_options(config, output=tmp_path / "alone")))[0] == 0
    assert bits_of_several(config.run.output) == bits_of_several(tmp_path / "alone")


@pytest.mark.parametrize(("rank", "place"), KILLED)
def test_all_end_within_a_minute_of_a_kill(rank: int, place: str, tiny: TinyRun, tmp_path: Path) -> None:
    """With the patience that users have; the same with less of it, and then gone on with, is in test_distributed."""
    config = tiny.config(tmp_path / "run", max_steps=4, save_every=1, eval_every=2, micro_batch_rows=1, answers=0)
    ranks = start_and_kill([config] * 2, tmp_path / "ranks", rank, place, quick=False)
    ranks.processes[rank].join()
    began = time.monotonic()
    codes = ranks.exit_codes()
    assert time.monotonic() - began < 60
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 5, ranks.said()
    assert f"rank {rank} (process " in ranks.said()[1 - rank]


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_a_killed_run_again(rank: int, config: TrainConfig, tmp_path: Path) -> None:
    run = started(config, *TORCHRUN)
    wait_for_steps(config.run.output, 8)
    os.kill(children(run)[rank], signal.SIGKILL)
    assert ended(run)[0] == 0
    assert ended(started(with_options(config, output=tmp_path / "alone")))[0] == 0
    assert bits_of_several(config.run.output) == bits_of_several(tmp_path / "alone")


def test_a_rendezvous_of_torchruns_that_fails(config: TrainConfig) -> None:
    """It comes before the first of our processes: torchrun says what is wrong, and ends with 1."""
    one = ["-m", "torch.distributed.run", "--nproc-per-node", "1"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, errors = ended(started(config, *one, "--master-addr", "127.0.0.1", "--master-port", port))
        assert code == 1 and "address already in use" in errors
    joint = [*one, "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    code, errors = ended(started(config, *joint, "--rdzv-conf", "is_host=1,join_timeout=5"))
    assert code == 1 and "RendezvousTimeoutError" in errors
    assert not config.run.output.exists()


@pytest.fixture
def link() -> Iterator[Any]:
    """Two network namespaces with a link between them, of benchmarks/linked_machines.py; skips where there are none."""
    path = Path(__file__).parents[2] / "benchmarks" / "linked_machines.py"
    spec = importlib.util.spec_from_file_location("linked_machines", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if os.geteuid() != 0:
        pytest.skip("not run: making network namespaces takes root")
    with ExitStack() as stack:
        try:
            made = stack.enter_context(module.linked_machines())
        except OSError as error:
            pytest.skip(f"not run: no network namespaces here ({error})")
        yield made


def on_machine(link: Any, machine: int, config: TrainConfig, *launcher: str, **more: str) -> subprocess.Popen[str]:
    return started(config, *launcher, prefix=link.inside(machine), GLOO_SOCKET_IFNAME="eth0", **more)


def test_a_machine_whose_network_is_cut(config: TrainConfig, tmp_path: Path, link: Any) -> None:
    long = with_options(config, max_steps=5000, save_every=5000, eval_every=5000)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": link.hosts[0], "MASTER_PORT": "29500"}
    outputs = (long.run.output, tmp_path / "other")
    runs = [
        on_machine(link, rank, with_options(long, output=output), RANK=str(rank), **place)
        for rank, output in enumerate(outputs)
    ]
    wait_for_steps(long.run.output, 3)
    link.cut()
    found = [ended(run) for run in runs]
    assert [code for code, _ in found] == [5, 5], found
    assert "rank 1 (process " in found[0][1] and "is lost" in found[0][1]
    assert re.search(r"rank 0 .* is lost", found[1][1])
    assert not (tmp_path / "other").exists()  # rank 0 alone writes


def test_torchrun_on_two_machines(config: TrainConfig, tmp_path: Path, link: Any) -> None:
    """By the rendezvous of docs/scaling.md; SIGTERM to one machine's process, and the run goes on with one process."""
    joint = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    joint += ["--rdzv-endpoint", f"{link.hosts[0]}:29500"]
    runs = []
    for machine, host in enumerate(link.hosts):
        own = ["--local-addr", host, "--rdzv-conf", f"is_host={int(machine == 0)}"]
        runs.append(on_machine(link, machine, config, *joint, *own))
    wait_for_steps(config.run.output, 7)
    os.kill(children(runs[1])[0], signal.SIGTERM)
    found = [ended(run) for run in runs]
    assert [code for code, _ in found] == [1, 1], found  # torchrun's own, whatever its processes ended with
    assert sum("everything up to it is saved" in text for _, text in found) == 1, found
    status = read_status(config.run.output)
    assert status is not None and status.state == "interrupted" and status.reason.startswith("terminated")
    assert ended(started(with_options(config, resume=True)))[0] == 0
    assert ended(started(with_options(config, output=tmp_path / "alone")))[0] == 0
    assert bits_of_several(config.run.output) == bits_of_several(tmp_path / "alone")


@pytest.mark.smollm2
def test_smollm2_on_two_processes(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 6, seed=3)
    config = with_options(TrainConfig(), model=NAME, data=(str(rows),), eval_fraction=0.34, max_steps=2, batch_rows=2)
    config = with_options(config, micro_batch_rows=1, threads=1, answers=0, quiet=True, output=tmp_path / "alone")
    train(config)
    ranks = start_ranks([with_options(config, output=tmp_path / "run")] * 2, tmp_path / "ranks")
    assert ranks.exit_codes() == [0, 0], ranks.said()
    assert bits_of_several(tmp_path / "run") == bits_of_several(tmp_path / "alone")
