"""The packages in docs/architecture.md, docs/files.md and the README are the code's; docs/index.md links every page."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.support.doc_blocks import PAGES, PROJECT

(CONTRACT,) = (
    contract
    for contract in tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    if contract["name"] == "Imports point down only"
)
LAYERS = [layer.strip().removeprefix("backhand.") for line in CONTRACT["layers"] for layer in line.split("|")]


def test_every_part_of_the_package_is_a_layer() -> None:
    package = PROJECT / "src" / "backhand"
    packages = {path.parent.name for path in package.glob("*/__init__.py")}
    files = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    assert packages | files == set(LAYERS)


def test_the_architecture_page_lists_them_in_order() -> None:
    text = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| package | contents |") :].split("\n\n")[0]
    listed = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert listed == LAYERS


def test_the_list_of_files_has_them_in_order() -> None:
    text = (PROJECT / "docs" / "files.md").read_text(encoding="utf-8")
    listed = re.findall(r"^## `(\w+)/`", text, re.MULTILINE)
    assert listed == [name for name in LAYERS if name in listed]
    assert {name for name in LAYERS if len(list((PROJECT / "src" / "backhand" / name).rglob("*.py"))) > 1} == set(
        listed
    )


def test_the_map_of_the_readme_has_them_in_order() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    folders = [name for name in LAYERS if (PROJECT / "src" / "backhand" / name).is_dir()]
    assert re.findall(r"^- `(\w+)`: \S", text, re.MULTILINE) == folders


def test_the_walk_goes_through_the_seven_files_of_the_readme() -> None:
    readme, walk = ((PROJECT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/architecture.md"))
    seven = re.findall(r"^\d\. \[`(\S+\.py)`\]\(src/backhand/\1\)", readme, re.MULTILINE)
    assert len(seven) == 7
    assert re.findall(r"^### \d\. \[`(\S+\.py)`\]\(\.\./src/backhand/\1\)", walk, re.MULTILINE) == seven
    for file, shown in re.findall(r"^### \d\. \[`(\S+\.py)`\].*?\n(.*?)(?=^##)", walk, re.MULTILINE | re.DOTALL):
        source = (PROJECT / "src" / "backhand" / file).read_text(encoding="utf-8")
        functions = re.findall(r"`(?:\w+\.)?(\w+)\(\)`", shown)
        assert functions
        assert [name for name in functions if not re.search(rf"\bdef {name}\b", source)] == [], file


def test_the_first_page_leads_to_every_other() -> None:
    docs = PROJECT / "docs"
    linked = set(re.findall(r"\]\((?!https?:)([^)#]+\.md)", (docs / "index.md").read_text(encoding="utf-8")))
    pages = {path.relative_to(docs).as_posix() for path in docs.glob("**/*.md")} - {"index.md"}
    assert linked >= pages | {"../CONTRIBUTING.md", "../CHANGELOG.md"}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (PROJECT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)\s#]+)", text)
    assert [target for target in targets if not ((PROJECT / page).parent / target).exists()] == []
