"""Rendering of templates to one HTML file. Scripts and styles are embedded, and all text is escaped.

The content security policy allows only the page's own scripts, by their digests, and no connections or frames. Even
text that was not escaped could neither run nor send data.
"""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from backhand.printing import duration
from backhand.reading import uploaded_name
from backhand.report.run_record import is_number
from backhand.runs.label_results import soft_target_words
from backhand.runs.summary import interval_of
from backhand.words import count_of, in_words, interval_range, interval_text, label_text

NOT_KNOWN = "–"
PAGE_SCRIPTS = ("vega.min.js", "page.js")


def render(
    template: str, values: Mapping[str, Any], *, scripts: Iterable[str] = PAGE_SCRIPTS, connect: str = "'none'"
) -> bytes:
    """Render a page as UTF-8. Lone surrogates, for example from file names, are escaped.

    Args:
        values: the template's values, including `title` and `charts`.
        connect: where the page may connect to, in the syntax of the policy.
    """  # fmt: skip
    sources = [_static(name) for name in scripts]
    page = environment().get_template(template).render(
        **values,
        style=Markup(_static("page.css")),
        scripts=[Markup(source) for source in sources],
        policy=_policy(sources, connect),
        version=version("backhand"),
    )  # fmt: skip
    return page.encode("utf-8", "backslashreplace")


@cache
def environment() -> Environment:
    """Return the template environment, which escapes every value except Backhand's own markup."""
    templates = Environment(
        loader=PackageLoader("backhand.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"figure": figure, "percent": percent, "place": place, "json": _json, "moment": moment}
    templates.filters |= {"time_taken": time_taken, "size": size, "count_of": count_of, "label_text": label_text}
    templates.filters |= {"interval_text": interval_text, "interval_range": interval_range, "interval_of": interval_of}
    templates.filters["soft_targets"] = soft_target_words
    templates.filters["worded"] = str  # the studio names its fields instead of commands
    templates.globals["studio"] = False
    templates.filters["shell"] = lambda value: shlex.quote(str(value))
    return templates


def _json(value: Any) -> Markup:
    """Return JSON that is safe inside a script element and contains no NaN."""
    return htmlsafe_json_dumps(value, allow_nan=False, separators=(",", ":"))


def _policy(scripts: Iterable[str], connect: str) -> str:
    digests = (base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; connect-src {connect}; "
        "base-uri 'none'; form-action 'none'"
    )


@cache
def _static(name: str) -> str:
    text = files("backhand.report").joinpath("static", name).read_text(encoding="utf-8")
    if "</script" in text or "<!--" in text:
        raise ValueError(f"{name} cannot be embedded in a script element")
    return text


def figure(value: object) -> str:
    """Format a number with four significant digits, None as a dash, and other values with `str`."""
    if value is None:
        return NOT_KNOWN
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    return f"{value:,.4g}"


def known(value: object, words: Callable[[float], str]) -> str:
    """Format a finite number with `words`, and any other value as a dash."""
    return words(value) if is_number(value) else NOT_KNOWN


percent = partial(known, words="{:.1%}".format)
time_taken = partial(known, words=duration)
size = partial(known, words=lambda value: in_words(int(value)))


def moment(text: object) -> str:
    """Format an ISO time as `24 November 2026, 22:11 UTC`; return any other text unchanged."""
    try:
        when = datetime.fromisoformat(str(text)).astimezone(UTC)
    except (ValueError, OverflowError):
        return str(text)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def place(source: object) -> str:
    """Format `/data/valid.jsonl:3` as `valid.jsonl, line 3`, with the name that an uploaded file had before.

    Any other text stays unchanged, also the row after the number.
    """
    file, colon, number = str(source).rpartition(":")
    line, space, row = number.partition(" ")
    if colon and line.isdecimal() and file:
        return f"{uploaded_name(Path(file))}, line {line}{space}{row}"
    name = uploaded_name(path := Path(str(source)))
    return str(source) if name == path.name else name
