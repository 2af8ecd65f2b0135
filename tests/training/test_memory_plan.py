"""Micro-batch and recomputation chosen for a budget, and what is proposed where nothing fits."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from backhand.data.packing import RowPacker, micro_batches
from backhand.data.prefix_forest import Forest
from backhand.engines.machine import MemoryKeeper
from backhand.engines.memory.parts import ModelSize, StepBytes, estimated_step, parts_of, second_model_bytes
from backhand.engines.memory.plan import MemoryPlan, choose
from backhand.engines.memory.shapes import StepShape, largest_shapes
from backhand.errors import ResourceError
from backhand.nn.decoder.kv_cache import PAGE
from backhand.options.config import Recompute
from backhand.system import available_bytes

MB = 1 << 20
SIZE = ModelSize(
    dtype_bytes=2,
    weight_bytes=200 * MB,
    adapter_elements=MB // 4,
    saved_bytes={"none": 100_000, "mlp": 50_000, "block": 10_000},
    block_bytes={"none": 25_000, "mlp": 33_000, "block": 34_000},
    stream_bytes=2_000,
    head_row_bytes=3_000,
    chunk_rows=256,
    logits_bytes=60_000,
    cache_bytes=4_000,
)
SHAPES = {rows: StepShape(512 * rows, 100 * rows, (512,) * rows, mean_tokens=512 * rows) for rows in (1, 2, 4, 8, 16)}
PROCESS = 300 * MB
ASKED: list[tuple[int, Recompute]] = []


def parts(shape: StepShape, recompute: Recompute) -> dict[str, int]:
    ASKED.append((shape.tokens, recompute))
    return parts_of(SIZE, shape, estimated_step(SIZE, shape, recompute), PROCESS)


def chosen(
    budget_mb: int | None,
    *,
    rows: int | None = None,
    recompute: Recompute = "auto",
    watched: bool = False,
    smaller_base: str | None = None,
) -> MemoryPlan:
    ASKED.clear()
    return choose(
        SIZE,
        parts,
        SHAPES,
        budget_bytes=None if budget_mb is None else budget_mb * MB,
        micro_batch_rows=rows,
        recompute=recompute,
        answering_bytes=PROCESS if watched else None,
        smaller_base=smaller_base,
    )


def test_pages_of_sampled_rows_are_counted() -> None:
    """Rows of one token after one prompt, as the cache holds them: each has a page of its own, and perhaps another."""
    sampled = StepShape(1, 1, (1,), mean_tokens=1, sampled_rows=64, sampled_tokens=64)
    found = parts_of(replace(SIZE, logits_bytes=0), sampled, StepBytes(0, 0), PROCESS)["checkpoints and measurements"]
    assert found == 64 * (2 * PAGE + 1) * SIZE.cache_bytes * 5 // 4


def test_without_a_limit_the_fastest_way_is_taken() -> None:
    plan = chosen(None)
    assert (plan.micro_batch_rows, plan.recompute) == (8, "none"), "more than 4,096 tokens gain nothing"
    assert ASKED == [(4096, "none")], "nothing else is measured"
    assert plan.peak_bytes == sum(plan.parts.values())


def test_less_memory_means_smaller_cuts_and_then_recomputation() -> None:
    order = {"none": 0, "mlp": 1, "block": 2}
    plans = [chosen(budget) for budget in range(1220, 592, -20)]
    for plan, budget in zip(plans, range(1220, 592, -20), strict=True):
        assert plan.total_bytes <= 0.95 * budget * MB
    assert {plan.recompute for plan in plans} == {"none", "mlp", "block"}
    peaks = [plan.peak_bytes for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert max(order[plan.recompute] for plan in plans[-3:]) > 0


def test_what_was_asked_for_is_not_changed() -> None:
    plan = chosen(4000, rows=4, recompute="block")
    assert (plan.micro_batch_rows, plan.recompute) == (4, "block")


def test_a_refusal_names_the_parts_and_a_proposal_that_fits() -> None:
    with pytest.raises(ResourceError) as refused:
        chosen(700, rows=8, recompute="none")
    error = refused.value
    assert error.exit_code == 5
    for part in ("base weights: 200 MiB", "process: 300 MiB", "kept activations: 391 MiB"):
        assert part in str(error.why)
    found = re.search(r"--micro-batch-rows (\d+)(?: --recompute (\w+))?", str(error.next_step))
    assert found is not None
    proposed = chosen(700, rows=int(found[1]), recompute=cast("Recompute", found[2] or "none"))
    assert proposed.total_bytes <= 0.95 * 700 * MB


def test_where_nothing_fits_shorter_rows_are_proposed_if_they_do() -> None:
    with pytest.raises(ResourceError) as refused:
        chosen(580)
    found = re.search(r"--micro-batch-rows 1 --max-length (\d+) --recompute block", str(refused.value.next_step))
    assert found is not None
    assert sum(parts(SHAPES[1].cut(int(found[1])), "block").values()) <= 0.95 * 580 * MB
    with pytest.raises(ResourceError, match="or a smaller model") as refused:
        chosen(400, smaller_base="--base quantized")
    assert "--base quantized" in str(refused.value.next_step)


def test_a_second_model_counts() -> None:
    alone, watched = chosen(None), chosen(None, watched=True)
    assert alone.second_model_bytes == 0
    assert watched.second_model_bytes == second_model_bytes(SIZE, PROCESS, 1024) > PROCESS + SIZE.weight_bytes
    assert watched.total_bytes == watched.peak_bytes + watched.second_model_bytes
    with pytest.raises(ResourceError, match="live view"):
        chosen(1000, watched=True)


class Rows:
    """Replaces a `RowPacker`: rows of these lengths, after a number of tokens that all of them share."""

    def __init__(self, lengths: Sequence[int], supervised: Sequence[int], shared: int = 0) -> None:
        self.lengths, self.supervised, self.shared = lengths, supervised, shared
        self.common_prefix = shared

    def micro_batches(self, rows: Sequence[int], max_rows: int) -> list[list[int]]:
        return micro_batches(rows, self.lengths, max_rows=max_rows)

    def supervised_tokens(self, rows: Sequence[int]) -> int:
        return sum(self.supervised[row] for row in rows)

    def tokens(self, rows: Sequence[int]) -> int:
        return sum(self.lengths[row] for row in rows)

    def forest(self, rows: Sequence[int]) -> Forest:
        lengths = sorted(self.lengths[row] for row in rows)
        if not self.shared or len(rows) == 1:
            return Forest(tuple(lengths), (), (), [])
        own = (length - self.shared for length in lengths)
        return Forest((self.shared, *own), (-1, *(0,) * len(rows)), (), [])


def shapes_of(steps: Sequence[Sequence[int]], rows: Rows, options: Sequence[int]) -> dict[int, StepShape]:
    return largest_shapes(steps, cast("RowPacker", rows), options)


def test_shapes_of_the_micro_batches_that_steps_make() -> None:
    shapes = shapes_of([[0, 1], [2, 3]], Rows([10, 20, 200, 200], [5, 6, 7, 8]), [1, 2])
    assert shapes[1] == StepShape(208, 8, (200, 8), mean_tokens=116, sizes=2 + 4, micro_batches=2)
    assert shapes[2] == StepShape(400, 15, (200, 200), mean_tokens=216, sizes=2 + 2)


def test_later_steps_are_laid_out_where_they_may_be_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(2)
    lengths = [draw.randint(40, 400) for _ in range(300)]
    rows = Rows(lengths, [draw.randint(1, length) for length in lengths], shared=35)
    steps = [list(range(begin, begin + 5)) for begin in range(0, 300, 5)]
    whole = shapes_of(steps, rows, [1, 2, 5])
    laid_out, forest = [], rows.forest
    monkeypatch.setattr(rows, "forest", lambda group: laid_out.append(group) or forest(group))
    monkeypatch.setattr("backhand.engines.memory.shapes._STEPS_PACKED", 3)
    few = shapes_of(steps, rows, [1, 2, 5])
    assert len(laid_out) < 100 < 300 + 180 + 60
    for count, shape in few.items():
        assert replace(shape, mean_tokens=0, sizes=0) == replace(whole[count], mean_tokens=0, sizes=0)


def test_a_shared_prefix_is_counted_once() -> None:
    shapes = shapes_of([range(3)], Rows([200, 200, 200], [1] * 3, shared=136), [1, 3])
    assert (shapes[1].tokens, shapes[1].lengths, shapes[1].parents) == (208, (200, 8), ())
    assert (shapes[3].tokens, shapes[3].lengths) == (336, (136, 64, 64, 64, 8))
    assert shapes[3].parents == (-1, 0, 0, 0, -1)


def test_rows_that_share_a_long_prefix_come_together() -> None:
    """As many as their own tokens allow, not as many as they would be without the prefix."""
    rows = Rows([3100] * 8, [1] * 8, 3000)
    apart = Rows([3100] * 8, [1] * 8)
    for given, taken in ((rows, 8), (apart, 1)):
        shapes = shapes_of([range(8)], given, [1, 2, 4, 8])
        plan = choose(SIZE, parts, shapes, budget_bytes=None, micro_batch_rows=None, recompute="none")
        assert plan.micro_batch_rows == taken


def test_the_keeper_releases_before_the_plan_is_exceeded_and_not_before() -> None:
    now, released = [0], []
    keeper = MemoryKeeper(1000, measure=lambda: now[0], release=lambda: released.append(now[0]))
    for value in (600, 800, 890):
        now[0] = value
        keeper.after_step()
    assert released == []
    now[0] = 960  # another step like this one would reach 1,030
    keeper.after_step()
    assert released == [960]
    for value in (650, 700):
        now[0] = value
        keeper.after_step()
    assert released == [960]


def test_the_first_step_is_followed_by_a_release() -> None:
    now, released = [600], []
    keeper = MemoryKeeper(1000, measure=lambda: now[0], release=lambda: released.append(now[0]))
    keeper.make_room()
    for value in (950, 960, 970):
        now[0] = value
        keeper.after_step()
    assert released == [600, 950]


def test_a_plan_that_is_too_low_does_not_release_at_every_step() -> None:
    now, released = [900], []
    keeper = MemoryKeeper(1000, measure=lambda: now[0], release=lambda: released.append(now[0]))
    for value in [900, *[1500] * 10]:
        now[0] = value
        keeper.after_step()
    assert len(released) == 1
    assert keeper.limit_bytes == 1650


def file_system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


FREE = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4000000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4_096_000_000),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max"}, 4_096_000_000),
        (
            {
                "proc/self/cgroup": "0::/jobs/mine\n",
                "sys/fs/cgroup/jobs/memory.max": "3000000000",
                "sys/fs/cgroup/jobs/memory.current": "1500000000",
                "sys/fs/cgroup/jobs/memory.stat": "anon 5\ninactive_file 500000000\n",
                "sys/fs/cgroup/jobs/mine/memory.max": "max",
            },
            2_000_000_000,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,memory:/old\n0::/\n",
                "sys/fs/cgroup/memory/old/memory.limit_in_bytes": "1000000000",
                "sys/fs/cgroup/memory/old/memory.usage_in_bytes": "1200000000",
            },
            0,
        ),
    ],
    ids=["no group", "no limit", "the group around", "version 1, used up"],
)
def test_limits_of_control_groups(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert available_bytes(file_system(tmp_path, FREE | files)) == expected
