"""No installed package, whatever its name, is found instead of a folder or a module of the tests or the tools."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

PROJECT = Path(__file__).parents[2]
FOLDERS = ("tests", "tools")
AS_IN_SITE_PACKAGES = """
import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent))
"""


def find_each_module() -> None:
    files = [path.relative_to(PROJECT) for folder in FOLDERS for path in (PROJECT / folder).rglob("*.py")]
    specs = {path: find_spec(".".join(path.with_suffix("").parts)) for path in files if path.name != "__init__.py"}
    assert {path for path, spec in specs.items() if spec is None or spec.origin != str(PROJECT / path)} == set()


def test_each_module_is_found_here() -> None:
    """Also by a new process of multiprocessing. The test of dependencies refuses imports by any other name."""
    find_each_module()
    process = multiprocessing.get_context("spawn").Process(target=find_each_module)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_installed_packages_with_all_their_names_hide_none(tmp_path: Path) -> None:
    for path in (PROJECT / folder for folder in FOLDERS):
        for name in {path.name, *(one.stem for one in path.iterdir() if one.is_dir() or one.suffix == ".py")}:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "__init__.py").write_text(f"raise ImportError('{name} of an installed package')\n")
    (tmp_path / "sitecustomize.py").write_text(AS_IN_SITE_PACKAGES)
    here = f"{Path(__file__).relative_to(PROJECT)}::{test_each_module_is_found_here.__name__}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", here],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
