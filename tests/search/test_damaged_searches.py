"""Damage to the files of a search: an error of the contract, and never a worse adapter than the published one."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backhand.cli.main import main
from backhand.errors import ArtifactError
from backhand.search.command import search_command
from backhand.search.result import SearchResult
from backhand.search.space import parse_dimensions
from backhand.search.study import Study
from tests.fuzz.searches import damaged_file
from tests.support.fault_table import documented
from tests.support.searches import OVER, search_config
from tests.support.tiny_run import TinyRun

DAMAGES = 40


@pytest.fixture
def search(found: SearchResult, tmp_path: Path) -> Path:
    """A finished search of its own."""
    return Path(shutil.copytree(found.output, tmp_path / "search"))


def resumed(search: Path) -> int:
    return main(["search", "--resume", "--output", str(search), "--quiet"])


def published(search: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((search / "adapter").iterdir())}


def test_a_damaged_best_trial_is_not_published_and_its_own_resume_mends_it(
    search: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = published(search)
    for path in search.glob("trials/*/adapter/adapter_model.safetensors"):
        path.write_bytes(b"x")
    assert resumed(search) == 4
    assert published(search) == before
    said = capsys.readouterr().err
    assert "adapter_model.safetensors: its bytes have changed" in said
    remedy = said.partition("backhand train --resume --output ")[2].split()[0]
    assert main(["train", "--resume", "--output", remedy, "--quiet"]) == 0
    assert resumed(search) == 0
    assert published(search) == before


def test_the_adapter_of_another_trial_is_not_published_either(search: Path, found: SearchResult) -> None:
    before, best = published(search), search / "trials" / f"{found.best:03d}" / "adapter"
    other = next(path for path in sorted(search.glob("trials/*/adapter")) if path != best)
    shutil.rmtree(best)
    shutil.copytree(other, best)
    assert resumed(search) == 4
    assert published(search) == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "backhand.json", "README.md"])
def test_a_file_of_the_best_adapter_is_missing(name: str, search: Path, found: SearchResult) -> None:
    before = published(search)
    (search / "trials" / f"{found.best:03d}" / "adapter" / name).unlink()
    assert resumed(search) == 4
    assert published(search) == before


def lines_changed(search: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    journal = search / "study.journal"
    records = [change(json.loads(line)) for line in journal.read_text().splitlines()]
    journal.write_text("".join(json.dumps(record) + "\n" for record in records if record is not None))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_search_of_before_digests_is_held_against_the_adapters_record(search: Path, damaged: bool) -> None:
    lines_changed(search, lambda record: None if "adapter" in record.get("user_attr", {}) else record)
    before = published(search)
    if damaged:
        for path in search.glob("trials/*/adapter/adapter_config.json"):
            path.write_bytes(path.read_bytes().replace(b"}", b"} ", 1))
    assert resumed(search) == (4 if damaged else 0)
    assert published(search) == before


def attribute(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    """Give a trial's attribute another value."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        for key in ("user_attr", "user_attrs"):
            if name in record.get(key, {}) or key == "user_attrs" in record:
                record[key][name] = value
        return record

    return change


def renamed(record: dict[str, Any]) -> dict[str, Any]:
    attributes = record.get("user_attrs", {})
    if "seed" in attributes:
        attributes["sed"] = attributes.pop("seed")
    return record


