r"""Rename columns: by options such as `--prompt '{subject}\n{body}' --completion team`, or by common spreadsheet names.

Renaming comes before the form of a row is detected (`data.forms`). The column that an option names becomes `prompt`,
`completion`, `system`, `messages` or `state`, and the columns of `--question` become `answers`. `--columns` gives any
other name, such as `chosen`. The original columns are kept too, since reward functions and labels read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, combinations
from typing import Any

from backhand.data.column_hints import COUNTING, ClassColumns, state_option
from backhand.data.decision_rows import ANSWERS, LABEL
from backhand.data.forms import fits
from backhand.data.options import (
    PIECES,
    WRITTEN,
    DecisionColumns,
    NamedColumns,
    columns_named,
    has_columns,
    shell_quoted,
)
from backhand.data.raw_rows import RawRow, RowErrors
from backhand.data.rows import REFERENCES
from backhand.errors import DataError, UsageError
from backhand.words import name_list, nearest_names

_DECIDING = ("messages", "conversations", "conversation")
"""Columns that take precedence over a prompt when the form is detected."""

_PROMPTS = frozenset(("prompt", "question", "query", "instruction", "input", "request", "user"))
_ANSWERS = frozenset(("completion", "answer", "response", "output", "reply", "assistant"))
"""Common names of prompts and answers, in lower case. They are used if a file has one of each and no other columns but
row numbers and the like."""
AS_TRAINED = "the columns are read as in the adapter's training"
"""Start of the note about columns of an adapter's record."""


