"""The base model and the adapter of one command, checked against each other, without a weight in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backhand.adapters.checked_base import load_adapter_for
from backhand.adapters.peft_files import LoadedAdapter
from backhand.export.module_factors import ModuleFactors, factors_of
from backhand.export.probes import probe_documents
from backhand.export.refusal import refuse_kinds
from backhand.nn.decoder_weights import module_shapes
from backhand.nn.family import DecoderConfig
from backhand.nn.family_parsing import decoder_config
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.source import ModelSource


@dataclass(frozen=True)
class OpenedAdapter:
    """What a command starts from.

    Attributes:
        source: the base model.
        config: its family as data.
        shapes: (out, in) of every linear module.
        loaded: the adapter.
        factors: its modules.
        documents: token ids to compare logits on.
    """

    source: ModelSource
    config: DecoderConfig
    shapes: dict[str, tuple[int, int]]
    loaded: LoadedAdapter
    factors: dict[str, ModuleFactors]
    documents: list[list[int]]

    @property
    def base_name(self) -> str:
        """An id or path by which other programs find the base."""
        return self.source.hub_id or str(self.source.path.resolve())


def open_adapter(model: str, adapter: Path, *, force_base: bool) -> OpenedAdapter:
    """Open both and hold them against each other.

    Raises:
        UnsupportedModel: a base that the engine does not compute.
        ArtifactError: base or adapter cannot be read, or do not belong together; or something else than lora_A and
            lora_B of linear modules was trained, by module.
    """
    source = open_model(model)
    config = decoder_config(source.config)
    shapes = module_shapes(config)
    loaded = load_adapter_for(source, adapter, shapes, force_base=force_base)
    _check_plain(loaded)
    return OpenedAdapter(source, config, shapes, loaded, factors_of(loaded), probe_documents(source))


def _check_plain(loaded: LoadedAdapter) -> None:
    """Refuse what neither the formats nor the merge here can say, module by module.

    Raises:
        ArtifactError: names the modules and what is trained there.
    """
    reasons = {}
    for slot in loaded.slots:
        if slot.use_dora:
            reasons[slot.name] = "DoRA's magnitude multiplies the whole weight"
        elif slot.lora_bias:
            reasons[slot.name] = "lora_B has a bias"
        elif slot.embedding:
            reasons[slot.name] = "the module is an embedding"
    reasons |= {
        tensor.name: "single rows are trained" if tensor.token_ids is not None else "it is trained in full"
        for tensor in loaded.trained
    }
    refuse_kinds(reasons, str(loaded.directory))
