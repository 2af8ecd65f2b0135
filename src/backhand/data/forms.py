"""Forms of rows: one table of column sets. The form of a file is detected from the columns of its first valid row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from backhand.data.column_hints import naming_advice, suggestion
from backhand.data.options import DecisionColumns, NamedColumns, columns_named, shell_quoted
from backhand.data.raw_rows import NO_TITLE, RawRow
from backhand.data.row_kind import Form, RowKind, UnfitColumns, known_columns, negative_columns, row_kind, row_kinds
from backhand.data.rows import Purpose
from backhand.errors import DataError, UsageError
from backhand.objective.registry import names, recorded_traits
from backhand.words import name_list, nearest_names, shorten

PREFERENCE = ("chosen", "rejected")


def answers_at_once(messages: Sequence[Any]) -> bool:
    """Return True if a list of messages begins with a reply."""
    first = messages[0] if messages else None
    return isinstance(first, Mapping) and (first.get("role") or first.get("from")) in ("assistant", "gpt")


SCORES = ("score", "label")
LISTED_SCORES = ("scores", "labels")
LABELLED_TEXT = ("text", "label")
NAMED = ("prompt", "completion")  # also the columns that --prompt and --completion name
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
    Form(("text",), "text", reads_system=False),
)
"""Forms of answers, in order of precedence."""
PROMPT_FORMS = (
    Form(("prompt",), "completion"),
    Form(("instruction",), "instruction", ("input",)),
    Form(("question",), "completion"),
)
"""Forms of rows without an answer, to generate from."""

_OF_ANSWERS = ("option_order", "option_rows", "question")
"""Options of the column `answers`."""


def check_options(named: NamedColumns, kind: RowKind, reader: str, give: Callable[[str], str]) -> None:
    """Raise UsageError for an option of columns that no row of this kind has.

    Args:
        reader: phrase for the reader of the rows, such as the objective.
        give: returns an imperative clause to use one of these objectives instead, which are joined by "or".
    """
    usual = vars(NamedColumns()) | vars(DecisionColumns())
    usual.pop("columns")
    for name, value in usual.items():
        column = "answers" if name in _OF_ANSWERS else name
        given = getattr(named, name, value) != value or (name in named.columns and hasattr(NamedColumns, name))
        if given and not _reads(kind, column):
            option = f"--{name.replace('_', '-')}"
            others = "name other columns: --prompt COLUMN --completion COLUMN"
            others = kind.needed[1] if kind.needed else others
            reading = [one for one in names() if _reads(row_kind(recorded_traits({"objective": one}).rows), column)]
            raise UsageError(
                f"{option} is given, but {reader} does not read it",
                where=name,
                next_step=f"{give(' or '.join(reading))}; "
                f"otherwise leave {option} out" + f", and {others}" * (name not in _OF_ANSWERS[:2]),
            )


def _reads(kind: RowKind, column: str) -> bool:
    return any(column in (*form.columns, *form.optional) for form in kind.forms)


def _all_forms() -> list[Form]:
    """Return the forms of all kinds of rows."""
    return [form for kind in row_kinds() for form in kind.forms]


def nearest_known(name: str) -> list[str]:
    """Return the columns of forms with the most similar names: this name alone if it is one of them."""
    if negative_columns([name]):
        return [name]
    known = known_columns(_all_forms())
    return [name] if name in known else nearest_names(name, [*known])


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
) -> tuple[RowKind, Form]:
    """Return the kind and the form of a row, from the names of its columns that are not null.

    Args:
        allow_prompts: also accept rows without an answer.
        purpose: kind of the rows; None if their columns tell it, see `row_kind.Detected`.
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
    kind = row_kind(purpose).of(raw, present, given, renamed)
    forms = [*kind.forms, *(PROMPT_FORMS if allow_prompts else ())]
    form = next((form for form in forms if given.keys() <= {*form.columns} <= present), None)
    preferred = kind.needed is None and not allow_prompts and present.issuperset(PREFERENCE)
    if form is not None and not (preferred and len(form.columns) == 1 and not given):
        return kind, form
    columns = _Columns(raw, present, given, following, answers=not allow_prompts)
    if error := columns.under_key() or columns.ignored_option(kind.forms):
        raise error
    if not_as_trained is not None and (error := not_as_trained(raw)):
        raise error
    if kind.needed is not None:
        needed, next_step = kind.needed
        raise DataError(
            f"these columns do not fit {kind.name}: {', '.join(sorted(present - {*given, *renamed})) or 'none'}",
            where=raw.source,
            why=needed,
            next_step=kind.advice(columns, questions) or f"{columns.title_step}{next_step}",
        )
    raise columns.preference_pair() or columns.without_answer() or columns.null() or columns.unknown()


