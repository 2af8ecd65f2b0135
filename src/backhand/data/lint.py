"""Find problems in rows before they are trained on. Each finding has locations and a remedy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from backhand.data.class_examples import ClassFormat, decimal_comma_note, problem_of
from backhand.data.class_lint import add_misfits, check_names, problems_of_classes, scale_of
from backhand.data.data_report import DataReport, TruncationStats
from backhand.data.decision_lint import problems_of_decisions
from backhand.data.decisions import DecisionRow
from backhand.data.embedding_examples import EmbeddingFormat
from backhand.data.embedding_lint import problems_of_embeddings
from backhand.data.examples import Example
from backhand.data.held_out import equal_neighbours, overlap
from backhand.data.label_names import integers_note, is_integer
from backhand.data.options import DataOptions
from backhand.data.pair_examples import PairFormat
from backhand.data.prepare import prepare
from backhand.data.ranking_examples import RankingFormat, documents_of_texts
from backhand.data.ranking_lint import problems_of_rankings, target_fault
from backhand.data.raw_rows import RowErrors, number_of
from backhand.data.row_encoder import TextFormat
from backhand.data.rows import NUMBER, SINGLE, ClassLabel, ProblemType, Purpose, RankedTexts, RankingLossName
from backhand.data.stored_examples import PreparedData, StoredExamples, tokens_of_documents
from backhand.data.template_report import describe_template
from backhand.data.text_encoder import TokenIds
from backhand.errors import DataError
from backhand.printing import reworded
from backhand.words import count_of

SHOWN_PLACES = 5
_BLANK_TOKENS = 8
"""Largest number of tokens of a reply that is checked for being blank."""
SHOWN_BAD_ROWS = 20
_LEFT_OUT = "nothing, since these rows are left out; to train on them, correct them"


class Check(NamedTuple):
    """Words of a kind of finding."""

    words: str  # label in a table
    what: str = ""  # follows the number of documents
    remedy: str = ""
    # the rows that it concerns: documents, answers, labels, pairs, unpaired, decisions, embeddings, rankings or
    # classes; "" for all
    form: str = ""


CHECKS = {
    "malformed": Check("malformed rows"),
    "truncated": Check(
        "truncated to max_length",
        "truncated to {:,} tokens",
        "{1}shorten the rows, or leave them out with --long-rows drop",
    ),
    "too_long": Check("longer than max_length, left out", "left out as too long", "{0}shorten the rows"),
    "unsupervised": Check(
        "without a supervised token, left out",
        "left out because no token carries loss",
        "add a reply with a weight other than 0",
    ),
    "context": Check("longer than the model's context", "longer than the model's {:,} tokens", "give --max-length {}"),
    "no_end": Check(
        "no end token carries loss",
        "in which no end token carries loss, so the model does not learn to stop",
        "use a chat template that ends replies (--chat-template)",
        form="answers",
    ),
    "empty_reply": Check("empty replies", "with an empty reply", "fill it in or remove the rows", form="answers"),
    "equal_pair": Check(
        "pairs of equal answers", "with equal answers, which teach nothing", "remove the rows", form="pairs"
    ),
    "one_label": Check(
        "labels of one kind only",
        "of {:,} answers, each {}desirable: there is nothing to distinguish",
        "give answers of both kinds",
        form="unpaired",
    ),
    "spelling": Check(
        "labels that differ in case or spaces", "{}", "write each label the same way in all rows", form="labels"
    ),
    "unused_option": Check(
        "options that are never the answer",
        "with options that no training row has as its answer, which are not learned ({})",
        "add rows with these answers, or remove the options",
        form="decisions",
    ),
    "untrained_answer": Check(
        "held-out answers of no training row",
        "held out with an answer of no training row, which is not learned ({})",
        "add training rows with these answers",
        form="decisions",
    ),
    "alike_options": Check(
        "options named alike",
        "with options named alike ({})",
        "write each option the same way",
        form="decisions",
    ),
    "contradiction": Check(
        "equal states with other answers",
        "whose state has another answer in an earlier row ({})",
        "correct one of them, or give probabilities as the answer",
        form="decisions",
    ),
    "one_answer": Check(
        "one answer for 90 % of the rows",
        "of a question with one frequent answer ({}), which a constant model gives, too",
        "add rows with other answers",
        form="decisions",
    ),
    "equal_positive": Check(
        "positives equal to their anchor",
        "whose positive is the anchor, which teaches nothing without dropout",
        "remove the rows, or train with --dropout 0.1",
        form="embeddings",
    ),
    "positive_negative": Check(
        "negatives that are positives",
        "with a negative that is a positive of the same anchor in some row",
        "remove the negative",
        form="embeddings",
    ),
    "few_positives": Check(
        "few different positives",
        "of rows with {:,} different positives: most texts of a step are no negatives of each other",
        "train labels with --objective classify or decide, or give rows with more different positives",
        form="embeddings",
    ),
    "few_anchors": Check(
        "few different anchors",
        "of rows with {:,} different anchors: many texts of a step belong to the same one, and are no negatives",
        "train labels with --objective classify or decide, or give rows with more different anchors",
        form="embeddings",
    ),
    "relevant_negative": Check(
        "negatives that are relevant",
        "with a negative that is relevant for the same query in some row",
        "remove the negative",
        form="rankings",
    ),
    "twice": Check(
        "documents given twice for a query",
        "with the same document twice",
        "remove one of them",
        form="rankings",
    ),
    "one_score": Check(
        "one score for all documents",
        "whose documents have the same score as all others: there is nothing to rank",
        "add negatives (backhand mine finds them)",
        form="rankings",
    ),
    "alike_labels": Check(
        "labels named alike",
        "with labels named alike ({})",
        "write each label the same way",
        form="classes",
    ),
    "contradicting_labels": Check(
        "equal texts with other labels",
        "whose text has another label in an earlier row",
        "correct one of them, or give both labels in a list",
        form="classes",
    ),
    "rare_label": Check(
        "labels of few rows",
        "with a label of fewer than {} rows ({})",
        "add rows with these labels, or give them another label{2}",
        form="classes",
    ),
    "not_numbers": Check(
        "labels next to numbers",
        "with a label that is no number ({}), although most labels are numbers: all labels are read as names",
        "write these labels as numbers with a decimal point, or give --problem-type regression --skip-bad, which "
        "leaves their rows out; or give --problem-type single_label_classification if numbers are names of labels",
        form="classes",
    ),
    "one_class": Check(
        "one label for 90 % of the rows",
        "of a data set with one frequent label ({}), which a constant answer gives, too",
        "add rows with other labels, and read macro F1 instead of accuracy",
        form="classes",
    ),
    "scale": Check(
        "numbers far from 0",
        "of numbers around {:.4g} with a deviation of {:.4g}, which a new head reaches only slowly",
        "subtract the mean from the numbers of the rows and divide by the deviation, and undo it on the answers",
        form="classes",
    ),
    "far_number": Check(
        "numbers far from all others",
        "with a number far from all others ({}), which weighs most in the squared error",
        "correct it, or remove the row if it stands for a missing number",
        form="classes",
    ),
    "doubled_bos": Check(
        "two begin-of-sequence tokens",
        "starting with two begin-of-sequence tokens",
        "remove the token from the rows or from the chat template",
        form="documents",
    ),
    "duplicate": Check("exact duplicates", "equal to an earlier one", "remove the duplicates"),
    "overlap": Check(
        "held-out documents in the training data", "also in the training data", "remove them from one of the two"
    ),
    "mojibake": Check(
        "text that looks wrongly decoded",
        "with text that looks wrongly decoded, such as {!r}",
        "decode the original file again, as UTF-8",
    ),
}
"""Kinds of findings. `_finding` fills in the braces."""

_TEXT_FORMATS: dict[Purpose, TextFormat] = {
    "embeddings": EmbeddingFormat("last"),
    "rankings": RankingFormat(),
    "classes": ClassFormat("last"),
}
"""Formats whose details no finding depends on."""

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One kind of problem."""

    kind: str  # stable name, for scripts
    severity: Severity  # `error` stops training unless `--skip-bad` is given, `warning` does not
    count: int  # rows or documents concerned
    what: str
    where: tuple[str, ...]  # the first few locations, `file:line`
    remedy: str


