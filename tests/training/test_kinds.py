"""Whole runs of everything that can be trained: PEFT reads the files, resuming gives the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from backhand.adapters.contents import UnusableAdapterError
from backhand.adapters.inject import inject_from
from backhand.errors import UsageError
from backhand.generation.completer import complete_greedily
from backhand.generation.loading import loaded_model
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.opening import open_model
from backhand.nn.model_options import BaseModelOptions
from backhand.training.run import train
from tests.support.parity import relative_error
from tests.support.saved_adapters import load_adapter
from tests.support.tiny_models import full_logits, tiny_documents
from tests.support.tiny_run import TinyRun, final_bits, with_options

Trained = Callable[[str, str], Path]

KINDS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True, "use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "embedding": {"target_modules": ("embed_tokens", "v_proj")},
    "embedding, DoRA": {"target_modules": ("embed_tokens", "v_proj"), "use_dora": True},
    "head and a norm": {"modules_to_save": ("lm_head", "model.norm")},
    "embedding in full": {"modules_to_save": ("embed_tokens",), "rank_pattern": {"q_proj": 2}},
    "tokens": {"trainable_token_indices": (5, 40, 17), "use_dora": True},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def trained(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The adapter of a whole run of one kind by one engine, made when first asked for."""

    @cache
    def made(name: str, engine: str) -> Path:
        return run(tiny, tmp_path_factory.mktemp("run") / "run", KINDS[name], engine=engine)

    return made


def run(tiny: TinyRun, output: Path, fields: dict[str, Any], **options: Any) -> Path:
    config = tiny.config(output, **options)
    train(replace(config, adapter=replace(config.adapter, **fields)))
    return output / "adapter"


def their_logits(tiny: TinyRun, adapter: Path | None, document: torch.Tensor) -> torch.Tensor:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    model = base if adapter is None else peft.PeftModel.from_pretrained(base, str(adapter))
    return full_logits(model.eval(), document)


def our_logits(tiny: TinyRun, adapter: Path, document: torch.Tensor) -> torch.Tensor:
    decoder = Decoder.from_source(open_model(str(tiny.model)), dtype=torch.float32)
    decoder.attach(load_adapter(adapter, decoder.module_shapes()).parameters())
    return decoder.logits(document)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["backhand", "transformers"])
@pytest.mark.parametrize("name", KINDS)
def test_a_run_learns_and_peft_reads_what_it_wrote(name: str, engine: str, tiny: TinyRun, trained: Trained) -> None:
    adapter = trained(name, engine)
    summary = json.loads((adapter.parent / "summary.json").read_text())
    assert summary["engine"] == engine
    if "embed_tokens" not in KINDS[name].get("target_modules", ()):  # six steps are too few for those
        assert summary["best_eval_loss"] < summary["base_eval_loss"]
    (document,) = tiny_documents((19,), vocab_size=90)
    theirs, ours = their_logits(tiny, adapter, document), our_logits(tiny, adapter, document)
    assert relative_error(ours, theirs) <= 1e-5
    assert relative_error(ours, their_logits(tiny, None, document)) > 1e-3


@pytest.mark.parametrize("name", [name for name in KINDS if "target_modules" not in KINDS[name]])
def test_both_engines_train_to_the_same_adapter(name: str, tiny: TinyRun, trained: Trained) -> None:
    """But for an embedding's factors, which the two draw in another order."""
    shapes = module_shapes(decoder_config(open_model(str(tiny.model)).config))
    ours, theirs = (load_adapter(trained(name, engine), shapes).factors for engine in ("backhand", "transformers"))
    assert ours.keys() == theirs.keys()
    for tensor, value in ours.items():
        assert relative_error(value, theirs[tensor]) <= 1e-2, tensor


