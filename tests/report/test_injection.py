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
from markdown_it import MarkdownIt

from backhand.report.comparison import comparison_page
from backhand.report.page import run_page
from backhand.report.rendering import environment
from backhand.report.run_record import read_run
from backhand.report.train import train
from tests.support.page import Page
from tests.support.poison import ATTACKS, poison_adapter, poison_run
from tests.support.tiny_run import TinyRun


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
def test_poison_in_the_names_of_modules_stays_text(number: int, finished: Path) -> None:
    attack = ATTACKS[number]
    before = Page(run_page(read_run(finished)))
    after = Page(run_page(read_run(poison_adapter(finished, attack))))
    assert set(elements(after)) == set(elements(before)) and after.scripts == before.scripts
    moved = after.one("section", id="adapter").text
    assert "of 14 modules moved" in moved and f"_proj{attack}" in moved
    assert all(row["name"].endswith(attack) for row in after.charts["moved"]["data"]["values"])


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
    model = Path(shutil.copytree(tiny.model, place / "model<b onclick=alert(5)>"))
    names = {"model": str(model), "data": (str(rows),), "eval_data": (str(rows),), "system": attack}
    run = place / "run<math onload=alert(6)>"
    train(tiny.config(run, max_steps=1, answers=4, report_to=("tensorboard",), **names))
    page = Page((run / "report.html").read_bytes())
    result = page.one("section", id="result").text
    assert run.name in result and model.name in result
    check_card((run / "adapter" / "README.md").read_text())
    check_logged(run)
    assert not page.every("img") + page.every("svg") and len(page.scripts) == 2
    assert not [e for e in page.root.all() if any(name.startswith("on") for name in e.attributes)]
    shown = [element.text for element in page.root.all() if element.attributes.get("class") == "tokens"]
    assert attack in shown[0] and attack in page.one("section", id="answers").text
    assert rows.name in page.one("section", id="data").text


def check_card(text: str) -> None:
    """The adapter's card, as a hub renders Markdown with HTML in it, has no element of ours or of the names."""
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("---", 2)[2])
    parsed = Page(f"<main>{body}</main>".encode())
    assert not [element.tag for element in parsed.root.all() if element.tag in ("img", "svg", "b", "math", "script")]
    assert not [e for e in parsed.root.all() if any(name.startswith("on") for name in e.attributes)]
    assert "model<b onclick=alert(5)>" in parsed.one("table").text


def check_logged(run: Path) -> None:
    """TensorBoard shows the configuration that it receives as code."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (run / "logs" / "tensorboard").iterdir()
    reported = EventAccumulator(str(events))
    reported.Reload()
    (text,) = reported.Tensors("config/text_summary")
    markdown = text.tensor_proto.string_val[0].decode()
    shown = Page(MarkdownIt("commonmark", {"html": True}).render(markdown).encode())
    assert {element.tag for element in shown.root.all()} == {"#document", "pre", "code"}


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
