"""Each case that once lost data, hung, filled the memory or ended as a bug, as it ends now."""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from backhand.cli.main import main
from backhand.errors import ArtifactError
from backhand.nn.decoder.weights import load_weights
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading import open_model
from tests.fuzz.mutate import LooseGGUF
from tests.hostile.conftest import World, linked
from tests.support.limited import Ended, limited
from tests.support.tiny_gguf import add_sentencepiece_tokenizer, write_tiny_gguf, write_vocabulary_gguf
from tests.support.tiny_models import tiny_model

# ---- what a file is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "backhand.json"])
def test_a_pipe_in_an_adapter(name: str, world: World, tmp_path: Path) -> None:
    os.mkfifo(linked(world.adapter, tmp_path / "a", without=name) / name)
    ended = limited(["inspect", "a"], tmp_path)
    assert ended.code == 4, ended.errors


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_pipe_in_a_model(name: str, world: World, tmp_path: Path) -> None:
    os.mkfifo(linked(world.model, tmp_path / "m", without=name) / name)
    ended = limited(world.ask("--model", "m"), tmp_path)
    assert ended.code == 4 and "pipe" in ended.errors


def test_pipes_as_options_and_rows(world: World, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    lint = ["lint", "--model", world.model, "--data"]
    assert limited(["train", "pipe"], tmp_path).code == 2
    assert limited([*lint, world.rows, "--chat-template", "pipe"], tmp_path).code == 2
    (tmp_path / "link").symlink_to("pipe")
    assert limited(world.ask("--model", "link"), tmp_path).code == 4


def test_rows_may_come_out_of_a_pipe_if_something_does(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("backhand.reading._PIPE_WAIT_S", 0.3)
    os.mkfifo(tmp_path / "pipe")
    assert main(["lint", "--model", str(world.model), "--data", str(tmp_path / "pipe")]) == 3
    assert "nothing came out of it" in capsys.readouterr().err


def test_a_file_that_says_it_is_short(world: World, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "backhand.json"):
        place = linked(world.adapter, tmp_path / name, without=name)
        with (place / name).open("wb") as file:
            file.truncate(2**33)
        ended = limited(["inspect", name], tmp_path, memory_bytes=2**30)
        assert ended.code == 4 and "it has more than 8,388,608 bytes" in ended.errors


# ---- foreign programs inside data --------------------------------------------------------------------------------


def test_one_token_of_three_megabytes(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("a", -1.0, 1), ("a" * 3_000_000, -2.0, 1)]
    write_vocabulary_gguf(
        tmp_path / "m.gguf",
        len(pieces),
        lambda writer: add_sentencepiece_tokenizer(writer, pieces, space_prefix=False, add_bos=True),
    )
    (tmp_path / "rows.jsonl").write_text('{"text": "aaa"}')
    assert limited(["lint", "--model", "m.gguf", "--data", "rows.jsonl"], tmp_path).code == 0


@pytest.mark.parametrize("given", ["option", "model"])
@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 20000000000 }}",
        "{{ '\\ud800' }}",
        "{{ ''.__class__.__mro__ }}",
    ],
    ids=["endless", "huge", "half a pair", "forbidden"],
)
def test_a_template_that_asks_for_too_much(given: str, template: str, world: World, tmp_path: Path) -> None:
    model: object = world.model
    option: list[object] = ["--chat-template", template]
    if given == "model":
        place = linked(world.model, tmp_path / "m", without="chat_template.jinja")
        (place / "chat_template.jinja").write_text(template)
        model, option = "m", []
    ended = limited(["lint", "--model", model, "--data", world.rows, *option], tmp_path, memory_bytes=2**31)
    assert ended.code == 4 and "chat template" in ended.what and "rows.jsonl" not in ended.what


def test_a_row_of_thirty_megabytes(world: World, tmp_path: Path) -> None:
    row = json.dumps({"prompt": "q", "completion": "word " * 6_000_000})
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' + row)
    ended = limited(["lint", "--model", world.model, "--data", "rows.jsonl"], tmp_path, memory_bytes=2**31)
    assert ended.code == 3 and "rows.jsonl:2" in ended.what


