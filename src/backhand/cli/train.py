"""`backhand train`."""

from __future__ import annotations

from pathlib import Path

from backhand.adapters.config import parse_modules, parse_names, parse_pattern
from backhand.cli.command import command
from backhand.cli.fields import Parse
from backhand.data.options import parse_template_args
from backhand.train.config import TrainConfig

DATA_PARSERS: dict[str, Parse] = {"template_args": parse_template_args}
ADAPTER_PARSERS: dict[str, Parse] = {
    "target_modules": parse_modules,
    "exclude_modules": parse_modules,
    "modules_to_save": parse_names,
    "rank_pattern": lambda words: parse_pattern(words, "rank_pattern"),
    "alpha_pattern": lambda words: parse_pattern(words, "alpha_pattern"),
}


def _load(path: Path) -> TrainConfig:
    from backhand.train.config_file import load_config

    return load_config(path)


def _train(config: TrainConfig, *, typed: frozenset[str]) -> None:
    from backhand.report.train import train

    train(config, typed=typed)


train = command(TrainConfig, _train, parse=DATA_PARSERS | ADAPTER_PARSERS, load=_load, tell_typed=True)
