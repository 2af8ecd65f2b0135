"""Answers under a template that ends no turn stop where the next role begins, as they were trained to."""

from __future__ import annotations

from pathlib import Path

import pytest

from backhand.cli.main import main
from backhand.data.options import TemplateOptions
from backhand.generation.loading import loaded_model
from backhand.nn.model_options import BaseModelOptions
from tests.support.tiny_tokenizer import CHAT_TEMPLATE, TURN_START, tiny_tokenizer

_ENDLESS = CHAT_TEMPLATE.replace("+ '<|im_end|>' + '\n'", "")


def test_the_next_roles_token_ends_an_answer(model_directory: Path) -> None:
    options = BaseModelOptions(model=str(model_directory), dtype="float32")
    next_role = tiny_tokenizer().convert_tokens_to_ids(TURN_START)
    with loaded_model(options, template=TemplateOptions(chat_template=_ENDLESS)) as loaded:
        assert next_role in loaded.stop_ids
    for template in (None, CHAT_TEMPLATE, "none"):
        with loaded_model(options, template=TemplateOptions(chat_template=template)) as loaded:
            assert next_role not in loaded.stop_ids


def test_a_template_that_is_not_valid_is_the_options_fault(
    model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--model", str(model_directory), "--prompt", "hi", "--chat-template", "{% for %}"]
    assert main(words) == 2
    assert "--chat-template: the chat template is not valid Jinja" in capsys.readouterr().err
