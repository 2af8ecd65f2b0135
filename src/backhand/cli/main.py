"""The `backhand` command: finds the subcommand, runs it, and turns whatever ends it into an exit code.

What the command line is made of takes a tenth of a second to import, so that `main` does it inside: Ctrl-C ends it
quietly from its first moment on. Nothing here imports torch; a subcommand's module is imported when it is the one to
run.
"""

from __future__ import annotations

import codecs
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO, cast

from backhand.errors import ArtifactError, BackhandError, DataError, UsageError, first_line
from backhand.nn.openmp_spin import adaptive_spinning, set_spin_count
from backhand.printing import bounded, may_be_silent, never_silent, show_what_libraries_say, visible
from backhand.system import version_of

if TYPE_CHECKING:
    import cyclopts

    from backhand.cli.command import Prepared

_SUMMARY = "LoRA fine-tuning in which every gradient is derived and written by hand, and proved."

_EPILOGUE = (
    "Example: `backhand train --data rows.jsonl --output runs/mine`\n\n"
    "Each command explains itself: `backhand train --help`. `--debug` shows a traceback with an error."
)


def make_app() -> cyclopts.App:
    """The command line as cyclopts sees it; commands are imported when they are named."""
    import cyclopts

    from backhand.cli import commands

    app = cyclopts.App(
        name="backhand",
        help=_SUMMARY,
        help_epilogue=_EPILOGUE,
        help_format="markdown",
        version=lambda: str(version_of("backhand")),
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    for place, command in enumerate(commands.COMMANDS):
        app.command(
            f"{commands.__name__}:{command.name}",  # imported when it is named
            name=command.name,
            help=command.summary,
            help_epilogue=f"Example: `{command.example}`",
            sort_key=place,
        )
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: the words after `backhand`; those of this process if None.
    """
    with _stderr_may_fail():
        return _main(list(sys.argv[1:] if arguments is None else arguments))


def _main(words: list[str]) -> int:
    debug = "--debug" in words
    interrupted: list[float] = []
    set_spin_count()  # what is read later, `nn.compute` sets
    try:
        _open_closed_streams()
        _carry_anything()
        with _signals_unwind(interrupted), ExitStack() as around:
            given = words[1:] if words[:1] == ["--debug"] else words
            # From here on: what a command imports takes its time, too.
            around.enter_context(never_silent(given[0] if given else ""))
            if "--quiet" in given or is_a_follower():
                around.enter_context(may_be_silent())
            if sorted(given) == ["--verbose", "--version"]:
                print(_verbose_version(), flush=True)
                return 0
            result = make_app()(_values_joined(given))
            # Help and version have been printed.
            code = 0 if result is None else run_prepared(result)
            sys.stdout.flush()
        return code
    except BaseException as error:  # noqa: BLE001 - this is where every exception ends
        return _report(error, words, debug, interrupted)


def run_prepared(prepared: Prepared) -> int:
    """Run what was parsed, and return its exit code; an error about an option says where it was written."""
    _check_directory()
    show_what_libraries_say()
    with ExitStack() as around:
        around.enter_context(adaptive_spinning())
        if prepared.report_of is not None:
            from backhand.report.command import report_kept

            around.enter_context(report_kept(prepared.report_of))
        try:
            result = prepared.function()
        except UsageError as error:
            prepared.name_origin(error)
            raise
    return result if isinstance(result, int) else 0


def _check_directory() -> None:
    """Raise UsageError where the current directory has been deleted: libraries end the process over it."""
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(
            "the current directory is not there any more",
            where=os.environ.get("PWD"),
            why=error.strerror,
            next_step="change to a directory that exists: cd ~",
        ) from None


def _open_closed_streams() -> None:
    """A program may be started without standard streams: what is written then goes nowhere, what is read is empty.

    Their numbers are taken as well, so that no file of ours gets the one that a library prints to.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - open until the end


def _carry_anything() -> None:
    """Standard output takes what standard error takes, half of a surrogate pair, from a file, as its code.

    Streams that Python takes for ASCII, as in the C locale without its UTF-8 mode, carry UTF-8: what is piped in has
    to be that, and JSON is. What PYTHONIOENCODING names, an encoding or what is done with errors, stays so.
    """
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    streams: tuple[Any, ...] = (sys.stdin, sys.stdout, sys.stderr)
    for stream in streams:
        # It is written out first, and may be closed; what a program has put in its place may have none of this.
        with suppress(OSError, ValueError, AttributeError, TypeError, LookupError):
            reconfigure = stream.reconfigure
            if not encoding and codecs.lookup(stream.encoding).name == "ascii":
                reconfigure(encoding="utf-8", errors=stream.errors)
            if not errors and stream is sys.stdout:
                reconfigure(errors="backslashreplace")


def _values_joined(words: Sequence[str]) -> list[str]:
    """Join `--prompt -` and `--prompt "- a list"` with an equals sign: the parser would take such values for options.

    Only what cannot be an option is joined: a lone hyphen, and words that begin with one and hold white space.
    """
    joined: list[str] = []
    for word in words:
        value = word == "-" or (word.startswith("-") and len(word.split(maxsplit=1)) > 1)
        if value and joined and joined[-1].startswith("--") and "=" not in joined[-1] and len(joined[-1]) > 2:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _report(error: BaseException, words: Sequence[str], debug: bool, interrupted: Sequence[float]) -> int:
    import traceback

    just_now = bool(interrupted) and time.monotonic() - interrupted[-1] < _JUST_NOW_S
    if just_now and isinstance(error, Exception) and _may_be_of_ctrl_c(error) and ending(error, words)[0] == BUG:
        error = KeyboardInterrupt().with_traceback(error.__traceback__)
    if debug and not isinstance(error, SystemExit | BrokenPipeError):
        sys.stderr.write(visible("".join(traceback.format_exception(error)), "\n"))
    code, text = ending(error, words)
    if text:
        with suppress(OSError):  # a closed terminal
            print(
                text.replace("error:", "\033[1;31merror:\033[0m", 1) if _stderr_in_colour() else text, file=sys.stderr
            )
    with suppress(OSError, ValueError, AttributeError):  # what a program has put in its place, or has closed
        try:
            sys.stdout.flush()
        except OSError:
            _write_no_more(sys.stdout)
    return code


def _write_no_more(stream: TextIO) -> None:
    """Let what is written to a stream go nowhere: the reader has left, the terminal is closed, or the disk is full.

    What is still buffered must not raise again when Python closes its streams, which would end the command with 120.
    """
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _StandardError:
    """Standard error that drops what cannot be written: that a line is lost is no reason for a command to fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _write_no_more(self._stream)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _write_no_more(self._stream)


@contextmanager
def _stderr_may_fail() -> Iterator[None]:
    stream = sys.stderr
    if stream is None:  # closed: `_open_closed_streams` opens one that goes nowhere
        yield
        return
    guarded = cast("TextIO", _StandardError(stream))
    sys.stderr = guarded
    try:
        yield
    finally:
        with suppress(ValueError):  # closed meanwhile
            guarded.flush()
        if sys.stderr is guarded:
            sys.stderr = stream


def _may_be_of_ctrl_c(error: BaseException) -> bool:
    """Whether a library may have made this of Ctrl-C, as those do whose import it ends; C code may forget of what."""
    if isinstance(error, ImportError | SystemError):
        return True
    within: BaseException | None = error
    while within is not None and not isinstance(within, KeyboardInterrupt):
        within = within.__cause__ or within.__context__
    return within is not None


def _stderr_in_colour() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


_JUST_NOW_S = 2.0


@contextmanager
def _signals_unwind(interrupted: list[float]) -> Iterator[None]:
    """Let SIGTERM unwind the stack like Ctrl-C does, so that files are closed; training installs its own handlers.

    Args:
        interrupted: the times of Ctrl-C go here.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        interrupted.append(time.monotonic())
        raise KeyboardInterrupt

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield  # other threads may not set handlers
        return
    before = {}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # what was asked to ignore it goes on ignoring it
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _verbose_version() -> str:
    """`--version --verbose`: the versions, the processor and which kernels run here; what a report of a bug needs."""
    import platform

    import torch

    from backhand.kernels.builds import describe
    from backhand.nn.compute import available_cores, default_dtype

    lines = [f"backhand {version_of('backhand')}", f"python {platform.python_version()}, {platform.platform()}"]
    packages = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "peft")
    lines += [f"{package} {version}" for package in packages if (version := version_of(package))]
    dtype = str(default_dtype(torch.device("cpu"))).removeprefix("torch.")
    lines.append(f"{available_cores()} cores, {torch.backends.cpu.get_cpu_capability()}; --dtype auto is {dtype}")
    return "\n".join([*lines, describe()])


