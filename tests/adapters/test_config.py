from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from backhand.adapters.config import LoRAConfig, parse_modules, parse_pattern
from backhand.errors import UsageError


def test_the_defaults_are_valid() -> None:
    config = LoRAConfig()
    assert config.validate() is config
    assert config.scaling_of(config.rank, config.alpha) == 2.0


def test_rank_stabilised_scaling_divides_by_the_root() -> None:
    assert LoRAConfig(use_rslora=True).scaling_of(7, 5.0) == 5.0 / math.sqrt(7)
    assert LoRAConfig().scaling_of(7, 5.0) == 5.0 / 7


@pytest.mark.parametrize(
    ("fields", "where", "shown"),
    [
        ({"rank": 0}, "rank", "0"),
        ({"rank": -3}, "rank", "-3"),
        ({"rank": True}, "rank", "True"),
        ({"rank": 4.0}, "rank", "4.0"),
        ({"alpha": 0.0}, "alpha", "0.0"),
        ({"alpha": -1}, "alpha", "-1"),
        ({"alpha": math.nan}, "alpha", "nan"),
        ({"alpha": math.inf}, "alpha", "inf"),
        ({"alpha": 1e308}, "alpha", "1e+308"),
        ({"alpha": "8"}, "alpha", "'8'"),
        ({"alpha": True}, "alpha", "True"),
        ({"dropout": 1.0}, "dropout", "1.0"),
        ({"dropout": -0.1}, "dropout", "-0.1"),
        ({"dropout": math.nan}, "dropout", "nan"),
        ({"target_modules": ()}, "target_modules", "no modules"),
        ({"target_modules": ""}, "target_modules", "no modules"),
        ({"target_modules": ("q_proj", "")}, "target_modules", "q_proj"),
        ({"target_modules": 5}, "target_modules", "5"),
        ({"exclude_modules": (3,)}, "exclude_modules", "3"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']", "0"),
        ({"alpha_pattern": {"q_proj": -2}}, "alpha_pattern['q_proj']", "-2"),
        ({"use_rslora": "yes"}, "use_rslora", "yes"),
        ({"layers": "last"}, "layers", "'last'"),
        ({"layers": "last:0"}, "layers", "last:0"),
        ({"layers": "1,,2"}, "layers", "does not name layers"),
        ({"layers": "0", "layers_to_transform": (0,)}, "layers", "are both given"),
        ({"layers": "0", "target_modules": ".*q"}, "target_modules", "regular expression"),
        ({"layers_to_transform": ()}, "layers_to_transform", "()"),
        ({"layers_to_transform": (-1,)}, "layers_to_transform", "-1"),
        ({"layers_to_transform": (0,), "target_modules": ".*q"}, "target_modules", "regular expression"),
        ({"layers_pattern": ("layers",)}, "layers_pattern", "layers"),
        ({"layers_to_transform": (0,), "layers_pattern": ("(",)}, "layers_pattern", "("),
    ],
)
def test_a_value_out_of_range_is_named(fields: dict[str, object], where: str, shown: str) -> None:
    with pytest.raises(UsageError) as caught:
        LoRAConfig(**fields).validate()  # type: ignore[arg-type]
    assert caught.value.where == where
    assert shown in caught.value.what
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("all-linear", "all-linear"),
        ("All-Linear", "all-linear"),
        ("q_proj", ("q_proj",)),
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        (" q_proj, self_attn.v_proj ,", ("q_proj", "self_attn.v_proj")),
        (["q_proj", "self_attn.v_proj"], ("q_proj", "self_attn.v_proj")),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        ((), ()),
    ],
)
def test_modules_on_a_command_line(given: str | list[str], meant: str | tuple[str, ...]) -> None:
    assert parse_modules(given) == meant


def test_patterns_on_a_command_line() -> None:
    pattern = parse_pattern(["q_proj=8", r"layers\.[0=]\..*=4", "v_proj=2.5"], "rank_pattern")
    assert pattern == {"q_proj": 8, r"layers\.[0=]\..*": 4, "v_proj": 2.5}
    assert isinstance(pattern["q_proj"], int)
    for bad in ("q_proj", "=8", "q_proj=", "q_proj=many"):
        with pytest.raises(UsageError, match="NAME=NUMBER"):
            parse_pattern([bad], "rank_pattern")


def test_the_configuration_imports_no_torch() -> None:
    code = "import sys, backhand.adapters.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("field", ["modules_to_save", "target_parameters", "layers_pattern"])
def test_one_string_is_no_list_of_names(field: str) -> None:
    """It would be read letter by letter."""
    given: dict[str, Any] = {field: "lm_head", "layers_to_transform": (0,) if field == "layers_pattern" else None}
    config = LoRAConfig(**given)
    with pytest.raises(UsageError, match=f"{field}: 'lm_head' is not a list of names"):
        config.validate()
