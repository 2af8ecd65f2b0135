"""A run that the decoder engine could not take says why, what it costs and what would change it, wherever one looks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backhand.nn.families.config_fields import UnsupportedModel
from backhand.report.headline import headline
from backhand.report.run_record import read_run
from backhand.report.train import train
from backhand.runs.summary import read_summary
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import TinyRun

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    """A model whose rotary rule the engine does not have, and a foreign field in its configuration."""
    directory = save_tiny(tiny_model("llama-tied", rope_parameters=DYNAMIC), tmp_path / "dynamic")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "unsloth_fixed": True}))
    return directory


def test_a_fallback_is_said_everywhere(
    unknown: Path, tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train(tiny.config(tmp_path / "run", model=str(unknown), max_steps=2, quiet=False))
    assert summary.engine == "transformers"
    note = summary.engine_note
    assert note is not None
    for part in ("rope_type = 'dynamic'", "1.3 to 2.2 times the time", "docs/models.md"):
        assert part in note
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["engine_note"] == note
    assert read_summary(tmp_path / "run" / "summary.json") == summary
    shown = capsys.readouterr()
    assert f"SLOWER: {note}" in shown.err  # before the first step
    assert shown.out.splitlines()[1] == f"SLOWER: {note}"  # and in the closing lines
    assert summary.base_architecture is None and "backhand export" not in shown.out  # which needs the decoder engine
    sentence = headline(read_run(tmp_path / "run"))
    assert "docs/models.md" in sentence and "slower than necessary" in sentence and "'dynamic'" in sentence


def test_where_nothing_falls_back_nothing_is_said(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for engine in ("auto", "transformers"):
        output = tmp_path / engine
        summary = train(tiny.config(output, engine=engine, max_steps=1, quiet=False))
        assert summary.engine_note is None
        shown = capsys.readouterr()
        assert "SLOWER" not in shown.err + shown.out
        assert "slower" not in headline(read_run(output))


def test_summaries_of_earlier_versions_are_read(tiny: TinyRun, tmp_path: Path) -> None:
    summary = train(tiny.config(tmp_path / "run", max_steps=1))
    path = tmp_path / "run" / "summary.json"
    values = json.loads(path.read_text())
    del values["engine_note"]
    path.write_text(json.dumps(values))
    assert read_summary(path) == summary


def test_quantized_directories_say_what_would_be_faster(tiny: TinyRun, tmp_path: Path) -> None:
    directory = save_tiny(tiny_model("llama-tied"), tmp_path / "quantized")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization": {"group_size": 64, "bits": 4}}))
    summary = train(tiny.config(tmp_path / "run", model=str(directory), max_steps=1))
    assert summary.engine_note is not None and "as a GGUF file" in summary.engine_note


def test_what_a_gguf_file_means_is_never_guessed(tiny: TinyRun, tmp_path: Path) -> None:
    """transformers would compute a plain model from it, and the loss would look well."""
    path = write_tiny_gguf(tiny_model("llama-tied"), tmp_path / "t.gguf", extra={"llama.attention.clamp_kqv": 3})
    with pytest.raises(UnsupportedModel, match="clamp_kqv = 3") as raised:
        train(tiny.config(tmp_path / "run", model=str(path), max_steps=1))
    assert "Hugging Face directory" in str(raised.value)


def test_foreign_fields_are_a_note_and_no_fallback(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = save_tiny(tiny_model("llama-tied"), tmp_path / "foreign")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "unk_token_id": 0, "_model_name_or_path": "a/b"}))
    summary = train(tiny.config(tmp_path / "run", model=str(directory), max_steps=1, quiet=False))
    assert (summary.engine, summary.engine_note) == ("backhand", None)
    noted = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: the configuration")]
    assert noted == [
        "note: the configuration has 2 fields that no llama model of transformers reads: "
        + ", ".join(
            name
            for name in json.loads((directory / "config.json").read_text())
            if name in ("unk_token_id", "_model_name_or_path")
        )
    ]
