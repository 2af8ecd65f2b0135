"""Hidden states that are kept below the lowest adapted layer: the bits of a run that computes them in every epoch."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as StorageType
from torch import Tensor

from backhand.adapters.config import LoRAConfig
from backhand.cli.main import main
from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.errors import CheckError, ResourceError, UsageError
from backhand.kernels.library import library, torch_form
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder import decoder as decoder_module
from backhand.nn.decoder import row_products
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.ops import frozen_matrix
from backhand.runs.directory import Proof
from backhand.training.config import ModelOptions, TrainConfig
from backhand.training.decoder_engine import DecoderEngine
from backhand.training.kept_states import KeptStates, StatesInMemory
from backhand.training.memory import calibration
from backhand.training.memory.plan import MemoryPlan
from backhand.training.memory.states import Below, keep_states, kept_tokens
from backhand.training.observer import Observer
from backhand.training.run import train
from support.faulty_files import InterceptedFiles, half_written
from support.products_by_rows import ProductsByRows, by_library
from support.ranks import start_ranks
from support.tiny_gguf import write_tiny_gguf
from support.tiny_models import WINDOW, save_tiny, tiny_model
from support.tiny_run import StopAfter, TinyRun, final_bits, with_options

_BEGINNING = "the user asks an assistant and the assistant answers in json a list of names and one number is for what "
KEPT = "kept hidden states are those computed again, bit by bit"


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Four layers."""
    if library() is None:
        pytest.skip("the compiled library is not built, and without it nothing is kept")
    directory = tmp_path_factory.mktemp("four")
    run = TinyRun(directory)
    run.model = save_tiny(tiny_model("llama-tied", num_hidden_layers=4), directory / "four")
    return run


