"""End-of-sequence token ids in configurations."""

from __future__ import annotations

from backhand.errors import ArtifactError


def token_ids(stated: object) -> list[int]:
    """Return the ids in an `eos_token_id` value: an integer, a list of integers, or None.

    Raises:
        ArtifactError: if the value is anything else.
    """
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in ids):
        raise ArtifactError(
            f"eos_token_id = {stated!r} is neither a token id nor a list of them",
            where="config.json or generation_config.json",
            next_step="write the id of the token that ends a text there, or remove the key",
        )
    return list(ids)
