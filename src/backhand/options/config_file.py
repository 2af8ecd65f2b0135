"""Read and write a TrainConfig as TOML (`run.toml`, `config.toml`), with one table per concern and strict checks.

    [model]
    model = "smollm2-135m"
    [optimization]
    learning_rate = 1e-3

TOML has no null, so options that are not given are left out. A file whose name ends in .yaml or .yml is read as YAML,
in which options may also be outside of their tables. This file imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
import tomllib
import types
import typing
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from backhand.bounds import also_names
from backhand.errors import UsageError
from backhand.options.config import TrainConfig
from backhand.other_names import suggestion, translate_option, value_suggestion
from backhand.reading import MAX_SETTINGS_BYTES, read_plain
from backhand.words import name_list, with_article

Table = Mapping[str, Any]


def load_config(path: Path) -> TrainConfig:
    """Read a run configuration. Options that the file leaves out have their defaults.

    Raises:
        UsageError: not readable, not TOML, an unknown key (with the nearest name) or a value of another type.
    """
    return config_from_table(read_table(path), str(path))


def read_table(path: Path) -> dict[str, Any]:
    """Return the file as nested tables: YAML by its ending, otherwise TOML. Raises UsageError if it cannot be read."""
    table = read_plain_table(path)
    return _in_tables(table, str(path)) if path.suffix.lower() in _YAML else table


_YAML = (".yaml", ".yml")


def read_plain_table(path: Path) -> dict[str, Any]:
    """Return the file's keys and values as they are. Raises UsageError if it cannot be read."""
    yaml = path.suffix.lower() in _YAML
    try:
        _check_is_no_other(path)
        text = read_plain(path, MAX_YAML_BYTES if yaml else MAX_SETTINGS_BYTES).decode("utf-8-sig")
        return parse_yaml(text) if yaml else parse_toml(text)
    except OSError as error:
        raise UsageError(
            "the configuration cannot be read",
            where=str(path),
            why=error.strerror,
            next_step="check the path, or give another file",
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            "the configuration is not UTF-8",
            where=str(path),
            why=f"byte 0x{error.object[error.start]:02x} at offset {error.start} is not valid UTF-8",
            next_step="save it as UTF-8",
        ) from None
    except (ValueError, RecursionError) as error:  # a number of 6,000 digits raises ValueError itself
        how = "write options as learning_rate: 1.0e-4, one per line"
        if not yaml:
            how = "write tables as [optimization] and options as learning_rate = 1e-4, text in quotes"
        what = f"the configuration is not {'YAML' if yaml else 'TOML'}"
        raise UsageError(what, where=str(path), why=str(error), next_step=how) from None


def _check_is_no_other(path: Path) -> None:
    """Raise UsageError if the path is a run directory or a file of rows instead of a configuration."""
    quoted = shlex.quote(str(path))
    if (path / "config.toml").is_file():
        what, how = "a run", f"its options are in its config.toml; --resume --output {quoted} continues it"
    elif path.is_dir() or re.search(r"\.(jsonl?|csv|tsv|parquet)(\.gz)?\Z", path.name.lower()):
        what, how = "a folder" if path.is_dir() else "a file of rows", f"give rows with --data {quoted}"
    else:
        return
    raise UsageError(f"this is {what}, not a configuration", where=str(path), next_step=how)


_MOST_PARTS = 32
"""Largest number of parts of a key. Time and memory of tomllib grow with their square; options have two or a few."""
_TOKEN = re.compile(
    r"""(?P<text>\"{3}(?:\\.|[^\\])*?(?:\"{3}|\Z)|'{3}.*?(?:'{3}|\Z)|"(?:\\.|[^"\\\n])*"?|'[^'\n]*'?)"""
    r"|(?P<dot>\.)|(?P<bare>[\w-]+)|(?P<space>[ \t]+)|\#[^\n]*|.",
    re.DOTALL,
)


def parse_toml(text: str) -> dict[str, Any]:
    """Return nested tables, in time proportional to the length of the text.

    Raises:
        ValueError: the text is not TOML, or a key has too many parts.
        RecursionError: tables are nested too deeply.
    """
    dots = 0
    for token in _TOKEN.finditer(text):
        dots = dots + (token.lastgroup == "dot") if token.lastgroup is not None else 0
        if dots >= _MOST_PARTS:
            line = text.count("\n", 0, token.start()) + 1
            raise ValueError(f"a key has more than {_MOST_PARTS} parts (at line {line})")
    return tomllib.loads(text)


MAX_YAML_BYTES = 2**18
_NUMBER = re.compile(r"[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d+)[eE][-+]?\d+\Z")
_MAX_YAML_DEPTH = 32
"""Lists and tables inside one another. Options have three levels; PyYAML takes time by the square of the depth."""


