"""Measure the size of the package, package by package, and of the code that one step runs: `make size`.

python tools/size.py                   # of this project
python tools/size.py --tree PATH       # of another checkout of it, an older one too
python tools/size.py --no-step         # without running a training step

What is counted, over every *.py file under src/backhand:

- lines: all of them, blank ones and docstrings too. Import lines: those of import statements, at the top or inside
  functions. Code lines: those with code on them that is no docstring, comment or import.
- imports: from module to module, at the top or inside functions, and `import_module("backhand.…")`; those under
  `if TYPE_CHECKING` are read by type checkers alone and count for circles only where it says so. Upward: from a room
  to one above it or in the same layer, in the layers of that tree's pyproject.toml. A circle: modules of which each
  can be reached from each other by imports, in one room or several.
- later objectives: files that serve only an objective or a family added after the first objectives (`LATER`). They are
  counted separately, because the bar for the package's size was set before them.
- marks: sizes with an upper bound (`marks`). The tests fail if one is exceeded.
- files on the way of one step: see one_step.py. All lines of a file count, not only those that run. A step starts in
  the loop's file. Bindings of compiled kernels (`kernels/`) are counted separately.
- parameters: of each function as it is written, `self` and `cls` left out.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import statistics
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[1]
_NAME = "backhand"
_SHOWN = 8
MANY_PARAMETERS = 8
LOOP = "loop/loop.py"
LONG, SHORT = 450, 80
"""Lines above which a file wants a reason, and below which it may belong to its neighbour."""
BAR_LINES, BAR_CODE, BAR_TESTS = 57_500, 34_500, 45_000
"""The size that the package is to have without later objectives, and that of the tests. They are goals, not marks."""
LATER: dict[str, tuple[str, ...]] = {
    "decide": ("*decide.py", "*decision*.py", "loop/value_average.py"),
    "bake": ("*distill*.py", "*linear_divergence.py", "*/context.py", "*/contexts.py", "objectives/distillation/*"),
    "embed": (
        "*/embed.py", "*/embedding_*.py", "*/label_pairs.py", "*vectors.py", "objectives/vectors/*",
        "*retrieval_*.py", "*sentence_transformers.py", "*llama_cpp_server.py", "*info_nce.py", "*cosent.py",
        "*triplet.py", "*normalize.py", "*pooling.py", "*pooled_states.py",
    ),
    "rank": ("*/rank.py", "*/pair_examples.py", "*ranking*.py"),
    "classify": (
        "*/classify.py", "*/class_*.py", "*classifier_*.py", "*/head.py", "*head_loss.py", "*binary_cross_*.py",
    ),
    "encoders": ("*encoder_inputs.py", "*encoder_families.py", "*layer_norm.py"),
    "hybrids": (
        "*ssm_*.py", "*/ssd.py", "*time_step.py", "*parallel_mixer.py", "*mlp_mixer.py", "*unit_multipliers.py",
    ),
    "studio": ("studio/*",),
}  # fmt: skip
"""Patterns of the files that serve only a later objective. The first group that matches a file counts it."""


@dataclass(frozen=True)
class Module:
    """One file of the package.

    Attributes:
        path: relative to the package.
        name: dotted, `backhand` included.
        lines: of the file.
        import_lines: of them, those of import statements.
        code_lines: those with code.
        imports: modules of the package that it imports.
        for_types: those that it imports for type checkers alone.
        signatures: names of its functions and how many parameters they have.
    """

    path: str
    name: str
    lines: int
    import_lines: int
    code_lines: int
    imports: frozenset[str]
    for_types: frozenset[str]
    signatures: tuple[tuple[str, int], ...]

    @property
    def room(self) -> str:
        """The folder under the package, or the file's own name for a file outside of all folders."""
        return room_of(self.name)


class Mark(NamedTuple):
    """A size with an upper bound."""

    name: str
    size: int
    limit: int


