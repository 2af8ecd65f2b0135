"""A checkpoint is there as a whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backhand.errors import ArtifactError, BackhandError, ResourceError
from backhand.files import FileLayer
from backhand.runs.checkpoint import CheckpointStore, load_checkpoint
from tests.support.faulty_files import CALLS, InterceptedFiles, LosingFiles, failing, in_child, killing

OLD = {"state.safetensors": b"old" * 50, "progress.json": b"{}", "empty": b""}
NEW = {"state.safetensors": b"new" * 70, "progress.json": b"[1]", "empty": b""}
FACTS = {"base_digest": "sha256:1", "sampler": {"row": 3}}


def store_in(directory: Path, files: FileLayer | None = None) -> CheckpointStore:
    directory.mkdir(exist_ok=True)
    return CheckpointStore(directory, files or FileLayer(), lambda _: None)


def newest(directory: Path) -> tuple[int, Mapping[str, bytes]]:
    checkpoint = store_in(directory).newest_valid()
    assert checkpoint is not None
    return checkpoint.step, checkpoint.contents


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".tmp") or path.name.endswith(".old")]


def calls_of_a_save(tmp_path: Path, step: int) -> int:
    """How many calls it takes to save `step` after step 1 was saved, in a directory of its own."""
    files = InterceptedFiles()
    store_in(tmp_path / "counted").save(1, OLD, FACTS)
    store_in(tmp_path / "counted", files).save(step, NEW, FACTS)
    return files.count


def test_saved_and_loaded(tmp_path: Path) -> None:
    store = store_in(tmp_path / "c")
    store.save(7, NEW, FACTS)
    checkpoint = store.newest_valid()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.contents, checkpoint.facts) == (7, NEW, FACTS)
    assert (tmp_path / "c" / "latest").read_text() == "step-7\n"
    manifest = json.loads((tmp_path / "c" / "step-7" / "manifest.json").read_text())
    assert manifest["files"]["progress.json"]["bytes"] == 3 and len(manifest["files"]) == 3
    assert not leftovers(tmp_path / "c")


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            store_in(tmp_path / f"{mask}").save(1, NEW, FACTS)
        finally:
            os.umask(before)
        for path in (tmp_path / f"{mask}" / "step-1").iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_save_uses_every_call_of_the_layer(tmp_path: Path) -> None:
    files = InterceptedFiles()
    store_in(tmp_path / "c", files).save(1, OLD, FACTS)
    store_in(tmp_path / "c", files).save(1, NEW, FACTS)
    assert set(CALLS) - set(files.names) == {"open_to_append", "set_mode", "open_unnamed"}  # of other files


def test_the_manifest_is_written_last_and_the_pointer_after_the_rename(tmp_path: Path) -> None:
    made: list[str] = []

    def before(_number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if name in ("open_new", "rename"):
            made.append(arguments[-1].name)

    store_in(tmp_path, InterceptedFiles(before)).save(1, NEW, FACTS)
    files, (manifest, renamed, pointer, replaced) = made[:-4], made[-4:]
    assert files == list(NEW)
    assert (manifest, renamed, replaced) == ("manifest.json", "step-1", "latest")
    assert pointer.startswith(".tmp-latest")


@pytest.mark.parametrize("step", [2, 1], ids=["next-step", "same-step"])
def test_killed_at_every_call(step: int, tmp_path: Path) -> None:
    calls = calls_of_a_save(tmp_path, step)
    assert calls > 25
    for number in range(1, calls + 1):
        directory = tmp_path / f"{number}"
        store_in(directory).save(1, OLD, FACTS)
        killed = store_in(directory, killing(number))
        assert in_child(partial(killed.save, step, NEW, FACTS)) == -9
        assert newest(directory) in ((1, OLD), (step, NEW))
        # What comes next: the leftovers go, and the save succeeds.
        store_in(directory).clean()
        store_in(directory).save(step, NEW, FACTS)
        assert newest(directory) == (step, NEW)
        assert not leftovers(directory)


@pytest.mark.parametrize("step", [2, 1], ids=["next-step", "same-step"])
def test_power_lost_at_every_call(step: int, tmp_path: Path) -> None:
    store_in(tmp_path / "c").save(1, OLD, FACTS)
    files = LosingFiles(tmp_path / "c")
    (tmp_path / "lost").mkdir()
    files.snapshot_every_call_into(tmp_path / "lost")
    store_in(tmp_path / "c", files).save(step, NEW, FACTS)
    assert len(files.snapshots) >= 100
    found = [newest(left) for left in files.snapshots]
    assert all(state in ((1, OLD), (step, NEW)) for state in found)
    assert found[0] == (1, OLD) and found[-1] == (step, NEW)
    # Once the pointer has moved, the new one is there whatever is lost.
    assert [newest(left) for left in files.snapshots[-5:]] == [(step, NEW)] * 5


@pytest.mark.parametrize("forgotten", ["sync", "sync_directory"])
def test_the_power_loss_model_notices_a_forgotten_sync(
    forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_in(tmp_path / "c").save(1, OLD, FACTS)
    monkeypatch.setattr(LosingFiles, forgotten, lambda *_: None)
    files = LosingFiles(tmp_path / "c")
    (tmp_path / "lost").mkdir()
    files.snapshot_every_call_into(tmp_path / "lost")
    store_in(tmp_path / "c", files).save(2, NEW, FACTS)
    assert any(newest(left) == (1, OLD) for left in files.snapshots[-5:])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("forever", [False, True], ids=["once", "from-then-on"])
def test_failing_at_every_call(code: int, forever: bool, tmp_path: Path) -> None:
    for number in range(1, calls_of_a_save(tmp_path, 2) + 1):
        directory = tmp_path / f"{number}"
        store_in(directory).save(1, OLD, FACTS)
        files = failing(number, code, forever=forever)
        with pytest.raises(ResourceError, match=r"bytes are needed, .* are free"):
            store_in(directory, files).save(2, NEW, FACTS)
        assert files.count >= number
        assert newest(directory) in ((1, OLD), (2, NEW))
        if not forever and files.names[number - 1] not in ("remove_file", "remove_directory"):
            assert not leftovers(directory)
        store_in(directory).clean()
        store_in(directory).save(2, NEW, FACTS)
        assert newest(directory) == (2, NEW)


def test_the_file_size_limit_of_the_system(tmp_path: Path) -> None:
    store_in(tmp_path / "c").save(1, OLD, FACTS)

    def save_under_a_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(ResourceError, match="the file-size limit is reached"):
            store_in(tmp_path / "c").save(2, {"state.safetensors": b"x" * 200_000}, FACTS)

    assert in_child(save_under_a_limit) == 0
    assert newest(tmp_path / "c") == (1, OLD) and not leftovers(tmp_path / "c")


def test_pruning_spares_the_newest_and_the_protected(tmp_path: Path) -> None:
    store = store_in(tmp_path / "c")
    for step in range(1, 8):
        store.save(step, OLD, FACTS)
    store.prune(7, 2, {3})
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["latest", "step-3", "step-6", "step-7"]


def test_killed_at_every_call_of_pruning(tmp_path: Path) -> None:
    def full(directory: Path) -> CheckpointStore:
        store = store_in(directory)
        for step in (1, 2, 3):
            store.save(step, OLD if step == 1 else NEW, FACTS)
        return store

    files = InterceptedFiles()
    full(tmp_path / "counted")
    store_in(tmp_path / "counted", files).prune(3, 1, {1})
    for number in range(1, files.count + 1):
        full(tmp_path / f"{number}")
        killed = store_in(tmp_path / f"{number}", killing(number))
        assert in_child(partial(killed.prune, 3, 1, {1})) == -9
        assert newest(tmp_path / f"{number}") == (3, NEW)
        assert store_in(tmp_path / f"{number}").load(1).contents == OLD
        with pytest.raises(ArtifactError):
            load_checkpoint(tmp_path / f"{number}" / "nowhere", 2)


def test_a_dangling_pointer_is_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    store = CheckpointStore(tmp_path, FileLayer(), warnings.append)
    store.save(4, NEW, FACTS)
    (tmp_path / "latest").write_text("step-99")
    assert store.newest_valid() is not None
    assert warnings == ["`latest` names step-99; continuing from step-4, the newest checkpoint that is whole"]


def test_what_is_no_checkpoint_is_not_looked_at(tmp_path: Path) -> None:
    store = store_in(tmp_path / "c")
    store.save(1, OLD, FACTS)
    (tmp_path / "c" / ".tmp-step-9-1").mkdir()
    (tmp_path / "c" / "step-8").symlink_to(tmp_path / "c" / "step-1")
    (tmp_path / "c" / "step-7").write_text("a file")
    assert newest(tmp_path / "c") == (1, OLD)


@pytest.mark.parametrize("name", [*NEW, "manifest.json"])
def test_a_flipped_bit_is_noticed(name: str, tmp_path: Path) -> None:
    store_in(tmp_path / "c").save(1, NEW, FACTS)
    path = tmp_path / "c" / "step-1" / name
    data = bytearray(path.read_bytes())
    for place in range(0, len(data), 13):
        data[place] ^= 4
        path.write_bytes(data)
        with pytest.raises(ArtifactError):
            load_checkpoint(tmp_path / "c" / "step-1", 1)
        data[place] ^= 4


@settings(max_examples=150)
@given(st.binary(max_size=80) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["format_version", "step", "files", "facts", "manifest_sha256", "../x", "bytes"]), inner
    ),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_manifest_gives_our_error(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "manifest.json").write_bytes(data)
        with pytest.raises(BackhandError) as caught:
            load_checkpoint(Path(directory), 1)
        assert caught.value.exit_code == 4


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    from backhand.runs.checkpoint import manifest_bytes

    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "manifest.json").write_bytes(manifest_bytes(1, {"../secret": b"s"}, {}))
    with pytest.raises(ArtifactError, match="damaged"):
        load_checkpoint(tmp_path / "step-1", 1)
