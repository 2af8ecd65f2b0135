"""Distillation before its first step: the teacher samples answers, which are stored, and its states are computed.

`teacher_answers.jsonl` in the run directory contains the answers that the teacher has sampled. Its first line has a
digest of everything that the answers depend on apart from the machine, and a digest of the answers. A resumed run
reads the file, so it trains on the same answers on every machine. If the file is missing or damaged, the answers are
sampled again from the same seeds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from backhand.data.packing import RowPacker
from backhand.engines.engine import computing_with
from backhand.errors import not_none
from backhand.generation.loading import stop_ids
from backhand.generation.sampling import at_temperature
from backhand.generation.session import decode
from backhand.json_shape import ShapeError, convert, load
from backhand.loop.hidden_state_cache import DiskStateStore, MemoryStateStore, StateStore
from backhand.loop.step_plan import derived_seed
from backhand.nn.decoder.decoder import Decoder
from backhand.objectives.distillation.packers import DistilledPacker, DistilledPrompts
from backhand.objectives.distillation.steps import DistilledSteps
from backhand.objectives.kinds.sampled_answers import AnswerSampler, share_cut_off
from backhand.printing import counting
from backhand.reading import read_plain
from backhand.runs.directory import TEACHER_ANSWERS, RunDirectory
from backhand.training.hooks import RunContext
from backhand.training.reference import remember_start
from backhand.training.run_inputs import RunInputs
from backhand.words import count_of

_Answers = dict[str, list[list[int]]]
"""Token ids of the answers to the prompts of each set, `train` and `held_out`."""


def teach(run: RunContext) -> RunInputs:
    """Return the inputs with the teacher's answers as rows and with the teacher's states.

    Held-out prompts are always answered by the teacher, unless the rows contain the answers. Training prompts that the
    adapted model answers are returned unchanged.

    Raises:
        CheckError: the adapter that the run started from has changed.
        ResourceError: there is no room for the states.
    """
    inputs, model = run.inputs, run.bound.model
    packers: dict[str, RowPacker | None] = {"train": inputs.packer, "held_out": inputs.held_out_packer}
    remember_start(run)
    assert isinstance(model, Decoder)
    prompts = {name: one for name, one in packers.items() if isinstance(one, DistilledPrompts)}
    if run.config.objective.traits.trains_on_samples:
        prompts.pop("train", None)
    with computing_with(model, run.start.values):
        if prompts:
            answers = _answers(run, prompts)
            _warn_of_cut_off(run, [answer for of_set in answers.values() for answer in of_set])
            packers |= {name: one.answered(range(len(one.examples)), answers[name]) for name, one in prompts.items()}
        for packer in packers.values():
            if isinstance(packer, DistilledPacker):
                _compute_states(run, packer)
    train, held_out = packers["train"], packers["held_out"]
    return replace(
        inputs,
        packer=not_none(train),
        train=train.rows if isinstance(train, DistilledPacker) else inputs.train,
        held_out_packer=held_out,
        held_out=held_out.rows if isinstance(held_out, DistilledPacker) else None,
    )


def distilled_steps(run: RunContext) -> DistilledSteps:
    """Return the steps of a run in which the adapted model samples the answers."""
    assert isinstance(run.inputs.packer, DistilledPrompts)
    return DistilledSteps(_sampler(run, "answer"), run.inputs.packer, run.start.values, run.micro_batch_rows)


def _sampler(run: RunContext, purpose: str) -> AnswerSampler:
    seed, stops = run.config.run.seed, stop_ids(run.inputs.source, run.config.data)
    return AnswerSampler(
        run.config.rewards, 1, stops, lambda *numbers: derived_seed(seed, purpose, *numbers), run.processes
    )


_STATES_IN_MEMORY_BYTES = 2**28
"""Largest total size of the teacher's states of a set of rows in memory; larger ones are on the run's disk."""


def _compute_states(run: RunContext, packer: DistilledPacker) -> None:
    model = run.bound.model
    assert isinstance(model, Decoder)
    shape = packer.state_tokens, model.config.hidden_size, model.dtype
    store: StateStore
    if sum(packer.state_tokens) * model.config.hidden_size * model.dtype.itemsize <= _STATES_IN_MEMORY_BYTES:
        store = MemoryStateStore(*shape)
    else:
        store = DiskStateStore(run.directory.files, run.directory.path, *shape, run.notify)
        run.resources.callback(store.close)
    passes = packer.teacher_passes(run.micro_batch_rows)
    with counting("teacher's states", len(passes), "passes") as done:
        packer.learn_from(model, store, passes, done)


def _answers(run: RunContext, prompts: Mapping[str, DistilledPrompts]) -> _Answers:
    """Return the teacher's answers to all prompts, from the file or sampled and stored."""
    digest, directory, processes = _digest(run), run.directory, run.processes
    counts = {name: len(one.examples) for name, one in prompts.items()}
    on_main = _read(directory, digest, counts, run.notify) if processes.is_main_process else None
    stored: _Answers | None = processes.broadcast_object(on_main)
    if stored is not None:
        return stored
    sampler, model = _sampler(run, "teacher's answer"), run.bound.model
    assert isinstance(model, Decoder)
    answers: _Answers = {}
    with at_temperature(model, run.config.rewards.temperature):
        for number, (name, one) in enumerate(prompts.items()):
            answers[name] = [[] for _ in range(counts[name])]
            with counting("teacher's answers", counts[name], "prompts") as done:
                for rows in one.groups:
                    sampled = sampler.sampled(model, number, rows, one.teachers, as_trained=False, done=done)
                    for row, answer in zip(rows, sampled, strict=True):
                        answers[name][row] = answer.tokens
    if processes.is_main_process:
        _write(directory, digest, prompts, answers, run.inputs.source.tokenizer())
    return answers


