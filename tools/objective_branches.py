"""Count the places of the core that know an objective: names, comparisons, instances and imports.

    names      texts that are the name of an objective, and names of kinds of rows in comparisons
    compared   comparisons of something called `objective` or `purpose`, other than with None
    instances  isinstance, or match, on a class that a folder of objectives defines
    imports    imports of a folder of objectives

Only `objectives/NAME/` may know one, and the packages that prove or explain all of them. A change may lower the limits
below, not raise them. Their goal is 20, 0, 0, 0: public names such as `backhand.decide` remain.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from backhand.data.row_kind import row_kinds
from backhand.objective.registry import names

LIMITS = (140, 81, 0, 2)
SOURCE = Path(__file__).parents[1] / "src" / "backhand"
FREE = {"verify", "lab", "arithmetic", "ops", "kernels", "nn"}
NAMES = {*names()} - {"rank"}  # which is a size of adapters, too
KINDS = {"rank", *(kind.name for kind in row_kinds())} - {"answers"}
SIDES = {"objective", "purpose"}
FOLDER = re.compile(r"backhand\.objectives\.\w+")


def main() -> int:
    """Print the counts of each file and their sums; return 1 if a sum is above its limit."""
    folder = SOURCE / "objectives"
    defined = {
        node.name
        for file in folder.glob("*/**/*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    total = [0, 0, 0, 0]
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).parts
        if parts[0] in FREE or (parts[0] == "objectives" and len(parts) > 2):
            continue
        counts = counts_of(ast.parse(file.read_text(encoding="utf-8")), defined)
        if any(counts):
            print(*(f"{count:4}" for count in counts), file.relative_to(SOURCE.parents[1]))
        total = [one + other for one, other in zip(total, counts, strict=True)]
    print(*(f"{count:4}" for count in total), "names, compared, instances, imports; at most", *LIMITS)
    return int(any(count > limit for count, limit in zip(total, LIMITS, strict=True)))


def counts_of(tree: ast.Module, defined: set[str]) -> list[int]:
    """Return the four counts of a file.

    Args:
        defined: names of the classes that folders of objectives define.
    """
    docstrings = set(map(id, _docstrings(tree)))
    named = compared = instances = imports = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            named += node.value in NAMES if isinstance(node.value, str) else 0
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            about = {_called(side) for side in sides} & SIDES
            if about and not all(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops):
                compared += 1
                texts = (one.value for side in sides for one in ast.walk(side) if isinstance(one, ast.Constant))
                named += sum(isinstance(text, str) and text in KINDS for text in texts)
        elif isinstance(node, ast.Call) and _called(node.func) == "isinstance" and len(node.args) == 2:
            instances += any(_called(one) in defined for one in ast.walk(node.args[1]))
        elif isinstance(node, ast.MatchClass):
            instances += _called(node.cls) in defined
        elif isinstance(node, ast.ImportFrom):
            imports += bool(FOLDER.match(node.module or ""))
    return [named, compared, instances, imports]


def _called(node: ast.AST) -> str:
    """Return the last part of a dotted name, or ""."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _docstrings(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield the texts that are statements of a module or class, or the first one of a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body if isinstance(node, ast.Module | ast.ClassDef) else node.body[:1]
            yield from (one.value for one in body if isinstance(one, ast.Expr))


if __name__ == "__main__":
    sys.exit(main())
