"""Last stage of a run: train from the first step or a checkpoint to the summary.

directory → guards → loop with evaluations and checkpoints → summary → proof of resuming → answers
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from backhand.adapters.contents import RECORD_FILE
from backhand.adapters.record import read_record
from backhand.data.class_lint import scale_note
from backhand.data.label_names import unlearned_note
from backhand.data.rows import NUMBER, ClassLabel
from backhand.distributed.communicator import Communicator
from backhand.distributed.launch import broadcast_checkpoint, comparable_settings
from backhand.engines.engine import RunCache, computing_with
from backhand.engines.machine import MemoryKeeper, crowded_note
from backhand.errors import ArtifactError, not_none
from backhand.kernels.quantized_matrix import QuantizedMatrix
from backhand.loop.evaluator import Evaluator
from backhand.loop.guards import BaseGuard, LearningGuard
from backhand.loop.loop import TrainingLoop
from backhand.loop.observers import Observers, RunStart
from backhand.loop.state import Progress, RunState, Saver
from backhand.loop.step import AdapterOptimizer
from backhand.loop.step_plan import StepPlan
from backhand.nn.compute import gc_frozen
from backhand.options.config_file import config_table, dump_config, load_config
from backhand.printing import going_on, reworded
from backhand.reading import uploaded_name
from backhand.runs.checkpoint import Checkpoint, CheckpointStore
from backhand.runs.directory import CONFIG, FACTS, METRICS, SUMMARY, Proof, ProofLog, RunDirectory, proof_log
from backhand.runs.interruption import Interrupted, Interruption
from backhand.runs.row_changes import recorded_rise
from backhand.runs.status import resume_command, status_kept
from backhand.runs.summary import RunSummary, read_summary, rows_trained_on
from backhand.runs.uses import OWN_COMMANDS, TrainedAdapter
from backhand.system import available_bytes
from backhand.training.advice import advice, answer_advice, has_rows_in_memory, too_few_rows
from backhand.training.calibration import forecast_run
from backhand.training.console import opening_facts
from backhand.training.curves import Curves
from backhand.training.facts import held_out_card, run_facts, summarise
from backhand.training.hidden_states import hidden_state_caches
from backhand.training.hooks import Losses, RunContext, Start
from backhand.training.loaded_run import LoadedRun
from backhand.training.resume import (
    frozen_differences,
    original_adapter,
    proof_begin,
    prove_resume,
    refuse_differences,
    run_differences,
    state_digests,
)
from backhand.words import label_text, name_list


@dataclass
class Trainer:
    """Trains a loaded run and writes its directory."""

    run: LoadedRun
    directory: RunDirectory  # locked by rank 0; the other processes only know its path
    observer: Observers  # receives the events of the run
    interruption: Interruption  # receives signals
    checkpoint: Checkpoint | None  # to resume from; None for a new run
    processes: Communicator
    run_cache: RunCache = field(default_factory=RunCache)  # shared with other runs of this process
    pause_at: int | None = None  # step to stop after, with a checkpoint; None to run to the end
    owns_directory: bool = False  # True once the directory's contents are this run's
    _frozen_digest: str | None = None
    _losses: Losses = field(default_factory=Losses)

    def train(self) -> RunSummary:
        """Train to the end. Returns and raises the same as `run.train`."""
        run, config = self.run, self.run.config
        optimizer = AdapterOptimizer(run.bound.lora, config.optimization, config.objective.teacher_update_rate)
        state = RunState(run.bound.lora, optimizer, Progress())
        plan = StepPlan.of(config, run.inputs.total_steps)
        memory = MemoryKeeper(run.plan.memory.peak_bytes) if config.model.tune_allocator else None
        with self.interruption.graceful(), ExitStack() as resources:
            store = CheckpointStore(self.directory.checkpoints, self.directory.files, self.observer.noted)
            proof_start: int | None = None  # step from which the proof of resuming repeats the run
            if self.processes.is_main_process:
                proof_start = proof_begin(store, self.checkpoint, config.run.prove_resume, run.inputs.total_steps)
            proof_start = self.processes.broadcast_object(proof_start)
            saver = Saver(
                self.directory,
                store,
                state,
                lambda: run.bound.adapter_files(run.identity.record(self._fitted), self._card(state.progress)),
                lambda step: {
                    **run.identity.facts,
                    "frozen_digest": self._frozen_digest,
                    "sampler": run.inputs.sampler.position(step),
                },
                keep=config.run.keep,
                best_only=run.inputs.held_out is not None,
                protected=frozenset(() if proof_start is None else {proof_start}),
                make_room=memory.make_room if memory else lambda: None,
            )
            unfinished = self.checkpoint is None or self.checkpoint.step < run.inputs.total_steps
            if self.processes.is_main_process and unfinished:
                saver.require_room()
            self._prepare(store, state, saver)
            self.owns_directory = True
            if self.processes.is_main_process:  # a page must not take a run that is being prepared for a killed one
                steps = run.inputs.total_steps
                resources.enter_context(status_kept(self.directory, steps, lambda: state.progress.step))
            finished_before = state.progress.finished
            log = proof_log(self.directory) if self.processes.is_main_process else _unwritten
            with going_on("the digest of the base model"):
                base_guard = BaseGuard(run.bound.model, log)
            digest = self._frozen_digest = base_guard.digest
            if self.checkpoint is not None and self.processes.is_main_process:
                self._refuse(frozen_differences(self.checkpoint.facts, digest))
            self._assert_equal_processes(state)
            context = RunContext(
                *(config, run.inputs, run.bound, run.identity, self.directory, self.processes, self._start(digest)),
                *(log, self.observer.noted, resources),
            )
            inputs = run.plan.training.begin(context)
            run = self.run = replace(run, plan=replace(run.plan, inputs=inputs))
            caches = resources.enter_context(
                hidden_state_caches(
                    run, self.directory, digest, log=log, notify=self.observer.noted, run_cache=self.run_cache
                )
            )
            context = replace(context, inputs=inputs, caches=caches)
            losses = self._losses = run.plan.training.losses(context)
            if self.checkpoint is not None and losses.held_out is not None:  # for checkpoints before an evaluation
                losses.held_out.restore(read_record(json.loads(self.checkpoint.contents[RECORD_FILE]), RECORD_FILE))
            evaluator = Evaluator(
                run.bound.model,
                state,
                plan,
                held_out=losses.held_out,
                meter=run.inputs.neutral if run.inputs.neutral.documents else None,
                base_guard=base_guard,
                learning_guard=LearningGuard(run.bound.lora, optimizer, log, not_learned=losses.not_learned),
                check_model_files=self._check_model_files(),
                observer=self.observer,
                save_checkpoint=partial(self._save, saver, state),
                processes=self.processes,
            )
            loop = TrainingLoop(
                run.bound.model,
                state,
                run.inputs.packer,
                run.inputs.sampler,
                plan,
                evaluator,
                observer=self.observer,
                memory=memory,
                processes=self.processes,
                hidden_states=caches.train,
                objective=losses.train,
                sampled=losses.sampled,
            )
            if memory is not None:
                memory.make_room()  # loading and digests fragment the heap
            forecast = None
            if not config.run.quiet and not finished_before:
                forecast = forecast_run(run.plan, run.machine, run.bound.model)
                forecast.begin(state.progress.step, state.progress.train_s)
            from_step = None if self.checkpoint is None else self.checkpoint.step
            facts = opening_facts(run, from_step, self.processes, forecast)
            options = {
                f"{part}.{name}": value for part, table in config_table(config).items() for name, value in table.items()
            }
            opening = RunStart(
                *(run.inputs.total_steps, state.progress.step, facts, self.directory.path, options),
                forecast=forecast,
            )
            self.observer.started(opening)
            if not self._run_loop(loop, proof_start):
                raise self._interrupted(state.progress.step, f"continue with {self._resume_command()}")
            if losses.sampled is not None and not finished_before:
                losses.sampled.finished()
            with_start = context.start.values is not None
            summary = self._summary(state, with_start=with_start, keep=finished_before)
            if proof_start is not None:
                self._prove_resume(loop, store, proof_start, log)
            summary = self._measured(context, summary)
        self.observer.ended(summary)
        return summary

    def _assert_equal_processes(self, state: RunState) -> None:
        """Check that all processes have read the same inputs and start from the same adapter. Raises ArtifactError."""
        identity = self.run.identity.facts
        facts = {name: value for name, value in identity.items() if name.endswith("_digest")}
        del facts["settings_digest"]  # the settings themselves are more specific
        facts |= {f"model_config.{name}": value for name, value in identity["model_config"].items()}
        facts |= comparable_settings(identity["settings"])
        self.processes.assert_equal(
            {**facts, "base model": self._frozen_digest, "adapter": state_digests(state)["adapter"]}
        )

    @property
    def _fitted(self) -> Mapping[Any, float]:
        """The numbers that the most recent evaluation fitted to the held-out rows."""
        return {} if self._losses.held_out is None else self._losses.held_out.fitted

    def _save(self, saver: Saver, state: RunState, *, is_best: bool) -> None:
        """Save a checkpoint in rank 0, after checking that all processes have the same adapter."""
        self.processes.assert_equal_adapters(lambda: state_digests(state)["adapter"], state.progress.step)
        if self.processes.is_main_process:
            saver.save(is_best=is_best)
            self.directory.settle()

    def _measured(self, context: RunContext, summary: RunSummary) -> RunSummary:
        """Measure answers or scores of held-out rows with the adapter of `adapter/`, which is attached afterwards.

        Returns:
            the summary with the measurements.

        Raises:
            Interrupted: a signal stopped the measurement. A resumed run makes up for it.
        """
        if not self._measures_held_out() or not self.processes.is_main_process:
            return summary
        self.run.bound.fill(str(self.directory.adapter))
        scores = self.run.plan.training.scores(context, self._losses, summary)
        if scores is None:
            next_step = f"the answers of held-out rows are not measured yet: continue with {self._resume_command()}"
            raise self._interrupted(summary.steps, next_step)
        return self._advised(replace(summary, **scores))

    def _advised(self, summary: RunSummary) -> RunSummary:
        """Write and return the summary, with other advice if the answers or scores of held-out rows ask for it."""
        curves = Curves.of(self.directory.lines(METRICS), summary.constant_loss)
        summary = self._with_advice(summary, curves)
        suggestion = answer_advice(
            *(self.run.config, summary, self.directory.path, curves),
            given=self.run.inputs.config,
            auto_rate=self._auto_rate(),
        )
        if suggestion is not None:
            summary = replace(summary, advice=reworded(suggestion[0]), try_next=suggestion[1])
        summary = replace(summary, unmeasured=False)
        self.directory.write(SUMMARY, summary.to_json())
        return summary

    def _measures_held_out(self) -> bool:
        """Return True if answers or scores of held-out rows are measured after the last step."""
        scored = not self.run.config.objective.traits.has_targets
        return self.run.inputs.held_out is not None and (scored or self.run.config.run.answers > 0)

    def _prepare(self, store: CheckpointStore, state: RunState, saver: Saver) -> None:
        """Prepare the directory, and restore the state if the run is resumed."""
        run, config = self.run, self.run.config
        if not self.processes.is_main_process:
            if self.checkpoint is not None:
                state.restore(self.checkpoint, run.bound.model.dtype)
            return
        if not config.run.resume:
            if config.run.overwrite:
                self.directory.put_aside()
            # A later run from this file must not overwrite a directory by itself.
            written = replace(config, run=replace(config.run, overwrite=False))
            self.directory.write(CONFIG, dump_config(written))
        else:
            if self.checkpoint is not None:
                self._refuse(run_differences(self.checkpoint.facts, run.identity))
            self.directory.mend()
            self._store_sources()
        self.directory.make_checkpoints()
        self.directory.write(FACTS, json.dumps(run_facts(run), indent=1) + "\n")
        if not config.run.resume:
            return
        store.clean()
        if self.checkpoint is None:
            self.observer.noted("there is no checkpoint yet; the run starts at its first step")
            self.directory.forget_after(-1)
            return
        state.restore(self.checkpoint, run.bound.model.dtype)
        saver.restored(self.checkpoint.contents)
        summary = self.directory.path / SUMMARY
        if not state.progress.finished and summary.exists():  # a callback had ended the run, which now goes on
            self.directory.files.remove_file(summary)
        self.directory.forget_after(self.checkpoint.step, evaluates_again=state.progress.evaluation_outstanding)

    def _store_sources(self) -> None:
        """Write the model and the rows that a resumed run reads to its configuration, for the next resumption."""
        stored, read = load_config(self.directory.path / CONFIG), self.run.config
        data = replace(stored.data, data=read.data.data, eval_data=read.data.eval_data)
        written = replace(stored, data=data, model=replace(stored.model, model=read.model.model))
        if written != stored:
            self.directory.write(CONFIG, dump_config(written))

    def _run_loop(self, loop: TrainingLoop, proof_start: int | None) -> bool:
        """Run the loop, with a checkpoint at the step from which the proof of resuming starts.

        Returns:
            False if a signal or `pause_at` ended the loop.
        """
        with gc_frozen():
            if proof_start is not None and loop.state.progress.step <= proof_start:
                if not loop.run(until_step=proof_start):
                    return False
                loop.evaluator.save_checkpoint(is_best=False)
            if self.pause_at is None:
                return loop.run()
            if not loop.run(until_step=self.pause_at):
                return False
            loop.evaluator.save_checkpoint(is_best=False)  # without effect if this step has been saved
            return loop.state.progress.finished

    def _check_model_files(self) -> Callable[[], None]:
        """Return a check, called at every step, that mapped files of the base have not changed.

        Notifies the observer if these files do not fit into memory.
        """
        source = self.run.inputs.source
        if not any(isinstance(tensor, QuantizedMatrix) for _, tensor in self.run.bound.model.frozen_tensors()):
            return lambda: None  # a dense base is in memory
        note = crowded_note(source.mapped_bytes, available_bytes())
        if note is not None:
            self.observer.noted(note)
        return source.check_unchanged

    def _refuse(self, differences: list[str]) -> None:
        refuse_differences(differences, self.directory.path, self.run.config.model.force_base, self.observer.noted)

    def _interrupted(self, step: int, next_step: str) -> Interrupted:
        return Interrupted(self.interruption.requested or 0, step, next_step)

    def _summary(self, state: RunState, *, with_start: bool, keep: bool) -> RunSummary:
        """Write and return the summary. Keep the stored one of a run that was already finished."""
        path = self.directory.path / SUMMARY
        if keep and (stored := read_summary(path)) is not None:
            return replace(stored, compared_with_start=with_start)
        summary = summarise(self.run, state, self.directory, self.processes.world_size)
        unlearned = 0 if with_start else self.run.inputs.unlearned_rows
        summary = replace(
            summary,
            compared_with_start=with_start,
            unlearned_rows=unlearned,
            unmeasured=self._measures_held_out(),
        )
        if self.processes.is_main_process:
            summary = self._with_advice(summary, Curves.of(self.directory.lines(METRICS), summary.constant_loss))
            self.directory.write(SUMMARY, summary.to_json())
        return summary

    def _auto_rate(self) -> float:
        """Return the learning rate that `auto` chooses for this run."""
        inputs, options = self.run.inputs, self.run.config.optimization
        return inputs.learning_rate(replace(options, learning_rate="auto"))[0]

    def _with_advice(self, summary: RunSummary, curves: Curves) -> RunSummary:
        """Return the summary with the advice from the curves of the run."""
        inputs, config = self.run.inputs, self.run.config
        suggestion = advice(
            *(config, curves, inputs.total_steps, self._auto_rate(), self.directory.path),
            few_rows=0 if inputs.held_out is None else too_few_rows(inputs.held_out.report),
            all_rows=summary.rows - summary.option_rows + summary.held_out_rows,
            unseen_rows=summary.rows - not_none(summary.rows_seen),
            stopped=summary.stopped_because is not None,
            slow=scale_note(inputs.train.examples.facts(ClassLabel))
            if config.objective.problem_type == NUMBER
            else None,
            unlearned=unlearned_note(summary.unlearned_rows, summary.held_out_rows),
            change=summary.loss_change,
            rise=recorded_rise(self.directory.lines(METRICS), summary.best_step),
            held_out_rows=summary.held_out_rows,
            too_long=summary.too_long,
        )
        said, again = (None, None) if suggestion is None else (reworded(suggestion[0]), suggestion[1])
        return replace(summary, advice=said, try_next=again)

    def _prove_resume(self, loop: TrainingLoop, store: CheckpointStore, start: int, log: ProofLog) -> None:
        if loop.state.progress.step < self.run.inputs.total_steps:
            self.observer.noted("the run ended early; the proof of resuming is skipped")
            return
        checkpoint = not_none(
            broadcast_checkpoint(store.load(start) if self.processes.is_main_process else None, self.processes)
        )
        if not prove_resume(loop, checkpoint, log):
            command = self._resume_command(self.run.config.run.prove_resume)
            raise self._interrupted(loop.state.progress.step, f"the run is finished but not yet proved: {command}")
        self.observer.noted(f"resumed at step {start}, the run ended in the same bits")

    def _start(self, frozen_digest: str) -> Start:
        """Return the model that the run starts from, also of a resumed run."""
        run, started_from = self.run, self.run.config.run.from_adapter
        if run.config.run.resume and self.processes.is_main_process:
            started_from = original_adapter(self.directory.path)
        started_from = self.processes.broadcast_object(started_from)
        objective = run.config.objective
        learns_from_it = objective.traits.has_reference or objective.traits.has_teacher
        measures_it = run.inputs.held_out is not None
        adapter = started_from if learns_from_it or measures_it else None
        if adapter is None:
            return Start(frozen_digest)
        try:
            with computing_with(run.bound.model, run.bound.lora.values):
                run.bound.fill(adapter, run.config.model.allow_pickle)
                return Start(frozen_digest, run.bound.lora.values.clone())
        except ArtifactError as error:
            if learns_from_it:
                raise
            self.observer.noted(
                f"{error.where}: {error.what}, so the scores and answers are not compared with those of the adapter "
                "that the run started from, but with the base model's"
            )
            return Start(frozen_digest)

    def _card(self, progress: Progress) -> dict[str, object]:
        model, train = self.run.config.model, self.run.inputs.train
        form = "quantized" if self.run.plan.memory.base == "quantized" else "dense"
        form += f", quantized to {model.quantize} on reading" if model.quantize else ""
        base = _published_name(self.run.inputs.source.origin or model.model)
        card: dict[str, object] = {
            "base as trained": f"{base}, {form}, computed in {model.dtype}",
            "data": name_list(map(_published_name, self.run.config.data.data)),
            **self._card_of_columns(),
            "training rows": rows_trained_on(len(train.examples), None, train.report.option_rows),
            "steps": f"{progress.step:,} of {self.run.inputs.total_steps:,}",
        }
        if system := train.report.system:
            card["system message of every row"] = f"{len(system):,} characters, see backhand.json"
        card |= held_out_card(self.run, progress)
        if (objective := self.run.config.objective.objective) in OWN_COMMANDS:
            card["use"] = TrainedAdapter(objective, base, "path/to/this/directory").backhand()[0]
        return card

    def _card_of_columns(self) -> dict[str, object]:
        """Return the lines of the card on the texts that the options read, and on their answers."""
        data, inputs = self.run.config.data, self.run.inputs
        lists = {"labels": self.run.config.objective.class_labels or tuple(self.run.identity.labels)}
        lists |= {f"options of {name}": one.keys for name, one in inputs.train.questions.items()}
        lines = {
            "text": data.state or data.prompt,
            "answers": data.completion or name_list(data.question),
            **{f"question {name}": one.instructions for name, one in inputs.train.questions.items()},
            **{name: name_list(map(label_text, labels), limit=_MOST_LABELS) for name, labels in lists.items()},
        }
        return {name: text for name, text in lines.items() if text}

    def stop_message(self, *, restored: bool) -> str:
        """Describe the directory after an immediate stop.

        Args:
            restored: True if the run that was to be overwritten has been restored.
        """
        if restored:
            return "stopped at once, before the first checkpoint; the previous run has been restored"
        steps = CheckpointStore(self.directory.checkpoints, self.directory.files, self.observer.noted).steps()
        after = f"after the checkpoint of step {steps[-1]}: continue" if steps else "before the first checkpoint: start"
        return f"stopped at once, {after} with {self._resume_command()}"

    def _resume_command(self, prove_resume: int | None = None) -> str:
        in_memory = has_rows_in_memory(self.run.config)
        return resume_command(str(self.directory.path), in_memory=in_memory, prove_resume=prove_resume)


def _published_name(name: str) -> str:
    """Return the last part of a path, because cards are published; return other names, such as hub ids, unchanged."""
    return uploaded_name(Path(name)) if Path(name).exists() else name


_MOST_LABELS = 50
"""Number of labels in a card."""


def _unwritten(_proof: Proof) -> None:
    """Ignore the proof, which rank 0 writes."""
