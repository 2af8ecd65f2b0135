"""proofs.jsonl as the page shows it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from backhand.cli.main import main
from backhand.report.page import run_page
from backhand.report.proof_tables import KINDS, proof_tables
from backhand.report.run_record import read_run
from backhand.report.train import train
from backhand.verify.command import verify_command
from backhand.verify.options import VerifyOptions
from tests.support.page import Page
from tests.support.tiny_run import TinyRun


def kinds_not_run(run: Path, page: bytes | None = None) -> set[str | None]:
    parts = Page(page or run_page(read_run(run))).every("span", class_="badge not-run")
    return {part.attributes["data-kind"] for part in parts}


def test_what_was_not_run_says_so(finished: Path) -> None:
    assert kinds_not_run(finished) == {"gradients", "invariances", "resume", "merge", "export"}


def test_every_command_that_proves_something_fills_its_table(tiny: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny.config(run, prove_resume=2))
    options = VerifyOptions()
    verify_command(replace(options, verify=replace(options.verify, run=run, max_tokens=24)))
    assert kinds_not_run(run) == {"export"}
    page = Page(run_page(read_run(run)))
    (gradients,) = page.every("table", **{"data-kind": "gradients"})
    recorded = [json.loads(line) for line in (run / "proofs.jsonl").read_text().splitlines()]
    of_gradients = [line for line in recorded if line["kind"] == "gradients"]
    assert len(of_gradients) > 7 and all(line["proof"] in gradients.text for line in of_gradients)
    assert f"{of_gradients[-1]['value']:.1e}" in gradients.text


def test_the_newest_of_equal_statements_counts_and_failures_are_marked(finished: Path) -> None:
    with (finished / "proofs.jsonl").open("a") as file:
        for passed, value in ((True, 1e-12), (False, 0.5)):
            line = {"proof": "d lora_A = autograd's", "passed": passed, "value": value, "bound": 1e-9}
            file.write(json.dumps(line | {"command": "verify"}) + "\n")
    page = Page(run_page(read_run(finished)))
    (table,) = page.every("table", **{"data-kind": "gradients"})
    assert "0.5" in table.text and "1.0e-12" not in table.text
    assert [strong.text for strong in page.every("strong", class_="bad")] == ["no"]
    assert "5 of 6" in page.one("section", id="result").text


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ({"command": "export"}, "export"),
        ({"command": "merge"}, "merge"),
        ({"command": "train"}, "guards"),
        ({"command": "verify", "kind": "merge"}, "merge"),
        ({"command": "verify", "kind": "<script>"}, "gradients"),
        ({}, "guards"),
    ],
)
def test_lines_without_a_kind_go_by_their_command(line: dict[str, str], kind: str) -> None:
    tables = proof_tables([{"proof": "x", **line}], run="r", export="")
    assert [table.kind for table in tables] == list(KINDS)
    assert [table.kind for table in tables if table.lines] == [kind]


def test_a_command_to_run_quotes_a_path_with_a_space_once(finished: Path) -> None:
    run = finished.rename(finished.with_name("my run"))
    commands = [code.text for code in Page(run_page(read_run(run))).every("code")]
    assert f"backhand verify --run '{run}'" in commands


def test_the_page_is_written_again_when_a_command_proves_something(finished: Path, tmp_path: Path) -> None:
    adapter, model = str(finished / "adapter"), str(tiny_model_of(finished))
    page = finished / "report.html"
    before = page.read_bytes()
    to_gguf = ["export", "--model", model, "--adapter", adapter, "--to", "gguf", "--quiet"]
    assert main([*to_gguf, "--output", str(tmp_path / "one.gguf")]) == 0
    assert kinds_not_run(finished, page.read_bytes()) == {"gradients", "invariances", "resume", "merge"}
    merging = ["merge", "--model", model, "--adapter", adapter, "--quiet"]
    assert main([*merging, "--output", str(tmp_path / "merged")]) == 0
    assert kinds_not_run(finished, page.read_bytes()) == {"gradients", "invariances", "resume"}
    assert main(["verify", "--run", str(finished), "--max-tokens", "24"]) == 0
    assert kinds_not_run(finished, page.read_bytes()) == {"resume"}
    # A proof that fails is listed as well.
    tight = [*merging, "--dtype", "bfloat16", "--tolerance", "1e-9", "--output", str(tmp_path / "rounded")]
    assert main(tight) == 6
    assert [strong.text for strong in Page(page.read_bytes()).every("strong", class_="bad")] == ["no"]
    assert len(page.read_bytes()) > len(before)


def test_no_page_is_made_where_there_is_none_and_none_where_nothing_was_proved(finished: Path, tmp_path: Path) -> None:
    page, model = finished / "report.html", str(tiny_model_of(finished))
    to_gguf = ["export", "--model", model, "--adapter", str(finished / "adapter"), "--to", "gguf", "--quiet"]
    page.write_text("as it was")
    assert main(["export", "--adapter", str(finished / "adapter"), "--to", "gguf"]) == 2
    assert main([*to_gguf, "--output", str(finished / "config.toml")]) == 2
    assert page.read_text() == "as it was"
    page.unlink()
    assert main([*to_gguf, "--output", str(tmp_path / "one.gguf")]) == 0
    assert not page.exists()


def tiny_model_of(run: Path) -> Path:
    """The model that a run was made with."""
    return Path(read_run(run).config["model"]["model"])
