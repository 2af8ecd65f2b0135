"""The studio in a browser: from a table to a downloaded adapter, with tab, server and run killed in between.

Every screen is checked for accessibility by axe-core and photographed, at two widths, dark and light. With PICTURES set
to a directory, docs/studio.md's pictures are written there.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from backhand.cli.main import main
from backhand.runs.status import read_status
from tests.support.poison import ATTACKS, poison_adapter, poison_run
from tests.support.studio_client import until
from tests.support.tiny_run import TinyRun

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

pytestmark = pytest.mark.browser

_WIDTHS = (360, 1440)
_SCHEMES = ("light", "dark")
_READ = ((360, "light"), (1440, "dark"))
"""Widths and colours in which axe-core reads a screen."""
_PICTURES = {"model": 650, "learn": 1250, "start": 780, "running": 560, "answers": None}
"""Screens in docs/studio.md, with the height that is shown; None for what the window shows."""
_TOO_WIDE = "document.documentElement.scrollWidth > window.innerWidth"

TABLE = "question,answer\n" + "".join(
    f"What is the opening time on day {n}?,We open at {8 + n % 3}:00.\n" for n in range(60)
)


class Studio:
    """A server as a process, which is started again on the same directory."""

    def __init__(self, directory: Path, *words: str) -> None:
        self.directory = directory
        self._words = words
        self.start()

    def start(self) -> None:
        words = ["studio", "--directory", str(self.directory), "--no-browser", *self._words]
        command = [sys.executable, "-m", "backhand", *words]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().partition("Studio: ")[2].strip()
        assert self.address.startswith("http://127.0.0.1:")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def studio(tmp_path: Path, tiny: TinyRun) -> Iterator[Studio]:
    studio = Studio(tmp_path / "studio", "--allow", str(tiny.model))
    yield studio
    studio.kill()


class Screens:
    """Checks and photographs every screen."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.wrong: list[tuple[Any, ...]] = []

    def check(self, page: Page, name: str) -> None:
        from axe_playwright_python.sync_playwright import Axe

        for width in _WIDTHS:
            for scheme in _SCHEMES:
                page.set_viewport_size({"width": width, "height": 900})
                page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
                path = self.directory / f"{name}-{width}-{scheme}.png"
                page.screenshot(path=path, full_page=True)
                assert not page.evaluate(_TOO_WIDE), (name, width)
                if (width, scheme) not in _READ:
                    continue
                for one in Axe().run(page).response["violations"]:
                    self.wrong.append((name, width, scheme, one["id"], [node["html"][:200] for node in one["nodes"]]))
        page.set_viewport_size({"width": 1000, "height": 800})
        page.emulate_media(color_scheme="light")
        if (pictures := os.environ.get("PICTURES")) and name in _PICTURES:
            path, height = Path(pictures) / f"studio-{name}.png", _PICTURES[name]
            if height is None:
                page.screenshot(path=path)
            else:
                page.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": 1000, "height": height})


@pytest.fixture
def screens(tmp_path: Path) -> Iterator[Screens]:
    directory = Path(os.environ.get("SCREENS", tmp_path / "screens"))
    directory.mkdir(parents=True, exist_ok=True)
    screens = Screens(directory)
    yield screens
    assert not screens.wrong, json.dumps(screens.wrong, indent=1)


@contextmanager
def tab(context: BrowserContext, address: str) -> Iterator[Page]:
    """Open an address. Afterwards, nothing may have been logged, and no request have gone elsewhere."""
    page = context.new_page()
    page.set_default_timeout(120_000)
    logged: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: logged.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: logged.append(f"error: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("main, h1")
    yield page
    origin = address.partition("/?token=")[0]
    assert [line for line in logged if "409" not in line] == []
    assert {url for url in asked if not url.startswith(origin)} <= {"data:,"}
    page.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1000, "height": 800}, accept_downloads=True)
    context.grant_permissions([])
    yield context
    context.close()


