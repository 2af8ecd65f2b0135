"""facts.json: the facts about a run before its first step (model, adapter, rows, memory, machine, digests).

The report reads this file instead of the model and the rows, also for an interrupted run.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from backhand.adapters.record import installed_packages
from backhand.data.examples import Example
from backhand.data.options import asking_options, reading_options, shell_quoted
from backhand.data.stored_examples import PreparedData
from backhand.data.token_view import documents_to_show, token_texts
from backhand.loop.state import Progress, RunState
from backhand.nn.decoder.class_head import has_score_head
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.families.config_fields import UnsupportedModel
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.gguf_tensors import gguf_architecture
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.weight_tiles import frozen_dense
from backhand.runs.directory import METRICS, RunDirectory
from backhand.runs.pair_results import held_out_pairs
from backhand.runs.row_changes import recorded_gain, recorded_loss_change
from backhand.runs.summary import RunSummary, constant_name, forgotten_nats, loss_unit
from backhand.system import memory_bytes, peak_rss_bytes
from backhand.training.advice import too_few_rows
from backhand.training.loaded_run import LoadedRun
from backhand.training.run_inputs import RunInputs
from backhand.words import apart

SHOWN_ROWS = 3
SHOWN_TOKENS = 400
_BINS = 32


def run_facts(run: LoadedRun) -> dict[str, Any]:
    """Return the contents of facts.json.

    It contains only the first few rows, token by token. Norms are Frobenius norms of the base weights in the compute
    dtype; None for a module without a weight.
    """
    tokenizer, names = run.inputs.source.tokenizer(), run.inputs.source.config.get("architectures")
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "total_steps": run.inputs.total_steps,
        "model": {
            "name": run.config.model.model,
            "origin": run.inputs.source.origin,
            "hub_id": run.inputs.source.hub_id,
            "file": _gguf_file(run.inputs.source),
            "architecture": str(names[0]) if isinstance(names, list) and names else None,
            "engine": run.inputs.engine.name,
            "note": run.inputs.engine.note,
            "dtype": run.config.model.dtype,
            "base": run.plan.memory.base,
            "quantized": run.inputs.source.quantized,
        },
        "modules": _modules(run),
        "memory": {"predicted_bytes": run.plan.memory.peak_bytes, "parts": dict(run.plan.memory.parts)},
        "data": {
            "train": _rows(run.inputs.train, tokenizer, shown=SHOWN_ROWS),
            "held_out": None if run.inputs.held_out is None else _rows(run.inputs.held_out, tokenizer, shown=0),
        },
        "labels": list(run.identity.labels),
        "digests": run.identity.facts,
        "packages": installed_packages(),
        "machine": machine(),
    }


def held_out_card(run: LoadedRun, progress: Progress) -> dict[str, object]:
    """Return the lines of the adapter's card on held-out rows; empty if none were measured.

    The first loss is that before the first step. A new head has none, and is compared with the best constant answer.
    """
    base, after, held_out = progress.base_eval_loss, progress.eval_loss, run.inputs.held_out
    from_adapter = progress.first_eval_loss not in (None, base) and not _has_new_head(run)
    before = progress.first_eval_loss if from_adapter else base
    since = " (the adapter it started from)" if from_adapter else ""
    if before is None or after is None or held_out is None:
        return {}
    objective = run.config.objective
    card: dict[str, object] = {}
    if objective.objective == "grpo":
        first, last = apart(0.0 - before, 0.0 - after, 4)
        card["held-out reward"] = f"{first}{since} → {last} per answer"
    else:
        constant = since or (f" ({constant_name(objective.objective)})" if _has_new_head(run) else "")
        unit = loss_unit(objective.objective, {"problem_type": objective.problem_type})
        first, last = apart(before, after, 4)
        card["held-out loss"] = f"{first}{constant} → {last} {unit}"
    few = too_few_rows(held_out.report)
    card["held-out rows"] = f"{few:,}, too few to tell how much it helps on others" if few else len(held_out.examples)
    return card


def _has_new_head(run: LoadedRun) -> bool:
    """Return True if the adapter has a head that the base model lacks."""
    model = run.bound.model
    ranks = run.config.objective.objective == "rank" and isinstance(model, Decoder) and has_score_head(model)
    return run.inputs.trains_head and not ranks


def _gguf_file(source: ModelSource) -> str | None:
    return str(source.path) if isinstance(source, GGUFModel) else None


def machine() -> dict[str, Any]:
    """Return the machine's processor, cores, memory and system."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "system": platform.platform(terse=True),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _modules(run: LoadedRun) -> list[dict[str, Any]]:
    weights = dict(run.bound.model.frozen_tensors())
    return [
        {
            "name": name,
            "in_features": slot.in_features,
            "out_features": slot.out_features,
            "rank": slot.rank,
            "scaling": slot.scaling,
            "weight_norm": _norm(frozen_dense(weights[f"{name}.weight"])) if f"{name}.weight" in weights else None,
        }
        for name, slot in run.bound.lora.slots.items()
    ]


