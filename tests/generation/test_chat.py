from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from backhand.cli.main import main
from backhand.errors import DataError
from backhand.generation.chat import Conversation, Voice
from backhand.generation.options import SamplingOptions
from backhand.generation.session import Answer

SAMPLING = SamplingOptions(seed=7)


class Parrot:
    """A session that answers with a canned text, piece by piece, and remembers what it was asked."""

    def __init__(self, pieces: Sequence[str | BaseException] = ("al", "so"), finish_reason: Any = "stop") -> None:
        self.pieces = list(pieces)
        self.finish_reason = finish_reason
        self.asked: list[list[dict[str, Any]]] = []
        self.seeds: list[int] = []

    def conversation_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        self.asked.append([dict(message) for message in messages])
        return [1]

    def answer(self, _ids: Sequence[int], sampling: SamplingOptions, on_text: Any) -> Answer:
        self.seeds.append(sampling.seed)
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            on_text(piece)
        return Answer("".join(map(str, self.pieces)), len(self.pieces), self.finish_reason)


class Talk:
    def __init__(self, session: Parrot, system: str | None = None) -> None:
        self.session = session
        self.written: list[str] = []
        self.reported: list[str] = []
        self.conversation = Conversation(
            session, SAMPLING, system=system, write=self.written.append, tell=self.reported.append  # type: ignore[arg-type]
        )  # fmt: skip

    def take(self, *lines: str) -> bool:
        return [self.conversation.take(line) for line in lines][-1]

    @property
    def said(self) -> list[tuple[str, str]]:
        return [(message["role"], message["content"]) for message in self.conversation.voices[0].messages]


def test_turns_follow_one_another() -> None:
    talk = Talk(Parrot())
    assert talk.take("hi", "", "  ", "again")
    assert talk.written == ["al", "so", "\n", "al", "so", "\n"]
    assert talk.session.asked[1] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "also"},
        {"role": "user", "content": "again"},
    ]
    assert talk.session.seeds == [7, 8]
    assert talk.reported == []


def test_the_system_message_comes_first_and_can_be_changed() -> None:
    talk = Talk(Parrot(), system="be brief")
    talk.take("hi", "/system", "/system  be kind ", "/system", "hi")
    assert talk.said == [("system", "be kind"), ("user", "hi"), ("assistant", "also")]
    assert talk.reported[0] == "system message: be brief"
    assert talk.reported[2] == "system message: be kind"
    plain = Talk(Parrot())
    plain.take("/system")
    assert plain.reported == ["there is no system message of yours"]


def test_reset_keeps_the_system_message_only() -> None:
    talk = Talk(Parrot(), system="be brief")
    talk.take("hi", "/reset")
    assert talk.said == [("system", "be brief")]


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye", " /exit "])
def test_leaving(word: str) -> None:
    assert not Talk(Parrot()).take(word)


def test_unknown_commands_are_not_said_and_slashes_can_be() -> None:
    talk = Talk(Parrot())
    talk.take("/help", "/restart now", "//home/me is a path")
    assert "/reset" in talk.reported[0]
    assert "there is no /restart; to say it, type //restart now" in talk.reported[1]
    assert talk.said[0] == ("user", "/home/me is a path")


def test_an_interrupted_answer_stays_as_far_as_it_got() -> None:
    talk = Talk(Parrot(["al", KeyboardInterrupt()]))
    assert talk.take("hi")
    assert talk.said == [("user", "hi"), ("assistant", "al")]
    assert talk.reported == ["stopped"]
    at_once = Talk(Parrot([KeyboardInterrupt()]))
    assert at_once.take("hi")
    assert at_once.said == []


def test_an_error_takes_the_question_back() -> None:
    talk = Talk(Parrot([DataError("the prompt has 9 tokens", next_step="shorten it")]))
    assert talk.take("hi")
    assert talk.said == []
    assert "the prompt has 9 tokens" in talk.reported[0]
    assert "/reset" in talk.reported[0]


