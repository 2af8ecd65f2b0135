"""The gated short convolution: cases and mutants."""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.nn.batch import document_runs
from backhand.ops.causal_conv import CausalConvSaved, Taps, causal_conv_reference
from backhand.ops.gated_conv import GatedConvSaved, gated_conv_backward, gated_conv_forward, gated_conv_reference
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants
from backhand.verify.cases.causal_conv import conv_matrices


def _case(
    name: str,
    documents: tuple[int, ...],
    channels: int = 5,
    width: int = 3,
    *,
    shared: int = 0,
    bias: bool = False,
    into_buffer: bool = False,
) -> Case:
    draw = Draw(f"gated_conv: {name}")
    tokens, runs = shared + sum(documents), document_runs(documents, shared)
    tensors = {
        "bcx": draw.normal(tokens, 3 * channels),
        "d_y": draw.normal(tokens, channels),
        "weight": draw.normal(channels, width),
    }
    if bias:
        tensors["bias"] = draw.normal(channels)

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = gated_conv_forward(t["bcx"], Taps(t["weight"], t.get("bias")), runs, shared)
        out = torch.full_like(t["bcx"], torch.nan) if into_buffer else None
        return ByHand(y, {"bcx": backward(t["d_y"], saved, out=out).d_bcx})

    def reference(t: Tensors) -> Tensor:
        return gated_conv_reference(t["bcx"], Taps(t["weight"], t.get("bias")), runs, shared)

    def usual(t: Tensors) -> Tensor:
        b, c, x = t["bcx"].chunk(3, dim=-1)
        return c * causal_conv_reference(b * x, Taps(t["weight"], t.get("bias")), runs, shared)

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("packed documents", (6, 6, 4, 1, 2)),
    _case("bias", (6, 4), bias=True),
    _case("four taps", (6, 7), width=4),
    _case("one tap", (6, 3), width=1),
    _case("documents shorter than the taps", (1, 2, 3, 1), width=6),
    _case("shared prefix", (5, 5, 1, 2), shared=7),
    _case("shared prefix shorter than the taps", (5, 1, 6), shared=1, bias=True),
    _case("nothing but a prefix", (), shared=4),
    _case("into a used buffer", (5, 3), into_buffer=True),
    _case("one token", (1,)),
    _case("no tokens", ()),
    _case("training size", (40, 40, 17), channels=48),
)


def _parts(s: GatedConvSaved) -> tuple[Tensor, Tensor, Tensor]:
    b, c, x = s.bcx.chunk(3, dim=-1)
    return b, c, x


def _matrices(s: GatedConvSaved, *, apart: bool = True, prefix: bool = True) -> Tensor:
    b, _, x = _parts(s)
    return conv_matrices(CausalConvSaved(b * x, s.taps, s.runs, s.shared, False), apart=apart, prefix=prefix)


def _gradient(g: Tensor, s: GatedConvSaved, matrices: Tensor, *, gated: bool = True) -> Tensor:
    """[d_B | d_C | d_x] by the given matrices of the convolution."""
    b, c, x = _parts(s)
    convolved = torch.einsum("cts,sc->tc", matrices, b * x)
    if s.taps.bias is not None:
        convolved = convolved + s.taps.bias
    d_z = torch.einsum("tc,cts->sc", g * c if gated else g, matrices)
    return torch.cat([d_z * x, g * convolved, d_z * b], dim=-1)


def _exchanged(right: Tensor) -> Tensor:
    d_b, d_c, d_x = right.chunk(3, dim=-1)
    return torch.cat([d_x, d_c, d_b], dim=-1)


def _input_gate_alone(right: Tensor) -> Tensor:
    d_b, d_c, d_x = right.chunk(3, dim=-1)
    return torch.cat([d_b, torch.zeros_like(d_c), d_x], dim=-1)


MUTANTS = (
    *standard_mutants("d_bcx"),
    Mutant("output gate not in d_z", "d_bcx", lambda g, s, _right: _gradient(g, s, _matrices(s), gated=False)),
    Mutant("documents see each other", "d_bcx", lambda g, s, _right: _gradient(g, s, _matrices(s, apart=False))),
    Mutant("prefix's share missing", "d_bcx", lambda g, s, _right: _gradient(g, s, _matrices(s, prefix=False))),
    Mutant("taps not turned round", "d_bcx", lambda g, s, _right: _gradient(g, s, _matrices(s).mT)),
    Mutant("gate and input exchanged", "d_bcx", lambda _g, _s, right: _exchanged(right.d_bcx)),
    Mutant("output gate's gradient missing", "d_bcx", lambda _g, _s, right: _input_gate_alone(right.d_bcx)),
)

PROOFS = (OpProof("gated_conv", gated_conv_backward, CASES, MUTANTS, loops=True),)
