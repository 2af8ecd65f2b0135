"""Which adapters may be combined, by what their records say of their base, and what the new one records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import read_adapter_directory
from backhand.adapters.loading import load_adapter_for, source_digests
from backhand.adapters.record import AdapterRecord
from backhand.arithmetic.combine import combine
from backhand.arithmetic.options import CombineOptions
from backhand.cli.main import main
from backhand.errors import ArtifactError
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading import open_model
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import LoRAParameters
from tests.support.saved_adapters import resolve_slots, save_adapter
from tests.support.tiny_models import save_tiny, tiny_model

BOTH = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_model(save_tiny(tiny_model("llama-tied"), Path(tmp_path_factory.mktemp("base"))))


def shapes_of(source: ModelSource) -> dict[str, tuple[int, int]]:
    return module_shapes(decoder_config(source.config))


def adapter(
    source: ModelSource, directory: Path, *, targets: tuple[str, ...] = BOTH, base: str = "hub/base", **record: Any
) -> Path:
    config = LoRAConfig(rank=2, target_modules=targets)
    parameters = LoRAParameters(resolve_slots(config, shapes_of(source)))
    parameters.values.normal_()
    digests = source_digests(source, parameters.slots, chat_template="{{ a }}")
    whole = AdapterRecord(**({"origin": "somewhere"} | digests | record))
    return save_adapter(directory, config, parameters, base_model=base, record=whole)


def add(pair: tuple[Path, Path], output: Path, **options: Any) -> tuple[AdapterRecord, tuple[str, ...]]:
    result = combine(CombineOptions("add", pair, output, **options))
    record = read_adapter_directory(output).record
    assert record is not None
    return record, result.notes


def test_what_all_agree_on_is_recorded(source: ModelSource, tmp_path: Path) -> None:
    pair = adapter(source, tmp_path / "a"), adapter(source, tmp_path / "b", base="same/base/elsewhere")
    record, notes = add(pair, tmp_path / "new")  # the digest says that both names mean the same weights
    assert notes == () and record.origin == "somewhere"
    names = [name for name in shapes_of(source) if name.endswith(BOTH)]
    assert record.base_digest == source_digests(source, names)["base_digest"]
    loaded = load_adapter_for(source, tmp_path / "new", shapes_of(source), chat_template="{{ a }}")
    assert loaded.notes == () and len(loaded.targets) == 6
    with pytest.raises(ArtifactError, match="does not belong"):
        load_adapter_for(source, tmp_path / "new", shapes_of(source), chat_template="{{ b }}")


def test_labels_and_system_message_stay_where_all_have_the_same(source: ModelSource, tmp_path: Path) -> None:
    trained = {"labels": {"yes": [3, 2], "no": [4, 2]}, "system": "Say yes or no."}
    pair = adapter(source, tmp_path / "a", **trained), adapter(source, tmp_path / "b", **trained)
    record, _ = add(pair, tmp_path / "same")
    assert (record.labels, record.system) == (trained["labels"], trained["system"])
    other = adapter(source, tmp_path / "c", labels={"yes": [3, 2]}, system="Say.")
    record, _ = add((pair[0], other), tmp_path / "different")
    assert (record.labels, record.system) == ({}, None)
    other = adapter(source, tmp_path / "d", tokenizer_digest="sha256:0", **trained)
    record, _ = add((pair[0], other), tmp_path / "forced", force_base=True)
    assert (record.labels, record.system) == ({}, trained["system"])  # labels are tokens


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        ({"base_digest": "sha256:0"}, "base model"),
        ({"tokenizer_digest": "sha256:0"}, "tokenizer"),
        ({"chat_template_digest": "sha256:0"}, "chat template"),
    ],
)
def test_different_bases_are_refused_unless_forced(
    record: dict[str, str],
    shown: str,
    source: ModelSource,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pair = adapter(source, tmp_path / "a"), adapter(source, tmp_path / "b", **record)
    with pytest.raises(ArtifactError, match="same model") as caught:
        add(pair, tmp_path / "new")
    why = caught.value.why or ""
    assert why.startswith(shown) and "a, rank 2" in why and "b, rank 2" in why and not (tmp_path / "new").exists()
    words = ["combine", "add", *map(str, pair), "--output", str(tmp_path / "new"), "--force-base"]
    assert main(words) == 0
    assert f"WARNING: combined by force: {shown}" in capsys.readouterr().err
    made = read_adapter_directory(tmp_path / "new").record
    assert made is not None and getattr(made, next(iter(record))) is None


def test_names_of_bases_count_where_there_are_no_digests(source: ModelSource, tmp_path: Path) -> None:
    pair = (
        adapter(source, tmp_path / "a", base_digest=None),
        adapter(source, tmp_path / "b", base_digest=None, base="another/base"),
    )
    with pytest.raises(ArtifactError, match="hub/base of a, rank 2; another/base of b, rank 2"):
        add(pair, tmp_path / "new")


def test_digests_of_other_modules_are_not_compared_and_a_model_gives_the_new_one(
    source: ModelSource, tmp_path: Path
) -> None:
    pair = adapter(source, tmp_path / "a"), adapter(source, tmp_path / "b", targets=("up_proj",))
    record, notes = add(pair, tmp_path / "new")
    assert record.base_digest is None and record.tokenizer_digest is not None
    assert len(notes) == 1 and "--model" in notes[0]
    record, notes = add(pair, tmp_path / "known", model=str(source.path))
    assert record.base_digest is not None and notes == ()
    loaded = load_adapter_for(source, tmp_path / "known", shapes_of(source))
    assert len(loaded.targets) == 9 and set(loaded.config.target_modules) == {*BOTH, "up_proj"}


def test_a_model_that_is_not_theirs_is_refused(source: ModelSource, tmp_path: Path) -> None:
    other = save_tiny(tiny_model("llama-tied", seed=5), tmp_path / "other")
    pair = adapter(source, tmp_path / "a"), adapter(source, tmp_path / "b")
    with pytest.raises(ArtifactError, match="does not belong to this model"):
        add(pair, tmp_path / "new", model=str(other))
    _, notes = add(pair, tmp_path / "new", model=str(other), force_base=True)
    assert len(notes) == 2 and all(note.startswith("used by force: base model") for note in notes)


def test_target_modules_that_differ_in_form_become_whole_paths(source: ModelSource, tmp_path: Path) -> None:
    config = LoRAConfig(rank=2, target_modules=r".*\.[02]\..*\.q_proj")
    parameters = LoRAParameters(resolve_slots(config, shapes_of(source)))
    parameters.values.normal_()
    regex = save_adapter(tmp_path / "regex", config, parameters, base_model="hub/base")
    add((adapter(source, tmp_path / "a", base_digest=None, targets=("v_proj",)), regex), tmp_path / "new")
    loaded = load_adapter_for(source, tmp_path / "new", shapes_of(source))
    names = {target.name for target in loaded.targets}
    assert set(loaded.config.target_modules) == names and len(names) == 5
    add((regex, regex), tmp_path / "same")
    assert load_adapter_for(source, tmp_path / "same", shapes_of(source)).config.target_modules == config.target_modules
