"""The dense product with all that is added to it: right, inside its arrays, and the same bits however it is cut.

In float64 its source runs on every build; in bfloat16 where the processor has AMX's tiles.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from backhand.kernels import dense_product as module
from backhand.kernels.builds import load, torch_form, usable, using
from backhand.kernels.dense_product import MOST_UPDATES, LowRankUpdate, amx_available, dense_product, drop_workspace
from backhand.kernels.library import proving_kernels
from backhand.ops.frozen_matrix import frozen_input_gradient, frozen_linear, uses_amx
from backhand.ops.weight_tiles import drop_scratch
from tests.support.for_each import for_each
from tests.support.gapped import MARK, gapped, marks_intact
from tests.support.product_builds import PRODUCT_BUILDS, build_id

LONGEST_PART, WAITING_ROWS = 1536, 1024  # as in native/dense_product.h
UNIT = 2.0**-8  # of rounding to bfloat16

pytestmark = pytest.mark.skipif(not usable(), reason="the compiled library is not built")


class Problem(NamedTuple):
    """The operands of a product: its own factors, and `updates`, bias and residual that are added."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    updates: tuple[LowRankUpdate, ...]

    def __call__(self, out: Tensor | None = None) -> Tensor:
        """By the loop, but where there is nothing to multiply or nowhere to write: then as ops ask for it."""
        y = dense_product(*self[:4], out, self.updates)
        if y is None and 0 in self.weight.shape:
            y = frozen_linear(self.x, self.weight.T, *self[2:4], out, self.updates)
        assert y is not None
        return y

    def part(self, rows: slice, columns: slice = slice(None)) -> Problem:
        """The same for some of the rows and columns."""
        start, stop, _ = columns.indices(self.weight.shape[1])
        updates = []
        for column, h, factor, scaling, lora_A, _ in self.updates:
            begin, end = max(column, start), min(column + len(factor), stop)
            if begin < end:
                updates.append(
                    LowRankUpdate(begin - start, h[rows], factor[begin - column : end - column], scaling, lora_A)
                )
        residual = None if self.residual is None else self.residual[rows, columns]
        bias = None if self.bias is None else self.bias[columns]
        return Problem(self.x[rows], self.weight[:, columns], bias, residual, tuple(updates))

    def in_float64(self) -> tuple[Tensor, Tensor]:
        """What is right, and the sum of the summands' sizes, element by element."""
        y, sizes = self.x.double() @ self.weight.double(), self.x.double().abs() @ self.weight.double().abs()
        for more in (self.bias, self.residual):
            if more is not None:
                y, sizes = y + more.double(), sizes + more.double().abs()
        for column, h, factor, scaling, *_ in self.updates:
            place = slice(column, column + len(factor))
            y[:, place] += scaling * (h.double() @ factor.double().T)
            sizes[:, place] += abs(scaling) * (h.double().abs() @ factor.double().abs().T)
        return y, sizes

    def by_torch(self) -> Tensor:
        """The product, and each summand added to what was rounded before."""
        y = self.x @ self.weight if self.residual is None else torch.addmm(self.residual, self.x, self.weight)
        y = y if self.bias is None else y + self.bias
        for column, h, factor, scaling, *_ in self.updates:
            y[:, column : column + len(factor)].addmm_(h, factor.T, alpha=scaling)
        return y


