"""An epoch of the sine experiment: this project's loop against autograd, in both parts, on one core.

    python benchmarks/sine.py [--dtype float32 float64] [--epochs 400] [--rounds 9]

The peers, all from the same initial numbers:

    script      the original script's loop: every intermediate kept with retain_grad, loss.backward(), and the gradients
                worked out by hand a second time
    autograd    the same arithmetic without what the script does twice: torch.autograd.grad of what is trained
    torch       the formulas by hand in plain torch, each result a new tensor
    backhand    this project's loop
    product     the same with X (B A) in place of (X B) A, which is the cheaper order on a 1 × 20 layer (part 2 only)

Peers take turns round by round in one process, so that drift of the machine hits all alike, and all must agree on every
loss before a time is believed. Seconds are those of the processor, which other work on the machine does not change as
it does the clock's; the clock's times are listed too. Medians over the rounds, their range and the ratios go to
benchmarks/results/sine.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from torch import Tensor

from backhand.lab.sine.network import Start, draw_start
from backhand.lab.sine.points import Points, make_points
from backhand.lab.sine.training import AdapterTraining, BaseTraining, GradientDescent, Trained, train

BASE_RATE, LORA_RATE, SCALING = 0.01, 0.001, 2.0
REQUIRED_RATIO = 4.0
LOSS_TOLERANCE = {"float32": 1e-4, "float64": 1e-9}

Peer = Callable[[int], list[float]]
"""Runs a number of further epochs; returns their losses."""


def tensors(start: Start, points: Points) -> tuple[Tensor, ...]:
    """X, y, w0, b0, w2, B, A as the original lays them out."""
    network = start.network
    arrays = (points.x, points.y, network.weights[0], network.bias, network.weights[1], start.lora_A.T, start.lora_B.T)
    return tuple(torch.tensor(np.ascontiguousarray(array)) for array in arrays)


def script_base(start: Start, points: Points) -> Peer:
    X, y, w0, b0, w2, _, _ = tensors(start, points)
    w0, b0, w2 = (torch.nn.Parameter(tensor) for tensor in (w0, b0, w2))

    def run(epochs: int) -> list[float]:
        losses = []
        for _ in range(epochs):
            o1 = X @ w0.T
            o2 = o1 + b0
            o3 = torch.relu(o2)
            outputs = o3 @ w2.T
            diff = outputs - y
            squared_diff = diff**2
            o_seven = squared_diff.sum(0)
            loss = o_seven / len(squared_diff)
            for parameter in (w0, b0, w2):
                parameter.requires_grad = True
                parameter.grad = None
            for kept in (loss, o_seven, squared_diff, diff, outputs, o3, o2, o1, X):
                if not kept.requires_grad:
                    kept.requires_grad = True
                kept.retain_grad()
            loss.backward()
            doutputs = script_d_outputs(diff, squared_diff)
            do3 = doutputs @ w2
            dl2w = o3.T @ doutputs
            do2 = do3 * (o2 > 0)
            dl0bias = do2.sum(0)
            dl0w = X.T @ do2
            with torch.no_grad():
                w0.data -= BASE_RATE * dl0w.T
                b0.data -= BASE_RATE * dl0bias
                w2.data -= BASE_RATE * dl2w.T
            losses.append(loss.item())
        return losses

    return run


def script_lora(start: Start, points: Points) -> Peer:
    X, y, w0, b0, w2, B, A = tensors(start, points)
    B, A = torch.nn.Parameter(B), torch.nn.Parameter(A)

    def run(epochs: int) -> list[float]:
        losses = []
        for _ in range(epochs):
            o1 = X @ w0.T
            lora_w = SCALING * B @ A
            lora_o1 = X @ lora_w
            h = o1 + lora_o1
            o2 = h + b0
            o3 = torch.relu(o2)
            outputs = o3 @ w2.T
            diff = outputs - y
            squared_diff = diff**2
            o_seven = squared_diff.sum(0)
            loss = o_seven / len(squared_diff)
            for parameter in (w0, b0, w2):
                parameter.requires_grad = False
                parameter.grad = None
            A.grad = B.grad = None
            for kept in (loss, o_seven, squared_diff, diff, outputs, o3, o2, o1, X, h, lora_o1, lora_w):
                if not kept.requires_grad:
                    kept.requires_grad = True
                kept.retain_grad()
            loss.backward()
            doutputs = script_d_outputs(diff, squared_diff)
            do2 = doutputs @ w2 * (o2 > 0)
            dlora_w = X.T @ do2
            dB = SCALING * dlora_w @ A.T
            dA = SCALING * B.T @ dlora_w
            with torch.no_grad():
                A.data -= LORA_RATE * dA
                B.data -= LORA_RATE * dB
            losses.append(loss.item())
        return losses

    return run


def script_d_outputs(diff: Tensor, squared_diff: Tensor) -> Tensor:
    dL = torch.tensor(1.0, dtype=diff.dtype)  # in float32, as printed, 1/100 would be rounded to it
    do_seven = dL * 1 / len(squared_diff)
    dsquared_diff = do_seven * torch.ones_like(squared_diff)
    ddiff = dsquared_diff * 2 * diff
    return ddiff * 1


def autograd_base(start: Start, points: Points) -> Peer:
    X, y, *parameters = tensors(start, points)[:5]
    for parameter in parameters:
        parameter.requires_grad_()
    w0, b0, w2 = parameters

    def run(epochs: int) -> list[float]:
        losses = []
        for _ in range(epochs):
            outputs = torch.relu(X @ w0.T + b0) @ w2.T
            loss = ((outputs - y) ** 2).sum(0) / len(X)
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= BASE_RATE * gradient
            losses.append(loss.item())
        return losses

    return run


def autograd_lora(start: Start, points: Points) -> Peer:
    X, y, w0, b0, w2, B, A = tensors(start, points)
    parameters = (A.requires_grad_(), B.requires_grad_())

    def run(epochs: int) -> list[float]:
        losses = []
        for _ in range(epochs):
            outputs = torch.relu(X @ w0.T + X @ (SCALING * B @ A) + b0) @ w2.T
            loss = ((outputs - y) ** 2).sum(0) / len(X)
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= LORA_RATE * gradient
            losses.append(loss.item())
        return losses

    return run


def torch_base(start: Start, points: Points) -> Peer:
    X, y, w0, b0, w2, _, _ = tensors(start, points)

    @torch.no_grad()
    def run(epochs: int) -> list[float]:
        losses = []
        for _ in range(epochs):
            o2 = X @ w0.T + b0
            o3 = torch.relu(o2)
            diff = o3 @ w2.T - y
            doutputs = diff * (2 / len(X))
            do2 = doutputs @ w2 * (o2 > 0)
            dl2w, dl0bias, dl0w = doutputs.T @ o3, do2.sum(0), do2.T @ X
            w0.sub_(BASE_RATE * dl0w)
            b0.sub_(BASE_RATE * dl0bias)
            w2.sub_(BASE_RATE * dl2w)
            losses.append((diff**2).mean().item())
        return losses

    return run


def torch_lora(start: Start, points: Points) -> Peer:
    X, y, w0, b0, w2, B, A = tensors(start, points)

    @torch.no_grad()
    def run(epochs: int) -> list[float]:
        losses = []
        for _ in range(epochs):
            o2 = X @ w0.T + X @ (SCALING * B @ A) + b0
            diff = torch.relu(o2) @ w2.T - y
            do2 = diff * (2 / len(X)) @ w2 * (o2 > 0)
            dlora_w = X.T @ do2
            dB, dA = SCALING * dlora_w @ A.T, SCALING * B.T @ dlora_w
            A.sub_(LORA_RATE * dA)
            B.sub_(LORA_RATE * dB)
            losses.append((diff**2).mean().item())
        return losses

    return run


def backhand_peer(trained: Trained, learning_rate: float) -> Peer:
    optimizer = GradientDescent(trained.parameters, learning_rate)
    return lambda epochs: train(trained, optimizer, epochs).tolist()


def backhand_base(start: Start, points: Points) -> Peer:
    return backhand_peer(BaseTraining(start.network, points), BASE_RATE)


def backhand_lora(start: Start, points: Points) -> Peer:
    training = AdapterTraining(start.network, 0, points, start.lora_A, start.lora_B, SCALING)
    return backhand_peer(training, LORA_RATE)


class ProductFirst(AdapterTraining):
    """X (B A) in place of (X B) A: the product is formed, and so is its gradient."""

    def forward(self) -> float:
        return self.head.forward(np.dot(self.x, self.delta_weight.T) + self.frozen_h)

    def backward(self) -> None:
        d_product = np.dot(self.head.backward().T, self.x) * self.scaling
        np.dot(d_product, self.lora_A.T, out=self.d_lora_B)
        np.dot(self.lora_B.T, d_product, out=self.d_lora_A)


def product_first_lora(start: Start, points: Points) -> Peer:
    return backhand_peer(ProductFirst(start.network, 0, points, start.lora_A, start.lora_B, SCALING), LORA_RATE)


PARTS: dict[str, dict[str, Callable[[Start, Points], Peer]]] = {
    "base": {"script": script_base, "autograd": autograd_base, "torch": torch_base, "backhand": backhand_base},
    "lora": {
        "script": script_lora,
        "autograd": autograd_lora,
        "torch": torch_lora,
        "backhand": backhand_lora,
        "product": product_first_lora,
    },
}


def measure(part: str, dtype: str, epochs: int, rounds: int) -> dict[str, Any]:
    """All peers of one part in turns. Part 2 starts from the base that part 1 leaves."""
    points = make_points("sin", 100, dtype)
    start = draw_start((20,), 8, 0, dtype)
    if part == "lora":
        base = BaseTraining(start.network, points)
        train(base, GradientDescent(base.parameters, BASE_RATE), 5000)
        start = Start(base.network, start.lora_A, start.lora_B)
    peers = {name: make(start, points) for name, make in PARTS[part].items()}
    losses: dict[str, list[float]] = {name: [] for name in peers}
    processor_s: dict[str, list[float]] = {name: [] for name in peers}
    clock_s: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(1 + rounds):
        for name, run in peers.items():
            processor, clock = time.process_time(), time.perf_counter()
            losses[name] += run(epochs)
            processor_s[name].append((time.process_time() - processor) / epochs)
            clock_s[name].append((time.perf_counter() - clock) / epochs)
    check_parity(losses, dtype)
    found = {
        name: {"epoch_ms": in_ms(processor_s[name][1:]), "clock_epoch_ms": in_ms(clock_s[name][1:])} for name in peers
    }
    ours = statistics.median(processor_s["backhand"][1:])
    ratios = {
        f"{name}_over_backhand": statistics.median(processor_s[name][1:]) / ours for name in peers if name != "backhand"
    }
    return {"part": part, "dtype": dtype, "peers": found, "ratios": ratios, "last_loss": losses["backhand"][-1]}


def in_ms(seconds: list[float]) -> dict[str, float]:
    return {"min": 1e3 * min(seconds), "median": 1e3 * statistics.median(seconds), "max": 1e3 * max(seconds)}


def check_parity(losses: dict[str, list[float]], dtype: str) -> None:
    """Every loss of every peer is the autograd loop's."""
    for name, ours in losses.items():
        for epoch, (loss, expected) in enumerate(zip(ours, losses["autograd"], strict=True)):
            if not math.isclose(loss, expected, rel_tol=LOSS_TOLERANCE[dtype]):
                raise SystemExit(f"{name}: loss {loss} in epoch {epoch}, autograd has {expected}")


