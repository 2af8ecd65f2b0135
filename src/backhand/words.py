"""Text for people: numbers, durations, sizes, shortened texts and similar names."""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from backhand.printing import bounded, reworded, say

SHOWN_CHARACTERS = 60


def shorten(text: str, characters: int = SHOWN_CHARACTERS) -> str:
    """Return at most `characters` of `text`, ending with an ellipsis if it was cut."""
    return text if len(text) <= characters else text[: characters - 1] + "…"


def label_text(label: str) -> str:
    """Return a label for a list of labels: shortened, and in quotes if it contains the comma of the list."""
    return shown(label) if "," in label else shorten(label)


def shown(value: object) -> str:
    """Return the value of an option as an error quotes it, shortened."""
    return repr(shorten(value)) if isinstance(value, str) else shorten(repr(value))


def short_repr(result: object, names: Iterable[str]) -> str:
    """Return a result's fields that are set, without collections: of some results, their full repr fills pages."""
    values = {name: getattr(result, name) for name in names}
    given = {name: value for name, value in values.items() if value or type(value) in (int, float)}
    short = [f"{name}={value!r}" for name, value in given.items() if not isinstance(value, (dict, list, tuple))]
    return f"{type(result).__name__}({', '.join([*short, *['…'] * (len(short) < len(given))])})"


def with_article(noun: str) -> str:
    """Return the name of a kind with "a" or "an" in front of it."""
    return f"{'an' if noun[:1] in set('aeioAEIO') else 'a'} {noun}"


def count_of(count: float, what: str) -> str:
    """Return the number with its noun, in the plural unless the number is 1."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def signed(value: float, digits: int) -> str:
    """Format a change with its sign and this number of decimals. One that they would round to 0 has one digit."""
    text = f"{value + 0.0:+.{digits}f}"
    return f"{value:+.1g}" if value and not float(text) else text


_MORE_DIGITS = 4


def apart(one: float, other: float, digits: int) -> tuple[str, str]:
    """Format two numbers with this number of decimals, and with up to 4 more if they would look the same.

    Numbers that even these do not tell apart are equal for the reader.
    """
    shown = ((f"{one:z,.{more}f}", f"{other:z,.{more}f}") for more in range(digits, digits + _MORE_DIGITS + 1))
    return next((pair for pair in shown if pair[0] != pair[1]), (f"{one:z,.{digits}f}", f"{other:z,.{digits}f}"))


def percent(share: float) -> str:
    """Format a share from 0 to 1, with the decimals that tell a small one from 0 % and a large one from 100 %."""
    rest = min(share, 1 - share)
    digits = max(0, min(6, math.ceil(-math.log10(rest)) - 2)) if rest > 0 else 0
    return f"{100 * share:.{digits}f}%"


def capitalized(clause: str) -> str:
    """Return a clause as a sentence."""
    return f"{upper_first(clause)}."


def upper_first(text: str) -> str:
    """Return a text with an upper-case first letter, unless the second one is upper case, as in nDCG."""
    return text if text[1:2].isupper() else f"{text[:1].upper()}{text[1:]}"


def share_interval(share: float, rows: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share that was measured on `rows` independent rows.

    centre = (p + z²/2n) / (1 + z²/n),   half width = z √(p (1 - p)/n + z²/4n²) / (1 + z²/n),   z = 1.96

    Without rows, nothing is known about the share: the interval is 0 to 1.
    """
    if rows < 1:
        return 0.0, 1.0
    share = min(1.0, max(0.0, share))
    scale = 1 + _Z**2 / rows
    centre = (share + _Z**2 / (2 * rows)) / scale
    half = _Z * math.sqrt(share * (1 - share) / rows + (_Z / (2 * rows)) ** 2) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


