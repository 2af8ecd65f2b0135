"""Any contents of a file raise only errors of ours in its reader: what `make fuzz` draws, in this process."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backhand.adapters.contents import read_adapter_directory
from backhand.cli.main import main
from backhand.errors import ArtifactError, BackhandError
from backhand.nn.loading import open_model
from backhand.nn.loading.tokenizer_patterns import may_backtrack_exponentially
from tests.fuzz.child import Attempt, run_attempts
from tests.fuzz.kinds import KINDS, Case, lay_out, make_world
from tests.fuzz.kinds import World as Files

SEEDS = st.integers(0, 10**9)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_world(tmp_path_factory.mktemp("files"))


def read(
    kind: str, seed: int, files: Files, reader: Callable[[Path], object], allowed: tuple[type[Exception], ...]
) -> None:
    case: Case = KINDS[kind](random.Random(seed), files)
    with tempfile.TemporaryDirectory() as place:
        lay_out(case, Path(place))
        with suppress(*allowed):
            reader(Path(place))


@settings(max_examples=150)
@given(seed=SEEDS)
def test_gguf(seed: int, files: Files) -> None:
    def reader(place: Path) -> None:
        source = open_model(place / "hostile.gguf")
        source.tokenizer()
        source.stop_token_ids()
        for name in source.tensor_names():
            source.shape(name)

    read("gguf", seed, files, reader, (ArtifactError,))


@pytest.mark.parametrize("kind", ["safetensors", "adapter_config"])
@settings(max_examples=100)
@given(seed=SEEDS)
def test_adapters(kind: str, seed: int, files: Files) -> None:
    def reader(place: Path) -> None:
        if (place / "a").exists():
            read_adapter_directory(place / "a")

    read(kind, seed, files, reader, (BackhandError,))


@pytest.mark.parametrize(
    ("kind", "number"), [("config", 86), ("config", 793), ("tokenizer", 50), ("tokenizer", 852), ("tokenizer", 2168)]
)
def test_what_was_found_once(kind: str, number: int, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of `make fuzz` that ended with exit code 1: ends of text and model types of other kinds, and so on."""
    case: Case = KINDS[kind](random.Random(f"{kind}/{number}"), files)
    with tempfile.TemporaryDirectory() as place:
        lay_out(case, Path(place))
        monkeypatch.chdir(place)
        assert main([str(word) for word in case.command]) == 4


def test_half_a_surrogate_pair_is_printed(files: Files, tmp_path: Path) -> None:
    """A note on a configuration's field, whose value no encoding has."""
    case: Case = KINDS["config"](random.Random("config/4784"), files)
    lay_out(case, tmp_path)
    outcome = run_attempts([Attempt(case.command, tmp_path)])[0]
    assert (outcome.fault, outcome.code) == ("", 0)


@given(st.text(alphabet="()[]{}|*+?\\^-,019ap:!&", max_size=40))
def test_any_pattern_is_judged(pattern: str) -> None:
    assert may_backtrack_exponentially(pattern) in (True, False)
    assert may_backtrack_exponentially(f"({pattern}a+)+") or not _balanced(pattern)


def _balanced(pattern: str) -> bool:
    """Return True if brackets and escapes in it are literal, so that text around it keeps its meaning."""
    return not set(pattern) & set("()[]{}\\|")
