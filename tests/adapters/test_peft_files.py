"""Adapters to and from PEFT, and what strict loading refuses."""

from __future__ import annotations

import copy
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import UnusableAdapterError
from backhand.adapters.peft_config import peft_notes
from backhand.adapters.peft_saving import facts_of_card
from backhand.adapters.record import AdapterRecord, base_differences, read_record, record_bytes, wrong_base
from backhand.errors import ArtifactError, CheckError, UsageError
from backhand.nn.lora_parameters import LoRAParameters
from tests.support.parity import decoder_like, relative_error
from tests.support.saved_adapters import load_adapter, resolve_slots, save_adapter
from tests.support.tiny_models import attach_lora, full_logits, tiny_documents, tiny_model

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    return linear_shapes(model)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: (module.out_features, module.in_features) for name, module in linears.items()}


def random_parameters(config: LoRAConfig, shapes: dict[str, tuple[int, int]], seed: int = 3) -> LoRAParameters:
    parameters = LoRAParameters(resolve_slots(config, shapes))
    parameters.values.copy_(torch.randn(parameters.element_count, generator=torch.Generator().manual_seed(seed)) / 8)
    return parameters


CONFIGS: dict[str, LoRAConfig] = {
    "all-linear": LoRAConfig(rank=5, alpha=8.5),
    "names": LoRAConfig(rank=3, alpha=2, target_modules=("q_proj", "down_proj", "lm_head"), dropout=0.1),
    "regex": LoRAConfig(rank=4, target_modules=r".*\.(q|up)_proj", exclude_modules=r".*\.1\..*"),
    "rslora": LoRAConfig(rank=6, alpha=3.5, use_rslora=True),
    "patterns": LoRAConfig(
        rank=5,
        alpha=7,
        rank_pattern={r"layers\.0\..*": 3, "q_proj": 7},
        alpha_pattern={"q_proj": 5, r"layers\.2\.mlp.*": 2.5},
    ),
    "rslora and patterns": LoRAConfig(use_rslora=True, rank_pattern={"v_proj": 4}, alpha_pattern={"k_proj": 9}),
    "layers": LoRAConfig(rank=4, layers_to_transform=(0, 2)),
    "names in layers": LoRAConfig(rank=4, target_modules=("v_proj",), layers_to_transform=(1,)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_reads_what_we_write(
    name: str, model: nn.Module, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    config = CONFIGS[name]
    parameters = random_parameters(config, shapes)
    save_adapter(tmp_path / "a", config, parameters, base_model="some/base", module_names=list(shapes))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "a"))
    held = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert len(held) == 2 * len(parameters.slots)
    for factor, tensor in parameters.named_tensors():
        assert torch.equal(held[f"{PREFIX}{factor}.weight"], tensor)
    by_hand = copy.deepcopy(model)
    for slot in parameters.slots.values():
        weight = by_hand.get_submodule(slot.name).weight
        assert isinstance(weight, Tensor)
        weight.data += slot.scaling * (parameters.lora_B(slot.name) @ parameters.lora_A(slot.name))
    (document,) = tiny_documents([11])
    expected, got = full_logits(by_hand, document), full_logits(theirs, document)
    assert torch.linalg.norm(got - expected) <= 1e-5 * torch.linalg.norm(expected)
    assert torch.linalg.norm(got - full_logits(model, document)) > 0.01 * torch.linalg.norm(expected)


def _to_peft_and_back(variant: str, folder: Path) -> set[str]:
    """An adapter of all linear modules, saved, computed by PEFT as here, saved by PEFT and read again; its modules."""
    model = tiny_model(variant)
    shapes = linear_shapes(model)
    parameters = random_parameters(CONFIGS["all-linear"], shapes)
    save_adapter(folder / "a", CONFIGS["all-linear"], parameters, base_model="some/base", module_names=list(shapes))
    theirs = peft.PeftModel.from_pretrained(model, str(folder / "a"))
    (document,) = tiny_documents([11])
    decoder = decoder_like(theirs, next(iter(parameters.slots.values())).scaling)
    decoder.attach(parameters)
    assert relative_error(decoder.logits(document), full_logits(theirs, document)) <= 1e-5
    theirs.save_pretrained(str(folder / "back"), save_embedding_layers=False)
    back = load_adapter(folder / "back", shapes).parameters()
    assert torch.equal(back.values, parameters.values)
    return set(parameters.slots)


def test_modules_around_convolutions_go_to_peft_and_come_back(tmp_path: Path) -> None:
    slots = _to_peft_and_back("lfm2", tmp_path)
    assert {name.split(".", 3)[3] for name in slots} == {
        *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
        *(f"conv.{part}_proj" for part in ("in", "out")),
        *(f"feed_forward.w{part}" for part in "123"),
    }


def test_modules_next_to_the_layers_inputs_go_to_peft_and_come_back(tmp_path: Path) -> None:
    """Layers with another's keys have no k_proj and no v_proj; the projection of the inputs is before all layers."""
    slots = _to_peft_and_back("gemma4_text", tmp_path)
    assert {"model.per_layer_model_projection", "model.layers.6.per_layer_input_gate"} <= slots
    assert "model.layers.6.self_attn.k_proj" not in slots


def test_modules_of_delta_rules_go_to_peft_and_come_back(tmp_path: Path) -> None:
    slots = _to_peft_and_back("qwen3_5_text", tmp_path)
    assert {name.split(".", 3)[3] for name in slots} == {
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")),
        *("linear_attn.out_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    }


@pytest.mark.parametrize(
    ("variant", "refused"), [("falcon_h1", True), ("nemotron_h", True), ("granite4-h", False), ("bamba", False)]
)
def test_a_note_names_families_whose_out_proj_peft_refuses(variant: str, refused: bool) -> None:
    model = tiny_model(variant)
    modules = [name for name in linear_shapes(model) if name.endswith(".out_proj")]
    with pytest.raises(ValueError, match="'out_proj' is incompatible") if refused else nullcontext():
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["out_proj"]))
    notes = peft_notes(model.config.model_type, modules)
    assert ["--exclude-modules out_proj" in note for note in notes] == [True] * refused
    assert peft_notes(model.config.model_type, ["model.layers.0.mamba.in_proj"]) == ()


def test_modules_of_mamba_go_to_peft_and_come_back(tmp_path: Path) -> None:
    slots = _to_peft_and_back("granite4-h", tmp_path)
    assert {"mamba.in_proj", "mamba.out_proj", "self_attn.o_proj"} <= {name.split(".", 3)[3] for name in slots}


@pytest.mark.parametrize("name", ["all-linear", "fused"])
def test_fused_modules_go_to_peft_and_come_back(name: str, tmp_path: Path) -> None:
    """Phi-3's q, k and v are one module, and so are gate and up: one pair of factors each, as PEFT has them."""
    fused = tiny_model("phi3")
    shapes = linear_shapes(fused)
    config = {
        "all-linear": CONFIGS["all-linear"],
        "fused": LoRAConfig(rank=3, target_modules=("qkv_proj", "gate_up_proj")),
    }[name]
    parameters = random_parameters(config, shapes)
    assert "model.layers.0.self_attn.qkv_proj" in parameters.slots
    save_adapter(tmp_path / "a", config, parameters, base_model="some/base", module_names=list(shapes))
    theirs = peft.PeftModel.from_pretrained(fused, str(tmp_path / "a"))
    (document,) = tiny_documents([11])
    decoder = decoder_like(theirs, parameters.slots["model.layers.0.self_attn.qkv_proj"].scaling)
    decoder.attach(parameters)
    assert relative_error(decoder.logits(document), full_logits(theirs, document)) <= 1e-5
    theirs.save_pretrained(str(tmp_path / "back"), save_embedding_layers=False)
    back = load_adapter(tmp_path / "back", shapes).parameters()
    assert torch.equal(back.values, parameters.values)


THEIRS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\..*": 2}, "alpha_pattern": {r".*mlp.*": 3}},
    "names": {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r".*\.[02]\..*_proj"},
    "layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [2]},
    "excluded": {"exclude_modules": ["v_proj"]},
    "head": {"target_modules": ["lm_head", "o_proj"]},
}


