"""Every command: name, one sentence, an example that works, and its function. The README lists them from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        name: as typed.
        summary: what it does, in one sentence.
        example: a complete command line that works as it stands (with the user's own rows in rows.jsonl).
        target: `module:function` that cyclopts parses the command line for; imported when the command is named.
    """

    name: str
    summary: str
    example: str
    target: str


COMMANDS = (
    Command(
        "train",
        "Fine-tune a language model on rows of text or chat, and leave an adapter that PEFT loads.",
        "backhand train --data rows.jsonl --output runs/mine",
        "backhand.cli.train:train",
    ),
    Command(
        "plan",
        "Tell what a run will take in memory and time, and how it will be cut to fit, before it is made.",
        "backhand plan --data rows.jsonl",
        "backhand.cli.plan:plan",
    ),
    Command(
        "lint",
        "Look at rows as a model's tokenizer and chat template read them, and name every problem with its remedy.",
        "backhand lint --data rows.jsonl",
        "backhand.cli.lint:lint",
    ),
    Command(
        "evaluate",
        "Measure loss, perplexity and exact match on rows, for the base model and with an adapter.",
        "backhand evaluate --data rows.jsonl --adapter runs/mine/adapter",
        "backhand.cli.evaluate:evaluate",
    ),
    Command(
        "generate",
        "Answer a prompt, or a whole file of them, by the base model or with an adapter.",
        'backhand generate --adapter runs/mine/adapter --prompt "What is the capital of France?"',
        "backhand.cli.generate:generate",
    ),
    Command(
        "chat",
        "Talk with the base model or with an adapter.",
        "backhand chat --adapter runs/mine/adapter",
        "backhand.cli.generate:chat",
    ),
    Command(
        "verify",
        "Prove every gradient against autograd and finite differences: of the ops, or of your own model on your rows.",
        "backhand verify --op lora_linear",
        "backhand.cli.verify:verify",
    ),
    Command(
        "merge",
        "Fold an adapter into its base: a model of its own, proved against base and adapter.",
        "backhand merge --adapter runs/mine/adapter --output runs/mine/merged",
        "backhand.cli.export:merge",
    ),
    Command(
        "export",
        "Convert an adapter, or the merged model, for PEFT, vLLM, llama.cpp, Ollama, MLX, or diffusion programs.",
        "backhand export --adapter runs/mine/adapter --to gguf --output runs/mine/adapter.gguf",
        "backhand.cli.export:export",
    ),
    Command(
        "sine",
        "The experiment this project comes from: a net learns a sine, an adapter goes on from there, all by hand.",
        "backhand sine --check --output runs/sine",
        "backhand.cli.sine:sine",
    ),
    Command(
        "paper",
        "The LoRA paper's own findings on your adapters: subspaces, amplification, merging, memory, ranks.",
        "backhand paper --adapter runs/mine/adapter --output runs/paper",
        "backhand.cli.paper:paper",
    ),
    Command(
        "combine",
        "Add, average, subtract, concatenate, merge or reduce adapters, exactly, or saying what is lost.",
        "backhand combine add runs/one/adapter runs/two/adapter --output runs/both",
        "backhand.cli.combine:combine",
    ),
    Command(
        "inspect",
        "Show what is in an adapter: ranks, sizes, singular values, and how much of the rank is used.",
        "backhand inspect runs/mine/adapter",
        "backhand.cli.inspect:inspect",
    ),
    Command(
        "diff",
        "Compare two adapters module by module: the norm of the difference, and the angles between their subspaces.",
        "backhand diff runs/one/adapter runs/two/adapter",
        "backhand.cli.diff:diff",
    ),
    Command(
        "compress",
        "Give every module of an adapter the smallest rank that keeps to an error.",
        "backhand compress runs/mine/adapter --error 0.05 --output runs/small",
        "backhand.cli.compress:compress",
    ),
    Command(
        "report",
        "One self-contained page about a run, or about several side by side.",
        "backhand report runs/mine",
        "backhand.cli.report:report",
    ),
    Command(
        "watch",
        "The report of a run while it trains, on this machine only, with a box to try a prompt on base and adapter.",
        "backhand watch runs/mine",
        "backhand.cli.watch:watch",
    ),
    Command(
        "demo",
        "The sine experiment, then SmolLM2 learns to turn sentences into strict JSON: answers before and after.",
        "backhand demo --output runs/demo",
        "backhand.cli.demo:demo",
    ),
)
