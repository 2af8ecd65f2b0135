"""A tokenizer with more tokens than the model has: refused before anything is computed, by every command and engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backhand.cli.main import main
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

NEW = "<|new|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer got a special token, and the model no row of the embedding for it."""
    tokenizer = tiny_tokenizer()
    directory = save_tiny(
        tiny_model("llama-tied", num_hidden_layers=1, vocab_size=len(tokenizer)),
        tmp_path_factory.mktemp("unknown") / "model",
        tokenizer=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [NEW]})
    tokenizer.save_pretrained(directory)
    return directory


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("engine", ["backhand", "transformers"])
@pytest.mark.parametrize("command", ["train", "evaluate", "plan"])
def test_a_token_that_the_model_does_not_have_is_refused(
    command: str, engine: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", ["the user asks", f"the assistant {NEW} answers"])
    words = ["--model", str(model), "--engine", engine, "--dtype", "float32", "--data", data]
    output = ["--output", str(tmp_path / "run"), "--quiet"] if command == "train" else []
    assert main([command, *words, *output]) == 3
    said = capsys.readouterr().err
    assert f"{data}:2: token 300, {NEW!r}, is outside the model's vocabulary of 300 tokens" in said
    assert "resize_token_embeddings" in said


def test_verify_refuses_it_too(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "rows.jsonl", ["the user asks", f"the assistant {NEW} answers"])
    assert main(["verify", "--model", str(model), "--dtype", "float32", "--data", data]) == 3
    assert f"{data}:2: token 300, {NEW!r}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "plan"])
def test_held_out_rows_are_looked_at_too(
    command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", ["the user asks"])
    held_out = write(tmp_path / "held_out.jsonl", [f"the assistant {NEW} answers"])
    output = ["--output", str(tmp_path / "run"), "--quiet"] if command == "train" else []
    assert main([command, "--model", str(model), "--data", data, "--eval-data", held_out, *output]) == 3
    assert f"{held_out}:1: token 300" in capsys.readouterr().err


def test_rows_without_the_new_token_are_welcome(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ["the user asks", "the assistant answers"])
    assert main(["evaluate", "--model", str(model), "--dtype", "float32", "--data", data, "--json"]) == 0
