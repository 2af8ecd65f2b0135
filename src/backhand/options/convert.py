"""`backhand convert`: write another tool's YAML file as a configuration of Backhand.

A key is converted if its equivalent (`other_names`) is one option and the value is possible for this option. Some keys
have a rule of their own, because their value means something else. Any other key becomes a comment with its answer.
"""

from __future__ import annotations

import shlex
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from backhand.adapters.config import ALL_LINEAR, parse_modules
from backhand.bounds import check_value, comma_list, hints_of
from backhand.errors import UsageError
from backhand.files import write_atomically
from backhand.options.command_options import ConvertOptions
from backhand.options.config import TrainConfig
from backhand.options.config_file import config_from_table, read_plain_table, toml_value, typed_value
from backhand.other_names import HERE, translate_option
from backhand.printing import say, visible
from backhand.words import count_of, name_list, shorten

Values = dict[str, Any]


def convert_command(options: ConvertOptions) -> None:
    """Print the configuration, or write it to `output`.

    Raises:
        UsageError: the file is not YAML or TOML, its options contradict each other, or `output` exists.
    """
    options.validate()
    text, converted, left = convert(options.file)
    if options.output is None:
        sys.stdout.write(text)
    elif options.output.exists():
        raise UsageError(f"{options.output} exists", where="output", next_step="name another file, or remove it first")
    else:
        write_atomically(options.output, text.encode("utf-8"))
    if options.output is None:
        following = f"backhand convert {shlex.quote(str(options.file))} --output run.toml writes the file"
    else:
        following = f"backhand train {shlex.quote(str(options.output))}"
    say(f"{count_of(converted, 'key')} converted, {left:,} in comments; next: {following}")


def convert(path: Path) -> tuple[str, int, int]:
    """Return the text of the configuration, and the numbers of keys that are converted and that are comments.

    Raises:
        UsageError: the file cannot be read, or its options contradict each other.
    """
    table = read_plain_table(path)
    hints, parts = _hints()
    values: Values = {}
    origins: dict[str, str] = {}
    left: dict[str, str] = {}
    for key, value in table.items():
        try:
            found = _equivalents(key, value, table)
            for name, converted in found.items():
                if name in values:
                    raise UsageError(f"{name} is given by {origins[name]} already")
                typed = typed_value(converted, hints[name], name)
                check_value(name, typed, hints_of(parts[name][1])[name])
        except UsageError as error:
            left[key] = error.what if error.next_step is None else f"{error.what}; {error.next_step}"
            continue
        if not found:
            left[key] = translate_option(key, str, value=value) or "no option is meant by this name"
        values |= found
        origins |= dict.fromkeys(found, key)
    for name, (default, tool) in _other_defaults(table, values).items():
        values[name], origins[name] = default, f"the default of {tool}"
    config_from_table(_in_parts(values, parts), str(path)).validate()
    lines = [f"# From {visible(path.name)}."]
    for part, options in _in_parts(values, parts).items():
        lines += ["", f"[{part}]"]
        lines += [f"{name} = {toml_value(value)}{_comment(name, origins[name])}" for name, value in options.items()]
    lines += ["", "# Not converted:"] if left else []
    lines += [visible(f"# {key}: {shorten(str(table[key]))}: {answer}") for key, answer in left.items()]
    return "\n".join(lines) + "\n", len(table) - len(left), len(left)


def _hints() -> tuple[dict[str, Any], dict[str, tuple[str, type]]]:
    """Return the type of each option, and its table with the class of the table."""
    hints: dict[str, Any] = {}
    parts: dict[str, tuple[str, type]] = {}
    for part, kind in typing.get_type_hints(TrainConfig).items():
        for name, hint in typing.get_type_hints(kind).items():
            hints[name], parts[name] = hint, (part, kind)
    return hints, parts


def _in_parts(values: Values, parts: Mapping[str, tuple[str, type]]) -> dict[str, Values]:
    tables: dict[str, Values] = {part: {} for part in typing.get_type_hints(TrainConfig)}
    for name, value in values.items():
        tables[parts[name][0]][name] = value
    return {part: table for part, table in tables.items() if table}