def begin_alike(rows: Path, path: Path) -> Path:
    """The rows, each behind the same words."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "prompt": _BEGINNING + line["prompt"]}) + "\n" for line in lines))
    return path


def config_of(four: TinyRun, output: Path, **options: Any) -> TrainConfig:
    """Three epochs of three steps, the upper half of the layers."""
    return four.config(output, **{"layers": "last:2", "epochs": 3, "micro_batch_rows": 2, "answers": 0, **options})


def proofs(run: Path) -> list[dict[str, Any]]:
    lines = (run / "proofs.jsonl").read_text().splitlines()
    return [found for line in lines if (found := json.loads(line))["proof"] == KEPT]


class Computed:
    """What goes through the lower blocks: rows that are computed to be kept, and batches by themselves.

    Attributes:
        rows: the rows of each set in the order in which they were computed, by the number of rows of the set.
        compared: batches that were put together and computed as well.
        lower: batches whose lower blocks were computed, by steps (True) and by anything else.
    """

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}
        self.compared = 0
        self.lower = {True: 0, False: 0}


@contextmanager
def watched() -> Iterator[Computed]:
    """Inside, what goes through the lower blocks is counted."""
    computed, in_step = Computed(), [False]
    compute, step, block = KeptStates._compute, Decoder.loss_and_gradients, decoder_module.block_forward
    compared = KeptStates._compared

    def watched_compute(self: KeptStates, rows: list[int], batch: PackedBatch) -> Tensor:
        computed.rows.setdefault(len(self._packer.lengths), []).extend(rows)
        return compute(self, rows, batch)

    def watched_compared(self: KeptStates, *arguments: Any, **named: Any) -> Tensor:
        computed.compared += 1
        return compared(self, *arguments, **named)

    def watched_step(self: Decoder, *arguments: Any) -> Tensor:
        in_step[0] = True
        try:
            return step(self, *arguments)
        finally:
            in_step[0] = False

    def watched_block(x: Tensor, weights: Any, *rest: Any) -> Any:
        if watching and weights is watching[0]:
            computed.lower[in_step[0]] += 1
        return block(x, weights, *rest)

    def watched_from_source(*arguments: Any, **named: Any) -> Decoder:
        made = from_source(*arguments, **named)
        watching[:] = [made.weights.blocks[0]]
        return made

    watching: list[Any] = []
    from_source = Decoder.from_source
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptStates, "_compute", watched_compute)
        patch.setattr(KeptStates, "_compared", watched_compared)
        patch.setattr(Decoder, "loss_and_gradients", watched_step)
        patch.setattr(Decoder, "from_source", watched_from_source)
        patch.setattr(decoder_module, "block_forward", watched_block)
        yield computed


# ---------------------------------------------------------------------------------------------------------------------
# The same bits.


@pytest.mark.parametrize("alike", [False, True], ids=["", "shared-prefix"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
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
        assert not (tmp_path / where / "states").exists()


@pytest.mark.parametrize(
    "variant",
    [
        "qwen3",
        "gemma3_text",
        "mistral",
        "granite",
        "olmo2",
        "phi3-longrope",
        "glm4",
        "lfm2",
        "qwen3_5_text",
        "gemma4_text",
    ],
)
def test_other_families_end_in_the_same_bits(variant: str, four: TinyRun, tmp_path: Path) -> None:
    more = {"sliding_window": 64} if variant in ("gemma3_text", "mistral", "gemma4_text") else {}
    more |= {"num_kv_shared_layers": 1} if variant == "gemma4_text" else {}
    model = save_tiny(tiny_model(variant, num_hidden_layers=4, **more), tmp_path / "model")
    for where in ("off", "memory"):
        train(config_of(four, tmp_path / where, model=str(model), cache_frozen=where))
    assert final_bits(tmp_path / "memory") == final_bits(tmp_path / "off")
    assert proofs(tmp_path / "memory")


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
        train(config_of(four, output, model=str(model), base=base_kind, cache_frozen=where, dtype="bfloat16"))
        adapters.add((output / "adapter" / "adapter_model.safetensors").read_bytes())
    assert len(adapters) == 1


def test_micro_batches_of_one_row_and_of_all(four: TinyRun, tmp_path: Path) -> None:
    """One row alone has no shared prefix although the others do."""
    rows = begin_alike(four.rows, tmp_path / "rows.jsonl")
    for count in (1, 3, 4):
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
        assert not (output / "states").exists()


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
    beside = plain.lower[False] - held_out * evaluations
    assert kept.lower[False] - beside == 6 + held_out + kept.compared


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
    for module in (frozen_matrix, row_products):
        monkeypatch.setattr(module, "library_product", library_by_rows)
    return library_by_rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_are_kept_whatever_the_library_does(
    rows: int, dtype: str, products_by_rows: ProductsByRows, four: TinyRun, tmp_path: Path
) -> None:
    """Of micro-batches of all classes, each row goes through the lower layers once, to the bits without keeping."""
    bits = {}
    for where in ("off", "memory", "disk"):
        notes = Notes()
        options = {"micro_batch_rows": rows, "cache_frozen": where, "dtype": dtype}
        with watched() as computed:
            train(config_of(four, tmp_path / where, **options), callbacks=[notes])
        bits[where] = final_bits(tmp_path / where)
        assert not [text for text in notes.texts if "other bits" in text or "in each epoch" in text]
        if where != "off":
            assert computed.lower[True] == 0
            assert {count: sorted(found) for count, found in computed.rows.items()} == {
                11: list(range(11)),
                4: list(range(4)),
            }
            assert all(proof["passed"] for proof in proofs(tmp_path / where))
    assert bits["off"] == bits["memory"] == bits["disk"]
    assert len(set(map(products_by_rows.kind, products_by_rows.sizes))) > 1, "classes do come up"


def test_a_resumed_run_has_the_same_bits_whatever_the_library_does(
    products_by_rows: ProductsByRows, four: TinyRun, tmp_path: Path
) -> None:
    del products_by_rows
    train(config_of(four, tmp_path / "straight", cache_frozen="off", save_every=1))
    half = stopped(config_of(four, tmp_path / "half", cache_frozen="disk", save_every=1), 5)
    bits, notes, computed = resumed(half)
    assert (bits, notes, computed.rows) == (final_bits(tmp_path / "straight"), [], {})


# ---------------------------------------------------------------------------------------------------------------------
# Going on.


class Notes(Observer):
    """What a run noted."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)


def stopped(config: TrainConfig, step: int) -> Path:
    with pytest.raises(StopAfter.Stopped):
        train(config, callbacks=[StopAfter(step)])
    return config.run.output


