"""The README's generated sections say what the code says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", PROJECT / "tools" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_up_to_date(readme: ModuleType) -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert text == readme.fill(text), "run make readme"


def test_every_file_of_the_package_is_listed(readme: ModuleType) -> None:
    text = readme.files_section()
    for path in (PROJECT / "src" / "backhand").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in text


def test_a_section_without_markers_is_refused(readme: ModuleType) -> None:
    with pytest.raises(ValueError, match="commands"):
        readme.fill("# Backhand\n")


def test_a_module_without_docstring_is_refused(readme: ModuleType, tmp_path: Path) -> None:
    module = tmp_path / "silent.py"
    module.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"silent\.py has no docstring"):
        readme.first_line(module)


def test_check_fails_on_a_readme_that_is_out_of_date(
    readme: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme, "PROJECT", tmp_path)
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(text.replace("| `train` |", "| `trian` |"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["readme.py", "--check"])
    assert readme.main() == 1
    monkeypatch.setattr(sys, "argv", ["readme.py"])
    assert readme.main() == 0
    assert "| `trian` |" not in (tmp_path / "README.md").read_text(encoding="utf-8")
