"""Table of commands: name, summary, example, options and function. The README lists them.

Modules are named as text, so that the options of a command are imported when the command is named, and its function,
with torch, when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from backhand.cli.entry import Command


def __getattr__(name: str) -> Any:
    """Return the function of a command; cyclopts imports it from this module when the command is named."""
    for entry in COMMANDS:
        if entry.name == name:
            from backhand.cli.command import command

            return command(entry)
    raise AttributeError(name)


def _run_of_adapter(options: Any) -> Path | None:
    from backhand.runs.directory import run_of

    return run_of(options.adapter)


def _tables(options: str) -> Callable[[Path], Any]:
    """Return a reader of options from the tables of a TOML file, as in a run's config.toml."""

    def load(path: Path) -> Any:
        from backhand.cli.command import imported
        from backhand.options.config_file import read_table, tables_as

        return tables_as(imported(options), read_table(path), str(path))

    return load


def _rows_of_config(path: Path) -> Any:
    """Read the rows, the model and the seed from a run's configuration; `lint` ignores its other options."""
    from backhand.data.options import LintOptions, LintRunOptions

    config = _tables(_TRAIN)(path)
    return LintOptions(LintRunOptions(model=config.model.model, seed=config.run.seed), config.data)


_TRAIN = "backhand.options.config:TrainConfig"
_SEARCH = "backhand.search.options:SearchConfig"
_PLAN = "backhand.options.command_options:PlanOptions"

