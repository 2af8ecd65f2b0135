"""`backhand evaluate --reward`: the rewards of a model's greedy answers, with and without an adapter."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from backhand.data.columns import columns_of_prompts
from backhand.data.examples import check_vocabulary
from backhand.data.prepare import prepare
from backhand.data.rows import PromptRow
from backhand.distributed.communicator import Communicator
from backhand.generation.loading import loaded_model
from backhand.objectives.kinds.sampled_answers import check_context, prompt_of
from backhand.objectives.rewards.process import RewardProcess, check_references
from backhand.objectives.rewards.rollout import Rollout
from backhand.objectives.rewards.steps import HeldOutRewards
from backhand.options.command_options import EvaluateOptions
from backhand.options.rewards import RewardOptions
from backhand.runs.row_changes import ROW_REWARDS, gain_words, mean_gain
from backhand.terminal import console_for_tables, table_of, working
from backhand.words import show_notes


@dataclass(frozen=True)
class RewardEvaluation:
    """The rewards of the base model and of the adapted model on the same rows."""

    rows: int  # number of rows
    base: dict[str, float]  # measured values by name
    adapted: dict[str, float] | None  # None without an adapter
    # mean gain per row and the ends of its 95 % interval; None without an adapter or for one row
    gain: tuple[float, float, float] | None

    def as_dict(self) -> dict[str, Any]:
        """Return what `evaluate --reward --json` prints."""
        values = {name: value for name, value in asdict(self).items() if name != "gain"}
        if self.gain is not None:
            values["gain"], *values["gain_interval"] = self.gain
        return values


def evaluate_rewards(options: EvaluateOptions) -> RewardEvaluation:
    """Measure the base model and, with an adapter, the adapted model.

    Raises:
        UsageError, DataError, ArtifactError: an option, the rows or the model cannot be used.
        CheckError: a reward function failed.
    """
    run, data = options.run, replace(options.data, eval_data=(), eval_fraction=0.0)
    rewards = RewardOptions(reward=run.reward, reward_weights=run.reward_weights, max_new_tokens=run.max_new_tokens)
    with (
        RewardProcess(run.reward, rewards.reward_timeout, trains=False) as functions,
        loaded_model(options.model, run.adapter, template=data) as loaded,
    ):
        show_notes([*loaded.notes, *loaded.purpose_notes()])
        data = replace(data, chat_template=loaded.template.chat_template)
        prepared = prepare(data, loaded.tokenizer, purpose="prompts", recorded=columns_of_prompts(loaded.columns))[0]
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
            rewards_of.append(held_out.by_row[ROW_REWARDS])
            measured.append({name.removeprefix("eval_"): value for name, value in held_out.measured.items()})
    base, adapted = (*measured, None)[:2]
    assert base is not None
    return RewardEvaluation(len(rewards_of[0]), base, adapted, None if adapted is None else mean_gain(*rewards_of))


def evaluate_rewards_command(options: EvaluateOptions) -> RewardEvaluation:
    """Run `evaluate_rewards` and print a table, or one JSON object with `json`."""
    with working("evaluating"):
        result = evaluate_rewards(options)
    if options.run.json:
        sys.stdout.write(json.dumps(result.as_dict()) + "\n")
        return result
    shown = table_of("model", *result.base, right=result.base, title=f"{result.rows:,} rows, each answered once")
    for name, values in (("base", result.base), ("adapted", result.adapted)):
        if values is not None:
            shown.add_row(name, *(f"{value:.4g}" for value in values.values()))
    console_for_tables().print(shown)
    if result.adapted is not None:
        console_for_tables().print(gain_words(result.gain), soft_wrap=True)
    return result
