"""The generated sections of README.md and docs/ say what the code and the stored results say."""

from __future__ import annotations

import importlib.util
import json
import shutil
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


PAGES = (
    "README.md",
    "docs/commands.md",
    "docs/decisions.md",
    "docs/files.md",
    "docs/benchmarks.md",
    "docs/models.md",
    "docs/quantized.md",
    "docs/scaling.md",
)


def test_every_page_with_a_generated_section_is_known(readme: ModuleType) -> None:
    marked = [path for path in [PROJECT / "README.md", *PROJECT.glob("docs/**/*.md")] if "made by" in path.read_text()]
    assert {path.relative_to(PROJECT).as_posix() for path in marked} == set(readme.SECTIONS) == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_up_to_date(readme: ModuleType, page: str) -> None:
    text = (PROJECT / page).read_text(encoding="utf-8")
    assert text == readme.fill(page, text), "run make readme"


def test_the_notebook_is_its_page(readme: ModuleType) -> None:
    """tests/docs/test_blocks.py runs the blocks of the page in their order, which are the cells."""
    ((made, page),) = readme.NOTEBOOKS.items()
    text = (PROJECT / page).read_text(encoding="utf-8")
    assert (PROJECT / made).read_text(encoding="utf-8") == readme.notebook(text), "run make readme"
    cells = json.loads(readme.notebook(text))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == text.count("```python") and all(f"```python\n{one}\n```" in text for one in code)


def test_every_file_of_the_package_is_listed(readme: ModuleType) -> None:
    text = readme.files_section()
    for path in (PROJECT / "src" / "backhand").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in text


def test_the_speed_table_is_taken_from_the_results(readme: ModuleType) -> None:
    head, _rule, *rows = readme.benchmarks().summary().splitlines()
    setups = "speed-up over documented setup | speed-up over tuned setup"
    assert head == f"|  | Backhand | {setups} | instruction sets |"
    assert len(rows) == 7
    pairs, rewards = (
        json.loads((PROJECT / "benchmarks" / "results" / f"{name}.json").read_text())
        for name in ("preference", "rewards")
    )
    for name, ratios in (("DPO", pairs["runs"][0]["ratios"]), ("GRPO", rewards["ratios"])):
        (row,) = (row for row in rows if name in row)
        tuned = min(ratio for peer, ratio in ratios.items() if peer.startswith("speed_over_trl-"))
        assert f"TRL {ratios['speed_over_trl']:.1f} ×" in row and f"TRL {tuned:.1f} ×" in row
    assert "`--engine transformers`" in rows[-1]
    stored = [PROJECT / "benchmarks" / "results" / f"train_step{end}.json" for end in ("", "_amx", "_avx2")]
    runs = [run for path in stored for run in json.loads(path.read_text())["runs"]]
    runs = [run for run in runs if run["workload"]["dtype"] == "float32"]
    assert len(runs) == 3
    (row,) = (row for row in rows if "one step" in row and "float32" in row)
    assert all(name in row for name in ("AMX", "AVX512-BF16", "AVX2"))

    def ends(values: list[float]) -> str:
        return f"{min(values):.2f} to {max(values):.2f}"

    assert f"{ends([run['peers']['backhand']['step_s']['median'] for run in runs])} s" in row
    assert f"PEFT {ends([run['ratios']['speed_over_peft'] for run in runs])} ×" in row
    # Of the tuned peers the one that comes closest, on every machine: no figure is hidden.
    tuned = [[ratio for name, ratio in run["ratios"].items() if name.startswith("speed_over_peft_")] for run in runs]
    assert f"PEFT {ends([min(ratios) for ratios in tuned])} ×" in row


def test_the_readme_can_be_read_in_three_minutes() -> None:
    assert len((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_a_section_without_markers_is_refused(readme: ModuleType) -> None:
    with pytest.raises(ValueError, match="commands"):
        readme.fill("docs/commands.md", "# Backhand\n")


def test_a_module_without_docstring_is_refused(readme: ModuleType, tmp_path: Path) -> None:
    module = tmp_path / "silent.py"
    module.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"silent\.py has no docstring"):
        readme.first_line(module)


def test_check_fails_on_a_page_that_is_out_of_date(
    readme: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for page in PAGES:
        if page not in ("docs/commands.md", "docs/files.md"):  # made from other files
            monkeypatch.setitem(readme.SECTIONS, page, {})
    for page in (*PAGES, *readme.NOTEBOOKS, *readme.NOTEBOOKS.values()):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / page, tmp_path / page)
    monkeypatch.setattr(readme, "PROJECT", tmp_path)
    stale = tmp_path / "docs" / "commands.md"
    stale.write_text(stale.read_text(encoding="utf-8").replace("| `train` |", "| `trian` |"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["readme.py", "--check"])
    assert readme.main() == 1
    assert "not up to date: docs/commands.md: run make readme" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["readme.py"])
    assert readme.main() == 0
    assert "| `trian` |" not in stale.read_text(encoding="utf-8")