@dataclass
class _Imports(ast.NodeVisitor):
    """Import statements of one file: their lines, and the names that they may mean."""

    lines: set[int] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    for_types: set[str] = field(default_factory=set)
    _for_types: bool = False

    def visit_If(self, node: ast.If) -> None:
        """Record imports under `if TYPE_CHECKING` separately."""
        before = self._for_types
        self._for_types |= "TYPE_CHECKING" in ast.unparse(node.test)
        for child in node.body:
            self.visit(child)
        self._for_types = before
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        """`import a.b`."""
        self._add(node, {alias.name for alias in node.names})

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """`from a import b`: b may be a module or a name in one."""
        self._add(node, {f"{node.module}.{alias.name}" for alias in node.names})

    def visit_Call(self, node: ast.Call) -> None:
        """`import_module("a.b")`; of an f-string the part before the first hole."""
        if ast.unparse(node.func).rpartition(".")[2] == "import_module" and node.args:
            named = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(named, ast.Constant) and isinstance(named.value, str):
                self.names.add(named.value.removesuffix("."))
        self.generic_visit(node)

    def _add(self, node: ast.stmt, names: set[str]) -> None:
        self.lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        (self.for_types if self._for_types else self.names).update(names)


def room_of(module: str) -> str:
    """The room a module belongs to; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def read_modules(package: Path) -> list[Module]:
    """Every module of the package, by path."""
    paths = sorted(package.rglob("*.py"))
    names = {path: ".".join([_NAME, *path.relative_to(package).with_suffix("").parts]) for path in paths}
    names = {path: name.removesuffix(".__init__") for path, name in names.items()}
    known = set(names.values())
    modules = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        found, parsed = _Imports(), ast.parse(text)
        found.visit(parsed)
        imports, for_types = (
            frozenset(filter(None, {_known(name, known) for name in some} - {_NAME, names[path]}))
            for some in (found.names, found.for_types)
        )
        relative = path.relative_to(package).as_posix()
        lines, code = len(text.splitlines()), len(_code_lines(text, parsed) - found.lines)
        counts = lines, len(found.lines), code
        modules.append(Module(relative, names[path], *counts, imports, for_types, _signatures(parsed)))
    return modules


_NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def _code_lines(text: str, parsed: ast.Module) -> set[int]:
    """Numbers of the lines with code on them, docstrings left out."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(parsed):
        for child in getattr(node, "body", None) or () if not isinstance(node, ast.Lambda | ast.IfExp) else ():
            # Also after an attribute: a string expression is documentation.
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                found -= set(range(child.lineno, (child.end_lineno or child.lineno) + 1))
    return found


def _signatures(parsed: ast.Module) -> tuple[tuple[str, int], ...]:
    """Every function's name and number of parameters."""
    found = []
    for node in ast.walk(parsed):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            one = node.args
            names = [part.arg for part in (*one.posonlyargs, *one.args, *one.kwonlyargs)]
            names += [part.arg for part in (one.vararg, one.kwarg) if part is not None]
            found.append((node.name, len([name for name in names if name not in ("self", "cls")])))
    return tuple(found)