@pytest.mark.parametrize("name", ["DoRA", "embedding, DoRA", "head and a norm", "tokens"])
def test_a_resumed_run_ends_in_the_same_bits(name: str, tiny: TinyRun, tmp_path: Path) -> None:
    fields = {**KINDS[name], "dropout": 0.1}
    whole = tmp_path / "whole"
    run(tiny, whole, fields, prove_resume=2)
    proofs = [json.loads(line) for line in (whole / "proofs.jsonl").read_text().splitlines()]
    assert any("repeated from a checkpoint" in proof["proof"] and proof["passed"] for proof in proofs)
    bits = final_bits(whole)
    newest = max((whole / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    shutil.rmtree(newest)  # as if the run had been killed before it
    config = tiny.config(whole)
    train(with_options(replace(config, adapter=replace(config.adapter, **fields)), resume=True))
    assert final_bits(whole) == bits


@pytest.mark.parametrize("name", ["lora_bias", "embedding, DoRA", "embedding in full"])
def test_a_run_starts_from_such_an_adapter(name: str, tiny: TinyRun, trained: Trained, tmp_path: Path) -> None:
    train(tiny.config(tmp_path / "run", from_adapter=str(trained(name, "backhand")), learning_rate=1e-6, epochs=1))
    shapes = module_shapes(decoder_config(open_model(str(tiny.model)).config))
    paths = (trained(name, "backhand"), tmp_path / "run" / "adapter")
    before, after = (load_adapter(path, shapes).factors for path in paths)
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        assert torch.allclose(after[tensor], value, atol=1e-4), tensor


@pytest.mark.parametrize("name", KINDS)
def test_saved_loaded_and_saved_again_gives_the_same_bytes(name: str, tiny: TinyRun, trained: Trained) -> None:
    """Through the other way of putting an adapter into a model."""
    adapter = trained(name, "backhand")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    again = inject_from(base, adapter).files()
    assert again["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["DoRA", "head and a norm", "tokens", "embedding, DoRA"])
def test_both_engines_generate_the_same(name: str, tiny: TinyRun, trained: Trained) -> None:
    prompts = [document.tolist() for document in tiny_documents((7, 7, 11), vocab_size=90)]
    answers = []
    for engine in ("backhand", "transformers"):
        options = BaseModelOptions(model=str(tiny.model), dtype="float32", engine=engine, threads=1)  # type: ignore[arg-type]
        with loaded_model(options, trained(name, "backhand")) as loaded:
            answers.append(complete_greedily(loaded.model, prompts, stop_ids=(), max_new_tokens=6))
            loaded.model.use_adapter(False)
            answers.append(complete_greedily(loaded.model, prompts, stop_ids=(), max_new_tokens=6))
    assert answers[:2] == answers[2:]


def test_a_pickle_is_opened_only_when_allowed(tiny: TinyRun, trained: Trained, tmp_path: Path) -> None:
    adapter = shutil.copytree(trained("DoRA", "backhand"), tmp_path / "adapter")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "backhand.json").unlink()
    options = BaseModelOptions(model=str(tiny.model), dtype="float32", threads=1)
    with pytest.raises(UnusableAdapterError, match="--allow-pickle"), loaded_model(options, adapter):
        pass
    with loaded_model(replace(options, allow_pickle=True), adapter):
        pass
    with pytest.raises(UnusableAdapterError, match="--allow-pickle"):
        train(tiny.config(tmp_path / "run", from_adapter=str(adapter)))


def test_untying_is_said_before_the_first_step(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.config(tmp_path / "run", quiet=False, epochs=1)
    train(replace(config, adapter=replace(config.adapter, modules_to_save=("lm_head",))))
    text = " ".join(capsys.readouterr().err.split())
    assert "lm_head.weight: it is tied to model.embed_tokens.weight; training it in full unties them" in text


def test_whole_modules_under_transformers_need_float32(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dtype float32"):
        run(tiny, tmp_path / "run", {"modules_to_save": ("lm_head",)}, engine="transformers", dtype="bfloat16")


def test_an_option_that_matches_nothing_is_refused_before_the_weights_are_read(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lm_heat"):
        run(tiny, tmp_path / "run", {"modules_to_save": ("lm_heat",)})
    assert not (tmp_path / "run").exists()
