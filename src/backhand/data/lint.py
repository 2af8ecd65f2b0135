"""What is wrong, or may be wrong, with rows before they are trained on; each finding has a place and a remedy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from backhand.data.chat import ChatRenderer, read_template
from backhand.data.examples import CutRows, DataReport, Example
from backhand.data.options import DataOptions, TemplateOptions
from backhand.data.prepare import prepare
from backhand.data.rows import BadRows, Conversation, Purpose
from backhand.data.stored_examples import PreparedData, StoredExamples, equal_neighbours, overlap
from backhand.data.text_encoder import TextEncoder, TokenIds
from backhand.errors import DataError
from backhand.words import count_of, shorten

SHOWN_PLACES = 5
# Nobody fills a reply with more blanks than this; longer ones need not be read.
_BLANK_TOKENS = 8
SHOWN_BAD_ROWS = 20


class Check(NamedTuple):
    """A kind of finding."""

    words: str  # in a table
    what: str = ""  # is wrong with so many documents
    remedy: str = ""


CHECKS = {
    "malformed": Check("malformed rows"),
    "truncated": Check(
        "truncated to max_length",
        "truncated to {:,} tokens",
        "raise --max-length, shorten the rows, or leave them out with --long-rows drop",
    ),
    "too_long": Check(
        "left out as longer than max_length", "left out as too long", "raise --max-length or shorten the rows"
    ),
    "unsupervised": Check(
        "left out without a supervised token",
        "left out for want of a token that carries loss",
        "give them a reply with a weight other than 0",
    ),
    "context": Check("longer than the model was made for", "longer than the model's {:,} tokens", "--max-length {}"),
    "no_end": Check(
        "no end token carries loss",
        "in which no end token carries loss, so that the model is not taught to stop",
        "use a chat template that ends replies (--chat-template)",
    ),
    "empty_reply": Check("empty replies", "with an empty reply", "fill it in or take the rows out"),
    "equal_pair": Check("pairs of equal answers", "with equal answers, which teach nothing", "take the rows out"),
    "one_label": Check(
        "labels of one kind only",
        "of {:,}, each {}desirable: there is nothing to tell apart",
        "give answers of both kinds",
    ),
    "spelling": Check("labels that differ in case or blanks", "{}", "write each label in one way in all rows"),
    "doubled_bos": Check(
        "begin of sequence doubled",
        "with two begin-of-sequence tokens in front",
        "take the one that is written in the rows or in the chat template out",
    ),
    "duplicate": Check("exact repetitions", "equal to an earlier one", "remove the repetitions"),
    "overlap": Check("held-out documents that are trained on", "also trained on", "take them out of one of the two"),
    "mojibake": Check(
        "text that looks wrongly decoded",
        "with text that looks wrongly decoded, such as {!r}",
        "decode the original again, as UTF-8",
    ),
}
"""Every kind of finding; where something stands in braces is what `_finding` is given for it."""

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One kind of problem."""

    kind: str  # its name, stable for scripts
    severity: Severity  # `error` stops training (unless `--skip-bad`), `warning` does not
    count: int  # rows or documents concerned
    what: str
    where: tuple[str, ...]  # the first few places, `file:line`
    remedy: str


@dataclass(frozen=True)
class LintReport:
    """Everything that `lint` found."""

    train: DataReport
    held_out: DataReport | None
    lengths: dict[str, dict[str, int]]  # quantiles of the training documents' tokens, and of their supervised tokens
    template: tuple[str, ...]  # habits of the chat template, a sentence each
    findings: tuple[Finding, ...]
    not_checked: dict[str, str]  # kinds of finding that could not be looked for, and why

    @property
    def errors(self) -> int:
        """Rows that training would stop at."""
        return sum(finding.count for finding in self.findings if finding.severity == "error")

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "train": _report_json(self.train),
            "held_out": None if self.held_out is None else _report_json(self.held_out),
            "lengths": self.lengths,
            "template": list(self.template),
            "not_checked": self.not_checked,
            "errors": self.errors,
            "findings": [asdict(finding) | {"where": list(finding.where)} for finding in self.findings],
        }


