"""The system's Chromium, driven by Playwright, and a finished run to look at. No browser is a failure, never a skip."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from backhand.report.train import train
from support.tiny_run import TinyRun

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from support.open_page import OpenPage

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    found = os.environ.get("CHROMIUM") or next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(f"no browser found ({', '.join(_NAMES)}): install Chromium, or name one in CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> OpenPage:
    """Opens an address; when the page is left, no error may have been logged and no request have gone elsewhere."""

    @contextmanager
    def opened(address: str, *, width: int = 1280, scheme: str = "light") -> Iterator[Page]:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
        page = context.new_page()
        page.set_default_timeout(120_000)
        logged: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: logged.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: logged.append(f"error: {error}"))
        page.on("dialog", lambda dialog: logged.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("html[data-drawn]", state="attached")
        yield page
        assert logged == []
        assert {url.partition("?")[0] for url in asked if not url.startswith(address)} <= {"data:,"}
        context.close()

    return opened


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(Path(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def _finished(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Path(tmp_path_factory.mktemp("runs")) / "run"
    train(tiny.config(run, epochs=4, learning_rate=1e-2))
    return run


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    return Path(shutil.copytree(_finished, tmp_path / "run"))
