"""Install packages into this interpreter's environment by uv, in a fifth of pip's time; where it fails, by pip.

    python tools/by_uv.py --editable '.[test]'

uv does not read pip's configuration, so this script passes the indexes, certificates, other locations and version
constraints of that configuration to uv.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "cert": "SSL_CERT_FILE",
    "constraint": "UV_CONSTRAINT",
}


def settings(python: Path) -> dict[str, str]:
    """Return pip's configuration as uv's environment variables."""
    listed = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    known = dict(line.split("=", 1) for line in listed.splitlines())
    found = {}
    for name, variable in NAMES.items():
        for where in (f"global.{name}", f"install.{name}", f":env:.{name}"):
            if where in known:
                several = known[where].strip("'").replace("\\n", " ").split()
                found[variable] = ("," if name == "find-links" else " ").join(several)
    if "UV_INDEX" in found:  # pip takes the best of all indexes
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return found


def main() -> None:
    """Install what the command line says."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    uv = Path(sys.executable).with_name("uv.exe" if os.name == "nt" else "uv")
    command: list[str | Path] = [uv, "pip", "install", "--quiet", "--python", sys.executable, *sys.argv[1:]]
    there = settings(Path(sys.executable))
    # On the command line, these constraints are added to those of the arguments instead of replacing them.
    command += [word for file in there.pop("UV_CONSTRAINT", "").split() for word in ("--constraint", file)]
    if not uv.exists() or subprocess.run(command, env=os.environ | there, check=False).returncode != 0:
        print("uv cannot install this; pip does, which takes a few minutes", flush=True)
        subprocess.run([*pip, *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