def fits(raw: RawRow) -> bool:
    """Return True if a row has the columns of any form with an answer, null or not."""
    forms = (form for kind in row_kinds() if kind.has_answers and kind.is_rendered for form in kind.forms)
    return any(raw.values.keys() >= {*form.columns} for form in forms)


_BOTH = {"prompt": "completion", "completion": "prompt"}
_ADD_ANSWERS = (
    "add a column with the right answers and name it (--completion COLUMN), "
    "or write answers first: backhand generate --data FILE --as-rows"
)
_TABLE_PLACE = re.compile(r"\.[ct]sv(\.gz)?:\d+( \(row \d+\))?$", re.IGNORECASE)
_USUAL_FORMS = ["messages", "prompt/completion", "instruction/input/output", "question/answer", "text"]


class _Columns(UnfitColumns):
    """The columns of a row that fits no form, and the reasons for which it may fit none."""

    def under_key(self) -> DataError | None:
        """The only row of a file is a table with a list of rows."""
        keys = [name for name, value in self.raw.values.items() if _holds_rows(value)]
        if self.given or not keys or self.following is None or self.values[1] > 1:
            return None
        return DataError(
            f"the rows are a list under the key {name_list(keys)}",
            where=self.raw.source,
            why="rows are one list, or one object per line",
            next_step="write the list alone to a file, without the key and its braces; "
            f"in a terminal: jq {shell_quoted(f'.[{json.dumps(keys[0])}]')} OLD > NEW.json",
        )

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
        asking = next((form for form in PROMPT_FORMS if self.present.issuperset(form.columns)), None)
        if asking is None:
            return None
        answer = next(form.columns[1] for form in FORMS if form.columns[0] == asking.columns[0])
        known = {form.answer_columns[0] for form in FORMS if len(form.columns) > 1} - {answer}
        answers = sorted(self.present & known)
        read = {column for text in self.given.values() for column in columns_named(text)}
        unread = self.present - {*asking.columns, *self.given, *read}
        others = [name for name in self.raw.values if name in unread]
        texts = [name for name in others if not isinstance(self.raw.values[name], list | Mapping)]
        by_name = naming_advice(asking.columns, texts, self.given, *self.values, with_answer=self.answers)
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
        for form in FORMS:
            empty = [name for name in form.columns if name in self.raw.values.keys() - self.present]
            if empty and self.present.union(empty).issuperset(form.columns):
                verb = "is" if len(empty) == 1 else "are"
                return DataError(f"{' and '.join(empty)} {verb} null", where=self.raw.source)
        return None

    def unknown(self) -> DataError:
        columns = ", ".join(sorted(self.raw.values.keys() - self.given.keys())) or "none"
        small = {name.strip().lower() for name in self.present}
        meant = next((form for form in FORMS if small.issuperset(form.columns)), None)
        if meant is not None and not self.given:
            how = f"write {' and '.join(meant.columns)} in lower case"
            texts = [name for name in self.raw.values if meant.reader == "text" and name.strip().lower() == "text"]
            label = suggestion(texts, self.raw.values, self.given) if texts else None
            how += f" to train on whole texts; to train on another column as their answer: {label}" if label else ""
        else:
            near = [form.name for form in FORMS if self.present.intersection(form.columns)] or _USUAL_FORMS
            texts = [name for name, one in self.raw.values.items() if not isinstance(one, list | Mapping)]
            filled = [name for name in texts if name in self.present and str(self.raw.values[name]).strip()]
            by_name = naming_advice((), filled, self.given, *self.values, with_answer=self.answers)
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
