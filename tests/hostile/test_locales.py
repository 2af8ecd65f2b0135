"""Odd locales: the same rows, options and labels give the same bytes, and the same exit codes, as in C.UTF-8."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.conftest import World

NO_UTF_8 = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LOCALES: dict[str, dict[str, str]] = {
    "Turkish": {"LC_ALL": "tr_TR.UTF-8"},
    "Turkish in one byte per character": {"LC_ALL": "tr_TR.ISO-8859-9", **NO_UTF_8},
    "Japanese in several bytes": {"LC_ALL": "ja_JP.EUC-JP", **NO_UTF_8},
    "C without UTF-8": {"LC_ALL": "C", **NO_UTF_8},
    "one that is not installed": {"LC_ALL": "xx_XX.UTF-8", "LANG": "yy_YY"},
}
# Cased differently in Turkish: I and ı, İ and i.
ROWS = [
    {"prompt": f"the user asks for {number}", "completion": ("IYI", "ıyı", "iyi")[number % 3]} for number in range(12)
]

SCRIPT = """
import contextlib, hashlib, io, json, locale, pathlib, sys
with contextlib.suppress(locale.Error):
    locale.setlocale(locale.LC_ALL, "")
from backhand.cli.main import main
model, codes, said = sys.argv[1], {}, {}
common = ["--model", model, "--threads", "1", "--dtype", "float32"]
commands = {
    "train": ["train", *common, "--data", "rows.jsonl", "--output", "run", "--max-steps", "3", "--batch-rows", "4",
              "--quiet", "--eval-fraction", "0", "--learning-rate", "1.5e-3"],
    "answers": ["generate", *common, "--adapter", "run/adapter", "--data", "rows.jsonl", "--labels", "auto",
                "--output", "answers.jsonl", "--quiet"],
    "upper case": ["plan", *common[:-1], "FLOAT32", "--data", "rows.jsonl"],
    "Turkish names": ["plan", *common, "--data", "rows.jsonl", "--TITLE", "x"],
    "regular expression": ["train", *common, "--data", "rows.jsonl", "--output", "other", "--max-steps", "1",
                           "--target-modules", r"(?i).*\\.Q_PROJ", "--quiet"],
    "report": ["report", "run", "--output", "page.html"],
    "lint": ["lint", "--model", model, "--data", "rows.jsonl", "--json"],
}
for name, words in commands.items():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        codes[name] = main(words)
    said[name] = out.getvalue()
files = ["run/adapter/adapter_model.safetensors", "run/adapter/adapter_config.json", "answers.jsonl",
         "run/config.toml", "other/adapter/adapter_config.json"]
digests = {file: hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest() for file in files}
page = pathlib.Path("page.html").read_bytes().decode("utf-8")
pathlib.Path("result.json").write_text(json.dumps({"codes": codes, "digests": digests, "lint": said["lint"],
                                                   "page": "rows.jsonl" in page}))
"""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The locales of the table, where the system can compile them; elsewhere they are missing ones."""
    place = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef"):
        for variables in LOCALES.values():
            name, _, encoding = variables["LC_ALL"].partition(".")
            words = ["localedef", "-i", name, "-f", encoding or "UTF-8", str(place / variables["LC_ALL"])]
            subprocess.run(words, check=False, capture_output=True)
    return place


@pytest.fixture(scope="session")
def results(world: World, compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Maps a locale to what the commands leave there."""

    @functools.cache
    def run(name: str) -> dict[str, Any]:
        place = tmp_path_factory.mktemp("locale")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
        (place / "rows.jsonl").write_text(text, encoding="utf-8")
        names = ("LC_ALL", "LANG", "LC_CTYPE", *NO_UTF_8)
        plain = {key: value for key, value in os.environ.items() if key not in names}
        variables = LOCALES.get(name, {"LC_ALL": "C.UTF-8"})
        environment = {**plain, "LOCPATH": str(compiled), "PYTHONPATH": os.pathsep.join(sys.path), **variables}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(world.model)],
            cwd=place,
            env=environment,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
        found: dict[str, Any] = json.loads((place / "result.json").read_text())
        return found

    return run


CODES = {"train": 0, "answers": 0, "upper case": 2, "Turkish names": 2, "regular expression": 0, "report": 0, "lint": 0}


@pytest.mark.parametrize("locale", LOCALES)
def test_commands_end_and_write_the_same_bytes_in_any_locale(locale: str, results: Any) -> None:
    there, reference = results(locale), results("reference")
    assert there["codes"] == CODES
    assert there["digests"] == reference["digests"]
    assert there["lint"] == reference["lint"] and there["page"]
    assert json.loads(there["lint"])["findings"]  # labels are folded alike


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["generate", "--prompt", "ünï", "--max-new-tokens", "1"], 2),
        (["generate", "--prompt", "x", "--labels", "evet,hayır"], 2),
        (["lint", "--data", "rows_ünï.jsonl"], 0),
    ],
)
def test_words_that_a_command_line_of_ascii_cannot_read(
    words: list[str], code: int, world: World, tmp_path: Path
) -> None:
    """A text is refused, with the variable to set; a file is found by its bytes."""
    shutil.copy(world.rows, tmp_path / "rows_ünï.jsonl")
    environment = {**os.environ, "LC_ALL": "C", **NO_UTF_8, "PYTHONPATH": os.pathsep.join(sys.path)}
    whole = [sys.executable, "-m", "backhand", *words, "--model", str(world.model)]
    done = subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, check=False)
    said = done.stderr.decode("utf-8", "replace")
    assert done.returncode == code, said
    assert code == 0 or "set LC_ALL=C.UTF-8" in said