def problem(
    rows, outputs, inputs, dtype, *, transposed=True, bias=True, residual=True, members=(), size=1.0
) -> Problem:
    """Random numbers at odd addresses, with gaps after rows.

    Args:
        transposed: W lies as (out, in), as a weight does.
        members: columns, rank and scaling of each update, and whether its h is still to be computed. Their columns
            follow one another; without a rank there is no update.
        size: of the updates.
    """
    width = max(inputs, 1) ** -0.5
    weight = gapped((outputs, inputs), dtype, 1, width).T if transposed else gapped((inputs, outputs), dtype, 1, width)
    updates, column = [], 0
    for place, (columns, rank, scaling, *made) in enumerate(members):
        if rank is not None:
            h, shape = gapped((rows, rank), dtype, 10 + place, size), (columns, rank)
            factor = gapped(shape[::-1], dtype, 20 + place).T if place % 2 else gapped(shape, dtype, 20 + place)
            lora_A = gapped((rank, inputs), dtype, 30 + place, size * width) if any(made) else None
            updates.append(LowRankUpdate(column, h, factor, scaling, lora_A))
        column += columns
    assert column <= outputs
    return Problem(
        gapped((rows, inputs), dtype, 0),
        weight,
        gapped((outputs,), dtype, 2) if bias else None,
        gapped((rows, outputs), dtype, 3) if residual else None,
        tuple(updates),
    )


def assert_right(y: Tensor, expected: Problem) -> None:
    """In float64 nearly exact; in bfloat16 every element is rounded once, to the nearest. So is an h that is made.

    Where there is nothing to multiply, torch adds the rest, and rounds after each summand.
    """
    right, sizes = expected.in_float64()
    if 0 in expected.weight.shape and y.dtype == torch.bfloat16:
        assert ((y.double() - right).abs() <= (2 + len(expected.updates)) * UNIT * sizes).all()
    else:
        assert_rounded_once(y, right, sizes)
    for _, h, _, _, lora_A, _ in expected.updates:
        if lora_A is not None:
            x, transposed = expected.x.double(), lora_A.double().T
            assert_rounded_once(h, x @ transposed, x.abs() @ transposed.abs())
            assert marks_intact(h)


def assert_rounded_once(y: Tensor, right: Tensor, sizes: Tensor) -> None:
    assert y.shape == right.shape
    if y.dtype == torch.float64:
        bound = 1e-14 * sizes
    else:
        bound = UNIT * right.abs() + 2.0**-16 * sizes
    assert ((y.double() - right).abs() <= bound).all()


