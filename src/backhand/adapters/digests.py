"""Digests by which an adapter knows the base model, the tokenizer and the chat template it was trained with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


def bytes_digest(data: bytes) -> str:
    """`sha256:` and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def base_digest(names: Iterable[str], load: Callable[[str], Tensor]) -> str:
    """Digest of base tensors: of their names, shapes and values.

    The values are taken as fp32, which holds bf16, fp16 and dequantised numbers exactly, so that the same weights agree
    whatever file they come from; give them as the source has them, before any cast to the compute dtype. Every tensor
    is hashed on its own, by as many threads as torch has, and the digest is of these hashes in the order of the names.

    Args:
        names: Hugging Face tensor names, in any order; usually the weights of the adapted modules.
        load: gives a tensor by its name; called from several threads.
    """
    ordered = sorted(names)

    def tensor_hash(name: str) -> bytes:
        tensor = load(name).detach().to("cpu", torch.float32).contiguous()
        described = hashlib.sha256(json.dumps([name, list(tensor.shape)]).encode())
        described.update(tensor.view(-1).numpy().data)
        return described.digest()

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return bytes_digest(b"".join(threads.map(tensor_hash, ordered)))


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what a transformers fast tokenizer does with text: token ids, merges, added and special tokens.

    The order in which a file happens to list them, and settings of padding or truncation, do not count.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    special = sorted(tokenizer.all_special_tokens)
    return bytes_digest(json.dumps([vocabulary, merges, special], ensure_ascii=False).encode("utf-8", "replace"))


def text_digest(text: str | None) -> str | None:
    """Digest of a chat template; None where there is none."""
    return None if text is None else bytes_digest(text.encode("utf-8", "replace"))