def lint(
    options: DataOptions,
    tokenizer: Any,
    *,
    seed: int = 0,
    purpose: Purpose | None = None,
    context_length: int | None = None,
) -> tuple[LintReport, PreparedData]:
    """Prepare the rows as training would, leaving malformed ones out, and look at what comes of it.

    Args:
        purpose: what the rows are for; None where their columns say it.

    Raises:
        UsageError, DataError: as `prepare`; a single malformed row is a finding instead.
    """
    bad, cut_rows = BadRows(skip_bad=True, keep=SHOWN_BAD_ROWS), CutRows()
    train, held_out = prepare(
        replace(options, skip_bad=True), tokenizer, seed=seed, purpose=purpose, bad=bad, cut_rows=cut_rows
    )
    documents = train.examples.documents
    found: list[tuple[Any, ...]] = [
        ("truncated", cut_rows.truncated, options.max_length),
        ("too_long", cut_rows.dropped_long),
        ("unsupervised", cut_rows.dropped_unsupervised),
        *_in_documents(documents, tokenizer, cut_rows),
        *_in_rows(train.examples),
    ]
    spellings = label_spellings(tokenizer, train.examples, held_out.examples if held_out else ())
    found += [("spelling", places, what) for what, places in spellings]
    not_checked = {}
    if held_out is None:
        not_checked["overlap"] = "no held-out rows"
    else:
        found.append(("overlap", [example.source for example in overlap(train.examples, held_out.examples)]))
    if context_length is None:
        not_checked["context"] = "the model does not say"
    else:
        long = documents.take(documents.column("tokens") > context_length)
        found.append(("context", [document.source for document in long], context_length))
    malformed = _malformed(bad, "warning" if options.skip_bad else "error")
    findings = [*malformed, *(_finding(*one) for one in found if one[1])]
    columns = {"tokens": "tokens", "supervised tokens": "supervised"}
    report = LintReport(
        train=train.report,
        held_out=None if held_out is None else held_out.report,
        lengths={name: _quantiles(documents.column(column)) for name, column in columns.items()},
        template=tuple(probe_template(tokenizer, options)),
        findings=tuple(sorted(findings, key=lambda finding: finding.severity)),
        not_checked=not_checked,
    )
    return report, train


def _malformed(bad: BadRows, severity: Severity) -> list[Finding]:
    findings = []
    for error in bad.errors:
        what = error.what + (f": {error.why}" if error.why else "")
        remedy = error.next_step or "correct the row, or leave bad rows out with --skip-bad"
        findings.append(Finding("malformed", severity, 1, what, (str(error.where),), remedy))
    if unseen := bad.count - len(findings):
        what = f"{unseen:,} more malformed rows after this one"
        findings.append(Finding("malformed", severity, unseen, what, findings[-1].where, "as above"))
    return findings


def _finding(kind: str, places: list[str], *said: object) -> Finding:
    check, count = CHECKS[kind], len(places)
    what = f"{count_of(count, 'document')} {check.what.format(*said)}"
    return Finding(kind, "warning", count, what, tuple(places[:SHOWN_PLACES]), check.remedy.format(*said))


def _in_rows(examples: StoredExamples) -> list[tuple[Any, ...]]:
    """What is wrong with pairs, labels, and rows among one another."""
    pairs = examples.take(examples.pairs)
    alike = [one.source for one in pairs if one.rejected and np.array_equal(one.input_ids, one.rejected.input_ids)]
    labels = {examples[number].desirable for number in np.unique(examples.column("label"), return_index=True)[1]}
    labels.discard(None)
    only = [examples[0].source] if len(labels) == 1 else []
    return [
        ("equal_pair", alike),
        ("one_label", only, len(examples), "" if labels == {True} else "not "),
        ("duplicate", _repeated(examples)),
    ]


def _in_documents(documents: Iterable[Example], tokenizer: Any, cut_rows: CutRows) -> list[tuple[Any, ...]]:
    ends = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends.add(tokenizer.eos_token_id)
    bos = tokenizer.bos_token_id
    truncated = set(cut_rows.truncated)
    places: dict[str, list[str]] = {kind: [] for kind in ("no_end", "empty_reply", "doubled_bos", "mojibake")}
    garbled = None

    def says_nothing(ids: TokenIds) -> bool:
        """Whether a stretch that carries loss says nothing but its end: blanks, if anything, before an end token."""
        return len(ids) <= _BLANK_TOKENS and int(ids[-1]) in ends and not tokenizer.decode(ids[:-1].tolist()).strip()

    for example in documents:
        ids, targets = example.input_ids, np.flatnonzero(example.supervised)
        stretches = np.split(ids[targets], np.flatnonzero(np.diff(targets) > 1) + 1)
        piece = find_mojibake(tokenizer.decode(ids))
        garbled = garbled or piece
        wrong = {
            "no_end": example.source not in truncated and int(ids[targets[-1]]) not in ends,
            "empty_reply": any(map(says_nothing, stretches)),
            "doubled_bos": bos is not None and ids[:2].tolist() == [bos, bos],
            "mojibake": piece is not None,
        }
        for kind in filter(wrong.__getitem__, wrong):
            places[kind].append(example.source)
    return [(kind, where, garbled) for kind, where in places.items()]


_MOST_LABELS, _LONGEST_LABEL, _ROWS_A_LABEL = 128, 60, 3


