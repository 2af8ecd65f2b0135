"""One run on two and three processes of this machine: the bits of one process, and every way to end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

import backhand
from backhand.errors import UsageError
from backhand.options.config import TrainConfig
from backhand.runs.checkpoint import load_checkpoint
from backhand.runs.interruption import Interruption
from backhand.training.run import train
from tests.support.ranks import KILLED, PAUSE_S, Ranks, bits_of_several, start_and_kill, start_ranks
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import tiny_model
from tests.support.tiny_run import TinyRun, with_options, write_rows


@pytest.fixture(scope="module")
def straight(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Four steps of 4, 4, 3 and 4 micro-batches of one row each, in one process."""
    output = tmp_path_factory.mktemp("straight") / "run"
    config = tiny.config(
        output, max_steps=4, save_every=1, eval_every=2, dropout=0.2, micro_batch_rows=1, recompute="none", answers=0
    )
    train(config)
    return config


def ranks_of(config: TrainConfig, output: Path, size: int, **how: object) -> Ranks:
    return start_ranks([with_options(config, output=output)] * size, output.parent / "ranks", **how)  # type: ignore[arg-type]


def proofs(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "proofs.jsonl").read_text().splitlines()]
    return [{name: line.get(name) for name in ("proof", "passed", "value", "bound")} for line in lines]


def continued(output: Path) -> dict[str, bytes]:
    """The run, gone on with by one process."""
    train(with_options(TrainConfig(), output=output, resume=True, quiet=True))
    return bits_of_several(output)


@pytest.mark.parametrize("size", [2, 3])
def test_ordered_ends_in_the_bits_of_one_process(size: int, straight: TrainConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ranks = ranks_of(straight, output, size)
    assert ranks.exit_codes() == [0] * size, ranks.said()
    assert bits_of_several(output) == bits_of_several(straight.run.output)
    assert json.loads((output / "summary.json").read_text())["world_size"] == size
    step = json.loads((output / "metrics.jsonl").read_text().splitlines()[-2])
    assert len(step["computed_s"]) == len(step["waited_s"]) == size and min(step["computed_s"] + step["waited_s"]) > 0
    assert sum(step["computed_tokens"]) == step["tokens"] and len(step["computed_tokens"]) == size
    assert proofs(output) == proofs(straight.run.output)  # every guard has seen the same, the gradient among it


def test_processes_that_torch_has_connected_already(straight: TrainConfig, tmp_path: Path) -> None:
    ranks = ranks_of(straight, tmp_path / "run", 2, connected=True)
    assert ranks.exit_codes() == [0, 0], ranks.said()
    assert bits_of_several(tmp_path / "run") == bits_of_several(straight.run.output)


def test_one_sum_is_the_same_run_within_rounding(straight: TrainConfig, tmp_path: Path) -> None:
    """Element by element the bound is held in test_gradient_sum; here by a run over gloo."""
    config = with_options(straight, reduce="sum", output=tmp_path / "run")
    ranks = start_ranks([config] * 3, tmp_path / "ranks")
    assert ranks.exit_codes() == [0, 0, 0], ranks.said()
    ours, theirs = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "run", straight.run.output)
    )
    for name, bound in {"loss": 1e-5, "grad_norm": 1e-4, "eval_loss": 1e-5}.items():
        found, expected = ([line[name] for line in lines if name in line] for lines in (ours, theirs))
        assert len(found) > 1 and found == pytest.approx(expected, rel=bound)
    assert ours[1]["supervised_tokens"] == theirs[1]["supervised_tokens"]


