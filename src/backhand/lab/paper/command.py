"""`backhand paper`: tables on the terminal, and with `--output` pictures, every number as .csv, and summary.json."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from backhand.arithmetic.findings import kind_of, print_table
from backhand.errors import CheckError
from backhand.files import csv_bytes, make_directory, write_with_summary
from backhand.lab.paper.amplification import Amplification
from backhand.lab.paper.analyses import PaperResult, run_paper
from backhand.lab.paper.memory import MemoryResult, StepMemory
from backhand.lab.paper.merging import MergeResult, Ratio
from backhand.lab.paper.optimizer_claims import (
    FIRST_UPDATE_ALPHA,
    LARGEST_DIFFERENCE,
    LARGEST_STANDARD_ERRORS,
    PathComparison,
    largest_disagreement,
)
from backhand.lab.paper.options import PaperOptions
from backhand.lab.paper.plots import (
    draw_adam_paths,
    draw_amplification,
    draw_first_updates,
    draw_memory,
    draw_merging,
    draw_similarity,
    draw_similarity_by_layer,
    draw_sweep,
)
from backhand.lab.paper.similarity import ModuleSimilarity, SimilarityMap, similarity_maps
from backhand.lab.paper.sweep import SweepResult
from backhand.terminal import console_for_tables, working
from backhand.words import finite_or_none, show_notes

_MAP_COLUMNS = ("kind", "factor", "modules", "i", "j", "similarity", "random", "expected_random")

_LAYER_COLUMNS = (
    "module",
    "factor",
    "first_rank",
    "second_rank",
    "dimension",
    "first_direction",
    "at_smaller_rank",
    "all_directions",
    "expected_random_all_directions",
)

_NORMS = ("update_norm", "weight_norm", "along_update", "along_weight", "along_random")


def write_paper(directory: Path, result: PaperResult) -> list[str]:
    """Write every file; see `write_with_summary`."""
    files: dict[str, bytes] = {}
    if result.similarity is not None:
        first, second = (adapter.label for adapter in result.adapters)
        maps = similarity_maps(result.similarity)
        files["similarity.csv"] = csv_bytes(_MAP_COLUMNS, _map_lines(maps))
        files["similarity.png"] = draw_similarity(maps, first, second)
        files["similarity_layers.csv"] = csv_bytes(_LAYER_COLUMNS, _layer_lines(result.similarity))
        files["similarity_layers.png"] = draw_similarity_by_layer(result.similarity, first, second)
    for number, (adapter, rows) in enumerate(zip(result.adapters, result.amplification or [], strict=False), 1):
        suffix = "" if number == 1 else f"_{number}"
        fields = [*asdict(rows[0]), "factor", "random_factor"]
        files[f"amplification{suffix}.csv"] = csv_bytes(
            fields, ([getattr(row, name) for name in fields] for row in rows)
        )
        files[f"amplification{suffix}.png"] = draw_amplification(rows, adapter.label)
    if result.merging is not None:
        files["merging.png"] = draw_merging(result.merging)
    if result.memory is not None:
        files["memory.png"] = draw_memory(result.memory)
    if result.updates is not None and result.paths is not None:
        files["first_updates.png"] = draw_first_updates(result.updates)
        lines = ((u.rank, seed, value) for u in result.updates for seed, value in enumerate(u.along_descent))
        files["first_updates.csv"] = csv_bytes(("rank", "seed", "along_descent"), lines)
        files["adam_path.png"] = draw_adam_paths(result.paths)
        files["adam_path.csv"] = csv_bytes(("p", "q", "step", "difference", "control"), _path_lines(result.paths))
    if result.sweep is not None:
        files["sweep.png"] = draw_sweep(result.sweep)
        header = ("targets", "rank", "trained_parameters", "base_eval_loss", "eval_loss", "exact_match", "train_s")
        lines_of = (
            (row.point.targets, row.point.rank, row.point.trained_parameters, *astuple(row)[1:])
            for row in result.sweep.rows
        )
        files["sweep.csv"] = csv_bytes(header, lines_of)
    return write_with_summary(directory, files, paper_summary(result))


def paper_summary(result: PaperResult) -> dict[str, Any]:
    """The findings in numbers, as summary.json and `--json` give them."""
    return {
        "adapters": [
            {
                "label": adapter.label,
                "directory": str(adapter.directory),
                "modules": len(adapter.modules),
                "trained_parameters": adapter.element_count,
                "stored_bytes": adapter.stored_bytes,
            }
            for adapter in result.adapters
        ],
        "similarity": None if result.similarity is None else similarity_by_kind(result.similarity),
        "amplification": None
        if result.amplification is None
        else [amplification_by_kind(rows) for rows in result.amplification],
        "merging": None if result.merging is None else asdict(result.merging),
        "memory": None
        if result.memory is None
        else asdict(result.memory)
        | {"memory_ratio": result.memory.memory_ratio, "stored_ratio": result.memory.stored_ratio},
        "updates": None if result.updates is None else _updates(result),
        "sweep": None if result.sweep is None else [asdict(row) for row in result.sweep.rows],
    }


def similarity_by_kind(rows: Sequence[ModuleSimilarity]) -> list[dict[str, Any]]:
    """For each kind of module and factor, mean over the layers: φ(1, 1), φ at the full ranks, and what chance gives."""
    found = []
    for kind, factor in dict.fromkeys((kind_of(row.module), row.factor) for row in rows):
        chosen = [row for row in rows if (kind_of(row.module), row.factor) == (kind, factor)]
        expected = [float(max(row.similarity.shape)) / row.dimension for row in chosen]
        found.append(
            {
                "kind": kind,
                "factor": factor,
                "modules": len(chosen),
                "first_direction": statistics.fmean(float(row.similarity[0, 0]) for row in chosen),
                "all_directions": statistics.fmean(float(row.similarity[-1, -1]) for row in chosen),
                "random_first_direction": statistics.fmean(1 / row.dimension for row in chosen),
                "random_all_directions": statistics.fmean(expected),
            }
        )
    return found


def amplification_by_kind(rows: Sequence[Amplification]) -> list[dict[str, Any]]:
    """For each kind of module, mean over the layers; the factors are quotients of these means, as in a table.

    (A mean of quotients would follow the layers whose ‖UᵀWV‖ is next to nothing.)
    """
    found = []
    for kind in dict.fromkeys(kind_of(row.module) for row in rows):
        chosen = [row for row in rows if kind_of(row.module) == kind]
        mean = Amplification(
            kind,
            max(row.directions for row in chosen),
            **{name: statistics.fmean(getattr(row, name) for row in chosen) for name in _NORMS},
        )
        found.append(
            {"kind": kind, "modules": len(chosen)}
            | {name: getattr(mean, name) for name in _NORMS}
            | {"factor": finite_or_none(mean.factor), "random_factor": finite_or_none(mean.random_factor)}
        )
    return found


def _updates(result: PaperResult) -> dict[str, Any]:
    assert result.updates is not None and result.paths is not None
    apart = largest_disagreement(result.updates)
    return {
        "ranks": [
            {"rank": of.rank, "mean": of.mean, "standard_error": of.standard_error, "standard_deviation": of.deviation}
            for of in result.updates
        ],
        "seeds": len(result.updates[0].along_descent),
        "largest_disagreement_in_standard_errors": apart,
        "means_agree": apart <= LARGEST_STANDARD_ERRORS,
        "paths": [
            {"p": path.p, "q": path.q, "difference": path.difference, "control": path.control, "passed": path.passed}
            for path in result.paths
        ],
    }


def _map_lines(maps: Sequence[SimilarityMap]) -> Iterable[tuple[object, ...]]:
    """Every cell of similarity.png; those of each layer alone would make a file of megabytes."""
    for each in maps:
        for (i, j), value in np.ndenumerate(each.similarity):
            numbers = (f"{number:.6g}" for number in (value, each.random[i, j], each.expected[i, j]))
            yield each.kind, each.factor, each.modules, i + 1, j + 1, *numbers


def _layer_lines(rows: Sequence[ModuleSimilarity]) -> Iterable[tuple[object, ...]]:
    """Every cell of similarity_layers.png, with φ of the first directions and of all beside it."""
    for row in rows:
        first, second = row.similarity.shape
        measured = (float(row.similarity[0, 0]), row.at_smaller_rank, float(row.similarity[-1, -1]))
        numbers = (f"{number:.6g}" for number in (*measured, max(first, second) / row.dimension))
        yield row.module, row.factor, first, second, row.dimension, *numbers


def _path_lines(paths: Sequence[PathComparison]) -> Iterable[tuple[object, ...]]:
    for path in paths:
        for step, pair in enumerate(zip(path.differences, path.control_differences, strict=True), 1):
            yield path.p, path.q, step, *pair


def paper_command(options: PaperOptions) -> PaperResult:
    """Run the chosen analyses; print tables, or one JSON object with `json`; write files to `output`.

    Raises:
        UsageError: an option out of range, `output` is a file, or the adapters have no module in common.
        ArtifactError: model or adapter cannot be read, or do not belong together.
        ResourceError: `output` cannot be written.
        CheckError: a claim about the optimizer does not hold. What was found is printed and written first.
    """
    options.validate()
    if options.run.output is not None:
        make_directory(options.run.output)
    if options.run.json:
        result = run_paper(options)
    else:
        with working() as say:
            result = run_paper(options, say)
    show_notes(result.notes)
    names = write_paper(options.run.output, result) if options.run.output is not None else []
    if options.run.json:
        sys.stdout.write(json.dumps(paper_summary(result) | {"files": names}, indent=2, allow_nan=False) + "\n")
    else:
        console = console_for_tables()
        print_paper(console, result)
        if options.run.output is not None:
            console.print()
            console.print(f"Written to {os.fspath(options.run.output)}: {', '.join(names)}", soft_wrap=True)
    _raise_failures(result)
    return result


def _raise_failures(result: PaperResult) -> None:
    if result.updates is None or result.paths is None:
        return
    apart = largest_disagreement(result.updates)
    if apart > LARGEST_STANDARD_ERRORS:
        raise CheckError(
            f"the mean first update depends on the rank: two means lie {apart:.1f} standard errors apart",
            where="updates",
            next_step="repeat with another --seed and more --update-seeds: chance does this once in a thousand times",
        )
    for path in result.paths:
        if not path.passed:
            raise CheckError(
                f"Adam's path changes under p = {path.p:g}, q = {path.q:g}",
                where="updates",
                why=f"the updates differ by {path.difference:.2g}, the control by {path.control:.2g}",
            )


_MEGABYTE = 2**20


def print_paper(console: Console, result: PaperResult) -> None:
    """Every analysis that was made, in the paper's order of claims."""
    if result.sweep is not None:
        _print_sweep(console, result.sweep)
    if result.similarity is not None:
        first, second = (adapter.label for adapter in result.adapters)
        _print_similarity(console, similarity_by_kind(result.similarity), first, second)
    for adapter, rows in zip(result.adapters, result.amplification or [], strict=False):
        _print_amplification(console, amplification_by_kind(rows), adapter.label)
    if result.merging is not None:
        _print_merging(console, result.merging)
    if result.memory is not None:
        _print_memory(console, result.memory)
    if result.updates is not None:
        _print_updates(console, result)


