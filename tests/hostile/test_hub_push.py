"""`export --push` against a hub that refuses, fails, drops the connection, answers nonsense or does not answer."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from backhand.cli.main import main
from tests.hostile.conftest import World
from tests.support.tiny_hub import Answer, Request, lead_to, tiny_hub

Push = Callable[..., int]


@pytest.fixture
def push(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Push:
    """Export the adapter and upload it."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)  # between its attempts

    def command(*more: str, to: str = "peft", output: str = "out", repository: str = "me/it") -> int:
        words = ["export", "--model", str(world.model), "--adapter", str(world.adapter), "--to", to]
        return main([*words, "--output", str(tmp_path / output), "--push", repository, *more])

    return command


def failing(code: int, **headers: str) -> Answer:
    return lambda request: request.reply(code, {"error": "no \x1b[31mred"}, **headers)


@pytest.mark.parametrize(
    ("to", "output", "names"),
    [
        ("peft", "my adapter", {"README.md", "adapter_config.json", "adapter_model.safetensors", "backhand.json"}),
        ("gguf", "a.gguf", {"a.gguf"}),
        ("mlx", "mlx", {"adapter_config.json", "adapters.safetensors"}),
        ("ollama", "ollama", {"Modelfile", "adapter.gguf"}),
    ],
)
def test_all_files_arrive_and_their_address_is_printed(
    to: str, output: str, names: set[str], push: Push, capsys: pytest.CaptureFixture[str]
) -> None:
    with tiny_hub() as hub:
        assert push(to=to, output=output) == 0
        assert hub.stages[0] == "create" and set(hub.uploaded) == names
    assert f"uploaded: {hub.address}/me/it" in capsys.readouterr().out


REFUSED = "hf auth login, then: hf upload me/it"
UNREACHABLE = "once the hub can be reached: hf upload me/it"
FAILURES: dict[str, tuple[str, Answer, str, str]] = {
    "bad request": ("create", failing(400), "Bad request", UNREACHABLE),
    "not signed in": ("preupload", failing(401), "401", REFUSED),
    "no permission": ("commit", failing(403), "403", REFUSED),
    "repository gone": ("preupload", failing(404), "404", UNREACHABLE),
    "conflict": ("create", failing(409), "does not answer as a hub does", UNREACHABLE),
    "conflict of commits": ("commit", failing(409), "409", UNREACHABLE),
    "another head": ("commit", failing(412), "412", UNREACHABLE),
    "too large": ("commit", failing(413), "413", UNREACHABLE),
    "too many requests": ("preupload", failing(429, Retry_After="3600"), "429", UNREACHABLE),
    "server error": ("create", failing(500), "500", UNREACHABLE),
    "server error in the commit": ("commit", failing(502), "502", UNREACHABLE),
    "unavailable": ("preupload", failing(503), "503", UNREACHABLE),
    "dropped at once": ("create", Request.drop, "reset", UNREACHABLE),
    "dropped before the files": ("preupload", Request.drop, "reset", UNREACHABLE),
    "dropped in the commit": ("commit", Request.drop, "reset", UNREACHABLE),
    "a login page": ("create", lambda it: it.reply(200, b"<html>"), "does not answer as a hub does", UNREACHABLE),
    "a list": ("preupload", lambda it: it.reply(200, []), "does not answer as a hub does", UNREACHABLE),
    "nothing": ("commit", lambda it: it.reply(200, {}), "does not answer as a hub does", UNREACHABLE),
    "an endless redirect": ("create", lambda it: it.reply(307, b"", Location=it.path), "redirects", UNREACHABLE),
    "escapes": ("create", failing(400, X_Error_Message="\x1b[31mred"), "\\x1b[31mred", UNREACHABLE),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failed_upload_keeps_the_files_and_says_what_to_type(
    kind: str, push: Push, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, failure, why, next_step = FAILURES[kind]
    with tiny_hub({stage: failure}) as hub:
        assert push() == 5
    output, errors = capsys.readouterr()
    assert stage == hub.stages[-1] and not hub.uploaded
    assert f"{tmp_path / 'out'} is written, and could not be uploaded to me/it" in errors
    assert why in errors and f"next: {next_step} {tmp_path / 'out'}" in errors
    assert "uploaded:" not in output and "\x1b" not in errors and "hf_secret" not in output + errors
    json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_repository_that_exists_and_a_token_without_the_right_to_create(push: Push) -> None:
    """The hub refuses the creation; the upload succeeds."""
    with tiny_hub({"create": failing(403)}) as hub:
        assert push() == 0 and "adapter_config.json" in hub.uploaded


def test_a_hub_that_does_not_answer(
    push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("backhand.interop.command._ANSWER_S", 0.2)
    with tiny_hub({"create": lambda _request: time.sleep(1.0)}):
        assert push() == 5
    assert "timed out" in capsys.readouterr().err and (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("address", ["closed", "name", "no address", "offline"])
def test_no_hub_there(
    address: str, push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    there = {"closed": f"http://127.0.0.1:{port}", "name": "http://hub.invalid", "no address": "http://"}
    lead_to(monkeypatch, there.get(address, "http://127.0.0.1:9"), offline=address == "offline")
    assert push() == 5
    errors = capsys.readouterr().err
    assert f"{UNREACHABLE} {tmp_path / 'out'}" in errors and "why: " in errors
    assert address != "offline" or "HF_HUB_OFFLINE" in errors
    assert (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    "name", ["me", "me/it/too", "me/-it", "me/it.git", "me/a--b", "mé/it", "../it", "", f"me/{'i' * 97}"]
)
def test_names_of_repositories_that_none_can_have(name: str, push: Push, tmp_path: Path) -> None:
    """They are refused before anything is written or sent."""
    with tiny_hub() as hub:
        assert push(repository=name) == 2
        assert not hub.stages and not list(tmp_path.iterdir())


def test_nothing_is_uploaded_of_an_export_that_fails(push: Push, tmp_path: Path) -> None:
    with tiny_hub() as hub:
        assert push("--merge", to="gguf", output="m.gguf") in (0, 2, 4, 6)
        (tmp_path / "out").mkdir()
        assert push() == 2
        assert hub.stages.count("create") <= 1


def test_ctrl_c_during_an_upload_keeps_the_files(
    push: Push, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with tiny_hub():
        monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", interrupt)
        assert push() == 130
    assert f"written: {tmp_path / 'out'}" in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / "out" / "adapter_config.json").exists()
