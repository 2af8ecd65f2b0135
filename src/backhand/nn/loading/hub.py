"""Open models of the Hugging Face hub, from the local cache or by download."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path

from backhand.errors import ArtifactError, first_line
from backhand.nn.loading.huggingface import CONFIG_FILE, HuggingFaceDirectory
from backhand.nn.loading.stores import PACKAGED, PACKAGES, SMOLLM2, models_on_this_machine

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
"""Files to download: configuration, weights, chat template and every kind of tokenizer file, but no pickles."""
_IN_FOLDERS = "*/*"
"""Files to skip: subfolders contain the same weights for other programs, as in gpt-oss."""
_SHORTEST_PART = 5
"""Fewest characters of a part of a name that suggest the whole name."""


def open_hub_model(hub_id: str, revision: str | None, *, fetch: bool = True) -> HuggingFaceDirectory:
    """Open a model of the hub, from the local cache if it is complete there.

    Args:
        hub_id: `owner/model`, or `model` for old models.
        revision: branch, tag or commit; the main branch if None.
        fetch: download files that are not cached.

    Raises:
        ArtifactError: if the model is neither cached nor reachable, does not exist, needs access rights, or is damaged.
    """
    try:
        cached = _snapshot(hub_id, revision, local_files_only=True)
    except Exception:  # noqa: BLE001 - if the cache is unusable, downloading gives the better error
        if not fetch:
            raise ArtifactError(f"the model {hub_id} is not in the local cache") from None
        return _opened(_fetched(hub_id, revision), hub_id)
    try:
        return _opened(cached, hub_id)
    except ArtifactError as damaged:
        if not fetch:
            raise
        # An interrupted download leaves an incomplete snapshot, which another download completes.
        try:
            fetched = _fetched(hub_id, revision)
        except ArtifactError:
            raise damaged from None
        return _opened(fetched, hub_id)


def _opened(path: Path, hub_id: str) -> HuggingFaceDirectory:
    return HuggingFaceDirectory(path, hub_id=hub_id, origin=f"{hub_id} at {path.name}")


def suggest_name(name: str) -> str:
    """Return "did you mean …? Else " with the similar names of models on this machine, otherwise ""."""
    stored = {one.name: one.name for one in models_on_this_machine(note=lambda _: None)}
    packaged = {one: model for hub_id, model in PACKAGED.items() for one in (hub_id, model, PACKAGES[model])}
    candidates = {Path(one).name.lower(): meant for one, meant in (packaged | stored).items()}
    with suppress(OSError, ValueError, RuntimeError):  # a NUL character in the name, or `~` of an unknown user
        siblings = Path(name).expanduser().parent.iterdir()
        models = (path for path in siblings if path.suffix == ".gguf" or (path / CONFIG_FILE).is_file())
        candidates |= {path.name.lower(): str(path) for path in models}
    typed = Path(name).name.lower()
    near = difflib.get_close_matches(typed, candidates, cutoff=0.75)
    near = near or [one for one in candidates if len(typed) >= _SHORTEST_PART and typed in one][:3]
    return f"did you mean {' or '.join(dict.fromkeys(map(candidates.__getitem__, near)))}? Else " if near else ""


def _snapshot(hub_id: str, revision: str | None, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=_PATTERNS,
            ignore_patterns=_IN_FOLDERS,
            local_files_only=local_files_only,
        )
    )


def _fetched(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return _snapshot(hub_id, revision, local_files_only=False)
    except Exception as error:  # noqa: BLE001 - the types depend on the HTTP library that the hub client uses
        why = None
        if isinstance(error, GatedRepoError):
            what, next_step = "needs its owner's permission", "request access on the hub, then set HF_TOKEN"
        elif isinstance(error, RevisionNotFoundError):
            what, next_step = f"has no revision {revision}", "give a branch, tag or commit of it"
        elif isinstance(error, RepositoryNotFoundError):
            what = "is not on the hub, or is private"
            next_step = f"{suggest_name(hub_id)}check the spelling, or set HF_TOKEN"
        else:
            what, why = "is neither cached nor reachable", first_line(error)
            suggestion = suggest_name(hub_id)
            next_step = f"{suggestion}connect to the network once, or give a local directory, a .gguf file or {SMOLLM2}"
        raise ArtifactError(f"the model {hub_id} {what}", why=why, next_step=next_step) from None
