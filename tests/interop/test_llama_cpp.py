"""What leaves Backhand as GGUF means in llama.cpp what it means here; an adapter with unpermuted q and k does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as StorageType
from torch import Tensor

from backhand.adapters.module_factors import parameters_of
from backhand.errors import ArtifactError
from backhand.interop import gguf_adapter_writer
from backhand.interop.command import export_command
from backhand.interop.gguf_adapter_writer import write_gguf_adapter
from backhand.interop.merging import merge_command
from backhand.interop.opened_adapter import open_adapter
from backhand.interop.options import ExportOptions, MergeOptions
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.nn.loading.gguf_layouts import StoredSizes
from backhand.nn.loading.gguf_model import GGUFModel
from tests.support import tiny_gguf
from tests.support.boundary_tokenizers import spaced_tokenizer
from tests.support.llama_cpp import FAMILIES, LlamaCpp
from tests.support.odd_texts import ODD_TEXTS
from tests.support.tiny_adapters import SCALINGS, save_tiny_adapter
from tests.support.tiny_gguf import rewritten, write_tiny_gguf, write_tiny_gguf_with_prediction
from tests.support.tiny_models import VOCAB_SIZE, save_tiny, tiny_documents, tiny_model

_LENGTHS = (1, 9, 20, 33)
# Whose adapters say nothing that others do not.
_LEFT_OUT = ("llama-tied", "llama-linear", "tinyllama")
_FAMILIES = {name: sizes for name, sizes in FAMILIES.items() if name not in _LEFT_OUT}
_FAMILIES["glm"] = _FAMILIES["glm"] | {"attention_bias": True}
_FUSED = ("phi3", "phi3-longrope")


def _prompt() -> Tensor:
    return tiny_documents([max(_LENGTHS)], vocab_size=300)[0]


def _ours(model: Path, adapter: Path | None) -> Tensor:
    """(tokens, vocab) log-probabilities, float64."""
    decoder = Decoder.from_source(open_model(model), dtype=torch.float32)
    if adapter is not None:
        opened = open_adapter(str(model), adapter, force_base=False)
        decoder.attach(parameters_of(opened.factors, opened.source.config["model_type"]))
    return decoder.logits(_prompt()).double().log_softmax(-1)


def _largest_difference(ours: Tensor, peer: LlamaCpp) -> float:
    ids = _prompt().tolist()
    return max(
        float((ours[length - 1] - peer.log_probabilities(ids[:length], VOCAB_SIZE)).abs().max()) for length in _LENGTHS
    )


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_gguf_adapter_means_the_same_in_llama_cpp(scaling: str, tiny: Any, tmp_path: Path) -> None:
    adapter = tiny.adapters[scaling]
    output = tmp_path / "adapter.gguf"
    export_command(ExportOptions(adapter=adapter, to="gguf", output=output, model=str(tiny.directory), quiet=True))
    ours = _ours(tiny.directory, adapter)
    assert _largest_difference(ours, LlamaCpp(tiny.gguf, adapter=output)) < 1e-4
    assert float((ours - _ours(tiny.directory, None)).abs().max()) > 1  # the adapter does something


@pytest.mark.parametrize("family", _FAMILIES)
def test_so_does_that_of_every_family(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **_FAMILIES[family])
    base, gguf = save_tiny(model, tmp_path / "base"), write_tiny_gguf(model, tmp_path / "base.gguf")
    lora = SCALINGS["every-pattern"]
    if family == "gemma4_text":
        lora = lora | {"exclude_modules": ["per_layer_model_projection"]}
    if family in _FUSED:
        lora = lora | {"rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {"qkv_proj": 2.0}}
    adapter = save_tiny_adapter(model, tmp_path / "adapter", **lora)
    output = tmp_path / "adapter.gguf"
    export_command(ExportOptions(adapter=adapter, to="gguf", output=output, model=str(base), quiet=True))
    bound = 2e-2 if family.startswith("gemma") else 1e-4  # ggml's GELU is a table of float16
    assert _largest_difference(_ours(base, adapter), LlamaCpp(gguf, adapter=output)) < bound


def test_a_head_of_its_own_is_adapted_there_too(tmp_path: Path) -> None:
    model = tiny_model("llama")
    base, gguf = save_tiny(model, tmp_path / "base"), write_tiny_gguf(model, tmp_path / "base.gguf")
    adapter = save_tiny_adapter(model, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    output = tmp_path / "adapter.gguf"
    export_command(ExportOptions(adapter=adapter, to="gguf", output=output, model=str(base), quiet=True))
    assert _largest_difference(_ours(base, adapter), LlamaCpp(gguf, adapter=output)) < 1e-4


def test_so_is_an_embedding_of_its_own(tmp_path: Path) -> None:
    """Its lora_A lies transposed there. It comes back as it was."""
    model = tiny_model("llama")
    base, gguf = save_tiny(model, tmp_path / "base"), write_tiny_gguf(model, tmp_path / "base.gguf")
    lora, linear = SCALINGS["every-pattern"], ["v_proj", "q_proj", "k_proj"]
    adapter = save_tiny_adapter(model, tmp_path / "adapter", target_modules=["embed_tokens", *linear], **lora)
    output = tmp_path / "adapter.gguf"
    export_command(ExportOptions(adapter=adapter, to="gguf", output=output, model=str(base), quiet=True))
    ours = _ours(base, adapter)
    assert _largest_difference(ours, LlamaCpp(gguf, adapter=output)) < 1e-4
    assert float((_ours(base, output) - ours).abs().max()) < 1e-4
    without = save_tiny_adapter(
        model, tmp_path / "without", **(lora | {"target_modules": ["v_proj", "q_proj", "k_proj"]})
    )
    assert float((_ours(base, without) - ours).abs().max()) > 0.1  # the embedding's part does something


def test_without_the_permutation_of_q_and_k_it_answers_otherwise(tiny: Any, tmp_path: Path) -> None:
    adapter = tiny.adapters["plain"]
    opened = open_adapter(str(tiny.directory), adapter, force_base=False)
    path = tmp_path / "unpermuted.gguf"
    write_gguf_adapter(
        path, opened.factors, architecture="llama", sizes=StoredSizes(2), tied_head=True
    )  # pairs of one: as it is
    assert _largest_difference(_ours(tiny.directory, adapter), LlamaCpp(tiny.gguf, adapter=path)) > 0.05


@pytest.mark.parametrize("base", ["directory", "gguf"])
def test_a_merged_gguf_answers_in_llama_cpp_as_base_and_adapter_do_here(base: str, tiny: Any, tmp_path: Path) -> None:
    model, adapter = getattr(tiny, base), tiny.adapters["every-pattern"]
    output = tmp_path / "merged.gguf"
    merge_command(MergeOptions(adapter=adapter, output=output, model=str(model), quiet=True))
    assert _largest_difference(_ours(model, adapter), LlamaCpp(output)) < 1e-4


def test_so_does_one_whose_head_was_the_embedding(tiny: Any, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tiny.model, tmp_path / "adapter", target_modules=["lm_head", "up_proj"])
    output = tmp_path / "merged.gguf"
    merge_command(MergeOptions(adapter=adapter, output=output, model=str(tiny.gguf), quiet=True))
    assert _largest_difference(_ours(tiny.gguf, adapter), LlamaCpp(output)) < 1e-4


@pytest.mark.parametrize(
    "lora",
    [
        {"rank_pattern": {"input_linear": 3}, "alpha_pattern": {"output_linear": 5}},
        {"use_dora": True},
        {"modules_to_save": ["input_linear"], "target_modules": ["q_proj", "output_linear"]},
        {"target_modules": ["v_proj"]},
    ],
    ids=["factors", "dora", "in-full", "attention-alone"],
)
def test_a_merged_granite_4_is_a_granite_3_there(lora: dict[str, Any], tmp_path: Path) -> None:
    """With two tensors for one of its modules, whatever is trained in it."""
    model = tiny_model("granitemoehybrid")
    base, output = save_tiny(model, tmp_path / "base"), tmp_path / "merged.gguf"
    adapter = save_tiny_adapter(model, tmp_path / "adapter", alpha=10, **lora)
    merge_command(MergeOptions(adapter=adapter, output=output, model=str(base), quiet=True))
    decoder = Decoder.from_source(open_model(base), dtype=torch.float32)
    decoder.attach(open_adapter(str(base), adapter, force_base=False).loaded.parameters())
    ours = decoder.logits(_prompt()).double().log_softmax(-1)
    assert _largest_difference(ours, LlamaCpp(output)) < 1e-4
    assert float((ours - _ours(base, None)).abs().max()) > 0.1
    assert GGUFModel(output).config["model_type"] == "granite"


def test_a_granite_4_in_which_nothing_turns_is_left_to_llama_cpps_own_converter(tmp_path: Path) -> None:
    model = tiny_model("granite4-nope")
    base, adapter = save_tiny(model, tmp_path / "base"), save_tiny_adapter(model, tmp_path / "adapter", alpha=10)
    with pytest.raises(ArtifactError, match="without rotary embeddings") as raised:
        merge_command(MergeOptions(adapter=adapter, output=tmp_path / "m.gguf", model=str(base), quiet=True))
    assert "merge into a Hugging Face directory" in str(raised.value)
    assert not (tmp_path / "m.gguf").exists()


def test_a_granite_4s_adapter_comes_back_and_one_of_other_factors_does_not(tmp_path: Path) -> None:
    for variant in ("granite4-experts", "granitemoehybrid"):
        model, place = tiny_model(variant), tmp_path / variant
        base, adapter = save_tiny(model, place / "base"), save_tiny_adapter(model, place / "adapter", alpha=10)
        output = place / "adapter.gguf"
        export_command(ExportOptions(adapter=adapter, to="gguf", output=output, model=str(base), quiet=True))
        assert float((_ours(base, output) - _ours(base, adapter)).abs().max()) < 1e-4
    of_parts = save_tiny_adapter(tiny_model("granite"), tmp_path / "parts", alpha=10)
    factors = open_adapter(str(save_tiny(tiny_model("granite"), tmp_path / "g3")), of_parts, force_base=False).factors
    write_gguf_adapter(tmp_path / "parts.gguf", factors, architecture="granite", sizes=StoredSizes(14), tied_head=True)
    with pytest.raises(ArtifactError, match="gate and up are one module of this model"):
        open_adapter(str(base), tmp_path / "parts.gguf", force_base=True)


def test_a_bambas_adapter_comes_back_and_its_file_is_read_as_llama_cpp_computes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp's converter pairs features of whole heads, of which llama.cpp then rotates half: another model."""
    model = tiny_model("bamba", **_FAMILIES["bamba"])
    base, adapter = save_tiny(model, tmp_path / "base"), save_tiny_adapter(model, tmp_path / "adapter", alpha=10)
    output = tmp_path / "adapter.gguf"
    export_command(ExportOptions(adapter=adapter, to="gguf", output=output, model=str(base)))
    assert "give --merge, or train on the file" in capsys.readouterr().out
    assert float((_ours(base, output) - _ours(base, adapter)).abs().max()) < 1e-4
    monkeypatch.setattr(
        tiny_gguf, "interleaved_half", lambda values, width: tiny_gguf.interleaved(values, len(values) // width)
    )
    file = write_tiny_gguf(model, tmp_path / "converted.gguf")
    assert _largest_difference(_ours(file, None), LlamaCpp(file)) < 1e-4
    assert float((_ours(file, None) - _ours(base, None)).abs().max()) > 0.1
    merged = tmp_path / "merged.gguf"
    merge_command(MergeOptions(adapter=adapter, output=merged, model=str(file), quiet=True))
    assert _largest_difference(_ours(file, adapter), LlamaCpp(merged)) < 1e-4


def test_an_adapter_of_what_llama_cpp_multiplies_without_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be read there, and do nothing."""
    model = tiny_model("gemma4_text", **_FAMILIES["gemma4_text"])
    base, gguf = save_tiny(model, tmp_path / "base"), write_tiny_gguf(model, tmp_path / "base.gguf")
    adapter = save_tiny_adapter(model, tmp_path / "adapter", alpha=60, target_modules=["per_layer_model_projection"])
    output = tmp_path / "adapter.gguf"
    options = ExportOptions(adapter=adapter, to="gguf", output=output, model=str(base), quiet=True)
    with pytest.raises(ArtifactError, match="--exclude-modules per_layer_model_projection") as raised:
        export_command(options)
    assert "give --merge" in str(raised.value)
    monkeypatch.setattr(gguf_adapter_writer, "_obstacle", lambda *_: None)
    export_command(options)
    assert _largest_difference(_ours(base, None), LlamaCpp(gguf, adapter=output)) < 2e-2
    assert float((_ours(base, adapter) - _ours(base, None)).abs().max()) > 1


def test_a_gemma_4_file_becomes_a_merged_one(tmp_path: Path) -> None:
    """Whatever is adapted, and with keys that no layer reads."""
    model = tiny_model("gemma4_text", **_FAMILIES["gemma4_text"])
    unread = {"blk.3.attn_k.weight": np.ones((36, 60), dtype=np.float32)}
    base = rewritten(write_tiny_gguf(model, tmp_path / "plain.gguf"), tmp_path / "base.gguf", tensors=unread)
    adapter, output = save_tiny_adapter(model, tmp_path / "adapter", alpha=10), tmp_path / "merged.gguf"
    merge_command(MergeOptions(adapter=adapter, output=output, model=str(base), quiet=True))
    assert _largest_difference(_ours(base, adapter), LlamaCpp(output)) < 2e-2
    assert "blk.3.attn_k.weight" not in GGUFModel(output).metadata.tensors


@pytest.mark.parametrize("family", ["gemma3_text", "gemma4_text"])
def test_gemmas_own_vocabulary_gives_the_same_ids_there(family: str, tmp_path: Path) -> None:
    tokenizer = spaced_tokenizer()
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer)}
    sizes |= {"vocab_size_per_layer_input": len(tokenizer)} if family == "gemma4_text" else {}
    model = tiny_model(family, **_FAMILIES[family], **sizes)
    base, adapter = save_tiny(model, tmp_path / "base"), save_tiny_adapter(model, tmp_path / "adapter")
    tokenizer.save_pretrained(base)
    output = tmp_path / "merged.gguf"
    merge_command(MergeOptions(adapter=adapter, output=output, model=str(base), quiet=True))
    peer, ours = LlamaCpp(output), open_model(output).tokenizer()
    for text in (*ODD_TEXTS, "a\n\n\n\n\n\n b", "<bos> x<eos>"):
        ids = list(tokenizer(text)["input_ids"])
        assert peer.token_ids(text, add_special=True) == ids == list(ours(text)["input_ids"]), text


def test_one_whose_tokens_go_across_line_ends_is_refused(tmp_path: Path) -> None:
    """llama.cpp cuts there, and would give other ids."""
    tokenizer = spaced_tokenizer(across_lines=True)
    model = tiny_model("gemma3_text", query_pre_attn_scalar=14, vocab_size=len(tokenizer))
    base, adapter = save_tiny(model, tmp_path / "base"), save_tiny_adapter(model, tmp_path / "adapter")
    tokenizer.save_pretrained(base)
    with pytest.raises(ArtifactError, match="tokenizer cannot be written"):
        merge_command(MergeOptions(adapter=adapter, output=tmp_path / "m.gguf", model=str(base), quiet=True))


def test_blocks_that_predict_further_tokens_are_not_merged_and_not_missed(tmp_path: Path) -> None:
    """llama.cpp opens the base with its one block more, and the merged file without."""
    model = tiny_model("qwen3_5_text", rms_norm_eps=1e-6)
    base = write_tiny_gguf_with_prediction(model, tmp_path / "base.gguf")
    assert _largest_difference(_ours(base, None), LlamaCpp(base)) < 1e-4
    adapter, output = save_tiny_adapter(model, tmp_path / "adapter", alpha=10), tmp_path / "merged.gguf"
    merge_command(MergeOptions(adapter=adapter, output=output, model=str(base), quiet=True))
    assert _largest_difference(_ours(base, adapter), LlamaCpp(output)) < 1e-4


@pytest.mark.parametrize("family", _FAMILIES)
def test_a_directory_of_every_family_becomes_a_file_that_llama_cpp_computes_alike(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **_FAMILIES[family])
    base = save_tiny(model, tmp_path / "base")
    adapter = save_tiny_adapter(model, tmp_path / "adapter", alpha=10)
    output = tmp_path / "merged.gguf"
    merge_command(MergeOptions(adapter=adapter, output=output, model=str(base), quiet=True))
    bound = 2e-2 if family.startswith("gemma") else 1e-4
    peer = LlamaCpp(output)
    assert _largest_difference(_ours(base, adapter), peer) < bound
    tokenizer = open_model(base).tokenizer()
    for text in ("the user asks", "1234 names\n\n", "don't"):
        assert peer.token_ids(text) == list(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("targets", [{}, {"target_modules": ["v_proj"]}], ids=["experts", "attention alone"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granite4-experts"])
def test_a_file_with_stacks_of_experts_is_merged_into_one(family: str, targets: dict[str, Any], tmp_path: Path) -> None:
    """Stacks that the adapter leaves alone keep their bytes, and so do routers."""
    overrides = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96} | _FAMILIES[family]
    overrides |= {"moe_intermediate_size": 32} if family == "qwen3_moe" else {}
    overrides |= {"mamba_n_heads": 8, "mamba_d_head": 16} if family == "granite4-experts" else {}
    model = tiny_model(family, **overrides)
    base = write_tiny_gguf(model, tmp_path / "base.gguf", storage=StorageType.F16)
    adapter = save_tiny_adapter(model, tmp_path / "adapter", alpha=10, **targets)
    output = tmp_path / "merged.gguf"
    options = MergeOptions(adapter=adapter, output=output, model=str(base), dtype="auto", quiet=True, tolerance=0.05)
    merge_command(options)
    assert _largest_difference(_ours(base, adapter), LlamaCpp(output)) < 0.05
    before, after = GGUFModel(base), GGUFModel(output)
    assert before.metadata.tensors.keys() == after.metadata.tensors.keys()
    others = ("ssm_in", "ssm_out", "_shexp") if family == "granite4-experts" else ("_exps",)
    adapted = ("attn_v",) if targets else ("attn_q.", "attn_k.", "attn_v.", "attn_output", *others)
    for name in before.metadata.tensors:
        same = bool((before.bytes_of(name) == after.bytes_of(name)).all())
        assert same != any(part in name and not name.endswith("bias") for part in adapted), name


@pytest.mark.parametrize(
    ("variant", "overrides", "message"),
    [("qwen3_moe", {}, "layers without experts"), ("qwen3_moe-shares", {"decoder_sparse_step": 1}, "norm_topk_prob")],
)
def test_a_mixture_that_llama_cpp_lacks_is_no_file(
    variant: str, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = tiny_model(variant, **overrides)
    base, adapter = save_tiny(model, tmp_path / "base"), save_tiny_adapter(model, tmp_path / "adapter")
    options = MergeOptions(adapter=adapter, output=tmp_path / "merged.gguf", model=str(base), quiet=True)
    with pytest.raises(ArtifactError, match=message):
        merge_command(options)


def test_a_falcon_h1s_exported_adapter_belongs_to_files(tmp_path: Path) -> None:
    """There the multipliers are in the weights, so on the directory it would mean something else."""
    model = tiny_model("falcon_h1")
    base, adapter = save_tiny(model, tmp_path / "base"), save_tiny_adapter(model, tmp_path / "adapter", alpha=10)
    output = tmp_path / "adapter.gguf"
    export_command(ExportOptions(adapter=adapter, to="gguf", output=output, model=str(base), quiet=True))
    file = write_tiny_gguf(model, tmp_path / "base.gguf")
    assert float((_ours(file, output) - _ours(base, adapter)).abs().max()) < 1e-4
    with pytest.raises(ArtifactError, match="the adapter is for a GGUF file of this model"):
        open_adapter(str(base), output, force_base=False)
    tied = save_tiny(tiny_model("falcon_h1", tie_word_embeddings=True), tmp_path / "tied")
    with pytest.raises(ArtifactError, match="multipliers of the embedding and of logits with a tied head"):
        merge_command(MergeOptions(adapter=adapter, output=tmp_path / "no.gguf", model=str(tied), quiet=True))
