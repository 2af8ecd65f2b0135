"""adapter_config.json against PEFT's own LoraConfig."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest

from backhand.adapters.config import LoRAConfig
from backhand.adapters.peft_config import (
    FORMAT_VERSION,
    PEFT_FIELDS,
    REFUSED,
    PEFTConfig,
    peft_config_bytes,
    read_peft_config,
    written_pattern,
)
from backhand.adapters.targets import resolve_targets

NAMES = [
    f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]


def test_every_field_of_peft_is_classed() -> None:
    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert set(PEFT_FIELDS) == theirs
    assert len(theirs - {"runtime_config"}) == 41
    assert peft.__version__ == FORMAT_VERSION


def written(config: LoRAConfig, **described: Any) -> dict[str, Any]:
    targets = resolve_targets(config, NAMES)
    data = peft_config_bytes(PEFTConfig(config, **described), targets, NAMES)
    parsed: dict[str, Any] = json.loads(data)
    return parsed


def test_what_is_not_ours_is_written_at_pefts_own_defaults() -> None:
    """Else a reader of the file would find something switched on that we never meant."""
    defaults = peft.LoraConfig().to_dict()
    ours = written(LoRAConfig())
    assert set(ours) == set(defaults)
    different = {name for name in ours if ours[name] != defaults[name]}
    assert different == {"r", "lora_alpha", "target_modules", "inference_mode"}


def test_peft_reads_what_is_written(tmp_path: Path) -> None:
    config = LoRAConfig(
        rank=5,
        alpha=7.5,
        dropout=0.125,
        rank_pattern={r"layers\.0\..*": 3, "q_proj": 4},
        alpha_pattern={"up_proj": 9.0},
        use_rslora=True,
    )
    targets = resolve_targets(config, NAMES)
    described = PEFTConfig(config, "some/base", "CAUSAL_LM", "main")
    (tmp_path / "adapter_config.json").write_bytes(peft_config_bytes(described, targets, NAMES))
    theirs = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert isinstance(theirs, peft.LoraConfig)
    assert (theirs.r, theirs.lora_alpha, theirs.lora_dropout, theirs.use_rslora) == (5, 7.5, 0.125, True)
    assert (theirs.base_model_name_or_path, theirs.task_type, theirs.revision) == ("some/base", "CAUSAL_LM", "main")
    for target in targets:
        rank_key = peft.utils.other.get_pattern_key(theirs.rank_pattern, target.name)
        alpha_key = peft.utils.other.get_pattern_key(theirs.alpha_pattern, target.name)
        assert theirs.rank_pattern.get(rank_key, theirs.r) == target.rank
        assert theirs.alpha_pattern.get(alpha_key, theirs.lora_alpha) == target.alpha


def test_patterns_are_written_so_that_their_order_means_nothing() -> None:
    config = LoRAConfig(rank_pattern={r"layers\.0\..*": 3, "q_proj": 4, r".*up_proj": 6})
    targets = resolve_targets(config, NAMES)
    pattern = written_pattern({target.name: target.rank for target in targets}, config.rank)
    backwards = LoRAConfig(rank_pattern=dict(reversed(pattern.items())))
    assert [t.rank for t in resolve_targets(backwards, NAMES)] == [t.rank for t in targets]
    for name in NAMES:
        keys = [key for key in pattern if peft.utils.other.get_pattern_key([key], name) == key]
        assert len(keys) <= 1


def test_a_shared_value_is_written_under_the_short_name() -> None:
    assert written(LoRAConfig(rank_pattern={".*q_proj": 4}))["rank_pattern"] == {"q_proj": 4}
    assert written(LoRAConfig(rank_pattern={r".*\.0\..*q_proj": 4}))["rank_pattern"] == {
        r"^model\.layers\.0\.self_attn\.q_proj": 4
    }
    assert written(LoRAConfig(rank=8, rank_pattern={"q_proj": 8}))["rank_pattern"] == {}


@pytest.mark.parametrize(
    ("fields", "modules", "exclude", "layers"),
    [
        ({}, ["q_proj", "up_proj", "v_proj"], None, None),
        ({"exclude_modules": ("up_proj",)}, ["q_proj", "v_proj"], None, None),
        ({"layers_to_transform": (1,)}, sorted(NAMES[3:6]), None, None),
        ({"target_modules": ("v_proj", "q_proj")}, ["q_proj", "v_proj"], None, None),
        (
            {"target_modules": ("v_proj", "q_proj"), "exclude_modules": ("layers.0.self_attn.q_proj",)},
            ["q_proj", "v_proj"],
            ["layers.0.self_attn.q_proj"],
            None,
        ),
        ({"target_modules": ("q_proj",), "layers_to_transform": (2, 0)}, ["q_proj"], None, [0, 2]),
        ({"target_modules": ".*q_proj", "exclude_modules": r".*\.1\..*"}, ".*q_proj", r".*\.1\..*", None),
    ],
)
def test_targets_as_written(fields: dict[str, Any], modules: Any, exclude: Any, layers: Any) -> None:
    ours = written(LoRAConfig(**fields))
    assert (ours["target_modules"], ours["exclude_modules"], ours["layers_to_transform"]) == (modules, exclude, layers)
    read, problems = read_peft_config(ours)
    assert not problems
    before = [target.name for target in resolve_targets(LoRAConfig(**fields), NAMES)]
    assert [target.name for target in resolve_targets(read.config, NAMES)] == before


def test_an_integral_alpha_is_written_as_an_integer() -> None:
    assert repr(written(LoRAConfig(alpha=16.0))["lora_alpha"]) == "16"
    assert repr(written(LoRAConfig(alpha=2.5))["lora_alpha"]) == "2.5"


def test_what_peft_writes_is_read(tmp_path: Path) -> None:
    theirs = peft.LoraConfig(
        r=6,
        lora_alpha=3,
        lora_dropout=0.25,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["x"],
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 5},
        layers_to_transform=1,
        layers_pattern="layers",
        task_type="SEQ_CLS",
        init_lora_weights="gaussian",
        base_model_name_or_path="b",
        revision="r",
    )
    theirs.save_pretrained(str(tmp_path))
    read, problems = read_peft_config(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert not problems
    config = read.config
    assert isinstance(config.target_modules, tuple)
    assert sorted(config.target_modules) == ["q_proj", "v_proj"]
    assert (read.base_model, read.task_type, read.revision) == ("b", "SEQ_CLS", "r")
    assert dataclasses.replace(config, target_modules=("q_proj", "v_proj")) == LoRAConfig(
        rank=6,
        alpha=3,
        dropout=0.25,
        target_modules=("q_proj", "v_proj"),
        exclude_modules=("x",),
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 5},
        use_rslora=True,
        layers_to_transform=(1,),
        layers_pattern=("layers",),
    )


MINIMAL = {"peft_type": "LORA", "target_modules": ["q_proj"]}


def test_the_least_that_peft_needs_is_enough() -> None:
    read, problems = read_peft_config(MINIMAL)
    assert not problems
    assert (read.config.rank, read.config.alpha) == (8, 8)  # PEFT's defaults, not ours


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -4),
        ("r", 2.5),
        ("r", "8"),
        ("r", None),
        ("lora_alpha", 0),
        ("lora_alpha", -1),
        ("lora_alpha", "8"),
        ("lora_alpha", True),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.5),
        ("lora_dropout", None),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", [1]),
        ("target_modules", {"q_proj": 1}),
        ("exclude_modules", 3),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": "x"}),
        ("use_rslora", "yes"),
        ("use_rslora", 1),
        ("layers_to_transform", ["0"]),
        ("layers_to_transform", [-1]),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("task_type", 3),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("use_dora", "yes"),
        ("lora_bias", 1),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", [1]),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", [3, 3]),
        ("trainable_token_indices", {"a": [1], "b": [2]}),
        ("layer_replication", [[0, 2]]),
        ("megatron_config", {"a": 1}),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1.0}),
        ("monteclora_config", {"num_samples": 2}),
        ("velora_config", {"num_groups": 2}),
        ("ensure_weight_tying", True),
        ("use_something_new", True),
        ("something_new_config", {"x": 1}),
    ],
)
def test_a_field_that_cannot_be_followed_is_a_problem_that_names_it(field: str, value: Any) -> None:
    _, problems = read_peft_config({**MINIMAL, field: value})
    assert len(problems) == 1
    assert problems[0].startswith(field)


def test_every_refused_field_is_among_the_cases_above() -> None:
    marks = test_a_field_that_cannot_be_followed_is_a_problem_that_names_it.pytestmark  # type: ignore[attr-defined]
    tried = {case[0] for mark in marks for case in mark.args[1]}
    assert set(REFUSED) <= tried


def test_neutral_and_switched_off_fields_are_read_over() -> None:
    raw = {
        **MINIMAL,
        "auto_mapping": {"base_model_class": "X", "parent_library": "os"},
        "megatron_core": "antigravity",
        "peft_version": "9.9",
        "runtime_config": {"ephemeral_gpu_offload": True},
        "eva_config": {"rho": 2.0},
        "init_lora_weights": "eva",
        "use_dora": False,
        "modules_to_save": [],
        "kasa_config": None,
        "bias": "none",
        "future_switch": False,
        "future_config": None,
    }
    read, problems = read_peft_config(raw)
    assert not problems
    assert read.notes == ("future_switch: unknown, and off", "future_config: unknown, and off")
