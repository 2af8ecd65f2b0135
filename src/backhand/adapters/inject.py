"""LoRA put into any `nn.Module`, for the user's own training loop or Hugging Face's Trainer.

    adapter = backhand.inject(model, backhand.LoRAConfig(rank=8))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-4)
    …train as always…
    adapter.save("out")

`model` stays the object it was; the adapted modules in it compute base and update, forward and backward by hand. Every
other parameter is frozen, but for modules trained in full (`modules_to_save`), which torch differentiates as it does
the rest of the model. The factors are plain parameters, one tensor each: views of one flat buffer would come apart
as soon as the model is moved, copied or wrapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from backhand.adapters.adapter_directory import AdapterContents, UnusableAdapterError, read_adapter_directory
from backhand.adapters.base_copies import check_base_copies
from backhand.adapters.config import LoRAConfig
from backhand.adapters.injected import InjectedAdapter
from backhand.adapters.injection_plan import plan_injection
from backhand.adapters.peft_loading import match_adapter
from backhand.errors import UsageError
from backhand.nn.lora_module import base_weight


def inject(
    module: nn.Module,
    config: LoRAConfig | None = None,
    *,
    seed: int = 0,
    heads: Sequence[str] | None = None,
) -> InjectedAdapter:
    """Adapt the modules of `module` that `config` names, in place, and freeze everything else.

    Args:
        module: any model; it must not be adapted already.
        config: what to adapt; `LoRAConfig()` if None. `all-linear` takes every nn.Linear and transformers' Conv1D.
        seed: of the factors' first values.
        heads: paths that `all-linear` leaves out; if None, what `get_output_embeddings` gives, or `lm_head`.

    Returns:
        the adapter: its parameters, and how to merge, save, load and remove it.

    Raises:
        UsageError: a value out of range or of another type, a name that matches nothing, or modules that cannot be
            adapted, all of them listed; the model is then as it was.
    """
    _check_types(module, config)
    plan = plan_injection(module, config or LoRAConfig(), heads)
    adapter = InjectedAdapter(module, plan)
    adapter.initialise(torch.Generator().manual_seed(seed))
    return adapter


def _check_types(module: object, config: object) -> None:
    if not isinstance(module, nn.Module):
        raise UsageError(f"{type(module).__qualname__} is no torch.nn.Module", where="module")
    if config is not None and not isinstance(config, LoRAConfig):
        kind = type(config)
        raise UsageError(
            f"{kind.__module__}.{kind.__qualname__} is no backhand.LoRAConfig",
            where="config",
            next_step="write backhand.LoRAConfig(rank=…, alpha=…, target_modules=…); r and lora_alpha are PEFT's names",
        )


def inject_from(module: nn.Module, directory: Path | str, *, allow_pickle: bool = False) -> InjectedAdapter:
    """Adapt `module` as the adapter in `directory` says, and load that.

    Args:
        module: the base model.
        directory: in PEFT's format, by us or by PEFT.
        allow_pickle: also read adapter_model.bin, with torch's restricted unpickler.

    Raises:
        UnusableAdapterError: an ArtifactError that lists every problem; the model is then as it was.
        UsageError: the modules cannot be adapted.
    """
    return inject_contents(module, read_adapter_directory(directory, allow_pickle=allow_pickle))


def inject_contents(module: nn.Module, contents: AdapterContents) -> InjectedAdapter:
    """Adapt `module` by an adapter that has been read; errors as `inject_from`."""
    if not contents.config_usable:
        raise UnusableAdapterError(contents.directory, contents.problems)
    try:
        plan = plan_injection(module, contents.described.config, None, strict=False)
    except UsageError as error:
        raise UnusableAdapterError(contents.directory, [*contents.problems, str(error)]) from None
    loaded = match_adapter(
        contents,
        plan.module_names,
        lambda _: list(plan.shapes),
        linear=plan.linear,
        heads=plan.heads,
        trained=lambda _: plan.trained,
    )
    check_base_copies(loaded, lambda name: base_weight(plan.modules[name]))
    adapter = InjectedAdapter(module, plan)
    adapter.fill(loaded.factors)
    return adapter
