"""The place a run is written to: what may not be there, and what cannot be written to."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from backhand.errors import BackhandError, DataError, ResourceError, UsageError
from backhand.options.config import TrainConfig
from backhand.options.config_file import dump_config
from backhand.runs.directory import opened
from backhand.training.run import train
from tests.support.fault_table import documented
from tests.support.processes import run
from tests.support.tiny_run import StopAfter, TinyRun, final_bits, with_options


def a_file(place: Path) -> Path:
    (place / "file").write_text("mine")
    return place / "file"


def below_a_file(place: Path) -> Path:
    (place / "file").write_text("mine")
    return place / "file" / "run"


def a_dangling_link(place: Path) -> Path:
    (place / "link").symlink_to(place / "nowhere")
    return place / "link"


def a_loop_of_links(place: Path) -> Path:
    (place / "link").symlink_to(place / "link")
    return place / "link"


def a_link_inside(place: Path) -> Path:
    (place / "run").mkdir()
    (place / "elsewhere").mkdir()
    (place / "run" / "adapter").symlink_to(place / "elsewhere")
    return place / "run"


def a_linked_lock(place: Path) -> Path:
    (place / "run").mkdir()
    (place / "elsewhere").write_text("mine")
    (place / "run" / ".lock").symlink_to(place / "elsewhere")
    return place / "run"


def files_of_somebody(place: Path) -> Path:
    (place / "run").mkdir()
    (place / "run" / "notes.txt").write_text("mine")
    return place / "run"


def names_of_a_run(place: Path) -> Path:
    for name in (
        "logs/mine.log",
        "checkpoints/step-1/weights.pt",
        "report.html",
        ".tmp-mine",
        ".replaced/adapter/mine",
    ):
        (place / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "run" / name).write_text("mine")
    return place / "run"


def another_program(place: Path) -> Path:
    (place / "run").mkdir()
    (place / "run" / "config.toml").write_text('[model]\nname = "mine"\n')
    (place / "run" / ".lock").write_text("12345")
    return place / "run"


def a_copied_configuration(place: Path) -> Path:
    (place / "run").mkdir()
    (place / "run" / "config.toml").write_text(dump_config(TrainConfig()))
    return place / "run"


def a_lock_of_another_program(place: Path) -> Path:
    (place / "run").mkdir()
    (place / "run" / ".lock").write_text("held by 12345\n")
    return place / "run"


def where_nobody_may_write(place: Path) -> Path:
    return Path("/proc/run")


Make = Callable[[Path], Path]
OUTPUTS: tuple[tuple[Make, int], ...] = (
    (a_file, 2),
    (below_a_file, 2),
    (a_dangling_link, 2),
    (a_loop_of_links, 2),
    (a_link_inside, 2),
    (a_linked_lock, 2),
    (files_of_somebody, 2),
    (names_of_a_run, 2),
    (another_program, 2),
    (a_copied_configuration, 2),
    (a_lock_of_another_program, 2),
    (where_nobody_may_write, 5),
)


def tree(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in place.rglob("*")}


@pytest.mark.parametrize(("make", "code"), OUTPUTS, ids=[case[0].__name__ for case in OUTPUTS])
def test_an_output_that_cannot_be(make: Make, code: int, tiny: TinyRun, tmp_path: Path) -> None:
    output = make(tmp_path)
    before = tree(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(BackhandError) as caught:
            train(tiny.config(output, overwrite=overwrite, model="absent, and never looked at"))
        assert caught.value.exit_code == code, str(caught.value)
        assert tree(tmp_path) == before


def test_the_page_counts_the_outputs() -> None:
    assert documented("an output that cannot be written to") == len(OUTPUTS)


def test_a_place_that_is_not_utf8(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be written down in full: as the output's own place, or for what is given relative to it."""
    place = tmp_path / os.fsdecode(b"caf\xe9")
    place.mkdir()
    monkeypatch.chdir(place)
    for output in (Path("run"), tmp_path / "run"):
        with pytest.raises(UsageError, match="is not UTF-8"):
            train(tiny.config(output))
    assert not any(place.iterdir()) and not (tmp_path / "run").exists()


def test_a_linked_output_is_followed(tiny: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    train(tiny.config(tmp_path / "link", max_steps=1))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "adapter").is_dir()


