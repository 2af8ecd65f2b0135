"""Inject an adapter into any `nn.Module`; access its parameters, and merge, disable, save, load or remove it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import AdapterContents, UnusableAdapterError, read_adapter_directory
from backhand.adapters.injection_plan import Injection, close_fast_paths, plan_injection
from backhand.adapters.loading import Expected, LoadedAdapter, check_base_copies, match_adapter, unusable_adapter
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_saving import AdapterParts, adapter_files
from backhand.adapters.record import AdapterRecord
from backhand.adapters.targets import Target, resolve_targets
from backhand.adapters.trained_tensors import SavedModules
from backhand.bounds import check_value, checked_arguments
from backhand.errors import UsageError
from backhand.files import write_together
from backhand.nn.loading.wrappers import Wrapper
from backhand.nn.lora_parameters import TOKENS
from backhand.nn.modules.lora_module import LoRAModule, base_weight
from backhand.nn.modules.token_modules import TokenEmbedding, TokenLinear, TokenModule
from backhand.words import name_list


class InjectedAdapter:
    """An adapter inside a model.

    Attributes:
        module: the model.
        config: the adapter's configuration.
        targets: the adapted modules with their rank, alpha and scaling.
        modules: the adapted modules themselves, by dotted path.
        layout: the parts of the adapter.
        notes: notes for the user: adapted weights that are tied to others.
        enabled: True if the model computes with the adapter.
    """

    def __init__(self, module: nn.Module, plan: Injection) -> None:
        self.module = module
        self.config = plan.config
        self.targets: tuple[Target, ...] = plan.targets
        self._plan = plan
        self.layout, self.notes = plan.layout, plan.notes
        self._required_grad = [parameter for parameter in module.parameters() if parameter.requires_grad]
        module.requires_grad_(False)
        self.modules: dict[str, LoRAModule] = {
            target.name: plan.kinds[target.name].adapt(
                plan.modules[target.name],
                rank=target.rank,
                scaling=target.scaling,
                dropout=plan.config.dropout,
                use_dora=plan.config.use_dora,
                lora_bias=plan.config.lora_bias,
            )
            for target in plan.targets
        }
        self._saved = SavedModules(module, plan.trained)
        self._tokens = _train_rows(plan)
        self._fast_paths = close_fast_paths(module)
        self.enabled = True

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over all trained tensors: `<module>.lora_A`, `<module>.lora_B`, …, then whole parameters and rows.

        Raises:
            UsageError: if the model has replaced a trained parameter by a frozen one, or by one of another shape.
        """
        for name, adapted in self.modules.items():
            for part, parameter in adapted.trained():
                yield f"{name}.{part}", parameter
        yield from self._saved.named_parameters()
        for name, embedding in list(self._tokens.items())[:1]:  # modules that share a weight share the rows
            yield f"{name}.{TOKENS}", embedding.rows

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters, for an optimizer."""
        return [parameter for _, parameter in self.named_parameters()]

    def __repr__(self) -> str:
        """Return the model's class, the number of modules and of trained elements."""
        kind, count = type(self.module).__qualname__, len(self.modules)
        return f"InjectedAdapter({kind}: {count} modules adapted, {self.parameter_count:,} numbers trained)"

    @property
    def parameter_count(self) -> int:
        """The number of trained elements."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initialise(self, generator: torch.Generator) -> None:
        """Draw new factors, and reset all else to the base's values, so that the model computes what its base does."""
        for adapted in self.modules.values():
            adapted.initialise(generator)
        self.reset_bias_and_magnitude()

    def reset_bias_and_magnitude(self) -> None:
        """Reset biases, magnitudes and fully trained tensors, so that with zero factors the model computes its base."""
        for adapted in self.modules.values():
            adapted.reset_bias_and_magnitude()
        self._saved.reset()
        with torch.no_grad():
            for module in self._tokens.values():
                module.rows.copy_(module.weight[module.token_ids])

    @torch.no_grad()
    def fill(self, factors: Mapping[str, Tensor]) -> None:
        """Copy factors into the model, by the names of `named_parameters`."""
        merged, parameters = self.merged, list(self.named_parameters())
        self.unmerge()
        for name, parameter in parameters:
            parameter.copy_(factors[name])
        if merged:
            self.merge()

    @property
    def merged(self) -> bool:
        """True if the weights currently contain the update."""
        return any(adapted.merged for adapted in self._all_modules())

    def _all_modules(self) -> list[LoRAModule | TokenModule]:
        return [*self.modules.values(), *self._tokens.values()]

    def enable(self, wanted: bool = True) -> None:
        """Enable the adapter, or disable it, so that the model computes its base. Unmerge it before."""
        self.unmerge()
        if wanted:
            self._saved.enable()
        else:
            self._saved.disable()
        for adapted in self._all_modules():
            adapted.enabled = wanted
        self.enabled = wanted

    def merge(self) -> None:
        """Add the update to the weights, so that the model runs at the base model's speed.

        The sum is in fp32 or wider and then cast. A weight tied to another module's is untied while it is merged. A
        state dict of a merged model contains the merged weights and the factors: load it into a plain model, never
        into an injected one, which would add the update again.

        Raises:
            UsageError: if the adapter is disabled, or a module cannot be merged: a grouped convolution, or one with
                `lora_bias` whose base has no bias. Then nothing is merged.
        """
        if not self.enabled:
            raise UsageError(
                "a disabled adapter cannot be merged",
                why="a disabled adapter leaves the base's output unchanged, and merging would change it",
                next_step="call enable() first",
            )
        modules, biased = self.modules.items(), self.config.lora_bias
        without = name_list(name for name, adapted in modules if biased and adapted.bias is None)
        grouped = ", ".join(name for name, adapted in modules if getattr(adapted, "groups", 1) > 1)
        for names, why in (
            (without, "the adapter has a bias there, and the base model has none that could hold it"),
            (grouped, "the update of a grouped convolution reads channels that its weight does not"),
        ):
            if names:
                raise UsageError(f"{names} cannot be merged", why=why, next_step="leave the adapter unmerged")
        for adapted in self._all_modules():
            adapted.merge()

    def unmerge(self) -> None:
        """Put the base weights back, bit by bit."""
        for adapted in self._all_modules():
            adapted.unmerge()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable the adapter inside the block, and restore its state afterwards."""
        enabled, merged = self.enabled, self.merged
        self.enable(False)
        try:
            yield
        finally:
            self.enable(enabled)
            if merged:
                self.merge()

    def remove(self) -> nn.Module:
        """Remove the adapter and restore the model as it was before `inject`; this object cannot be used any more.

        Raises:
            UsageError: if a fully trained module has another shape now; then nothing is changed.
        """
        self._saved.disable()
        for adapted in self._all_modules():
            adapted.restore()
        for layer, attribute, value in self._fast_paths:
            setattr(layer, attribute, value)
        for parameter in self._required_grad:
            parameter.requires_grad_(True)
        self.modules, self._tokens, self._saved = {}, {}, SavedModules(self.module, ())
        return self.module

    def save(
        self,
        directory: Path | str,
        *,
        base_model: str | None = None,
        record: AdapterRecord | None = None,
        card: Mapping[str, object] | None = None,
    ) -> Path:
        """Write the adapter in PEFT's format; see `peft_saving.adapter_files`.

        Args:
            directory: created if need be.
            base_model: hub id or path of the base; if None, the name in a transformers model's configuration.
            record: origin and digests for backhand.json.
            card: further rows for the table in README.md.
        """
        write_together(Path(directory), self.files(base_model=base_model, record=record, card=card))
        return Path(directory)

    def files(
        self,
        *,
        base_model: str | None = None,
        record: AdapterRecord | None = None,
        card: Mapping[str, object] | None = None,
        wrapper: Wrapper | None = None,
    ) -> dict[str, bytes]:
        """Return the files that `save` writes by name, in their order; see `peft_saving.adapter_files`."""
        own_config = getattr(self.module, "config", None)
        base_model = base_model or getattr(own_config, "name_or_path", None) or None
        is_causal = type(self.module).__name__.endswith("ForCausalLM")
        plan, conv1d = self._plan, any(kind.__name__ == "LoRAConv1D" for kind in self._plan.kinds.values())
        described = PEFTConfig(self.config, base_model, "CAUSAL_LM" if is_causal else None, fan_in_fan_out=conv1d)
        factors = {name: parameter.detach() for name, parameter in self.named_parameters()}
        parts = AdapterParts(described, self.targets, plan.shapes, factors, plan.trained)
        return adapter_files(parts, record=record, card=card, module_names=plan.module_names, wrapper=wrapper)

    def load(self, directory: Path | str, *, allow_pickle: bool = False) -> LoadedAdapter:
        """Replace the factors by those of an adapter with the same modules, ranks and scaling.

        Raises:
            UnusableAdapterError: lists every problem; the model is then unchanged.
        """
        return self.load_contents(read_adapter_directory(directory, allow_pickle=allow_pickle))

    def load_contents(self, contents: AdapterContents) -> LoadedAdapter:
        """Load an adapter that has already been read from any kind of file; raises as `load` does."""
        plan = self._plan

        def expected(config: LoRAConfig) -> Expected:
            targets = resolve_targets(config, plan.module_names, linear=plan.linear, heads=plan.heads, strict=False)
            problems = _differences(targets, self.targets)
            return Expected(targets, () if problems else plan.shapes, plan.trained, problems=problems)

        loaded = match_adapter(contents, plan.module_names, expected)
        check_base_copies(loaded, lambda name: self.modules[name].weight)
        self.fill(loaded.factors)
        return loaded


def _train_rows(plan: Injection) -> dict[str, TokenModule]:
    """Return the modules with trained embedding rows, the embedding first."""
    if not plan.token_modules:
        return {}
    token_ids = torch.tensor(plan.config.trainable_token_indices, dtype=torch.int64)
    (name, module), *heads = plan.token_modules.items()
    embedding = TokenEmbedding.adapt(module, token_ids)
    return {name: embedding} | {head: TokenLinear.adapt(module, embedding) for head, module in heads}


def _differences(theirs: Sequence[Target], ours: Sequence[Target]) -> list[str]:
    """Return a sentence per module that the file adapts differently from the model."""
    here = {target.name: target for target in ours}
    there = {target.name: target for target in theirs}
    problems = [f"{name}: adapted in the file, not in the model" for name in there if name not in here]
    problems += [f"{name}: adapted in the model, not in the file" for name in here if name not in there]
    for name, ours_ in here.items():
        file = there.get(name, ours_)
        if (file.rank, file.scaling) != (ours_.rank, ours_.scaling):
            problems.append(
                f"{name}: rank {file.rank} and scaling {file.scaling:g} in the file, "
                f"{ours_.rank} and {ours_.scaling:g} in the model"
            )
    return problems


# LoRA inside any `nn.Module`, for the user's own training loop or Hugging Face's Trainer.
#
# The model object stays the same. The adapted modules in it compute base and update with manual forward and backward.
# All other parameters are frozen, except for modules trained in full (`modules_to_save`), which torch differentiates
# like the rest of the model. The factors are plain parameters, one tensor each: views of one flat buffer would be
# separated as soon as the model is moved, copied or wrapped.


@checked_arguments
def inject(
    module: nn.Module,
    config: LoRAConfig | None = None,
    *,
    seed: int = 0,
    heads: Sequence[str] | None = None,
) -> InjectedAdapter:
    """Adapt the modules of `module` that `config` names, in place, and freeze everything else.

    Args:
        module: any model that is not adapted yet.
        config: the configuration, `LoRAConfig()` if None. `all-linear` means every nn.Linear and transformers' Conv1D.
        seed: of the factors' initial values.
        heads: paths that `all-linear` leaves out; if None, the module of `get_output_embeddings`, or `lm_head`.

    Returns:
        the adapter, with its parameters and methods to merge, save, load and remove it.

    Raises:
        UsageError: if a value is out of range or has another type, a name matches nothing, or modules cannot be
            adapted, all of which are listed; the model is then unchanged.
    """
    _check_types(module, config)
    plan = plan_injection(module, config or LoRAConfig(), heads)
    adapter = InjectedAdapter(module, plan)
    adapter.initialise(torch.Generator().manual_seed(seed))
    return adapter


def _check_types(module: object, config: object) -> None:
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"{type(module).__qualname__} is not a torch.nn.Module",
            where="module",
            next_step="give the model itself, such as AutoModelForCausalLM.from_pretrained(…)",
        )
    if config is not None and not isinstance(config, LoRAConfig):
        kind = type(config)
        raise UsageError(
            f"{kind.__module__}.{kind.__qualname__} is not a backhand.LoRAConfig",
            where="config",
            next_step="use backhand.LoRAConfig(rank=…, alpha=…, target_modules=…); r and lora_alpha are PEFT's names",
        )


@checked_arguments
def inject_from(module: nn.Module, directory: str | os.PathLike[str], *, allow_pickle: bool = False) -> InjectedAdapter:
    """Adapt `module` with the configuration of the adapter in `directory`, and load the adapter.

    Args:
        directory: in PEFT's format, written by Backhand or by PEFT.
        allow_pickle: also read adapter_model.bin, with torch's restricted unpickler.

    Raises:
        UnusableAdapterError: lists every problem; the model is then unchanged.
        UsageError: if the modules cannot be adapted, or an argument has another type.
    """
    _check_types(module, None)
    return inject_contents(module, read_adapter_directory(_path(directory), allow_pickle=allow_pickle))


def _path(directory: object) -> Path:
    check_value("directory", os.fspath(directory) if isinstance(directory, os.PathLike) else directory, Path)
    return Path(cast("str", directory))


def inject_contents(module: nn.Module, contents: AdapterContents, base: str | None = None) -> InjectedAdapter:
    """Adapt `module`, the model of the name `base`, with an adapter that was read; raises as `inject_from` does."""
    if not contents.config_usable:
        raise UnusableAdapterError(contents.directory, contents.problems)
    try:
        plan = plan_injection(module, contents.described.config, None, strict=False)
    except UsageError as error:
        names = [name for name, _ in module.named_modules()]
        raise unusable_adapter(contents, [*contents.problems, str(error)], names, base=base) from None
    expected = Expected(plan.targets, plan.shapes, plan.trained)
    loaded = match_adapter(contents, plan.module_names, lambda _: expected, base)
    check_base_copies(loaded, lambda name: base_weight(plan.modules[name]))
    adapter = InjectedAdapter(module, plan)
    adapter.fill(loaded.factors)
    return adapter
