"""GGUF files of models for vectors: the pooling, and a check of llama.cpp's vectors.

llama.cpp's server reads the pooling from the file and answers at `/v1/embeddings` (`llama-server --embedding`). Prompts
have no entry in a GGUF file: programs put them in front of texts themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import torch

from backhand.data.embedding_examples import suffix_of
from backhand.data.held_out import neutral_texts
from backhand.data.text_encoder import TextEncoder
from backhand.errors import CheckError
from backhand.generation.completer import EngineCompleter
from backhand.generation.loading import LoadedModel
from backhand.interop.llama_cpp_server import start_server
from backhand.interop.opened_adapter import OpenedAdapter
from backhand.interop.proving import Prover
from backhand.interop.sentence_transformers import BOUND, distance, embedding_of
from backhand.loop.embed import Embedder
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading.opening import open_model
from backhand.options.command_options import VectorOptions

_POOLING = {"mean": gguf.PoolingType.MEAN, "cls": gguf.PoolingType.CLS, "last": gguf.PoolingType.LAST}
_LONGEST_TEXT = 512
"""Context of the server, in tokens. Neutral texts are short."""


def text_end(opened: OpenedAdapter) -> tuple[int, ...]:
    """Return the tokens after every text that the tokenizer of the base does not add itself."""
    encoder = TextEncoder(opened.source.tokenizer())
    end = suffix_of(encoder, embedding_of(opened)["pooling"])
    return () if end == encoder.suffix_ids else end


def vector_entries(opened: OpenedAdapter) -> Callable[[gguf.GGUFWriter], None]:
    """Return a function that adds the pooling to a file, and that its tokenizer ends every text."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_pooling_type(_POOLING[embedding_of(opened)["pooling"]])
        if text_end(opened):
            writer.kv_data[0].pop(gguf.Keys.Tokenizer.ADD_EOS, None)
            writer.add_add_eos_token(True)

    return add


def prove_gguf_vectors(path: str, opened: OpenedAdapter, prover: Prover, *, exact: bool) -> None:
    """Compare our vectors of neutral texts with those of llama.cpp.

    Args:
        path: the written file.
        exact: all weights are float32, so that the difference has a bound. Otherwise it is stated.

    Raises:
        CheckError: the vectors differ, or llama.cpp does not answer.
    """
    texts, embedding = neutral_texts(), embedding_of(opened)
    decoder = Decoder.from_source(open_model(path), dtype=torch.float32, device=torch.device("cpu"))
    loaded = LoadedModel(EngineCompleter(decoder), opened.source.tokenizer(), (), embedding=embedding)
    server = start_server(path, min(loaded.model.context_tokens, _LONGEST_TEXT), prover, embedding=True)
    if server is None:
        return
    ours = Embedder.of(loaded, VectorOptions()).vectors(texts)
    answered = server.handle_embeddings({"input": [embedding["document_prompt"] + text for text in texts]})
    if "data" not in answered:
        raise CheckError("llama.cpp does not answer", where=path, why=str(answered)[:500])
    theirs = torch.tensor([one["embedding"] for one in sorted(answered["data"], key=lambda one: one["index"])])
    statement = f"llama.cpp's /v1/embeddings gives the same vectors of {len(texts)} texts (1 - cosine)"
    if exact:
        prover.check(statement, distance(ours, theirs), BOUND, "report it with the model's name")
    else:
        prover.say(f"llama.cpp's vectors: largest 1 - cosine {distance(ours, theirs):.2g}, bound in float32 {BOUND}")