@pytest.mark.parametrize("lost", ["", "facts.json", "config.toml", ".lock"])
def test_a_run_is_replaced_without_a_part_of_its_mark(lost: str, tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", max_steps=1)
    train(config)
    (tmp_path / "run" / lost).unlink() if lost else None
    assert train(with_options(config, overwrite=True)).steps == 1


@pytest.mark.parametrize("name", ["adapter/notes.md", "checkpoints/step-1/best.pt", "logs/mine.log"])
def test_a_file_among_those_of_a_run_is_not_removed(name: str, tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", max_steps=1)
    train(config)
    (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(UsageError) as refused:
        train(with_options(config, overwrite=True))
    assert refused.value.why == name and (tmp_path / "run" / name).read_text() == "mine"


def open_as_nobody(path: Path, overwrite: bool = False) -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    with (
        pytest.raises(ResourceError, match="not writable") as refused,
        opened(path / "run", resume=False, overwrite=overwrite),
    ):
        pass
    # There is nothing yet that --resume could go on with.
    assert refused.value.where == "output"
    assert refused.value.next_step == "make the directory writable, or give another --output"


def test_a_directory_that_is_not_writable() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own are closed to anybody else
        Path(name).chmod(0o555)
        assert run(open_as_nobody, Path(name)) == 0
        Path(name).chmod(0o755)
        (Path(name) / "run").mkdir(mode=0o700)  # another user's: it cannot even be read
        assert run(open_as_nobody, Path(name), True) == 0


def train_under_a_limit(config: TrainConfig, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(ResourceError, match=r"the file-size limit is reached; .* bytes are needed"):
        train(config)


def test_the_file_size_limit_of_the_system(tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "straight", save_every=2)
    train(config)
    state = (tmp_path / "straight" / "checkpoints" / "latest").read_text().strip()
    largest = (tmp_path / "straight" / "checkpoints" / state / "state.safetensors").stat().st_size
    output = tmp_path / "run"
    with pytest.raises(StopAfter.Stopped):
        train(with_options(config, output=output), callbacks=[StopAfter(3)])
    resumed = with_options(TrainConfig(), output=output, resume=True, quiet=True)
    assert run(train_under_a_limit, resumed, largest - 100) == 0
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["latest", "step-2"]
    train(resumed)
    assert final_bits(output) == final_bits(tmp_path / "straight")


def train_on_a_small_disk(config: TrainConfig, place: Path, size: int) -> None:
    """Mounts a file system of this many bytes that nobody else sees; exit code 77 where the system forbids that."""
    user, group = os.getuid(), os.getgid()
    library = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_users = 0x00020000, 0x10000000
    if library.unshare(new_mounts | new_users) != 0:
        os._exit(77)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if library.mount(b"none", str(place).encode(), b"tmpfs", 0, f"size={size}".encode()) != 0:
        os._exit(77)
    with pytest.raises(ResourceError, match=r"the disk is full; [\d,]+ bytes are needed, [\d,]+ are free") as caught:
        train(config)
    assert caught.value.exit_code == 5
    checkpoints = config.run.output / "checkpoints"
    left = sorted(path.name for path in checkpoints.iterdir())
    assert "latest" in left and not any(name.startswith(".tmp") for name in left), left
    assert (checkpoints / (checkpoints / "latest").read_text().strip()).is_dir()


def test_a_disk_that_is_full(tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "measured", max_steps=6, save_every=1, keep=6, eval_data=())
    train(config)
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in (tmp_path / "measured").rglob("*"))
    (tmp_path / "disk").mkdir()
    config = with_options(config, output=tmp_path / "disk" / "run")
    code = run(train_on_a_small_disk, config, tmp_path / "disk", used * 2 // 3)
    if code == 77:
        pytest.skip("this system lets nobody but root mount a file system")
    assert code == 0


def test_a_link_for_a_checkpoint_is_never_written_through(tiny: TinyRun, tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = tiny.config(output, max_steps=3, save_every=1)
    with pytest.raises(StopAfter.Stopped):
        train(config, callbacks=[StopAfter(2)])
    (tmp_path / "elsewhere").mkdir()
    (output / "checkpoints" / "step-2").symlink_to(tmp_path / "elsewhere")
    (output / "checkpoints" / "step-3").symlink_to(tmp_path / "nowhere")
    assert train(with_options(TrainConfig(), output=output, resume=True, quiet=True)).steps == 3
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "nowhere").exists()
    with pytest.raises(UsageError, match="already contains a run"):
        train(config)


def test_a_fault_of_the_data_is_reported_before_a_taken_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for taken in ("run/adapter", "run-2"):
        (tmp_path / taken).mkdir(parents=True)
    (tmp_path / "latin1.csv").write_bytes(b"prompt,completion\na,caf\xe9\n")
    (tmp_path / "rows.csv").write_bytes(b"prompt,completion\na,b\n")
    for data, error in (((), UsageError), (("absent.csv",), DataError), (("latin1.csv",), DataError)):
        with pytest.raises(error) as refused:
            train(with_options(TrainConfig(), data=data, quiet=True))
        assert "already contains" not in str(refused.value)
    with pytest.raises(UsageError, match="already contains files") as refused:
        train(with_options(TrainConfig(), data=("rows.csv",), quiet=True))
    assert refused.value.next_step == "give --output run-3"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX alone has named pipes")
@pytest.mark.parametrize("name", ["metrics.jsonl", "proofs.jsonl"])
def test_a_pipe_instead_of_a_file_of_lines_is_not_waited_for(name: str, tmp_path: Path) -> None:
    with opened(tmp_path / "run", resume=False, overwrite=False) as directory:
        os.mkfifo(tmp_path / "run" / name)
        with pytest.raises(UsageError, match="cannot be saved"):
            directory.append(name, {"step": 1})
        with pytest.raises(OSError, match="a pipe, not a plain file"):
            directory.lines(name)


def test_a_run_of_a_similar_name_is_suggested_where_there_is_none_to_resume(tmp_path: Path) -> None:
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "config.toml").touch()
    (tmp_path / "zap").mkdir()  # holds no run
    with pytest.raises(UsageError) as found, opened(tmp_path / "zp", resume=True, overwrite=False):
        pass
    assert found.value.next_step == f"did you mean {tmp_path / 'zip'}? To begin a new run, leave out --resume"
