"""What is declared is what is used: packages, versions known to work, and what hosted CI runs."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    foreign = modules - set(sys.stdlib_module_names) - {"backhand", "tests", "tools"}
    return {name.lower().replace("_", "-") for module in foreign for name in providers.get(module, [module])}


CORE = names(DECLARED["dependencies"])
EXTRAS = {extra: names(requirements) for extra, requirements in DECLARED["optional-dependencies"].items()}


def test_the_package_imports_what_it_declares() -> None:
    optional = (
        "datasets",
        "demo",
        "tensorboard",
        "wandb",
        "mlflow",
        "trackio",
        "search",
        "rewards",
        "decisions",
        "vectors",
        "studio",
    )
    assert imported("src/backhand") <= CORE.union(*(EXTRAS[extra] for extra in optional))


def test_every_core_package_is_used() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (PROJECT / "src" / "backhand").rglob("*.py"))
    modules = {{"pyyaml": "yaml"}.get(name, name.replace("-", "_")) for name in CORE}
    # Also by name in a string, as optional imports are written.
    assert {module for module in modules if not re.search(rf"(import |from |\"){module}\b", text)} == set()


def test_the_tests_import_what_they_declare() -> None:
    assert imported("tests") <= CORE | EXTRAS["test"] | EXTRAS["browser"]


def test_the_makefile_installs_only_extras_that_exist() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    expected = {extra for extras in re.findall(r"'\.\[([\w,-]+)\]'", makefile) for extra in extras.split(",")}
    assert expected <= set(EXTRAS)


def test_every_declared_package_has_a_version_known_to_work() -> None:
    lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition(" ; ")[0] for line in lines if not line.startswith("#")]
    # A build's suffix or a path would hold on one machine alone.
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==\d[\w.]*", line)] == []
    known = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in pins)}
    assert len(known) == len({*pins})
    # The browser's driver is tested with the newest: it has to fit the system's browser.
    extras = [lines for extra, lines in DECLARED["optional-dependencies"].items() if extra != "browser"]
    for text in [*DECLARED["dependencies"], *(line for lines in extras for line in lines)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(known[canonicalize_name(requirement.name)], prereleases=True), text


def test_hosted_ci_runs_the_same_targets_on_all_that_is_claimed() -> None:
    workflow = (PROJECT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    called = set(re.findall(r"run: make ([\w-]+)", workflow))
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    assert called <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)", (PROJECT / ".ci" / "run").read_text(), re.MULTILINE)) <= called
    claimed = [re.findall(r":: (3\.\d+)$", line) for line in DECLARED["classifiers"]]
    (versions,) = re.findall(r"python: \[(.*)\]", workflow)
    assert re.findall(r"[\d.]+", versions) == [version for found in claimed for version in found]
    systems = {"Operating System :: MacOS": "macos", "Operating System :: POSIX :: Linux": "ubuntu"}
    (runners,) = re.findall(r"os: \[(.*)\]", workflow)
    assert set(re.findall(r"(\w+)-latest", runners)) == {
        systems[line] for line in DECLARED["classifiers"] if line in systems
    }