def _print_sweep(console: Console, result: SweepResult) -> None:
    rows = [
        (
            row.point.targets,
            str(row.point.rank),
            f"{row.point.trained_parameters:,}",
            _number(row.base_eval_loss),
            f"{row.eval_loss:.4f}",
            "" if row.exact_match is None else f"{row.exact_match:.1%}",
            f"{row.train_s:.0f} s",
            "yes" if row.point.budget else "",
        )
        for row in result.rows
    ]
    columns = ("targets", "rank", "trained", "base loss", "held-out loss", "exact match", "training", "at the budget")
    print_table(console, f"\nWhich weights, and how small a rank (budget: {result.budget:,} numbers)", columns, rows)


def _print_similarity(console: Console, kinds: Sequence[dict[str, Any]], first: str, second: str) -> None:
    rows = [
        (
            f"{kind['kind']} {kind['factor']}",
            str(kind["modules"]),
            _number(kind["first_direction"]),
            _number(kind["random_first_direction"]),
            _number(kind["all_directions"]),
            _number(kind["random_all_directions"]),
        )
        for kind in kinds
    ]
    columns = ("factor", "modules", "φ(1, 1)", "by chance", "φ(r, r′)", "by chance")
    print_table(console, f"\nSubspace similarity: {first} against {second} (mean over the layers)", columns, rows)


