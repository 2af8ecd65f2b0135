"""Every code block of README.md, CONTRIBUTING.md and docs/, as a Markdown parser sees it: fenced and indented ones."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

PROJECT = Path(__file__).parents[2]
_SHELL_SIGNS = {"|", "<", "<<<", ">", ">>", "&&", "&"}
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(PROJECT)) for path in PROJECT.glob("docs/**/*.md")),
)


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        page: its file, from the project's root.
        line: where it begins.
        language: the first word after the fence; empty for none, and for indented blocks.
        title: the file name that its fence gives it, as in `jsonl title="rows.jsonl"`, or empty.
        text: its contents.
    """

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def first_line(self) -> str:
        """What names it within its page: its first line, white space collapsed."""
        return " ".join(self.text.strip().splitlines()[0].split())

    @property
    def place(self) -> str:
        """For a reader: page and line."""
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> str:
        """The lines to type: all of a shell block, and those after a console's prompt."""
        if self.language == "console":
            return "".join(line[2:] for line in self.text.splitlines(keepends=True) if line.startswith("$ "))
        return self.text if self.language == "sh" else ""

    @property
    def output(self) -> list[str]:
        """What a console block shows as printed."""
        return (
            [line for line in self.text.splitlines() if not line.startswith("$ ")] if self.language == "console" else []
        )

    @property
    def command_lines(self) -> list[list[str]]:
        """The words of each line that runs backhand, comments and continuations undone."""
        lines = self.commands.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines if line.startswith("backhand ")]
        return [list(itertools.takewhile(lambda word: word not in _SHELL_SIGNS, line[1:])) for line in words]


def blocks(page: str) -> list[Block]:
    """The blocks of one page, in order."""
    return parse(page, (PROJECT / page).read_text(encoding="utf-8"))


def parse(page: str, text: str) -> list[Block]:
    """The blocks of a text, in order; those of lists and quotes included."""
    found: list[Block] = []
    for token in MarkdownIt().parse(text):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            language, _, rest = token.info.partition(" ")
            title = rest.removeprefix('title="').removesuffix('"') if rest.startswith('title="') else ""
            found.append(Block(page, token.map[0] + 1, language, title, token.content))
    return found
