"""`backhand generate` and `backhand chat`."""

from __future__ import annotations

from backhand.cli.command import command
from backhand.cli.train import DATA_PARSERS
from backhand.generate.options import ChatOptions, GenerateOptions


def _generate(options: GenerateOptions) -> None:
    from backhand.generate.command import generate_command

    generate_command(options)


def _chat(options: ChatOptions) -> None:
    from backhand.generate.chat import chat_command

    chat_command(options)


generate = command(GenerateOptions, _generate, parse=DATA_PARSERS)
chat = command(ChatOptions, _chat, parse=DATA_PARSERS)
