"""Commands that use an adapter after its training, in Backhand and in other programs.

The end of a run, its report, its page and `backhand export` take them from here. No command is given that refuses the
adapter, or that runs and does not give what the adapter was trained for:

                     other programs
    answers          PEFT, llama.cpp, vLLM, Ollama
    decide           PEFT, and llama.cpp with a decision model
    embed            sentence-transformers, and llama.cpp with a merged model, whose file names the pooling
    rank, decoder    PEFT, and llama.cpp with a merged model of an architecture that has a score head there
    rank, encoder    sentence-transformers, PEFT
    classify         PEFT; GGUF files have no place for the head

No program but PEFT reads DoRA, modules trained in full or token rows: they are merged into the base.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import NamedTuple

from backhand.data.options import system_option
from backhand.nn.model_options import peft_code

SCORED_DECODERS = ("qwen3",)
"""Architectures of decoders for which llama.cpp has a score head."""
_LLAMA_CPP = {"decide": "llama-server", "embed": "llama-server --embedding", "rank": "llama-server --reranking"}
OWN_COMMANDS = {
    "decide": "backhand decide {} --state '…'",
    "embed": "backhand embed {} --data FILE --output vectors.npy",
    "rank": "backhand rank {} --query '…' --data FILE",
    "classify": "backhand classify {} --text '…'",
}
"""Commands of adapters that do not generate text, by objective, with a place for `TrainedAdapter.given`."""
_MAX_LORA_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's option, of which the first is the default."""


class Use(NamedTuple):
    """Commands or code for one program."""

    program: str
    text: str
    loads_base: bool = False  # the program loads the base in full precision, even if training used quantized weights


