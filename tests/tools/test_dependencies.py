"""pyproject.toml declares every package that the code imports, and no core package that it does not."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

PROJECT = Path(__file__).parents[2]
DECLARED = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[; ]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def imported(folder: str) -> set[str]:
    """Distributions that provide the modules imported anywhere under the folder, also inside functions."""
    modules = set()
    for path in (PROJECT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                modules.add(node.module.partition(".")[0])
    providers = packages_distributions()
    foreign = modules - set(sys.stdlib_module_names) - {"backhand", "support"}
    return {name.lower().replace("_", "-") for module in foreign for name in providers.get(module, [module])}


CORE = names(DECLARED["dependencies"])
EXTRAS = {extra: names(requirements) for extra, requirements in DECLARED["optional-dependencies"].items()}


def test_the_package_imports_what_it_declares() -> None:
    optional = ("datasets", "demo", "tensorboard", "wandb", "mlflow", "trackio")
    assert imported("src/backhand") <= CORE.union(*(EXTRAS[extra] for extra in optional))


def test_every_core_package_is_used() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (PROJECT / "src" / "backhand").rglob("*.py"))
    modules = {name.replace("-", "_") for name in CORE}
    # Also by name in a string, as optional imports are written.
    assert {module for module in modules if not re.search(rf"(import |from |\"){module}\b", text)} == set()


def test_the_tests_import_what_they_declare() -> None:
    local = {path.stem for path in (PROJECT / "benchmarks").glob("*.py")} | {"benchmarks", "docsite"}
    assert imported("tests") - local <= CORE | EXTRAS["test"] | EXTRAS["browser"]


def test_the_makefile_installs_only_extras_that_exist() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    wanted = {extra for extras in re.findall(r"'\.\[([\w,-]+)\]'", makefile) for extra in extras.split(",")}
    assert wanted <= set(EXTRAS)
