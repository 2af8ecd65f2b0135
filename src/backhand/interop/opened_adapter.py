"""Open the base model and the adapter of a command and check them against each other, without reading weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from backhand.adapters.base_model import open_base
from backhand.adapters.loading import LoadedAdapter, load_adapter_for
from backhand.adapters.module_factors import ModuleFactors, factors_of
from backhand.adapters.record import AdapterRecord
from backhand.data.held_out import neutral_texts
from backhand.errors import ArtifactError
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.families.config_fields import UnsupportedModel
from backhand.nn.families.family import DecoderConfig
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.source import ModelSource
from backhand.nn.loading.unit_multipliers import UnitMultipliers, has_multipliers, scaled_rows
from backhand.printing import going_on
from backhand.words import name_list

_WITHOUT_ENGINE = (
    "use PEFT: an adapter directory trained here opens there as it is, and merge_and_unload() makes a merged model"
)


@dataclass(frozen=True)
class OpenedAdapter:
    """A base model and an adapter that fit each other."""

    source: ModelSource
    config: DecoderConfig  # of the base model
    shapes: dict[str, tuple[int, int]]  # (out, in) of every linear module
    loaded: LoadedAdapter
    factors: dict[str, ModuleFactors]
    documents: list[list[int]]

    @property
    def base_name(self) -> str:
        """An id or path under which other programs find the base."""
        return self.source.hub_id or str(self.source.path.resolve())

    @property
    def objective(self) -> str | None:
        """The objective that the adapter was trained with, None if its files do not name it."""
        record = self.loaded.record or AdapterRecord()
        shown = "decide" if record.decisions else "embed" if record.embedding else None
        return shown or record.config.get("objective.objective")


@going_on("reading the base model and the adapter")
def open_adapter(model: str | None, adapter: Path, *, force_base: bool, allow_pickle: bool = False) -> OpenedAdapter:
    """Open both and check them against each other.

    Args:
        model: name or path of the base; None for the model that the adapter was trained on.
        force_base: use the adapter even if its files name another base.
        allow_pickle: also read adapter_model.bin, with torch's restricted unpickler.

    Raises:
        UnsupportedModel: if the engine does not compute the base.
        ArtifactError: if base or adapter cannot be read, or do not belong together.
    """
    source = open_base(model, adapter)
    try:
        config = decoder_config(source.config)
    except UnsupportedModel as error:
        error.next_step = _WITHOUT_ENGINE
        raise
    shapes = module_shapes(config)
    loaded = load_adapter_for(source, adapter, shapes, force_base=force_base, allow_pickle=allow_pickle)
    return OpenedAdapter(source, config, shapes, loaded, factors_of(loaded), probe_documents(source, config))


def for_gguf(opened: OpenedAdapter) -> OpenedAdapter:
    """Return base and adapter in the form that a GGUF file has: Falcon-H1 with its multipliers in the weights."""
    if isinstance(opened.source, GGUFModel) or not has_multipliers(opened.source.config):
        return opened
    source, factors = UnitMultipliers(opened.source), dict(opened.loaded.factors)
    for name, tensor in factors.items():
        module, _, part = name.rpartition(".")
        rows = None if part == "lora_A" else source.row_multipliers(module)
        if rows is not None:
            factors[name] = scaled_rows(tensor, rows)
    loaded = replace(opened.loaded, factors=factors)
    config = decoder_config(source.config)
    return replace(opened, source=source, config=config, loaded=loaded, factors=factors_of(loaded))


_RANDOM_TOKENS = 32


def probe_documents(source: ModelSource, config: DecoderConfig) -> list[list[int]]:
    """Return a few sentences and one document of random tokens; the same for the same vocabulary.

    Each is cut to the model's positions. For a model without a tokenizer, only the random document is returned.
    """
    vocab, longest = config.vocab_size, config.max_position_embeddings
    random = torch.randint(vocab, (_RANDOM_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    documents = [random[:longest]]
    try:
        tokenizer = source.tokenizer()
    except ArtifactError:
        return documents
    texts = [list(tokenizer(text)["input_ids"])[:longest] for text in neutral_texts()]
    return [*documents, *(ids for ids in texts if ids and max(ids) < vocab)]


_SHOWN = 12


_MERGE = "give --merge: a merged model can contain any update"


def refuse(target: str, reasons: Mapping[str, str], next_step: str = _MERGE) -> None:
    """Raise if there are reasons to refuse modules.

    Args:
        target: the format, as `--to` names it.
        next_step: the formats that can express them.

    Raises:
        ArtifactError: names the modules, the reasons, and the next step.
    """
    if not reasons:
        return
    by_reason: dict[str, list[str]] = {}
    for module, reason in reasons.items():
        by_reason.setdefault(reason, []).append(module)
    raise ArtifactError(
        f"{len(reasons)} adapted module{'s' if len(reasons) > 1 else ''} cannot be expressed in this format",
        where=f"to {target}",
        why="".join(f"\n    - {name_list(those, limit=_SHOWN)}: {reason}" for reason, those in by_reason.items()),
        next_step=next_step,
    )
