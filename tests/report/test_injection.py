"""HTML, SVG and script from rows, prompts, answers, file names, configuration, models and proofs: it all stays text.

Everything a run records is poisoned, the page is parsed as a browser would, and no element, attribute or script may be
there that a harmless run's page does not have. The browser's own word on it is in tests/browser.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from backhand.report.comparison import comparison_page
from backhand.report.page import run_page
from backhand.report.rendering import environment
from backhand.report.run_record import read_run
from backhand.report.train import train
from support.page import Page
from support.poison import ATTACKS, poison_run
from support.tiny_run import TinyRun


def elements(page: Page) -> Counter[tuple[str, frozenset[str]]]:
    return Counter((element.tag, frozenset(element.attributes)) for element in page.root.all())


@pytest.mark.parametrize("number", range(len(ATTACKS)))
def test_poison_in_everything_that_is_recorded_stays_text(number: int, finished: Path) -> None:
    attack = ATTACKS[number]
    harmless = poison_run(shutil.copytree(finished, finished.parent / "harmless"), "harmless")
    poisoned = poison_run(finished, attack)
    before, after = Page(run_page(read_run(harmless))), Page(run_page(read_run(poisoned)))
    assert set(elements(after)) == set(elements(before))
    assert after.scripts == before.scripts
    # It is there, as text: in answers, tokens, proofs, configuration and digests alike.
    for section in ("answers", "proofs", "data", "repeat"):
        assert attack in after.one("section", id=section).text, section


@pytest.mark.parametrize("number", range(len(ATTACKS)))
def test_poison_in_a_comparison(number: int, finished: Path) -> None:
    attack = ATTACKS[number]
    other = Path(shutil.copytree(finished, finished.parent / "other"))
    runs = [read_run(poison_run(path, attack)) for path in (finished, other)]
    page = Page(comparison_page(runs))
    assert attack in page.one("section", id="answers").text
    assert not page.every("svg") + page.every("img") + page.every("iframe")
    assert len(page.scripts) == 2


def test_a_real_run_over_poisoned_rows_in_a_poisoned_place(tiny: TinyRun, tmp_path: Path) -> None:
    attack = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>"
    place = tmp_path / "a<img src=x onerror=alert(3)>'\""
    place.mkdir()
    rows = place / "<svg onload=alert(4)>.jsonl"
    rows.write_text("".join(json.dumps({"prompt": attack, "completion": f"{attack} {n}"}) + "\n" for n in range(3)))
    train(tiny.config(place / "run", data=(str(rows),), eval_data=(str(rows),), max_steps=1, system=attack))
    page = Page((place / "run" / "report.html").read_bytes())
    assert not page.every("img") + page.every("svg") and len(page.scripts) == 2
    assert not [e for e in page.root.all() if any(name.startswith("on") for name in e.attributes)]
    shown = [element.text for element in page.root.all() if element.attributes.get("class") == "tokens"]
    assert attack in shown[0] and attack in page.one("section", id="answers").text
    assert rows.name in page.one("section", id="data").text


def test_charts_cannot_end_their_script_nor_hold_an_expression(finished: Path) -> None:
    # A path may hold everything; this one ends a script, and begins a comment and another script.
    named = finished.parent / "a<" / "script><script>alert(1)<!-- {{ 1 }} \u2028&"
    shutil.copytree(finished, named)
    data = comparison_page([read_run(finished), read_run(named)])
    raw = data.decode()
    block = raw[raw.index('id="charts">') + len('id="charts">') :]
    block = block[: block.index("</script>")]
    assert "<" not in block and ">" not in block and "&" not in block
    page = Page(data)
    series = {row["series"] for row in page.charts["training"]["data"]["values"]}
    assert series == {"run", "a</script><script>alert(1)<!-- {{ 1 }} \u2028&"}

    def expressions(spec: object) -> list[object]:
        if isinstance(spec, dict):
            own = [spec[key] for key in ("expr", "calculate", "test", "url", "href") if key in spec]
            return own + [inner for key, value in spec.items() if key != "values" for inner in expressions(value)]
        return [inner for value in spec for inner in expressions(value)] if isinstance(spec, list) else []

    assert expressions(page.charts) == []


def test_half_a_surrogate_pair_does_not_break_the_page(finished: Path) -> None:
    answer = {"source": "x", "prompt": "\ud800", "reference": "", "base": "\udfff", "adapted": "fine"}
    (finished / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    assert "\\ud800" in Page(run_page(read_run(finished))).one("section", id="answers").text


def test_every_template_escapes() -> None:
    loader = environment().loader
    assert loader is not None
    for name in loader.list_templates():
        source = loader.get_source(environment(), name)[0]
        assert "safe" not in source and "autoescape" not in source, name
    assert environment().autoescape is True
