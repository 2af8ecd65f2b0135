"""Forms of rows: one table of column sets. The form of a file is detected from the columns of its first valid row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from backhand.data.column_hints import (
    ClassColumns,
    class_of,
    decision_options,
    naming_advice,
    pair_options,
    state_option,
    suggestion,
)
from backhand.data.options import DecisionColumns, NamedColumns, columns_named, shell_quoted
from backhand.data.raw_rows import NO_TITLE, RawRow
from backhand.data.rows import PURPOSES, Purpose
from backhand.errors import DataError, UsageError
from backhand.words import name_list, nearest_names, shorten


@dataclass(frozen=True)
class Form:
    """One form of row."""

    columns: tuple[str, ...]  # required columns
    kind: str  # selects the reader in `data.form_reader`
    purpose: Purpose = "answers"
    optional: tuple[str, ...] = ()  # optional columns of the form
    system: str | None = None  # the form's own name of the column `system`

    @property
    def name(self) -> str:
        """The form in messages, for example `prompt/completion`."""
        return "/".join((self.columns[0], *self.optional, *self.columns[1:]))

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """Columns of answers: two for a pair, otherwise one."""
        if self.kind == "pair":
            return self.columns[-2:]
        return self.columns[1:2] if self.kind == "labelled" else self.columns[-1:]

    def unread(self, columns: Collection[str], *, conversation: bool) -> list[str]:
        """Return the columns that are not read.

        Args:
            conversation: True if rows of this form contain lists of messages.
        """
        alone = self.kind in ("text", "embedding", "ranking", "class")
        shared = _SHARED_COLUMNS if conversation else () if alone else _SHARED_COLUMNS[:1]
        read = (*self.columns, *self.optional, self.system, *shared)
        if self.kind in ("embedding", "ranking") and self.columns[-1] not in (*SCORES, *LISTED_SCORES):
            read = (*read, *negative_columns(columns))
        return [column for column in columns if column not in read]


_SHARED_COLUMNS = ("system", "tools", "functions")
"""Columns that are read in addition to a conversation; only the first one in addition to a prompt."""

PREFERENCE = ("chosen", "rejected")


def answers_at_once(messages: Sequence[Any]) -> bool:
    """Return True if a list of messages begins with a reply."""
    first = messages[0] if messages else None
    return isinstance(first, Mapping) and (first.get("role") or first.get("from")) in ("assistant", "gpt")


SCORES = ("score", "label")
LISTED_SCORES = ("scores", "labels")
_NEGATIVE = re.compile(r"negatives?|negative_(\d+)")


def negative_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns of hard negatives, in the order of their numbers."""
    found = [(int(match[1] or 0), name) for name in columns if (match := _NEGATIVE.fullmatch(name))]
    return [name for _, name in sorted(found)]


_NAMED = ("prompt", "completion")  # also the columns that --prompt and --completion name
_DOCUMENTS = ("documents", "docs")
LABELLED_TEXT = ("text", "label")