def sentence_transformers_code(directory: str, *, vectors: bool) -> str:
    """Return Python code that loads an exported directory: a model for vectors, or else one for rankings."""
    kind = "SentenceTransformer" if vectors else "CrossEncoder"
    return f"from sentence_transformers import {kind}\n\nmodel = {kind}({directory!r})"


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter and its training, as far as the commands depend on them."""

    objective: str  # value of `--objective`
    model: str  # value of `--model`
    adapter: str  # its directory
    trains_head: bool = False  # it has a head on hidden states
    labelled: bool = False  # the answers of its rows are labels
    asking: str = " --prompt '…'"  # options of `generate` for a prompt like those of training
    system: str | None = None  # system message of all rows
    hub_id: str | None = None  # of the base, None if it is not on the hub
    file: str | None = None  # GGUF file of the base, None for a directory
    architecture: str | None = ""  # of the base in GGUF files: None if it has none, empty if it is not known
    form: str = "factors"  # other programs than PEFT read its `factors`, only a `merged` model, or (empty) nothing
    rank: int = 0  # the largest one
    uniform: bool = True  # all modules have one rank and one scaling
    has_template: bool = True  # the base has a chat template, and the adapter was trained with it

    @property
    def given(self) -> str:
        """Options that name base and adapter."""
        return f"--model {shlex.quote(self.model)} --adapter {shlex.quote(self.adapter)}"

    @property
    def base(self) -> str:
        """Name of the base for other programs: on the hub if it is there, else its file or the value of `--model`."""
        return self.hub_id or self.file or self.model

    @property
    def vllm_reads(self) -> bool:
        """True if vLLM reads the adapter as it is, next to its base."""
        answers = not self.trains_head and self.objective not in _LLAMA_CPP
        return answers and self.base != self.file and self.form == "factors" and self.uniform

    def backhand(self) -> list[str]:
        """Return Backhand's own commands, the most useful one first."""
        if self.objective in OWN_COMMANDS:
            return [OWN_COMMANDS[self.objective].format(self.given)]
        labels = " --labels auto" if self.labelled else ""
        answer = f"backhand generate {self.given}{labels} --compare{self.asking}"
        if self.labelled or not self.has_template:
            return [answer]
        return [answer, f"backhand chat {self.given}{system_option(self.system)}"]

    def exports(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return `--to` and the further options of each export that some program uses as the adapter was trained."""
        exports: list[tuple[str, tuple[str, ...]]] = []
        if self.form == "factors" or self.trains_head:  # PEFT reads the others as training wrote them
            exports.append(("peft", ()))
        merge = ("--merge",)
        if self.form and (self.objective == "embed" or (self.objective == "rank" and self.trains_head)):
            exports.append(("sentence-transformers", merge))
        if not self.form or self.trains_head or self.architecture is None:
            return exports
        if self.objective == "decide":
            return [*exports, ("gguf", ("--decision",))]
        if self.objective == "rank":
            return [*exports, *([("gguf", merge)] if self.architecture in SCORED_DECODERS else [])]
        if self.form == "factors" and self.objective != "embed":
            exports += [("gguf", ()), ("ollama", ())]
        return [*exports, ("gguf", merge), ("ollama", merge)]

    def export(self) -> str:
        """Return the command of one export, for llama.cpp if it reads the adapter; "" if PEFT alone does, as it is."""
        exports = sorted(self.exports(), key=lambda one: one[0] != "gguf")
        if not exports:
            return f"backhand merge {self.given} --output …" if self.form else ""
        to, options = exports[0]
        return " ".join(("backhand export", self.given, *options, f"--to {to} --output …"))

    def llama_cpp(self) -> list[str]:
        """Return the commands that export the adapter for llama.cpp and run it there; empty if there are none."""
        export = f"backhand export {self.given}"
        exports = [options for to, options in self.exports() if to == "gguf"]
        if not exports:
            return []
        if self.file is not None and () in exports:
            files = f"-m {shlex.quote(self.file)} --lora adapter.gguf"
            return [f"{export} --to gguf --output adapter.gguf", self.in_llama_cpp(files)]
        if self.objective == "decide":
            options, file = "--to gguf --decision", "decision.gguf"
        else:
            options, file = "--merge --to gguf", "merged.gguf"
        return [f"{export} {options} --output {file}", self.in_llama_cpp(f"-m {file}")]

    def in_llama_cpp(self, files: str) -> str:
        """Return the command of llama.cpp that runs these files, given as its options."""
        if self.objective in _LLAMA_CPP:
            return f"{_LLAMA_CPP[self.objective]} {files}"
        # llama-cli always opens a conversation, and llama-completion does so where the model has a chat template.
        return f"llama-cli {files}" if self.has_template else f"llama-completion -no-cnv {files} -p '…'"

    def in_ollama(self, directory: str) -> tuple[str, str]:
        """Return the commands that create a model from an exported directory, quoted for a shell, and that use it."""
        use = "ollama run mine" + ("" if self.has_template else " '…'")
        if self.objective == "embed":
            use = """curl http://localhost:11434/api/embed -d '{"model": "mine", "input": "…"}'"""
        return f"ollama create mine -f {directory}/Modelfile", use

    def programs(self) -> list[Use]:
        """Return the uses in all programs, Backhand first."""
        uses = [Use("Backhand", "\n".join(self.backhand()))]
        exports = self.exports()
        if any(to == "sentence-transformers" for to, _ in exports):
            code = sentence_transformers_code("merged", vectors=self.objective == "embed")
            export = f"backhand export {self.given} --merge --to sentence-transformers --output merged"
            uses.append(Use("sentence-transformers", f"{export}\n\n{code}"))
        base = self.base
        if self.objective != "embed":
            auto_class = "AutoModelForSequenceClassification" if self.trains_head else "AutoModelForCausalLM"
            uses.append(Use("PEFT", peft_code(auto_class, base, self.adapter, repr), loads_base=base != self.file))
        if commands := self.llama_cpp():
            uses.append(Use("llama.cpp", "\n".join(commands)))
        if self.trains_head or self.objective in _LLAMA_CPP:
            return uses
        if self.vllm_reads:
            serve = f"vllm serve {shlex.quote(base)} --enable-lora --lora-modules mine={shlex.quote(self.adapter)}"
            most = next((one for one in _MAX_LORA_RANKS if one >= self.rank), self.rank)
            serve += f" --max-lora-rank {most}" if most > _MAX_LORA_RANKS[0] else ""
            uses.append(Use("vLLM", serve, loads_base=True))
        elif self.form and self.architecture is not None:
            uses.append(Use("vLLM", f"backhand merge {self.given} --output merged\nvllm serve merged"))
        if of_ollama := [options for to, options in exports if to == "ollama"]:
            export = " ".join(("backhand export", self.given, *of_ollama[0], "--to ollama --output ollama"))
            uses.append(Use("Ollama", "\n".join((export, *self.in_ollama("ollama")))))
        return uses
