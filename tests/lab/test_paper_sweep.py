"""The plan of a sweep, and a tiny one that is stopped, continued and read again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from backhand.errors import ArtifactError, UsageError
from backhand.lab.paper import sweep as paper_sweep
from backhand.lab.paper.options import PaperOptions, PaperRunOptions, SweepOptions
from backhand.lab.paper.sweep import plan_sweep, run_sweep
from backhand.loop.evaluate import evaluate
from backhand.nn.loading import open_model
from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions
from backhand.runs.interruption import Interrupted
from tests.support.tiny_run import TinyRun

SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": shape
    for layer in range(2)
    for name, shape in {"q_proj": (10, 8), "v_proj": (4, 8)}.items()
}


def plan(**sweep: object) -> dict[str, tuple[int, bool, bool]]:
    options = PaperOptions(sweep=SweepOptions(**sweep))  # type: ignore[arg-type]
    points, _ = plan_sweep(options, SHAPES)
    return {point.name: (point.trained_parameters, point.ranks, point.budget) for point in points}


def test_plan_has_every_rank_and_the_largest_rank_within_the_budget() -> None:
    #  One rank of q_proj takes 2 · (10 + 8) = 36 numbers, of q_proj and v_proj 36 + 2 · (4 + 8) = 60.
    found = plan(sweep_ranks=(1, 4), sweep_targets=("q_proj", "q_proj,v_proj"))
    assert found == {
        "q_proj-rank-1": (36, True, False),
        "q_proj-rank-4": (144, True, False),
        "q_proj+v_proj-rank-1": (60, True, False),
        "q_proj+v_proj-rank-4": (240, True, True),  # the budget: 4 · 60
        "q_proj-rank-6": (216, False, True),
    }


def test_budget_that_is_given_and_one_that_is_too_small() -> None:
    found = plan(sweep_ranks=(2,), sweep_targets=("q_proj", "q_proj,v_proj"), sweep_budget=40)
    assert found["q_proj-rank-1"] == (36, False, True)
    assert not any(budget for name, (_, _, budget) in found.items() if name != "q_proj-rank-1")
    with pytest.raises(UsageError, match="less than the size of a rank 1 adapter"):
        plan(sweep_targets=("q_proj",), sweep_budget=35)
    with pytest.raises(UsageError, match="w_proj"):
        plan(sweep_targets=("w_proj",))


def options(tiny: TinyRun, output: Path) -> PaperOptions:
    config = tiny.config(output)
    return PaperOptions(
        run=PaperRunOptions(analyses=("sweep",), output=output),
        sweep=SweepOptions(sweep_ranks=(1, 2), sweep_targets=("q_proj", "q_proj,v_proj"), max_new_tokens=4),
        model=config.model,
        data=config.data,
        optimization=config.optimization,
    )


def test_sweep_is_stopped_continued_and_not_repeated(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, source = options(tiny, tmp_path), open_model(tiny.model)
    original, calls = paper_sweep.train, []

    def stopping(config: object) -> object:
        calls.append(config)
        if len(calls) == 3:
            raise Interrupted(15, 0, "continue")
        return original(config)  # type: ignore[arg-type]

    monkeypatch.setattr(paper_sweep, "train", stopping)
    with pytest.raises(Interrupted):
        run_sweep(chosen, source, tmp_path / "sweep")
    result = run_sweep(chosen, source, tmp_path / "sweep")
    assert len(calls) == 3 + 3 and len(result.rows) == 5  # two were done, three were left
    assert run_sweep(chosen, source, tmp_path / "sweep") == result and len(calls) == 6
    for row in result.rows:
        assert row.base_eval_loss is not None and row.eval_loss < row.base_eval_loss
        assert row.exact_match is not None and 0 <= row.exact_match <= 1
        adapter = json.loads((tmp_path / "sweep" / row.point.name / "run/adapter/adapter_config.json").read_text())
        assert adapter["r"] == row.point.rank
    by_name = {row.point.name: row for row in result.rows}
    assert by_name["q_proj-rank-1"].eval_loss != by_name["q_proj+v_proj-rank-1"].eval_loss


def test_a_row_is_what_evaluate_says_of_its_adapter_alone(tiny: TinyRun, tmp_path: Path) -> None:
    chosen, source = options(tiny, tmp_path), open_model(tiny.model)
    chosen = replace(chosen, sweep=replace(chosen.sweep, sweep_ranks=(2,), sweep_targets=("q_proj,v_proj",)))
    (row,) = run_sweep(chosen, source, tmp_path / "sweep").rows
    adapter = tmp_path / "sweep" / row.point.name / "run" / "adapter"
    found = evaluate(
        EvaluateOptions(
            model=chosen.model,
            data=replace(chosen.data, data=chosen.data.eval_data, eval_data=()),
            run=EvaluateRunOptions(adapter=adapter, max_new_tokens=4),
        )
    )
    assert found.adapted is not None
    assert row.base_eval_loss == pytest.approx(found.base.loss, rel=1e-6)
    assert row.eval_loss == pytest.approx(found.adapted.loss, rel=1e-6)
    assert row.exact_match == found.adapted.exact_match
    trained = load_file(adapter / "adapter_model.safetensors")
    assert row.point.trained_parameters == sum(tensor.numel() for tensor in trained.values())


def test_a_run_that_was_cut_off_is_resumed(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, source = options(tiny, tmp_path), open_model(tiny.model)
    chosen = replace(chosen, sweep=replace(chosen.sweep, sweep_ranks=(1,), sweep_targets=("q_proj",)))
    (whole,) = run_sweep(chosen, source, tmp_path / "sweep").rows
    (tmp_path / "sweep" / whole.point.name / "result.json").unlink()
    original, resumed = paper_sweep.train, []

    def watching(config: object) -> object:
        resumed.append(config.run.resume)  # type: ignore[attr-defined]
        return original(config)  # type: ignore[arg-type]

    monkeypatch.setattr(paper_sweep, "train", watching)
    (again,) = run_sweep(chosen, source, tmp_path / "sweep").rows
    assert resumed == [True]
    assert again.eval_loss == whole.eval_loss


def test_other_settings_and_damage_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    chosen, source = options(tiny, tmp_path), open_model(tiny.model)
    chosen = replace(chosen, sweep=replace(chosen.sweep, sweep_ranks=(1,), sweep_targets=("q_proj",)))
    (row,) = run_sweep(chosen, source, tmp_path / "sweep").rows
    other = replace(chosen, optimization=replace(chosen.optimization, learning_rate=1e-4))
    with pytest.raises(UsageError, match="other settings"):
        run_sweep(other, source, tmp_path / "sweep")
    path = tmp_path / "sweep" / row.point.name / "result.json"
    whole = json.loads(path.read_text())
    for damaged in ({}, [], {**whole, "eval_loss": None}, {**whole, "train_s": "1"}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(ArtifactError, match="damaged"):
            run_sweep(chosen, source, tmp_path / "sweep")


def test_held_out_rows_may_be_a_share_or_must_be_somewhere(tiny: TinyRun, tmp_path: Path) -> None:
    chosen, source = options(tiny, tmp_path), open_model(tiny.model)
    chosen = replace(chosen, sweep=replace(chosen.sweep, sweep_ranks=(1,), sweep_targets=("q_proj",)))
    nothing = replace(chosen, data=replace(chosen.data, eval_data=()))
    with pytest.raises(UsageError, match="no rows are held out"):
        run_sweep(nothing, source, tmp_path / "nothing")
    share = replace(nothing, data=replace(nothing.data, eval_fraction=0.3))
    (row,) = run_sweep(share, source, tmp_path / "share").rows
    assert row.exact_match is not None