def parse_yaml(text: str) -> dict[str, Any]:
    """Return nested tables. Null values are left out, and 1e-4 is a number, unlike in YAML 1.1.

    Raises:
        ValueError: it is not YAML, has a key twice, is nested too deeply, or contains an alias or several documents.
    """
    import yaml

    try:
        read = yaml.load(text, _yaml_loader())
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(read, dict | None):
        raise ValueError(f"it is {_kind(read)}, not options with their values")
    return dict(_without_nulls(read or {}))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


@functools.cache
def _yaml_loader() -> Any:
    """Return a loader that reads unquoted 1e-4 as a number and refuses aliases, duplicate keys and deep nesting."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it contains an alias (*name), which is not supported")
            self.depth += 1
            if self.depth > _MAX_YAML_DEPTH:
                line = self.peek_event().start_mark.line + 1
                raise ValueError(f"lists or tables are nested more than {_MAX_YAML_DEPTH} deep (at line {line})")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            counts = Counter(key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode))
            if twice := [key for key, count in counts.items() if count > 1]:
                raise ValueError(f"{twice[0]} is given twice")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
    return Loader


def _in_tables(read: dict[str, Any], origin: str) -> dict[str, Any]:
    """Move options that are outside of their tables, as in the YAML of other tools, into them."""
    read = _by_first_names(read)
    parts = {
        key: key if key in ("model", "data", "objective") and not isinstance(value, dict) else _places().get(key)
        for key, value in read.items()
    }
    tables = {key: read[key] for key, part in parts.items() if part is None}
    for key, part in parts.items():
        table = None if part is None else tables.setdefault(part, {})
        if not isinstance(table, dict):
            continue  # the section itself is not a table, which is reported later
        if key in table:
            raise UsageError(
                f"{key} is given twice",
                where=origin,
                why=f"it is in {part} and outside of it",
                next_step="keep one of them",
            )
        table[key] = read[key]
    return tables


@functools.cache
def _places() -> dict[str, str]:
    """Map every option to its table."""
    return {
        option: part
        for part, hint in typing.get_type_hints(TrainConfig).items()
        for option in typing.get_type_hints(hint)
        if option != part
    }


@functools.cache
def _other_names() -> dict[str, str]:
    """Map the alternative names of options on the command line to the options."""
    return also_names(typing.get_type_hints(TrainConfig).values())


def _by_first_names(table: Table) -> dict[str, Any]:
    names = {key: _other_names().get(key, key) for key in table}
    return {key if key != name and name in table else name: table[key] for key, name in names.items()}


def config_from_table(table: Table, origin: str) -> TrainConfig:
    """Convert nested tables to a TrainConfig; see `tables_as`."""
    return tables_as(TrainConfig, table, origin)


Config = TypeVar("Config", bound=TrainConfig)


def tables_as(kind: type[Config], table: Table, origin: str) -> Config:
    """Convert nested tables to a configuration.

    Args:
        kind: the class of the configuration.
        table: `{"model": {…}, "data": {…}, "adapter": {…}, "optimization": {…}, "run": {…}}`, each part optional.
        origin: the file's name, for errors.

    Raises:
        UsageError: an unknown key, with the nearest name, or a value of another type.
    """
    config: Config = _dataclass_from(kind, table, origin, "")
    return config


def config_table(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Convert a configuration to nested tables of plain values, without options that are None."""
    return {
        part.name: {
            option.name: _plain(value)
            for option in dataclasses.fields(getattr(config, part.name))
            if (value := getattr(getattr(config, part.name), option.name)) is not None
        }
        for part in dataclasses.fields(config)
    }


def dump_config(config: TrainConfig) -> str:
    """Return the configuration as TOML text, from which `load_config` reads an equal configuration."""
    lines: list[str] = []
    for part, options in config_table(config).items():
        lines += ["", f"[{part}]"] if lines else [f"[{part}]"]
        lines += [f"{name} = {toml_value(value)}" for name, value in options.items()]
    return "\n".join(lines) + "\n"


_hints = functools.cache(typing.get_type_hints)


def _dataclass_from(cls: Any, table: Any, origin: str, prefix: str) -> Any:
    if not isinstance(table, Mapping):
        name = prefix.rstrip(".")
        inner, next_step = _hints(cls).get(name), translate_option(name, str)
        if inner:
            listed = tuple in (get_origin(inner), *map(get_origin, get_args(inner)))
            next_step = f"write [{name}], and in a line below it {name} = " + ('["…"]' if listed else '"…"')
        raise UsageError(f"{name} is {_kind(table)}, expected a table", where=origin, next_step=next_step)
    hints, table = _hints(cls), _by_first_names(table)
    values: dict[str, Any] = {}
    # `adapter: qlora` is an option of Axolotl, not the table [adapter].
    theirs = {
        key: value
        for key, value in table.items()
        if isinstance(value, str) and not prefix and translate_option(key, str)
    }
    if unknown := [key for key in table if key not in hints or key in theirs]:
        asked = {key: theirs[key] for key in theirs if translate_option(theirs[key], str)}
        raise _unknown_keys({key: (asked.get(key, key), table[key]) for key in unknown}, prefix, hints, origin)
    for key, value in table.items():
        where = f"{origin}: {prefix}{key}"
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _dataclass_from(hints[key], value, origin, f"{prefix}{key}.")
        else:
            values[key] = typed_value(value, hints[key], where)
    return cls(**values)


