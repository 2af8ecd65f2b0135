"""`backhand plan` as it is typed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from backhand.adapters.config import LoRAConfig
from backhand.cli.main import main
from backhand.engines.decoder_engine import DecoderEngine
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.training.calibration import Seconds
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import TinyRun, write_rows

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> Plan:
    def run(*words: str) -> tuple[int, str, str]:
        model = ("--model", str(tiny.model), "--dtype", "float32", "--threads", "1", "--rank", "3")
        code = main(["plan", *model, *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_the_parts_add_up_and_nothing_is_written(
    plan: Plan, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = plan("--data", str(tiny.rows), "--batch-rows", "4", "--epochs", "2", "--no-calibrate", "--json")
    found: dict[str, Any] = json.loads(out)
    assert (code, err, list(tmp_path.iterdir())) == (0, "", [])
    assert found["peak_bytes"] == sum(found["parts"].values())
    assert {"process", "base weights", "adapter and gradients", "moments", "kept activations"} < set(found["parts"])
    assert found["steps"] == 6
    assert found["rows"] == 11
    assert found["tokens_per_s"] is None


def test_the_tables_say_what_the_run_will_be(plan: Plan, tiny: TinyRun) -> None:
    code, out, _ = plan("--data", str(tiny.rows), "--eval-data", str(tiny.held_out), "--no-calibrate", "--watch")
    assert code == 0
    for words in ("predicted peak", "base weights", "may be used", "live view, a second model", "11 rows"):
        assert words in out


def test_the_line_of_the_base_counts_cached_states(plan: Plan, tiny: TinyRun) -> None:
    _, out, _ = plan("--data", str(tiny.rows), "--layers", "last:1", "--cache-frozen", "memory", "--no-calibrate")
    assert "hidden states of frozen layers" in out
    (peak,) = re.findall(r"predicted peak\s+│\s+([\d.]+ \w+)", out)
    assert f"takes {peak}, " in out


def test_the_teacher_of_a_baked_run_takes_time_before_the_first_step(
    plan: Plan, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backhand.training.calibration._measure", lambda *_: Seconds(1e-9, 0.0, 0.0, 1.0, further=0.5))
    words = ("--data", str(tiny.rows), "--objective", "bake", "--context", "the assistant answers in json")
    sampled = plan(*words, "--max-new-tokens", "3", "--json")[1]
    rows = json.loads(sampled)["rows"] + json.loads(sampled)["held_out_rows"]
    assert json.loads(sampled)["teacher_s"] == pytest.approx(3 * (-(-rows // 64) + 0.5 * max(0, rows - 8)))
    for origin in (("rows",), ("student", "--max-new-tokens", "3")):
        others = json.loads(plan(*words, "--answers-from", *origin, "--json")[1])
        assert others["teacher_s"] < 1e-3, origin
    assert "the teacher's answers and states before them about" in plan(*words, "--max-new-tokens", "3")[1]


def test_processes_share_the_steps_and_the_memory(plan: Plan, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--data", str(tiny.rows), "--batch-rows", "4", "--memory", "15 GB", "--no-calibrate", "--json")
    alone, three = (json.loads(plan(*words, "--workers", workers)[1]) for workers in ("1", "3"))
    assert (alone["processes"], three["processes"]) == (1, 3)
    assert three["budget_bytes"] == alone["budget_bytes"] // 3
    assert three["micro_batch_rows"] <= 2 < alone["micro_batch_rows"]
    copies = [one["parts"]["adapter and gradients"] for one in (alone, three)]
    assert copies[0] < copies[1]
    monkeypatch.setattr("backhand.training.calibration._measure", lambda *_: Seconds(1e-3, 0.0, 0.0, 0.0))
    counted = ("--data", str(tiny.rows), "--batch-rows", "4", "--micro-batch-rows", "1", "--json")
    alone, three = (json.loads(plan(*counted, "--workers", workers)[1]) for workers in ("1", "3"))
    assert alone["tokens_per_s"] == pytest.approx(1000)
    assert 1500 < three["tokens_per_s"] < 3000  # four micro-batches on three processes: one has two
    assert "processes: 3 on this machine" in plan(*counted[:-1], "--no-calibrate", "--workers", "3")[1]


def test_the_longest_documents_are_named(plan: Plan, tiny: TinyRun, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 5, seed=3, words=(5, 6), completion=2).read_text().splitlines()
    rows[3] = json.dumps({"prompt": "the user asks for a list of names and numbers", "completion": "one " * 30})
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    words = ("--data", str(tmp_path / "rows.jsonl"), "--no-calibrate", "--show", "2")
    longest = json.loads(plan(*words, "--json")[1])["longest"]
    assert longest[0]["where"].endswith("rows.jsonl:4")
    assert longest[0]["tokens"] > longest[0]["supervised_tokens"] > 30 > longest[1]["supervised_tokens"] > 0
    assert [len(longest), longest[0]["tokens"] > longest[1]["tokens"]] == [2, True]
    out = plan(*words)[1]
    # A long path is folded within its column.
    where = "".join(line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│"))
    assert "longest documents" in out and "rows.jsonl:4" in where
    assert json.loads(plan(*words[:-2], "--json")[1])["longest"] == []
    code, _, err = plan(*words[:-1], "-1")
    assert code == 2 and "--show" in err
    labels = ("--objective", "classify", "--problem-type", "single_label_classification")
    (text,) = json.loads(plan(*words[:-1], "1", "--json", "--max-length", "8", *labels)[1])["longest"]
    assert (text["tokens"], text["supervised_tokens"]) == (8, 0), "a placeholder is no token of the text"


def test_a_sample_of_a_large_file_has_the_figures_of_all_rows(plan: Plan, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 3000, seed=3)
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "the user asks " * 40, "completion": "a list"}) + "\n")
    words = ("--data", str(rows), "--batch-rows", "8", "--no-calibrate", "--json")
    whole, sampled = (json.loads(plan(*words, *more)[1]) for more in ((), ("--sample", "200")))
    same = ("rows", "held_out_rows", "steps")
    assert [sampled[name] for name in same] == pytest.approx([whole[name] for name in same], rel=0.01)
    trained = (*words, "--eval-fraction", "0")  # so that the longest row is trained on
    parts = [json.loads(plan(*trained, *more)[1])["parts"] for more in ((), ("--sample", "200"))]
    activations = [one["kept activations"] + one["workspace"] for one in parts]
    assert activations[1] == pytest.approx(activations[0], rel=0.1)
    note = next(note for note in sampled["notes"] if "estimated" in note)
    read = re.match(r"([\d,]+) documents of 3,001 rows were encoded", note)
    assert read is not None and 200 <= int(read[1]) <= 500 and "python:" not in str(sampled["notes"])
    assert json.loads(plan(*words, "--sample", "2000")[1])["notes"] == whole["notes"]


def test_a_sample_names_files_and_splits_as_training_does(plan: Plan, tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", 40, seed=3)
    words = ("--batch-rows", "2", "--no-calibrate", "--json")
    for sample in ("1", "8"):
        found = json.loads(plan("--data", str(few), *words, "--sample", sample)[1])
        assert (found["rows"], found["held_out_rows"]) == (40, 0)
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "train.jsonl", 300, seed=4)
    write_rows(folder / "valid.jsonl", 7, seed=5)
    states = ("--layers", "last:1", "--cache-frozen", "memory", "--epochs", "2")
    for data in (
        (str(folder),),
        (str(few), str(folder / "train.jsonl")),
        (str(folder / "train.jsonl"), "--max-rows=90"),
    ):
        whole, found = (json.loads(plan("--data", *data, *words, *states, *more)[1]) for more in ((), ("--sample=8",)))
        same = ("rows", "held_out_rows", "steps")
        assert [found[name] for name in same] == pytest.approx([whole[name] for name in same], rel=0.1)
        assert found["kept_states"]["bytes"] == pytest.approx(whole["kept_states"]["bytes"], rel=0.3)
        assert "were encoded" in found["notes"][-1] and "python:" not in str(found["notes"])
    longest = json.loads(plan("--data", str(few), str(folder), *words, "--sample", "8", "--show", "3")[1])["longest"]
    for one in longest:
        name, number = one["where"].rsplit(":", 1)
        assert Path(name).read_text().splitlines()[int(number) - 1]
    few.write_text(few.read_text() + '{"prompt": 3, "completion": "x"}\n' + few.read_text() * 9)
    code, _, err = plan("--data", str(few), *words, "--sample", "30")
    assert "python:" not in err and (code == 0 or f"{few}:41" in err)


def test_without_rows_the_longest_are_assumed(plan: Plan) -> None:
    short = json.loads(plan("--no-calibrate", "--json", "--max-length", "32")[1])
    long = json.loads(plan("--no-calibrate", "--json", "--max-length", "64")[1])
    assert "rows of 64 tokens (--max-length) are assumed" in long["notes"][0]
    kept = [one["parts"]["kept activations"] for one in (short, long)]
    assert kept[1] == pytest.approx(2 * kept[0], rel=0.02)
    assert kept[0] > 0


def test_without_rows_of_vectors_as_many_texts_are_assumed_as_the_loss_needs(plan: Plan) -> None:
    words = "--objective", "embed", "--no-calibrate", "--json", "--max-length", "32", "--micro-batch-rows", "2"
    pairs, triplets = (
        json.loads(plan(*words, "--pooling", "mean", "--embedding-loss", loss)[1]) for loss in ("infonce", "triplet")
    )
    assert "a row has 2 texts, and each further negative adds one" in pairs["notes"][0]
    kept = [one["parts"]["kept activations"] for one in (pairs, triplets)]
    assert kept[1] == pytest.approx(1.5 * kept[0], rel=0.1)


def test_speed_is_measured_and_counted_over_the_run(plan: Plan, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backhand.training.calibration.calibrate.__kwdefaults__", {"budget_s": 0.1})
    once = json.loads(plan("--data", str(tiny.rows), "--epochs", "1", "--eval-data", str(tiny.held_out), "--json")[1])
    assert once["tokens_per_s"] > 0
    tokens = once["tokens_per_s"] * once["train_s"]
    stated = next(note for note in once["notes"] if "documents with" in note)
    of_documents = int(stated.split("with ")[1].split(" token")[0].replace(",", ""))
    assert 0.5 * of_documents < tokens < of_documents, "tokens after the last target are not trained on"
    assert once["evaluate_s"] > 0


@pytest.mark.parametrize(
    ("variant", "layers", "more", "lengths"),
    [
        ("llama", "last:2", {"num_hidden_layers": 6}, [(2, 0), (3, 0)]),
        ("llama", None, {"num_hidden_layers": 6}, [(3, 0), (4, 3)]),
        ("lfm2", "last:2", {"num_hidden_layers": 6, "full_attn_idxs": [1, 4]}, [(2, 0), (3, 0), (3, 0)]),
        ("lfm2", None, {"num_hidden_layers": 6, "full_attn_idxs": [1, 4]}, [(4, 0), (5, 1), (5, 1)]),
    ],
)
def test_every_block_that_is_measured_has_an_adapter_of_its_kind(
    variant: str, layers: str | None, more: dict[str, Any], lengths: list[tuple[int, int]], tmp_path: Path
) -> None:
    """Also where few are adapted; and how many blocks the short models have, and lack."""
    source = open_model(str(save_tiny(tiny_model(variant, **more), tmp_path / "model")))
    adapter = LoRAConfig(rank=2) if layers is None else LoRAConfig(rank=2, layers=layers)
    short = DecoderEngine(source, torch.float32).short(adapter, torch.device("cpu"), "none", "dense")
    models = [short.model, *(one.model for one in short.more)]
    found = []
    for model, missing in zip(models, (0, *(one.missing for one in short.more)), strict=True):
        assert isinstance(model, Decoder) and model.lora is not None
        assert set(model.lora.slots) == {name for name in model.module_shapes() if name.startswith("model.layers.")}
        found.append((len(model.config.layers), missing))
    assert found == lengths
    assert short.below == (4 if layers else 0)
    assert sum(one.blocks for one in short.more) == (2 if layers else 6)


def test_under_transformers_the_model_itself_is_timed(
    plan: Plan, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backhand.training.calibration.calibrate.__kwdefaults__", {"budget_s": 0.1})
    ours, theirs = (
        json.loads(plan("--data", str(tiny.rows), "--engine", engine, "--max-steps", "4", "--json")[1])
        for engine in ("backhand", "transformers")
    )
    assert (theirs["engine"], theirs["recompute"], theirs["steps"]) == ("transformers", "none", 4)
    assert theirs["trained_parameters"] == ours["trained_parameters"]
    assert theirs["parts"]["base weights"] == pytest.approx(ours["parts"]["base weights"], rel=0.05)
    assert theirs["peak_bytes"] == sum(theirs["parts"].values())
    assert theirs["tokens_per_s"] > 0


def test_a_slow_machine_measures_fewer_tokens(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass takes as long as its tokens say, on a clock of its own: eight seconds for the whole micro-batch."""
    now, passes = [0.0], []

    def slow(decoder: Decoder, batch: PackedBatch, *_: object) -> None:
        tokens = batch.input_ids.shape[0]
        passes.append(tokens)
        now[0] += tokens * (0.01 + 0.01 * len(decoder.config.layers))

    monkeypatch.setattr("backhand.training.calibration.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(Decoder, "loss_and_gradients", slow)
    rows = write_rows(tmp_path / "long.jsonl", 8, seed=0, words=(30, 31), completion=3)
    found = json.loads(plan("--data", str(rows), "--batch-rows", "8", "--micro-batch-rows", "8", "--json")[1])
    assert found["measured_s"] <= 12
    assert max(passes) < 8 * 100, "fewer than the micro-batch has"
    # two blocks: 0.03 seconds a token, the filler's among them
    assert found["tokens_per_s"] == pytest.approx(1 / 0.03, rel=0.25)


def test_what_does_not_fit_is_refused_with_a_proposal(plan: Plan, tiny: TinyRun) -> None:
    code, out, err = plan("--data", str(tiny.rows), "--memory", "100MB", "--no-calibrate")
    assert (code, out) == (5, "")
    assert "memory: training needs about" in err
    assert "process:" in err and "next:" in err


def test_a_wrong_target_is_an_error_before_anything_is_planned(plan: Plan) -> None:
    code, _, err = plan("--target-modules", "q_prj")
    assert code == 2
    assert "did you mean" in err and "q_proj" in err


def test_a_runs_configuration_can_be_planned(plan: Plan, tiny: TinyRun, tmp_path: Path) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text(f'[data]\ndata = ["{tiny.rows}"]\n[optimization]\nmax_steps = 5\n')
    found = json.loads(plan(str(settings), "--no-calibrate", "--json")[1])
    assert (found["steps"], found["rows"]) == (5, 11)
