"""Something is said within ten seconds, always, also through a pipe; and what floods a command ends soon."""

from __future__ import annotations

import gzip
import itertools
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from backhand import printing
from backhand.cli.main import main
from backhand.data.raw_rows import RowErrors
from backhand.data.sources import read_rows
from backhand.distributed import rendezvous as meeting
from backhand.errors import ResourceError, UsageError
from backhand.nn.loading.stores import models_on_this_machine
from backhand.options.config_file import parse_toml, read_table
from tests.fuzz.child import Attempt, run_attempts
from tests.hostile.conftest import World
from tests.support.limited import limited


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(printing, "SILENCE_S", 0.2)
    monkeypatch.setattr(printing, "_LOOK_S", 0.02)


@pytest.mark.usefixtures("quick")
def test_what_goes_on_is_said_again_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    with printing.never_silent("lint"):
        time.sleep(0.5)
        with printing.going_on(lambda: "reading \x1b[2J, line 7"):
            time.sleep(0.5)
        with printing.may_be_silent():
            said = capsys.readouterr().err
            time.sleep(0.5)
    assert "at work" in said and ": lint\n" in said and "reading \\x1b[2J, line 7\n" in said
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("quick")
def test_nothing_more_is_said_where_something_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with printing.never_silent("lint"):
        for _ in range(20):
            printing.say("line")
            time.sleep(0.05)
    assert set(capsys.readouterr().err.splitlines()) == {"line"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(printing.time, "monotonic", lambda: now[0])
    return now


def test_after_some_minutes_a_line_a_minute_is_enough(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(printing, "_began", 0.0)
    said_at: list[float] = []
    printing.said()
    while clock[0] < 600:
        clock[0] += 1.0
        if printing.line_due():
            said_at.append(clock[0])
            printing.said()
    gaps = list(itertools.pairwise(said_at))
    assert max(later - earlier for earlier, later in gaps if later < 180) <= 12
    assert {later - earlier for earlier, later in gaps if earlier >= 180} == {61.0}


def test_what_is_counted_says_how_long_the_rest_takes(clock: list[float]) -> None:
    with printing.counting("answers", 300) as done:
        assert printing.now() == "answers, 0 of 300 rows"
        for _ in range(100):
            clock[0] += 0.9
            done()
        assert printing.now() == "answers, 100 of 300 rows, about 3 min 0 s left"
        for _ in range(199):
            clock[0] += 0.9
            done()
        assert printing.now() == "answers, 299 of 300 rows"


def test_the_time_left_has_all_rounds_of_the_same_work(clock: list[float]) -> None:
    lefts: dict[tuple[str, str], str] = {}
    with printing.in_rounds(("base", "adapted"), costs=(1.0, 2.0)) as models:
        for model in models:
            for part in ("losses", "labels", "orders")[: 2 + (model == "adapted")]:
                with printing.counting(part, 10) as done:
                    for row in range(20 if part == "orders" else 10):
                        clock[0] += 1.0
                        done()
                        if row == 1:
                            lefts[model, part] = printing.now().partition("rows, ")[2]
    assert lefts == {
        ("base", "losses"): "at least 28 s left",  # the labels are not known
        ("base", "labels"): "at least 48 s left",
        ("adapted", "losses"): "about 38 s left",
        ("adapted", "labels"): "about 28 s left",
        ("adapted", "orders"): "about 18 s left",
    }
    with printing.counting("texts", 10) as done:
        clock[0] += 1.0
        done()
        assert printing.now().endswith(", about 9.0 s left"), "the rounds are over"


@pytest.mark.usefixtures("quick")
def test_a_function_that_fails_is_no_end_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with printing.never_silent("lint"), printing.going_on(lambda: str(1 / 0)):
        time.sleep(0.5)
    assert ": lint\n" in capsys.readouterr().err
    assert not [thread for thread in threading.enumerate() if thread.name == "never silent"]


@pytest.mark.usefixtures("quick")
def test_what_a_command_imports_counts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backhand.cli.main.make_app", lambda: lambda _words: time.sleep(0.5))
    assert main(["lint"]) == 0 and ": lint\n" in capsys.readouterr().err
    assert main(["lint", "--quiet"]) == 0 and capsys.readouterr().err == ""


def flooded(place: Path, line: bytes, count: int, suffix: str = "jsonl.gz") -> Path:
    path = place / f"rows.{suffix}"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "a"}\n' if suffix.startswith("jsonl") else b"text\na\n")
        for _ in range(100):
            file.write(line * (count // 100))
        file.write(b'{"text": "b"}\n' if suffix.startswith("jsonl") else b"b\n")
    return path


@pytest.mark.parametrize("line", [b"\n", b"\r\n", b" \t\n"])
def test_empty_lines_are_passed_over_and_counted(line: bytes, world: World, tmp_path: Path) -> None:
    """Two million in a fraction of a second; every line's number stays right."""
    path, bad = flooded(tmp_path, line, 2_000_000), RowErrors()
    began = time.process_time()
    found = list(read_rows(str(path), bad))
    assert time.process_time() - began < 5
    assert [row.source.rpartition(":")[2] for row in found] == ["1", "2000002"]
    assert bad.empty_lines == 2_000_000


def test_a_flood_of_empty_lines_is_reported(world: World, tmp_path: Path) -> None:
    for suffix in ("jsonl.gz", "csv.gz"):
        flooded(tmp_path, b"\n", 100_000, suffix)
        ended = limited(["lint", "--model", world.model, "--data", f"rows.{suffix}"], tmp_path)
        assert ended.code == 0 and "100,000 empty lines" in ended.output.replace("\n", " ")
    (tmp_path / "rows.jsonl").write_bytes(b"\n" * 100_000)
    ended = limited(["lint", "--model", world.model, "--data", "rows.jsonl"], tmp_path)
    assert ended.code == 3 and "100,000 empty lines" in ended.errors


def test_white_space_between_values_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[" + " " * 10_000_000 + '{"text": "a"}' + "\n" * 10_000_000 + "]")
    began = time.process_time()
    assert len(list(read_rows(str(tmp_path / "rows.json"), RowErrors()))) == 1
    assert time.process_time() - began < 5


# ---- TOML --------------------------------------------------------------------------------------------------------

DEEP = {
    "one key": "a." * 50_000 + "b = 1",
    "with spaces": "a . " * 50_000 + "b = 1",
    "quoted": '"a".' * 50_000 + "b = 1",
    "in single quotes": "'a'." * 50_000 + "b = 1",
    "a table": "[" + "a." * 50_000 + "b]",
    "a list of tables": "[[" + "a." * 50_000 + "b]]",
    "within braces": "x = {" + "a." * 50_000 + "b = 1}",
    "open text": '"""' + '\\"""\n' * 50_000,
    "open quotes": "'''" + "\"'\n" * 50_000,
    "tables in tables": "x = " + "{a = " * 50_000,
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_toml(kind: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(DEEP[kind])
    began = time.process_time()
    with pytest.raises(UsageError, match="not TOML"):
        read_table(tmp_path / "run.toml")
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "text",
    [
        "a = 'w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w.w'",
        'a = "' + "1.2." * 100 + '"',
        'a = """\n' + "x.y." * 100 + '\n"""',
        "a = '''\n" + "x.y." * 100 + "\n'''",
        "# " + "x.y." * 100 + "\na = 1",
        "a = [" + "1.5, " * 1000 + "]",
        "a.b.c.d = 1\n" * 1 + "e = 2",
        'a = "x\\"' + "y.z." * 50 + '"',
    ],
)
def test_toml_that_is_not_deep(text: str) -> None:
    import tomllib

    assert parse_toml(text) == tomllib.loads(text)


# ---- a master that has no address --------------------------------------------------------------------------------


def test_a_master_without_an_address(world: World, tmp_path: Path) -> None:
    host = "\x1b[31mx.invalid"
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": "29511"}
    began = time.monotonic()
    ended = limited(world.train("run"), tmp_path, environment=place)
    assert ended.code == 5 and "MASTER_ADDR" in ended.what, ended.errors
    assert printing.visible(host) in ended.what or repr(host)[1:-1] in ended.what
    assert "socket" not in ended.errors.lower()
    assert time.monotonic() - began < 60  # a few seconds, on a machine that has nothing else to do


@pytest.mark.parametrize(
    ("error", "asked"), [(socket.gaierror(-2, "Name or service not known"), 2), (UnicodeError("label too long"), 1)]
)
def test_a_name_that_none_can_be_is_not_asked_for_again(
    error: Exception, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def look_up(name: str, _port: None) -> None:
        found.append(name)
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    clock = iter(range(100))
    monkeypatch.setattr(meeting.time, "monotonic", lambda: 4.0 * next(clock))  # of five seconds, two look-ups
    monkeypatch.setattr(meeting.time, "sleep", lambda _s: None)
    place = meeting.DistributedEnv(
        rank=1, world_size=2, host="x y", port=29511, local_rank=0, agent_store=False, attempt="/0"
    )
    with pytest.raises(ResourceError, match="'x y' has no address") as raised:
        meeting.connected(place, "x y:29511", server=False)
    assert raised.value.why and found == ["x y"] * asked


# ---- stores ------------------------------------------------------------------------------------------------------


NO_MODEL = b"GGUF" + bytes(60)
"""Listed too, with the reason; one that can be trained would be timed."""


def store_of_llama_cpp(home: Path) -> Path:
    (home / ".cache" / "llama.cpp").mkdir(parents=True)
    (home / ".cache" / "llama.cpp" / "good.gguf").write_bytes(NO_MODEL)
    return home / ".lmstudio-home-pointer"


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


POINTERS = {
    "a pipe": make_pipe,
    "endless": make_endless,
    "a zero byte": lambda path: path.write_bytes(b"/a\0b"),
    "5,000 characters": lambda path: path.write_text("/" + "x" * 5000),
    "5,000 parts": lambda path: path.write_text("/x" * 5000),
    "a gigabyte": lambda path: path.touch() or os.truncate(path, 2**30),
    "no UTF-8": lambda path: path.write_bytes(b"/\xff\xfe"),
    "relative": lambda path: path.write_text("models"),
    "empty": lambda path: path.write_text(""),
    "a folder": lambda path: path.mkdir(),
}


def test_one_bad_store_is_a_note(tmp_path: Path) -> None:
    """Each in a child under limits: it neither hangs nor reads without end."""
    attempts = []
    for kind, make in POINTERS.items():
        make(store_of_llama_cpp(tmp_path / kind / "home"))
        attempts.append(Attempt(["models"], tmp_path / kind))
    for kind, outcome in zip(POINTERS, run_attempts(attempts), strict=True):
        assert (outcome.fault, outcome.code) == ("", 0), (kind, outcome.said)
        assert "note: LM Studio" in outcome.said, kind


@pytest.mark.parametrize("kind", [kind for kind in POINTERS if kind not in ("a pipe", "endless")])
def test_the_other_stores_are_listed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    POINTERS[kind](store_of_llama_cpp(tmp_path))
    notes: list[str] = []
    (listed,) = models_on_this_machine(note=notes.append)
    assert listed.path.name == "good.gguf" and len(notes) == 1


def test_folders_that_must_not_be_read(tmp_path: Path) -> None:
    """`/proc` has links that nobody may follow, and files without an end; nothing is said of a place to write to."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "b" / "good.gguf").write_bytes(NO_MODEL)
    ended = limited(["models", "/proc/self", "b", "--json"], tmp_path)
    assert ended.code == 0 and "good.gguf" in ended.output, ended.errors
    ended = limited(["models", "/" + "x" * 300, "b", "--json"], tmp_path)
    assert ended.code == 2 or "good.gguf" in ended.output, ended.errors
