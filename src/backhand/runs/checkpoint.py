"""Checkpoints. A crash or power loss at any moment leaves the previous checkpoint intact, and no partial one.

    checkpoints/.tmp-step-N-PID/    every file is written and synced, manifest.json last, then the directory is synced
    checkpoints/step-N/             the same directory, renamed; then checkpoints/ is synced
    checkpoints/latest              the text `step-N`, replaced atomically after that
    checkpoints/step-N.old/         the former step-N, while it is being replaced

A checkpoint is valid if its manifest is valid and every file has the size and SHA-256 in the manifest. The newest valid
checkpoint is loaded. The files are safetensors and JSON; nothing is unpickled.
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
from backhand.files import FileLayer, remove_tree, replace_file, save_errors
from backhand.json_shape import ShapeError, convert
from backhand.reading import open_plain, read_json, read_settings
from backhand.runs.directory import CHECKPOINTS, put_directory

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
_NAME = re.compile(r"step-(\d{1,18})(\.old)?")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files match its manifest."""

    step: int
    contents: Mapping[str, bytes]  # bytes of every file, by name
    # further entries of the manifest: digests of base, configuration and data, and the sampler's position
    facts: Mapping[str, Any]


@dataclass(eq=False)
class CheckpointStore:
    """The checkpoints of one run."""

    directory: Path  # the run's existing `checkpoints/`
    files: FileLayer
    warn: Callable[[str], None]  # called with a sentence about each damaged checkpoint

    def save(self, step: int, contents: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step, replacing an existing one, and point `latest` to it.

        Raises:
            ResourceError: with the bytes needed and free. Earlier checkpoints are intact, and nothing is left over.
        """
        manifest = manifest_bytes(step, contents, facts)
        needed = sum(map(len, contents.values())) + len(manifest)
        place, process = f"step-{step}", os.getpid()
        final, temporary, old = (self.directory / name for name in (place, f".tmp-{place}-{process}", f"{place}.old"))
        with save_errors(f"the checkpoint of step {step}", self.directory, needed):
            put_directory(self.files, final, {**contents, MANIFEST: manifest}, temporary, old)
            replace_file(self.files, self.directory / LATEST, f"{place}\n".encode())

    def prune(self, newest: int, keep: int, protected: set[int]) -> None:
        """Remove checkpoints, except the last `keep` up to step `newest`, and the protected steps.

        Checkpoints after `newest` are damaged ones that the run went back from. They are neither counted nor removed.

        Raises:
            ResourceError: a checkpoint cannot be removed.
        """
        steps = sorted({step for step, _ in self._candidates() if step <= newest}, reverse=True)
        for step in steps[keep:]:
            if step not in protected:
                with save_errors("the list of checkpoints", self.directory, 0):
                    self._remove(f"step-{step}.old")
                    self._remove(f"step-{step}")

    def _remove(self, name: str) -> None:
        path = self.directory / name
        if os.path.lexists(path):
            # Renamed first, so that a partial checkpoint never has the name of a whole one.
            renamed = self.directory / f".tmp-removed-{name}-{os.getpid()}"
            remove_tree(self.files, renamed)
            self.files.rename(path, renamed)
            remove_tree(self.files, renamed)

    def clean(self) -> None:
        """Remove the leftovers of an interrupted save or removal. Raises ResourceError."""
        with save_errors("the list of checkpoints", self.directory, 0):
            for path in sorted(self.directory.iterdir()):
                # A directory named `latest` could not be replaced by a file atomically.
                if path.name.startswith(".tmp-") or (path.name == LATEST and path.is_dir()):
                    remove_tree(self.files, path)

    def newest_valid(self, before: int | None = None) -> Checkpoint | None:
        """Return the newest valid checkpoint, up to step `before`, or None if there are no checkpoints.

        Raises:
            ArtifactError: no checkpoint is valid, or one has a newer format.
        """
        candidates = [(step, path) for step, path in self._candidates() if before is None or step <= before]
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
                next_step="start again with --overwrite, or restore the directory from a backup",
            )
        return None

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, valid or not, in ascending order."""
        return sorted({step for step, _ in self._candidates()})

    def load(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step. Raises ArtifactError: it is missing or damaged."""
        for candidate, path in self._candidates():
            if candidate == step:
                with suppress(ArtifactError):
                    return load_checkpoint(path, step)
        raise ArtifactError(f"the checkpoint of step {step} is missing or damaged", where=str(self.directory))

    def _compare_pointer(self, step: int) -> None:
        named = latest_name(self.directory) or "nothing"
        if named != f"step-{step}":
            self.warn(f"`latest` names {named:.60}; continuing from step-{step}, the newest checkpoint that is whole")

    def _candidates(self) -> list[tuple[int, Path]]:
        """Return (step, directory), newest first; a step's directory comes before its `.old` one."""
        candidates = []
        for path in self.directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                candidates.append((int(match[1]), match[2] is None, path))
        return [(step, path) for step, _, path in sorted(candidates, reverse=True)]


def latest_name(checkpoints: Path) -> str:
    """Return the name in `latest`, or "" if there is none."""
    try:
        return read_settings(checkpoints / LATEST).strip()
    except OSError:
        return ""


def newest_checkpoint(run: Path) -> Path | None:
    """Return the directory of a run's newest checkpoint, or None if there is none yet."""
    name = latest_name(run / CHECKPOINTS)
    return run / CHECKPOINTS / name if re.fullmatch(r"step-\d{1,18}", name) else None


class NewerFormatError(ArtifactError):
    """A checkpoint of a later version, which is not damaged but cannot be read."""


def manifest_bytes(step: int, contents: Mapping[str, bytes], facts: Mapping[str, Any]) -> bytes:
    """Return manifest.json: format version, step, size and SHA-256 of each file, the facts, and its own digest."""
    body = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "files": {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in contents.items()},
        "facts": dict(facts),
    }
    return (json.dumps({**body, "manifest_sha256": _body_digest(body)}, indent=1, sort_keys=True) + "\n").encode()


def load_checkpoint(directory: Path, step: int) -> Checkpoint:
    """Read a checkpoint and compare every file with its manifest.

    Raises:
        ArtifactError: a file is missing, cut short or different.
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
