"""The `backhand` command: find the subcommand, run it, and turn its result or exception into an exit code.

The modules of the command line take a tenth of a second to import. `main` imports them itself, so that Ctrl-C ends the
command quietly from the start. Nothing here imports torch; the module of a subcommand is imported when it runs.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from backhand.cli.exit_status import BUG, TERMINATED, exit_status, is_secondary_process
from backhand.cli.openmp_limits import remove_limits
from backhand.cli.openmp_spin import adaptive_spinning, set_spin_count
from backhand.cli.streams import accept_any_text, discard_output, open_missing_streams, tolerate_stderr_errors
from backhand.errors import UsageError
from backhand.printing import may_be_silent, never_silent, show_what_libraries_say, visible
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
    """Create the command line for cyclopts. Commands are imported when they are named."""
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
            f"{commands.__name__}:{command.name}",  # imported lazily
            name=command.name,
            help=command.summary,
            help_epilogue=f"Example: `{command.example}`",
            sort_key=place,
        )
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: the words after `backhand`; None for those of this process.
    """
    with tolerate_stderr_errors():
        return _main(list(sys.argv[1:] if arguments is None else arguments))


def _main(words: list[str]) -> int:
    debug = "--debug" in words
    interrupted: list[float] = []
    remove_limits()
    set_spin_count()  # for OpenMP libraries that read it when they are loaded; `nn.compute` sets it for later ones
    try:
        open_missing_streams()
        accept_any_text()
        with _signals_unwind(interrupted), ExitStack() as stack:
            command_words = words[1:] if words[:1] == ["--debug"] else words
            # Started before the imports of the command, which take time.
            stack.enter_context(never_silent(command_words[0] if command_words else ""))
            if "--quiet" in command_words or is_secondary_process():
                stack.enter_context(may_be_silent())
            if sorted(command_words) == ["--verbose", "--version"]:
                print(_verbose_version(), flush=True)
                return 0
            result = make_app()(_values_joined(command_words))
            # The result is None for help and version, which are printed already.
            code = 0 if result is None else run_prepared(result)
            sys.stdout.flush()
        return code
    except BaseException as error:  # noqa: BLE001 - every exception of a command ends here
        return _report(error, words, debug, interrupted)


def run_prepared(prepared: Prepared) -> int:
    """Run a parsed command and return its exit code. Errors about an option name the place where it was written."""
    _check_directory()
    show_what_libraries_say()
    with ExitStack() as stack:
        stack.enter_context(adaptive_spinning())
        if prepared.report_of is not None:
            from backhand.report.command import report_kept

            stack.enter_context(report_kept(prepared.report_of))
        try:
            result = prepared.function()
        except UsageError as error:
            prepared.name_origin(error)
            raise
    return result if isinstance(result, int) else 0


def _check_directory() -> None:
    """Raise UsageError if the current directory was deleted, because libraries end the process without a message."""
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(
            "the current directory does not exist any more",
            where=os.environ.get("PWD"),
            why=error.strerror,
            next_step="change to a directory that exists: cd ~",
        ) from None


_OPTION = re.compile(r"--[a-z][a-z0-9-]*=")
"""The beginning of an option with its value in the same word."""


def _values_joined(words: Sequence[str]) -> list[str]:
    """Join `--prompt -` and `--prompt "- a list"` with an equals sign; the parser would take the values for options.

    Only words that cannot be options are joined: a lone hyphen, and words that start with one and contain white space.
    The white space of `--output=my run` is in its value.
    """
    joined: list[str] = []
    for word in words:
        value = word == "-" or (word.startswith("-") and len(word.split(maxsplit=1)) > 1 and not _OPTION.match(word))
        if value and joined and joined[-1].startswith("--") and "=" not in joined[-1] and len(joined[-1]) > 2:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _report(error: BaseException, words: Sequence[str], debug: bool, interrupted: Sequence[float]) -> int:
    import traceback

    just_now = bool(interrupted) and time.monotonic() - interrupted[-1] < _JUST_NOW_S
    if (
        just_now
        and isinstance(error, Exception)
        and _may_result_from_ctrl_c(error)
        and exit_status(error, words)[0] == BUG
    ):
        error = KeyboardInterrupt().with_traceback(error.__traceback__)
    if debug and not isinstance(error, SystemExit | BrokenPipeError):
        sys.stderr.write(visible("".join(traceback.format_exception(error)), "\n"))
    code, text = exit_status(error, words)
    if text:
        with suppress(OSError):  # a closed terminal
            print(
                text.replace("error:", "\033[1;31merror:\033[0m", 1) if _stderr_in_colour() else text, file=sys.stderr
            )
    with suppress(OSError, ValueError, AttributeError):  # closed, or a program's replacement without these methods
        try:
            sys.stdout.flush()
        except OSError:
            discard_output(sys.stdout)
    return code


def _may_result_from_ctrl_c(error: BaseException) -> bool:
    """Return True if a library may have turned Ctrl-C into this error.

    An interrupted import raises ImportError, and C code may lose the cause.
    """
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
    """Let SIGTERM unwind the stack as Ctrl-C does, so that files are closed. Training installs its own handlers.

    Args:
        interrupted: collects the times of Ctrl-C.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        interrupted.append(time.monotonic())
        raise KeyboardInterrupt

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = {}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # a parent process may have asked to ignore it
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _verbose_version() -> str:
    """Return the output of `--version --verbose` for bug reports: versions, processor and compiled kernels."""
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
