"""Checkpoints: written so that a crash or power loss at any moment leaves the previous one whole, the next one absent.

    checkpoints/.tmp-step-N-PID/    every file written and synced, manifest.json last, then the directory synced
    checkpoints/step-N/             the same, renamed; then checkpoints/ synced
    checkpoints/latest              the text `step-N`, replaced in one step after that
    checkpoints/step-N.old/         the former step-N, for the moment in which it is being replaced

A checkpoint is valid if its manifest is, and every file has the size and SHA-256 that the manifest says. Loading takes
the newest valid one. No pickle: the files are safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backhand.errors import ArtifactError
from backhand.files import FileLayer, remove_tree, replace_file, saving
from backhand.json_shape import ShapeError, convert
from backhand.reading import open_plain, read_json, read_settings
from backhand.runs.directory import put_directory

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
_NAME = re.compile(r"step-(\d{1,18})(\.old)?")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose bytes are those its manifest describes."""

    step: int
    contents: Mapping[str, bytes]  # bytes of every file, by name
    # what the manifest says besides: digests of base, configuration and data, and the sampler's position
    facts: Mapping[str, Any]


@dataclass(eq=False)
class CheckpointStore:
    """The checkpoints of one run."""

    directory: Path  # `checkpoints/` of the run; it exists
    files: FileLayer
    warn: Callable[[str], None]  # told, in one sentence, of what was found damaged

    def save(self, step: int, contents: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        """Write a checkpoint of this step, in place of one of the same step if there is one, and point `latest` to it.

        Raises:
            ResourceError: with the bytes needed and free; the checkpoints before are intact, nothing is left over.
        """
        manifest = manifest_bytes(step, contents, facts)
        needed = sum(map(len, contents.values())) + len(manifest)
        place, process = f"step-{step}", os.getpid()
        final, temporary, old = (self.directory / name for name in (place, f".tmp-{place}-{process}", f"{place}.old"))
        with saving(f"the checkpoint of step {step}", self.directory, needed):
            put_directory(self.files, final, {**contents, MANIFEST: manifest}, temporary, old)
            replace_file(self.files, self.directory / LATEST, f"{place}\n".encode())

    def prune(self, newest: int, keep: int, protected: set[int]) -> None:
        """Remove all but `keep` checkpoints, counted down from step `newest`, and the protected steps.

        Later ones can only be damaged ones that the run went back from: they do not count as kept.

        Raises:
            ResourceError: something cannot be removed.
        """
        steps = sorted({step for step, _ in self._found() if step <= newest}, reverse=True)
        for step in steps[keep:]:
            if step not in protected:
                with saving("the list of checkpoints", self.directory, 0):
                    self._remove(f"step-{step}.old")
                    self._remove(f"step-{step}")

    def _remove(self, name: str) -> None:
        """Out of sight in one step first, so that no half of it is ever met under its name."""
        path = self.directory / name
        if os.path.lexists(path):
            doomed = self.directory / f".tmp-removed-{name}-{os.getpid()}"
            remove_tree(self.files, doomed)
            self.files.rename(path, doomed)
            remove_tree(self.files, doomed)

    def clean(self) -> None:
        """Remove what an interrupted save or removal left over. Raises ResourceError."""
        with saving("the list of checkpoints", self.directory, 0):
            for path in sorted(self.directory.iterdir()):
                # A directory in place of the pointer could not be replaced by a file in one step.
                if path.name.startswith(".tmp-") or (path.name == LATEST and path.is_dir()):
                    remove_tree(self.files, path)

    def newest_valid(self, before: int | None = None) -> Checkpoint | None:
        """The newest checkpoint that is whole, at most of step `before`; None where there has never been one.

        Raises:
            ArtifactError: there are checkpoints, and none of them is valid, or one is of a newer format.
        """
        candidates = [(step, path) for step, path in self._found() if before is None or step <= before]
        for step, path in candidates:
            try:
                checkpoint = load_checkpoint(path, step)
            except ArtifactError as error:
                if isinstance(error, NewerFormatError):
                    raise
                self.warn(f"{path.name} is skipped: {error.what}")
                continue
            if before is None:
                self._compare_pointer(step)
            return checkpoint
        if candidates:
            raise ArtifactError(
                f"none of the {len(candidates)} checkpoints is whole",
                where=str(self.directory),
                next_step="start again with --overwrite, or restore the directory from a copy",
            )
        return None

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, whole or not, in order."""
        return sorted({step for step, _ in self._found()})

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of one step. Raises ArtifactError where it is not there or not whole."""
        for found, path in self._found():
            if found == step:
                with suppress(ArtifactError):
                    return load_checkpoint(path, step)
        raise ArtifactError(f"the checkpoint of step {step} is missing or damaged", where=str(self.directory))

    def _compare_pointer(self, step: int) -> None:
        named = latest_name(self.directory) or "nothing"
        if named != f"step-{step}":
            self.warn(f"`latest` names {named:.60}; continuing from step-{step}, the newest checkpoint that is whole")

    def _found(self) -> list[tuple[int, Path]]:
        """(step, directory), newest first; a step's own directory before its former one."""
        found = []
        for path in self.directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                found.append((int(match[1]), match[2] is None, path))
        return [(step, path) for step, _, path in sorted(found, reverse=True)]


def latest_name(checkpoints: Path) -> str:
    """What `latest` names; empty where there is none."""
    try:
        return read_settings(checkpoints / LATEST).strip()
    except OSError:
        return ""


class NewerFormatError(ArtifactError):
    """A checkpoint written by a later version: neither damaged nor readable."""


def manifest_bytes(step: int, contents: Mapping[str, bytes], facts: Mapping[str, Any]) -> bytes:
    """manifest.json: format version, step, size and SHA-256 of each file, the facts, and its own digest."""
    body = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "files": {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in contents.items()},
        "facts": dict(facts),
    }
    return (json.dumps({**body, "manifest_sha256": _body_digest(body)}, indent=1, sort_keys=True) + "\n").encode()