def resumed(output: Path, **options: Any) -> tuple[dict[str, bytes], list[str], Computed]:
    notes = Notes()
    with watched() as computed:
        train(with_options(TrainConfig(), output=output, resume=True, quiet=True, **options), callbacks=[notes])
    return final_bits(output), [text for text in notes.texts if "hidden states" in text], computed


@pytest.fixture(scope="module")
def straight(four: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("straight") / "run"
    train(config_of(four, output, cache_frozen="off", save_every=1))
    return final_bits(output)


@pytest.fixture(scope="module")
def half_way(four: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped in the middle of the second epoch, its states on the disk."""
    config = config_of(four, tmp_path_factory.mktemp("half") / "run", cache_frozen="disk", save_every=1)
    return stopped(config, 5)


def states_file(run: Path) -> Path:
    (file,) = (run / "states").iterdir()
    return file


def copied(run: Path, place: Path) -> Path:
    return Path(shutil.copytree(run, place))


def test_a_resumed_run_finds_its_states(half_way: Path, straight: dict[str, bytes], tmp_path: Path) -> None:
    bits, notes, computed = resumed(copied(half_way, tmp_path / "run"))
    assert (bits, notes, computed.rows) == (straight, [], {})
    assert not (tmp_path / "run" / "states").exists()


def test_what_is_no_longer_kept_on_the_disk_is_removed(
    half_way: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    bits, notes, _ = resumed(copied(half_way, tmp_path / "run"), cache_frozen="memory")
    assert (bits, notes) == (straight, [])
    assert not (tmp_path / "run" / "states").exists()


@pytest.mark.parametrize("then", ["memory", "off", "disk"])
def test_a_run_without_them_makes_them_anew(
    then: str, half_way: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    """In the middle of an epoch, so that batches of rows that are there and rows that are not come up."""
    run = copied(half_way, tmp_path / "run")
    shutil.rmtree(run / "states")
    bits, notes, computed = resumed(run, cache_frozen=then)
    assert (bits, notes) == (straight, [])
    assert all(len(rows) == len(set(rows)) for rows in computed.rows.values())


def test_states_of_other_rows_or_another_base_are_not_taken(
    four: TinyRun, half_way: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    rows = begin_alike(four.rows, tmp_path / "rows.jsonl")
    base = save_tiny(tiny_model("llama-tied", num_hidden_layers=4, seed=7), tmp_path / "base")
    for number, other in enumerate(({"data": (str(rows),)}, {"model": str(base)}, {"layers": "last:1"})):
        config = config_of(four, tmp_path / f"other-{number}", cache_frozen="disk", save_every=1, **other)
        run = copied(half_way, tmp_path / f"run-{number}")
        shutil.copy(states_file(stopped(config, 5)), states_file(run))
        bits, notes, computed = resumed(run)
        assert bits == straight
        assert len(notes) == 1 and "made for another base, other rows" in notes[0]
        assert computed.rows


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def zeros_behind(file: Path) -> None:
    file.write_bytes(file.read_bytes() + bytes(4096))


def replaced_by_a_link(file: Path) -> None:
    file.rename(file.parent.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent.parent / "elsewhere")


@pytest.mark.parametrize("damage", [cut_off, emptied, zeros_behind, replaced_by_a_link])
def test_a_file_that_is_not_whole_gives_way(
    damage: Callable[[Path], None], half_way: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    run = copied(half_way, tmp_path / "run")
    damage(states_file(run))
    elsewhere = tmp_path / "elsewhere"
    before = elsewhere.read_bytes() if elsewhere.exists() else None
    bits, notes, _ = resumed(run)
    assert bits == straight
    assert len(notes) == 1 and "made anew" in notes[0]
    assert before is None or elsewhere.read_bytes() == before


def test_changed_states_are_noticed_row_by_row(half_way: Path, straight: dict[str, bytes], tmp_path: Path) -> None:
    """One bit in each kilobyte, wherever it falls: in states, in a length, in a number, in a checksum."""
    size = states_file(half_way).stat().st_size
    for first in range(200, 1200, 250):
        run = copied(half_way, tmp_path / f"run-{first}")
        damaged = bytearray(states_file(run).read_bytes())
        for place in range(first, size, 1024):
            damaged[place] ^= 1 << (place % 8)
        states_file(run).write_bytes(damaged)
        bits, notes, computed = resumed(run)
        assert bits == straight
        assert notes and computed.rows


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_no_more_ends_the_keeping_and_not_the_run(
    code: int, four: TinyRun, straight: dict[str, bytes], tmp_path: Path
) -> None:
    opened: set[int] = set()

    def before(_: int, name: str, arguments: tuple[Any, ...]) -> None:
        # The third record fails, half of it written.
        if name == "write" and len(arguments[1]) > 2000 and b"checkpoint" not in bytes(arguments[1][:4000]):
            where = Path(f"/proc/self/fd/{arguments[0]}").readlink()
            if where.parent.name == "states":
                opened.add(len(opened))
                if len(opened) == 3:
                    half_written(name, arguments)
                    raise OSError(code, "no more")

    notes, output = Notes(), tmp_path / "run"
    files = InterceptedFiles(before)
    train(config_of(four, output, cache_frozen="disk", save_every=1), files=files, callbacks=[notes])
    assert len(opened) == 3
    assert final_bits(output) == straight
    assert [text for text in notes.texts if "no more hidden states are kept" in text and "no more" in text]
    assert not list((output / "states").glob("*"))


def test_a_directory_that_takes_no_file_ends_the_keeping(
    four: TinyRun, straight: dict[str, bytes], tmp_path: Path
) -> None:
    def before(_: int, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "make_directory" and arguments[0].name == "states":
            raise OSError(errno.EDQUOT, "quota")

    notes = Notes()
    config = config_of(four, tmp_path / "run", cache_frozen="disk", save_every=1)
    train(config, files=InterceptedFiles(before), callbacks=[notes])
    assert final_bits(tmp_path / "run") == straight
    assert [text for text in notes.texts if "no hidden states are kept" in text and "quota" in text]


def test_repeating_the_last_steps_computes_them_all(four: TinyRun, tmp_path: Path) -> None:
    """The proof of resuming goes without what is kept: its steps are the ordinary ones."""
    with watched() as computed:
        train(config_of(four, tmp_path / "run", cache_frozen="memory", prove_resume=2))
    assert computed.lower[True] == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "proofs.jsonl").read_text().splitlines()]
    assert [line["passed"] for line in lines if line["kind"] == "resume"] == [True]


# ---------------------------------------------------------------------------------------------------------------------
# Where a row's states are not its own.


class Lower:
    """States that are their tokens' ids, and a little more in batches of some sizes, or from some call on."""

    def __init__(self, sizes: Collection[int] = (), from_call: int = 99, *, known: bool = True) -> None:
        self.sizes, self.from_call, self.known, self.calls = sizes, from_call, known, 0

    def entering(self, batch: PackedBatch, layer: int) -> Tensor:
        self.calls += 1
        size = batch.input_ids.shape[0]
        added = layer * 1e-3 if size in self.sizes or self.calls >= self.from_call else 0.0
        return batch.input_ids[:, None].float().expand(-1, 3) + added

    def settle_rows(self, layer: int, tokens: int) -> None:
        raise AssertionError("a set of rows does not ask for it")

    def keeps_rows(self, tokens: int) -> bool:
        return not self.known or tokens not in self.sizes


def kept_of(lower: Lower) -> tuple[KeptStates, list[Proof], list[str]]:
    random = np.random.default_rng(0)
    examples = []
    for length in (20, 30, 40, 50):
        supervised = np.zeros(length, dtype=np.bool_)
        supervised[-3:] = True
        examples.append(Example(random.integers(3, 99, length).astype(np.int32), supervised, "f:1"))
    packer = RowPacker(examples, share_prefixes=True)
    store = StatesInMemory([*packer.lengths, packer.common], 3, torch.float32)
    logged: list[Proof] = []
    noted: list[str] = []
    return KeptStates(lower, 2, packer, store, log=logged.append, noted=noted.append), logged, noted


def test_sizes_whose_products_differ_are_computed_as_ever() -> None:
    """Rows of 19, 29, 39 and 49 tokens, filled up to 48 and 96, then to 64 and 80; one row alone to 32."""
    lower = Lower(sizes=[80, 32])
    kept, logged, noted = kept_of(lower)
    assert kept.packed([0, 3]).entering is None, "80 tokens are not kept"
    for rows, size in (([0, 1], 48), ([2, 3], 96), ([0, 2], 64), ([0, 2], 64)):
        entering = kept.packed(rows).entering
        assert entering is not None and entering.states.shape == (size, 3)
    assert kept.packed([1, 3]).entering is None, "and 80 tokens are not put together"
    assert lower.calls == 3, "two that are computed, and the first that is put together"
    assert len(noted) == 1 and "products of 80 rows end in other bits" in noted[0]
    assert [proof.passed for proof in logged] == [True]


def test_a_row_that_is_missing_is_not_computed_in_such_a_size() -> None:
    lower = Lower(sizes=[32])
    kept, _, _ = kept_of(lower)
    kept.packed([0, 2])
    assert kept.packed([0, 1]).entering is None, "row 1 alone has 29 tokens"
    assert lower.calls == 1
    assert kept.packed([1, 3]).entering is not None


def test_states_that_are_others_in_the_first_batch_are_not_used() -> None:
    lower = Lower(sizes=[64], known=False)
    kept, logged, noted = kept_of(lower)
    kept.packed([0, 1])
    kept.packed([2, 3])
    batch = kept.packed([0, 2])
    assert batch.entering is not None and batch.input_ids.shape == (64,)
    assert torch.equal(batch.entering.states, batch.input_ids[:, None].float().expand(-1, 3) + 2e-3), "as computed"
    assert len(noted) == 1 and "the layers below 2 are computed in each epoch" in noted[0]
    assert [proof.passed for proof in logged] == [False]
    assert kept.packed([0, 1]).entering is None, "from here on they are computed as part of the step"


def test_states_that_change_end_the_run() -> None:
    kept, logged, _ = kept_of(Lower(from_call=4))
    for rows in ([0, 1], [2, 3], *[[0, 2]] * 31):
        kept.packed(rows)
    with pytest.raises(CheckError, match="kept hidden states are not those that are computed now") as found:
        kept.packed([0, 3])
    assert "--cache-frozen off" in str(found.value.next_step)
    assert [proof.passed for proof in logged] == [True, False]


# ---------------------------------------------------------------------------------------------------------------------
# The choice.


BELOW, STEP = Below(20, 576, 1152), MemoryPlan(4, "none", {"process": 1 << 30})
NEEDED = 1152 << 20


def choice(asked: Any, *, below: Below = BELOW, tokens: int = 1 << 20, budget: int | None = None, disk: int = 0) -> Any:
    return keep_states(asked, below, tokens, STEP, budget_bytes=budget, disk_bytes=disk)


def test_auto_takes_memory_while_it_lasts_then_the_disk() -> None:
    assert choice("auto").where == "memory"
    enough = int(((1 << 30) + NEEDED) / 0.95) + 1
    assert (choice("auto", budget=enough).where, choice("auto", budget=enough).bytes) == ("memory", NEEDED)
    assert choice("auto", budget=enough - 2, disk=2 * NEEDED).where == "disk"
    off = choice("auto", budget=enough - 2, disk=2 * NEEDED - 1)
    assert (off.where, off.bytes) == ("off", 0) and "neither memory nor disk" in str(off.note)


def test_auto_keeps_nothing_where_there_is_nothing_to_keep() -> None:
    assert choice("auto", below=Below()).note is None
    assert choice("auto", tokens=0).where == "off"
    dependent = choice("auto", below=Below(20, 576, 1152, "its rows meet"))
    assert dependent.where == "off" and "its rows meet" in str(dependent.note)


def test_what_is_asked_for_and_cannot_be_is_an_error() -> None:
    with pytest.raises(UsageError, match="nothing that it could keep") as found:
        choice("memory", below=Below())
    assert "--layers last:8" in str(found.value.next_step)
    with pytest.raises(UsageError, match="nothing that it could keep"):
        choice("disk", below=Below(20, 576, 1152, "its rows meet"))
    with pytest.raises(ResourceError, match="may be used") as short:
        choice("memory", budget=1 << 30)
    assert "--cache-frozen disk" in str(short.value.next_step)
    with pytest.raises(ResourceError, match="are free"):
        choice("disk", disk=NEEDED - 1)
    with pytest.raises(UsageError, match="backhand engine only"):
        ModelOptions(engine="transformers", cache_frozen="memory").validate()
    assert choice("off", below=Below()).where == "off"


@pytest.mark.parametrize(
    ("variant", "longest", "loops", "why"),
    [
        ("llama-tied", 99, True, None),
        ("llama-tied", 99, False, "without the compiled loops"),
        ("gemma2", 5, True, "capped attention scores"),
        ("gemma3_text", WINDOW, True, None),
        ("gemma3_text", WINDOW + 1, True, f"longer than a window of {WINDOW} tokens"),
    ],
)
def test_where_the_engine_promises_states_of_a_rows_own(
    variant: str, longest: int, loops: bool, why: str | None, tmp_path: Path
) -> None:
    if loops and library() is None:
        pytest.skip("the compiled library is not built")
    source = open_model(str(save_tiny(tiny_model(variant, num_hidden_layers=4), tmp_path / "model")))
    engine = DecoderEngine(source, torch.bfloat16)
    layout = engine.layout(LoRAConfig(rank=2, layers="last:1"))
    with nullcontext() if loops else torch_form():
        below = engine.below(layout, longest)
    assert (below.layer, below.width, below.token_bytes) == (3, 60, 120)
    assert below.dependent is None if why is None else why in str(below.dependent)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--layers", "last:2"), None),
        ((), "the lowest adapted layer is the first one"),
        (("--layers", "last:2", "--trainable-token-indices", "5"), "the lowest adapted layer is the first one"),
    ],
)
def test_plan_says_what_is_kept(
    words: tuple[str, ...], why: str | None, four: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["plan", "--model", str(four.model), "--dtype", "float32", "--threads", "1", "--data", str(four.rows)]
    base += ["--eval-data", str(four.held_out), "--no-calibrate", "--json", *words]
    assert main(base) == 0
    found = json.loads(capsys.readouterr().out)
    assert main([*base, "--cache-frozen", "memory"]) == (0 if why is None else 2)
    said = capsys.readouterr()
    if why is not None:
        assert found["kept_states"] == {"where": "off", "layer": 0, "bytes": 0}
        assert why in said.err
        return
    assert json.loads(said.out)["kept_states"] == found["kept_states"]
    assert found["kept_states"]["where"] == "memory" and found["kept_states"]["layer"] == 2
    assert found["kept_states"]["bytes"] == found["parts"]["hidden states of frozen layers"] > 0
    assert found["kept_states"]["bytes"] % (4 * 60) == 0, "float32, 60 wide"


def test_what_all_rows_begin_with_is_counted_once() -> None:
    ids = np.arange(60, dtype=np.int32)
    supervised = np.zeros(60, dtype=np.bool_)
    supervised[55:] = True
    rows = [Example(ids[:length], supervised[:length], "f:1") for length in (60, 57)]
    packer = RowPacker(rows, share_prefixes=True)
    assert (packer.common, packer.lengths) == (54, [59, 56])
    assert kept_tokens(packer) == 54 + 5 + 2
    assert kept_tokens(RowPacker(rows, share_prefixes=False)) == 59 + 56


def test_a_forward_pass_below_is_measured_and_not_guessed() -> None:
    """One and four blocks: a block takes 0.5 s of a step with adapter and 0.1 of a forward pass without."""
    token = calibration._whole(30, 20, (1, 4), (1.0, 2.5), (0.2, 0.5), 100)
    assert token == pytest.approx(((1.0 + 0.5 * 9) / 100, 20 * 0.1 / 100))
    assert calibration._whole(4, 0, (1, 4), (1.0, 2.5), (), 100) == pytest.approx(((1.0 + 0.5 * 3) / 100, 0.0))
    assert calibration._whole(1, 0, (1,), (1.0,), (), 100) == pytest.approx((0.01, 0.0))


def test_speed_counts_what_is_spared(four: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["plan", "--model", str(four.model), "--dtype", "float32", "--threads", "1", "--data", str(four.rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backhand.training.memory.calibration.calibrate.__kwdefaults__", {"budget_s": 0.1})
        found = {}
        for words in ("auto", "off"):
            assert main([*base, "--layers", "last:2", "--json", "--cache-frozen", words]) == 0
            found[words] = json.loads(capsys.readouterr().out)
    assert found["off"]["kept_s"] == 0
    assert found["auto"]["kept_s"] > 0
