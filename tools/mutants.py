"""Mistakes drawn over the package, and which tests notice them: what a change of the tests may not lose.

    python tools/mutants.py --seed 1 --count 100 --modules backhand.files,backhand.words -- tests/test_files.py
    python tools/mutants.py --count 25 --like ../before --modules backhand.data -- tests/data     # in both checkouts

A mistake is one change of one function's tree: a reversed comparison, an inverted branch, `and` for `or`, one more or
one less, a sum for a difference, a removed call, None returned. The tests run once without a mistake, and the functions
that each test calls are recorded. For each mistake, a forked process replaces the function's code. It runs the tests
that call the function, the fastest first, until one fails. Calls during the collection of tests are not recorded. Of a
function that caches its results, only the first test is recorded. Equal seeds draw equal mistakes from equal sources.
With `--like`, only functions that are identical in another checkout are changed, so that old and new tests can be
compared.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import json
import os
import pkgutil
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).resolve().parents[1]
KILLED, SURVIVED, ENDLESS = "killed", "survived", "endless"
UNTRIED, NOT_PLACED = "untried", "not placed"
"""No test calls its function, or they fail in this order without it too; no function has this code."""
_FIRST = 60  # of the tests that call a function are run by themselves
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
}


class Mistake(NamedTuple):
    """A mistake: its place, its description, and the function's changed code."""

    module: str
    line: int
    what: str
    name: str
    first_line: int
    code: CodeType


