"""Any contents of rows, configuration or a run's own files raise only errors of ours, with their exit codes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from backhand.cli.main import main
from backhand.errors import ArtifactError, BackhandError
from backhand.loop.state import PROGRESS_FILE, STATE_FILE, Progress, RunState
from backhand.loop.step import AdapterOptimizer
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot
from backhand.options.config import OptimizationOptions, TrainConfig
from backhand.runs.checkpoint import load_checkpoint, manifest_bytes
from backhand.training.run import train
from tests.support.fault_table import documented
from tests.support.tiny_run import StopAfter, TinyRun, final_bits, with_options

RUNS, CONFIGURATIONS, DAMAGES, CHECKPOINTS = 40, 150, 40, 150


def cases(count: int) -> settings:
    patient = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, derandomize=True, suppress_health_check=patient)


def exit_code(config: TrainConfig) -> int:
    """0, or that of the error of ours; anything else fails the test."""
    try:
        train(config)
    except BackhandError as error:
        return error.exit_code
    return 0


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


ROWS = st.binary(max_size=60) | st.lists(
    st.sampled_from(
        [
            b'{"text": "a list"}',
            b'{"prompt": "what", "completion": "a"}',
            b"[]",
            b"{}",
            b"null",
            b'{"text": 3}',
            b"\xff",
        ]
    ),
    max_size=4,
).map(b"\n".join)


@cases(RUNS)
@given(rows=ROWS, skip_bad=st.booleans())
def test_any_file_of_rows(rows: bytes, skip_bad: bool, tiny: TinyRun) -> None:
    assert documented("any bytes as a file of rows") == RUNS
    with folder() as place:
        (place / "rows.jsonl").write_bytes(rows)
        config = tiny.config(
            place / "run", data=(str(place / "rows.jsonl"),), eval_data=(), skip_bad=skip_bad, max_steps=1
        )
        code = exit_code(config)
        assert code in (0, 3)
        assert (place / "run").exists() == (code == 0)


OPTIONS = sorted({option.name for part in fields(TrainConfig) for option in fields(getattr(TrainConfig(), part.name))})
VALUES = st.sampled_from(
    ["", '""', "0", "-1", "1.5", "nan", "inf", "1e400", "true", "[]", "{}", '"x"', '["q_proj"]', '"auto"', "9" * 20]
)  # fmt: skip


@cases(CONFIGURATIONS)
@given(
    text=st.binary(max_size=40)
    | st.lists(
        st.tuples(
            st.sampled_from(["model", "data", "adapter", "optimization", "run"]), st.sampled_from(OPTIONS), VALUES
        ),
        max_size=3,
    )
)
def test_any_configuration(text: bytes | list[tuple[str, str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert documented("any text or values as a configuration") == CONFIGURATIONS
    if isinstance(text, list):
        text = "".join(f"{part}.{option} = {value}\n" for part, option, value in text).encode()
    with folder() as place:
        (place / "run.toml").write_bytes(text)
        # No rows are there, so that a configuration which is right ends with 3, and a model which is none with 4.
        words = [
            "--output",
            str(place / "run"),
            "--data",
            str(place / "absent.jsonl"),
            "--model",
            str(place / "absent"),
        ]
        code = main(["train", str(place / "run.toml"), *words])
        assert code in (2, 3, 4), capsys.readouterr().err
        assert not (place / "run").exists()


class Stopped:
    """A run that was stopped after step 4, with checkpoints of steps 2 and 3; and the bits it is to end in."""

    def __init__(self, run: Path, bits: dict[str, bytes]) -> None:
        self.run = run
        self.bits = bits


@pytest.fixture(scope="module")
def stopped(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    place = tmp_path_factory.mktemp("stopped")
    config = tiny.config(place / "straight", max_steps=4, save_every=1, eval_every=4)
    train(config)
    with pytest.raises(StopAfter.Stopped):
        train(with_options(config, output=place / "run"), callbacks=[StopAfter(4)])
    return Stopped(place / "run", final_bits(place / "straight"))


def damaged(path: Path, kind: str, place: float) -> None:
    data = path.read_bytes()
    position = int(place * max(1, len(data) - 1))
    match kind:
        case "cut":
            path.write_bytes(data[:position])
        case "flipped":
            path.write_bytes(
                data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :] if data else b"\x10"
            )
        case "removed":
            path.unlink()
        case "directory":
            path.unlink()
            path.mkdir()
        case "pipe":
            path.unlink()
            os.mkfifo(path)
        case "zeros":
            path.write_bytes(bytes(len(data)))


@cases(DAMAGES)
@given(
    damages=st.lists(
        st.tuples(
            st.integers(0, 10**6),
            st.sampled_from(["cut", "flipped", "removed", "directory", "pipe", "zeros"]),
            st.floats(0, 1, exclude_max=True),
        ),
        min_size=1,
        max_size=3,
        unique_by=lambda damage: damage[0],
    )
)
def test_any_damage_to_a_run(damages: list[tuple[int, str, float]], stopped: Stopped) -> None:
    assert documented("any damage to the files of a stopped run") == DAMAGES
    with folder() as place:
        run = place / "run"
        shutil.copytree(stopped.run, run)
        # Metrics are what was measured, not what the next step depends on: nothing can bring them back.
        paths = [
            path for path in sorted(run.rglob("*")) if path.is_file() and path.name not in ("metrics.jsonl", ".lock")
        ]
        touched = {paths[number % len(paths)]: (kind, at) for number, kind, at in damages}
        for path, (kind, at) in touched.items():
            damaged(path, kind, at)
        code = exit_code(with_options(TrainConfig(), output=run, resume=True, quiet=True))
        assert code in (0, 2, 3, 4)  # 3 where config.toml names other rows
        whole = {path.parent.name for path in paths} - {path.parent.name for path in touched}
        if all(path.parent != run for path in touched):
            if {"step-2", "step-3"} & whole:
                assert code == 0
            else:
                assert code == 4, "never a silent start from nothing"
        if code == 0:
            assert final_bits(run) == stopped.bits


@pytest.mark.parametrize("name", ["adapter/README.md", "status.json", "summary.json", "facts.json", "proofs.jsonl"])
def test_a_pipe_instead_of_a_file_is_not_waited_for(name: str, stopped: Stopped) -> None:
    with folder() as place:
        run = Path(shutil.copytree(stopped.run, place / "run"))
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
        code = main(["train", "--resume", "--output", str(run), "--quiet"])
        assert code == 2 or (code == 0 and final_bits(run) == stopped.bits)


def test_metrics_of_other_types_are_left_out(stopped: Stopped) -> None:
    wrong = [{"step": "x"}, {"step": None}, {}, [], {"step": 2, "eval_loss": "low"}, {"step": 3, "loss": [1], "x": {}}]
    with folder() as place:
        run = Path(shutil.copytree(stopped.run, place / "run"))
        with (run / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in wrong)
        assert exit_code(with_options(TrainConfig(), output=run, resume=True, quiet=True)) == 0
        assert {**final_bits(run), "metrics": b""} == {**stopped.bits, "metrics": b""}


def state() -> RunState:
    lora = LoRAParameters([LoRASlot("q_proj", 3, 2, 2, 1.0, 0.0)])
    return RunState(lora, AdapterOptimizer(lora, OptimizationOptions()), Progress())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def saved(tensors: dict[str, torch.Tensor]) -> bytes:
    return save({name: tensor.clone() for name, tensor in tensors.items()})


PROGRESS = st.dictionaries(st.sampled_from([field.name for field in fields(Progress)]), JSON, max_size=4)
TENSORS = st.dictionaries(
    st.sampled_from(["values", "mean", "squares", "updates"]),
    st.sampled_from([torch.zeros(10), torch.zeros(()), torch.zeros(3, 2), torch.zeros(10, dtype=torch.int64)]),
)


@cases(CHECKPOINTS)
@given(
    progress=PROGRESS.map(lambda changes: json.dumps({**json.loads(Progress().to_json()), **changes}).encode())
    | st.binary(max_size=20),
    tensors=TENSORS.map(saved) | st.binary(max_size=20),
    left_out=st.sampled_from(["", "", "", STATE_FILE, PROGRESS_FILE]),
    facts=st.dictionaries(st.text(max_size=4), JSON, max_size=2),
)
def test_any_values_in_a_checkpoint(progress: bytes, tensors: bytes, left_out: str, facts: dict[str, Any]) -> None:
    assert documented("any values in a checkpoint with right digests") == CHECKPOINTS
    contents = {PROGRESS_FILE: progress, STATE_FILE: tensors}
    contents.pop(left_out, None)
    with folder() as place:
        for name, data in contents.items():
            (place / name).write_bytes(data)
        (place / "manifest.json").write_bytes(manifest_bytes(0, contents, facts))
        with suppress(ArtifactError):
            state().restore(load_checkpoint(place, 0), torch.float32)


def test_a_manifest_with_right_digest_and_another_form() -> None:
    import hashlib

    for files in (
        [],
        {"x": {"bytes": 5.0, "sha256": ""}},
        {"x": 3},
        {"x": {"bytes": 1}},
        {"../x": {"bytes": 0, "sha256": ""}},
        "x",
        None,
    ):
        body = {"format_version": 1, "step": 0, "files": files, "facts": {}}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        with folder() as place:
            (place / "manifest.json").write_text(json.dumps({**body, "manifest_sha256": digest}))
            with pytest.raises(BackhandError, match="damaged"):
                load_checkpoint(place, 0)
