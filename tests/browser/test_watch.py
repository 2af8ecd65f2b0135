"""`watch` in a browser while a run goes on: the curve grows, base and adapter answer, a killed run is shown as such."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from backhand.options.config import TrainConfig
from backhand.options.config_file import dump_config
from backhand.report.options import WatchOptions
from backhand.report.watch import serving
from support.poison import ATTACKS, poison_adapter, poison_run
from support.tiny_run import TinyRun, with_options

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from support.open_page import OpenPage

pytestmark = pytest.mark.browser

# A step of the tiny model takes milliseconds: each one waits a little, so that there is something to watch.
_RUN = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from backhand.report.train import train
from backhand.options.config_file import load_config
train(load_config(Path(sys.argv[2])), callbacks=[lambda record: time.sleep(float(sys.argv[3]))])
"""


def points(page: Page, chart: str) -> int:
    return int(page.evaluate(f"views.get('{chart}')?.data('rows').length ?? 0"))


def until(page: Page, true: Callable[[], bool], tries: int = 1200) -> None:
    """Wait in the browser's own time; its `wait_for_function` is what the page's policy forbids."""
    for _ in range(tries):
        if true():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it never came true")


def test_a_run_that_goes_on_and_is_killed(tiny: TinyRun, tmp_path: Path, open_page: OpenPage) -> None:
    config = tiny.config(tmp_path / "run", epochs=500, save_every=10, eval_every=10)
    watch_until_killed(config, tmp_path, open_page, pause_s=0.3)


@pytest.mark.smollm2
def test_a_run_of_a_real_model_that_goes_on_and_is_killed(tiny: TinyRun, tmp_path: Path, open_page: OpenPage) -> None:
    options = {
        "model": "smollm2-135m",
        "dtype": "auto",
        "batch_rows": 2,
        "save_every": 8,
        "eval_every": 4,
        "answers": 0,
    }
    config = with_options(tiny.config(tmp_path / "run", epochs=500), **options)
    watch_until_killed(config, tmp_path, open_page, pause_s=0.0)


def watch_until_killed(config: TrainConfig, tmp_path: Path, open_page: OpenPage, *, pause_s: float) -> None:
    """See the curve grow, ask before and after the first checkpoint, and see the run killed."""
    run = config.run.output
    (tmp_path / "run.toml").write_text(dump_config(config))
    source = str(Path(__file__).parents[2] / "src")
    process = subprocess.Popen([sys.executable, "-c", _RUN, source, str(tmp_path / "run.toml"), str(pause_s)])
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "status.json").exists(), process)
        with serving(WatchOptions(run=run, max_new_tokens=8)) as server, open_page(server.address) as page:
            assert "Running: process" in page.locator(".state").inner_text()
            if not (run / "checkpoints" / "latest").exists():
                assert "There is no checkpoint yet" in page.locator("#try-state").inner_text()
                assert page.locator("#try-ask").is_disabled()
            before = points(page, "loss")
            until(page, lambda: points(page, "loss") > before + 3)
            page.wait_for_selector("#try-ask:enabled")
            # What it will take is said before anything is loaded.
            until(page, lambda: " of memory, in addition to the training" in page.locator("#try-state").inner_text())
            page.fill("#try-prompt", "<b>the user</b> asks <script>window.hurt=1</script>")
            page.click("#try-ask")
            page.wait_for_selector("#try-answers:not([hidden])")
            assert "with the adapter of step" in page.locator("#try-step").inner_text()
            assert page.evaluate("window.hurt") is None
            until(page, lambda: page.locator("#try-state").inner_text().startswith("The model is loaded,"))
            process.kill()
            process.wait()
            page.wait_for_selector(".state.bad")
            assert page.locator(".state").inner_text().startswith("Killed: process")
            # What was typed and answered is still there after all the updates.
            assert page.input_value("#try-prompt").startswith("<b>") and page.locator("#try-answers").is_visible()
    finally:
        process.kill()
        process.wait()


def test_poison_stays_inert_on_the_live_page_too(finished: Path, open_page: OpenPage) -> None:
    attack = " ".join(ATTACKS)
    poison_adapter(poison_run(finished, attack), attack)
    with serving(WatchOptions(run=finished)) as server, open_page(server.address) as page:
        # What the box says of a model that is not there holds its name.
        until(page, lambda: "cannot be opened" in page.locator("#try-state").inner_text())
        assert "onerror" in page.locator("#try-state").inner_text()
        # And once the page has brought itself up to date, poison and all.
        before = points(page, "loss")
        with (finished / "metrics.jsonl").open("a") as file:
            file.write('{"step": 13, "loss": 0.25}\n')
        until(page, lambda: points(page, "loss") == before + 1)
        assert page.evaluate("window.hurt") is None
        assert page.locator("section img, section iframe, section script, #report > section style").count() == 0


def test_another_page_in_the_same_browser_learns_nothing(finished: Path, open_page: OpenPage) -> None:
    with serving(WatchOptions(run=finished)) as server, open_page(server.address) as page:
        context = page.context
        other = context.new_page()
        other.goto("data:text/html,<title>other</title>")
        fetched = other.evaluate(
            "address => fetch(address + 'answer', {method: 'POST', body: '{\"prompt\": \"x\"}'})"
            ".then(reply => reply.text(), error => 'refused')",
            server.address,
        )
        assert fetched == "refused"
        wrong = other.goto(f"http://127.0.0.1:{server.server_port}/wrong-token/")
        assert wrong is not None and wrong.status == 403
        other.close()


def wait_for(there: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not there():
        assert process.poll() is None, "the run ended before it began"
        time.sleep(0.1)