# What an exception means for the shell: its exit code, and what to print on standard error (docs/errors.md).


BUG = 1
USAGE = 2
RESOURCES = 5
SIGNAL = 128
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143

# What the system says of a path that was given; whatever else it says is of the machine.
_USAGE_ERRNOS = {
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.EINVAL)
}
_OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")
_UNLOADABLE_TEXTS = ("failed to map segment", "cannot allocate memory", "cannot create shared object descriptor")


_EXHAUSTED = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or give --threads 1",
}
_EXHAUSTED_TEXTS = {"too many open files": errno.EMFILE, "can't start new thread": errno.EAGAIN}


def _exhausted(error: BaseException) -> int | None:
    """Return the errno where the system had no more files or processes to give, whatever was made of its answer."""
    within: BaseException | None = error
    while isinstance(within, Exception):  # an end on request comes of no lack
        number = within.errno if isinstance(within, OSError) else None
        if number in _EXHAUSTED and getattr(within, "strerror", None) == os.strerror(number or 0):
            return number
        if isinstance(within, RuntimeError):  # of Python's threads, and of libraries that are not Python
            for text, meant in _EXHAUSTED_TEXTS.items():
                if text in str(within).lower():
                    return meant
        within = within.__cause__ or within.__context__
    return None


def ending(error: BaseException, arguments: Sequence[str]) -> tuple[int, str]:
    """The exit code of the contract for an exception that ended a command, and what to print for it.

    That is what happened, where, why, what to do next; "" where there is nothing to say.
    """
    if (number := _exhausted(error)) is not None and not (isinstance(error, BackhandError) and error.said_elsewhere):
        what = error.what if isinstance(error, BackhandError) else first_line(error)
        return RESOURCES, f"error: {bounded(what)}\n  why: {os.strerror(number)}\n  next: {_EXHAUSTED[number]}"
    match error:
        case BackhandError():
            # Stopping when asked to is no error, although the shell gets a code for it.
            asked = error.exit_code > SIGNAL
            text = str(error) if asked else f"error: {error}{_general_advice(error, arguments)}"
            return error.exit_code, "" if error.said_elsewhere else text
        case KeyboardInterrupt():
            return INTERRUPTED, "" if is_a_follower() else "interrupted"
        case BrokenPipeError():
            return BROKEN_PIPE, ""
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None), ""
        case _ if (wrong := _of_the_parser(error)) is not None:
            command = " ".join(("backhand", *(wrong.command_chain or ()), "--help"))
            return USAGE, f"error: {bounded(_usage(wrong, arguments))}\n  next: {command}"
        case _ if _is_out_of_memory(error):
            return RESOURCES, (
                "error: not enough memory\n"
                f"  why: {bounded(str(error).splitlines()[0]) if str(error) else 'the system refused an allocation'}\n"
                "  next: give --memory what may be used, or a smaller --micro-batch-rows or --max-length"
            )
        case OSError() if error.errno:
            return USAGE if error.errno in _USAGE_ERRNOS else RESOURCES, _explain_os_error(error)
        # A library written in Rust gave up, tokenizers on what a tokenizer.json says as a rule.
        case _ if type(error).__name__ == "PanicException" and not isinstance(error, Exception):
            return ArtifactError.exit_code, (
                f"error: a library gave up on what it read: {bounded(str(error))}\n"
                "  why: a file of the model contradicts itself, tokenizer.json as a rule\n"
                "  next: take the model's files from where they come from, once more"
            )
    return BUG, _explain_bug(error, arguments)


