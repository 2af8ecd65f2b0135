"""Split GGUF models whose parts are missing, cut, mixed, renamed, repeated or changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from backhand.cli.main import main
from tests.fuzz.mutate import LooseGGUF
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import tiny_model


def written(place: Path, *, layers: int = 2, parts: int = 3) -> Path:
    place.mkdir()
    write_tiny_gguf(tiny_model("llama", num_hidden_layers=layers), place / "m", parts=parts)
    return place


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("split") / "good")


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another number of layers."""
    return written(tmp_path_factory.mktemp("split") / "larger", layers=3)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "m"))


def part(folder: Path, number: int, count: int = 3) -> Path:
    return folder / f"m-{number:05d}-of-{count:05d}.gguf"


def generate(model: Path) -> int:
    words = ["generate", "--model", str(model), "--prompt", "what", "--max-new-tokens", "1", "--threads", "1"]
    return main([*words, "--dtype", "float32"])


def changed(path: Path, change: Callable[[LooseGGUF], None]) -> None:
    file = LooseGGUF(path.read_bytes())
    change(file)
    path.write_bytes(file.to_bytes())


def stating(key: str, value: int, kind: int = 2) -> Callable[[LooseGGUF], None]:
    def change(file: LooseGGUF) -> None:
        file.entries = [entry for entry in file.entries if entry[0] != key.encode()]
        file.entries.append([key.encode(), kind, value])

    return change


def swap(one: Path, other: Path) -> None:
    between = one.with_suffix(".between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def without_tensor(file: LooseGGUF) -> None:
    del file.tensors[0]


def twice(file: LooseGGUF) -> None:
    file.tensors.append(list(file.tensors[0]))


def foreign(folder: Path, larger: Path) -> None:
    shutil.copy(part(larger, 2), part(folder, 2))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "the first part is missing": (lambda m: part(m, 1).unlink(), "missing: m-00001-of-00003.gguf"),
    "the second part is missing": (lambda m: part(m, 2).unlink(), "missing: m-00002-of-00003.gguf"),
    "all but one are missing": (lambda m: (part(m, 1).unlink(), part(m, 2).unlink()), "2 of 3 parts"),
    "the first two are swapped": (lambda m: swap(part(m, 1), part(m, 2)), "split.no"),
    "the last two are swapped": (lambda m: swap(part(m, 2), part(m, 3)), "split.no"),
    "the third is the second": (lambda m: shutil.copy(part(m, 2), part(m, 3)), "split."),
    "the second is the first": (lambda m: shutil.copy(part(m, 1), part(m, 2)), "split."),
    "half of a part": (lambda m: cut(part(m, 2), 0.5), "m-00002-of-00003.gguf"),
    "most of a part": (lambda m: cut(part(m, 3), 0.98), "m-00003-of-00003.gguf"),
    "a part of four bytes": (lambda m: os.truncate(part(m, 2), 4), "m-00002-of-00003.gguf"),
    "an empty part": (lambda m: os.truncate(part(m, 2), 0), "m-00002-of-00003.gguf"),
    "a part that is text": (lambda m: part(m, 2).write_text("not found"), "m-00002-of-00003.gguf"),
    "a part that is a folder": (lambda m: (part(m, 2).unlink(), part(m, 2).mkdir()), "m-00002-of-00003.gguf"),
    "a part that is a pipe": (lambda m: (part(m, 2).unlink(), os.mkfifo(part(m, 2))), "m-00002-of-00003.gguf"),
    "a link that leads nowhere": (
        lambda m: (part(m, 2).unlink(), part(m, 2).symlink_to("none")),
        "missing: m-00002-of-00003.gguf",
    ),
    "more parts stated": (lambda m: changed(part(m, 1), stating("split.count", 4)), "split.count"),
    "fewer parts stated": (lambda m: changed(part(m, 2), stating("split.count", 2)), "split.count"),
    "a number too large": (lambda m: changed(part(m, 3), stating("split.no", 9)), "split.no"),
    "more tensors stated": (lambda m: changed(part(m, 1), stating("split.tensors.count", 99, 5)), "split.tensors"),
    "a tensor is missing": (lambda m: changed(part(m, 2), without_tensor), "split.tensors"),
    "a tensor twice in a part": (lambda m: changed(part(m, 2), twice), "m-00002-of-00003.gguf"),
    "named as two": (
        lambda m: (part(m, 1).rename(part(m, 1, 2)), part(m, 2).rename(part(m, 2, 2))),
        "split.count",
    ),
    "named as one": (lambda m: part(m, 1).rename(m / "m.gguf"), "its name does not lead to the others"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_split_model(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, said = DAMAGES[kind]
    damage(folder)
    model = min(folder.glob("*.gguf"), key=lambda path: len(path.name))  # the one with another name, if there is one
    assert generate(model) == 4
    errors = capsys.readouterr().err
    assert said in errors and "next: " in errors and "bug" not in errors, errors


def test_a_part_of_another_model(folder: Path, larger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign(folder, larger)
    assert generate(part(folder, 1)) == 4
    errors = capsys.readouterr().err
    assert "m-00002-of-00003.gguf" in errors or "m-00001-of-00003.gguf" in errors, errors


@pytest.mark.parametrize("named", ["first", "second", "last", "folder"])
def test_any_part_leads_to_the_others(named: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {"first": part(folder, 1), "second": part(folder, 2), "last": part(folder, 3), "folder": folder}
    assert generate(paths[named]) == 0
    capsys.readouterr()


def test_two_split_models_in_one_folder(folder: Path, larger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in larger.iterdir():
        shutil.copy(path, folder / path.name.replace("m-", "n-"))
    assert generate(folder) == 4
    assert "6 GGUF files" in capsys.readouterr().err
