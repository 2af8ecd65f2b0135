"""`backhand chat`: a conversation with a model, with or without an adapter."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial

from backhand.data.chat import OWN_TEMPLATE, read_template
from backhand.data.rows import Message
from backhand.errors import BackhandError, DataError, UsageError
from backhand.generation.command import read_text
from backhand.generation.loading import LoadedModel, loaded_model
from backhand.generation.options import ChatOptions, SamplingOptions, compared_labels
from backhand.generation.session import GenerationSession
from backhand.printing import may_be_silent, say, write_answer
from backhand.words import show_notes

ASK = ">>> "

HELP = """\
/reset          forget the conversation
/system TEXT    set the system message, and forget the conversation; without TEXT, show it
/help           this list
/exit           leave, as Ctrl-D does
Ctrl-C          stop the answer
//TEXT          say /TEXT"""


def chat_command(options: ChatOptions) -> None:
    """Hold a conversation until Ctrl-D, /exit or the end of standard input.

    Raises:
        UsageError: an option is out of range, or the model has no chat template.
        DataError: standard input is not UTF-8.
        ArtifactError: model and adapter cannot be read, or do not belong together.
    """
    options.validate()
    with loaded_model(options.model, options.chat.adapter, template=options.template, one_at_a_time=True) as loaded:
        session = GenerationSession(loaded, loaded.template)
        if not session.has_template:
            raise _completes_texts(loaded, options)
        show_notes([*loaded.notes, *loaded.purpose_notes()])
        show_notes(loaded.missing_system(options.template.system))
        interactive = sys.stdin.isatty()
        if interactive:
            say(f"{loaded.base}; /help lists the commands, Ctrl-D leaves")
            with suppress(ImportError):
                import readline  # noqa: F401 - gives input() its line editing and history
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        voices = [Voice()]
        if options.chat.compare:
            use = loaded.model.use_adapter
            voices = [Voice(label, partial(use, wanted)) for label, wanted in compared_labels(options.chat.adapter)]
        conversation = Conversation(session, options.sampling, system=options.template.system, voices=voices)
        if options.chat.prompt is not None:
            if interactive:
                say(f"{ASK}{options.chat.prompt}", file=sys.stdout)
            conversation.say(options.chat.prompt)
        _talk(conversation, interactive)


def _completes_texts(loaded: LoadedModel, options: ChatOptions) -> UsageError:
    """Return the error for a model without a chat template, or an adapter that was trained without one."""
    if loaded.template == options.template:
        return UsageError(
            f"{loaded.base} has no chat template, so it cannot hold a conversation",
            where="chat_template",
            next_step="take the Instruct variant of the model, give --chat-template FILE, or use backhand generate",
        )
    given = f"--adapter {shlex.quote(str(options.chat.adapter))}"
    if options.model.model is not None:
        given = f"--model {shlex.quote(options.model.model)} {given}"
    has_template = read_template(None, loaded.tokenizer) is not None
    talk = f"; for a conversation all the same: --chat-template {OWN_TEMPLATE}" if has_template else ""
    return UsageError(
        "the adapter was trained on texts without a chat template: it completes texts, and holds no conversation",
        where="adapter",
        next_step=f"backhand generate {given} --prompt '…'{talk}",
    )


def _talk(conversation: Conversation, interactive: bool) -> None:
    while True:
        try:
            with may_be_silent():
                line = read_text(lambda: input(ASK if interactive else ""), "the message")
        except EOFError:
            if interactive:
                print()
            return
        except DataError as error:
            if not interactive:
                raise
            _print_note(f"error: {error}")
            continue
        except KeyboardInterrupt:
            if not interactive:
                raise
            say("", "(Ctrl-D leaves)")
            continue
        if not conversation.take(line):
            return


@dataclass
class Voice:
    """The base model or the adapted one, with its own history of the conversation."""

    label: str | None = None  # heading of its answers; None if it is the only voice
    begin: Callable[[], None] = lambda: None  # attaches or detaches the adapter
    messages: list[Message] = field(default_factory=list)  # system, user and assistant turns so far


def _print_note(text: str) -> None:
    say(*text.split("\n"))


@dataclass(eq=False)
class Conversation:
    """The messages of a conversation, and the commands that a user can type."""

    session: GenerationSession
    sampling: SamplingOptions  # sampling of the first turn; each later turn has the next seed
    _: KW_ONLY
    system: str | None = None  # the system message; None for the template's own
    voices: Sequence[Voice] = field(default_factory=lambda: [Voice()])  # models that answer every turn, in this order
    write: Callable[[str], None] = write_answer  # receives the text of the answers
    tell: Callable[[str], None] = _print_note  # receives everything else

    def __post_init__(self) -> None:
        self._turns = 0
        self._reset()

    def take(self, line: str) -> bool:
        """Run a typed command, or send a message. Return False if the line ends the conversation."""
        word, _, rest = line.strip().partition(" ")
        if not line.strip():
            return True
        if not word.startswith("/") or word.startswith("//"):
            self.say(line.replace("//", "/", 1) if word.startswith("//") else line)
        elif word in ("/exit", "/quit", "/bye"):
            return False
        elif word == "/reset":
            self._reset()
            self.tell("the conversation is forgotten")
        elif word == "/system" and not rest.strip():
            self.tell(f"system message: {self.system}" if self.system else "there is no system message of yours")
        elif word == "/system":
            self.system = rest.strip()
            self._reset()
            self.tell("the system message is set, the conversation is forgotten")
        else:
            self.tell(HELP if word == "/help" else f"there is no {word}; to say it, type /{line.strip()}\n{HELP}")
        return True

    def _reset(self) -> None:
        for voice in self.voices:
            voice.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str) -> None:
        """Send a message to every voice; a leading slash has no meaning."""
        sampling = replace(self.sampling, seed=(self.sampling.seed + self._turns) % 2**63)
        self._turns += 1
        for voice in self.voices:
            if voice.label is not None:
                self.write(f"{voice.label}:\n")
            voice.begin()
            self._answer(voice.messages, text, sampling)

    def _answer(self, messages: list[Message], text: str, sampling: SamplingOptions) -> None:
        messages.append({"role": "user", "content": text})
        pieces: list[str] = []

        def on_text(piece: str) -> None:
            pieces.append(piece)
            self.write(piece)

        try:
            prompt_ids = self.session.conversation_ids(messages)
            answer = self.session.answer(prompt_ids, sampling, on_text=on_text)
        except KeyboardInterrupt:
            self.write("\n")
            self.tell("stopped")
        except BackhandError as error:
            messages.pop()
            self.tell(f"error: {error}\n  (/reset starts again)")
            return
        else:
            self.write("\n")
            if answer.finish_reason == "length":
                self.tell(f"cut off after {answer.tokens} tokens")
        if pieces:
            messages.append({"role": "assistant", "content": "".join(pieces)})
        else:
            # After an empty answer, the next message would make two user turns in a row, which some templates refuse.
            messages.pop()
