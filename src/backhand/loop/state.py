"""Save the state of a run: write the checkpoint, publish the adapter, and remove old checkpoints.

An adapter with NaN or infinity is never saved, so every adapter on the disk is usable.
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
from backhand.loop.value_average import IS_SAVED, saved_values
from backhand.nn.lora_parameters import LoRAParameters
from backhand.reading import read_plain
from backhand.runs.checkpoint import Checkpoint, CheckpointStore
from backhand.runs.directory import RunDirectory
from backhand.words import name_list

STATE_FILE = "state.safetensors"
PROGRESS_FILE = "progress.json"


@dataclass(eq=False)
class RunState:
    """Adapter, moments and counters: the complete state of a run between two steps.

    No random state and no position in the data are needed, because the order of rows and every dropout mask follow from
    the seed, the epoch and the step. No accumulated gradient is needed, because checkpoints are made between steps.
    """

    lora: LoRAParameters  # the adapter
    optimizer: AdapterOptimizer  # its optimizer with the moments
    progress: Progress  # the counters

    def contents(self, adapter_files: Callable[[], Mapping[str, bytes]]) -> dict[str, bytes]:
        """Return the files of a checkpoint: the adapter in PEFT's format, the optimizer's state and the counters.

        Args:
            adapter_files: returns the files of the adapter.
        """
        from safetensors.torch import save

        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.optimizer.moments().items()}
        tensors["values"] = self.lora.values.cpu()
        with saved_values(self.optimizer.average):
            files = adapter_files()
        return {**files, STATE_FILE: save(tensors), PROGRESS_FILE: self.progress.to_json()}

    def restore(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Continue from a checkpoint.

        Args:
            checkpoint: a checkpoint whose files `contents` returned.
            dtype: the compute dtype. The factors are copied to this dtype for the model.

        Raises:
            ArtifactError: a file is missing, or belongs to another adapter or optimizer.
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
        if "average" in tensors:
            tensors.setdefault(IS_SAVED, torch.tensor(True))  # earlier checkpoints do not state it
        targets = {"values": self.lora.values, **self.optimizer.moments()}
        for name, tensor in targets.items():
            stored = tensors.get(name)
            if stored is None or stored.shape != tensor.shape or stored.dtype != tensor.dtype:
                actual = "nothing" if stored is None else f"{tuple(stored.shape)} {stored.dtype}"
                raise ArtifactError(
                    "the checkpoint is one of another adapter",
                    where=STATE_FILE,
                    why=f"its {name!r} is {actual}, expected {tuple(tensor.shape)} {tensor.dtype}",
                )
        progress = Progress.from_json(contents[PROGRESS_FILE])
        if progress.step != checkpoint.step:
            raise ArtifactError(
                f"the checkpoint of step {checkpoint.step} says that {progress.step} steps are done",
                where=PROGRESS_FILE,
            )
        self.progress = progress
        for name, tensor in targets.items():
            tensor.copy_(tensors[name])
        self.lora.gradients.zero_()
        self.lora.refresh_compute(dtype)


@dataclass(eq=False)
class Saver:
    """Saves the checkpoints of one run."""

    directory: RunDirectory  # the run directory
    store: CheckpointStore  # its checkpoints
    state: RunState  # the state to save
    adapter_files: Callable[[], Mapping[str, bytes]]  # returns the files of the adapter
    facts: Callable[[int], Mapping[str, Any]]  # returns the manifest's facts of a step
    _: KW_ONLY
    keep: int  # number of checkpoints to keep
    best_only: bool  # True if `adapter/` has the lowest held-out loss; otherwise it is the newest adapter
    protected: frozenset[int] = frozenset()  # steps whose checkpoints are never removed
    make_room: Callable[[], object] = lambda: None  # called before and after the buffers of a checkpoint exist

    def __post_init__(self) -> None:
        self._saved: bytes | None = None

    def require_room(self) -> None:
        """Check before training that the disk has room for one checkpoint.

        Raises:
            ResourceError: it has not. Names the required and the free bytes.
        """
        # state.safetensors contains the values, the moments and the average, and the PEFT file the values. The rest is
        # small.
        tensors = [self.state.lora.values] * 2 + list(self.state.optimizer.moments().values())
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        free = free_bytes(self.directory.path)
        if free is not None and free < needed:
            raise ResourceError(
                f"a checkpoint of this run takes {needed:,} bytes, and {free:,} are free",
                where=str(self.directory.path),
                why="the adapter could not be saved; nothing has been trained yet",
                next_step="free space, give another --output, or train less: a smaller --rank, fewer --target-modules",
            )

    def save(self, *, is_best: bool) -> None:
        """Save the state unless it is saved already, and publish the adapter.

        With `best_only`, the adapter is published if `is_best`, or if no held-out loss has been the best yet.

        Args:
            is_best: True if the most recent held-out loss is the lowest so far.

        Raises:
            ResourceError: the disk is full. Names the required and the free bytes. Earlier checkpoints are intact.
            CheckError: the adapter is not finite, and is not saved.
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
        if is_best or not self.best_only or progress.best_step is None:
            self.directory.publish_adapter(adapter_part(contents))
        del contents
        self.make_room()  # the buffers of a step do not fit the gaps that these large buffers leave
        best = set() if progress.best_step is None else {progress.best_step}
        self.store.prune(progress.step, self.keep, {progress.step} | best | self.protected)

    def _require_finite(self) -> None:
        """Check the tensors, because the loss can be finite while they are not."""
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
        """Record the files of the checkpoint that the state was restored from, and restore `adapter/`."""
        self._saved = contents[PROGRESS_FILE]
        restore_adapter(self.directory, self.store, contents, self.state.progress)


