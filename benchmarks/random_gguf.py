"""A GGUF file of a real model's shape and Q4_K_M's types, with random blocks: what a step costs, without a download.

Where rows are no whole blocks of 256 it has Q8_0 throughout.

Blocks are drawn so that the weights have mean 0 and a deviation of about 0.02, as trained ones do. The tokenizer is one
of bytes, filled up to the model's vocabulary with tokens that no text makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as StorageType
from gguf import GGUFWriter, TokenType

_CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
_DEVIATION = 0.02
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Shape:
    """What a model's size is made of.

    Attributes:
        architecture: `qwen2` (biases on q, k and v) or `llama` (rows of q and k in pairs).
        tied: whether the head is the embedding, which is then Q6_K.
    """

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    rope_base: float


SHAPES = {
    "0.5b": Shape("qwen2", 24, 896, 4864, 14, 2, 64, 151_936, True, 1e6),
    "1.5b": Shape("qwen2", 28, 1536, 8960, 12, 2, 128, 151_936, True, 1e6),
    "8b": Shape("llama", 32, 4096, 14_336, 32, 8, 128, 128_256, False, 5e5),
    # Not a real one: to see in seconds that the benchmark itself works.
    "tiny": Shape("qwen2", 4, 256, 1024, 4, 2, 64, 2048, True, 1e6),
}


def write_random_model(path: Path, shape: Shape, seed: int = 0) -> Path:
    """Write the file, tensor by tensor: never more than one of them is in memory."""
    writer = GGUFWriter(path, shape.architecture, use_temp_file=False)
    writer.add_name("random blocks")
    writer.add_block_count(shape.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.vocabulary)
    _add_tokenizer(writer, shape.vocabulary)
    tensors = list(_tensors(shape))
    for name, sizes, kind in tensors:
        dtype = np.dtype(np.float32 if kind == StorageType.F32 else np.uint8)
        writer.add_tensor_info(name, _stored_sizes(sizes, kind), dtype, _bytes(sizes, kind), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(seed)
    assert writer.fout is not None
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    for name, sizes, kind in tensors:
        for piece in _values(generator, name, sizes, kind):
            file.write(piece.tobytes())
        writer.write_padding(file, _bytes(sizes, kind))
    writer.close()
    return path


def takes_more_bits(layer: int, layers: int) -> bool:
    """Whether Q4_K_M stores a layer's v and down more finely: the first and last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], StorageType]]:
    q, kv = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    usual, better, vector = StorageType.Q4_K, StorageType.Q6_K, StorageType.F32
    if shape.hidden % 256:  # no whole blocks of 256 in the rows of most matrices
        usual = better = StorageType.Q8_0
    yield "token_embd.weight", (shape.vocabulary, shape.hidden), better if shape.tied else usual
    for layer in range(shape.layers):
        fine = takes_more_bits(layer, shape.layers)
        rows = {
            "attn_q": (q, shape.hidden, usual),
            "attn_k": (kv, shape.hidden, usual),
            "attn_v": (kv, shape.hidden, better if fine else usual),
            "attn_output": (shape.hidden, q, usual),
            "ffn_gate": (shape.intermediate, shape.hidden, usual),
            "ffn_up": (shape.intermediate, shape.hidden, usual),
            "ffn_down": (shape.hidden, shape.intermediate, better if fine else usual),
        }
        yield f"blk.{layer}.attn_norm.weight", (shape.hidden,), vector
        yield f"blk.{layer}.ffn_norm.weight", (shape.hidden,), vector
        for name, (outputs, inputs, kind) in rows.items():
            yield f"blk.{layer}.{name}.weight", (outputs, inputs), kind
            if shape.architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                yield f"blk.{layer}.{name}.bias", (outputs,), vector
    yield "output_norm.weight", (shape.hidden,), vector
    if not shape.tied:
        yield "output.weight", (shape.vocabulary, shape.hidden), better


_BLOCKS = {StorageType.Q4_K: (256, 144), StorageType.Q6_K: (256, 210), StorageType.Q8_0: (32, 34)}  # values, bytes


def _stored_sizes(sizes: tuple[int, ...], kind: StorageType) -> tuple[int, ...]:
    if kind == StorageType.F32:
        return sizes
    values, stored = _BLOCKS[kind]
    return (*sizes[:-1], sizes[-1] // values * stored)


def _bytes(sizes: tuple[int, ...], kind: StorageType) -> int:
    return int(np.prod(_stored_sizes(sizes, kind))) * (4 if kind == StorageType.F32 else 1)


def _values(
    generator: np.random.Generator, name: str, sizes: tuple[int, ...], kind: StorageType
) -> Iterator[np.ndarray]:
    if kind == StorageType.F32:
        yield np.full(sizes, 0 if name.endswith("bias") else 1, np.float32)
        return
    blocks = sizes[0] * (sizes[1] // _BLOCKS[kind][0])
    for start in range(0, blocks, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, blocks - start)
        yield _DRAWN[kind](generator, count)


def _q4_k(generator: np.random.Generator, count: int) -> np.ndarray:
    """d · scale · q - dmin · min: scales and mins of 6 bits, q of 4 bits with mean 7.5; deviation 259 d in all."""
    blocks = generator.integers(0, 256, (count, 144), dtype=np.uint8)
    d = _DEVIATION / 259
    blocks[:, :4] = np.array([d, 7.5 * d], np.float16).view(np.uint8)
    return blocks


def _q6_k(generator: np.random.Generator, count: int) -> np.ndarray:
    """d · scale · (q - 32): scales of 8 bits with mean 0 and deviation 74, q of 6 bits with deviation 18.5."""
    blocks = generator.integers(0, 256, (count, 210), dtype=np.uint8)
    blocks[:, 208:] = np.array([_DEVIATION / (18.5 * 74)], np.float16).view(np.uint8)
    return blocks


def _q8_0(generator: np.random.Generator, count: int) -> np.ndarray:
    """d · q: q of 8 bits with deviation 74."""
    blocks = generator.integers(0, 256, (count, 34), dtype=np.uint8)
    blocks[:, :2] = np.array([_DEVIATION / 74], np.float16).view(np.uint8)
    return blocks


_DRAWN = {StorageType.Q4_K: _q4_k, StorageType.Q6_K: _q6_k, StorageType.Q8_0: _q8_0}


def _add_tokenizer(writer: GGUFWriter, vocabulary: int) -> None:
    # The letters that byte-level tokenizers spell bytes with.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in plain] + [chr(256 + place) for place in range(256 - len(plain))]
    fill = [f"<|unused_{place}|>" for place in range(vocabulary - len(letters) - 1)]
    tokens = [*letters, "<|end|>", *fill]
    kinds = [TokenType.NORMAL] * len(letters) + [TokenType.CONTROL] + [TokenType.UNUSED] * len(fill)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_eos_token_id(len(letters))
    writer.add_chat_template(_CHAT)
