"""Whatever ends a command becomes an exit code of the contract and a text that says what to do."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from backhand.cli import commands
from backhand.cli import main as cli
from backhand.cli.exit_status import exit_status
from backhand.errors import UsageError
from tests.support.cli_commands import END

SCRIPT = (
    # A test run in the background of a shell has Ctrl-C ignored, and hands that down.
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "import sys; from backhand.cli import commands, main as cli; from tests.support.cli_commands import END; "
    "commands.COMMANDS = (END,); "
    "sys.exit(cli.main(sys.argv[1:]))"
)


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `backhand end …` in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(commands, "COMMANDS", (END,))

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(["end", *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def start(*words: str, **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, "end", *words], env=environment, text=True, **pipes)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("how", "code", "text"),
    [
        ("well", 0, ""),
        ("usage", 2, "error: somewhere: wrong\n  why: because\n  next: do better\n"),
        ("data", 3, "error: rows.jsonl:3: bad row\n  next: correct the file, or give another one\n"),
        ("artifact", 4, "error: torn file\n  next: download or make it again, or give another one\n"),
        ("resource", 5, "error: too large\n"),
        ("check", 6, "error: not equal\n"),
        ("stopped", 143, "terminated after step 3\n  next: go on with --resume\n"),
        ("interrupt", 130, "interrupted\n"),
        ("exit", 7, ""),
    ],
)
def test_each_kind_of_end(end, how: str, code: int, text: str) -> None:
    assert end("--how", how) == (code, "", text)


def test_an_error_of_usage_without_advice_names_the_help() -> None:
    text = exit_status(UsageError("rank 0 is not an integer of at least 1", where="--rank"), ["train", "--rank", "0"])[
        1
    ]
    assert text.endswith("\n  next: backhand train --help explains every option")


def test_the_command_itself_may_give_the_exit_code(end) -> None:
    assert end("--how", "code", "--size", "6")[0] == 6


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("memory", "not enough memory"),
        ("torch-memory", "can't allocate memory"),
        ("disk-full", "/data/adapter.safetensors: No space left on device"),
        ("too-big", "ulimit -f"),
        ("not-writable", "/data: Permission denied"),
    ],
)
def test_missing_resources_are_no_bug(end, how: str, text: str) -> None:
    code, _, printed = end("--how", how)
    assert code == 5
    assert text in printed
    assert "next:" in printed
    assert "Traceback" not in printed


def test_a_bug_says_how_to_report_it_and_shows_a_traceback_only_with_debug(end) -> None:
    code, _, printed = end("--how", "bug")
    assert code == 1
    assert "unexpected IndexError: list index out of range" in printed
    assert "--debug" in printed
    assert "backhand end --how bug" in printed
    assert "torch 2." in printed
    assert "Traceback" not in printed
    code, _, printed = end("--how", "bug", "--debug")
    assert code == 1
    assert "Traceback (most recent call last)" in printed


def test_debug_may_come_before_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(commands, "COMMANDS", (END,))
    assert cli.main(["--debug", "end", "--how", "data"]) == 3
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--rte", "2"], "Unknown option: --rte. Did you mean --rate?"),
        (["--rate", "fast"], '"fast" is not a number.'),
        (["--rate"], "--rate requires an argument"),
        (["--mode", "fst"], 'Did you mean "fast"?'),
        (["file.toml", "more"], "Unexpected 'more'"),
    ],
)
def test_usage_errors_name_the_nearest_option(end, words: list[str], text: str) -> None:
    code, _, printed = end(*words)
    assert code == 2
    assert printed.startswith("error: ")
    assert text in printed
    assert "next: backhand end --help" in printed


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["classify", "--adapter", "run", "good", "phone"], "a text: --text 'good phone', or a file of rows: --data"),
        (["generate", "good phone"], "a text: --prompt 'good phone', or a file of rows: --data 'good phone'"),
        (["chat", "hello"], "here. Give a text: --prompt hello\n"),
        (["classify", "--adapter", "run", "--text", "good", "phone"], "in quotes: --text 'good phone'\n"),
        (["generate", "--prompt=what", "is", "this", "--greedy"], "in quotes: --prompt 'what is this'\n"),
        (["embed", "rows.jsonl"], "here. Give a file of rows: --data rows.jsonl\n"),
    ],
)
def test_a_text_without_its_option_is_answered_with_it(
    words: list[str], options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert options in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert 'Did you mean "train"?' in capsys.readouterr().err


def test_the_value_of_another_tool_is_answered_and_required_options_are_checked_before_torch_is_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["export", "--to", "llama.cpp", "--adapter", "a"]) == 2
    assert '"sentence-transformers". Its equivalent is gguf.\n' in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "backhand.interop.command", None)
    assert cli.main(["export", "--to", "gguf", "--adapter", "a"]) == 2
    assert "no output is given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "text"),
    [("--verison", "Unknown option: --verison. Did you mean --version?"), ("--qqq", "Unknown option: --qqq.\n")],
)
def test_an_unknown_option_before_the_command(word: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 2
    assert text in capsys.readouterr().err


def test_terminated_is_143_and_interrupted_130() -> None:
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with start("--how", "sleep") as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "asleep\n"
            process.send_signal(number)
            _, printed = process.communicate(timeout=30)
        assert process.returncode == code
        assert "Traceback" not in printed


def test_a_reader_that_leaves_is_no_error() -> None:
    with start("--how", "print") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        printed = process.stderr.read()
    assert (process.returncode, printed) == (141, "")


def test_output_that_no_file_takes_is_reported_once(tmp_path: Path) -> None:
    """Not once more by Python, which ends with 120 then: what could not be written is still in a buffer."""
    command = 'ulimit -f 0; trap "" XFSZ; exec "$0" -m backhand --version > out'
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = ["sh", "-c", command, sys.executable]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 5
    assert done.stderr.count(b"error: ") == 1 and b"Exception ignored" not in done.stderr


def test_a_device_out_of_memory_is_known_by_name() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch names it."""

    error = OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    code, text = exit_status(error, [])
    assert code == 5
    assert "Tried to allocate" in text