@pytest.mark.parametrize("name", THEIRS)
def test_we_read_what_peft_writes(
    name: str, model: nn.Module, shapes: dict[str, tuple[int, int]], tmp_path: Path, recwarn: Any
) -> None:
    theirs = attach_lora(copy.deepcopy(model), **THEIRS[name])  # type: ignore[arg-type]
    theirs.save_pretrained(str(tmp_path))
    loaded = load_adapter(tmp_path, shapes)
    held = {key: value for key, value in peft.get_peft_model_state_dict(theirs).items() if "base_layer" not in key}
    assert {f"{PREFIX}{factor}.weight" for factor in loaded.factors} == set(held)
    parameters = loaded.parameters()
    for factor, tensor in parameters.named_tensors():
        assert torch.equal(held[f"{PREFIX}{factor}.weight"], tensor)
    for slot in loaded.slots:
        assert slot.scaling == theirs.get_submodule(f"base_model.model.{slot.name}").scaling["default"]
    assert list(loaded.base_copies) == (["lm_head"] if name == "head" else [])


@pytest.mark.parametrize("name", CONFIGS)
def test_save_load_save_gives_the_same_bytes(name: str, shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    config = CONFIGS[name]
    record = AdapterRecord(origin="somewhere", base_digest="sha256:0")
    first = save_adapter(
        tmp_path / "first",
        config,
        random_parameters(config, shapes),
        base_model="some/base",
        record=record,
        module_names=list(shapes),
        card={"loss": 0.5},
    )
    loaded = load_adapter(first, shapes)
    second = save_adapter(
        tmp_path / "second",
        loaded.config,
        loaded.parameters(),
        base_model=loaded.described.base_model,
        task_type=loaded.described.task_type,
        revision=loaded.described.revision,
        record=loaded.record,
        module_names=list(shapes),
        card={"loss": 0.5},
    )
    names = sorted(path.name for path in first.iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors", "backhand.json"]
    for file in names:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_without_the_module_names_all_linear_is_still_written_exactly(
    model: nn.Module, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    for name in ("all-linear", "layers"):
        config = CONFIGS[name]
        save_adapter(tmp_path / name, config, random_parameters(config, shapes), base_model=None)
        assert len(load_adapter(tmp_path / name, shapes).slots) == len(resolve_slots(config, shapes))


@pytest.fixture
def saved(shapes: dict[str, tuple[int, int]], tmp_path: Path) -> Path:
    config = LoRAConfig(rank=3, alpha=2, target_modules=("q_proj", "v_proj"))
    return save_adapter(tmp_path / "adapter", config, random_parameters(config, shapes), base_model="some/base")


def without_record(directory: Path) -> Path:
    (directory / "backhand.json").unlink(missing_ok=True)
    return directory


def change_tensors(directory: Path, change: Any) -> None:
    without_record(directory)
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_config(directory: Path, **fields: Any) -> None:
    without_record(directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def problems_of(directory: Path, shapes: dict[str, tuple[int, int]]) -> list[str]:
    with pytest.raises(UnusableAdapterError) as caught:
        load_adapter(directory, shapes)
    assert caught.value.exit_code == 4
    for problem in caught.value.problems[:40]:
        assert problem in str(caught.value)
    return list(caught.value.problems)


Q0 = "model.layers.0.self_attn.q_proj"
A0, B0 = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"


def rename_all(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[key.removeprefix("base_model.model.model.")] = tensors.pop(key)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda t: t.pop(A0), [f"missing: {A0}, (3, 60)", f"{B0}: its partner lora_A.weight is missing"]),
        (lambda t: t.pop(B0), [f"missing: {B0}, (84, 3)", f"{A0}: its partner lora_B.weight is missing"]),
        (
            lambda t: t.update({f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(3, 60)}),
            ["unexpected", "layers.7", "no such module, the nearest are model.layers."],
        ),
        (lambda t: t.update({"extra": torch.ones(2)}), ["unexpected: extra, (2,)", "names begin with"]),
        (
            lambda t: t.update({f"{PREFIX}{Q0}.lora_magnitude_vector": torch.ones(84)}),
            ["lora_magnitude_vector, (84,)", "use_dora"],
        ),
        (
            lambda t: t.update({f"{PREFIX}model.layers.0.self_attn.k_proj.lora_A.weight": torch.ones(3, 60)}),
            ["the configuration does not adapt this module", "its partner lora_B.weight is missing"],
        ),
        (
            lambda t: t.update({A0: torch.ones(5, 60), B0: torch.ones(84, 5)}),
            [f"{A0}: shape (5, 60) in the file, (3, 60) by", f"{B0}: shape (84, 5) in the file, (84, 3) by"],
        ),
        (lambda t: t.update({A0: torch.ones(60, 3)}), [f"{A0}: shape (60, 3) in the file, (3, 60)"]),
        (lambda t: t.update({A0: torch.full((3, 60), torch.nan)}), [f"{A0}: 180 of 180 values are not finite"]),
        (lambda t: t[B0].view(-1).__setitem__(5, torch.inf), [f"{B0}: 1 of 252 values are not finite"]),
        (lambda t: t.update({A0: torch.ones(3, 60, dtype=torch.int8)}), [f"{A0}: stored as I8"]),
        (
            lambda t: t.update({A0: torch.ones(3, 60).to(torch.float8_e4m3fn)}),
            [f"{A0}: stored as F8_E4M3"],
        ),
        (rename_all, ["missing: " + A0, "names begin with base_model.model."]),
        (lambda t: t.clear(), ["missing: " + A0]),
    ],
)
def test_tensors_that_do_not_fit_are_all_listed(
    saved: Path, shapes: dict[str, tuple[int, int]], change: Any, shown: list[str]
) -> None:
    change_tensors(saved, change)
    text = "\n".join(problems_of(saved, shapes))
    for part in shown:
        assert part in text


def test_a_tensor_of_a_wrong_type_is_one_problem_and_not_also_missing(
    saved: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    change_tensors(saved, lambda t: t.update({A0: torch.ones(3, 60, dtype=torch.int8)}))
    (problem,) = problems_of(saved, shapes)
    assert "I8" in problem


def test_a_file_of_another_kind_is_one_problem(saved: Path, shapes: dict[str, tuple[int, int]]) -> None:
    (saved / "adapter_model.safetensors").write_text("<!doctype html><title>Sign in</title>")
    (saved / "backhand.json").unlink(missing_ok=True)
    (problem,) = problems_of(saved, shapes)
    assert "HTML page" in problem


def test_many_missing_tensors_do_not_hide_why(saved: Path, shapes: dict[str, tuple[int, int]]) -> None:
    (saved / "backhand.json").unlink(missing_ok=True)
    change_tensors(saved, rename_all)
    with pytest.raises(UnusableAdapterError) as caught:
        load_adapter(saved, shapes)
    shown = str(caught.value)
    assert "- missing: " in shown and "- unexpected: " in shown and "begin with base_model.model." in shown
    assert "next: give the base model it was trained on" in shown


def test_one_error_lists_problems_of_every_kind(saved: Path, shapes: dict[str, tuple[int, int]]) -> None:
    change_config(saved, lora_alpha=-1, layer_replication=[[0, 1]], future=7)
    change_tensors(saved, lambda t: t.update({A0: torch.full((3, 60), torch.nan)}))
    problems = problems_of(saved, shapes)
    for part in ("lora_alpha", "layer_replication", "future", "not finite"):
        assert sum(part in problem for problem in problems) == 1


def test_an_adapter_of_another_model_names_the_base_it_was_made_for(saved: Path) -> None:
    with pytest.raises(UnusableAdapterError, match="does not belong to this model") as caught:
        load_adapter(saved, {Q0: (80, 64)})
    assert caught.value.why is not None and caught.value.why.startswith("it was trained on some/base; ")
    assert any("shape" in problem for problem in caught.value.problems)


def test_more_tensors_than_can_be_shown_are_counted(saved: Path, shapes: dict[str, tuple[int, int]]) -> None:
    change_tensors(saved, lambda t: t.update({f"x{i}": torch.ones(1) for i in range(100)}))
    with pytest.raises(UnusableAdapterError, match=r"100 problems[\s\S]*and 60 more"):
        load_adapter(saved, shapes)


@pytest.mark.parametrize("field", ["r", "rank_pattern"])
def test_a_rank_other_than_the_files_is_a_problem(saved: Path, shapes: dict[str, tuple[int, int]], field: str) -> None:
    change_config(saved, **({"r": 4} if field == "r" else {"rank_pattern": {"v_proj": 2}}))
    assert any("in the file" in problem and "by configuration" in problem for problem in problems_of(saved, shapes))


def test_patterns_that_overlap_are_read_in_the_order_of_the_file(
    model: nn.Module, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    """PEFT sorts the keys when it writes, so its own file may mean something else than what was trained."""
    overlapping = {"q_proj": 7, r"layers\.1\..*": 2}
    theirs = attach_lora(copy.deepcopy(model), rank_pattern=overlapping)
    theirs.save_pretrained(str(tmp_path / "ranks"))
    assert any(
        f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight: shape (7, 60)" in problem
        for problem in problems_of(tmp_path / "ranks", shapes)
    )
    theirs = attach_lora(copy.deepcopy(model), alpha_pattern=overlapping)
    theirs.save_pretrained(str(tmp_path / "alphas"))
    loaded = load_adapter(tmp_path / "alphas", shapes)
    assert any("overlap" in note and "layers.1.self_attn.q_proj" in note for note in loaded.notes)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "alphas"))
    for slot in loaded.slots:
        assert slot.scaling == again.get_submodule(f"base_model.model.{slot.name}").scaling["default"]


def test_a_target_that_matches_nothing_is_tolerated_if_the_tensors_agree(
    saved: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    """PEFT keeps every name the user gave; what was adapted, the tensors say."""
    change_config(saved, target_modules=["q_proj", "v_proj", "query_key_value"], rank_pattern={"nothing": 3})
    assert len(load_adapter(saved, shapes).slots) == 6


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"target_modules": ["nothing"]}, "leaves no module"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"rank_pattern": {"(": 3}}, "not a regular expression"),
        ({"target_modules": ["q_proj"]}, "does not adapt this module"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "missing: "),
    ],
)
def test_a_configuration_that_does_not_describe_the_tensors(
    saved: Path, shapes: dict[str, tuple[int, int]], fields: dict[str, Any], shown: str
) -> None:
    change_config(saved, **fields)
    assert any(shown in problem for problem in problems_of(saved, shapes))


