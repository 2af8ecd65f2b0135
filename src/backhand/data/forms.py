"""The forms rows come in: told apart by their columns, per file, and made into one of six kinds of row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from backhand.data.column_hints import ClassColumns, suggestion
from backhand.data.rows import (
    Asked,
    BadRows,
    Completion,
    Conversation,
    Labelled,
    Pair,
    PlainText,
    Purpose,
    RawRow,
    Row,
    describe,
    read_conversation,
    read_turns,
)
from backhand.errors import DataError
from backhand.words import begin_alike, name_list


@dataclass(frozen=True)
class Form:
    """One form of row."""

    columns: tuple[str, ...]  # all of these must be there
    kind: str  # how they are read
    optional: tuple[str, ...] = ()  # further columns that belong to the form
    system: str | None = None  # a column of the form's own for what `system` holds beside the others

    @property
    def name(self) -> str:
        """How it is called aloud, for example `prompt/completion`."""
        return "/".join((self.columns[0], *self.optional, *self.columns[1:]))

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """Columns that hold answers: two of a pair, otherwise one."""
        if self.kind == "pair":
            return self.columns[-2:]
        return self.columns[1:2] if self.kind == "labelled" else self.columns[-1:]

    def unread(self, columns: Iterable[str], *, conversation: bool) -> list[str]:
        """Those of a row's columns that nothing is taken from.

        Args:
            conversation: whether rows of this form hold lists of messages.
        """
        beside = _BESIDE_MESSAGES if conversation else () if self.kind == "text" else _BESIDE_MESSAGES[:1]
        read = (*self.columns, *self.optional, self.system, *beside)
        return [column for column in columns if column not in read]


_BESIDE_MESSAGES = ("system", "tools", "functions")
"""Columns that are read beside a conversation, the first one beside a question as well."""

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
"""In order of precedence: a row with the columns of several forms has the first."""

ASKING_FORMS = (
    Form(("prompt",), "completion"),
    Form(("instruction",), "instruction", ("input",)),
    Form(("question",), "completion"),
)
"""Rows without an answer: there is something to generate from them, and nothing to train on."""

_PREFERENCE = ("chosen", "rejected")
_BOTH = (("prompt", "completion"), ("completion", "prompt"))

PAIR_FORMS = (
    Form(("prompt", *_PREFERENCE), "pair"),
    Form(("question", *_PREFERENCE), "pair"),
    Form(_PREFERENCE, "pair"),
)
LABELLED_FORMS = (Form(("prompt", "completion", "label"), "labelled"),)
"""TRL's: for DPO and its kin (in the last form both sides begin with the prompt), and for KTO."""

_SPECIAL: dict[Purpose, tuple[tuple[Form, ...], str]] = {
    "pairs": (PAIR_FORMS, "a row of pairs has prompt, chosen and rejected, or chosen and rejected that begin alike"),
    "labels": (LABELLED_FORMS, "a labelled row has prompt, completion and label"),
    "prompts": (ASKING_FORMS, "a row to be answered has prompt, question, or instruction and input"),
}


