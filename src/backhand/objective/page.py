"""An objective on the studio's page: its title, the columns that it reads, and the options of its fields.

This module imports no torch and no NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol


class Role(NamedTuple):
    """A column that an objective reads."""

    name: str  # `prompt` and `completion` have options of their own; any other name is one of `--columns`
    label: str
    optional: bool = False  # rows need no such column


QUESTION = Role("prompt", "Question")


class Fields(Protocol):
    """The fields of the form, as far as a page reads them."""

    def get(self, name: str) -> str:
        """Return a field, "" if it is empty."""
        ...

    def number(self, name: str) -> str:
        """Return a number as the command line reads it. Raises UsageError."""
        ...

    def refused(self, field: str, what: str, next_step: str) -> Exception:
        """Return the error of a field that is not possible."""
        ...


class FirstColumns:
    """The columns of the first rows of a file.

    Args:
        columns: all names in their order.
        classes: names of columns with few, repeating values, which may be answers.
        texts: names of columns with texts to read.
        rows: the rows, by column.
    """

    def __init__(
        self, columns: Sequence[str], classes: Sequence[str], texts: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        self.columns, self.classes, self.texts, self.rows = columns, classes, texts, rows

    @cached_property
    def small(self) -> dict[str, str]:
        """The names by themselves in lower case."""
        return {column.strip().lower(): column for column in self.columns}

    @property
    def others(self) -> list[str]:
        """The texts that are no classes."""
        return [column for column in self.texts if column not in self.classes]

    def values(self, column: str) -> list[Any]:
        """Return the values of a column, without empty ones."""
        return [row[column] for row in self.rows if row.get(column) not in (None, "")]


class Fit(NamedTuple):
    """Columns that fit an objective."""

    certainty: int  # the objective with the largest one is suggested
    columns: Mapping[str, str] = {}  # by role; columns that are recognised by their names are left out


class Page:
    """An objective on the page. The methods of this class are those of an objective that answers prompts.

    Attributes:
        title: a short name, a colon, and a description.
        roles: the columns that it reads.
        fields: template of further fields in which the rows are chosen, or "".
        reads: options outside the section `objective` that not all objectives read.
        fits_encoders: an encoder without a language-model head can learn it.
        lint_rows: kind of rows that are checked; "" for that of the objective.
        text_option: option of the text of a row.
        needs_held_out: a run without held-out rows measures nothing.
        document_note: explanation of the number of documents, with a space in front.
        command: command that answers a prompt, or "" if the page has none.
        asked: column of a prompt on standard input, and the options of the command that read it.
        answering: sentence on the answers, and the words of the button.
        compares: the page asks for two texts, which are compared.
    """

    title = ""
    roles: tuple[Role, ...] = ()
    fields = ""
    reads: tuple[str, ...] = ()
    fits_encoders = False
    lint_rows = ""
    text_option = "prompt"
    needs_held_out = True
    document_note = ""
    command = "generate"
    asked: tuple[str, ...] = ("prompt",)
    answering = ("Base model and adapter answer, one after the other.", "Ask both")
    compares = False

    def fits(self, first: FirstColumns) -> Fit | None:  # noqa: ARG002
        """Return the columns that fit, or None if they do not suggest this objective."""
        return None

    def column_words(self, fields: Fields) -> list[str]:
        """Return the options of the columns. Raises UsageError: they are incomplete."""
        given = {role.name: chosen(fields, role.name) for role in self.roles}
        columns = {name: text for name, text in self.named(given).items() if text}
        own = ("prompt", "completion")
        return [f"--{name}={text}" if name in own else f"--columns={name}={text}" for name, text in columns.items()]

    def named(self, given: Mapping[str, str]) -> Mapping[str, str]:
        """Return the columns by the names that the rows have for them."""
        return given

    def column_fields(self) -> list[str]:
        """Return the names of the fields of columns."""
        return [role.name for role in self.roles]

    def words(self, fields: Fields, context: Any) -> list[str]:  # noqa: ARG002
        """Return the options of further fields. Raises UsageError: one is missing.

        Args:
            context: returns the path of a long text by its name.
        """
        return []

    def numbers(self) -> tuple[str, ...]:
        """Return the further fields that are numbers."""
        return ()

    def asking(self, words: Sequence[str], prompt: str) -> list[str] | None:  # noqa: ARG002
        """Return the words of `command` for a prompt, or None to generate an answer.

        Args:
            words: the options of model and adapter.
        """
        return None


def chosen(fields: Fields, name: str) -> str:
    """Return the column of a role: the typed text, or the chosen name."""
    return fields.get(f"typed_{name}") or fields.get(name)
