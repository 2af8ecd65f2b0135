"""Give texts the labels or the number of an adapter's classification head, and score it on rows with labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from backhand.bounds import check_kind
from backhand.data.class_examples import ClassEncoder, ClassFormat
from backhand.data.columns import column_of_texts
from backhand.data.data_report import TruncationStats
from backhand.data.examples import Example, check_vocabulary
from backhand.data.options import DataOptions, NamedColumns, RowSources
from backhand.data.packing import RowPacker
from backhand.data.prepare import prepare
from backhand.data.rows import MULTI, NUMBER, ClassRow, ProblemType
from backhand.data.sources import expand
from backhand.data.stored_examples import StoredExamples, stored
from backhand.data.text_encoder import TextEncoder
from backhand.distributed.communicator import Communicator
from backhand.errors import UsageError, not_none
from backhand.generation.command import check_output, rounded, write_lines
from backhand.generation.completer import EngineCompleter, require_finite
from backhand.generation.loading import LoadedModel, loaded_model
from backhand.loop.class_scores import ClassScores, constant_logits, score_classes, targets_of
from backhand.loop.embed import texts_of
from backhand.loop.row_passes import head_logits
from backhand.options.command_options import ClassifyOptions
from backhand.printing import counting
from backhand.runs.label_results import never_given
from backhand.runs.row_changes import as_loss, loss_words, right_words
from backhand.runs.summary import CLASS_SCORES, interval_of, loss_unit
from backhand.terminal import console_for_tables, table_of, working
from backhand.words import count_of, interval_text, shorten, show_notes

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Classifier:
    """A model with a classification head."""

    loaded: LoadedModel
    problem: ProblemType
    labels: Sequence[str]  # names of the outputs
    max_length: int
    micro_batch_rows: int

    @classmethod
    def of(cls, loaded: LoadedModel, micro_batch_rows: int) -> Classifier:
        """Return the classifier of a loaded adapter. Raises UsageError if the adapter has no head for labels."""
        known: Mapping[str, Any] = loaded.classification
        if loaded.ranking:
            raise UsageError(
                "the head of this adapter scores documents for a query",
                where="adapter",
                next_step="use backhand rank",
            )
        if not known:
            raise UsageError(
                "this adapter has no classification head",
                where="adapter",
                next_step=loaded.next_step("classify"),
            )
        context = loaded.model.context_tokens
        longest = min(int(known.get("max_length") or context), context)
        return cls(loaded, known["problem_type"], known["labels"], longest, micro_batch_rows)

    @property
    def text_format(self) -> ClassFormat:
        """The way from a text to its tokens."""
        model = self.loaded.model
        assert isinstance(model, EngineCompleter), "other engines have no adapters with heads"
        return ClassFormat(model.decoder.config.class_head.pooling, self.loaded.padding_id)

    def logits(self, examples: StoredExamples, what: str = "texts") -> Tensor:
        """Return the logits of encoded texts, (texts, outputs) float64.

        Raises:
            DataError: a token that the model does not have.
            CheckError: the model computes NaN or infinity.
        """
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        assert isinstance(model, EngineCompleter), "other engines have no adapters with heads"
        check_vocabulary(examples.beyond(model.vocab_size), model.vocab_size, tokenizer)
        packer, rows = RowPacker(examples, share_prefixes=model.shares_prefixes), self.micro_batch_rows
        with counting(what, len(examples)) as done:
            logits = not_none(head_logits(model.decoder, packer, rows, Communicator(), done=done))
        require_finite(logits)
        return logits

    def answers(self, texts: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        """Yield the answer to each text: its label or labels with all probabilities, or its number.

        Args:
            texts: each text with its location.

        Raises:
            DataError, CheckError: as `logits`, and for a text without tokens.
        """
        encoder = ClassEncoder(TextEncoder(self.loaded.tokenizer), self.text_format, self.max_length)
        stats = TruncationStats()
        for start in range(0, len(texts), _ROWS_AT_ONCE):
            rows = [ClassRow(text, None, source) for text, source in texts[start : start + _ROWS_AT_ONCE]]
            examples = []
            for example in encoder.encode(rows, stats):
                if not isinstance(example, Example):
                    raise not_none(example)
                examples.append(example)
            yield from map(self.answer, self.logits(stored(examples)))
        if stats.truncated:
            show_notes([f"{count_of(len(stats.truncated), 'text')} cut to {self.max_length:,} tokens"])

    def answers_to_rows(self, data: RowSources, prompt: str | None) -> list[dict[str, Any]]:
        """Return the answers to the texts of rows, as `answers`. `prompt` names their column.

        Raises:
            UsageError, DataError: as `loop.embed.texts_of`, and as `answers`.
        """
        recorded = column_of_texts(self.loaded.columns)
        rows = texts_of(data, NamedColumns(prompt=prompt), "texts", recorded)
        return list(self.answers([(row.texts[0], row.source) for row in rows]))

    def answer(self, logits: Tensor) -> dict[str, Any]:
        """Return the answer with these logits, (outputs,)."""
        if self.problem == NUMBER:
            return {"value": float(logits)}
        p = (torch.sigmoid(logits) if self.problem == MULTI else torch.softmax(logits, 0)).tolist()
        scores = dict(sorted(zip(self.labels, p, strict=True), key=lambda one: -one[1]))
        if self.problem == MULTI:
            return {"labels": [label for label, share in scores.items() if share > 0.5], "scores": scores}
        label = next(iter(scores))
        return {"label": label, "score": scores[label], "scores": scores}


def classify(options: ClassifyOptions) -> list[dict[str, Any]]:
    """Classify one text, or the texts of files.

    Returns:
        per text `label`, `score` and the `scores` of all labels; for several labels `labels` and `scores`; for a number
        its `value`.

    Raises:
        UsageError, DataError, ArtifactError: an option, the texts, the model or the adapter cannot be used.
    """
    check_kind("options", options, ClassifyOptions)
    options.validate()
    run = options.run
    expand(options.data.data, text_option="text")  # a missing file is reported before the model is loaded
    with loaded_model(options.model, run.adapter, takes_heads=True) as loaded:
        show_notes(loaded.notes)
        classifier = Classifier.of(loaded, run.micro_batch_rows)
        if run.text is not None:
            return list(classifier.answers([(run.text, "text")]))
        return classifier.answers_to_rows(options.data, run.prompt)


def classify_command(options: ClassifyOptions) -> list[dict[str, Any]]:
    """Run `classify` and write one JSON object per text, to `output` or to standard output."""
    check_output(options.run.output, overwrite=options.run.overwrite)
    with working("classifying"):
        answers = classify(options)
    lines = [answer if "value" in answer else rounded(answer) for answer in answers]  # a value may need all its digits
    write_lines(lines, options.run.output, "answer")
    return answers


def evaluate_classes(
    loaded: LoadedModel, data: DataOptions, micro_batch_rows: int
) -> tuple[int, list[tuple[float, ClassScores]]]:
    """Score the best constant answer and the adapter on rows with labels.

    Returns:
        the number of rows; and for each of the two the mean loss of a row and the scores.

    Raises:
        UsageError, DataError: see `data.prepare`. DataError also for a label that the adapter does not have.
    """
    classifier = Classifier.of(loaded, micro_batch_rows)
    data = replace(data, eval_data=(), eval_fraction=0.0, max_length=min(data.max_length, classifier.max_length))
    text_format = replace(classifier.text_format, problem=classifier.problem, names=tuple(classifier.labels))
    prepared, _ = prepare(data, loaded.tokenizer, purpose="classes", text_format=text_format, recorded=loaded.columns)
    show_notes(prepared.report.left_out())
    examples, problem = prepared.examples, classifier.problem
    targets = targets_of(RowPacker(examples, share_prefixes=False), problem, classifier.labels)
    sources = [examples[row].source for row in range(len(examples))]
    results = []
    for logits in (constant_logits(targets, problem), classifier.logits(examples, "rows")):
        scores = score_classes(logits, targets, problem, classifier.labels, sources)
        results.append((scores.loss, scores))
    return len(examples), results


def print_classes(scores: Mapping[str, ClassScores]) -> None:
    """Print a table with a line per model, with the intervals of the accuracies, and the largest loss of the last one.

    Args:
        scores: by the model's name.
    """
    last = list(scores.values())[-1]
    names = [name for name in CLASS_SCORES if name in last.values]
    unit = loss_unit("classify", {"problem_type": last.problem_type})
    columns = [CLASS_SCORES[name] + (f" ({unit})" if name == "nll" else "") for name in names]
    shown = table_of("model", *columns, right=columns, title=count_of(last.rows, "row"))
    for name, one in scores.items():
        shown.add_row(name, *(_cell(one, score) for score in names))
    console = console_for_tables()
    console.print(shown)
    if last.gain is not None:
        number = last.problem_type == NUMBER
        words = loss_words(as_loss(last.gain), unit) if number else right_words(last.gain, "a constant answer")
        console.print(words, soft_wrap=True)
    if last.constant:
        console.print("the model gives the same answer to all rows", soft_wrap=True)
    if missing := never_given(last.confusion):
        console.print(missing, soft_wrap=True)
    for row in (one for one in last.surprises[:1] if one["answer"] != one["given"]):
        console.print(
            f"the largest loss is at {row['source']}: the answer is {shorten(row['answer'])}, and the model gives "
            f"{shorten(row['given'])}",
            soft_wrap=True,
        )


def _cell(scores: ClassScores, name: str) -> str:
    value = scores.values[name]
    if name == "accuracy":
        return f"{value:.1%} ({interval_text(value, scores.rows)})"
    return f"{value:.4f}{interval_of({'intervals': scores.intervals}, name)}"