def report(found: dict[str, Any]) -> None:
    """One line a peer, and the ratios."""
    print(f"\n{found['part']}, {found['dtype']}: ms an epoch, processor (clock); median of the rounds [range]")
    for name, times in found["peers"].items():
        processor, clock = times["epoch_ms"], times["clock_epoch_ms"]
        spread = f"[{processor['min']:.4f} to {processor['max']:.4f}]"
        print(f"  {name:<10} {processor['median']:.4f} {spread}  ({clock['median']:.4f})")
    for name, ratio in found["ratios"].items():
        print(f"  {name.replace('_', ' ')}: {ratio:.1f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=sorted(LOSS_TOLERANCE), default=["float32", "float64"])
    parser.add_argument("--epochs", type=int, default=400, help="epochs of each peer in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sine.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(part, dtype, arguments.epochs, arguments.rounds) for dtype in arguments.dtype for part in PARTS]
    for part in found:
        report(part)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    workload = {"epochs": arguments.epochs, "rounds": arguments.rounds, "threads": 1}
    record = {"machine": describe_machine(), "workload": workload, "parts": found}
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\nwritten to {arguments.output}")
    slow = [part for part in found if part["ratios"]["autograd_over_backhand"] < REQUIRED_RATIO]
    if slow:
        names = ", ".join(f"{part['part']} in {part['dtype']}" for part in slow)
        raise SystemExit(f"less than {REQUIRED_RATIO:g} times as fast as the autograd loop: {names}")


if __name__ == "__main__":
    main()