def test_another_base_of_other_sizes_is_refused(saved: Path) -> None:
    with pytest.raises(UnusableAdapterError, match="6 of 6 adapted modules are not in this model"):
        load_adapter(saved, linear_shapes(tiny_model("llama", hidden_size=48)))


def test_a_file_changed_after_saving_is_refused(saved: Path, shapes: dict[str, tuple[int, int]]) -> None:
    path = saved / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)
    assert any("backhand.json describes" in problem for problem in problems_of(saved, shapes))
    without_record(saved)
    load_adapter(saved, shapes)


def test_a_damaged_record_is_refused(saved: Path, shapes: dict[str, tuple[int, int]]) -> None:
    path = saved / "backhand.json"
    raw = json.loads(path.read_text())
    for broken in ({**raw, "files": 3}, {k: v for k, v in raw.items() if k != "files"}, {**raw, "format_version": 99}):
        path.write_text(json.dumps(broken))
        assert any("backhand.json" in problem for problem in problems_of(saved, shapes))


def test_a_record_without_options_is_one_of_the_first() -> None:
    raw = json.loads(record_bytes(AdapterRecord(origin="here")))
    del raw["config"]
    assert read_record(raw, "backhand.json") == AdapterRecord(origin="here")


def test_the_record_knows_its_base() -> None:
    record = AdapterRecord(origin="x.gguf", base_digest="a", tokenizer_digest="b", chat_template_digest="c")
    assert not base_differences(record, {"base_digest": "a", "tokenizer_digest": "b", "chat_template_digest": "c"})
    assert not base_differences(record, {})
    different = base_differences(record, {"base_digest": "z", "tokenizer_digest": "b", "chat_template_digest": "z"})
    assert [sentence.split(":")[0] for sentence in different] == ["base model", "chat template"]
    assert all("trained on x.gguf" in sentence for sentence in different)
    text = str(wrong_base(different, "here"))
    assert all(sentence in text for sentence in different) and "here" in text and "--force-base" in text


