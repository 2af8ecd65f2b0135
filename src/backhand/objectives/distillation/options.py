"""Options of distillation.

This file imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from backhand.bounds import Bound, Options, Text
from backhand.data.rows import TEMPLATE_PLACES
from backhand.errors import UsageError
from backhand.objective.spec import AnswersFrom

DivergenceKind = Literal["forward", "reverse", "jensen-shannon"]
DEMONSTRATION_TEMPLATE = """{prompt}

This is an example for a response to the question:
{privileged_context}

Now answer with a response of your own."""
"""The prompt of arXiv:2601.19897, without its demand for a thinking process, which only some models have."""


@dataclass(frozen=True)
class DistillationOptions(Options):
    """Teacher and distance of distillation."""

    context: Text | None = None
    """The prompt that `bake` turns into an adapter: a file, or the text itself. A text is a system message; a JSON list
    of messages may contain examples. It is in front of the prompts of the teacher, which is the model that the run
    starts from. The adapted model learns the teacher's next-token distributions over the answers, without seeing the
    prompt. A directory of files makes one adapter of each, in a run directory of its own inside `output`, with the base
    loaded once."""

    context_column: Text | None = None
    """With a directory as the `context`: the column that names the file of each row, with or without its suffix. One
    adapter learns all contexts (`bake`)."""

    answers_from: AnswersFrom | None = None
    """Origin of the answers of `bake`: the `teacher` samples an answer to each prompt once, before the first step
    (default); the `student`, the adapted model, samples new ones in each step; or the `rows` contain them."""

    teacher_prompt_template: Text | None = None
    """Prompt of the teacher of `sdft`. `{prompt}` is the prompt of the row, and `{privileged_context}` its answer, the
    demonstration. The adapted model answers the prompt alone and learns the teacher's next-token distributions over
    its own answers. Default: the template of 2601.19897."""

    teacher_update_rate: Annotated[float, Bound(at_least=0.0, at_most=1.0)] = 0.0
    """Share of the adapter in the teacher of `sdft` after each step: the teacher's adapter is an exponential moving
    average of the trained one. 0 keeps the model that the run starts from; 1 makes the newest adapter the teacher."""

    divergence: DivergenceKind | None = None
    """Distance of the model from its teacher: `forward` is KL(teacher ‖ model), `reverse` KL(model ‖ teacher), and
    `jensen-shannon` a mixture of both (2306.13649). Default: `forward` for `bake`, `reverse` for `sdft`."""

    divergence_share: Annotated[float, Bound(above=0.0, below=1.0)] = 0.5
    """The teacher's share β in the mixture of `jensen-shannon`."""

    divergence_temperature: Annotated[float, Bound(at_least=0.01, at_most=100.0)] = 1.0
    """Divide the logits of both sides by this number in the loss of `bake` and `sdft`."""


def check_divergence(options: Any) -> None:
    """Raise UsageError for a share of a divergence that is no mixture."""
    if options.divergence != "jensen-shannon" and options.divergence_share != DistillationOptions.divergence_share:
        raise UsageError(
            f"divergence_share {options.divergence_share} is given, but divergence {options.divergence!r} is no "
            "mixture",
            where="divergence_share",
            next_step="leave it out, or give --divergence jensen-shannon",
        )


def check_context(options: Any) -> None:
    """Raise UsageError without a context."""
    if options.context is None:
        raise UsageError(
            "bake has no prompt to turn into an adapter",
            where="context",
            next_step="give --context FILE, a directory of files, or the prompt itself",
        )


def check_template(template: str | None) -> None:
    """Raise UsageError unless the template has all places."""
    if template is not None and (missing := [place for place in TEMPLATE_PLACES if place not in template]):
        raise UsageError(
            f"teacher_prompt_template has no {' and no '.join(missing)}",
            where="teacher_prompt_template",
            why="the teacher reads the prompt of the row and its demonstration",
            next_step="write both places, each in braces",
        )