def load_checkpoint(directory: Path, step: int) -> Checkpoint:
    """Read a checkpoint and compare every byte with its manifest.

    Raises:
        ArtifactError: in one sentence, what is missing, torn or different.
    """
    manifest = _read_manifest(directory / MANIFEST)
    if manifest.step != step:
        raise ArtifactError(f"its manifest is of step {manifest.step}", where=str(directory))
    contents: dict[str, bytes] = {}
    for name, described in manifest.files.items():
        path = directory / name
        try:
            with open_plain(path) as file:
                same_size = os.fstat(file.fileno()).st_size == described.bytes
                data = file.read(described.bytes) if same_size else b""
        except OSError as error:
            raise ArtifactError(f"{name} cannot be read: {error.strerror}", where=str(path)) from None
        if not same_size or _sha256(data) != described.sha256:
            raise ArtifactError(f"{name} is not as it was written", where=str(path))
        contents[name] = data
    return Checkpoint(step, contents, manifest.facts)


@dataclass(frozen=True)
class _File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    format_version: int
    step: int
    files: dict[str, _File]
    facts: dict[str, Any]


def _read_manifest(path: Path) -> _Manifest:
    try:
        body = read_json(path, dict[str, Any])
    except FileNotFoundError:
        raise ArtifactError("it has no manifest", where=str(path)) from None
    except OSError as error:
        raise ArtifactError(f"its manifest cannot be read: {error.strerror}", where=str(path)) from None
    except ShapeError:
        raise ArtifactError("its manifest is not a JSON object", where=str(path)) from None
    except ValueError:
        raise ArtifactError("its manifest is not JSON", where=str(path)) from None
    version = body.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise NewerFormatError(
            f"the checkpoint is of format {version}, this version reads up to {FORMAT_VERSION}",
            where=str(path),
            next_step="upgrade Backhand",
        )
    damaged = ArtifactError("its manifest is damaged", where=str(path))
    if body.pop("manifest_sha256", None) != _body_digest(body):
        raise damaged
    try:
        manifest = convert(body, _Manifest)
    except ShapeError as error:
        damaged.why = str(error)
        raise damaged from None
    if not all(map(_FILE_NAME.fullmatch, manifest.files)):
        raise damaged
    return manifest


def _body_digest(body: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