def test_a_cut_off_answer_says_so() -> None:
    talk = Talk(Parrot(finish_reason="length"))
    talk.take("hi")
    assert talk.reported == ["cut off after 2 tokens"]


def test_two_voices_answer_each_turn_from_what_each_said_itself() -> None:
    session, started, written = Parrot(["al", "so"]), [], []

    def begin(name: str, piece: str) -> None:
        started.append(name)
        session.pieces = [piece]

    voices = [Voice("base model", lambda: begin("base", "no")), Voice("with a", lambda: begin("adapted", "yes"))]
    conversation = Conversation(session, SAMPLING, voices=voices, write=written.append, tell=print)  # type: ignore[arg-type]
    conversation.take("hi")
    conversation.take("again")
    assert "".join(written) == "base model:\nno\nwith a:\nyes\n" * 2
    assert started == ["base", "adapted"] * 2
    assert session.seeds == [7, 7, 8, 8]
    replies = [[message["content"] for message in asked if message["role"] == "assistant"] for asked in session.asked]
    assert replies == [[], [], ["no"], ["yes"]]


def test_one_answer_that_fails_leaves_the_other_conversation_alone() -> None:
    session, reported = Parrot(), []
    pieces = iter([[DataError("too long")], ["fine"]])
    voices = [Voice(name, lambda: setattr(session, "pieces", next(pieces))) for name in ("a", "b")]
    conversation = Conversation(session, SAMPLING, voices=voices, write=lambda _: None, tell=reported.append)  # type: ignore[arg-type]
    conversation.take("hi")
    assert [len(voice.messages) for voice in conversation.voices] == [0, 2]
    assert len(reported) == 1


@pytest.fixture
def base(model_directory: Path) -> list[str]:
    return ["chat", "--model", str(model_directory), "--dtype", "float32", "--max-new-tokens", "6", "--greedy"]


def test_a_conversation_piped_in(
    base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("name a list\nanother\n/reset\nname a list\n"))
    assert main(base) == 0
    out, err = capsys.readouterr()
    assert ">>>" not in out + err
    assert "the conversation is forgotten" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("name a list\n/exit\nnever said\n"))
    assert main(base) == 0
    once = capsys.readouterr().out
    assert out.startswith(once)
    assert out.endswith(once)
    assert len(out) > 2 * len(once)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_message_that_is_not_utf8(
    errors: str, base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))
    assert main(base) == 3
    assert "standard input: the message is not UTF-8" in capsys.readouterr().err


def test_the_first_message_may_be_an_option(
    base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a message whatever it begins with, and what is typed goes on from its answer."""
    monkeypatch.setattr("sys.stdin", io.StringIO("//help\nanother\n"))
    assert main(base) == 0
    typed = capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("another\n"))
    assert main([*base, "--prompt", "/help"]) == 0
    given = capsys.readouterr()
    assert given.out == typed.out and "/reset" not in given.err
    assert main([*base, "--prompt", " "]) == 2
    assert "--prompt: the first message is empty" in capsys.readouterr().err


def test_compared_answers_are_those_of_two_conversations(
    base: list[str],
    adapter_directory: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def said(*options: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("name a list\n"))
        assert main([*base, *options]) == 0
        return capsys.readouterr().out.splitlines(keepends=True)

    alone, adapted = said(), said("--adapter", str(adapter_directory))
    assert alone != adapted
    both = said("--adapter", str(adapter_directory), "--compare")
    assert both == ["base model:\n", *alone, f"with {adapter_directory}:\n", *adapted]
    assert main([*base, "--compare"]) == 2
    assert "give --adapter" in capsys.readouterr().err


def test_a_model_without_a_template_cannot_talk(
    base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert main([*base, "--chat-template", "none"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_a_bad_option_is_named(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*base, "--top-k", "0"]) == 2
    assert "--top-k" in capsys.readouterr().err
