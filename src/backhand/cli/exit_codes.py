"""What an exception means for the shell: its exit code, and what to print on standard error (docs/errors.md)."""

from __future__ import annotations

import difflib
import errno
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from backhand.errors import ArtifactError, BackhandError, DataError, UsageError
from backhand.printing import bounded
from backhand.system import version_of

if TYPE_CHECKING:
    from cyclopts import CycloptsError

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


def ending(error: BaseException, arguments: Sequence[str]) -> tuple[int, str]:
    """The exit code of the contract for an exception that ended a command, and what to print for it.

    That is what happened, where, why, what to do next; "" where there is nothing to say.
    """
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
            return USAGE, f"error: {bounded(_usage(wrong))}\n  next: {command}"
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


def _of_the_parser(error: BaseException) -> CycloptsError | None:
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
    for kind, advice in (
        (UsageError, f"{command} --help explains every option"),
        (DataError, "correct the file, or give another one"),
        (ArtifactError, "fetch or make it again, or give another one"),
    ):
        if isinstance(error, kind):
            return f"\n  next: {advice}"
    return ""


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


def _usage(error: CycloptsError) -> str:
    from cyclopts import UnknownCommandError, UnknownOptionError, UnusedCliTokensError

    from backhand.cli.command import as_option
    from backhand.training.other_names import COMMANDS, HERE, NOT_NEEDED, ours

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
        written = (error.token.keyword or error.token.value or "").partition("=")[0]
        options = {name for argument in error.argument_collection if argument.parse for name in argument.names}
        if meant := ours(written, as_option, {name[2:].replace("-", "_") for name in options}):
            near = meant.removeprefix(HERE)
            said = f"Did you mean {near}?" if near in options else f"{meant[0].upper()}{meant[1:]}."
            return f"Unknown option: {written}" + (f"; {meant}" if meant.startswith(NOT_NEEDED) else f". {said}")
        if meant := ours(written, as_option):
            return f"Unknown option: {written}. `backhand train` has it: {meant.removeprefix(HERE)}."
    return str(error).strip()


def _explain_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    path_remedy = "check the path, and give another one"
    remedy = {
        **dict.fromkeys(_USAGE_ERRNOS, path_remedy),
        errno.ENOSPC: "free some space, or write to another disk with --output",
        errno.EDQUOT: "free some space, or write to another disk with --output",
        errno.EFBIG: "raise the file-size limit (ulimit -f), or write to another disk with --output",
        errno.ENOMEM: "close other programs, or give a smaller --micro-batch-rows",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
        errno.ENFILE: "close other programs",
    }.get(error.errno or 0, "choose a place you may write to, for example with --output")
    return f"error: {bounded(where)}{error.strerror or os.strerror(error.errno or 0)}\n  next: {remedy}"


def _explain_bug(error: BaseException, arguments: Sequence[str]) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}backhand{os.sep}" in frame.filename] or frames
    place = f" ({ours[-1].filename}:{ours[-1].lineno}, in {ours[-1].name})" if ours else ""
    packages = (f"{name} {version_of(name) or 'not installed'}" for name in ("backhand", "torch", "transformers"))
    versions = ", ".join((f"Python {platform.python_version()} on {sys.platform}", *packages))
    return (
        f"error: unexpected {type(error).__name__}: {bounded(str(error))}{place}\n"
        "  why: this is a bug in Backhand, not in what you typed\n"
        "  next: run the command again with --debug and report what it prints, with this line:\n"
        f"        {versions}; backhand {bounded(' '.join(arguments))}"
    )