def _norm(weight: torch.Tensor) -> float:
    # Norms of rows are computed first: torch's float32 sum over a matrix of an 8B model is half a percent too small.
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).double()))


def _rows(data: PreparedData, tokenizer: Any, *, shown: int) -> dict[str, Any]:
    documents = data.examples.documents
    report = {name: value for name, value in vars(data.report).items() if name not in ("bad_rows", "empty_answers")}
    return {
        **report,
        "examples": len(data.examples),
        "sources": [asdict(form) for form in data.report.sources],
        "lengths": _histogram(documents.column("tokens")),
        "supervised": _histogram(documents.column("supervised")) if data.report.supervised_tokens else [],
        "shown": [_token_by_token(*one, tokenizer) for one in documents_to_show(data.examples, shown)],
    }


def _histogram(counts: npt.NDArray[np.int32]) -> list[dict[str, int]]:
    """Return the number of counts in each bin of equal width, `from` inclusive and `to` exclusive."""
    low, high = int(counts.min()), int(counts.max())
    width = max(1, math.ceil((high + 1 - low) / _BINS))
    bins = np.bincount((counts - low) // width).tolist()
    return [
        {"from": low + number * width, "to": low + (number + 1) * width, "documents": documents}
        for number, documents in enumerate(bins)
    ]


def _token_by_token(example: Example, label: str, tokenizer: Any) -> dict[str, Any]:
    """Return the first tokens of a document as [text, True if supervised], and the number of other tokens."""
    ids = example.input_ids[:SHOWN_TOKENS].tolist()
    texts = token_texts(ids, tokenizer)
    return {
        "source": example.source,
        "tokens": [[text, bool(marked)] for text, marked in zip(texts, example.supervised, strict=False)],
        "left_out": len(example) - len(ids),
        **({"label": label} if label else {}),
    }


def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def summarise(run: LoadedRun, state: RunState, directory: RunDirectory, world_size: int = 1) -> RunSummary:
    """Return the summary of a finished run."""
    progress = state.progress
    counted = {one.name: getattr(progress, one.name) for one in fields(RunSummary) if hasattr(progress, one.name)}
    lines = directory.lines(METRICS)
    peak_bytes, report = peak_rss_bytes(), run.inputs.train.report
    evaluations = [line for line in lines if line.get("eval_loss") is not None and line["step"] > 0]
    return RunSummary(
        **counted | {"train_s": round(progress.train_s, 3)},
        output=str(directory.path),
        adapter=str(directory.adapter),
        model=run.config.model.model,
        engine=run.inputs.engine.name,
        engine_note=run.inputs.engine.note,
        dtype=run.config.model.dtype,
        base=run.plan.memory.base,
        steps=progress.step,
        tokens_per_s=round(progress.tokens / progress.train_s, 1) if progress.train_s else 0.0,
        peak_rss_bytes=peak_bytes,
        predicted_rss_bytes=run.plan.memory.peak_bytes if peak_bytes > run.earlier_peak_bytes else None,
        trained_parameters=state.lora.element_count,
        adapted_modules=len(state.lora.slots),
        rows=len(run.inputs.train.examples),
        option_rows=report.option_rows,
        rows_seen=_rows_seen(run, progress.step),
        held_out_rows=0 if run.inputs.held_out is None else len(run.inputs.held_out.examples),
        malformed_rows=report.skipped_bad,
        too_long=report.too_long(*([] if run.inputs.held_out is None else [run.inputs.held_out.report])),
        repeated_rows=0 if run.inputs.held_out is None else run.inputs.held_out.report.repeated,
        world_size=world_size,
        objective=run.config.objective.objective,
        trains_head=run.inputs.trains_head,
        base_file=_gguf_file(run.inputs.source),
        base_architecture=_gguf_architecture(run.inputs),
        adapter_form=_form(state.lora),
        evaluations=len({line["step"] for line in evaluations}),
        held_out_pairs=held_out_pairs(lines, progress.best_step, run.config.objective.strength),
        loss_change=recorded_loss_change(lines, progress.best_step),
        **_rewards(lines, progress),
        forgotten_nats=forgotten_nats(lines, progress.best_step),
        reading=_reading(run),
        asking=asking_options(
            *(run.config.data, report.system),
            plain_text=report.bare and {source.form for source in report.sources} == {"text"},
        ),
        system=report.system,
        labels=tuple(run.identity.labels),
    )


def _gguf_architecture(inputs: RunInputs) -> str | None:
    """Return the base's architecture in GGUF files; None if no export has a GGUF file that is used as trained."""
    if any(question.has_letters for question in inputs.train.questions.values()):
        return None
    try:
        decoder_config(inputs.source.config)
    except UnsupportedModel:
        return None
    return gguf_architecture(inputs.source.config)


def _form(lora: LoRAParameters) -> str:
    """Return the form in which other programs than PEFT can read the adapter: `factors`, `merged`, or empty."""
    if any(slot.lora_bias or (slot.embedding and slot.use_dora) for slot in lora.slots.values()):
        return ""
    return "factors" if lora.plain else "merged"


def _rows_seen(run: LoadedRun, steps: int) -> int:
    """Return the number of different rows in the steps done. Every epoch contains each row once."""
    sampler = run.inputs.sampler
    epochs = sampler.epochs_done(steps)
    return sampler.records if epochs >= 1 else round(epochs * sampler.records)


def _reading(run: LoadedRun) -> str | None:
    """Return the options of `evaluate` for rows like those of the run; None if such rows need no answers."""
    if run.config.objective.objective == "bake" and run.config.objective.traits.samples:
        return None
    reading = reading_options(run.config.data)
    if run.config.objective.objective != "grpo":
        return reading
    options = run.config.rewards
    functions = "".join(f" --reward {shell_quoted(name)}" for name in options.reward)
    weights = "".join(f" --reward-weights {weight:g}" for weight in options.weights if {*options.weights} != {1.0})
    return f"{reading}{functions}{weights} --max-new-tokens {options.max_new_tokens}"


def _rewards(lines: Sequence[Mapping[str, Any]], progress: Progress) -> dict[str, Any]:
    """Return the summary's fields on rewards; empty without rewards."""
    rewards = [line["reward"] for line in lines if line.get("reward") is not None]
    if not rewards:
        return {}
    few = max(1, len(rewards) // 10)
    values: dict[str, Any] = {"first_reward": fmean(rewards[:few]), "last_reward": fmean(rewards[-few:])}
    if cut_off := [line["clipped_answers"] for line in lines if line.get("clipped_answers") is not None]:
        values["last_cut_off"] = fmean(cut_off[-few:])
    if progress.base_eval_loss is not None and progress.best_eval_loss is not None:
        values |= {"base_eval_reward": -progress.base_eval_loss, "best_eval_reward": -progress.best_eval_loss}
        values["reward_gain"] = recorded_gain(lines, progress.best_step)
    return values
