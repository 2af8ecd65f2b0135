"""Everything that ends an answer is a stop token, and text that merely looks like an end is not."""

from __future__ import annotations

from backhand.nn.loading.stop_tokens import stop_token_ids
from tests.support.tiny_tokenizer import tiny_tokenizer


def test_stated_own_and_known_ends() -> None:
    tokenizer = tiny_tokenizer()
    assert stop_token_ids(tokenizer, []) == (0, 2)
    assert stop_token_ids(tokenizer, [17, 2, 17]) == (0, 2, 17)
    assert 1 not in stop_token_ids(tokenizer, [])


def test_special_end_of_turn_tokens_count_and_plain_ones_do_not() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    tokenizer.add_tokens(["<end_of_turn>"])
    ids = stop_token_ids(tokenizer, [])
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in ids
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") not in ids


def test_what_ends_a_thought_does_not_end_the_answer() -> None:
    """<|end|> ends a turn of Phi-3, and in gpt-oss only a part of the answer before <|return|>."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    assert tokenizer.convert_tokens_to_ids("<|end|>") in stop_token_ids(tokenizer, [])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|return|>", "<|call|>"]})
    ids = stop_token_ids(tokenizer, [])
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in ids
    assert set(tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"])) <= set(ids)


def test_a_tokenizer_without_an_end() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert stop_token_ids(tokenizer, [5]) == (0, 2, 5)