@pytest.mark.parametrize(
    "change",
    [
        renamed,
        lambda record: [],
        lambda record: {**record, "op_code": 99},
        lambda record: {**record, "trial_id": []} if "trial_id" in record else record,
        lambda record: {**record, "user_attrs": None} if "user_attrs" in record else record,
        lambda record: {**record, "study_name": "other"} if "study_name" in record else record,
        lambda record: None if "done" in record.get("user_attr", {}) else record,
        lambda record: None if "params" in record else record,
        *[
            attribute(name, value)
            for name, values in {
                "goal": [0, 9, "3", None, True],
                "done": [-1, 9, 1.5],
                "steps": [10**400, "many"],
                "spent_s": [-1, float("nan"), 10**400],
                "losses": [[], [None], ["low"], 3.0, [float("inf")], [float("nan"), 1.0]],
                "seed": [None, -1, "x"],
                "repeats": [7, "x"],
                "failed": [3, []],
                "adapter": [[], {"../x": "sha256:0"}, {"x\0": "sha256:0"}, {"x": 3}],
            }.items()
            for value in values
        ],
    ],
)
def test_a_journal_that_no_search_wrote(change: Callable[[dict[str, Any]], Any], search: Path) -> None:
    before = published(search)
    lines_changed(search, change)
    assert resumed(search) == 4
    assert published(search) == before


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cut(path: Path) -> None:
    path.write_text("{")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["study.journal", "rows.json"])
@pytest.mark.parametrize("damage", [fifo, endless, directory, empty, cut, Path.unlink])
def test_a_file_of_the_search_is_something_else(damage: Callable[[Path], None], name: str, search: Path) -> None:
    before = published(search)
    damage(search / name)
    assert resumed(search) == 4
    assert published(search) == before


@pytest.mark.parametrize("text", ["[]", "null", '{"data": 3, "held_out": ""}', "{}", "[" * 100_000])
def test_digests_of_rows_that_no_search_wrote(text: str, search: Path) -> None:
    (search / "rows.json").write_text(text)
    assert resumed(search) == 4


@pytest.mark.parametrize("value", ['"low"', "[]", "true"])
@pytest.mark.parametrize("name", ["eval_loss", "step"])
def test_an_evaluation_that_no_run_wrote(name: str, value: str, tiny: TinyRun, tmp_path: Path) -> None:
    search_command(search_config(tiny, tmp_path / "search", {"trials": 1, "prune": "none", "over": ("rank=2,4",)}))
    search = tmp_path / "search"
    lines_changed(search, lambda record: None if record.get("user_attr") or record["op_code"] == 6 else record)
    metrics = search / "trials" / "000" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        if "eval_loss" in line and line["step"]:
            line[name] = json.loads(value)
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert resumed(search) == 4
    shutil.rmtree(metrics.parent)
    assert resumed(search) == 0


def test_a_journal_that_lost_trials_does_not_take_over_their_runs(search: Path) -> None:
    journal = search / "study.journal"
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    assert resumed(search) == 4


def test_a_damaged_trial_ends_the_search_and_has_not_failed(search: Path) -> None:
    study = Study(search, parse_dimensions(OVER), {"learning_rate": 3e-3, "rank": 3}, last=3)
    with study.locked():
        number = next(trial.number for trial in study.trials() if trial.done == 1)
        study.write(number, {"goal": 2})
    files = sorted((search / "trials" / f"{number:03d}" / "checkpoints").glob("step-*/*"))
    kept = {path: path.read_bytes() for path in files}
    for path in files:
        path.write_bytes(b"x")
    assert resumed(search) == 4
    assert study.trials()[number].failed is None
    for path, data in kept.items():
        path.write_bytes(data)
    assert resumed(search) == 0
    assert study.trials()[number].done == 2


def test_any_damage_to_the_files_of_a_search(search: Path, tmp_path: Path) -> None:
    assert documented("any damage to the files of a finished search") == DAMAGES
    before = published(search)
    for number in range(DAMAGES):
        place = Path(shutil.copytree(search, tmp_path / str(number)))
        name, data = damaged_file(random.Random(f"search/{number}"), place)
        (place / name).write_bytes(data)
        there = published(place)
        code = resumed(place)
        assert code in (0, 2, 3, 4), (number, name)
        assert published(place) == (there if code else before), (number, name)
        shutil.rmtree(place)


def test_read_errors_name_the_line(search: Path) -> None:
    with (search / "study.journal").open("a") as file:
        file.write("[]\n")
    study = Study(search, (), {}, last=3)
    lines = len((search / "study.journal").read_text().splitlines())
    with pytest.raises(ArtifactError, match="the study is damaged") as raised:
        study.trials()
    assert f"line {lines} is not a JSON object" in str(raised.value)
