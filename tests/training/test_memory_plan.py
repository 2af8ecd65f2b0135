"""Micro-batch and recomputation chosen for a budget, and what is proposed where nothing fits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backhand.errors import ResourceError
from backhand.kernels.library import load, torch_form, usable, using
from backhand.nn.available_memory import available_bytes
from backhand.training.memory.model import ModelSize, parts_of, second_model_bytes
from backhand.training.memory.plan import MemoryPlan, choose
from backhand.training.memory.process import MemoryKeeper
from backhand.training.memory.shapes import KernelCount, Rows, StepShape, kept_kernels, largest_shapes

MB = 1 << 20
KERNEL_BYTES = 580_000
SIZE = ModelSize(
    dtype_bytes=2,
    weight_bytes=200 * MB,
    adapter_elements=MB,
    kept_bytes={"none": 100_000, "mlp": 50_000, "block": 10_000},
    unread_bytes={"none": 0, "mlp": 0, "block": 0},
    block_bytes=20_000,
    attending_bytes={"none": 5_000, "mlp": 5_000, "block": 5_000},
    delta_bytes={"none": 0, "mlp": 0, "block": 0},
    delta_heads=None,
    again_bytes={"none": 0, "mlp": 8_000, "block": 9_000},
    run_token_bytes=1_000,
    run_product_bytes=50,
    copied_token_bytes=2_000,
    stream_bytes=2_000,
    head_row_bytes=3_000,
    head_chunk_bytes=30_000,
    softmax_rows=32,
    softmax_row_bytes=60_000,
    head_adapter_bytes=0,
    checkpoint_bytes=10 * MB,
    neutral_token_bytes=60_000,
    cache_bytes=4_000,
)
SHAPES = {
    rows: StepShape(512 * rows, 100 * rows, 39, 512, 512 * 160, mean_tokens=512 * rows) for rows in (1, 2, 4, 8, 16)
}
PROCESS = 300 * MB


def chosen(
    budget_mb: int | None, *, rows: int | None = None, recompute: str = "auto", watched: bool = False
) -> MemoryPlan:
    return choose(
        SIZE,
        SHAPES,
        budget_bytes=None if budget_mb is None else budget_mb * MB,
        process_bytes=PROCESS,
        micro_batch_rows=rows,
        recompute=recompute,  # type: ignore[arg-type]
        watched=watched,
    )


@pytest.fixture(autouse=True)
def _same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large on every processor."""
    monkeypatch.setattr("backhand.training.memory.model.kernel_bytes", lambda: KERNEL_BYTES)


def test_without_a_limit_the_fastest_way_is_taken() -> None:
    plan = chosen(None)
    assert (plan.micro_batch_rows, plan.recompute) == (8, "none"), "more than 4,096 tokens gain nothing"
    assert plan.peak_bytes == sum(plan.parts.values())


def test_less_memory_means_smaller_cuts_and_then_recomputation() -> None:
    order = {"none": 0, "mlp": 1, "block": 2}
    plans = [chosen(budget) for budget in range(1200, 592, -20)]
    for plan, budget in zip(plans, range(1200, 592, -20), strict=True):
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
    for part in ("base weights: 200 MB", "process: 300 MB", "kept activations: 391 MB"):
        assert part in str(error.why)
    found = re.search(r"--micro-batch-rows (\d+)(?: --recompute (\w+))?", str(error.next_step))
    assert found is not None
    proposed = chosen(700, rows=int(found[1]), recompute=found[2] or "none")
    assert proposed.total_bytes <= 0.95 * 700 * MB


def test_where_nothing_fits_shorter_rows_are_proposed_if_they_do() -> None:
    with pytest.raises(ResourceError) as refused:
        chosen(590)
    found = re.search(r"--micro-batch-rows 1 --max-length (\d+) --recompute block", str(refused.value.next_step))
    assert found is not None
    shape = replace(SHAPES[1], tokens=int(found[1]), run_tokens=int(found[1]), run_products=int(found[1]) * 160)
    assert sum(parts_of(SIZE, shape, "block", PROCESS).values()) <= 0.95 * 590 * MB
    with pytest.raises(ResourceError, match="or a smaller model"):
        chosen(400)


def test_a_second_model_counts() -> None:
    alone, watched = chosen(None), chosen(None, watched=True)
    assert alone.beside_bytes == 0
    assert watched.beside_bytes == second_model_bytes(SIZE, PROCESS, 1024) > PROCESS + SIZE.weight_bytes
    assert watched.total_bytes == watched.peak_bytes + watched.beside_bytes
    with pytest.raises(ResourceError, match="live view"):
        chosen(1000, watched=True)


LIKE = {dtype: torch.empty(0, dtype=dtype) for dtype in (torch.bfloat16, torch.float64)}


def test_shapes_of_the_micro_batches_that_steps_make() -> None:
    rows = Rows(lengths=[10, 20, 200, 200], supervised=[5, 6, 7, 8])
    shapes = largest_shapes([[0, 1], [2, 3]], rows, [1, 2], LIKE[torch.float64])
    # 200 tokens lie in two blocks of queries, of which the second sees all keys, and in steps of 64
    assert shapes[1] == StepShape(
        *(208, 8, 0),
        run_tokens=200,
        run_products=200 * 104,
        step_tokens=72,
        longest_tokens=200,
        mean_tokens=116,
        micro_batches=4,
    )
    assert shapes[2] == StepShape(
        *(400, 15, 0),
        run_tokens=400,
        run_products=2 * 200 * 104,
        step_tokens=128,
        longest_tokens=200,
        mean_tokens=216,
        micro_batches=2,
    )


