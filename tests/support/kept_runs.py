"""Runs that keep hidden states below the lowest adapted layer, and what goes through these layers in them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from backhand.engines import decoder_engine
from backhand.kernels.builds import library
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.loop.observers import Observer
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder import forward_backward as forward_backward_module
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.frozen_prefix import FrozenPrefix
from backhand.nn.decoder.weights import DecoderWeights
from backhand.options.config import TrainConfig
from backhand.training.run import train
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import StopAfter, TinyRun, final_bits, with_options

_BEGINNING = "the user asks an assistant and the assistant answers in json a list of names and one number is for what "
KEPT = "cached hidden states equal the computed ones, bit by bit"


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Four layers."""
    return run_of_layers(4, tmp_path_factory.mktemp("four"))


def run_of_layers(layers: int, directory: Path) -> TinyRun:
    """A run whose model has so many."""
    if library() is None:
        pytest.skip("the compiled library is not built, and without it nothing is kept")
    run = TinyRun(directory)
    run.model = save_tiny(tiny_model("llama-tied", num_hidden_layers=layers), directory / "model")
    return run


def begin_alike(rows: Path, path: Path) -> Path:
    """The rows, each after the same words."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "prompt": _BEGINNING + line["prompt"]}) + "\n" for line in lines))
    return path


def config_of(four: TinyRun, output: Path, **options: Any) -> TrainConfig:
    """Three epochs of three steps, the upper half of the layers."""
    return four.config(output, **{"layers": "last:2", "epochs": 3, "micro_batch_rows": 2, "answers": 0, **options})


def proofs(run: Path) -> list[dict[str, Any]]:
    lines = (run / "proofs.jsonl").read_text().splitlines()
    return [found for line in lines if (found := json.loads(line))["proof"] == KEPT]


class Computed:
    """What goes through the lower blocks: rows that are computed to be kept, and batches by themselves.

    Attributes:
        rows: the rows of each set in the order in which they were computed, by the number of rows of the set.
        passes: how many of these passes there were, likewise.
        compared: batches that were put together and computed as well.
        lower: batches whose lower blocks were computed, by steps (True) and by anything else.
    """

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}
        self.passes: Counter[int] = Counter()
        self.compared = 0
        self.lower = {True: 0, False: 0}


@contextmanager
def watched() -> Iterator[Computed]:
    """Inside, what goes through the lower blocks is counted."""
    computed, in_step = Computed(), [False]
    compute, step, block = HiddenStateCache._compute, Decoder.loss_and_gradients, forward_backward_module.block_forward
    compared = HiddenStateCache._compared

    def watched_compute(self: HiddenStateCache, rows: list[int], batch: PackedBatch) -> Tensor:
        computed.rows.setdefault(len(self._packer.lengths), []).extend(rows)
        computed.passes[len(self._packer.lengths)] += 1
        return compute(self, rows, batch)

    def watched_compared(self: HiddenStateCache, *arguments: Any, **named: Any) -> Tensor:
        computed.compared += 1
        return compared(self, *arguments, **named)

    def watched_step(self: Decoder, *arguments: Any) -> Tensor:
        in_step[0] = True
        try:
            return step(self, *arguments)
        finally:
            in_step[0] = False

    def watched_block(x: Tensor, weights: Any, *rest: Any) -> Any:
        if watching and weights is watching[0]:
            computed.lower[in_step[0]] += 1
        return block(x, weights, *rest)

    def watched_look(self: FrozenPrefix, *arguments: Any) -> Tensor:
        """Looking at a number of tokens is no batch."""
        blocks = [watching.pop() for _ in list(watching)]
        try:
            return look(self, *arguments)
        finally:
            watching.extend(blocks)

    def watched_load(*arguments: Any, **named: Any) -> DecoderWeights:
        made = load(*arguments, **named)
        watching[:] = [made.blocks[0]]
        return made

    watching: list[Any] = []
    load, look = decoder_engine.load_weights, FrozenPrefix._probe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HiddenStateCache, "_compute", watched_compute)
        patch.setattr(HiddenStateCache, "_compared", watched_compared)
        patch.setattr(Decoder, "loss_and_gradients", watched_step)
        patch.setattr(FrozenPrefix, "_probe", watched_look)
        patch.setattr(decoder_engine, "load_weights", watched_load)
        patch.setattr(forward_backward_module, "block_forward", watched_block)
        yield computed


class Notes(Observer):
    """What a run noted."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)


def stopped(config: TrainConfig, step: int) -> Path:
    with pytest.raises(StopAfter.Stopped):
        train(config, callbacks=[StopAfter(step)])
    return config.run.output


def resumed(output: Path, **options: Any) -> tuple[dict[str, bytes], list[str], Computed]:
    notes = Notes()
    with watched() as computed:
        train(with_options(TrainConfig(), output=output, resume=True, quiet=True, **options), callbacks=[notes])
    return final_bits(output), [text for text in notes.texts if "hidden states" in text], computed
