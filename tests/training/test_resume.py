"""Ten straight steps end in the same bits as four, a stop, and six more."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as StorageType

from backhand.adapters.config import LoRAConfig
from backhand.cli.main import main
from backhand.data.options import DataOptions
from backhand.errors import ArtifactError, BackhandError, UsageError
from backhand.options.config import ModelOptions, OptimizationOptions, RunOptions, TrainConfig
from backhand.options.config_file import load_config
from backhand.runs.checkpoint import load_checkpoint, manifest_bytes
from backhand.training.run import train
from tests.support.fault_table import documented
from tests.support.processes import run
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import StopAfter, TinyRun, final_bits, train_until_killed, with_options, write_rows


def stopped(config: TrainConfig, step: int) -> None:
    with pytest.raises(StopAfter.Stopped):
        train(config, callbacks=[StopAfter(step)])


def resumed(output: Path, **options: Any) -> Any:
    return train(with_options(TrainConfig(), output=output, resume=True, quiet=True, **options))


@dataclass(frozen=True)
class KilledAt:
    """Where step 4, the last one saved before the kill, lies; and how a step is divided."""

    rows: int
    batch_rows: int
    micro_batch_rows: int
    dropout: float


def killed_cases() -> dict[str, KilledAt]:
    """Of place, dropout, accumulation and packing any three in all ways together."""
    cases = {}
    for place, steps_per_epoch in (("mid-epoch-1", 7), ("mid-epoch-2", 3)):
        for dropout in (0.0, 0.3):
            for accumulation in (1, 3):
                for packed in (1, 2):  # rows after one another in a micro-batch
                    if ((steps_per_epoch == 3) + (dropout > 0) + (accumulation == 3) + (packed == 2)) % 2:
                        continue
                    batch_rows = accumulation * packed
                    name = f"{place}-dropout-{dropout}-accumulation-{accumulation}-packed-{packed}"
                    cases[name] = KilledAt(steps_per_epoch * batch_rows, batch_rows, packed, dropout)
    return cases


@pytest.mark.parametrize("case", killed_cases().values(), ids=killed_cases().keys())
def test_ten_steps_equal_four_a_kill_and_six(case: KilledAt, tiny: TinyRun, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", case.rows, seed=5)
    config = tiny.config(
        tmp_path / "straight", data=(str(rows),), max_steps=10, batch_rows=case.batch_rows, dropout=case.dropout,
        micro_batch_rows=case.micro_batch_rows, eval_every=3, save_every=4, early_stopping=9,
    )  # fmt: skip
    train(config)
    output = tmp_path / "killed"
    assert run(train_until_killed, with_options(config, output=output), 5) == -signal.SIGKILL
    assert (output / "checkpoints" / "latest").read_text() == "step-4\n"
    resumed(output)
    assert final_bits(output) == final_bits(tmp_path / "straight")


def test_the_page_counts_the_kills() -> None:
    assert documented("SIGKILL in a step: ten steps against four, the kill, and six") == len(killed_cases())


@pytest.mark.parametrize(("engine", "model"), [("backhand", "gemma3_text"), ("transformers", "llama-tied")])
def test_either_engine_resumes(engine: str, model: str, tiny: TinyRun, tmp_path: Path) -> None:
    base = save_tiny(tiny_model(model), tmp_path / "model")
    config = tiny.config(
        tmp_path / "straight", model=str(base), engine=engine, dropout=0.2, micro_batch_rows=2, eval_every=2
    )
    train(config)
    stopped(with_options(config, output=tmp_path / "run"), 3)
    resumed(tmp_path / "run")
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")


@pytest.mark.smollm2
def test_smollm2_ten_steps_equal_four_a_kill_and_six(tmp_path: Path) -> None:
    rows, held_out = write_rows(tmp_path / "rows.jsonl", 9, seed=0), write_rows(tmp_path / "held.jsonl", 2, seed=1)
    config = TrainConfig(
        # Said aloud: the process that is killed would take one thread and this one all it has, and two wait for each
        # other on a busy machine, for minutes; which base is worth its time would be measured there.
        model=ModelOptions(threads=1, base="dense"),
        data=DataOptions(data=(str(rows),), eval_data=(str(held_out),)),
        adapter=LoRAConfig(rank=2, dropout=0.1),
        optimization=OptimizationOptions(max_steps=10, batch_rows=3, micro_batch_rows=1, learning_rate=1e-3),
        run=RunOptions(output=tmp_path / "straight", save_every=4, eval_every=5, quiet=True, answers=0),
    )
    train(config)
    output = tmp_path / "killed"
    assert run(train_until_killed, with_options(config, output=output), 5) == -signal.SIGKILL
    resumed(output)
    assert final_bits(output) == final_bits(tmp_path / "straight")


def test_stopped_again_and_again(tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "straight", dropout=0.1, eval_every=2, save_every=1)
    train(config)
    stopped(with_options(config, output=tmp_path / "run"), 1)
    for step in (2, 4, 5):
        stopped(with_options(TrainConfig(), output=tmp_path / "run", resume=True, quiet=True), step)
    resumed(tmp_path / "run")
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")


def test_early_stopping_counts_on_after_resuming(tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config(
        tmp_path / "straight",
        epochs=9,
        learning_rate=0.3,
        schedule="constant",
        eval_every=1,
        save_every=1,  # so that the checkpoint has counted one evaluation already
        early_stopping=3,
    )
    summary = train(config)
    assert summary.stopped_because and summary.best_step is not None
    stopped(with_options(config, output=tmp_path / "run"), summary.best_step + 2)
    again = resumed(tmp_path / "run")
    assert (again.steps, again.stopped_because) == (summary.steps, summary.stopped_because)
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")


def test_a_run_stopped_before_its_first_checkpoint_begins_anew(tiny: TinyRun, tmp_path: Path) -> None:
    """On two threads: all others have one."""
    config = tiny.config(tmp_path / "straight", threads=2, micro_batch_rows=2)
    train(config)
    stopped(with_options(config, output=tmp_path / "run"), 1)
    resumed(tmp_path / "run")
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")


def test_a_run_from_an_adapter_resumes_without_it(tiny: TinyRun, tmp_path: Path) -> None:
    train(tiny.config(tmp_path / "first", rank=2))
    config = tiny.config(tmp_path / "straight", from_adapter=str(tmp_path / "first" / "adapter"), rank=2, eval_every=2)
    train(config)
    stopped(with_options(config, output=tmp_path / "run"), 3)
    shutil.rmtree(tmp_path / "first")
    resumed(tmp_path / "run")
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")


def test_a_run_from_an_adapter_that_has_no_checkpoint_begins_from_it_again(tiny: TinyRun, tmp_path: Path) -> None:
    adapter = tmp_path / "first" / "adapter"
    train(tiny.config(tmp_path / "first", rank=2))
    config = tiny.config(tmp_path / "straight", from_adapter=str(adapter), rank=2, dropout=0.1, eval_every=2)
    train(config)
    for name in ("run", "orphan"):
        stopped(with_options(config, output=tmp_path / name), 1)
        assert not list((tmp_path / name / "checkpoints").glob("step-*"))
    resumed(tmp_path / "run")
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")
    shutil.rmtree(adapter)
    with pytest.raises(BackhandError, match=str(adapter)):
        resumed(tmp_path / "orphan")


def test_a_finished_run_says_so_and_changes_nothing(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(tiny.config(tmp_path / "run"))
    before = {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"
    }
    again = train(with_options(TrainConfig(), output=tmp_path / "run", resume=True))
    assert "nothing left to do" in capsys.readouterr().err
    assert again == first
    assert before == {path: path.read_bytes() for path in before}


def test_resuming_a_finished_run_restores_its_damaged_adapter(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny.config(tmp_path / "run"))
    files = {path: path.read_bytes() for path in (tmp_path / "run" / "adapter").iterdir()}
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "run" / "adapter" / "README.md").unlink()
    train(with_options(TrainConfig(), output=tmp_path / "run", resume=True))
    assert "adapter/ was damaged, and is restored" in capsys.readouterr().err
    assert files == {path: path.read_bytes() for path in (tmp_path / "run" / "adapter").iterdir()}


def test_proving_that_a_run_resumes(tiny: TinyRun, tmp_path: Path) -> None:
    train(tiny.config(tmp_path / "run", dropout=0.2, prove_resume=4, keep=1))
    proofs = [json.loads(line) for line in (tmp_path / "run" / "proofs.jsonl").read_text().splitlines()]
    assert proofs[-1]["passed"] and "last 4 steps" in proofs[-1]["proof"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 4}, ["seed"]),
        ({"batch_rows": 2}, ["batch_rows"]),
        ({"early_stopping": 5}, ["early_stopping"]),
        ({"rank": 2, "dtype": "bfloat16"}, ["rank", "dtype"]),
        ({"target_modules": ("q_proj",)}, ["target_modules"]),
        ({"learning_rate": 1.0, "max_steps": 50, "threads": 2}, ["learning_rate", "max_steps", "threads"]),
        ({"template_args": {"enable_thinking": False}}, ["template_args"]),
    ],
)
def test_other_settings_are_refused_with_a_list(
    options: dict[str, Any], named: list[str], tiny: TinyRun, tmp_path: Path
) -> None:
    stopped(tiny.config(tmp_path / "run", save_every=1), 3)
    with pytest.raises(UsageError) as caught:
        resumed(tmp_path / "run", **options)
    assert all(name in caught.value.what for name in named)
    assert "--keep" in str(caught.value) and "--from-adapter" in str(caught.value)


# What a run stores otherwise than it is typed: chosen, counted, or written as words.
RESOLVED = {
    "layers": "--layers last:1",
    "layers-mixed": "--layers 0,first:1",
    "learning-rate": "--learning-rate auto",
    "default-rate": "--learning-rate 3e-3 --alpha 5 --rank 3 --warmup-steps 0",
    "modules": "--target-modules q_proj,v_proj --rank-pattern q_proj=2",
    "machine": "--dtype float32 --device cpu --engine backhand --base auto --recompute auto --cache-frozen auto",
    "micro-batch": "--micro-batch-rows 16",
    "held-out": "--eval-fraction 0.3 --eval-every 2 --save-every 2",
    "memory": "--memory 16GB",
    "objective": "--objective sft --schedule linear",
}


@pytest.mark.parametrize("typed", RESOLVED.values(), ids=RESOLVED.keys())
def test_the_command_of_a_run_resumes_it_as_it_was_typed(
    typed: str, tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = {"--model": tiny.model, "--data": tiny.rows, "--output": tmp_path / "run", "--epochs": 2, "--answers": 0}
    usual |= {} if "--eval" in typed else {"--eval-data": tiny.held_out}
    command = ["train", *(str(word) for pair in usual.items() for word in pair), *typed.split()]
    assert main(command) == 0
    assert main([*command, "--resume"]) == 0, capsys.readouterr().err
    assert "nothing left to do" in capsys.readouterr().err


def test_layers_in_words_are_those_of_the_runs_model(tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "straight", layers="last:1", save_every=1)
    train(config)
    stopped(with_options(config, output=tmp_path / "run"), 3)
    with pytest.raises(UsageError, match=r"layers_to_transform: \(1,\) in the run, \(0,\) given"):
        resumed(tmp_path / "run", layers="first:1")
    train(with_options(config, output=tmp_path / "run", resume=True))  # all of them given again
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")


def test_what_is_proposed_can_be_typed_into_a_shell(tiny: TinyRun, tmp_path: Path) -> None:
    stopped(tiny.config(tmp_path / "a $run", save_every=1), 3)
    with pytest.raises(UsageError) as caught:
        resumed(tmp_path / "a $run", seed=4)
    assert caught.value.next_step is not None
    assert shlex.split(caught.value.next_step)[-2:] == ["--from-adapter", str(tmp_path / "a $run" / "adapter")]


def test_changed_rows_and_a_changed_base_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 9, seed=3)
    model = save_tiny(tiny_model("llama-tied", num_hidden_layers=2), tmp_path / "model")
    stopped(tiny.config(tmp_path / "run", save_every=1, data=(str(rows),), model=str(model)), 3)
    write_rows(rows, 11, seed=4)
    save_tiny(tiny_model("llama-tied", num_hidden_layers=2, seed=1), model)
    with pytest.raises(UsageError, match=r"base model: .*; data: the rows of .*: 9 rows then, 11 now"):
        resumed(tmp_path / "run")


def test_another_base_is_continued_with_by_force_alone(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tiny_model("llama-tied", num_hidden_layers=2), tmp_path / "model")
    stopped(tiny.config(tmp_path / "run", save_every=1, model=str(model)), 3)
    save_tiny(tiny_model("llama-tied", num_hidden_layers=2, seed=1), model)
    with pytest.raises(UsageError, match="base model: the adapted weights"):
        resumed(tmp_path / "run")
    given = with_options(TrainConfig(), output=tmp_path / "run", resume=True, force_base=True)
    assert train(given).steps == 6
    assert "continuing all the same, as --force-base says" in capsys.readouterr().err
    train(tiny.config(tmp_path / "straight", save_every=1, model=str(model)))
    assert final_bits(tmp_path / "run")["state"] != final_bits(tmp_path / "straight")["state"]


def test_force_is_for_the_base_alone(tiny: TinyRun, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 9, seed=3)
    stopped(tiny.config(tmp_path / "run", save_every=1, data=(str(rows),)), 3)
    write_rows(rows, 9, seed=4)
    with pytest.raises(UsageError, match="data: the rows"):
        resumed(tmp_path / "run", force_base=True)


def test_a_configuration_that_was_edited_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    stopped(tiny.config(tmp_path / "run", save_every=1), 3)
    stored = tmp_path / "run" / "config.toml"
    text = stored.read_text()
    stored.write_text(text.replace("learning_rate = 0.003", "learning_rate = 0.01"))
    assert stored.read_text() != text
    with pytest.raises(UsageError, match=r"learning_rate: 0\.003 in the checkpoint, 0\.01 in config\.toml"):
        resumed(tmp_path / "run")
    stored.write_text(text)
    assert resumed(tmp_path / "run").steps == 6


@pytest.mark.parametrize("model", ["directory", "quantized"])
def test_a_run_from_before_an_option_existed_goes_on(model: str, tiny: TinyRun, tmp_path: Path) -> None:
    """Neither its configuration nor its checkpoints know the option: what is its default now was done then.

    Every base was dense, whatever is chosen today for a file in blocks.
    """
    since = {"model": ("base", "quantize", "cache_frozen"), "run": ("workers", "reduce")}
    path: Any = tiny.model
    if model == "quantized":
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
        path = write_tiny_gguf(
            tiny_model("llama", num_hidden_layers=2, **sizes), tmp_path / "tiny.gguf", storage=StorageType.Q8_0
        )
    config = tiny.config(tmp_path / "straight", model=str(path), base="dense", eval_every=2)
    train(config)
    output = tmp_path / "run"
    stopped(with_options(config, output=output), 3)
    stored = output / "config.toml"
    lines = stored.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.partition(" = ")[0] not in {*since["model"], *since["run"]}]
    assert len(lines) - len(kept) == 4, "quantize is not written where it is not given"
    stored.write_text("".join(kept))
    for directory in (output / "checkpoints").glob("step-*"):
        checkpoint = load_checkpoint(directory, int(directory.name.removeprefix("step-")))
        settings = {
            name: value
            for name, value in checkpoint.facts["settings"].items()
            if name.partition(".")[2] not in since.get(name.partition(".")[0], ())
        }
        settings["rewards.reward_timeout"] = 30.0  # it was decisive then, and may change today
        facts = {**checkpoint.facts, "settings": settings}
        (directory / "manifest.json").write_bytes(manifest_bytes(checkpoint.step, checkpoint.contents, facts))
    resumed(output)
    assert final_bits(output)["state"] == final_bits(tmp_path / "straight")["state"]
    assert load_config(stored).model.base == "auto", "the file says how the run began"
    assert json.loads((output / "summary.json").read_text())["base"] == "dense"


def test_a_default_that_is_typed_counts_as_given(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(tiny.config(tmp_path / "run", save_every=1, seed=7), 3)
    resume = ["train", "--resume", "--output", str(tmp_path / "run"), "--quiet"]
    assert main([*resume, "--seed", "0"]) == 2
    assert "seed: 7 in the run, 0 given" in capsys.readouterr().err
    assert main(resume) == 0, "what is not typed is as it was"
    assert load_config(tmp_path / "run" / "config.toml").run.seed == 7


def test_what_may_change_on_resuming(tiny: TinyRun, tmp_path: Path) -> None:
    rows, moved = tmp_path / "rows.jsonl", tmp_path / "moved.jsonl"
    shutil.copy(tiny.rows, rows)
    config = tiny.config(tmp_path / "straight", eval_every=2, data=(str(rows),))
    train(config)
    stopped(with_options(config, output=tmp_path / "before"), 3)
    (tmp_path / "before").rename(tmp_path / "run")
    rows.rename(moved)
    changed = {"keep": 1, "save_every": 1, "log_every": 1, "memory": "8GB"}
    given = with_options(TrainConfig(), output=tmp_path / "run", resume=True, quiet=True, data=(str(moved),), **changed)
    stopped(given, 5)
    resumed(tmp_path / "run", **changed)  # reads the rows that were given last
    found, expected = final_bits(tmp_path / "run"), final_bits(tmp_path / "straight")
    assert found.pop("README.md") != expected.pop("README.md")  # it names the rows' file
    assert found == expected


def test_resuming_what_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError, match="no run"):
            resumed(path)


def test_no_valid_checkpoint_is_never_a_silent_restart(tiny: TinyRun, tmp_path: Path) -> None:
    stopped(tiny.config(tmp_path / "run", save_every=1), 3)
    for manifest in (tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"):
        manifest.write_text("{}")
    with pytest.raises(ArtifactError, match="none of the 2 checkpoints is whole"):
        resumed(tmp_path / "run")


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.config(tmp_path / "straight", save_every=1, eval_every=6)
    train(config)
    stopped(with_options(config, output=tmp_path / "run"), 5)
    torn = tmp_path / "run" / "checkpoints" / "step-4" / "state.safetensors"
    torn.write_bytes(torn.read_bytes()[:-7])
    train(with_options(TrainConfig(), output=tmp_path / "run", resume=True))
    assert "step-4 is skipped: state.safetensors is not as it was written" in capsys.readouterr().err
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")


def test_a_newer_format_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    stopped(tiny.config(tmp_path / "run", save_every=1), 3)
    manifest = tmp_path / "run" / "checkpoints" / "step-2" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 99}))
    with pytest.raises(ArtifactError, match="format 99"):
        resumed(tmp_path / "run")


def test_the_stored_choices_are_kept_whatever_would_be_chosen_today(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def today(dtype: torch.dtype, threads: int, free: int) -> None:
        monkeypatch.setattr("backhand.nn.compute.default_dtype", lambda _: dtype)
        monkeypatch.setattr("backhand.engines.machine.resolve_threads", lambda options: options.threads or threads)
        monkeypatch.setattr("backhand.engines.machine.available_bytes", lambda: free)

    config = tiny.config(tmp_path / "straight", dtype="auto", threads=None, eval_every=2)
    today(torch.float32, 1, 1 << 40)
    train(config)
    stopped(with_options(config, output=tmp_path / "run"), 3)
    today(torch.bfloat16, 2, 1 << 29)
    resumed(tmp_path / "run")
    stored = load_config(tmp_path / "run" / "config.toml")
    assert (stored.model.dtype, stored.model.threads, stored.model.recompute) == ("float32", 1, "none")
    assert final_bits(tmp_path / "run") == final_bits(tmp_path / "straight")