def _print_amplification(console: Console, kinds: Sequence[dict[str, Any]], label: str) -> None:
    rows = [
        (
            kind["kind"],
            str(kind["modules"]),
            *(_number(kind[name]) for name in ("update_norm", "weight_norm", "along_update", "along_weight")),
            *(_number(kind[name]) for name in ("along_random", "factor", "random_factor")),
        )
        for kind in kinds
    ]
    columns = ("module", "modules", "‖ΔW‖", "‖W‖", "‖UᵀWV‖: ΔW", "of W", "random", "amplification", "by chance")
    print_table(console, f"\nAmplification: {label} (mean over the layers)", columns, rows)


def _print_merging(console: Console, result: MergeResult) -> None:
    rows = [
        (
            f"{times.documents} × {times.tokens} tokens",
            f"{1000 * times.base_s:.1f} ms",
            _ratio(times.adapter),
            _ratio(times.merged),
        )
        for times in result.times
    ]
    columns = ("forward pass", "base", "adapter beside it / base", "merged / base")
    print_table(console, "\nLatency before and after merging (median [quartiles])", columns, rows)
    console.print(
        f"Merged weights give the hidden states of base and adapter to {result.difference:.1e} of their size."
    )


def _print_memory(console: Console, result: MemoryResult) -> None:
    ratio = result.memory_ratio
    rows = [
        ("adapter", *_memory_cells(result.adapter), f"{result.adapter_stored_bytes / _MEGABYTE:,.1f} MiB"),
        ("every weight", *_memory_cells(result.full), f"{result.full_stored_bytes / _MEGABYTE:,.1f} MiB"),
        ("ratio", "", "", "" if ratio is None else f"{ratio:.1f}", f"{result.stored_ratio:.1f}"),
    ]
    columns = ("trained", "numbers", "computed", "measured [range]", "stored, float32")
    print_table(console, "\nMemory of an optimizer step without activations, and what is stored", columns, rows)


