"""What every field of PEFT's LoraConfig (0.21.2) means for us: handled, neutral, or refused.

- handled: read into our configuration, or kept and written again;
- neutral: does not change what the trained adapter computes; read over, at whatever value;
- refused: changes what the adapter computes in a way we do not have; an error unless switched off.

A test holds this table against PEFT's own list of fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

FORMAT_VERSION = "0.21.2"
"""The PEFT release whose format is written, and stands as peft_version in the file."""


class FieldRule(NamedTuple):
    """How a field is treated, why, and the values at which a refused field is switched off."""

    treatment: Literal["handled", "neutral", "refused"]
    reason: str
    off: tuple[Any, ...] = (None, False, "", [], {})


def _handled(reason: str) -> FieldRule:
    return FieldRule("handled", reason)


def _neutral(reason: str) -> FieldRule:
    return FieldRule("neutral", reason)


def _refused(reason: str, *off: Any) -> FieldRule:
    return FieldRule("refused", reason, off) if off else FieldRule("refused", reason)


PEFT_FIELDS: Mapping[str, FieldRule] = {
    "peft_type": _handled("must be LORA"),
    "task_type": _handled("kept"),
    "base_model_name_or_path": _handled("kept"),
    "revision": _handled("kept"),
    "r": _handled("rank"),
    "lora_alpha": _handled("alpha"),
    "lora_dropout": _handled("dropout"),
    "target_modules": _handled("target_modules"),
    "exclude_modules": _handled("exclude_modules"),
    "use_rslora": _handled("use_rslora"),
    "rank_pattern": _handled("rank_pattern"),
    "alpha_pattern": _handled("alpha_pattern"),
    "use_dora": _handled("use_dora"),
    "lora_bias": _handled("lora_bias"),
    "modules_to_save": _handled("modules_to_save"),
    "trainable_token_indices": _handled("trainable_token_indices, of the input embedding"),
    "layers_to_transform": _handled("layers_to_transform"),
    "layers_pattern": _handled("layers_pattern"),
    "fan_in_fan_out": _handled("written for GPT-2's Conv1D; on reading, the module says how its weight lies"),
    "init_lora_weights": _handled("read over unless it names a method that changed the base model"),
    "inference_mode": _neutral("whether the factors are trainable"),
    "auto_mapping": _neutral("names a class to import, which is never done"),
    "peft_version": _neutral("who wrote the file"),
    "runtime_config": _neutral("how PEFT runs, not what it computes"),
    "megatron_core": _neutral("names a package to import, which is never done"),
    "loftq_config": _neutral("of initialisation; init_lora_weights decides"),
    "eva_config": _neutral("of initialisation; it leaves the base model alone"),
    "corda_config": _neutral("of initialisation; init_lora_weights decides"),
    "lora_ga_config": _neutral("of initialisation; init_lora_weights decides"),
    "qalora_group_size": _neutral("only read with use_qalora"),
    "bias": _refused("trained biases of the base model", "none", None),
    "target_parameters": _refused("adapts parameters that are not modules, such as stacked experts"),
    "layer_replication": _refused("repeats layers of the base model"),
    "megatron_config": _refused("modules of Megatron, split over processes"),
    "alora_invocation_tokens": _refused("the adapter applies only behind certain tokens"),
    "use_qalora": _refused("pools the input before lora_A"),
    "use_bdlora": _refused("factors are block-diagonal"),
    "arrow_config": _refused("routes between several adapters"),
    "kasa_config": _refused("truncates the base weight and adds a diagonal between the factors"),
    "monteclora_config": _refused("samples the factors"),
    "velora_config": _refused("stores, beside the factors, by what it compressed activations in training"),
    "ensure_weight_tying": _refused("shares factors between tied modules"),
}

HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that left the base model as it was."""