def restore_adapter(
    directory: RunDirectory, store: CheckpointStore, contents: Mapping[str, bytes], progress: Progress
) -> bool:
    """Publish the adapter of the best checkpoint unless `adapter/` contains its files already; return True if it did.

    They differ if the process was killed between writing the checkpoint and publishing its adapter, or if a file was
    damaged later.

    Args:
        directory: the run directory.
        store: its checkpoints.
        contents: files of the newest checkpoint.
        progress: the counters in the newest checkpoint.

    Raises:
        ResourceError: the files cannot be written.
    """
    best_step = progress.best_step
    if best_step is not None and best_step != progress.step:
        try:
            contents = store.load(best_step).contents
        except ArtifactError as error:
            store.warn(f"adapter/ is left as it is: {error.what}")
            return False
    files = adapter_part(contents)
    try:
        same = all(read_plain(directory.adapter / name) == data for name, data in files.items())
    except OSError:
        same = False
    if not same:
        directory.publish_adapter(files)
    return not same


def adapter_part(contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files of a checkpoint that belong to the adapter."""
    return {name: data for name, data in contents.items() if name not in (STATE_FILE, PROGRESS_FILE)}


BY_CALLBACK = "a callback returned False"
"""Value of `Progress.stopped_because` of a run that a callback has ended."""


@dataclass
class Progress:
    """The counters of a run, saved as progress.json in a checkpoint."""

    step: int = 0  # number of optimizer steps done, including skipped steps
    # tokens, supervised_tokens: number of tokens trained on so far
    tokens: int = 0
    supervised_tokens: int = 0
    train_s: float = 0.0  # seconds of all steps
    # first_loss, last_loss: mean nats per supervised token of the first and of the most recent step
    first_loss: float | None = None
    last_loss: float | None = None
    smooth_loss: float | None = None  # running mean of the loss, to detect spikes
    base_eval_loss: float | None = None  # held-out loss of the base model
    # held-out loss before the first step; equals base_eval_loss unless the run started from an adapter
    first_eval_loss: float | None = None
    # eval_loss, best_eval_loss, best_step: most recent and lowest held-out loss, and the step of the lowest
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0  # in a row, for early stopping
    # bad_steps_in_a_row, skipped_steps: number of steps with a non-finite loss or gradient
    bad_steps_in_a_row: int = 0
    skipped_steps: int = 0
    pending_evaluation: bool = False  # True if the evaluation of this step was due and has not been made
    stopped_because: str | None = None  # why the run ended before its last step, or None
    finished: bool = False  # True once the run is over

    @property
    def stopped_by_callback(self) -> bool:
        """Return True if a callback has ended the run. Unlike a run that has converged, it can go on."""
        return self.finished and self.stopped_because == BY_CALLBACK

    @property
    def evaluation_outstanding(self) -> bool:
        """Return True if the evaluation of this step, or the one before the first step, has not been made."""
        return self.pending_evaluation or (self.step == 0 and self.first_eval_loss is None)

    def to_json(self) -> bytes:
        """Return the counters as JSON. Every float is restored exactly."""
        return (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Progress:
        """Return the counters from the output of `to_json`. Raises ArtifactError for other data."""
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
        """Record a held-out loss. Return True if it is the best so far."""
        self.eval_loss = loss
        self.pending_evaluation = False
        better = math.isfinite(loss) and (self.best_eval_loss is None or loss < self.best_eval_loss)
        if better:
            self.best_eval_loss, self.best_step = loss, self.step
            self.evaluations_without_improvement = 0
        else:
            self.evaluations_without_improvement += 1
        return better