def _comment(name: str, origin: str) -> str:
    return "" if name == origin else visible(f"  # {origin}")


def _equivalents(key: str, value: Any, table: Mapping[str, Any]) -> Values:
    """Return the options that a key stands for, with their values; empty if only its answer says what to do."""
    name = key.replace("-", "_").lower()
    if name in _RULES:
        return _RULES[name](value, table)
    if (same := translate_option(key, str, value=value)) is not None:
        option, _, given = same.removeprefix(HERE).partition(", as ")
        if not same.startswith(HERE) or not option.isidentifier():
            return {}
        value = given.partition(",")[0] if given else value
    else:
        option = name
    hint = _hints()[0].get(option)
    if hint is None:
        return {}
    if typing.get_origin(hint) is tuple and isinstance(value, str):
        value = [value]
    return {option: int(value) if isinstance(value, float) and value.is_integer() and option != "alpha" else value}


def _other_defaults(table: Mapping[str, Any], values: Values) -> dict[str, tuple[int, str]]:
    """Return the rank and alpha that the other tool chooses for keys that are absent, with the tool's name."""
    if "alpha" in values:
        return {}
    if any(key in table for key in ("finetuning_type", "lora_target", "cutoff_len")):
        rank = values.get("rank", 8)
        chosen = {"alpha": (2 * rank, "LLaMA-Factory, twice the rank")}
        return chosen if "rank" in values else {"rank": (rank, "LLaMA-Factory"), **chosen}
    return {"alpha": (8, "PEFT")} if "r" in table else {}


def _number(table: Mapping[str, Any], *names: str) -> int | None:
    return next((table[name] for name in names if isinstance(table.get(name), int)), None)


_MICRO = ("micro_batch_size", "per_device_train_batch_size", "batch_size", "micro_batch_rows")
_ACCUMULATED = ("gradient_accumulation_steps", "grad_accumulation_steps", "gradient_accumulation")


def _micro_batch(value: Any, table: Mapping[str, Any]) -> Values:
    """Return the rows of a micro-batch, and the rows of a step if the number of micro-batches is not given."""
    return {"micro_batch_rows": value} | ({} if _number(table, *_ACCUMULATED) else {"batch_rows": value})


def _accumulation(value: Any, table: Mapping[str, Any]) -> Values:
    rows = _number(table, *_MICRO)
    return {} if rows is None or not isinstance(value, int) else {"batch_rows": value * rows}


