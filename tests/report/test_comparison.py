"""Several runs on one page, and the command."""

from __future__ import annotations

import errno
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from backhand.cli.main import main
from backhand.options.rewards import RewardOptions
from backhand.report import command as writing
from backhand.report.comparison import comparison_page, short_names
from backhand.report.run_record import RunRecord, read_run
from backhand.report.train import train
from tests.support.page import Page
from tests.support.tiny_run import TinyRun


@pytest.fixture
def two(finished: Path, tiny: TinyRun, tmp_path: Path) -> tuple[Path, Path]:
    train(tiny.config(tmp_path / "other", max_steps=2, learning_rate=1e-6, answers=4))
    return finished, tmp_path / "other"


def test_two_runs_side_by_side(two: tuple[Path, Path], tmp_path: Path) -> None:
    output, config = tmp_path / "pages" / "both.html", two[1] / "config.toml"
    config.write_text(config.read_text().replace("alpha = 5.0", "alpha = 5"))
    assert main(["report", *map(str, two), "--output", str(output)]) == 0
    page = Page(output.read_bytes())
    assert page.one("p", class_="lead").text.startswith("run has the lowest loss on the same 4 held-out rows")
    options = page.one("section", id="configuration").text
    assert "adapter.alpha" not in options, "5.0 and 5 are equal"
    assert "optimization.learning_rate" in options and "1e-06" in options and "run.output" not in options
    series = {row["series"] for row in page.charts["held-out"]["data"]["values"]}
    assert series == {"run", "other"}
    assert len(page.every("article", class_="answer")) == 4
    assert {row["series"] for row in page.charts["forgetting"]["data"]["values"]} == {"run", "other"}
    assert "forgotten on neutral texts" in " ".join(cell.text for cell in page.every("th"))


def test_other_held_out_rows_are_not_compared(two: tuple[Path, Path], tmp_path: Path) -> None:
    facts = two[1] / "facts.json"
    facts.write_text(facts.read_text().replace('"held_out_digest": "', '"held_out_digest": "0'))
    assert main(["report", *map(str, two), "--output", str(tmp_path / "x.html")]) == 0
    assert "cannot be compared" in Page((tmp_path / "x.html").read_bytes()).one("p", class_="lead").text


def test_the_best_run_is_named_in_the_measure_of_its_objective(two: tuple[Path, Path]) -> None:
    runs = [read_run(path) for path in two]

    def lead(*objectives: str) -> str:
        made = [
            replace(run, config=run.config | {"objective": {"objective": objective}})
            for run, objective in zip(runs, objectives, strict=True)
        ]
        return Page(comparison_page(made)).one("p", class_="lead").text

    assert "per pair (dpo)" in lead("dpo", "dpo")
    of_tokens = lead("sft", "sft")
    assert "nats per token; compared with other, loss changed by -" in of_tokens and "(95 % interval -" in of_tokens
    assert "(dpo), which does not tell whose answers are better" in lead("dpo", "dpo")
    assert "has the highest reward on the same 4 held-out rows: -" in lead("grpo", "grpo")
    assert "different objectives" in lead("sft", "dpo")
    killed = replace(runs[1], metrics=[], summary={})
    assert Page(comparison_page([runs[0], killed])).one("p", class_="lead").text == (
        "other has no held-out figures, so which run is better is not known."
    )
    three = Page(comparison_page([*runs, killed])).one("p", class_="lead").text
    assert "lowest loss" in three and three.endswith("no held-out figures.")
    runs[1].facts["digests"] = {"held_out_digest": "of the same rows as other tokens"}
    assert "different objectives" in lead("sft", "decide") and "other tokens" in lead("sft", "sft")


