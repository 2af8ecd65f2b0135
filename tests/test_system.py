"""What systems do each in its own way: the forms of this one, and those of Windows as far as they run here."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from backhand import system

SOURCES = Path(system.__file__).parent
LACKING = {"fcntl", "resource", "select", "termios", "tty", "pty", "pwd", "grp", "posix", "msvcrt", "winreg"}
"""Modules that Windows or everybody else does not have; `select` knows sockets alone there."""
CALLS = {
    *("fork", "forkpty", "kill", "killpg", "setsid", "waitpid", "getuid", "geteuid", "mkfifo", "pread", "preadv"),
    *("pwrite", "SIGKILL", "SIGHUP", "SIGQUIT", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "sysconf", "getpgid"),
}


def named_outside_of_system(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in LACKING]
        elif isinstance(node, ast.ImportFrom) and node.module in LACKING:
            found.append(node.module)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [node.attr] if node.value.id in ("os", "signal") and node.attr in CALLS else []
    return found


def test_no_other_file_names_what_a_system_lacks() -> None:
    assert named_outside_of_system(Path(system.__file__)), "or this test could not fail"
    for path in sorted(SOURCES.rglob("*.py")):
        if path != Path(system.__file__):
            assert not named_outside_of_system(path), f"{path}: its place is backhand/system.py"


@pytest.fixture(params=[sys.platform, "win32"])
def form(request, monkeypatch):
    """The module as it is here, and as Windows has it, with what that one's modules do in words of this system."""
    if request.param == sys.platform:
        return system
    import fcntl

    import psutil  # noqa: F401 - before another system is simulated

    def locking(descriptor, _mode, count):
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, os.lseek(descriptor, 0, os.SEEK_CUR))
        except OSError:
            raise PermissionError from None

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(sys, "platform", "win32")
    spec = importlib.util.spec_from_file_location("system_of_windows", system.__file__)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    monkeypatch.undo()
    found.sys = types.SimpleNamespace(**{**vars(sys), "platform": "win32"})  # its functions ask when they are called
    return found


# Another process, since locks of one's own are no obstacle on every system.
HOLD = """
import sys
{locking}
file = open(sys.argv[1], "r+b")
{call}
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_keeps_others_out_until_its_process_ends(form, tmp_path):
    path = tmp_path / "lock"
    path.write_bytes(b"123")
    flock = form is system
    call = "fcntl.flock(file, fcntl.LOCK_EX)" if flock else "fcntl.lockf(file, fcntl.LOCK_EX, 1, 2**30)"
    script = HOLD.format(locking="import fcntl", call=call)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        descriptor = os.open(path, os.O_RDWR | form.PLAIN)
        assert not form.lock(descriptor)
        assert os.read(descriptor, 8) == b"123", "who holds it can be read"
        holder.kill()
        holder.wait()
        assert form.lock(descriptor, wait=True)
        os.close(descriptor)


def test_bytes_from_a_place_on(form, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    descriptor = os.open(path, os.O_RDONLY | form.PLAIN)
    data = bytearray(10)
    assert form.read_at(descriptor, data, 90) == 10
    assert data == bytes(range(90, 100))
    assert form.read_at(descriptor, data, 95) == 5, "where the file ends"
    os.close(descriptor)


def test_which_processes_there_are(form):
    start = form.process_start(os.getpid())
    assert form.exists(os.getpid())
    assert start is not None
    assert start == form.process_start(os.getpid())
    assert start != form.process_start(os.getppid())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not form.exists(ended.pid)
    assert form.process_start(ended.pid) is None


def test_memory_is_reported(form):
    assert form.memory_bytes() > 2**28
    assert form.rss_bytes() > 2**20
    assert form.peak_rss_bytes() >= form.rss_bytes() // 2


def test_what_is_missing_is_installed_by_what_made_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(system, "find_spec", lambda name: object())
    assert system.install("peft") == "pip install peft"
    monkeypatch.setattr(system, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "executable", "/home/a b/bin/python")
    assert system.install("peft") == "uv pip install --python '/home/a b/bin/python' peft"
    (tmp_path / "pipx_metadata.json").touch()
    assert system.install("peft") == "pipx runpip backhand install peft"
