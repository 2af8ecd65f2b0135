"""A directory in which what the documentation says can be typed: rows, the project's docs/, `backhand` on the path.

An adapter that a command line reads (`runs/NAME`), and that nothing before has made, is trained on the spot: one step
on SmolLM2.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
import warnings
from pathlib import Path
from typing import Any

import yaml

from tests.support.doc_blocks import PROJECT, Block

ROWS = [
    {"prompt": f"How many {thing} are in the box?", "completion": f"There are {number} {thing} in the box."}
    for number, thing in enumerate(("pens", "nails", "cups", "keys", "maps", "coins", "shells", "stamps"), start=3)
]
_RUN_READ = re.compile(r"(?<![\w/])runs/(\w+)")
_RUN_MADE = re.compile(r"--output[ =]runs/(\w+)(?![\w/])")
_ROWS_OF_RUNS = {
    "classes": "--data docs/recipes/tickets.jsonl --objective classify",
    "decided": "--data docs/recipes/tickets.jsonl --objective decide",
    "ranked": "--data ranked.jsonl --objective rank",
    "vectors": "--data pairs.jsonl --objective embed --pooling mean",
}
"""Rows and objective of runs that are not trained on `ROWS`."""
_TIME_LIMIT_S = 900


def _words(line: str) -> str:
    """A printed line without what another machine prints otherwise: numbers, digests, verdicts on bits, widths."""
    return " ".join(re.findall(r"[^\W\d_]+", re.sub(r"\b(\d[\d.,]*e[-+]\d+|[0-9a-f]{64}|yes|no)\b", "", line)))


def _check_output(expected: list[str], printed: str) -> None:
    """Each line that the documentation shows is printed, in this order."""
    lines = iter([_words(line) for line in printed.splitlines()])
    for line in expected:
        if (words := _words(line)) and words not in lines:
            raise AssertionError(f"this is not printed, or not in this place: {line}\n{printed}")


class World:
    """A directory to type in.

    Args:
        directory: an empty one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: dict[str, Any] = {}
        (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        pairs = [{"anchor": row["prompt"], "positive": row["completion"]} for row in ROWS]
        (directory / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        ranked = [
            {"query": row["prompt"], "positive": row["completion"], "negative": other["completion"]}
            for row, other in zip(ROWS, ROWS[1:] + ROWS[:1], strict=True)
        ]
        (directory / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
        texts = [{"text": row["completion"]} for row in ROWS]
        (directory / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
        (directory / "axolotl.yaml").write_text("base_model: smollm2-135m\nlora_r: 8\nsample_packing: true\n")
        (directory / "docs").symlink_to(PROJECT / "docs")
        programs = directory / ".bin"
        programs.mkdir()
        program = programs / "backhand"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m backhand "$@"\n')
        program.chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}

    def type(self, script: str, given: str = "") -> str:
        """Run shell lines unchanged, and return what they print; the first that fails fails the test."""
        self._train_what_is_read(script)
        return self._shell(script, given)

    def serve(self, command: str, sign: str) -> tuple[str, int]:
        """Start what serves until it is interrupted, interrupt it when it has printed `sign`: that line, exit code."""
        self._train_what_is_read(command)
        with subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=self.directory,
            env={**self.environment, "HOME": str(self.directory)},  # where the studio keeps its files
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            too_long = threading.Timer(_TIME_LIMIT_S, process.kill)
            too_long.start()
            printed = []
            for line in process.stdout:
                printed.append(line)
                if sign in line:
                    process.send_signal(signal.SIGINT)
                    break
            process.stdout.read()
            too_long.cancel()
            code = process.wait()
        if not any(sign in line for line in printed):
            raise AssertionError(f"exit code {code}, and {sign} was not printed\n{''.join(printed)}")
        return printed[-1], code

    def run(self, block: Block) -> None:
        """Run a block of the documentation, or save it as the file that it says it is."""
        try:
            match block.language:
                case "sh":
                    self.type(block.text)
                case "console":
                    _check_output(block.output, self.type(block.commands))
                case "python":
                    self._python(block)
                case "json" | "jsonl" | "toml" | "yaml":
                    self._file(block)
                case _:
                    raise AssertionError(f"nothing runs a block of the language {block.language!r}")
        except Exception as error:
            raise AssertionError(f"{block.place}: {error}") from error

    def _train_what_is_read(self, script: str) -> None:
        made: set[str] = set()
        for line in script.splitlines():
            for run in set(_RUN_READ.findall(line)) - set(_RUN_MADE.findall(line)) - made:
                self._train(run)
            made |= set(_RUN_MADE.findall(line))

    def _train(self, run: str) -> None:
        if not (self.directory / "runs" / run).exists():
            seed = sum(run.encode())
            rows = _ROWS_OF_RUNS.get(run, "--data rows.jsonl")
            self._shell(f"backhand train {rows} --epochs 1 --seed {seed} --output runs/{run} --quiet", "")

    def _shell(self, script: str, given: str) -> str:
        finished = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.directory,
            env=self.environment,
            input=given,
            check=False,
            capture_output=True,
            text=True,
            timeout=_TIME_LIMIT_S,
        )
        if finished.returncode != 0:
            raise AssertionError(f"exit code {finished.returncode}\n{script}\n{finished.stdout}\n{finished.stderr}")
        return finished.stdout

    def _python(self, block: Block) -> None:
        code = compile("\n" * (block.line) + block.text, str(PROJECT / block.page), "exec")
        before = Path.cwd()
        os.chdir(self.directory)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other libraries warn about each other
                exec(code, self.names)
        finally:
            os.chdir(before)

    def _file(self, block: Block) -> None:
        match block.language:
            case "toml":
                tomllib.loads(block.text)
            case "yaml":
                yaml.safe_load(block.text)
            case "json":
                json.loads(block.text)
            case _:
                for line in block.text.splitlines():
                    json.loads(line)
        if block.title:
            (self.directory / block.title).write_text(block.text, encoding="utf-8")
