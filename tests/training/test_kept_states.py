"""Hidden states that are kept below the lowest adapted layer: the bits of a run that computes them in every epoch."""

from __future__ import annotations

import errno
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as StorageType
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.errors import CheckError, UsageError
from backhand.files import FileLayer
from backhand.loop.hidden_state_cache import DiskStateStore, HiddenStateCache, MemoryStateStore, StateStore
from backhand.nn.batch import PackedBatch
from backhand.ops import frozen_matrix
from backhand.runs.directory import Proof
from backhand.training.run import train
from tests.support.faulty_files import InterceptedFiles
from tests.support.kept_runs import begin_alike, config_of, proofs, resumed, run_of_layers, stopped, watched
from tests.support.products_by_rows import ProductsByRows, by_library
from tests.support.ranks import start_ranks
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import TinyRun, final_bits

# ---------------------------------------------------------------------------------------------------------------------
# The same bits.


# Of each two of these axes all four pairs.
@pytest.mark.parametrize(
    ("dtype", "dropout", "alike"),
    [("float32", 0.0, False), ("float32", 0.3, True), ("bfloat16", 0.0, True), ("bfloat16", 0.3, False)],
)
def test_three_epochs_end_in_the_same_bits(
    dtype: str, dropout: float, alike: bool, four: TinyRun, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "dropout": dropout, "eval_every": 2}
    if alike:
        options["data"] = (str(begin_alike(four.rows, tmp_path / "rows.jsonl")),)
        options["eval_data"] = (str(begin_alike(four.held_out, tmp_path / "held_out.jsonl")),)
    for where in ("off", "memory", "disk"):
        train(config_of(four, tmp_path / where, cache_frozen=where, **options))
        passed = [proof["passed"] for proof in proofs(tmp_path / where)]
        assert passed == ([] if where == "off" else [True, True]), "training rows and held-out ones"
    for where in ("memory", "disk"):
        assert final_bits(tmp_path / where) == final_bits(tmp_path / "off")


@pytest.mark.parametrize(
    "variant",
    [
        "gemma3_text",
        "phi3-longrope",
        "lfm2",
        "gemma4_text",
    ],
)
def test_other_families_end_in_the_same_bits(variant: str, four: TinyRun, tmp_path: Path) -> None:
    """Their layers differ in windows, angles or kind, so the input must fit the layers above."""
    more = {"sliding_window": 64} if variant in ("gemma3_text", "mistral", "gemma4_text") else {}
    more |= {"num_kv_shared_layers": 1} if variant == "gemma4_text" else {}
    model = save_tiny(tiny_model(variant, num_hidden_layers=4, **more), tmp_path / "model")
    for where in ("off", "memory"):
        train(config_of(four, tmp_path / where, model=str(model), cache_frozen=where))
    assert final_bits(tmp_path / "memory") == final_bits(tmp_path / "off")
    assert proofs(tmp_path / "memory")


def test_the_delta_rule_keeps_nothing(four: TinyRun, tmp_path: Path) -> None:
    """Its chunks are counted anew after a shared prefix."""
    model = save_tiny(tiny_model("qwen3_5_text", num_hidden_layers=6), tmp_path / "model")
    config = config_of(four, tmp_path / "run", model=str(model), layers="last:5", cache_frozen="memory")
    with pytest.raises(UsageError, match="has nothing to cache") as found:
        train(config)
    assert "the chunks of a layer with a state" in str(found.value.why)


