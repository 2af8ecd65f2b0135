"""Saving a run as it stands: the checkpoint, the published adapter, and the checkpoints that are no longer needed.

An adapter that holds NaN or infinity is never saved: whatever is on the disk can be used.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from backhand.errors import ArtifactError, CheckError, ResourceError
from backhand.files import free_bytes
from backhand.json_shape import ShapeError, convert, load
from backhand.loop.guards import MOST_SHOWN, is_finite, named_unusable
from backhand.loop.step import AdapterOptimizer
from backhand.nn.lora_parameters import LoRAParameters
from backhand.reading import read_plain
from backhand.runs.checkpoint import Checkpoint, CheckpointStore
from backhand.runs.directory import RunDirectory
from backhand.words import name_list

STATE_FILE = "state.safetensors"
PROGRESS_FILE = "progress.json"


@dataclass(eq=False)
class RunState:
    """Adapter, moments and counters.

    There is no random state and no place in the data to store: the order of rows and every dropout mask follow from the
    seed, the epoch and the step. There is no half-filled accumulation window either: checkpoints lie between steps.
    """

    lora: LoRAParameters
    optimizer: AdapterOptimizer
    progress: Progress

    def contents(self, adapter_files: Callable[[], Mapping[str, bytes]]) -> dict[str, bytes]:
        """The files of a checkpoint: the adapter as PEFT reads it, and beside it what else the next step needs."""
        from safetensors.torch import save

        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.optimizer.moments().items()}
        tensors["values"] = self.lora.values.cpu()
        return {**adapter_files(), STATE_FILE: save(tensors), PROGRESS_FILE: self.progress.to_json()}

    def restore(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Continue from a checkpoint.

        Args:
            checkpoint: of what `contents` returned.
            dtype: the compute dtype, for the copy of the factors that the model uses.

        Raises:
            ArtifactError: a file is missing, or is not of this adapter and optimizer.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        contents = checkpoint.contents
        for name in (STATE_FILE, PROGRESS_FILE):
            if name not in contents:
                raise ArtifactError("the file is missing from the checkpoint", where=name)
        try:
            tensors: dict[str, Tensor] = load(contents[STATE_FILE])
        except (SafetensorError, ValueError) as error:
            raise ArtifactError("the state is not a safetensors file", where=STATE_FILE, why=str(error)) from None
        own = {"values": self.lora.values, **self.optimizer.moments()}
        for name, tensor in own.items():
            given = tensors.get(name)
            if given is None or given.shape != tensor.shape or given.dtype != tensor.dtype:
                found = "nothing" if given is None else f"{tuple(given.shape)} {given.dtype}"
                raise ArtifactError(
                    "the checkpoint is one of another adapter",
                    where=STATE_FILE,
                    why=f"its {name!r} is {found}, expected {tuple(tensor.shape)} {tensor.dtype}",
                )
        progress = Progress.from_json(contents[PROGRESS_FILE])
        if progress.step != checkpoint.step:
            raise ArtifactError(
                f"the checkpoint of step {checkpoint.step} says that {progress.step} steps are done",
                where=PROGRESS_FILE,
            )
        self.progress = progress
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.lora.gradients.zero_()
        self.lora.refresh_compute(dtype)


@dataclass(eq=False)
class Saver:
    """Makes checkpoints of one run."""

    directory: RunDirectory
    store: CheckpointStore
    state: RunState
    adapter_files: Callable[[], Mapping[str, bytes]]
    facts: Callable[[int], Mapping[str, Any]]
    _: KW_ONLY
    keep: int
    best_only: bool  # whether `adapter/` is the best by held-out loss; else it is the newest
    protected: frozenset[int] = frozenset()
    # called before the buffers of a checkpoint are made, and when they are no longer needed
    make_room: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self._saved: bytes | None = None

    def require_room(self) -> None:
        """Whether the disk has room for one checkpoint, asked before hours go into what could not be saved.

        Raises:
            ResourceError: with the bytes needed and free.
        """
        # Values and two moments in state.safetensors, and the values as PEFT reads them; the rest is small.
        values = self.state.lora.values
        needed = 4 * values.numel() * values.element_size()
        free = free_bytes(self.directory.path)
        if free is not None and free < needed:
            raise ResourceError(
                f"a checkpoint of this run takes {needed:,} bytes, and {free:,} are free",
                where=str(self.directory.path),
                why="nothing of it could be saved; nothing has been trained yet",
                next_step="free space, give another --output, or train less: a smaller --rank, fewer --target-modules",
            )

    def save(self, better: bool) -> None:
        """Save the state, unless it is saved already; publish the adapter if it is the one to publish.

        Until some held-out loss is the best so far, the newest adapter is published.

        Args:
            better: whether the newest held-out loss is the best so far.

        Raises:
            ResourceError: with the bytes needed and free; what was saved before is intact.
            CheckError: the adapter is not finite; nothing is saved.
        """
        progress = self.state.progress
        if self._saved == progress.to_json():
            return
        self._require_finite()
        self.directory.sync_lines()
        self.make_room()
        contents = self.state.contents(self.adapter_files)
        self.store.save(progress.step, contents, self.facts(progress.step))
        self._saved = contents[PROGRESS_FILE]
        if better or not self.best_only or progress.best_step is None:
            self.directory.publish_adapter(adapter_part(contents))
        del contents
        self.make_room()  # a step's buffers would not lie where these did
        best = set() if progress.best_step is None else {progress.best_step}
        self.store.prune(progress.step, self.keep, {progress.step} | best | self.protected)

    def _require_finite(self) -> None:
        """Look at the tensors themselves: a loss can be finite while they are not."""
        if not is_finite(self.state.lora.values):
            unusable = list(named_unusable(self.state.lora.named_tensors()))
            raise CheckError(
                f"{len(unusable)} adapter factors hold NaN or infinity after step {self.state.progress.step}; "
                "they are not saved",
                where=name_list(unusable, limit=MOST_SHOWN),
                next_step="use the adapter or the checkpoint saved before; start again with a lower --learning-rate, "
                "or --dtype float32",
            )

    def restored(self, contents: Mapping[str, bytes]) -> None:
        """Take note of the checkpoint that the state was restored from, and restore `adapter/` as well."""
        self._saved = contents[PROGRESS_FILE]
        restore_adapter(self.directory, self.store, contents, self.state.progress)


def restore_adapter(
    directory: RunDirectory, store: CheckpointStore, contents: Mapping[str, bytes], progress: Progress
) -> bool:
    """Publish the adapter of the best checkpoint unless `adapter/` contains its files already; return True if it did.

    A crash may have come between a checkpoint and the adapter that belongs to it, or a file was damaged since.

    Args:
        contents: files of the newest checkpoint, whose progress is `progress`.

    Raises:
        ResourceError: it cannot be written.
    """
    wanted, best_step = contents, progress.best_step
    if best_step is not None and best_step != progress.step:
        try:
            wanted = store.load(best_step).contents
        except ArtifactError as error:
            store.warn(f"adapter/ is left as it is: {error.what}")
            return False
    files = adapter_part(wanted)
    try:
        same = all(read_plain(directory.adapter / name) == data for name, data in files.items())
    except OSError:
        same = False
    if not same:
        directory.publish_adapter(files)
    return not same


def adapter_part(contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those files of a checkpoint that are the adapter."""
    return {name: data for name, data in contents.items() if name not in (STATE_FILE, PROGRESS_FILE)}


