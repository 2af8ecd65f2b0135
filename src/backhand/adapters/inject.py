"""An adapter inside any `nn.Module`: its parameters, and how to merge, disable, save, load and remove it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import AdapterContents, UnusableAdapterError, read_adapter_directory
from backhand.adapters.injection_plan import Injection, close_fast_paths, plan_injection
from backhand.adapters.loading import Expected, LoadedAdapter, check_base_copies, match_adapter
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_saving import AdapterParts, adapter_files
from backhand.adapters.record import AdapterRecord
from backhand.adapters.targets import Target, resolve_targets
from backhand.adapters.trained_tensors import SavedModules
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
        config: what was injected.
        targets: the adapted modules with their rank, alpha and scaling.
        modules: the adapted modules themselves, by dotted path.
        layout: what the adapter consists of.
        notes: what may interest a person: adapted weights that are tied to others.
        enabled: whether the model computes with the adapter.
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
        """Everything trained by name: `<module>.lora_A`, `<module>.lora_B`, …, then whole parameters and rows.

        Raises:
            UsageError: the model has put a frozen parameter, or one of another shape, in the place of a trained one.
        """
        for name, adapted in self.modules.items():
            for part, parameter in adapted.trained():
                yield f"{name}.{part}", parameter
        yield from self._saved.named_parameters()
        for name, embedding in list(self._tokens.items())[:1]:  # modules that share a weight share the rows
            yield f"{name}.{TOKENS}", embedding.rows

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, for an optimizer."""
        return [parameter for _, parameter in self.named_parameters()]

    def __repr__(self) -> str:
        """How much of which model is adapted."""
        kind, count = type(self.module).__qualname__, len(self.modules)
        return f"InjectedAdapter({kind}: {count} modules adapted, {self.parameter_count:,} numbers trained)"

    @property
    def parameter_count(self) -> int:
        """Trained elements in all."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initialise(self, generator: torch.Generator) -> None:
        """Draw the factors anew, and set the rest to the base's values; the model then computes what its base does."""
        for adapted in self.modules.values():
            adapted.initialise(generator)
        self.reset_bias_and_magnitude()

    def reset_bias_and_magnitude(self) -> None:
        """Set what is trained beside the factors to where it changes nothing, given that they change nothing."""
        for adapted in self.modules.values():
            adapted.reset_bias_and_magnitude()
        self._saved.reset()
        with torch.no_grad():
            for module in self._tokens.values():
                module.rows.copy_(module.weight[module.token_ids])

    @torch.no_grad()
    def fill(self, factors: Mapping[str, Tensor]) -> None:
        """Copy factors, by the names of `named_parameters`, into the model."""
        merged, parameters = self.merged, list(self.named_parameters())
        self.unmerge()
        for name, parameter in parameters:
            parameter.copy_(factors[name])
        if merged:
            self.merge()

    @property
    def merged(self) -> bool:
        """Whether the weights hold the update at the moment."""
        return any(adapted.merged for adapted in self._all_modules())

    def _all_modules(self) -> list[LoRAModule | TokenModule]:
        return [*self.modules.values(), *self._tokens.values()]

    def enable(self, wanted: bool = True) -> None:
        """Compute with the adapter, or as the base model does; a merged one is unmerged first."""
        self.unmerge()
        if wanted:
            self._saved.enable()
        else:
            self._saved.disable()
        for adapted in self._all_modules():
            adapted.enabled = wanted
        self.enabled = wanted

    def merge(self) -> None:
        """Put the update into the weights, so that the model runs at the base model's speed.

        Added in fp32 at least and then cast. A weight tied to another module's is untied while it is merged. A state
        dict taken meanwhile holds the merged weights and the factors beside them: load it into a plain model, never
        into an injected one, which would add the update once more.

        Raises:
            UsageError: the adapter is disabled, grouped convolutions, whose update no weight can hold, or `lora_bias`
                where the base has no bias; nothing is merged then.
        """
        if not self.enabled:
            raise UsageError(
                "a disabled adapter cannot be merged",
                why="the model is to compute what its base does, and merged it would not",
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
        """Inside, the model computes what its base does; afterwards what it did before."""
        enabled, merged = self.enabled, self.merged
        self.enable(False)
        try:
            yield
        finally:
            self.enable(enabled)
            if merged:
                self.merge()

    def remove(self) -> nn.Module:
        """Take the adapter out: the model is what it was before `inject`, and this object is spent.

        Raises:
            UsageError: a module trained in full has another shape now; nothing is changed then.
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
        """Write the adapter in PEFT's format, see `peft_saving.adapter_files`.

        Args:
            directory: created if need be.
            base_model: hub id or path of the base; if None, what a transformers model knows of itself.
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
        """The files that `save` writes, by name, in the order to write them; see `peft_saving.adapter_files`."""
        own_config = getattr(self.module, "config", None)
        base_model = base_model or getattr(own_config, "name_or_path", None) or None
        is_causal = type(self.module).__name__.endswith("ForCausalLM")
        plan, conv1d = self._plan, any(kind.__name__ == "LoRAConv1D" for kind in self._plan.kinds.values())
        described = PEFTConfig(self.config, base_model, "CAUSAL_LM" if is_causal else None, fan_in_fan_out=conv1d)
        factors = {name: parameter.detach() for name, parameter in self.named_parameters()}
        parts = AdapterParts(described, self.targets, plan.shapes, factors, plan.trained)
        return adapter_files(parts, record=record, card=card, module_names=plan.module_names, wrapper=wrapper)

    def load(self, directory: Path | str, *, allow_pickle: bool = False) -> LoadedAdapter:
        """Replace the factors by those of an adapter of the same modules, ranks and scaling.

        Raises:
            UnusableAdapterError: an ArtifactError that lists every problem; the model is then as it was.
        """
        return self.load_contents(read_adapter_directory(directory, allow_pickle=allow_pickle))

    def load_contents(self, contents: AdapterContents) -> LoadedAdapter:
        """The same with an adapter that has been read, whatever file it stood in; errors as `load`."""
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
    """The modules with trained embedding rows, the embedding first."""
    if not plan.token_modules:
        return {}
    token_ids = torch.tensor(plan.config.trainable_token_indices, dtype=torch.int64)
    (name, module), *heads = plan.token_modules.items()
    embedding = TokenEmbedding.adapt(module, token_ids)
    return {name: embedding} | {head: TokenLinear.adapt(module, embedding) for head, module in heads}


def _differences(theirs: Sequence[Target], ours: Sequence[Target]) -> list[str]:
    """A sentence for each module that the file adapts in another way than the model."""
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


# LoRA put into any `nn.Module`, for the user's own training loop or Hugging Face's Trainer.
#
# `model` stays the object it was; the adapted modules in it compute base and update, forward and backward by hand.
# Every other parameter is frozen, but for modules trained in full (`modules_to_save`), which torch differentiates as it
# does the rest of the model. The factors are plain parameters, one tensor each: views of one flat buffer would come
# apart as soon as the model is moved, copied or wrapped.


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
    expected = Expected(plan.targets, plan.shapes, plan.trained)
    loaded = match_adapter(contents, plan.module_names, lambda _: expected)
    check_base_copies(loaded, lambda name: base_weight(plan.modules[name]))
    adapter = InjectedAdapter(module, plan)
    adapter.fill(loaded.factors)
    return adapter
