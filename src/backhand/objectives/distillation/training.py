"""Training on the distributions of a teacher, which is the model with a longer prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from backhand.data.context import TeacherPrompts
from backhand.data.packing import RowPacker
from backhand.data.stored_examples import PreparedData
from backhand.engines.decoder_engine import DecoderEngine, with_hidden_states
from backhand.errors import UsageError
from backhand.generation.loading import stop_ids
from backhand.generation.sampling import ROWS_AT_ONCE
from backhand.nn.decoder.adapted_group import HEAD
from backhand.nn.decoder.decoder import Decoder
from backhand.objectives.distillation.figures import MOST_ANSWERED, TIMED, distilled_figures
from backhand.objectives.distillation.packers import DistilledPacker, DistilledPrompts, Lesson
from backhand.objectives.distillation.teaching import distilled_steps, teach
from backhand.objectives.kinds.answer_training import AnswerTraining, exact_match, exact_match_work
from backhand.objectives.kinds.free_answers import FreeAnswers, free_answers
from backhand.objectives.kinds.sampled_answers import check_context, share_cut_off
from backhand.runs.records import MAX_NEW_TOKENS
from backhand.runs.summary import RunSummary
from backhand.training.contexts import count_contexts, with_context_text
from backhand.training.hooks import KnownModel, KnownRows, Losses, Packing, RunContext
from backhand.training.run_inputs import RunInputs
from backhand.training.work import Answers, Work
from backhand.words import name_list


class DistilledTraining(AnswerTraining):
    """Training on a teacher's distributions, at answers of the rows, of the teacher, or of the model itself."""

    def with_model(self, model: KnownModel) -> KnownModel:
        objective = with_context_text(model.config.objective)
        engine = with_hidden_states(model.engine, "distillation needs the hidden states of the teacher")
        if ends := [name for name in model.layout.names if name.startswith((HEAD, engine.config.embedding))]:
            raise UsageError(
                f"distillation trains the blocks of a model, not {name_list(ends)}",
                where="target_modules",
                why="teacher and adapted model share the head, so that a hidden state determines a distribution",
                next_step="leave the embedding and the head out of the adapter",
            )
        teacher = TeacherPrompts(
            context=objective.context,
            column=objective.context_column,
            template=objective.resolved().teacher_prompt_template or "",
            sampled=objective.traits.samples,
        )
        return replace(model, config=replace(model.config, objective=objective), teacher=teacher)

    def packing(self, rows: KnownRows) -> Packing:
        config = rows.config
        if not config.data.data:  # assumed rows have no teacher
            return super().packing(rows)
        lesson, shares = Lesson.of(config.objective, count_contexts(config.objective)), rows.engine.shares_prefixes

        def packer(data: PreparedData, share_prefixes: bool) -> DistilledPacker | DistilledPrompts:
            sharing = {"share_prefixes": share_prefixes, "teacher_shares": shares}
            if config.objective.traits.samples:
                return DistilledPrompts(data, lesson, config.rewards.max_new_tokens, **sharing)
            return DistilledPacker(data, lesson, **sharing)

        held_out = None if rows.held_out is None else packer(rows.held_out, shares)
        train = packer(rows.train, rows.shares_in_steps)
        prompts = [one for one in (train, held_out) if isinstance(one, DistilledPrompts)]
        if prompts:
            assert isinstance(rows.engine, DecoderEngine)
            check_context(max(one.longest for one in prompts), rows.engine.config.max_position_embeddings)
        return Packing(train.rows, None if held_out is None else held_out.rows, train, held_out)

    def work(self, inputs: RunInputs, rows_per_process: int) -> Work:
        config, packers = inputs.config, _packers(inputs)
        work = super().work(inputs, rows_per_process)
        if not packers:
            return work
        traits, rows, tokens, answers = config.objective.traits, 0, 0, 0
        if isinstance(inputs.packer, DistilledPrompts):
            rows = min(ROWS_AT_ONCE, max(len(one.lengths) for one in packers.values()))
            work = work._replace(sampled_rows=rows, sampled_tokens=inputs.packer.sampled_tokens(rows))
        for name, one in packers.items():
            sampled = isinstance(one, DistilledPrompts)
            if not (sampled and name == "train" and traits.trains_on_samples):
                answers += len(one.examples) * sampled
                tokens += one.teacher_pass.tokens(len(one.examples))
        work = work._replace(
            group=int(traits.trains_on_samples),
            teacher=tuple(one.teacher_pass for one in packers.values()),
            teacher_answers=answers,
            teacher_tokens=tokens,
        )
        held_out = packers.get("held_out")
        if held_out is None or not work.end_answers:
            return work
        # The answers of both models and of the teacher to up to all rows, and the agreement of both models.
        evaluations, matched = exact_match_work(inputs) if traits.answers_from == "rows" else (0.0, ())
        compared = Answers(
            min(len(held_out.examples), MOST_ANSWERED), 2 * MAX_NEW_TOKENS + work.end_answers[0].tokens, at_least=TIMED
        )
        return work._replace(
            end_evaluations=2.0 + evaluations,
            end_tokens=_prompt_tokens(held_out),
            end_answers=(*work.end_answers, compared, *matched),
        )

    def begin(self, run: RunContext) -> RunInputs:
        return teach(run)

    def losses(self, run: RunContext) -> Losses:
        sampled = distilled_steps(run) if run.config.objective.traits.trains_on_samples else None
        return super().losses(run)._replace(sampled=sampled)

    def answers(self, run: RunContext, losses: Losses) -> tuple[FreeAnswers, dict[str, Any]]:
        figures, prompted, packer = None, dict[int, str](), run.inputs.held_out_packer
        source, start, stops = run.inputs.source, run.start.values, stop_ids(run.inputs.source, run.config.data)
        if isinstance(packer, DistilledPacker) and isinstance(run.bound.model, Decoder):
            figures, prompted = distilled_figures(
                *(run.bound.model, packer, start, source.tokenizer(), stops, run.micro_batch_rows),
                shown=run.config.run.answers,
            )
            if figures is not None and run.config.objective.traits.samples:
                own = [example.input_ids[-1:].tolist() for example in packer.examples]
                figures["teacher_cut_off"] = share_cut_off(own, stops)
        answers = free_answers(
            run.bound, source, run.inputs.held_out_examples, run.config, prompted=prompted, start=start
        )
        return answers, {"same_answer": answers.same, "distilled": figures}

    def matches(self, run: RunContext, summary: RunSummary) -> dict[str, Any]:
        return exact_match(run, summary, {}) if run.config.objective.traits.answers_from == "rows" else {}


def _packers(inputs: RunInputs) -> Mapping[str, DistilledPacker | DistilledPrompts]:
    packers: dict[str, RowPacker | None] = {"train": inputs.packer, "held_out": inputs.held_out_packer}
    return {name: one for name, one in packers.items() if isinstance(one, DistilledPacker | DistilledPrompts)}


def _prompt_tokens(packer: DistilledPacker | DistilledPrompts) -> float:
    """Return the tokens of the prompts of student and teacher that are answered at the end.

    Both models and the teacher read up to `MOST_ANSWERED` prompts, the teacher's context once. Then student and teacher
    read `TIMED` prompts, and one before them, one at a time.
    """
    student, teacher = (
        sum(example.last_answer[0] for example in examples) / len(examples)
        for examples in (packer.examples, packer.teachers)
    )
    asked = min(len(packer.examples), MOST_ANSWERED)
    return 3 * asked * student + len(packer.groups) * teacher + (TIMED + 1) * (student + teacher)
