"""The page of one run: the report's sections while it trains, and nothing that changes the run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backhand.cli.main import main
from backhand.runs.row_changes import MOST_RECORDED
from backhand.studio import app
from backhand.studio.command import serving
from backhand.studio.commands import Commands, Outcome
from backhand.studio.workspace import Workspace
from tests.support.page import Page
from tests.support.poison import ATTACKS, poison_run
from tests.support.studio_client import Client


@pytest.fixture
def watched(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.chdir(Path(model_of(finished)).parent)
    with serving(finished, host="127.0.0.1", port=0) as address:
        yield Client(address).enter()


def shown(client: Client) -> Page:
    status, text, _ = client.get("runs/run")
    assert status == 200
    return Page(text.encode())


def test_the_page_is_the_report_with_a_box_for_prompts(watched: Client) -> None:
    page = shown(watched)
    assert "loss" in page.charts and page.one("section", id="try") and not page.every("section", id="export")
    assert {form.attributes["action"] for form in page.every("form")} == {f"{watched.address.root}/runs/run/try"}
    _, _, headers = watched.get("")
    assert headers["location"] == f"{watched.address.root}/runs/run"


@pytest.mark.parametrize("place", ["new", "runs/other", "part/models", "runs/run/download/x", "static/../app.py"])
def test_nothing_else_is_shown(watched: Client, place: str) -> None:
    assert watched.get(place)[0] == 404
    assert watched.post("runs/run/delete", sure="yes")[0] == 404


def test_the_report_has_an_origin_of_its_own(watched: Client, finished: Path) -> None:
    status, text, headers = watched.get("runs/run/report")
    assert status == 200 and text.encode() == (finished / "report.html").read_bytes()
    policy = headers["content-security-policy"]
    assert "sandbox allow-scripts" in policy and "allow-same-origin" not in policy and "connect-src" not in policy
    (finished / "report.html").unlink()
    (finished / "report.html").symlink_to("/etc/passwd")
    assert watched.get("runs/run/report")[0] == 409


def test_the_page_follows_the_run(watched: Client, finished: Path) -> None:
    _, _, headers = watched.get("runs/run")
    assert watched.get("runs/run", If_None_Match=headers["etag"])[:2] == (304, "")
    line = {"step": 13, "loss": 0.25, "learning_rate": 1e-4, "tokens_per_s": 1.0}
    with (finished / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n" + '{"step": 14, "lo')  # half a line is being written
    status, text, _ = watched.get("runs/run", If_None_Match=headers["etag"])
    values = Page(text.encode()).charts["loss"]["data"]["values"]
    assert status == 200 and {"step": 13, "value": 0.25, "series": "training rows"} in values


def test_time_left_and_a_killed_run_are_shown(watched: Client, finished: Path) -> None:
    status = json.loads((finished / "status.json").read_text())
    start = status | {"state": "running", "process": os.getpid(), "process_start": None, "total_steps": 24}
    (finished / "status.json").write_text(json.dumps(start))
    # The newest line is an evaluation with as many values per row as a run of pairs records.
    pairs = {name: [-17.123456789012345] * MOST_RECORDED for name in ("row_chosen", "row_rejected", "row_nats")}
    with (finished / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 12, "eval_loss": 0.25, "row_tokens": [4096] * MOST_RECORDED} | pairs) + "\n")
    text = shown(watched).one("div", id="state").text
    assert "trains" in text and "step 12 of 24, about" in text
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    (finished / "status.json").write_text(json.dumps(start | {"process": int(done.stdout)}))
    page = shown(watched)
    assert "was killed" in page.one("div", id="state").text and "--resume" in page.one("p", class_="state bad").text


def test_a_run_without_a_status_may_be_in_preparation(watched: Client, client: Client, finished: Path) -> None:
    (finished / "status.json").unlink()
    assert "finished" in shown(watched).one("div", id="state").text  # its summary says so
    for name in ("summary.json", "metrics.jsonl"):
        (finished / name).unlink()
    page = shown(watched)
    for text in (page.one("div", id="state").text, page.one("p", class_="lead").text):
        assert "is being prepared, or its process has ended" in text and "killed" not in text
    assert "nothing was held out" not in page.root.text
    shutil.copytree(finished, finished.parent / "studio" / "runs" / "one")  # as if it was started in a terminal
    assert "is being prepared, or its process has ended" in client.get("")[1]


@pytest.mark.parametrize(("name", "key"), [("status.json", "step"), ("facts.json", "modules")])
def test_damaged_files_do_not_hide_the_rest(watched: Client, name: str, key: str, finished: Path) -> None:
    (finished / name).write_text(json.dumps({**json.loads((finished / name).read_text()), key: None}))
    assert "How training went" in shown(watched).root.text


def test_errors_are_answered(watched: Client, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finished / "config.toml").write_text("[model")
    assert "the configuration cannot be read" in shown(watched).root.text
    for error, status in ((TypeError("of ours"), 500), (PermissionError(13, "Permission denied"), 409)):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(app, "page_of", fail)
        (finished / "metrics.jsonl").touch()
        found, text, _ = watched.get("runs/run")
        assert found == status and (error.args[-1] in text)


def test_poison_in_every_file_stays_text(watched: Client, finished: Path) -> None:
    poison_run(finished, " ".join(ATTACKS))
    page = shown(watched)
    assert not page.every("img") and not page.every("iframe") and "onerror" in page.root.text
    assert [script.attributes.get("src") is not None for script in page.every("script")] == [True, False, True, True]


def test_base_and_adapter_answer_with_the_newest_checkpoint(watched: Client, finished: Path) -> None:
    from backhand import generate

    model, config = model_of(finished), (finished / "config.toml").read_text()
    (finished / "config.toml").write_text(config.replace(model, Path(model).name))  # as it was typed
    status, text, _ = watched.post("runs/run/try", prompt="the user asks <b>")
    page = Page(text.encode())
    base, adapted = (element.text for element in page.every("div", class_="text"))
    expected = [
        generate(adapter=adapter, model=model, prompt="the user asks <b>", greedy=True, max_new_tokens=128)
        for adapter in (None, finished / "adapter")
    ]
    assert status == 200 and [base, adapted] == expected and base != adapted
    assert "&lt;b&gt;" in text and "backhand generate" in page.one("pre").text
    record = finished / "adapter" / "backhand.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"bare": True}))  # as after training on texts
    _, text, _ = watched.post("runs/run/try", prompt="the user asks")
    asked = {"model": model, "prompt": "the user asks", "greedy": True, "max_new_tokens": 128}
    (_, adapted) = (element.text for element in Page(text.encode()).every("div", class_="text"))
    assert adapted == generate(adapter=finished / "adapter", chat_template="none", **asked)
    assert adapted != generate(adapter=finished / "adapter", chat_template="default", **asked)
    shutil.rmtree(finished / "adapter")
    shutil.rmtree(finished / "checkpoints")
    for prompt, message in (("  ", "the prompt is empty"), ("x", "there is no checkpoint yet")):
        status, text, _ = watched.post("runs/run/try", prompt=prompt)
        assert status == 409 and message in text


def test_decisions_and_labels_have_probabilities(
    watched: Client, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], str]] = []
    answers: dict[str, Any] = {
        "team": {"type": "choice", "choice": "<b>", "probabilities": {"<b>": 0.75, "sales": 0.25}, "confidence": 0.5},
        "urgent": {"type": "noul", "noul": 0.9},
    }

    async def checked(_: Commands, words: list[str], __: object, *, text: str = "") -> Outcome:
        asked.append((words, text))
        return Outcome(
            0, json.dumps({"answers": answers}), "noise\nnote: <i>the run stopped early; --rank 3, or --system X\n"
        )

    monkeypatch.setattr(Commands, "checked", checked)
    config = (finished / "config.toml").read_text()
    (finished / "config.toml").write_text(config.replace('objective = "sft"', 'objective = "decide"'))
    _, text, _ = watched.post("runs/run/try", prompt="--state")
    cells = [[cell.text for cell in row.children if cell.text] for row in Page(text.encode()).every("tr")]
    assert cells == [["<b>", "75.0%"], ["sales", "25.0%"], ["yes", "90.0%"]]
    assert "One of the options is always chosen" in text and "noise" not in text
    assert "&lt;i&gt;the run stopped early; “rank” (3) under More options, or “system” (in a terminal) X" in text
    words, rows = asked[0]
    assert words[0] == "decide" and words[-2:] == ["--data=-", "--state=state"] and rows == '{"state": "--state"}\n'
    assert "it decides nothing" not in text
    summary = (finished / "summary.json").read_text()
    shares = ("accuracy", "majority", "f1_macro", "nll", "brier", "ece", "temperature")
    figures: dict[str, Any] = dict.fromkeys(shares, 0.5)
    figures |= {name: [] for name in ("reliability", "coverage", "thresholds", "surprises")}
    figures |= {"rows": 4, "ece_interval": [0.0, 1.0], "confusion": {}}
    decisions = {name: {**figures, "constant": name == "team"} for name in answers}
    (finished / "summary.json").write_text(json.dumps(json.loads(summary) | {"adapted_decisions": decisions}))
    _, text, _ = watched.post("runs/run/try", prompt="a")
    assert text.count("it decides nothing") == 1
    (finished / "summary.json").write_text(summary)
    (finished / "config.toml").write_text(config)
    answers = {side: {"completion": "x", "finish_reason": "length"} for side in ("base", "adapted")}
    monkeypatch.setattr(Outcome, "json", lambda _: answers)
    _, text, _ = watched.post("runs/run/try", prompt="a")
    assert text.count("cut off: this page asks for at most 128 tokens") == 2 and "--quiet" not in asked[-1][0]
    assert "the run stopped early" in text
    answers = {
        side: {"completion": "x", "probability": 0.6, "probabilities": {"x": 0.6}} for side in ("base", "adapted")
    }
    monkeypatch.setattr(Outcome, "json", lambda _: answers)
    _, text, _ = watched.post("runs/run/try", prompt="a")
    assert [cell.text for cell in Page(text.encode()).every("td", class_="number")] == ["60.0%", "60.0%"]
    assert "One of the labels is always chosen" in text


@pytest.mark.parametrize(
    ("answer", "cells"),
    [
        ({"label": "<b>", "score": 0.75, "scores": {"<b>": 0.75, "sales": 0.25}}, ["<b>", "75.0%", "sales", "25.0%"]),
        ({"labels": ["a"], "scores": {"a": 0.75, "b": 0.25}}, ["a given", "75.0%", "b", "25.0%"]),
        ({"value": 2.5}, []),
    ],
)
def test_the_head_of_a_run_with_labels_answers(
    answer: dict[str, Any], cells: list[str], watched: Client, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], str]] = []

    async def checked(_: Commands, words: list[str], __: object, *, text: str = "") -> Outcome:
        asked.append((words, text))
        return Outcome(0, json.dumps(answer) + "\n", "")

    monkeypatch.setattr(Commands, "checked", checked)
    set_objective(finished, "classify")
    assert "Classify" in [button.text for button in shown(watched).every("button")]
    _, text, _ = watched.post("runs/run/try", prompt="--text")
    page = Page(text.encode())
    assert [cell.text for row in page.every("tr") for cell in row.children if cell.text] == cells
    assert ("One of the labels is always chosen" in text) is ("label" in answer)
    assert ("A label is given if its probability is above 50%." in text) is ("labels" in answer)
    assert ("not calibrated" in text) is bool(cells)
    assert cells or "2.5" in page.one("div", class_="text").text
    assert ("How far it may be off is not known" in text) is (not cells)
    scores = {"base_classes": {"mse": 16.0, "rows": 12}, "adapted_classes": {"mse": 4.0, "rows": 12}}
    summary = json.loads((finished / "summary.json").read_text())
    (finished / "summary.json").write_text(json.dumps(summary | (scores if not cells else {})))
    _, text, _ = watched.post("runs/run/try", prompt="--text")
    assert ("On 12 held-out rows, such numbers were off by about 2 " in text and "was off by 4." in text) is (not cells)
    words, rows = asked[0]
    assert words[0] == "classify" and words[-2:] == ["--data=-", "--prompt=text"] and rows == '{"text": "--text"}\n'


def test_there_is_no_box_for_prompts_before_the_first_checkpoint(watched: Client, finished: Path) -> None:
    assert shown(watched).every("section", id="try")
    for name in ("adapter", "checkpoints"):
        shutil.rmtree(finished / name, ignore_errors=True)
    assert not shown(watched).every("section", id="try")


def test_rankings_have_no_box_for_prompts(watched: Client, finished: Path) -> None:
    set_objective(finished, "rank")
    assert not shown(watched).every("section", id="try")


def test_vectors_of_two_texts_are_compared(watched: Client, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], str]] = []

    async def checked(_: Commands, words: list[str], __: object, *, text: str = "") -> Outcome:
        asked.append((words, text))
        return Outcome(0, '{"embedding": [0.6, 0.8]}\n{"embedding": [1.0, 0.0]}\n', "")

    monkeypatch.setattr(Commands, "checked", checked)
    set_objective(finished, "embed")
    assert "Compare" in [button.text for button in shown(watched).every("button")]
    assert watched.post("runs/run/try", prompt="a shoe", other=" ")[0] == 409 and not asked
    _, text, _ = watched.post("runs/run/try", prompt="a shoe", other="<b>")
    assert Page(text.encode()).one("div", class_="text").text == "0.6"
    words, rows = asked[0]
    assert words[0] == "embed" and words[-2:] == ["--data=-", "--prompt=text"]
    assert rows == '{"text": "a shoe"}\n{"text": "<b>"}\n'


def test_only_exports_that_a_program_uses_are_offered(client: Client, space: Workspace, finished: Path) -> None:
    run = finished.rename(space.run("run"))

    def offered(objective: str) -> list[str | None]:
        set_objective(run, objective)
        options = shown(client).one("select", id="to").all()
        return [option.attributes["value"] for option in options if option.tag == "option"]

    assert offered("decide") == ["peft", "decision"] and offered("embed") == ["peft", "vectors", "merged"]
    assert offered("sft") == ["peft", "gguf", "merged", "ollama"] and offered("rank") == ["peft"]
    for objective, vllm in (("sft", True), ("decide", False), ("embed", False)):
        set_objective(run, objective)
        first = next(option for option in shown(client).one("select", id="to").all() if option.tag == "option")
        assert first.text == f"PEFT adapter, also for transformers{' and vLLM' if vllm else ''} (zip)"


def set_objective(run: Path, objective: str) -> None:
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(re.sub(r'(?m)^objective = "\w+"', f'objective = "{objective}"', config))


def model_of(run: Path) -> str:
    import tomllib

    return str(tomllib.loads((run / "config.toml").read_text())["model"]["model"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["watch", "absent"], "no run in absent"), (["watch", "run", "--port", "70000"], "above 65535")],
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
