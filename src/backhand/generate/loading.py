"""A base model, perhaps with an adapter, ready to complete prompts: by the decoder engine, or by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from backhand.adapters.loading import check_source, load_adapter_for, read_adapter
from backhand.adapters.record import AdapterRecord
from backhand.data.chat import read_template, stopping_role_ids
from backhand.data.options import TemplateOptions
from backhand.generate.completer import Completer
from backhand.generate.engine_completer import EngineCompleter
from backhand.generate.labels import Labels
from backhand.nn.compute import compute_settings, resolve_device, resolve_dtype, resolve_threads
from backhand.nn.decoder.config_fields import UnsupportedModel
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.held_base import stays_quantized
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.source import ModelSource
from backhand.nn.model_options import BaseModelOptions


@dataclass(frozen=True)
class LoadedModel:
    """A model that completes prompts, and what turns text into prompts and back."""

    model: Completer  # with the adapter, if one was asked for
    tokenizer: Any
    stop_ids: tuple[int, ...]  # tokens that end an answer
    # what a person should know, a sentence each: which way the model is computed, what the adapter's files say
    notes: tuple[str, ...] = ()
    # that the adapter's record names, see `labels`; none where they are no tokens of this model
    labels: Labels = field(default_factory=dict)


@contextmanager
def loaded_model(
    options: BaseModelOptions,
    adapter: Path | str | None = None,
    *,
    chat_template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    one_at_a_time: bool = False,
) -> Iterator[LoadedModel]:
    """Load a model, and compute with the options' threads as long as it is used.

    Args:
        adapter: directory of an adapter to put on it, or a GGUF file.
        chat_template: the option of that name; the adapter's record is held against the template in use.
        template_args: likewise; None where the template is not asked.
        one_at_a_time: whether prompts come one after the other; a quantized base then stays so.

    Raises:
        ArtifactError: model, tokenizer or adapter cannot be read, or do not belong together.
        UsageError: the device or the template cannot be used.
    """
    device = resolve_device(options)
    dtype = resolve_dtype(options, device)
    with compute_settings(options, resolve_threads(options), dtype, device):
        source = open_model(options.model, quantize=options.quantize)
        tokenizer = source.tokenizer()
        template = read_template(chat_template, tokenizer)
        asked = _Asked(options, source, adapter, template, template_args, dtype, device, one_at_a_time)
        try:
            model, notes, record = _by_transformers(asked) if options.engine == "transformers" else _by_engine(asked)
        except UnsupportedModel as error:
            if options.engine == "backhand":
                raise
            model, notes, record = _by_transformers(asked)
            reason = error.problems[0] if error.problems else error.what
            notes = (f"transformers computes this model, more slowly than the engine would: {reason}", *notes)
        stop_ids = (
            *source.stop_token_ids(),
            *stopping_role_ids(tokenizer, TemplateOptions(chat_template, template_args or {})),
        )
        labels = {} if record is None else record.labels
        known = all(0 <= token < model.vocab_size for ids in labels.values() for token in ids)
        yield LoadedModel(model, tokenizer, stop_ids, notes, labels if known else {})


_Loaded = tuple[Completer, tuple[str, ...], AdapterRecord | None]
"""The model, its notes, and the adapter's record."""


class _Asked(NamedTuple):
    """What `loaded_model` was asked for, resolved."""

    options: BaseModelOptions
    source: ModelSource
    adapter: Path | str | None
    template: str | None
    template_args: Mapping[str, Any] | None
    dtype: torch.dtype
    device: torch.device
    one_at_a_time: bool

    @property
    def record_options(self) -> dict[str, Any]:
        """What the adapter's record is held against, and whether it decides."""
        args, force = self.template_args, self.options.force_base
        return {"chat_template": self.template, "template_args": args, "force_base": force}


def _by_engine(asked: _Asked) -> _Loaded:
    options, source, dtype, device = asked.options, asked.source, asked.dtype, asked.device
    quantized = stays_quantized(options, source, dtype, device, one_at_a_time=asked.one_at_a_time)
    decoder = Decoder.from_source(source, dtype=dtype, device=device, quantized=quantized)
    if asked.adapter is None:
        return EngineCompleter(decoder), (), None
    pickle, shapes = options.allow_pickle, decoder.module_shapes()
    loaded = load_adapter_for(source, asked.adapter, shapes, **asked.record_options, allow_pickle=pickle)
    decoder.attach(loaded.parameters(device=device))
    return EngineCompleter(decoder), loaded.notes, loaded.record


def _by_transformers(asked: _Asked) -> _Loaded:
    from backhand.adapters.inject import inject_contents
    from backhand.generate.transformers_completer import TransformersCompleter
    from backhand.nn.loading.transformers_model import load_transformers_model

    source, adapter = asked.source, asked.adapter
    model = load_transformers_model(source, dtype=asked.dtype, device=asked.device)
    if adapter is None:
        return TransformersCompleter(model), (), None
    contents = read_adapter(adapter, source, allow_pickle=asked.options.allow_pickle)
    injected = inject_contents(model, contents)
    names = [target.name for target in injected.targets]
    forced = check_source(contents.record, str(adapter), source, names, **asked.record_options)
    return TransformersCompleter(model, injected), (*forced, *injected.notes), contents.record
