"""Hugging Face's Trainer with an injected model: its checkpoints are the adapter alone, in PEFT's files, and resume.

The Trainer saves what `save_pretrained` writes, which leaves out what the model says is not to be saved. Told so of
every frozen tensor, it writes the factors alone, and reads them back when it resumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from backhand.adapters.inject import InjectedAdapter
from backhand.adapters.record import AdapterRecord

ADAPTER_DIRECTORY = "adapter"


class AdapterCallback(TrainerCallback):  # type: ignore[misc]
    """Give it to the Trainer: `Trainer(model, args, callbacks=[AdapterCallback(adapter)], …)`.

    Every checkpoint then holds the adapter in PEFT's format (adapter_model.safetensors …) beside optimizer and
    scheduler, and `trainer.train(resume_from_checkpoint=True)` goes on from it; the base model is never written. When
    training ends the adapter, the best one with `load_best_model_at_end`, is in `output_dir/adapter`.

    Args:
        adapter: what `inject` gave.
        base_model: hub id or path of the base; if None, what the model knows of itself.
        record: origin and digests for backhand.json.
    """

    def __init__(
        self, adapter: InjectedAdapter, *, base_model: str | None = None, record: AdapterRecord | None = None
    ) -> None:
        self._adapter = adapter
        self._described: dict[str, Any] = {"base_model": base_model, "record": record}
        trained = {id(parameter) for parameter in adapter.parameters()}
        state = adapter.module.state_dict(keep_vars=True)
        frozen = [name for name, value in state.items() if id(value) not in trained]
        adapter.module._keys_to_ignore_on_save = frozen  # type: ignore[assignment]

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Write PEFT's files into the checkpoint that was just saved."""
        if state.is_world_process_zero:
            self._save(Path(args.output_dir) / f"checkpoint-{state.global_step}", state)

    def on_train_end(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Write the adapter as training leaves it."""
        if state.is_world_process_zero:
            self._save(Path(args.output_dir) / ADAPTER_DIRECTORY, state)

    def _save(self, directory: Path, state: Any) -> None:
        card: dict[str, object] = {"steps": f"{state.global_step:,}"}
        if state.best_metric is not None:
            card["best metric"] = f"{state.best_metric:.6g}"
        self._adapter.save(directory, card=card, **self._described)