def test_runs_on_rewards_are_compared_by_the_rewards_of_their_rows(two: tuple[Path, Path]) -> None:
    def with_rewards(run: RunRecord, *rewards: float, reward: str = "exact") -> RunRecord:
        mean = sum(rewards) / len(rewards)
        line = {"step": 1, "eval_loss": -mean, "eval_reward": mean, "row_rewards": list(rewards)}
        options = {"objective": {"objective": "grpo"}, "rewards": {"reward": [reward]}}
        steps = [{**one, "reward": 0.25} for one in run.steps]
        return replace(run, config=run.config | options, metrics=[*steps, line])

    def page(*runs: RunRecord) -> Page:
        return Page(comparison_page(runs))

    def lead(*runs: RunRecord) -> str:
        return page(*runs).one("p", class_="lead").text

    one, other = (read_run(path) for path in two)
    worse, better = with_rewards(one, 0.0, 0.0, 0.0, 0.2), with_rewards(other, 0.9, 1.0, 1.0, 1.0)
    beaten = "other has the highest reward on the same 4 held-out rows: 0.9750; compared with run, reward gained"
    assert lead(worse, better).startswith(f"{beaten} per row +0.925 (95 % interval +0.7727 to +1.077)")
    close, same = with_rewards(one, 1.0, 1.0, 0.8, 1.0), with_rewards(one, 0.9, 1.0, 1.0, 1.0)
    assert "too few rows to be sure of the change" in lead(close, better)
    assert lead(same, better).startswith("other and run have the same reward on the same 4 held-out rows: 0.9750")
    punished = with_rewards(one, -0.5), with_rewards(other, -0.5)
    assert lead(*punished).startswith("other and run have the same reward on the same 4 held-out rows: -0.5000")
    assert "→ 0" in " ".join(cell.text for cell in page(with_rewards(one, 0.0), better).every("td")), "and not -0"
    otherwise = with_rewards(other, 1.0, reward="json")
    assert "different values of --reward: their held-out rewards" in lead(worse, otherwise)
    assert "different rewards" in " ".join(one.text for one in page(worse, otherwise).every("figcaption"))
    of_default = better.config | {"rewards": {"reward": ["exact"], "max_new_tokens": RewardOptions().max_new_tokens}}
    assert lead(worse, replace(better, config=of_default)).startswith(beaten), "a missing option has its default"
    longer = better.config | {"rewards": {"reward": ["exact"], "max_new_tokens": 7}}
    assert "different values of --max-new-tokens" in lead(worse, replace(better, config=longer))
    shown = page(worse, better)
    captions = " ".join(one.text for one in shown.every("figcaption"))
    assert "Reward on held-out rows, per answer: higher is better" in captions and "Loss" not in captions
    assert {row["value"] for row in shown.charts["held-out"]["data"]["values"]} == {0.05, 0.975}
    assert "→ 0.975" in " ".join(cell.text for cell in shown.every("td"))


def test_equal_rankings_of_all_queries_leave_others_uncertain(two: tuple[Path, Path]) -> None:
    figures = {"ndcg@10": 1.0, "queries": 4, "intervals": {"ndcg@10": [0.5, 1.0]}}
    of_queries = {"adapted_retrieval": figures, "base_retrieval": figures | {"ndcg@10": 0.5}, "row_scores": [1.0] * 4}
    runs = [
        replace(run, config=run.config | {"objective": {"objective": "embed"}}, summary=run.summary | of_queries)
        for run in map(read_run, two)
    ]
    lead = Page(comparison_page(runs)).one("p", class_="lead").text
    low, high = map(float, re.findall(r"they differ by \+0.000 \(95 % interval (\S+) to (\S+)\)", lead)[0])
    assert low == -high < -0.3


def test_runs_on_labels_are_compared_by_their_scores(two: tuple[Path, Path]) -> None:
    figures = {"base_classes": {"accuracy": 0.25}, "adapted_classes": {"accuracy": 0.5, "rows": 40}}
    of_labels = {"objective": {"objective": "classify"}}
    runs = [
        replace(run, config=run.config | of_labels, summary=run.summary | figures, answers=[])
        for run in map(read_run, two)
    ]
    page = Page(comparison_page(runs))
    assert "right answers 25.0% (constant answer) → 50.0%" in " ".join(cell.text for cell in page.every("td"))
    assert "run, other keep no answers to single rows" in page.one("section", id="answers").text


