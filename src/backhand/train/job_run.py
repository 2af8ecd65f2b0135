"""A job from its first step, or the one it was stopped at, to its summary.

directory made ready → guards → loop, with evaluations and checkpoints → summary → proof of resuming → answers
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from typing import Any

from backhand.train.answers import held_out_answers
from backhand.train.base_guard import BaseGuard
from backhand.train.checkpoint import Checkpoint, CheckpointStore
from backhand.train.config_file import config_table, dump_config
from backhand.train.facts import run_facts
from backhand.train.forgetting import ForgettingMeter
from backhand.train.guards import LearningGuard
from backhand.train.held_out import HeldOut
from backhand.train.interruption import Interrupted, Interruption
from backhand.train.job import Job
from backhand.train.loop import TrainingLoop
from backhand.train.memory_keeper import MemoryKeeper
from backhand.train.observer import Observers, RunStart
from backhand.train.opening import opening_facts
from backhand.train.optimizer import AdapterOptimizer
from backhand.train.progress import Progress
from backhand.train.proofs import ProofLog, proof_log
from backhand.train.resume import BaseCheck, check_same_frozen, check_same_run
from backhand.train.resume_proof import proof_begin, prove_resume
from backhand.train.run_directory import ANSWERS, CONFIG, FACTS, SUMMARY, RunDirectory
from backhand.train.run_state import RunState
from backhand.train.saver import Saver
from backhand.train.status import status_kept
from backhand.train.step_plan import StepPlan
from backhand.train.summary import RunSummary, read_summary, summarise


@dataclass
class JobRun:
    """A job in its directory.

    Attributes:
        job: model, adapter, rows and every choice.
        directory: of the run, locked.
        observer: is told how it goes.
        interruption: whether somebody asked to stop.
        checkpoint: to go on from; None for a run that begins.
    """

    job: Job
    directory: RunDirectory
    observer: Observers
    interruption: Interruption
    checkpoint: Checkpoint | None
    _frozen_digest: str | None = None

    def train(self) -> RunSummary:
        """Run to the end. Returns and raises what `run.train` does."""
        job, config = self.job, self.job.config
        optimizer = AdapterOptimizer(job.bound.lora, config.optimization)
        state = RunState(job.bound.lora, optimizer, Progress())
        plan = StepPlan.of(config, job.total_steps)
        memory = MemoryKeeper(job.memory.peak_bytes) if config.model.tune_allocator else None
        with self.interruption.graceful():
            store = CheckpointStore(self.directory.checkpoints, self.directory.files, self.observer.noted)
            begin = proof_begin(store, self.checkpoint, config.run.prove_resume, job.total_steps)
            saver = Saver(
                self.directory,
                store,
                state,
                lambda: job.bound.adapter_files(job.identity.record(), self._card(state.progress)),
                self._facts,
                keep=config.run.keep,
                best_only=job.held_out is not None,
                protected=frozenset(() if begin is None else {begin}),
                make_room=memory.make_room if memory else lambda: None,
            )
            self._begin(store, state, saver)
            finished_before = state.progress.finished
            log = proof_log(self.directory)
            base_guard = self._guard_base(log)
            loop = TrainingLoop(
                job.bound.model,
                state,
                job.packer,
                job.sampler,
                plan,
                held_out=self._held_out(),
                meter=self._meter(),
                base_guard=base_guard,
                learning_guard=LearningGuard(job.bound.lora, optimizer, log),
                observer=self.observer,
                memory=memory,
                save=saver.save,
                stop_requested=lambda: self.interruption.requested is not None,
            )
            if memory is not None:
                memory.make_room()  # loading and digests leave gaps behind
            with status_kept(self.directory, job.total_steps, lambda: loop.state.progress.step):
                self.observer.started(self._start(state.progress.step))
                if not self._run_loop(loop, saver, begin):
                    raise self._interrupted(state, f"continue with {self._resume_command()}")
                summary = self._summary(state, keep=finished_before)
                if begin is not None:
                    self._prove(loop, store, begin, log)
                self._answer()
        self.observer.ended(summary)
        return summary

    def _start(self, step: int) -> RunStart:
        table = config_table(self.job.config)
        options = {f"{part}.{name}": value for part, values in table.items() for name, value in values.items()}
        facts = opening_facts(self.job, continued=self.checkpoint is not None)
        return RunStart(self.job.total_steps, step, facts, self.directory.path, options)

    def _answer(self) -> None:
        """Let base and adapter answer a few held-out rows; what is attached afterwards is the adapter in `adapter/`."""
        job = self.job
        if job.held_out is None or not job.config.run.answers:
            return
        if self.interruption.requested is not None:
            self.observer.noted("asked to stop: no held-out rows are answered for the report")
            return
        job.bound.fill(str(self.directory.adapter))
        tokenizer, stop_ids = job.source.tokenizer(), job.source.stop_token_ids()
        answers = held_out_answers(job.bound, job.held_out.examples, tokenizer, stop_ids, job.config.run.answers)
        self.directory.write(ANSWERS, "".join(json.dumps(asdict(answer)) + "\n" for answer in answers))

    def _begin(self, store: CheckpointStore, state: RunState, saver: Saver) -> None:
        """Make the directory ready, and the state what it was where the run is continued."""
        job, config = self.job, self.job.config
        if not config.run.resume:
            if config.run.overwrite:
                self.directory.clear()
            self.directory.write(CONFIG, dump_config(config))
            self.directory.make_checkpoints()
            self._write_facts()
            return
        if self.checkpoint is not None:
            check_same_run(self.checkpoint.facts, job.identity, self._base_check())
        self.directory.mend()
        self.directory.make_checkpoints()
        self._write_facts()
        store.clean()
        if self.checkpoint is None:
            self.observer.noted("there is no checkpoint yet; the run begins at its first step")
            self.directory.forget_after(-1)
            return
        state.restore(self.checkpoint, job.bound.model.dtype)
        saver.restored(self.checkpoint.contents)
        self.directory.forget_after(self.checkpoint.step)

    def _write_facts(self) -> None:
        self.directory.write(FACTS, json.dumps(run_facts(self.job), indent=1) + "\n")

    def _run_loop(self, loop: TrainingLoop, saver: Saver, begin: int | None) -> bool:
        """Run to the end, with a checkpoint where the proof of resuming is to begin."""
        if begin is not None and loop.state.progress.step <= begin:
            if not loop.run(until_step=begin):
                return False
            saver.save(False)
        return loop.run()

    def _guard_base(self, log: ProofLog) -> BaseGuard:
        """The guard of the base, which must be the one that the checkpoint was made with, in every tensor."""
        guard = BaseGuard(self.job.bound.model, log)
        self._frozen_digest = guard.digest
        if self.checkpoint is not None:
            check_same_frozen(self.checkpoint.facts, guard.digest, self._base_check())
        return guard

    def _base_check(self) -> BaseCheck:
        return BaseCheck(self.directory.path, self.job.config.model.force_base, self.observer.noted)

    def _interrupted(self, state: RunState, next_step: str) -> Interrupted:
        return Interrupted(self.interruption.requested or 0, state.progress.step, next_step)

    def _summary(self, state: RunState, *, keep: bool) -> RunSummary:
        """Written now; of a run that was finished before, as it stands."""
        path = self.directory.path / SUMMARY
        if keep and (there := read_summary(path)) is not None:
            return there
        summary = summarise(self.job, state, self.directory)
        self.directory.write(SUMMARY, summary.to_json())
        return summary

    def _prove(self, loop: TrainingLoop, store: CheckpointStore, begin: int, log: ProofLog) -> None:
        if loop.state.progress.step < self.job.total_steps:
            self.observer.noted("the run ended early; the proof of resuming is left out")
            return
        if not prove_resume(loop, store.load(begin), log):
            again = f"{self._resume_command()} --prove-resume {self.job.config.run.prove_resume}"
            raise self._interrupted(loop.state, f"the run is finished and not yet proved: {again}")
        self.observer.noted(f"resumed at step {begin}, the run ended in the same bits")

    def _held_out(self) -> HeldOut | None:
        job = self.job
        if job.held_out is None:
            return None
        return HeldOut(job.held_out.examples, job.memory.micro_batch_rows)

    def _meter(self) -> ForgettingMeter | None:
        if self.job.held_out is None and self.job.config.run.max_forgetting is None:
            return None
        return ForgettingMeter.for_tokenizer(self.job.source.tokenizer())

    def _facts(self, step: int) -> dict[str, Any]:
        identity = self.job.identity.facts()
        return {**identity, "frozen_digest": self._frozen_digest, "sampler": self.job.sampler.position(step)}

    def _card(self, progress: Progress) -> dict[str, object]:
        card: dict[str, object] = {"training rows": f"{len(self.job.train.examples):,}", "steps": f"{progress.step:,}"}
        if progress.eval_loss is not None and progress.base_eval_loss is not None:
            card["held-out loss"] = f"{progress.base_eval_loss:.4f} → {progress.eval_loss:.4f} nats per token"
        return card

    def _resume_command(self) -> str:
        return f"backhand train --resume --output {shlex.quote(str(self.directory.path))}"
