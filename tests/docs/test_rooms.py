"""The rooms in docs/architecture.md and in the README are those of the code, top to bottom."""

from __future__ import annotations

import re
import tomllib

from support.doc_blocks import PROJECT

(CONTRACT,) = (
    contract
    for contract in tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    if contract["type"] == "layers"
)
LAYERS = [layer.strip().removeprefix("backhand.") for line in CONTRACT["layers"] for layer in line.split("|")]


def test_every_room_of_the_package_is_a_layer() -> None:
    package = PROJECT / "src" / "backhand"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert rooms | {"terminal", "errors"} == set(LAYERS)


def test_the_architecture_page_lists_them_in_order() -> None:
    text = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| room | job |") :].split("\n\n")[0]
    listed = [room for line in table.splitlines()[2:] for room in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert listed == LAYERS


def test_the_readme_lists_their_files_in_order() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\*\*`(\w+)/`\*\*", text, re.MULTILINE)
    assert listed == [room for room in LAYERS if room in listed]
    assert {room for room in LAYERS if len(list((PROJECT / "src" / "backhand" / room).glob("*.py"))) > 1} == set(listed)
