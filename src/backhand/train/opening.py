"""What a run says before its first step: model, rows, adapter, plan, a line each."""

from __future__ import annotations

from backhand.data.packing import micro_batches
from backhand.generate.notes import labelled
from backhand.train.job import Job
from backhand.train.memory_plan import in_words


def opening_facts(job: Job, continued: bool) -> tuple[str, ...]:
    """The lines.

    Args:
        job: ready for its first step.
        continued: whether it goes on from a checkpoint.
    """
    model, options = job.config.model, job.config.optimization
    lora, report = job.bound.lora, job.train.report
    threads = f"{model.threads} thread{'s' if model.threads != 1 else ''} on {model.device}"
    ranks = sorted({slot.rank for slot in lora.slots.values()})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    cut = f"{job.memory.micro_batch_rows} at a time, recompute {job.memory.recompute}"
    facts = [f"model: {model.model} ({job.source.origin}), {model.dtype}, {job.choice.name} engine, {threads}"]
    facts += [labelled(note) for note in (job.choice.note, *job.notes) if note]
    facts += [f"data: {line}" for line in report.lines()]
    if job.held_out is not None:
        facts += [f"held out: {line}" for line in job.held_out.report.lines()]
    facts.append(
        f"adapter: {lora.element_count:,} parameters in {len(dict(lora.named_tensors()))} tensors of {len(lora.slots)} "
        f"modules, rank {rank}; "
        f"{report.supervised_tokens / max(1, report.documents):,.1f} supervised tokens a row"
    )
    facts.append(
        f"plan: {job.total_steps:,} steps of {options.batch_rows} rows, {cut}; "
        f"peak memory about {in_words(job.memory.peak_bytes)}"
    )
    facts += _shared_facts(job)
    if continued:
        facts.append("continuing from a checkpoint")
    return tuple(facts)


_STEPS_COUNTED = 200


def _shared_facts(job: Job) -> list[str]:
    """How many tokens of the first steps are computed, where rows share what they begin with."""
    packer = job.packer
    steps = [job.sampler.rows_of(step) for step in range(min(job.total_steps, _STEPS_COUNTED))]
    tokens = sum(packer.tokens(rows) for rows in steps)
    computed = sum(
        packer.positions(group)
        for rows in steps
        for group in micro_batches(rows, packer.lengths, max_rows=job.memory.micro_batch_rows)
    )
    if computed == tokens:
        return []
    return [f"rows begin alike: {1 - computed / tokens:.0%} of their tokens are computed once for a whole micro-batch"]
