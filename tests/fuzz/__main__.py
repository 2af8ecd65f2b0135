"""`python -m tests.fuzz`: draw files of every kind, let commands read them, and keep what did not end as it should.

    make fuzz                                          a minute, on two cores
    make fuzz FUZZ_ARGS='--seconds 3600'               an hour
    python -m tests.fuzz --kind gguf --seed 41 --files 1    the one case again

Case N of a kind is drawn from the seed "kind/N" alone: it is the same on every machine and after every other case.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.fuzz import kinds as file_kinds
from tests.fuzz import read_back
from tests.fuzz.child import Attempt, run_attempts
from tests.fuzz.kinds import World, lay_out, make_world
from tests.fuzz.searches import make_search, search_case, yaml_case

KINDS = {**file_kinds.KINDS, **read_back.KINDS, "search": search_case, "yaml": yaml_case}
AT_ONCE = 56
"""Cases in one child."""


def main() -> int:
    """Run until the time or the files are up; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--files", type=int, help="of each kind; not given: as many as the time allows")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="that share the cases")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="where failing cases are kept")
    options = parser.parse_args()
    options.keep = options.keep.resolve()
    kinds = list(KINDS) if options.kind == "all" else [options.kind]
    place = Path(tempfile.mkdtemp(prefix="backhand-fuzz-"))
    try:
        world = make_world(place / "world")
        _warm_up(world, place)
        began = time.monotonic()
        forked = multiprocessing.get_context("fork")  # with what has been imported here
        with ProcessPoolExecutor(options.processes, forked) as pool:  # one that is killed raises, and is not waited for
            tallies = list(pool.map(partial(_share, kinds, world, place, options), range(options.processes)))
        return _reported(kinds, tallies, options, time.monotonic() - began)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _warm_up(world: World, place: Path) -> None:
    """Import here what commands import, so that children begin with it."""
    from backhand.cli.main import main as command

    os.chdir(place)
    make_search(world)
    read_back.make_files(world)
    for words in (
        ["lint", "--model", str(world.model), "--data", str(world.rows)],
        ["inspect", str(world.adapter)],
        ["generate", "--model", str(world.gguf), "--prompt", "a", "--max-new-tokens", "1", "--threads", "1"],
        ["plan", "--model", str(world.model), "--data", str(world.rows)],
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            code = command(words)
        if code != 0:
            raise SystemExit(f"the good files end with {code}: {' '.join(words)}")


class Tally(NamedTuple):
    """Of the cases of one process.

    Attributes:
        codes: how often a kind ended in each exit code or fault.
        worst: of each kind, the most processor seconds and bytes of a case.
        failures: how many there were.
        stop: the number after its last case.
    """

    codes: dict[str, Counter[str]]
    worst: dict[str, tuple[float, int]]
    failures: int
    stop: int


def _share(kinds: list[str], world: World, place: Path, options: argparse.Namespace, share: int) -> Tally:
    """Every so many cases in turn, of which this process takes the batch of its number."""
    began = time.monotonic()
    own = place / f"share-{share}"
    own.mkdir()
    codes: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    worst: dict[str, tuple[float, int]] = dict.fromkeys(kinds, (0.0, 0))
    failures, batch = 0, AT_ONCE // len(kinds)
    number, stop = options.seed + share * batch, options.seed
    last = None if options.files is None else options.seed + options.files
    while (last is None or number < last) and time.monotonic() - began < options.seconds:
        stop = number + batch if last is None else min(last, number + batch)
        drawn = [
            (kind, n, KINDS[kind](random.Random(f"{kind}/{n}"), world)) for n in range(number, stop) for kind in kinds
        ]
        attempts = [Attempt(case.command, own / f"{kind}-{n}") for kind, n, case in drawn]
        for (_, _, case), attempt in zip(drawn, attempts, strict=True):
            attempt.place.mkdir()
            lay_out(case, attempt.place)
        for (kind, n, case), attempt, outcome in zip(drawn, attempts, run_attempts(attempts), strict=True):
            codes[kind][outcome.fault or str(outcome.code)] += 1
            worst[kind] = max(worst[kind][0], outcome.cpu_s), max(worst[kind][1], outcome.peak_bytes)
            if outcome.fault:
                failures += 1
                kept = options.keep / f"{kind}-{n}"
                shutil.rmtree(kept, ignore_errors=True)
                kept.mkdir(parents=True)
                for name, data in case.files.items():
                    (kept / Path(name).name[-200:]).write_bytes(data)
                said = f"{outcome.fault}\nbackhand {' '.join(case.command)}\n\n{outcome.said}"
                (kept / "outcome.txt").write_text(said, encoding="utf-8", errors="replace")
                print(f"{kind} {n}: {outcome.fault}: {outcome.said.strip().splitlines()[:1]}", flush=True)
            shutil.rmtree(attempt.place)
        number += options.processes * batch
    return Tally(codes, worst, failures, stop)


def _reported(kinds: list[str], tallies: list[Tally], options: argparse.Namespace, took_s: float) -> int:
    """Print what all processes have found; 1 if anything failed."""
    for kind in kinds:
        codes = sum((tally.codes[kind] for tally in tallies), Counter[str]())
        counted = ", ".join(f"{count:,} × {code}" for code, count in sorted(codes.items()))
        seconds, peak = (max(most) for most in zip(*(tally.worst[kind] for tally in tallies), strict=True))
        print(f"{kind:15} {codes.total():6,} files: {counted}; at most {seconds:.1f} s, {peak / 2**20:.0f} MB")
    failures = sum(tally.failures for tally in tallies)
    last = max(tally.stop for tally in tallies) - 1
    print(f"{failures} failures in {took_s:.0f} s, cases {options.seed} to {last}")
    if failures:
        print(f"kept in {options.keep}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
