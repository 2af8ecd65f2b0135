"""Greedy answers to held-out rows of the demo task, here and in llama.cpp, and how far log-probabilities differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from backhand.data.demo_task import write_demo_data
from backhand.data.options import DataOptions
from backhand.data.prepare import prepare_prompts
from backhand.generation.completer import EngineCompleter, complete_greedily
from backhand.interop.opened_adapter import open_adapter
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from tests.support.llama_cpp import LlamaCpp

MAX_NEW_TOKENS = 56


@dataclass(frozen=True)
class Agreement:
    """llama.cpp's greedy answers against ours.

    Attributes:
        same: answers with the same tokens.
        rows: all answers.
        mean, largest: |log-probability there − here| of the likeliest token, over every token of llama.cpp's answers.
    """

    same: int
    rows: int
    mean: float
    largest: float


class Answers:
    """A model with an adapter here, and its greedy answers.

    Args:
        model: the base.
        adapter: its directory; None for the base alone.
        prompts: token ids.
    """

    def __init__(self, model: str, adapter: Path | None, prompts: Sequence[list[int]]) -> None:
        source = open_model(model)
        self.prompts = prompts
        self.decoder = Decoder.from_source(source, dtype=torch.float32)
        if adapter is not None:
            self.decoder.attach(open_adapter(model, adapter, force_base=False).loaded.parameters())
        self.stop_ids = source.stop_token_ids()
        self.ids = complete_greedily(
            EngineCompleter(self.decoder), prompts, max_new_tokens=MAX_NEW_TOKENS, stop_ids=self.stop_ids
        )

    def against(self, peer: LlamaCpp) -> Agreement:
        """Ask llama.cpp the same, and look up our log-probabilities along its answers."""
        same, differences = 0, []
        for prompt, ours in zip(self.prompts, self.ids, strict=True):
            answer = peer.answer(prompt, max_new_tokens=MAX_NEW_TOKENS)
            ids = [token for token, _ in answer]
            if ids and ids[-1] in self.stop_ids:
                ids, answer = ids[:-1], answer[:-1]
            same += ids == list(ours)
            logits = self.decoder.logits(torch.tensor([*prompt, *ids]))[len(prompt) - 1 : -1].double()
            here = logits.log_softmax(-1).amax(-1)
            differences += [
                abs(there - float(value)) for (_, there), value in zip(answer, here[: len(answer)], strict=True)
            ]
        return Agreement(same, len(self.prompts), sum(differences) / len(differences), max(differences))


def demo_prompts(folder: Path, model: str, rows: int) -> list[list[int]]:
    """Prompts of held-out rows, templated, up to where the answer begins."""
    _, held_out = write_demo_data(folder, seed=3, train_rows=1, held_out_rows=rows)
    data = DataOptions(data=(str(held_out),))
    prompts, _ = prepare_prompts(data, data, open_model(model).tokenizer())
    return [prompt.input_ids.tolist() for prompt in prompts]