def test_charts_of_losses_name_the_unit_that_all_runs_have(two: tuple[Path, Path]) -> None:
    runs = [read_run(path) for path in two]

    def chart(*objectives: dict[str, str]) -> tuple[str, str]:
        made = [
            replace(run, config=run.config | {"objective": objective})
            for run, objective in zip(runs, objectives, strict=True)
        ]
        page = Page(comparison_page(made))
        captions = [one.text for one in page.every("figcaption") if "held-out rows" in one.text]
        return captions[0], page.charts["held-out"]["layer"][-1]["encoding"]["tooltip"][1]["title"]

    sft, dpo = {"objective": "sft"}, {"objective": "dpo"}
    assert chart(sft, sft) == ("Loss on held-out rows, nats per token: lower is better", "nats per token")
    assert chart(dpo, dpo) == ("Loss on held-out rows, per pair (dpo): lower is better", "per pair (dpo)")
    for different in (sft, dpo | {"loss_type": "ipo"}):
        caption, title = chart(dpo, different)
        assert "cannot be compared" in caption and "lower is better" not in caption and title == "loss"
    made = [
        replace(run, config=run.config | {"objective": objective})
        for run, objective in zip(runs, (dpo, different), strict=True)
    ]
    lead = Page(comparison_page(made)).one("p", class_="lead").text
    assert "different values of --loss-type: their held-out losses cannot" in lead
    made[1] = replace(runs[1], config=runs[1].config | {"objective": dpo | {"beta": 0.5}})
    assert "different values of --beta: their" in Page(comparison_page(made)).one("p", class_="lead").text


def test_answers_are_compared_with_the_reference_of_the_objective(two: tuple[Path, Path]) -> None:
    runs = [read_run(path) for path in two]

    def shown(**line: str) -> str:
        made = [replace(run, answers=[answer | line for answer in run.answers]) for run in runs]
        return Page(comparison_page(made)).one("section", id="answers").text

    assert "expected answer" in shown() and "chosen" not in shown()
    assert "chosen" in shown(rejected="no") and "expected answer" not in shown(rejected="no")


def test_one_run_without_an_output_goes_into_its_directory(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "report.html").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").exists() and str(finished / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no run is given"),
        (["absent"], 2, "no run in absent"),
        (["run", "run"], 2, "twice"),
        (["run", "--output", "."], 2, "is a directory"),
    ],
)
def test_mistakes(
    arguments: list[str],
    code: int,
    message: str,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished.parent)
    assert main(["report", *arguments]) == code
    assert message in capsys.readouterr().err


def test_links_and_pipes_are_not_replaced(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("link", "a symbolic link"), ("pipe", "not a plain file")):
        assert main(["report", str(finished), "--output", str(tmp_path / name)]) == 2
        assert f"this is {kind} and will not be replaced" in capsys.readouterr().err
    assert (tmp_path / "target").read_text() == "precious" and (tmp_path / "link").is_symlink()
    assert (tmp_path / "pipe").is_fifo()


def test_a_page_that_cannot_be_written_is_not_to_be_resumed(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "replace_file", full)
    assert main(["report", str(finished)]) == 5
    error = capsys.readouterr().err
    assert "free space, then write it with `backhand report`" in error and "--resume" not in error


def test_a_damaged_configuration_is_an_artifact(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "config.toml").write_text("= nothing")
    assert main(["report", str(finished)]) == 4


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    assert short_names([tmp_path / "a" / "x", tmp_path / "b"]) == ["a/x", "b"]


def test_a_run_moved_elsewhere_still_has_its_page(finished: Path, tmp_path: Path) -> None:
    shutil.move(finished, tmp_path / "moved")
    assert main(["report", str(tmp_path / "moved")]) == 0
    lead = Page((tmp_path / "moved" / "report.html").read_bytes()).one("p", class_="lead").text
    assert str(tmp_path / "moved" / "adapter") in lead
