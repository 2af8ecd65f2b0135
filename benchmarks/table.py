"""The stored results as tables: all in docs/benchmarks.md, five rows in the README. `make readme` puts them there."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
_NAMES = {
    "backhand": "**Backhand**",
    "backhand-unshared": "Backhand, as if no two rows began alike",
    "backhand-transformers": "Backhand, `--engine transformers`",
    "backhand-recompute-mlp": "Backhand, `--recompute mlp`",
    "backhand-recompute-block": "Backhand, `--recompute block`",
    "peft": "PEFT as documented",
    "peft-tuned": "PEFT tuned (allocator, adapters in the base's dtype, fused AdamW)",
    "peft-tuned-openmp": "PEFT tuned, with this project's OpenMP setting as well",
    "peft-checkpointing": "PEFT with gradient checkpointing",
    "products-alone": "the matrix products alone (ceiling)",
    "trl": "TRL as users run it",
    "trl-tuned": "TRL, checkpointing off, allocator tuned",
    "trl-no-checkpointing": "TRL, checkpointing off",
    "trl-no-checkpointing-tuned": "TRL, checkpointing off, allocator tuned",
    "trl-no-checkpointing-tuned-openmp": "TRL, the same with this project's OpenMP setting",
    "trl-packing-tuned": "TRL, allocator tuned, with packing",
    "trl-precomputed": "TRL, reference precomputed, checkpointing off",
    "trl-precomputed-tuned": "TRL, reference precomputed, checkpointing off, allocator tuned",
    "trl-precomputed-tuned-openmp": "TRL, the same with this project's OpenMP setting",
    "backhand-answers": "Backhand, as many tokens of answers (`sft`)",
}


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown, numbers right-aligned."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def step_section(results: dict[str, Any]) -> list[str]:
    """One table for each dtype of `train_step.json`."""
    lines: list[str] = []
    for run in results["runs"]:
        workload, peers, ratios = run["workload"], run["peers"], run["ratios"]
        title = f"One training step, {workload['rows']} × {workload['length']} tokens, all supervised, "
        title += f"{workload['dtype']}:"
        lines += [
            "",
            title,
            "",
        ]
        lines += table(
            ["", "tokens/s", "step, median (min to max)", "Backhand is faster by", "memory above the model"],
            [
                [
                    _NAMES[name],
                    f"{row['tokens_per_s']:.0f}",
                    "{median:.2f} s ({min:.2f} to {max:.2f})".format(**row["step_s"]),
                    _ratio(ratios, name),
                    "" if name == "products-alone" else f"{row['memory_above_model_bytes'] / 2**20:.0f} MiB",
                ]
                for name, row in peers.items()
            ],
        )
    return lines


def _ratio(ratios: dict[str, float], peer: str) -> str:
    """How many times faster the engine is than a peer, by the rounds both took part in."""
    found = ratios.get(f"speed_over_{peer.replace('-', '_')}")
    if peer == "products-alone":
        found = ratios.get("share_of_all_products", ratios.get("share_of_products_alone"))
    return "" if found is None else f"{found:.2f} ×"


def finetune_section(results: dict[str, Any]) -> list[str]:
    """The table of `finetune.json`."""
    workload, peers = results["workload"], results["peers"]
    ours = peers["backhand"]["tokens_per_s"]
    per_row = workload["tokens"] / workload["rows"]
    supervised = workload["supervised_tokens"] / workload["rows"]
    described = (
        f"Fine-tuning on {workload['rows']} short rows ({per_row:.0f} tokens, {supervised:.0f} of them supervised), "
        f"{workload['epochs']} epoch, {workload['batch_rows']} rows a step, {workload['dtype']}; held-out loss of the "
        f"base {results['base_held_out_loss']:.2f}:"
    )
    return [
        "",
        described,
        "",
        *table(
            [
                "",
                "real tokens/s",
                "training, median (min to max)",
                "Backhand is faster by",
                "held-out loss",
                "peak memory",
            ],
            [
                [
                    _NAMES[name],
                    f"{row['tokens_per_s']:.0f}",
                    "{median:.1f} s ({min:.1f} to {max:.1f})".format(**row["train_s"]),
                    "" if name == "backhand" else f"{ours / row['tokens_per_s']:.2f} ×",
                    f"{sum(row['held_out_loss']) / len(row['held_out_loss']):.3f}",
                    f"{row['peak_rss_bytes'] / 2**30:.2f} GiB" if "peak_rss_bytes" in row else "",
                ]
                for name, row in peers.items()
            ],
        ),
    ]


_QUANTIZED_NAMES = {
    "backhand": "Backhand, `--base dense`",
    "backhand-quantized": "**Backhand, `--base quantized`**",
    "backhand-quantized-torch": "the same without compiled kernels",
    "backhand-quantized-recompute-block": "`--base quantized --recompute block`",
    "peft": "PEFT, bfloat16",
    "peft-nf4": "PEFT on bitsandbytes' NF4, scales quantized too",
    "peft-nf4-checkpointing": "the same with gradient checkpointing",
}
_MODELS = {
    "smollm2-135m": "SmolLM2-135M",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B (Q4_K_M)",
    "0.5b": "the shape of a Qwen2 of 0.5 billion",
    "smollm2": "SmolLM2-135M (Q4_1)",
    "1.5b": "the shape of a Qwen2 of 1.5 billion (Q4_K_M)",
    "8b": "8B",
}


def quantized_section() -> str:
    """The tables of `quantized_base.json`, or how to make them."""
    if not (HERE / "results" / "quantized_base.json").exists():
        return "`python benchmarks/quantized_base.py` measures it on your machine; no figures are stored yet."
    results = _read("quantized_base.json")
    lines: list[str] = []
    for run in results["runs"]:
        workload, peers, ratios = run["workload"], run["peers"], run["ratios"]
        model = _MODELS.get(workload["model"], workload["model"])
        title = f"{model}, {workload['file_bytes'] / 2**30:.2f} GiB, {workload['rows']} × {workload['length']} tokens, "
        head = [
            "",
            "tokens/s",
            "step, median (min to max)",
            "`--base quantized` is faster by",
            "peak memory",
            "loading",
        ]
        rows = [
            [
                _QUANTIZED_NAMES[name],
                f"{row['tokens_per_s']:.1f}",
                "{median:.2f} s ({min:.2f} to {max:.2f})".format(**row["step_s"]),
                _ratio(ratios, name),
                f"{row['peak_bytes'] / 2**30:.2f} GiB",
                f"{row['load_s']:.1f} s",
            ]
            for name, row in peers.items()
        ]
        lines += ["", machine_line(run["machine"]), "", f"{title}{workload['dtype']}:", "", *table(head, rows)]
    if "limited" in results:
        lines += ["", machine_line(results["limited"]["machine"]), _limited_line(results["limited"])]
    return "\n".join(lines).strip()


def base_types_section() -> str:
    """The tables of `base_types.json`, one for each task, or how to make them."""
    if not (HERE / "results" / "base_types.json").exists():
        return "`python benchmarks/base_types.py` measures it on your machine; no figures are stored yet."
    lines: list[str] = []
    for run in _read("base_types.json")["runs"]:
        workload, bases, losses = run["workload"], run["bases"], run["loss_by_trained_and_served"]
        first = next(iter(bases.values()))
        title = (
            f"SmolLM2-135M, the rows of the recipe `{workload['task']}`, {first['steps']} steps, {workload['dtype']}; "
        )
        title += f"held-out loss over {run['supervised_tokens']} supervised tokens:"
        head = ["", "size", "peak memory of training", "loss of the base", *(f"served with {name}" for name in bases)]
        rows = []
        for name, base in bases.items():
            sizes = [f"{base[what] / 2**20:.0f} MiB" for what in ("file_bytes", "peak_rss_bytes")]
            served = [f"**{loss:.3f}**" if other == name else f"{loss:.3f}" for other, loss in losses[name].items()]
            rows.append([f"trained on {name}", *sizes, f"{base['base_loss']:.3f}", *served])
        lines += [*([""] if lines else []), title, "", *table(head, rows)]
    return "\n".join(lines)


def _limited_line(limited: dict[str, Any]) -> str:
    seconds = ", ".join(f"{step:.0f}" for step in limited["step_s"])
    return (
        f"Three steps of {limited['rows']} × {limited['length']} tokens on the shape of an 8B "
        f"({limited['file_bytes'] / 1e9:.2f} GB), stopped after the first and resumed: {seconds} s. "
        f"The limit was {limited['limit_bytes'] / 1e9:.0f} GB ({limited['limit_kind']}). The highest resident memory, "
        f"including the file's pages, was {limited['peak_bytes'] / 1e9:.2f} GB."
    )


# Of each machine: what it is, its short name, and the files of its results.
_MACHINES = (
    ("A processor that multiplies tiles of bfloat16 (AMX)", "AMX", "train_step_amx.json", "finetune_amx.json"),
    ("A processor that multiplies bfloat16 (AVX512-BF16)", "AVX512-BF16", "train_step.json", "finetune.json"),
    (
        "A processor that does not (AVX2): runs are float32 there by themselves",
        "AVX2",
        "train_step_avx2.json",
        "finetune_avx2.json",
    ),
)


def section() -> str:
    """Every table, machine by machine."""
    lines: list[str] = []
    for title, _, step_file, finetune_file in _MACHINES:
        step, finetune = _read(step_file), _read(finetune_file)
        lines += ["", f"## {title}", "", machine_line(step["machine"])]
        other = finetune["machine"] != step["machine"]
        lines += [*step_section(step), *(["", machine_line(finetune["machine"])] if other else [])]
        lines += finetune_section(finetune)
    if (HERE / "results" / "preference.json").exists():
        lines += pairs_section(_read("preference.json"))
    sections = (
        *(("rewards", rewards_section), ("rewards_sampling", sampling_section)),
        *(("baking", baking_section), ("few_shot", few_shot_section)),
        *(("vectors", vectors_section), ("vectors_scores", vectors_scores_section)),
        *(("reranking", reranking_section), ("reranking_encoder", reranking_section)),
    )
    for name, make in sections:
        if (HERE / "results" / f"{name}.json").exists():
            lines += make(_read(f"{name}.json"))
    if (HERE / "results" / "shapes.json").exists():
        lines += shapes_section(_read("shapes.json"))
    if (HERE / "results" / "long_rows.json").exists():
        lines += long_rows_section(_read("long_rows.json"))
    if (HERE / "results" / "upper_layers.json").exists():
        for results in _read("upper_layers.json")["places"]:
            lines += upper_layers_section(results)
    return "\n".join(lines).strip()


def pairs_section(results: dict[str, Any]) -> list[str]:
    """The tables of `preference.json`: DPO on the same pairs."""
    lines = ["", "## Pairs (DPO)", "", "`python benchmarks/preference.py`; a reference's log-probabilities included."]
    head = ["", "pairs/s", "training, median (min to max)", "Backhand is faster by", "peak memory", "of it Backhand's"]
    for run in results["runs"]:
        workload, peers = run["workload"], run["peers"]
        ours = peers["backhand"]
        name = _MODELS.get(workload["model"], workload["model"])
        lines += [
            "",
            machine_line(run["machine"]),
            "",
            f"{name}, {workload['pairs']} pairs of {workload['whole_tokens']:,}",
        ]
        lines[-1] += f" tokens in all, {workload['computed_tokens']:,} with each beginning once, {workload['dtype']}:"
        rows = []
        for peer, row in peers.items():
            times = "{median:.1f} s ({min:.1f} to {max:.1f})".format(**row["train_s"])
            speed, share = ours["pairs_per_s"] / row["pairs_per_s"], ours["peak_rss_bytes"] / row["peak_rss_bytes"]
            compared = ["", f"{row['peak_rss_bytes'] / 2**30:.2f} GiB", ""]
            if peer != "backhand":
                compared[0], compared[2] = f"{speed:.2f} ×", f"{share:.2f}"
            rows.append([_NAMES[peer], f"{row['pairs_per_s']:.2f}", times, *compared])
        lines += ["", *table(head, rows)]
    return lines


def rewards_section(results: dict[str, Any]) -> list[str]:
    """The table of `rewards.json`: a step of GRPO, sampling, judging and training."""
    workload, peers = results["workload"], results["peers"]
    lines = ["", "## Rewards (GRPO)", "", "`python benchmarks/rewards.py`", "", machine_line(results["machine"]), ""]
    lines.append(
        f"{workload['prompts']} prompts of about 100 tokens, {workload['group']} answers of at most "
        f"{workload['new_tokens']} tokens each, {workload['dtype']}; compared by the seconds a token:"
    )
    ours, rows = peers["backhand"], []
    for peer, row in peers.items():
        answers = sum(run["answer_tokens"] for run in row["runs"]) / len(row["runs"])
        speed, share = row["token_s"] / ours["token_s"], ours["peak_rss_bytes"] / row["peak_rss_bytes"]
        compared = ["", f"{row['peak_rss_bytes'] / 2**30:.2f} GiB", ""]
        if peer != "backhand":
            compared[0], compared[2] = f"{speed:.2f} ×", f"{share:.2f}"
        rows.append([_NAMES[peer], f"{row['step_s']:.2f} s", f"{answers:.0f}", *compared])
    head = ["", "a step", "tokens an answer", "Backhand is faster by", "peak memory", "of it Backhand's"]
    return [*lines, "", *table(head, rows)]


def sampling_section(results: dict[str, Any]) -> list[str]:
    """The table of `rewards_sampling.json`."""
    rows = [
        [answers, *(f"{rate:.0f}" for rate in one["tokens_per_s"].values()), f"{one['ratio']:.2f}"]
        for answers, one in results.items()
        if answers.isdigit()
    ]
    head = ["answers at once", "Backhand, tokens/s", "llama.cpp, tokens/s", "ratio"]
    about = "Answers to one prompt alone, from the same file (`--sampling`); medians of runs in turns:"
    return ["", about, "", *table(head, rows)]


def baking_section(results: dict[str, Any]) -> list[str]:
    """Return the table of `baking.json`: a context turned into an adapter."""
    workload, peers = results["workload"], results["peers"]
    lines = ["", "## Prompt baking", "", "`python benchmarks/baking.py`", "", machine_line(results["machine"]), ""]
    lines.append(
        f"A context of {workload['context']}, {workload['prompts']} prompts a step, answers of at most "
        f"{workload['new_tokens']} tokens, two epochs, {workload['dtype']}. Seconds of all of training, with sampling "
        "and without loading."
    )
    rows, ours = [], peers["backhand"]
    for peer, row in peers.items():
        compared = ["", f"{row['peak_rss_bytes'] / 2**30:.2f} GiB", ""]
        if peer.startswith("trl"):
            both = (peers[name] for name in ("backhand", "backhand-student") if name in peers)
            compared[0] = " and ".join(f"{row['seconds'] / one['seconds']:.1f} ×" for one in both)
            compared[2] = f"{ours['peak_rss_bytes'] / row['peak_rss_bytes']:.2f}"
        seconds = [f"{row['seconds']:.1f} s", f"{row['cpu_s']:.1f} s"]
        rows.append([_BAKING_NAMES[peer], *seconds, f"{row['answer_tokens']:.0f}", *compared])
    head = ["", "training", "processor time", "answer tokens", "Backhand is faster by", "peak memory"]
    head.append("of it Backhand's")
    return [*lines, "", *table(head, rows)]


def few_shot_section(results: dict[str, Any]) -> list[str]:
    """Return the tables of `few_shot.json`: examples in a prompt turned into adapters."""
    lines = ["", "## Examples of a prompt, baked", "", "`python benchmarks/few_shot.py`", ""]
    lines += [machine_line(results["machine"]), ""]
    lines.append("Greedy answers without the prompt, by the true answers; next to `sft` on the same answers:")
    matches, seconds = [], []
    for model, tasks in results["models"].items():
        for task, row in tasks.items():
            name = f"{_MODELS.get(model, model)}: {task}, {row['examples']} examples"
            match, forgotten = row["exact_match"], row["forgotten_nats"]
            shares = [f"{100 * match[kind]:.0f} %" for kind in ("prompted", "bake", "sft")]
            matches.append([name, *shares, *(f"{forgotten[kind]:.2f}" for kind in ("bake", "sft"))])
            calls = [
                f"{row['first_token_s'][f'{program}, {kind}']:.3g} s"
                for program in ("backhand", "llama.cpp")
                for kind in ("prompted", "baked")
            ]
            seconds.append([name, f"{row['tokens']['prompted']}", f"{row['tokens']['baked']}", *calls])
    head = ["", "with the prompt", "baked", "`sft`", "forgotten, baked", "forgotten, `sft`"]
    lines += ["", *table(head, matches), "", "Tokens before the answer, and seconds to its first token:", ""]
    head = ["", "tokens with the prompt", "baked", "Backhand, with the prompt", "baked"]
    return [*lines, *table([*head, "llama.cpp, with the prompt", "baked"], seconds)]


_BAKING_NAMES = {
    "backhand": "**Backhand**, the teacher answers once",
    "backhand-student": "Backhand, the model answers in each step",
    "trl": "TRL's SDFTTrainer as users run it",
    "trl-tuned": "TRL's SDFTTrainer, checkpointing off, allocator tuned",
}


_VECTORS_NAMES = {
    "idle": "(torch, sentence-transformers and the model, nothing trained)",
    "backhand": "**Backhand**, float32",
    "backhand-bfloat16": "Backhand, bfloat16",
    "sentence-transformers": "sentence-transformers with PEFT as documented",
    "sentence-transformers-tuned": "the same tuned (no dropout, mini-batch, allocator, fused AdamW)",
    "sentence-transformers-tuned-bfloat16": "the same tuned, bfloat16",
}


def vectors_section(results: dict[str, Any]) -> list[str]:
    """Return the table of `vectors.json`: a step of InfoNCE over many pairs."""
    lines = ["", "## Vectors (InfoNCE)", "", "`python benchmarks/vectors.py`", "", machine_line(results["machine"])]
    head = ["", "pairs per second of a core", "Backhand is faster by", "peak memory", "of it Backhand's"]
    for run in results["runs"]:
        workload, peers = run["workload"], run["peers"]
        ours, rows = peers["backhand"], []
        for peer, row in peers.items():
            step_s, memory = statistics.median(row["cpu_s"]), row["peak_rss_bytes"]
            cells = [f"{workload['rows'] / step_s:.1f}", f"{step_s / statistics.median(ours['cpu_s']):.2f} ×"]
            cells += [f"{memory / 2**20:.0f} MiB", f"{ours['peak_rss_bytes'] / memory:.2f}"]
            if peer == "idle":
                cells = ["", "", cells[2], ""]
            rows.append([_VECTORS_NAMES[peer], *cells])
        about = f"MiniLM, {workload['rows']:,} pairs of documentation texts per step, at most {workload['max_length']} "
        about += f"tokens each, mini-batches of {workload['mini_batch']} in the tuned peer:"
        lines += ["", about, "", *table(head, rows)]
    return lines


def vectors_scores_section(results: dict[str, Any]) -> list[str]:
    """Return the table of `vectors_scores.json`: nDCG@10 of held-out rows."""
    about = f"Scores of {results['held_out']:,} held-out pairs after {results['steps']} steps of "
    about += f"{results['rows_per_step']} pairs (`--scores`). The model alone has an nDCG@10 of {{:.3f}}:"
    scores = dict(results["ndcg@10"])
    lines = ["", about.format(scores.pop("base")), ""]
    rows = [
        [peer, f"{statistics.mean(of_peer):.4f}", f"{min(of_peer):.4f} to {max(of_peer):.4f}", str(len(of_peer))]
        for peer, of_peer in scores.items()
    ]
    return [*lines, *table(["", "nDCG@10, mean", "of the seeds", "seeds"], rows)]


def by_machine(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group runs of `train_step.py --add` by the line that describes their machine, in the order of the first ones."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(machine_line(run["machine"]), []).append(run)
    return groups


def reranking_section(results: dict[str, Any]) -> list[str]:
    """Return the table of `reranking.json` or `reranking_encoder.json`: training a reranker."""
    workload, peers = results["workload"], results["peers"]
    encoder = "peft" not in peers
    texts = "paragraphs of documentation" if encoder else f"{workload['document_words']} words each"
    title, option = ("## Cross-encoders", " --encoder") if encoder else ("## Rerankers", "")
    lines = ["", title, "", f"`python benchmarks/reranking.py{option}`", "", machine_line(results["machine"]), ""]
    lines.append(
        f"{workload['queries']} queries a step, each with one relevant document and {workload['negatives']} others, "
        f"{texts}, pointwise loss, {workload['dtype']}:"
    )
    ours, rows = peers["backhand"], []
    steps = workload.get("timed_steps", workload["steps"])
    key = "cpu_s" if "cpu_s" in ours else "seconds"  # other programs of the machine change processor time little
    for peer, row in peers.items():
        cells = [f"{row[key] / steps:.1f} s", f"{row[key] / ours[key]:.2f} ×"]
        memory = row["peak_rss_bytes"]
        cells += [f"{memory / 2**20:,.0f} MiB", f"{ours['peak_rss_bytes'] / memory:.2f}"]
        rows.append([_RERANKING_NAMES[peer], *cells])
    seconds = "seconds per step" if key == "seconds" else "processor time per step"
    head = ["", seconds, "Backhand is faster by", "peak memory", "of it Backhand's"]
    return [*lines, "", *table(head, rows)]


_RERANKING_NAMES = {
    "backhand": "**Backhand**",
    "peft": "transformers and PEFT as documented",
    "peft-tuned": "the same tuned (a query at a time, head at the last position, allocator, fused AdamW)",
    "sentence-transformers": "sentence-transformers and PEFT as documented",
    "sentence-transformers-tuned": "the same tuned (a query at a time, no dropout, allocator, fused AdamW)",
}


def shapes_section(results: dict[str, Any]) -> list[str]:
    """The table of `shapes.json`: one step of other sizes and rows, compared with its products alone."""
    lines = ["", "## Larger models, short and long rows", ""]
    lines += ["Shapes of a Qwen2 with random weights; 135M is SmolLM2. `train_step.py --add`."]
    head = ["", "dtype", "tokens/s", "step, median (min to max)", "of the products alone", "memory above the model"]
    for machine, runs in by_machine(results["runs"]).items():
        rows = []
        for run in runs:
            workload, ours = run["workload"], run["peers"]["backhand"]
            model = workload["model"].removeprefix("smollm2-").upper()
            rows.append(
                [
                    f"{model}, {workload['rows']} × {workload['length']} tokens",
                    workload["dtype"],
                    f"{ours['tokens_per_s']:.0f}",
                    "{median:.2f} s ({min:.2f} to {max:.2f})".format(**ours["step_s"]),
                    _ratio(run["ratios"], "products-alone"),
                    f"{ours['memory_above_model_bytes'] / 2**20:.0f} MiB",
                ]
            )
        lines += ["", machine, "", *table(head, rows)]
    return lines


def long_rows_section(results: dict[str, Any]) -> list[str]:
    """Return the tables of `long_rows.json`: one row of each length, with attention's products in the ceiling."""
    lines = ["", "## One row, from short to long", ""]
    lines += [
        "To measure a line of these tables, run `python benchmarks/train_step.py --long-row TOKENS --model MODEL`."
    ]
    lines += ["The ceiling is all matrix products, with attention's visible half at the rate of the linear layers."]
    lines += ["With one thread, a step is in seconds of processor time."]
    head = ["", "tokens", "dtype", "threads", "step", "of the ceiling"]
    head += ["PEFT tuned", "Backhand is faster by", "of its memory"]

    def order(run: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(run["workload"][name] for name in ("model", "dtype", "threads", "length"))

    for machine, runs in by_machine(results["runs"]).items():
        rows = []
        for run in sorted(runs, key=order):
            workload, peers, ratios = run["workload"], run["peers"], run["ratios"]
            theirs = peers.get("peft-tuned")
            rows.append(
                [
                    workload["model"].removeprefix("smollm2-").upper(),
                    f"{workload['length']:,}",
                    workload["dtype"],
                    str(workload["threads"]),
                    f"{peers['backhand']['step_s']['median']:.2f} s",
                    _ratio(ratios, "products-alone"),
                    "" if theirs is None else f"{theirs['step_s']['median']:.2f} s",
                    _ratio(ratios, "peft-tuned"),
                    "" if theirs is None else f"{ratios['memory_over_peft_tuned']:.2f} ×",
                ]
            )
        lines += ["", machine, "", *table(head, rows)]
    return lines


_UPPER_NAMES = {
    "kept": "**upper layers, hidden states below kept**",
    "computed": "upper layers, `--cache-frozen off`",
    "all-layers": "all layers",
}


def upper_layers_section(results: dict[str, Any]) -> list[str]:
    """The tables of one of the places in `upper_layers.json`."""
    options = results["options"]
    machine = results["machine"]
    what = f"`--layers {options['layers']}`, {options['epochs']} epochs, {options['batch_rows']} rows a step"
    where = machine.get("capped_to", machine["instructions"])
    lines = ["", f"## Upper layers alone: {what}, {options['dtype']}, {where}", "", machine_line(machine)]
    lines += ["", "`python benchmarks/upper_layers.py`; the first two of each table leave the same adapter to the bit."]
    for run in results["runs"]:
        workload, ratios = run["workload"], run["ratios"]
        tokens = f"{workload['tokens']:,} tokens in all, {workload['supervised_tokens']:,} of them supervised"
        base = f"held-out loss of the base {workload['base_held_out_loss']:.2f}"
        lines += ["", f"Task `{workload['task']}`, {workload['rows']} rows, {tokens}; {base}:", ""]
        lines += table(
            ["", "training, median (min to max)", "kept is faster by", "held-out loss", "peak memory"],
            [
                [
                    name,
                    "{median:.1f} s ({min:.1f} to {max:.1f})".format(**row["train_s"]),
                    "" if peer == "kept" else f"{ratios['kept_over_' + peer.replace('-', '_')]:.2f} ×",
                    f"{row['held_out_loss']:.3f}",
                    f"{row['peak_rss_bytes'] / 2**30:.2f} GiB",
                ]
                for peer, name in _UPPER_NAMES.items()
                for row in (run["peers"][peer],)
            ],
        )
    return lines


def summary() -> str:
    """Return the README's table: a row per workload, with the lowest and the highest value over the machines."""
    found: dict[tuple[str, str], list[_Gain]] = {}
    by_transformers: dict[tuple[str, str], list[_Gain]] = {}
    for _, machine, step_file, finetune_file in _MACHINES:
        for run in _read(step_file)["runs"]:
            workload, peers, ratios = run["workload"], run["peers"], run["ratios"]
            what = f"one step of {workload['rows']} × {workload['length']} tokens, {workload['dtype']}"
            faster = {peer: ratios[f"speed_over_{peer.replace('-', '_')}"] for peer in peers if peer.startswith("peft")}
            gain = _gain(machine, "peft", peers["backhand"]["step_s"]["median"], faster)
            found.setdefault((what, "PEFT"), []).append(gain)
        finetune = _read(finetune_file)
        workload, peers = finetune["workload"], finetune["peers"]
        what = f"training on {workload['rows']} short rows, {workload['dtype']}"
        for peer, key, rows in (
            ("backhand", (what, "TRL"), found),
            ("backhand-transformers", (f"{what}, `--engine transformers`", "TRL"), by_transformers),
        ):
            if peer in peers:
                ours, seconds = peers[peer]["tokens_per_s"], peers[peer]["train_s"]["median"]
                faster = {name: ours / row["tokens_per_s"] for name, row in peers.items() if name.startswith("trl")}
                rows.setdefault(key, []).append(_gain(machine, "trl", seconds, faster))
    pairs = next(run for run in _read("preference.json")["runs"] if "trl" in run["peers"])
    rewards, asked = _read("rewards.json"), _read("rewards.json")["workload"]
    for what, run, seconds in (
        (f"DPO on {pairs['workload']['pairs']} pairs", pairs, pairs["peers"]["backhand"]["train_s"]["median"]),
        (
            f"one GRPO step of {asked['prompts']} × {asked['group']} answers",
            rewards,
            rewards["peers"]["backhand"]["step_s"],
        ),
    ):
        named = {name.removeprefix("speed_over_"): ratio for name, ratio in run["ratios"].items()}
        faster = {name: ratio for name, ratio in named.items() if name.startswith("trl")}
        gain = _gain(run["machine"]["instructions"], "trl", seconds, faster)
        found[f"{what}, {run['workload']['dtype']}", "TRL"] = [gain]
    rows = [
        [what, _range([gain.seconds for gain in gains], "s"), *_faster(peer, gains), _machines(gains)]
        for (what, peer), gains in (found | by_transformers).items()
    ]
    head = ["", "Backhand", "speed-up over documented setup", "speed-up over tuned setup", "instruction sets"]
    return "\n".join(table(head, rows))


class _Gain(NamedTuple):
    """The seconds of Backhand on one machine, and its speed-up over a peer as documented and tuned."""

    machine: str
    seconds: float
    documented: float
    tuned: float


def _gain(machine: str, documented: str, seconds: float, faster: dict[str, float]) -> _Gain:
    tuned = min(ratio for name, ratio in faster.items() if name != documented)
    return _Gain(machine, seconds, faster[documented], tuned)


def _faster(peer: str, gains: list[_Gain]) -> list[str]:
    documented, tuned = [gain.documented for gain in gains], [gain.tuned for gain in gains]
    return [f"{peer} {_range(ratios, '×')}" for ratios in (documented, tuned)]


def _machines(gains: list[_Gain]) -> str:
    return ", ".join(gain.machine for gain in gains)


def _range(values: list[float], unit: str) -> str:
    ends = dict.fromkeys(f"{value:.{1 if value >= 5 else 2}f}" for value in (min(values), max(values)))
    return f"{' to '.join(ends)} {unit}"


_SCALING_PEERS = {"backhand": "**Backhand**", "trainer": "PEFT under transformers' Trainer"}


def scaling_section(kind: str) -> str:
    """A table of `scaling.json`: `exchange`, `turns`, `runs`, `peers` or `carried`."""
    results = _read("scaling.json")
    if kind not in results:
        return f"`python benchmarks/scaling.py {kind}` measures it on your machine; no figures are stored yet."
    rows = results[kind]
    lines = {
        "exchange": _exchange_table,
        "turns": _turns_table,
        "runs": _runs_table,
        "peers": _peers_table,
        "carried": _carried_table,
    }[kind](rows)
    return "\n".join([*([] if kind == "carried" else [machine_line(results["machine"]), _load_line(rows), ""]), *lines])


def _load_line(rows: list[dict[str, Any]]) -> str:
    loads = [row["load"] for row in rows]
    return f"Load average while it ran: {min(loads):.1f} to {max(loads):.1f}."


def _exchange_table(rows: list[dict[str, Any]]) -> list[str]:
    head = ["link (found by TCP)", "`--reduce`", "micro-batches", "measured, median (min to max)", "predicted"]
    return table(
        head,
        [
            [
                _link(row),
                row["reduce"],
                f"{row['micro_batches']}",
                _spread(row["exchange_s"]),
                f"{row['predicted_s']:.2f} s" if "predicted_s" in row else "",
            ]
            for row in rows
        ],
    )


def _turns_table(rows: list[dict[str, Any]]) -> list[str]:
    counts = sorted({row["processes"] for row in rows})
    medians = {(row["reduce"], row["processes"]): f"{statistics.median(row['round_trips']):.1f}" for row in rows}
    lines = [[f"`{reduce}`", *(medians[reduce, count] for count in counts)] for reduce in ("ordered", "sum")]
    return table(["round trips of an exchange", *(f"{count} processes" for count in counts)], lines)


def _link(row: dict[str, Any]) -> str:
    found = f"{row['found']['rate_mbit']:,.0f} Mbit/s, {row['found']['round_trip_s'] * 1e3:.2f} ms"
    if row["rate_mbit"] is None:
        return f"no limit ({found})"
    return f"{row['rate_mbit']:,} Mbit/s, {row['round_trip_s'] * 1e3:.1f} ms ({found})"


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def _runs_table(rows: list[dict[str, Any]]) -> list[str]:
    """What a step takes, how much of it the exchange, and both by the model, for the same computation."""
    lines = []
    for row in rows:
        step_s = statistics.median(row["step_s"])
        speed = f"{row['tokens'] / sum(row['step_s']):.0f}"
        if "exchange_s" not in row:
            lines.append(["one machine", "", speed, f"{step_s:.2f} s", "", "", ""])
            continue
        share, predicted = statistics.median(row["exchange_s"]) / step_s, row.get("predicted_s")
        computed_s = statistics.median(row["computed_s"])
        lines.append(
            [
                f"two, {_link(row).partition(' (')[0]}",
                row["reduce"],
                speed,
                f"{step_s:.2f} s",
                _spread(row["exchange_s"]),
                f"{share:.0%}",
                "" if predicted is None else f"{predicted:.2f} s, {predicted / (computed_s + predicted):.0%}",
            ]
        )
    return table(["machines", "`--reduce`", "tokens/s", "step", "exchange", "its share", "predicted"], lines)


def _peers_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for peer, name in _SCALING_PEERS.items():
        speeds = {
            count: [row["tokens_per_s"] for row in rows if (row["peer"], row["processes"]) == (peer, count)]
            for count in (1, 2)
        }
        ratio = statistics.median(two / one for one, two in zip(speeds[1], speeds[2], strict=True))
        lines.append([name, *(f"{statistics.median(found):.0f}" for found in speeds.values()), f"{ratio:.2f} ×"])
    return table(["", "one process, tokens/s", "two processes, tokens/s", "faster by"], lines)


def _carried_table(rows: list[dict[str, Any]]) -> list[str]:
    rates = {"100": "100 Mbit/s", "1000": "1 Gbit/s", "10000": "10 Gbit/s"}
    lines = [
        [
            f"{row['machines']}",
            f"{row['sent_bytes'] / 1e6:.1f} MB",
            *(f"{row['exchange_s'][rate]:.2f} s" for rate in rates),
        ]
        for row in rows
    ]
    return table(["machines", "sent by each", *rates.values()], lines)


def _read(file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / "results" / file).read_text(encoding="utf-8"))
    return found


def machine_line(machine: dict[str, Any]) -> str:
    """Cores, memory and versions, as they were measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    processor = ", ".join([machine["processor"], *([machine["instructions"]] if "instructions" in machine else [])])
    if "capped_to" in machine:
        processor += f", kept from more than {machine['capped_to'].upper()}"
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    return f"{cores} ({processor}), {memory}; {versions}."
