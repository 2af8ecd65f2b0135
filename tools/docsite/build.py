"""Put the site together: `python -m tools.docsite.build` fills build/site/pages and build/site/zensical.toml.

Every docs/*.md is a page; a page that the navigation below does not list is under "Guides". Links that leave
docs/ are turned to the page of the same thing: an op's file to its derivation, other files to their bare name.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from tools.docsite.command_pages import command_pages, toml_page
from tools.docsite.error_page import error_page
from tools.docsite.op_pages import op_pages
from tools.docsite.python_page import python_page

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = PROJECT / "src" / "backhand"
DOCS = PROJECT / "docs"
HERE = Path(__file__).parent

# Hand-written pages with a place of their own; every other one is a guide.
START = ("start.md",)
BY_HAND = ("by_hand.md",)
TUTORIALS = ("sine.md",)
# In the order in which one needs them; a guide that is not named here comes last.
GUIDES = (
    "data.md",
    "models.md",
    "plan.md",
    "report.md",
    "python.md",
    "kinds.md",
    "interop.md",
    "adapters.md",
    "reliability.md",
    "scaling.md",
    "verify.md",
    "paper.md",
)
PROJECT_PAGES = (
    "architecture.md",
    "glossary.md",
    "files.md",
    "benchmarks.md",
    "comparison.md",
    "contributing.md",
    "log.md",
    "changelog.md",
)
COMMANDS = ("commands.md",)
REFERENCE = ("errors.md", "error_messages.md", "toml.md", "python_names.md")
# Files outside docs/ that are pages too.
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)

Nav = list[dict[str, object]]


def assemble(target: Path) -> None:
    """Write `pages/` and `zensical.toml` into the folder, replacing what is there."""
    shutil.rmtree(target, ignore_errors=True)
    pages = target / "pages"
    shutil.copytree(DOCS, pages)
    for source, name in ROOT_PAGES.items():
        (pages / name).write_text((PROJECT / source).read_text(encoding="utf-8"), encoding="utf-8")
    ops = op_pages(PACKAGE)
    for page in pages.rglob("*.md"):
        page.write_text(relink(page.read_text(encoding="utf-8"), page.relative_to(pages), set(ops)), encoding="utf-8")
    commands = command_pages()
    made = {f"ops/{name}.md": text for name, text in ops.items()}
    made |= {f"commands/{name}.md": text for name, text in commands.items()}
    made |= {"toml.md": toml_page(), "error_messages.md": error_page(PACKAGE), "python_names.md": python_page()}
    for name, text in made.items():
        (pages / name).parent.mkdir(exist_ok=True)
        (pages / name).write_text(text, encoding="utf-8")
    shutil.copy(HERE / "formulas.css", pages)
    settings = (HERE / "zensical.toml").read_text(encoding="utf-8")
    nav = navigation(pages, list(ops), list(commands))
    # An array of inline tables, on one line before the first table of its own.
    settings = settings.replace("[project]\n", f"[project]\nnav = {_toml(nav)}\n", 1)
    (target / "zensical.toml").write_text(settings, encoding="utf-8")


def navigation(pages: Path, ops: list[str], commands: list[str]) -> Nav:
    """Every page of the folder, each once."""
    recipes = [f"recipes/{path.name}" for path in sorted((pages / "recipes").glob("*.md"))]
    placed = {"index.md", *START, *BY_HAND, *TUTORIALS, *PROJECT_PAGES, *REFERENCE, *COMMANDS}
    others = [path.name for path in sorted(pages.glob("*.md")) if path.name not in placed]
    guides = [name for name in GUIDES if name in others] + [name for name in others if name not in GUIDES]

    def listed(names: list[str] | tuple[str, ...]) -> Nav:
        return [{_title(pages / name): name} for name in names if (pages / name).exists()]

    # An op's heading says more than a navigation has room for.
    names = [f"ops/{op}.md" for op in ops]
    derivations: Nav = [{re.split("[:,]| that | with | over ", _title(pages / name))[0]: name} for name in names]

    return [
        {"Home": "index.md"},
        *listed(START),
        {"Recipes": listed(recipes)},
        {"LoRA by hand": [*listed([*BY_HAND, *TUTORIALS]), *derivations]},
        {"Guides": listed(guides)},
        {"Commands": listed([*COMMANDS, *(f"commands/{name}.md" for name in commands)])},
        {"Reference": listed(REFERENCE)},
        {"Project": listed(PROJECT_PAGES)},
    ]


def relink(text: str, page: Path, ops: set[str]) -> str:
    """The page with its links turned to pages of the site; code blocks stay as they are."""

    def turned(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        # What the link means from the project's root: pages of docs/ lie there, root pages above.
        base = PROJECT if page.name in ROOT_PAGES.values() else DOCS / page.parent
        path = (base / target).resolve()
        if not path.exists():
            return match[0]  # the build names it
        up = "../" * len(page.parent.parts)
        if path.is_relative_to(DOCS) and path.suffix != "":
            return f"[{label}]({up}{path.relative_to(DOCS)}{anchor})"
        if path.parent in (PACKAGE / "ops", PACKAGE / "nn" / "decoder") and path.stem in ops:
            return f"[{label}]({up}ops/{path.stem}.md)"
        if path.parent == PROJECT and path.name in ROOT_PAGES:
            return f"[{label}]({up}{ROOT_PAGES[path.name]}{anchor})"
        return label if label.startswith("`") else f"`{label}`"

    parts: list[str] = []
    end = 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(turned, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(turned, text[end:])])


def _title(page: Path) -> str:
    """The page's first heading, without markup."""
    heading = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert heading, f"{page.name} has no heading"
    return heading[1].replace("`", "")


def _toml(value: object) -> str:
    """Strings, lists and tables in TOML's inline form."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return (
            "{ "
            + ", ".join(f"{json.dumps(key, ensure_ascii=False)} = {_toml(item)}" for key, item in value.items())
            + " }"
        )
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    assemble(PROJECT / "build" / "site")