_MOST_CUT_OFF = 0.1
"""Largest share of the teacher's answers that may be cut off without a warning."""


def _warn_of_cut_off(run: RunContext, answers: Sequence[Sequence[int]]) -> None:
    share = share_cut_off(answers, stop_ids(run.inputs.source, run.config.data))
    if share > _MOST_CUT_OFF:
        limit = run.config.rewards.max_new_tokens
        run.notify(
            f"warning: {share:.0%} of the teacher's {count_of(len(answers), 'answer')} were cut off at {limit} tokens, "
            "so that the adapter learns no end from them: give a larger --max-new-tokens, or ask for shorter answers"
        )


def _digest(run: RunContext) -> str:
    """Return the SHA-256 of everything that the answers depend on, apart from the machine."""
    identity = run.identity.facts
    facts = {name: identity[f"{name}_digest"] for name in ("data", "held_out", "settings")}
    facts |= {"frozen": run.start.frozen_digest, "start": run.start.adapter_digest}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _write(
    directory: RunDirectory, digest: str, prompts: Mapping[str, DistilledPrompts], answers: _Answers, tokenizer: Any
) -> None:
    lines: list[dict[str, Any]] = [{"digest": digest, "answers": _checksum(answers)}]
    for name, one in prompts.items():
        for example, tokens in zip(one.examples, answers[name], strict=True):
            text = decode(tokenizer, tokens)
            lines.append({"set": name, "source": example.source, "completion": text, "tokens": tokens})
    directory.write(TEACHER_ANSWERS, "".join(json.dumps(line) + "\n" for line in lines))


def _read(
    directory: RunDirectory, digest: str, counts: Mapping[str, int], notify: Callable[[str], None]
) -> _Answers | None:
    """Return the stored answers, or None if the file is missing, damaged or of another run."""
    try:
        first, *lines = read_plain(directory.path / TEACHER_ANSWERS).decode().splitlines()
        header = load(first.encode(), dict[str, str])
        answers: _Answers = {name: [] for name in counts}
        for line in lines:
            stored = load(line.encode(), dict[str, Any])
            answers[stored["set"]].append(convert(stored["tokens"], list[int]))
        whole = header.get("answers") == _checksum(answers) and header.get("digest") == digest
        whole = whole and {name: len(tokens) for name, tokens in answers.items()} == counts
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, ShapeError):
        whole = False
    if not whole:
        notify(f"the teacher samples its answers again: {TEACHER_ANSWERS} is damaged or of another run")
        return None
    return answers


def _checksum(answers: Mapping[str, Sequence[Sequence[int]]]) -> str:
    return hashlib.sha256(json.dumps(answers, sort_keys=True).encode()).hexdigest()
