"""`--prove-resume K`: the last K steps once more, from a checkpoint, and every bit compared."""

from __future__ import annotations

import dataclasses
import hashlib

from backhand.errors import CheckError, UsageError
from backhand.train.checkpoint import Checkpoint, CheckpointStore
from backhand.train.loop import TrainingLoop
from backhand.train.optimizer import AdapterOptimizer
from backhand.train.progress import Progress
from backhand.train.proofs import Proof, ProofLog
from backhand.train.run_state import RunState


def proof_begin(
    store: CheckpointStore, checkpoint: Checkpoint | None, steps: int | None, total_steps: int
) -> int | None:
    """The step that the proof begins at: `steps` before the end, or the newest kept one before that.

    Args:
        store: the run's checkpoints.
        checkpoint: that the run goes on from, if it does.
        steps: to repeat; None for no proof, and then None is returned.
        total_steps: of the run.

    Raises:
        UsageError: more steps than the run has, or a continued run is past it and has kept no checkpoint.
    """
    if steps is None:
        return None
    begin = total_steps - steps
    if begin < 0:
        raise UsageError(
            f"prove_resume {steps} is more than the {total_steps} steps of the run",
            where="prove_resume",
            next_step=f"give --prove-resume {total_steps} or less",
        )
    if checkpoint is None or checkpoint.step <= begin:
        return begin
    earlier = store.newest_valid(before=begin)
    if earlier is None:
        raise UsageError(
            f"the run is past step {begin}, and no checkpoint from before is kept",
            where="prove_resume",
            next_step=f"give --prove-resume {total_steps - store.steps()[0]}, which begins at the oldest that is kept",
        )
    return earlier.step


def prove_resume(finished: TrainingLoop, checkpoint: Checkpoint, log: ProofLog) -> bool:
    """Repeat what came after the checkpoint, without writing anything; afterwards the loop's state is as it was.

    Args:
        finished: a loop at its last step.
        checkpoint: of an earlier step of the same run.
        log: told the outcome.

    Returns:
        False if the repetition was asked to stop, and nothing is proved.

    Raises:
        CheckError: the repetition ends in other bits.
    """
    wanted = state_digests(finished.state)
    steps = finished.state.progress.step - checkpoint.step
    lora = finished.state.lora
    values, gradients = lora.values.clone(), lora.gradients.clone()
    again = RunState(lora, _like(finished.state.optimizer), Progress())
    again.restore(checkpoint, finished.model.dtype)
    loop = TrainingLoop(
        finished.model,
        again,
        finished.packer,
        finished.sampler,
        finished.plan,
        held_out=finished.held_out,
        stop_requested=finished.stop_requested,
    )
    try:
        completed = loop.run()
        found = state_digests(again)
    finally:
        lora.values.copy_(values)
        lora.gradients.copy_(gradients)
        lora.refresh_compute(finished.model.dtype)
    if not completed:
        return False
    different = [name for name, digest in wanted.items() if found[name] != digest]
    log(
        Proof(
            f"the last {steps} steps, repeated from a checkpoint, end in the same bits",
            not different,
            len(different),
            0,
            kind="resume",
        )
    )
    if different:
        raise CheckError(
            f"the last {steps} steps, repeated from the checkpoint of step {checkpoint.step}, end in other bits",
            where=", ".join(different),
            why="a kernel on this machine does not repeat its results",
            next_step="try --threads 1; the adapter is saved, only its repetition differs",
        )
    return True


def state_digests(state: RunState) -> dict[str, str]:
    """SHA-256 of adapter, moments and counters; times are left out."""
    tensors = {"adapter": state.lora.values, **state.optimizer.moments()}
    digests = {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).numpy().data).hexdigest()
        for name, tensor in tensors.items()
    }
    digests["progress"] = hashlib.sha256(dataclasses.replace(state.progress, train_s=0.0).to_json()).hexdigest()
    return digests


def _like(optimizer: AdapterOptimizer) -> AdapterOptimizer:
    """A fresh optimizer of the same adapter with the same options."""
    return AdapterOptimizer(optimizer.lora, optimizer.options)
