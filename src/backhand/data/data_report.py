"""Statistics of prepared rows, for the user and for `lint`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from backhand.errors import DataError
from backhand.words import count_of


@dataclass(frozen=True)
class SourceForm:
    """A file or hub data set, the form of its rows, and the number of its valid rows."""

    source: str
    form: str
    rows: int


@dataclass(frozen=True)
class DataReport:
    """Statistics of prepared rows. Each count is a number of rows unless its name says otherwise.

    Attributes:
        sources: the form detected in each file.
        rows: valid rows, without those that were left out.
        documents: documents in use. They outnumber the rows if a conversation became several documents.
        tokens, supervised_tokens: totals of the documents in use. No token of vectors, rankings and classes counts as
            supervised, since their loss is not one of tokens.
        longest: number of tokens of the longest document in use.
        truncated, dropped_long: documents cut to `max_length`, or left out because of it.
        dropped_unsupervised: documents left out because they have no supervised token.
        cut_unit: the noun for what these three count: rows, if a row is used or left out as a whole.
        first_cut: location of the first document of each of these three kinds, or "".
        option_rows: rows added to those of decisions, whose text is the name of an option. They count in `rows`.
        empty_answers: rows with an answer of only white space.
        skipped_bad: malformed rows left out under `skip_bad`.
        repeated: held-out rows that also occur in the training data.
        system: the system message, if all rows have the same one; else None.
        bare: True if all rows were texts without a chat template and without control tokens.
        notes: other information for the user, one sentence each.
    """

    sources: tuple[SourceForm, ...] = ()
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    dropped_long: int = 0
    dropped_unsupervised: int = 0
    cut_unit: str = "document"
    first_cut: tuple[str, str, str] = ("", "", "")
    option_rows: int = 0
    empty_answers: int = 0
    skipped_bad: int = 0
    bad_rows: tuple[DataError, ...] = ()
    system: str | None = None
    bare: bool = False
    empty_rows: int = 0
    repeated: int = 0
    notes: tuple[str, ...] = ()

    def lines(self, unit: str = "document") -> list[str]:
        """Return the report as text, one fact per line. Documents without targets have no supervised tokens."""
        lines = [f"{form.source}: {form.form}, {count_of(form.rows, 'row')}" for form in self.sources]
        counts = unit == "document" and self.supervised_tokens
        supervised = "" if not counts else f"{self.supervised_tokens:,} of them supervised, "
        lines.append(
            f"{self.size(unit)} with {count_of(self.tokens, 'token')}, {supervised}the longest {self.longest:,}"
        )
        return [*lines, *self.left_out(), *self.notes]

    def size(self, unit: str) -> str:
        """Return the number of documents, and the number of their rows if rows have several documents."""
        rows = f" of {count_of(self.rows, 'row')}" if self.documents > self.rows > 0 else ""
        return f"{count_of(self.documents, unit)}{rows}"

    @property
    def kept(self) -> int:
        """Number of rows, or of documents where these are left out one by one, without those that were added."""
        return self.rows - self.option_rows if self.cut_unit == "row" else self.documents

    def too_long(self, *others: DataReport) -> str | None:
        """Return a clause on what was left out as longer than `max_length`, also of other reports; None for nothing."""
        reports = (self, *others)
        if not (long := sum(one.dropped_long for one in reports)):
            return None
        given = sum(one.kept for one in reports) + long + sum(one.dropped_unsupervised for one in reports)
        verb = "is" if long == 1 else "are"
        return f"{long:,} of {count_of(given, self.cut_unit)} {verb} longer than --max-length and left out"

    def left_out(self) -> list[str]:
        """Return one line per reason for which documents or rows were cut or left out."""
        counted = (
            (self.truncated, "truncated to max_length"),
            (self.dropped_long, "longer than max_length, left out"),
            (self.dropped_unsupervised, "without a supervised token, left out"),
        )
        lines = [
            f"{count_of(count, self.cut_unit)} {what}"
            + (f": {place}" if count == 1 else f", the first: {place}") * bool(place)
            for (count, what), place in zip(counted, self.first_cut, strict=True)
            if count
        ]
        return lines + rows_left_out(self.skipped_bad, self.bad_rows, self.empty_rows)


def rows_left_out(malformed: int, errors: Sequence[DataError], empty: int) -> list[str]:
    """Return a line on malformed rows, of which `errors` are the first, and one on rows without a value."""
    lines = []
    if malformed:
        lines.append(f"{count_of(malformed, 'malformed row')} left out, the first: {errors[0].one_line}")
    if empty:
        lines.append(f"{count_of(empty, 'row')} without a value left out")
    return lines


@dataclass
class TruncationStats:
    """Locations of the documents that were cut or left out; a row may occur once per document.

    Attributes:
        needed: the smallest `max_length` that would keep each document of `dropped_long`.
    """

    truncated: list[str] = field(default_factory=list)
    dropped_long: list[str] = field(default_factory=list)
    dropped_unsupervised: list[str] = field(default_factory=list)
    needed: list[int] = field(default_factory=list)

    def drop(self, source: str, needed: int) -> None:
        """Record a document that is left out because it is too long."""
        self.dropped_long.append(source)
        self.needed.append(needed)

    def of_rows(self) -> TruncationStats:
        """Return the locations of rows, each with the worst that happened to one of its documents."""
        long, unsupervised = dict.fromkeys(self.dropped_long), dict.fromkeys(self.dropped_unsupervised)
        left_out = long | unsupervised
        return TruncationStats(
            [source for source in dict.fromkeys(self.truncated) if source not in left_out],
            [*long],
            [source for source in unsupervised if source not in long],
            self.needed,
        )

    @property
    def firsts(self) -> tuple[str, str, str]:
        """The first location of each kind, or ""."""
        kinds = self.truncated, self.dropped_long, self.dropped_unsupervised
        one, other, third = (next(iter(all_), "") for all_ in kinds)
        return one, other, third

    def add(self, other: TruncationStats) -> None:
        """Append the locations of `other`."""
        self.truncated += other.truncated
        self.dropped_long += other.dropped_long
        self.dropped_unsupervised += other.dropped_unsupervised
        self.needed += other.needed
