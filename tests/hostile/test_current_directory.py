"""Nothing is imported from the current directory: by a command, by what it starts, or by `python -m backhand`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.hostile.conftest import World

SRC = str(Path(__file__).parents[2] / "src")
TRAP = "import os\nopen(os.environ['TRAP'], 'a').write(__name__ + '\\n')\nraise SystemExit(77)\n"


def names_to_plant() -> set[str]:
    """Every module of the standard library, and of every distribution that is installed, ours included."""
    return {*sys.stdlib_module_names, *metadata.packages_distributions(), "h2", "sitecustomize", "usercustomize"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("planted")
    for name in names_to_plant() - {"backhand"}:
        if name.isidentifier():
            (place / f"{name}.py").write_text(TRAP)
    assert len(list(place.glob("*.py"))) > 300
    return place


def run(program: list[str], words: list[object], planted: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command among the planted files. None of them may have been run."""
    trap = planted / "trapped"
    place = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    place |= {"TRAP": str(trap), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [*program, *map(str, words)], cwd=planted, env=place, capture_output=True, text=True, check=False
    )
    assert not trap.exists(), trap.read_text()
    return done


def command() -> list[str]:
    """The installed command; if it is not next to this interpreter, the contents of its script."""
    script = Path(sys.executable).with_name("backhand")
    return [str(script)] if script.exists() else [sys.executable, "-P", "-m", "backhand"]


def test_the_trap_springs(planted: Path) -> None:
    """Otherwise the tests below could not fail."""
    with pytest.raises(AssertionError, match="wave"):
        run([sys.executable, "-c", "import wave"], [], planted)
    (planted / "trapped").unlink()


def test_workers_import_nothing_from_here(world: World, planted: Path) -> None:
    """The launcher, what it starts to look after its memory, and both workers."""
    done = run(command(), world.train("run", "--workers", 2, "--overwrite", steps=1), planted)
    assert done.returncode == 0, done.stderr
    assert (planted / "run" / "summary.json").exists()


def test_a_measurement_in_a_process_of_its_own(planted: Path) -> None:
    """As `paper --analyses memory` starts it, by a program that imports the package."""
    code = "from backhand.lab.paper.memory import _measure; print(_measure(1000, 100, 4) >= 0)"
    done = run([sys.executable, "-P", "-c", code], [], planted)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("path", [None, f"{os.pathsep}{SRC}"], ids=["unset", "an empty entry"])
def test_python_m_imports_nothing_from_here(path: str | None, planted: Path) -> None:
    """But what Python itself has imported before any of ours; an empty entry of PYTHONPATH is the same directory."""
    (planted / "probe.py").write_text("import sys; print(*sys.modules)")
    empty = planted / "empty"
    empty.mkdir(exist_ok=True)
    (empty / "probe.py").write_text("import sys; print(*sys.modules)")
    before = subprocess.run([sys.executable, "-m", "probe"], cwd=empty, capture_output=True, text=True, check=True)
    early = {*before.stdout.split(), *(() if path is None else ("sitecustomize", "usercustomize"))}
    spared = [planted / f"{name}.py" for name in early if (planted / f"{name}.py").exists()]
    texts = {trap: trap.read_text() for trap in spared}
    for trap in spared:
        trap.unlink()
    try:
        environment = {} if path is None else {"PYTHONPATH": path}
        done = run([sys.executable, "-m", "backhand"], ["models", planted / "empty"], planted, **environment)
    finally:
        for trap, text in texts.items():
            trap.write_text(text)
    assert done.returncode == 0 and "no models" in done.stdout, done.stderr


def test_a_program_that_imports_the_package_keeps_its_own_path(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("print('mine')")
    code = "import backhand; from backhand.cli.main import main; main(['--version']); import mine"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("mine\n"), done.stderr
