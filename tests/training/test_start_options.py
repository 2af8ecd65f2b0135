"""Options that ask for another adapter than the one to start from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from backhand.cli.main import main
from backhand.errors import UsageError
from backhand.training.run import train
from tests.support.tiny_run import TinyRun

SAME: dict[str, Any] = {"rank": 2, "alpha": 5.0, "target_modules": ("v_proj", "q_proj")}


@pytest.fixture(scope="module")
def adapter(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Path(tmp_path_factory.mktemp("first")) / "run"
    train(tiny.config(run, max_steps=1, rank=2, target_modules=("q_proj", "v_proj")))
    return run / "adapter"


@pytest.mark.parametrize("engine", ["backhand", "transformers"])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 3}, ["rank: 2 in the adapter, 3 given"]),
        ({"alpha": 7.0, "use_rslora": True}, ["alpha: ", "use_rslora: "]),
        ({"use_dora": True}, ["use_dora: False in the adapter, True given"]),
        ({"target_modules": ("q_proj",)}, ["target_modules: "]),
        ({"rank_pattern": {"q_proj": 9}}, ["rank_pattern: "]),
    ],
)
def test_another_adapter_is_refused_with_a_list(
    options: dict[str, Any], named: list[str], engine: str, adapter: Path, tiny: TinyRun, tmp_path: Path
) -> None:
    config = tiny.config(tmp_path / "run", engine=engine, from_adapter=str(adapter), **{**SAME, **options})
    with pytest.raises(UsageError) as caught:
        train(config)
    assert all(name in caught.value.what for name in named) and caught.value.what.count(" in the adapter, ") == len(
        named
    )
    assert not (tmp_path / "run").exists()


def test_layers_that_the_adapter_lacks_are_refused_by_their_numbers(tiny: TinyRun, tmp_path: Path) -> None:
    train(tiny.config(tmp_path / "first", max_steps=1, layers="last:1"))
    start = str(tmp_path / "first" / "adapter")
    with pytest.raises(UsageError, match="layers: 1 in the adapter, 0–1 given"):
        train(tiny.config(tmp_path / "run", from_adapter=start, layers="last:2"))
    with pytest.raises(UsageError, match=r"up_proj, v_proj \(layers 1\) in the adapter, q_proj v_proj given"):
        train(tiny.config(tmp_path / "run", from_adapter=start, target_modules=("q_proj", "v_proj")))
    assert not (tmp_path / "run").exists()
    train(tiny.config(tmp_path / "run", from_adapter=start, layers="last:1", max_steps=1))
    one = ("model.layers.1.self_attn.q_proj",)
    train(tiny.config(tmp_path / "one", max_steps=1, target_modules=one))
    train(
        tiny.config(
            tmp_path / "again", from_adapter=str(tmp_path / "one/adapter"), layers_to_transform=(1,), max_steps=1
        )
    )


@pytest.mark.parametrize("engine", ["backhand", "transformers"])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}])
def test_the_same_adapter_may_be_asked_for(
    options: dict[str, Any], engine: str, adapter: Path, tiny: TinyRun, tmp_path: Path
) -> None:
    train(tiny.config(tmp_path / "run", engine=engine, from_adapter=str(adapter), max_steps=1, **{**SAME, **options}))


def test_the_same_modules_may_be_written_in_another_way(adapter: Path, tiny: TinyRun, tmp_path: Path) -> None:
    options = {**SAME, "target_modules": r".*self_attn\.[qv]_proj", "exclude_modules": ("k_proj",)}
    train(tiny.config(tmp_path / "run", from_adapter=str(adapter), max_steps=1, **options))


def test_a_default_that_is_typed_counts_as_given(
    adapter: Path, tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model", str(tiny.model), "--data", str(tiny.rows), "--threads", "1", "--dtype", "float32"]
    words += ["--max-steps", "1", "--quiet", "--from-adapter", str(adapter), "--output", str(tmp_path / "run")]
    assert main([*words, "--rank", "16"]) == 2
    assert "rank: 2 in the adapter, 16 given" in capsys.readouterr().err
    assert main(words) == 0, "what is not typed is the adapter's"
    shutil.rmtree(tmp_path / "run")
    assert main([*words, "--rank", "2"]) == 0