def _unknown_keys(
    keys: Mapping[str, tuple[str, Any]], prefix: str, hints: Mapping[str, Any], origin: str
) -> UsageError:
    """Return one error for all unknown keys of a table, with a suggestion for each key.

    Args:
        keys: per key the name to look up and its value.
    """
    homes = {option: f"the table [{part}]" for option, part in _places().items()}
    lines = [
        f"{key}: {suggestion(asked, hints, homes, value=value) or 'backhand train --help lists all options'}"
        for key, (asked, value) in keys.items()
    ]
    if len(keys) == 1:
        (key,) = keys
        return UsageError(f"unknown key {prefix + key!r}", where=origin, next_step=lines[0].removeprefix(f"{key}: "))
    return UsageError(
        f"unknown keys {name_list([repr(prefix + key) for key in keys])}",
        where=origin,
        next_step="\n    - ".join([_conversion(keys, prefix, origin), *lines]),
    )


def _conversion(keys: Iterable[str], prefix: str, origin: str) -> str:
    """Return the command that converts a file of another tool, or "" if it is none."""
    foreign = sum(translate_option(key, str) is not None for key in keys)
    if prefix or foreign < 2 or Path(origin).suffix not in (".yaml", ".yml", ".toml"):
        return ""
    return f"backhand convert {shlex.quote(origin)} --output run.toml; or key by key:"


def typed_value(value: Any, hint: Any, where: str) -> Any:
    """Convert a value to the annotated type: whole numbers to floats, lists to tuples."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        for option in options[:-1]:
            try:
                return typed_value(value, option, where)
            except UsageError:
                continue
        if get_origin(options[-1]) is Literal and value not in get_args(options[-1]):
            allowed = [*(_KINDS.get(option, str(option)) for option in options[:-1]), *get_args(options[-1])]
            near = value_suggestion(value, get_args(options[-1]))
            raise UsageError(f"{value!r} is not {' or '.join(allowed)}", where=where, next_step=near)
        return typed_value(value, options[-1], where)
    if origin is Literal:
        if value in get_args(hint) and isinstance(value, str):
            return value
        raise UsageError(
            f"{value!r} is not one of {', '.join(map(str, get_args(hint)))}",
            where=where,
            next_step=value_suggestion(value, get_args(hint), where),
        )
    if origin is tuple and isinstance(value, list):
        return tuple(typed_value(element, get_args(hint)[0], where) for element in value)
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: typed_value(element, get_args(hint)[1], f"{where}.{key}") for key, element in value.items()}
    if hint is Any:
        return _json_value(value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise UsageError(
        f"{value!r} is {_kind(value)}, expected {_KINDS.get(origin or hint, 'a table')}",
        where=where,
        next_step=no_tracker
        if (no_tracker := value_suggestion(value, (), where))
        else f"write it in brackets: [{toml_value(value)}]"
        if origin is tuple and isinstance(value, str)
        else f"write {where.rpartition('.')[2]} = {toml_value([str(value.get('path', 'PATH'))])}"
        if hint is str and isinstance(value, Mapping) and where.endswith("data")
        else None,
    )


def _json_value(value: Any, where: str) -> Any:
    """Return the value if JSON can represent it, which excludes TOML's dates and times."""
    if isinstance(value, Mapping):
        return {key: _json_value(element, f"{where}.{key}") for key, element in value.items()}
    if isinstance(value, list):
        return [_json_value(element, where) for element in value]
    if isinstance(value, str | int | float):
        return value
    raise UsageError(
        f"{value} is {with_article(type(value).__name__)}, expected text, a number, true or false, a list or a table",
        where=where,
        next_step="write it in quotes",
    )


_KINDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    Path: "a path",
}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a table" if isinstance(value, Mapping) else type(value).__name__)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(element) for key, element in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [_plain(element) for element in value]
    return value


def toml_value(value: Any) -> str:
    """Return a value as TOML. Raises UsageError if TOML has no such value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    if isinstance(value, bool | str):
        # A JSON string is a TOML basic string, once the one control character that JSON leaves bare is written out.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        inner = ", ".join(f"{toml_value(str(key))} = {toml_value(element)}" for key, element in value.items())
        return f"{{{inner}}}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(toml_value(element) for element in value)}]"
    raise UsageError(f"{value!r} cannot be written to a TOML file", next_step="give text, a number, true or false")
