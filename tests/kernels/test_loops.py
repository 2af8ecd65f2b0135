"""The compiled kernels on every path of this machine: right, inside their buffers, and the same bits each time."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from backhand.kernels import rms_norm
from backhand.kernels.builds import load, torch_form, usable, using
from backhand.kernels.library import find_kernel, proving_kernels
from backhand.nn.batch import document_runs
from backhand.ops.adapted_glu import AdaptedGLUSaved, adapted_glu_backward
from backhand.ops.attention import attention_backward, attention_forward
from backhand.ops.attention_blocks import Scores
from backhand.ops.causal_conv import Taps, causal_conv_backward, causal_conv_continued, causal_conv_forward
from backhand.ops.frozen_matrix import frozen_linear
from backhand.ops.gated_conv import gated_conv_backward, gated_conv_forward
from backhand.ops.gated_delta_rule import gated_delta_rule_backward, gated_delta_rule_forward
from backhand.ops.glu import GLUSaved, glu_backward, glu_forward
from backhand.ops.linear_cross_entropy import softmax_losses
from backhand.ops.linear_divergence import DIVERGENCES, Divergence, divergences_in_place
from backhand.ops.lora_group import LoRAGroup
from backhand.ops.low_rank import LoRAFactors, add_lora_A_gradients, add_up_projection, down_projection, h_gradient
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, rms_norm_backward, rms_norm_forward
from backhand.ops.rotary import RotaryTable, rotary_backward, rotary_forward
from backhand.verify.measure import autograd_gradients, relative_error
from backhand.verify.runner import FLOAT64_BOUND, load_proofs
from tests.support.for_each import for_each
from tests.support.gapped import gapped, marks_intact

WITH_LOOPS = (
    *("rms_norm", "glu", "adapted_glu", "rotary", "linear_cross_entropy", "attention", "frozen_linear"),
    *("lora_linear", "lora_group", "causal_conv", "gated_conv", "gated_delta_rule"),
)
UNREAD = torch.zeros(0, 0)
"""In the place of a member's tensors that a function does not read."""
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float64: 1e-12}

pytestmark = pytest.mark.skipif(not usable(), reason="the compiled library is not built")


@pytest.fixture(params=usable())
def build(request):
    """Each build of the library in turn, and float64 too."""
    with using(load(request.param)), proving_kernels(), torch.no_grad():
        yield request.param


@pytest.fixture(scope="module")
def right():
    """What is computed once for all builds."""
    return {}


@pytest.fixture
def both_forms(request, right):
    """Computes by the loops, and in torch's form from the same numbers in float64."""
    case = request.node.originalname, repr([(n, v) for n, v in request.node.callspec.params.items() if n != "build"])
    number = itertools.count()

    def both(compute):
        # Copies: in float64 both write into the same arrays.
        found, key = [part.clone() for part in compute(lambda x: x)], (case, next(number))
        if key not in right:
            with torch_form():
                there = compute(lambda x: x.double() if x.is_floating_point() else x)
            right[key] = [part.clone() for part in there]
        return found, right[key]

    return both


def assert_close(found, expected, dtype):
    """Relative to the numbers, or to numbers of a hundredth where the right ones are zero or nearly."""
    for ours, right in zip(found, expected, strict=True):
        assert ours.shape == right.shape
        least = 0.01 * right.numel() ** 0.5
        assert (ours.double() - right).norm() <= TOLERANCE[dtype] * max(float(right.norm()), least)


@functools.cache
def truths_of(op):
    """Each case with its proof, and the right output and gradients."""
    found = []
    for proof in load_proofs(op):
        for case in proof.cases:
            gradients = case.run_manual(case.tensors, proof.backward).gradients
            with torch.enable_grad():
                found.append((proof, case, *autograd_gradients(case.reference, case.tensors, gradients)))
    return found


