"""The command line on the real model, as a user types it: train, evaluate, generate, prove, load in PEFT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backhand.data.demo_task import write_demo_data

pytestmark = pytest.mark.smollm2
TRAIN_ROWS, HELD_OUT_ROWS = 320, 24


def backhand(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "backhand", *map(str, words)]
    finished = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=1200)
    assert finished.returncode == code, finished.stderr
    return finished


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ and the run directory of one epoch on the demo's task."""
    folder = tmp_path_factory.mktemp("end_to_end")
    train, held_out = write_demo_data(folder / "data", seed=1, train_rows=TRAIN_ROWS, held_out_rows=HELD_OUT_ROWS)
    settings = folder / "run.toml"
    settings.write_text(
        f'[data]\ndata = ["{train}"]\neval_data = ["{held_out}"]\n'
        "[optimization]\nepochs = 1\nlearning_rate = 1e-4\nbatch_rows = 8\n"
    )
    backhand("train", settings, "--learning-rate", "1e-3", "--output", folder / "run")
    return folder


def test_training_learns_and_leaves_a_whole_run_directory(trained: Path) -> None:
    run = trained / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["engine"] == "backhand"
    assert summary["steps"] == TRAIN_ROWS // 8
    assert summary["best_eval_loss"] < summary["base_eval_loss"] / 10
    assert "learning_rate = 0.001" in (run / "config.toml").read_text(), "the command line wins over run.toml"
    for name in ("adapter_config.json", "adapter_model.safetensors", "backhand.json", "README.md"):
        assert (run / "adapter" / name).stat().st_size > 0
    proofs = [json.loads(line) for line in (run / "proofs.jsonl").read_text().splitlines()]
    assert proofs
    assert all(proof["passed"] for proof in proofs)


def test_evaluate_sees_the_base_improved(trained: Path) -> None:
    held_out = trained / "data" / "valid.jsonl"
    finished = backhand(
        "evaluate", "--data", held_out, "--adapter", trained / "run" / "adapter", "--max-new-tokens", "56", "--json"
    )
    found = json.loads(finished.stdout)
    assert found["rows"] == HELD_OUT_ROWS
    assert found["adapted"]["loss"] < found["base"]["loss"] / 10
    assert found["adapted"]["exact_match"] > found["base"]["exact_match"]


def test_generate_answers_in_json_and_only_the_answer(trained: Path) -> None:
    row = json.loads((trained / "data" / "valid.jsonl").read_text().splitlines()[0])
    (system,) = (message["content"] for message in row["messages"] if message["role"] == "system")
    (prompt,) = (message["content"] for message in row["messages"] if message["role"] == "user")
    finished = backhand(
        *("generate", "--adapter", trained / "run" / "adapter", "--system", system, "--prompt", prompt),
        *("--greedy", "--max-new-tokens", "56"),
    )
    answer = json.loads(finished.stdout)
    assert set(answer) == set(json.loads(row["messages"][-1]["content"]))


def test_verify_proves_the_run(trained: Path) -> None:
    finished = backhand("verify", "--run", trained / "run", "--max-tokens", "64", "--json")
    assert json.loads(finished.stdout)["passed"] is True


def test_an_existing_run_is_not_touched(trained: Path) -> None:
    data = trained / "data" / "train.jsonl"
    finished = backhand("train", "--data", data, "--output", trained / "run", code=2)
    assert "--resume" in finished.stderr
    assert "--overwrite" in finished.stderr


def test_the_adapter_means_the_same_in_peft(trained: Path) -> None:
    from backhand.lab.peft_parity import peft_parity
    from backhand.nn.loading import open_model

    ids = open_model("smollm2-135m").tokenizer()("The adapter means the same everywhere.")["input_ids"]
    parity = peft_parity("smollm2-135m", trained / "run" / "adapter", [ids])
    assert parity.passed, parity
    assert parity.effect > 0.01
    assert torch.is_grad_enabled()
