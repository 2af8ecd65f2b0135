"""`backhand generate`: one answer on standard output, or the answers to a file of rows."""

from __future__ import annotations

import io
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from backhand.data.context import TeacherPrompts, context_text
from backhand.data.data_report import rows_left_out
from backhand.data.options import NamedColumns
from backhand.data.prepare import prepare_prompts
from backhand.data.raw_rows import RowErrors
from backhand.data.row_encoder import Prompt
from backhand.data.rows import with_answer
from backhand.data.sources import expand
from backhand.errors import DataError, UsageError
from backhand.files import check_directory, made_directory, replaceable_mode, write_atomically
from backhand.generation.labels import (
    AUTO,
    NONE,
    RULE,
    Labels,
    check_labels,
    choose_labels,
    longest_label,
    named_labels,
)
from backhand.generation.loading import LoadedModel, loaded_model
from backhand.generation.options import GenerateOptions, compared_labels
from backhand.generation.session import PROMPT, GenerationSession
from backhand.printing import counting, say, visible, write_answer
from backhand.reading import refuse_inputs_inside
from backhand.terminal import working
from backhand.words import count_of, interval_text, name_list, shorten, show_notes

STDIN = "-"


def generate_command(options: GenerateOptions) -> None:
    """Answer a prompt on standard output, or every row of a file. Everything else goes to standard error.

    Raises:
        UsageError: an option is out of range, or `output` exists.
        DataError: there is no prompt, or the rows cannot be read.
        ArtifactError: model and adapter cannot be read, or do not belong together.
    """
    options.validate()
    expand(options.rows.data, text_option="prompt")  # a missing file is reported before the model is loaded
    answer = options.answer
    check_output(answer.output, overwrite=answer.overwrite)
    if answer.output is not None:
        inputs: dict[str, Path | str | None] = {"adapter": answer.adapter, "model": options.model.model}
        inputs |= {f"data[{i}]": name for i, name in enumerate(options.rows.data)}
        refuse_inputs_inside(answer.output, {**inputs, "chat_template": options.template.chat_template})
    prompt = None if options.rows.data else answer.prompt
    if prompt == STDIN:
        prompt = read_text(sys.stdin.read, "the prompt").removesuffix("\n")
        if not prompt.strip():
            raise DataError("the prompt is empty", where="standard input", next_step="pipe a text into the command")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal's encoding does not have must not end the answer.
        sys.stdout.reconfigure(errors="replace")
    one = prompt is not None
    with loaded_model(options.model, answer.adapter, template=options.template, one_at_a_time=one) as loaded:
        if not answer.quiet:
            show_notes([*loaded.notes, *loaded.purpose_notes()])
        if prompt is None:
            _write_answers(options, loaded)
        else:
            _answer_prompt(options, loaded, prompt)


def _answer_prompt(options: GenerateOptions, loaded: LoadedModel, prompt: str) -> None:
    session = GenerationSession(loaded, loaded.template)
    if session.has_template and not options.answer.quiet:
        show_notes(loaded.missing_system(loaded.template.system))
    prompt_ids = session.prompt_ids(prompt)
    labels = _labels(options, loaded, session)
    if not options.answer.compare:
        _answer_one(session, prompt_ids, options, labels)
        return
    for label, with_adapter in compared_labels(options.answer.adapter):
        write_answer(f"{label}:\n")
        loaded.model.use_adapter(with_adapter)
        _answer_one(session, prompt_ids, options, labels, f"{label}: ")
        if not with_adapter:
            write_answer("\n")


def _labels(options: GenerateOptions, loaded: LoadedModel, session: GenerationSession) -> Labels:
    """Return the labels to choose answers from; empty if answers are free text.

    Raises:
        UsageError: `auto` is given and the adapter's record has no labels, or a label does not fit the model.
    """
    names = options.answer.labels
    if names != (AUTO,):
        labels = named_labels(() if names == (NONE,) else names, loaded.labels, lambda: session.renderer)
        check_labels(labels, loaded.model)
        return labels
    if loaded.decisions:
        raise UsageError(
            "the adapter decides questions, and names no labels",
            where="labels",
            next_step="use backhand decide with the same adapter",
        )
    if options.answer.adapter is None:
        raise UsageError(
            "no labels are given, and there is no adapter whose record names them",
            where="labels",
            next_step="name them: --labels A,B,…, or give --adapter",
        )
    if not loaded.labels:
        raise UsageError(
            "the adapter's record names no labels",
            where="labels",
            why=f"it names them where training rows have them: {RULE}",
            next_step="name them: --labels A,B,…",
        )
    return loaded.labels


