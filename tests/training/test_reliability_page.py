"""docs/reliability.md names a test for each fault, and that test compares its number of cases with the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.fault_table import rows

ROOT = Path(__file__).parents[2]


def test_the_page_has_rows() -> None:
    assert len(rows()) > 10


@pytest.mark.parametrize("fault", rows())
def test_a_test_compares_its_cases_with_the_page(fault: str) -> None:
    _, outcome, test = rows()[fault]
    file, _, name = test.partition("::")
    source = (ROOT / file).read_text(encoding="utf-8")
    match = re.search(rf"^def {name}\(.*?(?=^(?:def|class|@|[A-Z_]+ ?[=:])|\Z)", source, re.DOTALL | re.MULTILINE)
    assert match, f"{test} does not exist"
    compared = re.search(r"documented\(f?\"(.*?)\"\)", match[0], re.DOTALL)
    assert compared, f"{test} does not look at the page"
    assert fault.endswith(re.sub(r"^\{\w+\}", "", compared[1])), f"{test} looks at another row"
    assert outcome