def test_two_processes_go_on_as_three(straight: TrainConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    stopped = ranks_of(straight, output, 2, at_place={1: ("step", "terminate")})
    assert stopped.exit_codes() == [143, 143], stopped.said()
    again = start_ranks([with_options(TrainConfig(), output=output, resume=True)] * 3, tmp_path / "more")
    assert again.exit_codes() == [0, 0, 0], again.said()
    assert bits_of_several(output) == bits_of_several(straight.run.output)
    assert json.loads((output / "summary.json").read_text())["world_size"] == 3


@pytest.mark.skipif(sys.platform != "linux", reason="not run: only Linux tells which pages are shared")
def test_a_quantized_base_is_in_memory_once(tiny: TinyRun, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("llama-tied", num_hidden_layers=2, intermediate_size=128, **sizes)
    path = write_tiny_gguf(model, tmp_path / "model.gguf", storage=GGMLQuantizationType.Q8_0)
    config = tiny.config(tmp_path / "run", model=str(path), base="quantized", micro_batch_rows=1, max_steps=4)
    ranks = ranks_of(config, tmp_path / "run", 2, at_place={0: ("step", "stop"), 1: ("step", "stop")})
    for rank in (0, 1):
        ranks.wait_until_stopped(rank)
    for rank in (0, 1):
        own, shared = mapped_bytes(ranks.pid(rank), path)
        assert own == 0 and shared > path.stat().st_size / 2
    for rank in (0, 1):
        ranks.send(rank, signal.SIGCONT)
    assert ranks.exit_codes() == [0, 0], ranks.said()


def mapped_bytes(pid: int, path: Path) -> tuple[int, int]:
    """(of this process alone, of several) of a mapped file's bytes that are in memory."""
    found, here = {"Private": 0, "Shared": 0}, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            here = line.endswith(str(path))
        elif here and (field := re.match(r"(Private|Shared)_\w+: +(\d+) kB", line)):
            found[field[1]] += int(field[2]) * 1024
    return found["Private"], found["Shared"]


def test_fewer_micro_batches_than_processes(straight: TrainConfig, tmp_path: Path) -> None:
    config = with_options(straight, micro_batch_rows=3, max_steps=3, output=tmp_path / "alone")
    train(config)
    clocks = dict.fromkeys(range(3), ("clock", "other"))
    # Micro-batches of 3 and 1 rows, and one of 3 in the last step.
    ranks = ranks_of(config, tmp_path / "run", 3, at_place=clocks)
    assert ranks.exit_codes() == [0] * 3, ranks.said()
    assert bits_of_several(tmp_path / "run") == bits_of_several(tmp_path / "alone")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [step["computed_s"] for step in steps] == [[1.0, 1.0, 0.0]] * 2 + [[1.0, 0.0, 0.0]]
    # Once for the slices, twice for what is said of them: how long it is, and it.
    assert [step["waited_s"] for step in steps] == [[0.0] * 3] + [[0.75] * 3] * 2


def test_each_process_waits_by_its_own_clock(straight: TrainConfig, tmp_path: Path) -> None:
    """Rank 0 is late after step 2, in no step of its own; the wait of rank 1 in step 3 is recorded with step 4."""
    output = tmp_path / "run"
    ranks = ranks_of(straight, output, 2, at_place={0: ("save", "pause")})
    assert ranks.exit_codes() == [0, 0], ranks.said()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    first, _, third, fourth = (line for line in lines if "loss" in line)
    assert first["waited_s"] == [0.0, 0.0]
    assert third["computed_s"][1] + fourth["waited_s"][1] > 0.9 * PAUSE_S


# Either signal, either rank, of two and of three.
STOPPED = [("interrupt", 130, 2, 0, "step"), ("terminate", 143, 2, 1, "step"), ("interrupt", 130, 3, 2, "step")]


@pytest.mark.parametrize(
    ("number", "code", "size", "rank", "place"),
    [*STOPPED, ("interrupt", 130, 2, 1, "evaluation"), ("terminate", 143, 2, 0, "save")],
)
def test_a_signal_to_one_is_one_checkpoint_and_the_end_of_all(
    number: str, code: int, size: int, rank: int, place: str, straight: TrainConfig, tmp_path: Path
) -> None:
    output = tmp_path / "ranks" / ".." / "run"  # however it is written, all say the same of it, so that one does
    ranks = ranks_of(straight, output, size, at_place={rank: (place, number)})
    assert ranks.exit_codes() == [code] * size, ranks.said()
    assert sum("everything up to it is saved" in text for text in ranks.said()) == 1
    steps = [int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*")]
    assert load_checkpoint(output / "checkpoints" / f"step-{max(steps)}", max(steps)).step < 4
    assert continued(output) == bits_of_several(straight.run.output)


@pytest.mark.parametrize(("number", "code", "rank"), [("interrupt", 130, 1), ("terminate", 143, 0)])
def test_a_signal_before_there_is_anything_to_save(
    number: str, code: int, rank: int, straight: TrainConfig, tmp_path: Path
) -> None:
    ranks = ranks_of(straight, tmp_path / "run", 2, at_place={rank: ("load", number)})
    assert ranks.exit_codes() == [code, code], ranks.said()
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "KeyboardInterrupt" not in "".join(ranks.said()) and "SystemExit" not in "".join(ranks.said())


def test_processes_that_are_interrupted_together_say_so_once(straight: TrainConfig, tmp_path: Path) -> None:
    both = dict.fromkeys((0, 1), ("load", "interrupt"))
    ranks = ranks_of(straight, tmp_path / "run", 2, at_place=both)
    assert ranks.exit_codes() == [130, 130]
    assert ranks.said() == ["interrupted\n", ""]


# At each place one of the two, in turns; the other one in `make test-slow`.
@pytest.mark.parametrize(
    ("rank", "place"),
    [pytest.param(*case, marks=pytest.mark.slow if n % 4 in (1, 2) else ()) for n, case in enumerate(KILLED)],
)
def test_a_killed_rank_is_named_and_the_run_goes_on(
    rank: int, place: str, straight: TrainConfig, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    silent_s = 6.0 if place in ("end", "summary") else 60.0  # there nobody speaks with the other any more
    configs = [with_options(straight, output=output)] * 2
    ranks = start_and_kill(configs, tmp_path / "ranks", rank, place, silent_s=silent_s)
    codes = ranks.exit_codes()
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 5, ranks.said()
    assert f"rank {rank} (process " in ranks.said()[1 - rank] and "--resume" in ranks.said()[1 - rank]
    if place != "load":
        assert continued(output) == bits_of_several(straight.run.output)
        assert (output / "summary.json").exists()


def test_a_rank_that_is_killed_when_all_is_done_takes_nothing_along(straight: TrainConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ranks = ranks_of(straight, output, 2, at_place={1: ("done", "kill")})
    assert ranks.exit_codes() == [0, -signal.SIGKILL], ranks.said()
    assert bits_of_several(output) == bits_of_several(straight.run.output) and (output / "summary.json").exists()


def test_a_silent_rank_is_named(straight: TrainConfig, tmp_path: Path) -> None:
    ranks = ranks_of(straight, tmp_path / "run", 2, at_place={1: ("step", "stop")}, silent_s=4.0)
    ranks.processes[0].join(60)
    assert ranks.processes[0].exitcode == 5 and "rank 1 (process " in ranks.said()[0]
    ranks.send(1, signal.SIGCONT)
    assert ranks.exit_codes() == [5, 5]
    assert "is lost" in ranks.said()[1]


@pytest.mark.parametrize(
    "name",
    [
        *("data_digest", "optimization.learning_rate", "base_digest", "base model", "model_config.norm_eps", "torch"),
        *("run.from_adapter", "data.chat_template"),
    ],
)
def test_what_is_not_alike_is_refused_before_the_first_step(
    name: str, tiny: TinyRun, straight: TrainConfig, tmp_path: Path
) -> None:
    """Rows, configuration, an adapted and another weight of the base, versions; both sides are named, once."""
    config = other = with_options(straight, output=tmp_path / "run")
    match name:
        case "data_digest":
            other = with_options(config, data=(str(write_rows(tmp_path / "other.jsonl", 11, seed=5)),))
        case "optimization.learning_rate":
            other = with_options(config, learning_rate=1e-3)
        case "run.from_adapter":
            other = with_options(config, from_adapter=str(straight.run.output / "adapter"))
        case "data.chat_template":
            other = with_options(config, chat_template="none")
        case "base_digest":
            other = with_options(config, model=str(changed(tiny.model, "q_proj.weight", tmp_path / "model")))
        case "base model":
            other = with_options(config, model=str(changed(tiny.model, "model.norm.weight", tmp_path / "model")))
        case "model_config.norm_eps":
            model = shutil.copytree(tiny.model, tmp_path / "model")
            stored = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(stored | {"rms_norm_eps": 0.1}))
            other = with_options(config, model=str(model))
    place = {1: ("versions", "other")} if name == "torch" else None
    ranks = start_ranks([config, other], tmp_path / "ranks", at_place=place)
    assert ranks.exit_codes() == [4, 4], ranks.said()
    assert re.search(rf"{re.escape(name)}: \S+ on rank 0, \S+ on rank 1", ranks.said()[0])
    assert ("base_digest" in ranks.said()[0]) == (name == "base_digest")
    assert ranks.said()[1] == ""  # said once
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def changed(model: Path, ending: str, target: Path) -> Path:
    """A model that differs in one number of the first weight whose name ends so."""
    shutil.copytree(model, target)
    tensors = load_file(target / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    tensors[name].view(-1)[1] += 0.25
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_another_adapter_is_refused_at_the_checkpoint(straight: TrainConfig, tmp_path: Path) -> None:
    ranks = ranks_of(straight, tmp_path / "run", 2, at_place={1: ("adapter", "other")})
    assert ranks.exit_codes() == [6, 6], ranks.said()
    assert "the adapter of rank 1 (process " in ranks.said()[0]
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_an_error_of_one_is_the_end_of_all(straight: TrainConfig, tmp_path: Path) -> None:
    config = with_options(straight, output=tmp_path / "run")
    ranks = start_ranks([config, with_options(config, data=(str(tmp_path / "none.jsonl"),))], tmp_path / "ranks")
    assert ranks.exit_codes() == [3, 3]
    assert "stopped: " in ranks.said()[0] and "none.jsonl" in ranks.said()[0] and "none.jsonl" in ranks.said()[1]


def test_a_meeting_that_fails_says_what_to_do(straight: TrainConfig, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = ranks_of(straight, tmp_path / "taken" / "run", 2, port=port, absent=[1])
        assert refused.exit_codes() == [2] and f"port {port} cannot be used" in refused.said()[0]
    alone = ranks_of(straight, tmp_path / "alone" / "run", 2, absent=[1], join_s=1.0)
    assert alone.exit_codes() == [5] and "missing: rank 1" in alone.said()[0]
    nobody = ranks_of(straight, tmp_path / "nobody" / "run", 2, absent=[0], join_s=1.0)
    assert nobody.exit_codes() == [5] and "start rank 0 there" in nobody.said()[0]
    half = ranks_of(straight, tmp_path / "half" / "run", 2, absent=[1], environment={"MASTER_PORT": ""})
    assert half.exit_codes() == [2] and "MASTER_PORT not set" in half.said()[0]


def test_a_restarted_run_goes_on_by_itself_unless_it_was_stopped(straight: TrainConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    killed = ranks_of(straight, output, 2, at_place={1: ("step", "kill")})
    assert killed.exit_codes() == [5, -signal.SIGKILL]
    again = ranks_of(straight, output, 2, environment={"TORCHELASTIC_RESTART_COUNT": "1"})
    assert again.exit_codes() == [0, 0], again.said()
    assert bits_of_several(output) == bits_of_several(straight.run.output)
    stopped = ranks_of(straight, tmp_path / "stopped" / "run", 2, at_place={0: ("step", "terminate")})
    assert stopped.exit_codes() == [143, 143]
    again = ranks_of(straight, tmp_path / "stopped" / "run", 2, environment={"TORCHELASTIC_RESTART_COUNT": "1"})
    assert again.exit_codes() == [143, 143], again.said()


def test_a_count_of_restarts_that_is_no_number_is_named(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "abc")
    with pytest.raises(UsageError, match="environment: TORCHELASTIC_RESTART_COUNT is 'abc', no number"):
        train(tiny.config(tmp_path / "run"))


def test_a_signal_of_ones_own_after_anothers_is_no_second_one() -> None:
    with ExitStack() as handlers:
        interruption = handlers.enter_context(Interruption(lambda _text: None))
        with interruption.graceful():
            interruption.heard_elsewhere(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.requested == signal.SIGTERM
            with pytest.raises(SystemExit):
                os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit):  # a run that ended all the same ends the program
            handlers.close()


def test_callbacks_do_not_go_to_processes_that_are_started(straight: TrainConfig) -> None:
    with pytest.raises(UsageError, match="callbacks cannot be passed to 2 worker processes"):
        backhand.train(with_options(straight, workers=2), callbacks=[lambda _record: None])
