"""`backhand paper`: print tables, and with `--output` write pictures, .csv files and summary.json."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from backhand.arithmetic.findings import print_table
from backhand.errors import CheckError
from backhand.files import csv_bytes, made_directory, write_with_summary
from backhand.lab.paper import plots
from backhand.lab.paper.adam_path import LARGEST_DIFFERENCE
from backhand.lab.paper.amplification import NORMS, amplification_by_kind
from backhand.lab.paper.analyses import OptimizerClaims, PaperResult, run_paper
from backhand.lab.paper.first_update import FIRST_UPDATE_ALPHA, LARGEST_STANDARD_ERRORS, largest_disagreement
from backhand.lab.paper.memory import MemoryResult, StepMemory
from backhand.lab.paper.merging import MergeResult, Ratio
from backhand.lab.paper.options import PaperOptions
from backhand.lab.paper.similarity import ModuleSimilarity, SimilarityMap, similarity_by_kind, similarity_maps
from backhand.lab.paper.sweep import MEASURED, SweepResult
from backhand.terminal import console_for_tables, working
from backhand.words import show_notes

_BAD = "bold red"
_MEBIBYTE = 2**20


def paper_command(options: PaperOptions) -> PaperResult:
    """Run the chosen analyses, print tables or one JSON object, and write files to `output`.

    Raises:
        UsageError: if an option is out of range, `output` is a file, or the adapters have no module in common.
        ArtifactError: if model or adapter cannot be read or do not belong together.
        ResourceError: if `output` cannot be written.
        CheckError: if a claim about the optimizer does not hold. The results have been printed and written before.
    """
    options.validate()
    output = options.run.output
    with made_directory(output) if output is not None else nullcontext():
        with working() if not options.run.json else nullcontext(lambda _: None) as say:
            result = run_paper(options, say)
        show_notes(result.notes)
        summary = paper_summary(result)
        names = write_with_summary(output, _files(result), summary) if output is not None else []
    if options.run.json:
        sys.stdout.write(json.dumps(summary | {"files": names}, indent=2, allow_nan=False) + "\n")
    else:
        console = console_for_tables()
        _print_tables(console, result, summary)
        if output is not None:
            console.print()
            console.print(f"Written to {os.fspath(output)}: {', '.join(names)}", soft_wrap=True)
    if summary["updates"] is not None:
        _raise_failures(summary["updates"])
    return result


def _raise_failures(updates: Mapping[str, Any]) -> None:
    if not updates["means_agree"]:
        distance = updates["largest_disagreement_in_standard_errors"]
        raise CheckError(
            f"the mean first update depends on the rank: two means differ by {distance:.1f} standard errors",
            where="updates",
            next_step="repeat with another --seed and more --update-seeds: this happens by chance once in 1000 times",
        )
    for path in updates["paths"]:
        if not path["passed"]:
            raise CheckError(
                f"Adam's path changes under p = {path['p']:g}, q = {path['q']:g}",
                where="updates",
                why=f"the updates differ by {path['difference']:.2g}, the control by {path['control']:.2g}",
            )


def paper_summary(result: PaperResult) -> dict[str, Any]:
    """Return the contents of summary.json and of `--json`, None for analyses that were not run."""

    def of(result: Any, summary: Callable[[Any], Any]) -> Any:
        return None if result is None else summary(result)

    adapters = [
        {
            "label": adapter.label,
            "directory": str(adapter.directory),
            "modules": len(adapter.modules),
            "trained_parameters": adapter.element_count,
            "stored_bytes": adapter.stored_bytes,
        }
        for adapter in result.adapters
    ]
    return {
        "adapters": adapters,
        "similarity": of(result.similarity, similarity_by_kind),
        "amplification": of(result.amplification, lambda adapters: [amplification_by_kind(rows) for rows in adapters]),
        "merging": of(result.merging, asdict),
        "memory": of(result.memory, MemoryResult.as_json),
        "updates": of(result.claims, _claims),
        "sweep": of(result.sweep, lambda sweep: [asdict(row) for row in sweep.rows]),
    }


def _claims(claims: OptimizerClaims) -> dict[str, Any]:
    distance = largest_disagreement(claims.updates)
    return {
        "ranks": [
            {"rank": of.rank, "mean": of.mean, "standard_error": of.standard_error, "standard_deviation": of.deviation}
            for of in claims.updates
        ],
        "seeds": len(claims.updates[0].along_descent),
        "largest_disagreement_in_standard_errors": distance,
        "means_agree": distance <= LARGEST_STANDARD_ERRORS,
        "paths": [
            {name: getattr(path, name) for name in ("p", "q", "difference", "control", "passed")}
            for path in claims.paths
        ],
    }


def _files(result: PaperResult) -> dict[str, bytes]:
    """Return pictures and tables by file name."""
    files: dict[str, bytes] = {}
    labels = [adapter.label for adapter in result.adapters]
    if result.similarity is not None:
        maps = similarity_maps(result.similarity)
        files["similarity.csv"] = _csv(_map_rows(maps))
        files["similarity.png"] = plots.draw_similarity(maps, *labels)
        files["similarity_layers.csv"] = _csv(map(_layer_row, result.similarity))
        files["similarity_layers.png"] = plots.draw_similarity_by_layer(result.similarity, *labels)
    for suffix, label, rows in zip(("", "_2"), labels, result.amplification or (), strict=False):
        files[f"amplification{suffix}.csv"] = _csv(
            asdict(row) | {"factor": row.factor, "random_factor": row.random_factor} for row in rows
        )
        files[f"amplification{suffix}.png"] = plots.draw_amplification(rows, label)
    if result.merging is not None:
        files["merging.png"] = plots.draw_merging(result.merging)
    if result.memory is not None:
        files["memory.png"] = plots.draw_memory(result.memory)
    if result.claims is not None:
        updates, paths = result.claims
        files["first_updates.png"] = plots.draw_first_updates(updates)
        files["first_updates.csv"] = _csv(
            {"rank": of.rank, "seed": seed, "along_descent": value}
            for of in updates
            for seed, value in enumerate(of.along_descent)
        )
        files["adam_path.png"] = plots.draw_adam_paths(paths)
        files["adam_path.csv"] = _csv(
            {"p": path.p, "q": path.q, "step": step, "difference": difference, "control": control}
            for path in paths
            for step, (difference, control) in enumerate(
                zip(path.differences, path.control_differences, strict=True), 1
            )
        )
    if result.sweep is not None:
        files["sweep.png"] = plots.draw_sweep(result.sweep)
        columns = ("targets", "rank", "trained_parameters")
        files["sweep.csv"] = _csv(
            {name: getattr(row.point, name) for name in columns} | {name: getattr(row, name) for name in MEASURED}
            for row in result.sweep.rows
        )
    return files


def _csv(rows: Iterable[Mapping[str, object]]) -> bytes:
    """Return a .csv file of at least one row. All rows have the same columns."""
    lines = list(rows)
    return csv_bytes(list(lines[0]), (list(line.values()) for line in lines))


def _map_rows(maps: Sequence[SimilarityMap]) -> Iterable[dict[str, object]]:
    """Iterate over the cells of similarity.png, which are means over layers, to keep the file small."""
    for each in maps:
        for (i, j), value in np.ndenumerate(each.similarity):
            numbers = {"similarity": value, "random": each.random[i, j], "expected_random": each.expected[i, j]}
            place = {"kind": each.kind, "factor": each.factor, "modules": each.modules, "i": i + 1, "j": j + 1}
            yield place | {name: f"{number:.6g}" for name, number in numbers.items()}


def _layer_row(row: ModuleSimilarity) -> dict[str, object]:
    """Return a cell of similarity_layers.png, with φ of the first directions and of all directions."""
    first_rank, second_rank = row.similarity.shape
    first, full, chance = row.ends
    numbers = {"first_direction": first, "at_smaller_rank": row.at_smaller_rank, "all_directions": full}
    numbers["expected_random_all_directions"] = chance
    sizes = {"first_rank": first_rank, "second_rank": second_rank, "dimension": row.dimension}
    place: dict[str, object] = {"module": row.module, "factor": row.factor}
    return place | sizes | {name: f"{number:.6g}" for name, number in numbers.items()}


def _print_tables(console: Console, result: PaperResult, summary: Mapping[str, Any]) -> None:
    """Print every analysis that was run, in the order of the paper's claims."""
    labels = [adapter.label for adapter in result.adapters]
    if result.sweep is not None:
        _print_sweep(console, result.sweep)
    if result.similarity is not None:
        rows = [
            (f"{kind['kind']} {kind['factor']}", str(kind["modules"]), *_numbers(kind, *_SIMILARITY))
            for kind in summary["similarity"]
        ]
        title = f"\nSubspace similarity: {labels[0]} against {labels[1]} (mean over the layers)"
        print_table(console, title, ("factor", "modules", "φ(1, 1)", "by chance", "φ(r, r′)", "by chance"), rows)
    for label, kinds in zip(labels, summary["amplification"] or (), strict=False):
        rows = [(kind["kind"], str(kind["modules"]), *_numbers(kind, *_AMPLIFICATION)) for kind in kinds]
        columns = ("module", "modules", "‖ΔW‖", "‖W‖", "‖UᵀWV‖: ΔW", "of W", "random", "amplification", "by chance")
        print_table(console, f"\nAmplification: {label} (mean over the layers)", columns, rows)
    if result.merging is not None:
        _print_merging(console, result.merging)
    if result.memory is not None:
        _print_memory(console, result.memory)
    if summary["updates"] is not None:
        _print_claims(console, summary["updates"])


