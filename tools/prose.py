"""Check that the project's prose is plain, standard English: `make prose`, which `make check` runs.

python tools/prose.py                  # list every violation; exit 1 if there is one
python tools/prose.py --counts         # only the number of violations per rule
python tools/prose.py --tree PATH      # of another checkout, an older one too
python tools/prose.py src/backhand/ops # only these files or folders

Rules:

- summary: a docstring's first word is a verb in the imperative or begins a noun phrase. It is none of `FIRST_WORDS`.
- word: the phrases of `PHRASES` occur neither in code, comments and messages nor in pages. `ALLOWED` has exceptions.
- sentence: at most 35 words in docstrings and comments, at most 25 in pages. Formulas, tables and code do not count.
- paragraph: at most six lines in pages.
- docstring: every public function, class and method has one. A method needs none if a class of the package documents a
  method of the same name, because it implements that interface.

CHANGELOG.md and docs/log.md list single facts, so the rules for sentences and paragraphs do not apply to them.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE, PAGES = Path("src/backhand"), ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs")
LISTS = frozenset({"CHANGELOG.md", "docs/log.md"})
FIRST_WORDS = ("What", "Whether", "Of", "Those", "As", "All that", "That", "Where", "How", "Which", "Who", "For whom")
PHRASES = {
    "beside": r"besides?",
    "behind": "behind",
    "stand": r"(?:it|they|that|which|what|[a-z]+s?) stands?(?! for)|stands?(?! for| alone)",
    "told": "told",
    "so many": "so many",
    "begun": "begun",
    "so-manieth": r"so[- ]manieth",
    "in place of": "in place of",
    "none of which": "what none|none of which|by the ends of",
}
ALLOWED = (r"stand-ins?",)
LONGEST_SENTENCE, LONGEST_SENTENCE_IN_PAGES, LONGEST_PARAGRAPH = 35, 25, 6

_FIRST_WORDS = re.compile(rf"(?:{'|'.join(FIRST_WORDS)})\b")
_PHRASES = {
    name: re.compile(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", re.IGNORECASE) for name, pattern in PHRASES.items()
}
_ALLOWED = re.compile(rf"(?<![A-Za-z])(?:{'|'.join(ALLOWED)})(?![A-Za-z])", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?:;])[\"'`)”]*\s+(?=[A-Z`*(\[\"'“])")
_ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|cf|vs|eq|no|Sec|Fig|et al)\.\s")
_INLINE_CODE, _LINK = re.compile(r"`[^`]*`"), re.compile(r"\[([^\]]*)\]\([^)]*\)")
_NO_PROSE = ("```", "#", "|", "<!--", "![")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Note|Example|Examples):")


class Violation(NamedTuple):
    """One place that breaks a rule."""

    path: Path
    line: int
    rule: str
    text: str


def check(tree: Path, only: Iterable[Path] = ()) -> list[Violation]:
    """Return the violations of every rule in a checkout, in the order of files and lines.

    Args:
        tree: the root of the checkout.
        only: files or folders to check instead of all, relative to the root.
    """
    chosen = tuple(only)
    files = [*sorted((tree / PACKAGE).rglob("*.py")), *sorted((tree / "tools").rglob("*.py"))]
    for page in PAGES:
        files += sorted((tree / page).rglob("*.md")) if (tree / page).is_dir() else [tree / page]
    violations: list[Violation] = []
    documented = frozenset(_documented_methods(tree))
    for path in files:
        relative = path.relative_to(tree)
        if relative == Path("tools/prose.py") or (chosen and not any(relative.is_relative_to(one) for one in chosen)):
            continue
        text = path.read_text(encoding="utf-8")
        violations += _words(relative, text)
        found = _python(relative, text, documented) if path.suffix == ".py" else _page(relative, text)
        violations += found
    return sorted(violations, key=lambda violation: (violation.path, violation.line, violation.rule))


def _words(path: Path, text: str) -> Iterator[Violation]:
    for number, line in enumerate(text.splitlines(), start=1):
        line = _ALLOWED.sub(lambda match: " " * len(match.group()), line)
        for name, pattern in _PHRASES.items():
            for _ in pattern.finditer(line):
                yield Violation(path, number, "word", f"{name}: {line.strip()}")


def _python(path: Path, text: str, documented: frozenset[str]) -> Iterator[Violation]:
    module = ast.parse(text)
    for node in ast.walk(module):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        line = node.body[0].lineno
        if _FIRST_WORDS.match(docstring):
            yield Violation(path, line, "summary", docstring.splitlines()[0])
        yield from _long_sentences(path, line, _docstring_paragraphs(docstring), LONGEST_SENTENCE)
    for line, comment in _comments(text):
        yield from _long_sentences(path, line, [(0, comment)], LONGEST_SENTENCE)
    yield from _undocumented(path, module, documented)


def _undocumented(path: Path, module: ast.Module, documented: frozenset[str]) -> Iterator[Violation]:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if not isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                if method.name.startswith("_") or method.name in documented or ast.get_docstring(method):
                    continue
                yield Violation(path, method.lineno, "docstring", f"{node.name}.{method.name} has none")


def _documented_methods(tree: Path) -> Iterator[str]:
    for path in (tree / PACKAGE).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(method):
                        yield method.name


def _docstring_paragraphs(docstring: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the prose in a docstring; skip formulas, drawings and the first words of a section."""
    start, lines, in_section = 0, list[str](), False
    for number, line in enumerate([*docstring.splitlines(), ""]):
        indent = len(line) - len(line.lstrip())
        in_section = bool(_SECTION.match(line)) or (in_section and (indent > 0 or not line.strip()))
        formula = indent >= 4 and not in_section
        if not line.strip() or formula or _SECTION.match(line) or line.lstrip().startswith(("- ", "* ", "|")):
            if lines:
                yield start, " ".join(lines)
            lines = []
        elif in_section and re.match(r"\s+[\w`*, ]+: ", line) and lines:
            yield start, " ".join(lines)
            lines = []
        if line.strip() and not formula and not _SECTION.match(line) and not line.lstrip().startswith("|"):
            start = start if lines else number
            lines.append(re.sub(r"^\s*(?:[-*] )?", "", line))