def _known(name: str, known: set[str]) -> str | None:
    """Return the module that an imported name is or belongs to; None for other packages."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def read_layers(pyproject: Path) -> list[set[str]]:
    """Return the layers of the import contract, top to bottom, each as a set of rooms."""
    contracts = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [{name.strip().removeprefix(f"{_NAME}.") for name in layer.split("|")} for layer in layers]


def upward(modules: list[Module], layers: list[set[str]]) -> list[tuple[str, str]]:
    """Return imports from a room to one above it, to another of the same layer, or to one outside of all layers."""
    height = {room: -depth for depth, rooms in enumerate(layers) for room in rooms}
    found = []
    for module in modules:
        # The package itself and its command are outside of the layers, because they import from every room.
        if module.room in height:
            for target in sorted(module.imports):
                room = room_of(target)
                if room != module.room and (room not in height or height[room] >= height[module.room]):
                    found.append((module.name, target))
    return found


def circles(modules: list[Module], *, for_types: bool = False) -> list[list[str]]:
    """Groups of modules that import each other in a circle, each group as large as it can be.

    for_types: whether imports for type checkers alone count.
    """
    reached = {module.name: set(module.imports | (module.for_types if for_types else set())) for module in modules}
    for middle, beyond in reached.items():
        for targets in reached.values():
            if middle in targets:
                targets |= beyond
    groups = {
        tuple(sorted(other for other in targets if name in reached.get(other, ())))
        for name, targets in reached.items()
        if name in targets
    }
    return sorted(map(list, groups))


def step_files(tree: Path) -> dict[str, list[str]]:
    """Return the result of one_step.py for that tree.

    Raises:
        RuntimeError: it found nothing; the text is what it printed.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("one_step.py"))]
    finished = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"one_step.py: exit code {finished.returncode}\n{finished.stderr}")
    found: dict[str, list[str]] = json.loads(finished.stdout)
    return found


def later_group(path: str) -> str | None:
    """Return the later objective that a file serves, None for all other files."""
    groups = ((name, pattern) for name, patterns in LATER.items() for pattern in patterns)
    return next((name for name, pattern in groups if fnmatch(path, pattern)), None)


