"""The files of one adapter, read and checked as far as that goes without a model."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from backhand.adapters.peft_config import PEFTConfig, read_peft_config
from backhand.adapters.peft_keys import factor_problems
from backhand.adapters.record import AdapterRecord, changed_files, read_record
from backhand.adapters.tensor_file import read_json_object, read_tensors
from backhand.errors import ArtifactError, first_line
from backhand.reading import read_plain
from backhand.words import name_list

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
RECORD_FILE = "backhand.json"
CARD_FILE = "README.md"
_SHOWN_PROBLEMS = 40
_OF_MODEL = ("missing", "unexpected")
"""How problems begin that may also be those of another base model."""


class UnusableAdapterError(ArtifactError):
    """An adapter that cannot be used, with everything that is wrong with it.

    Attributes:
        problems: one sentence each; the message shows forty of them.
    """

    def __init__(
        self,
        directory: Path,
        problems: Sequence[str],
        base_model: str | None = None,
        next_step: str | None = None,
    ) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        shown = _some_of_each_kind(self.problems, _SHOWN_PROBLEMS)
        if count > len(shown):
            shown.append(f"and {count - len(shown)} more")
        super().__init__(
            f"the adapter cannot be used: {count} problem{'s' if count > 1 else ''}",
            where=str(directory),
            why="".join(f"\n    - {problem}" for problem in shown),
            next_step=next_step or _next_step(self.problems, base_model),
        )


def _next_step(problems: Sequence[str], base_model: str | None) -> str:
    """Tensors that do not fit may be those of another model; everything else is in the files themselves."""
    of_model = any(problem.startswith(_OF_MODEL) or "by configuration and model" in problem for problem in problems)
    named = f", {base_model}" if base_model else ""
    model = f"give the base model it was trained on{named}, or " if of_model else ""
    return f"{model}save or download the adapter again; nothing was loaded"


def _some_of_each_kind(problems: Sequence[str], limit: int) -> list[str]:
    """At most `limit` of them in their order, so that many of one kind do not hide those of another."""
    kinds: dict[str, list[int]] = {}
    for index, problem in enumerate(problems):
        kind = problem.partition(":")[0]
        kinds.setdefault(kind if kind in _OF_MODEL else "", []).append(index)
    chosen: set[int] = set()
    for left, members in zip(range(len(kinds), 0, -1), sorted(kinds.values(), key=len), strict=True):
        chosen.update(members[: (limit - len(chosen)) // left])
    return [problem for index, problem in enumerate(problems) if index in chosen]


@dataclass(frozen=True)
class AdapterContents:
    """What a directory holds."""

    directory: Path  # the one with the files, a sub-folder perhaps of the one that was asked for
    described: PEFTConfig
    config_usable: bool  # whether `described` can be relied on
    tensors: dict[str, Tensor]  # by their names in the file, on the CPU
    record: AdapterRecord | None
    problems: tuple[str, ...]
    # size of each tensor in the file, by its name in `tensors`, where it is not the tensor's own
    stored_bytes: Mapping[str, int] = field(default_factory=dict)
    # names of tensors that stand in the file and are left out for one of the problems; None if the file cannot be read
    # at all, so that nothing can be said of single tensors
    unusable: Collection[str] | None = ()


def find_adapter(path: Path | str) -> Path:
    """The directory that holds the adapter: `path` itself, a run's `adapter/`, or its only sub-folder that does.

    Raises:
        ArtifactError: there is none, or several to choose from.
    """
    path = Path(path)
    try:
        if path.is_file() and path.name in (CONFIG_FILE, TENSOR_FILE, PICKLE_FILE):
            path = path.parent
        if not path.is_dir():
            what = "this is a file, not the directory of an adapter" if path.exists() else "there is no such directory"
            raise ArtifactError(what, where=str(path), next_step="give the directory that holds adapter_config.json")
        if (path / CONFIG_FILE).exists():
            return path
        named = sorted((folder for folder in path.iterdir() if (folder / CONFIG_FILE).exists()), key=_by_number)
        begun = (path / "config.toml").exists() and (path / "checkpoints").is_dir()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise ArtifactError(f"cannot be read: {error}", where=str(path)) from None
    if path / _OF_RUN in named:
        return path / _OF_RUN  # what else lies in a run's directory was made of it
    if len(named) == 1:
        return named[0]
    if named:
        raise ArtifactError(
            f"holds several adapters: {name_list(folder.name for folder in named)}",
            where=str(path),
            next_step=f"give one of them, such as {named[-1]}",
        )
    if begun:
        raise ArtifactError(
            "this run has saved no adapter yet",
            where=str(path),
            next_step="wait for its first checkpoint; where it was stopped before, go on with --resume",
        )
    raise ArtifactError(
        f"holds no adapter: there is no {CONFIG_FILE}",
        where=str(path),
        next_step="give the directory that training or PEFT wrote",
    )


_OF_RUN = "adapter"


def _by_number(folder: Path) -> list[str | int]:
    """Checkpoints in their order, step-8 before step-16."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d{1,18})", folder.name)]


