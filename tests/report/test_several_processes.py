"""Runs on two processes: `watch` while the third step is held and after the end, and report.html."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from backhand.studio.command import serving
from tests.support.page import Page
from tests.support.ranks import start_ranks
from tests.support.studio_client import Client
from tests.support.tiny_run import TinyRun


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def observed_each(page: Page) -> list[list[str]]:
    """Speed and share of waiting in the row of each rank, as the page has them."""
    section = page.one("section", id="curves")
    rows = [row.children for row in section.all() if row.tag == "tr" and row.children[0].text.startswith("rank ")]
    assert [cells[0].text for cells in rows] == ["rank 0", "rank 1"]
    return [[cell.text for cell in cells[2:]] for cells in rows]


def expected(steps: list[dict[str, Any]]) -> list[list[str]]:
    found = []
    for rank in (0, 1):
        computed, waited, tokens = (
            sum(step[name][rank] for step in steps) for name in ("computed_s", "waited_s", "computed_tokens")
        )
        found.append([f"{tokens / computed:,.0f} tokens/s", f"{waited / (computed + waited):.0%} waited"])
    return found


def tiles(page: Page) -> str:
    (section,) = [element for element in page.root.all() if element.attributes.get("class") == "tiles"]
    return section.text


def test_what_watch_and_the_report_show_of_two_processes(tiny: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny.config(run, max_steps=4, save_every=1, eval_every=2, micro_batch_rows=1, answers=0, quiet=False)
    ranks = start_ranks([config] * 2, tmp_path / "ranks", at_place={0: ("step", "stop")})
    ranks.wait_until_stopped(0)
    with serving(run, host="127.0.0.1", port=0) as address:
        client = Client(address).enter()
        _, text, before = client.get("runs/run")
        page = Page(text.encode())
        steps = steps_of(run)
        assert len(steps) == 2 and "2 of 4 steps so far" in page.root.text
        assert observed_each(page) == expected(steps)
        assert f"{steps[-1]['tokens_per_s']:,.0f}tokens per second" in "".join(tiles(page).split("\n"))
        ranks.send(0, signal.SIGCONT)
        assert ranks.exit_codes() == [0, 0], ranks.said()
        _, text, after = client.get("runs/run")
        assert after["etag"] != before["etag"]
        page = Page(text.encode())
    steps = steps_of(run)
    report = Page((run / "report.html").read_bytes())
    assert observed_each(page) == observed_each(report) == expected(steps)
    summary = json.loads((run / "summary.json").read_text())
    for shown in (page, report):
        assert "4 steps" in shown.root.text and "so far" not in shown.root.text
        assert f"{summary['tokens_per_s']:,.0f}tokens per second" in "".join(tiles(shown).split("\n"))
    assert all(f"{step['tokens_per_s']:,.0f} tokens/s" in ranks.said()[0] for step in steps)
    assert ranks.said()[1] == ""  # rank 0 speaks for all
