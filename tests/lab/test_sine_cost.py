from __future__ import annotations

import math

import pytest
import torch

from backhand.lab.sine.cost import break_even_rank, low_rank_first, parameter_counts, product_first


def multiply_adds(*shapes: tuple[tuple[int, int], tuple[int, int]]) -> int:
    """Count the products that are formed: each element of the result is a sum over the inner size."""
    total = 0
    for left, right in shapes:
        product = torch.zeros(left) @ torch.zeros(right)
        total += product.numel() * left[1]
    return total


@pytest.mark.parametrize("sizes", [(100, 1, 20, 8), (7, 5, 3, 2)])
def test_costs_are_those_of_the_products(sizes: tuple[int, int, int, int]) -> None:
    n, inputs, outputs, r = sizes
    low = low_rank_first(n, inputs, outputs, r)
    assert low.forward == multiply_adds(((n, inputs), (inputs, r)), ((n, r), (r, outputs)))
    assert low.backward == multiply_adds(((r, n), (n, outputs)), ((n, outputs), (outputs, r)), ((inputs, n), (n, r)))
    product = product_first(n, inputs, outputs, r)
    assert product.forward == multiply_adds(((inputs, r), (r, outputs)), ((n, inputs), (inputs, outputs)))
    assert product.backward == multiply_adds(
        ((inputs, n), (n, outputs)), ((inputs, outputs), (outputs, r)), ((r, inputs), (inputs, outputs))
    )


def test_the_product_is_cheaper_on_the_experiments_layer() -> None:
    assert product_first(100, 1, 20, 8).total < low_rank_first(100, 1, 20, 8).total
    assert product_first(4096, 512, 512, 8).total > low_rank_first(4096, 512, 512, 8).total


@pytest.mark.parametrize(("inputs", "outputs"), [(512, 512), (64, 192)])
def test_break_even(inputs: int, outputs: int) -> None:
    points = 100_000
    rank = break_even_rank(points, inputs, outputs)
    below, above = math.floor(rank), math.ceil(rank)
    assert (
        low_rank_first(points, inputs, outputs, below).forward <= product_first(points, inputs, outputs, below).forward
    )
    assert (
        low_rank_first(points, inputs, outputs, above).forward >= product_first(points, inputs, outputs, above).forward
    )
    assert break_even_rank(10**9, inputs, outputs) == pytest.approx(inputs * outputs / (inputs + outputs), rel=1e-5)


def test_with_few_points_the_low_rank_order_always_wins() -> None:
    assert break_even_rank(256, 512, 512) == math.inf
    for rank in (1, 100, 512):
        assert low_rank_first(256, 512, 512, rank).forward < product_first(256, 512, 512, rank).forward


def test_the_posts_table() -> None:
    counts = parameter_counts(512, 512, (1, 8, 256))
    assert [(count["adapter"], count["full"]) for count in counts] == [(1024, 262144), (8192, 262144), (262144, 262144)]
    assert [count["share"] for count in counts] == [1 / 256, 1 / 32, 1]