def read_adapter_directory(path: Path | str, *, allow_pickle: bool = False) -> AdapterContents:
    """Read configuration, tensors and record of the adapter in `path`.

    Nothing that the files name is imported, and no pickle is opened unless allowed.

    Raises:
        ArtifactError: there is no adapter, or its configuration is not even JSON.
    """
    directory = find_adapter(path)
    raw = read_json_object(directory / CONFIG_FILE)
    described, problems = read_peft_config(raw)
    problems = [f"{CONFIG_FILE}: {problem}" for problem in problems]
    config_usable = not problems
    tensors: dict[str, Tensor] = {}
    unusable: Collection[str] | None = None
    record = None
    try:
        tensors, wrong = _read_factors(directory, allow_pickle)
        unusable = wrong.keys()
        problems += [f"{name}: {what}" for name, what in wrong.items()] + factor_problems(tensors, unusable)
    except ArtifactError as error:
        problems.append(error.one_line)
    try:
        record, changed = _read_record(directory)
        problems += changed
    except ArtifactError as error:
        problems.append(error.one_line)
    return AdapterContents(directory, described, config_usable, tensors, record, tuple(problems), unusable=unusable)


def _read_factors(directory: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, and by name what is wrong with those that are not usable."""
    if (directory / TENSOR_FILE).exists():
        return read_tensors(directory / TENSOR_FILE)
    pickle_file = directory / PICKLE_FILE
    if not pickle_file.exists():
        raise ArtifactError("there is no such file", where=TENSOR_FILE)
    if not allow_pickle:
        raise ArtifactError(
            "a pickle is not opened",
            where=PICKLE_FILE,
            why="it can run code",
            next_step=f"save it with PEFT as {TENSOR_FILE}, or give --allow-pickle",
        )
    return _unpickle(pickle_file)


def _unpickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _refuse_compressed(sum(entry.file_size for entry in archive.infolist()), path.stat().st_size)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except ArtifactError:
        raise
    except Exception as error:  # noqa: BLE001 - a hostile file may make the unpickler raise anything
        raise ArtifactError(
            "is not a pickle of plain tensors", where=PICKLE_FILE, why=first_line(error)[:200]
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise ArtifactError("does not hold a map of names to tensors", where=PICKLE_FILE)
    usable = {name: tensor for name, tensor in found.items() if _is_plain(tensor)}
    wrong = {
        name: f"{tensor.dtype} of shape {tuple(tensor.shape)} is not usable"
        for name, tensor in found.items()
        if name not in usable
    }
    return usable, wrong


def _refuse_compressed(content_bytes: int, file_bytes: int) -> None:
    """torch.save compresses nothing: an archive that holds more than its size is none of its files."""
    if content_bytes > file_bytes:
        raise ArtifactError(
            f"would unpack to {content_bytes:,} bytes, from {file_bytes:,}",
            where=PICKLE_FILE,
            next_step=f"save it with PEFT as {TENSOR_FILE}",
        )


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is floating and holds its elements, each once: a view may claim any shape of one number."""
    if tensor.layout != torch.strided or not tensor.is_floating_point() or not tensor.numel():
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _read_record(directory: Path) -> tuple[AdapterRecord | None, list[str]]:
    """backhand.json, if it is there, and which files are not those it was written for."""
    path = directory / RECORD_FILE
    if not path.exists():
        return None, []
    record = read_record(read_json_object(path), RECORD_FILE)
    contents = {name: _bytes(directory / name) for name in (CONFIG_FILE, TENSOR_FILE)}
    return record, changed_files(record, contents)


def _bytes(path: Path) -> bytes:
    try:
        return read_plain(path)
    except OSError:
        return b""  # what is not there has been said already
