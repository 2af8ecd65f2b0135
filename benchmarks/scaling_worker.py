"""One process of a measurement of `scaling.py`: transformers' Trainer, a run over a link, the exchange alone."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

REPEATS = 5


def trainer(rows: str, output: str, batch_rows: int) -> None:
    """One epoch of PEFT under transformers' Trainer, gloo between processes; rank 0 writes result.json."""
    import peft
    import transformers
    from finetune_worker import transformers_model

    from backhand.data.options import DataOptions
    from backhand.data.pack import trained_length
    from backhand.data.prepare import prepare
    from backhand.nn.compute import default_dtype
    from backhand.nn.loading import open_model

    torch.set_num_threads(1)
    source = open_model("smollm2-135m")
    examples = prepare(DataOptions(data=(rows,), eval_fraction=0.0), source.tokenizer())[0].examples
    ids = [torch.from_numpy(example.input_ids).long() for example in examples]
    labels = [
        torch.where(torch.from_numpy(example.supervised), tokens, -100)
        for example, tokens in zip(examples, ids, strict=True)
    ]

    def collated(chosen: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        def padded(name: str, value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([row[name] for row in chosen], batch_first=True, padding_value=value)

        input_ids = padded("input_ids", 0)
        return {"input_ids": input_ids, "labels": padded("labels", -100), "attention_mask": padded("mask", 0)}

    dataset = [
        {"input_ids": tokens, "labels": label, "mask": torch.ones_like(tokens)}
        for tokens, label in zip(ids, labels, strict=True)
    ]
    dtype = default_dtype()
    model = peft.get_peft_model(
        transformers_model("smollm2-135m", dtype),
        peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    made = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=f"{output}/trainer",
            num_train_epochs=1,
            per_device_train_batch_size=batch_rows,
            learning_rate=2e-4,
            use_cpu=True,
            ddp_backend="gloo" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            bf16=dtype == torch.bfloat16,
        ),
        train_dataset=dataset,
        data_collator=collated,
    )
    began = time.perf_counter()
    made.train()
    train_s = time.perf_counter() - began
    if int(os.environ.get("RANK", "0")) == 0:
        tokens = sum(trained_length(example) for example in examples)
        (Path(output) / "result.json").write_text(json.dumps({"train_s": train_s, "tokens": tokens}))


def exchange(elements: int, reduce: str, micro_batches: int) -> None:
    """Print the seconds of some exchanges, with a number of micro-batches in each process."""
    from backhand.distributed.process_group import joined

    torch.set_num_threads(1)
    buffer = torch.zeros(elements)
    times = []
    with joined(reduce) as processes:  # type: ignore[arg-type]
        shares = processes.assign([1] * micro_batches * processes.world_size)
        for _ in range(REPEATS):
            added = processes.gradient_sum(buffer, shares)
            for number in shares[processes.rank]:
                buffer.fill_(1.0 + number)
                added.add()
            processes.all_gather_object(None)  # both are ready
            began = time.perf_counter()
            processes.reduce_step(added, [], 0.0)
            times.append(time.perf_counter() - began)
    print(json.dumps({"exchange_s": times}), flush=True)


def timed_train(words: list[str], times: str) -> None:
    """`backhand train`; rank 0 also writes the seconds of each exchange, from the time when all have computed."""
    from backhand.cli.main import main
    from backhand.distributed.process_group import ProcessGroup

    total, taken = ProcessGroup.reduce_step, []

    def timed(self: Any, added: Any, own: Any, computed_s: float) -> Any:
        self.all_gather_object(None)
        began = time.perf_counter()
        found = total(self, added, own, computed_s)
        taken.append(time.perf_counter() - began)
        if self.is_main_process:
            Path(times).with_suffix(".json").write_text(json.dumps(taken))
        return found

    ProcessGroup.reduce_step = timed  # type: ignore[method-assign]
    sys.exit(main(words))


if __name__ == "__main__":
    {"trainer": trainer, "exchange": exchange, "timed_train": timed_train}[sys.argv[1]](**json.loads(sys.argv[2]))