def _comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every block of comment lines."""
    block: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, comment = token.start[0], token.string.lstrip("#:! ")
        alone = token.line.strip().startswith("#")
        if block and not (alone and line == last + 1):
            yield start, " ".join(block)
            block = []
        if not alone:
            yield line, comment
            continue
        start, last = (start if block else line), line
        block.append(comment)
    if block:
        yield start, " ".join(block)


def _page(path: Path, text: str) -> Iterator[Violation]:
    if path.as_posix() in LISTS:
        return
    lines, start, fenced = list[str](), 0, False
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        breaks = not line.strip() or fenced or line.startswith("    ") or line.lstrip().startswith(_NO_PROSE)
        item = re.match(r"\s*(?:[-*]|\d+\.) ", line)
        if (breaks or item) and lines:
            yield from _long_sentences(path, start, [(0, " ".join(lines))], LONGEST_SENTENCE_IN_PAGES)
            if len(lines) > LONGEST_PARAGRAPH:
                yield Violation(path, start, "paragraph", f"{len(lines)} lines")
            lines = []
        if not breaks:
            start = start if lines else number
            lines.append(re.sub(r"^\s*(?:[-*]|\d+\.) ", "", line).strip())


def _long_sentences(path: Path, line: int, paragraphs: Iterable[tuple[int, str]], longest: int) -> Iterator[Violation]:
    for offset, paragraph in paragraphs:
        text = _LINK.sub(r"\1", _INLINE_CODE.sub("Code", paragraph))
        text = _ABBREVIATIONS.sub(r"\1 ", text)
        for sentence in _SENTENCE_END.split(text):
            words = [word for word in sentence.split() if re.search(r"[A-Za-z]", word)]
            if len(words) > longest:
                yield Violation(path, line + offset, "sentence", f"{len(words)} words: {' '.join(words[:12])} …")


def main() -> int:
    """Print the violations, or their number per rule. Return 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", type=Path, help="files or folders to check instead of all")
    parser.add_argument("--tree", type=Path, default=PROJECT, help="the root of the checkout")
    parser.add_argument("--counts", action="store_true", help="print only the number of violations per rule")
    options = parser.parse_args()
    violations = check(options.tree.resolve(), options.only)
    counts: Counter[str] = Counter()
    for violation in violations:
        counts[violation.rule] += 1
        if violation.rule == "word":
            counts[f"word {violation.text.partition(':')[0]}"] += 1
        if not options.counts:
            print(f"{violation.path}:{violation.line}: {violation.rule}: {violation.text}")
    for rule, count in sorted(counts.items()):
        print(f"{count:6,} {rule}")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
