from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from backhand.generation.options import SamplingOptions
from backhand.generation.session import kept_probabilities, next_token


def plain(**changes: float) -> SamplingOptions:
    """Drawn from all tokens as the logits say, but for the changes."""
    return replace(SamplingOptions(temperature=1.0, top_p=1.0), **changes)


def random_logits(vocab: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


def transformers_probabilities(logits: torch.Tensor, sampling: SamplingOptions) -> torch.Tensor:
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits[None])
    if sampling.top_k is not None:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(-1)[0]


@given(
    vocab=st.sampled_from([1, 2, 7, 300, 1000]),
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([None, 1, 3, 40, 2000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
)
@example(vocab=1000, seed=538, temperature=0.7, top_k=None, top_p=0.999)
def test_probabilities_are_those_of_transformers_processors(
    vocab: int, seed: int, temperature: float, top_k: int | None, top_p: float
) -> None:
    sampling = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = random_logits(vocab, seed)
    ours = kept_probabilities(logits, sampling)
    theirs = transformers_probabilities(logits, sampling)
    exact = transformers_probabilities(logits.double(), replace(sampling, top_p=1.0))
    likelier = torch.where(exact > exact[:, None], exact, 0.0).sum(1)
    # Rounding may keep or leave a token before which there is just as much as is kept.
    unsure = (likelier - top_p).abs() < 1e-6
    assert torch.equal((ours > 0) | unsure, (theirs > 0) | unsure)
    if torch.equal(ours > 0, theirs > 0):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    else:
        both = (ours > 0) & (theirs > 0)
        mine, right = (each[both] / each[both].sum() for each in (ours, theirs))
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-7)
        assert float(ours.sum()) == pytest.approx(1, rel=1e-5)


def test_flat_distributions_keep_more_than_the_first_look() -> None:
    logits = random_logits(5000, 1, spread=0.01)
    sampling = plain(top_p=0.9)
    kept = kept_probabilities(logits, sampling)
    assert 4400 < int((kept > 0).sum()) < 4600
    torch.testing.assert_close(kept, transformers_probabilities(logits, sampling), rtol=1e-5, atol=1e-8)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, kept in ((0.4, [1.0, 0, 0, 0]), (0.6, [0.5, 0.3, 0, 0]), (0.85, [0.5, 0.3, 0.15, 0])):
        expected = torch.tensor([probability / sum(kept) for probability in kept])
        torch.testing.assert_close(kept_probabilities(logits, plain(top_p=top_p)), expected)


def test_top_k_keeps_ties_with_the_last_one() -> None:
    kept = kept_probabilities(torch.tensor([1.0, 3.0, 2.0, 2.0]), plain(top_k=2))
    assert (kept > 0).tolist() == [False, True, True, True]


@pytest.mark.parametrize("changes", [{"greedy": True}, {"temperature": 0.0}, {"greedy": True, "top_k": 5}])
def test_greedy_takes_the_first_of_the_likeliest(changes: dict[str, float]) -> None:
    assert next_token(torch.tensor([0.0, 7.0, 7.0, 1.0]), replace(SamplingOptions(), **changes)) == 1


def test_a_seed_draws_the_same_tokens_and_another_one_others() -> None:
    logits, sampling = random_logits(50, 3, spread=1.0), SamplingOptions(temperature=0.9, top_p=0.95)

    def drawn(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [next_token(logits, sampling, generator) for _ in range(20)]

    assert drawn(4) == drawn(4)
    assert drawn(4) != drawn(5)
    state = torch.random.get_rng_state()
    drawn(4)
    assert torch.equal(state, torch.random.get_rng_state())


def test_frequencies_are_the_probabilities() -> None:
    logits, sampling = random_logits(6, 8, spread=1.0), plain(temperature=1.3, top_k=4)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(6)
    for _ in range(4000):
        counts[next_token(logits, sampling, generator)] += 1
    expected = kept_probabilities(logits, sampling)
    # Five standard deviations of a binomial share.
    assert ((counts / 4000 - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-9).all()


def test_narrow_logits_are_sampled_in_float32() -> None:
    logits = random_logits(40, 2).bfloat16()
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    sampling = plain(temperature=0.8)
    assert next_token(logits, sampling, generators[0]) == next_token(logits.float(), sampling, generators[1])
