"""The losses of rewards against TRL's own trainers and the papers' formulas; the sampler, and proof that it is one."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from backhand.data.examples import Example
from backhand.distributed.communicator import Communicator
from backhand.errors import CheckError
from backhand.generation import completer
from backhand.generation.sampling import GAP_BOUNDS, Sampled, at_temperature, draw, sample
from backhand.kernels.builds import load, usable, using
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.decoding import IncrementalDecoder
from backhand.nn.decoder.kv_cache import PAGE
from backhand.objectives.rewards.guards import LogprobCheck
from backhand.objectives.rewards.rollout import Judged, Rollout
from backhand.objectives.rewards.steps import AnswerBatch, RewardedSteps
from backhand.ops.grpo import answer_weights, group_advantages
from backhand.options.rewards import RewardOptions
from tests.support.float64_reference import without_float32_casts
from tests.support.parity import decoder_like, lora_from_peft, our_gradients, peft_gradients, relative_error
from tests.support.tiny_models import VOCAB_SIZE, attach_lora, tiny_documents, tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

RANK, ALPHA, GROUP, LONGEST = 5, 8.5, 3, 7
TEMPERATURE = 0.8
LOSSES = ("grpo", "dr_grpo", "dapo", "rloo")


def prompts(count: int = 3, seed: int = 0) -> list[Example]:
    """Each with one token as a placeholder for its answers."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = draw.integers(3, VOCAB_SIZE, int(draw.integers(2, 9))).astype(np.int32)
        found.append(Example(ids, np.arange(len(ids)) == len(ids) - 1, "row"))
    return found


