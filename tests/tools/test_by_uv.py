"""What pip is configured with is said to uv in uv's words."""

from __future__ import annotations

import stat
from pathlib import Path

from tools.by_uv import settings

LISTED = r"""
:env:.find-links='/wheels'
global.cert='/certs.pem'
global.constraint='/one.txt'
global.extra-index-url='\nhttps://a.example/simple\nhttps://b.example/simple'
global.find-links='/others'
global.timeout='180'
install.constraint='/one.txt /two.txt'
"""


def pip_that_lists(folder: Path, text: str) -> Path:
    python = folder / "python"
    python.write_text(f"#!/bin/sh\ncat <<'END'\n{text.strip()}\nEND\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


def test_the_nearest_setting_counts_and_several_are_joined_as_uv_reads_them(tmp_path: Path) -> None:
    assert settings(pip_that_lists(tmp_path, LISTED)) == {
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels",
        "SSL_CERT_FILE": "/certs.pem",
        "UV_CONSTRAINT": "/one.txt /two.txt",
    }


def test_where_nothing_is_set_nothing_is_said(tmp_path: Path) -> None:
    assert settings(pip_that_lists(tmp_path, "global.timeout='180'")) == {}
