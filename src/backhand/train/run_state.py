"""Everything the next step depends on, and its form as files: what a checkpoint stores and a resumed run reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.nn.lora_parameters import LoRAParameters
from backhand.train.checkpoint import Checkpoint
from backhand.train.optimizer import AdapterOptimizer
from backhand.train.progress import Progress

STATE_FILE = "state.safetensors"
PROGRESS_FILE = "progress.json"


class RunState:
    """Adapter, moments and counters.

    There is no random state and no place in the data to store: the order of rows and every dropout mask follow from the
    seed, the epoch and the step. There is no half-filled accumulation window either: checkpoints lie between steps.

    Args:
        lora: the adapter.
        optimizer: of the adapter.
        progress: counters, the step among them.
    """

    def __init__(self, lora: LoRAParameters, optimizer: AdapterOptimizer, progress: Progress) -> None:
        self.lora = lora
        self.optimizer = optimizer
        self.progress = progress

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
        contents = checkpoint.contents
        tensors = _tensors(contents)
        values = tensors.get("values")
        if values is None or values.shape != self.lora.values.shape or values.dtype != self.lora.values.dtype:
            raise ArtifactError("the checkpoint holds the values of another adapter", where=STATE_FILE)
        progress = Progress.from_json(_file(contents, PROGRESS_FILE))
        if progress.step != checkpoint.step:
            raise ArtifactError(
                f"the checkpoint of step {checkpoint.step} says that {progress.step} steps are done",
                where=PROGRESS_FILE,
            )
        self.progress = progress
        self.optimizer.load_moments(tensors)
        self.lora.values.copy_(values)
        self.lora.gradients.zero_()
        self.lora.refresh_compute(dtype)


def _file(contents: Mapping[str, bytes], name: str) -> bytes:
    if name not in contents:
        raise ArtifactError("the file is missing from the checkpoint", where=name)
    return contents[name]


def _tensors(contents: Mapping[str, bytes]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(_file(contents, STATE_FILE))
    except (SafetensorError, ValueError) as error:
        raise ArtifactError("the state is not a safetensors file", where=STATE_FILE, why=str(error)) from None
    return tensors
