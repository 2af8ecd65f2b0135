"""Install the package in each of the ways that people install packages, in a bare environment, and train with it.

    python -m tools.install_paths [pip] [uv] [uvx] [pipx] [newest] [oldest]

`newest` and `oldest` are environments with the newest and with the oldest release of every dependency that
pyproject.toml allows, PyTorch aside: its old releases come with CUDA's libraries, `--old-torch` takes them. A run is
started first without its model's package: the error must name a command that installs it there. The script runs
exactly that command and repeats the run. The wheel is that of dist/ for this system if it is newer than the sources,
otherwise a pure one, built here. Packages come from the indexes in pip's configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tools.by_uv import settings

ROOT = Path(__file__).resolve().parents[1]
PATHS = ("pip", "uv", "uvx", "pipx", "newest", "oldest")
MISSING = 4
"""Exit code where a model is not there."""


class Place:
    """A folder with everything in it: installers, their caches, environments, the wheel.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "installers" / ("Scripts" if os.name == "nt" else "bin")
        subprocess.run([sys.executable, "-m", "venv", folder / "installers"], check=True)
        self.python = self.bin / "python"
        self.environment = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        self.run(self.python, "-m", "pip", "install", "--quiet", "uv", "pipx", "build", "hatchling")
        self.environment |= {
            **settings(self.python),
            "PATH": f"{folder / 'bin'}{os.pathsep}{self.bin}{os.pathsep}{os.environ['PATH']}",
            "UV_PYTHON": sys.executable,
            "UV_PYTHON_DOWNLOADS": "never",
            "UV_CACHE_DIR": str(folder / "cache"),
            **{name: str(folder / "bin") for name in ("UV_TOOL_BIN_DIR", "PIPX_BIN_DIR")},
            "PIPX_HOME": str(folder / "pipx"),
            "HF_HUB_OFFLINE": "1",
        }
        self.wheel = self._wheel()

    def _wheel(self) -> Path:
        sources = max(path.stat().st_mtime for path in (ROOT / "src").rglob("*.*"))
        built = sorted((ROOT / "dist").glob("backhand-*manylinux*x86_64.whl"), key=lambda path: path.stat().st_mtime)
        here = sys.platform == "linux" and os.uname().machine == "x86_64"
        if here and built and built[-1].stat().st_mtime > sources:
            return built[-1]
        self.environment["BACKHAND_KERNELS"] = "none"
        self.run(self.python, "-m", "build", "--wheel", "--no-isolation", "--outdir", self.folder / "dist", ROOT)
        del self.environment["BACKHAND_KERNELS"]
        return next((self.folder / "dist").glob("*.whl"))

    def run(self, *words: object, expected: int = 0) -> str:
        """Run a command; return what it said. Raises SystemExit where it ended otherwise than expected."""
        done = subprocess.run(
            [*map(str, words)], capture_output=True, text=True, check=False, env=self.environment, cwd=self.folder
        )
        if done.returncode != expected:
            said = f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
            raise SystemExit(f"{' '.join(map(str, words))}\nended with {done.returncode}, not {expected}:\n{said}")
        return done.stdout + done.stderr

    def installed(self, path: str, old_torch: bool) -> Sequence[object]:
        """Install along one of the paths; return what `backhand` is called by."""
        environment = self.folder / path
        self.environment["UV_TOOL_DIR"] = str(environment)  # uvx would take what uv has installed
        if path == "uvx":
            return "uvx", "--from", self.wheel, "backhand"
        if path == "uv":
            self.run("uv", "tool", "install", self.wheel)
        elif path == "pipx":
            self.run("pipx", "install", "--python", sys.executable, self.wheel)
        elif path == "pip":
            self.run(sys.executable, "-m", "venv", environment)
            self.run(environment / self.bin.name / "python", "-m", "pip", "install", "--quiet", self.wheel)
        else:
            self.run("uv", "venv", environment)
            newest_torch = [] if old_torch else ["--override", self.folder / "torch.txt"]
            torch = version("torch").partition("+")[0]
            (self.folder / "torch.txt").write_text(f"torch=={torch}\n", encoding="utf-8")
            # The requirements by their file as well: direct is what the command itself names.
            oldest = ["--resolution", "lowest-direct", *newest_torch, "-r", ROOT / "pyproject.toml"]
            oldest = oldest if path == "oldest" else []
            self.run("uv", "pip", "install", "--python", environment, *oldest, self.wheel)
        if path in ("uv", "pipx"):
            return (self.folder / "bin" / "backhand",)
        return (environment / self.bin.name / "backhand",)


def try_path(place: Place, path: str, old_torch: bool) -> str:
    """Install, install the package that the error names, train two steps; return the installed versions."""
    rows, output = place.folder / "rows.jsonl", place.folder / f"run-{path}"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{n} + {n} =", "completion": f" {2 * n}"}) + "\n" for n in range(8)),
        encoding="utf-8",
    )
    backhand = place.installed(path, old_torch)
    place.run(*backhand, "--help")
    train = (*backhand, "train", "--model", "smollm2-135m", "--data", rows, "--max-steps", 2, "--output", output)
    (remedy,) = (
        line.removeprefix("next: ").strip()
        for line in map(str.strip, place.run(*train, expected=MISSING).splitlines())
        if line.startswith("next: ")
    )
    if remedy.startswith("pip "):  # the one of the environment at hand, as if that were activated
        remedy = f"{place.folder / path / place.bin.name}{os.sep}{remedy}"
    place.run("sh", "-c", remedy)
    place.run(*train)
    if not (output / "adapter" / "adapter_model.safetensors").exists():
        raise SystemExit(f"{path}: there is no adapter")
    facts = json.loads((output / "facts.json").read_text(encoding="utf-8"))
    return f"{remedy}\n  {json.dumps(facts['packages'])}"


def main() -> None:
    """Try the paths that are named, all of them otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=str, metavar="|".join(PATHS))
    parser.add_argument("--old-torch", action="store_true")
    arguments = parser.parse_args()
    if unknown := set(arguments.paths) - set(PATHS):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(PATHS)}")
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name))
        print(place.wheel.name)
        for path in arguments.paths or PATHS:
            began = time.perf_counter()
            summary = try_path(place, path, arguments.old_torch)
            took = time.perf_counter() - began
            print(f"{path}: installed, named the missing package, trained; {took:.0f} s\n  {summary}", flush=True)


if __name__ == "__main__":
    main()