COMMANDS = (
    Command(
        "train",
        "Fine-tune a language model on rows of text or chat, and write an adapter that PEFT loads.",
        "backhand train --data rows.jsonl --output runs/mine",
        _TRAIN,
        "backhand.report.train:train_command",
        file=_tables(_TRAIN),
        tell_typed=True,
    ),
    Command(
        "search",
        "Find the best learning rate, or any other options, with runs that stop early if they are not the best.",
        "backhand search --data rows.jsonl --eval-fraction 0.2 --output runs/search",
        _SEARCH,
        "backhand.search.command:search_command",
        file=_tables(_SEARCH),
        tell_typed=True,
    ),
    Command(
        "plan",
        "Estimate the memory and time of a run, and how its batches are divided to fit, before it starts.",
        "backhand plan --data rows.jsonl",
        _PLAN,
        "backhand.training.plan_command:plan_command",
        file=_tables(_PLAN),
    ),
    Command(
        "models",
        "List the models on this machine, which of them can be trained, and the memory and time that needs.",
        "backhand models",
        "backhand.options.command_options:ModelsOptions",
        "backhand.training.models_command:models_command",
        positional=("places",),
    ),
    Command(
        "convert",
        "Write another tool's YAML file as a configuration, with an answer to each key that has no equivalent.",
        "backhand convert axolotl.yaml",
        "backhand.options.command_options:ConvertOptions",
        "backhand.options.convert:convert_command",
        positional=("file",),
    ),
    Command(
        "lint",
        "Check rows as a model's tokenizer and chat template read them, and report every problem with its remedy.",
        "backhand lint --data rows.jsonl",
        "backhand.data.options:LintOptions",
        "backhand.data.lint_command:lint_command",
        file=_rows_of_config,
    ),
    Command(
        "evaluate",
        "Measure loss, perplexity, exact match and labels on rows, for the base model and with an adapter.",
        "backhand evaluate --data rows.jsonl --adapter runs/mine/adapter",
        "backhand.options.command_options:EvaluateOptions",
        "backhand.loop.evaluate:evaluate_command",
    ),
    Command(
        "generate",
        "Answer a prompt, or a file of prompts, with the base model or with an adapter.",
        'backhand generate --adapter runs/mine/adapter --prompt "What is the capital of France?"',
        "backhand.generation.options:GenerateOptions",
        "backhand.generation.command:generate_command",
        text="prompt",
    ),
    Command(
        "chat",
        "Chat with the base model or with an adapter.",
        "backhand chat --adapter runs/mine/adapter",
        "backhand.generation.options:ChatOptions",
        "backhand.generation.chat:chat_command",
        text="prompt",
    ),
    Command(
        "decide",
        "Answer an adapter's questions about a state, or about a file of states, with the probability of each answer.",
        'backhand decide --adapter runs/decided/adapter --state "My card was charged twice."',
        "backhand.options.command_options:DecideOptions",
        "backhand.loop.decide:decide_command",
        text="state",
    ),
    Command(
        "classify",
        "Give texts the labels or the number of an adapter's classification head, with the probability of each label.",
        'backhand classify --adapter runs/classes/adapter --text "My card was charged twice."',
        "backhand.options.command_options:ClassifyOptions",
        "backhand.loop.classify:classify_command",
        text="text",
    ),
    Command(
        "embed",
        "Compute the vectors of texts for search, with the base model or with an adapter.",
        "backhand embed --adapter runs/vectors/adapter --data texts.jsonl --output vectors.npy",
        "backhand.options.command_options:EmbedOptions",
        "backhand.loop.embed:embed_command",
        text="data",
    ),
    Command(
        "mine",
        "Add hard negatives to pairs of texts: those that the model takes for the answer.",
        "backhand mine --adapter runs/vectors/adapter --data pairs.jsonl --negatives 3 --output mined.jsonl",
        "backhand.options.command_options:MineOptions",
        "backhand.loop.embed:mine_command",
    ),
    Command(
        "rank",
        "Score documents for queries, or rank the texts of a file for one query, with a reranker or with an adapter.",
        'backhand rank --adapter runs/ranked/adapter --query "How do I pay?" --data texts.jsonl',
        "backhand.options.command_options:RankOptions",
        "backhand.loop.rank:rank_command",
        text="query",
    ),
    Command(
        "verify",
        "Prove every gradient against autograd and finite differences: of the ops, or of your own model on your rows.",
        "backhand verify --op lora_linear",
        "backhand.verify.options:VerifyOptions",
        "backhand.verify.command:verify_command",
        report_of=lambda options: options.verify.run,
    ),
    Command(
        "merge",
        "Merge an adapter into its base model, and prove the result against base and adapter.",
        "backhand merge --adapter runs/mine/adapter --output runs/mine/merged",
        "backhand.interop.options:MergeOptions",
        "backhand.interop.merging:merge_command",
        report_of=_run_of_adapter,
    ),
    Command(
        "export",
        "Convert an adapter, or the merged model, for PEFT, vLLM, llama.cpp, Ollama, MLX, or diffusion programs.",
        "backhand export --adapter runs/mine/adapter --to gguf --output runs/mine/adapter.gguf",
        "backhand.interop.options:ExportOptions",
        "backhand.interop.command:export_command",
        report_of=_run_of_adapter,
    ),
    Command(
        "sine",
        "Run the first experiment: a network learns a sine, and an adapter continues, with hand-written gradients.",
        "backhand sine --check --output runs/sine",
        "backhand.lab.sine.options:SineOptions",
        "backhand.lab.sine.command:sine_command",
    ),
    Command(
        "paper",
        "Repeat the LoRA paper's analyses on your adapters: subspaces, amplification, merging, memory, ranks.",
        "backhand paper --adapter runs/mine/adapter --output runs/paper",
        "backhand.lab.paper.options:PaperOptions",
        "backhand.lab.paper.command:paper_command",
    ),
    Command(
        "combine",
        "Add, average, subtract, concatenate, merge or reduce adapters, exactly or with the error reported.",
        "backhand combine add runs/one/adapter runs/two/adapter --output runs/both",
        "backhand.arithmetic.options:CombineOptions",
        "backhand.arithmetic.combine:combine_command",
        positional=("operation", "adapters"),
    ),
    Command(
        "inspect",
        "Show an adapter's ranks, sizes and singular values, and how much of the rank is used.",
        "backhand inspect runs/mine/adapter",
        "backhand.arithmetic.options:InspectOptions",
        "backhand.arithmetic.inspect:inspect_command",
        positional=("adapter",),
    ),
    Command(
        "diff",
        "Compare two adapters module by module: the norm of the difference, and the angles between their subspaces.",
        "backhand diff runs/one/adapter runs/two/adapter",
        "backhand.arithmetic.options:DiffOptions",
        "backhand.arithmetic.diff:diff_command",
        positional=("first", "second"),
    ),
    Command(
        "compress",
        "Give every module of an adapter the smallest rank within an error bound.",
        "backhand compress runs/mine/adapter --error 0.05 --output runs/small",
        "backhand.arithmetic.options:CompressOptions",
        "backhand.arithmetic.compress:compress_command",
        positional=("adapter",),
    ),
    Command(
        "report",
        "Write one self-contained page about a run, or about several runs side by side.",
        "backhand report runs/mine",
        "backhand.report.options:ReportOptions",
        "backhand.report.command:report_command",
        positional=("runs",),
    ),
    Command(
        "watch",
        "Show the report of a run while it trains, on this machine only, with a box for prompts to base and adapter.",
        "backhand watch runs/mine",
        "backhand.studio.options:WatchOptions",
        "backhand.studio.command:watch_command",
        positional=("run",),
    ),
    Command(
        "studio",
        "Open a page in the browser, on this machine only, on which runs are started, followed and tried out.",
        "backhand studio",
        "backhand.studio.options:StudioOptions",
        "backhand.studio.command:studio_command",
    ),
    Command(
        "demo",
        "Run the sine experiment, then train SmolLM2 to turn sentences into strict JSON: answers before and after.",
        "backhand demo --output runs/demo",
        "backhand.lab.demo_options:DemoOptions",
        "backhand.lab.demo:demo_command",
    ),
)