class ColumnReader:
    """Rename the columns of one file to the names that `data.forms` knows.

    Args:
        system: the value of `--system`. Columns in braces are filled in.
        guess: recognize common names of spreadsheet columns.
        recorded: columns that an adapter was trained on. They are read if no option names others and the file has them.
            A state and answers to questions must be there.
        answers: the rows need answers, so `recorded` columns of answers must be there too.
        may_be_equal: anchor and positive may be the same text, whose vectors differ by dropout.

    Attributes:
        given: column or template by option, without `columns`.
        used: columns that were read.
        note: sentence about guessed columns, or None.
        values: values of the columns of a text and of answers, if several columns form the text.
    """

    def __init__(
        self,
        named: NamedColumns,
        system: str | None = None,
        *,
        guess: bool = False,
        recorded: NamedColumns | None = None,
        answers: bool = True,
        may_be_equal: bool = False,
    ) -> None:
        self.given = _by_option(named)
        self._columns: Mapping[str, str] = _others(named)
        self._answers: tuple[str, ...] = ()  # columns of answers to questions
        own, trained = _of_decisions(named), _of_decisions(recorded)
        state = own.state
        if state is None and not self.given and "state" not in self._columns:
            state = trained.state
        if state is not None:
            self.given["state"], self._answers = state, tuple(own.question or trained.question) if answers else ()
        self._typed = {own.state, *own.question}
        self._questions = {*own.question, *trained.question}
        self._system = system if self.given and system is not None and has_columns(system) else None
        self._guess = guess and not self.given and not self._columns
        self._recorded = None if self.given or self._columns else recorded
        self._needs_answers = answers
        self._for_answers = guess
        self._may_be_equal = may_be_equal
        self.used: frozenset[str] = frozenset()
        self.note: str | None = None
        self.values = ClassColumns()

    def rows(self, raws: Iterator[RawRow], bad: RowErrors) -> Iterator[RawRow]:
        """Yield every row with its columns renamed.

        Raises:
            UsageError: the first row lacks a column that an option names.
            DataError: it lacks a column of the adapter's record that must be there.
        """
        first = next(raws, None)
        if first is None:
            return
        if self._recorded is not None:
            self._take_recorded(first, self._recorded)
        if self._guess and not self.given:
            self._guess_from(first)
        columns = [("columns", text) for text in self._columns.values()]
        for option, text in [*self.given.items(), *columns, *(("question", name) for name in self._answers)]:
            self._check(option, text, first)
        self._check_answers(first)
        texts = (*self.given.values(), *self._columns.values(), self._system or "", *self._answers)
        self.used = frozenset(name for text in texts for name in columns_named(text))
        _, asked, answers = self._text_and_answers()
        for raw in chain([first], raws):
            if len(asked) > 1:
                self.values.add({name: raw.values.get(name) for name in (*asked, *answers)})
            try:
                yield self._renamed(raw) if self.given or self._columns else raw
            except DataError as error:
                bad.add(error)

    def name_columns(self, error: DataError) -> None:
        """Call a column that has another name in the file by that name, in an error that begins with the column.

        An option of the next step that reads a column of `--columns` replaces it.
        """
        step = error.next_step or ""
        option = re.search(r"(--completion|--messages) (\w+)$", step)
        if option and option[2] in self._columns:
            prompt = f"--prompt {shell_quoted(self.given['prompt'])} " if "prompt" in self.given else ""
            named = f"{option[1]} {shell_quoted(self._columns[option[2]])}"
            error.next_step = f"{step[: option.start()]}{prompt}{named} instead of --columns"
        for usual, text in {**self.given, **self._columns}.items():
            column = _alone(text)
            if re.match(rf"{re.escape(usual)}\b", error.what) and not has_columns(column):
                error.what = error.what.replace(usual, column, 1)
                error.args = (error.what,)
                if error.next_step:  # which also has options and words of these names
                    place = rf"(?<=write ){re.escape(usual)}\b|(?<=\['){re.escape(usual)}(?='\])"
                    error.next_step = re.sub(place, column.replace("\\", r"\\"), error.next_step)
                return

    def _text_and_answers(self) -> tuple[str, list[str], list[str]]:
        """Return the option of the text, its columns, and the columns of its answers."""
        option = "state" if "state" in self.given else "prompt"
        answers = self._answers or ((self.given["completion"],) if "completion" in self.given else ())
        return option, columns_named(self.given.get(option, "")), [_alone(text) for text in answers]

    def notes(self) -> list[str]:
        """Return sentences about the rows that were read."""
        option, asked, answers = self._text_and_answers()
        others = [name for name in asked if name not in answers]
        looked_up = ((name, answer) for answer in answers for name in self.values.determining(answer, others))
        return ([] if self.note is None else [self.note]) + [
            f"warning: each {name} has only one {answer}, but for a few rows at most, so that the model learns these "
            f"values instead of the text: leave {name} out of --{option}, unless new texts have the same ones"
            for name, answer in looked_up
        ]

    def _renamed(self, raw: RawRow) -> RawRow:
        values = {name: value for name, value in raw.values.items() if not self.given or name not in _DECIDING}
        for name, text in self._columns.items():
            values[name] = PIECES.sub(partial(_piece, raw=raw), text) if has_columns(text) else raw.values.get(text)
        for option, text in self.given.items():
            values[option] = _filled(option, text, raw)
        if self._answers:
            values["answers"] = {name: raw.values.get(name) for name in self._answers}
        if isinstance(values.get("prompt"), list) and isinstance(answer := values.get("completion"), str):
            values["completion"] = [{"role": "assistant", "content": answer}]
        if self._system is not None and (not values.get("system") or "system" in columns_named(self._system)):
            values["system"] = PIECES.sub(partial(_piece, raw=raw, keep=True), self._system)
        return RawRow(values, raw.source)

    def _check(self, option: str, text: str, row: RawRow) -> None:
        names = columns_named(text)
        if not names:
            raise UsageError(
                f"{text!r} names no column",
                where=option,
                why=f"{row.source} has {name_list(row.values)}",
                next_step=f"give --{option} COLUMN, or a text with columns in braces, or leave it out",
            )
        for name in names:
            if name not in row.values:
                if option in ("state", "question") and text not in self._typed:
                    raise self._not_as_trained(option, text, name, row)
                steps = [f"did you mean {' or '.join(near)}?"] if (near := nearest_names(name, row.values)) else []
                if has_columns(text):
                    steps.append("Columns are in braces; double the braces that belong to the text: {{ and }}")
                raise UsageError(
                    f"there is no column {name!r}",
                    where=option,
                    why=f"{row.source} has {name_list(row.values)}",
                    next_step=" ".join(steps) or "name a column that the rows have",
                )

    def _check_answers(self, row: RawRow) -> None:
        """Refuse columns that are one text, and note an answer that the prompt or the state contains.

        Raises:
            UsageError: both name the same text.
        """
        named = {name: text for name, text in {**self.given, **self._columns}.items() if name in _DIFFERENT}
        pairs = [(*one, *other) for one, other in combinations(named.items(), 2)]
        pairs += [("state", self.given.get("state", ""), "question", name) for name in self._answers]
        for one, text, other, again in pairs:
            has_answer = (one, other) in (("prompt", "completion"), ("state", "question"))
            if _alone(text) == _alone(again) and not (self._may_be_equal and (one, other) in _VIEWS):
                shown = f"--{other}" if has_answer else other
                steps = [f"name another column as {shown}; {row.source} has {name_list(row.values)}"]
                if one == "prompt" and self._for_answers and {"prompt", "completion"}.isdisjoint(row.values):
                    column = "" if _alone(text) == "text" else f" --columns {shell_quoted(f'text={_alone(text)}')}"
                    steps.append(f"to learn whole texts, give these instead of both: --train-on text{column}")
                raise UsageError(
                    f"{one} and {other} are the same text, {_alone(text)!r}",
                    where=other,
                    why="the model would see every answer, and learn to repeat it"
                    if has_answer and (self._for_answers or one == "state")
                    else "both texts of every row would be equal, which teaches nothing"
                    if _NOT_TEXTS.isdisjoint((one, other))
                    else None,
                    next_step="; ".join(steps),
                )
            if has_answer and {*columns_named(again)} <= {*columns_named(text)} and not self._may_be_equal:
                self.note = (
                    f"warning: the answer {name_list(columns_named(again))} is also in --{one}, so that the model sees "
                    f"it before it answers: leave it out of --{one}"
                )

    def not_as_trained(self, row: RawRow) -> DataError | None:
        """Return the error for a row of no form that lacks a column of the adapter's record, or None."""
        texts = {} if self._recorded is None else _by_option(self._recorded) | _others(self._recorded)
        read = {option: text for option, text in texts.items() if self._needs_answers or option in _ASKING}
        lacking = [(*one, name) for one in read.items() for name in columns_named(one[1]) if name not in row.values]
        if not lacking:
            return None
        missing = {name for _, _, name in lacking}
        others = {option: _with_placeholder(text, missing) for option, text in read.items()}
        named = " ".join(_typed(*one) for one in others.items())
        next_step = f"rename the column of these rows to {lacking[0][2]}, or name others: {named}"
        of_states = isinstance(self._recorded, DecisionColumns) and not self._needs_answers
        return self._not_as_trained(*lacking[0], row, None if of_states else next_step)

    def _not_as_trained(
        self, option: str, text: str, name: str, row: RawRow, next_step: str | None = None
    ) -> DataError:
        """Return the error for a column of the adapter's record that the rows do not have."""
        others = (column for column in row.values if column not in self._questions)
        other = "give --question with other questions"
        if self._questions == {LABEL}:
            other = "name the columns with --prompt and --completion instead of --state"
        next_steps = {
            "state": f"name columns of these rows: {state_option(others) or '--state COLUMN'}",
            "question": f"rename the column of these answers to {name}, or {other}",
        }
        return DataError(
            f"there is no column {name!r}, and the adapter was trained with {_typed(option, text)}",
            where=row.source,
            why=f"the columns are {name_list(row.values)}",
            next_step=next_step or next_steps.get(option, next_steps["state"]),
        )

    def _take_recorded(self, row: RawRow, recorded: NamedColumns) -> None:
        def present(texts: Mapping[str, str]) -> dict[str, str]:
            return {key: text for key, text in texts.items() if row.values.keys() >= {*columns_named(text)}}

        given, columns = present(_by_option(recorded)), present(_others(recorded))
        complete = given == _by_option(recorded) and columns == _others(recorded)
        if not complete and (self._needs_answers or (given | columns).keys().isdisjoint(_ASKING)):
            return
        if not given and not columns:
            return
        self.given.update(given)  # the reader of forms has the same mapping
        self._columns = columns
        self.note = f"{AS_TRAINED}: {' '.join(_typed(*one) for one in (given | columns).items())}"

    def _guess_from(self, row: RawRow) -> None:
        names = common_names(row.values)
        if names is None or fits(row):
            return
        prompt, answer = names
        self.given = {"prompt": prompt, "completion": answer}
        self.note = (
            f"the column {prompt} is read as the prompt and {answer} as its completion; "
            "others are named with --prompt and --completion"
        )