_SIMILARITY = ("first_direction", "random_first_direction", "all_directions", "random_all_directions")
_AMPLIFICATION = (*NORMS, "factor", "random_factor")


def _numbers(row: Mapping[str, Any], *names: str) -> list[str]:
    """Format numbers with four digits, and None as an empty string."""
    return ["" if row[name] is None else f"{row[name]:.4g}" for name in names]


def _print_sweep(console: Console, result: SweepResult) -> None:
    rows = [
        (
            row.point.targets,
            str(row.point.rank),
            f"{row.point.trained_parameters:,}",
            *_numbers(vars(row), "base_eval_loss"),
            f"{row.eval_loss:.4f}",
            "" if row.exact_match is None else f"{row.exact_match:.1%}",
            f"{row.train_s:.0f} s",
            "yes" if row.point.budget else "",
        )
        for row in result.rows
    ]
    columns = ("targets", "rank", "trained", "base loss", "held-out loss", "exact match", "training", "at the budget")
    print_table(console, f"\nWhich weights, and how small a rank (budget: {result.budget:,} numbers)", columns, rows)


def _print_merging(console: Console, result: MergeResult) -> None:
    def ratio(of: Ratio) -> str:
        return f"{of.median:.3f} [{of.lower:.3f}, {of.upper:.3f}]"

    rows = [
        (f"{of.documents} × {of.tokens} tokens", f"{1000 * of.base_s:.1f} ms", ratio(of.adapter), ratio(of.merged))
        for of in result.times
    ]
    columns = ("forward pass", "base", "with adapter / base", "merged / base")
    print_table(console, "\nLatency before and after merging (median [quartiles])", columns, rows)
    console.print(
        f"Merged weights give the hidden states of base and adapter to {result.difference:.1e} of their size."
    )


