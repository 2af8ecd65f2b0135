"""Templates to one HTML file: everything embedded, every text escaped, and a policy that lets nothing else run.

The policy allows exactly the scripts that stand in the page, by their digests, no connection and no frame; so even a
text that got past the escaping could neither run nor call home.
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
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from backhand.adapters.peft_saving import pretrained_arguments
from backhand.data.options import system_option
from backhand.report.run_record import is_number
from backhand.words import count_of, duration, in_words

NOT_KNOWN = "–"
PAGE_SCRIPTS = ("vega.min.js", "page.js")


def render(
    template: str, values: Mapping[str, Any], *, scripts: Iterable[str] = PAGE_SCRIPTS, connect: str = "'none'"
) -> bytes:
    """A page as UTF-8; what UTF-8 cannot hold, such as half a surrogate pair in a file name, is written out.

    Args:
        values: what it shows; `title` and `charts` among them.
        connect: where the page may connect to, as its policy says it.
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
    """The templates, with every value escaped that is not markup of our own."""
    found = Environment(
        loader=PackageLoader("backhand.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"figure": figure, "percent": percent, "place": place, "json": _json, "moment": moment}
    found.filters |= {"time_taken": time_taken, "size": size, "count_of": count_of}
    found.filters |= {"pretrained": pretrained_arguments, "system_option": system_option}
    found.filters |= {"repr": repr, "shell": lambda value: shlex.quote(str(value))}
    return found


def _json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in, and holds no NaN."""
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
        raise ValueError(f"{name} cannot stand inside a script element")
    return text


def figure(value: object) -> str:
    """A number with four significant digits; other values as they are, None as a dash."""
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
    """A number in these words, or a dash where it is none."""
    return words(value) if is_number(value) else NOT_KNOWN


percent = partial(known, words="{:.1%}".format)
time_taken = partial(known, words=duration)
size = partial(known, words=lambda value: in_words(int(value)))


def moment(text: object) -> str:
    """A time in ISO form as `24 November 2026, 22:11 UTC`; any other text as it is."""
    try:
        when = datetime.fromisoformat(str(text)).astimezone(UTC)
    except (ValueError, OverflowError):
        return str(text)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def place(source: object) -> str:
    """`valid.jsonl, line 3` for `/data/valid.jsonl:3`; a place of another form as it is."""
    file, colon, number = str(source).rpartition(":")
    return f"{PurePath(file).name}, line {number}" if colon and number.isdecimal() and file else str(source)