def _memory_cells(memory: StepMemory) -> tuple[str, str, str]:
    if memory.bytes is None:
        measured = "too small to measure"
    elif not memory.measured_bytes:
        measured = "does not fit here"
    else:
        low, high = (value / _MEGABYTE for value in (min(memory.measured_bytes), max(memory.measured_bytes)))
        measured = f"{memory.bytes / _MEGABYTE:,.1f} MiB [{low:,.1f}, {high:,.1f}]"
    return f"{memory.trained:,}", f"{memory.computed_bytes / _MEGABYTE:,.1f} MiB", measured


def _print_updates(console: Console, result: PaperResult) -> None:
    assert result.updates is not None and result.paths is not None
    rows = [
        (str(update.rank), f"{update.mean:.6g}", f"{update.standard_error:.2g}", f"{update.deviation:.2g}")
        for update in result.updates
    ]
    seeds = len(result.updates[0].along_descent)
    title = (
        f"First update along the descent at alpha {FIRST_UPDATE_ALPHA:g}, scaling alpha / rank: "
        f"{seeds} fresh adapters each"
    )
    print_table(console, "\n" + title, ("rank", "mean", "standard error", "standard deviation of one"), rows)
    apart = largest_disagreement(result.updates)
    verdict = Text("agree") if apart <= LARGEST_STANDARD_ERRORS else Text("DO NOT AGREE", style="bold red")
    how = (
        f": the two furthest apart differ by {apart:.1f} standard errors of their difference "
        f"(bound {LARGEST_STANDARD_ERRORS:g})."
    )
    console.print(Text.assemble("The means ", verdict, how))
    compared: list[tuple[str | Text, ...]] = [
        (
            f"{path.p:g}, {path.q:g}",
            f"{path.difference:.2g}",
            f"{path.control:.2g}" if path.has_control else "",
            "same path" if path.passed else Text("ANOTHER PATH", style="bold red"),
        )
        for path in result.paths
    ]
    columns = ("p, q", "largest difference of ΔW", "lora_B's rate left as it was", f"bound {LARGEST_DIFFERENCE:g}")
    title = "Adam's path under alpha/(pq), p · lora_A, rates p and q times as large"
    print_table(console, "\n" + title, columns, compared)


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} [{ratio.lower:.3f}, {ratio.upper:.3f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