def label_spellings(tokenizer: Any, *examples: Iterable[Example]) -> list[tuple[str, list[str]]]:
    """Short answers, as they are trained on, that are another's but for case or blanks: a phrase, and their places."""
    counts: Counter[tuple[int, ...]] = Counter()
    for example in chain.from_iterable(examples):
        ids = _answer(example)
        if not ids or (ids not in counts and len(counts) == _MOST_LABELS):
            return []
        counts[ids] += 1
    alike: dict[str, dict[str, set[tuple[int, ...]]]] = {}
    for ids, _ in counts.most_common():
        text = str(tokenizer.decode(ids, skip_special_tokens=True)).removesuffix("\n")
        alike.setdefault(" ".join(text.split()).casefold(), {}).setdefault(text, set()).add(ids)
    if _ROWS_A_LABEL * len(alike) > counts.total() or any(len(text) > _LONGEST_LABEL for text in alike):
        return []
    return [
        (
            f"with the answer {text!r} beside {next(iter(ways))!r}, which are learnt as two labels",
            [example.source for example in chain.from_iterable(examples) if _answer(example) in written],
        )
        for ways in alike.values()
        for text, written in list(ways.items())[1:]
    ]


def _answer(example: Example) -> tuple[int, ...]:
    """The ids of its last answer."""
    begin, end = example.last_answer
    return tuple(example.input_ids[begin:end].tolist())


def _repeated(examples: StoredExamples) -> list[str]:
    """Places of those that are another's again, and of the first such."""
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
    return {name: value for name, value in asdict(replace(report, bad_rows=())).items() if name != "bad_rows"}


_REPLACEMENT = "\ufffd"
_SUSPECTS = re.compile(r"[^\x00-\x7f]{2,}")


def find_mojibake(text: str) -> str | None:
    """A piece of `text` that looks wrongly decoded, or None.

    It is the replacement character, or a run of characters that Windows-1252 can write and whose bytes then make sense
    as UTF-8: `Ã©` was é, `â€™` was ’. Proper text of two and more such characters hardly ever does.
    """
    if text.isascii():
        return None
    if _REPLACEMENT in text:
        place = text.index(_REPLACEMENT)
        return text[max(0, place - 10) : place + 10]
    for match in _SUSPECTS.finditer(text):
        try:
            match[0].encode("cp1252").decode("utf-8")
        except UnicodeError:
            continue
        return match[0]
    return None


_QUESTION, _ANSWER = "QUESTION", "ANSWER"


def probe_template(tokenizer: Any, options: TemplateOptions) -> list[str]:
    """Its habits, a sentence each; nothing if there is no template.

    Raises:
        UsageError, ArtifactError: the template cannot be read, or is not valid Jinja.
    """
    template = read_template(options.chat_template, tokenizer)
    if template is None:
        return ["there is no chat template: prompts and completions are joined as they stand"]
    encoder = TextEncoder(tokenizer, template)
    chat = ChatRenderer(tokenizer, encoder, template, options)
    asked = _prompt(chat, ("user", _QUESTION))
    if asked is None:
        return ["the chat template refuses a single question"]
    habits = []
    before = asked.partition(_QUESTION)[0]
    if options.system is None and any(len(word) > 3 for word in before.split()[1:]):
        habits.append(f"the chat template puts its own words before the first message: {shorten(before)!r}")
    trimmed = _prompt(chat, ("user", f"\n {_QUESTION} \n"))
    if trimmed is not None and f"\n {_QUESTION} \n" not in trimmed:
        habits.append("the chat template trims white space from messages")
    if options.system is None and _prompt(chat, ("system", "S"), ("user", _QUESTION)) is None:
        habits.append("the chat template refuses a system message")
    if _prompt(chat, ("user", _QUESTION), ("assistant", _ANSWER), ("user", _QUESTION)) is None:
        habits.append("the chat template refuses a second question")
    habits += _habits_of_replies(chat, encoder)
    return habits


def _habits_of_replies(chat: ChatRenderer, encoder: TextEncoder) -> list[str]:
    turns = [("user", _QUESTION), ("assistant", f"<think>\n\n</think>\n\n{_ANSWER}")] * 2
    habits = []
    try:
        (first, *others) = chat.documents(_conversation(*turns))
    except DataError as error:
        return [f"{error.what}: {error.why}"]
    start, end = first.spans[0]
    header = re.split(f"{_ANSWER}|</?think>", first.text[start:end])[0]
    if header.strip():
        habits.append(f"the reply's header {header!r} carries loss, since the generation prompt does not write it")
    if others:
        habits.append("the chat template rewrites earlier replies; each reply becomes a document of its own")
    if first.append_eos:
        habits.append("the chat template does not end replies with a control token; the end of sequence is added")
    elif encoder.eos and not first.text.rstrip().endswith(encoder.eos):
        habits.append(f"replies end with {first.text.split()[-1][-20:]!r}, which is not the end of sequence")
    return habits


def _prompt(chat: ChatRenderer, *turns: tuple[str, str]) -> str | None:
    try:
        return chat.prompt(_conversation(*turns)).text
    except DataError:
        return None


def _conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation.of([{"role": role, "content": content} for role, content in turns], "template")
