"""Models by hub id: from the local cache if they are there, else fetched into it."""

from __future__ import annotations

import re
from pathlib import Path

from backhand.errors import ArtifactError
from backhand.nn.loading.huggingface_directory import HuggingFaceDirectory
from backhand.nn.loading.smollm2 import NAME

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
"""Configuration, weights, chat template and every kind of tokenizer file; no pickles."""


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/model` or `model`."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name


def open_hub_model(hub_id: str, revision: str | None, *, fetch: bool = True) -> HuggingFaceDirectory:
    """A model of the hub.

    Args:
        hub_id: `owner/model`, or `model` for old ones.
        revision: branch, tag or commit; the main branch if None.
        fetch: whether to ask the hub for what is not cached.

    Raises:
        ArtifactError: if it is neither cached nor reachable, does not exist, needs access rights, or is damaged.
    """
    try:
        cached = _snapshot(hub_id, revision, local_files_only=True)
    except Exception:  # noqa: BLE001 - whatever is wrong with the cache, fetching says it better
        if not fetch:
            raise ArtifactError(f"the model {hub_id} is not in the local cache") from None
        return _opened(_fetched(hub_id, revision), hub_id)
    try:
        return _opened(cached, hub_id)
    except ArtifactError as damaged:
        if not fetch:
            raise
        # A download that was broken off leaves a snapshot without all of its files; fetching completes it.
        try:
            fetched = _fetched(hub_id, revision)
        except ArtifactError:
            raise damaged from None
        return _opened(fetched, hub_id)


def _opened(path: Path, hub_id: str) -> HuggingFaceDirectory:
    return HuggingFaceDirectory(path, hub_id=hub_id, origin=f"{hub_id} at {path.name}")


def _snapshot(hub_id: str, revision: str | None, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(hub_id, revision=revision, allow_patterns=_PATTERNS, local_files_only=local_files_only)
    )


def _fetched(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return _snapshot(hub_id, revision, local_files_only=False)
    except Exception as error:  # noqa: BLE001 - the network's errors are those of whichever HTTP library the hub client uses
        why = None
        if isinstance(error, GatedRepoError):
            what, next_step = "needs its owner's permission", "ask for it on the hub, then set HF_TOKEN"
        elif isinstance(error, RevisionNotFoundError):
            what, next_step = f"has no revision {revision}", "name a branch, tag or commit of it"
        elif isinstance(error, RepositoryNotFoundError):
            what, next_step = "is not on the hub, or is private", "check the spelling, or set HF_TOKEN"
        else:
            what, why = "is neither cached nor reachable", _first_line(error)
            next_step = f"connect to the network once, or give a local directory or .gguf file, or {NAME}"
        raise ArtifactError(f"the model {hub_id} {what}", why=why, next_step=next_step) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