FORMS = (
    Form(("messages",), "conversation"),
    Form(("conversations",), "conversation"),
    Form(("conversation",), "conversation"),
    Form(("prompt", "completion"), "completion"),
    Form(("prompt", "response"), "completion"),
    Form(("instruction", "output"), "instruction", optional=("input",)),
    Form(("instruction", "response"), "instruction", optional=("context",)),
    Form(("question", "answer"), "completion"),
    Form(("question", "response"), "completion", system="system_prompt"),
    Form(("query", "response"), "completion"),
    Form(("input", "output"), "completion"),
    Form(("text",), "text"),
    # Without an answer: rows to generate from.
    Form(("prompt",), "completion", "prompts"),
    Form(("instruction",), "instruction", "prompts", ("input",)),
    Form(("question",), "completion", "prompts"),
    # TRL's forms, for DPO and related objectives and for KTO. In the last pair form, both sides start with the prompt.
    Form(("prompt", *PREFERENCE), "pair", "pairs"),
    Form(("question", *PREFERENCE), "pair", "pairs"),
    Form(PREFERENCE, "pair", "pairs"),
    Form(("prompt", "completion", "label"), "labelled", "labels"),
    Form(("state", "answers"), "decision", "decisions", ("questions",)),
    Form(("prompt", "completion"), "decision", "decisions"),
    Form(("text", "label"), "decision", "decisions"),
    # Without an answer: states to decide.
    Form(("state",), "decision", "states", ("questions", "answers")),
    Form(("prompt",), "decision", "states", ("completion",)),
    Form(("text",), "decision", "states", ("label",)),
    # sentence-transformers' forms. Further columns contain hard negatives (`embedding_rows.negative_columns`).
    Form(("sentence1", "sentence2", "score"), "embedding", "embeddings"),
    Form(("sentence1", "sentence2", "label"), "embedding", "embeddings"),
    Form(("anchor", "positive"), "embedding", "embeddings"),
    Form(("query", "positive"), "embedding", "embeddings"),
    Form(("question", "answer"), "embedding", "embeddings"),
    Form(("query", "answer"), "embedding", "embeddings"),
    Form(("prompt", "completion"), "embedding", "embeddings"),
    Form(LABELLED_TEXT, "embedding", "embeddings"),
    Form(LABELLED_TEXT, "class", "classes"),
    Form(("text", "labels"), "class", "classes"),
    Form(("prompt", "completion"), "class", "classes"),
    Form(("text",), "embedding", "texts"),
    Form(("prompt",), "embedding", "texts"),
    # The same for rankings: a document with a score, a list of documents with their scores, or a positive.
    *(
        Form((query, document, score), "ranking", "rankings")
        for query, document in (("query", "document"), ("query", "passage"), _NAMED, ("sentence1", "sentence2"))
        for score in SCORES
    ),
    *(
        Form(("query", documents, scores), "ranking", "rankings")
        for documents in _DOCUMENTS
        for scores in LISTED_SCORES
    ),
    Form(("anchor", "positive"), "ranking", "rankings"),
    Form(("query", "positive"), "ranking", "rankings"),
    Form(("question", "answer"), "ranking", "rankings"),
    Form(("query", "answer"), "ranking", "rankings"),
    Form(_NAMED, "ranking", "rankings"),
    # Without scores: documents to score.
    *(Form(("query", documents), "ranking", "candidates") for documents in ("document", "passage", *_DOCUMENTS)),
    Form(_NAMED, "ranking", "candidates"),
)
"""Forms by purpose, in order of precedence: a row with the columns of several forms has the first one."""

_NEEDED: dict[Purpose, tuple[str, str]] = {
    "pairs": (
        "a pair has prompt, chosen and rejected, or chosen and rejected with a common beginning",
        "name the columns: --columns chosen=COLUMN --columns rejected=COLUMN",
    ),
    "labels": (
        "a row with a label has prompt, completion and label",
        "name the columns with --columns NAME=COLUMN",
    ),
    "prompts": (
        "a prompt to answer has prompt, question, or instruction and input",
        "name the column of the prompts: --prompt COLUMN",
    ),
    "decisions": (
        "a decision has state, questions and answers, or text and label",
        "name the columns of states and answers: --state COLUMN --question COLUMN",
    ),
    "embeddings": (
        "a pair has anchor and positive, a scored pair sentence1, sentence2 and score, a labelled text text and label",
        "name the columns of anchors and positives: --prompt COLUMN --completion COLUMN",
    ),
    "rankings": (
        "a row has query, positive and negatives, or query, document and score",
        "name the columns of queries and documents: --prompt COLUMN --completion COLUMN",
    ),
    "candidates": (
        "a row has query and document, or query and a list of documents",
        "name the columns of queries and documents: --prompt COLUMN --completion COLUMN",
    ),
    "texts": ("a text is in the column text", "name another column: --prompt COLUMN"),
    "classes": (
        "a row has text and label",
        "name the columns of texts and labels: --prompt COLUMN --completion COLUMN",
    ),
    "states": ("a state to decide has state, prompt or text", "name another column: --state COLUMN"),
}
"""Columns that purposes other than answers need, as a phrase for errors, and options of all commands that read them."""