_FIRST = ("prompt", "anchor", "query", "question", "sentence1", "text")
_SECOND = ("completion", "positive", "answer", "document", "passage", "sentence2", "text")
"""Names of the first and of the second text of a row, and of the only one."""
_ASKING = frozenset((*_FIRST, "messages", "instruction", "state"))
"""Names that suffice where no answers are needed."""


def column_of_texts(recorded: NamedColumns | None, *, second: bool = False) -> NamedColumns | None:
    """Return the column of single texts for an adapter that was trained on these columns, or None if none is known.

    Args:
        recorded: columns that the adapter was trained on.
        second: the texts are the second ones of the rows of training (positives, documents), instead of the first.
    """
    columns = {} if recorded is None else _others(recorded) | _by_option(recorded)
    named = (columns[name] for name in (_SECOND if second else _FIRST) if name in columns)
    return next((NamedColumns(prompt=column) for column in named), None)


def columns_of_prompts(recorded: NamedColumns | None) -> NamedColumns | None:
    """Return the columns of prompts to answer for an adapter that was trained on these columns.

    Completions are then the right answers of rows that have no other column of `REFERENCES`, such as `answer`. A
    conversation is no prompt to answer.
    """
    if recorded is None:
        return None
    given = _by_option(recorded)
    given.pop("messages", None)
    answer = {REFERENCES[-1]: given.pop("completion")} if "completion" in given else {}
    return NamedColumns(**given, columns=answer | _others(recorded))


