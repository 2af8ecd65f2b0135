"""Set up a model proof: the user's decoder, an adapter with nonzero lora_B, and a few documents of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backhand.adapters.base_model import open_base
from backhand.adapters.classifier_config import padding_id
from backhand.adapters.config import LoRAConfig
from backhand.adapters.loading import LoadedAdapter, load_adapter_for
from backhand.adapters.record import AdapterRecord
from backhand.adapters.targets import resolve_adapter
from backhand.data.chat import read_template
from backhand.data.class_examples import ClassEncoder, ClassFormat
from backhand.data.data_report import TruncationStats
from backhand.data.embedding_examples import EmbeddingFormat
from backhand.data.examples import Example, check_vocabulary
from backhand.data.held_out import neutral_texts
from backhand.data.options import DataOptions, NamedColumns
from backhand.data.prepare import read_examples
from backhand.data.ranking_examples import RankingFormat
from backhand.data.row_encoder import TextFormat
from backhand.data.row_kind import row_kind
from backhand.data.rows import ClassRow, Purpose
from backhand.data.text_encoder import TextEncoder
from backhand.errors import ArtifactError, DataError, UsageError
from backhand.generation.held_base import stays_quantized
from backhand.generation.loading import classification_of, columns_of, ranking_of
from backhand.loop.ranking_loss import pair_format
from backhand.nn.compute import resolve_device, resolve_dtype
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.families.config_fields import UnsupportedModel
from backhand.nn.families.family import DecoderConfig
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.sentence_transformers import read_embedding_files
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import LoRAParameters
from backhand.nn.model_options import BaseModelOptions
from backhand.ops.weight_tiles import frozen_dense
from backhand.options.objectives import ObjectiveOptions
from backhand.verify.head_loss import HeadLoss
from backhand.verify.measure import norm

ADAPTER_SEED = 0
DROPOUT_SEED = 1
RANDOM_ADAPTER = LoRAConfig(dropout=0.1)
UPDATE_SHARE = 0.1

_WITHOUT_ENGINE = (
    "autograd computes its gradients, so there are none by hand to prove; backhand verify without --model proves ops"
)


@dataclass(frozen=True)
class ModelSetup:
    """A decoder with its adapter attached, and the documents for the proof."""

    decoder: Decoder  # in the compute dtype
    examples: tuple[Example, ...]  # documents with supervised tokens; long documents are cut
    dropout_seed: int | None  # seed of the dropout masks, None for an adapter without dropout
    notes: tuple[str, ...]
    rows: tuple[Example, ...] = ()  # the same documents as rows, if these are pairs, decisions or rankings
    head_loss: HeadLoss | None = None  # the loss of an adapter with a head or for vectors, and of encoders


def load_setup(
    model: BaseModelOptions,
    data: DataOptions,
    adapter: Path | None,
    max_tokens: int,
    objective: ObjectiveOptions | None = None,
) -> ModelSetup:
    """Load the model, the adapter or a random one, and the first rows.

    Args:
        objective: reads the rows as decisions or rankings, if it is one of them. Rows are decisions also if the options
            name a state or questions.

    Raises:
        UnsupportedModel: if the decoder engine does not support the model, so that there are no gradients by hand.
        ArtifactError: if model, adapter or tokenizer cannot be read or do not belong together.
        DataError: if the rows cannot be read, have no supervised token, or contain a token that the model lacks.
        UsageError: if the device cannot be used.
    """
    device = resolve_device(model)
    dtype = resolve_dtype(model, device)
    source = open_base(model.model or None, adapter, quantize=model.quantize)
    try:
        config = decoder_config(source.config)
    except UnsupportedModel as error:
        error.next_step = _WITHOUT_ENGINE
        raise
    loaded = None
    if adapter is not None:
        loaded = load_adapter_for(
            source,
            adapter,
            module_shapes(config),
            chat_template=read_template(data.chat_template, source.tokenizer()),
            template_args=data.template_args,
            force_base=model.force_base,
            allow_pickle=model.allow_pickle,
        )
        _check_proved(loaded, config)
    record = AdapterRecord() if loaded is None or loaded.record is None else loaded.record
    head_loss = None
    if loaded is not None and classification_of(loaded, config):
        head_loss = HeadLoss(config)
    elif record.embedding or not config.has_head:
        head_loss = HeadLoss(config, _text_format(source, record).pooling)
    if head_loss is not None:
        examples, note = _texts(data, source, head_loss, record, max_tokens)
        rows: tuple[Example, ...] = ()
    else:
        if data.state is not None or data.question:
            objective = ObjectiveOptions("decide")
        objective = objective or ObjectiveOptions()
        examples, rows, note = _documents(data, source.tokenizer(), max_tokens, objective, columns_of(record))
    check_vocabulary(
        ((example.input_ids, example.source) for example in examples), config.vocab_size, source.tokenizer()
    )
    quantized = stays_quantized(model, source, dtype, device)
    decoder = Decoder.from_source(source, dtype=dtype, device=device, quantized=quantized)
    adapter_notes: tuple[str, ...] = ()
    if len(examples) == 1:
        adapter_notes = ("there is only one document: packing and accumulation are not measured",)
    if loaded is None:
        lora = random_adapter(decoder)
        description = f"random adapter, rank {RANDOM_ADAPTER.rank}, all linear layers, dropout {RANDOM_ADAPTER.dropout}"
    else:
        lora = loaded.parameters(device=device)
        adapter_notes += loaded.notes
        description = f"adapter {adapter}"
    decoder.attach(lora)
    name = model.model or source.origin
    dropout = any(slot.dropout > 0 for slot in lora.slots.values())
    notes = (
        f"model {name} ({decoder.config.family}, {str(dtype).removeprefix('torch.')}, {device})",
        f"{description}: {len(lora.slots)} modules, {lora.element_count:,} elements",
        note,
        *adapter_notes,
    )
    return ModelSetup(decoder, examples, DROPOUT_SEED if dropout else None, notes, rows, head_loss)


def _check_proved(loaded: LoadedAdapter, config: DecoderConfig) -> None:
    """Raise UsageError for an adapter that trains more than factors and a head, whose gradients are not compared."""
    proved = {shape.name for shape in loaded.shapes if shape.experts}
    proved |= {name.rpartition(".")[0] for name in config.class_head.parameters.values()}
    if untested := [(name, what) for name, what in loaded.beyond_factors.items() if name not in proved]:
        name, what = untested[0]
        raise UsageError(
            f"--model proves plain LoRA, and this adapter trains more: {name}: {what}",
            where="adapter",
            next_step="backhand verify without --model proves these gradients for ops and whole decoders",
        )


def _text_format(source: ModelSource, record: AdapterRecord) -> EmbeddingFormat:
    """Return the way from a text to its vector: of the adapter, else of the model's own files, else the mean."""
    known = record.embedding
    if not known:
        files = None
        with suppress(ArtifactError):  # Any pooling serves the proof.
            files = read_embedding_files(source.path)
        known = {"pooling": "mean", "query_prompt": "", "document_prompt": ""} if files is None else files._asdict()
    return EmbeddingFormat(known["pooling"], known["query_prompt"], known["document_prompt"])