def test_short_documents_of_different_lengths_are_attended_as_copies() -> None:
    rows = Rows(lengths=[100, 110, 130, 150, 160], supervised=[1] * 5)
    (shape,) = largest_shapes([range(5)], rows, [5], LIKE[torch.bfloat16]).values()
    assert shape.run_tokens == shape.copied_tokens == 5 * 160
    apart = Rows(lengths=[40, 160], supervised=[1, 1])
    (shape,) = largest_shapes([range(2)], apart, [2], LIKE[torch.bfloat16]).values()
    assert (shape.run_tokens, shape.copied_tokens) == (160, 0)


def test_a_shared_prefix_is_computed_once_and_copied_before_each_document() -> None:
    rows = Rows(lengths=[200, 200, 200], supervised=[1] * 3, shared=lambda group: 136 if len(group) > 1 else 0)
    shapes = largest_shapes([range(3)], rows, [1, 3], LIKE[torch.float64])
    assert (shapes[1].tokens, shapes[1].copied_tokens) == (208, 0)
    assert shapes[3].tokens == 336, "136 and three times 64, and a filler"
    assert shapes[3].copied_tokens == 4 * 200, "the filler is attended with them"


def test_rows_that_share_a_long_prefix_come_together() -> None:
    """As many as their own tokens allow, not as many as they would be without the prefix."""
    rows = Rows([3100] * 8, [1] * 8, lambda group: 3000 if len(group) > 1 else 0)
    apart = Rows([3100] * 8, [1] * 8)
    for given, taken in ((rows, 8), (apart, 1)):
        shapes = largest_shapes([range(8)], given, [1, 2, 4, 8], LIKE[torch.bfloat16])
        plan = choose(SIZE, shapes, budget_bytes=None, process_bytes=PROCESS, micro_batch_rows=None, recompute="none")
        assert plan.micro_batch_rows == taken


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor whose bfloat16 products torch sends to oneDNN, all of them."""
    monkeypatch.setattr("backhand.training.memory.shapes.onednn_takes_bf16", lambda: True)
    with torch_form():
        yield


@pytest.mark.usefixtures("onednn")
def test_kernels_are_counted_once_for_each_shape_of_product() -> None:
    count = KernelCount(LIKE[torch.bfloat16])
    count.add(640, [(8, 103, 103)], 271)
    assert count.total == 31 + 20 + 6 + 2 * 2, "chunks of 256 and of 15 rows"
    count.add(640, [(8, 103, 103)], 15)
    count.add(640, [], 256, trained=False)
    assert count.total == 61 + 20 + 8, "the last block of 15 rows, and of 256 that are not trained"
    count.add(25, [], 0, trained=False)
    assert count.total == 89 + 12
    wide = KernelCount(LIKE[torch.bfloat16], 512)
    wide.add(640, [], 271)
    wide.add(640, [], 513)
    assert wide.total == 31 + 2 * 20 + 3 * 2, "chunks of 271, of 512 and of 1 row"
    other = KernelCount(LIKE[torch.float64])
    other.add(640, [(8, 103, 103)], 271)
    assert other.total == 0, "float64 products are not compiled"


@pytest.mark.skipif("avx512bf16" not in usable(), reason="this processor has no such build")
def test_loops_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backhand.training.memory.shapes.onednn_takes_bf16", lambda: True)
    with using(load("avx512bf16")):
        count = KernelCount(LIKE[torch.bfloat16])
        count.add(640, [(8, 103, 103)], 256)
        assert count.total == 8 + 6 + 2, "no block of attention"


@pytest.mark.skipif("amx" not in usable(), reason="this processor has no such build")
def test_where_loops_multiply_by_tiles_nothing_is_compiled() -> None:
    with using(load("amx")):
        count = KernelCount(LIKE[torch.bfloat16])
        count.add(640, [(8, 103, 103)], 256)
        count.add(320, [(8, 103, 103)], 100, trained=False)
        assert count.total == 0


def test_where_torch_multiplies_by_itself_no_kernel_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backhand.training.memory.shapes.onednn_takes_bf16", lambda: False)
    count = KernelCount(LIKE[torch.bfloat16])
    count.add(640, [(8, 103, 103)], 271)
    assert count.total == 0


@pytest.mark.usefixtures("onednn")
def test_the_kernels_that_are_kept_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    count = KernelCount(LIKE[torch.bfloat16])
    for tokens in range(32, 3200, 32):
        count.add(tokens, [], 1)
    shape = StepShape(100, 10, kernels=count.total, kernel_sizes=count.sizes)
    few_modules = replace(SIZE, more_kernels=(-14, -5, -14, -5))

    def kept(size: ModelSize) -> int:
        return parts_of(size, shape, "none", 0)["compiled kernels"] // KERNEL_BYTES

    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100")
    assert kept_kernels() == kept(SIZE) == kept(few_modules) == 100
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    assert kept(SIZE) == kept(few_modules) == 1024


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