@dataclass(frozen=True)
class LintReport:
    """Result of `lint`."""

    train: DataReport
    held_out: DataReport | None
    lengths: dict[str, dict[str, int]]  # quantiles of tokens and of supervised tokens per training document
    template: tuple[str, ...]  # properties of the chat template, one sentence each
    findings: tuple[Finding, ...]
    not_checked: dict[str, str]  # kinds of findings that could not be checked, with the reason
    checked: tuple[str, ...]  # kinds of findings that concern these rows
    labels: dict[str, int]  # training documents per answer, most frequent first; empty unless answers are labels
    # options that leave out every row at which training would stop, () if there are none
    skip_with: tuple[str, ...] = ("--skip-bad",)

    @property
    def errors(self) -> int:
        """Number of rows at which training would stop."""
        return sum(finding.count for finding in self.findings if finding.severity == "error")

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "train": _report_json(self.train),
            "held_out": None if self.held_out is None else _report_json(self.held_out),
            "lengths": self.lengths,
            "template": list(map(reworded, self.template)),
            "not_checked": self.not_checked,
            "labels": self.labels,
            "errors": self.errors,
            "skip_with": list(self.skip_with),
            "findings": [
                asdict(finding)
                | {name: reworded(getattr(finding, name)) for name in ("what", "remedy")}
                | {"where": list(map(reworded, finding.where))}
                for finding in self.findings
            ],
        }


