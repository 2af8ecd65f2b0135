from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from backhand.adapters.record import base_digest, text_digest, tokenizer_digest
from tests.support.tiny_tokenizer import tiny_tokenizer


def test_the_same_values_agree_in_every_dtype_and_order() -> None:
    weights = {"a.weight": torch.randn(3, 5).bfloat16(), "b.weight": torch.randn(4).bfloat16()}
    digest = base_digest(weights, weights.__getitem__)
    assert digest == base_digest(reversed(list(weights)), lambda name: weights[name].double())
    assert digest == base_digest(weights, lambda name: weights[name].float().flip(0).contiguous().flip(0))


@pytest.mark.parametrize("change", ["value", "name", "shape"])
def test_any_difference_shows(change: str) -> None:
    weight = torch.randn(3, 5)
    other = weight.clone()
    other[2, 4] += 1e-6
    before = base_digest(["a"], lambda _: weight)
    after = {
        "value": base_digest(["a"], lambda _: other),
        "name": base_digest(["b"], lambda _: weight),
        "shape": base_digest(["a"], lambda _: weight.view(5, 3)),
    }[change]
    assert after != before


def test_a_tokenizer_is_known_by_what_it_does() -> None:
    tokenizer, same, other = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    same.padding_side = "left"
    other.add_tokens(["<another>"])
    assert tokenizer_digest(tokenizer) == tokenizer_digest(same) != tokenizer_digest(other)


def test_a_tokenizer_is_known_by_its_merges_and_special_tokens_too() -> None:
    """The same tokens with the same ids, put together in another order, or one of them special."""
    tokenizer = tiny_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["merges"].reverse()
    other_merges = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    other_special = tiny_tokenizer()
    other_special.pad_token = "a"
    for other in (other_merges, other_special):
        assert other.get_vocab() == tokenizer.get_vocab()
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        setattr(other_merges, name, getattr(tokenizer, name))
    assert other_merges.all_special_tokens == tokenizer.all_special_tokens != other_special.all_special_tokens
    assert len({tokenizer_digest(one) for one in (tokenizer, other_merges, other_special)}) == 3


def test_a_template_is_known_by_its_text() -> None:
    assert text_digest(None) is None
    assert text_digest("{{ a }}") != text_digest("{{ b }}")
