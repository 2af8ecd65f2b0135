"""Templates to one HTML file: everything embedded, every text escaped, and a policy that lets nothing else run.

The policy allows exactly the scripts that stand in the page, by their digests, no connection and no frame; so even a
text that got past the escaping could neither run nor call home.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from backhand.report.words import figure, percent, place

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
    found.filters |= {"figure": figure, "percent": percent, "place": place, "json": _json}
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
