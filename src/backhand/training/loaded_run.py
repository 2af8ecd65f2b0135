"""Third stage of a run: the model is loaded, every option has its final value, and no file has been written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import torch

from backhand.adapters.loading import weight_names
from backhand.distributed.communicator import Communicator
from backhand.engines.engine import BoundModel, RunCache
from backhand.engines.machine import Machine
from backhand.loop.measuring import quantization_notes
from backhand.loop.step_plan import default_warmup_steps, five_times
from backhand.options.config import TrainConfig
from backhand.printing import going_on
from backhand.system import peak_rss_bytes
from backhand.training.hooks import Training
from backhand.training.identity import Identity
from backhand.training.plan import RunPlan, plan_run
from backhand.training.run_inputs import RunInputs, scaled_matrices
from backhand.training.starting_adapter import set_values


@dataclass(frozen=True)
class LoadedRun:
    """A run before its first step."""

    plan: RunPlan
    machine: Machine  # where it computes
    config: TrainConfig  # with every automatic choice filled in
    bound: BoundModel  # the model with its adapter
    identity: Identity
    notes: tuple[str, ...]  # messages for the user
    earlier_peak_bytes: int  # highest resident memory of the process before the run

    @property
    def inputs(self) -> RunInputs:
        """Model, rows and steps of the plan."""
        return self.plan.inputs

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.bound.model.dtype


def load_run(
    config: TrainConfig,
    machine: Machine,
    typed: frozenset[str] = frozenset(),
    processes: Communicator | None = None,
    run_cache: RunCache | None = None,
    training: Training | None = None,
) -> LoadedRun:
    """Plan a run and load its weights. Nothing is written.

    Args:
        config: validated; for a resumed run, the stored configuration.
        machine: from `resolve_machine`.
        typed: names of the options that the user gave explicitly.
        processes: of the run. Rank 0 chooses micro-batch, recomputation and base before any process reads weights.
        run_cache: shared with other runs of this process.
        training: as for `plan_run`.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: each says what to do.
    """
    earlier_peak_bytes, run_cache = peak_rss_bytes(), run_cache or RunCache()
    processes = Communicator() if processes is None else processes
    if not processes.is_main_process:
        rows, recompute, base = processes.broadcast_object(None)
        optimization = replace(config.optimization, micro_batch_rows=rows)
        model = replace(config.model, recompute=recompute, base=base)
        config = replace(config, optimization=optimization, model=model)
    plan = plan_run(config, machine, typed=typed, run_cache=run_cache, training=training)
    inputs, memory = plan.inputs, plan.memory
    if processes.is_main_process:
        processes.broadcast_object([memory.micro_batch_rows, memory.recompute, memory.base])
    with going_on("reading the base model"):
        bound = _load_weights(plan, machine, run_cache)
    rate, reason = inputs.learning_rate(inputs.config.optimization)
    rate_note = () if reason is None else (f"learning rate: {reason}",)
    resolved = _resolved_config(plan, machine, rate)
    set_values(resolved, bound)
    # Without answers, which are sampled later, there is no loss to measure.
    answered = () if config.objective.traits.samples else (inputs.held_out, inputs.train)
    documents = chain.from_iterable(rows.examples.documents for rows in answered if rows)
    quantized = quantization_notes(inputs.source, documents, memory.micro_batch_rows, machine.dtype, machine.device)
    return LoadedRun(
        plan,
        machine,
        resolved,
        bound,
        Identity(
            *(resolved, inputs.source, list(bound.lora.slots), inputs.train, inputs.held_out),
            *(inputs.trains_head, inputs.base_facts),
        ),
        (*rate_note, *plan.notes, *quantized, *bound.notes),
        earlier_peak_bytes,
    )


def _load_weights(plan: RunPlan, machine: Machine, run_cache: RunCache) -> BoundModel:
    """Load the model. The digests and the weight scale are computed while the weights are read."""
    inputs, memory = plan.inputs, plan.memory
    base_facts, layout, source = inputs.base_facts, inputs.layout, inputs.source
    base_facts.request(
        hashed=weight_names([slot.name for slot in layout.slots], source.tensor_names()),
        squared=scaled_matrices(source, layout),
    )
    adapter = inputs.config.adapter
    bound = inputs.engine.load(
        adapter, machine.device, memory.recompute, memory.base, run_cache, examine=base_facts.examine
    )
    base_facts.examine()  # tensors that were not loaded now: mapped ones, and those that an earlier run has loaded
    if memory.base == "dense":
        source.drop_mapped_pages()  # a dense base is in memory and is not read again
    return bound


def _resolved_config(plan: RunPlan, machine: Machine, learning_rate: float) -> TrainConfig:
    """Return the configuration with every automatic choice filled in."""
    config, memory, total_steps = plan.inputs.config, plan.memory, plan.inputs.total_steps
    interval = five_times(total_steps)
    warmup = config.optimization.warmup_steps
    return replace(
        config,
        model=replace(
            config.model,
            engine=plan.inputs.engine.name,
            dtype="bfloat16" if machine.dtype == torch.bfloat16 else "float32",
            device=str(machine.device),
            threads=machine.threads,
            recompute=memory.recompute,
            base=memory.base,
            cache_frozen=plan.hidden_states.where,
        ),
        optimization=replace(
            config.optimization,
            learning_rate=learning_rate,
            micro_batch_rows=memory.micro_batch_rows,
            warmup_steps=default_warmup_steps(total_steps) if warmup is None else warmup,
        ),
        run=replace(
            config.run, eval_every=config.run.eval_every or interval, save_every=config.run.save_every or interval
        ),
        objective=config.objective.resolved(),
        rewards=config.rewards.resolved() if config.rewards.reward else config.rewards,
    )
