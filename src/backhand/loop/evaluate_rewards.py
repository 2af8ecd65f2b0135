"""`backhand evaluate --reward`: the rewards of a model's greedy answers, with and without an adapter."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from backhand.data.examples import check_vocabulary
from backhand.data.prepare import prepare
from backhand.data.rows import PromptRow
from backhand.distributed.communicator import Communicator
from backhand.generation.loading import loaded_model
from backhand.loop.rewards.process import RewardProcess, check_references
from backhand.loop.rewards.rollout import Rollout
from backhand.loop.rewards.steps import HeldOutRewards
from backhand.loop.sampled_answers import check_context, prompt_of
from backhand.options.command_options import EvaluateOptions
from backhand.options.rewards import RewardOptions
from backhand.runs.reward_results import gain_words, reward_gain
from backhand.terminal import console_for_tables, table_of, working
from backhand.words import show_notes


def evaluate_rewards(options: EvaluateOptions) -> tuple[list[list[float]], list[dict[str, float]]]:
    """Measure the base model and, with an adapter, the adapted model.

    Returns:
        For each model, the reward of every row, and the measured values.

    Raises:
        UsageError, DataError, ArtifactError: an option, the rows or the model cannot be used.
        CheckError: a reward function failed.
    """
    run, data = options.run, replace(options.data, eval_data=(), eval_fraction=0.0)
    rewards = RewardOptions(reward=run.reward, max_new_tokens=run.max_new_tokens)
    with (
        RewardProcess(run.reward, rewards.reward_timeout) as functions,
        loaded_model(options.model, run.adapter, template=data) as loaded,
    ):
        show_notes(loaded.notes)
        prepared = prepare(data, loaded.tokenizer, purpose="prompts")[0]
        show_notes(prepared.report.left_out())
        examples = prepared.examples
        functions.check_parameters(examples)
        check_references(run.reward, examples.facts(PromptRow))
        check_vocabulary(examples.beyond(loaded.model.vocab_size), loaded.model.vocab_size, loaded.tokenizer)
        longest = max(len(prompt_of(one)) for one in examples) + rewards.max_new_tokens
        check_context(longest, loaded.model.context_tokens)
        rollout = Rollout(
            *(rewards, rewards.group, loaded.stop_ids, lambda *_: 0, Communicator()),
            functions=functions,
            tokenizer=loaded.tokenizer,
        )
        held_out = HeldOutRewards(examples, rollout, 0)
        rewards_of, measured = [], []
        for adapter in (False, True)[: 1 if run.adapter is None else 2]:
            loaded.model.use_adapter(adapter)
            held_out.loss(loaded.model, Communicator(), interruptible=False)
            rewards_of.append(held_out.row_rewards)
            measured.append({name.removeprefix("eval_"): value for name, value in held_out.measured.items()})
    return rewards_of, measured


def evaluate_rewards_command(options: EvaluateOptions) -> Sequence[dict[str, float]]:
    """Run `evaluate_rewards` and print a table, or one JSON object with `json`."""
    with working("evaluating"):
        rewards, measured = evaluate_rewards(options)
    rows = len(rewards[0])
    if options.run.json:
        base, adapted = (*measured, None)[:2]
        sys.stdout.write(json.dumps({"rows": rows, "base": base, "adapted": adapted}) + "\n")
        return measured
    shown = table_of("model", *measured[0], right=measured[0], title=f"{rows:,} rows, each answered once")
    for name, values in zip(("base", "adapted"), measured, strict=False):
        shown.add_row(name, *(f"{value:.4g}" for value in values.values()))
    console_for_tables().print(shown)
    if len(rewards) > 1:
        console_for_tables().print(gain_words(reward_gain(*rewards)), soft_wrap=True)
    return measured