def written(decoder: Decoder, rows: list[Example], seed: int = 0, batch_rows: int = 64) -> list[Sampled]:
    asked = [row.input_ids[:-1].tolist() for row in rows for _ in range(GROUP)]
    stops = range(VOCAB_SIZE // 4)  # answers of many lengths
    with at_temperature(decoder, TEMPERATURE):
        seeds = range(seed, seed + len(asked))
        return sample(decoder, asked, seeds, max_new_tokens=LONGEST, stop_ids=stops, batch_rows=batch_rows)


def batch_of(
    decoder: Decoder, rows: list[Example], answers: list[Sampled], rewards: Tensor, loss: str, beta: float
) -> AnswerBatch:
    options = RewardOptions(
        group=GROUP,
        max_new_tokens=LONGEST,
        loss=loss,
        epsilon=0.05,
        epsilon_high=0.09,  # type: ignore[arg-type]
    ).resolved()
    asked = [row for row in rows for _ in range(GROUP)]
    logprob_check = LogprobCheck(GAP_BOUNDS[decoder.dtype], lambda _: None)
    judged = Judged(answers, [], rewards[None], rewards)
    rollout = Rollout(options, options.group, (), lambda *_: 0, Communicator(), functions=None, tokenizer=None)
    with at_temperature(decoder, TEMPERATURE):
        return AnswerBatch(decoder, asked, judged, RewardedSteps(rollout, (), beta, 2, logprob_check))


def gradients_of(decoder: Decoder, batch: AnswerBatch) -> float:
    """The step's loss; its gradient is in the adapter."""
    assert decoder.lora is not None
    decoder.lora.gradients.zero_()
    work, total = batch.work(), 0.0
    assert work.loss_and_gradients is not None
    for number in range(len(work.packed_tokens)):
        total += float(work.loss_and_gradients(decoder, number, work.packed(number), 1 / work.mean_over, None))
    return total


def move(decoder: Decoder, adapted: Any) -> None:
    """Change the adapter of both."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_" in name and ".ref." not in name:
                tensor.add_(0.02 * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype))
    assert decoder.lora is not None
    decoder.lora.values.copy_(lora_from_peft(adapted, ALPHA / RANK, decoder.dtype).values)
    decoder.lora.refresh_compute(decoder.dtype)


def compare(decoder: Decoder, adapted: Any, bound: float) -> None:
    ours, theirs = our_gradients(decoder.lora), peft_gradients(adapted)
    worst = {name: relative_error(ours[name], theirs[name]) for name in theirs if ".ref." not in name}
    assert max(worst.values()) <= bound, sorted(worst.items(), key=lambda item: -item[1])[:3]
    assert any(bool(gradient.any()) for gradient in ours.values())


def drawn_rewards(rows: int, seed: int = 1) -> Tensor:
    return torch.rand(rows * GROUP, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_p_of(adapted: Any, rows: list[Example], answers: list[Sampled]) -> list[Tensor]:
    """Of every answer's tokens at the temperature, with its graph."""
    found = []
    for number, answer in enumerate(answers):
        prompt = rows[number // GROUP].input_ids[:-1].tolist()
        ids = torch.tensor([prompt + answer.tokens])
        logits = adapted(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE
        found.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(answer.tokens)[:, None]).squeeze(1))
    return found


@pytest.mark.parametrize("beta", [0.0, 0.07])
@pytest.mark.parametrize("loss", LOSSES)
def test_two_updates_of_one_batch_equal_trl(loss: str, beta: float, tmp_path: Path) -> None:
    """With TRL's own loss: of the first update, and of a second one, in which ratios move and some are clipped."""
    import trl
    from datasets import Dataset

    rows, adapted = prompts(), attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA)
    decoder = decoder_like(adapted, ALPHA / RANK)
    answers, rewards = written(decoder, rows), drawn_rewards(len(rows))
    kind = "RLOO" if loss == "rloo" else "GRPO"
    form = {} if loss == "rloo" else {"loss_type": loss}
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(answers),
        num_generations=GROUP,
        max_completion_length=LONGEST,
        temperature=TEMPERATURE,
        epsilon=0.05,
        epsilon_high=0.09,
        beta=beta,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        disable_tqdm=True,
        **form,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=adapted,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * len(answers)),
        processing_class=tiny_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    asked = [torch.tensor(rows[n // GROUP].input_ids[:-1].astype(np.int64)) for n in range(len(answers))]
    said = [torch.tensor(answer.tokens) for answer in answers]
    sides = {"prompt": asked, "completion": said}
    given: dict[str, Any] = {}
    for name, parts in sides.items():
        side = "left" if name == "prompt" else "right"
        given[f"{name}_ids"] = pad_sequence(parts, batch_first=True, padding_side=side)
        ones = [torch.ones_like(part) for part in parts]
        given[f"{name}_mask"] = pad_sequence(ones, batch_first=True, padding_side=side)
    with torch.no_grad():
        old = pad_sequence(log_p_of(adapted, rows, answers), batch_first=True)
        with adapted.disable_adapter():
            reference = pad_sequence(log_p_of(adapted, rows, answers), batch_first=True)
    if loss == "rloo":
        given["old_logps"] = old.sum(1)
        rewards_seen = rewards - beta * (old - reference).sum(1)
        groups = rewards_seen.view(-1, GROUP)
        given["advantages"] = (rewards_seen - ((groups.sum(1, keepdim=True) - groups) / (GROUP - 1)).flatten()).float()
    else:
        given |= {"old_per_token_logps": old, "ref_per_token_logps": reference}
        groups = rewards.view(-1, GROUP)
        apart = groups - groups.mean(1, keepdim=True)
        scaled = apart if loss == "dr_grpo" else apart / (groups.std(1, keepdim=True) + 1e-4)
        given["advantages"] = scaled.flatten().float()
        given["num_items_in_batch"] = given["completion_mask"].sum()
    batch = batch_of(decoder, rows, answers, rewards, loss, beta)
    for update in range(2):
        adapted.zero_grad()
        theirs = trainer._compute_loss(adapted, given)
        theirs.backward()
        with at_temperature(decoder, TEMPERATURE):
            ours = gradients_of(decoder, batch)
        assert ours == pytest.approx(theirs.item(), rel=1e-4, abs=1e-6), update
        compare(decoder, adapted, 1e-4)
        measured = batch.measured()
        if beta and loss != "rloo":
            assert measured["kl"] == pytest.approx(trainer._metrics["train"]["kl"][-1], rel=1e-3)
        assert (measured["clip_ratio"] > 0) == (update == 1)
        move(decoder, adapted)


@pytest.mark.parametrize("loss", LOSSES)
def test_float64_equals_autograd_of_the_paper(loss: str) -> None:
    rows, beta = prompts(4, seed=2), 0.0 if loss == "rloo" else 0.11
    adapted = attach_lora(tiny_model("qwen3").double(), rank=RANK, alpha=ALPHA)
    decoder = decoder_like(adapted, ALPHA / RANK, dtype=torch.float64)
    with without_float32_casts(adapted):
        answers, rewards = written(decoder, rows), drawn_rewards(len(rows))
        with torch.no_grad():
            old = log_p_of(adapted, rows, answers)
            with adapted.disable_adapter():
                reference = log_p_of(adapted, rows, answers)
        batch = batch_of(decoder, rows, answers, rewards, loss, beta)
        with at_temperature(decoder, TEMPERATURE):
            gradients_of(decoder, batch)
        move(decoder, adapted)
        adapted.zero_grad()
        now = log_p_of(adapted, rows, answers)
    groups, tokens = rewards.view(-1, GROUP), sum(map(len, old))
    losses = []
    for number, (p, o, q) in enumerate(zip(now, old, reference, strict=True)):
        own, group = rewards[number], groups[number // GROUP]
        gain = own - group.mean() if loss != "rloo" else own - (group.sum() - own) / (GROUP - 1)
        if loss in ("grpo", "dapo"):
            gain = gain / (group.std() + 1e-4)
        ratio = (p - o).exp() if loss != "rloo" else (p.sum() - o.sum()).exp()
        one = -torch.minimum(ratio * gain, ratio.clamp(0.95, 1.09) * gain)
        one = one + beta * ratio * ((q - p).exp() - (q - p) - 1) if beta else one
        count = len(answers)
        divisor = {"grpo": count * len(p), "dr_grpo": count * LONGEST, "dapo": tokens, "rloo": count}
        losses.append(one.sum() / divisor[loss])
    theirs = torch.stack(losses).sum()
    theirs.backward()
    with at_temperature(decoder, TEMPERATURE):
        ours = gradients_of(decoder, batch)
    assert ours == pytest.approx(theirs.item(), rel=1e-9, abs=1e-12)
    compare(decoder, adapted, 1e-9)


def test_advantages_and_weights() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    assert group_advantages(rewards, "grpo", "group")[0, 0] == pytest.approx(0.5 / (1 / 3**0.5 + 1e-4))
    assert not group_advantages(rewards, "grpo", "group")[1].any()
    assert group_advantages(rewards, "rloo", "none")[0].tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert group_advantages(rewards, "grpo", "batch")[0, 0] == pytest.approx(0.5 / (float(rewards.std()) + 1e-4))
    lengths = torch.tensor([1, 3])
    found = {loss: answer_weights(lengths, loss, 10).tolist() for loss in LOSSES}  # type: ignore[arg-type]
    assert found["grpo"] == pytest.approx([1 / 2, 1 / 6])
    assert (found["dapo"][0], found["dr_grpo"][0], found["rloo"][0]) == pytest.approx((1 / 4, 1 / 20, 1 / 2))


HUGE = (
    [1e308, -1e308, 1e308, -1e308],
    [1e200, 2e200, 3e200, 4e200],
    [1.7e308, 1.7e308, 0.0, 5.0],
    [1e-300, 2e-300, 0, 0],
)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scaling", ["group", "batch"])
def test_advantages_of_rewards_whose_squares_overflow(loss: Any, scaling: Any) -> None:
    """Against exact fractions; without the scale every advantage was 0."""
    exact = [[Fraction(value) for value in group] for group in HUGE]

    def deviation(values: list[Fraction]) -> Fraction:
        mean = sum(values) / len(values)
        square = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return Fraction(math.isqrt(int(square * 10**800)), 10**400)

    found = group_advantages(torch.tensor(HUGE, dtype=torch.float64), loss, scaling)
    of_batch = deviation([value for group in exact for value in group])
    for values, group in zip(found.tolist(), exact, strict=True):
        divisor = (deviation(group) if scaling == "group" else of_batch) + Fraction(1e-4)
        factor = Fraction(len(group), len(group) - 1) if loss == "rloo" else 1
        apart = [factor * (value - sum(group) / len(group)) for value in group]
        assert values == pytest.approx([float(one / divisor) for one in apart], rel=1e-12, abs=1e-290)


@given(st.lists(st.lists(st.floats(-1e100, 1e100), min_size=4, max_size=4), min_size=1, max_size=5))
def test_the_scale_changes_no_bit_of_ordinary_rewards(groups: list[list[float]]) -> None:
    rewards = torch.tensor(groups, dtype=torch.float64)
    apart = rewards - rewards.mean(1, keepdim=True)
    found = {name: group_advantages(rewards, "grpo", name) for name in ("none", "group", "batch")}  # type: ignore[arg-type]
    assume(bool((rewards.abs() > 1e-100).logical_or(rewards == 0).all()))  # a sum of others may round away
    assert torch.equal(found["none"], apart)
    assert torch.equal(found["group"], apart / (rewards.std(1, keepdim=True) + 1e-4))
    assert torch.equal(found["batch"], apart / (rewards.std() + 1e-4))


def test_rewards_too_large_to_divide_by_nothing_are_refused() -> None:
    rows, adapted = prompts(), attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA)
    decoder = decoder_like(adapted, ALPHA / RANK)
    answers, rewards = written(decoder, rows), drawn_rewards(len(rows)) * 1e200
    with pytest.raises(CheckError, match="differ by about") as raised:
        batch_of(decoder, rows, answers, rewards, "dr_grpo", 0.0)
    assert raised.value.exit_code == 6 and "--scale-rewards group" in str(raised.value.next_step)
    batch = batch_of(decoder, rows, answers, rewards, "dapo", 0.0)
    with at_temperature(decoder, TEMPERATURE):
        gradients_of(decoder, batch)
    assert decoder.lora is not None and batch.flat == 0
    assert 0 < float(decoder.lora.gradients.norm()) < 1e6


def test_a_group_of_one_reward_is_not_trained_on_and_takes_part_in_the_mean() -> None:
    rows, adapted = prompts(), attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA)
    decoder = decoder_like(adapted, ALPHA / RANK)
    answers, rewards = written(decoder, rows), drawn_rewards(len(rows))
    rewards[GROUP : 2 * GROUP] = 0.25
    one = batch_of(decoder, rows, answers, rewards, "dapo", 0.0)
    assert one.flat == 1 and one.trained == [*range(GROUP), *range(2 * GROUP, 3 * GROUP)]
    with at_temperature(decoder, TEMPERATURE):
        gradients_of(decoder, one)
        assert decoder.lora is not None
        left_out = decoder.lora.gradients.clone()
        rewards[GROUP] += 1e-13  # all of them, with next to no advantage
        all_of_them = batch_of(decoder, rows, answers, rewards, "dapo", 0.0)
        assert all_of_them.flat == 0
        gradients_of(decoder, all_of_them)
    assert relative_error(decoder.lora.gradients, left_out) < 1e-5


def test_tokens_are_drawn_as_the_probabilities_say() -> None:
    for vocabulary in (7, 256, 300):
        logits = 2 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
        count = 40_000
        drawn = draw(logits.repeat(count, 1), ((torch.arange(count) + 0.5) / count).tolist())
        p = torch.softmax(logits[0].double(), 0)
        assert float((torch.bincount(drawn.tokens, minlength=vocabulary) / count - p).abs().max()) < 1e-4
        assert drawn.log_p[:9].tolist() == pytest.approx(p[drawn.tokens[:9]].log().tolist(), abs=1e-5)
        assert float(drawn.entropies[0]) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
    alone = torch.full((2, 600), -1e9)
    alone[0, 5] = alone[1, 599] = 0.0
    assert draw(alone, [1 - 1e-12, 1 - 1e-12]).tokens.tolist() == [5, 599]
    kept = draw(torch.tensor([[0.0, 2.0, 1.0]]).repeat(50, 1), [n / 50 for n in range(50)], top_p=0.6).tokens
    assert set(kept.tolist()) == {1}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
def test_an_answer_does_not_depend_on_its_neighbours(kind: str) -> None:
    decoder = decoder_like(attach_lora(tiny_model(kind), rank=RANK, alpha=ALPHA), ALPHA / RANK)
    rows = [row.input_ids[:-1].tolist() for row in prompts(5, seed=3) for _ in range(GROUP)]
    seeds = list(range(len(rows)))
    more: dict[str, Any] = {"max_new_tokens": 9, "stop_ids": range(20)}
    with at_temperature(decoder, TEMPERATURE):
        together = sample(decoder, rows, seeds, **more)
        few = sample(decoder, rows, seeds, batch_rows=4, **more)  # places are taken by the next prompts
        alone = [sample(decoder, [row], [seed], **more)[0] for row, seed in zip(rows, seeds, strict=True)]
    assert len({len(one.tokens) for one in together}) > 1 and any(one.stopped for one in together)
    for others in (few, alone):
        assert [one.tokens for one in others] == [one.tokens for one in together]
        for one, other in zip(together, others, strict=True):
            assert one.log_p == pytest.approx(other.log_p, abs=1e-5)


def test_a_prompts_keys_and_values_are_there_once_for_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two prompts of 100 tokens and eight answers of 9 to each, copies would be eight times as much."""
    decoder, made = decoder_like(attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA), ALPHA / RANK), []

    def caught(*arguments: Any, **options: Any) -> IncrementalDecoder:
        made.append(IncrementalDecoder(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(completer, "IncrementalDecoder", caught)
    asked = [ids.tolist() for ids in tiny_documents([100, 100], seed=4) for _ in range(8)]
    sample(decoder, asked, range(16), max_new_tokens=9, stop_ids=())
    (state,) = made
    tokens = 2 * 100 + 16 * 9
    for buffer in (*state.cache.keys, *state.cache.values):
        assert tokens <= buffer.shape[1] < tokens + (1 + 2 + 16) * PAGE


@pytest.mark.parametrize("kind", ["llama", "gemma2", "lfm2", "phi3-longrope"])
def test_a_prompt_is_computed_once_for_answers_that_begin_later(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More answers than fit at once; one prompt is a single token, and a third of the answers end early."""
    decoder = decoder_like(attach_lora(tiny_model(kind), rank=RANK, alpha=ALPHA), ALPHA / RANK)
    asked = [[*range(3, 3 + length)] for length in (2 * PAGE, PAGE + 5, 1) for _ in range(10)]
    new: list[int] = []
    extend = IncrementalDecoder.extend

    def counted(self: IncrementalDecoder, rows: Any, tokens: Any) -> Tensor:
        new.extend(len(one) for one in tokens)
        return extend(self, rows, tokens)

    more: dict[str, Any] = {"max_new_tokens": 9, "stop_ids": range(VOCAB_SIZE // 8)}
    alone = [sample(decoder, [row], [seed], **more)[0] for seed, row in enumerate(asked)]
    monkeypatch.setattr(IncrementalDecoder, "extend", counted)
    few = sample(decoder, asked, range(len(asked)), batch_rows=8, **more)
    assert [one.tokens for one in few] == [one.tokens for one in alone]
    for one, other in zip(few, alone, strict=True):
        assert one.log_p == pytest.approx(other.log_p, abs=1e-5)
    if kind in ("llama", "gemma2"):
        assert new == [2 * PAGE, PAGE + 5, 1]


@pytest.mark.skipif("amx" not in usable(), reason="this processor has no AMX")
@pytest.mark.parametrize("batch_rows", [64, 5])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_with_amx_there_is_no_gap(kind: str, batch_rows: int) -> None:
    """With fewer rows than answers too, where a prompt's last token comes in a step."""
    decoder = decoder_like(attach_lora(tiny_model(kind), rank=RANK, alpha=ALPHA), ALPHA / RANK, dtype=torch.bfloat16)
    rows, gaps = prompts(6, seed=3), []
    with using(load("amx")):
        answers = written(decoder, rows, batch_rows=batch_rows)
        batch = batch_of(decoder, rows, answers, drawn_rewards(len(rows)), "dapo", 0.0)
        with pytest.MonkeyPatch.context() as patch, at_temperature(decoder, TEMPERATURE):
            patch.setattr(LogprobCheck, "compare", lambda _, *both: gaps.append(both) or True)
            gradients_of(decoder, batch)
    assert len(gaps) >= 2 and all(torch.equal(*both) for both in gaps)


WRONG = ("temperature", "adapter", "another answer", "one step old")


@pytest.mark.parametrize("how", [None, *WRONG])
def test_the_check_sees_a_sampler_that_is_another_model(how: str | None) -> None:
    rows, adapted = prompts(), attach_lora(tiny_model("gemma2"), rank=RANK, alpha=ALPHA)
    decoder = decoder_like(adapted, ALPHA / RANK)
    lora = decoder.lora
    assert lora is not None
    if how == "adapter":
        decoder.detach()
    answers = written(decoder, rows)
    decoder.attach(lora)
    if how == "temperature":
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "TEMPERATURE", 0.81)
            answers = written(decoder, rows)
    elif how == "another answer":
        answers[1] = replace(answers[1], log_p=answers[2].log_p[:1] * len(answers[1].tokens))
    elif how == "one step old":
        move(decoder, adapted)
    batch = batch_of(decoder, rows, answers, drawn_rewards(len(rows)), "dapo", 0.0)
    with at_temperature(decoder, TEMPERATURE):
        loss = gradients_of(decoder, batch)
    assert np.isfinite(loss) == (how is None)
    if how is None:
        assert 0 < batch._logprob_check.step_gaps(1, Communicator())["sampling_gap"] < 1e-4
    else:
        with pytest.raises(Exception, match="two models"):
            batch._logprob_check.step_gaps(1, Communicator())