_OF_ANSWERS = ("option_order", "option_rows", "question")
"""Options of the column `answers`."""


def check_options(named: NamedColumns, purpose: Purpose | None, reader: str, give: Callable[[str], str]) -> None:
    """Raise UsageError for an option of columns that no row of this use has.

    Args:
        reader: phrase for the reader of the rows, such as the objective.
        give: returns an imperative clause to use one of these objectives instead, which are joined by "or".
    """
    read = ("answers", "pairs", "labels") if purpose is None or purpose == "labelled" else (purpose,)
    usual = vars(NamedColumns()) | vars(DecisionColumns())
    usual.pop("columns")
    for name, value in usual.items():
        column = "answers" if name in _OF_ANSWERS else name
        reading = {form.purpose for form in FORMS if column in (*form.columns, *form.optional)}
        given = getattr(named, name, value) != value or (name in named.columns and hasattr(NamedColumns, name))
        if given and reading.isdisjoint(read):
            option = f"--{name.replace('_', '-')}"
            others = "name other columns: --prompt COLUMN --completion COLUMN"
            others = _NEEDED[purpose][1] if purpose in _NEEDED else others
            raise UsageError(
                f"{option} is given, but {reader} does not read it",
                where=name,
                next_step=f"{give(' or '.join(one for one, use in PURPOSES.items() if use in reading))}; "
                f"otherwise leave {option} out" + f", and {others}" * (name not in _OF_ANSWERS[:2]),
            )


def nearest_known(name: str) -> list[str]:
    """Return the columns of forms with the most similar names: this name alone if it is one of them."""
    if negative_columns([name]):
        return [name]
    known = {*_SHARED_COLUMNS, "negative"}.union(*({*form.columns, *form.optional, form.system} for form in FORMS))
    return [name] if name in known else nearest_names(name, [one for one in known if one is not None])


def forms_for(*purposes: Purpose) -> tuple[Form, ...]:
    """Return the forms of these purposes in order of precedence."""
    return tuple(form for form in FORMS if form.purpose in purposes)


_ANSWERS, _PROMPTS = forms_for("answers"), forms_for("prompts")


def _holds_rows(value: object) -> bool:
    """Return True for a list of tables that are no messages."""
    tables = value if isinstance(value, list) else ()
    return bool(tables) and all(isinstance(one, Mapping) and not {"role", "from"} & one.keys() for one in tables)


def detect(
    raw: RawRow,
    *,
    allow_prompts: bool = False,
    purpose: Purpose | None = "answers",
    named: Mapping[str, str] | None = None,
    renamed: Collection[str] = (),
    questions: Collection[str] = (),
    following: Iterable[RawRow] | None = None,
    not_as_trained: Callable[[RawRow], DataError | None] | None = None,
) -> Form:
    """Return the form of a row, from the names of its columns that are not null.

    Args:
        allow_prompts: also accept rows without an answer.
        purpose: use of the rows. None for pairs if the columns are those of pairs, else answers; `labelled` for
            the same, but an answer's column `label` is read. With None, it is read if it is `true` or `false`.
        named: columns or templates by option; the form must read each of these options' columns.
        renamed: names that `--columns` gives, which are no columns of the file.
        questions: names of the questions of decisions, if they are known; advice names columns of their answers.
        following: the rows after this one; None if they are not known. If it fits no form, some of them are consumed
            for the values of columns.
        not_as_trained: returns the error for a row that lacks columns of an adapter's training, or None.

    Raises:
        DataError: the columns fit no form.
    """
    given = named or {}
    present = frozenset(name for name, value in raw.values.items() if value is not None)
    if purpose in (None, "labelled"):
        purpose = _purpose_of(raw, present, given, labelled=purpose == "labelled")
    forms = [*forms_for(purpose), *(forms_for("prompts") if allow_prompts else ())]
    form = next((form for form in forms if given.keys() <= {*form.columns} <= present), None)
    preferred = purpose == "answers" and not allow_prompts and present.issuperset(PREFERENCE)
    if form is not None and not (preferred and len(form.columns) == 1 and not given):
        return form
    columns = _Columns(raw, present, given, following, answers=not allow_prompts)
    if error := columns.under_key() or columns.ignored_option(forms_for(purpose)):
        raise error
    if not_as_trained is not None and (error := not_as_trained(raw)):
        raise error
    if purpose in _NEEDED:
        needed, next_step = _NEEDED[purpose]
        raise DataError(
            f"these columns do not fit {purpose}: {', '.join(sorted(present - {*given, *renamed})) or 'none'}",
            where=raw.source,
            why=needed,
            next_step=columns.with_questions(purpose, questions)
            or columns.with_class(purpose)
            or columns.with_pair(purpose)
            or f"{columns.title_step}{next_step}",
        )
    raise columns.preference_pair() or columns.without_answer() or columns.null() or columns.unknown()


