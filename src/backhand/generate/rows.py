"""The answers to a file of rows, as JSON Lines in the order of the rows."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from backhand.adapters.atomic_files import make_directory, replaceable_mode, write_atomically
from backhand.data.prepare import Prompt, prepare_prompts
from backhand.data.rows import BadRows, count_of
from backhand.errors import DataError, UsageError
from backhand.generate.loading import LoadedModel
from backhand.generate.notes import show_notes
from backhand.generate.options import AnswerOptions, GenerateOptions
from backhand.generate.session import Answer, GenerationSession


def check_output(options: AnswerOptions) -> None:
    """Whether `output` can be written, before anything is loaded; its directory is made if need be.

    Raises:
        UsageError: it exists and is not to be overwritten, or is no plain file.
        ResourceError: its directory cannot be made.
    """
    output = options.output
    if output is None:
        return
    if output.is_dir():
        raise UsageError(f"{output} is a directory", where="output", next_step="name a file in it")
    if output.exists() and not options.overwrite:
        raise UsageError(
            f"{output} exists", where="output", next_step="name another file, or replace this one with --overwrite"
        )
    replaceable_mode(output)  # now, and not when all answers are there
    make_directory(output.parent)


def answer_rows(options: GenerateOptions, loaded: LoadedModel) -> None:
    """Answer every row of `data` and write a line for each: prompt, reference, completion and finish_reason.

    `prompt` is the text as the model saw it, `reference` the row's own last reply or null. With `compare`, `base` and
    `adapted` hold a completion and its finish_reason each. The file appears when all answers are there.

    Raises:
        UsageError, DataError: as `data.prepare.prepare_prompts`.
        ResourceError: the file cannot be written.
    """
    read, report = prepare_prompts(options.rows, options.template, loaded.tokenizer)
    session = GenerationSession(loaded, options.template)
    # A prompt that leaves no room for an answer is a bad row of this model, as a malformed one is of any.
    bad = BadRows(options.rows.skip_bad)
    prompts = [prompt for prompt in read if _can_be_answered(prompt, session, bad)]
    if not prompts and bad.errors:
        raise bad.errors[0]
    if not options.answer.quiet:
        notes = list(report.notes)
        if left_out := report.skipped_bad + bad.count:
            first = (*report.bad_rows, *bad.errors)[0]
            notes.append(f"{count_of(left_out, 'bad row')} left out, the first: {first}")
        show_notes(notes)
    started = time.perf_counter()
    lines = _lines(options, loaded, session, prompts)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if options.answer.output is None:
        sys.stdout.write(text)
        return
    write_atomically(options.answer.output, text.encode("utf-8"))
    if not options.answer.quiet:
        took_s = time.perf_counter() - started
        print(f"{len(lines)} rows answered in {took_s:.1f} s: {options.answer.output}", file=sys.stderr)


def _can_be_answered(prompt: Prompt, session: GenerationSession, bad: BadRows) -> bool:
    try:
        session.check(prompt.input_ids.tolist(), prompt.source)
    except DataError as error:
        bad.add(error)
        return False
    return True


def _lines(
    options: GenerateOptions, loaded: LoadedModel, session: GenerationSession, prompts: Sequence[Prompt]
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"prompt": prompt.text, "reference": prompt.reply} for prompt in prompts]
    if not options.answer.compare:
        for line, answer in zip(lines, _answers(session, prompts, options, "answers"), strict=True):
            line |= _entry(answer)
        return lines
    for key, with_adapter in (("base", False), ("adapted", True)):
        loaded.model.use_adapter(with_adapter)
        for line, answer in zip(lines, _answers(session, prompts, options, key), strict=True):
            line[key] = _entry(answer)
    return lines


def _entry(answer: Answer) -> dict[str, str]:
    return {"completion": answer.text, "finish_reason": answer.finish_reason}


def _answers(
    session: GenerationSession, prompts: Sequence[Prompt], options: GenerateOptions, label: str
) -> list[Answer]:
    with _progress(label, len(prompts), shown=not options.answer.quiet) as advance:
        return session.answer_all(
            [prompt.input_ids.tolist() for prompt in prompts],
            options.sampling,
            sources=[prompt.source for prompt in prompts],
            batch_rows=options.answer.batch_rows,
            on_done=lambda _: advance(),
        )


@contextmanager
def _progress(label: str, rows: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar on standard error, if that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from backhand.terminal import console

    shown_on = console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=shown_on, transient=True, disable=not (shown and shown_on.is_terminal)) as progress:
        task = progress.add_task(label, total=rows)
        yield lambda: progress.advance(task)
