"""What a target format cannot express is refused module by module, and a merged model offered in its place."""

from __future__ import annotations

from collections.abc import Mapping

from backhand.errors import ArtifactError

_SHOWN = 12


def refuse(target: str, reasons: Mapping[str, str], *, merge: bool = True) -> None:
    """Do nothing if there is no reason.

    Args:
        target: the format, as `--to` names it.
        reasons: by module.
        merge: whether `--merge` would help.

    Raises:
        ArtifactError: names the modules, why each cannot be expressed, and what to do.
    """
    if not reasons:
        return
    raise ArtifactError(
        f"{len(reasons)} adapted module{'s' if len(reasons) > 1 else ''} cannot be expressed in this format",
        where=f"to {target}",
        why=_by_reason(reasons),
        next_step="give --merge: a merged model holds any update" if merge else "export to another format",
    )


def _by_reason(reasons: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for module, reason in reasons.items():
        by_reason.setdefault(reason, []).append(module)
    lines = []
    for reason, modules in by_reason.items():
        more = f" and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else ""
        lines.append(f"\n    - {', '.join(modules[:_SHOWN])}{more}: {reason}")
    return "".join(lines)
