"""Commands after training: each program gets what it accepts, and no program that cannot use the adapter is named."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from backhand.runs.uses import TrainedAdapter


@pytest.mark.parametrize(
    ("objective", "facts", "programs", "last"),
    [
        ("sft", {}, "PEFT, llama.cpp, vLLM, Ollama", "ollama run mine"),
        ("dpo", {"file": "/a/b.gguf", "hub_id": "a/b"}, "PEFT, llama.cpp, vLLM, Ollama", "ollama run mine"),
        ("sft", {"architecture": None}, "PEFT, vLLM", "vllm serve m --enable-lora --lora-modules mine=a"),
        ("sft", {"form": "merged"}, "PEFT, llama.cpp, vLLM, Ollama", "ollama run mine"),
        ("sft", {"form": ""}, "PEFT", "model = PeftModel.from_pretrained(base, 'a')"),
        ("sft", {"form": "merged", "architecture": None}, "PEFT", "model = PeftModel.from_pretrained(base, 'a')"),
        ("embed", {"architecture": None}, "sentence-transformers", "model = SentenceTransformer('merged')"),
        ("decide", {}, "PEFT, llama.cpp", "llama-server -m decision.gguf"),
        ("embed", {}, "sentence-transformers, llama.cpp", "llama-server --embedding -m merged.gguf"),
        ("embed", {"file": "b.gguf"}, "sentence-transformers, llama.cpp", "llama-server --embedding -m merged.gguf"),
        ("rank", {"architecture": "qwen3"}, "PEFT, llama.cpp", "llama-server --reranking -m merged.gguf"),
        ("rank", {"architecture": "llama"}, "PEFT", "model = PeftModel.from_pretrained(base, 'a')"),
        (
            "rank",
            {"trains_head": True},
            "sentence-transformers, PEFT",
            "model = PeftModel.from_pretrained(base, adapter)",
        ),
        ("classify", {"trains_head": True}, "PEFT", "model = PeftModel.from_pretrained(base, adapter)"),
    ],
)
def test_the_programs_of_each_objective(objective: str, facts: dict[str, Any], programs: str, last: str) -> None:
    trained = TrainedAdapter(objective, "m", "a", **facts)
    uses = trained.programs()
    assert ", ".join(use.program for use in uses[1:]) == programs
    assert uses[-1].text.splitlines()[-1] == last
    peft = [use.text for use in uses if use.program == "PEFT"]
    for code in peft:
        ast.parse(code)
        assert ("AutoModelForSequenceClassification" in code) == bool(facts.get("trains_head"))
    command = objective if objective in ("decide", "embed", "rank", "classify") else "generate"
    assert uses[0].text.startswith(f"backhand {command} --model m --adapter a ")


def test_vllm_reads_other_adapters_only_merged_and_large_ranks_only_with_a_limit() -> None:
    def vllm(**facts: Any) -> str:
        return next(use.text for use in TrainedAdapter("sft", "m", "a", **facts).programs() if use.program == "vLLM")

    for facts in ({"file": "/a/b.gguf"}, {"form": "merged"}, {"uniform": False}):
        assert vllm(**facts).endswith("--output merged\nvllm serve merged")
        assert not TrainedAdapter("sft", "m", "a", **facts).vllm_reads
    assert TrainedAdapter("sft", "m", "a").vllm_reads
    assert not TrainedAdapter("classify", "m", "a", trains_head=True).vllm_reads
    assert vllm(rank=17).endswith("--lora-modules mine=a --max-lora-rank 32") and vllm(rank=16).endswith("mine=a")


def test_more_than_factors_is_exported_merged() -> None:
    trained = TrainedAdapter("sft", "m", "a", file="b.gguf", form="merged")
    assert trained.llama_cpp()[1] == "llama-cli -m merged.gguf"
    assert "--adapter a --merge --to ollama" in trained.programs()[-1].text


@pytest.mark.parametrize(
    ("objective", "facts", "exports"),
    [
        ("sft", {}, "peft, gguf, ollama, gguf --merge, ollama --merge"),
        ("sft", {"form": "merged"}, "gguf --merge, ollama --merge"),
        ("sft", {"form": ""}, ""),
        ("decide", {}, "peft, gguf --decision"),
        ("decide", {"architecture": None}, "peft"),
        ("embed", {}, "peft, sentence-transformers --merge, gguf --merge, ollama --merge"),
        ("rank", {"architecture": "llama"}, "peft"),
        ("rank", {"architecture": "qwen3"}, "peft, gguf --merge"),
        ("rank", {"trains_head": True, "form": "merged"}, "peft, sentence-transformers --merge"),
        ("classify", {"trains_head": True}, "peft"),
    ],
)
def test_the_exports_of_each_objective(objective: str, facts: dict[str, Any], exports: str) -> None:
    trained = TrainedAdapter(objective, "m", "a", **facts)
    assert ", ".join(" ".join((to, *options)) for to, options in trained.exports()) == exports


def test_a_chat_needs_a_template_and_free_answers() -> None:
    trained = TrainedAdapter("sft", "m", "a", system="Be kind.")
    assert trained.backhand()[1] == "backhand chat --model m --adapter a --system 'Be kind.'"
    for facts in ({"labelled": True}, {"has_template": False}):
        assert len(TrainedAdapter("sft", "m", "a", **facts).backhand()) == 1


def test_a_text_is_completed_without_a_template() -> None:
    trained = TrainedAdapter("sft", "m", "a", file="b.gguf", has_template=False)
    assert trained.llama_cpp()[1] == "llama-completion -no-cnv -m b.gguf --lora adapter.gguf -p '…'"
    assert trained.programs()[-1].text.endswith("\nollama run mine '…'")
