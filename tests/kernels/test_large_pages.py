"""The heap in large pages, in processes of their own: a heap is grown once and for all."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from backhand.kernels import large_pages
from tests.support.processes import run

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc"
    or not large_pages._may_take_addresses()
    or "[madvise]" not in ENABLED.read_text(),
    reason="only a system that gives large pages when it is asked for them tells whether it was asked",
)
BEGIN = """
import resource, threading
from pathlib import Path
import torch
from backhand.kernels import large_pages
from backhand.nn.compute import keep_freed_memory, release_freed_memory

release_freed_memory()  # what the test process had freed before the fork

def total(field):
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith(field + ":"))

def size():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() >> 20
"""


def _printing(script: str, path: str) -> None:
    with Path(path).open("w") as file, redirect_stdout(file):
        exec(BEGIN + script, {})


@pytest.fixture
def printed(tmp_path: Path) -> Callable[[str], list[int]]:
    """The numbers that a script prints in a process of its own, MiB where they are sizes."""

    def printed(script: str) -> list[int]:
        assert run(_printing, script, str(tmp_path / "printed")) == 0
        return [int(word) for word in (tmp_path / "printed").read_text().split()]

    return printed


def test_large_buffers_lie_in_large_pages_also_after_memory_was_given_back(printed: Callable[[str], list[int]]) -> None:
    before, first, freed, again = printed("""
assert keep_freed_memory()
print(total("AnonHugePages"))
held = [torch.ones(25 << 20), torch.ones(1 << 10)]
print(total("AnonHugePages"))
held = held[1:]
release_freed_memory()
print(total("AnonHugePages"))
held.append(torch.ones(50 << 20))
print(total("AnonHugePages"))
""")
    assert before < 8
    assert 96 <= first < 116, "100 MiB of ones"
    assert freed < 8
    assert 196 <= again < 216, "in what was the heap's end before it was given back"


def test_only_addresses_are_taken(printed: Callable[[str], list[int]]) -> None:
    before, after, grown = printed("""
torch.ones(1)
print(total("Rss"))
grown = size()
assert keep_freed_memory()
print(total("Rss"), size() - grown)
""")
    assert after - before < 8
    assert grown > 1024


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_under_a_limit_of_addresses_none_are_taken(printed: Callable[[str], list[int]], kind: str) -> None:
    grown, large = printed(f"""
soft, hard = resource.getrlimit(resource.{kind})
most = 1 << 36 if hard == resource.RLIM_INFINITY else min(hard, 1 << 36)
resource.setrlimit(resource.{kind}, (most, hard))
before = size()
assert keep_freed_memory()
print(size() - before)
held = torch.ones(25 << 20)
release_freed_memory()
print(total("AnonHugePages"))
""")
    assert grown < 64 and large < 8


@pytest.mark.parametrize(("says", "possible"), [("0", 1), ("1", 1), ("2", 0), ("", 0)])
def test_not_where_the_system_promises_no_more_than_it_has(
    printed: Callable[[str], list[int]], says: str, possible: int, tmp_path: Path
) -> None:
    (tmp_path / "overcommit").write_text(f"{says}\n")
    assert printed(f"""
large_pages._OVERCOMMIT = Path({str(tmp_path / "overcommit")!r})
before = size()
assert keep_freed_memory()
print(int(size() - before > 1024))
""") == [possible]


def test_a_limit_that_is_set_later_keeps_what_is_given_back(printed: Callable[[str], list[int]]) -> None:
    grown, again = printed("""
before = size()
keep_freed_memory()
print(size() - before)
resource.setrlimit(resource.RLIMIT_AS, (1 << 40, resource.getrlimit(resource.RLIMIT_AS)[1]))
release_freed_memory()
print(size() - before)
""")
    assert grown > 1024 and again < 256


def test_another_thread_has_another_heap_and_gives_the_end_back_alone(printed: Callable[[str], list[int]]) -> None:
    grown, left, again = printed("""
before = size()
keep_freed_memory()
print(size() - before)
thread = threading.Thread(target=release_freed_memory)
thread.start()
thread.join()
print(size() - before)
release_freed_memory()
print(size() - before)
""")
    assert grown > 1024 and left < 256, "what it may not make longer stays short"
    assert again > 1024
