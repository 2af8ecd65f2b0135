"""An op's docstring as a page: its prose as Markdown, its indented lines as set formulas.

The docstrings are written for an editor: Unicode mathematics in indented lines, columns made of spaces. This file
parses only that form and leaves unknown text unchanged. A formula becomes a row of three columns: left side, right
side, and remarks (shapes, sources).
"""

from __future__ import annotations

import re
from html import escape

# A note is set off from its formula by at least four spaces, a source also by fewer.
_COLUMN_GAP = re.compile(r" {4,}| {2,}(?=\[arXiv)")
_LABEL = re.compile(r"(\w+) {3,}(?=\S)")
_ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")
_INDENT = 4
# Names that carry an index; any other word with an underscore is a name of the code.
_INDEXED_WORDS = {"softmax", "logsumexp", "mean", "Σ", "onehot"}
_LETTER = "A-Za-zα-ωΑ-ΡΤ-Ωℓ"
_TOKEN = re.compile(
    rf"(?P<possessive>'s\b)|(?P<code>[a-z]{{2,}}_\w+)|(?P<differential>d(?=[{_LETTER}](?![{_LETTER}])))|(?P<word>[{_LETTER}]{{2,}})"
    rf"|(?P<letter>[{_LETTER}](?:[\u0300-\u036f′]|'(?![{_LETTER}]))*)|(?P<sub>_)|(?P<sup>\^)|(?P<other>.)"
)


def derivation(docstring: str) -> str:
    """The docstring without its first line, as Markdown with the formulas as HTML tables."""
    parts: list[str] = []
    for paragraph in docstring.split("\n\n")[1:]:
        parts += _paragraph(paragraph.splitlines())
    return "\n\n".join(parts)


def _paragraph(lines: list[str]) -> list[str]:
    """Runs of prose and runs of set lines, in order."""
    parts: list[str] = []
    prose: list[str] = []
    formulas: list[str] = []
    for line in [*lines, ""]:
        label = _LABEL.match(line)
        is_set = line.startswith(" " * _INDENT) or label is not None
        if formulas and (not is_set or label):
            parts.append(_table(formulas))
            formulas = []
        if label:
            prose.append(f"**{label[1]}**")
            line = " " * _INDENT + line[label.end() :]
        if is_set and prose:
            parts.append(_prose(prose))
            prose = []
        if is_set:
            formulas.append(line.strip())
        elif line:
            prose.append(line)
    return [*parts, _prose(prose)] if prose else parts


def _prose(lines: list[str]) -> str:
    """Lines of text as Markdown: only `code` is markup there, everything else stands for itself."""
    pieces = re.split(r"(`[^`]*`|\*\*\w+\*\*)", " ".join(line.strip() for line in lines))
    text = "".join(piece if piece.startswith(("`", "**")) else _linked(_indices(_plain(piece))) for piece in pieces)
    return re.sub(r"^(Backward\.|Saved:|Measured)", r"**\1**", text)


def _plain(text: str) -> str:
    return re.sub(r"([\\*\[\]#])", r"\\\1", escape(text, quote=False))


def _indices(text: str) -> str:
    """x_i and e_{i_t} in prose as indices; d_y and other names of the code, and what else holds `_`, stay."""

    def index(match: re.Match[str]) -> str:
        return match[0] if match[1] == "d" else f"{match[1]}<sub>{_indices(match[3] or match[2])}</sub>"

    replaced = re.sub(r"(?<!\w)([^\W\d_])_(\w\b|\{([^}]*)\})", index, text)
    return re.sub(r"(?<![<\w])_|_(?!\w)|(?<=\w)_(?=\w)", r"\\_", replaced)


def _linked(text: str) -> str:
    """Each arXiv number as a link."""
    return _ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", text)


def _table(formulas: list[str]) -> str:
    rows = "\n".join(_row(formula) for formula in formulas)
    return f'<table class="formulas">\n{rows}\n</table>'


def _row(formula: str) -> str:
    left, equals, right = _at_first_equals(formula)
    if not equals:
        text, notes = _notes(formula)
        return f'<tr><td colspan="2">{typeset(text)}</td>{notes}</tr>'
    text, notes = _notes(right)
    return f"<tr><td>{typeset(left)}</td><td>{equals} {typeset(text)}</td>{notes}</tr>"


def _at_first_equals(formula: str) -> tuple[str, str, str]:
    """Left side, the sign, right side; the sign empty where there is none outside of all brackets."""
    depth = 0
    for place, letter in enumerate(formula):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == "=" and depth == 0:
            plus = formula[place - 1] == "+"
            return formula[: place - plus].rstrip(), "+=" if plus else "=", formula[place + 1 :].strip()
    return "", "", formula


def _notes(text: str) -> tuple[str, str]:
    formula, *notes = _COLUMN_GAP.split(text)
    shown = " &emsp; ".join(_note(note) for note in notes)
    return formula, f"<td>{shown}</td>"


def _note(note: str) -> str:
    if "arXiv" in note:
        return _ARXIV.sub(r'<a href="https://arxiv.org/abs/\1">\1</a>', escape(note, quote=False))
    return typeset(note)


def typeset(formula: str) -> str:
    """One formula as HTML: single letters italic, words upright, `_` and `^` as indices and exponents."""
    out: list[str] = []
    rest = formula.strip()
    while rest:
        match = _TOKEN.match(rest)
        assert match is not None  # the last alternative takes any character
        kind, text = match.lastgroup, match[0]
        if kind == "code" and text.split("_", 1)[0] in _INDEXED_WORDS:
            kind, text = "word", text.split("_", 1)[0]
        rest = rest[len(text) :]
        if kind in ("sub", "sup") and out and rest and not rest[0].isspace():
            argument, rest = _argument(rest)
            out.append(f"<{kind}>{typeset(argument)}</{kind}>")
        elif kind == "letter":
            out.append(f"<i>{escape(text, quote=False)}</i>")
        elif kind == "code":
            out.append(f"<code>{escape(text, quote=False)}</code>")
        else:
            out.append(escape(text, quote=False))
    return re.sub(r" {2,}", " &ensp; ", "".join(out))


def _argument(rest: str) -> tuple[str, str]:
    """Split off the argument of an `_` or `^`: a group in braces or parentheses, or the next word or letter."""
    closing = {"{": "}", "(": ")"}.get(rest[0])
    if closing is None:
        match = re.match(rf"[{_LETTER}\d]+", rest) or re.match(r".", rest)
        assert match is not None
        return match[0], rest[match.end() :]
    depth = 0
    for place, letter in enumerate(rest):
        depth += letter == rest[0]
        depth -= letter == closing
        if depth == 0:
            return rest[1:place], rest[place + 1 :]
    return rest, ""
