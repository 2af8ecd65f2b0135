"""The README's benchmark section from the stored results: `python benchmarks/table.py` rewrites it in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks: made by benchmarks/table.py -->", "<!-- end of benchmarks -->"
_NAMES = {
    "backhand": "**Backhand**",
    "backhand-unshared": "Backhand, as if no two rows began alike",
    "backhand-recompute-mlp": "Backhand, `--recompute mlp`",
    "backhand-recompute-block": "Backhand, `--recompute block`",
    "peft": "PEFT as documented",
    "peft-tuned": "PEFT tuned (allocator, adapters in the base's dtype, fused AdamW)",
    "peft-tuned-openmp": "PEFT tuned, with this project's OpenMP setting as well",
    "peft-checkpointing": "PEFT with gradient checkpointing",
    "products-alone": "the matrix products alone (ceiling)",
    "trl": "TRL as users run it",
    "trl-no-checkpointing": "TRL, checkpointing off",
    "trl-no-checkpointing-tuned": "TRL, checkpointing off, allocator tuned",
    "trl-no-checkpointing-tuned-openmp": "TRL, the same with this project's OpenMP setting",
    "trl-packing-tuned": "TRL, allocator tuned, with packing",
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
        found = ratios["share_of_products_alone"]
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
            ["", "real tokens/s", "training, median (min to max)", "Backhand is faster by", "held-out loss"],
            [
                [
                    _NAMES[name],
                    f"{row['tokens_per_s']:.0f}",
                    "{median:.1f} s ({min:.1f} to {max:.1f})".format(**row["train_s"]),
                    "" if name == "backhand" else f"{ours / row['tokens_per_s']:.2f} ×",
                    f"{sum(row['held_out_loss']) / len(row['held_out_loss']):.3f}",
                ]
                for name, row in peers.items()
            ],
        ),
    ]


# Of each machine: what it is, and the files of its results.
_MACHINES = (
    ("A processor that multiplies bfloat16 (AVX512-BF16)", "train_step.json", "finetune.json"),
    (
        "A processor that does not (AVX2): runs are float32 there by themselves",
        "train_step_avx2.json",
        "finetune_avx2.json",
    ),
)


def section() -> str:
    """Everything between the markers."""
    setting = (
        "SmolLM2-135M, rank 16 on all linear layers. Each peer in its own process, in turns; losses and gradients are "
        "compared before a time is believed. `python benchmarks/train_step.py` and `python benchmarks/finetune.py` "
        "repeat it."
    )
    lines = [BEGIN, "", "## How fast", "", setting]
    for title, step_file, finetune_file in _MACHINES:
        step = json.loads((HERE / "results" / step_file).read_text())
        finetune = json.loads((HERE / "results" / finetune_file).read_text())
        lines += [
            "",
            f"### {title}",
            "",
            machine_line(step["machine"]),
            *step_section(step),
            *finetune_section(finetune),
        ]
    return "\n".join([*lines, "", END])


def machine_line(machine: dict[str, Any]) -> str:
    """Cores, memory and versions, as they were measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    return f"{machine['cores']} cores ({machine['processor']}), {memory}; {versions}."


def main() -> None:
    """Rewrite the section in README.md."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + section() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