def lint(
    options: DataOptions,
    tokenizer: Any,
    *,
    seed: int = 0,
    purpose: Purpose | None = None,
    context_length: int | None = None,
    text_format: TextFormat | None = None,
    problem_type: ProblemType | None = None,
    ranking_loss: RankingLossName = "pointwise",
) -> tuple[LintReport, PreparedData]:
    """Prepare the rows as for training, without malformed ones, and report problems.

    Args:
        purpose: use of the rows; None to detect it from their columns.
        context_length: the model's largest number of tokens, or None if unknown.
        text_format: the way from texts to tokens; None for the usual one of the purpose.
        problem_type: of classes; None for that of the labels.
        ranking_loss: the loss of rankings that the scores must fit.

    Raises:
        UsageError, DataError: as `prepare`, but a malformed row is a finding.
    """
    text_format = text_format or (None if purpose is None else _TEXT_FORMATS.get(purpose))
    if isinstance(text_format, ClassFormat):
        text_format = replace(text_format, problem=problem_type)
    garbled: dict[str, str] = {}
    bad, truncation = RowErrors(skip_bad=True, keep=SHOWN_BAD_ROWS, garbled=garbled), TruncationStats()
    train, held_out = prepare(
        replace(options, skip_bad=True, option_rows=0 if purpose == "decisions" else options.option_rows),
        tokenizer,
        seed=seed,
        purpose=purpose,
        bad=bad,
        truncation=truncation,
        text_format=text_format,
    )
    documents, tokens = train.examples.documents, tokens_of_documents(train.examples)
    longer = "raise --max-length" if options.max_length < (context_length or math.inf) else ""
    problems: list[tuple[Any, ...]] = [
        ("truncated", truncation.truncated, options.max_length, longer and f"{longer}, "),
        ("too_long", truncation.dropped_long, longer and f"{longer} or "),
        ("unsupervised", truncation.dropped_unsupervised),
        ("mojibake", [*garbled], next(iter(garbled.values()), "")),
    ]
    labels: dict[str, int] = {}
    mixed = RowErrors(skip_bad=True, keep=SHOWN_BAD_ROWS)  # which no option leaves out
    no_numbers = RowErrors(skip_bad=True, keep=SHOWN_BAD_ROWS)  # which --skip-bad alone does not leave out
    forms: set[str] = {""}
    if purpose in ("embeddings", "decisions", "rankings", "classes"):
        forms.add(str(purpose))
    elif purpose == "prompts":
        forms.add("documents")
    else:
        forms |= {"documents", "answers", *_row_forms(train.examples)}
    if purpose == "embeddings":
        problems += problems_of_embeddings(train.examples)
    elif purpose == "rankings":
        problems += problems_of_rankings(train.examples)
        for one in (*train.examples, *(() if held_out is None else held_out.examples)):
            if fault := target_fault(ranking_loss, one.facts_as(RankedTexts)):
                mixed.add(DataError(fault[0], where=one.source, why=fault[1], next_step=fault[2]))
        train = train.with_note(documents_of_texts(head=isinstance(text_format, PairFormat)))
    elif purpose == "classes":
        rows = [*train.examples, *(() if held_out is None else held_out.examples)]
        problem = problem_type or problem_of(one.facts_as(ClassLabel) for one in rows)
        found, labels = problems_of_classes(train.examples, problem, chosen=problem_type is not None)
        problems += [*found, ("duplicate", _repeated(train.examples))]
        add_misfits(rows, problem, mixed, no_numbers)
        if problem_type is None and problem != NUMBER:
            try:
                check_names(problem, rows[: len(train.examples)], rows[len(train.examples) :])
            except DataError as error:
                mixed.add(error)
        try:
            note = integers_note(labels) if problem == SINGLE and problem_type is None else None
            if not labels:
                note = decimal_comma_note((one.facts_as(ClassLabel), one.source) for one in rows)
            train = train if note is None else train.with_note(note)
        except DataError as error:
            mixed.add(error)
    elif purpose == "decisions":
        problems += problems_of_decisions(
            train.examples.facts(DecisionRow), () if held_out is None else held_out.examples.facts(DecisionRow)
        )
    elif purpose == "prompts":
        problems += [*_in_documents(documents, tokenizer, truncation), ("duplicate", _repeated(train.examples))]
    else:
        problems += [*_in_documents(documents, tokenizer, truncation), *_in_rows(train.examples)]
        spellings = label_spellings(tokenizer, train.examples, held_out.examples if held_out else ())
        problems += [("spelling", places, what) for what, places in spellings]
        counts = _answer_counts(tokenizer, train.examples)
        labels = {ways.most_common(1)[0][0]: ways.total() for ways in counts.values()}
        of_numbers = numbers_note(tokenizer, train.examples)
        train = train if of_numbers is None else train.with_note(of_numbers)
        forms |= {"labels"} if labels or spellings else set()
    not_checked = {}
    if held_out is None:
        not_checked["overlap"] = "no held-out rows"
    else:
        problems.append(("overlap", [example.source for example in overlap(train.examples, held_out.examples)]))
    if context_length is None:
        not_checked["context"] = "the model does not state it"
    else:
        long = documents.take(tokens > context_length)
        problems.append(("context", [document.source for document in long], context_length))
    malformed = [*_malformed(no_numbers, "error"), *_malformed(mixed, "error")]
    malformed += _malformed(bad, "warning" if options.skip_bad else "error")
    unit = train.report.cut_unit
    checked = tuple(kind for kind, check in CHECKS.items() if check.form in forms)
    findings = [*malformed, *(_finding(unit, *one) for one in problems if one[1] and one[0] in checked)]
    lengths = {"tokens": tokens}
    if train.report.supervised_tokens:
        lengths["supervised tokens"] = documents.column("supervised")
    report = LintReport(
        train=train.report,
        held_out=None if held_out is None else held_out.report,
        lengths={name: _quantiles(values) for name, values in lengths.items()},
        template=() if purpose in _TEXT_FORMATS else tuple(describe_template(tokenizer, options)),
        findings=tuple(sorted(findings, key=lambda finding: finding.severity)),
        not_checked=not_checked,
        checked=checked,
        labels=dict(sorted(labels.items(), key=lambda label: -label[1])),
        skip_with=() if mixed.count else (*["--problem-type=regression"] * bool(no_numbers.count), "--skip-bad"),
    )
    return report, train


