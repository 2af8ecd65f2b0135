"""llama.cpp, through xllamacpp, as the other side of a comparison: token ids and log-probabilities of a GGUF file."""

from __future__ import annotations

import ctypes
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xllamacpp
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from tests.support.tiny_models import GPT_OSS_OF_LLAMA_CPP

# llama.cpp reads no sliding window for mistral, no layer without experts for qwen3moe, no head_dim for qwen2, olmo2,
# exaone4 and glm, no bias for olmo2, no windows in exaone4's models of other than 64 layers, it derives Gemma's scale
# from head_dim, the delta rule's queries and keys are normed with the norms' epsilon, and Gemma 4's layers share keys
# and values of the last two that have their own.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {},
    "llama-biases": {},
    "llama3": {},
    "llama-linear": {},
    "tinyllama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": 10},
    "qwen3": {},
    "qwen3-yarn": {},
    "qwen3_5_text": {"rms_norm_eps": 1e-6},
    "qwen3_moe": {"mlp_only_layers": []},
    "mixtral": {},
    "gpt_oss": GPT_OSS_OF_LLAMA_CPP,
    "olmo2": {"head_dim": 10, "attention_bias": False},
    "olmo3": {"head_dim": 10},
    "exaone4": {"num_hidden_layers": 64, "head_dim": 10},
    "exaone4-full": {"head_dim": 10},
    "ministral3": {},
    "phi3": {},
    "phi3-longrope": {"original_max_position_embeddings": 256, "max_position_embeddings": 1024},
    "glm": {"head_dim": 10},
    "glm4": {},
    "granite": {},
    "granitemoehybrid": {},
    "granite4-h": {},
    "granite4-experts": {},
    "bamba": {"mamba_proj_bias": False},
    "falcon_h1": {},
    "nemotron_h": {},
    "lfm2": {"head_dim": 10},
    "smollm3": {},
    "gemma2": {"query_pre_attn_scalar": 14},
    "gemma3_text": {"query_pre_attn_scalar": 14},
    "gemma4_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2},
    "gemma4-keys": {"attention_bias": False},
}
"""Tiny models of which llama.cpp computes what transformers does, with what has to be said for it."""


class LlamaCpp:
    """A loaded GGUF file; one thread, everything in float32 where the file is.

    Args:
        path: of the file.
        context: most tokens of one prompt.
        adapter: a GGUF file of an adapter to put on it.
    """

    def __init__(self, path: Path, *, context: int = 256, adapter: Path | None = None) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_batch = params.n_ubatch = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.warmup = False
        params.verbosity = -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)
        # Taking a server down now and then waits for its own listening thread for ever: none is taken down, here or
        # when the process ends. A tiny one that idles costs nothing.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._server))

    def token_ids(self, text: str, *, add_special: bool = False) -> list[int]:
        """Ids of a text in which special tokens are recognised; `add_special` puts bos and eos where the file says."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        ids: list[int] = self._post("/tokenize", body)["tokens"]
        return ids

    def log_probabilities(self, ids: Sequence[int], vocab_size: int, *, forced: int = 65) -> Tensor:
        """(vocab,) float64: of every token after this prompt.

        Args:
            ids: the prompt.
            vocab_size: tokens in the vocabulary.
            forced: a token of plain text that the server is made to answer with: after half a character, or after an
                end, it would report nothing. What it reports is from before this takes effect.
        """
        answer = self._post(
            "/completion",
            {
                "prompt": list(ids),
                "n_predict": 1,
                "n_probs": vocab_size,
                "temperature": 0.0,
                "cache_prompt": False,
                "logit_bias": [[forced, 10_000.0]],
            },
        )
        (step,) = answer["completion_probabilities"]
        found = {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
        if sorted(found) != list(range(vocab_size)):
            raise AssertionError(f"llama.cpp gave {len(found)} of {vocab_size} log-probabilities")
        return torch.tensor([found[index] for index in range(vocab_size)], dtype=torch.float64)

    def answer(self, ids: Sequence[int], *, max_new_tokens: int) -> list[tuple[int, float]]:
        """The greedy answer to a prompt: each token with its log-probability, the one that ends it left out."""
        body = {"prompt": list(ids), "n_predict": max_new_tokens, "n_probs": 1, "temperature": 0.0}
        answer = self._post("/completion", body | {"cache_prompt": False, "return_tokens": True})
        steps = answer["completion_probabilities"][: len(answer["tokens"])]
        return [(step["id"], step["logprob"]) for step in steps]

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def quantized_rows(values: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """Rows of float32 numbers in ggml's blocks, (rows, bytes) uint8, by llama.cpp's own quantiser.

    Args:
        values: (rows, elements), each row a whole number of blocks.
        kind: any type that ggml quantizes; those that need an importance of every column take all for equal.
    """
    rows, elements = values.shape
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    assert elements % block_size == 0
    source = np.ascontiguousarray(values, dtype=np.float32)
    stored = np.zeros((rows, elements // block_size * block_bytes), dtype=np.uint8)
    importance = np.ones(elements, dtype=np.float32)
    quantize = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    pointers = (source.ctypes.data, stored.ctypes.data)
    assert quantize(int(kind), *pointers, 0, rows, elements, importance.ctypes.data) == stored.nbytes
    return stored