@pytest.mark.smollm2
def test_from_a_table_to_an_adapter(studio: Studio, context: BrowserContext, screens: Screens, tmp_path: Path) -> None:
    (tmp_path / "faq.csv").write_text(TABLE)
    run = studio.directory / "runs" / "Opening times"
    options = {"max_steps": "24", "save_every": "4", "batch_rows": "4", "answers": "2"}
    with tab(context, studio.address) as page:
        screens.check(page, "empty")
        page.get_by_role("link", name="New run").first.click()
        page.wait_for_selector("input[name=model]")
        screens.check(page, "model")
        page.get_by_role("button", name="Go on to the rows").click()
        page.set_input_files("#file", tmp_path / "faq.csv")
        screens.check(page, "rows")
        page.get_by_role("button", name="Upload it and go on").click()
        page.wait_for_selector("#objective")
        page.select_option("#objective", "sft")  # three answers look like labels
        page.select_option("#prompt", "question")
        page.select_option("#completion", "answer")
        page.get_by_role("button", name="Check the rows").click()
        page.wait_for_selector(".tokens .on")
        page.wait_for_selector("#objective")
        screens.check(page, "learn")
        page.select_option("#completion", "question")
        page.get_by_text("The choices above have changed. Check the rows again.").wait_for()
        assert page.get_by_role("button", name="Go on to the start").is_disabled()
        page.select_option("#completion", "answer")
        page.get_by_role("button", name="Check the rows").click()
        page.wait_for_selector(".tokens .on")
        page.get_by_role("button", name="Go on to the start").click()
        page.get_by_text("More options").click()
        for name, value in options.items():
            page.locator(f"[id='more.{name}']").fill(value)
        page.get_by_role("link", name="What to learn").click()
        page.wait_for_selector(".tokens .on")
        page.get_by_role("button", name="Go on to the start").click()
        for name, value in options.items():
            assert page.locator(f"[id='more.{name}']").input_value() == value
        page.get_by_role("button", name="Plan with these options").click()
        page.wait_for_selector(".tiles .tile")
        shown = page.locator("main > details.command pre").text_content() or ""
        page.fill("#name", "Opening times")
        page.get_by_text("More options").click()
        screens.check(page, "start")
        page.get_by_role("button", name="Start the run").click()
        page.wait_for_selector("progress")
        page.wait_for_selector("#chart-loss svg")
        page.locator("#state", has_text=" left").wait_for()
        send(run, signal.SIGSTOP)  # it waits for the screens to be checked
        screens.check(page, "running")
    # The tab is closed, and the server is killed. The run goes on.
    studio.kill()
    studio.start()
    with tab(context, studio.address) as page:
        page.wait_for_selector("article.run")
        screens.check(page, "list")
        send(run, signal.SIGCONT)
        page.get_by_role("link", name="Opening times").click()
        until((run / "checkpoints" / "latest").exists)
        send(run, signal.SIGKILL)
        page.get_by_text("was killed, and can be continued").wait_for()
        screens.check(page, "killed")
        page.get_by_role("button", name="Continue the run").click()
        page.locator("#state .badge.good").wait_for(timeout=300_000)
        page.wait_for_selector("#export")
        screens.check(page, "finished")
        page.fill("#prompt", "What is the opening time on day 7?")
        page.get_by_role("button", name="Ask both").click()
        page.wait_for_selector("#try-answers .pair")
        screens.check(page, "answers")
        files = {}
        for kind in ("peft", "gguf"):
            page.select_option("#to", kind)
            page.get_by_role("button", name="Make the file").click()
            link = page.locator("#exported a", has_text=f"-{kind}.")
            with page.expect_download() as download:
                link.click(timeout=300_000)
            files[kind] = tmp_path / download.value.suggested_filename
            download.value.save_as(files[kind])
    assert files["gguf"].read_bytes()[:4] == b"GGUF"
    with zipfile.ZipFile(files["peft"]) as archive:
        exported = archive.read("adapter_model.safetensors")
    # The command that the page showed gives the same bits, without an interruption.
    words = [word.replace(str(run.with_name("NAME")), str(tmp_path / "typed")) for word in shlex.split(shown)[1:]]
    assert main([*words, "--quiet"]) == 0
    assert exported == (tmp_path / "typed" / "adapter" / "adapter_model.safetensors").read_bytes()


def send(run: Path, number: int) -> None:
    """Send a signal to the process of a run that trains."""
    status = read_status(run)
    assert status is not None and status.state == "running"
    os.kill(status.process, number)


def test_a_choice_in_a_list_clears_the_text_that_takes_precedence(studio: Studio, context: BrowserContext) -> None:
    (studio.directory / "rows" / "rows-1.csv").write_text(TABLE)
    with tab(context, studio.address) as page:
        page.goto(f"{studio.address.partition('?')[0]}new/learn?data=rows-1.csv&objective=sft")
        page.wait_for_selector("#objective")
        page.fill("#typed_prompt", "{answer}")
        page.select_option("#completion", "answer")
        assert page.input_value("#typed_prompt") == "{answer}"
        page.select_option("#prompt", "question")
        assert page.input_value("#typed_prompt") == ""