def _steps(option: str) -> Callable[[Any, Mapping[str, Any]], Values]:
    """Return a rule for a number of steps. mlx-lm, which has `iters`, counts micro-batches instead."""

    def rule(value: Any, table: Mapping[str, Any]) -> Values:
        per_step = (_number(table, *_ACCUMULATED) if "iters" in table else None) or 1
        return {option: max(1, value // per_step) if isinstance(value, int) and value > 0 else value}

    return rule


_FIELDS = {
    "messages": ("field_messages",),
    "prompt": ("field_instruction",),
    "completion": ("field_output",),
    "system": ("system_prompt",),
}
"""Axolotl's names of columns in an entry of `datasets`, or in its `type`, by option."""


def _sources(option: str) -> Callable[[Any, Mapping[str, Any]], Values]:
    def rule(value: Any, _: Mapping[str, Any]) -> Values:
        entries = [one if isinstance(one, dict) else {"path": one} for one in _as_list(value)]
        names = [f"{one.get('path')}" + (f":{one['split']}" if "split" in one else "") for one in entries]
        fields = [one | (kind if isinstance(kind := one.get("type"), dict) else {}) for one in entries]
        named = {}
        for name, keys in _FIELDS.items():
            columns = {str(one[key]) for one in fields for key in keys if one.get(key)}
            if option == "data" and len(columns) == 1:
                named[name] = columns.pop()
        return {option: names} | named

    return rule


def _listed_names(option: str) -> Callable[[Any, Mapping[str, Any]], Values]:
    """Return a rule for data sets by name. A name without a suffix or an owner is one of LLaMA-Factory's own list."""

    def rule(value: Any, table: Mapping[str, Any]) -> Values:
        if not isinstance(value, str):
            return {option: value}
        names = comma_list(value)
        if unknown := [name for name in names if "/" not in name and not Path(name).suffix]:
            folder = Path(str(table.get("dataset_dir", "data")))
            raise UsageError(
                f"{name_list(unknown)} {'is a name' if len(unknown) == 1 else 'are names'} in a list of data sets",
                next_step=f'give the file that {folder / "dataset_info.json"} names, as {option} = ["FILE"]',
            )
        return {option: names}

    return rule


def _dataset_dir(*_: Any) -> Values:
    raise UsageError("data sets are not found by name", next_step='give their files, as data = ["FILE"]')


def _target(value: Any, _: Mapping[str, Any]) -> Values:
    """Convert names of modules. LLaMA-Factory writes `all`, and separates names by commas."""
    if value in ("all", ["all"]):
        return {"target_modules": ALL_LINEAR}
    parsed = parse_modules(value) if isinstance(value, str) else value
    return {"target_modules": list(parsed) if isinstance(parsed, tuple) else parsed}


def _template(value: Any, _: Mapping[str, Any]) -> Values:
    if isinstance(value, str) and (Path(value).suffix or Path(value).exists()):
        return {"chat_template": value}
    raise UsageError(
        "the model's own chat template is used; templates have no names here",
        next_step="give a file as chat_template to use another one",
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _mlx(value: Any, _: Mapping[str, Any]) -> Values:
    """Convert mlx-lm's `lora_parameters`: its scale is alpha / rank, and its keys are names of modules."""
    if not isinstance(value, dict):
        return {}
    rank = value.get("rank", 8)
    found: Values = {name: value[name] for name in ("rank", "dropout") if name in value}
    if "scale" in value:
        found["alpha"] = float(value["scale"]) * rank
    if "keys" in value:
        found["target_modules"] = [str(key) for key in value["keys"]]
    return found


def _if(true: Values, false: Values | None = None) -> Callable[[Any, Mapping[str, Any]], Values]:
    """Return a rule for a switch."""
    return lambda value, _: true if value is True else (false or {}) if value is False else {}


_RULES: Mapping[str, Callable[[Any, Mapping[str, Any]], Values]] = {
    "adapter": lambda value, _: {"quantize": "q4_0"} if value == "qlora" else {},
    "bf16": lambda value, _: {"dtype": "bfloat16"} if value is True else {"dtype": "auto"} if value == "auto" else {},
    "load_in_4bit": _if({"quantize": "q4_0"}),
    "load_in_8bit": _if({"quantize": "q8_0"}),
    "lora_target_linear": _if({"target_modules": "all-linear"}),
    "train_on_inputs": _if({"train_on": "all"}, {"train_on": "completions"}),
    "mask_prompt": _if({"train_on": "completions"}, {"train_on": "all"}),
    "completion_only_loss": _if({"train_on": "completions"}, {"train_on": "all"}),
    "assistant_only_loss": _if({"train_on": "completions"}, {"train_on": "all"}),
    **dict.fromkeys(("lora_target", "lora_target_modules", "target_modules"), _target),
    **dict.fromkeys(("template", "chat_template", "chat_template_path"), _template),
    **dict.fromkeys(("dataset", "train_dataset"), _listed_names("data")),
    "eval_dataset": _listed_names("eval_data"),
    "dataset_dir": _dataset_dir,
    "datasets": _sources("data"),
    "test_datasets": _sources("eval_data"),
    "lora_parameters": _mlx,
    "num_layers": lambda value, _: {"layers": f"last:{value}"} if isinstance(value, int) and value > 0 else {},
    "iters": _steps("max_steps"),
    **dict.fromkeys(_MICRO[:3], _micro_batch),
    **dict.fromkeys(_ACCUMULATED, _accumulation),
    **dict.fromkeys(("save_steps", "save_interval"), _steps("save_every")),
    **dict.fromkeys(("eval_steps", "steps_per_eval"), _steps("eval_every")),
    **dict.fromkeys(("logging_steps", "steps_per_report"), _steps("log_every")),
}
"""Keys whose value means something else than the value of their option."""
