"""`backhand train`: one run from its configuration to its summary, or from where it was stopped.

run directory locked → configuration → job (rows, model, adapter) → loop → summary
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from backhand.errors import UsageError
from backhand.nn.compute import compute_settings
from backhand.train.answers import held_out_answers
from backhand.train.base_guard import BaseGuard
from backhand.train.callbacks import Callback, as_observers
from backhand.train.checkpoint import Checkpoint, CheckpointStore
from backhand.train.config import TrainConfig
from backhand.train.config_file import config_table, dump_config
from backhand.train.console import TerminalObserver
from backhand.train.facts import run_facts
from backhand.train.files import FileLayer
from backhand.train.forgetting import ForgettingMeter
from backhand.train.guards import LearningGuard
from backhand.train.held_out import HeldOut
from backhand.train.interruption import Interrupted, Interruption
from backhand.train.job import Job, build_job
from backhand.train.loggers.choice import chosen_loggers
from backhand.train.loop import TrainingLoop
from backhand.train.machine import resolve_machine
from backhand.train.memory_keeper import MemoryKeeper
from backhand.train.metrics_file import MetricsFile
from backhand.train.observer import Observer, Observers, RunStart
from backhand.train.opening import opening_facts
from backhand.train.optimizer import AdapterOptimizer
from backhand.train.progress import Progress
from backhand.train.proofs import ProofLog, proof_log
from backhand.train.resume import BaseCheck, check_same_frozen, check_same_run, resumed_config
from backhand.train.resume_proof import prove_resume
from backhand.train.run_directory import ANSWERS, CONFIG, FACTS, SUMMARY, RunDirectory, opened
from backhand.train.run_state import PROGRESS_FILE, RunState
from backhand.train.saver import Saver
from backhand.train.status import status_kept
from backhand.train.step_plan import StepPlan
from backhand.train.summary import RunSummary, read_summary, summarise


def train(
    config: TrainConfig,
    *,
    callbacks: Iterable[Callback] = (),
    files: FileLayer | None = None,
    typed: frozenset[str] = frozenset(),
) -> RunSummary:
    """Train as `config` says; what is left behind stands in the run directory, see docs.

    Args:
        config: every option. What is None or `auto` in it is chosen, and written to config.toml.
        callbacks: told of every step and evaluation, besides the terminal, metrics.jsonl and loggers.
        files: the file layer, for tests.
        typed: names of options that were given even where they have their default value; matters when resuming.

    Returns:
        what the run came to, as summary.json has it.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: before the first step; each says what to do.
        CheckError: a guard fired, or nothing finite came out; what was saved before is intact.
        Interrupted: after a signal and a checkpoint.
    """
    config.validate()
    terminal = TerminalObserver(quiet=config.run.quiet)
    everyone: list[Observer] = [
        terminal,
        *chosen_loggers(config.run.report_to, terminal.noted),
        *as_observers(callbacks),
    ]
    run = config.run
    try:
        with (
            Interruption(terminal.noted) as interruption,
            opened(run.output, resume=run.resume, overwrite=run.overwrite, files=files) as directory,
        ):
            checkpoint = None
            if run.resume:
                config = resumed_config(config, directory.path, typed).validate()
                checkpoint = _newest_checkpoint(directory, terminal)
                if checkpoint is not None and (done := _finished(checkpoint, config, directory)) is not None:
                    terminal.noted(f"the run in {directory.path} is finished; there is nothing left to do")
                    terminal.ended(done)
                    return done
            machine = resolve_machine(config)
            with compute_settings(config.model, machine.threads, machine.dtype, machine.device):
                job = build_job(config, machine)
                told = Observers([*everyone, MetricsFile(directory)])
                return _Run(job, directory, told, interruption, checkpoint).train()
    finally:
        for observer in everyone:
            observer.closed()


def _newest_checkpoint(directory: RunDirectory, observer: Observer) -> Checkpoint | None:
    if not directory.checkpoints.is_dir():
        return None
    return CheckpointStore(directory.checkpoints, directory.files, observer.noted).newest_valid()


def _finished(checkpoint: Checkpoint, config: TrainConfig, directory: RunDirectory) -> RunSummary | None:
    """The summary of a run that needs nothing more; None if there is something to do."""
    if config.run.prove_resume is not None:
        return None
    if not Progress.from_json(checkpoint.contents.get(PROGRESS_FILE, b"")).finished:
        return None
    return read_summary(directory.path / SUMMARY)


@dataclass
class _Run:
    """A job in its directory, and the checkpoint it goes on from."""

    job: Job
    directory: RunDirectory
    observer: Observers
    interruption: Interruption
    checkpoint: Checkpoint | None
    _frozen_digest: str | None = None

    def train(self) -> RunSummary:
        job, config = self.job, self.job.config
        optimizer = AdapterOptimizer(job.bound.lora, config.optimization)
        state = RunState(job.bound.lora, optimizer, Progress())
        plan = StepPlan.of(config, job.total_steps)
        with self.interruption.graceful():
            store = CheckpointStore(self.directory.checkpoints, self.directory.files, self.observer.noted)
            proof_begin = self._proof_begin(store)
            saver = Saver(
                self.directory,
                store,
                state,
                lambda: job.bound.adapter_files(job.identity.record(), self._card(state.progress)),
                self._facts,
                keep=config.run.keep,
                best_only=job.held_out is not None,
                protected=frozenset(() if proof_begin is None else {proof_begin}),
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
                memory=MemoryKeeper(job.memory.peak_bytes) if job.config.model.tune_allocator else None,
                save=saver.save,
                stop_requested=lambda: self.interruption.requested is not None,
            )
            with status_kept(self.directory, job.total_steps, lambda: loop.state.progress.step):
                self.observer.started(self._start(state.progress.step))
                if not self._run_loop(loop, saver, proof_begin):
                    raise self._interrupted(state, f"continue with {self._resume_command()}")
                summary = self._summary(state, keep=finished_before)
                if proof_begin is not None:
                    self._prove(loop, store, proof_begin, log)
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
        answers = held_out_answers(
            job.bound,
            job.held_out.examples,
            job.source.tokenizer(),
            job.source.stop_token_ids(),
            job.config.run.answers,
        )
        text = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
        self.directory.write(ANSWERS, text)

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

    def _run_loop(self, loop: TrainingLoop, saver: Saver, proof_begin: int | None) -> bool:
        """Run to the end, with a checkpoint where the proof of resuming is to begin."""
        if proof_begin is not None and loop.state.progress.step <= proof_begin:
            if not loop.run(until_step=proof_begin):
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

    def _proof_begin(self, store: CheckpointStore) -> int | None:
        """The step that the proof of resuming begins at: K before the end, or the newest kept one before that.

        Raises:
            UsageError: more steps than the run has, or a continued run is past it and has kept no checkpoint.
        """
        steps, total = self.job.config.run.prove_resume, self.job.total_steps
        if steps is None:
            return None
        begin = total - steps
        if begin < 0:
            raise UsageError(f"prove_resume {steps} is more than the {total} steps of the run", where="prove_resume")
        if self.checkpoint is None or self.checkpoint.step <= begin:
            return begin
        earlier = store.newest_valid(before=begin)
        if earlier is None:
            raise UsageError(
                f"the run is past step {begin}, and no checkpoint from before is kept",
                where="prove_resume",
                next_step=f"give --prove-resume {total - store.steps()[0]}, which begins at the oldest that is kept",
            )
        return earlier.step

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
