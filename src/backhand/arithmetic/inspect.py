"""`backhand inspect`: what is in an adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from backhand.adapters.adapter_record import wrong_base
from backhand.adapters.checked_base import weight_names
from backhand.adapters.digests import base_digest
from backhand.arithmetic.adapter_factors import AdapterFactors, read_factors
from backhand.arithmetic.findings import leave_findings
from backhand.arithmetic.inspection import ModuleInspection, Part, file_parts, inspect_modules, inspection_facts
from backhand.arithmetic.look_options import InspectOptions
from backhand.arithmetic.tables import by_kind, print_table, spread
from backhand.errors import ArtifactError
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.smollm2 import HUB_ID, NAME
from backhand.nn.loading.source import ModelSource
from backhand.terminal import console_for_tables


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        adapter: its factors.
        modules: one by one.
        parts: of the file of tensors.
        error: that the needed ranks are for.
        notes: what a person should know.
    """

    adapter: AdapterFactors
    modules: tuple[ModuleInspection, ...]
    parts: tuple[Part, ...]
    error: float
    notes: tuple[str, ...]


def inspect_adapter(options: InspectOptions) -> Inspection:
    """Look at an adapter.

    Raises:
        UsageError: an option out of range.
        ArtifactError: the adapter cannot be read, or it does not belong to `model`.
    """
    options.validate()
    base = None if options.model is None else open_model(options.model)
    adapter = read_factors(options.adapter, base, allow_pickle=options.reading.allow_pickle)
    notes = list(adapter.described.notes)
    if base is not None:
        notes += _hold_against(base, adapter, force=options.force_base)
        modules = inspect_modules(adapter, options.error, base)
    else:
        try:
            base = _named_base(adapter)
            if base is not None:
                _hold_against(base, adapter, force=options.force_base)
            modules = inspect_modules(adapter, options.error, base)
        except ArtifactError as error:
            notes.append(f"no norms of base weights: {error.what}{f' ({error.why})' if error.why else ''}")
            modules = inspect_modules(adapter, options.error, None)
    return Inspection(adapter, tuple(modules), tuple(file_parts(adapter)), options.error, tuple(notes))


def _named_base(adapter: AdapterFactors) -> ModelSource | None:
    """The base model that the adapter names, if it is on this machine; nothing is fetched."""
    name = adapter.described.base_model
    if name is None:
        return None
    if name == HUB_ID:
        try:
            return open_model(NAME)
        except ArtifactError:
            pass  # then perhaps from the hub's cache
    return open_model(name, revision=adapter.described.revision, fetch=False)


def _hold_against(base: ModelSource, adapter: AdapterFactors, *, force: bool) -> list[str]:
    """Refuse weights other than those the adapter was trained on; only they matter here."""
    recorded = adapter.record.base_digest if adapter.record else None
    names = list(weight_names(adapter.modules, base.tensor_names()))
    if recorded is None or not names or base_digest(names, base.load) == recorded:
        return []
    different = [f"base model: the adapted weights of {base.path} are not those the adapter was trained on"]
    if not force:
        raise wrong_base(different, str(adapter.directory))
    return [f"used by force: {sentence}" for sentence in different]


def inspect_command(options: InspectOptions) -> Inspection:
    """`inspect_adapter`, printed as tables, or as one JSON object with `json`; files as asked for."""
    result = inspect_adapter(options)

    def picture() -> bytes:
        from backhand.arithmetic.pictures import draw_inspection

        return draw_inspection(result.modules, result.adapter.label, result.error)

    leave_findings(
        "inspect",
        inspection_summary(result),
        lambda: _print(result),
        picture,
        as_json=options.json,
        plot=options.plot,
        output=options.output,
        notes=result.notes,
    )
    return result


def inspection_summary(result: Inspection) -> dict[str, Any]:
    """Everything in numbers, as `--json` and inspect.json give it."""
    return {
        "label": result.adapter.label,
        **{name.replace(" ", "_").replace("-", "_"): fact for name, fact in inspection_facts(result.adapter).items()},
        "error": result.error,
        "stored_bytes": result.adapter.stored_bytes,
        "parts": [asdict(part) for part in result.parts],
        "modules": [
            asdict(module) | {"relative_norm": module.relative_norm, "wasted_rank": module.wasted_rank}
            for module in result.modules
        ],
        "notes": list(result.notes),
    }


def _print(result: Inspection) -> None:
    console = console_for_tables()
    for name, fact in inspection_facts(result.adapter).items():
        shown = f"{fact:,}" if isinstance(fact, int) and not isinstance(fact, bool) else str(fact)
        console.print(f"{name:>16}: {shown}", markup=False, soft_wrap=True)
    of = {module.module: module for module in result.modules}
    rows = []
    for kind, names in by_kind(of).items():
        modules = [of[name] for name in names]
        rows.append(
            (
                kind,
                str(len(names)),
                spread(module.rank for module in modules),
                spread(module.scaling for module in modules),
                spread(module.norm for module in modules),
                spread(module.relative_norm for module in modules),
                spread(module.effective_rank for module in modules),
                spread(module.needed_rank for module in modules),
                spread(module.wasted_rank for module in modules),
            )
        )
    columns = ("module", "modules", "rank", "scaling", "‖ΔW‖", "‖ΔW‖/‖W‖", "effective rank")
    needed = f"rank for {result.error:g}"
    print_table(console, f"{result.adapter.label}, least … greatest", (*columns, needed, "wasted"), rows)
    total = result.adapter.stored_bytes
    print_table(
        console,
        f"The file of tensors: {total:,} bytes",
        ("part", "tensors", "bytes", "share"),
        [
            (part.name, f"{part.tensors or ''}", f"{part.stored_bytes:,}", f"{part.stored_bytes / total:.1%}")
            for part in result.parts
        ],
    )
