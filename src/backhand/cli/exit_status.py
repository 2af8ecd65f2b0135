"""Map the exception that ended a command to its exit code and its message on standard error (docs/errors.md)."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Sequence, Set
from contextlib import suppress
from typing import TYPE_CHECKING

from backhand.errors import ArtifactError, BackhandError, DataError, UsageError, first_line
from backhand.printing import bounded
from backhand.system import version_of

if TYPE_CHECKING:
    import cyclopts

BUG = 1
USAGE = 2
RESOURCES = 5
SIGNAL = 128
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143

# Errors about a path that was given; all other errors are of the machine.
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
    """Return the errno if the system ran out of files or processes, also if it is the cause of another error."""
    within: BaseException | None = error
    while isinstance(within, Exception):  # not KeyboardInterrupt or SystemExit
        number = within.errno if isinstance(within, OSError) else None
        if number in _EXHAUSTED and getattr(within, "strerror", None) == os.strerror(number or 0):
            return number
        if isinstance(within, RuntimeError):  # raised by Python's threads and by libraries in other languages
            for text, meant in _EXHAUSTED_TEXTS.items():
                if text in str(within).lower():
                    return meant
        within = within.__cause__ or within.__context__
    return None


def exit_status(error: BaseException, arguments: Sequence[str]) -> tuple[int, str]:
    """Return the exit code for an exception that ended a command, and the text to print, or "".

    The text says what happened, where, why, and what to do next.
    """
    if (number := _exhausted(error)) is not None and not (isinstance(error, BackhandError) and error.said_elsewhere):
        what = error.what if isinstance(error, BackhandError) else first_line(error)
        return RESOURCES, f"error: {bounded(what)}\n  why: {os.strerror(number)}\n  next: {_EXHAUSTED[number]}"
    match error:
        case BackhandError():
            # Stopping on request is no error, although it has an exit code.
            on_request = error.exit_code > SIGNAL
            text = str(error) if on_request else f"error: {error}{_general_advice(error, arguments)}"
            return error.exit_code, "" if error.said_elsewhere else text
        case KeyboardInterrupt():
            return INTERRUPTED, "" if is_secondary_process() else "interrupted"
        case BrokenPipeError():
            return BROKEN_PIPE, ""
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None), ""
        case _ if (parser_error := _parser_error(error)) is not None:
            command = " ".join(("backhand", *(parser_error.command_chain or ()), "--help"))
            return USAGE, f"error: {bounded(_usage(parser_error, arguments))}\n  next: {command}"
        case _ if _is_out_of_memory(error):
            return RESOURCES, (
                "error: not enough memory\n"
                f"  why: {bounded(str(error).splitlines()[0]) if str(error) else 'the system refused an allocation'}\n"
                "  next: lower the limit with --memory, or give a smaller --micro-batch-rows or --max-length"
            )
        case OSError() if error.errno:
            return USAGE if error.errno in _USAGE_ERRNOS else RESOURCES, _explain_os_error(error)
        # A library written in Rust panicked, usually tokenizers because of an inconsistent tokenizer.json.
        case _ if type(error).__name__ == "PanicException" and not isinstance(error, Exception):
            return ArtifactError.exit_code, (
                f"error: a library failed on what it read: {bounded(str(error))}\n"
                "  why: a file of the model is inconsistent, usually tokenizer.json\n"
                "  next: download the files of the model again"
            )
    return BUG, _explain_bug(error, arguments)


def _parser_error(error: BaseException) -> cyclopts.CycloptsError | None:
    """Return the error if it is cyclopts' own, else None.

    It imports nothing: an interrupted import may be the error, and leaves modules incomplete.
    """
    kind = getattr(sys.modules.get("cyclopts"), "CycloptsError", ())
    return error if isinstance(error, kind) else None


def is_secondary_process() -> bool:
    """Return True for a run's processes on this machine other than the first, which prints for all of them."""
    return (os.environ.get("WORLD_SIZE") or "1") != "1" and os.environ.get("LOCAL_RANK", "0") != "0"


