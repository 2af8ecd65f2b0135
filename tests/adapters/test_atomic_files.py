from __future__ import annotations

import os
import resource
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from backhand import files as atomic_files
from backhand.errors import ResourceError, UsageError
from backhand.files import make_directory, write_atomically


@pytest.fixture(params=[0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_new_file_follows_the_umask(umask: int, tmp_path: Path) -> None:
    write_atomically(tmp_path / "f", b"x")
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o666 & ~umask


def test_a_replaced_file_keeps_its_mode(umask: int, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    (tmp_path / "f").chmod(0o640)
    write_atomically(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_links_and_devices_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(UsageError, match="will not be replaced"):
            write_atomically(tmp_path / name, b"x")
    assert (tmp_path / "target").read_bytes() == b"mine" and (tmp_path / "link").is_symlink()


STEPS = ("open_new", "set_mode", "write", "sync", "rename", "sync_directory")


@pytest.mark.parametrize("step", STEPS)
def test_a_failure_on_the_way_leaves_a_whole_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_files.FileLayer, step, fail)
    with pytest.raises(ResourceError, match="disk is full") as caught:
        write_atomically(tmp_path / "f", b"new")
    assert "3 bytes are needed" in str(caught.value) and caught.value.exit_code == 5
    assert (tmp_path / "f").read_bytes() in (b"old", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_file_size_limit_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ResourceError, match="file-size limit"):
            write_atomically(tmp_path / "f", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError):
            make_directory(path)
    with pytest.raises(ResourceError):
        make_directory(Path("/proc/nowhere"))
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