def main() -> None:
    """Draw, try and count."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100, help="mistakes to draw")
    parser.add_argument("--modules", required=True, help="modules and packages, with commas between them")
    parser.add_argument("--like", type=Path, help="another checkout, which has the same functions")
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=300.0,
        help="after which a mistake counts as endless; a third for tests that pass",
    )
    parser.add_argument("--output", type=Path, help="a JSON file of what became of each")
    parser.add_argument("tests", nargs="+", help="files of pytest, and arguments that choose among their tests")
    options = parser.parse_args()
    os.chdir(PROJECT)
    loaded = _Loaded(options.tests)
    drawn = draw(options.modules.split(","), options.seed, options.count, options.like)
    found = []
    for mistake in drawn:
        outcome = loaded.outcome(mistake, options.timeout_s)
        found.append({"at": f"{mistake.module}:{mistake.line}", "what": mistake.what, "outcome": outcome})
        print(f"{outcome:10} {mistake.module}:{mistake.line} {mistake.what}", flush=True)
    noticed = sum(one["outcome"] in (KILLED, ENDLESS) for one in found)
    tried = sum(one["outcome"] not in (NOT_PLACED, UNTRIED) for one in found)
    print(f"{noticed} of {tried} mistakes noticed, of {len(found)} drawn")
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


class _Calls:
    """A plugin of pytest: how long each test takes, and what it and its fixtures call of the package."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._fixtures_of: dict[str, set[str]] = {}
        self._fixtures: set[str] = set()
        self._of_test: dict[str, set[int]] = {}
        self._of_fixture: dict[tuple[str, str], set[int]] = {}
        self._codes: dict[int, CodeType] = {}
        self._into: set[int] = set()

    @pytest.hookimpl(wrapper=True)  # type: ignore[untyped-decorator]
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._fixtures = self._fixtures_of.setdefault(item.nodeid, set(getattr(item, "fixturenames", ())))
        self._into = self._of_test.setdefault(item.nodeid, set())
        start = time.perf_counter()
        threading.setprofile(self._called)
        sys.setprofile(self._called)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            self.seconds.setdefault(item.nodeid, time.perf_counter() - start)

    @pytest.hookimpl(wrapper=True)  # type: ignore[untyped-decorator]
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[object]) -> Iterator[None]:
        outer = self._into
        self._fixtures.add(fixturedef.argname)  # also one that the test asks for as it runs
        self._into = self._of_fixture.setdefault((fixturedef.baseid, fixturedef.argname), set())
        try:
            return (yield)
        finally:
            self._into = outer

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.seconds[report.nodeid] = -1.0  # not one that tells anything here

    def _called(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            code = frame.f_code
            self._codes[id(code)] = code
            self._into.add(id(code))

    def written(self) -> dict[str, list[tuple[str, float]]]:
        """The tests that pass, the quickest first, with their seconds, by `file:line` of the functions they call."""
        tests: dict[str, list[tuple[str, float]]] = {}
        for test in sorted(self.seconds, key=lambda one: self.seconds[one]):
            if self.seconds[test] < 0:
                continue
            called = set(self._of_test[test])
            for (base, name), calls in self._of_fixture.items():
                if name in self._fixtures_of[test] and test.startswith(base):
                    called |= calls
            for code in (self._codes[one] for one in called):
                tests.setdefault(f"{code.co_filename}:{code.co_firstlineno}", []).append((test, self.seconds[test]))
        return {place: found for place, found in tests.items() if f"{PROJECT}/src/" in place}


class _Loaded:
    """Tests that are imported, to be run in forked processes.

    Args:
        arguments: of pytest.
    """

    def __init__(self, arguments: list[str]) -> None:
        self._passing: dict[tuple[str, ...], bool] = {}
        # Collected once, so that what the tests import is in this process before it forks.
        pytest.main([*arguments, "--collect-only", "--quiet"])
        with tempfile.NamedTemporaryFile() as file:
            if (child := os.fork()) == 0:
                calls = _Calls()
                code = _run(arguments, calls)
                Path(file.name).write_text(json.dumps(calls.written()), encoding="utf-8")
                os._exit(code)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) not in (0, 1):  # some may fail in such a process
                sys.exit("the tests do not run without any mistake")
            self._tests_of: dict[str, list[tuple[str, float]]] = json.loads(Path(file.name).read_text(encoding="utf-8"))

    def outcome(self, mistake: Mistake, timeout_s: float) -> str:
        """Run the tests that call the function with the mistake, and return the outcome."""
        found = self._tests_of.get(f"{sys.modules[mistake.module].__file__}:{mistake.first_line}", [])
        # Of very many the quickest: without a mistake they take a third of the time there is.
        until = accumulate(seconds for _, seconds in found)
        tests = [test for (test, _), end in zip(found, until, strict=True) if end < timeout_s / 3]
        # The quickest notice most; thousands more are collected only where those do not.
        for some in (tests[:_FIRST], tests[_FIRST:]):
            if some and (outcome := _forked(mistake, some, timeout_s)) != SURVIVED:
                return outcome if outcome == NOT_PLACED or self._pass(tuple(some), timeout_s) else UNTRIED
        return SURVIVED if tests else UNTRIED

    def _pass(self, tests: tuple[str, ...], timeout_s: float) -> bool:
        """Return True if these tests pass in this order without a mistake."""
        if tests not in self._passing:
            self._passing[tests] = _forked(None, list(tests), timeout_s) == SURVIVED
        return self._passing[tests]


