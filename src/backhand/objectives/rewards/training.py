"""Training on rewards of sampled answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from backhand.data.packing import RowPacker
from backhand.data.rows import PromptRow
from backhand.distributed.communicator import Communicator
from backhand.engines.decoder_engine import DecoderEngine
from backhand.errors import UsageError
from backhand.generation.loading import stop_ids
from backhand.generation.sampling import GAP_BOUNDS, ROWS_AT_ONCE
from backhand.loop.step_plan import derived_seed
from backhand.objectives.kinds.answer_training import AnswerTraining
from backhand.objectives.kinds.sampled_answers import PromptPacker, check_context, prompt_of
from backhand.objectives.rewards.guards import LogprobCheck, RewardGuard
from backhand.objectives.rewards.process import RewardProcess, check_references
from backhand.objectives.rewards.rollout import Rollout
from backhand.objectives.rewards.steps import HeldOutRewards, RewardedSteps
from backhand.options.config import TrainConfig
from backhand.runs.directory import METRICS
from backhand.training.hooks import KnownModel, KnownRows, Losses, Packing, RunContext
from backhand.training.run_inputs import RunInputs
from backhand.training.work import Work


class RewardTraining(AnswerTraining):
    """Training on rewards. The functions are loaded first, so that one that cannot be loaded leaves no directory."""

    functions: RewardProcess | None = None  # None without functions, and in other processes than the main one

    @contextmanager
    def resources(self, config: TrainConfig, processes: Communicator) -> Iterator[None]:
        options = config.rewards
        if not options.reward or not processes.is_main_process:
            yield
            return
        with RewardProcess(options.reward, options.reward_timeout) as self.functions:
            yield

    def with_model(self, model: KnownModel) -> KnownModel:
        if not isinstance(model.engine, DecoderEngine):
            raise UsageError(
                "answers of this model cannot be sampled and trained on by the same computation",
                where="objective",
                why=model.engine.note,
                next_step="choose a model that the backhand engine supports (backhand models)",
            )
        return model

    def with_rows(self, rows: KnownRows) -> KnownRows:
        for prepared in filter(None, (rows.train, rows.held_out)):
            check_references(rows.config.rewards.reward, prepared.examples.facts(PromptRow))
        if self.functions is not None:
            self.functions.check_parameters(rows.train.examples)
        return rows

    def packing(self, rows: KnownRows) -> Packing:
        options, shares = rows.config.rewards, rows.shares_in_steps
        packer = PromptPacker(rows.train.examples, options.group, options.max_new_tokens, share_prefixes=shares)
        packing = super().packing(rows)._replace(packer=packer)
        longest = _longest(packer, packing.held_out_packer, options.max_new_tokens)
        assert isinstance(rows.engine, DecoderEngine)
        check_context(longest, rows.engine.config.max_position_embeddings)
        return packing

    def work(self, inputs: RunInputs, rows_per_process: int) -> Work:
        options, packer = inputs.config.rewards, inputs.packer
        assert isinstance(packer, PromptPacker)
        answers = min(ROWS_AT_ONCE, rows_per_process * options.group)
        prompt = _longest(packer, inputs.held_out_packer, options.max_new_tokens) - options.max_new_tokens
        return (
            super()
            .work(inputs, rows_per_process)
            ._replace(
                group=options.group,
                evaluation_answers=len(inputs.held_out_examples),
                sampled_rows=answers,
                sampled_tokens=min(rows_per_process, answers) * prompt + answers * options.max_new_tokens,
            )
        )

    def losses(self, run: RunContext) -> Losses:
        options, seed, processes = run.config.rewards, run.config.run.seed, run.processes
        rollout = Rollout(
            options,
            options.group,
            stop_ids(run.inputs.source, run.config.data),
            lambda step, row, number: derived_seed(seed, "answer", step, row, number),
            processes,
            functions=self.functions,
            tokenizer=run.inputs.source.tokenizer(),
        )
        guard = RewardGuard(run.notify, options.reward)
        lines = run.directory.lines(METRICS) if processes.is_main_process else []
        earlier = [line for line in lines if "no_gradient_groups" in line]  # steps of a resumed run
        for measured in processes.broadcast_object(earlier):
            guard.remember(measured)
        steps = RewardedSteps(
            rollout,
            run.inputs.train.examples,
            run.config.objective.strength,
            run.micro_batch_rows,
            LogprobCheck(GAP_BOUNDS[run.bound.model.dtype], run.log),
            guard,
        )
        held_out = run.inputs.held_out_examples
        return Losses(
            sampled=steps, held_out=HeldOutRewards(held_out, rollout, run.config.run.answers) if held_out else None
        )


def _longest(packer: PromptPacker, held_out: RowPacker | None, new_tokens: int) -> int:
    """Return the number of tokens of the longest prompt with an answer, over training and held-out rows."""
    examples = () if held_out is None else held_out.examples
    return max([packer.longest, *(len(prompt_of(example)) + new_tokens for example in examples)])