def numbers_note(tokenizer: Any, examples: StoredExamples) -> str | None:
    """Return a sentence if nearly all first answers are decimal numbers, which are learned as text, or None."""
    texts = [_answer_text(tokenizer, _answer(examples[place])) for place in range(min(len(examples), _FIRST_ANSWERS))]
    numbers = {text for text in texts if number_of(text) is not None}
    count = sum(text in numbers for text in texts)
    if len(numbers) < _FEWEST_NUMBERS or count < _NEARLY_ALL * len(texts) or all(map(is_integer, numbers)):
        return None
    return (
        "the answers are numbers, which are learned as text; to learn them as numbers, train with --objective classify"
    )


_FIRST_ANSWERS, _FEWEST_NUMBERS, _NEARLY_ALL = 200, 10, 0.9


def scale_note(labels: Iterable[ClassLabel]) -> str | None:
    """Return a sentence about numbers that a new head reaches only slowly, with the remedy, or None."""
    if (scale := scale_of(labels)) is None:
        return None
    check = CHECKS["scale"]
    return f"the labels are {check.what.removeprefix('of ').format(*scale)}; {check.remedy}"


def _row_forms(examples: StoredExamples) -> set[str]:
    pairs = {"pairs"} if (examples.document_counts == 2).any() else set()
    first_of_labels = np.unique(examples.column("label"), return_index=True)[1]
    unpaired = any(examples[int(number)].desirable is not None for number in first_of_labels)
    return pairs | ({"unpaired"} if unpaired else set())