def _texts(
    data: DataOptions, source: ModelSource, loss: HeadLoss, record: AdapterRecord, max_tokens: int
) -> tuple[tuple[Example, ...], str]:
    """Return the first texts or pairs of texts of the rows as the loss reads them, and a note about them.

    Without rows they are the neutral texts of the package.
    """
    config, tokenizer, padding = loss.config, source.tokenizer(), padding_id(source)
    longest = min(data.max_length, config.max_position_embeddings, max_tokens // 2 - 1)
    text_format = ClassFormat(loss.pooling, padding)
    if data.data:
        purpose: Purpose = "rankings" if ranking_of(record) else "classes" if loss.vectors is None else "embeddings"
        chosen: TextFormat = pair_format(config, padding) if purpose == "rankings" else text_format
        chosen = _text_format(source, record) if purpose == "embeddings" else chosen
        options = replace(data, max_length=longest)
        read = read_examples(
            options,
            data.data,
            tokenizer,
            purpose=purpose,
            text_format=chosen,
            recorded=columns_of(record),
        )
        documents = [_alone(document) for example in read.examples for document in example.documents]
        where = ", ".join(data.data)
    else:
        texts = [ClassRow(text, None, "neutral_texts.txt") for text in neutral_texts()]
        encoded = ClassEncoder(TextEncoder(tokenizer), text_format, longest).encode(texts, TruncationStats())
        documents = [one for one in encoded if isinstance(one, Example)]
        where = "neutral texts of the package"
    examples = choose_documents(documents, max_tokens)
    tokens = sum(len(example) for example in examples)
    return tuple(examples), f"{len(examples)} of {len(documents)} documents of {where}: {tokens} tokens"


def random_adapter(decoder: Decoder) -> LoRAParameters:
    """Return an adapter with normal factors, whose updates are a tenth of the size of their weights' outputs.

    So no gradient is zero by definition, and the update is well above the rounding of bfloat16.
    """
    lora = LoRAParameters(resolve_adapter(RANDOM_ADAPTER, decoder.module_shapes()).slots, device=decoder.device)
    weights = dict(decoder.frozen_tensors())
    generator = torch.Generator().manual_seed(ADAPTER_SEED)
    for name, slot in lora.slots.items():
        output_size = norm(frozen_dense(weights[f"{name}.weight"])) / slot.out_features**0.5
        sizes = slot.in_features**-0.5, UPDATE_SHARE * output_size / (slot.scaling * slot.rank**0.5)
        for view, size in zip((lora.lora_A(name), lora.lora_B(name)), sizes, strict=True):
            view.copy_(size * torch.randn(view.shape, generator=generator))
    return lora


def _documents(
    data: DataOptions, tokenizer: Any, max_tokens: int, objective: ObjectiveOptions, recorded: NamedColumns
) -> tuple[tuple[Example, ...], tuple[Example, ...], str]:
    """Return the first documents of the rows or of the neutral texts, their rows if any, and a note about them.

    Rows are pairs, decisions or rankings.
    """
    several = objective.traits.rows in ("decisions", "rankings")
    if data.data:
        purpose: Purpose | None = objective.traits.rows if several else None
        examples: Sequence[Example] = read_examples(
            data,
            data.data,
            tokenizer,
            purpose=purpose,
            questions=row_kind(purpose).find_questions(data, None),
            text_format=RankingFormat(objective.instruction) if purpose == "rankings" else None,
            recorded=recorded,
        ).examples
        where = ", ".join(data.data)
    else:
        examples = [_text_example(text, tokenizer) for text in neutral_texts()]
        where = "neutral texts of the package"
    paired = any(example.rejected is not None for example in examples)
    documents = [_alone(document) for example in examples for document in example.documents]
    rows: tuple[Example, ...] = ()
    if several:
        rows = tuple(choose_rows(examples, max_tokens))
        chosen = [_alone(document) for row in rows for document in row.documents]
    else:
        chosen = choose_documents(documents, max_tokens)
    if not chosen:
        raise DataError("no document has a supervised token", where=where)
    if paired:
        chosen = chosen[: len(chosen) // 2 * 2]
        rows = tuple(replace(one, rejected=other) for one, other in zip(chosen[::2], chosen[1::2], strict=True))
    tokens = sum(len(example) for example in chosen)
    return tuple(chosen), rows, f"{len(chosen)} of {len(documents)} documents of {where}: {tokens} tokens"


def _alone(document: Example) -> Example:
    """Return a document of a row without the others."""
    return replace(document, rejected=None, others=(), facts=None)


def _text_example(text: str, tokenizer: Any) -> Example:
    ids = np.asarray(tokenizer(text)["input_ids"], dtype=np.int32)
    supervised = np.ones(len(ids), dtype=bool)
    supervised[:1] = False
    return Example(ids, supervised, "neutral_texts.txt")


def choose_documents(examples: Sequence[Example], max_tokens: int) -> list[Example]:
    """Return documents in order until about `max_tokens` tokens are reached, at least two if there are two.

    A document longer than half of `max_tokens` is cut to the tokens up to its last supervised token.
    """
    chosen: list[Example] = []
    tokens = 0
    for example in examples:
        if not example.supervised.any():
            continue
        part = _cut(example, max_tokens // 2)
        if len(chosen) >= 2 and tokens + len(part) > max_tokens:
            break
        chosen.append(part)
        tokens += len(part)
    return chosen


def choose_rows(examples: Sequence[Example], max_tokens: int) -> list[Example]:
    """Return rows of decisions or rankings in order, at least two, until about `max_tokens` tokens are reached.

    The documents of a row are cut to the tokens up to the label, so that the row has at most half of `max_tokens`.
    """
    chosen: list[Example] = []
    tokens = 0
    for example in examples:
        most = max_tokens // 2 // len(example.documents)
        first, *others = (_cut(document, most) for document in map(_alone, example.documents))
        row = replace(first, others=tuple(others), facts=example.facts)
        size = sum(map(len, row.documents))
        if len(chosen) >= 2 and tokens + size > max_tokens:
            break
        chosen.append(row)
        tokens += size
    return chosen


def _cut(document: Example, most: int) -> Example:
    """Return the last tokens of a document up to its last supervised token, at least two of them."""
    end = int(np.flatnonzero(document.supervised)[-1]) + 1
    start = max(0, end - max(most, 2))
    supervised = document.supervised[start:end].copy()
    supervised[0] = False
    return replace(document, input_ids=document.input_ids[start:end], supervised=supervised)
