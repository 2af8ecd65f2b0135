"""Every command that reads an adapter reads one in a GGUF file, and a pickle if it is allowed, as it reads PEFT's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backhand.adapters.loading import source_digests
from backhand.adapters.record import AdapterRecord
from backhand.arithmetic.adapter_factors import read_factors
from backhand.arithmetic.diff import compare_updates
from backhand.cli.main import main
from backhand.errors import UsageError
from backhand.generation.completer import complete_greedily
from backhand.generation.loading import loaded_model
from backhand.interop.command import export_command
from backhand.interop.opened_adapter import open_adapter
from backhand.interop.options import ExportOptions
from backhand.nn.loading import open_model
from backhand.nn.model_options import BaseModelOptions
from tests.support.saved_adapters import save_adapter

ADAPTER = "every-pattern"


@pytest.fixture(scope="module")
def gguf_adapter(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixed ranks and alphas under rank-stabilised scaling, of an architecture that permutes rows of q and k."""
    output = tmp_path_factory.mktemp("exported") / "adapter.gguf"
    return export_command(
        ExportOptions(adapter=tiny.adapters[ADAPTER], to="gguf", output=output, model=str(tiny.directory), quiet=True)
    )


@pytest.fixture(scope="module")
def pickle(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as old versions of PEFT wrote it."""
    adapter = shutil.copytree(tiny.adapters[ADAPTER], tmp_path_factory.mktemp("old") / "adapter")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    return adapter


def difference(tiny: Any, first: Path, second: Path) -> float:
    """The largest relative difference of any module's update; every module must be in both."""
    source = open_model(str(tiny.directory))
    found = compare_updates(*(read_factors(path, source, allow_pickle=True) for path in (first, second)))
    assert not found.only_first and not found.only_second
    return max(module.relative for module in found.modules)


@pytest.mark.parametrize("engine", ["backhand", "transformers"])
def test_both_engines_answer_as_with_pefts_files(tiny: Any, gguf_adapter: Path, engine: Any) -> None:
    options = BaseModelOptions(model=str(tiny.directory), dtype="float32", engine=engine, threads=1)
    prompts = [[5, 9, 3], [7, 2, 8, 1, 4]]
    answers = []
    for adapter in (tiny.adapters[ADAPTER], gguf_adapter, None):
        with loaded_model(options, adapter) as loaded:
            answers.append(complete_greedily(loaded.model, prompts, stop_ids=(), max_new_tokens=8))
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("engine", ["backhand", "transformers"])
def test_a_run_starts_from_it(tiny: Any, gguf_adapter: Path, tmp_path: Path, engine: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a {i}", "completion": f"b {i}"}) + "\n" for i in range(4)))
    words = ["train", "--model", str(tiny.directory), "--data", str(rows), "--output", str(tmp_path / "run")]
    # A step of this size moves no update by more than a few millionths of its norm.
    words += ["--from-adapter", str(gguf_adapter), "--engine", engine, "--learning-rate", "1e-6", "--max-steps", "1"]
    assert main([*words, "--dtype", "float32", "--answers", "0", "--quiet"]) == 0
    assert difference(tiny, tiny.adapters[ADAPTER], tmp_path / "run" / "adapter") < 2e-5


def test_its_tensors_are_read_in_hugging_faces_order(tiny: Any, gguf_adapter: Path) -> None:
    assert difference(tiny, tiny.adapters[ADAPTER], gguf_adapter) < 1e-6


def test_it_is_not_read_without_the_base(gguf_adapter: Path) -> None:
    with pytest.raises(UsageError, match="needs its base model") as caught:
        read_factors(gguf_adapter)
    assert caught.value.next_step == "give --model"


def commands(adapter: Path, other: Path, output: Path) -> dict[str, list[str]]:
    """Every command that looks at adapters, or makes one of them."""
    return {
        "inspect": ["inspect", str(adapter)],
        "diff": ["diff", str(adapter), str(other), "--error", "1e-6"],
        "combine": ["combine", "average", str(adapter), str(other), "--output", str(output)],
        "compress": ["compress", str(adapter), "--error", "1e-4", "--output", str(output)],
        "paper": ["paper", "--adapter", str(adapter), str(other), "--analyses", "similarity"],
        "export": ["export", "--adapter", str(adapter), "--to", "peft", "--output", str(output)],
        "merge": ["merge", "--adapter", str(adapter), "--output", str(output), "--dtype", "float32"],
        "generate": ["generate", "--adapter", str(adapter), "--prompt", "a", "--max-new-tokens", "1"],
    }


COMMANDS = tuple(commands(Path(), Path(), Path()))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reads_a_gguf_adapter(command: str, tiny: Any, gguf_adapter: Path, tmp_path: Path) -> None:
    words = commands(gguf_adapter, tiny.adapters[ADAPTER], tmp_path / "out")[command]
    assert main([*words, "--model", str(tiny.directory)]) == 0
    if command in ("combine", "compress", "export"):
        assert difference(tiny, tiny.adapters[ADAPTER], tmp_path / "out") < 2e-4
        described = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert described["base_model_name_or_path"] == str(tiny.directory.resolve())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_opens_a_pickle_when_allowed_and_never_else(
    command: str, tiny: Any, pickle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*commands(pickle, tiny.adapters[ADAPTER], tmp_path / "out")[command], "--model", str(tiny.directory)]
    assert main(words) == 4
    assert "a pickle is not opened" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*words, "--allow-pickle"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_damaged_gguf_adapter(
    command: str, tiny: Any, gguf_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.gguf"
    data = bytearray(gguf_adapter.read_bytes())
    data[-64] ^= 1
    damaged.write_bytes(data)
    words = commands(damaged, tiny.adapters[ADAPTER], tmp_path / "out")[command]
    assert main([*words, "--model", str(tiny.directory)]) == 4
    assert "has been changed or damaged" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["export", "merge"])
def test_what_is_forced_is_said_even_where_nothing_else_is(
    command: str, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that knows its base, on a base of the same shapes with one number changed."""
    source = open_model(str(tiny.directory))
    loaded = open_adapter(str(tiny.directory), tiny.adapters["plain"], force_base=False).loaded
    digests = source_digests(source, [target.name for target in loaded.targets])
    known = save_adapter(
        tmp_path / "known", loaded.config, loaded.parameters(), base_model=None, record=AdapterRecord(**digests)
    )
    other = shutil.copytree(tiny.directory, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    words = [command, "--adapter", str(known), "--model", str(other), "--output", str(tmp_path / "out"), "--quiet"]
    words += ["--to", "mlx"] if command == "export" else []
    assert main(words) == 4
    assert "base model: its adapted weights" in capsys.readouterr().err
    assert main([*words, "--force-base"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("WARNING: used by force: base model: ") and not said.out
