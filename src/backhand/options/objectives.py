"""Options of the loss, named as in TRL's configurations.

This file imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, get_args

from backhand.bounds import Bound, Check, Convert, GivenTexts, Options, Text
from backhand.data.label_names import as_labels
from backhand.data.rows import (
    INSTRUCTION,
    TEMPLATE_PLACES,
    PoolingName,
    ProblemType,
    RankingLossName,
)
from backhand.errors import UsageError
from backhand.objective.registry import objective
from backhand.objective.spec import AnswersFrom, Traits
from backhand.words import shown

ObjectiveName = Literal[
    "sft", "dpo", "ipo", "orpo", "simpo", "kto", "grpo", "decide", "bake", "sdft", "embed", "rank", "classify"
]
_OfMargin = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
_OfSides = Literal["nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"]
_Sorted = Literal["aot", "aot_unpaired"]
_OfLabels = Literal["kto", "apo_zero_unpaired"]
EmbeddingLoss = Literal["infonce", "symmetric", "triplet", "cosent"]
DivergenceKind = Literal["forward", "reverse", "jensen-shannon"]
DEMONSTRATION_TEMPLATE = """{prompt}

This is an example for a response to the question:
{privileged_context}

Now answer with a response of your own."""
"""The prompt of arXiv:2601.19897, without its demand for a thinking process, which only some models have."""
LossType = Literal[_OfMargin, _OfSides, _Sorted, _OfLabels]

_TAKEN: dict[str, tuple[str, ...]] = {
    "sft": (),
    "dpo": ("beta", "loss_type", "label_smoothing", "discopop_tau"),
    "ipo": ("beta",),
    "orpo": ("beta",),
    "simpo": ("beta", "simpo_gamma", "label_smoothing"),
    "kto": ("beta", "loss_type", "desirable_weight", "undesirable_weight"),
    "grpo": ("beta",),
    "decide": ("label_smoothing",),
    "bake": (
        *("context", "context_column", "answers_from"),
        *("divergence", "divergence_share", "divergence_temperature"),
    ),
    "sdft": (
        *("teacher_prompt_template", "teacher_update_rate"),
        *("divergence", "divergence_share", "divergence_temperature"),
    ),
    "embed": (
        *("pooling", "embedding_loss", "similarity_scale", "triplet_margin", "matryoshka_dims"),
        *("query_prompt", "document_prompt"),
    ),
    "rank": ("ranking_loss", "positive_weight", "instruction"),
    "classify": ("problem_type", "class_labels"),
}


def objectives_with(option: str) -> tuple[str, ...]:
    """Return the objectives that use an option which not all objectives use, or () for any other option."""
    return tuple(objective for objective, taken in _TAKEN.items() if option in taken)


_USUAL_BETA = {"simpo": 2.0, "grpo": 0.0}
SORTED: tuple[str, ...] = get_args(_Sorted)
_SMOOTHED = ("exo_pair", "robust", *SORTED)


def _check_dims(where: str, dims: Any) -> None:
    """Raise UsageError unless `dims` are different positive integers."""
    if not all(isinstance(size, int) and size > 0 for size in dims) or len({*dims}) < len(dims):
        raise UsageError(f"{list(dims)} are not different lengths of vectors", where=where)


def _check_labels(where: str, labels: Any) -> None:
    """Raise UsageError unless `labels` are different texts."""
    if not all(isinstance(label, str) and label.strip() for label in labels) or len({*labels}) < len(labels):
        raise UsageError(f"{shown([*labels])} are not different labels", where=where)


_SMALLEST, _LARGEST = 1e-6, 1e6
"""Bounds of factors of the gradient. Beyond them, gradients underflow or overflow."""
_Weight = Annotated[float, Bound(at_least=_SMALLEST, at_most=_LARGEST)]


@dataclass(frozen=True)
class ObjectiveOptions(Options):
    """The loss and its hyper-parameters."""

    objective: ObjectiveName = "sft"
    """Training objective. `sft` trains on the answers of the rows. For pairs of answers there are `dpo` (arXiv
    2305.18290), `ipo` (2310.12036), `orpo` (2403.07691) and `simpo` (2405.14734); for answers labelled desirable or
    undesirable `kto` (2402.01306); for rewards of sampled answers `grpo` (2402.03300; variants: `loss`); for
    questions with a fixed set of answers `decide`, whose probabilities `backhand decide` returns; to make the model
    answer without a long prompt as it answers with it `bake` (2409.13697), see `context`; to learn from demonstrations
    with less forgetting `sdft` (2601.19897), see `teacher_prompt_template`; for vectors of texts, for search and
    duplicates, `embed`; for a score of a document and a query, to rank what a search has found, `rank`
    (2506.05176); for a classification head on hidden states, which learns labels or a number, `classify`."""

    beta: Annotated[float, Bound(at_least=0.0, at_most=_LARGEST)] | None = None
    """Strength with which the model is held to the one it starts from (`dpo`, `kto`; τ of `ipo`). For `orpo` it is λ,
    the weight of the odds ratio; for `simpo` the factor of the rewards; for `grpo` the weight of the divergence from
    the base model. Default: 0.1, for `simpo` 2, for `grpo` 0."""

    loss_type: LossType | None = None
    """Form of the loss of `dpo`, as in TRL's DPOConfig (default: `sigmoid`), or of `kto`: `kto` or `apo_zero_unpaired`.
    `backhand.ops.preference` defines each form. `aot` and `aot_unpaired` (2406.05882) sort the pairs of a step."""

    label_smoothing: Annotated[float, Bound(at_least=0.0, below=1.0)] = 0.0
    """Probability that chosen and rejected are exchanged in a pair: for `simpo`, and for `dpo` with `robust` (below
    0.5), `exo_pair` (above 0), `aot` or `aot_unpaired`. For `decide`, the share of each answer that training spreads
    over all options of its question (1512.00567). Probabilities are then too even without a temperature, so `decide`
    needs held-out rows for it."""

    discopop_tau: Annotated[float, Bound(at_least=_SMALLEST)] = 0.05
    """Temperature of `dpo` with `discopop`."""

    simpo_gamma: Annotated[float, Bound(at_least=0.0, at_most=_LARGEST)] = 0.5
    """Target margin between the rewards of a pair (`simpo`)."""

    desirable_weight: _Weight = 1.0
    """Weight of desirable answers (`kto`)."""

    undesirable_weight: _Weight = 1.0
    """Weight of undesirable answers (`kto`)."""

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

    pooling: PoolingName | None = None
    """The vector of a text (`embed`): the hidden state of its `last` token, which is the end-of-sequence token, of its
    first one (`cls`), or the `mean` of all. Default: as the model's sentence-transformers files say, else `last`."""

    embedding_loss: EmbeddingLoss | None = None
    """Loss of vectors (`embed`): `infonce` with all texts of a step as negatives, `symmetric` to find anchors from
    positives as well, `triplet` with the negatives of the row alone, or `cosent` for pairs with a score. Default:
    `cosent` for pairs with a score, else `infonce`."""

    similarity_scale: Annotated[float, Bound(at_least=0.01, at_most=1000.0)] = 20.0
    """Factor of the cosines in the losses of vectors, the inverse of a temperature."""

    triplet_margin: Annotated[float, Bound(above=0.0, at_most=2.0)] = 0.5
    """Margin between the cosines of positive and negative (`triplet`)."""

    matryoshka_dims: Annotated[tuple[int, ...], Check(_check_dims)] = ()
    """Lengths to which the vectors can be cut, such as `256 128 64` (`embed`; 2205.13147). The loss is the sum over
    these and the whole vector."""

    query_prompt: str | None = None
    """Text in front of every anchor (`embed`), such as an instruction. Default: as the model's sentence-transformers
    files say, else none."""

    document_prompt: str | None = None
    """Text in front of all other texts (`embed`). Default: as for `query_prompt`."""

    ranking_loss: RankingLossName = "pointwise"
    """Loss of rankings (`rank`): `pointwise`, the binary cross-entropy of each document; `listwise`, the cross-entropy
    of a softmax over the documents of a row; or `listnet`, the same with the softmax of graded scores as targets."""

    positive_weight: _Weight = 1.0
    """Weight of relevant documents in the `pointwise` loss of rankings, for rows with many negatives."""

    instruction: Text = INSTRUCTION
    """The task in the prompt of rankings by a decoder (`rank`), such as `Given a question, find the help page that
    answers it`."""

    problem_type: ProblemType | None = None
    """Use of the logits of the head of `classify`, named as in transformers: one label per row (cross-entropy), all
    labels of a list (binary cross-entropy), or a number (squared error). Default: several labels if a row has a list,
    a number if (nearly) all labels are numbers and some are fractions, else one label."""

    class_labels: Annotated[GivenTexts, Convert(as_labels), Check(_check_labels)] = ()  # type: ignore[assignment]
    """Labels of `classify` in the order of the logits. Default: the labels of all rows, sorted."""

    def _check_together(self) -> None:
        usual = ObjectiveOptions()
        for option in fields(self):
            name = option.name
            if name == "objective" or name in _TAKEN[self.objective] or getattr(self, name) == getattr(usual, name):
                continue
            raise UsageError(
                f"{name} {shown(getattr(self, name))} is given, but {self.objective} does not use it",
                where=name,
                next_step=f"leave it out, or give --objective {' or '.join(objectives_with(name))}",
            )
        if self.objective == "bake" and self.context is None:
            raise UsageError(
                "bake has no prompt to turn into an adapter",
                where="context",
                next_step="give --context FILE, a directory of files, or the prompt itself",
            )
        template = self.teacher_prompt_template
        if template is not None and (missing := [place for place in TEMPLATE_PLACES if place not in template]):
            raise UsageError(
                f"teacher_prompt_template has no {' and no '.join(missing)}",
                where="teacher_prompt_template",
                why="the teacher reads the prompt of the row and its demonstration",
                next_step="write both places, each in braces",
            )
        if self.divergence != "jensen-shannon" and self.divergence_share != usual.divergence_share:
            raise UsageError(
                f"divergence_share {self.divergence_share} is given, but divergence {self.divergence!r} is no mixture",
                where="divergence_share",
                next_step="leave it out, or give --divergence jensen-shannon",
            )
        if self.embedding_loss != "triplet" and self.triplet_margin != usual.triplet_margin:
            raise UsageError(
                f"triplet_margin {self.triplet_margin} is given, but the loss is not triplet",
                where="triplet_margin",
                next_step="leave it out, or give --embedding-loss triplet",
            )
        if self.embedding_loss == "triplet" and self.similarity_scale != usual.similarity_scale:
            raise UsageError(
                f"similarity_scale {self.similarity_scale} is given, but triplet does not use it",
                where="similarity_scale",
                next_step="leave it out; triplet has --triplet-margin",
            )
        if self.ranking_loss != "pointwise" and self.positive_weight != usual.positive_weight:
            raise UsageError(
                f"positive_weight {self.positive_weight} is given, but {self.ranking_loss} does not use it",
                where="positive_weight",
                next_step="leave it out, or give --ranking-loss pointwise",
            )
        if self.beta == 0 and self.objective != "grpo":
            raise UsageError("beta 0.0 is not a finite number above 0", where="beta")
        if self.beta is not None and 0 < self.beta < _SMALLEST:
            why = "gradients are multiples of it, and would be lost in rounding"
            raise UsageError(f"beta {self.beta} is below {_SMALLEST}", where="beta", why=why)
        if self.loss_type is not None and (self.loss_type in get_args(_OfLabels)) != (self.objective == "kto"):
            raise UsageError(
                f"loss_type {self.loss_type!r} is not a form of {self.objective}",
                where="loss_type",
                next_step=f"{self.loss_type} belongs to --objective {'dpo' if self.objective == 'kto' else 'kto'}",
            )
        self._check_smoothing()

    def _check_smoothing(self) -> None:
        smoothing, form = self.label_smoothing, self.loss_type
        if self.objective == "dpo" and smoothing and form not in _SMOOTHED:
            raise UsageError(
                f"label_smoothing {smoothing} is given, but loss_type {form or 'sigmoid'!r} does not use it",
                where="label_smoothing",
                next_step=f"leave it out, or give --loss-type {' or '.join(_SMOOTHED)}",
            )
        if form == "robust" and smoothing >= 0.5:
            raise UsageError(
                f"label_smoothing {smoothing} is not below 0.5, as robust needs it", where="label_smoothing"
            )
        if form == "exo_pair" and not smoothing:
            raise UsageError(
                "exo_pair needs a label_smoothing above 0",
                where="label_smoothing",
                next_step="give --label-smoothing 0.001, as its paper does",
            )

    def resolved(self) -> ObjectiveOptions:
        """Return the options with all defaults filled in."""
        beta = self.strength if "beta" in _TAKEN[self.objective] else None
        loss_type = self.form if "loss_type" in _TAKEN[self.objective] else None
        resolved = replace(self, beta=beta, loss_type=loss_type)
        if self.objective == "bake":
            return replace(resolved, divergence=self.divergence or "forward", answers_from=self.traits.answers_from)
        if self.objective == "sdft":
            template = self.teacher_prompt_template or DEMONSTRATION_TEMPLATE
            return replace(resolved, divergence=self.divergence or "reverse", teacher_prompt_template=template)
        return resolved

    @property
    def traits(self) -> Traits:
        """Facts of the objective under these options."""
        return objective(self.objective).traits(self)

    @property
    def strength(self) -> float:
        """`beta`, or its default."""
        return self.beta if self.beta is not None else _USUAL_BETA.get(self.objective, 0.1)

    @property
    def form(self) -> LossType:
        """`loss_type`, or its default."""
        usual: LossType = "ipo" if self.objective == "ipo" else "kto" if self.objective == "kto" else "sigmoid"
        return self.loss_type or usual
