"""What llama.cpp cannot compute is refused before it is written, and a window it does not have bounds the context."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from transformers import AutoTokenizer

from backhand.cli.main import main
from backhand.errors import ArtifactError
from backhand.interop.merging import merge_command
from backhand.interop.options import MergeOptions
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading import open_model
from backhand.nn.loading.gguf_file import GGUFFile
from tests.support.llama_cpp import LlamaCpp
from tests.support.tiny_adapters import adapted, save_tiny_adapter
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import VOCAB_SIZE, WINDOW, full_logits, save_tiny, tiny_documents, tiny_model

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.5, 2.0, 3.0, 1.0, 1.0, 4.0, 2.0],
    "long_factor": [1.5, 2.0, 3.0, 1.0, 1.0, 4.0, 2.0],
    "attention_factor": 1.0,
    "original_max_position_embeddings": 16,
}
_LOCAL = {"rope_type": "default", "rope_theta": 1e4}
_OTHER_LOCAL = {"rope_type": "default", "rope_theta": 1e3}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}


def merge(model: Any, folder: Path, change_tokenizer: Callable[[Any], object] | None = None) -> Path:
    """Merge a tiny adapter into a GGUF file made from a Hugging Face directory."""
    base, adapter = save_tiny(model, folder / "base"), save_tiny_adapter(model, folder / "adapter")
    if change_tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        change_tokenizer(tokenizer)
        tokenizer.save_pretrained(base)
    return merge_command(MergeOptions(adapter=adapter, output=folder / "merged.gguf", model=str(base)))


def difference(model: Any, length: int, peer: LlamaCpp) -> float:
    """Between log-probabilities after a prompt, of the model with the adapter and of llama.cpp."""
    prompt = tiny_documents([length], vocab_size=300)[0]
    ours = full_logits(adapted(model), prompt)[-1].double().log_softmax(-1)
    return float((ours - peer.log_probabilities(prompt.tolist(), VOCAB_SIZE)).abs().max())


@pytest.mark.parametrize(
    ("variant", "overrides", "named"),
    [
        ("qwen2", {}, "84 wide together where the model is 60"),
        ("qwen2", {"head_dim": 10, "rope_parameters": _LLAMA3}, "llama3 rope scaling"),
        ("qwen3", {"rope_parameters": _LLAMA3}, "llama3 rope scaling"),
        ("qwen3", {"rope_parameters": _LONGROPE}, "longrope rope scaling"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("olmo2", {"attention_bias": False}, "84 wide together where the model is 60"),
        ("olmo2", {"head_dim": 10}, "attention_bias"),
        (
            "olmo2",
            {"head_dim": 10, "attention_bias": False, "tie_word_embeddings": True},
            "a head that is the embedding",
        ),
        (
            "olmo3",
            {"head_dim": 10, "layer_types": ["full_attention"] * 4 + ["sliding_attention"]},
            "every fourth layer",
        ),
        (
            "olmo3",
            {"head_dim": 10, "rope_parameters": {"full_attention": _LOCAL, "sliding_attention": _OTHER_LOCAL}},
            "sliding layers' own",
        ),
        ("exaone4-full", {}, "84 wide together where the model is 60"),
        ("lfm2", {}, "84 wide together where the model is 60"),
        ("qwen3_5_text", {}, "an epsilon of its own, 1e-06"),
        ("qwen3_5_text", {"rms_norm_eps": 1e-6, "linear_value_head_dim": 12}, "another width than key heads"),
        ("qwen3_5_text", {"rms_norm_eps": 1e-6, "attention_bias": True}, "attention_bias"),
        ("exaone4", {}, "a sliding window in models of other than 64 layers"),
        ("exaone4", {"layer_types": ["full_attention"] * 4 + ["sliding_attention"]}, "every fourth layer"),
        ("glm", {}, "84 wide together where the model is 60"),
        ("glm4", {"rope_parameters": {**_LLAMA3, "partial_rotary_factor": 0.6}}, "llama3 rope scaling"),
        ("bamba", {}, "biases of the projections around Mamba-2"),
        ("bamba", {"attn_layer_indices": [0, 1, 2]}, "a Bamba without Mamba-2"),
        ("phi3", {"head_dim": 10}, "60 wide together where the model is 84"),
        ("llama", {"rope_parameters": {**_LONGROPE, "attention_factor": 1.2}}, "an attention factor"),
        ("llama", {"rope_parameters": {**_LONGROPE, "short_factor": [1.0] * 7}}, "with two lists"),
        ("qwen3", {"rope_parameters": {**_YARN, "truncate": False}}, "without truncate"),
        ("qwen3", {"rope_parameters": {**_YARN, "beta_fast": 16.0}}, "betas other than 32 and 1"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1]}, "other than every fourth"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, "sliding window"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window"),
        ("gemma3_text", {"query_pre_attn_scalar": 14, "attention_bias": True}, "attention_bias"),
        ("gemma4-keys", {}, "attention_bias"),
        ("gemma4_text", {}, "other layers than the last two that have their own"),
        ("gemma4_text", {"num_kv_shared_layers": 3, "vocab_size_per_layer_input": 400}, "another number of tokens"),
        (
            "gemma3_text",
            {
                "query_pre_attn_scalar": 14,
                "rope_parameters": {"full_attention": _LLAMA3, "sliding_attention": _LOCAL},
            },
            "llama3 rope scaling",
        ),
    ],
)
def test_what_an_architecture_does_not_have_is_refused(
    variant: str, overrides: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"llama\.cpp cannot compute") as raised:
        merge(tiny_model(variant, **overrides), tmp_path)
    assert named in str(raised.value) and "Hugging Face directory" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("rule", [_LLAMA3, _LONGROPE], ids=["llama3", "longrope"])
def test_what_llama_files_have_of_it_is_computed_alike(rule: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("llama", rope_parameters=rule, attention_bias=True, head_dim=14)
    assert difference(model, 33, LlamaCpp(merge(model, tmp_path))) < 1e-4


@pytest.mark.parametrize(("variant", "architecture"), [("mistral", "llama"), ("phi3", "phi3")])
def test_a_file_states_no_more_context_than_the_window_that_llama_cpp_does_not_have(
    variant: str, architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(variant, sliding_window=WINDOW)
    output = merge(model, tmp_path)
    assert f"a context of {WINDOW} tokens" in capsys.readouterr().out
    assert GGUFFile(output).value(f"{architecture}.context_length") == WINDOW
    peer = LlamaCpp(output)
    assert difference(model, WINDOW - 1, peer) < 1e-4
    with pytest.raises(HTTPError):
        difference(model, WINDOW + 1, peer)
    # Here the window in the file counts.
    assert {layer.window for layer in decoder_config(open_model(output).config).layers} == {WINDOW}
    prompt = tiny_documents([33])[0]
    found = Decoder.from_source(open_model(output), dtype=torch.float32).logits(prompt)
    torch.testing.assert_close(found, full_logits(adapted(model), prompt), rtol=1e-4, atol=1e-4)


def test_angles_that_depend_on_the_length_are_said_to_go_by_the_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("phi3-longrope", original_max_position_embeddings=256, max_position_embeddings=1024)
    output = merge(model, tmp_path)
    assert "-c 256" in " ".join(capsys.readouterr().out.split())
    short, long = LlamaCpp(output), LlamaCpp(output, context=512)
    assert difference(model, 200, short) < 1e-4
    assert difference(model, 200, long) > 0.1
    assert difference(model, 257, long) < 1e-4


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("mistral", sliding_window=128)
    output = merge(model, tmp_path)
    assert "sliding window" not in capsys.readouterr().out
    assert GGUFFile(output).value("llama.context_length") == 128
    assert difference(model, 33, LlamaCpp(output)) < 1e-4


@pytest.mark.parametrize("command", [["merge"], ["export", "--to", "gguf"], ["export", "--to", "ollama"]])
@pytest.mark.parametrize("gguf", [False, True], ids=["directory", "gguf"])
def test_every_way_to_llama_cpp_says_so(
    command: list[str], gguf: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("mistral")
    adapter = save_tiny_adapter(model, tmp_path / "adapter")
    extra = {"llama.attention.sliding_window": WINDOW}
    base = write_tiny_gguf(model, tmp_path / "b.gguf", extra=extra) if gguf else save_tiny(model, tmp_path / "base")
    output = tmp_path / ("output" if "ollama" in command else "output.gguf")
    assert main([*command, "--model", str(base), "--adapter", str(adapter), "--output", str(output)]) == 0
    cut = command == ["merge"] and not gguf
    said = f"a context of {WINDOW} tokens" if cut else f"texts of more than {WINDOW} tokens"
    assert said in " ".join(capsys.readouterr().out.split())
    if not cut and "ollama" not in command:  # what it is about
        plain = write_tiny_gguf(model, tmp_path / "plain.gguf")
        peer = LlamaCpp(output) if command == ["merge"] else LlamaCpp(plain, adapter=output)
        assert difference(model, WINDOW, peer) < 1e-4
        assert difference(model, 33, peer) > 0.1


def test_added_tokens_without_a_row_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def add(tokenizer: Any) -> None:
        tokenizer.add_special_tokens({"pad_token": "<added 59>"})
        tokenizer.add_tokens([f"<added {number}>" for number in range(60)], special_tokens=True)

    model = tiny_model("llama")
    output = merge(model, tmp_path, add)
    before = len(open_model(save_tiny(model, tmp_path / "plain")).tokenizer())
    without_row = before + 60 - VOCAB_SIZE
    assert f"{without_row} tokens without a row in the model are not in the file" in capsys.readouterr().out
    peer = LlamaCpp(output)
    assert difference(model, 20, peer) < 1e-4
    tokenizer = open_model(tmp_path / "base").tokenizer()
    for text in ("the user asks", "1234 names\n\n", "<added 59>the user"):
        assert peer.token_ids(text) == list(tokenizer(text)["input_ids"])


def test_no_other_token_may_be_without_a_row(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="rows for them"):
        merge(tiny_model("llama", vocab_size=290), tmp_path / "smaller")

    def end(tokenizer: Any) -> None:
        tokenizer.add_tokens([f"<added {number}>" for number in range(60)], special_tokens=True)
        tokenizer.add_special_tokens({"eos_token": "<the end>"})

    with pytest.raises(ArtifactError, match="rows for them"):
        merge(tiny_model("llama"), tmp_path / "end", end)


def test_a_pad_token_that_the_tokenizer_alone_names_is_no_obstacle(tmp_path: Path) -> None:
    output = merge(tiny_model("llama", pad_token_id=None), tmp_path)
    assert open_model(output).config["pad_token_id"] is not None
