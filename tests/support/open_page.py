"""The type of the fixture that opens pages in a browser, for annotations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

    OpenPage = Callable[..., AbstractContextManager[Page]]