def test_every_objective_shows_its_own_columns(
    studio: Studio, tiny: TinyRun, context: BrowserContext, screens: Screens
) -> None:
    (studio.directory / "rows" / "rows-1.csv").write_text(TABLE)
    (studio.directory / "jobs" / "Earlier.json").write_text('{"words": ["train"], "cancelled": true}')
    root = studio.address.partition("?")[0]
    shown = {"sft": "#completion", "dpo": "#dpo-rejected", "kto": "#kto-label", "embed": "#embed-negative"}
    shown |= {"rank": "#rank-score", "classify": "#classify-completion", "grpo": "#reward_length"}
    shown |= {"decide": "#question0", "bake": "#context_text"}
    with tab(context, studio.address) as page:
        page.wait_for_selector("main#main")
        assert page.url == root
        page.goto(studio.address)  # again, with the cookie
        page.wait_for_selector("main#main")
        assert page.url == root
        page.get_by_text("was cancelled before it started").wait_for()
        screens.check(page, "cancelled")
        page.goto(f"{root}new/rows")
        page.get_by_text("uploaded on").wait_for()
        screens.check(page, "uploads")
        page.goto(f"{root}new/learn?data=rows-1.csv&typed_model={tiny.model}")
        page.wait_for_selector("#objective")
        for objective, field in shown.items():
            page.select_option("#objective", objective)
            assert {name: page.is_visible(name) for name in shown.values()} == {
                name: name == field for name in shown.values()
            }
            if objective in ("dpo", "grpo", "bake"):
                screens.check(page, f"learn-{objective}")
        page.fill("#context_text", "Answer in one word.\n</textarea><script>window.hurt = 1</script>")
        page.select_option("#bake-prompt", "question")
        page.get_by_role("button", name="Check the rows").click()
        page.get_by_text("training documents").wait_for()
        assert "context=context-" in page.url and "Answer" not in page.url
        assert page.input_value("#context_text").startswith("Answer in one word.\n</textarea>")
        assert page.evaluate("window.hurt") is None


def test_errors_are_those_of_the_command_line(
    studio: Studio, context: BrowserContext, screens: Screens, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("no rows")
    with tab(context, studio.address) as page:
        page.wait_for_selector("main#main")
        page.goto(f"{studio.address.partition('?')[0]}new/rows")
        page.set_input_files("#file", tmp_path / "notes.txt")
        page.get_by_role("button", name="Upload it and go on").click()
        page.get_by_text("notes.txt is not a file of rows").wait_for()
        page.fill("#typed_data", "/etc/passwd")
        page.get_by_role("button", name="Go on with this file").click()
        page.get_by_text("is not in a folder that this page may read").wait_for()
        screens.check(page, "error")


def test_poison_stays_inert_while_the_page_follows_the_run(
    studio: Studio, finished: Path, context: BrowserContext
) -> None:
    run = studio.directory / "runs" / "one"
    poison_adapter(poison_run(finished, " ".join(ATTACKS)), " ".join(ATTACKS))
    finished.rename(run)
    with tab(context, studio.address) as page:
        page.get_by_role("link", name="one").click()
        page.wait_for_selector("html[data-updated]")
        page.wait_for_selector("#chart-loss svg")
        points = "views.get('loss').data('rows').length"
        before = page.evaluate(points)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 13, "loss": 0.25}\n')
        for _ in range(100):
            if page.evaluate(points) == before + 1:
                break
            page.wait_for_timeout(100)
        assert page.evaluate(points) == before + 1
        assert page.evaluate("window.hurt") is None
        assert page.locator("main img, main iframe, main script, main section > style").count() == 0
        with context.expect_page() as report:
            page.get_by_role("link", name="Report (new tab)").click()
        report.value.wait_for_load_state()
        # The report has an origin of its own: it cannot ask this server anything.
        assert report.value.evaluate("origin") == "null"
        refused = "fetch(location.href).then(() => 'answered', () => 'refused')"
        assert report.value.evaluate(refused) == "refused"
        report.value.close()


def test_another_page_in_the_same_browser_can_do_nothing(studio: Studio, context: BrowserContext) -> None:
    with tab(context, studio.address) as page:
        page.wait_for_selector("main#main")
        root = studio.address.partition("?")[0]
        other = context.new_page()
        other.goto("data:text/html,<title>other</title>")
        for place in ("", "start", "runs/one/delete"):
            asked = "([address, method]) => fetch(address, {method, credentials: 'include'})"
            asked += ".then(reply => reply.text(), () => 'refused')"
            for method in ("GET", "POST"):
                assert other.evaluate(asked, [root + place, method]) == "refused"
        other.set_content(f"<form method=post action='{root}start'><button>go</button></form>")
        other.click("button")
        other.wait_for_load_state()
        assert "this request comes from another page" in other.content() or "token" in other.content()
        other.close()