# The widest one is what `backhand verify` proves.
@pytest.mark.parametrize("op", WITH_LOOPS)
@pytest.mark.parametrize("build", usable()[:-1], indirect=True)
def test_cases_hold_in_float64_on_every_path(build, op):
    for proof, case, expected_y, expected in truths_of(op):
        y, gradients = case.run_manual(case.tensors, proof.backward)
        assert relative_error(y, expected_y, 1.0) < FLOAT64_BOUND, case.name
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name], 1.0) < FLOAT64_BOUND, (case.name, name)


SIZES = [(0, 5), (1, 1), (3, 7), (2, 16), (5, 33), (4, 64), (3, 129)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@for_each("rows, n", SIZES)
def test_rms_norm_of_any_size(build, both_forms, dtype, rows, n):
    x, d_y = gapped((rows, n), dtype, 0), gapped((rows, n), dtype, 1)
    weight, residual = torch.randn(n).to(dtype), torch.randn(rows, n).to(dtype)

    def compute(cast):
        y, saved = rms_norm_forward(cast(x), cast(weight), 1e-2, 1.0)
        grads = rms_norm_backward(cast(d_y), saved, residual=cast(residual))
        own = cast(d_y).clone()
        again = rms_norm_backward(own, saved, residual=cast(residual), out=own)
        assert again.d_x is own
        assert all(map(torch.equal, grads, again))
        return y, rms_norm_apply(*saved), *grads

    assert_close(*both_forms(compute), dtype)
    assert marks_intact(x)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_of_heads_that_are_a_view(build, both_forms, dtype):
    x, d_y, weight = gapped((5, 9, 24), dtype, 0), gapped((5, 9, 24), dtype, 1), torch.randn(24).to(dtype)

    def compute(cast):
        y, saved = rms_norm_forward(cast(x)[:, 2:6], cast(weight), 1e-2)
        return y, *rms_norm_backward(cast(d_y)[:, 1:5], saved)

    assert_close(*both_forms(compute), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@for_each("rows, n", SIZES)
def test_glu_of_any_size(build, both_forms, dtype, rows, n, activation):
    gate, up, d_y = (gapped((rows, n), dtype, seed, size=3.0) for seed in range(3))
    out, grads, again = gapped((rows, n), dtype, 3), gapped((rows, 2 * n), dtype, 4), gapped((rows, n), dtype, 5)

    def compute(cast):
        y, _ = glu_forward(cast(gate), cast(up), activation, out=cast(out))
        saved, once_more = GLUSaved(cast(gate), cast(up), activation), cast(again)
        alone = glu_backward(cast(d_y), saved)
        return y, *alone, *glu_backward(cast(d_y), saved, out=cast(grads), output_buffer=once_more), once_more

    assert_close(*both_forms(compute), dtype)
    compute(lambda x: x)
    assert torch.equal(again, out), "the forward's bits"
    place, g = torch.cat([gate, up], dim=-1), d_y.clone()
    glu_backward(g, GLUSaved(place[:, :n], place[:, n:], activation), out=place, output_buffer=g)
    assert torch.equal(place, grads), "in place too"
    assert torch.equal(g, again)
    assert marks_intact(out)
    assert marks_intact(again)
    assert marks_intact(grads)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@for_each(
    "rows, n, ranks",
    [
        *((0, 5, (3, 2, 4)), (5, 0, (3, 2, 4)), (1, 1, (1, 1, 1)), (3, 7, (2, 0, 3)), (5, 33, (0, 17, 0))),
        *((49, 64, (16, 16, 16)), (130, 65, (8, 33, 0)), (97, 129, (0, 0, 130)), (771, 70, (16, 3, 16))),
    ],
)
def test_adapted_glu_of_any_size(build, both_forms, dtype, rows, n, ranks, activation):
    gate, up, down = ranks
    gate_up, d_y = gapped((rows, 2 * n), dtype, 0, size=2.0), gapped((rows, n), dtype, 1)
    h, d_t = gapped((rows, gate + up), dtype, 2), gapped((rows, down), dtype, 3) if down else None
    factors = [gapped((n, rank), dtype, 4 + place) if rank else None for place, rank in enumerate((gate, up))]
    wide = torch.promote_types(dtype, torch.float32)
    shapes = *((n, rank) if rank else None for rank in (gate, up)), (down, n) if down else None
    receivers = [None if shape is None else gapped(shape, wide, 6 + place) for place, shape in enumerate(shapes)]

    def unit(place, cast, of_gate, of_up, of_after):
        front = [
            LoRAFactors(column, UNREAD, cast(factor), scaling, UNREAD, into)
            for column, factor, scaling, into in zip((0, n), factors, (1.7, -0.6), (of_gate, of_up), strict=True)
            if factor is not None
        ]
        after = [] if of_after is None else [LoRAFactors(0, UNREAD, UNREAD, 1.0, of_after, UNREAD)]
        groups = LoRAGroup(tuple(front)), LoRAGroup(tuple(after))
        return AdaptedGLUSaved(place, activation, groups[0], cast(h), groups[1], None if d_t is None else cast(d_t))

    def compute(cast):
        # Both what is overwritten and what is added to.
        place, g, *copies = (None if x is None else cast(x) + 0 for x in (gate_up, d_y, *receivers))
        grads = adapted_glu_backward(g, unit(place, cast, *copies), out=place)
        assert grads.d_gate_up is place
        return place, grads.d_h, *(copy for copy in copies if copy is not None)

    found, expected = both_forms(compute)
    assert_close(found, expected, dtype)
    adapted_glu_backward(d_y.clone(), unit(gate_up, lambda x: x, *receivers), out=gate_up)
    there = [gate_up, *(receiver for receiver in receivers if receiver is not None)]
    assert all(torch.equal(x, right) for x, right in zip(there, [found[0], *found[2:]], strict=True))
    assert all(marks_intact(x) for x in there)


@pytest.mark.parametrize("dtype", TOLERANCE)
@for_each("tokens, half", [(0, 4), (1, 1), (3, 5), (2, 16), (5, 35)])
def test_rotary_of_any_size(build, both_forms, dtype, tokens, half):
    x = gapped((tokens, 3, 2 * half), dtype, 0)
    angles = torch.randn(tokens, half, dtype=torch.promote_types(dtype, torch.float32))

    def compute(cast):
        table = RotaryTable(*(cast(part) for part in (angles.cos(), angles.sin())))
        copy = x.clone() if cast(x) is x else cast(x)
        y, _ = rotary_forward(copy, table, out=copy)
        return y.clone(), rotary_backward(cast(x), table).d_x

    assert_close(*both_forms(compute), dtype)
    y = gapped((tokens, 3, 2 * half), dtype, 1)
    rotary_forward(x, RotaryTable(angles.cos(), angles.sin()), out=y)
    assert marks_intact(y)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("transposed", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("by_parts", [False, True], ids=["columns", "rows"])
@for_each(
    "rows, n, rank",
    [
        *((0, 5, 3), (5, 0, 3), (5, 4, 0), (1, 1, 1), (3, 7, 2), (2, 64, 16), (5, 33, 1), (129, 31, 17)),
        *((259, 97, 8), (13, 530, 16), (31, 1027, 48), (49, 35, 130), (130, 192, 33), (771, 65, 24)),
    ],
)
def test_low_rank_products_of_any_size(build, both_forms, dtype, rows, n, rank, transposed, by_parts, monkeypatch):
    monkeypatch.setattr("backhand.kernels.low_rank.by_parts_of_rows", lambda dtype: by_parts)
    v, h, y = gapped((rows, n), dtype, 0), gapped((rows, rank), dtype, 1), gapped((rows, n), dtype, 2)
    factor = gapped((rank, n), dtype, 3, size=max(n, 1) ** -0.5) if transposed else gapped((n, rank), dtype, 3)
    out, wide = gapped((rows, rank), dtype, 4), torch.promote_types(dtype, torch.float32)
    factors, weight = torch.rand(rows, 1, dtype=wide) + 0.5, torch.randn(n).to(dtype)
    parts = rank // 3, rank - rank // 3
    receivers = [gapped((part, n), wide, 5 + part) for part in parts * 2]
    lora_A = factor if transposed else factor.T.contiguous()

    def compute(cast):
        copies = [cast(part) if cast(part) is not part else part.clone() for part in receivers]
        add_lora_A_gradients(cast(v), cast(h), copies[:2])
        norm = RMSNormSaved(cast(v), cast(weight), cast(factors), 1.0)
        add_lora_A_gradients(norm, cast(h), copies[2:])
        copy = cast(y) if cast(y) is not y else y.clone()
        projected = down_projection(cast(v), cast(lora_A)), down_projection(cast(v), cast(lora_A), cast(out)).clone()
        return *copies, add_up_projection(copy, cast(h), cast(factor), -0.6, transposed=transposed), *projected

    found, expected = both_forms(compute)
    assert_close(found, expected, dtype)
    assert_close([add_up_projection(y, h, factor, -0.6, transposed=transposed)], expected[4:5], dtype)
    add_lora_A_gradients(v, h, receivers[:2])
    add_lora_A_gradients(RMSNormSaved(v, weight, factors, 1.0), h, receivers[2:])
    assert all(torch.equal(part, copy) for part, copy in zip(receivers, found[:4], strict=True))
    assert all(marks_intact(part) for part in (y, out, *receivers))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("same", [False, True], ids=["wide", "same"])
@pytest.mark.parametrize("by_parts", [False, True], ids=["columns", "rows"])
@for_each(
    "rows, sizes, ranks",
    [
        *((0, (5,), (3,)), (5, (0, 4), (2, 3)), (5, (4,), (0,)), (1, (1,), (1,)), (3, (7, 5), (2, 16))),
        *((49, (35, 3, 65), (17, 1, 8)), (130, (192, 129), (16, 16)), (97, (300,), (130,))),
        *((31, (64,), (16,)), (259, (97, 31), (8, 17)), (545, (192,), (33,))),
    ],
)
def test_both_products_with_a_gradient_of_any_size(
    build, both_forms, dtype, same, by_parts, rows, sizes, ranks, monkeypatch
):
    monkeypatch.setattr("backhand.kernels.low_rank.by_parts_of_rows", lambda dtype: by_parts)
    g, h = gapped((rows, sum(sizes) + 2), dtype, 0), gapped((rows, sum(ranks)), dtype, 1)
    factors = [gapped(size, dtype, 2 + i) for i, size in enumerate(zip(sizes, ranks, strict=True))]
    wide = dtype if same else torch.promote_types(dtype, torch.float32)
    receivers = [gapped(factor.shape, wide, 5 + i) for i, factor in enumerate(factors)]

    def compute(cast):
        copies = [cast(part) if cast(part) is not part else part.clone() for part in receivers]
        members, column = [], 2
        for factor, into in zip(factors, copies, strict=True):
            members.append(LoRAFactors(column, UNREAD, cast(factor), 0.7 + column, UNREAD, into))
            column += len(factor)
        return h_gradient(cast(g), cast(h), members), *copies

    found, expected = both_forms(compute)
    assert_close(found, expected, dtype)
    h_gradient(g, h, [LoRAFactors(2, UNREAD, factors[0], 2.7, UNREAD, receivers[0])])
    assert torch.equal(receivers[0], found[1])
    assert marks_intact(receivers[0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3, 8])
@for_each("outputs, n", [(0, 5), (1, 1), (3, 0), (4, 7), (9, 64), (6, 1025), (67, 1100)])
def test_few_rows_of_any_size(build, both_forms, dtype, rows, outputs, n):
    x, weight = gapped((rows, n), dtype, 0), gapped((outputs, n), dtype, 1, size=max(n, 1) ** -0.5)
    residual, bias = gapped((rows, outputs), dtype, 2), gapped((1, outputs), dtype, 3)[0]
    y = gapped((rows, outputs), dtype, 4)

    def compute(cast):
        return frozen_linear(cast(x), cast(weight)), frozen_linear(cast(x), cast(weight), cast(bias), cast(residual))

    assert_close(*both_forms(compute), dtype)
    expected = frozen_linear(x, weight, bias, residual)
    assert torch.equal(frozen_linear(x, weight, bias, residual, out=y), expected)
    assert marks_intact(y)


@pytest.mark.parametrize("dtype", TOLERANCE)
@for_each("rows, n", [(0, 5), (1, 1), (3, 7), (2, 64), (3, 4099), (2, 8200)])
def test_softmax_losses_of_any_size(build, both_forms, dtype, rows, n):
    logits, targets = gapped((rows, n), dtype, 0, size=2.0), torch.arange(rows) * 5 % n
    wide = torch.promote_types(dtype, torch.float32)

    def compute(cast):
        z = cast(logits) if cast(logits) is not logits else logits.clone()
        losses = torch.empty(rows, dtype=cast(torch.empty(0, dtype=wide)).dtype)
        softmax_losses(z, targets, losses, gradient=True)
        return z, losses

    assert_close(*both_forms(compute), dtype)
    softmax_losses(logits, targets, torch.empty(rows, dtype=wide), gradient=True)
    assert marks_intact(logits)


@pytest.mark.parametrize("dtype", TOLERANCE)
@for_each("rows, n", [(0, 5), (1, 1), (3, 7), (2, 64), (3, 4099), (2, 8200)])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_of_any_size(build, both_forms, kind, dtype, rows, n):
    student, teacher = gapped((rows, n), dtype, 0, size=2.0), gapped((rows, n), dtype, 1, size=2.0)
    wide = torch.promote_types(dtype, torch.float32)

    def compute(cast):
        z = cast(student) if cast(student) is not student else student.clone()
        losses = torch.empty(rows, dtype=cast(torch.empty(0, dtype=wide)).dtype)
        divergences_in_place(z, cast(teacher), losses, Divergence(kind, 0.3), gradient=True)
        return z, losses

    assert_close(*both_forms(compute), dtype)
    divergences_in_place(student, teacher, torch.empty(rows, dtype=wide), Divergence(kind, 0.3), gradient=True)
    assert marks_intact(student) and marks_intact(teacher)


def test_a_target_that_is_no_class_is_an_error(build):
    for target in (-100, 7):
        with pytest.raises(IndexError):
            softmax_losses(torch.zeros(2, 7), torch.tensor([0, target]), torch.empty(2), gradient=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_shows(build, value, dtype):
    """A guard that looks for numbers that are not finite must find what torch's form would show it."""
    row = torch.randn(2, 37).to(dtype)
    row[0, 5] = value
    _, saved = rms_norm_forward(row, torch.ones(37, dtype=dtype), 1e-5)
    assert not rms_norm_apply(*saved)[0].isfinite().all()
    losses = torch.empty(2)
    softmax_losses(row.clone(), torch.tensor([5, 5]), losses, gradient=True)
    assert not losses[0].isfinite()
    assert losses[1].isfinite()
    y, _ = glu_forward(torch.ones_like(row), row, "silu")
    assert not y[0].isfinite().all()


TREES = (3, 4, 2, 5, 5, 1, 2, 6, 3), (-1, -1, 1, 2, 2, 1, -1, 6, 6)
CHAINS = (1, 1, 1, 2, 1, 3, 12), (-1, 0, 1, 2, 1, 0, -1)


def runs_of(lengths, shared):
    """Documents after this number of shared tokens, or segments by their parents."""
    if isinstance(shared, tuple):
        return document_runs(lengths, shared)
    return document_runs((shared, *lengths), (-1, *(0,) * len(lengths))) if shared else document_runs(lengths)


def tokens_of(runs):
    return sum(run.number * run.length for run in runs)


def attention_of(documents, heads, kv_heads, head_dim, dtype, *, window=None, shared=0, causal=True):
    """A function that runs it, forward and backward, on tensors cast by its argument."""
    runs = runs_of(documents, shared)
    tokens = tokens_of(runs)
    qkv = gapped((tokens, heads + 2 * kv_heads, head_dim), dtype, 0)
    d_y = gapped((tokens, heads, head_dim), dtype, 1)

    def compute(cast):
        q, k, v = cast(qkv).split([heads, kv_heads, kv_heads], dim=1)
        y, saved = attention_forward(q, k, v, runs, Scores(0.2, window, causal=causal))
        return y, *attention_backward(cast(d_y), saved)

    return compute


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("documents", "heads", "kv_heads", "head_dim", "window", "shared"),
    [
        ((), 2, 1, 8, None, 0),
        ((1,), 3, 1, 1, None, 0),
        ((0, 5, 0), 2, 2, 7, None, 0),
        ((33, 64, 31), 4, 2, 64, None, 0),
        ((97,), 3, 1, 80, 40, 0),
        ((70,), 2, 1, 128, 1, 0),
        ((65,), 2, 1, 256, None, 0),
        ((3, 40, 1, 17, 5, 5, 5, 29, 2, 66, 8), 3, 1, 33, None, 37),
        ((5, 90), 2, 1, 16, 20, 50),
        ((2065,), 2, 1, 16, 300, 0),
        ((641, 3), 3, 1, 48, None, 0),
        ((1100, 40), 3, 1, 20, None, 0),
        ((90, 60, 300), 2, 1, 16, 1040, 1000),
        ((513, 2, 130), 4, 2, 64, None, 470),
        (TREES[0], 3, 1, 33, None, TREES[1]),
        (CHAINS[0], 2, 1, 16, 7, CHAINS[1]),
        ((70, 65, 33, 140, 40, 90, 3, 66), 4, 2, 64, None, (-1, 0, 1, 1, 0, -1, 5, 5)),
        ((200, 90, 80) * 5, 2, 1, 32, 100, tuple(p for n in range(0, 15, 3) for p in (-1, n, n))),
    ],
)
def test_attention_of_any_shape(build, both_forms, dtype, documents, heads, kv_heads, head_dim, window, shared):
    for causal in (True, False)[: 1 if shared else 2]:
        options = {"window": window, "shared": shared, "causal": causal}
        assert_close(*both_forms(attention_of(documents, heads, kv_heads, head_dim, dtype, **options)), dtype)


def test_attention_writes_nothing_but_its_results(build):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, d_y = (gapped((35, heads, 24), dtype, seed) for seed, heads in enumerate((4, 2, 2, 4)))
        out = gapped((35, 8, 24), dtype, 5)
        _, saved = attention_forward(q, k, v, document_runs((30, 5)), Scores(0.2))
        attention_backward(d_y, saved, out=out)
        assert marks_intact(out)


DOCUMENTS = [((), 0), ((1,), 0), ((3, 0, 7), 0), ((2, 5, 5), 1), ((4, 9), 5), ((), 3), TREES, CHAINS]


@pytest.mark.parametrize("dtype", TOLERANCE)
@for_each("documents, shared", DOCUMENTS)
@for_each("channels, width", [(1, 1), (5, 3), (16, 4), (259, 4), (530, 8), (33, 11)])
def test_convolutions_of_any_shape(build, both_forms, dtype, documents, shared, channels, width):
    """More taps than the loops take too."""
    runs = runs_of(documents, shared)
    tokens = tokens_of(runs)
    x, d_y, bcx = (gapped((tokens, n), dtype, n) for n in (channels, channels, 3 * channels))
    weight, bias = gapped((channels, width), dtype, 1), gapped((1, channels), dtype, 2)[0]
    out, out_gated = gapped((tokens, channels), dtype, 3), gapped((tokens, 3 * channels), dtype, 4)

    def compute(cast):
        results, taps = [], Taps(cast(weight), cast(bias))
        for silu in (False, True):
            y, saved = causal_conv_forward(cast(x), taps, runs, silu=silu)
            results += [y, causal_conv_backward(cast(d_y), saved, out=cast(out)).d_x.clone()]
        y, gated = gated_conv_forward(cast(bcx), Taps(cast(weight)), runs)
        return *results, y, gated_conv_backward(cast(d_y), gated, out=cast(out_gated)).d_bcx

    assert_close(*both_forms(compute), dtype)
    assert marks_intact(out)
    assert marks_intact(out_gated)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_convolution_goes_on(build, both_forms, dtype):
    x, weight = gapped((22, 19), dtype, 0).view(2, 11, 19), gapped((19, 4), dtype, 1)

    def compute(cast):
        seen = cast(x).new_zeros(2, 3, 19)
        taps, pieces = Taps(cast(weight)), cast(x).split([2, 1, 8], 1)
        return torch.cat([causal_conv_continued(piece, taps, seen, silu=True) for piece in pieces], 1), seen

    assert_close(*both_forms(compute), dtype)


def delta_rule_of(documents, heads, group, widths, dtype, *, shared=0, chunk=64, states=False):
    """A function that runs it, forward and backward, on tensors cast by its argument."""
    runs = runs_of(documents, shared)
    tokens = tokens_of(runs)
    wide = torch.promote_types(dtype, torch.float32)
    q, k = (gapped((tokens, heads, widths[0]), wide, seed, size=widths[0] ** -0.5) for seed in range(2))
    v, d_y = (gapped((tokens, heads * group, widths[1]), dtype, seed) for seed in (2, 3))
    decay, beta = -gapped((tokens, heads * group), wide, 4).abs(), gapped((tokens, heads * group), dtype, 5).sigmoid()
    begin = torch.randn(len(documents), heads * group, *widths, generator=torch.Generator().manual_seed(6)).to(wide)

    def compute(cast):
        inputs = [cast(x) for x in (q, k, v, decay, beta)]
        own = cast(begin).clone() if states else None
        y, saved = gated_delta_rule_forward(*inputs, runs, states=own, chunk=chunk)
        return (y, own) if own is not None else (y, *gated_delta_rule_backward(cast(d_y), saved))

    return compute


@pytest.mark.parametrize("dtype", TOLERANCE)
@for_each("documents, shared", [*DOCUMENTS, ((150, 64, 1), 0), ((70, 3), 129)])
@for_each(
    "heads, group, widths, chunk",
    [(1, 1, (1, 1), 64), (2, 3, (5, 17), 3), (3, 1, (64, 64), 64), (2, 2, (33, 20), 17), (1, 2, (16, 144), 50)],
)
def test_delta_rule_of_any_shape(build, both_forms, dtype, documents, shared, heads, group, widths, chunk):
    assert_close(*both_forms(delta_rule_of(documents, heads, group, widths, dtype, shared=shared, chunk=chunk)), dtype)
    if not shared:
        both = both_forms(delta_rule_of(documents, heads, group, widths, dtype, chunk=chunk, states=True))
        assert_close(*both, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_parts", [False, True], ids=["columns", "rows"])
def test_the_same_bits_each_time_whatever_the_threads(build, dtype, by_parts, monkeypatch):
    monkeypatch.setattr("backhand.kernels.low_rank.by_parts_of_rows", lambda dtype: by_parts)
    attend = [
        attention_of((130, 70, 90), 6, 2, 32, dtype),
        attention_of((300,), 3, 1, 32, dtype),
        attention_of((33, 100, 18), 4, 2, 32, dtype, window=20, causal=False),
        attention_of((40, 30, 60), 4, 2, 32, dtype, shared=50, window=45),
    ]
    attend += [
        delta_rule_of((130, 70, 90), 3, 2, (32, 24), dtype),
        delta_rule_of((40, 30, 60), 3, 1, (32, 24), dtype, shared=50),
    ]
    x, gate_up = torch.randn(600, 96).to(dtype), torch.randn(600, 192).to(dtype)
    wide, taps = torch.randn(300, 700).to(dtype), Taps(torch.randn(700, 4).to(dtype))

    def everything():
        results = [tensor for compute in attend for tensor in compute(lambda t: t)]
        y, conv = causal_conv_forward(wide, taps, document_runs((30, 90, 180), (-1, 0, 0)), silu=True)
        results += [y, *causal_conv_backward(wide, conv)]
        y, saved = rms_norm_forward(x, x[0], 1e-5)
        results += [y, *rms_norm_backward(x, saved, residual=y)]
        y, glu_saved = glu_forward(gate_up[:, :96], gate_up[:, 96:], "silu")
        lora_A, lora_B = x[:24], x[:24].T.contiguous()
        h = down_projection(x, lora_A)
        d_A, d_B, own, down = torch.zeros(24, 96), torch.zeros(96, 24), torch.zeros(2, 96, 8), torch.zeros(24, 96)
        add_lora_A_gradients(x, h, [d_A])
        add_lora_A_gradients(saved, h, [d_A])
        d_h = h_gradient(x, h, [LoRAFactors(0, UNREAD, lora_B, 0.5, UNREAD, d_B)])
        results += [h, add_up_projection(x.clone(), h, lora_A, transposed=True), d_h, d_A, d_B]
        front = [
            LoRAFactors(96 * i, UNREAD, lora_B[:, 8 * i : 8 * i + 8].contiguous(), 0.5 + i, UNREAD, own[i])
            for i in range(2)
        ]
        after = LoRAFactors(0, UNREAD, UNREAD, 1.0, down, UNREAD)
        groups = LoRAGroup(tuple(front)), LoRAGroup((after,))
        saved_unit = AdaptedGLUSaved(gate_up.clone(), "silu", groups[0], h[:, :16], groups[1], h)
        of_unit = adapted_glu_backward(x.clone(), saved_unit)
        results += [of_unit.d_gate_up, of_unit.d_h, own, down]
        logits, losses = gate_up.clone(), torch.empty(600)
        results.append(frozen_linear(x[:5], x.repeat(8, 1)))
        softmax_losses(logits, torch.arange(600) % 192, losses, gradient=True)
        return [*results, y, *glu_backward(x, glu_saved), logits, losses]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = everything()
        for count in (2, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(once, everything(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_rows_with_gaps_inside_go_to_torch(build):
    x, weight = torch.randn(7, 5).T, torch.randn(7)
    right, _ = rms_norm_forward(x.double().contiguous(), weight.double(), 1e-5)
    assert_close([rms_norm_forward(x, weight, 1e-5)[0]], [right], torch.float32)


@pytest.mark.parametrize("strided", [0, 1, 3])
def test_delta_rule_inputs_that_a_kernel_does_not_read_go_to_torch(build, strided):
    """Of q, k and the decays; v and the rates are read by the kernel's own check."""
    runs, generator = document_runs((9, 4)), torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    inputs = [
        normal(13, 2, 5) / 3,
        normal(13, 2, 5) / 3,
        normal(13, 4, 7),
        -normal(13, 4).abs(),
        normal(13, 4).sigmoid(),
    ]
    expected, _ = gated_delta_rule_forward(*inputs, runs, chunk=4)
    inputs[strided] = inputs[strided].mT.contiguous().mT
    y, saved = gated_delta_rule_forward(*inputs, runs, chunk=4)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gated_delta_rule_backward(y, saved))


@pytest.mark.parametrize("name", usable())
def test_what_a_loop_takes(name):
    x = torch.randn(3, 5, dtype=torch.float64)
    with using(load(name)):
        assert_taken(x)
        with proving_kernels():
            assert find_kernel(rms_norm._FORWARD, x) is not None
    with torch_form():
        assert find_kernel(rms_norm._FORWARD, x.float()) is None


def assert_taken(x):
    assert find_kernel(rms_norm._FORWARD, x) is None
    assert find_kernel(rms_norm._FORWARD, x.float()) is not None
    assert find_kernel(rms_norm._FORWARD, x.float(), x) is None, "one dtype for all"
    assert find_kernel(rms_norm._FORWARD, x.float().T) is None, "the last axis without gaps"


def test_what_autograd_follows_goes_to_torch(build):
    x = torch.randn(3, 5, requires_grad=True)
    assert find_kernel(rms_norm._FORWARD, x) is not None
    with torch.enable_grad():
        assert find_kernel(rms_norm._FORWARD, x) is None
