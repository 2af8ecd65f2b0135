"""One whole fine-tuning run of one peer in a process of its own; the last line it prints is its result in JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from peers import ALPHA, DTYPES, LEARNING_RATE, RANK, transformers_model, tune_process

from backhand.cli.openmp_spin import adaptive_spinning


@dataclass(frozen=True)
class FineTune:
    """The same for all peers: model, rows, epochs, batch, dtype; rank, alpha and rate are in `peers`."""

    model: str
    train: str
    held_out: str
    epochs: int
    batch_rows: int
    dtype: str
    seed: int = 0


def run_backhand(task: FineTune, output: Path, *, engine: str = "backhand") -> dict[str, Any]:
    """`backhand.train` as the command calls it, without evaluations; its checkpoint at the end is part of its time."""
    import backhand
    from backhand.adapters.config import LoRAConfig
    from backhand.data.options import DataOptions
    from backhand.loop.observers import Observer
    from backhand.options.config import ModelOptions, OptimizationOptions, RunOptions, TrainConfig

    class Watch(Observer):
        """The times at which the first step begins and the last checkpoint is saved."""

        # The records of an observer are not needed here.
        def started(self, start: Any) -> None:  # noqa: ARG002
            self.begin = time.perf_counter()

        def ended(self, summary: Any) -> None:  # noqa: ARG002
            self.train_s = time.perf_counter() - self.begin

    watch = Watch()
    backhand.train(
        TrainConfig(
            model=ModelOptions(model=task.model, dtype=task.dtype, engine=engine),
            data=DataOptions(data=(task.train,), eval_fraction=0.0),
            adapter=LoRAConfig(rank=RANK, alpha=ALPHA, dropout=0.0),
            optimization=OptimizationOptions(
                epochs=task.epochs,
                batch_rows=task.batch_rows,
                learning_rate=LEARNING_RATE,
                schedule="linear",
                warmup_steps=0,
            ),
            run=RunOptions(output=output / "run", seed=task.seed, answers=0, save_every=10**6, quiet=True),
        ),
        callbacks=[watch],
    )
    return {"train_s": watch.train_s, "adapter": str(output / "run" / "adapter")}


def run_backhand_unshared(task: FineTune, output: Path) -> dict[str, Any]:
    """The same, with the tokens that rows begin with computed in each row, as if no two began alike."""
    from backhand.data import packing as batches

    batches.MIN_SAVED_TOKENS = 1 << 40
    return run_backhand(task, output)


def run_trl(
    task: FineTune, output: Path, *, checkpointing: bool, tuned: bool = False, packing: bool = False
) -> dict[str, Any]:
    """TRL's SFTTrainer; as users run it, checkpointing is on and nothing is tuned."""
    import datasets
    import peft
    import trl

    from backhand.nn.loading import open_model

    if tuned:
        tune_process()
    tokenizer = open_model(task.model).tokenizer()
    rows = datasets.load_dataset("json", data_files=task.train, split="train", cache_dir=str(output / "cache"))
    trainer = trl.SFTTrainer(
        model=transformers_model(task.model, DTYPES[task.dtype]),
        args=trl.SFTConfig(
            output_dir=str(output / "trl"),
            num_train_epochs=task.epochs,
            per_device_train_batch_size=task.batch_rows,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            warmup_steps=0,
            gradient_checkpointing=checkpointing,
            packing=packing,
            max_length=1024,
            bf16=task.dtype == "bfloat16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            seed=task.seed,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    start = time.perf_counter()
    trainer.train()
    train_s = time.perf_counter() - start
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    if not norms or not norms[0] > 0:
        raise SystemExit(f"the first gradient norm is {norms[:1]}")
    trainer.model.save_pretrained(output / "adapter")
    return {"train_s": train_s, "adapter": str(output / "adapter")}


PEERS = {
    "backhand": run_backhand,
    "backhand-unshared": run_backhand_unshared,
    "backhand-transformers": lambda task, output: run_backhand(task, output, engine="transformers"),
    "trl": lambda task, output: run_trl(task, output, checkpointing=True),
    "trl-no-checkpointing": lambda task, output: run_trl(task, output, checkpointing=False),
    "trl-no-checkpointing-tuned": lambda task, output: run_trl(task, output, checkpointing=False, tuned=True),
    "trl-no-checkpointing-tuned-openmp": lambda task, output: run_trl(task, output, checkpointing=False, tuned=True),
    "trl-packing-tuned": lambda task, output: run_trl(task, output, checkpointing=False, tuned=True, packing=True),
}


def main() -> None:
    """Arguments: peer, task as JSON, output directory, threads."""
    peer, task, output = sys.argv[1], FineTune(**json.loads(sys.argv[2])), Path(sys.argv[3])
    torch.set_num_threads(int(sys.argv[4]))
    output.mkdir(parents=True, exist_ok=True)
    with adaptive_spinning():
        done = PEERS[peer](task, output)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**done, "peak_rss_bytes": peak_kib * 1024}), flush=True)


if __name__ == "__main__":
    main()