def _malformed(bad: RowErrors, severity: Severity) -> list[Finding]:
    findings = []
    for what, count in bad.alike.items():
        errors = [error for error in bad.errors if error.what == what]
        said = what + (f": {errors[0].why}" if errors[0].why else "")
        places = tuple(str(error.where) for error in errors[:SHOWN_PLACES])
        remedy = errors[0].next_step or "correct the row, or leave bad rows out with --skip-bad"
        remedy = _LEFT_OUT if severity == "warning" else remedy
        findings.append(Finding("malformed", severity, count, said, places, remedy))
    if unseen := bad.count - bad.alike.total():
        what, last = f"{unseen:,} more malformed rows after this one", bad.errors[-1]
        findings.append(Finding("malformed", severity, unseen, what, (str(last.where),), findings[-1].remedy))
    return findings


def _finding(unit: str, kind: str, places: list[str], *values: object) -> Finding:
    check, count = CHECKS[kind], len(places)
    said = check.what.format(*values)
    # What is said of all rows has one place, as an example.
    what = said.removeprefix("of ") if said.startswith("of ") else f"{count_of(count, unit)} {said}"
    return Finding(kind, "warning", count, what, tuple(places[:SHOWN_PLACES]), check.remedy.format(*values))


def _in_rows(examples: StoredExamples) -> list[tuple[Any, ...]]:
    """Return problems of pairs and labels, and duplicates."""
    pairs = examples.take(examples.document_counts == 2)
    alike = [one.source for one in pairs if one.rejected and np.array_equal(one.input_ids, one.rejected.input_ids)]
    labels = {examples[number].desirable for number in np.unique(examples.column("label"), return_index=True)[1]}
    labels.discard(None)
    only = [examples[0].source] if len(labels) == 1 else []
    return [
        ("equal_pair", alike),
        ("one_label", only, len(examples), "" if labels == {True} else "not "),
        ("duplicate", _repeated(examples)),
    ]