def files_of_step(way: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Split the files on the way of a step, from the loop on, into bindings of kernels and all others."""
    files = list(way)
    step = files[files.index(LOOP) :] if LOOP in files else []
    bindings = [path for path in step if path.startswith("kernels/")]
    return bindings, [path for path in step if path not in bindings]


def marks(tree: Path, modules: list[Module], way: dict[str, list[str]]) -> list[Mark]:
    """Return the sizes that have an upper bound. A step's files are those from the loop on, without bindings."""
    sizes = {module.path: module for module in modules}
    _, others = files_of_step(way)
    return [
        Mark("lines of loop/step.py", sizes["loop/step.py"].lines, 250),
        Mark("files of a step", len(others), 20),
        Mark("code lines of a step", sum(sizes[path].code_lines for path in others), 2_000),
        Mark("lines of README.md", len((tree / "README.md").read_text(encoding="utf-8").splitlines()), 150),
    ]


def size_table(modules: list[Module], tests: list[Module]) -> Iterator[str]:
    """Yield the sizes without later objectives, of each of them, and of all tests, with the bars."""
    files, lines, code = Counter[str | None](), Counter[str | None](), Counter[str | None]()
    for module in modules:
        group = later_group(module.path)
        files[group] += 1
        lines[group] += module.lines
        code[group] += module.code_lines
    yield f"{'':<26}{'files':>7}{'lines':>9}{'code':>9}"
    rows = [("without later objectives", None), *((f"  {name}", name) for name in LATER)]
    for title, group in rows:
        yield f"{title:<26}{files[group]:>7,}{lines[group]:>9,}{code[group]:>9,}"
        if group is None:
            yield f"{'bar':<33}{BAR_LINES:>9,}{BAR_CODE:>9,}"
            yield "later objectives"
    yield f"{'all':<26}{files.total():>7,}{lines.total():>9,}{code.total():>9,}"
    lines_of_tests, code_of_tests = (sum(getattr(one, size) for one in tests) for size in ("lines", "code_lines"))
    yield f"{'tests, of all objectives':<26}{len(tests):>7,}{lines_of_tests:>9,}{code_of_tests:>9,}"
    yield f"{'bar':<33}{BAR_TESTS:>9,}"


def tables(
    modules: list[Module], layers: list[set[str]], way: dict[str, list[str]] | None, tree: Path
) -> Iterator[str]:
    """The lines of the report."""
    yield from size_table(modules, read_modules(tree / "tests"))
    yield ""
    counts = [module.lines for module in modules]
    total = sum(counts)
    imports = sum(module.import_lines for module in modules)
    climbing, round_trips = upward(modules, layers), circles(modules)
    yield f"files           {len(modules):>7,}"
    mean, median = total / len(modules), statistics.median(counts)
    yield f"lines           {total:>7,}   a file {mean:.0f} on average, {median:.0f} median"
    yield f"import lines    {imports:>7,}   {imports / total:.1%}"
    yield f"below {SHORT} lines  {sum(count < SHORT for count in counts):>7,}"
    yield f"above {LONG} lines {sum(count > LONG for count in counts):>7,}"
    yield f"upward imports  {len(climbing):>7,}"
    yield from (f"    {source} → {target}" for source, target in climbing)
    yield f"circles         {len(round_trips):>7,}"
    yield from (f"    {' ⇄ '.join(group)}" for group in round_trips)
    typed = [group for group in circles(modules, for_types=True) if group not in round_trips]
    yield f"for types too   {len(typed):>7,}"
    yield from (f"    {' ⇄ '.join(group)}" for group in typed)
    signatures = sorted((-count, name, module.path) for module in modules for name, count in module.signatures)
    many = sum(-count >= MANY_PARAMETERS for count, *_ in signatures)
    yield f"functions with {MANY_PARAMETERS} or more parameters: {many}"
    yield from (f"    {-count:>5}  {name}, {path}" for count, name, path in signatures[:_SHOWN])
    if way is not None:
        lines = {module.path: module.lines for module in modules}
        code = {module.path: module.code_lines for module in modules}
        bindings, others = files_of_step(way)
        for mark in marks(tree, modules, way):
            yield f"mark: {mark.name} {mark.size:,} of at most {mark.limit:,}{' EXCEEDED' * (mark.size > mark.limit)}"
        yield f"one step, from the loop on: {len(others)} files of {sum(code[path] for path in others):,} code lines"
        yield f"bindings of its kernels: {len(bindings)} files of {sum(code[path] for path in bindings):,} code lines"
        of_them = sum(lines[path] for path in way)
        yield f"on the way of one step, from the command to the optimizer: {len(way)} files of {of_them:,} lines"
        yield from (f"    {lines[path]:>5}{code[path]:>6}  {path}" for path in way)
    yield ""
    yield f"{'room':<14}{'files':>6}{'lines':>8}{'a file':>8}"
    order = ["", *(room for rooms in layers for room in sorted(rooms))]
    rooms = [*order, *sorted({module.room for module in modules} - set(order))]
    for room in rooms:
        of_room = [module.lines for module in modules if module.room == room]
        if of_room:
            yield f"{room or _NAME:<14}{len(of_room):>6}{sum(of_room):>8,}{sum(of_room) / len(of_room):>8.0f}"
    ordered = sorted(modules, key=lambda module: (-module.lines, module.path))
    long = max(_SHOWN, sum(count > LONG for count in counts))
    written = [module for module in ordered if not module.path.endswith("__init__.py")]
    for title, shown in (("longest", ordered[:long]), ("shortest, without __init__.py", written[: -_SHOWN - 1 : -1])):
        yield ""
        yield title
        yield from (f"    {module.lines:>5}  {module.path}" for module in shown)


def main() -> int:
    """Print the report; the exit code."""
    parser = argparse.ArgumentParser(description="Files and lines of the package, room by room.")
    parser.add_argument("--tree", type=Path, default=PROJECT, help="a checkout of this project; this one unless given")
    parser.add_argument("--no-step", action="store_true", help="do not run a training step to see its files")
    options = parser.parse_args()
    tree: Path = options.tree.resolve()
    modules = read_modules(tree / "src" / _NAME)
    way = None if options.no_step else step_files(tree)
    print("\n".join(tables(modules, read_layers(tree / "pyproject.toml"), way, tree)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
