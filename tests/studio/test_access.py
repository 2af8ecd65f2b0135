"""Who is answered: attacks by other pages, other names, other users and other programs on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import subprocess
import sys
import time
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from backhand.errors import UsageError
from backhand.studio import access, command, server
from backhand.studio.command import serving
from backhand.studio.options import LOOPBACK, StudioOptions
from backhand.studio.workspace import Workspace
from tests.support.studio_client import Client, until

PLACES = ("", "new", "new/rows", "runs/one", "runs/one/report", "static/studio.js", "part/models", "upload")


def test_the_token_is_exchanged_for_a_strict_cookie_that_scripts_cannot_read(client: Client) -> None:
    address = client.address
    _, text, headers = Client(address).ask(f"{address.root}/?token={address.token}")
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and f"Path={address.root}/" in cookie
    assert address.token not in cookie and address.token not in text and address.token not in address.root
    assert headers["refresh"] == f"0;url={address.root}/"
    assert client.get("")[0] == 200


def test_the_token_leaves_the_address_bar_also_if_the_browser_has_the_cookie(client: Client) -> None:
    for place in ("", "new/rows"):
        status, text, headers = client.get(f"{place}?token={client.address.token}")
        assert status == 200 and headers["refresh"] == f"0;url={client.address.root}/"
        assert "Continue to Backhand" in text and client.address.token not in text


@pytest.mark.parametrize("place", PLACES)
def test_without_the_cookie_nothing_is_answered(client: Client, place: str) -> None:
    stranger = Client(client.address)
    for cookie in ("", client.cookie[:-1], client.cookie.replace("backhand", "other")):
        stranger.cookie = cookie
        status, text, headers = stranger.get(place)
        assert status == 403 and "token" in text and "set-cookie" not in headers
        assert stranger.post(place, name="x")[0] == 403
    assert stranger.get(f"{place}?token={client.address.token[:-1]}")[0] == 403
    assert stranger.ask(f"/{place}?token={client.address.token}")[0] == 403  # without the path


def test_the_cookie_of_another_studio_is_refused(client: Client, tmp_path: Path) -> None:
    with serving(Workspace(tmp_path / "other"), host=LOOPBACK, port=0) as address:
        other = Client(address).enter()
        assert other.get("")[0] == 200
        value = other.cookie.partition("=")[2]
        other.address, other.cookie = client.address, f"backhand-{client.address.port}={value}"
        assert other.get("")[0] == 403 and other.post("start", name="x")[0] == 403


def test_the_token_does_not_allow_a_change_by_itself(client: Client) -> None:
    stranger = Client(client.address)
    assert stranger.post(f"start?token={client.address.token}", name="x")[0] == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "", "[::1]:{port}"]
)
def test_another_host_name_is_refused(client: Client, host: str) -> None:
    status, text, _ = client.get("", Host=host.format(port=client.address.port))
    assert status in (400, 403) and "Runs" not in text
    assert client.get("", Host=f"localhost:{client.address.port}")[0] == 200


def test_names_are_compared_as_browsers_send_them(space: Workspace) -> None:
    app = access.Access(PlainTextResponse("yes"), token="x", host="Box.local", port=80)

    def status(**headers: str) -> int:
        cookie = f"backhand-80={access._derived('x', 'session')}"
        sent = [(b"cookie", cookie.encode()), *((name.encode(), value.encode()) for name, value in headers.items())]
        scope = {"type": "http", "method": "POST", "path": f"{app.root}/", "query_string": b"", "headers": sent}
        answered: list[dict[str, int]] = []

        async def receive() -> dict[str, str]:
            return {"type": "http.request"}

        async def send(message: dict[str, int]) -> None:
            answered.append(message)

        asyncio.run(app(scope, receive, send))
        return answered[0]["status"]

    for host in ("box.local", "BOX.local", "box.local:80", "[::1]", "[::1]:80"):
        assert status(host=host, origin=f"http://{host.lower()}") == 200
    for host in ("box.local:81", "evil.example", "[evil.example]"):
        assert status(host=host, origin=f"http://{host}") == 403


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.2", False), ("localhost", False), ("0.0.0.0", True)])
def test_the_warning_concerns_addresses_that_other_machines_reach(
    space: Workspace, host: str, warns: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_wait", lambda: None)
    command.studio_command(StudioOptions(directory=space.root, host=host, browser=False))
    assert ("not encrypted" in capsys.readouterr().err) == warns


def test_a_server_of_the_network_answers_to_numbers_but_not_to_names_that_point_to_it(space: Workspace) -> None:
    with serving(space, host="0.0.0.0", port=0) as address:
        client = Client(address).enter()
        assert client.get("", Host=f"192.168.1.7:{address.port}")[0] == 200
        assert client.get("", Host=f"evil.example:{address.port}")[0] == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_a_change_that_another_page_asks_for_is_refused(client: Client, headers: dict[str, str]) -> None:
    sent = {"Origin": client.origin, "Content_Type": "application/x-www-form-urlencoded"} | headers
    places = ("start", "upload?name=x.csv", "delete-rows", "new/learn")
    for place in (*places, *(f"runs/one/{name}" for name in ("stop", "delete", "rename", "resume", "try", "export"))):
        path = f"{client.address.root}/{place}"
        status, text, answered = client.ask(path, method="POST", body=b"name=x", **sent)
        assert status == 403 and "another page" in text
        assert not [name for name in answered if name.startswith("access-control")]


def test_only_get_and_post_are_answered(client: Client) -> None:
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
        assert client.ask(f"{client.address.root}/", method=method, Origin=client.origin)[0] == 405


def test_every_answer_has_a_policy_without_inline_scripts(client: Client) -> None:
    for place in ("", "new", "nowhere", "runs/none"):
        _, text, headers = client.get(place)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff" and "no-store" in headers["cache-control"]
        assert not [name for name in headers if name.startswith("access-control")]
        assert " onclick" not in text and "https://" not in text and "javascript:" not in text


def test_forms_that_are_too_long_or_stop_are_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.post("start", name="x" * access.MAX_FORM_BYTES)[0] == 413
    monkeypatch.setattr(access, "BODY_WAIT_S", 0.2)
    head = f"POST {client.address.root}/start HTTP/1.1\r\nHost: 127.0.0.1:{client.address.port}\r\n"
    head += f"Cookie: {client.cookie}\r\nOrigin: {client.origin}\r\nContent-Length: 100\r\n"
    head += "Content-Type: application/x-www-form-urlencoded\r\n\r\nname="
    assert raw(client, head.encode()).startswith(b"HTTP/1.1 408")


def raw(client: Client, data: bytes) -> bytes:
    """Send bytes, and return the answer up to the end of the connection."""
    with socket.create_connection((LOOPBACK, client.address.port), timeout=60) as connection:
        connection.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while more := connection.recv(65536):
                answer += more
    return answer


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "x", "2\r\nContent-Length: 3"])
def test_impossible_lengths_are_refused(client: Client, length: str) -> None:
    head = f"POST {client.address.root}/start HTTP/1.1\r\nHost: 127.0.0.1:{client.address.port}\r\n"
    assert raw(client, f"{head}Content-Length: {length}\r\n\r\n{{}}".encode()).startswith(b"HTTP/1.1 4")


def test_512_silent_connections_hold_up_nobody(client: Client) -> None:
    with contextlib.ExitStack() as held:
        for number in range(512):
            waiting = socket.create_connection((LOOPBACK, client.address.port), timeout=60)
            held.enter_context(waiting)
            with contextlib.suppress(ConnectionError):
                waiting.sendall(b"GET / HT"[: number % 9])
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(lambda _: client.get("static/studio.css")[0], range(32))) == [200] * 32


def test_a_connection_that_sends_no_request_is_closed(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_WAIT_S", 0.1)
    began = time.monotonic()
    assert raw(client, b"GET / HTTP/1.1\r\n") == b""
    assert time.monotonic() - began < 20


def test_other_users_read_neither_directory_nor_token(space: Workspace, client: Client) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (space.root, *space.root.iterdir())}
    assert modes.pop("studio.json") == modes.pop("server.lock") == 0o600 and set(modes.values()) == {0o700}
    assert Workspace(space.root).token == space.token  # an open tab survives a new start


def test_the_browser_is_sent_to_the_address_by_a_file_that_others_cannot_read(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(command, "_has_screen", lambda: True)
    monkeypatch.setattr(command, "_wait", lambda: until(lambda: bool(opened)))
    command.studio_command(StudioOptions(directory=space.root))
    assert opened == [(space.root / "open.html").as_uri()]
    text = (space.root / "open.html").read_text()
    assert stat.S_IMODE((space.root / "open.html").stat().st_mode) == 0o600
    assert f"/?token={Workspace(space.root).token}" in text and 'http-equiv="refresh"' in text


def test_without_its_settings_the_directory_has_another_token(space: Workspace) -> None:
    with space.locked():
        space.opener("http://127.0.0.1:1/")
    (space.root / "studio.json").unlink()
    (space.root / ".tmp-studio.json-1").touch()  # the start was killed
    assert Workspace(space.root).token != space.token


def test_a_directory_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(UsageError, match="contains other files"):
        Workspace(tmp_path / "mine")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UsageError, match="may write to it"):
        Workspace(tmp_path / "open")
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) != 0o700


def test_a_port_that_is_taken_is_named(client: Client, tmp_path: Path) -> None:
    port, space = client.address.port, Workspace(tmp_path / "other")
    with pytest.raises(UsageError, match=f"port {port} of"), serving(tmp_path, host=LOOPBACK, port=port):
        pass
    space.port = port  # that of the last time: another one is taken
    with serving(space, host=LOOPBACK, port=port) as address:
        assert address.port != port


def test_the_command_prints_its_address_first_warns_of_other_hosts_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    words = ["studio", "--directory", str(tmp_path / "studio"), "--no-browser", "--host", "0.0.0.0"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-m", "backhand", *words],
        stdout=pipe,
        stderr=pipe,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        assert "http://0.0.0.0:" in first and "?token=" in first
        assert "not encrypted" in process.stderr.readline()
        memory = Path(f"/proc/{process.pid}/status")
        if memory.exists():
            line = next(line for line in memory.read_text().splitlines() if line.startswith("VmRSS:"))
            assert int(line.split()[1]) < 70 * 1024  # no torch
            place, _, token = first.split("Studio: http://0.0.0.0:")[1].strip().partition("/?token=")
            port, _, root = place.partition("/")
            page = Client(command.Address(LOOPBACK, int(port), f"/{root}", token)).enter().get("")
            mapped = Path(f"/proc/{process.pid}/maps").read_text()
            slow = ("torch", "numpy", "pyarrow", "tokenizers", "safetensors")  # to import, or transformers imports them
            assert page[0] == 200 and not any(f"/{package}/" in mapped for package in slow)
            time.sleep(0.5)  # the connection is closed
            before = processor_s(process.pid)
            time.sleep(1.0)
            assert processor_s(process.pid) - before < 0.025  # the clock counts in steps of 0.01 s
        process.send_signal(2)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def processor_s(process: int) -> float:
    """Return the seconds of processor time of a process."""
    times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


def test_the_help_imports_no_server() -> None:
    code = (
        "import sys; from backhand.cli.main import main; main(['studio', '--help'])\n"
        "print([name for name in ('starlette', 'uvicorn', 'torch', 'backhand.studio.app') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.rstrip().endswith("[]") and "--no-browser" in done.stdout
    assert StudioOptions().host == LOOPBACK


def test_an_answer_ends_by_itself_when_the_server_stops() -> None:
    answered, ended = asyncio.Event(), []

    async def slow_to_close(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("sent")(scope, receive, send)
        answered.set()
        try:
            await asyncio.sleep(0.2)
            ended.append("by itself")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def ask_and_stop() -> None:
        listener = socket.create_server((LOOPBACK, 0))
        serving = asyncio.create_task(server.serve(slow_to_close, listener))
        _, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await answered.wait()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        writer.close()

    asyncio.run(ask_and_stop())
    assert ended == ["by itself"]