def _answer_one(
    session: GenerationSession, prompt_ids: Sequence[int], options: GenerateOptions, labels: Labels, who: str = ""
) -> None:
    """Write one answer while it is generated, or the most probable label.

    The probabilities of all labels go to standard error.

    Args:
        session: the model.
        prompt_ids: tokens of the prompt.
        options: all options of the command.
        labels: the labels to choose from; empty for free text.
        who: prefix of the line of probabilities, which names the model when two are compared.
    """
    if labels:
        session.check(prompt_ids, PROMPT, longest_label(labels))
        (chosen,) = choose_labels(session.model, [prompt_ids], labels)
        write_answer(f"{next(iter(chosen))}\n")
        if not options.answer.quiet:
            shown = (f"{visible(shorten(label))} {probability:.3f}" for label, probability in chosen.items())
            say(who + name_list(shown))
        return
    answer = session.answer(prompt_ids, options.sampling, on_text=write_answer)
    if not answer.text.endswith("\n"):
        write_answer("\n")
    if answer.finish_reason == "length" and not options.answer.quiet:
        why = "; --max-new-tokens allows for more"
        if answer.tokens < options.sampling.max_new_tokens:
            why = f": with the prompt they are the {session.model.context_tokens:,} that the model takes"
        show_notes([f"cut off after {answer.tokens} tokens{why}"])


def check_output(output: Path | None, *, overwrite: bool) -> None:
    """Check that `output` can be written, before anything is loaded. See `write_output`.

    Raises:
        UsageError: it exists and --overwrite is not given, or it is not a plain file.
        ResourceError: its directory cannot be created.
    """
    if output is None:
        return
    if output.is_dir():
        raise UsageError(f"{output} is a directory", where="output", next_step="name a file in it")
    if output.exists() and not overwrite:
        raise UsageError(
            f"{output} exists", where="output", next_step="name another file, or replace this one with --overwrite"
        )
    replaceable_mode(output)  # raises now instead of after all answers
    check_directory(output.parent)


def write_output(output: Path, data: bytes) -> None:
    """Write the output of a command, and create its directory. Raises as `files.write_atomically`."""
    with made_directory(output.parent):
        write_atomically(output, data)


def _write_answers(options: GenerateOptions, loaded: LoadedModel) -> None:
    """Write a line of JSON for every row, after the last answer."""
    started = time.perf_counter()
    lines = answer_rows(options, loaded)
    lines = lines if options.answer.as_rows else rounded(lines)  # rows have numbers of their own
    if options.answer.output is None:
        write_answer(_json_lines(lines))
        return
    write_output(options.answer.output, _json_lines(lines).encode("utf-8"))
    if not options.answer.quiet:
        took_s = time.perf_counter() - started
        say(
            f"{len(lines)} rows answered in {took_s:.1f} s: {shlex.quote(str(options.answer.output))}",
            *_exactly_right(lines, options.answer.compare),
        )


_DIGITS = 6
"""Number of significant digits of a printed probability."""


def rounded(answers: Any) -> Any:
    """Return answers with printed digits. In bfloat16, about two digits of a probability are known."""
    return json.loads(json.dumps(answers), parse_float=lambda digits: float(f"{float(digits):.{_DIGITS}g}"))


def write_lines(lines: Sequence[Mapping[str, Any]], output: Path | None, noun: str) -> None:
    """Write one JSON object per line to a file, and say how many of what there are; or to standard output."""
    text = _json_lines(lines)
    if output is None:
        sys.stdout.write(text)
        return
    write_output(output, text.encode("utf-8"))
    say(f"{count_of(len(lines), noun)} written to {output}")


