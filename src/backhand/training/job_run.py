"""A job from its first step, or the one it was stopped at, to its summary.

directory made ready → guards → loop, with evaluations and checkpoints → summary → proof of resuming → answers
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from backhand.distributed.communicator import Communicator
from backhand.distributed.launch import alike, shared_checkpoint
from backhand.engines.engine import Shared
from backhand.engines.machine import MemoryKeeper, crowded_note
from backhand.errors import not_none
from backhand.kernels.quantized_matrix import QuantizedMatrix
from backhand.loop.answers import answers_file, measured_answers, stop_ids
from backhand.loop.evaluator import Judge
from backhand.loop.guards import BaseGuard, LearningGuard
from backhand.loop.loggers import Observers, RunStart
from backhand.loop.loop import TrainingLoop
from backhand.loop.measuring import HeldOut
from backhand.loop.objectives.objective import HeldOutObjective, Objective
from backhand.loop.rewards.guards import BOUNDS, LogprobCheck, RewardGuard
from backhand.loop.rewards.process import RewardProcess
from backhand.loop.rewards.rollout import Rollout
from backhand.loop.rewards.steps import HeldOutRewards, RewardedSteps
from backhand.loop.state import Progress, RunState, Saver
from backhand.loop.step import AdapterOptimizer
from backhand.loop.step_plan import StepPlan, derived_seed
from backhand.nn.available_memory import available_bytes
from backhand.nn.compute import gc_frozen
from backhand.options.config_file import config_table, dump_config
from backhand.runs.checkpoint import Checkpoint, CheckpointStore
from backhand.runs.directory import ANSWERS, CONFIG, FACTS, METRICS, SUMMARY, Proof, ProofLog, RunDirectory, proof_log
from backhand.runs.interruption import Interrupted, Interruption
from backhand.runs.status import status_kept
from backhand.runs.summary import RunSummary, read_summary
from backhand.training.advice import Curves, advice
from backhand.training.console import opening_facts
from backhand.training.facts import run_facts, summarise
from backhand.training.job import Job, Keeping, keeping
from backhand.training.reference import run_objectives
from backhand.training.resume import (
    begun_from,
    frozen_differences,
    proof_begin,
    prove_resume,
    refuse_differences,
    run_differences,
    state_digests,
)
from backhand.words import name_list


@dataclass
class JobRun:
    """A job in its directory."""

    job: Job  # model, adapter, rows and every choice
    directory: RunDirectory  # of the run, locked; where another process leads, only its name
    observer: Observers  # is told how it goes
    interruption: Interruption  # whether somebody asked to stop
    checkpoint: Checkpoint | None  # to go on from; None for a run that begins
    processes: Communicator  # that share the run; the first one writes
    shared: Shared = field(default_factory=Shared)  # with other runs of this process
    pause_at: int | None = None  # a step to stop after, with a checkpoint; None for none before the last
    begun: bool = False  # whether what lies in the directory is this run's
    _frozen_digest: str | None = None

    def train(self) -> RunSummary:
        """Run to the end. Returns and raises what the function `train` does."""
        job, config = self.job, self.job.config
        optimizer = AdapterOptimizer(job.bound.lora, config.optimization)
        state = RunState(job.bound.lora, optimizer, Progress())
        plan = StepPlan.of(config, job.total_steps)
        memory = MemoryKeeper(job.memory.peak_bytes) if config.model.tune_allocator else None
        with self.interruption.graceful(), ExitStack() as places:
            store = CheckpointStore(self.directory.checkpoints, self.directory.files, self.observer.noted)
            begin: int | None = None  # the step that the proof of resuming repeats the run from
            if self.processes.is_main_process:
                begin = proof_begin(store, self.checkpoint, config.run.prove_resume, job.total_steps)
            begin = self.processes.broadcast_object(begin)
            saver = Saver(
                self.directory,
                store,
                state,
                lambda: job.bound.adapter_files(job.identity.record(), self._card(state.progress)),
                lambda step: {
                    **job.identity.facts,
                    "frozen_digest": self._frozen_digest,
                    "sampler": job.sampler.position(step),
                },
                keep=config.run.keep,
                best_only=job.held_out is not None,
                protected=frozenset(() if begin is None else {begin}),
                make_room=memory.make_room if memory else lambda: None,
            )
            if self.processes.is_main_process and (self.checkpoint is None or self.checkpoint.step < job.total_steps):
                saver.require_room()
            self._begin(store, state, saver)
            self.begun = True
            finished_before = state.progress.finished
            log = proof_log(self.directory) if self.processes.is_main_process else _unwritten
            base_guard = BaseGuard(job.bound.model, log)
            digest = self._frozen_digest = base_guard.digest
            if self.checkpoint is not None and self.processes.is_main_process:
                self._refuse(frozen_differences(self.checkpoint.facts, digest))
            self._check_same(state)
            save = partial(self._save, saver, state)
            keeps = keeping(job, self.directory, digest, log=log, noted=self.observer.noted, shared=self.shared)
            kept = places.enter_context(keeps)
            objective, of_held_out = self._objectives(kept, log)
            rewarded = self._rewarded(places, log)
            judge = Judge(
                job.bound.model,
                state,
                plan,
                held_out=self._held_out(kept, of_held_out, rewarded),
                meter=job.neutral if job.neutral.documents else None,
                base_guard=base_guard,
                learning_guard=LearningGuard(job.bound.lora, optimizer, log),
                check_files=self._check_files(),
                observer=self.observer,
                save=save,
                processes=self.processes,
            )
            loop = TrainingLoop(
                *(job.bound.model, state, job.packer, job.sampler, plan, judge),
                observer=self.observer,
                memory=memory,
                processes=self.processes,
                kept=kept.train,
                objective=objective,
                rewarded=rewarded,
            )
            if memory is not None:
                memory.make_room()  # loading and digests leave gaps behind
            shown = status_kept(self.directory, job.total_steps, lambda: loop.state.progress.step)
            with shown if self.processes.is_main_process else nullcontext():
                facts = opening_facts(job, self.checkpoint is not None, self.processes)
                options = {
                    f"{part}.{name}": value for part, of in config_table(config).items() for name, value in of.items()
                }
                start = RunStart(job.total_steps, state.progress.step, facts, self.directory.path, options)
                self.observer.started(start)
                if not self._run_loop(loop, save, begin):
                    raise self._interrupted(state, f"continue with {self._resume_command()}")
                if rewarded is not None and not finished_before:
                    rewarded.logprob_check.finished()
                summary = self._summary(state, keep=finished_before)
                if begin is not None:
                    self._prove(loop, store, begin, log)
                summary = self._answer(summary)
        self.observer.ended(summary)
        return summary

    def _check_same(self, state: RunState) -> None:
        """What the processes have read and are about to change must be equal. Raises ArtifactError."""
        identity = self.job.identity.facts
        facts = {name: value for name, value in identity.items() if name.endswith("_digest")}
        del facts["settings_digest"]  # its parts tell more
        facts |= {f"model_config.{name}": value for name, value in identity["model_config"].items()}
        facts |= alike(identity["settings"])
        self.processes.assert_equal(
            {**facts, "base model": self._frozen_digest, "adapter": state_digests(state)["adapter"]}
        )

    def _save(self, saver: Saver, state: RunState, better: bool) -> None:
        """A checkpoint by the first process, of an adapter that all of them have."""
        self.processes.assert_equal_adapters(lambda: state_digests(state)["adapter"], state.progress.step)
        if self.processes.is_main_process:
            saver.save(better)
            self.directory.settle()

    def _answer(self, summary: RunSummary) -> RunSummary:
        """Let base and adapter answer held-out rows; what is attached afterwards is the adapter in `adapter/`.

        Returns:
            the summary, with how many answers were right.
        """
        job = self.job
        if job.held_out is None or not job.config.run.answers or not self.processes.is_main_process:
            return summary
        if self.processes.stop_requested:
            self.observer.noted("asked to stop: no held-out rows are answered for the report")
            return summary
        job.bound.fill(str(self.directory.adapter))
        asked = job.bound, job.source, job.held_out.examples, job.config
        self.directory.write(ANSWERS, answers_file(*asked))
        if summary.adapted_exact_match is None and (
            measured := measured_answers(
                *asked, job.identity.labels, summary.tokens, lambda: self.processes.stop_requested
            )
        ):
            summary = replace(summary, **measured)
            self.directory.write(SUMMARY, summary.to_json())
        return summary

    def _begin(self, store: CheckpointStore, state: RunState, saver: Saver) -> None:
        """Make the directory ready, and the state what it was where the run is continued."""
        job, config = self.job, self.job.config
        if not self.processes.is_main_process:
            if self.checkpoint is not None:
                state.restore(self.checkpoint, job.bound.model.dtype)
            return
        if not config.run.resume:
            if config.run.overwrite:
                self.directory.put_aside()
            # Whoever begins anew from this file must not be told to overwrite, or that a run is there.
            kept = replace(config, run=replace(config.run, overwrite=False))
            self.directory.write(CONFIG, dump_config(kept))
        else:
            if self.checkpoint is not None:
                self._refuse(run_differences(self.checkpoint.facts, job.identity))
            self.directory.mend()
        self.directory.make_checkpoints()
        self.directory.write(FACTS, json.dumps(run_facts(job), indent=1) + "\n")
        if not config.run.resume:
            return
        store.clean()
        if self.checkpoint is None:
            self.observer.noted("there is no checkpoint yet; the run begins at its first step")
            self.directory.forget_after(-1)
            return
        state.restore(self.checkpoint, job.bound.model.dtype)
        saver.restored(self.checkpoint.contents)
        self.directory.forget_after(self.checkpoint.step, evaluates_again=state.progress.evaluation_outstanding)

    def _run_loop(self, loop: TrainingLoop, save: Callable[[bool], None], begin: int | None) -> bool:
        """Run to the end, with a checkpoint where the proof of resuming is to begin."""
        with gc_frozen():
            if begin is not None and loop.state.progress.step <= begin:
                if not loop.run(until_step=begin):
                    return False
                save(False)
            if self.pause_at is None:
                return loop.run()
            if not loop.run(until_step=self.pause_at):
                return False
            save(False)  # unless it is saved
            return loop.state.progress.finished

    def _check_files(self) -> Callable[[], None]:
        """Asked at every step: are the base's mapped files as they were? Warns where they do not fit into memory."""
        source = self.job.source
        if not any(isinstance(tensor, QuantizedMatrix) for _, tensor in self.job.bound.model.frozen_tensors()):
            return lambda: None  # a dense base stands in memory
        note = crowded_note(source.mapped_bytes, available_bytes())
        if note is not None:
            self.observer.noted(note)
        return source.check_unchanged

    def _refuse(self, differences: list[str]) -> None:
        refuse_differences(differences, self.directory.path, self.job.config.model.force_base, self.observer.noted)

    def _interrupted(self, state: RunState, next_step: str) -> Interrupted:
        return Interrupted(self.interruption.requested or 0, state.progress.step, next_step)

    def _summary(self, state: RunState, *, keep: bool) -> RunSummary:
        """RewardInput now; of a run that was finished before, as it stands."""
        path = self.directory.path / SUMMARY
        if keep and (there := read_summary(path)) is not None:
            return there
        summary = summarise(self.job, state, self.directory, self.processes.world_size)
        if self.processes.is_main_process:
            curves = Curves.of(self.directory.lines(METRICS))
            usual, _ = self.job.rate(replace(self.job.config.optimization, learning_rate="auto"))
            said = advice(self.job.config, curves, self.job.total_steps, usual, self.directory.path)
            summary = replace(summary, advice=said and said[0], try_next=said and said[1])
            self.directory.write(SUMMARY, summary.to_json())
        return summary

    def _prove(self, loop: TrainingLoop, store: CheckpointStore, begin: int, log: ProofLog) -> None:
        if loop.state.progress.step < self.job.total_steps:
            self.observer.noted("the run ended early; the proof of resuming is left out")
            return
        checkpoint = not_none(
            shared_checkpoint(store.load(begin) if self.processes.is_main_process else None, self.processes)
        )
        if not prove_resume(loop, checkpoint, log):
            again = f"{self._resume_command()} --prove-resume {self.job.config.run.prove_resume}"
            raise self._interrupted(loop.state, f"the run is finished and not yet proved: {again}")
        self.observer.noted(f"resumed at step {begin}, the run ended in the same bits")

    def _objectives(self, kept: Keeping, log: ProofLog) -> tuple[Objective | None, Objective | None]:
        """Of training and of held-out rows, with what the model that the run starts from says of them."""
        assert self._frozen_digest is not None
        started_from = self.job.config.run.from_adapter
        if self.job.config.run.resume and self.processes.is_main_process:
            started_from = begun_from(self.directory.path)
        started_from = self.processes.broadcast_object(started_from)
        return run_objectives(
            self.job, self.directory, self.processes, self._frozen_digest, kept, started_from, log, self.observer.noted
        )

    def _rewarded(self, places: ExitStack, log: ProofLog) -> RewardedSteps | None:
        """What samples and judges answers, with its process of reward functions; None where rows have answers."""
        job, processes = self.job, self.processes
        if job.config.objective.purpose != "prompts":
            return None
        options, seed = job.config.rewards, job.config.run.seed
        functions = RewardProcess(options.reward, options.reward_timeout) if processes.is_main_process else None
        rollout = Rollout(
            options,
            None if functions is None else places.enter_context(functions),
            job.source.tokenizer(),
            stop_ids(job.source, job.config.data),
            lambda step, row, number: derived_seed(seed, "answer", step, row, number),
            processes,
        )
        guard = RewardGuard(self.observer.noted)
        lines = self.directory.lines(METRICS) if processes.is_main_process else []
        before = [line for line in lines if "no_gradient_groups" in line]  # steps, if this goes on
        for measured in processes.broadcast_object(before):
            guard.remember(measured)
        return RewardedSteps(
            rollout,
            job.train.examples,
            job.config.objective.strength,
            job.memory.micro_batch_rows,
            LogprobCheck(BOUNDS[job.dtype], log),
            guard,
        )

    def _held_out(self, kept: Keeping, objective: Objective | None, rewarded: RewardedSteps | None) -> HeldOut | None:
        job = self.job
        if job.held_out is None:
            return None
        if rewarded is not None:
            return HeldOutRewards(job.held_out.examples, rewarded.rollout, job.config.run.answers)
        if objective is not None:
            return HeldOutObjective(objective, job.memory.micro_batch_rows, kept.held_out)
        return HeldOut(job.held_out.examples, job.memory.micro_batch_rows, kept.held_out)

    def _card(self, progress: Progress) -> dict[str, object]:
        model = self.job.config.model
        kept = "kept quantized" if self.job.memory.base == "quantized" else "dense"
        kept += f", quantized to {model.quantize} on reading" if model.quantize else ""
        base = _shown(self.job.source.origin or model.model)
        card: dict[str, object] = {
            "base as trained": f"{base}, {kept}, computed in {model.dtype}",
            "data": name_list(map(_shown, self.job.config.data.data)),
            "training rows": f"{len(self.job.train.examples):,}",
            "steps": f"{progress.step:,}",
        }
        if system := self.job.train.report.system:
            card["system message of every row"] = f"{len(system):,} characters, which backhand.json has"
        if progress.eval_loss is not None and progress.base_eval_loss is not None:
            name = self.job.config.objective.objective
            unit = "nats per token" if name == "sft" else f"({name})"
            card["held-out loss"] = f"{progress.base_eval_loss:.4f} → {progress.eval_loss:.4f} {unit}"
            if name == "grpo":
                card["held-out reward"] = f"{-progress.base_eval_loss:.4f} → {-progress.eval_loss:.4f}"
                del card["held-out loss"]
        return card

    def left(self, *, back: bool) -> str:
        """What a run leaves that was stopped at once; `back` tells that the run that it was to replace is back."""
        if back:
            return "stopped at once, before the first checkpoint; the run that was here before is back"
        steps = CheckpointStore(self.directory.checkpoints, self.directory.files, self.observer.noted).steps()
        after = f"after the checkpoint of step {steps[-1]}: continue" if steps else "before the first checkpoint: begin"
        return f"stopped at once, {after} with {self._resume_command()}"

    def _resume_command(self) -> str:
        return f"backhand train --resume --output {shlex.quote(str(self.directory.path))}"


def _shown(name: str) -> str:
    """A path by its last part, since cards are published; what is no path, such as a hub id, as it is."""
    return Path(name).name if Path(name).exists() else name


def _unwritten(_proof: Proof) -> None:
    """The first process writes proofs down."""