def detect(
    raw: RawRow,
    *,
    may_ask: bool = False,
    purpose: Purpose | None = "answers",
    named: Mapping[str, str] | None = None,
) -> Form:
    """The form of a row, by the names of its columns that are not null.

    Args:
        purpose: what the rows are for; None for pairs where the columns are those of pairs, else answers.
        named: what options say of the columns of their names, which the form must read.

    Raises:
        DataError: its columns fit no form.
    """
    given = named or {}
    asked = frozenset(given)
    present = frozenset(name for name, value in raw.values.items() if value is not None)
    if purpose is None:
        purpose = "pairs" if present.issuperset(_PREFERENCE) and asked <= {"prompt"} else "answers"
    if purpose in _SPECIAL:
        forms, what = _SPECIAL[purpose]
        found = next((form for form in forms if asked <= {*form.columns} <= present), None)
        if found is not None:
            return found
        _check_named(asked, forms, present, raw.source)
        raise DataError(
            f"the columns are not those of {purpose}: {', '.join(sorted(present)) or 'none'}",
            where=raw.source,
            why=what,
            next_step="name the columns so, or train on answers with --objective sft",
        )
    for form in FORMS + ASKING_FORMS if may_ask else FORMS:
        if asked <= {*form.columns} <= present:
            if len(form.columns) == 1 and not asked and present.issuperset(_PREFERENCE):
                break
            return form
    _check_named(asked, FORMS, present, raw.source)
    if present.issuperset(_PREFERENCE):
        alone = "prompt" not in present and isinstance(raw.values["chosen"], list)
        raise DataError(
            "these are preference pairs (chosen, rejected)",
            where=raw.source,
            next_step="train on them with --objective dpo; to train on the chosen answers alone, "
            + ("keep chosen, and call it messages" if alone else "keep prompt and chosen, and call it completion"),
        )
    half = next(
        (f"--{one} is given, and no --{other}" for one, other in _BOTH if one in given and other not in given), ""
    )
    asking = next((form for form in ASKING_FORMS if present.issuperset(form.columns)), None)
    if asking is not None:
        answer = next(form.columns[1] for form in FORMS if form.columns[0] == asking.columns[0])
        meant_so = sorted(present & ({form.answer_columns[0] for form in FORMS if len(form.columns) > 1} - {answer}))
        others = [name for name in raw.values if name in present and name not in (*asking.columns, *given)]
        by_name = suggestion(asking.columns, others, given)
        raise DataError(
            half or f"the row has {asking.columns[0]}, but {'an empty' if answer in raw.values else 'no'} {answer}",
            where=raw.source,
            why=f"its other columns: {name_list(others)}" if others else None,
            next_step=f"call the column {meant_so[0]} {answer}" if meant_so and not given else by_name,
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
        how = f"write {' and '.join(meant.columns)} in small letters"
        texts = [name for name in raw.values if meant.kind == "text" and name.strip().lower() == "text"]
        label = suggestion(texts, raw.values, given) if texts else None
        how += f" to learn whole texts; to learn another column as the answer to them: {label}" if label else ""
    else:
        by_name = suggestion((), raw.values, given)
        how = f"a row has {' or '.join(near)}" + (f"; or name the columns: {by_name}" if by_name else "")
    what = f"{half}; its columns: {columns}" if half else f"the columns fit no form of row: {columns}"
    raise DataError(what, where=raw.source, next_step=how)


def _check_named(named: frozenset[str], forms: Iterable[Form], present: frozenset[str], source: str) -> None:
    """Raise DataError where rows have a form that would leave unread what an option names."""
    form = next((form for form in forms if present.issuperset(form.columns)), None)
    if not named or form is None:
        return
    unused = sorted(named.difference(form.columns)) or sorted(named)
    other = dict(_BOTH).get(unused[0])
    raise DataError(
        f"--{unused[0]} would not be used",
        where=source,
        why=f"the row has the form {form.name}, which reads {name_list(form.columns)}",
        next_step=f"name its {other} as well, with --{other}, or leave --{unused[0]} out"
        if other is not None and other not in named
        else f"leave out {name_list([f'--{name}' for name in unused])}",
    )


def fits(raw: RawRow) -> bool:
    """Whether the columns of a row are those of any form, null or not."""
    return any(raw.values.keys() >= {*form.columns} for form in (*FORMS, *PAIR_FORMS, *LABELLED_FORMS))


_USUAL_FORMS = ["messages", "prompt/completion", "instruction/input/output", "question/answer", "text"]


class FormReader:
    """Reads the rows of one file, which must all have the form of its first good row.

    Args:
        purpose, named: see `detect`.

    Attributes:
        form: that form, or None before the first good row.
        columns: the names of all columns so far, in their order.
        beside_text: which of them may be classes, where rows are plain text.
    """

    def __init__(
        self, *, may_ask: bool = False, purpose: Purpose | None = "answers", named: Mapping[str, str] | None = None
    ) -> None:
        self._purpose: Purpose | None = purpose
        self._detect = partial(detect, may_ask=may_ask, purpose=purpose, named=named)
        self.form: Form | None = None
        self.columns: dict[str, None] = {}
        self._first_source = ""
        self.beside_text = ClassColumns()

    def read(self, raw: RawRow) -> Row:
        """One row.

        Raises:
            DataError: another form than the rows before it, a missing column, or a value of the wrong type.
        """
        form = self.form or self._detect(raw)
        if self.form is not None:
            self._check_same(raw)
        row = _asked(form, raw) if self._purpose == "prompts" else _read(form, raw)
        if self.form is None:
            self.form, self._first_source = form, raw.source
        if form.kind == "text":
            self.beside_text.add(raw.values)
        if not self.columns.keys() >= raw.values.keys():
            self.columns |= dict.fromkeys(raw.values)
        return row

    def read_all(self, raws: Iterable[RawRow], bad: BadRows) -> Iterator[Row]:
        """Every good row; `bad` raises or counts the others."""
        for raw in raws:
            try:
                row = self.read(raw)
            except DataError as error:
                bad.add(error)
                continue
            yield row

    def _check_same(self, raw: RawRow) -> None:
        assert self.form is not None
        missing = [column for column in self.form.columns if raw.values.get(column) is None]
        if not missing:
            return
        try:
            other = self._detect(raw)
        except DataError:
            other = None
        if other is not None and other != self.form:
            raise DataError(
                f"this row has the form {other.name}, but {self._first_source} has the form {self.form.name}",
                where=raw.source,
                next_step="keep one form in a file; several files may each have their own",
            )
        found = "null" if missing[0] in raw.values else "not there"
        raise DataError(f"{missing[0]} is {found}, in a file of the form {self.form.name}", where=raw.source)


def _read(form: Form, raw: RawRow) -> Row:
    values, source = _under_usual_names(form, raw), raw.source
    if form.kind == "conversation":
        return read_conversation(form.columns[0], values[form.columns[0]], values, source)
    if form.kind == "text":
        text = _text(values, "text", source)
        if not text.strip():
            raise DataError("text is empty", where=source)
        return PlainText(text, source)
    if form.kind == "instruction":
        return _read_instruction(form, values, source)
    if form.kind == "pair":
        return _read_pair(form, values, source)
    if form.kind == "labelled":
        answer = _read_completion(form.columns[:2], values, source)
        return Labelled(answer, _label(values[form.columns[-1]], form.columns[-1], source), source)
    return _read_completion(form.columns, values, source)


def _asked(form: Form, raw: RawRow) -> Asked:
    question = _read(form, raw)
    assert isinstance(question, Conversation | Completion)
    prompt = question.prompt if isinstance(question, Completion) else raw.values[form.columns[0]]
    columns = {name: value for name, value in raw.values.items() if name not in (form.columns[0], "prompt")}
    return Asked(question, prompt, columns, raw.source)


def _read_completion(columns: Sequence[str], values: Mapping[str, Any], source: str) -> Conversation | Completion:
    prompt, *completions = columns
    if isinstance(values[prompt], list):  # lists of messages, as TRL has them: the loss is on the completion alone
        conversation = read_conversation(prompt, values[prompt], values, source)
        turns = [(message, False) for message in conversation.messages]
        for column in completions:
            turns += read_turns(column, values[column], source)
        messages, supervised = zip(*turns, strict=True)
        return Conversation(messages, supervised, conversation.tools, source)
    completion = _text(values, completions[0], source) if completions else None
    return Completion(_text(values, prompt, source), completion, "", _optional(values, "system", source), source)


def _under_usual_names(form: Form, raw: RawRow) -> Mapping[str, Any]:
    """A row's columns, the form's own for a system message as `system`."""
    own = None if form.system is None else _optional(raw.values, form.system, raw.source)
    if own is None:
        return raw.values
    if raw.values.get("system") is not None:
        raise DataError(
            f"the row has two system messages, in system and in {form.system}",
            where=raw.source,
            next_step="keep one of these columns",
        )
    return {**raw.values, "system": own}


def _read_instruction(form: Form, values: Mapping[str, Any], source: str) -> Completion:
    prompt = _text(values, form.columns[0], source)
    extra = _optional(values, form.optional[0], source)
    if extra and extra.strip():
        prompt = f"{prompt}\n\n{extra}"
    if not prompt.strip():
        raise DataError(f"{form.columns[0]} is empty", where=source)
    output = _text(values, form.columns[1], source) if len(form.columns) > 1 else None
    return Completion(prompt, output, "\n\n", _optional(values, "system", source), source)


def _read_pair(form: Form, values: Mapping[str, Any], source: str) -> Pair:
    """A pair with its prompt in a column of its own, or as what both sides begin with."""
    chosen, rejected = (values[column] for column in _PREFERENCE)
    prompt = values[form.columns[0]] if len(form.columns) > len(_PREFERENCE) else None
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise DataError("of chosen and rejected one is text and the other a list of messages", where=source)
    if not isinstance(chosen, list):
        chosen, rejected = (_text(values, column, source) for column in _PREFERENCE)
        if prompt is None:
            begin = _common_text(chosen, rejected, source)
            values = {**values, "prompt": chosen[:begin], "chosen": chosen[begin:], "rejected": rejected[begin:]}
    elif isinstance(prompt, str) and _answers_at_once(chosen) and _answers_at_once(rejected):
        values = {**values, form.columns[0]: [{"role": "user", "content": prompt}]}
    elif not isinstance(prompt, list) or all(prompt and side[: len(prompt)] == prompt for side in (chosen, rejected)):
        # The whole conversation stands in both; its prompt beside them, text or messages, is not put before it again.
        one, other = (read_conversation(column, values[column], values, source) for column in _PREFERENCE)
        begin = _common_messages(one, other, source)
        return Pair(_supervised_from(one, begin), _supervised_from(other, begin), source)
    column = form.columns[0] if prompt is not None else "prompt"
    good, bad = (_read_completion((column, side), values, source) for side in _PREFERENCE)
    return Pair(good, bad, source)


def _supervised_from(side: Conversation, begin: int) -> Conversation:
    return replace(side, supervised=tuple(carries and i >= begin for i, carries in enumerate(side.supervised)))


def _answers_at_once(messages: list[Any]) -> bool:
    first = messages[0] if messages else None
    return isinstance(first, Mapping) and (first.get("role") or first.get("from")) in ("assistant", "gpt")


def _common_text(chosen: str, rejected: str, source: str) -> int:
    """Characters with which both sides begin; a blank before the answers is theirs, as TRL has it."""
    common = begin_alike(chosen, rejected)
    if common and chosen[common - 1] == " ":
        common -= 1
    if chosen == rejected:
        raise DataError("chosen and rejected are the same text", where=source, next_step="take the row out")
    if not common:
        raise _no_prompt("nothing", source)
    if common in (len(chosen), len(rejected)):
        one, other = ("chosen", "rejected") if common == len(chosen) else ("rejected", "chosen")
        raise DataError(
            f"{one} is the beginning of {other}, so it holds no answer after the prompt",
            where=source,
            why="without a column prompt, the prompt is the text that both sides begin with",
            next_step="write the prompt in a column prompt",
        )
    return common


def _common_messages(chosen: Conversation, rejected: Conversation, source: str) -> int:
    """Messages with which both sides begin, without the last one of either."""
    both = list(zip(chosen.messages[:-1], rejected.messages[:-1], strict=False))
    common = next((i for i, (one, other) in enumerate(both) if one != other), len(both))
    if not any(message["role"] not in ("system", "assistant") for message in chosen.messages[:common]):
        raise _no_prompt("no question", source)
    return common


def _no_prompt(common: str, source: str) -> DataError:
    return DataError(
        f"chosen and rejected have no common prompt: {common} stands at the beginning of both",
        where=source,
        why="a pair is two answers to one prompt",
        next_step="write the prompt in a column prompt, or the same question at the beginning of both sides",
    )


def _label(value: object, column: str, source: str) -> bool:
    found = {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())
    if found is None:
        raise DataError(
            f"{column} is {describe(value)}, neither true nor false",
            where=source,
            next_step="write true for an answer that is desirable, false for others",
        )
    return found


def _text(values: Mapping[str, Any], column: str, source: str) -> str:
    value = values[column]
    if not isinstance(value, str):
        raise DataError(
            f"{column} is {describe(value)}, not text",
            where=source,
            next_step=f"write {column} in quotes" if isinstance(value, int | float) else None,
        )
    return value


def _optional(values: Mapping[str, Any], column: str, source: str) -> str | None:
    return None if values.get(column) is None else _text(values, column, source)
