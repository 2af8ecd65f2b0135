"""Padded rows have the same losses and gradients as separate ones. Models that do not allow padding are detected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from backhand.adapters.config import LoRAConfig
from backhand.engines.transformers_engine import TransformersModel
from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.lora_parameters import LoRAParameters
from backhand.nn.right_padding import head_on_positions, padded_groups, padding_obstacle, reset_dynamic_rope
from tests.support.tiny_models import randomise, tiny_model

LENGTHS = (13, 12, 9, 9, 5)
VOCAB = 97

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}


def _made(model_type: str, **config: Any) -> nn.Module:
    known = transformers.AutoConfig.for_model(model_type, **config)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(known)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)  # far from the small start, where one token hardly moves another
    return model.double().eval()


def _tiny(variant: str, **overrides: Any) -> nn.Module:
    model = tiny_model(variant, **overrides)
    randomise(model, seed=0)
    return model.double().eval()


LOOK_BACK_ALONE: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _tiny("llama"),
    "windows": lambda: _tiny("gemma3_text"),
    "softcapped": lambda: _made("gemma2", **_SMALL, query_pre_attn_scalar=12, final_logit_softcapping=3.0),
    "scaled logits": lambda: _made("granite", **_SMALL, logits_scaling=3.0),
    "learnt positions": lambda: _made("gpt2", vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=32),
    # Its product over experts knows no float64.
    "experts": lambda: _made(
        "qwen3_moe", **_SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1
    ).float(),
    "state space": lambda: _made(
        "mamba", vocab_size=VOCAB, hidden_size=24, state_size=4, num_hidden_layers=2, pad_token_id=0
    ),
    "short convolutions": lambda: _made(
        "lfm2",
        **{key: value for key, value in _SMALL.items() if key != "head_dim"},
        layer_types=["conv", "full_attention"],
    ),
}

LOOK_AHEAD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "both directions": (lambda: _tiny("gemma3_text", use_bidirectional_attention=True), "what comes after a token"),
    "an encoder": (
        lambda: _made(
            "bert",
            vocab_size=VOCAB,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=40,
            is_decoder=False,
        ),
        "what comes after a token",
    ),
    "longrope": (
        lambda: _made(
            "phi3",
            **_SMALL,
            original_max_position_embeddings=32,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 6,
                "long_factor": [2.0] * 6,
            },
        ),
        r"rotary angles \(longrope\)",
    ),
    "dynamic": (
        lambda: _tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        r"rotary angles \(dynamic\)",
    ),
}


def _batch(lengths: tuple[int, ...] = LENGTHS) -> PackedBatch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCAB, (sum(lengths),), generator=generator)
    labels = torch.randint(2, VOCAB, (sum(lengths),), generator=generator)
    labels[torch.rand(len(labels), generator=generator) < 0.4] = IGNORE_INDEX
    return PackedBatch(ids, labels, lengths)


def _adapted(model: nn.Module) -> TransformersModel:
    trained = TransformersModel(model)
    slots, extra = trained.inject(LoRAConfig(rank=3, alpha=5.1, target_modules="all-linear", dropout=0.0))
    lora = LoRAParameters(slots, full_tensors=extra)
    trained.attach(lora)
    generator = torch.Generator().manual_seed(1)
    for _, view in lora.named_tensors():
        view.copy_(0.3 * torch.randn(view.shape, generator=generator))
    lora.refresh_compute(trained.dtype)
    return trained


def _one_by_one(batch: PackedBatch) -> list[PackedBatch]:
    ids, labels = batch.input_ids.split(batch.lengths), batch.labels.split(batch.lengths)
    return [PackedBatch(a, b, (len(a),)) for a, b in zip(ids, labels, strict=True)]


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return float((ours - theirs).norm() / theirs.norm()) <= tolerance


@pytest.mark.parametrize("kind", LOOK_BACK_ALONE)
def test_padded_rows_have_the_losses_and_gradients_of_rows_alone(kind: str) -> None:
    batch = _batch()
    model = _adapted(LOOK_BACK_ALONE[kind]())
    assert model.padding_obstacle is None
    assert model.lora is not None
    alone = sum(model.loss_and_gradients(part, 0.7) for part in _one_by_one(batch))
    expected = model.lora.gradients.clone()
    assert float(expected.norm()) > 0
    model.lora.gradients.zero_()
    assert len(list(padded_groups(batch, padded=True))) == 1
    together = model.loss_and_gradients(batch, 0.7)
    assert float(together) == pytest.approx(float(alone), rel=1e-6)
    assert _close(model.lora.gradients, expected, 1e-5)
    assert float(model.token_losses(batch).sum()) == pytest.approx(float(alone), rel=1e-6)
    losses = torch.cat([model.token_losses(part) for part in _one_by_one(batch)])
    assert _close(model.token_losses(batch), losses, 1e-5)


@pytest.mark.parametrize("kind", LOOK_AHEAD)
def test_models_that_look_ahead_are_found_and_keep_to_equal_lengths(kind: str) -> None:
    make, reason = LOOK_AHEAD[kind]
    model = TransformersModel(make())
    assert model.padding_obstacle is not None
    assert re.search(reason, model.padding_obstacle)
    batch = _batch()
    alone = sum(float(model.token_losses(part).sum()) for part in _one_by_one(batch))
    assert float(model.token_losses(batch).sum()) == pytest.approx(alone, rel=1e-6)


def test_without_the_finding_the_losses_would_differ() -> None:
    """So the finding matters, and the test above could fail."""
    model = TransformersModel(LOOK_AHEAD["both directions"][0]())
    batch = _batch()
    alone = sum(float(model.token_losses(part).sum()) for part in _one_by_one(batch))
    model.__dict__["padding_obstacle"] = None
    assert float(model.token_losses(batch).sum()) != pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*LOOK_BACK_ALONE, "both directions"])
def test_rounding_is_no_sign_of_looking_ahead(kind: str, dtype: torch.dtype) -> None:
    looks_ahead = kind == "both directions"
    make = LOOK_AHEAD[kind][0] if looks_ahead else LOOK_BACK_ALONE[kind]
    assert (padding_obstacle(make().to(dtype)) is not None) == looks_ahead


def test_rows_stay_in_order_and_little_is_padded() -> None:
    batch = _batch((200, 199, 60, 58, 57, 3, 200))
    groups = [ids.shape for ids, _ in padded_groups(batch, padded=True)]
    assert groups == [(2, 200), (4, 60), (1, 200)]
    real = [labels[labels != IGNORE_INDEX] for _, labels in padded_groups(batch, padded=True)]
    assert torch.equal(torch.cat(real), batch.labels[batch.labels != IGNORE_INDEX])
    assert [ids.shape for ids, _ in padded_groups(_batch((9, 9, 5)), padded=False)] == [(2, 9), (1, 5)]


def test_documents_without_a_label_are_not_computed() -> None:
    batch = _batch((9, 7, 5))
    batch.labels[9:16] = IGNORE_INDEX
    assert [ids.shape for ids, _ in padded_groups(batch, padded=True)] == [(2, 9)]
    batch.labels[:] = IGNORE_INDEX
    assert list(padded_groups(batch, padded=True)) == []
    assert float(TransformersModel(tiny_model("llama")).token_losses(batch).sum()) == 0.0


def test_the_head_sees_the_supervised_positions_alone() -> None:
    model = tiny_model("llama")
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape)))
    batch = _batch()
    TransformersModel(model).token_losses(batch).sum()
    assert seen[-1] == (1, batch.supervised_tokens, model.config.vocab_size)


def test_a_head_that_is_no_module_gives_every_position() -> None:
    class Bare(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.inside, self.config, self.dtype = model, model.config, model.dtype

        def get_input_embeddings(self) -> nn.Module:
            return self.inside.get_input_embeddings()  # type: ignore[no-any-return]

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, **inputs: Any) -> Any:
            return self.inside(**inputs)

    model = tiny_model("llama")
    batch = _batch()
    assert float(TransformersModel(Bare(model)).token_losses(batch).sum()) == pytest.approx(
        float(TransformersModel(model).token_losses(batch).sum())
    )
    with head_on_positions(None, torch.ones(1, 1, dtype=torch.bool)):
        pass


_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
REMEMBERS_LENGTHS: dict[str, Callable[[], nn.Module]] = {
    "all layers": lambda: _tiny("llama", max_position_embeddings=8, rope_parameters=_DYNAMIC),
    "some layers": lambda: _tiny(
        "gemma3_text",
        max_position_embeddings=8,
        rope_parameters={
            "full_attention": _DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}


@pytest.mark.parametrize("kind", REMEMBERS_LENGTHS)
def test_a_row_costs_what_it_costs_whatever_was_computed_before(kind: str) -> None:
    """transformers keeps the `dynamic` angles of the longest row so far, and turns shorter ones by them."""
    make = REMEMBERS_LENGTHS[kind]
    rows = _one_by_one(_batch((20, 13, 9, 5)))
    fresh = [_adapted(make()).token_losses(row) for row in rows]
    model = _adapted(make())
    for row, expected in zip(rows, fresh, strict=True):
        assert torch.equal(model.token_losses(row), expected)
    for row in rows:
        model.logits(rows[0].input_ids)
        assert torch.equal(model.logits(row.input_ids), _adapted(make()).logits(row.input_ids))


@pytest.mark.parametrize("kind", REMEMBERS_LENGTHS)
def test_modules_are_looked_through_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = REMEMBERS_LENGTHS[kind]()
    (long,) = _one_by_one(_batch((20,)))
    rotary = model.model.rotary_emb
    before = {name: angles.clone() for name, angles in rotary.named_buffers()}
    reset_dynamic_rope(model)
    monkeypatch.setattr(model, "modules", None)
    with monkeypatch.context() as patch:
        patch.delattr(model, "modules")
        model(input_ids=long.input_ids[None])
    assert any(not torch.equal(angles, before[name]) for name, angles in rotary.named_buffers())
    reset_dynamic_rope(model)
    assert all(torch.equal(angles, before[name]) for name, angles in rotary.named_buffers())


def test_the_angles_of_rows_of_several_lengths_differ() -> None:
    """Else the test above would hold of any model."""
    model: Any = REMEMBERS_LENGTHS["all layers"]()
    long, short = (row.input_ids[None] for row in _one_by_one(_batch((20, 13))))
    alone = model(input_ids=short).logits
    model(input_ids=long)
    assert not torch.allclose(model(input_ids=short).logits, alone)