def test_an_adapter_in_a_named_sub_folder_is_found(
    model: nn.Module, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    theirs = attach_lora(copy.deepcopy(model))
    theirs.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path / "a"), selected_adapters=["other"])
    loaded = load_adapter(tmp_path / "a", shapes)
    assert loaded.directory == tmp_path / "a" / "other" and loaded.config.rank == 2
    theirs.save_pretrained(str(tmp_path / "b"))  # "default" in the directory itself, "other" below it
    assert load_adapter(tmp_path / "b", shapes).config.rank == 5
    assert load_adapter(tmp_path / "b" / "other", shapes).config.rank == 2
    assert load_adapter(tmp_path / "b" / "adapter_config.json", shapes).config.rank == 5


def test_several_adapters_without_one_in_the_directory_itself_are_named(
    saved: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    for name in ("one", "two"):
        (saved.parent / "many" / name).mkdir(parents=True)
        (saved.parent / "many" / name / "adapter_config.json").write_bytes(b"{}")
    with pytest.raises(ArtifactError, match="one, two"):
        load_adapter(saved.parent / "many", shapes)


@pytest.mark.parametrize("where", ["nowhere", "file", "empty", "nul\0"])
def test_no_adapter_there(where: str, shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError):
        load_adapter(tmp_path / where, shapes)


def test_pickles_are_opened_only_when_allowed(
    model: nn.Module, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    theirs = attach_lora(copy.deepcopy(model))
    theirs.save_pretrained(str(tmp_path), safe_serialization=False)
    assert any("pickle" in problem for problem in problems_of(tmp_path, shapes))
    loaded = load_adapter(tmp_path, shapes, allow_pickle=True)
    assert len(loaded.slots) == 21


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_hostile_pickle_never_runs(saved: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    without_record(saved)
    (saved / "adapter_model.safetensors").unlink()
    torch.save({"x": Canary(tmp_path / "canary")}, saved / "adapter_model.bin")
    with pytest.raises(UnusableAdapterError, match="pickle of plain tensors"):
        load_adapter(saved, shapes, allow_pickle=True)
    assert not (tmp_path / "canary").exists()


def test_nothing_named_in_the_configuration_is_imported(
    saved: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trap_module.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    change_config(
        saved,
        auto_mapping={"base_model_class": "X", "parent_library": "trap_module"},
        megatron_core="trap_module",
        base_model_name_or_path="trap_module",
    )
    load_adapter(saved, shapes)
    assert not (tmp_path / "canary").exists()


def test_values_that_are_not_finite_are_not_written(shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    config = CONFIGS["names"]
    parameters = random_parameters(config, shapes)
    parameters.values[17] = torch.nan
    with pytest.raises(CheckError, match="not finite"):
        save_adapter(tmp_path / "a", config, parameters, base_model=None)
    assert not (tmp_path / "a").exists()


def test_a_directory_that_is_a_file_is_refused(shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    config = CONFIGS["names"]
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(UsageError, match="file, not a directory"):
            save_adapter(path, config, random_parameters(config, shapes), base_model=None)
    assert (tmp_path / "a").read_text() == "mine"


def test_the_card_names_the_base_and_how_to_load(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    assert 'base_model: "some/base"' in card
    assert 'AutoModelForCausalLM.from_pretrained("some/base")' in card
    assert "`q_proj`, `v_proj`" in card


def test_the_facts_of_a_card_can_be_read_again(tmp_path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    config, facts = next(iter(CONFIGS.values())), {"data": "a_b [1].csv", "loss": "2 → 1"}
    saved = save_adapter(tmp_path / "a", config, random_parameters(config, shapes), base_model="b", card=facts)
    assert facts_of_card(saved) == facts
    assert facts_of_card(tmp_path) == {}
    (tmp_path / "README.md").write_text("# My own card\n| trained parameters | 3 |\n| a | b |\n")
    assert facts_of_card(tmp_path) == {}