def _of_the_parser(error: BaseException) -> cyclopts.CycloptsError | None:
    """The error as cyclopts' own, if it is.

    Nothing is imported for that: an import may be what was interrupted, and what is there of it in pieces.
    """
    kind = getattr(sys.modules.get("cyclopts"), "CycloptsError", ())
    return error if isinstance(error, kind) else None


def is_a_follower() -> bool:
    """Whether this is one of a run's processes on this machine, and not the first of them: that one speaks for all."""
    return (os.environ.get("WORLD_SIZE") or "1") != "1" and os.environ.get("LOCAL_RANK", "0") != "0"


def _general_advice(error: BackhandError, arguments: Sequence[str]) -> str:
    """What to do next where the error itself does not say, since what is wrong says most of it."""
    if error.next_step:
        return ""
    command = bounded(" ".join(["backhand", *(word for word in arguments[:1] if not word.startswith("-"))]))
    advice = {
        UsageError.exit_code: f"{command} --help explains every option",
        DataError.exit_code: "correct the file, or give another one",
        ArtifactError.exit_code: "fetch or make it again, or give another one",
    }.get(error.exit_code)
    return f"\n  next: {advice}" if advice else ""


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, ImportError) and any(text in str(error).lower() for text in _UNLOADABLE_TEXTS):
        return True  # a library that does not fit below the limit of the address space
    # torch raises RuntimeError from its CPU allocator; its own class for devices is named here without importing torch.
    named = any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__)
    return named or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY_TEXTS)
    )


