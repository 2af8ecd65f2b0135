from __future__ import annotations

import shutil
import sys

import pytest

from backhand.kernels import build
from backhand.kernels.builds import Library, usable
from backhand.kernels.library import INT


@pytest.fixture
def one(monkeypatch, tmp_path):
    """A folder of sources with one small file, and one instruction set."""
    (tmp_path / "native").mkdir()
    for name in ("common.h", "library.cpp"):
        shutil.copy(build.SOURCES / name, tmp_path / "native" / name)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "native")
    monkeypatch.setattr(build, "INSTRUCTION_SETS", {build.machine(): {"baseline": ()}})
    return tmp_path


needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_only_what_changed_is_compiled_again(one):
    lib = one / "lib"
    assert build.build(lib) == ["baseline"]
    first = build.library_path("baseline", lib).stat().st_ino
    assert build.build(lib) == ["baseline"]
    assert build.library_path("baseline", lib).stat().st_ino == first
    with (one / "native" / "common.h").open("a") as header:
        header.write("// another line\n")
    build.build(lib)
    second = build.library_path("baseline", lib).stat().st_ino
    assert second != first
    build.build(lib, force=True)
    assert build.library_path("baseline", lib).stat().st_ino != second


@needs_compiler
def test_every_source_is_picked_up(one):
    (one / "native" / "more.cpp").write_text('#include "common.h"\nBACKHAND_EXPORT int more() { return 42; }\n')
    build.build(one / "lib")
    assert Library(build.library_path("baseline", one / "lib")).function("more", (), INT)() == 42


@needs_compiler
def test_a_mistake_shows_what_the_compiler_said_and_leaves_the_old_build_alone(one):
    build.build(one / "lib")
    (one / "native" / "more.cpp").write_text("mistake\n")
    with pytest.raises(RuntimeError, match=r"more\.cpp"):
        build.build(one / "lib")
    assert build.library_path("baseline", one / "lib").exists()
    assert not list((one / "lib").glob("tmp*"))


@needs_compiler
def test_an_instruction_set_that_the_compiler_does_not_know_is_left_out(one, monkeypatch, capsys):
    sets = {build.machine(): {"baseline": (), "avx2": ("-mno-such-thing",)}}
    monkeypatch.setattr(build, "INSTRUCTION_SETS", sets)
    assert build.build(one / "lib", every=True) == ["baseline"]
    assert "left out avx2" in capsys.readouterr().err


@needs_compiler
def test_a_compiler_with_other_names_for_flags_gets_its_own(one, monkeypatch):
    sets = {"aarch64": {"baseline": (), "neon_bf16": ("-march=armv8.2-a+bf16",)}}
    monkeypatch.setattr(build, "INSTRUCTION_SETS", sets)
    command = (build.find_compiler(),)
    spelled = {"-march=armv8.2-a+bf16": "-DBACKHAND_SPELLED"}
    (one / "native" / "more.cpp").write_text(
        '#include "common.h"\n#if defined(BACKHAND_SPELLED)\nBACKHAND_EXPORT int more() { return 42; }\n#endif\n'
    )
    toolchain = build.Toolchain(command, "aarch64", sys.platform, command, spelled)
    assert build.build(one / "lib", toolchain=toolchain) == ["baseline", "neon_bf16"]
    assert Library(build.library_path("neon_bf16", one / "lib")).function("more", (), INT)() == 42


def test_without_a_compiler_one_line_says_so(one, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "BUILT", one / "lib")
    monkeypatch.setattr("sys.argv", ["build.py"])
    build.main()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "everything works through torch" in said
    assert not (one / "lib").exists()


@needs_compiler
def test_loops_of_other_sources_are_not_taken(one):
    lib = one / "lib"
    build.build(lib)
    assert build.fault("baseline", lib) is None and usable.__wrapped__(lib) == ("baseline",)
    with (one / "native" / "common.h").open("a") as header:
        header.write("// another line\n")
    assert "other sources" in build.fault("baseline", lib) and usable.__wrapped__(lib) == ()
    build.build(lib)
    assert usable.__wrapped__(lib) == ("baseline",)
    target, stamp = build.library_path("baseline", lib), build.stamp_path("baseline", lib)
    damages = (
        lambda: target.write_bytes(target.read_bytes()[:-1]),
        stamp.unlink,
        lambda: stamp.write_text("three other words"),
    )
    for damage in damages:
        damage()  # what is not as it was built is built again
        assert build.fault("baseline", lib) is not None
        build.build(lib)
        assert build.fault("baseline", lib) is None
    shutil.rmtree(one / "native")  # as where the library is installed without its sources
    assert usable.__wrapped__(lib) == ("baseline",)


@needs_compiler
def test_only_what_this_processor_runs_is_compiled_unless_every_one_is_asked_for(one, monkeypatch):
    """A processor that says it has none of the newer ones; the flags do not matter, the names do."""
    monkeypatch.setattr(build, "INSTRUCTION_SETS", {build.machine(): {"baseline": (), "avx2": (), "avx512": ()}})
    source = one / "native" / "library.cpp"
    asked = source.read_text()
    start = asked.index("uint32_t found = 0;")
    source.write_text(asked[:start] + "return 1;\n  " + asked[start:])
    assert build.build(one / "lib") == ["baseline", "avx2"]
    assert not build.library_path("avx512", one / "lib").exists()
    assert build.processor_runs(build.library_path("avx2", one / "lib")) == ["baseline", "avx2"]
    assert build.build(one / "lib", every=True) == ["baseline", "avx2", "avx512"]
