"""`backhand generate`: one answer on standard output, or the answers to a file of rows."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from backhand.errors import DataError
from backhand.generate.loading import LoadedModel, loaded_model
from backhand.generate.notes import show_notes
from backhand.generate.options import GenerateOptions, compared_labels
from backhand.generate.rows import answer_rows, check_output
from backhand.generate.session import Answer, GenerationSession
from backhand.generate.standard_input import read_text

STDIN = "-"


def generate_command(options: GenerateOptions) -> None:
    """Answer a prompt on standard output, or every row of a file; everything else goes to standard error.

    Raises:
        UsageError: an option is out of range, or `output` exists.
        DataError: there is no prompt, or the rows cannot be read.
        ArtifactError: model and adapter cannot be read, or do not belong together.
    """
    options.validate()
    answer = options.answer
    check_output(answer)
    prompt = _read_prompt(answer.prompt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character shows another one; the answer goes on.
        sys.stdout.reconfigure(errors="replace")
    with loaded_model(options.model, answer.adapter, chat_template=options.template.chat_template) as loaded:
        if not answer.quiet:
            show_notes(loaded.notes)
        if prompt is None:
            answer_rows(options, loaded)
        else:
            _answer_prompt(options, loaded, prompt)


def _read_prompt(prompt: str | None) -> str | None:
    if prompt != STDIN:
        return prompt
    text = read_text(sys.stdin.read, "the prompt")
    if not text.strip():
        raise DataError("the prompt is empty", where="standard input", next_step="pipe a text into the command")
    return text.removesuffix("\n")


def _answer_prompt(options: GenerateOptions, loaded: LoadedModel, prompt: str) -> None:
    session = GenerationSession(loaded, options.template)
    prompt_ids = session.prompt_ids(prompt)
    if not options.answer.compare:
        _stream(session, prompt_ids, options)
        return
    for label, with_adapter in compared_labels(options.answer.adapter):
        _write(f"{label}:\n")
        loaded.model.use_adapter(with_adapter)
        _stream(session, prompt_ids, options)
        if not with_adapter:
            _write("\n")


def _stream(session: GenerationSession, prompt_ids: Sequence[int], options: GenerateOptions) -> None:
    answer = session.answer(prompt_ids, options.sampling, on_text=_write)
    if not answer.text.endswith("\n"):
        _write("\n")
    if answer.finish_reason == "length" and not options.answer.quiet:
        show_notes([_cut_off(answer, session, options)])


def _cut_off(answer: Answer, session: GenerationSession, options: GenerateOptions) -> str:
    """Why an answer ended before its end."""
    if answer.tokens < options.sampling.max_new_tokens:
        room = session.model.context_tokens
        return f"cut off after {answer.tokens} tokens: with the prompt they are the {room:,} that the model takes"
    return f"cut off after {answer.tokens} tokens; --max-new-tokens allows for more"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
