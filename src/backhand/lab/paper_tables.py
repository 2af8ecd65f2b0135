"""The paper's findings in tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from backhand.lab.paper_adam_path import LARGEST_DIFFERENCE
from backhand.lab.paper_files import amplification_by_kind, similarity_by_kind
from backhand.lab.paper_first_update import ALPHA, LARGEST_STANDARD_ERRORS, largest_disagreement
from backhand.lab.paper_memory import MemoryResult, StepMemory
from backhand.lab.paper_merging import MergeResult, Ratio
from backhand.lab.paper_run import PaperResult
from backhand.lab.paper_sweep import SweepResult

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


def _table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console.print()
    console.print(table)


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
    _table(console, f"Which weights, and how small a rank (budget: {result.budget:,} numbers)", columns, rows)


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
    _table(console, f"Subspace similarity: {first} against {second} (mean over the layers)", columns, rows)


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
    _table(console, f"Amplification: {label} (mean over the layers)", columns, rows)


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
    _table(console, "Latency before and after merging (median [quartiles])", columns, rows)
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
    _table(console, "Memory of an optimizer step without activations, and what is stored", columns, rows)


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
    title = f"First update along the descent at alpha {ALPHA:g}, scaling alpha / rank: {seeds} fresh adapters each"
    _table(console, title, ("rank", "mean", "standard error", "standard deviation of one"), rows)
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
    _table(console, title, columns, compared)


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} [{ratio.lower:.3f}, {ratio.upper:.3f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
