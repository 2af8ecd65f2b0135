"""The report in a browser: nothing logged, nothing fetched, charts drawn and alive, at every width, dark and light."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from backhand.report.command import write_report
from backhand.report.page import SECTIONS, run_page
from backhand.report.run_record import read_run
from backhand.report.train import train
from tests.support.poison import ATTACKS, poison_adapter, poison_run
from tests.support.tiny_run import TinyRun, with_options

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.support.open_page import OpenPage

pytestmark = pytest.mark.browser


# Texts that are wider than their box: they would cover their neighbours, or be cut off.
_TOO_NARROW = """
[...document.querySelectorAll('td, th, p, pre, figcaption, h1, h2, h3, summary, .tile, .label, .text')]
    .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)
"""


def check(page: Page) -> None:
    """Every section is there, every chart is drawn, and nothing is wider than the window."""
    assert [section.get_attribute("id") for section in page.locator("section").all()] == list(SECTIONS)
    charts = page.locator(".chart")
    assert charts.count() >= 10
    assert page.locator(".chart svg").count() == charts.count()
    wide, window = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window
    assert page.evaluate(_TOO_NARROW) == []


def hover(page: Page, chart: str) -> str:
    """What is shown when the pointer is over a point or a cell of a chart."""
    drawn = page.locator(f"#{chart} svg")
    drawn.scroll_into_view_if_needed()
    marks = page.locator(f"#{chart} svg g.mark-symbol.role-mark path, #{chart} svg g.mark-rect.role-mark path")
    for share in (0.4, 0.5, 0.6, 0.9):
        box = marks.nth(int(share * marks.count())).bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_timeout(150)
        if page.locator("#vg-tooltip-element.visible").count():
            return page.locator("#vg-tooltip-element").inner_text()
    raise AssertionError(f"nothing is shown over {chart}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_every_width_and_light(width: int, scheme: str, finished: Path, open_page: OpenPage) -> None:
    with open_page((finished / "report.html").as_uri(), width=width, scheme=scheme) as page:
        check(page)
        paper, ink = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
        label = page.locator("#chart-loss svg text").first.evaluate("e => getComputedStyle(e).fill")
        assert (_luminance(paper) > 0.8) == (scheme == "light")
        # What WCAG asks of small text.
        assert _contrast(ink, paper) > 7 and _contrast(label, paper) > 4.5


def _contrast(one: str, other: str) -> float:
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it, of `rgb(…)`."""
    shares = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_charts_answer_the_pointer(finished: Path, open_page: OpenPage) -> None:
    with open_page((finished / "report.html").as_uri()) as page:
        text = hover(page, "chart-loss")
        assert "step" in text and "nats per supervised token" in text and " rows" in text
        for chart in page.locator(".chart").all():
            shown = hover(page, str(chart.get_attribute("id")))
            assert shown.strip() and "undefined" not in shown and "NaN" not in shown
        assert "module" in hover(page, "chart-moved") and "documents" in hover(page, "chart-lengths")


def test_printed_it_is_complete(finished: Path, open_page: OpenPage) -> None:
    from pypdf import PdfReader

    with open_page((finished / "report.html").as_uri(), scheme="dark") as page:
        pdf = PdfReader(io.BytesIO(page.pdf(format="A4")))
    text = "\n".join(sheet.extract_text() for sheet in pdf.pages)
    for heading in ("Held-out rows", "How training went", "The adapter itself", "Proofs about this run", "The rows"):
        assert heading in text
    # What is closed on the screen is open on paper, and charts are drawn there with their axes.
    assert "PeftModel.from_pretrained" in text and "vllm serve" in text
    assert "optimizer step" in text and "learning_rate" in text and len(pdf.pages) >= 4


@pytest.mark.parametrize("number", range(len(ATTACKS)))
def test_injected_markup_stays_inert(number: int, finished: Path, open_page: OpenPage) -> None:
    poison_adapter(poison_run(finished, ATTACKS[number]), ATTACKS[number])
    (finished / "report.html").write_bytes(run_page(read_run(finished)))
    with open_page((finished / "report.html").as_uri()) as page:
        check(page)
        # The names of modules, in the text next to the pointer too.
        assert (
            "_proj" in hover(page, "chart-moved") and page.locator("#vg-tooltip-element img, svg script").count() == 0
        )
        assert page.evaluate("window.hurt") is None
        assert page.locator("section img, section iframe, section script").count() == 0


@pytest.mark.smollm2
def test_the_report_of_a_real_model(tiny: TinyRun, tmp_path: Path, open_page: OpenPage) -> None:
    options = {"model": "smollm2-135m", "dtype": "auto", "batch_rows": 2, "max_steps": 3, "eval_every": 1, "answers": 2}
    train(with_options(tiny.config(tmp_path / "run"), **options))
    path = write_report(tmp_path / "run")
    assert path.stat().st_size < 2_000_000
    for width in (360, 1280):
        with open_page(path.as_uri(), width=width) as page:
            check(page)
            assert "of 210 modules moved" in page.locator("#adapter").inner_text()
            hover(page, "chart-moved")
