"""The functions of the package. They take the options of the commands by name, and texts, paths and rows as they are.

    summary = backhand.train(data=rows, output="runs/mine", rank=8)
    backhand.generate("Hello", adapter=summary.adapter)

Options are checked as on the command line. An unknown name is answered with the one to write instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from backhand.api_errors import errors_in_python, in_python, name_rows
from backhand.bounds import Options, check_kind
from backhand.cli.option_fields import build, option_fields
from backhand.data.decisions import questions_of
from backhand.data.given_rows import GivenRows, Rows, list_of_texts
from backhand.data.lint_command import lint_as_json
from backhand.data.options import LintOptions, no_data
from backhand.data.sources import expand
from backhand.errors import UsageError
from backhand.generation.command import answer_rows
from backhand.generation.loading import loaded_model
from backhand.generation.options import GenerateOptions
from backhand.interop.command import export_command
from backhand.interop.merging import merge_command
from backhand.interop.options import ExportOptions, Format, MergeOptions
from backhand.loop import evaluate as evaluation
from backhand.loop.classify import Classifier
from backhand.loop.decide import decide as decide_states
from backhand.loop.embed import VectorEvaluation
from backhand.loop.embed import embed as embed_texts
from backhand.loop.embed import mine as mine_negatives
from backhand.loop.observers import Callback
from backhand.loop.rank import rank as rank_rows
from backhand.objectives.rewards.evaluation import RewardEvaluation, evaluate_rewards
from backhand.options.command_options import (
    DecideOptions,
    EmbedOptions,
    EvaluateOptions,
    MineOptions,
    PlanOptions,
    RankOptions,
)
from backhand.options.config import TrainConfig
from backhand.report.train import train as train_with_report
from backhand.runs.summary import RunSummary
from backhand.training.plan_command import plan as plan_of_run
from backhand.words import label_text, name_list, show_notes

Place = str | PathLike[str]
"""A path. A `RunSummary` is the path of its adapter."""
State = str | Mapping[Any, Any] | Sequence[Any]
"""A state to decide: text, or a value that is written as JSON."""
T = TypeVar("T", bound=Options)


def _options(kind: type[T], values: Mapping[str, Any], base: T | None = None) -> T:
    """Return the options of a function. Texts are parsed as on the command line where the option has a parser.

    Args:
        values: options by name. None of a named parameter has been left out.
        base: other options.
    """
    if base is not None:
        base.validate()
    fields = {field.name: field for field in option_fields(kind)}
    parsed = {
        name: parse(value) if isinstance(value, str) and (parse := fields[name].parse) else value
        for name, value in values.items()
    }
    options = build(kind, parsed, base)
    name_rows(options)
    return options


def _named(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@errors_in_python(TrainConfig)
def train(
    config: TrainConfig | None = None,
    *,
    data: Rows | None = None,
    output: Place | None = None,
    model: Place | None = None,
    callbacks: Iterable[Callback] | Callback | None = (),
    **options: Any,
) -> RunSummary:
    """Train an adapter, and write the run directory with its report.

    Args:
        config: options as an object. Those given by name replace its own.
        data: rows to learn: a file, several files, a list of dicts or a data frame.
        output: the run directory, which must not exist; `run` unless given.
        model: the base model: a directory, a GGUF file or a hub id.
        callbacks: one or several. Each is a function that is called with a record per step and evaluation, or an
            `Observer`. A callback that returns False ends the run after the step, as early stopping does, and
            `resume=True` goes on. An exception in a callback ends the run, and removes a run without a checkpoint.
        options: any other option of `backhand train`, by its name.

    Returns:
        The results of the run, which are the contents of summary.json. `losses` and `eval_losses` are the curves.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: before the first step.
        CheckError: a guard failed, or the results are not finite. Earlier checkpoints are intact.
        Interrupted: after a signal and a checkpoint.
    """
    if config is not None:
        check_kind("config", config, TrainConfig)
    given = _named(data=data, output=output, model=model) | options
    built = _options(TrainConfig, given, config)
    summary = train_with_report(built, callbacks=callbacks, typed=frozenset(given))
    hints = {field.option: field.hint for field in option_fields(TrainConfig)}
    return replace(summary, advice=summary.advice and in_python(summary.advice, hints))


@overload
def evaluate(
    options: EvaluateOptions | None = ...,
    *,
    vectors: Literal[True],
    data: Rows | None = ...,
    adapter: Place | None = ...,
    model: Place | None = ...,
    **further: Any,
) -> VectorEvaluation: ...
@overload
def evaluate(
    options: EvaluateOptions | None = ...,
    *,
    reward: str | Sequence[str],
    data: Rows | None = ...,
    adapter: Place | None = ...,
    model: Place | None = ...,
    **further: Any,
) -> RewardEvaluation: ...
@overload
def evaluate(
    options: EvaluateOptions | None = ...,
    *,
    rankings: Literal[True],
    data: Rows | None = ...,
    adapter: Place | None = ...,
    model: Place | None = ...,
    **further: Any,
) -> evaluation.Evaluation: ...
@overload
def evaluate(
    options: None = ...,
    *,
    vectors: Literal[False] = ...,
    data: Rows | None = ...,
    adapter: None = ...,
    model: Place | None = ...,
    **further: Any,
) -> evaluation.Evaluation: ...
@overload
def evaluate(
    options: None = ...,
    *,
    data: Rows | None = ...,
    adapter: Place | None = ...,
    model: Place | None = ...,
    **further: Any,
) -> evaluation.Evaluation | VectorEvaluation: ...
@overload
def evaluate(
    options: EvaluateOptions | None = ...,
    *,
    data: Rows | None = ...,
    adapter: Place | None = ...,
    model: Place | None = ...,
    **further: Any,
) -> evaluation.Evaluation | RewardEvaluation | VectorEvaluation: ...
@errors_in_python(EvaluateOptions)
def evaluate(
    options: EvaluateOptions | None = None,
    *,
    data: Rows | None = None,
    adapter: Place | None = None,
    model: Place | None = None,
    **further: Any,
) -> evaluation.Evaluation | RewardEvaluation | VectorEvaluation:
    """Measure the base model and, if an adapter is given, the adapted model on rows.

    Args:
        options: options as an object. Those given by name replace its own.
        data: the rows: a file, several files, a list of dicts or a data frame.
        adapter: directory of an adapter, or a GGUF file.
        model: the base model.
        further: any other option of `backhand evaluate`, by its name. With `reward`, the rewards of greedy answers are
            measured instead of losses, and with `vectors` or an adapter that was trained to embed, vectors of texts.

    Returns:
        The scores; `as_dict` gives what `backhand evaluate --json` prints. They are a `RewardEvaluation` with `reward`,
        a `VectorEvaluation` for vectors, and an `Evaluation` otherwise.

    Raises:
        UsageError, DataError, ArtifactError: an option, the rows, the model or the adapter cannot be used.
    """
    if options is not None:
        check_kind("options", options, EvaluateOptions)
    given = _named(data=data, adapter=adapter, model=model) | further
    built = _options(EvaluateOptions, given, options)
    return evaluate_rewards(built.validate()) if built.run.reward else evaluation.evaluate(built)


@overload
def generate(
    prompt: str = ..., *, data: Rows, adapter: Place | None = None, model: Place | None = None, **options: Any
) -> list[dict[str, Any]]: ...
@overload
def generate(prompt: str, *, adapter: Place | None = None, model: Place | None = None, **options: Any) -> str: ...
@overload
def generate(
    *, prompts: Iterable[str], adapter: Place | None = None, model: Place | None = None, **options: Any
) -> list[str]: ...
@errors_in_python(GenerateOptions, takes_text=True)
def generate(
    prompt: str | None = None,
    *,
    prompts: Iterable[str] | None = None,
    data: Rows | None = None,
    adapter: Place | None = None,
    model: Place | None = None,
    **options: Any,
) -> str | list[str] | list[dict[str, Any]]:
    """Answer a prompt, several prompts, or rows.

    Args:
        prompt: one prompt; with `data`, a column or a text with columns in braces.
        prompts: several prompts.
        data: rows to answer: a file, several files, a list of dicts or a data frame.
        adapter: directory of an adapter, or a GGUF file.
        model: the base model.
        options: any other option of `backhand generate`, such as `greedy`, `max_new_tokens`, `system` or `labels`.

    Returns:
        The answer to `prompt`, the answers to `prompts`, or for each row of `data` what `backhand generate --data`
        writes for it: prompt, reference, completion and finish_reason.

    Raises:
        UsageError, DataError, ArtifactError: an option, a prompt, the model or the adapter cannot be used.
    """
    rows = _prompts(generate, prompt, prompts, data)
    given = _named(adapter=adapter, model=model) | options
    if data is not None:
        return _answers(generate, rows, given | _named(prompt=prompt))
    if given.get("compare"):
        raise UsageError(
            "compare is for rows", where="compare", next_step="give data=…, or call it without the adapter as well"
        )
    lines = _answers(generate, rows, given)
    answers = [str(line["completion"]) for line in lines]
    return answers if prompt is None else answers[0]


@overload
def classify(
    prompt: str = ...,
    *,
    data: Rows,
    labels: Iterable[str] = ...,
    adapter: Place | None = None,
    model: Place | None = None,
    **options: Any,
) -> list[dict[str, float]]: ...
@overload
def classify(
    prompt: str,
    *,
    labels: Iterable[str] = ...,
    adapter: Place | None = None,
    model: Place | None = None,
    **options: Any,
) -> dict[str, float]: ...
@overload
def classify(
    *,
    prompts: Iterable[str],
    labels: Iterable[str] = ...,
    adapter: Place | None = None,
    model: Place | None = None,
    **options: Any,
) -> list[dict[str, float]]: ...
@errors_in_python(GenerateOptions, takes_text=True)
def classify(
    prompt: str | None = None,
    *,
    prompts: Iterable[str] | None = None,
    data: Rows | None = None,
    labels: Iterable[str] = ("auto",),
    adapter: Place | None = None,
    model: Place | None = None,
    **options: Any,
) -> dict[str, float] | list[dict[str, float]]:
    """Return the probability of each label as the answer to a prompt, the most probable label first.

    If the adapter has a classification head, the prompt is the text to classify.

    Args:
        prompt: one prompt; with `data`, a column or a text with columns in braces.
        prompts: several prompts.
        data: rows to classify: a file, several files, a list of dicts or a data frame.
        labels: the labels; those that the adapter was trained on unless given.
        adapter: directory of an adapter, or a GGUF file.
        model: the base model.
        options: any other option of `backhand generate`.

    Raises:
        UsageError, DataError, ArtifactError: an option, a prompt, the model or the adapter cannot be used.
    """
    given = {"labels": ("auto",)} | _named(labels=labels, adapter=adapter, model=model) | options
    rows = _prompts(classify, prompt, prompts, data)
    for option in ("compare", "as_rows"):
        if given.get(option):
            raise UsageError(
                "backhand.classify returns the probabilities of labels",
                where=option,
                next_step=f"leave {option} out, or call backhand.generate(data=…, labels=…, {option}=True)",
            )
    lines = _answers(classify, rows, given if data is None else given | _named(prompt=prompt))
    probabilities = [dict(line["probabilities"]) for line in lines]
    return probabilities if prompt is None or data is not None else probabilities[0]


@overload
def decide(
    state: str | None = ...,
    *,
    data: Rows,
    adapter: Place,
    questions: Mapping[str, Any] | None = ...,
    model: Place | None = ...,
    **options: Any,
) -> list[dict[str, Any]]: ...
@overload
def decide(
    state: State,
    *,
    adapter: Place,
    questions: Mapping[str, Any] | None = ...,
    model: Place | None = ...,
    **options: Any,
) -> dict[str, Any]: ...
@overload
def decide(
    *,
    states: Iterable[State],
    adapter: Place,
    questions: Mapping[str, Any] | None = ...,
    model: Place | None = ...,
    **options: Any,
) -> list[dict[str, Any]]: ...
@errors_in_python(DecideOptions, takes_text=True)
def decide(
    state: State | None = None,
    *,
    states: Iterable[State] | None = None,
    adapter: Place,
    questions: Mapping[str, Any] | None = None,
    model: Place | None = None,
    **options: Any,
) -> dict[str, Any] | list[dict[str, Any]]:
    """Return the answers to an adapter's questions about a state, by question, in the decision protocol's form.

    Args:
        state: one state: text, or a value that is written as JSON; with `data`, a column or a text with columns in
            braces. A list of texts or of dicts is refused, since it may be several states.
        states: several states.
        adapter: directory of an adapter that was trained with `objective="decide"`.
        questions: other questions than those that the adapter was trained on, in the protocol's form.
        model: the base model.
        options: any other option of `backhand decide`. `data` gives rows, by default with the columns of training.

    Raises:
        UsageError, DataError, ArtifactError: an option, a state, a question, the model or the adapter cannot be used.
    """
    next_step = (
        "backhand.decide('…') for one state, backhand.decide(states=['…', '…']) for several, "
        "backhand.decide(data=…) for rows with the columns of training"
    )
    if (state is not None or "data" in options) + (states is not None) != 1:
        raise UsageError("give either state, states or data", where="states", next_step=next_step)
    given = _named(adapter=adapter, model=model) | options
    own = {} if questions is None else {"questions": questions}
    if "data" not in options and questions is not None:
        questions_of(questions, "questions")  # an error of the row would not name the argument
    if "data" in options:
        given |= own | _named(state=state)
    else:
        option, values = ("state", state) if states is None else ("states", states)
        plural = "states" if states is None else None
        texts = list_of_texts(option, values, next_step, plural=plural, of_json=True)
        if not texts:
            return []
        given |= {"data": GivenRows.of([{"state": one, **own} for one in texts], option=option), "state": "state"}
    built = _options(DecideOptions, given)
    _check_returned(decide, "answers", built.run.output)
    answers = [line["answers"] for line in decide_states(built)]
    return answers if state is None or "data" in options else answers[0]


@errors_in_python(RankOptions, takes_text=True)
def rank(
    query: str,
    documents: Iterable[str],
    *,
    adapter: Place | None = None,
    model: Place | None = None,
    **options: Any,
) -> list[float]:
    """Return the relevance of documents for a query, each a probability from 0 to 1, in the order of the documents.

    Args:
        query: the query.
        documents: the documents.
        adapter: directory of an adapter that was trained with `objective="rank"`.
        model: the base model.
        options: any other option of `backhand rank`.

    Raises:
        UsageError, DataError, ArtifactError: an option, a text, the model or the adapter cannot be used.
    """
    next_step = "backhand.rank('…', ['…', '…']) takes one query and a list of documents"
    list_of_texts("query", query, next_step, plural="")
    texts = list_of_texts("documents", documents, next_step)
    rows = GivenRows.of([{"query": query, "documents": texts}], option="documents")
    built = _options(RankOptions, _named(adapter=adapter, model=model) | options | {"data": rows})
    _check_returned(rank, "scores", built.run.output)
    if built.run.top is not None:
        raise UsageError(
            "backhand.rank returns the scores of all documents, in their order",
            where="top",
            next_step="leave top out, and sort: sorted(zip(scores, documents), reverse=True)[:N]",
        )
    scores: list[float] = rank_rows(built)[0]["scores"] if texts else []
    return scores


@errors_in_python(EmbedOptions, takes_text=True)
def embed(
    texts: str | Iterable[str] | None = None,
    *,
    data: Rows | None = None,
    adapter: Place | None = None,
    model: Place | None = None,
    **options: Any,
) -> NDArray[np.float32]:
    """Return the vectors of texts, of length 1: the scalar product of two vectors is their cosine.

    Args:
        texts: one text or several.
        data: rows with texts instead: a file, several files, a list of dicts or a data frame.
        adapter: directory of an adapter that was trained with `objective="embed"`.
        model: the base model.
        options: any other option of `backhand embed`, such as `queries=True`.

    Returns:
        (texts, size), in the order of the texts; (size,) for one text.

    Raises:
        UsageError, DataError, ArtifactError: an option, a text, the model or the adapter cannot be used.
    """
    next_step = "backhand.embed(['…', '…']), or backhand.embed(data=FILE) for rows"
    if (texts is None) == (data is None):
        raise UsageError("give either texts or data", where="texts", next_step=next_step)
    several = not isinstance(texts, str)
    rows = _rows("texts", texts if several else [texts], "text", next_step) if data is None else data
    if data is None and rows == ():
        raise UsageError("there are no texts", where="texts", next_step=next_step)
    built = _options(EmbedOptions, _named(adapter=adapter, model=model) | options | {"data": rows})
    _check_returned(embed, "vectors", built.run.output)
    vectors: NDArray[np.float32] = embed_texts(built).numpy()
    return vectors if several else vectors[0]


def _check_returned(function: Callable[..., object], what: str, output: Path | None) -> None:
    """Raise UsageError if a function that returns its results is given a file for them."""
    if output is not None:
        raise UsageError(
            f"backhand.{function.__name__} returns the {what}", where="output", next_step="leave output out"
        )


def _prompts(
    function: Callable[..., object], prompt: str | None, prompts: Iterable[str] | None, data: Rows | None
) -> Rows:
    """Return `data`, whose column `prompt` may name, or the rows of one prompt or of several.

    Raises:
        UsageError: none of them is given, or `prompts` and another.
    """
    name = f"backhand.{function.__name__}"
    next_step = f"{name}('…') for one prompt, {name}(prompts=['…', '…']) for several, {name}(data=FILE) for rows"
    if (prompt is not None or data is not None) + (prompts is not None) != 1:
        raise UsageError("give either prompt, prompts or data", where="prompts", next_step=next_step)
    if data is not None:
        return data
    if prompts is None:
        return _rows("prompt", prompt, "prompt", next_step, plural="prompts")
    return _rows("prompts", prompts, "prompt", next_step)


def _rows(option: str, given: Any, column: str, next_step: str, *, plural: str | None = None) -> Rows:
    """Return the texts that an argument gives as rows with one column. `plural` is that of `list_of_texts`."""
    rows = [{column: text} for text in list_of_texts(option, given, next_step, plural=plural)]
    return GivenRows.of(rows, option=option) if rows else ()


def _answers(function: Callable[..., object], data: Any, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    if isinstance(data, list | tuple) and not data:
        return []
    options = _options(GenerateOptions, {**given, "data": data}).validate()
    _check_returned(function, "answers", options.answer.output)
    if function is classify and not options.answer.labels:
        raise UsageError(
            "there are no labels", where="labels", next_step='give labels=["yes", "no"], or leave labels out'
        )
    expand(options.rows.data, text_option="prompt")
    rows = [row for name in options.rows.data if isinstance(name, GivenRows) for row in name.rows]
    with loaded_model(
        options.model,
        options.answer.adapter,
        template=options.template,
        one_at_a_time=len(rows) == 1,
        takes_heads=function is classify,
    ) as loaded:
        if not options.answer.quiet:
            show_notes([*loaded.notes, *([] if loaded.classification else loaded.purpose_notes())])
        if loaded.classification:
            if options.answer.labels not in ((), ("auto",)):
                raise UsageError(
                    "labels are given, but the adapter has a classification head with its own labels",
                    where="labels",
                    why=f"it knows {name_list(map(label_text, loaded.classification['labels']), limit=8)}",
                    next_step="leave labels out",
                )
            column = "prompt" if isinstance(data, GivenRows) else options.answer.prompt
            answers = Classifier.of(loaded, options.answer.batch_rows).answers_to_rows(options.rows, column)
            return [{"probabilities": one.get("scores") or {"value": one["value"]}} for one in answers]
        return answer_rows(options, loaded)


@errors_in_python(ExportOptions)
def export(adapter: Place, *, to: Format, output: Place, model: Place | None = None, **options: Any) -> Path:
    """Write an adapter, or with `merge=True` the merged model, in another program's format, and prove it.

    Args:
        adapter: directory of an adapter, or a GGUF file.
        to: the format.
        output: path to write, which must not exist.
        model: the base model.
        options: any other option of `backhand export`, by its name.

    Returns:
        The path that was written.

    Raises:
        UsageError, ArtifactError: an option, the model or the adapter cannot be used, or the format cannot express it.
        ResourceError: the output cannot be written or uploaded.
        CheckError: the written files do not compute what the adapter does; they are removed.
    """
    given = _named(adapter=adapter, to=to, output=output, model=model) | options
    return export_command(_options(ExportOptions, given))


@errors_in_python(MergeOptions)
def merge(adapter: Place, *, output: Place, model: Place | None = None, **options: Any) -> Path:
    """Merge an adapter into its base model, and prove the result.

    Args:
        adapter: directory of an adapter, or a GGUF file.
        output: directory or GGUF file to write, which must not exist.
        model: the base model.
        options: any other option of `backhand merge`, by its name.

    Returns:
        The path that was written.

    Raises:
        UsageError, ArtifactError: an option, the model or the adapter cannot be used.
        ResourceError: the output cannot be written.
        CheckError: the written model differs from base plus adapter; it is removed.
    """
    return merge_command(_options(MergeOptions, _named(adapter=adapter, output=output, model=model) | options))


@errors_in_python(LintOptions)
def lint(*, data: Rows, model: Place | None = None, **options: Any) -> dict[str, Any]:
    """Check rows as a model's tokenizer and chat template read them.

    Args:
        data: the rows: a file, several files, a list of dicts or a data frame.
        model: the base model.
        options: any other option of `backhand lint`, by its name.

    Returns:
        What `backhand lint --json` prints. Malformed rows are among the findings.

    Raises:
        UsageError, DataError, ArtifactError: an option, the data as a whole or the tokenizer is unusable.
    """
    return lint_as_json(_options(LintOptions, _named(data=data, model=model) | options))


@errors_in_python(PlanOptions)
def plan(*, data: Rows | None = None, model: Place | None = None, **options: Any) -> dict[str, Any]:
    """Predict the memory and time of a run. The options are those of `train`.

    Args:
        data: the rows: a file, several files, a list of dicts or a data frame. Without rows, their length is assumed.
        model: the base model.
        options: any other option of `backhand plan`, by its name.

    Returns:
        What `backhand plan --json` prints.

    Raises:
        UsageError, DataError, ArtifactError: for the same reasons as `train`.
        ResourceError: the run does not fit into memory.
    """
    planned = _options(PlanOptions, _named(data=data, model=model) | options)
    if data is not None and not planned.data.data:
        raise no_data()
    return plan_of_run(planned).to_json()


@errors_in_python(MineOptions)
def mine(
    *, data: Rows, adapter: Place | None = None, model: Place | None = None, **options: Any
) -> list[dict[str, str]]:
    """Return pairs of texts with the hardest negatives of each anchor.

    Args:
        data: the pairs: a file, several files, a list of dicts or a data frame.
        adapter: directory of an adapter that was trained with `objective="embed"`.
        model: the base model.
        options: any other option of `backhand mine`, by its name.

    Raises:
        UsageError, DataError, ArtifactError: an option, the rows, the model or the adapter cannot be used.
    """
    built = _options(MineOptions, _named(data=data, adapter=adapter, model=model) | options)
    _check_returned(mine, "rows", built.run.output)
    return mine_negatives(built)
