r"""Match a configuration with a model's modules, by PEFT's rules; names that match nothing are errors.

- a list of names: a module whose path is a name, or ends with `.name`;
- a string: one regular expression for the whole path;
- `all-linear`: every linear layer except the output head;
- `target_parameters`: a parameter of experts whose path is a name, or ends with `.name`; exclusions and numbers of
  layers apply to modules only, as in PEFT, but `layers` applies to both;
- `exclude_modules` (same two forms) excludes modules;
- `modules_to_save` excludes modules that are trained in full, and all modules within them;
- `layers_to_transform` keeps the modules whose layer number, the first number in the path, is listed; a name that is a
  whole path is not filtered;
- `rank_pattern`, `alpha_pattern`: the first key for which `(.*\.)?(key)$` matches the path wins.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from backhand.adapters.config import ALL_LINEAR, LoRAConfig
from backhand.adapters.trained_tensors import resolve_trained
from backhand.bounds import comma_list
from backhand.errors import UsageError
from backhand.nn.lora_parameters import AdapterLayout, LoRASlot
from backhand.nn.module_shapes import ModuleShapes
from backhand.words import name_list, nearest_names, shorten

OUTPUT_HEADS = ("lm_head",)
_LAYER_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclass(frozen=True)
class Target:
    """One module to adapt: its path, and the rank, alpha and scaling of its factors."""

    name: str
    rank: int
    alpha: float
    scaling: float


def resolve_adapter(
    config: LoRAConfig, module_shapes: Mapping[str, tuple[int, int]], *, heads: Collection[str] = OUTPUT_HEADS
) -> AdapterLayout:
    """Return all that `config` trains on a model.

    Args:
        module_shapes: (out, in) of every linear module, by dotted path; a `ModuleShapes` also has embeddings.
        heads: paths that `all-linear` leaves out; naming one in `target_modules` adapts it.

    Returns:
        one slot per module, in the order of `module_shapes`, then embeddings, then parameters of experts; and the
        tensors that are trained directly.

    Raises:
        UsageError: if a value is out of range, a name or pattern matches nothing (names the nearest ones), or an
            embedding has `lora_bias`; and as `trained_tensors.resolve_trained`.
    """
    shapes = ModuleShapes.of(module_shapes)
    modules, parameters = [*shapes, *shapes.embeddings], list(shapes.experts)
    targets = resolve_targets(config, modules, linear=shapes, heads=heads, parameters=parameters)
    return adapter_layout(config, shapes, targets)


def adapter_layout(
    config: LoRAConfig, shapes: ModuleShapes, targets: Sequence[Target], *, strict: bool = True
) -> AdapterLayout:
    """Return the layout of resolved targets; `strict` and errors as in `resolve_trained`."""
    slots = tuple(_slot(target, shapes, config) for target in targets)
    trained = resolve_trained(
        config,
        shapes.parameters,
        next(iter(shapes.embeddings), None),
        tied=shapes.tied,
        frozen=shapes.frozen,
        targets=[slot.name for slot in slots],
        strict=strict,
    )
    return AdapterLayout(slots, tuple(trained))


def _slot(target: Target, shapes: ModuleShapes, config: LoRAConfig) -> LoRASlot:
    name, rank, scaling = target.name, target.rank, target.scaling
    if name in shapes.experts:
        experts, out_features, in_features = shapes.experts[name]
        slot = LoRASlot(name, in_features, out_features, rank, scaling, experts=experts)
        return replace(slot, interleaved=name in shapes.interleaved)
    embedding = name in shapes.embeddings
    if embedding and config.lora_bias:
        raise no_embedding_bias(name)
    in_features, out_features = shapes.embeddings[name] if embedding else shapes[name][::-1]
    dropout = 0.0 if embedding else config.dropout
    slot = LoRASlot(name, in_features, out_features, rank, scaling, dropout, config.use_dora, config.lora_bias)
    return replace(slot, embedding=embedding)


def no_embedding_bias(name: str) -> UsageError:
    """Return the error for an embedding with `lora_bias`, which PEFT does not have."""
    return UsageError(
        f"{name} is an embedding, and lora_bias is not for embeddings",
        where="lora_bias",
        next_step="leave the embedding out of target_modules, or leave out lora_bias",
    )


def resolve_targets(
    config: LoRAConfig,
    names: Sequence[str],
    *,
    linear: Collection[str] | None = None,
    heads: Collection[str] = OUTPUT_HEADS,
    parameters: Sequence[str] = (),
    strict: bool = True,
) -> list[Target]:
    """Match a configuration against module paths.

    Args:
        linear: the paths of `all-linear`; all paths if None.
        heads: paths that `all-linear` leaves out.
        strict: raise for a name or pattern that matches nothing; a configuration without any match always raises.

    Returns:
        one target per module, in the order of `names`, then one per parameter.

    Raises:
        UsageError: if a value is out of range, or a name is unmatched.
    """
    config.validate()
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        chosen = [name for name in names if (linear is None or name in linear) and name not in heads]
    else:
        chosen = _named(config.target_modules, names, "target_modules", strict)
    parameter_paths = targeted_parameters(config, parameters, strict=strict)
    if config.layers:
        numbers = {
            name: number for name in [*chosen, *parameter_paths] if (number := _layer_number(name, ())) is not None
        }
        wanted = _numbers(config.layers, max(numbers.values(), default=-1) + 1)
        chosen, parameter_paths = (
            [name for name in some if numbers.get(name) in wanted] for some in (chosen, parameter_paths)
        )
    if config.layers_to_transform is not None:
        chosen = _in_layers(config, chosen, strict)
    if config.exclude_modules:
        excluded = set(_named(config.exclude_modules, names, "exclude_modules", strict))
        chosen = [name for name in chosen if name not in excluded]
    chosen = [name for name in chosen if not within(name, config.modules_to_save)]
    if not chosen and not parameter_paths:
        raise UsageError(
            f"{_shown(config.target_modules)} leaves no module to adapt",
            where="target_modules",
            why=f"the model has {name_list(_last_parts(names))}" if names else "the model has no module to adapt",
            next_step=f"name some of these, or give {ALL_LINEAR}",
        )
    return module_values(config, [*chosen, *parameter_paths], strict=strict)


def targeted_parameters(config: LoRAConfig, names: Sequence[str], *, strict: bool = False) -> list[str]:
    """Return the paths among `names` that `target_parameters` selects.

    Raises:
        UsageError: if `strict`, for a name that selects no path.
    """
    return _named(config.target_parameters, names, "target_parameters", strict) if config.target_parameters else []


def module_values(config: LoRAConfig, chosen: Sequence[str], *, strict: bool) -> list[Target]:
    """Return rank, alpha and scaling of the chosen modules.

    Raises:
        UsageError: if a pattern is no regular expression, or, with `strict`, matches no module.
    """
    ranks = _first_match(config.rank_pattern, chosen, "rank_pattern", strict)
    alphas = _first_match(config.alpha_pattern, chosen, "alpha_pattern", strict)
    targets = []
    for name in chosen:
        rank, alpha = ranks.get(name, config.rank), alphas.get(name, config.alpha)
        targets.append(Target(name, int(rank), alpha, config.scaling_of(int(rank), alpha)))
    return targets


def within(name: str, modules: Collection[str]) -> bool:
    """Return True if `name` is, or lies inside, a module whose path ends with one of `modules`, on whole parts."""
    return any(f".{module}." in f".{name}." for module in modules)


def _named(wanted: str | Collection[str], names: Sequence[str], where: str, strict: bool) -> list[str]:
    """Return the paths that a regular expression or a list of names selects, in the order of `names`."""
    if isinstance(wanted, str):
        matched = pattern_matches(wanted, names, where=where)
        if strict and not any(matched):
            raise _unmatched(wanted, names, where, regex=True)
        return [name for name, hit in zip(names, matched, strict=True) if hit]
    picked: set[str] = set()
    for suffix in sorted(wanted):
        hits = [name for name in names if name == suffix or name.endswith(f".{suffix}")]
        if strict and not hits:
            raise _unmatched(suffix, names, where)
        picked.update(hits)
    return [name for name in names if name in picked]


def in_numbers(config: LoRAConfig, adapted: Sequence[str]) -> LoRAConfig:
    """Return the configuration with the words of `layers` converted into numbers, as in PEFT's files.

    PEFT filters modules by layer numbers, but not parameters, which are therefore named by their full paths.
    """
    if not config.layers:
        return config
    parameter_paths = tuple(targeted_parameters(config, adapted))
    return replace(config, layers="", layers_to_transform=layer_numbers(adapted), target_parameters=parameter_paths)


def layer_numbers(names: Iterable[str]) -> tuple[int, ...]:
    """Return the numbers of the layers of these modules in ascending order. Modules outside layers have none."""
    return tuple(sorted({number for name in names if (number := _layer_number(name, ())) is not None}))


def _numbers(words: str, count: int) -> set[int]:
    """Return the layers that `last:8`, `first:4`, `8-15` or a number name in a model with `count` layers."""
    wanted: set[int] = set()
    for word in comma_list(words):
        kind, _, number = word.partition(":")
        low, _, high = word.partition("-")
        if kind in ("last", "first"):
            size = int(number)
            named = range(count - size, count) if kind == "last" else range(size)
        else:
            named = range(int(low), int(high or low) + 1)
        if not named or named[0] < 0 or named[-1] >= count:
            raise UsageError(
                f"{word} names layers that the model does not have",
                where="layers",
                why=f"the layers are 0 to {count - 1}" if count else "the targeted paths have no layer number",
            )
        wanted.update(named)
    return wanted


def _in_layers(config: LoRAConfig, chosen: Sequence[str], strict: bool) -> list[str]:
    wanted = set(config.layers_to_transform or ())
    whole_paths = set() if isinstance(config.target_modules, str) else set(config.target_modules)
    numbers = {name: number for name in chosen if (number := _layer_number(name, config.layers_pattern)) is not None}
    if strict and (absent := sorted(wanted - set(numbers.values()))):
        there = sorted(set(numbers.values()))
        raise UsageError(
            f"no targeted module is in layer {', '.join(map(str, absent))}",
            where="layers_to_transform",
            why=f"the layers are {there[0]} to {there[-1]}" if there else "the targeted paths have no layer number",
        )
    return [name for name in chosen if name in whole_paths or numbers.get(name) in wanted]


def _layer_number(name: str, layers_pattern: Sequence[str]) -> int | None:
    found = None
    if not layers_pattern:
        found = _LAYER_NUMBER.match(name)
    for pattern in layers_pattern:
        found = re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.(\d+)\.", name)
        if found:
            break
    return int(found.group(1)) if found else None


def _first_match(patterns: Mapping[str, float], chosen: Sequence[str], where: str, strict: bool) -> dict[str, float]:
    values: dict[str, float] = {}
    ends: dict[str, list[str]] = {}
    for name in chosen if patterns else ():
        ends.setdefault(name.rpartition(".")[2], []).append(name)
        ends.setdefault("^" + re.escape(name), []).append(name)  # the form of full paths in `written_pattern`
    end = time.thread_time() + MATCH_LIMIT_S
    for key, value in patterns.items():
        hits = ends.get(key)
        if hits is None:
            absent = re.fullmatch(r"[\w-]+|\^(?:\w|\\[.-])+", key) is not None
            matches = [] if absent else key_matches(key, chosen, where=where, end=end)
            hits = [name for name, match in zip(chosen, matches, strict=False) if match]
        if strict and not hits:
            raise _unmatched(key, chosen, where, "adapted module")
        for name in hits:
            values.setdefault(name, value)
    return values


def _unmatched(
    wanted: str, names: Sequence[str], where: str, what: str = "module", *, regex: bool = False
) -> UsageError:
    if where == "target_parameters" and not names:
        return UsageError(
            f"{wanted!r} matches no parameter",
            where=where,
            why="the model has no experts, or they stay frozen",
            next_step="leave out target_parameters, and name linear modules in target_modules",
        )
    parts = _last_parts(names)
    near = nearest_names(wanted, [ALL_LINEAR, *names] if where == "target_modules" else names)
    if regex and names:
        hint = f"a regular expression must match the whole path, such as {names[0]}; for the end of a path give a list"
    elif near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = "a name matches whole parts at the end of the module path"
    return UsageError(
        f"{wanted!r} matches no {what}",
        where=where,
        why=f"there are {name_list(parts)}" if parts else "there is none",
        next_step=hint,
    )


def _last_parts(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _shown(modules: str | Collection[str]) -> str:
    return repr(modules) if isinstance(modules, str) else ", ".join(sorted(modules))


# Regular expressions from users and files are matched so that no pattern can hang or crash the process.
#
# Python's matcher may backtrack without bound: `(a+)+b` on thirty letters takes minutes. The regex package has a time
# limit. A pattern must be valid in Python, as PEFT's are. Patterns that the two packages interpret differently, or that
# regex would expand beyond the memory, are refused.

MATCH_LIMIT_S = 3
"""Processor seconds for all names of a pattern, of the thread; regex counts those of the process within one name."""
MAX_PATTERN_CHARACTERS = 20_000
_MAX_WRITTEN_OUT = 200_000
# In Python a brace without a count is a literal. In regex it allows errors in a match, and `[:` is a POSIX class.
_READ_DIFFERENTLY = re.compile(r"\{(?!\d+(?:,\d*)?\}|,\d+\})|\[:")
_COUNT = re.compile(r"(\)?)\{(\d*),?(\d*)\}")


def pattern_matches(pattern: str, names: Sequence[str], *, where: str, end: float | None = None) -> list[bool]:
    """Return, for each of `names`, True if `pattern` matches all of it (re.fullmatch).

    Args:
        where: the configuration key of the pattern, for errors.
        end: deadline in the thread's processor time; `MATCH_LIMIT_S` from now if None.

    Raises:
        UsageError: if it is no regular expression, or does not finish within `MATCH_LIMIT_S`.
    """
    compiled = _compile(pattern, where)
    end = time.thread_time() + MATCH_LIMIT_S if end is None else end
    try:
        # regex takes a time limit of 0 as no limit.
        return [compiled.fullmatch(name, timeout=max(end - time.thread_time(), 1e-3)) is not None for name in names]
    except TimeoutError:
        raise UsageError(
            f"{_shown_pattern(pattern)} takes longer than {MATCH_LIMIT_S} s to match the module names",
            where=where,
            why="nested or many unbounded repeats make a regular expression backtrack without bound",
            next_step="write it with fewer * and +, or list the names",
        ) from None


def key_matches(key: str, names: Sequence[str], *, where: str, end: float | None = None) -> list[bool]:
    r"""Return, for each of `names`, True if a key of rank_pattern or alpha_pattern matches: PEFT's `(.*\.)?(key)$`.

    Raises:
        UsageError: as `pattern_matches`.
    """
    if end is not None and time.thread_time() > end:
        raise UsageError(
            f"the regular expressions take longer than {MATCH_LIMIT_S} s to match the module names",
            where=where,
            next_step="write fewer of them, or list the names",
        )
    _compile(key, where)
    return pattern_matches(rf"(?:.*\.)?(?:{key})", names, where=where, end=end)


def _compile(pattern: str, where: str) -> Any:
    import regex

    if len(pattern) > MAX_PATTERN_CHARACTERS:
        raise UsageError(
            f"a regular expression of {len(pattern)} characters is longer than {MAX_PATTERN_CHARACTERS}", where=where
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
            if why := _refused(pattern):
                raise UsageError(f"the regular expression {_shown_pattern(pattern)} is refused", where=where, why=why)
            return regex.compile(pattern, regex.VERSION0)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise UsageError(
            f"{_shown_pattern(pattern)} is not a regular expression",
            where=where,
            why=str(error) or type(error).__name__,
        ) from None


def _refused(pattern: str) -> str:
    """Return why a pattern that is valid in Python is refused, or ""."""
    if _READ_DIFFERENTLY.search(pattern):
        return "a brace that counts no repeats, and [:, occur in no module path"
    written_out, longest = len(pattern), 1
    for closing, *counts in _COUNT.findall(pattern):
        count = max(1, *(int(number or 0) for number in counts))
        if closing:  # of a group, which may contain others
            written_out *= count
        else:
            longest = max(longest, count)
    return "its repeats are too many" if written_out * longest > _MAX_WRITTEN_OUT else ""


def _shown_pattern(pattern: str) -> str:
    return repr(shorten(pattern, 120))