def _json_lines(lines: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _keep_answers(lines: Sequence[Mapping[str, Any]], whole: int, rows: int, output: Path | None) -> None:
    """Write the answers of an interrupted command: next to `output`, or to standard output.

    Args:
        whole: number of rows with the answers of every model.
        rows: number of all rows.
    """
    if output is None:
        write_answer(_json_lines(lines))
    elif lines:
        partial = output.with_name(f"{output.name}.partial")
        write_output(partial, _json_lines(lines).encode("utf-8"))
        say(f"{whole:,} of {count_of(rows, 'row')} were answered: {shlex.quote(str(partial))}")


def _exactly_right(lines: Sequence[Mapping[str, Any]], compared: bool) -> list[str]:
    """Return a line on the answers that equal the rows' own ones, per model; none if the rows have no answers."""
    right: list[str] = []
    known = [line for line in lines if line.get("reference") is not None]
    for who in ("base", "adapted") if compared and known else ("",) if known else ():
        answers = [(line[who] if who else line)["completion"] for line in known]
        pairs = zip(answers, known, strict=True)
        share = sum(text.strip() == line["reference"].strip() for text, line in pairs) / len(known)
        of = f"of {count_of(len(known), 'row')} with an answer ({interval_text(share, len(known))})"
        right.append(f"{who}{': ' if who else ''}exactly right {share:.1%} {of}")
    return right


def answer_rows(options: GenerateOptions, loaded: LoadedModel) -> list[dict[str, Any]]:
    """Return for every row of `data`: prompt, reference, completion and finish_reason.

    `prompt` is the text that the model receives, `reference` the row's own last reply or null. With `labels`,
    `completion` is a label, and the line has its `probability` and the `probabilities` of all labels instead of
    `finish_reason`. With `compare`, `base` and `adapted` hold the answers of the two models.

    Raises:
        UsageError, DataError: as `data.prepare.prepare_prompts`.
    """
    context = options.answer.context
    teacher = None if context is None else TeacherPrompts(context_text(context))
    read, report = prepare_prompts(
        *(options.rows, loaded.template, loaded.tokenizer, NamedColumns(prompt=options.answer.prompt), teacher),
        recorded=loaded.columns,
        purpose="labelled" if loaded.objective == "kto" else "answers",
    )
    session = GenerationSession(loaded, loaded.template)
    labels = _labels(options, loaded, session)
    # A prompt without room for an answer counts as a malformed row.
    bad = RowErrors(options.rows.skip_bad)
    prompts: list[Prompt] = []
    for prompt in read:
        try:
            session.check(prompt.input_ids.tolist(), prompt.source, longest_label(labels) or 1)
            prompts.append(prompt)
        except DataError as error:
            bad.add(error)
    if not prompts and bad.errors:
        raise bad.errors[0]
    if not options.answer.quiet:
        notes = list(report.notes)
        notes += loaded.missing_system(report.system) if session.has_template else []
        errors = (*report.bad_rows, *bad.errors)
        show_notes([*notes, *rows_left_out(report.skipped_bad + bad.count, errors, report.empty_rows)])
    return _lines(options, loaded, session, prompts, labels)


def _lines(
    options: GenerateOptions, loaded: LoadedModel, session: GenerationSession, prompts: Sequence[Prompt], labels: Labels
) -> list[dict[str, Any]]:
    lines: dict[int, dict[str, Any]] = {}  # by number of the prompt, in the order of completion

    def take(number: int, answer: dict[str, Any]) -> None:
        prompt = prompts[number]
        if options.answer.as_rows:
            assert prompt.row is not None
            lines[number] = with_answer(prompt.row, answer["completion"])
        else:
            lines[number] = {"prompt": prompt.text, "reference": prompt.reply, **answer}

    try:
        if not options.answer.compare:
            _answer_rows(session, prompts, options, "answers", labels, take)
        else:
            compared: list[dict[str, Any]] = [{} for _ in prompts]
            for key, with_adapter in (("base", False), ("adapted", True)):
                loaded.model.use_adapter(with_adapter)

                def add(number: int, answer: dict[str, Any], key: str = key) -> None:
                    compared[number][key] = answer
                    take(number, compared[number])

                _answer_rows(session, prompts, options, key, labels, add)
    except KeyboardInterrupt:
        answered = [lines[number] for number in sorted(lines)]
        whole = sum("adapted" in line for line in answered) if options.answer.compare else len(answered)
        answered = answered if options.answer.as_rows else rounded(answered)
        _keep_answers(answered, whole, len(prompts), options.answer.output)
        raise
    return [lines[number] for number in range(len(prompts))]


LABELLED_TOGETHER = 512
"""Number of prompts whose labels are chosen together. If the command is interrupted, those of earlier ones are kept."""


def _answer_rows(
    session: GenerationSession,
    prompts: Sequence[Prompt],
    options: GenerateOptions,
    key: str,
    labels: Labels,
    take: Callable[[int, dict[str, Any]], None],
) -> None:
    """Answer every prompt. `take` receives the number of each prompt and its answer when it is complete."""
    asked = [prompt.input_ids.tolist() for prompt in prompts]
    with working(quiet=options.answer.quiet), counting(key, len(asked)) as done:
        if labels:
            for start in range(0, len(asked), LABELLED_TOGETHER):
                some = asked[start : start + LABELLED_TOGETHER]
                for number, row in enumerate(choose_labels(session.model, some, labels, done), start):
                    label, probability = next(iter(row.items()))
                    take(number, {"completion": label, "probability": probability, "probabilities": row})
            return
        session.answer_all(
            asked,
            options.sampling,
            sources=[prompt.source for prompt in prompts],
            batch_rows=options.answer.batch_rows,
            on_done=done,
            on_answer=lambda number, answer: take(
                number, {"completion": answer.text, "finish_reason": answer.finish_reason}
            ),
        )


def read_text(read: Callable[[], str], what: str) -> str:
    """Read a text from standard input.

    Args:
        read: reads it; depending on the locale, Python raises UnicodeDecodeError or returns lone surrogates for bytes
            that are not valid.
        what: noun phrase for the error.

    Raises:
        DataError: the text is not UTF-8.
    """
    try:
        text = read()
        text.encode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) & 0xFF
    else:
        return text
    raise DataError(
        f"{what} is not UTF-8",
        where="standard input",
        why=f"it contains the byte 0x{byte:02x}, which is not valid there",
        next_step="convert it first, for example with iconv -f latin1 -t utf-8",
    )