@pytest.mark.parametrize("fixtures", [(), ("products_by_rows",)], ids=["", "products-by-rows"])
def test_a_quantized_base_ends_in_the_same_bits(
    fixtures: tuple[str, ...], four: TinyRun, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    for name in fixtures:
        request.getfixturevalue(name)
    kinds = iter([StorageType.Q8_0, StorageType.Q4_0, StorageType.Q5_1] * 30)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    base = tiny_model("llama", num_hidden_layers=4, **sizes)
    model = write_tiny_gguf(base, tmp_path / "tiny.gguf", storage=lambda _: next(kinds))
    adapters = set()
    for base_kind, where in (("quantized", "off"), ("quantized", "memory"), ("dense", "disk")):
        output = tmp_path / f"{base_kind}-{where}"
        options = {"base": base_kind, "cache_frozen": where, "dtype": "bfloat16", "epochs": 2}
        train(config_of(four, output, model=str(model), **options))
        adapters.add((output / "adapter" / "adapter_model.safetensors").read_bytes())
    assert len(adapters) == 1


def test_micro_batches_of_one_row_and_of_more(four: TinyRun, tmp_path: Path) -> None:
    """One row alone has no shared prefix although the others do."""
    rows = begin_alike(four.rows, tmp_path / "rows.jsonl")
    for count in (1, 3):  # of four: one alone, three and one
        for where in ("off", "memory"):
            options = {"micro_batch_rows": count, "cache_frozen": where, "data": (str(rows),)}
            train(config_of(four, tmp_path / f"{where}-{count}", **options))
        assert final_bits(tmp_path / f"memory-{count}") == final_bits(tmp_path / f"off-{count}")


def test_two_processes_end_in_the_same_bits(four: TinyRun, tmp_path: Path) -> None:
    train(config_of(four, tmp_path / "alone", cache_frozen="off", micro_batch_rows=1, recompute="none"))
    for where in ("memory", "disk"):
        output = tmp_path / where
        config = config_of(four, output, cache_frozen=where, micro_batch_rows=1, recompute="none")
        ranks = start_ranks([config] * 2, tmp_path / f"ranks-{where}")
        assert ranks.exit_codes() == [0, 0], ranks.said()
        adapter = Path("adapter", "adapter_model.safetensors")
        assert (output / adapter).read_bytes() == (tmp_path / "alone" / adapter).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Each row once.


def test_each_row_goes_through_the_lower_layers_once(four: TinyRun, tmp_path: Path) -> None:
    with watched() as plain:
        train(config_of(four, tmp_path / "off", cache_frozen="off", eval_every=3))
    with watched() as kept:
        train(config_of(four, tmp_path / "memory", cache_frozen="memory", eval_every=3))
    assert plain.rows == {}
    assert {count: sorted(rows) for count, rows in kept.rows.items()} == {11: list(range(11)), 4: list(range(4))}
    micro_batches, held_out, evaluations = 3 * 6, 2, 4
    assert plain.lower[True] == micro_batches
    assert kept.lower[True] == 0
    assert kept.compared == 1 + 1, "the first of the training rows' and the first of the held-out ones'"
    # What else goes through all layers, neutral texts, is the same in both.
    neighbour = plain.lower[False] - held_out * evaluations
    assert kept.lower[False] - neighbour == 6 + held_out + kept.compared


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Six layers: with five of them adapted, a pass through the first one takes two micro-batches' tokens."""
    return run_of_layers(6, tmp_path_factory.mktemp("six"))


@pytest.mark.parametrize(("dtype", "alike"), [("float32", True), ("bfloat16", False)])
def test_rows_of_the_next_batches_go_along(dtype: str, alike: bool, six: TinyRun, tmp_path: Path) -> None:
    """In fewer passes than there are micro-batches each row still goes through once, and to the same bits."""
    options: dict[str, Any] = {"dtype": dtype, "layers": "last:5", "eval_every": 2}
    if alike:
        options["data"] = (str(begin_alike(six.rows, tmp_path / "rows.jsonl")),)
    train(config_of(six, tmp_path / "off", cache_frozen="off", **options))
    for where in ("memory", "disk"):
        with watched() as kept:
            train(config_of(six, tmp_path / where, cache_frozen=where, **options))
        assert final_bits(tmp_path / where) == final_bits(tmp_path / "off")
        assert {count: sorted(rows) for count, rows in kept.rows.items()} == {11: list(range(11)), 4: list(range(4))}
        assert kept.passes[11] < 6 == kept.passes[4] + 4, "six micro-batches an epoch, two of held-out rows"
        assert [proof["passed"] for proof in proofs(tmp_path / where)] == [True, True]


def test_a_run_that_stops_after_such_a_pass_goes_on(six: TinyRun, tmp_path: Path) -> None:
    """Rows that were taken along before the stop are computed once more, with the others."""
    options = {"layers": "last:5", "save_every": 1}
    train(config_of(six, tmp_path / "straight", cache_frozen="off", **options))
    with watched() as before:
        half = stopped(config_of(six, tmp_path / "half", cache_frozen="disk", **options), 1)
    bits, _, after = resumed(half)
    assert bits == final_bits(tmp_path / "straight")
    assert len(before.rows[11]) > 4, "more than those of the first step"
    assert len(after.rows[11]) == len(set(after.rows[11]))


def test_two_processes_take_rows_of_their_own_along(six: TinyRun, tmp_path: Path) -> None:
    options = {"layers": "last:5", "micro_batch_rows": 1, "recompute": "none"}
    train(config_of(six, tmp_path / "alone", cache_frozen="off", **options))
    config = config_of(six, tmp_path / "two", cache_frozen="memory", **options)
    ranks = start_ranks([config] * 2, tmp_path / "ranks", at_place=dict.fromkeys((0, 1), ("passes", "count")))
    assert ranks.exit_codes() == [0, 0], ranks.said()
    reported = [json.loads(said.splitlines()[-1])["11"] for said in ranks.said()]
    for passes, rows in reported:
        assert passes < len(rows) == len(set(rows)), "micro-batches of one row each"
    assert {row for _, rows in reported for row in rows} == set(range(11))
    adapter = Path("adapter", "adapter_model.safetensors")
    assert (tmp_path / "two" / adapter).read_bytes() == (tmp_path / "alone" / adapter).read_bytes()


def test_nothing_goes_along_where_activations_are_computed_again(six: TinyRun, tmp_path: Path) -> None:
    """A step holds little then, and a pass of more tokens would hold more than it."""
    with watched() as kept:
        train(config_of(six, tmp_path / "run", cache_frozen="memory", layers="last:5", recompute="block"))
    assert kept.passes[11] == 6


def test_one_epoch_keeps_the_held_out_rows_alone(four: TinyRun, tmp_path: Path) -> None:
    with watched() as kept:
        train(config_of(four, tmp_path / "one", epochs=1, eval_every=1))
    assert {count: sorted(rows) for count, rows in kept.rows.items()} == {4: list(range(4))}
    train(config_of(four, tmp_path / "off", epochs=1, eval_every=1, cache_frozen="off"))
    assert final_bits(tmp_path / "one") == final_bits(tmp_path / "off")


# ---------------------------------------------------------------------------------------------------------------------
# A library whose bits follow the number of rows, as oneDNN with AMX where products do not go by our own tiles.


@pytest.fixture
def products_by_rows(monkeypatch: pytest.MonkeyPatch) -> ProductsByRows:
    library_by_rows = ProductsByRows(bounds=(48, 80))
    by_library(monkeypatch)
    monkeypatch.setattr(frozen_matrix, "library_product", library_by_rows)
    return library_by_rows


@pytest.mark.parametrize(
    ("rows", "dtype", "places"),
    [(1, "bfloat16", ("memory",)), (2, "float32", ("memory", "disk")), (4, "bfloat16", ("disk",))],
)
def test_rows_are_kept_whatever_the_library_does(
    rows: int,
    dtype: str,
    places: tuple[str, ...],
    products_by_rows: ProductsByRows,
    four: TinyRun,
    tmp_path: Path,
) -> None:
    """Micro-batches of all classes: rows are kept in those of the usual one alone, to the bits without keeping."""
    bits = {}
    for where in ("off", *places):
        options = {"micro_batch_rows": rows, "cache_frozen": where, "dtype": dtype}
        train(config_of(four, tmp_path / where, **options))
        bits[where] = final_bits(tmp_path / where)
        if where != "off":
            assert all(proof["passed"] for proof in proofs(tmp_path / where))
    assert all(bits[where] == bits["off"] for where in places)
    assert len(set(map(products_by_rows.kind, products_by_rows.sizes))) > 1, "classes do come up"


def test_a_resumed_run_has_the_same_bits_whatever_the_library_does(
    products_by_rows: ProductsByRows, four: TinyRun, tmp_path: Path
) -> None:
    del products_by_rows
    train(config_of(four, tmp_path / "straight", cache_frozen="off", save_every=1))
    half = stopped(config_of(four, tmp_path / "half", cache_frozen="disk", save_every=1), 5)
    bits, notes, computed = resumed(half)
    assert (bits, notes) == (final_bits(tmp_path / "straight"), []) and computed.rows


# ---------------------------------------------------------------------------------------------------------------------
# Where a row's states are not its own.


class Lower:
    """States that are their tokens' ids, and a little more in batches of some sizes, or from some call on."""

    def __init__(self, sizes: Collection[int] = (), from_call: int = 99, *, known: bool = True) -> None:
        self.sizes, self.from_call, self.known, self.calls = sizes, from_call, known, 0
        self.seen: list[PackedBatch] = []

    def layer_input(self, batch: PackedBatch, layer: int) -> Tensor:
        self.calls += 1
        self.seen.append(batch)
        size = batch.input_ids.shape[0]
        added = layer * 1e-3 if size in self.sizes or self.calls >= self.from_call else 0.0
        return batch.input_ids[:, None].float().expand(-1, 3) + added

    def set_usual_tokens(self, tokens: int) -> None:
        raise AssertionError("a set of rows does not ask for it")

    def is_batch_invariant(self, tokens: int, _layer: int) -> bool:
        return not self.known or tokens not in self.sizes


def kept_of(
    lower: Lower, at_once: int = 0, disk: tuple[FileLayer, Path] | None = None
) -> tuple[HiddenStateCache, list[Proof], list[str]]:
    random = np.random.default_rng(0)
    examples = []
    for length in (20, 30, 40, 50):
        supervised = np.zeros(length, dtype=np.bool_)
        supervised[-3:] = True
        examples.append(Example(random.integers(3, 99, length).astype(np.int32), supervised, "f:1"))
    packer = RowPacker(examples, share_prefixes=True)
    lengths = [*packer.lengths.tolist(), packer.common_prefix]
    logged: list[Proof] = []
    noted: list[str] = []
    store: StateStore = MemoryStateStore(lengths, 3, torch.float32)
    if disk is not None:
        store = DiskStateStore(*disk, lengths, 3, torch.float32, noted.append)
    kept = HiddenStateCache(lower, 2, packer, store, tokens_per_pass=at_once, log=logged.append, notify=noted.append)
    return kept, logged, noted


def test_sizes_whose_products_differ_are_computed_as_ever() -> None:
    """Rows of 19, 29, 39 and 49 tokens, filled up to 48 and 96, then to 64 and 80; one row alone to 32."""
    lower = Lower(sizes=[80, 32])
    kept, logged, noted = kept_of(lower)
    assert kept.packed([0, 3]).start is None, "80 tokens are not kept"
    for rows, size in (([0, 1], 48), ([2, 3], 96), ([0, 2], 64), ([0, 2], 64)):
        entering = kept.packed(rows).start
        assert entering is not None and entering.states.shape == (size, 3)
    assert kept.packed([1, 3]).start is None, "and 80 tokens are not put together"
    assert lower.calls == 3, "two that are computed, and the first that is put together"
    assert len(noted) == 1 and "products of 80 rows end in other bits" in noted[0]
    assert [proof.passed for proof in logged] == [True]


def test_a_row_that_is_missing_is_not_computed_in_such_a_size() -> None:
    lower = Lower(sizes=[32])
    kept, _, _ = kept_of(lower)
    kept.packed([0, 2])
    assert kept.packed([0, 1]).start is None, "row 1 alone has 29 tokens"
    assert lower.calls == 1
    assert kept.packed([1, 3]).start is not None


def states_of(batch: PackedBatch) -> Tensor:
    """Those that the batch was given, which are its ids here."""
    assert batch.start is not None
    assert torch.equal(batch.start.states, batch.input_ids[:, None].float().expand(-1, 3))
    return batch.start.states


def test_as_many_rows_go_along_as_there_is_room_for() -> None:
    """Rows of 19, 29, 39 and 49 tokens."""
    lower = Lower()
    kept, _, _ = kept_of(lower, at_once=19 + 29 + 39)
    states_of(kept.packed([0], iter([[1], [2], [3]])))
    assert lower.calls == 1 + 1, "the first that is put together is computed as well"
    states_of(kept.packed([1, 2], iter([[3]])))
    assert lower.calls == 2
    states_of(kept.packed([2, 3], iter([])))
    assert lower.calls == 3, "row 3 had no place"


def test_only_what_is_missing_goes_along() -> None:
    lower = Lower()
    kept, _, _ = kept_of(lower, at_once=1000)
    states_of(kept.packed([0, 1]))
    states_of(kept.packed([1, 2], [[0, 3]]))
    assert lower.seen[1].lengths[:2] == (39, 49), "rows 2 and 3"

    def asked() -> Iterator[list[int]]:
        pytest.fail("nothing is missing")
        yield []

    states_of(kept.packed([0, 3], asked()))


def test_rows_do_not_go_along_in_a_size_whose_products_differ() -> None:
    """All four rows have 136 tokens, filled up to 144."""
    lower = Lower(sizes=[144])
    kept, _, noted = kept_of(lower, at_once=1000)
    states_of(kept.packed([0, 1], [[2, 3]]))
    states_of(kept.packed([2, 3]))
    assert lower.calls == 2 and not noted


@pytest.mark.parametrize("taken", [0, 3])
def test_rows_do_not_go_along_where_the_disk_takes_no_more(taken: int, tmp_path: Path) -> None:
    """The pass whose states find no room is the last one; after it each batch is computed as part of its step."""
    records = [0]

    def before(_: int, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "write" and len(arguments[1]) > 200:
            records[0] += 1
            if records[0] > taken:
                raise OSError(errno.ENOSPC, "no more")

    lower = Lower()
    kept, _, noted = kept_of(lower, at_once=1000, disk=(InterceptedFiles(before), tmp_path))
    coming = [[1], [2], [3]]
    for number in range(4):
        assert kept.packed([number], coming[number:]).start is None
    assert (lower.calls, records[0]) == (1, taken + 1)
    assert len(noted) == 1 and "hidden states are no longer cached" in noted[0]


def test_the_file_has_no_name_and_gives_back_what_was_put(tmp_path: Path) -> None:
    store = DiskStateStore(FileLayer(), tmp_path, [5, 0, 7], 3, torch.bfloat16, pytest.fail)
    rows = {number: torch.randn(tokens, 3).bfloat16() for number, tokens in ((2, 7), (0, 5))}
    for number, states in rows.items():
        store.put(number, states)
    for number, states in rows.items():
        found = store.get(number)
        assert number in store and found is not None and torch.equal(found, states)
    assert store.get(1) is None and not list(tmp_path.iterdir())
    store.close()
    assert store.get(0) is None and 0 not in store


def test_states_that_are_others_in_the_first_batch_are_not_used() -> None:
    lower = Lower(sizes=[64], known=False)
    kept, logged, noted = kept_of(lower)
    kept.packed([0, 1])
    kept.packed([2, 3])
    batch = kept.packed([0, 2])
    assert batch.start is not None and batch.input_ids.shape == (64,)
    assert torch.equal(batch.start.states, batch.input_ids[:, None].float().expand(-1, 3) + 2e-3), "as computed"
    assert len(noted) == 1 and "the layers below 2 are computed in each epoch" in noted[0]
    assert [proof.passed for proof in logged] == [False]
    assert kept.packed([0, 1]).start is None, "from here on they are computed as part of the step"


def test_states_that_change_end_the_run() -> None:
    kept, logged, _ = kept_of(Lower(from_call=4))
    for rows in ([0, 1], [2, 3], *[[0, 2]] * 31):
        kept.packed(rows)
    with pytest.raises(CheckError, match="cached hidden states differ from the computed ones") as found:
        kept.packed([0, 3])
    assert "--cache-frozen off" in str(found.value.next_step)
    assert [proof.passed for proof in logged] == [True, False]