def _purpose_of(raw: RawRow, present: frozenset[str], given: Mapping[str, str], *, labelled: bool) -> Purpose:
    """Return the use of rows to evaluate: pairs, answers with a label, or answers."""
    if {*PREFERENCE} <= present and given.keys() <= {"prompt"}:
        return "pairs"
    (unpaired,) = forms_for("labels")
    names_it = labelled or str(raw.values.get(unpaired.columns[-1])).strip().lower() in ("true", "false")
    return "labels" if names_it and present >= {*unpaired.columns} >= given.keys() else "answers"


def fits(raw: RawRow) -> bool:
    """Return True if a row has the columns of any form with an answer, null or not."""
    without = ("prompts", "states", "embeddings", "texts", "rankings", "candidates", "classes")
    return any(form.purpose not in without and raw.values.keys() >= {*form.columns} for form in FORMS)


_BOTH = {"prompt": "completion", "completion": "prompt"}
_ADD_ANSWERS = (
    "add a column with the right answers and name it (--completion COLUMN), "
    "or write answers first: backhand generate --data FILE --as-rows"
)
_TABLE_PLACE = re.compile(r"\.[ct]sv(\.gz)?:\d+( \(row \d+\))?$", re.IGNORECASE)
MOST_FOLLOWING = 200
"""Largest number of following rows that are read for the values of columns."""
_USUAL_FORMS = ["messages", "prompt/completion", "instruction/input/output", "question/answer", "text"]