@dataclass
class Progress:
    """The counters of a run. They are what a checkpoint holds as progress.json."""

    step: int = 0  # optimizer steps done, skipped ones included
    # tokens, supervised_tokens: trained on so far
    tokens: int = 0
    supervised_tokens: int = 0
    train_s: float = 0.0
    # first_loss, last_loss: mean nats per supervised token of the first and of the newest step
    first_loss: float | None = None
    last_loss: float | None = None
    smooth_loss: float | None = None  # running mean of the loss, which spikes are measured against
    base_eval_loss: float | None = None  # held-out loss of the base model
    # held-out loss before the first step; the base's unless the run began from an adapter
    first_eval_loss: float | None = None
    # eval_loss, best_eval_loss, best_step: newest and lowest held-out loss, and the step of the lowest
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0  # in a row, for early stopping
    # bad_steps_in_a_row, skipped_steps: with a non-finite loss or gradient
    bad_steps_in_a_row: int = 0
    skipped_steps: int = 0
    pending_evaluation: bool = False  # the evaluation of this step was due and has not been made
    stopped_because: str | None = None  # why the run ended before its last step, or None
    finished: bool = False

    @property
    def evaluation_outstanding(self) -> bool:
        """Return True if the evaluation of this step, or the one before the first step, has not been made."""
        return self.pending_evaluation or (self.step == 0 and self.first_eval_loss is None)

    def to_json(self) -> bytes:
        """As JSON, every float to the last bit."""
        return (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Progress:
        """What `to_json` wrote. Raises ArtifactError: it is something else."""
        try:
            values = load(data, dict[str, Any])
            if set(values) != {field.name for field in dataclasses.fields(cls)}:
                raise ArtifactError("the progress of the run has other fields than expected", where="progress.json")
            progress = convert(values, cls)
        except ShapeError as error:
            raise ArtifactError("the progress of the run is damaged", where="progress.json", why=str(error)) from None
        except ValueError:
            raise ArtifactError("the progress of the run is not JSON", where="progress.json") from None
        for name, value in vars(progress).items():
            if isinstance(value, int) and value < 0:
                raise ArtifactError(f"{name} is {value}, which cannot be", where="progress.json")
        return progress

    def record_evaluation(self, loss: float) -> bool:
        """Count a held-out loss; return whether it is the best so far."""
        self.eval_loss = loss
        self.pending_evaluation = False
        better = math.isfinite(loss) and (self.best_eval_loss is None or loss < self.best_eval_loss)
        if better:
            self.best_eval_loss, self.best_step = loss, self.step
            self.evaluations_without_improvement = 0
        else:
            self.evaluations_without_improvement += 1
        return better
