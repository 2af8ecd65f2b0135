"""`backhand verify --model`: on tiny models of the families, and its results for a broken engine."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from backhand.data.examples import Example
from backhand.data.options import DataOptions
from backhand.data.pack import pack
from backhand.errors import ArtifactError, CheckError
from backhand.nn.decoder import adapted_head, block, projections
from backhand.nn.decoder import forward_backward as forward_backward_module
from backhand.nn.decoder.merging import merge_into
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.families.family_parsing import decoder_config
from backhand.objectives.decisions import loss as decide_objective
from backhand.ops.document_groups import SegmentRun
from backhand.verify import blockwise_step
from backhand.verify import merging as merged_model
from backhand.verify.blockwise_step import BlockwiseStep
from backhand.verify.command import verify, verify_command
from backhand.verify.measure import relative_error
from backhand.verify.model_gradients import GradientProofs
from backhand.verify.model_setup import choose_documents, load_setup
from backhand.verify.options import VerifiedModelOptions, VerifyOptions, VerifyRunOptions
from backhand.verify.report import MODEL, statement
from tests.support.tiny_models import FAMILIES, attach_lora, save_tiny, tiny_config, tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directory of a tiny model of each family, created on demand."""
    made = {}

    def directory(variant):
        if variant not in made:
            path = tmp_path_factory.mktemp(variant)
            made[variant] = save_tiny(tiny_model(variant), path)
        return made[variant]

    return directory


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [
        {"prompt": "the sky is", "completion": " blue today"},
        {"prompt": "two and two", "completion": " make four, they say"},
        {"prompt": "a", "completion": " b"},
        {"prompt": "what comes after", "completion": " is what was before " * 3},
    ]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


def options(model, rows=None, *, dtype="float32", **fields):
    return VerifyOptions(
        verify=VerifyRunOptions(max_tokens=64, **fields),
        model=VerifiedModelOptions(model=str(model), dtype=dtype, device="cpu"),
        data=DataOptions(data=(str(rows),) if rows else (), chat_template="none"),
    )


@pytest.mark.parametrize("variant", FAMILIES)
def test_every_family_is_proved(variant, models, rows):
    report = verify(options(models(variant), rows))
    assert not report.failed(MODEL)
    exact = [proof for proof in report.of(MODEL) if proof.case.endswith("float64")]
    # What the random adapter has; of a mixture of experts that is attention.
    names = module_shapes(decoder_config(tiny_config(variant).to_dict()))
    kinds = {name.rpartition(".")[2] for name in names if name != "lm_head"}
    assert len(exact) == 4 + len(kinds), "loss, every kind of module, d_x, packing, merging"
    assert max(proof.error for proof in exact) < 1e-12
    statements = " ".join(proof.case for proof in report.of(MODEL))
    for words in ("packed = unpacked", "accumulated = one batch", "recomputed (mlp)", "recomputed (block)", "merged"):
        assert words in statements
    step = next(proof for proof in report.of(MODEL) if "training step" in proof.case)
    assert 0 < step.error < 1e-4


def test_bfloat16_and_the_neutral_texts(models):
    report = verify(options(models("llama"), dtype="bfloat16"))
    assert not report.failed(MODEL)
    assert "neutral texts" in " ".join(report.notes)