def _usage(error: cyclopts.CycloptsError, arguments: Sequence[str]) -> str:
    import difflib

    from cyclopts import UnknownCommandError, UnknownOptionError, UnusedCliTokensError

    from backhand.options.other_names import COMMANDS

    words = list(error.unused_tokens or ())
    if isinstance(error, UnusedCliTokensError):
        return f"Unexpected {' '.join(map(repr, words))}: there is no place for it."
    if isinstance(error, UnknownCommandError) and words and words[0].startswith("-"):
        close = difflib.get_close_matches(words[0], ("--help", "--version", "--debug"), n=1)
        return f"Unknown option: {words[0]}." + (f" Did you mean {close[0]}?" if close else "")
    if isinstance(error, UnknownCommandError) and words:
        name = words[0].lower().removeprefix("mlx_lm.")
        if same := COMMANDS.get(name) or (f"backhand {name} --help" if name != words[0].lower() else None):
            return f"Unknown command: {words[0]}. Here that is: {same}."
    if isinstance(error, UnknownOptionError):
        first = (error.token.keyword or error.token.value or "").partition("=")[0]
        values = {first: ""}
        for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
            name, equals, value = word.partition("=")
            if (name.startswith("--") and len(name) > 2 and not any(map(str.isspace, name))) or name == first:
                values[name] = value if equals or after.startswith("-") else after
        options = {name for argument in error.argument_collection if argument.parse for name in argument.names}
        known = {*options, "--debug", "--help", "--version"}
        unknown = [name for name in values if name == first or name.replace("_", "-") not in known]
        said = [_unknown_option(error, name, values[name], options) for name in unknown]
        several = (text.removeprefix("Unknown option: ") for text in said)
        return said[0] if len(said) == 1 else "\n    - ".join(["Unknown options:", *several])
    said_of_it = str(error).strip()
    none = said_of_it.lower().startswith('invalid value "none" for --report-to.')
    return f"{said_of_it} No tracker is the default: leave --report-to out." if none else said_of_it


def _unknown_option(error: cyclopts.UnknownOptionError, written: str, value: str, options: Set[str]) -> str:
    """What an option is here that the command does not have; the parser's own guess where it is no other tool's."""
    from cyclopts import Token

    from backhand.cli.command import as_option
    from backhand.options.other_names import HERE, NOT_NEEDED, translate_option

    if meant := translate_option(written, as_option, {name[2:].replace("-", "_") for name in options}, value=value):
        near = meant.removeprefix(HERE)
        said = f"Did you mean {near}?" if near in options else f"{meant[0].upper()}{meant[1:]}."
        return f"Unknown option: {written}" + (f"; {meant}" if meant.startswith(NOT_NEEDED) else f". {said}")
    if meant := translate_option(written, as_option, value=value):
        return f"Unknown option: {written}. `backhand train` has it: {meant.removeprefix(HERE)}."
    error.token = Token(keyword=written, source="cli")
    return str(error).strip()


def _explain_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    path_remedy = "check the path, and give another one"
    remedy = {
        **dict.fromkeys(_USAGE_ERRNOS, path_remedy),
        errno.ENOSPC: "free some space, or write to another disk with --output",
        errno.EDQUOT: "free some space, or write to another disk with --output",
        errno.EFBIG: "raise the file-size limit (ulimit -f), or write to another disk with --output",
        **dict.fromkeys((errno.EACCES, errno.EPERM), "check who may read and write it, or give another place"),
        errno.ENOMEM: "close other programs, or give a smaller --micro-batch-rows",
    }.get(error.errno or 0, "choose a place you may write to, for example with --output")
    return f"error: {bounded(where)}{error.strerror or os.strerror(error.errno or 0)}\n  next: {remedy}"


def _explain_bug(error: BaseException, arguments: Sequence[str]) -> str:
    import platform
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    own_frames = [frame for frame in frames if f"{os.sep}backhand{os.sep}" in frame.filename] or frames
    place = f" ({own_frames[-1].filename}:{own_frames[-1].lineno}, in {own_frames[-1].name})" if own_frames else ""
    versions = f"Python {platform.python_version()} on {sys.platform}"
    with suppress(OSError):  # the bug is to be told, whatever else fails
        for name in ("backhand", "torch", "transformers"):
            versions += f", {name} {version_of(name) or 'not installed'}"
    return (
        f"error: unexpected {type(error).__name__}: {bounded(str(error))}{place}\n"
        "  why: this is a bug in Backhand, not in what you typed\n"
        "  next: run the command again with --debug and report what it prints, with this line:\n"
        f"        {versions}; backhand {bounded(' '.join(arguments))}"
    )
