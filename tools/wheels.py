"""`make wheels`: one wheel a platform with its kernels in it, and the source distribution, all from this machine.

The compiler of the PyPI package ziglang knows every system, so that nothing but packages is needed. Times in the
archives are those of the last commit (SOURCE_DATE_EPOCH), so that the same sources can give the same bytes.

    python tools/wheels.py [TARGET ...] [--output dist]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hatch_build import TARGETS  # noqa: E402


def run(*command: str, **environment: str) -> None:
    """Run a tool, in the project's root, and end with its status where it fails."""
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"no target: {', '.join(sorted(unknown))}")
    log = ("git", "log", "-1", "--format=%ct")
    committed = subprocess.run(log, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    python = sys.executable
    for path in options.output.glob("backhand-*"):
        path.unlink()
    build = (python, "-m", "build", "--no-isolation", "--outdir", str(options.output))
    run(*build, "--sdist", SOURCE_DATE_EPOCH=committed)
    for target in options.targets or TARGETS:
        run(*build, "--wheel", SOURCE_DATE_EPOCH=committed, BACKHAND_WHEEL_TARGET=target)
    made = sorted(map(str, options.output.glob("backhand-*")))
    run(python, "-m", "twine", "check", "--strict", *made)
    for wheel in made:
        if "manylinux" in wheel:
            run(python, "-m", "auditwheel", "show", wheel)
        print(hashlib.sha256(Path(wheel).read_bytes()).hexdigest(), Path(wheel).name)


if __name__ == "__main__":
    main()