def test_one_document_is_said_to_be_alone(models, tmp_path):
    (tmp_path / "row.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
    report = verify(options(models("llama"), tmp_path / "row.jsonl"))
    assert report.passed
    assert "packing and accumulation are not measured" in " ".join(report.notes)
    assert not any("packed" in proof.case or "accumulated" in proof.case for proof in report.of(MODEL))


def test_experts_of_an_adapter(models, rows, tmp_path):
    attach_lora(tiny_model("qwen3_moe"), rank=3).save_pretrained(tmp_path)
    report = verify(options(models("qwen3_moe"), rows, adapter=tmp_path))
    assert report.passed
    statements = [proof.case for proof in report.of(MODEL) if proof.case.endswith("float64")]
    for kind in ("gate_up_proj", "down_proj"):
        assert any(statement.startswith(f"3 × {kind}:") for statement in statements)


def test_an_adapter_of_peft(models, rows, tmp_path):
    adapted = attach_lora(tiny_model("qwen3"), rank=3, target_modules=["q_proj", "down_proj"])
    adapted.peft_config["default"].base_model_name_or_path = str(models("qwen3"))
    adapted.save_pretrained(tmp_path)
    report = verify(options("", rows, adapter=tmp_path))  # on the model that it names
    assert report.passed and f"model {models('qwen3')} (" in report.notes[0]
    statements = " ".join(proof.case for proof in report.of(MODEL))
    assert "3 × q_proj" in statements
    assert "3 × down_proj" in statements
    assert "v_proj" not in statements


@pytest.mark.filterwarnings("ignore:.*tied:UserWarning")  # PEFT about adapting a tied head
@pytest.mark.parametrize("variant", ["llama", "llama-tied"])
def test_a_head_with_dropout_is_proved_and_its_merging_too(variant, models, rows, tmp_path):
    adapted = attach_lora(tiny_model(variant), target_modules=["lm_head", "v_proj"], dropout=0.3)
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    report = verify(options(models(variant), rows, adapter=tmp_path))
    assert not report.failed(MODEL)
    statements = {proof.case: proof for proof in report.of(MODEL)}
    assert statements["1 × lm_head: d_lora_A, d_lora_B = autograd's, float64"].error < 1e-12
    assert "merged = unmerged, logits" in statements


@pytest.mark.filterwarnings("ignore:.*tied:UserWarning")
def test_a_head_whose_dropout_is_forgotten_is_found(models, rows, tmp_path, monkeypatch):
    """Without dropout on the head each part is right, but the step's gradient is wrong."""
    adapted = attach_lora(tiny_model("llama"), target_modules=["lm_head"], dropout=0.3)
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    right = adapted_head.linear_cross_entropy_backward

    def without(x, weight, targets, head=None, *others, **room):
        return right(x, weight, targets, head and head._replace(dropout=None), *others, **room)

    monkeypatch.setattr(adapted_head, "linear_cross_entropy_backward", without)
    failed = _failed(verify(options(models("llama"), rows, adapter=tmp_path)))
    assert failed == {"a training step's gradient in float32 = float64's"}


def test_an_adapter_of_another_model_is_refused(models, rows, tmp_path):
    attach_lora(tiny_model("llama", hidden_size=66), target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError):
        verify(options(models("llama"), rows, adapter=tmp_path))


def _failed(report):
    return {proof.case for proof in report.failed(MODEL)}


def test_a_wrong_backward_in_the_engine_is_found_and_named(models, rows, monkeypatch):
    right = block.h_gradient

    def wrong(g, h, members):
        d_h = right(g, h, members)
        if len(members) == 1:
            members[0].d_lora_B.mul_(1 + 1e-6)  # what the gradients are added to
        return d_h

    monkeypatch.setattr(block, "h_gradient", wrong)
    failed = _failed(verify(options(models("llama"), rows)))
    assert any("o_proj" in proof for proof in failed)
    assert any("down_proj" in proof for proof in failed)
    assert not any("q_proj" in proof for proof in failed)


def test_a_wrong_gradient_between_blocks_is_found(models, rows, monkeypatch):
    right = projections.rms_norm_backward
    monkeypatch.setattr(
        projections,
        "rms_norm_backward",
        lambda *args, **kwargs: right(*args, **kwargs)._replace(d_x=1.001 * right(*args, **kwargs).d_x),
    )
    assert any("d_x" in proof for proof in _failed(verify(options(models("mistral"), rows))))


def test_a_wrong_gradient_of_the_head_is_found(models, rows, monkeypatch):
    """The blocks are proved with the head's d_x, so that only the head's comparison reveals the mistake."""
    right = blockwise_step.linear_cross_entropy_backward

    def wrong(*args):
        losses, grads = right(*args)
        return losses, grads._replace(d_x=grads.d_x * (1 + 1e-6))

    monkeypatch.setattr(blockwise_step, "linear_cross_entropy_backward", wrong)
    report = verify(options(models("llama"), rows))
    failed = next(proof for proof in report.failed(MODEL) if "d_x" in proof.case)
    assert failed.detail == "worst: d_x of the head"


def test_a_step_put_together_wrongly_is_found(models, rows, monkeypatch):
    """Each block is right, but the step skips the backward of a block in the middle."""
    right = forward_backward_module.block_backward
    calls = []

    def forgetful(d_x, *args, **kwargs):
        calls.append(1)
        return d_x if len(calls) % 3 == 2 else right(d_x, *args, **kwargs)

    monkeypatch.setattr(forward_backward_module, "block_backward", forgetful)
    failed = _failed(verify(options(models("llama"), rows)))
    assert any("training step" in proof for proof in failed)
    assert not any("float64" in proof and "×" in proof for proof in failed)


@pytest.mark.parametrize(("others", "passes"), [((0.1, 0.1), True), ((0.3, 0.1), False), ((math.nan, 0.1), False)])
def test_rounding_above_the_bound_is_judged_on_several_adapters(others, passes, models, rows, monkeypatch):
    setup = load_setup(options(models("llama")).model, options(models("llama"), rows).data, None, 64)
    lora = setup.decoder.lora
    proofs = GradientProofs(setup.decoder, pack(setup.examples), None)
    before, tried = lora.values.clone(), []

    def errors(_self, truth):
        tried.append((lora.values.clone(), truth.clone()))
        return (0.25, 0.1) if len(tried) == 1 else others

    monkeypatch.setattr(GradientProofs, "_rounding_errors", errors)
    list(proofs.by_block())
    step = proofs.training_step()
    assert step.passed is passes
    assert "means of 8" in step.detail
    if passes:
        assert step.error == pytest.approx((0.25 * 0.1**7) ** (1 / 8)) and step.bound == pytest.approx(0.2)
    assert len(tried) == 8 and torch.equal(lora.values, before)
    for values, truth in tried[1:]:
        assert 0.03 < (values / before).log().std() < 0.07
        assert 0.001 < relative_error(truth, tried[0][1]) < 0.5  # each has its own gradient in float64


def test_documents_that_see_each_other_are_found(models, rows, monkeypatch):
    right = forward_backward_module.ForwardBackward.contexts

    def leaking(self, batch, *others):
        return [
            context._replace(segment_runs=(SegmentRun(0, 1, len(batch.input_ids)),) if len(batch.input_ids) else ())
            for context in right(self, batch, *others)
        ]

    monkeypatch.setattr(forward_backward_module.ForwardBackward, "contexts", leaking)
    with pytest.raises(CheckError):
        verify_command(options(models("llama"), rows))
    assert any("packed = unpacked" in proof for proof in _failed(verify(options(models("llama"), rows))))


def test_a_shared_prefix_is_proved_and_one_that_is_not_read_is_found(models, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    long = "what comes after, and what is there before, and after that, of all things, " * 2
    texts = [(long + "one", " two"), (long + "night", " the day"), (long + "all", " it")]
    rows.write_text("".join(json.dumps({"prompt": one, "completion": other}) + "\n" for one, other in texts))
    asked = options(models("llama"), rows)
    asked = replace(asked, verify=replace(asked.verify, max_tokens=512))
    report = verify(asked)
    exact, rounded = (proof for proof in report.of(MODEL) if proof.case.startswith("shared prefix"))
    assert report.passed and exact.case.endswith("float64")
    assert exact.error < 1e-12 and 0 < rounded.error < 1e-4
    right = BlockwiseStep.context

    def unread(self, layer, expected=None):
        context = right(self, layer, expected)
        return context._replace(segment_runs=tuple(run._replace(before=()) for run in context.segment_runs))

    monkeypatch.setattr(BlockwiseStep, "context", unread)
    assert exact.case in _failed(verify(asked))


def test_no_prefix_is_shared_where_angles_depend_on_the_length(models, tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = [("what comes after one", " two"), ("what comes after night", " the day")]
    rows.write_text("".join(json.dumps({"prompt": one, "completion": other}) + "\n" for one, other in texts))
    report = verify(options(models("phi3-longrope"), rows))
    assert report.passed and not [proof for proof in report.of(MODEL) if proof.case.startswith("shared prefix")]


def test_a_leak_that_bfloat16_hides_is_found_in_float64(models, rows, monkeypatch):
    """Every document's rotary angles continue slightly from the previous document."""
    right = forward_backward_module.angles

    def leaking(frequencies, positions, dtype, document_lengths):
        return right(frequencies, positions + 1e-4 * torch.arange(len(positions)), dtype, document_lengths)

    monkeypatch.setattr(forward_backward_module, "angles", leaking)
    failed = _failed(verify(options(models("llama"), rows, dtype="bfloat16")))
    assert "packed = unpacked, gradient, float64" in failed
    assert "packed = unpacked, gradient" not in failed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", ["scaling forgotten", "nothing merged"])
def test_a_wrong_merge_is_found(wrong, dtype, models, rows, monkeypatch):
    def merge(decoder, lora):
        for name, slot in lora.slots.items():
            lora.lora_B(name).mul_(1 / slot.scaling if wrong == "scaling forgotten" else 0)
        merge_into(decoder, lora)

    monkeypatch.setattr(merged_model, "merge_into", merge)
    assert _failed(verify(options(models("llama"), rows, dtype=dtype))) == {"merged = unmerged, logits"}


@pytest.mark.filterwarnings("ignore:.*tied:UserWarning")
@pytest.mark.parametrize("target", ["down_proj", "lm_head"])
def test_a_wrong_merge_of_a_faint_adapter_is_found_in_float64(target, models, rows, tmp_path, monkeypatch):
    """An update that bfloat16 cannot see, merged with a factor of 1 + 1e-6."""
    faint = attach_lora(tiny_model("llama"), target_modules=[target])
    for name, parameter in faint.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e-2)
    faint.save_pretrained(tmp_path, save_embedding_layers=False)
    right = merged_model.merged_weight
    assert verify(options(models("llama"), rows, dtype="bfloat16", adapter=tmp_path)).passed

    def merge(weight, lora, name):
        return weight + (1 + 1e-4) * (right(weight, lora, name) - weight)

    monkeypatch.setattr(merged_model, "merged_weight", merge)
    report = verify(options(models("llama"), rows, dtype="bfloat16", adapter=tmp_path))
    (failed,) = report.failed(MODEL)
    assert failed.case.endswith("merged = unmerged, float64")
    assert "head" in failed.detail if target == "lm_head" else "layer" in failed.detail
    assert report.of(MODEL)[-1].detail.startswith("the adapter itself changes only")


def test_the_logits_error_is_measured_against_float64(models, rows):
    """The difference is a few units of rounding in each dtype, far below the adapter's effect."""
    for dtype, low, high in (("float32", 1e-8, 1e-5), ("bfloat16", 1e-3, 5e-2)):
        merged = verify(options(models("llama"), rows, dtype=dtype)).of(MODEL)[-1]
        detail = re.fullmatch(
            r"the adapter changes the logits by (\S+) of their norm; (\S+) of .* is lost", merged.detail
        )
        effect, lost = detail.groups()
        assert float(effect) > 3 * merged.bound
        assert float(lost) * float(effect) == pytest.approx(merged.error, rel=0.1)
        assert low < merged.bound / 3 < high and merged.error > low


def test_a_run_is_proved_with_its_own_model_rows_and_adapter(models, rows, tmp_path):
    from backhand.options.config import ModelOptions, TrainConfig
    from backhand.options.config_file import dump_config

    config = TrainConfig(
        model=ModelOptions(model=str(models("llama")), dtype="float32", device="cpu"),
        data=DataOptions(data=(str(rows),), chat_template="none"),
    )
    (tmp_path / "config.toml").write_text(dump_config(config))
    attach_lora(tiny_model("llama"), target_modules=["v_proj"]).save_pretrained(tmp_path / "adapter")
    report = verify_command(VerifyOptions(verify=VerifyRunOptions(run=tmp_path, max_tokens=64)))
    lines = [json.loads(line) for line in (tmp_path / "proofs.jsonl").read_text().splitlines()]
    assert [line["proof"] for line in lines] == [proof.case for proof in report.of(MODEL)]
    assert any("v_proj" in line["proof"] for line in lines)


def test_the_loss_of_decisions_is_proved_and_a_wrong_one_is_found(models, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    texts = [("the sky", "team json", 0), ("a list", "team user", 2), ("what", "team json", 1)]
    rows.write_text("".join(json.dumps({"text": t, "team": team, "mood": mood}) + "\n" for t, team, mood in texts))
    asked = options(models("llama"), rows)
    asked = replace(asked, data=replace(asked.data, state="text", question={"team": "Which team?", "mood": "Mood?"}))
    report = verify(asked)
    assert report.passed
    (loss,) = (proof for proof in report.of(MODEL) if proof.case == "loss of decisions = reference, float64")
    assert loss.error < 1e-12
    right = decide_objective.decide_backward
    monkeypatch.setattr(
        decide_objective,
        "decide_backward",
        lambda d_y, saved: right(d_y, saved._replace(targets=saved.targets.flip(0))),
    )
    failed = next(proof for proof in verify(asked).failed(MODEL) if "d_x" in proof.case)
    assert failed.detail == "worst: d_x of the head"


def example(length, supervised):
    flags = np.zeros(length, dtype=bool)
    flags[list(supervised)] = True
    return Example(np.arange(length, dtype=np.int32), flags, f"row of {length}")


def test_long_documents_are_cut_to_what_leads_to_their_last_supervised_token():
    (first, second) = choose_documents([example(100, [40, 90]), example(50, [3])], 20)
    assert first.input_ids.tolist() == list(range(81, 91))
    assert first.supervised.tolist() == [False] * 9 + [True]
    assert second.input_ids.tolist() == [0, 1, 2, 3]


def test_documents_are_taken_until_there_are_enough():
    short = [example(6, [5]) for _ in range(10)]
    assert len(choose_documents(short, 20)) == 3
    assert len(choose_documents(short[:1], 20)) == 1
    assert choose_documents([example(6, [])], 20) == []


def test_a_measured_nan_does_not_pass():
    assert not statement("x", math.nan, 1.0).passed
    assert statement("x", 0.5, 1.0).passed


def test_a_model_without_gradients_by_hand_gets_a_list_of_what_can_be_proved(tmp_path):
    base = save_tiny(tiny_model("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="does not know how to compute") as raised:
        verify(VerifyOptions(model=VerifiedModelOptions(model=str(base))))
    assert "verify without --model" in str(raised.value) and "--engine" not in str(raised.value)
