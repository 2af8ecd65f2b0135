"""Run directories that version 0.1 wrote: each command gives what it gave then.

tests/fixtures/runs_of_0_1 contains a finished run of each objective with its checkpoint of step 2, the rows, and models
without weights, which are made here of integers, so that they are equal on all machines. `python -m
tests.runs.test_stored_runs` writes expected.json again, after a change of texts.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import backhand
from backhand.cli.main import main
from backhand.runs.directory import METRICS, SUMMARY
from tests.support.page import Page
from tools.bits import constant

STORED = Path(__file__).parents[1] / "fixtures" / "runs_of_0_1"
EXPECTED = STORED / "expected.json"
NAMES = sorted(path.name for path in (STORED / "runs").iterdir())
WEIGHTS = "adapter_model.safetensors"
SECTIONS = ("result", "curves", "configuration")


def write_weights(directory: Path) -> None:
    """Write weights that are multiples of 1/64."""
    config = transformers.AutoConfig.from_pretrained(directory)
    kind = transformers.AutoModel if config.model_type == "bert" else transformers.AutoModelForCausalLM
    weights = {name: one for name, one in kind.from_config(config).state_dict().items() if name != "lm_head.weight"}
    draw = np.random.default_rng(0)
    for name, one in sorted(weights.items()):
        drawn = torch.from_numpy(draw.integers(-32, 33, tuple(one.shape))).float() / 64
        weights[name] = drawn + float("orm" in name and name.endswith("weight"))
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def set_up(place: Path) -> Path:
    """Copy what is stored, and complete the models."""
    shutil.copytree(STORED, place, dirs_exist_ok=True)
    for model in ("decoder", "encoder"):
        write_weights(place / model)
    return place


def run_command(*words: str) -> str:
    """Return what a command prints to standard output, without the directory."""
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as notes:
        code = main(words)
    text = notes.getvalue() if code else printed.getvalue()
    return f"{code}\n{text}".replace(str(Path.cwd()), ".")


def sections(page: Path) -> list[str]:
    """Return the lines of the page's sections that depend on files of the runs alone."""
    found = Page(page.read_bytes())
    text = "\n".join(found.one("section", id=name).text for name in SECTIONS if found.every("section", id=name))
    lines = (" ".join(line.split()) for line in text.replace(str(Path.cwd()), ".").splitlines())
    return [line for line in lines if line]


def report(name: str, *others: str) -> Any:
    run_command("report", f"runs/{name}", *others, "--output", "page.html")
    return sections(Path("page.html"))


def comparison(name: str) -> Any:
    return report(name, shutil.copytree(f"runs/{name}", f"again/{name}-again"))


def evaluate(name: str) -> Any:
    config = tomllib.loads(Path(f"runs/{name}/config.toml").read_text())
    words = ["--model", config["model"]["model"], "--adapter", f"runs/{name}/adapter", "--dtype", "float32", "--json"]
    words += ["--data", *config["data"]["eval_data"], *(f"--reward={one}" for one in config["rewards"]["reward"])]
    words += ["--threads", "1", "--max-new-tokens", "8"]  # long random answers could depend on the processor
    code, text = run_command("evaluate", *words).split("\n", 1)
    return {code: json.loads(text)}


def export(name: str) -> Any:
    model = tomllib.loads(Path(f"runs/{name}/config.toml").read_text())["model"]["model"]
    words = "--model", model, "--adapter", f"runs/{name}/adapter", "--to", "peft", "--output", f"exported/{name}"
    printed, made = run_command("export", *words), Path("exported", name)
    digest = hashlib.sha256((made / WEIGHTS).read_bytes()).hexdigest()
    config, files = json.loads((made / "adapter_config.json").read_text()), sorted(one.name for one in made.iterdir())
    return {"printed": printed, "files": files, "weights": digest, "config": config}


OUTPUTS = {output.__name__: output for output in (report, comparison, evaluate, export)}


def assert_close(now: Any, then: Any, where: str = "") -> None:
    """Numbers may differ by rounding, as on another processor."""
    if isinstance(then, dict):
        assert [*now] == [*then], where
        for key in then:
            assert_close(now[key], then[key], f"{where}.{key}")
    elif isinstance(then, list):
        assert len(now) == len(then), where
        for number, one in enumerate(then):
            assert_close(now[number], one, f"{where}[{number}]")
    else:
        same = math.isclose(now, then, rel_tol=1e-3, abs_tol=1e-5) if isinstance(then, float) else now == then
        assert same, (where, now, then)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return set_up(tmp_path_factory.mktemp("stored"))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_command_gives_what_it_gave(name: str, output: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert_close(OUTPUTS[output](name), json.loads(EXPECTED.read_text())[name][output])


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_from_its_checkpoint(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends as the stored run did."""
    monkeypatch.chdir(place)
    stored, run = Path("runs", name), Path(shutil.copytree(f"runs/{name}", f"resumed/{name}"))
    assert backhand.train(output=run, resume=True, quiet=True).steps == 4
    for tensor, values in load_file(stored / "adapter" / WEIGHTS).items():
        found = load_file(run / "adapter" / WEIGHTS)[tensor]
        assert (found - values).norm() <= 1e-3 * values.norm(), tensor
    now, then = (json.loads((one / SUMMARY).read_text()) for one in (run, stored))
    now["neutral_answers"] = then["neutral_answers"]  # the same holds for these
    assert_close(constant(now), constant(then))
    now, then = ([json.loads(line) for line in (one / METRICS).read_text().splitlines()] for one in (run, stored))
    assert_close(constant(now), constant(then))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(set_up(Path(directory).resolve()))
        outputs = {name: {part: make(name) for part, make in OUTPUTS.items()} for name in NAMES}
        EXPECTED.write_text(json.dumps(outputs, indent=1, ensure_ascii=False) + "\n")
