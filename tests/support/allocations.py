"""What torch, and the process as a whole, hold while something is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from backhand.nn.compute import release_freed_memory
from backhand.system import peak_rss_bytes, rss_bytes


def held_at_most(work: Callable[[], object]) -> int:
    """Most bytes that torch held at once, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def resident_growth(work: Callable[[], object]) -> int:
    """Most resident bytes of this process while something is computed, above what it had before; on Linux."""
    release_freed_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest is that of now
    before = rss_bytes()
    work()
    return peak_rss_bytes() - before