def _in_documents(documents: Iterable[Example], tokenizer: Any, truncation: TruncationStats) -> list[tuple[Any, ...]]:
    ends = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends.add(tokenizer.eos_token_id)
    bos = tokenizer.bos_token_id
    truncated = set(truncation.truncated)
    places: dict[str, list[str]] = {kind: [] for kind in ("no_end", "empty_reply", "doubled_bos")}

    def says_nothing(ids: TokenIds) -> bool:
        """Return True if a supervised span contains at most white space before its end token."""
        return len(ids) <= _BLANK_TOKENS and int(ids[-1]) in ends and not tokenizer.decode(ids[:-1].tolist()).strip()

    for example in documents:
        ids, targets = example.input_ids, np.flatnonzero(example.supervised)
        stretches = np.split(ids[targets], np.flatnonzero(np.diff(targets) > 1) + 1)
        wrong = {
            "no_end": example.source not in truncated and int(ids[targets[-1]]) not in ends,
            "empty_reply": any(map(says_nothing, stretches)),
            "doubled_bos": bos is not None and ids[:2].tolist() == [bos, bos],
        }
        for kind in filter(wrong.__getitem__, wrong):
            places[kind].append(example.source)
    return [*places.items()]


_MOST_LABELS, _LONGEST_LABEL, _ROWS_PER_LABEL = 128, 60, 3


def label_spellings(tokenizer: Any, *examples: Iterable[Example]) -> list[tuple[str, list[str]]]:
    """Return (phrase, locations) for short trained answers that equal another answer except for case or spaces."""
    spellings = _answer_counts(tokenizer, *examples).values()
    return [
        (
            f"with the answer {text!r} next to {next(iter(ways))!r}, which are trained as two labels",
            [one.source for one in chain.from_iterable(examples) if _answer_text(tokenizer, _answer(one)) == text],
        )
        for ways in spellings
        for text in list(ways)[1:]
    ]


def _answer_counts(tokenizer: Any, *examples: Iterable[Example]) -> dict[str, Counter[str]]:
    """Return the number of documents per answer, by the answer without case and spaces; empty if they are no labels.

    Answers are labels if they are few, short and repeated.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    for example in chain.from_iterable(examples):
        ids = _answer(example)
        if not ids or (ids not in counts and len(counts) == _MOST_LABELS):
            return {}
        counts[ids] += 1
    alike: dict[str, Counter[str]] = {}
    for ids, count in counts.most_common():
        text = _answer_text(tokenizer, ids)
        alike.setdefault(" ".join(text.split()).casefold(), Counter())[text] += count
    if _ROWS_PER_LABEL * len(alike) > counts.total() or any(len(text) > _LONGEST_LABEL for text in alike):
        return {}
    return alike


def _answer_text(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).removesuffix("\n")


def _answer(example: Example) -> tuple[int, ...]:
    """Return the token ids of the last answer."""
    begin, end = example.last_answer
    return tuple(example.input_ids[begin:end].tolist())


def _repeated(examples: StoredExamples) -> list[str]:
    """Return the locations of duplicates, each with the location of the first occurrence."""
    before, again = equal_neighbours(examples.column("token_digest"))
    firsts: dict[int, int] = {}
    for one, other in zip(before, again, strict=True):
        firsts[other] = firsts.get(one, one)
    return [f"{examples[one].source} = {examples[first].source}" for one, first in sorted(firsts.items())]


def _quantiles(values: npt.NDArray[np.int32]) -> dict[str, int]:
    values = np.sort(values)
    at = {"least": 0.0, "half": 0.5, "9 in 10": 0.9, "most": 1.0}
    return {name: int(values[round(share * (len(values) - 1))]) for name, share in at.items()}


def _report_json(report: DataReport) -> dict[str, Any]:
    said = replace(report, bad_rows=(), notes=tuple(map(reworded, report.notes)))
    return {name: value for name, value in asdict(said).items() if name != "bad_rows"}
