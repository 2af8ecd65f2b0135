"""A Hugging Face hub on this machine's loopback that answers uploads, or fails at a chosen request in a chosen way."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import close_session

Answer = Callable[["Request"], None]
"""Answer one request, in any way."""

STAGES = {"create": "/api/repos/create", "preupload": "/preupload/", "commit": "/commit/"}
"""The requests of an upload, in their order."""


class Request(BaseHTTPRequestHandler):
    """One request. `uploaded`, `stages` and `failures` belong to the server."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # each answer in one packet: the second one of two would wait for 40 ms
    stages: list[str]
    failures: Mapping[str, Answer]
    uploaded: dict[str, bytes]

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the base class names it so
        """Print nothing."""

    def do_GET(self) -> None:
        self.reply(200, {"id": "me/it", "siblings": []})

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        stage = next((name for name, part in STAGES.items() if part in self.path), "other")
        self.stages.append(stage)
        if stage in self.failures:
            self.failures[stage](self)
        elif stage == "create":
            self.reply(200, {"url": f"http://{self.headers['Host']}/me/it"})
        elif stage == "preupload":
            files = json.loads(self.body)["files"]
            modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            self.reply(200, {"files": modes, "commitOid": "0" * 40})
        elif stage == "commit":
            for line in self.body.splitlines():
                value = json.loads(line)["value"]
                if "path" in value:
                    self.uploaded[value["path"]] = value["content"]
            url = f"http://{self.headers['Host']}/me/it/commit/1"
            self.reply(200, {"success": True, "commitUrl": url, "commitOid": "1" * 40, "hookOutput": ""})
        else:
            self.reply(200, {})

    def reply(self, code: int, content: Any, **headers: str) -> None:
        """Send an answer: JSON, or bytes as they are."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def drop(self) -> None:
        """Close the connection by a reset, without an answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


class TinyHub:
    """The hub's address, and what has happened at it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.stages: list[str] = []
        self.uploaded: dict[str, bytes] = {}


@contextmanager
def tiny_hub(failures: Mapping[str, Answer] | None = None) -> Iterator[TinyHub]:
    """Serve a hub; the library's session leads to it inside the block.

    Args:
        failures: by stage, how the hub answers instead.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), Request) as server, pytest.MonkeyPatch.context() as patch:
        server.daemon_threads = True
        hub = TinyHub(f"http://127.0.0.1:{server.server_port}")
        own = {"stages": hub.stages, "failures": failures or {}, "uploaded": hub.uploaded}
        server.RequestHandlerClass = type("OneRequest", (Request,), own)
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        lead_to(patch, hub.address)
        try:
            yield hub
        finally:
            server.shutdown()
            close_session()


def lead_to(patch: pytest.MonkeyPatch, address: str, *, offline: bool = False) -> None:
    """Point the library to a hub at this address. It reads the environment once, when it is imported."""
    patch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    patch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    close_session()
