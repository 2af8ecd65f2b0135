"""The system's Chromium, driven by Playwright, and a finished run to look at. No browser is a failure, never a skip."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.finished_runs import finished, finished_once, tiny

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from tests.support.open_page import OpenPage

__all__ = ["browser", "finished", "finished_once", "open_page", "tiny"]
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
