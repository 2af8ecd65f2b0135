from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from backhand.cli.main import main
from backhand.data.options import DataOptions
from backhand.errors import CheckError, UsageError
from backhand.verify import command
from backhand.verify.command import verify, verify_command
from backhand.verify.mutants import Mutant
from backhand.verify.options import VerifiedModelOptions, VerifyOptions, VerifyRunOptions
from backhand.verify.report import MUTANTS, PROOFS
from backhand.verify.runner import PROOF_FILES, forms, load_proofs


def options(**fields):
    return VerifyOptions(verify=VerifyRunOptions(**fields))


def test_one_op_lists_cases_and_mutants(capsys):
    report = verify_command(options(op="glu"))
    assert report.passed
    printed = capsys.readouterr().out
    for row in report.of(PROOFS):
        assert row.case in printed
    for rejection in report.of(MUTANTS):
        assert rejection.mutant in printed
    assert f"{len(report.of(PROOFS))} of {len(report.of(PROOFS))} proofs hold" in printed
    assert f"{len(report.of(MUTANTS))} of {len(report.of(MUTANTS))} mutants rejected" in printed


def test_json_holds_every_proof(capsys):
    report = verify_command(options(op="mse", json=True))
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert len(found["proofs"]) == len(report.of(PROOFS))
    keys = {"op", "case", "dtype", "check", "tensor", "error", "bound", "worst", "form", "passed"}
    assert set(found["proofs"][0]) == keys
    assert all(one["rejected"] for one in found["mutants"])
    assert found["model"] == []


@pytest.fixture
def broken_glu(monkeypatch):
    """An op with a wrong backward, and a mutant without a mistake."""
    (proof,) = load_proofs("glu")
    wrong = Mutant("half", "d_up", lambda _g, _s, right: right.d_up / 2).spoil(proof.backward)
    unnoticed = Mutant("changes nothing", "d_gate", lambda _g, _s, right: right.d_gate)
    broken = replace(proof, backward=wrong, mutants=(unnoticed,))
    monkeypatch.setattr(command, "load_proofs", lambda op: [broken])


@pytest.mark.usefixtures("broken_glu")
def test_failure_names_the_worst_row_and_exits_with_6(capsys):
    assert main(["verify", "--op", "glu"]) == 6
    captured = capsys.readouterr()
    assert "Failed" in captured.out
    assert "WRONG" in captured.out
    assert "NOT REJECTED" in captured.out
    assert "d_up of glu" in captured.err
    assert "row " in captured.err


def test_a_mutant_that_goes_unnoticed_is_named(monkeypatch, capsys):
    (proof,) = load_proofs("glu")
    unnoticed = Mutant("changes nothing", "d_gate", lambda _g, _s, right: right.d_gate)
    monkeypatch.setattr(command, "load_proofs", lambda op: [replace(proof, mutants=(*proof.mutants, unnoticed))])
    assert main(["verify", "--op", "glu"]) == 6
    error = capsys.readouterr().err
    assert (
        f"{len(forms(proof))} deliberately wrong versions were not rejected" in error and "'changes nothing'" in error
    )


def test_what_is_no_number_is_named_before_what_is_only_wrong(monkeypatch, capsys):
    (proof,) = load_proofs("glu")
    half = Mutant("half", "d_up", lambda _g, _s, right: right.d_up / 2).spoil(proof.backward)
    both = Mutant("NaN", "d_gate", lambda _g, _s, right: right.d_gate * float("nan")).spoil(half)
    monkeypatch.setattr(command, "load_proofs", lambda op: [replace(proof, backward=both)])
    assert main(["verify", "--op", "glu"]) == 6
    error = capsys.readouterr().err
    assert "d_gate of glu" in error and "relative error nan" in error and "row " in error


@pytest.mark.usefixtures("broken_glu")
def test_failure_in_json(capsys):
    with pytest.raises(CheckError):
        verify_command(options(op="glu", json=True))
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert {one["tensor"] for one in found["proofs"] if not one["passed"]} == {"d_up"}
    assert {one["rejected"] for one in found["mutants"]} == {False}


def test_an_unknown_op_shows_the_nearest():
    with pytest.raises(UsageError) as caught:
        verify(options(op="rms_nrom"))
    assert "rms_norm" in str(caught.value.next_step)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"verify": VerifyRunOptions(op="glu"), "model": VerifiedModelOptions(model="x")}, "op"),
        ({"verify": VerifyRunOptions(max_tokens=7)}, "max_tokens"),
        ({"model": VerifiedModelOptions(model="x", engine="transformers")}, "engine"),
        ({"model": VerifiedModelOptions(model="x", dtype="float16")}, "dtype"),  # type: ignore[arg-type]
        ({"verify": VerifyRunOptions(op="glu", adapter=Path("a"))}, "op"),
        ({"data": DataOptions(data=("a",))}, "data"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(fields, where):
    with pytest.raises(UsageError) as caught:
        verify(VerifyOptions(**fields))
    assert caught.value.where == where


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError) as caught:
        verify_command(options(op="mse", run=tmp_path))
    assert caught.value.where == "run"


def test_proofs_are_appended_to_the_run(tmp_path, capsys):
    (tmp_path / "config.toml").write_text("")
    for _ in range(2):
        verify_command(options(op="mse", run=tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "proofs.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 5, "four checks and the mutants, twice"
    for line in lines:
        assert set(line) == {"proof", "passed", "value", "bound", "command", "time", "kind", "detail"}
        assert line["passed"] is True
        assert line["command"] == "verify"
        assert line["kind"] == "gradients"


def test_every_name_can_be_verified_alone():
    for name in PROOF_FILES:
        assert [proof.op for proof in load_proofs(name)] == [name]


def test_options_import_no_torch():
    code = "import sys, backhand.verify.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
