"""Files with which sentence-transformers loads a merged model as it is: pooling, normalization, prompts, tokenizer.

    model.safetensors, config.json, tokenizer.json     as `interop.huggingface_writer` writes them
    modules.json                                       transformer, pooling, normalization
    1_Pooling/config.json                              the pooling
    config_sentence_transformers.json                  prompts, and cosine as the similarity
    sentence_bert_config.json                          the largest number of tokens

If vectors are the states of an end-of-sequence token that the tokenizer does not add by itself, the written tokenizer
adds it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backhand.adapters.record import AdapterRecord
from backhand.data.embedding_examples import suffix_of
from backhand.data.held_out import neutral_texts
from backhand.data.rows import PoolingName
from backhand.data.text_encoder import TextEncoder
from backhand.errors import ArtifactError, UsageError
from backhand.files import write_atomically
from backhand.generation.completer import EngineCompleter
from backhand.generation.loading import LoadedModel
from backhand.interop.opened_adapter import OpenedAdapter
from backhand.interop.proving import Prover
from backhand.loop.embed import Embedder
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.sentence_transformers import LENGTH, MODULES, PROMPTS
from backhand.options.command_options import VectorOptions

_KINDS = {"0": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
_POOLING_KEYS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
BOUND = 1e-5
"""Largest 1 - cosine between our vectors and those of sentence-transformers."""


def embedding_of(opened: OpenedAdapter) -> Mapping[str, Any]:
    """Return the way from a text to its vector. Raises UsageError if the adapter was not trained on vectors."""
    record = opened.loaded.record or AdapterRecord()
    if not record.embedding:
        raise UsageError(
            "this adapter was not trained on vectors", where="to", next_step="train one with --objective embed"
        )
    return record.embedding


def write_files(directory: Path, opened: OpenedAdapter) -> None:
    """Add the files of sentence-transformers to a merged model."""
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
    for name, contents in files.items():
        write_atomically(directory / name, (json.dumps(contents, indent=2, ensure_ascii=False) + "\n").encode())
    _write_tokenizer(directory, embedding["pooling"])


def _write_tokenizer(directory: Path, pooling: PoolingName) -> None:
    """Make the tokenizer add the end-of-sequence token, and give it a padding token if it has none."""
    from tokenizers.processors import Sequence, TemplateProcessing

    tokenizer = open_model(str(directory)).tokenizer()
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
    written = open_model(str(directory)).tokenizer()
    for text in neutral_texts():
        expected = [*encoder.prefix_ids, *tokenizer(text, add_special_tokens=False)["input_ids"], *suffix]
        if written(text)["input_ids"] != expected:
            raise ArtifactError(
                "the written tokenizer gives other tokens than in training",
                where="tokenizer.json",
                why=f"its class {type(written).__name__} decides itself which tokens are put around a text",
                next_step="export with --to peft, and append the end-of-sequence token to each text yourself",
            )


def prove_vectors(directory: Path, opened: OpenedAdapter, prover: Prover) -> None:
    """Compare our vectors of neutral texts with those of sentence-transformers.

    Raises:
        CheckError: the vectors differ.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        prover.say(
            "note: not compared with sentence-transformers, which is not installed (pip install 'backhand[vectors]')"
        )
        return
    texts, cpu = neutral_texts(), torch.device("cpu")
    source = open_model(str(directory))
    decoder = Decoder.from_source(source, dtype=torch.float32, device=cpu)
    loaded = LoadedModel(EngineCompleter(decoder), source.tokenizer(), (), embedding=embedding_of(opened))
    embedder = Embedder.of(loaded, VectorOptions())
    theirs = SentenceTransformer(str(directory), device="cpu", model_kwargs={"dtype": torch.float32})
    pairs = [
        (embedder.vectors(texts), theirs.encode_document(texts, convert_to_tensor=True)),
        (embedder.vectors(texts, queries=True), theirs.encode_query(texts, convert_to_tensor=True)),
    ]
    statement = f"sentence-transformers gives the same vectors of {2 * len(texts)} texts (1 - cosine)"
    prover.check(statement, max(distance(*pair) for pair in pairs), BOUND, "report it with the model's name")


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest 1 - cosine of unit vectors."""
    return float(1 - (ours.double() * theirs.cpu().double()).sum(1).min())
