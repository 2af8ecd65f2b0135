"""Uploads and names: bounded, under names of our own, and never outside the studio's directory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

import pytest

from backhand.errors import UsageError
from backhand.studio import access, workspace
from backhand.studio.command import Address, serving
from backhand.studio.commands import Commands, Outcome
from backhand.studio.queue import Job
from backhand.studio.runs import run_of
from backhand.studio.workspace import Workspace, checked_name
from tests.support.page import Page
from tests.support.studio_client import Client, until
from tests.support.tiny_run import TinyRun

ROWS = b"prompt,completion\na,b\n"


def files_of(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["../../evil.csv", "/etc/evil.csv", "a/b.csv", "..%2f..%2fevil.csv", "<script>.csv", "x" * 5000 + ".csv"]
)
def test_an_upload_has_a_name_of_our_own(client: Client, space: Workspace, name: str) -> None:
    status, stored, _ = client.post(f"upload?name={quote(name)}", body=ROWS)
    assert (status, stored) == (200, "rows-1.csv")
    assert (space.rows / stored).read_bytes() == ROWS
    assert files_of(space.root.parent) == {
        f"studio/{one}" for one in ("server.lock", "studio.json", "rows/rows-1.csv", "rows/rows-1.csv.name")
    }
    _, page, _ = client.get("new/rows")
    assert "rows-1.csv" in page and "<script>." not in page


def test_names_count_up_and_keep_the_suffix(client: Client, space: Workspace) -> None:
    for name in ("a.csv", "b.jsonl.gz", "c.PARQUET"):
        assert client.post(f"upload?name={name}", body=ROWS)[0] == 200
    assert set(space.uploads()) == {"rows-1.csv", "rows-2.jsonl.gz", "rows-3.parquet"}
    assert client.post("delete-rows", data="rows-2.jsonl.gz", query="")[0] == 303
    assert client.post("delete-rows", data="../studio.json", query="")[0] == 409
    assert set(space.uploads()) == {"rows-1.csv", "rows-3.parquet"}


def test_uploads_are_listed_with_their_size_and_date(client: Client, space: Workspace) -> None:
    client.post("upload?name=faq.csv", body=ROWS * 1000)
    os.utime(space.rows / "rows-1.csv", (86_400 * 365.25 * 30,) * 2)
    (choice,) = Page(client.get("new/rows")[1].encode()).every("label", class_="choice")
    assert "faq.csv" in choice.text and "22 KiB" in choice.text and "2000" in choice.text


def test_the_name_of_a_deleted_upload_is_not_used_again(client: Client, space: Workspace) -> None:
    (space.rows / "rows-mine.csv").write_bytes(ROWS)
    for number in (1, 2):
        stored = f"rows-{number}.csv"
        assert client.post("upload?name=secret.csv", body=ROWS)[1] == stored
        assert client.post("delete-rows", data=stored, query="")[0] == 303
    assert not [path for path in space.rows.iterdir() if path.is_file() and b"secret" in path.read_bytes()]


@pytest.mark.parametrize("named_by", ["words", "form", "configuration"])
def test_rows_that_a_waiting_run_needs_are_not_deleted(client: Client, space: Workspace, named_by: str) -> None:
    client.post("upload?name=x.csv", body=ROWS)
    job = Job(["train", f"--data={space.rows / 'rows-1.csv'}"])
    if named_by == "form":
        job = Job(["train", "--resume"], "objective=sft&data=rows-1.csv")
    elif named_by == "configuration":
        config = space.run("other") / "config.toml"
        config.parent.mkdir()
        config.write_text(f'[data]\ndata = ["{space.rows / "rows-1.csv"}"]\n')
        job = Job(["train", str(config)])
    waits = space.queue / "000001-later.json"
    waits.write_text(json.dumps(asdict(job)))
    status, text, _ = client.post("delete-rows", data="rows-1.csv", query="")
    assert status == 409 and "needed by later" in text and (space.rows / "rows-1.csv").exists()
    waits.unlink()
    assert client.post("delete-rows", data="rows-1.csv", query="")[0] == 303


@pytest.mark.parametrize("name", ["rows.exe", "rows", "", "rows.csv.sh", "evil.py"])
def test_other_files_than_rows_are_refused(client: Client, space: Workspace, name: str) -> None:
    status, text, _ = client.post(f"upload?name={name}", body=ROWS)
    assert status == 409 and "is not a file of rows" in text and not any(space.rows.iterdir())


def test_uploads_are_bounded_in_size_and_number(
    client: Client, space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "MAX_UPLOAD_BYTES", 100_000)
    assert client.post("upload?name=x.csv", body=b"x" * 100_001)[0] == 413
    # An endless one, without a length.
    head = f"POST {client.address.root}/upload?name=x.csv HTTP/1.1\r\nHost: 127.0.0.1:{client.address.port}\r\n"
    head += f"Cookie: {client.cookie}\r\nOrigin: {client.origin}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.address.port), timeout=60) as connection:
        connection.sendall(head.encode())
        with contextlib.suppress(ConnectionError):
            for _ in range(10_000):
                connection.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
            raise AssertionError("it was read to no end")
    until(lambda: not any(space.rows.iterdir()))
    monkeypatch.setattr(workspace, "MAX_UPLOADS", 1)
    assert client.post("upload?name=x.csv", body=ROWS)[0] == 200
    status, text, _ = client.post("upload?name=x.csv", body=ROWS)
    assert status == 409 and "1 files of rows already" in text


def test_a_directory_has_one_server(client: Client, space: Workspace) -> None:
    receiving = space.rows / ".tmp-upload"
    receiving.write_bytes(ROWS)
    with (
        pytest.raises(UsageError, match="has a server already") as refused,
        serving(Workspace(space.root), host="127.0.0.1", port=0),
    ):
        pass
    assert refused.value.why == f"process {os.getpid()} answers at {client.origin}"
    assert receiving.exists() and client.get("new/rows")[0] == 200
    lock = space.root / "server.lock"
    assert space.token not in lock.read_text() and lock.stat().st_mode & 0o77 == 0


def test_uploads_at_once_have_names_of_their_own(space: Workspace) -> None:
    async def rows(number: int) -> AsyncIterator[bytes]:
        yield b"%d" % number

    def upload(number: int) -> str:
        return asyncio.run(Workspace(space.root).save_upload(f"{number}.csv", rows(number)))

    with ThreadPoolExecutor(8) as threads:
        names = list(threads.map(upload, range(60)))
    assert [(space.rows / name).read_bytes() for name in names] == [b"%d" % number for number in range(60)]
    labels = space.uploads()
    assert [labels[name].label for name in names] == [f"{number}.csv" for number in range(60)]


def test_a_server_that_is_killed_during_an_upload_leaves_nothing_of_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "backhand", "studio", "--directory", str(tmp_path / "studio"), "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split("Studio: ")[1].strip()
        place, _, token = address.removeprefix("http://127.0.0.1:").partition("/?token=")
        port, _, root = place.partition("/")
        client = Client(Address("127.0.0.1", int(port), f"/{root}", token)).enter()
        head = f"POST /{root}/upload?name=x.csv HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nCookie: {client.cookie}\r\n"
        head += f"Origin: {client.origin}\r\nContent-Length: 1000000\r\n\r\n"
        rows = tmp_path / "studio" / "rows"
        with socket.create_connection(("127.0.0.1", int(port)), timeout=60) as connection:
            connection.sendall(head.encode() + b"x" * 1000)
            until(lambda: any(rows.iterdir()))
            process.send_signal(signal.SIGKILL)
            process.wait()
    finally:
        process.kill()
        process.communicate()
    again = Workspace(tmp_path / "studio")
    assert again.uploads() == {}
    with again.locked():
        assert not any(rows.iterdir())
    assert again.port == int(port) and again.token == token


@pytest.mark.parametrize("name", ["../x", "..", ".x", "a/b", "", "x" * 61, "-x", "x\n", "a\0b", "x "])
def test_names_of_runs_stay_in_their_directory(client: Client, space: Workspace, name: str) -> None:
    with pytest.raises(UsageError, match="not a possible name"):
        checked_name(name)
    client.post("upload?name=x.csv", body=ROWS)
    if name == name.strip():
        assert client.post("start", name=name, data="rows-1.csv")[0] == 409
    assert not [path for path in files_of(space.root.parent) if "x/" in path or path.endswith("/x")]


@pytest.mark.parametrize(
    "place", ["runs/..%2f..%2fetc", "runs/%2e%2e", "runs/one%2f..%2ftwo", "static/..%2f..%2fapp.py"]
)
def test_addresses_lead_nowhere_else(client: Client, place: str) -> None:
    status, text, _ = client.get(place)
    assert status in (404, 409) and "root:" not in text and "import" not in text


def test_exports_stay_in_the_directory_of_their_run(
    client: Client, space: Workspace, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished.rename(space.run("one"))
    started: list[list[str]] = []

    async def export(_: Commands, words: list[str], *__: object) -> Outcome:
        started.append(words)
        next(Path(word.partition("=")[2]) for word in words if word.startswith("--output=")).touch()
        return Outcome(0, "", "<b>done</b>")

    monkeypatch.setattr(Commands, "checked", export)
    for kind in ("../gguf", "/etc/passwd", "", "gguf/../../../x"):
        assert client.post("runs/one/export", to=kind)[0] == 409
    for name in ("..%2fone", "one%2f..%2f..", "%2e%2e"):
        assert client.post(f"runs/{name}/export", to="gguf")[0] in (404, 409)
    assert client.post("runs/one/export", to="gguf", push="me/mine")[0] == 409 and not started
    assert client.post("runs/one/export", to="gguf", push="--output=/tmp/x", sure="yes")[0] == 200
    assert started[0][-1] == "--push=--output=/tmp/x" and f"--output={space.exports}/one/one-gguf.gguf" in started[0]
    (space.exports / "one" / "link").symlink_to("/etc")
    secret = space.root / "studio.json"
    for place in ("..%2f..%2fstudio.json", "%2e%2e%2fone.json", "..", "link%2fpasswd", "link", str(secret)):
        status, text, _ = client.get(f"runs/one/download/{place}")
        assert status in (404, 409) and space.token not in text and "root:" not in text


def test_a_command_ends_when_nobody_waits_for_it_any_more(client: Client, space: Workspace, tiny: TinyRun) -> None:
    pipe = space.root / "pipe.csv"
    os.mkfifo(pipe)
    head = f"GET {client.address.root}/part/rows?typed_data=pipe.csv HTTP/1.1\r\n"
    head += f"Host: 127.0.0.1:{client.address.port}\r\nCookie: {client.cookie}\r\n\r\n"

    def is_read() -> bool:
        try:
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    with socket.create_connection(("127.0.0.1", client.address.port), timeout=60) as connection:
        connection.sendall(head.encode())
        until(is_read)
    until(lambda: not is_read(), 20)


def test_paths_are_read_below_allowed_folders_only(client: Client, space: Workspace, tiny: TinyRun) -> None:
    assert space.allowed(str(tiny.model)) == tiny.model.resolve()
    outside = tiny.model.parent / "rows.jsonl"
    (space.root / "link").symlink_to(outside.parent)
    for path in (str(outside), "/etc/passwd", "../secret", f"{tiny.model}/../rows.jsonl", "link/rows.jsonl", "a\0b"):
        with pytest.raises(UsageError):
            space.allowed(path)
    for query in (f"typed_data={outside}", "typed_data=/etc/passwd", "data=../studio.json", "data=/etc/passwd"):
        status, text, _ = client.get(f"part/rows?{query}")
        assert status == 409 and ("may read" in text or "no such file of rows" in text)
    client.post("upload?name=x.csv", body=ROWS)
    status, text, _ = client.get(f"part/lint?data=rows-1.csv&typed_model={outside.parent}")
    assert status == 409 and "not in a folder that this page may read" in text


@pytest.mark.parametrize("name", ["reward", "chat_template", "output", "from_adapter", "report_to", "allow_pickle"])
def test_options_that_name_code_or_files_are_not_taken_from_the_page(client: Client, name: str) -> None:
    client.post("upload?name=x.csv", body=ROWS)
    _, text, _ = client.get(f"new/start?data=rows-1.csv&more.{name}=/tmp/evil.py&{name}=/tmp/evil.py&more.rank=3")
    assert "--rank=3" in text and name.replace("_", "-") + "=/tmp/evil" not in text


def test_a_value_cannot_become_another_option(client: Client) -> None:
    client.post("upload?name=x.csv", body=ROWS)
    _, text, _ = client.get("new/start?data=rows-1.csv&prompt=--reward&more.system=x%20--reward%20y.py:f")
    assert "--prompt=--reward" in text and "&#39;--system=x --reward y.py:f&#39;" in text


@pytest.mark.parametrize(
    ("label", "name"),
    [("faq", "faq"), ("../../my rows!", "my rows"), ("…", "run"), ("x" * 99, "x" * 50), ("a_b.c", "a b c")],
)
def test_a_name_is_suggested_that_is_possible_and_free(space: Workspace, label: str, name: str) -> None:
    assert space.free_name(label) == checked_name(name)
    space.run(name).mkdir()
    (space.queue / f"000001-{name}-2.json").write_text('{"words": ["train"]}')
    assert space.free_name(label) == checked_name(f"{name}-3")


def test_runs_are_renamed_and_deleted_without_following_links(
    client: Client, space: Workspace, finished: Path, tmp_path: Path
) -> None:
    finished.rename(space.run("one"))
    (space.run("two")).mkdir()
    assert client.post("runs/one/rename", new="two")[0] == 409
    (space.queue / "000001-later.json").write_text('{"words": ["train"]}')
    assert client.post("runs/one/rename", new="later")[0] == 409
    (space.queue / "000001-later.json").unlink()
    assert client.post("runs/one/rename", new="../three")[0] == 409
    assert client.post("runs/one/rename", new="three")[0] == 303
    assert not space.run("one").exists() and run_of(space, "three").state == "finished"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (space.run("three") / "link").symlink_to(tmp_path / "precious")
    status, text, _ = client.post("runs/three/delete")
    assert status == 409 and "is not deleted" in text and space.run("three").exists()
    assert client.post("runs/three/delete", sure="yes")[0] == 303
    assert not space.run("three").exists() and (tmp_path / "precious" / "file").exists()
    assert client.get("runs/three")[0] == 409
