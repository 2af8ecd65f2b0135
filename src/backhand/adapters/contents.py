"""Read the files of one adapter, which may be damaged or hostile, and check them as far as possible without a model."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backhand.adapters.peft_config import PEFTConfig, read_peft_config
from backhand.adapters.peft_keys import PREFIX, factor_problems
from backhand.adapters.record import AdapterRecord, changed_files, read_record
from backhand.adapters.record_shapes import head_problems
from backhand.errors import ArtifactError, first_line, short_reason
from backhand.reading import MAX_SETTINGS_BYTES, kind_of, read_plain
from backhand.words import name_list, nearest_names

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
RECORD_FILE = "backhand.json"
CLASSIFIER_FILE = "config.json"
CARD_FILE = "README.md"
_SHOWN_PROBLEMS = 40
_OF_MODEL = ("missing", "unexpected")
"""First words of problems that may be caused by another base model."""


class UnusableAdapterError(ArtifactError):
    """An adapter that cannot be used, with all its problems.

    Attributes:
        problems: one sentence each; the message shows forty of them.
    """

    def __init__(
        self,
        directory: Path,
        problems: Sequence[str],
        base_model: str | None = None,
        next_step: str | None = None,
        *,
        what: str | None = None,
        why: str | None = None,
    ) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        shown = _some_of_each_kind(self.problems, _SHOWN_PROBLEMS)
        if count > len(shown):
            shown.append(f"and {count - len(shown)} more")
        super().__init__(
            what or f"the adapter cannot be used: {count} problem{'s' if count > 1 else ''}",
            where=str(directory),
            why=why or "".join(f"\n    - {problem}" for problem in shown),
            next_step=next_step or _next_step(self.problems, base_model),
        )


def _next_step(problems: Sequence[str], base_model: str | None) -> str:
    """Return the next step: tensors that do not fit may belong to another model, other problems are in the files."""
    of_model = any(problem.startswith(_OF_MODEL) or "by configuration and model" in problem for problem in problems)
    named = f", {base_model}" if base_model else ""
    model = f"give the base model it was trained on{named}, or " if of_model else ""
    return f"{model}save or download the adapter again; nothing was loaded"


def _some_of_each_kind(problems: Sequence[str], limit: int) -> list[str]:
    """Return at most `limit` problems in order, such that many of one kind do not hide those of another."""
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
    """Contents of an adapter's files."""

    directory: Path  # the directory with the files, perhaps a subfolder of the given one
    described: PEFTConfig
    config_usable: bool  # False if `described` contains defaults for unusable fields
    tensors: dict[str, Tensor]  # by name in the file, on the CPU
    record: AdapterRecord | None
    problems: tuple[str, ...]
    # size of each tensor in the file, by its name in `tensors`, if it differs from the tensor's size
    stored_bytes: Mapping[str, int] = field(default_factory=dict)
    # names of tensors in the file that are left out because of a problem; None if the file cannot be read at all
    unusable: Collection[str] | None = ()


def _nearest_path(path: Path) -> Path | None:
    """Return an existing path that differs from a missing one in one misspelt part, or None."""
    missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), None)
    if missing is None or not missing.parent.is_dir():
        return None
    try:
        siblings = [sibling.name for sibling in missing.parent.iterdir()]
    except OSError:  # a directory that may be entered, but not listed
        return None
    paths = (missing.with_name(name) / path.relative_to(missing) for name in nearest_names(missing.name, siblings))
    return next((near for near in paths if near.exists()), None)


def find_adapter(path: Path | str) -> Path:
    """Return the adapter's directory: `path` itself, a run's `adapter/`, or the only subfolder with an adapter.

    Raises:
        ArtifactError: if there is no adapter, or more than one.
    """
    path = Path(path)
    try:
        if path.is_file() and path.name in (CONFIG_FILE, TENSOR_FILE, PICKLE_FILE):
            path = path.parent
        if not path.is_dir():
            what = "this is a file, not the directory of an adapter" if path.exists() else "there is no such directory"
            near = _nearest_path(path)
            next_step = f"did you mean {near}?" if near else "give the directory that holds adapter_config.json"
            raise ArtifactError(what, where=str(path), next_step=next_step)
        if (path / CONFIG_FILE).exists():
            return path
        named = sorted((folder for folder in path.iterdir() if (folder / CONFIG_FILE).exists()), key=_by_number)
        is_run = (path / "config.toml").exists() and (path / "checkpoints").is_dir()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise ArtifactError(f"cannot be read: {short_reason(error)}", where=str(path)) from None
    if path / _OF_RUN in named:
        return path / _OF_RUN  # other adapters in a run's directory were derived from it
    if len(named) == 1:
        return named[0]
    if named:
        raise ArtifactError(
            f"contains several adapters: {name_list(folder.name for folder in named)}",
            where=str(path),
            next_step=f"give one of them, such as {named[-1]}",
        )
    if is_run:
        raise ArtifactError(
            "this run has saved no adapter yet",
            where=str(path),
            next_step="wait for its first checkpoint; if it was stopped before, continue it with --resume",
        )
    raise ArtifactError(
        f"contains no adapter: there is no {CONFIG_FILE}",
        where=str(path),
        next_step="give the directory that training or PEFT wrote",
    )