def _general_advice(error: BackhandError, arguments: Sequence[str]) -> str:
    """Return what to do next for an error without a next step of its own."""
    if error.next_step:
        return ""
    command = bounded(" ".join(["backhand", *(word for word in arguments[:1] if not word.startswith("-"))]))
    advice = {
        UsageError.exit_code: f"{command} --help explains every option",
        DataError.exit_code: "correct the file, or give another one",
        ArtifactError.exit_code: "download or make it again, or give another one",
    }.get(error.exit_code)
    return f"\n  next: {advice}" if advice else ""


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, ImportError) and any(text in str(error).lower() for text in _UNLOADABLE_TEXTS):
        return True  # the library does not fit into the limit of the address space
    # torch raises RuntimeError for its CPU allocator. The name of its class for devices avoids an import of torch.
    named = any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__)
    return named or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY_TEXTS)
    )


def _usage(error: cyclopts.CycloptsError, arguments: Sequence[str]) -> str:
    import difflib

    from cyclopts import CoercionError, UnknownCommandError, UnknownOptionError, UnusedCliTokensError

    from backhand.other_names import command_answers, value_answers

    words = list(error.unused_tokens or ())
    command = next(iter(error.command_chain or ()), "")
    if isinstance(error, UnusedCliTokensError):
        ways = _by_option(words, command, arguments)
        return f"Unexpected {' '.join(map(repr, words))}: no argument is expected here.{ways}"
    if isinstance(error, UnknownCommandError) and words and words[0].startswith("-"):
        close = difflib.get_close_matches(words[0], ("--help", "--version", "--debug"), n=1)
        return f"Unknown option: {words[0]}." + (f" Did you mean {close[0]}?" if close else "")
    if isinstance(error, UnknownCommandError) and words:
        name = words[0].lower().removeprefix("mlx_lm.")
        if same := command_answers().get(name) or (f"backhand {name} --help" if name != words[0].lower() else None):
            return f"Unknown command: {words[0]}. Its equivalent is {same}."
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
        messages = [_unknown_option(name, values[name], known, command) for name in unknown]
        several = (text.removeprefix("Unknown option: ") for text in messages)
        return messages[0] if len(messages) == 1 else "\n    - ".join(["Unknown options:", *several])
    message = str(error).strip()
    value = error.token.value.lower() if isinstance(error, CoercionError) and error.token else ""
    if (same := value_answers().get(value)) is not None and f'"{same}"' in message:
        return f"{message.partition(' Did you mean')[0]} Its equivalent is {same}."
    message = re.sub(r'unable to convert (".*") into ([^"]+)\.$', _not_converted, message)
    none = message.lower().replace("_", "-").startswith('invalid value "none" for --report-to.')
    return f"{message} No tracker is the default: leave --report-to out." if none else message


def _not_converted(match: re.Match[str]) -> str:
    """Return a value that no type accepts, with the types in words."""
    names = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    literal = (re.fullmatch(r"Literal\[(.*)\]", one) for one in match[2].split("|"))
    types = [
        choices[1] if choices else names.get(one) for one, choices in zip(match[2].split("|"), literal, strict=True)
    ]
    return f"{match[1]} is not {' or '.join(filter(None, types))}." if all(types) else match[0]


def _text_option(command: str) -> str | None:
    """Return the option of a command that takes one text, or None."""
    from backhand.cli.commands import COMMANDS

    option = next((entry.text for entry in COMMANDS if entry.name == command), "")
    return None if option in ("", "data") else option


def _reads_rows_alone(command: str) -> bool:
    """Return True for a command that takes texts as rows alone."""
    from backhand.cli.commands import COMMANDS

    return any(entry.text == "data" for entry in COMMANDS if entry.name == command)


def _by_option(words: Sequence[str], command: str, arguments: Sequence[str]) -> str:
    """Return the options that take these words as rows or as a text, after a space, or ""."""
    import shlex
    from itertools import takewhile

    from backhand.cli.command import imported
    from backhand.cli.commands import COMMANDS
    from backhand.cli.option_fields import option_fields

    options = next((imported(entry.options) for entry in COMMANDS if entry.name == command), None)
    typed, files = shlex.quote(" ".join(words)), [*filter(os.path.isfile, words)]
    ways, text = [], f"--{_text_option(command)}"
    for place, argument in enumerate(arguments):
        option, *value = argument.split("=", 1)
        spoken = [*value, *takewhile(lambda word: not word.startswith("-"), arguments[place + 1 :])]
        if option == text and spoken[1:] == words:
            return f" Give the text in quotes: {text} {shlex.quote(' '.join(spoken))}"
    if _text_option(command) and not files:
        ways.append(f"a text: {text} {typed}")
    if options is not None and any(field.name == "data" for field in option_fields(options)):
        ways.append(f"a file of rows: --data {' '.join(map(shlex.quote, files)) or typed}")
    return f" Give {', or '.join(ways)}" if ways else ""


