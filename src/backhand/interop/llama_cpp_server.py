"""llama.cpp's server, with which exports compare what an exported file computes."""

from __future__ import annotations

from typing import Any

from backhand.interop.proving import Prover


def start_server(
    path: str, context: int, prover: Prover, *, embedding: bool = False, reranking: bool = False
) -> Any | None:
    """Load a GGUF file in llama.cpp's server, on the processor with a float32 cache.

    Args:
        path: the file.
        context: context in tokens, and the size of a batch.
        prover: says that the server is not installed.
        embedding: answer with vectors.
        reranking: answer with scores.

    Returns:
        the `xllamacpp.Server`, or None if it is not installed.
    """
    try:
        import xllamacpp
    except ImportError:
        prover.say("note: not compared with llama.cpp: its server is not installed (pip install xllamacpp)")
        return None
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.embedding = embedding or reranking
    if reranking:
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    params.n_ctx = params.n_batch = params.n_ubatch = context
    params.n_gpu_layers = 0
    params.warmup = False
    params.verbosity = -1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)
