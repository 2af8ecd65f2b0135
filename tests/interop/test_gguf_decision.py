"""Decision models in GGUF files: llama.cpp's `/v1/systemone` gives the probabilities of `backhand decide`."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backhand
from backhand.errors import UsageError
from backhand.generation.command import generate_command
from backhand.generation.options import AnswerOptions, GenerateOptions, SamplingOptions
from backhand.interop.command import export_command
from backhand.interop.options import ExportOptions
from backhand.nn.loading import open_model
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.model_options import BaseModelOptions
from backhand.options.config import TrainConfig
from backhand.options.objectives import ObjectiveOptions
from backhand.training.run import train
from tests.support.finished_runs import tiny
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import TinyRun, with_options
from tests.support.trl_templates import template_source

__all__ = ["tiny"]

WORDS = ("user", "json", "list")


@pytest.fixture(scope="module")
def decided(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    place = tmp_path_factory.mktemp("decided")
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(24):
        team, mood = (int(number) for number in draw.integers(3, size=2))
        rows.append({"text": f"{WORDS[team]} asks {WORDS[mood]}", "team": f"team {WORDS[team]}", "mood": mood})
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data": (str(path),), "eval_data": (), "eval_fraction": 0.25, "state": "text"}
    model = save_tiny(tiny_model("llama-tied", num_hidden_layers=2, max_position_embeddings=512), place / "model")
    (model / "chat_template.jinja").write_text(template_source("qwen3"))
    questions = {"team": "Which team?", "mood": "Mood?"}
    made = tiny.config(place / "run", **data, question=questions, model=str(model))
    made = with_options(replace(made, objective=ObjectiveOptions(objective="decide")), eval_every=2)
    train(made)
    return made


@pytest.fixture(scope="module")
def exported(decided: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "decision.gguf"
    adapter, model = decided.run.output / "adapter", decided.model.model
    export_command(
        ExportOptions(adapter=adapter, model=model, to="gguf", decision=True, dtype="float32", output=path, quiet=True)
    )
    return path


@pytest.fixture(scope="module")
def server(exported: Path) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(exported)
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_gpu_layers = 0
    params.warmup = False
    params.verbosity = -1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


QUESTIONS = {
    "team": {"type": "choice", "instructions": "Which team?", "criteria": {"team a": "a list", "team b": None}},
    "plain": {"type": "choice", "instructions": "", "criteria": {"team a": None, "team b": None, "team c": "json"}},
    "mood": {"type": "score", "instructions": "Mood?", "criteria": ["calm", "the user asks", "json"]},
}


@pytest.mark.parametrize("state", ["the user asks", "two\n\nlines of text", {"title": "json", "text": "a list"}])
def test_llama_cpp_gives_our_probabilities(state: Any, decided: TrainConfig, server: Any) -> None:
    model = {"model": decided.model.model, "dtype": "float32", "threads": 1}
    ours = backhand.decide(state, adapter=decided.run.output / "adapter", questions=QUESTIONS, **model)
    theirs = server.handle_systemone({"state": state, "questions": QUESTIONS})["answers"]
    assert theirs.keys() == ours.keys()
    for name, answer in ours.items():
        assert theirs[name].keys() == answer.keys()
        assert theirs[name]["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-4)
        assert theirs[name]["confidence"] == pytest.approx(answer["confidence"], abs=1e-3)
    assert theirs["mood"]["legend"] == ours["mood"]["legend"]
    assert theirs["mood"]["score"] == pytest.approx(ours["mood"]["score"], abs=1e-3)


def test_the_file_has_type_template_and_temperatures(decided: TrainConfig, exported: Path) -> None:
    record = json.loads((decided.run.output / "adapter" / "backhand.json").read_text())
    source = open_model(str(exported))
    assert isinstance(source, GGUFModel)
    metadata = source.metadata
    assert metadata.value("llama.decision.type") == "lfm2-d1"
    for kind, temperature in record["decisions"]["temperatures"].items():
        assert metadata.value(f"llama.decision.temperature.{kind}") == pytest.approx(temperature)
    template = metadata.value("tokenizer.chat_template.systemone")
    assert "option.label" in template and template.endswith('assistant\\n<think>\\n\\n</think>\\n\\n" }}'), template[
        -90:
    ]


def test_the_export_prints_a_request_that_the_server_answers(
    decided: TrainConfig, server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, model = decided.run.output / "adapter", decided.model.model
    export_command(
        ExportOptions(
            adapter=adapter, model=model, to="gguf", decision=True, dtype="float32", output=tmp_path / "d.gguf"
        )
    )
    (line,) = (one for one in capsys.readouterr().out.splitlines() if "curl" in one)
    words = shlex.split(line)
    assert words[:3] == ["curl", "http://localhost:8080/v1/systemone", "-d"]
    assert server.handle_systemone(json.loads(words[3]))["answers"].keys() == {"team", "mood"}


def test_the_export_is_proved_by_llama_cpp(decided: TrainConfig, exported: Path) -> None:
    lines = (decided.run.output / "proofs.jsonl").read_text().splitlines()
    proofs = [json.loads(line) for line in lines if "systemone" in line]
    assert proofs and all(proof["passed"] for proof in proofs) and proofs[0]["value"] <= 1e-4


def test_a_wrong_temperature_fails_the_proof(
    decided: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backhand.errors import CheckError
    from backhand.interop import merging
    from backhand.interop.gguf_decision import gguf_decision

    def colder(opened: Any) -> Any:
        right = gguf_decision(opened)
        return replace(right, temperatures={kind: one / 3 for kind, one in right.temperatures.items()})

    monkeypatch.setattr(merging, "gguf_decision", colder)
    options = ExportOptions(
        adapter=decided.run.output / "adapter",
        model=decided.model.model,
        to="gguf",
        decision=True,
        dtype="float32",
        output=tmp_path / "wrong.gguf",
        quiet=True,
    )
    with pytest.raises(CheckError, match="gives the same probabilities"):
        export_command(options)
    assert not (tmp_path / "wrong.gguf").exists()


def test_other_programs_are_not_advised_for_a_decision_adapter(
    decided: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, model = decided.run.output / "adapter", decided.model.model
    export_command(ExportOptions(adapter=adapter, model=model, to="gguf", output=tmp_path / "lora.gguf"))
    said = capsys.readouterr().out
    assert "add --decision" in said and "llama-cli" not in said
    answer = AnswerOptions(prompt="user asks", adapter=adapter)
    options = GenerateOptions(
        model=BaseModelOptions(model=model), answer=answer, sampling=SamplingOptions(max_new_tokens=1)
    )
    generate_command(options)
    assert "not to answer prompts: use backhand decide" in capsys.readouterr().err


def test_other_adapters_and_formats_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    made = tiny.config(tmp_path / "run", epochs=1)
    train(made)
    options = {"adapter": tmp_path / "run" / "adapter", "model": str(tiny.model), "output": tmp_path / "out.gguf"}
    with pytest.raises(UsageError, match="not trained to decide"):
        export_command(ExportOptions(**options, to="gguf", decision=True))
    with pytest.raises(UsageError, match="a decision model is a GGUF file"):
        export_command(ExportOptions(**options, to="mlx", decision=True))