def _unknown_option(typed: str, value: str, options: Set[str], command: str) -> str:
    """Explain an unknown option: by its equivalent if it is another tool's, otherwise by the nearest name."""
    from backhand.cli.option_fields import as_option, option_fields
    from backhand.options.config import TrainConfig
    from backhand.other_names import HERE, NOT_NEEDED, TYPO, is_text, longer_or_shorter, text_meant, translate_option
    from backhand.words import nearest_names

    known = {name[2:].replace("-", "_") for name in options}
    # The dashes are left out, since they make any two short options similar.
    plain = typed.strip("-").replace("-", "_")
    if text := text_meant(typed, _text_option(command), known):
        return f"Unknown option: {typed}. Did you mean {as_option(text)}?"
    if _reads_rows_alone(command) and is_text(plain):
        rows = 'Write texts as rows, such as {"text": "…"}'
        return f"Unknown option: {typed}. {rows}, and give them with --data FILE, or with --data - on standard input."
    if nearest := nearest_names(plain, known, count=1, cutoff=0.9):
        return f"Unknown option: {typed}. Did you mean {as_option(nearest[0])}?"
    if meant := translate_option(typed, as_option, known, value=value):
        near = meant.removeprefix(HERE)
        suggestion = f"Did you mean {near}?" if near in options else f"{meant[0].upper()}{meant[1:]}."
        return f"Unknown option: {typed}" + (f"; {meant}" if meant.startswith(NOT_NEEDED) else f". {suggestion}")
    of_train = {field.name for field in option_fields(TrainConfig)}
    if plain in of_train:
        lint = plain == "objective" and "labels" in known
        advice = " `lint` detects the form of the rows from their columns." if lint else ""
        return f"Unknown option: {typed}. It is an option of `backhand train`.{advice}"
    if meant := translate_option(typed, as_option, of_train, value=value):
        return f"Unknown option: {typed}. It is an option of `backhand train`: {meant.removeprefix(HERE)}."
    nearest = longer_or_shorter(plain, known) or nearest_names(plain, known, count=1, cutoff=TYPO)
    return f"Unknown option: {typed}." + "".join(f" Did you mean {as_option(name)}?" for name in nearest)


def _explain_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    path_remedy = "check the path, or give another one"
    remedy = {
        **dict.fromkeys(_USAGE_ERRNOS, path_remedy),
        errno.ENOSPC: "free some space, or write to another disk with --output",
        errno.EDQUOT: "free some space, or write to another disk with --output",
        errno.EFBIG: "raise the file-size limit (ulimit -f), or write to another disk with --output",
        **dict.fromkeys((errno.EACCES, errno.EPERM), "check its permissions, or give another place"),
        errno.ENOMEM: "close other programs, or give a smaller --micro-batch-rows",
    }.get(error.errno or 0, "choose a place you may write to, for example with --output")
    return f"error: {bounded(where)}{error.strerror or os.strerror(error.errno or 0)}\n  next: {remedy}"


def _explain_bug(error: BaseException, arguments: Sequence[str]) -> str:
    import platform
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    package_frames = [frame for frame in frames if f"{os.sep}backhand{os.sep}" in frame.filename] or frames
    place = (
        f" ({package_frames[-1].filename}:{package_frames[-1].lineno}, in {package_frames[-1].name})"
        if package_frames
        else ""
    )
    versions = f"Python {platform.python_version()} on {sys.platform}"
    with suppress(OSError):  # the message must not fail
        for name in ("backhand", "torch", "transformers"):
            versions += f", {name} {version_of(name) or 'not installed'}"
    return (
        f"error: unexpected {type(error).__name__}: {bounded(str(error))}{place}\n"
        "  why: this is a bug in Backhand, not in what you typed\n"
        "  next: run the command again with --debug and report what it prints, with this line:\n"
        f"        {versions}; backhand {bounded(' '.join(arguments))}"
    )