@dataclass(frozen=True)
class _Columns:
    """The columns of a row that fits no form, and the reasons for which it may fit none."""

    raw: RawRow
    present: frozenset[str]  # columns that are not null
    given: Mapping[str, str]  # columns or templates by option
    following: Iterable[RawRow] | None  # the rows after this one; None if they are not known
    answers: bool  # False if rows without an answer are accepted

    @cached_property
    def _values(self) -> tuple[ClassColumns, int]:
        """The values of the columns, and the number of rows that were read for them: this and some following ones."""
        rows, values = [self.raw], ClassColumns()
        with suppress(DataError):  # the error about the first row is raised instead
            rows.extend(islice(self.following or (), MOST_FOLLOWING))
        for row in rows:
            values.add(row.values)
        return values, len(rows)

    def under_key(self) -> DataError | None:
        """The only row of a file is a table with a list of rows."""
        keys = [name for name, value in self.raw.values.items() if _holds_rows(value)]
        if self.given or not keys or self.following is None or self._values[1] > 1:
            return None
        return DataError(
            f"the rows are a list under the key {name_list(keys)}",
            where=self.raw.source,
            why="rows are one list, or one object per line",
            next_step="write the list alone to a file, without the key and its braces; "
            f"in a terminal: jq {shell_quoted(f'.[{json.dumps(keys[0])}]')} OLD > NEW.json",
        )

    def with_class(self, purpose: Purpose | None) -> str | None:
        """Return the options that read a column with few repeating values as the answer, or None."""
        state = self.given.get("state") if purpose == "decisions" else None
        if purpose not in ("decisions", "classes") or self.given.keys() - {"state" if state else ""}:
            return None
        read = (*self.given, *columns_named(state or ""))
        filled = [name for name in self.raw.values if name in self.present and str(self.raw.values[name]).strip()]
        values, rows = self._values
        classes, more = [name for name in values.names(rows) if name not in read], ""
        if purpose == "decisions":
            options = decision_options(filled, classes, values.uninformative(rows), needs_state=not state)
            more = "; --question COLUMN='…' also puts the question into words"
        else:
            given = {"completion": class_of(classes)} if classes else {}
            options = suggestion((), filled, given, values.uninformative(rows)) if given else None
        return None if options is None else f"add {options}{more}"

    def with_questions(self, purpose: Purpose | None, questions: Collection[str]) -> str | None:
        """Return the options that read states and the answers to known questions, or None without such questions.

        A single question that has the usual name is that of a prompt and its completion.
        """
        if self.given or not questions or purpose not in ("decisions", "states"):
            return None
        values, rows = self._values
        classes = values.names(rows)
        filled = [name for name in self.raw.values if values.filled(name)]
        answers = [name for name in filled if name in questions]
        if purpose == "decisions" and not answers and [*questions] == [*LABELLED_TEXT[1:]]:
            return self.with_class("classes") or _NEEDED["classes"][1]
        without = {*values.constant(rows), *(answers or ([class_of(classes)] if classes else []))}
        state = state_option(name for name in filled if name not in without)
        if purpose == "states":
            return state and f"name the columns of the states, for example {state}"
        near = [other for name in questions for other in nearest_names(name, filled, cutoff=0.7)]
        if not answers and near:
            state = state_option(name for name in filled if name not in {*without, *near})
            return f"did you mean {' or '.join(dict.fromkeys(near))}?" + (f" Also add {state}" if state else "")
        if not answers:
            return f"rename the columns of the answers to the questions that they answer: {name_list(questions)}"
        named = [] if len(answers) == len(questions) else answers  # without any, all questions are read
        return state and f"add {state}" + "".join(f" --question {shell_quoted(name)}" for name in named)

    def with_pair(self, purpose: Purpose | None) -> str | None:
        """Return the options that read two columns of texts as chosen and rejected answers, or None."""
        if purpose != "pairs":
            return None
        prompts = [name for name in ("prompt", "question", "instruction") if name in self.present][:1]
        filled = [name for name in self.raw.values if name in self.present]
        options = pair_options(prompts, filled, self.given, *self._values)
        return f"name the columns, for example {options}" if options else None

    def ignored_option(self, forms: Sequence[Form]) -> DataError | None:
        """The form of the row would ignore a column that an option names."""
        form = next((form for form in forms if self.present.issuperset(form.columns)), None)
        if not self.given or form is None:
            return None
        unused = sorted(self.given.keys() - {*form.columns}) or sorted(self.given)
        other = _BOTH.get(unused[0], unused[0])
        return DataError(
            f"--{unused[0]} would be ignored",
            where=self.raw.source,
            why=f"the row has the form {form.name}, which reads {name_list(form.columns)}",
            next_step=f"leave out {name_list([f'--{name}' for name in unused])}"
            if other in self.given
            else f"name its {other} as well, with --{other}, or leave --{unused[0]} out",
        )

    def preference_pair(self) -> DataError | None:
        if not self.answers or not self.present.issuperset(PREFERENCE):
            return None
        chosen, only = self.raw.values["chosen"], "on the chosen answers only with "
        asked = next((name for name in ("prompt", "question") if name in self.present), None)
        whole = isinstance(chosen, list) and not answers_at_once(chosen)
        if whole:
            other = f"{only}--messages chosen"
        elif asked is not None and (isinstance(chosen, str) or isinstance(self.raw.values[asked], list)):
            other = f"{only}{'' if asked == 'prompt' else f'--prompt {asked} '}--completion chosen"
        else:  # texts that begin with the prompt, or replies as messages to a prompt as a text
            other = "with --objective orpo, which learns the chosen answers as well"
        return DataError(
            "these are preference pairs (chosen, rejected)",
            where=self.raw.source,
            next_step=f"train on them with --objective dpo, or {other}",
        )

    def without_answer(self) -> DataError | None:
        asking = next((form for form in _PROMPTS if self.present.issuperset(form.columns)), None)
        if asking is None:
            return None
        answer = next(form.columns[1] for form in _ANSWERS if form.columns[0] == asking.columns[0])
        known = {form.answer_columns[0] for form in _ANSWERS if len(form.columns) > 1} - {answer}
        answers = sorted(self.present & known)
        read = {column for text in self.given.values() for column in columns_named(text)}
        others = [name for name in self.raw.values if name in self.present - {*asking.columns, *self.given, *read}]
        texts = [name for name in others if not isinstance(self.raw.values[name], list | Mapping)]
        by_name = naming_advice(asking.columns, texts, self.given, *self._values, with_answer=self.answers)
        state = "an empty" if answer in self.raw.values else "no"
        return DataError(
            self._half_named or f"the row has {asking.columns[0]} but {state} {answer}",
            where=self.raw.source,
            why=f"its other columns: {name_list(others)}" if others else None,
            next_step=f"rename the column {answers[0]} to {answer}"
            if answers and not self.given
            else by_name or (None if answer in self.raw.values else _ADD_ANSWERS),
        )

    def null(self) -> DataError | None:
        for form in _ANSWERS:
            empty = [name for name in form.columns if name in self.raw.values.keys() - self.present]
            if empty and self.present.union(empty).issuperset(form.columns):
                verb = "is" if len(empty) == 1 else "are"
                return DataError(f"{' and '.join(empty)} {verb} null", where=self.raw.source)
        return None

    def unknown(self) -> DataError:
        columns = ", ".join(sorted(self.raw.values.keys() - self.given.keys())) or "none"
        small = {name.strip().lower() for name in self.present}
        meant = next((form for form in _ANSWERS if small.issuperset(form.columns)), None)
        if meant is not None and not self.given:
            how = f"write {' and '.join(meant.columns)} in lower case"
            texts = [name for name in self.raw.values if meant.kind == "text" and name.strip().lower() == "text"]
            label = suggestion(texts, self.raw.values, self.given) if texts else None
            how += f" to train on whole texts; to train on another column as their answer: {label}" if label else ""
        else:
            near = [form.name for form in _ANSWERS if self.present.intersection(form.columns)] or _USUAL_FORMS
            texts = [name for name, one in self.raw.values.items() if not isinstance(one, list | Mapping)]
            filled = [name for name in texts if name in self.present and str(self.raw.values[name]).strip()]
            by_name = naming_advice((), filled, self.given, *self._values, with_answer=self.answers)
            how = f"a row has {' or '.join(near)}" + (f"; or name the columns: {by_name}" if by_name else "")
        what = f"{self._half_named}; its columns" if self._half_named else "the columns fit no form of row"
        return DataError(f"{what}: {columns}", where=self.raw.source, next_step=f"{self.title_step}{how}")

    @property
    def title_step(self) -> str:
        """The first step if a table has one column with a name, which may be a title, or ""."""
        names = [name for name in self.raw.values if name]
        one = len(names) == 1 and _TABLE_PLACE.search(self.raw.source)
        return f"if {shorten(names[0])!r} is a title, {NO_TITLE}; otherwise " if one else ""

    @property
    def _half_named(self) -> str:
        """The phrase for a column that is named as one of prompt and completion if none is the other, or ""."""
        pairs = ((one, other) for one, other in _BOTH.items() if one in self.given and other not in self.given)
        return next(
            (f"{shell_quoted(self.given[one])} is named as the {one}, and no {other}" for one, other in pairs), ""
        )
