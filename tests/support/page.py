"""A page as a browser's parser sees it: elements, texts, scripts, and the charts in it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

_VOID = {"meta", "link", "br", "img", "input", "hr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self) -> list[Element]:
        return [self, *(inner for child in self.children for inner in child.all())]


class Page(HTMLParser):
    """Parses at once; `text` of an element is everything in it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("#document", {})
        self._open = [self.root]
        self.feed(data.decode("utf-8"))
        self.close()
        assert self._open == [self.root], [element.tag for element in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self._open[-1].children.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def every(self, tag: str, **attributes: str) -> list[Element]:
        expected = {name.rstrip("_"): value for name, value in attributes.items()}
        return [
            element
            for element in self.root.all()
            if element.tag == tag and all(element.attributes.get(name) == value for name, value in expected.items())
        ]

    def one(self, tag: str, **attributes: str) -> Element:
        (element,) = self.every(tag, **attributes)
        return element

    @property
    def charts(self) -> dict[str, Any]:
        charts: dict[str, Any] = json.loads(self.one("script", id="charts").text)
        return charts

    @property
    def scripts(self) -> list[str]:
        return [element.text for element in self.every("script") if element.attributes.get("type") is None]
