"""docs/interop.md: its commands work unchanged on a tiny base, and its table has every format and refusal."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from backhand.cli.main import main
from backhand.errors import ArtifactError
from backhand.interop.command import export_command
from backhand.interop.options import FLOAT32_TOLERANCE, FORMATS, ROUNDED_TOLERANCE, ExportOptions
from tests.support.doc_blocks import PROJECT, blocks
from tests.support.tiny_adapters import save_tiny_adapter

PAGE = "docs/interop.md"
TEXT = (PROJECT / PAGE).read_text(encoding="utf-8")


def command_lines() -> list[list[str]]:
    return [words for block in blocks(PAGE) for words in block.command_lines]


def test_every_command_works_unchanged(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.adapters["every-pattern"], tmp_path / "runs" / "mine" / "adapter")
    lines = command_lines()
    assert {line[0] for line in lines} == {"export", "merge"}
    for words in lines:
        assert main([*words, "--model", str(tiny.directory), "--quiet"]) == 0, words
    assert sorted(path.name for path in (tmp_path / "runs" / "mine").iterdir()) == [
        "adapter",
        "adapter.gguf",
        "merged",
        "merged.gguf",
        "mlx",
        "ollama",
        "vllm",
    ]


def test_other_programs_are_directed_to_the_files_that_were_written() -> None:
    written = {words[words.index("--output") + 1] for words in command_lines()}
    read = set(re.findall(r"runs/mine/[\w.]+", TEXT)) - {"runs/mine/adapter"}
    assert read == written


def test_the_table_has_every_format() -> None:
    assert {name for name in FORMATS if f"`--to {name}" in TEXT} == set(FORMATS)


def test_what_vllm_reads_has_neither_patterns_nor_rslora(tiny: Any, tmp_path: Path) -> None:
    options = ExportOptions(
        adapter=tiny.adapters["every-pattern"],
        to="peft",
        uniform=True,
        output=tmp_path / "vllm",
        model=str(tiny.directory),
        quiet=True,
    )
    config = json.loads((export_command(options) / "adapter_config.json").read_text())
    for field in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save"):
        assert not config[field], field
    assert config["bias"] == "none" and config["r"] == 5


def test_the_refusals_of_the_table(tiny: Any, tmp_path: Path) -> None:
    head = save_tiny_adapter(tiny.model, tmp_path / "head", target_modules=["lm_head"])
    for to, adapter in (("gguf", head), ("ollama", head), ("mlx", head), ("kohya", tiny.adapters["plain"])):
        options = ExportOptions(
            adapter=adapter,
            to=to,  # type: ignore[arg-type]
            output=tmp_path / "out",
            model=str(tiny.directory),
            quiet=True,
        )
        with pytest.raises(ArtifactError):
            export_command(options)


def test_the_tolerances_are_those_of_the_code() -> None:
    assert f"({FLOAT32_TOLERANCE} in float32, {ROUNDED_TOLERANCE} in other types)" in " ".join(TEXT.split())