SIZES = [
    *((0, 5, 7), (3, 0, 5), (4, 6, 0), (1, 1, 1), (2, 3, 1), (9, 33, 7), (32, 32, 32), (31, 64, 65), (33, 31, 64)),
    *((70, 150, 1051), (13, 97, 63), (64, 34, 1535), (9, 45, LONGEST_PART + 1), (40, 239, 1551), (35, 50, 3100)),
    (WAITING_ROWS + 37, 45, LONGEST_PART + 3),
]
MEMBERS = {
    "alone": lambda n: (),
    "one": lambda n: ((n, 3, 0.6),),
    "two": lambda n: ((n // 3, 1, -1.7), (n - n // 3, 16, 0.25)),
    "made": lambda n: ((n, 8, 1.7, True),),
    "some made": lambda n: ((n // 3, 20, 0.6, True), (n // 4, 5, 1.0), (n // 5, None, 0.0), (n // 6, 33, 0.3, True)),
    "gap": lambda n: ((n // 4, 40, 2.3), (n // 3, None, 0.0), (n // 5, 3, 0.6), (n // 6, 17, 2.0)),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@for_each("members", MEMBERS)
def test_of_any_size(dtype, size, members):
    transposed = (SIZES.index(size) + list(MEMBERS).index(members)) % 2 == 0
    one = problem(*size, dtype, transposed=transposed, members=MEMBERS[members](size[1]))
    y = one()
    assert_right(y, one)
    plain = one._replace(bias=None, residual=None)
    assert_right(plain(), plain)
    assert_right(one._replace(bias=None)(), one._replace(bias=None))
    out = gapped(y.shape, dtype, 5)
    assert one(out) is out and same(out, y, size) and marks_intact(out)
    copy = gapped(y.shape, dtype, 5).copy_(one.residual)
    assert same(one._replace(residual=copy)(copy), y, size), "the residual's own place"
    assert marks_intact(copy)


def same(out: torch.Tensor, y: torch.Tensor, size: tuple[int, int, int]) -> bool:
    """Without an inner size, torch's library computes the low-rank terms, and its last bits may follow the strides."""
    if size[2] or y.dtype != torch.float64:
        return torch.equal(out, y)
    last_bits = 4 * torch.finfo(y.dtype).eps
    return torch.allclose(out, y, rtol=last_bits, atol=last_bits)


@pytest.mark.parametrize("made", [False, True], ids=["", "made"])
@for_each("rank", [0, 1, 2, 15, 16, 31, 32, 33, 40, 130])
@for_each("scaling", [1.0, -0.5, 1.7, 0.1, 0.0])
def test_terms_of_any_rank_and_scaling(dtype, rank, scaling, made):
    """They are the larger part, so that what is lost of s h would be seen."""
    members = ((20, rank, scaling, made), (41, rank, 1.7), (16, 3, 0.3, made))
    one = problem(43, 77, 19, dtype, members=members, size=30.0)
    assert_right(one(), one)


def test_a_scaled_h_that_is_rounded_would_be_seen():
    one = problem(43, 77, 19, torch.bfloat16, members=((77, 16, 1.7),), size=30.0, bias=False, residual=False)
    (column, h, factor, scaling, *_), *_ = one.updates
    rounded = one._replace(updates=(LowRankUpdate(column, (scaling * h.float()).bfloat16(), factor, 1.0),))
    y = rounded.in_float64()[0].bfloat16()
    with pytest.raises(AssertionError):
        assert_right(y, one)


def test_where_nothing_is_written_an_h_is_made(dtype):
    """A product without columns: what comes later reads h."""
    one = problem(35, 0, 40, dtype, members=((0, 5, 1.7, True),))
    assert_right(one(), one)


def test_an_h_is_made_of_a_term_after_the_last_column(dtype):
    """As of a matrix in tiles, where the first one makes each h."""
    whole = problem(35, 83, 40, dtype, members=((64, 5, 1.7, True), (19, 20, 0.6, True)))
    y, made = whole(), [update.h.clone() for update in whole.updates]
    first, second = whole.updates
    for update in whole.updates:
        update.h.fill_(torch.nan)
    beyond = second._replace(column=64, factor=second.factor[:0])
    left = whole.part(slice(None), slice(0, 64))._replace(updates=(first, beyond))
    right = whole.part(slice(None), slice(64, 83))._replace(updates=(second._replace(column=0, lora_A=None),))
    assert torch.equal(torch.cat([left(), right()], 1), y)
    assert all(torch.equal(update.h, h) for update, h in zip(whole.updates, made, strict=True))


def test_a_term_of_no_columns_changes_nothing(dtype):
    one = problem(35, 83, 40, dtype, members=((20, 3, 1.7), (0, 5, 0.6), (30, 2, 0.3)))
    for _ in range(3):
        assert_right(one(), one)
        problem(70, 300, 90, dtype, size=1e30)()  # other numbers in the memory of the factors


@pytest.mark.parametrize("count", [1, MOST_UPDATES])
def test_as_many_terms_as_there_may_be(dtype, count):
    one = problem(35, 83, 40, dtype, members=tuple((10, 1 + place, 0.3 + place) for place in range(count)))
    assert_right(one(), one)
    more = one._replace(updates=(*one.updates, *[one.updates[-1]] * MOST_UPDATES))
    assert dense_product(*more[:4], None, more.updates) is None


@pytest.mark.parametrize(
    ("size", "members"),
    [((256, 192, 576), 8), ((96, 576, 1536), 16), ((300, 200, 3072), 4), ((64, 1000, 200), 3), ((512, 40, 96), 40)],
    ids=str,
)
def test_bfloat16_errs_no_more_than_a_product_and_an_addition(size, members):
    if "amx" not in usable():
        pytest.skip("bfloat16 goes by the library here")
    one = problem(*size, torch.bfloat16, members=((size[1], members, 1.7),))
    right, _ = one.in_float64()
    with using(load("amx")), torch.no_grad():
        ours, other = ((y.double() - right).norm() for y in (one(), one.by_torch()))
    assert ours <= other


# ---------------------------------------------------------------------------------------------------------------------
# The same bits.


@pytest.mark.parametrize(
    "size",
    [(70, 150, 1300), (9, 700, 400), (700, 33, 190), (WAITING_ROWS + 70, 70, LONGEST_PART + 9), (40, 1500, 240)],
    ids=str,
)
@pytest.mark.parametrize("members", ["gap", "some made"])
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", ""])
# How threads share the work is the same in every build: the plainest, and by tiles or the last.
@pytest.mark.parametrize("dtype", PRODUCT_BUILDS[:1] + PRODUCT_BUILDS[1:][-1:], ids=build_id, indirect=True)
def test_any_number_of_threads_gives_the_same_bits(dtype, size, transposed, members):
    one = problem(*size, dtype, transposed=transposed, members=MEMBERS[members](size[1]))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((one(), *(update.h.clone() for update in one.updates)))
        assert_right(found[0][0], one)
    for other in found[1:]:
        assert all(torch.equal(part, first) for part, first in zip(other, found[0], strict=True))


@pytest.mark.parametrize("inputs", [77, 1300, LONGEST_PART + 5, 3100])
@pytest.mark.parametrize("members", ["two", "some made"])
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", ""])
def test_a_row_has_the_same_bits_among_any_rows(dtype, inputs, transposed, members):
    rows, outputs = WAITING_ROWS + 10, 45
    one = problem(rows, outputs, inputs, dtype, transposed=transposed, members=MEMBERS[members](outputs))
    whole, made = one(), [update.h.clone() for update in one.updates]
    for count in (1, 5, 9, 31, 32, 33, 70, 300):
        assert torch.equal(one.part(slice(0, count))(), whole[:count])
        assert torch.equal(one.part(slice(rows - count, rows))(), whole[-count:])
        assert all(torch.equal(update.h, h) for update, h in zip(one.updates, made, strict=True)), (
            "made again, or as it was"
        )


@pytest.mark.parametrize("inputs", [77, 1300, LONGEST_PART + 5])
@pytest.mark.parametrize("members", ["gap", "some made"])
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", ""])
def test_a_column_has_the_same_bits_among_any_columns(dtype, inputs, transposed, members):
    one = problem(40, 420, inputs, dtype, transposed=transposed, members=MEMBERS[members](420))
    whole = one()
    for start, stop in ((0, 1), (0, 33), (5, 150), (64, 300), (97, 420), (419, 420)):
        out = gapped((40, stop - start), dtype, 6)
        assert torch.equal(one.part(slice(None), slice(start, stop))(out), whole[:, start:stop])
        assert marks_intact(out)


def test_a_result_is_the_columns_of_a_wider_matrix(dtype):
    one = problem(37, 64, 96, dtype, members=((64, 8, 1.7),))
    wide = torch.full((37, 192), MARK, dtype=dtype)
    one(wide[:, 64:128])
    assert torch.equal(wide[:, 64:128], one())
    assert (wide[:, :64] == MARK).all() and (wide[:, 128:] == MARK).all()


@pytest.mark.parametrize("offset", [0, 1, 32])
def test_a_large_result_has_the_same_bits_wherever_it_lies(dtype, offset):
    """From two megabytes on it is written past the caches, where it lies on whole lines."""
    one = problem(1100, 970, 40, dtype, members=((970, 3, 0.6),))
    wide = torch.full((1100, 1024), MARK, dtype=dtype)
    y = wide[:, offset : offset + 970]
    one(y)
    assert_right(y, one)
    assert torch.equal(y[:50], one.part(slice(0, 50))())
    assert (wide[:, :offset] == MARK).all() and (wide[:, offset + 970 :] == MARK).all()
    again = y.clone()
    assert torch.equal(one._replace(residual=y)(y), one._replace(residual=again)())


def test_threads_of_the_program_have_rooms_of_their_own(dtype):
    problems = [problem(70, 150 + place, 1300, dtype, members=((150, 8, 1.7),)) for place in range(3)]
    build, expected, found = module.library(), [one() for one in problems], {}

    def again(place: int) -> None:
        with using(build), proving_kernels(), torch.no_grad():
            found[place] = [problems[place]() for _ in range(20)]

    threads = [threading.Thread(target=again, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected[place]) for place in range(3) for y in found[place])


def test_the_room_grows_as_it_must_and_is_given_back(dtype, monkeypatch):
    monkeypatch.setattr(module, "_WORKSPACE", module._Workspace())
    small, large = problem(9, 33, 40, dtype), problem(70, 300, 1300, dtype, members=((300, 40, 1.7),))
    expected = small(), large()
    drop_workspace()
    assert module._WORKSPACE.buffer.numel() == 0
    assert torch.equal(small(), expected[0])
    first = module._WORKSPACE.buffer
    assert first.numel() > 0
    assert torch.equal(small(), expected[0]) and module._WORKSPACE.buffer is first
    assert torch.equal(large(), expected[1])
    second = module._WORKSPACE.buffer
    assert second.numel() > first.numel()
    assert torch.equal(small(), expected[0]) and module._WORKSPACE.buffer is second
    drop_scratch()
    assert module._WORKSPACE.buffer.numel() == 0, "with the tiles of quantized matrices"


# ---------------------------------------------------------------------------------------------------------------------
# Where a library has to do.


def both_ways(one: Problem) -> tuple[Tensor, Tensor]:
    """As ops ask for it, forward and as a gradient: the same numbers, where W is one that can be read both ways."""
    return (
        frozen_linear(one.x, one.weight.T, one.bias, one.residual, updates=one.updates),
        frozen_input_gradient(one.x, one.weight, updates=one.updates),
    )


def assert_near(one: Problem) -> None:
    bare = one._replace(bias=None, residual=None)
    for y, expected in zip(both_ways(one), (one, bare), strict=True):
        right, sizes = expected.in_float64()
        unit = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[y.dtype]
        assert ((y.double() - right).abs() <= unit * sizes).all()


@pytest.mark.parametrize("build", [*usable(), None])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_other_builds_and_dtypes_take_the_library(build, narrow):
    one = problem(35, 83, 40, narrow, members=MEMBERS["two"](83))
    with using(None if build is None else load(build)), torch.no_grad():
        ours = build == "amx" and narrow == torch.bfloat16
        assert amx_available(narrow) is ours
        assert uses_amx(one.x) is ours
        assert (dense_product(*one[:4], None, one.updates) is None) is not ours
        assert_near(one)


def test_what_autograd_records_takes_the_library(dtype):
    one = problem(35, 83, 40, dtype, members=MEMBERS["two"](83))
    with torch.enable_grad():
        x = one.x.clone().requires_grad_()
        assert dense_product(x, one.weight) is None
        frozen_linear(x, one.weight.T).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_what_has_gaps_within_rows_takes_the_library(dtype):
    one = problem(35, 83, 40, dtype, members=MEMBERS["two"](83))
    gaps = one._replace(x=torch.stack([one.x, one.x], dim=-1)[..., 0])
    assert dense_product(*gaps[:4], None, gaps.updates) is None
    assert_near(gaps)
    assert dense_product(one.x.cfloat().real, one.weight) is None


def test_what_is_compiled_takes_the_library(dtype):
    """Without a break: what is traced has no addresses."""
    one = problem(35, 83, 40, dtype, members=MEMBERS["two"](83))

    def plain(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return frozen_linear(x, weight, None, residual), frozen_input_gradient(x, weight.T)

    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    with torch_form():
        expected = plain(one.x, one.weight.T, one.residual)
    for y, other in zip(compiled(one.x, one.weight.T, one.residual), expected, strict=True):
        assert torch.equal(y, other)