def columns_of_states(recorded: NamedColumns) -> NamedColumns:
    """Return the columns of states for an adapter that was trained on these columns: those that are no answers."""
    given = _by_option(recorded)
    given.pop("completion", None)
    others = {name: text for name, text in _others(recorded).items() if name not in (LABEL, ANSWERS)}
    return NamedColumns(**given, columns=others)


def common_names(columns: Iterable[str]) -> tuple[str, str] | None:
    """Return the columns of prompt and answer if these have common names and no other column could be one; or None."""
    names = [*columns]
    small = {name.strip().lower(): name for name in names}
    prompts, answers = _PROMPTS & small.keys(), _ANSWERS & small.keys()
    doubtful = small.keys() - _PROMPTS - _ANSWERS - COUNTING or len(small) < len(names)
    if doubtful or len(prompts) != 1 or len(answers) != 1:
        return None
    return small[next(iter(prompts))], small[next(iter(answers))]


_OPTIONS = ("prompt", "completion", "messages")
"""Names that have an option of their own."""


def _by_option(named: NamedColumns) -> dict[str, str]:
    columns = {option: named.columns[option] for option in _OPTIONS if option in named.columns}
    texts = columns | {option: text for option in _OPTIONS if (text := getattr(named, option)) is not None}
    return {option: texts[option] for option in _OPTIONS if option in texts}


def _typed(name: str, text: str) -> str:
    """Return the option that reads a column or a template under this name."""
    if name in (*_OPTIONS, "state", "question"):
        return f"--{name} {shell_quoted(text)}"
    return f"--columns {shell_quoted(f'{name}={text}')}"


def _with_placeholder(text: str, missing: Collection[str]) -> str:
    """Return a column or a template with COLUMN instead of the missing columns."""
    if not has_columns(text):
        return "COLUMN" if text in missing else text
    return PIECES.sub(lambda piece: "{COLUMN}" if piece[1] in missing else piece[0], text)


def _of_decisions(named: object) -> DecisionColumns:
    return named if isinstance(named, DecisionColumns) else DecisionColumns()


def _others(named: NamedColumns) -> dict[str, str]:
    return {name: text for name, text in named.columns.items() if name not in _OPTIONS}


_NOT_TEXTS = {"label", "labels", "score"}
_DIFFERENT = _NOT_TEXTS | {"prompt", "completion", "text", "chosen", "rejected", "negative", "positive"}
_DIFFERENT |= {"anchor", "sentence1", "sentence2", "query", "document", "passage"}
"""Columns of which no two are the same text."""
_VIEWS = (("prompt", "completion"), ("anchor", "positive"))
"""Columns of pairs of embeddings."""


def _alone(text: str) -> str:
    """Return the column of a template that is one column and nothing else, and any other template unchanged."""
    names = columns_named(text)
    return names[0] if text == f"{{{names[0]}}}" else text


def _filled(option: str, text: str, raw: RawRow) -> Any:
    names = columns_named(text)
    if missing := [name for name in names if name not in raw.values]:
        raise DataError(f"there is no {missing[0]} in this row", where=raw.source)
    if all(_is_empty(raw.values[name]) for name in names):
        are = "is" if len(names) == 1 else "are"
        raise DataError(f"{name_list(names)} {are} empty, so that the row has no {option}", where=raw.source)
    if _alone(text) == names[0]:
        value = raw.values[names[0]]
        return value if isinstance(value, list) else _as_text(value, raw.source)
    return PIECES.sub(partial(_piece, raw=raw), text)


def _piece(match: re.Match[str], raw: RawRow, *, keep: bool = False) -> str:
    """Return the text for a piece of a template. With `keep`, braces around an unknown column are left unchanged."""
    if match[1] is None:
        return WRITTEN[match[0]]
    return match[0] if keep and match[1] not in raw.values else _as_text(raw.values.get(match[1]), raw.source)


def _is_empty(value: Any) -> bool:
    """Return True for null, empty text, and the NaN of an empty cell in a table of numbers."""
    return bool(value is None or value == "" or value != value)


def _as_text(value: Any, source: str) -> str:
    """Return a cell as text: empty cells as "", numbers, lists and tables as JSON, dates as `str` prints them."""
    if isinstance(value, bytes):
        raise DataError("a cell contains bytes, not text", where=source, next_step="write the column as text")
    if isinstance(value, str) or _is_empty(value):
        return value if isinstance(value, str) else ""
    plain = isinstance(value, int | float | list | tuple | Mapping)
    return json.dumps(value, ensure_ascii=False, default=str) if plain else str(value)
