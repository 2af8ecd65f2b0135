"""The local page: who is answered, what changes, what the box says before and after it loads the model."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backhand.cli.main import main
from backhand.errors import UsageError
from backhand.report import prompt_box
from backhand.report.options import WatchOptions
from backhand.report.watch import LONGEST_QUESTION_BYTES, WatchServer, serving
from support.page import Page
from support.tiny_run import TinyRun


@pytest.fixture
def server(finished: Path) -> Iterator[WatchServer]:
    with serving(WatchOptions(run=finished, max_new_tokens=6)) as server:
        yield server


def ask(
    server: WatchServer, path: str, *, method: str = "GET", body: str | bytes | None = None, **headers: str
) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    sent = {"Host": f"127.0.0.1:{server.server_port}"} | {name.replace("_", "-"): v for name, v in headers.items()}
    data = body.encode() if isinstance(body, str) else body
    if data is not None:
        sent = {"Content-Type": "application/json", "Content-Length": str(len(data))} | sent
    for name, value in sent.items():
        if value:
            connection.putheader(name, value)
    connection.endheaders(data)
    reply = connection.getresponse()
    result = reply.status, reply.read().decode(), dict(reply.getheaders())
    connection.close()
    return result


def prompt(server: WatchServer, text: Any, **headers: str) -> tuple[int, str, dict[str, str]]:
    return ask(server, f"/{server.token}/answer", method="POST", body=json.dumps({"prompt": text}), **headers)


def test_the_page_is_the_report_with_a_box(server: WatchServer) -> None:
    status, text, headers = ask(server, f"/{server.token}/")
    page = Page(text.encode())
    assert status == 200 and "loss" in page.charts and page.one("section", id="try")
    policy = next(m for m in page.every("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy")
    assert len(page.scripts) == 3 and "connect-src 'self'" in (policy.attributes["content"] or "")
    assert headers["Cache-Control"] == "no-store" and headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer" and "Access-Control-Allow-Origin" not in headers


def test_it_listens_on_this_machine_only_under_a_token_of_its_own(server: WatchServer, finished: Path) -> None:
    assert server.server_address[0] == "127.0.0.1" and server.server_port > 0
    assert len(server.token) >= 20
    with serving(WatchOptions(run=finished)) as other:
        assert other.token != server.token and other.server_port != server.server_port


@pytest.mark.parametrize("path", ["/", "/x/", "//", "/{token}x/", "/?{token}", "/x/../{token}/", "/ü/"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_the_token_nothing_is_revealed(server: WatchServer, path: str, method: str) -> None:
    expected = path.format(token=server.token).encode().decode("latin-1")
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection._encode_request = lambda request: request.encode("latin-1")  # type: ignore[attr-defined,method-assign]
    connection.request(method, expected.replace("ü", "%C3%BC"), body=b"{}" if method == "POST" else None)
    reply = connection.getresponse()
    text = reply.read().decode()
    assert reply.status == 403 and "backhand watch" in text and len(text) < 200
    connection.close()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "", "[::1]:{port}"]
)
def test_another_host_name_is_refused(server: WatchServer, host: str) -> None:
    status, text, _ = ask(server, f"/{server.token}/", Host=host.format(port=server.server_port))
    assert status == 403 and "own name" in text
    assert ask(server, f"/{server.token}/", Host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Content_Type": "text/plain"},
    ],
)
def test_a_question_from_another_page_is_refused(server: WatchServer, headers: dict[str, str]) -> None:
    status, text, _ = prompt(server, "hello", **headers)
    assert status == 403 and "another page" in text


def test_what_is_no_question_is_refused(server: WatchServer) -> None:
    place = f"/{server.token}/answer"
    for body in ("", "[]", "{}", '{"prompt": 1}', "{", "[" * 50_000):
        assert ask(server, place, method="POST", body=body)[0] == 400
    assert ask(server, place, method="POST", body="x" * (LONGEST_QUESTION_BYTES + 1))[0] == 413
    assert ask(server, place, method="POST", body="{}", Content_Length="-1")[0] == 413
    assert ask(server, f"/{server.token}/elsewhere")[0] == 404
    assert ask(server, f"/{server.token}/state", method="POST", body="{}")[0] == 404
    assert ask(server, f"/{server.token}/", method="PUT")[0] == 501


def test_base_and_adapter_answer_and_nothing_is_loaded_before(
    server: WatchServer, tiny: TinyRun, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    real = prompt_box.loaded_model

    def counted(*arguments: Any, **options: Any) -> Any:
        loads.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(prompt_box, "loaded_model", counted)
    server.box._needed.result()
    said = json.loads(ask(server, f"/{server.token}/state")[1])["box"]
    assert said["ready"] and "loaded when you first ask: about" in said["text"] and not loads
    status, text, _ = prompt(server, "the user asks")
    answer = json.loads(text)
    assert status == 200 and answer["step"] == 12
    assert (answer["base"], answer["adapted"]) == expected_answers(tiny, finished)
    assert answer["base"] != answer["adapted"]
    again = json.loads(prompt(server, "the user asks")[1])
    assert again | {"seconds": 0} == answer | {"seconds": 0} and len(loads) == 1
    said = json.loads(ask(server, f"/{server.token}/state")[1])["box"]
    assert said["text"] == "The model is loaded, with the adapter of step 12."


def expected_answers(tiny: TinyRun, finished: Path) -> tuple[str, str]:
    """What `generate --greedy` says."""
    from backhand.generation.loading import loaded_model
    from backhand.generation.options import SamplingOptions
    from backhand.generation.session import GenerationSession
    from backhand.nn.model_options import BaseModelOptions

    options = BaseModelOptions(model=str(tiny.model), dtype="float32", threads=1)
    with loaded_model(options, finished / "checkpoints" / "step-12") as loaded:
        session = GenerationSession(loaded)
        texts = []
        for adapter in (False, True):
            loaded.model.use_adapter(adapter)
            sampling = SamplingOptions(greedy=True, max_new_tokens=6)
            texts.append(session.answer(session.prompt_ids("the user asks"), sampling).text)
    return texts[0], texts[1]


def test_a_newer_checkpoint_answers_from_then_on(server: WatchServer, finished: Path) -> None:
    older = finished.parent / "newest"
    shutil.move(finished / "checkpoints" / "step-12", older)
    first = json.loads(prompt(server, "the user asks")[1])
    assert first["step"] < 12
    shutil.move(older, finished / "checkpoints" / "step-12")
    second = json.loads(prompt(server, "the user asks")[1])
    assert second["step"] == 12 and second["base"] == first["base"]


def test_before_the_first_checkpoint_the_box_says_so(server: WatchServer, finished: Path) -> None:
    shutil.rmtree(finished / "checkpoints")
    said = json.loads(ask(server, f"/{server.token}/state")[1])["box"]
    assert not said["ready"] and said["text"].startswith("There is no checkpoint yet")
    assert Page(ask(server, f"/{server.token}/")[1].encode()).one("button", id="try-ask").attributes.keys() >= {
        "disabled"
    }
    status, text, _ = prompt(server, "hello")
    assert status == 409 and "no checkpoint yet" in json.loads(text)["error"]


def test_a_model_that_does_not_fit_is_refused_and_not_loaded(
    server: WatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_box, "available_bytes", lambda: 1000)
    monkeypatch.setattr(prompt_box, "loaded_model", lambda *_, **__: pytest.fail("it was loaded"))
    status, text, _ = prompt(server, "hello")
    assert status == 409 and "are free" in json.loads(text)["error"]


def test_an_empty_prompt_is_an_error_of_its_own(server: WatchServer) -> None:
    assert json.loads(prompt(server, "  ")[1])["error"].startswith("the prompt is empty")


def test_the_page_follows_the_run(server: WatchServer, finished: Path) -> None:
    def version() -> str:
        return str(json.loads(ask(server, f"/{server.token}/state")[1])["version"])

    before = version()
    assert version() == before
    line = {"step": 13, "loss": 0.25, "learning_rate": 1e-4, "tokens_per_s": 1.0}
    with (finished / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n" + '{"step": 14, "lo')  # half a line is being written
    assert version() != before
    values = Page(ask(server, f"/{server.token}/")[1].encode()).charts["loss"]["data"]["values"]
    assert {"step": 13, "value": 0.25, "series": "training rows"} in values
    (finished / "config.toml").unlink()  # as in the moment in which a run is replaced
    assert ask(server, f"/{server.token}/")[0] == 200


def test_a_killed_run_is_shown_as_such(server: WatchServer, finished: Path) -> None:
    status = json.loads((finished / "status.json").read_text())
    (finished / "status.json").write_text(json.dumps(status | {"state": "running", "process": os.getpid()}))
    text = Page(ask(server, f"/{server.token}/")[1].encode()).one("p", class_="state").text
    assert text.startswith("Running: process")
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    (finished / "status.json").write_text(json.dumps(status | {"state": "running", "process": int(done.stdout)}))
    text = Page(ask(server, f"/{server.token}/")[1].encode()).one("p", class_="state bad").text
    assert text.startswith("Killed: process") and "--resume" in text


def test_poison_in_the_box_stays_text(server: WatchServer, finished: Path) -> None:
    config = (finished / "config.toml").read_text()
    (finished / "config.toml").write_text(config.replace("[data]", '[data]\nsystem = "</pre><img src=x>"', 1))
    page = Page(ask(server, f"/{server.token}/")[1].encode())
    assert not page.every("img")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["watch", "absent"], "no run in absent"),
        (["watch", "run", "--port", "70000"], "above 65535"),
        (["watch", "run", "--threads", "0"], "at least 1"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished.parent)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(server: WatchServer, finished: Path) -> None:
    with (
        pytest.raises(UsageError, match=f"port {server.server_port} cannot be used"),
        serving(WatchOptions(run=finished, port=server.server_port)),
    ):
        pass


def test_an_answer_that_is_being_given_holds_up_no_end(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = threading.Event()

    def endless(*_: Any, on_text: Any = lambda _: None, **__: Any) -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            on_text("and ")
            given.set()
            time.sleep(0.01)

    monkeypatch.setattr(prompt_box.GenerationSession, "answer", endless)
    box = prompt_box.PromptBox(finished, threads=1, max_new_tokens=8)
    refused: list[BaseException] = []

    def asked() -> None:
        try:
            box.answer("name a list")
        except UsageError as error:
            refused.append(error)

    asking = threading.Thread(target=asked)
    asking.start()
    assert given.wait(20)
    began = time.monotonic()
    box.close()
    asking.join()
    assert time.monotonic() - began < 10
    assert "has ended" in str(refused[0])


def test_the_end_waits_for_the_loading_that_is_under_way_and_no_more(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[prompt_box.PromptBox] = []
    started, go_on = threading.Event(), threading.Event()

    def loaded(box: prompt_box.PromptBox) -> Any:
        loads.append(box)
        started.set()
        assert go_on.wait(20)

    monkeypatch.setattr(prompt_box.PromptBox, "_with_newest_adapter", loaded)
    monkeypatch.setattr(prompt_box, "GenerationSession", lambda *_: pytest.fail("it has been ended"))
    box = prompt_box.PromptBox(finished, threads=1, max_new_tokens=8)
    refused: list[BaseException] = []

    def asked() -> None:
        try:
            box.answer("name a list")
        except BaseException as error:  # noqa: BLE001 - looked at below
            refused.append(error)

    asking = [threading.Thread(target=asked) for _ in range(3)]
    for thread in asking:
        thread.start()
    assert started.wait(20)
    while box._worker._work_queue.qsize() < 2:
        time.sleep(0.01)
    closing = threading.Thread(target=box.close)
    closing.start()
    assert box._closing.wait(20)
    go_on.set()
    for thread in (closing, *asking):
        thread.join()
    asked()
    assert len(loads) == 1
    assert [str(error) for error in refused] == ["`backhand watch` has ended"] * 4


def test_ctrl_c_ends_it_well(finished: Path) -> None:
    code = "import sys; from backhand.cli.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "watch", str(finished)], stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline()
        assert "http://127.0.0.1:" in address
        process.send_signal(2)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.communicate()


def raw(server: WatchServer, data: bytes) -> bytes:
    """What the server says to these bytes, up to where it closes the connection."""
    import socket

    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        said = b""
        while more := connection.recv(65536):
            said += more
    return said


def question(server: WatchServer, *lengths: bytes, body: bytes = b"{}", more: bytes = b"") -> bytes:
    head = f"POST /{server.token}/answer HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n".encode()
    head += b"Content-Type: application/json\r\n" + more
    return head + b"".join(b"Content-Length: " + length + b"\r\n" for length in lengths) + b"\r\n" + body


def test_half_of_a_surrogate_pair_is_no_prompt(server: WatchServer) -> None:
    for body in ('{"prompt": "\\ud800"}', '{"prompt": "a\\udfffb"}'):
        status, text, _ = ask(server, f"/{server.token}/answer", method="POST", body=body)
        assert status == 400 and "no prompt" in text


def test_lengths_that_are_none_are_answered(server: WatchServer) -> None:
    assert raw(server, question(server, b"9" * 5000)).startswith(b"HTTP/1.1 413")
    assert raw(server, question(server, b"9" * 60_000)).startswith(b"HTTP/1.1 413")
    assert raw(server, question(server, b"2", b"3")).startswith(b"HTTP/1.1 400")
    assert raw(server, question(server, b"2", b"2")).startswith(b"HTTP/1.1 400")
    assert raw(server, question(server)).startswith(b"HTTP/1.1 400")
    chunked = question(server, b"2", more=b"Transfer-Encoding: chunked\r\n")
    assert raw(server, chunked).startswith(b"HTTP/1.1 400")


def test_a_hundred_at_once_after_two_hundred_that_say_nothing(server: WatchServer) -> None:
    import socket
    from concurrent.futures import ThreadPoolExecutor
    from contextlib import ExitStack

    with ExitStack() as held, ThreadPoolExecutor(100) as pool:
        for number in range(200):
            waiting = held.enter_context(socket.create_connection(("127.0.0.1", server.server_port), timeout=60))
            waiting.sendall(b"GET / HT"[: number % 9])
        answers = list(pool.map(lambda _: ask(server, f"/{server.token}/state")[0], range(100)))
    assert answers == [200] * 100
