from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from backhand.errors import ArtifactError, UsageError
from backhand.kernels import build, builds
from backhand.kernels.builds import BUILDS, VARIABLE, describe, load, usable, using
from backhand.kernels.library import INT64, POINTER, KernelSignature

COUNT = KernelSignature("backhand_count", POINTER, INT64, INT64, INT64)


@pytest.fixture
def fresh(monkeypatch):
    """The choice is made anew, and again after the test."""
    builds.chosen.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    builds.chosen.cache_clear()


@pytest.mark.parametrize("name", usable())
@pytest.mark.parametrize(("count", "grain"), [(0, 4), (1, 4), (3, 4), (1001, 4), (1001, 5000)])
def test_a_loop_covers_its_range_once_on_any_number_of_threads(name, count, grain):
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = torch.full((count + 1,), -1)
            with using(load(name)):
                COUNT.function()(out.data_ptr(), count, 7, grain)
        finally:
            torch.set_num_threads(before)
        assert out.tolist() == [*range(7, 7 + count), -1]


def test_a_build_says_its_own_name():
    assert [load(name).name for name in usable()] == list(usable())


def test_usable_builds_are_in_order():
    places = [BUILDS.index(name) for name in usable()]
    assert places == sorted(places)


def test_every_set_of_every_processor_has_a_name_in_order():
    for family in build.INSTRUCTION_SETS.values():
        places = [BUILDS.index(name) for name in family]
        assert places == sorted(places)


def test_the_widest_is_chosen_and_said(fresh):
    fresh.delenv(VARIABLE, raising=False)
    chosen = builds.library()
    assert (chosen.name if chosen else None) == (usable()[-1] if usable() else None)
    assert describe() == f"compiled kernels: {chosen.name}" if chosen else "none" in describe()


def test_none_is_torch_alone(fresh):
    fresh.setenv(VARIABLE, "none")
    assert builds.library() is None
    assert COUNT.function() is None
    assert describe() == "compiled kernels: none (BACKHAND_KERNELS=none); everything goes through torch, slower"


def test_a_path_can_be_forced(fresh):
    for name in usable():
        fresh.setenv(VARIABLE, name)
        builds.chosen.cache_clear()
        assert builds.library().name == name
        assert describe() == f"compiled kernels: {name} (BACKHAND_KERNELS={name})"


def test_an_unknown_name_is_an_error_that_lists_them(fresh):
    fresh.setenv(VARIABLE, "avx3")
    with pytest.raises(UsageError, match="avx3") as caught:
        builds.library()
    assert "avx512bf16" in str(caught.value)


def test_a_build_that_is_not_there_is_an_error(fresh):
    fresh.setattr(builds, "usable", lambda: ("baseline",))
    fresh.setenv(VARIABLE, "avx2")
    with pytest.raises(ArtifactError, match="avx2") as caught:
        builds.library()
    assert "make kernels" in str(caught.value)


def test_an_installed_package_is_not_sent_to_a_makefile(tmp_path):
    build = tmp_path / "site packages" / "backhand" / "kernels" / "build.py"
    assert builds.remedy() == "`make kernels`"
    assert builds.remedy(build) == f"`python '{build}'`"


def test_an_empty_folder_has_no_builds(tmp_path):
    assert usable(tmp_path) == ()


def test_a_file_that_is_no_library_counts_as_none(tmp_path):
    builds.library_path("baseline", tmp_path).write_text("no library")
    assert usable(tmp_path) == ()


def test_importing_the_library_loads_no_torch():
    script = "import sys, backhand.kernels.builds as l; l.usable(); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": "src"}, check=False)
    assert done.returncode == 0