@pytest.mark.parametrize("pattern", ["(a+)+$", "(\\w|\\w)*x", "(?:[a-z ]+)*\\d"])
def test_a_pattern_without_end_in_a_tokenizer(pattern: str, world: World, tmp_path: Path) -> None:
    place = linked(world.model, tmp_path / "m", without="tokenizer.json")
    tokenizer = json.loads((world.model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    ended = limited(["lint", "--model", "m", "--data", world.rows], tmp_path)
    assert ended.code == 4 and "regular expression" in ended.errors


# ---- GGUF: metadata against types, ranges and tensors ------------------------------------------------------------

Change = Callable[[LooseGGUF], None]


def entry(key: str, kind: int, value: Any) -> Change:
    def change(file: LooseGGUF) -> None:
        file.entries = [one for one in file.entries if one[0] != key.encode()]
        file.entries.append([key.encode(), kind, value])

    return change


def shifted(by: int) -> Change:
    def change(file: LooseGGUF) -> None:
        file.tensors[1][3] = file.tensors[0][3] + by

    return change


STRINGS = [8, [b"x", b"y"]]
GGUF_CHANGES: dict[str, Change] = {
    "pre is a list": entry("tokenizer.ggml.pre", 9, STRINGS),
    "scaling type is a list": entry("llama.rope.scaling.type", 9, STRINGS),
    "template is a list": entry("tokenizer.chat_template", 9, STRINGS),
    "token types are texts": entry("tokenizer.ggml.token_type", 9, STRINGS),
    "token types are too few": entry("tokenizer.ggml.token_type", 9, [5, [1, 1]]),
    "architecture is a list": entry("general.architecture", 9, STRINGS),
    "seven rotated": entry("llama.rope.dimension_count", 4, 7),
    "too many rotated": entry("llama.rope.dimension_count", 4, 4096),
    "key length": entry("llama.attention.key_length", 4, 2**31),
    "embedding length": entry("llama.embedding_length", 10, 2**62),
    "other embedding length": entry("llama.embedding_length", 4, 64),
    "heads": entry("llama.attention.head_count", 4, 1),
    "end of sequence": entry("tokenizer.ggml.eos_token_id", 4, 99999),
    "context": entry("llama.context_length", 8, b"long"),
    "epsilon": entry("llama.attention.layer_norm_rms_epsilon", 8, b"x"),
    "over one another": shifted(0),
    "unaligned": shifted(7),
}


@pytest.mark.parametrize("name", GGUF_CHANGES)
def test_gguf_metadata(name: str, world: World, tmp_path: Path) -> None:
    file = LooseGGUF(world.gguf.read_bytes())
    GGUF_CHANGES[name](file)
    (tmp_path / "m.gguf").write_bytes(file.to_bytes())
    ended = limited(world.ask("--model", "m.gguf"), tmp_path, memory_bytes=2**31)
    assert ended.code == 4, ended.errors
    assert "transformers" not in ended.errors


def test_split_gguf_with_missing_and_repeated_parts(world: World, tmp_path: Path) -> None:
    first = write_tiny_gguf(tiny_model("llama", num_hidden_layers=2), tmp_path / "m", parts=3)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3 and limited(world.ask("--model", first.name), tmp_path).code == 0
    second = parts[1].read_bytes()
    parts[1].unlink()
    ended = limited(world.ask("--model", first.name), tmp_path)
    assert ended.code == 4 and "missing" in ended.what
    parts[1].write_bytes(parts[2].read_bytes())
    ended = limited(world.ask("--model", first.name), tmp_path)
    assert ended.code == 4 and "states split.no" in ended.what
    parts[1].write_bytes(second[: len(second) // 2])
    assert limited(world.ask("--model", first.name), tmp_path).code == 4


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 2**40, 2**30])
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_hidden_layers"])
def test_sizes_that_no_model_has(key: str, size: int, world: World) -> None:
    config = json.loads((world.model / "config.json").read_text())
    with pytest.raises(ArtifactError):
        load_weights_of({**config, key: size}, world)


def load_weights_of(config: dict[str, Any], world: World) -> None:
    source = open_model(world.model)
    load_weights(source, decoder_config(config), torch.float32)


# ---- options and files that ended as bugs ------------------------------------------------------------------------


def test_a_shape_of_a_hundred_thousand_dimensions(world: World, tmp_path: Path) -> None:
    place = linked(world.adapter, tmp_path / "a", without="adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]}}).encode()
    (place / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    ended = limited(["inspect", "a"], tmp_path)
    assert ended.code == 4 and len(ended.errors) < 10_000


LONG_NAME = "n" * 300
OPTIONS: dict[str, tuple[list[object], int]] = {
    "weights": (["combine", "add", "A", "A", "--weights", "1e308", "1e308", "--output", "out"], 2),
    "long name": (["combine", "add", "A", "A", "--output", LONG_NAME], 2),
    "deep output": (["combine", "add", "A", "A", "--output", "/".join(["d"] * 2000)], 2),
    "model of a long name": (["generate", "--prompt", "x", "--model", LONG_NAME], 4),
    "rows of a long name": (["lint", "--model", "M", "--data", LONG_NAME], 3),
    "temperature": (["generate", "--model", "M", "--prompt", "x", "--temperature", "1e-320"], 2),
    "device": (["generate", "--model", "M", "--prompt", "x", "--device", "meta"], 2),
    "template arguments": (["lint", "--model", "M", "--data", "R", "--template-args", "{" * 100_000], 2),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, world: World, tmp_path: Path) -> None:
    words, code = OPTIONS[name]
    (tmp_path / "A").symlink_to(world.adapter)
    (tmp_path / "M").symlink_to(world.model)
    (tmp_path / "R").symlink_to(world.rows)
    ended = limited(words, tmp_path)
    assert ended.code in (code, 2), ended.errors
    assert len(ended.errors) < 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "M", "R"]


@pytest.mark.parametrize("text", ["[adapter]\nrank = " + "9" * 6000, "a = " + "[" * 5000, "[adapter]\nrank = 1e400"])
def test_configurations(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    ended = limited(["train", "run.toml"], tmp_path)
    assert ended.code == 2 and len(ended.errors) < 10_000


def test_a_model_without_merges_is_written(tmp_path: Path, world: World) -> None:
    letters = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((chr(c), -1.0 - c, 1) for c in range(97, 123))]
    write_vocabulary_gguf(
        tmp_path / "m.gguf",
        len(letters),
        lambda writer: add_sentencepiece_tokenizer(writer, letters, space_prefix=False, add_bos=True),
    )
    words = ["train", "--model", "m.gguf", "--data", "rows.jsonl", "--output", "run", "--max-steps", 1, "--quiet"]
    (tmp_path / "rows.jsonl").write_text('{"text": "abcdef"}\n{"text": "fedcba"}\n')
    assert limited([*words, "--threads", 1], tmp_path).code == 0
    merge = ["merge", "--model", "m.gguf", "--adapter", "run/adapter", "--output", "q.gguf", "--dtype", "q8_0"]
    ended = limited(merge, tmp_path)
    assert ended.code in (0, 4, 6), ended.errors


def test_memory_that_does_not_suffice_to_begin(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (400_000_000,) * 2)\n"
        "from backhand.cli.main import main; sys.exit(main(['inspect', '.']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 5 and "too low to load PyTorch" in done.stderr, done.stderr


# ---- rows --------------------------------------------------------------------------------------------------------


def test_names_that_occur_twice(world: World, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    twice = '{"text": "a", "text": "b"}'
    (tmp_path / "rows.jsonl").write_text(twice)
    (tmp_path / "rows.json").write_text(f"[{twice}]")
    (tmp_path / "rows.csv").write_text("text,text\na,b\n")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(twice.encode()))
    parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "rows.parquet")
    for path in sorted(tmp_path.iterdir()):
        ended = limited(["lint", "--model", world.model, "--data", path.name], tmp_path)
        assert ended.code == 3 and ("twice" in ended.errors or "two columns" in ended.errors), path.name


def test_a_time_that_no_calendar_has(world: World, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    times = pa.array([2**62], pa.int64()).view(pa.timestamp("us"))
    parquet.write_table(pa.table({"text": ["a"], "at": times}), tmp_path / "rows.parquet")
    ended: Ended = limited(["lint", "--model", world.model, "--data", "rows.parquet"], tmp_path)
    assert ended.code == 3 and "Parquet" in ended.what
