"""The loops under the address and the undefined-behaviour sanitizer, in a process of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from backhand.kernels import build
from tests.support.sanitizer import environment, runtime

FUZZ = "tests.kernels.sanitized_fuzz"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    if runtime("libasan.so") is None:
        pytest.skip("no compiler with an address sanitizer")
    folder = tmp_path_factory.mktemp("sanitized")
    build.build(folder, sanitize=True)
    return folder


def fuzz(folder, rounds):
    return subprocess.run(
        [sys.executable, "-m", FUZZ, str(folder), str(rounds)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_random_blocks_are_read_and_written_within_their_bounds(sanitized):
    done = fuzz(sanitized, 150)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "calls of baseline" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("formats.h", "block + 2, 32);", "block + 3, 32);"),
        ("gated_delta_rule.cpp", "memory + worker * each", "memory + 2 * worker * each"),
    ],
    ids=["read after a block", "memory of a second thread"],
)
def test_an_access_outside_a_buffer_is_noticed(monkeypatch, tmp_path, file, right, wrong):
    """Otherwise the test above could not fail."""
    if runtime("libasan.so") is None:
        pytest.skip("no compiler with an address sanitizer")
    sources = tmp_path / "native"
    sources.mkdir()
    for path in build.SOURCES.iterdir():
        text = path.read_text(encoding="utf-8")
        if path.name == file:
            assert right in text
            text = text.replace(right, wrong)
        (sources / path.name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "INSTRUCTION_SETS", {build.machine(): {"baseline": ()}})
    build.build(tmp_path / "lib", sanitize=True)
    monkeypatch.undo()
    build._stamp("baseline", tmp_path / "lib", sys.platform)  # as if of the sources that the process has which loads it
    done = fuzz(tmp_path / "lib", 40)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-" in done.stderr  # by what lies there: an overflow, or a use after free
