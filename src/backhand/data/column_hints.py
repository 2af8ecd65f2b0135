"""Hints about columns: options to suggest when rows fit no form, and columns that may contain class labels."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from backhand.data.label_names import is_integer
from backhand.data.options import columns_named
from backhand.data.raw_rows import number_of

COUNTING = frozenset(("", "id", "index", "no", "nr", "number", "row", "unnamed: 0", "date", "time", "timestamp"))
"""Names, in lower case, of columns that number or date rows."""
ANSWERS = frozenset(("completion", "answer", "response", "output", "reply", "accepted", "chosen", "preferred"))
_ABOUT_ROWS = frozenset(("split", "subset", "fold", "dataset", "file"))
CLASSES = frozenset(("label", "labels", "class", "category", "intent", "sentiment", "target"))
_UNWANTED = frozenset(("rejected", "refused", "dispreferred", "negative"))
"""Names, in lower case, of columns with expected answers (`ANSWERS`), the file or split of a row, the class of a text,
and rejected answers (`_UNWANTED`)."""


def suggestion(
    prompts: Sequence[str],
    others: Iterable[str],
    given: Mapping[str, str],
    constant: Collection[str] = (),
    likely: str | None = None,
) -> str | None:
    """Return command-line options that would read these columns, or None.

    Args:
        prompts: columns of a prompt. If it is empty, all columns but the answer form the prompt.
        given: options that the user gave, which stay.
        constant: columns with the same value in all rows, which are not suggested.
        likely: the answer if no column has the name of one; the last column if it is None.
    """
    skipped = {*given, *prompts, *constant, *(column for text in given.values() for column in columns_named(text))}
    unread = [name for name in others if name not in skipped]
    small, free = {name: _in_lower_case(name) for name in unread}, _usable(unread)
    answer, template = given.get("completion"), given.get("prompt")
    if answer is None and free:
        answer = next((name for name in free if small[name] in ANSWERS | CLASSES), None)
        answer = answer or (likely if likely in free else free[-1])
    if template is None:
        asking = [name for name in prompts if name not in given and _can_be_typed(name)] or [
            name for name in free if name != answer
        ]
        template = _template(asking)
    return f"--prompt {shlex.quote(template)} --completion {shlex.quote(answer)}" if template and answer else None


def naming_advice(
    prompts: Sequence[str],
    others: Sequence[str],
    given: Mapping[str, str],
    values: ClassColumns,
    rows: int,
    *,
    with_answer: bool = True,
) -> str | None:
    """Return options that would read these columns, marked as an example unless one column is clearly the answer.

    An answer is known by its name, or because its values are a class and the last column has no longer texts. Where the
    last column has longer texts, one example reads the class, and another the last column.

    Args:
        prompts, others, given: see `suggestion`.
        values: the values of the columns.
        rows: the number of rows with these values.
        with_answer: False if the command reads only prompts, so that no option names the answer.
    """
    useless = values.uninformative(rows)
    known = "completion" in given or any(
        _in_lower_case(name) in ANSWERS | CLASSES for name in _usable(others) if name not in useless
    )
    among = set(others)
    classes = [] if known else [name for name in values.names(rows) if name in among]
    sure = known or bool(classes and not values.has_long_texts(others[-1]))
    answers = [class_of(classes)] if classes else []
    options = [
        suggestion(prompts, others, given, useless, one) for one in (answers if answers and sure else [*answers, None])
    ]
    if not with_answer:
        options = [one and one.rpartition(" --completion ")[0] for one in options]
    different = list(dict.fromkeys(filter(None, options)))
    asked = any(map(values.has_long_texts, others)) if "prompt" in given else bool(prompts)
    unclear = asked and with_answer and not (sure or given.keys() - {"prompt"})
    pair = pair_options(prompts, others, given, values, rows) if unclear else None
    more = f"; if one of the two is the better answer, they are a pair, for --objective dpo: {pair}" if pair else ""
    return ("" if sure else "for example ") + ", or ".join(different) + more if different else None


_BETTER, _WORSE = ANSWERS | {"good", "better", "best"}, _UNWANTED | {"bad", "worse", "worst"}


def pair_options(
    prompts: Sequence[str], columns: Iterable[str], given: Mapping[str, str], values: ClassColumns, rows: int
) -> str | None:
    """Return options that read two texts next to a prompt as a preference pair, or None if there are not two.

    Args:
        prompts: columns of the prompt. If it is empty, the first text is the prompt.
        columns: all columns, or those that are not the prompt.
        given: options that the user gave, which stay.
        values: the values of the columns.
        rows: the number of rows with these values.
    """
    skipped = {*values.uninformative(rows), *prompts, *(one for text in given.values() for one in columns_named(text))}
    texts = [name for name in columns if name not in skipped and _can_be_typed(name)]
    texts = [name for name in texts if _in_lower_case(name) not in COUNTING | _ABOUT_ROWS]
    asked = "prompt" if "prompt" in given else prompts[0] if prompts else texts.pop(0) if texts else ""
    if len(texts) != 2:
        return None
    chosen, rejected = texts
    if _in_lower_case(chosen) in _WORSE or _in_lower_case(rejected) in _BETTER - _WORSE:
        chosen, rejected = rejected, chosen
    named = "" if asked in ("prompt", "question") else f"--prompt {shlex.quote(asked)} "
    pair = (("chosen", chosen), ("rejected", rejected))
    return named + " ".join(f"--columns {name}={shlex.quote(one)}" for name, one in pair if name != one)


def decision_options(
    columns: Iterable[str], classes: Sequence[str], without: Collection[str], *, needs_state: bool = True
) -> str | None:
    """Return command-line options that read one of these classes as the answer to a question, or None.

    Args:
        columns: all columns. Those that are neither classes nor in `without` form the state.
        classes: columns that may contain answers.
        without: columns that need not be read, such as constant ones.
        needs_state: False if an option names the state, which stays.
    """
    answers = [name for name in _usable(classes) if "=" not in name]
    read = {*classes, *without}
    state = state_option(name for name in columns if name not in read) if needs_state else ""
    return f"{state} --question {shlex.quote(class_of(answers))}".strip() if answers and state is not None else None


def state_option(columns: Iterable[str]) -> str | None:
    """Return the command-line option that reads these columns as the state of a decision, or None."""
    texts = _usable(columns)
    return f"--state {shlex.quote(_template(texts))}" if texts else None


def class_of(columns: Sequence[str]) -> str:
    """Return the most likely class of these columns: the first with the name of one, else the last."""
    return next((name for name in columns if name.lower() in CLASSES), columns[-1])


def _template(columns: Sequence[str]) -> str:
    return "\\n".join(f"{{{name}}}" for name in columns[:4])


def _in_lower_case(column: str) -> str:
    return column.strip(" .:#").lower()


def _usable(columns: Iterable[str]) -> list[str]:
    """Return the columns that can be typed and are about a text, in order."""
    useless = COUNTING | _UNWANTED | _ABOUT_ROWS
    return [name for name in columns if _can_be_typed(name) and _in_lower_case(name) not in useless]


def _can_be_typed(column: str) -> bool:
    return column.isprintable() and not column.startswith("-") and not set(column) & set("{}")


_MOST, _LONGEST = 20, 40
_NUMBER = re.compile(
    r"[-+]?\d[\d.,]*(e[-+]?\d+)?|\d{1,4}([-/.])\d{1,2}\2\d{1,4}([ T]\d{1,2}:\d{2}[\d:.+Z]*)?", re.IGNORECASE
)
"""A number or a date."""
_FEWEST_ROWS = 4
"""Fewest rows from which a column counts as constant, or as empty in most rows."""
_NEARLY_ALL = 0.9
_MOST_ROWS = 2_000
"""Number of rows whose values are compared with each other."""
_CHANCE = 1e-6
"""Probability below which equal answers of equal values are no chance."""
_EXCEPTIONS = 0.02
"""Largest share of rows whose answer differs from the usual one of their value, such as a mistyped answer."""


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


class ClassColumns:
    """Find columns next to a text that may contain its class: by their names, or by few distinct short values.

    The values of other columns say which of them contain numbers or longer texts.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, str]] = []  # the short values of the first rows
        self._seen: dict[str, dict[str, None]] = {}  # the first distinct values per column, truncated
        self._filled: Counter[str] = Counter()  # number of rows with more than white space per column
        self._no_texts: dict[str, None] = {}  # columns of tables, and of lists other than lists of messages

    def add(self, values: Mapping[str, Any]) -> None:
        """Record the values of a row."""
        if len(self._rows) < _MOST_ROWS:
            texts = ((name, str(value)) for name, value in values.items() if value is not None)
            self._rows.append({name: text.strip() for name, text in texts if len(text) <= _LONGEST and text.strip()})
        for name, value in values.items():
            if value is not None:
                text = str(value)[: _LONGEST + 1]
                self._filled[name] += bool(text.strip())
                if _is_table(value) or (isinstance(value, list) and not any(map(_is_table, value))):
                    self._no_texts[name] = None
                if len(seen := self._seen.setdefault(name, {})) <= _MOST:
                    seen[text] = None

    def filled(self, name: str) -> bool:
        """Return True if a row has more than white space in this column."""
        return self._filled[name] > 0

    def complete(self, rows: int) -> list[str]:
        """Return the columns that have a value in nearly all of these rows."""
        return [name for name in self._seen if self._filled[name] >= _NEARLY_ALL * rows]

    def values(self, name: str) -> list[str]:
        """Return the first distinct values of a column."""
        return list(self._seen[name])

    def has_few(self, name: str) -> bool:
        """Return True if a column has few distinct values, which are short."""
        return len(self._seen[name]) <= _MOST and not self.has_long_texts(name)

    def has_decimals(self, name: str) -> bool:
        """Return True if nearly all first values of a column are numbers, and some are no integers."""
        values = [value for value in self._seen[name] if value.strip()]
        numbers = [value for value in values if number_of(value) is not None]
        return len(numbers) >= _NEARLY_ALL * len(values) and not all(map(is_integer, numbers))

    def has_long_texts(self, name: str) -> bool:
        """Return True if a value of a column is longer than the name of a class."""
        return max(map(len, self._seen.get(name, ())), default=0) > _LONGEST

    def uninformative(self, rows: int) -> set[str]:
        """Return the columns that a prompt need not contain.

        These are the constant columns, lists and tables, columns that determine the answer, and numbers and dates if
        other columns contain a text and an answer.
        """
        constant, classes = {*self.constant(rows), *self._no_texts}, self.names(rows)
        answer = class_of(classes) if classes else None
        others = [name for name in _usable(self._seen) if name not in constant and name != answer]
        texts = [name for name in others if not self._has_numbers(name)]
        constant.update(self.determining(answer, texts))
        return constant | ({*others} - {*texts}) if texts and len(texts) + len(classes[:1]) > 1 else constant

    def determining(self, answer: str | None, columns: Sequence[str]) -> list[str]:
        """Return the columns of repeating short values that each have one answer, [] if no other column remains.

        Such values are names to look up, next to which a text need not be read. Mistyped answers are exceptions: at
        most 2 % of the rows. If answers are independent of the column, n rows with so few exceptions have a probability
        of at most comb(n, exceptions) p^(repeats - exceptions). Here, p is the share of the most frequent answer.
        """
        answers = Counter(row[answer] for row in self._rows if answer in row) if answer is not None else Counter()
        found = []
        for name in columns if 1 < len(answers) <= _MOST else ():
            pairs = [
                (row[name], row[answer]) for row in self._rows if answer is not None and {name, answer} <= row.keys()
            ]
            counts = Counter(pairs)
            usual = {value: count for (value, _), count in sorted(counts.items(), key=lambda one: one[1])}
            repeats, exceptions = len(pairs) - len(usual), len(pairs) - sum(usual.values())
            most = max(answers.values()) / answers.total()
            chance = math.comb(len(pairs), exceptions) * most ** (repeats - exceptions)
            enough = len(usual) <= 2 * repeats and repeats >= len(self._rows) // 4
            if enough and exceptions <= _EXCEPTIONS * len(pairs) and chance < _CHANCE:
                found.append(name)
        return found if len(found) < len(columns) else []

    def _has_numbers(self, name: str) -> bool:
        values = [value for value in self._seen[name] if value.strip()]
        numbers = sum(bool(_NUMBER.fullmatch(value.strip())) for value in values)
        return bool(values) and numbers >= _NEARLY_ALL * len(values)

    def constant(self, rows: int) -> list[str]:
        """Return the columns with the same short value in all of these rows, or with none in most of them.

        There are none in very few rows.
        """
        constant = [
            name
            for name, seen in self._seen.items()
            if rows >= _FEWEST_ROWS and len(seen) == 1 and max(map(len, seen)) <= _LONGEST
        ]
        return list(dict.fromkeys(constant + self._sparse(rows)))

    def names(self, rows: int) -> list[str]:
        """Return the columns that may be classes. Each value must occur twice on average.

        Columns with gaps are first, and then columns of numbers, because the last one is the most likely class.
        """
        sparse, complete = set(self._sparse(rows)), set(self.complete(rows))
        found = [
            name
            for name, seen in self._seen.items()
            if name not in sparse
            and (
                (small := name.lower()) in CLASSES
                or (
                    small not in _ABOUT_ROWS | COUNTING
                    and 1 < sum(bool(value.strip()) for value in seen) <= min(_MOST, rows // 2)
                    and max(map(len, seen)) <= _LONGEST
                )
            )
        ]
        return sorted(found, key=lambda name: (name in complete, not self._has_numbers(name)))

    def _sparse(self, rows: int) -> list[str]:
        """Return the columns without a value in most of these rows. There are none in very few rows."""
        return [name for name in self._seen if rows >= _FEWEST_ROWS and 2 * self._filled[name] < rows]
