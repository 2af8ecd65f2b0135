"""A file that changes, shrinks or vanishes while it is mapped: an error that names it, never a silent crash."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as StorageType

from backhand.errors import ArtifactError
from backhand.kernels.builds import usable
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.nn.loading.mapped_file import MappedFile
from tests.nn.loading import mapped_read
from tests.support.fault_table import documented
from tests.support.processes import run

ROWS, ROW_BYTES = 4096, 288  # Q4_K, rows of 512: more than a megabyte, so that no read-ahead has all of it


@pytest.fixture
def path(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    blocks = np.random.default_rng(0).integers(0, 60, (ROWS, ROW_BYTES), dtype=np.uint8)
    writer.add_tensor("big.weight", blocks, raw_dtype=StorageType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


class Done(NamedTuple):
    """Exit status and output of a process."""

    returncode: int
    stdout: str
    stderr: str


def read(path: Path, how: str, left: int, kernels: str) -> Done:
    code = run(mapped_read.read, path, how, left, kernels, path.parent)
    return Done(code, *((path.parent / name).read_text() for name in ("out", "err")))


NEWEST = usable()[-1] if usable() else "none"
CASES = {("product", NEWEST), ("numpy", NEWEST), ("python", NEWEST), ("product", "none"), ("python", "none")}


@pytest.mark.parametrize(("how", "kernels"), sorted(CASES))
def test_a_file_cut_short_while_it_is_read(path: Path, how: str, kernels: str) -> None:
    size = path.stat().st_size
    done = read(path, how, 4096, kernels)
    assert done.returncode == ArtifactError.exit_code, done
    assert f"error: {path} can no longer be read" in done.stderr
    assert f"cut short while it was in use; it had {size:,} bytes" in done.stderr
    assert "--resume" in done.stderr
    assert "read" not in done.stdout.split()


def test_a_file_that_is_whole_is_read(path: Path) -> None:
    """Check that the test above can fail."""
    done = read(path, "product", path.stat().st_size, NEWEST)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["read"], "")


@pytest.mark.skipif(not usable(), reason="needs the compiled library, which knows addresses")
def test_somebody_elses_bus_error_stays_his_own(path: Path) -> None:
    path.with_name("other").write_bytes(bytes(1 << 16))
    done = read(path, "elsewhere", path.stat().st_size, "auto")
    assert done.returncode == -signal.SIGBUS, done
    assert str(path) not in done.stderr


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def written_to(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    # Clocks of file systems have ticks of some milliseconds.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 5_000_000))


def replaced(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shorter": (lambda path: os.truncate(path, 5000), "bytes and has 5,000"),
    "longer": (grown, "bytes and has"),
    "written to": (written_to, "it was written to at "),
    "removed": (Path.unlink, "removed or renamed"),
    "renamed": (lambda path: path.rename(path.with_name("other")), "removed or renamed"),
    "replaced": (replaced, "another file of "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_an_error_that_says_what_has_changed(change: str, path: Path) -> None:
    make, said = CHANGES[change]
    file = GGUFFile(path)
    file.check_unchanged()
    make(path)
    with pytest.raises(ArtifactError, match=said) as raised:
        file.check_unchanged()
    assert str(path) in str(raised.value)


def test_the_page_counts_the_changes() -> None:
    counted = documented("the file of a quantized base is cut, longer, written to, removed, renamed or replaced")
    assert len(CHANGES) == counted


def test_the_page_counts_the_reads() -> None:
    counted = documented("the file of a quantized base is cut short while a loop, NumPy or Python reads it")
    assert len({how for how, _ in CASES}) == counted


def test_reading_changes_nothing(path: Path) -> None:
    file = GGUFFile(path)
    assert file.bytes_of(file.tensors["big.weight"]).sum() > 0
    path.read_bytes()
    path.chmod(0o400)
    file.check_unchanged()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells what is open")
def test_descriptors_are_given_back(path: Path) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    for _ in range(2000):  # more than there are places for mappings
        MappedFile(path)
    assert count() <= before + 1