def test_what_the_system_says_is_no_bug() -> None:
    assert exit_status(OSError(errno.EIO, "Input/output error"), [])[0] == 5
    assert exit_status(FileNotFoundError(errno.ENOENT, "No such file"), [])[0] == 2
    assert exit_status(OSError(errno.ENAMETOOLONG, "File name too long"), [])[0] == 2
    assert exit_status(ImportError("libtorch.so: failed to map segment from shared object"), [])[0] == 5
    assert exit_status(OSError("of a library, without a number"), [])[0] == 1


@pytest.mark.parametrize("how", ["note", "usage"])
@pytest.mark.parametrize("errors", ["full", "closed"])
def test_standard_error_that_cannot_be_written_changes_no_exit_code(how: str, errors: str, tmp_path: Path) -> None:
    """Nor does Python end with 120 because a line for standard error is still buffered."""
    reading, writing = os.pipe()
    os.close(reading)
    stderr = os.open("/dev/full", os.O_WRONLY) if errors == "full" else writing
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, "end", "--how", how]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, check=False)
    assert (done.returncode, done.stdout) == ((0, b"the answer\n") if how == "note" else (2, b""))


@pytest.mark.parametrize("kilobytes", [300_000, 600_000])
def test_a_limit_of_addresses_below_the_imports_is_reported(kilobytes: int, tmp_path: Path) -> None:
    """OpenBLAS ends a process with 1 where it gets no memory; a command's help needs none of it."""
    script = f'ulimit -v {kilobytes}; exec "$0" -m backhand "$@"'
    for words, code, said in ((["lint", "--data", "x"], 5, "too low to load PyTorch"), (["lint", "--help"], 0, "")):
        done = subprocess.run(
            ["sh", "-c", script, sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr


def test_a_name_of_utf8_in_an_ascii_locale_differs_from_one_of_other_bytes(tmp_path: Path) -> None:
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name, said in (("e_ünï".encode(), "cannot be read in this locale"), (b"e_\xfc", "is not UTF-8")):
        words = [sys.executable, "-m", "backhand", "train", "--model", "x", "--data", "x", "--output", name]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=False)
        error = done.stderr.decode()
        assert done.returncode == 2 and said in error, error
        assert ("PYTHONUTF8" in error) == (said != "is not UTF-8")
