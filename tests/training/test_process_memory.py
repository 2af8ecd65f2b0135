"""What the process itself takes, measured in processes of their own."""

from __future__ import annotations

import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from backhand.report.page import run_page
from backhand.report.run_record import read_run
from backhand.training.console import closing_lines
from backhand.training.run import train
from tests.support.tiny_run import TinyRun

SCRIPT = """
import torch
from backhand.nn.compute import keep_freed_memory
from backhand.system import rss_bytes
from backhand.loop.process_memory import settled_rss_bytes
settled_rss_bytes(torch.float32)
assert keep_freed_memory()
alone = rss_bytes()
model = torch.ones(60 << 20, dtype=torch.float32)
# A small tensor after it, so that the end of the heap cannot simply move down.
small = torch.ones(1 << 12)
held = rss_bytes()
del model
left_over = rss_bytes()
print(held - alone, left_over - alone, settled_rss_bytes(torch.float32) - alone)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be set to keep freed memory")
def test_memory_of_an_earlier_model_is_not_counted() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, timeout=300)
    held, left_over, settled = (int(value) >> 20 for value in done.stdout.split())
    assert held >= 235, "240 MB of ones"
    assert left_over >= 235, "which stay with the process when they are freed"
    assert settled < 40


def test_the_peak_of_what_ran_before_is_not_compared_with_the_prediction(tiny: TinyRun, tmp_path: Path) -> None:
    # Not by malloc, which may have as much freed memory of earlier tests.
    with mmap.mmap(-1, 512 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as earlier:
        for _ in range(512):
            earlier.write(b"1" * (1 << 20))
    summary = train(tiny.config(tmp_path / "run", max_steps=1))
    assert summary.predicted_rss_bytes is None
    (line,) = (line for line in closing_lines(summary) if line.startswith("Peak memory"))
    assert "predicted" not in line
    assert b"peak memory, " not in run_page(read_run(tmp_path / "run"))