def _print_memory(console: Console, result: MemoryResult) -> None:
    def cells(trained: str, memory: StepMemory, stored_bytes: int) -> tuple[str, ...]:
        if memory.bytes is None:
            measured = "too small to measure"
        elif not memory.measured_bytes:
            measured = "does not fit here"
        else:
            low, high = (value / _MEBIBYTE for value in (min(memory.measured_bytes), max(memory.measured_bytes)))
            measured = f"{memory.bytes / _MEBIBYTE:,.1f} MiB [{low:,.1f}, {high:,.1f}]"
        computed, stored = (f"{size / _MEBIBYTE:,.1f} MiB" for size in (memory.computed_bytes, stored_bytes))
        return trained, f"{memory.trained:,}", computed, measured, stored

    rows = [
        cells("adapter", result.adapter, result.adapter_stored_bytes),
        cells("every weight", result.full, result.full_stored_bytes),
        ("ratio", "", "", f"{result.memory_ratio:.1f}" if result.memory_ratio else "", f"{result.stored_ratio:.1f}"),
    ]
    columns = ("trained", "numbers", "computed", "measured [range]", "stored, float32")
    print_table(console, "\nMemory of an optimizer step without activations, and what is stored", columns, rows)


def _print_claims(console: Console, claims: Mapping[str, Any]) -> None:
    """Print the results of `_claims`."""
    title = (
        f"\nFirst update along the descent at alpha {FIRST_UPDATE_ALPHA:g}, scaling alpha / rank: "
        f"{claims['seeds']} fresh adapters each"
    )
    rows = [
        (f"{of['rank']}", f"{of['mean']:.6g}", f"{of['standard_error']:.2g}", f"{of['standard_deviation']:.2g}")
        for of in claims["ranks"]
    ]
    print_table(console, title, ("rank", "mean", "standard error", "standard deviation of one"), rows)
    how = (
        f": the two furthest apart differ by {claims['largest_disagreement_in_standard_errors']:.1f} standard errors "
        f"of their difference (bound {LARGEST_STANDARD_ERRORS:g})."
    )
    verdict = Text("agree") if claims["means_agree"] else Text("DO NOT AGREE", style=_BAD)
    console.print(Text.assemble("The means ", verdict, how))
    compared: list[tuple[str | Text, ...]] = [
        (
            f"{path['p']:g}, {path['q']:g}",
            f"{path['difference']:.2g}",
            f"{path['control']:.2g}" if path["q"] != 1 else "",
            "same path" if path["passed"] else Text("ANOTHER PATH", style=_BAD),
        )
        for path in claims["paths"]
    ]
    title = "\nAdam's path under alpha/(pq), p · lora_A, rates p and q times as large"
    columns = ("p, q", "largest difference of ΔW", "lora_B's rate unchanged", f"bound {LARGEST_DIFFERENCE:g}")
    print_table(console, title, columns, compared)