_OF_RUN = "adapter"


def _by_number(folder: Path) -> list[str | int]:
    """Return a sort key that puts step-8 before step-16."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d{1,18})", folder.name)]


def read_adapter_directory(path: Path | str, *, allow_pickle: bool = False) -> AdapterContents:
    """Read configuration, tensors and record of the adapter in `path`.

    Nothing that the files name is imported, and no pickle is opened unless allowed.

    Raises:
        ArtifactError: if there is no adapter, or its configuration is not JSON.
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
        if record is not None and unusable is not None:
            shapes = {key.removeprefix(PREFIX): tuple(tensor.shape) for key, tensor in tensors.items()}
            problems += [f"{RECORD_FILE}: {one}" for one in head_problems(record.classification, shapes)]
    except ArtifactError as error:
        problems.append(error.one_line)
    return AdapterContents(directory, described, config_usable, tensors, record, tuple(problems), unusable=unusable)


def _read_factors(directory: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, and the problems of unusable tensors by name."""
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
        raise ArtifactError("does not contain a map of names to tensors", where=PICKLE_FILE)
    usable = {name: tensor for name, tensor in found.items() if _is_plain(tensor)}
    wrong = {
        name: f"{tensor.dtype} of shape {tuple(tensor.shape)} is not usable"
        for name, tensor in found.items()
        if name not in usable
    }
    return usable, wrong


def _refuse_compressed(content_bytes: int, file_bytes: int) -> None:
    """Refuse archives that contain more than their size: torch.save does not compress."""
    if content_bytes > file_bytes:
        raise ArtifactError(
            f"would unpack to {content_bytes:,} bytes, from {file_bytes:,}",
            where=PICKLE_FILE,
            next_step=f"save it with PEFT as {TENSOR_FILE}",
        )


def _is_plain(tensor: Tensor) -> bool:
    """Return True if the tensor is floating and owns each of its elements; a view may claim any shape of one number."""
    if tensor.layout != torch.strided or not tensor.is_floating_point() or not tensor.numel():
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _read_record(directory: Path) -> tuple[AdapterRecord | None, list[str]]:
    """Return the record in backhand.json, if there is one, and a sentence per file that has changed since."""
    path = directory / RECORD_FILE
    if not path.exists():
        return None, []
    record = read_record(read_json_object(path), RECORD_FILE)
    contents = dict.fromkeys((CONFIG_FILE, TENSOR_FILE), b"")
    for name in contents:
        with suppress(OSError):  # missing files have been reported already
            contents[name] = read_plain(directory / name)
    with suppress(OSError):  # exports for sentence-transformers leave it out
        if CLASSIFIER_FILE in record.files:
            contents[CLASSIFIER_FILE] = read_plain(directory / CLASSIFIER_FILE)
    return record, changed_files(record, contents)


# Strict reading and writing of safetensors and JSON files, which may be damaged or hostile.
#
#     8 bytes   length n of the header, little-endian
#     n bytes   JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …, "__metadata__": {…}}
#     the rest  the tensors, without holes or overlaps

# The safetensors package is not used, so that errors name the tensor, memory is bounded by the size of the file, and
# duplicate names and other dtypes are refused.


_MOST_DIMENSIONS = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors package; a parsed header takes many times its length in memory."""

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a file in their stored dtype.

    Returns:
        floating tensors by name, in the order of the file; and the problems of the other tensors by name. These are
        empty, or have a dtype other than F64, F32, F16 and BF16.

    Raises:
        ArtifactError: if the file cannot be read, is not a safetensors file, or is damaged.
    """
    try:
        data = bytearray(read_plain(path))
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    header, start = _header(data, str(path))
    tensors: dict[str, Tensor] = {}
    problems: dict[str, str] = {}
    end = 0
    in_order = sorted(header.items(), key=lambda entry: _offsets(entry[1], str(path), entry[0]))
    described = start + max((entry["data_offsets"][1] for _, entry in in_order), default=0)
    if described != len(data):
        raise _damaged(path, f"{len(data)} bytes are there where the header describes {described}")
    for name, entry in in_order:
        begin, stop = _offsets(entry, str(path), name)
        if begin != end:
            raise _damaged(path, f"the data of {name} begins at byte {begin}, where {end} was expected")
        end = stop
        shape = _shape(entry, str(path), name)
        dtype = _DTYPES.get(str(entry.get("dtype")))
        if dtype is None:
            problems[name] = f"stored as {entry.get('dtype')!s:.20}, which is not a floating type"
            continue
        if math.prod(shape) * dtype.itemsize != stop - begin:
            raise _damaged(path, f"{name} of shape {shape} in {entry['dtype']} does not fit its {stop - begin} bytes")
        if begin == stop:
            problems[name] = f"shape {shape} holds no element"
            continue
        tensors[name] = torch.frombuffer(data[start + begin : start + stop], dtype=dtype).view(shape)
    return tensors, problems


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the bytes of a safetensors file; the same tensors give the same bytes."""
    from safetensors.torch import save

    data: bytes = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    return data


def _header(data: bytearray, where: str) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(data[:8], "little")
    complete = 0 < length <= len(data) - 8
    # A length may spell the mark of another kind of file (640 is 80 02, as a pickle begins), but none has a brace next.
    if not (complete and data[8:9] == b"{") and (kind := kind_of(bytes(data[:512]))):
        raise ArtifactError(f"this is {kind}, not a safetensors file", where=where)
    if length > MAX_HEADER_BYTES and complete:
        raise ArtifactError(f"a header of {length:,} bytes is too long", where=where, next_step=_AGAIN)
    if not complete:
        short = "it is only {} bytes long" if len(data) < 8 else "its header is cut off after {} bytes"
        raise ArtifactError(
            "this is not a complete safetensors file", where=where, why=short.format(len(data)), next_step=_AGAIN
        )
    try:
        header = parse_json_object(bytes(data[8 : 8 + length]), where)
    except ArtifactError as error:
        raise ArtifactError(
            f"this is not a safetensors file: its header {error.what}", where=where, why=error.why, next_step=_AGAIN
        ) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactError("the metadata in its header is not a map of strings", where=where)
    return header, 8 + length


def _offsets(entry: Any, where: str, name: str) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise ArtifactError(f"the header entry of {name} is malformed", where=where, next_step=_AGAIN)
    begin, stop = offsets
    if begin > stop:
        raise ArtifactError(f"the data of {name} ends before it begins", where=where, next_step=_AGAIN)
    return begin, stop


def _shape(entry: dict[str, Any], where: str, name: str) -> tuple[int, ...]:
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(_is_count(size) for size in shape):
        raise ArtifactError(f"the shape of {name} is malformed", where=where, next_step=_AGAIN)
    return tuple(shape)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError("the file is damaged", where=str(path), why=why, next_step=_AGAIN)


_AGAIN = "copy or download the file again"


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Also refused, although Python's parser accepts them: a byte-order mark, duplicate keys, NaN and Infinity, lone
    surrogates, nesting that exhausts the stack, and files above 8 MiB.

    Raises:
        ArtifactError: if the file cannot be read, or is not such an object.
    """
    try:
        data = read_plain(path, MAX_SETTINGS_BYTES)
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    if kind := kind_of(data[:512]):
        raise ArtifactError(f"this is {kind}, not a JSON file", where=str(path))
    return parse_json_object(data, str(path))


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse bytes as `read_json_object` does; `where` names them in errors."""
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ArtifactError("begins with a byte-order mark, which JSON does not have", where=where)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_NotJSON)
        # A lone surrogate passes the parser, but could not be written again.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # UnicodeError and JSONDecodeError are ValueErrors
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        again = "restore or download the file again"
        raise ArtifactError("is not JSON", where=where, why=why, next_step=again) from None
    if not isinstance(value, dict):
        raise ArtifactError(f"contains {_json_name(value)}, not an object", where=where)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} occurs twice")
        if _holds_constant(value):
            raise ValueError(f"{key} is {value}, which is not a JSON value")
        found[key] = value
    return found


class _NotJSON(str):
    """A constant such as NaN or Infinity, which is not JSON; it is reported with its key."""

    __slots__ = ()


def _holds_constant(value: Any) -> bool:
    return isinstance(value, _NotJSON) or (isinstance(value, list) and any(map(_holds_constant, value)))


def _json_name(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return "a string"
    return "null" if value is None else f"the value {value!r}"
