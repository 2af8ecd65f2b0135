"""Files with which sentence-transformers loads a model as it is, merged or as an adapter of its base.

    model.safetensors, config.json, tokenizer.json     merged: as `interop.huggingface_writer` writes them
    adapter_model.safetensors, adapter_config.json     an adapter: PEFT's files, next to the tokenizer's
    modules.json                                       the transformer; for vectors also pooling and normalization
    1_Pooling/config.json                              the pooling
    config_sentence_transformers.json                  prompts and cosine as the similarity, or the kind of model
    sentence_bert_config.json                          the largest number of tokens, and the class of a head

An adapter has no config.json: transformers would take the directory for a whole model. If vectors are the states of an
end-of-sequence token that the tokenizer does not add by itself, the written tokenizer adds it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from backhand.adapters.peft_saving import CLASS_TASK, HEADLESS_TASK
from backhand.adapters.record import AdapterRecord
from backhand.data.embedding_examples import suffix_of
from backhand.data.held_out import neutral_texts
from backhand.data.options import TemplateOptions
from backhand.data.rows import PoolingName, RankingRow
from backhand.data.text_encoder import TextEncoder
from backhand.errors import ArtifactError, UsageError, short_reason
from backhand.files import write_atomically
from backhand.generation.completer import EngineCompleter
from backhand.generation.loading import LoadedModel, classification_of, ranking_of
from backhand.interop.opened_adapter import OpenedAdapter
from backhand.interop.proving import Prover
from backhand.loop.embed import Embedder
from backhand.loop.rank import Reranker
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.sentence_transformers import LENGTH, MODULES, PROMPTS
from backhand.nn.loading.transformers_model import quiet_transformers
from backhand.options.command_options import VectorOptions

_KINDS = {"0": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
_POOLING_KEYS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
BOUND = 1e-5
"""Largest 1 - cosine between our vectors and those of sentence-transformers."""


def kind_of(opened: OpenedAdapter) -> Literal["vectors", "rankings"]:
    """Return what the adapter is for. Raises UsageError if it was trained neither on vectors nor on rankings."""
    loaded = opened.loaded
    classification = classification_of(loaded, opened.config)
    if classification and classification["problem_type"] is None:  # the logit is a score of documents
        return "rankings"
    if not (loaded.record or AdapterRecord()).embedding:
        raise UsageError(
            "this adapter was trained neither on vectors nor on the rankings of an encoder",
            where="to",
            next_step="train one with --objective embed, or rank on an encoder",
        )
    return "vectors"


def for_sentence_transformers(opened: OpenedAdapter) -> OpenedAdapter:
    """Return the adapter with the task of the class that sentence-transformers adapts.

    If the base was moved since the training, the adapter names its new place, from which it is loaded.
    """
    task = HEADLESS_TASK if kind_of(opened) == "vectors" else CLASS_TASK
    described = replace(opened.loaded.described, task_type=task)
    base = Path(described.base_model or "")
    if base.is_absolute() and not base.exists():
        described = replace(described, base_model=opened.base_name)
    return replace(opened, loaded=replace(opened.loaded, described=described))


def embedding_of(opened: OpenedAdapter) -> Mapping[str, Any]:
    """Return the way from a text to its vector. Raises UsageError if the adapter was not trained on vectors."""
    record = opened.loaded.record or AdapterRecord()
    if not record.embedding:
        raise UsageError(
            "this adapter was not trained on vectors", where="to", next_step="train one with --objective embed"
        )
    return record.embedding


def write_files(directory: Path, opened: OpenedAdapter) -> None:
    """Add the files of sentence-transformers to a merged model, or to an adapter with its tokenizer."""
    files = _of_vectors(directory, opened) if kind_of(opened) == "vectors" else _of_rankings(opened)
    for name, contents in files.items():
        write_atomically(directory / name, (json.dumps(contents, indent=2, ensure_ascii=False) + "\n").encode())


def _of_rankings(opened: OpenedAdapter) -> dict[str, Any]:
    longest = opened.config.max_position_embeddings
    known = ranking_of(opened.loaded.record or AdapterRecord())
    longest = min(int(known.get("max_length", longest)), longest)
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    return {
        MODULES: [module],
        PROMPTS: {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.activation.Sigmoid"},
        LENGTH: {"transformer_task": "sequence-classification", "max_seq_length": longest, "do_lower_case": False},
    }


def _of_vectors(directory: Path, opened: OpenedAdapter) -> dict[str, Any]:
    embedding, width = embedding_of(opened), opened.config.hidden_size
    longest = min(embedding["max_length"], opened.config.max_position_embeddings)
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": "" if kind == "Transformer" else place,
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, (place, kind) in enumerate(_KINDS.items())
    ]
    pooling = {key: name == embedding["pooling"] for name, key in _POOLING_KEYS.items()}
    prompts = {"query": embedding["query_prompt"], "document": embedding["document_prompt"]}
    files: dict[str, Any] = {
        MODULES: modules,
        "1_Pooling/config.json": {"word_embedding_dimension": width, **pooling, "include_prompt": True},
        PROMPTS: {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
        LENGTH: {"max_seq_length": longest, "do_lower_case": False},
    }
    (directory / "1_Pooling").mkdir()
    (directory / "2_Normalize").mkdir()
    _write_tokenizer(directory, embedding["pooling"])
    return files


def _write_tokenizer(directory: Path, pooling: PoolingName) -> None:
    """Make the tokenizer add the end-of-sequence token, and give it a padding token if it has none."""
    from tokenizers.processors import Sequence, TemplateProcessing

    tokenizer = _tokenizer_of(directory)
    encoder = TextEncoder(tokenizer)
    suffix, backend = suffix_of(encoder, pooling), tokenizer.backend_tokenizer
    if suffix != encoder.suffix_ids:
        end = TemplateProcessing(
            single=f"$A {tokenizer.eos_token}",
            pair=f"$A {tokenizer.eos_token} $B {tokenizer.eos_token}",
            special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)],
        )
        before = backend.post_processor
        backend.post_processor = end if before is None else Sequence([before, end])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(directory)
    written = _tokenizer_of(directory)
    for text in neutral_texts():
        expected = [*encoder.prefix_ids, *tokenizer(text, add_special_tokens=False)["input_ids"], *suffix]
        if written(text)["input_ids"] != expected:
            raise ArtifactError(
                "the written tokenizer gives other tokens than in training",
                where="tokenizer.json",
                why=f"its class {type(written).__name__} decides itself which tokens are put around a text",
                next_step="export with --to peft, and append the end-of-sequence token to each text yourself",
            )


def _tokenizer_of(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def prove_sentence_transformers(directory: Path, opened: OpenedAdapter, prover: Prover, *, merged: bool) -> None:
    """Compare our vectors of neutral texts, or our scores of pairs of them, with those of sentence-transformers.

    Args:
        merged: the directory is a whole model, and not an adapter of its base.

    Raises:
        ArtifactError: sentence-transformers cannot load the directory.
        CheckError: they differ.
    """
    try:
        import sentence_transformers as theirs
    except ImportError:
        prover.say(
            "note: not compared with sentence-transformers, which is not installed (pip install 'backhand[vectors]')"
        )
        return
    source = open_model(str(directory)) if merged else opened.source
    decoder = Decoder.from_source(source, dtype=torch.float32, device="cpu")
    if not merged:
        decoder.attach(opened.loaded.parameters())
    kind, texts = kind_of(opened), neutral_texts()
    loaded = LoadedModel(
        *(EngineCompleter(decoder), _tokenizer_of(directory), ()),
        embedding=embedding_of(opened) if kind == "vectors" else {},
        ranking=ranking_of(opened.loaded.record or AdapterRecord()),
        classification=classification_of(opened.loaded, opened.config),
    )
    if kind == "rankings":
        query, *documents = texts
        rows = [RankingRow(query, tuple(documents), (), "neutral texts")]
        (scores,) = Reranker.of(loaded, TemplateOptions(), len(documents)).scores(rows)
        model = _loaded_by(theirs.CrossEncoder, directory, merged=merged)
        found = model.predict([(query, document) for document in documents], convert_to_tensor=True)
        error = float((torch.tensor(scores, dtype=torch.float64).sigmoid() - found.cpu().double()).abs().max())
        statement = f"sentence-transformers gives the same scores of {len(documents)} pairs of texts"
        prover.check(statement, error, BOUND, "report it with the model's name")
        return
    embedder = Embedder.of(loaded, VectorOptions())
    model = _loaded_by(theirs.SentenceTransformer, directory, merged=merged)
    pairs = [
        (embedder.vectors(texts), model.encode_document(texts, convert_to_tensor=True)),
        (embedder.vectors(texts, queries=True), model.encode_query(texts, convert_to_tensor=True)),
    ]
    statement = f"sentence-transformers gives the same vectors of {2 * len(texts)} texts (1 - cosine)"
    prover.check(statement, max(distance(*pair) for pair in pairs), BOUND, "report it with the model's name")


def _loaded_by(load: Callable[..., Any], directory: Path, *, merged: bool) -> Any:
    """Return what a class of sentence-transformers loads. Raises ArtifactError if it cannot."""
    try:
        with quiet_transformers():
            return load(str(directory), device="cpu", model_kwargs={"dtype": torch.float32})
    except (OSError, ValueError) as error:  # as transformers raises them for files that it does not read or find
        what = "the merged model" if merged else "the adapter with its base"
        raise ArtifactError(
            f"sentence-transformers cannot load {what}",
            where="to sentence-transformers",
            why=short_reason(error),
            next_step="report it with the model's name" if merged else "give --merge: a merged model needs no base",
        ) from None


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest 1 - cosine of unit vectors."""
    return float(1 - (ours.double() * theirs.cpu().double()).sum(1).min())
