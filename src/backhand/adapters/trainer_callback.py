"""Callback for Hugging Face's Trainer with an injected model: checkpoints contain only the adapter, in PEFT's format.

The Trainer saves the output of `save_pretrained`, which skips keys that the model excludes. The callback excludes every
frozen tensor, so that the Trainer writes the factors alone, and reads them when it resumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from backhand.adapters.inject import InjectedAdapter
from backhand.adapters.record import AdapterRecord
from backhand.errors import UsageError
from backhand.words import with_article

ADAPTER_DIRECTORY = "adapter"


class AdapterCallback(TrainerCallback):  # type: ignore[misc]
    """Save the adapter with the Trainer: `Trainer(model, args, callbacks=[AdapterCallback(adapter)], …)`.

    Every checkpoint then contains the adapter in PEFT's format (adapter_model.safetensors …) next to optimizer and
    scheduler, and `trainer.train(resume_from_checkpoint=True)` continues from it. The base model is never written. At
    the end of training the adapter, or the best one with `load_best_model_at_end`, is in `output_dir/adapter`.

    Args:
        adapter: the result of `inject`.
        base_model: hub id or path of the base; if None, the name in the model's configuration.
        record: origin and digests for backhand.json.
    """

    def __init__(
        self, adapter: InjectedAdapter, *, base_model: str | None = None, record: AdapterRecord | None = None
    ) -> None:
        self._adapter = adapter
        self._described: dict[str, Any] = {"base_model": base_model, "record": record}
        if not isinstance(adapter, InjectedAdapter):
            raise UsageError(
                f"adapter is {with_article(type(adapter).__name__)}, not an injected adapter",
                where="adapter",
                next_step="give the result of backhand.inject(model, …) or backhand.inject_from(model, …)",
            )
        trained = {id(parameter) for parameter in adapter.parameters()}
        state = adapter.module.state_dict(keep_vars=True)
        frozen = [name for name, value in state.items() if id(value) not in trained]
        adapter.module._keys_to_ignore_on_save = frozen  # type: ignore[assignment]

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Write PEFT's files into the checkpoint that was just saved."""
        if state.is_world_process_zero:
            self._save(Path(args.output_dir) / f"checkpoint-{state.global_step}", state)

    def on_train_end(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Write the trained adapter."""
        if state.is_world_process_zero:
            self._save(Path(args.output_dir) / ADAPTER_DIRECTORY, state)

    def _save(self, directory: Path, state: Any) -> None:
        card: dict[str, object] = {"steps": f"{state.global_step:,}"}
        if state.best_metric is not None:
            card["best metric"] = f"{state.best_metric:.6g}"
        self._adapter.save(directory, card=card, **self._described)