def _forked(mistake: Mistake | None, tests: list[str], timeout_s: float) -> str:
    """Run the tests in a forked process with the mistake, and return the outcome."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os._exit(_run([*tests, "-x"]) if mistake is None or _put_in_force(mistake) else 99)
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {0: SURVIVED, 99: NOT_PLACED}.get(code, KILLED)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return ENDLESS


def _run(arguments: list[str], *plugins: object) -> int:
    _silence()
    if remembered := os.environ.get("BACKHAND_TESTS_MEASURED"):  # by other processes, without this mistake
        os.environ["BACKHAND_TESTS_MEASURED"] = tempfile.mkdtemp(dir=remembered)
    return int(pytest.main([*arguments, "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no"], plugins=[*plugins]))


def _silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _put_in_force(mistake: Mistake) -> bool:
    """Give every function that has this place in the source the other code; whether there is one."""
    gc.unfreeze()  # what is frozen (tests/conftest.py) is in no list of objects
    functions = [
        one
        for one in gc.get_objects()
        if type(one) is FunctionType
        and one.__module__ == mistake.module
        and one.__code__.co_name == mistake.name
        and one.__code__.co_firstlineno == mistake.first_line
    ]
    fitting = [one for one in functions if one.__code__.co_freevars == mistake.code.co_freevars]
    for function in fitting:
        function.__code__ = mistake.code
    return bool(fitting)


def draw(names: list[str], seed: int, count: int, like: Path | None = None) -> list[Mistake]:
    """Draw this number of mistakes, or all; every possible place has the same probability."""
    modules = [module for name in names for module in _modules(importlib.import_module(name))]
    places = [place for module in modules for place in _places(module, like)]
    random.Random(seed).shuffle(places)
    found: list[Mistake] = []
    while places and len(found) < count:
        mistake = _made(*places.pop())
        if mistake is not None:
            found.append(mistake)
    return found


def _modules(module: ModuleType) -> Iterator[ModuleType]:
    """The module, or all that are in a package."""
    yield module
    for inner in sorted(pkgutil.iter_modules(getattr(module, "__path__", ())), key=lambda one: one.name):
        yield from _modules(importlib.import_module(f"{module.__name__}.{inner.name}"))


def _places(module: ModuleType, like: Path | None) -> list[tuple[ModuleType, int, int]]:
    """Number of the node and of the change for each change that can be made, in an order that both checkouts have."""
    path = Path(str(module.__file__))
    known = None
    if like is not None:
        other = like / path.relative_to(PROJECT)
        tree = ast.parse(other.read_text(encoding="utf-8") if other.exists() else "")
        known = {ast.dump(function) for function, _ in _nodes(tree)}
    dumps: dict[int, str] = {}
    found = []
    for number, (function, node) in enumerate(_nodes(_tree(module))):
        dump = dumps.setdefault(function.lineno, ast.dump(function))
        if known is None or dump in known:
            found += [(dump, number, which) for which in range(len(_changes(node)))]
    if like is not None:
        found.sort()
    return [(module, number, which) for _, number, which in found]


def _made(module: ModuleType, number: int, which: int) -> Mistake | None:
    """The mistake; None where the code stays as it was."""
    tree = _tree(module)
    function, node = list(_nodes(tree))[number]
    what, change = _changes(node)[which]
    line = getattr(node, "lineno", function.lineno)
    first = min([function.lineno, *(one.lineno for one in function.decorator_list)])
    before = _code_at(compile(_tree(module), str(module.__file__), "exec"), function.name, first)
    change()
    after = _code_at(compile(ast.fix_missing_locations(tree), str(module.__file__), "exec"), function.name, first)
    if before is None or after is None or before == after:
        return None
    return Mistake(module.__name__, line, what, function.name, first, after)


def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))


def _nodes(tree: ast.AST) -> Iterator[tuple[ast.FunctionDef, ast.AST]]:
    """Yield the nodes in the bodies of outermost functions, with the function, without annotations and decorators."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef):
            for statement in child.body:
                yield from ((child, node) for node in ast.walk(statement))
        elif isinstance(child, ast.ClassDef):
            yield from _nodes(child)


def _code_at(code: CodeType, name: str, first_line: int) -> CodeType | None:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if (inner.co_name, inner.co_firstlineno) == (name, first_line):
                return inner
            if (found := _code_at(inner, name, first_line)) is not None:
                return found
    return None


def _changes(node: ast.AST) -> list[tuple[str, Callable[[], None]]]:
    """Return the possible mistakes at a node: a description and a function that makes the change."""

    def put(field: str, value: object) -> Callable[[], None]:
        return lambda: setattr(node, field, value)

    match node:
        case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
            other = _COMPARISONS[type(op)]
            return [(f"{type(op).__name__} → {other.__name__}", put("ops", [other()]))]
        case ast.BoolOp(op=op):
            return [("and ↔ or", put("op", ast.Or() if isinstance(op, ast.And) else ast.And()))]
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            return [("condition negated", put("test", ast.UnaryOp(ast.Not(), test)))]
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
            other_op = _ARITHMETIC[type(op)]
            return [(f"{type(op).__name__} → {other_op.__name__}", put("op", other_op()))]
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return [(f"{value} → {value + step}", put("value", value + step)) for step in (1, -1)]
        case ast.Return(value=value) if value is not None:
            return [("None returned", put("value", ast.Constant(None)))]
        case ast.Expr(value=ast.Call()):
            return [("call left out", put("value", ast.Constant(None)))]
        case _:
            return []


if __name__ == "__main__":
    main()
