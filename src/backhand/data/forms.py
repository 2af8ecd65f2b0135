"""Forms of rows: detected per file from the columns, and read into one of six types of row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from backhand.data.column_hints import suggestion
from backhand.data.raw_rows import RawRow
from backhand.data.rows import Purpose
from backhand.errors import DataError
from backhand.words import name_list


@dataclass(frozen=True)
class Form:
    """One form of row."""

    columns: tuple[str, ...]  # required columns
    kind: str  # selects the reader
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

    def unread(self, columns: Iterable[str], *, conversation: bool) -> list[str]:
        """Return the columns that are not read.

        Args:
            conversation: True if rows of this form contain lists of messages.
        """
        shared = _SHARED_COLUMNS if conversation else () if self.kind == "text" else _SHARED_COLUMNS[:1]
        read = (*self.columns, *self.optional, self.system, *shared)
        return [column for column in columns if column not in read]


_SHARED_COLUMNS = ("system", "tools", "functions")
"""Columns that are read in addition to a conversation; only the first one in addition to a prompt."""

FORMS = (
    Form(("messages",), "conversation"),
    Form(("conversations",), "conversation"),
    Form(("conversation",), "conversation"),
    Form(("prompt", "completion"), "completion"),
    Form(("prompt", "response"), "completion"),
    Form(("instruction", "output"), "instruction", ("input",)),
    Form(("instruction", "response"), "instruction", ("context",)),
    Form(("question", "answer"), "completion"),
    Form(("question", "response"), "completion", system="system_prompt"),
    Form(("query", "response"), "completion"),
    Form(("input", "output"), "completion"),
    Form(("text",), "text"),
)
"""Forms in order of precedence: a row with the columns of several forms has the first one."""

PROMPT_FORMS = (
    Form(("prompt",), "completion"),
    Form(("instruction",), "instruction", ("input",)),
    Form(("question",), "completion"),
)
"""Forms of rows without an answer, which can be generated from but not trained on."""

PREFERENCE = ("chosen", "rejected")
_BOTH = (("prompt", "completion"), ("completion", "prompt"))

PAIR_FORMS = (
    Form(("prompt", *PREFERENCE), "pair"),
    Form(("question", *PREFERENCE), "pair"),
    Form(PREFERENCE, "pair"),
)
UNPAIRED_FORMS = (Form(("prompt", "completion", "label"), "labelled"),)
"""TRL's forms, for DPO and related objectives (`PAIR_FORMS`) and for KTO. In the last pair form, both sides start with
the prompt."""

_SPECIAL: dict[Purpose, tuple[tuple[Form, ...], str]] = {
    "pairs": (PAIR_FORMS, "a pair has prompt, chosen and rejected, or chosen and rejected with a common beginning"),
    "labels": (UNPAIRED_FORMS, "a row with a label has prompt, completion and label"),
    "prompts": (PROMPT_FORMS, "a prompt to answer has prompt, question, or instruction and input"),
}


def detect(
    raw: RawRow,
    *,
    allow_prompts: bool = False,
    purpose: Purpose | None = "answers",
    named: Mapping[str, str] | None = None,
) -> Form:
    """Return the form of a row, from the names of its columns that are not null.

    Args:
        may_ask: also accept rows without an answer.
        purpose: use of the rows; None for pairs if the columns are those of pairs, else answers.
        named: columns or templates by option; the form must read each of these options' columns.

    Raises:
        DataError: the columns fit no form.
    """
    given = named or {}
    required = frozenset(given)
    present = frozenset(name for name, value in raw.values.items() if value is not None)
    if purpose is None:
        purpose = "pairs" if present.issuperset(PREFERENCE) and required <= {"prompt"} else "answers"
    if purpose in _SPECIAL:
        forms, what = _SPECIAL[purpose]
        match = next((form for form in forms if required <= {*form.columns} <= present), None)
        if match is not None:
            return match
        _check_named(required, forms, present, raw.source)
        raise DataError(
            f"these columns do not fit {purpose}: {', '.join(sorted(present)) or 'none'}",
            where=raw.source,
            why=what,
            next_step="rename the columns, or train on answers with --objective sft",
        )
    for form in FORMS + PROMPT_FORMS if allow_prompts else FORMS:
        if required <= {*form.columns} <= present:
            if len(form.columns) == 1 and not required and present.issuperset(PREFERENCE):
                break
            return form
    _check_named(required, FORMS, present, raw.source)
    if present.issuperset(PREFERENCE):
        alone = "prompt" not in present and isinstance(raw.values["chosen"], list)
        raise DataError(
            "these are preference pairs (chosen, rejected)",
            where=raw.source,
            next_step="train on them with --objective dpo; to train on the chosen answers only, "
            + (
                "keep chosen and rename it to messages"
                if alone
                else "keep prompt and chosen, and rename chosen to completion"
            ),
        )
    half = next(
        (f"--{one} is given without --{other}" for one, other in _BOTH if one in given and other not in given), ""
    )
    asking = next((form for form in PROMPT_FORMS if present.issuperset(form.columns)), None)
    if asking is not None:
        answer = next(form.columns[1] for form in FORMS if form.columns[0] == asking.columns[0])
        answers = sorted(present & ({form.answer_columns[0] for form in FORMS if len(form.columns) > 1} - {answer}))
        others = [name for name in raw.values if name in present and name not in (*asking.columns, *given)]
        by_name = suggestion(asking.columns, others, given)
        raise DataError(
            half or f"the row has {asking.columns[0]} but {'an empty' if answer in raw.values else 'no'} {answer}",
            where=raw.source,
            why=f"its other columns: {name_list(others)}" if others else None,
            next_step=f"rename the column {answers[0]} to {answer}" if answers and not given else by_name,
        )
    for form in FORMS:
        empty = [name for name in form.columns if name in raw.values and name not in present]
        if empty and present.union(empty).issuperset(form.columns):
            raise DataError(f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} null", where=raw.source)
    columns = ", ".join(sorted(raw.values.keys() - given.keys())) or "none"
    small = {name.strip().lower() for name in present}
    meant = next((form for form in FORMS if small.issuperset(form.columns)), None)
    near = [form.name for form in FORMS if present.intersection(form.columns)] or _USUAL_FORMS
    if meant is not None and not given:
        how = f"write {' and '.join(meant.columns)} in lower case"
        texts = [name for name in raw.values if meant.kind == "text" and name.strip().lower() == "text"]
        label = suggestion(texts, raw.values, given) if texts else None
        how += f" to train on whole texts; to train on another column as their answer: {label}" if label else ""
    else:
        by_name = suggestion((), raw.values, given)
        how = f"a row has {' or '.join(near)}" + (f"; or name the columns: {by_name}" if by_name else "")
    what = f"{half}; its columns: {columns}" if half else f"the columns fit no form of row: {columns}"
    raise DataError(what, where=raw.source, next_step=how)


def _check_named(named: frozenset[str], forms: Iterable[Form], present: frozenset[str], source: str) -> None:
    """Raise DataError if the form of the row would ignore a column that an option names."""
    form = next((form for form in forms if present.issuperset(form.columns)), None)
    if not named or form is None:
        return
    unused = sorted(named.difference(form.columns)) or sorted(named)
    other = dict(_BOTH).get(unused[0])
    raise DataError(
        f"--{unused[0]} would be ignored",
        where=source,
        why=f"the row has the form {form.name}, which reads {name_list(form.columns)}",
        next_step=f"name its {other} as well, with --{other}, or leave --{unused[0]} out"
        if other is not None and other not in named
        else f"leave out {name_list([f'--{name}' for name in unused])}",
    )


def fits(raw: RawRow) -> bool:
    """Return True if a row has the columns of any form, null or not."""
    return any(raw.values.keys() >= {*form.columns} for form in (*FORMS, *PAIR_FORMS, *UNPAIRED_FORMS))


_USUAL_FORMS = ["messages", "prompt/completion", "instruction/input/output", "question/answer", "text"]