_Z = 1.96
"""A standard normal variable is within ±1.96 with a probability of 95 %."""


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of at least two values and its 95 % interval, mean ± t · deviation / √n.

    t is the quantile of Student's distribution with n - 1 degrees of freedom, 12.7 for two values and 1.96 for many.
    Equal values have no deviation, although other rows may differ from them. They count as a share of 100 %: the
    values of the other rows, of which there may be as many as Wilson's interval allows, have the opposite sign.
    """
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    half = _student_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    if half > _ROUNDING * abs(mean):
        return mean, mean - half, mean + half
    least = mean * (2 * share_interval(1.0, len(values))[0] - 1)
    return mean, min(mean, least), max(mean, least)


def difference_interval(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return Welch's 95 % interval of the difference of the means of two independent samples of at least two values.

    Without any deviation, it is the difference of the bounds of `mean_interval`.
    """
    parts = [(statistics.variance(values) / len(values), len(values) - 1) for values in (one, other)]
    difference, total = statistics.fmean(one) - statistics.fmean(other), sum(part for part, _ in parts)
    if math.sqrt(total) <= _ROUNDING * abs(difference):
        (_, low, high), (_, other_low, other_high) = mean_interval(one), mean_interval(other)
        return low - other_high, high - other_low
    freedom = int((1 + _ROUNDING) * total**2 / sum(part**2 / degrees for part, degrees in parts))
    half = _student_quantile(max(1, freedom)) * math.sqrt(total)
    return difference - half, difference + half


_ROUNDING = 1e-9
"""A deviation of a smaller share of the mean is due to rounding."""


def _student_quantile(freedom: int) -> float:
    """Return the bound within which Student's t with these degrees of freedom lies with a probability of 95 %.

    With many degrees, it is the Cornish-Fisher expansion t = z + (z³ + z)/4ν + (5z⁵ + 16z³ + 3z)/96ν².
    """
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    return _Z + (_Z**3 + _Z) / (4 * freedom) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)


_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The quantile of 97.5 % of Student's distribution with 1, 2, … degrees of freedom."""


def interval_text(share: float, rows: int) -> str:
    """Format the interval of a share, such as `95 % interval 75–98 %`."""
    return f"95 % interval {interval_range(share, rows)}"


def interval_range(share: float, rows: int) -> str:
    """Format the 95 % interval of a share without its name, such as `75–98 %`."""
    low, high = share_interval(share, rows)
    return f"{100 * low:.0f}–{100 * high:.0f} %"


def in_words(size: int) -> str:
    """Format a number of bytes, such as `12 KiB`, `812 MiB` or `3.4 GiB`."""
    if size < 2**20:
        return f"{-(-size // 2**10)} KiB"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def finite_or_none(value: Any) -> Any:
    """Return None for a float that is not finite, which strict JSON cannot represent, and any other value unchanged."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def begin_alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the longest common prefix of two texts, or of two sequences."""
    both = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))


_MAX_COMPARED = 2000


def nearest_names(name: str, candidates: Iterable[str], *, count: int = 3, cutoff: float = 0.5) -> list[str]:
    """Return up to `count` candidates that are most similar to `name`, best first.

    The last part of a dotted path is a candidate of its own. Only the first 2000 distinct candidates are compared,
    since the cost grows with their number.
    """
    known = list(dict.fromkeys(candidates))[:_MAX_COMPARED]
    if "." not in name:
        known = list(dict.fromkeys([*(candidate.rpartition(".")[2] for candidate in known), *known]))
    return difflib.get_close_matches(name[:300], known, n=count, cutoff=cutoff)


def name_list(names: Iterable[str], *, limit: int = 8) -> str:
    """Join names for an error message: at most `limit` of them, and the number of the others."""
    given = list(names)
    shown = ", ".join(given[:limit])
    return shown if len(given) <= limit else f"{shown} and {len(given) - limit} more"


def show_notes(notes: Iterable[str]) -> None:
    """Print each note on a line of standard error."""
    say(*(bounded(labelled(note)) for note in notes))


def labelled(note: str) -> str:
    """Prefix a note in the words of the caller. Forced actions are marked as warnings."""
    return f"{'WARNING' if ' by force: ' in note else 'note'}: {reworded(note)}"
