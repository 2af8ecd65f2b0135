"""A step of on-policy distillation: sample answers without the context, compute the teacher's states, train.

    prompts ── AnswerSampler ──► answers ─┬─ student's documents ─┬─► PackedBatch ── training_step ──► adapter
                                          └─ teacher's states ────┘

The loss of a token is the divergence between model and teacher after the tokens that the model itself has sampled
(arXiv:2306.13649, arXiv:2601.19897). No gradient passes through the sampling. The teacher is the model that the run
starts from, or has the moving average of the adapter (`AdapterOptimizer.average`). A process computes the states of the
micro-batches that it trains on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from backhand.engines.engine import Trainable, computing_with
from backhand.generation.sampling import Sampled, at_temperature
from backhand.loop.hidden_state_cache import MemoryStateStore
from backhand.loop.step import AdapterOptimizer, StepResult, StepWork, training_step
from backhand.nn.decoder.decoder import Decoder
from backhand.objectives.distillation.packers import DistilledPrompts
from backhand.objectives.kinds.sampled_answers import AnswerSampler, answer_measures


@dataclass(eq=False)
class DistilledSteps:
    """The steps of a run that learns from a teacher at answers which the adapted model samples."""

    sampler: AnswerSampler  # samples one answer to each prompt
    prompts: DistilledPrompts  # the prompts of student and teacher
    start: Tensor | None  # values of the adapter that the run starts from, (elements,) float32; None for the base
    micro_batch_rows: int  # maximum number of rows per forward pass
    tokens: int = 0  # number of tokens of the newest step's prompts and answers
    measured: dict[str, float] = field(default_factory=dict)  # metrics of the newest step
    answers: list[Sampled] = field(default_factory=list)  # of the newest step

    def sample_answers(self, model: Trainable, step: int, rows: Sequence[int]) -> None:
        """Sample an answer to each prompt of a step. Nothing is trained yet."""
        assert isinstance(model, Decoder)
        began = time.perf_counter()
        with at_temperature(model, self.sampler.options.temperature):
            self.answers = self.sampler.sampled(model, step, rows, self.prompts.examples)
        tokens = sum(len(answer.tokens) for answer in self.answers)
        self.measured = answer_measures(self.answers) | {
            "entropy": sum(answer.entropy for answer in self.answers) / tokens,
            "sampling_s": round(time.perf_counter() - began, 4),
        }

    def train(
        self,
        model: Trainable,
        optimizer: AdapterOptimizer,
        step: int,
        rows: Sequence[int],
        rate: float,
    ) -> StepResult:
        """Train on the answers that `sample_answers` sampled."""
        assert isinstance(model, Decoder)
        processes = self.sampler.processes
        packer = self.prompts.answered(rows, [answer.tokens for answer in self.answers])
        every = range(len(rows))
        parts = packer.micro_batches(every, self.micro_batch_rows)
        packed_tokens, supervised = list(map(packer.packed_tokens, parts)), packer.supervised_tokens(every)
        own = processes.assign(packed_tokens)[processes.rank]
        store = MemoryStateStore(packer.state_tokens, model.config.hidden_size, model.dtype)
        average = optimizer.average if optimizer.average_rate else None  # otherwise it is the average that a run saves
        with computing_with(model, self.start if average is None else average.values):
            packer.learn_from(model, store, [parts[number] for number in own])
        self.tokens = packer.tokens(every)
        work = StepWork(
            packed=lambda number: packer.packed(parts[number], model.device),
            packed_tokens=packed_tokens,
            supervised_tokens=supervised,
            dropout_seeds=[None] * len(parts),
            mean_over=supervised,
        )
        return training_step(model, optimizer, work, processes, rate)

    def finished(self) -> None:
        """Do nothing: there are no proofs."""

    def repeated(self) -> DistilledSteps:
        """Return these steps, which have no guards."""
        return self
