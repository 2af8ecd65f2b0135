"""What `backhand paper --output DIR` leaves: pictures, every number as .csv, and summary.json."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from backhand.adapters.atomic_files import make_directory, write_atomically
from backhand.arithmetic.module_paths import kind_of
from backhand.lab.paper_adam_path import PathComparison
from backhand.lab.paper_amplification import Amplification
from backhand.lab.paper_first_update import LARGEST_STANDARD_ERRORS, largest_disagreement
from backhand.lab.paper_plots import (
    draw_amplification,
    draw_memory,
    draw_merging,
    draw_similarity,
    draw_similarity_by_layer,
    draw_sweep,
)
from backhand.lab.paper_run import PaperResult
from backhand.lab.paper_similarity import ModuleSimilarity, SimilarityMap, similarity_maps
from backhand.lab.paper_sweep import SweepRow
from backhand.lab.paper_update_plots import draw_adam_paths, draw_first_updates

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
    """Write every file, each in one step over an older one of its name; returns the names.

    Raises:
        UsageError: `directory` is a file.
        ResourceError: it cannot be written.
    """
    make_directory(directory)
    files: dict[str, bytes] = {}
    if result.similarity is not None:
        first, second = (adapter.label for adapter in result.adapters)
        maps = similarity_maps(result.similarity)
        files["similarity.csv"] = _csv(_MAP_COLUMNS, _map_lines(maps))
        files["similarity.png"] = draw_similarity(maps, first, second)
        files["similarity_layers.csv"] = _csv(_LAYER_COLUMNS, _layer_lines(result.similarity))
        files["similarity_layers.png"] = draw_similarity_by_layer(result.similarity, first, second)
    for number, (adapter, rows) in enumerate(zip(result.adapters, result.amplification or [], strict=False), 1):
        suffix = "" if number == 1 else f"_{number}"
        fields = [*asdict(rows[0]), "factor", "random_factor"]
        files[f"amplification{suffix}.csv"] = _csv(fields, ([getattr(row, name) for name in fields] for row in rows))
        files[f"amplification{suffix}.png"] = draw_amplification(rows, adapter.label)
    if result.merging is not None:
        files["merging.png"] = draw_merging(result.merging)
    if result.memory is not None:
        files["memory.png"] = draw_memory(result.memory)
    if result.updates is not None and result.paths is not None:
        files["first_updates.png"] = draw_first_updates(result.updates)
        lines = ((u.rank, seed, value) for u in result.updates for seed, value in enumerate(u.along_descent))
        files["first_updates.csv"] = _csv(("rank", "seed", "along_descent"), lines)
        files["adam_path.png"] = draw_adam_paths(result.paths)
        files["adam_path.csv"] = _csv(("p", "q", "step", "difference", "control"), _path_lines(result.paths))
    if result.sweep is not None:
        files["sweep.png"] = draw_sweep(result.sweep)
        header = ("targets", "rank", "trained_parameters", "base_eval_loss", "eval_loss", "exact_match", "train_s")
        files["sweep.csv"] = _csv(header, ([*_point(r), *_measured(r)] for r in result.sweep.rows))
    names = [*files, "summary.json"]
    files["summary.json"] = _json(paper_summary(result) | {"files": names})
    for name, data in files.items():
        write_atomically(directory / name, data)
    return names


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
            | {"factor": _finite(mean.factor), "random_factor": _finite(mean.random_factor)}
        )
    return found


def _updates(result: PaperResult) -> dict[str, Any]:
    assert result.updates is not None and result.paths is not None
    apart = largest_disagreement(result.updates)
    return {
        "ranks": [
            {
                "rank": update.rank,
                "mean": update.mean,
                "standard_error": update.standard_error,
                "standard_deviation": update.deviation,
            }
            for update in result.updates
        ],
        "seeds": len(result.updates[0].along_descent),
        "largest_disagreement_in_standard_errors": apart,
        "means_agree": apart <= LARGEST_STANDARD_ERRORS,
        "paths": [
            {"p": path.p, "q": path.q, "difference": path.difference, "control": path.control, "passed": path.passed}
            for path in result.paths
        ],
    }


def _point(row: SweepRow) -> tuple[object, ...]:
    return row.point.targets, row.point.rank, row.point.trained_parameters


def _measured(row: SweepRow) -> tuple[object, ...]:
    return row.base_eval_loss, row.eval_loss, row.exact_match, row.train_s


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


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


def _csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return file.getvalue().encode()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
