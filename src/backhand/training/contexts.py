"""Contexts of prompt baking: their texts, and a run for each file of a directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace

from backhand.data.context import context_files, context_text, is_directory, named_contexts
from backhand.distributed.launch import in_process_group
from backhand.errors import UsageError
from backhand.options.config import TrainConfig
from backhand.options.objectives import ObjectiveOptions
from backhand.runs.directory import CONFIG
from backhand.words import name_list


def with_context_text(objective: ObjectiveOptions) -> ObjectiveOptions:
    """Return the options with the contents of the files that `context` names.

    Raises:
        UsageError: a file cannot be read.
    """
    if objective.context is None:
        return objective
    read: Callable[[str], str] = context_text if objective.context_column is None else named_contexts
    return replace(objective, context=read(objective.context))


def count_contexts(objective: ObjectiveOptions) -> int:
    """Return the number of contexts of the teacher, of options `with_context_text`."""
    return 1 if objective.context is None or objective.context_column is None else len(json.loads(objective.context))


def runs_per_context(config: TrainConfig) -> Mapping[str, TrainConfig]:
    """Return a configuration for each file of a directory of contexts, by its name; empty if one run was asked for.

    The run directories are inside `output`. With `resume`, those that do not exist yet are new runs, unless `output` is
    itself the run to resume.

    Raises:
        UsageError: a run directory exists already, or a launcher has started this process.
    """
    objective, run = config.objective, config.run
    context = objective.context
    if context is None or objective.context_column is not None or not is_directory(context):
        return {}
    if run.resume and (run.output / CONFIG).exists():  # one run, whose configuration has the column
        return {}
    if in_process_group():
        raise UsageError(
            f"{context} is a directory, and a launcher starts the processes of one run",
            where="context",
            next_step="give --workers instead of the launcher, or start each file on its own",
        )
    files = context_files(context)
    outputs = {name: run.output / name for name in files}
    existing = [name for name, path in outputs.items() if os.path.lexists(path)]
    if existing and not (run.resume or run.overwrite):
        raise UsageError(
            f"{name_list(existing)} {'exist' if len(existing) > 1 else 'exists'} already",
            where=f"output, {run.output}",
            next_step="give another --output, --resume to continue these runs, or --overwrite",
        )
    return {
        name: replace(
            config,
            objective=replace(objective, context=str(path)),
            run=replace(run, output=outputs[name], resume=run.resume and name in existing),
        )
        for name, path in files.items()
    }
