"""From a table to a downloaded adapter, which has the bits of the command that the page shows."""

from __future__ import annotations

import asyncio
import html
import io
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from backhand.cli.main import main
from backhand.data.label_names import integers_note
from backhand.errors import DataError, UsageError
from backhand.nn.loading.stores import MINILM, SMOLLM2
from backhand.report.run_record import read_run
from backhand.studio import commands, draft, named_model, queue
from backhand.studio.commands import Commands, Outcome
from backhand.studio.draft import MORE, Draft, more_for, on_page
from backhand.studio.first_rows import first_rows
from backhand.studio.runs import STATES, Progress, all_runs, run_of
from backhand.studio.workspace import Workspace
from backhand.system import process_start
from tests.support.page import Page
from tests.support.poison import ATTACKS
from tests.support.studio_client import Client, until
from tests.support.tiny_run import TinyRun

TABLE = b"question,answer\n" + b"".join(b"the user asks for %d names,a list of %d\n" % (n, n % 3) for n in range(12))


def part(text: str) -> Page:
    return Page(text.encode())


def test_a_table_becomes_an_adapter(client: Client, space: Workspace, tiny: TinyRun, tmp_path: Path) -> None:
    assert client.post("upload?name=faq.csv", body=TABLE)[0] == 200
    draft = {"typed_model": str(tiny.model), "data": "rows-1.csv"}
    _, text, _ = client.get(f"part/rows?{urlencode(draft)}")
    assert [cell.text for cell in part(text).every("th")] == ["question", "answer"]
    draft |= {"objective": "sft", "prompt": "question", "completion": "answer", "eval_fraction": "0.25"}
    draft |= {"more.rank": "3", "more.dtype": "float32", "more.answers": "0", "more.max_steps": "2"}
    status, text, _ = client.post("start", name="My FAQ", **draft | {"more.target_modules": "q_proj, v_prj"})
    assert status == 409 and "did you mean" in text and not space.taken("My FAQ")
    draft["more.target_modules"] = "q_proj, v_proj"
    _, text, _ = client.get(f"new/start?{urlencode(draft)}")
    assert "What to learn: Answers (question, answer)" in part(text).one("main").text
    shown = next(pre.text for pre in part(text).every("pre") if pre.text.startswith("backhand train"))
    status, _, headers = client.post("start", name="My FAQ", **draft)
    assert status == 303 and headers["location"].endswith("/runs/My%20FAQ")
    until(lambda: run_of(space, "My FAQ").state == "finished")
    (settings,) = re.findall(r'href="[^"]*(new/start\?[^"]*)"', client.get("runs/My%20FAQ")[1])
    assert shown in html.unescape(client.get(html.unescape(settings))[1])
    words = [word.replace(str(space.run("NAME")), str(tmp_path / "typed")) for word in shlex.split(shown)[1:]]
    assert main(words) == 0
    _, text, _ = client.post("runs/My%20FAQ/export", to="peft")
    address = html.unescape(re.findall(r'href="([^"]*download[^"]*)"', text)[0])
    status, data, headers = client.ask_bytes(address)
    assert status == 200 and headers["content-disposition"].startswith("attachment")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        exported = archive.read("adapter_model.safetensors")
    assert exported == (tmp_path / "typed" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_rows_are_shown_as_the_model_reads_them(client: Client, tiny: TinyRun) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    draft = {"typed_model": str(tiny.model), "data": "rows-1.csv", "objective": "sft", "eval_fraction": "0.25"}
    draft |= {"prompt": "question", "completion": "answer"}
    _, text, _ = client.get(f"part/lint?{urlencode(draft)}")
    tokens = part(text).every("span", class_="on")
    assert "9 training documents" in text and "a list of" in "".join(token.text for token in tokens)
    status, text, _ = client.get(f"part/lint?{urlencode(draft | {'prompt': 'nothing'})}")
    assert status == 409 and "there is no column &#39;nothing&#39;" in text and "next:" in text


def test_problems_of_rows_are_under_the_name_of_the_uploaded_file(client: Client, tiny: TinyRun) -> None:
    client.post("upload?name=Orders%202026.csv", body=b"text;label\nf\xfcr;a\nf\xe4r;b\n" + b"list;a\none;b\n" * 4)
    draft = {"typed_model": str(tiny.model), "data": "rows-1.csv", "objective": "classify"}
    _, text, _ = client.get(f"part/lint?{urlencode(draft)}")
    page = part(text)
    finding = page.every("div", class_="finding")[0]
    assert finding.text.count("iconv") == 1 and "Orders 2026.csv:2, Orders 2026.csv:3: this line" in finding.text
    assert "Documents per answer: a 4, b 4." in text
    assert "error: Orders 2026.csv:2: training would stop" in text and "Leave out the 2 bad rows" in text
    (again,) = (link for link in page.every("a") if link.text == "upload it again")
    assert str(again.attributes["href"]).endswith(
        f"new/rows?{urlencode({k: v for k, v in draft.items() if k != 'data'})}"
    )
    rows = b"text;label;note\n" + b"f\xfcr;a;\nf\xe4r;b;\n" * 5 + b"one;a;\nlist;b;\n" * 2
    client.post("upload?name=o.csv", body=rows)
    query = urlencode(draft | {"data": "rows-2.csv", "prompt": "text", "completion": "label"})
    text = client.get(f"part/lint?{query}")[1]
    assert "Most rows lack a value" not in text and "Leave out" not in text
    error = part(text).one("pre", class_="error").text
    assert "training would stop" in error and "save it as CSV UTF-8" in error and "skip bad" not in error
    query = urlencode(draft | {"more.skip_bad": "True"})
    findings = [one.text for one in part(client.get(f"part/lint?{query}")[1]).every("div", class_="finding")]
    (left_out,) = (text for text in findings if "this line is not UTF-8" in text)
    assert "next: nothing, since these rows are left out; to train on them, correct them" in left_out


def test_a_run_is_stopped_continued_and_tried_again(
    client: Client, space: Workspace, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished.rename(space.run("one"))
    started: dict[str, list[str]] = {}
    monkeypatch.setattr(queue, "enqueue", lambda _, name, words, form="": started.setdefault(name, words))
    status = (space.run("one") / "status.json").read_text()
    reason = '"reason": "stopped; continue with backhand train --resume --output one"'
    status = status.replace('"finished"', '"interrupted"').replace('"reason": ""', reason)
    (space.run("one") / "status.json").write_text(status)
    result = part(client.get("runs/one")[1]).one("div", id="live-result").text
    assert "Interrupted: stopped; choose “Continue the run”." in result
    assert client.post("runs/one/resume")[0] == 303
    assert started.pop("one") == ["train", "--resume", f"--output={space.run('one')}"]
    summary = space.run("one") / "summary.json"
    before = summary.read_text()
    for options, allowed in (("--learning-rate 0.01", True), ("--reward x.py:f", False), ("--rank 3; reboot", False)):
        suggested = f"backhand train config.toml {options} --output runs/again"
        summary.write_text(re.sub(r'"try_next": [^,\n]*', f'"try_next": "{suggested}"', before))
        status_code, text, _ = client.post("runs/one/again")
        assert status_code == (303 if allowed else 409) and (allowed or "copy the command" in text)
    assert list(started.values()) == [
        ["train", str(space.run("one") / "config.toml"), "--learning-rate=0.01", f"--output={space.run('one-2')}"]
    ]
    job = {
        "words": ["train"],
        "form": "data=rows-1.csv&objective=sft",
        "process": 1,
        "process_start": "x",
        "exit_code": 0,
    }
    space.job_file("one").write_text(json.dumps(job))
    summary.write_text(
        re.sub(r'"try_next": [^,\n]*', '"try_next": "backhand train c --learning-rate 0.01 --output o"', before)
    )
    address = client.post("runs/one/again")[2]["location"]
    assert address.endswith("/new/start?data=rows-1.csv&objective=sft&more.learning_rate=0.01")
    job["form"] += "&more.learning_rate=1e-5"
    space.job_file("one").write_text(json.dumps(job))
    other = "backhand train --model m --objective orpo --output o"
    summary.write_text(re.sub(r'"try_next": [^,\n]*', f'"try_next": "{other}"', before))
    assert "Try again with the suggested change" in client.get("runs/one")[1]
    address = client.post("runs/one/again")[2]["location"]
    assert address.endswith("/new/start?data=rows-1.csv&objective=orpo")
    assert client.post("runs/one/stop")[0] == 409  # it does not train


def test_rows_of_a_stopped_run_are_not_lost_silently_and_can_be_given_again(
    client: Client, space: Workspace, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    finished.rename(space.run("one"))
    config, status = space.run("one") / "config.toml", space.run("one") / "status.json"
    rows = f"data = {json.dumps([str(space.rows / 'rows-1.csv')])}\nprompt = '{{question}} ({{group}})'"
    config.write_text(re.sub(r"(?m)^data = .*", rows, config.read_text()))
    status.write_text(status.read_text().replace('"finished"', '"interrupted"'))
    code, text, _ = client.post("delete-rows", data="rows-1.csv")
    assert code == 409 and "one can be continued, and needs these rows" in text
    assert client.post("delete-rows", data="rows-1.csv", sure="yes")[0] == 303
    client.post("upload?name=other.csv", body=b"a,b\n1,2\n")
    space.job_file("one").write_text('{"words": ["train"], "form": "data=rows-1.csv&objective=sft", "exit_code": 0}')
    started: list[tuple[list[str], str]] = []
    monkeypatch.setattr(queue, "enqueue", lambda _, name, words, form="": started.append((words, form)))
    page = part(client.get("runs/one")[1])
    assert "The rows of this run were deleted (rows-1.csv)" in page.one("div", id="state").text
    assert "this was the text {question} ({group}), with the columns in" in page.one("p", id="trained-on").text
    code, text, _ = client.post("runs/one/resume")
    assert code == 409 and "rows of this run were deleted" in text and "did you mean" not in text and not started
    client.post("upload?name=faq.csv", body=TABLE)
    assert client.post("runs/one/resume", data="rows-3.csv")[0] == 303
    words = ["train", "--resume", f"--output={space.run('one')}", f"--data={space.rows / 'rows-3.csv'}"]
    assert started == [(words, "data=rows-3.csv&objective=sft")]


def test_the_error_of_a_continuation_is_shown_at_its_button(client: Client, space: Workspace, finished: Path) -> None:
    finished.rename(space.run("one"))
    status = space.run("one") / "status.json"
    status.write_text(status.read_text().replace('"finished"', '"interrupted"'))
    space.job_file("one").write_text('{"words": ["train", "--resume"], "process": 1, "exit_code": 3}')
    space.log_file("one").write_text("reading\nerror: the rows have changed\n  next: give the same ones\n")
    state = part(client.get("runs/one")[1]).one("div", id="state")
    assert "did not start again" in state.text and "error: the rows have changed" in state.text
    assert "reading" not in state.text and "Continue the run" in state.text


def test_the_list_has_every_state(
    client: Client, space: Workspace, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "start_worker", lambda _: None)  # the list would start the run that waits
    finished.rename(space.run("done"))
    (space.queue / "000001-later.json").write_text('{"words": ["train"]}')
    space.job_file("wrong").write_text('{"words": ["train"], "process": 1, "process_start": "x", "exit_code": 2}')
    space.log_file("wrong").write_text("error: <b>no data</b>")
    for odd in ("rows.v2", "-x", ".hidden"):
        space.run("x").with_name(odd).mkdir()
    space.job_file("rows.v2").write_text('{"words": ["train"]}')
    assert {run.name: run.state for run in all_runs(space)} == {
        "later": "waiting",
        "done": "finished",
        "wrong": "not started",
    }
    assert client.get("")[0] == 200 and "waits in the queue, number 1" in client.get("")[1]
    _, text, _ = client.get("runs/wrong")
    assert STATES["not started"] in text and "&lt;b&gt;no data" in text and "Start it again" in text
    assert client.post("runs/done/restart")[0] == 409
    assert client.post("runs/later/stop")[0] == 303 and not queue.waiting(space)
    page = part(client.get("")[1])
    assert "was cancelled before it started" in page.one("div", id="runs").text
    assert "Start it again" in client.get("runs/later")[1]
    assert client.post("runs/later/delete", sure="yes")[0] == 303 and "later" not in client.get("")[1]


def test_a_cancelled_continuation_leaves_the_run_as_it_was(space: Workspace, finished: Path) -> None:
    finished.rename(space.run("one"))
    (space.queue / "000001-one.json").write_text('{"words": ["train", "--resume"]}')
    assert queue.cancel(space, "one") and run_of(space, "one").state == "finished"


def test_the_list_has_the_result_of_each_run(client: Client, space: Workspace, finished: Path) -> None:
    finished.rename(space.run("one"))
    (_, first), *later = read_run(space.run("one")).held_out_losses()
    best = min(loss for _, loss in later)
    sentences = [one.text for one in part(client.get("")[1]).one("article", class_="run").children if one.tag == "p"]
    (sentence,) = (one for one in sentences if one.startswith("Held-out loss"))
    assert f" {first:.1f} → {best:.3f} nats per token (" in sentence and sentence.endswith("): it helped.")


def test_a_run_is_finished_while_its_process_writes_the_report(
    client: Client, space: Workspace, finished: Path
) -> None:
    run = space.run("one")
    finished.rename(run)
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"process": os.getpid()}))
    job = {"words": ["train"], "process": os.getpid(), "process_start": process_start(os.getpid())}
    space.job_file("one").write_text(json.dumps(job))
    assert run_of(space, "one").state == "finished"
    assert client.post("runs/one/rename", new="two")[0] == 409 and run.exists()
    # A process that this start launched may write the status. That of an earlier start says nothing.
    for launcher, state in ((job["process_start"], "finished"), ("earlier", "starting")):
        other = {"process": os.getppid(), "launcher_start": launcher}
        (run / "status.json").write_text(json.dumps(status | other))
        assert run_of(space, "one").state == state
        shown = [part(client.get(place)[1]).one("main").text for place in ("runs/one", "")]
        assert ["it helped" in text for text in shown] == [state == "finished"] * 2
    for name in ("status", "summary"):  # as before the first step of the first start
        (run / f"{name}.json").unlink()
    text = part(client.get("runs/one")[1]).one("main").text
    assert "is being prepared" in text and "until its process was killed" not in text


def test_the_time_left_is_that_of_the_last_steps_also_after_an_evaluation(
    client: Client, space: Workspace, finished: Path
) -> None:
    run = space.run("one")
    finished.rename(run)
    status = json.loads((run / "status.json").read_text())
    at_work = {"state": "running", "process": os.getpid(), "process_start": process_start(os.getpid())}
    (run / "status.json").write_text(json.dumps(status | at_work | {"step": 80, "total_steps": 140}))
    seconds = [10 * step if step <= 80 else 800 + step - 80 for step in range(1, 101)]  # slow steps, then fast ones
    lines = [{"step": step, "loss": 1.0, "time_s": time_s} for step, time_s in enumerate(seconds, 1)]
    evaluation = {"step": 100, "eval_loss": 1.0, "rows": [0.123456] * 30_000}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, evaluation]))
    assert run_of(space, "one").progress == Progress(100, 140, "40 s")
    log = "step 98/140  loss 1.0  eval 1.1 @ step 80  3 min 2 s left\nstep 99/140  loss 1.0  2 min 59 s left\nsaved\n"
    space.log_file("one").write_text(log)
    assert run_of(space, "one").progress == Progress(100, 140, "40 s"), "another process than that of the log trains"
    job = {"words": ["train"], "process": os.getpid(), "process_start": process_start(os.getpid())}
    space.job_file("one").write_text(json.dumps(job))
    assert run_of(space, "one").progress == Progress(100, 140, "2 min 59 s", of_steps=False)
    assert "about 2 min 59 s left<" in client.get("runs/one")[1]


def test_a_comparison_of_no_runs_says_where_to_mark_them(client: Client) -> None:
    status, page = client.get("compare")[:2]
    assert status == 409 and "no run is marked" in page and "mark two runs or more" in page


def test_only_the_process_of_the_run_on_this_machine_is_stopped(
    client: Client, space: Workspace, finished: Path
) -> None:
    run = space.run("one")
    finished.rename(run)
    status = json.loads((run / "status.json").read_text())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        at_work = status | {"state": "running", "process": process.pid, "process_start": process_start(process.pid)}
        for other, why in (({"host": "elsewhere"}, "trains on elsewhere"), ({"process_start": "x"}, "does not train")):
            (run / "status.json").write_text(json.dumps(at_work | other))
            code, text, _ = client.post("runs/one/stop")
            assert code == 409 and why in text and process.poll() is None
        (run / "status.json").write_text(json.dumps(at_work))
        assert client.post("runs/one/stop")[0] == 303 and process.wait(60) != 0


def test_an_export_keeps_those_of_other_formats(
    client: Client, space: Workspace, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished.rename(space.run("one"))

    async def export(_: Commands, words: list[str], *__: object) -> Outcome:
        output = Path(words[-1].partition("=")[2])
        if output.suffix == ".gguf":
            output.touch(exist_ok=False)
        else:
            output.mkdir()
        return Outcome(0, "", "")

    monkeypatch.setattr(Commands, "checked", export)
    for kind in ("peft", "gguf", "peft", "gguf"):
        assert client.post("runs/one/export", to=kind)[0] == 200
    assert {path.name for path in (space.exports / "one").iterdir() if path.is_file()} == {
        "one-peft.zip",
        "one-gguf.gguf",
    }
    links = [link.text for link in part(client.get("runs/one")[1]).every("a") if "download" in link.attributes]
    assert links == ["one-gguf.gguf", "one-peft.zip"]


def test_the_options_on_the_screen_are_those_of_the_start(client: Client) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    draft = {"data": "rows-1.csv", "objective": "sft", "eval_fraction": "20 %", "more.learning_rate": "0,001"}
    page = part(client.get(f"new/start?{urlencode(draft)}")[1])
    (form,) = (form for form in page.every("form") if form.attributes["action"].endswith("/start"))
    fields = {field.attributes.get("name") for field in form.all() if field.tag in ("input", "select")}
    assert {"name", "data", "objective", "eval_fraction", "more.max_steps", "more.learning_rate"} <= fields
    (shown,) = (pre.text for pre in page.every("pre") if pre.text.startswith("backhand train"))
    assert "--eval-fraction=0.2 " in shown and "--learning-rate=0.001 " in shown and "faq.csv" in page.one("main").text
    for wrong in ({"eval_fraction": "a fifth"}, {"more.epochs": "twelve"}, {"more.epochs": "1,000"}):
        status, text, _ = client.get(f"new/start?{urlencode(draft | wrong)}")
        assert status == 409 and re.search("is not a (whole )?number", text) and "part/lint" not in text


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("more.epochs", "drei", "epochs is not a whole number: drei: write it in digits, such as 12"),
        ("more.max_steps", "24,5", "max steps is not a whole number: 24,5: write it in digits, such as 12"),
        ("more.rank", "0", "rank 0 is not an integer of at least 1: write one such as 12"),
        ("more.average_share", "60", "average share is a share of 1, and 60 is more: write 60% or 0.6"),
    ],
)
def test_a_wrong_option_is_shown_next_to_its_field_and_the_others_stay(
    field: str, value: str, told: str, client: Client
) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    draft = {"data": "rows-1.csv", "objective": "sft", "more.system": "be brief", field: value}
    status, text, _ = client.get(f"new/start?{urlencode(draft)}")
    page = part(text)
    assert status == 409 and page.one("span", id=f"{field}-error").text == told
    fields = {one.attributes.get("name"): one.attributes.get("value") for one in page.every("input")}
    assert (fields["more.system"], fields[field]) == ("be brief", value)
    (start,) = (one for one in page.every("button") if "data-after" in one.attributes)
    (why,) = (one for one in page.every("p") if "data-why" in one.attributes)
    assert "disabled" in start.attributes and told in why.text and "part/plan" not in text


@pytest.mark.parametrize(
    ("place", "fields", "title", "told"),
    [
        ("new/learn", {"eval_fraction": "20"}, "What shall it learn?", "20 is more: write 20% or 0.2"),
        ("new/start", {"eval_fraction": "abc"}, "What shall it learn?", "in digits, such as 20% or 0.2"),
        ("new/start", {"data": "rows-9.csv"}, "From which rows shall it learn?", "no such file of rows any more"),
        (
            "new/learn",
            {"typed_data": "/etc/x.csv"},
            "From which rows shall it learn?",
            "folder that this page may read",
        ),
        ("new/rows", {"typed_model": "/etc/model"}, "Which model shall learn?", "folder that this page may read"),
    ],
)
def test_a_wrong_field_is_shown_at_its_step(
    place: str, fields: dict[str, str], title: str, told: str, client: Client
) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    draft = {"data": "rows-1.csv", "objective": "sft", "prompt": "question", "completion": "answer"} | fields
    _, text, _ = client.get(f"{place}?{urlencode(draft)}")
    assert title in text and told in html.unescape(text) and "lint" not in text and "To the list" not in text
    if "eval_fraction" in fields:
        page = part(client.get(f"part/rows?{urlencode(draft)}")[1])
        assert told in page.one("span", id="eval_fraction-error").text
        assert page.one("input", id="eval_fraction").attributes["value"] == fields["eval_fraction"]
    status, text, _ = client.get(f"part/lint?{urlencode(draft)}", X_Part="1")
    assert status == 409 and "Change it at the step" in text


def test_a_misspelt_model_is_shown_next_to_its_field(
    client: Client, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny.model.parent / "small.gguf").touch()
    near = {"smolm2-135m": SMOLLM2, "sentence-transformers/all-MiniLM-L6-v3": MINILM}
    for typed, meant in (near | {f"{tiny.model.parent}/smal.gguf": f"{tiny.model.parent}/small.gguf"}).items():
        assert f"did you mean {meant}" in str(named_model.facts_of(typed)["error"]["next_step"])
    assert named_model.facts_of(str(tiny.model)) == {"error": {}, "answers": True}
    status, text, _ = client.get("new/rows?typed_model=smolm2-135m")
    error = part(text).one("span", id="typed_model-error").text
    assert status == 409 and error.startswith(f"there is no model smolm2-135m: did you mean {SMOLLM2}?")
    assert "backhand models" not in error and part(text).one("input", id="typed_model").attributes["value"]
    client.post("upload?name=faq.csv", body=TABLE)
    for step in ("lint", "plan"):
        named = "typed_model=smolm2-135m&data=rows-1.csv&objective=sft"
        _, text, _ = client.get(f"part/{step}?{named}", X_Part="1")
        assert part(text).one("a").attributes["href"].startswith(f"{client.address.root}/new?")
    monkeypatch.setattr("backhand.studio.commands.Commands.run", None)  # with a network, no process is started
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert client.get("new/rows?typed_model=owner/model")[0] == 200


def test_options_of_the_adapter_that_the_page_once_left_out_are_fields(space: Workspace) -> None:
    (space.rows / "rows-1.csv").write_bytes(TABLE)
    given = {"layers": "last:2", "average_share": "0.5", "lora_bias": "True", "modules_to_save": "lm_head"}
    given |= {"cache_frozen": "off", "max_steps": "1000"}
    assert {*given} <= {field.name for fields in more_for("sft").values() for field in fields}
    (error,) = Draft({"objective": "grpo", "reward_length": "0"}).errors().values()
    assert error.startswith("the length of answers 0 is not an integer of at least 1")
    typed = {f"more.{name}": value for name, value in (given | {"max_steps": "1e3"}).items()}
    words = Draft({"data": "rows-1.csv", **typed}).run_words(space, [])
    assert {f"--{name.replace('_', '-')}={value}" for name, value in given.items()} <= {*words}


@pytest.mark.parametrize(
    ("objective", "used"),
    [
        ("sft", set()),
        ("dpo", {"beta", "loss_type", "label_smoothing"}),
        ("orpo", {"beta"}),
        ("simpo", {"beta", "label_smoothing"}),
        ("kto", {"beta", "loss_type"}),
        ("decide", {"label_smoothing"}),
        ("embed", {"pooling", "query_prompt", "document_prompt"}),
        ("rank", {"ranking_loss"}),
        ("classify", {"problem_type"}),
        ("grpo", {"beta"}),
        ("bake", set()),
    ],
)
def test_only_options_that_the_objective_uses_are_shown_and_given(
    objective: str, used: set[str], space: Workspace
) -> None:
    (space.rows / "rows-1.csv").write_bytes(TABLE)
    given = {"beta": "0.3", "loss_type": "robust", "label_smoothing": "0.1", "pooling": "mean"}
    given |= {"query_prompt": "q", "document_prompt": "d", "problem_type": "regression", "ranking_loss": "listnet"}
    fields = {"data": "rows-1.csv", "objective": objective, **{f"more.{name}": value for name, value in given.items()}}
    assert {field.name for field in more_for(objective).get("objective", ())} == used
    fields |= {"reward_exact": "yes", "context": space.save_context("be brief")}
    words = Draft(fields).run_words(space, [])
    assert {name for name in given if any(word.startswith(f"--{name.replace('_', '-')}=") for word in words)} == used
    checked = {"problem_type", "ranking_loss"} & used
    assert {f"--{name.replace('_', '-')}={given[name]}" for name in checked} <= {*Draft(fields).lint_words(space, [])}


def test_models_of_packages_and_of_the_list_are_known_after_a_restart(
    client: Client, space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert draft.PACKAGED == (SMOLLM2, MINILM)
    assert Draft({"model": MINILM}).model_words(space, []) == [f"--model={MINILM}"]
    client.post("upload?name=faq.csv", body=TABLE)
    started: list[list[str]] = []
    monkeypatch.setattr(queue, "enqueue", lambda _, name, words, form="": started.append(words))
    model = str(tmp_path / "elsewhere" / "model.gguf")

    async def listed(*_: object, **__: object) -> Outcome:
        return Outcome(0, json.dumps([{"name": model}]), "")

    monkeypatch.setattr(Commands, "checked", listed)
    assert client.post("start", name="x", model=model, data="rows-1.csv", objective="sft")[0] == 303
    assert f"--model={model}" in started[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("objective=sft&prompt=question&completion=answer", ["--prompt=question", "--completion=answer"]),
        (
            "objective=dpo&prompt=question&chosen=good&rejected=bad",
            ["--prompt=question", "--columns=chosen=good", "--columns=rejected=bad", "--objective=dpo"],
        ),
        ("objective=kto&prompt=q&completion=a&label=fine", ["--prompt=q", "--completion=a", "--columns=label=fine"]),
        ("objective=embed&prompt=q&negative=n", ["--prompt=q", "--columns=negative=n"]),
        (
            "objective=embed&prompt=a&completion=b&score=s",
            ["--columns=sentence1=a", "--columns=sentence2=b", "--columns=score=s"],
        ),
        ("objective=rank&prompt=q&completion=d&score=s", ["--prompt=q", "--completion=d", "--columns=score=s"]),
        ("objective=classify&prompt=text&completion=label", ["--prompt=text", "--completion=label"]),
        (
            "objective=grpo&prompt=q&answer=a&reward_exact=yes&reward_length=40&reward_regex=^a",
            ["--columns=answer=a", "--objective=grpo", "--reward=exact", "--reward=length:40", "--reward=regex:^a"],
        ),
    ],
)
def test_columns_of_every_objective_are_named(fields: str, words: list[str], client: Client, space: Workspace) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    assert words == [
        word for word in Draft.of(parse_qsl(f"data=rows-1.csv&{fields}")).run_words(space, []) if word in words
    ]
    page = part(client.get(f"part/rows?data=rows-1.csv&{fields}")[1])
    objective, offered = dict(parse_qsl(fields))["objective"], set()
    for place in page.every("div"):
        if objective in (place.attributes.get("data-if") or "").split():
            offered |= {one.attributes.get("name") for one in place.all()}
    assert {name for name, _ in parse_qsl(fields)} - {"objective"} <= offered
    ids = [one.attributes["id"] for one in page.root.all() if "id" in one.attributes]
    assert len({*ids}) == len(ids)


@pytest.mark.parametrize(
    "fields",
    [
        "objective=dpo&prompt=asked&chosen=good&rejected=bad",
        "objective=kto&prompt=asked&completion=good&label=fine",
        "objective=embed&prompt=asked&completion=good&negative=bad",
        "objective=embed&prompt=good&completion=bad&score=fine",
        "objective=classify&prompt=asked&completion=fine",
        "objective=grpo&prompt=asked&answer=good&reward_exact=yes&reward_number=yes&reward_length=9&reward_regex=^a|b",
        "objective=bake&prompt=asked&context=",
    ],
)
def test_the_command_of_every_objective_can_be_planned(
    fields: str, space: Workspace, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"how {n}?,so {n},not {n},{'yes' if n % 2 else 'no'}\n" for n in range(60))
    (space.rows / "rows-1.csv").write_text(f"asked,good,bad,fine\n{rows}")
    fields = fields.replace("context=", f"context={space.save_context('be brief')}")
    more = {"data": "rows-1.csv", "typed_model": str(tiny.model), "more.dtype": "float32", "more.max_new_tokens": "16"}
    words = Draft.of((dict(parse_qsl(fields)) | more).items()).run_words(space, [])
    assert main(["plan", *words, "--no-calibrate", "--json", "--sample=2000"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] >= 48


def test_rewards_of_the_page_are_checks_and_never_code(client: Client, space: Workspace) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    for fields in ("", "&reward_exact=yes&reward=x.py:f&reward_file=x.py&more.reward=x.py:f&reward_x.py:f=yes"):
        draft = Draft.of(parse_qsl(f"data=rows-1.csv&objective=grpo{fields}"))
        if fields:
            assert [word for word in draft.run_words(space, []) if word.startswith("--reward")] == ["--reward=exact"]
        else:
            with pytest.raises(UsageError, match="no check is chosen"):
                draft.run_words(space, [])
    assert "--prompts" in draft.lint_words(space, [])


def test_a_long_prompt_is_a_file_whatever_it_looks_like(client: Client, space: Workspace) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    secret = space.root.parent / "secret.txt"
    secret.write_text("x")
    status, _, headers = client.post("new/learn", data="rows-1.csv", objective="bake", context_text=str(secret))
    (query,) = re.findall(r"new/learn\?(.*)", headers["location"])
    assert status == 303 and str(secret) not in query and "context=context-" in query
    draft = Draft.of(parse_qsl(query))
    (word,) = (word for word in draft.run_words(space, []) if word.startswith("--context="))
    assert Path(word.partition("=")[2]).read_text() == str(secret) and word.startswith(f"--context={space.rows}")
    assert str(secret) in part(client.get(f"part/rows?{query}")[1]).one("textarea").text
    for name in ("../studio.json", "studio.json", str(secret), "context-0000000000000000.txt", "rows-1.csv"):
        with pytest.raises(UsageError, match="no such prompt"):
            space.context(name)
    assert "context-" not in client.get("new/rows")[1]


def test_files_that_are_no_rows_are_marked_and_not_preselected(client: Client) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    client.post("upload?name=letter.csv", body=b"PK\x03\x04" + bytes(26) + b"word/document.xml" + bytes(40))
    status, text, _ = client.get("part/rows?data=rows-2.csv")
    assert status == 409 and "the file is a Word document" in text
    page = part(client.get("new/rows")[1])
    assert [badge.text for badge in page.every("span", class_="badge bad")] == ["could not be read"]
    assert not any("checked" in field.attributes for field in page.every("input"))
    status, text, _ = client.post("upload?name=clauses.xlsx", body=b"PK")
    assert status == 409 and "workbook" in text and "CSV UTF-8" in text


def test_lines_about_current_work_are_progress_and_no_messages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "import sys; print('still at work after 9 s: lint', 'error: no', sep=chr(10), file=sys.stderr, flush=True)"
    monkeypatch.setattr(
        commands, "python_words", lambda *_: [sys.executable, "-c", f"{script}; import time; time.sleep(1.2)"]
    )
    seen: list[str] = []

    async def run() -> Outcome:
        one = Commands(tmp_path)

        async def gone() -> bool:
            seen.append(one.progress.get("w", ""))
            return len(seen) > 100

        working = asyncio.create_task(one.run(["lint"], gone, work="w", text=""))
        outcome = await working
        assert not one.progress
        return outcome

    outcome = asyncio.run(run())
    assert outcome.messages == f"error: no{os.linesep}" and "lint" in seen


def test_a_renamed_run_starts_again_in_its_own_directory(
    client: Client, space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = ["train", "--rank=3", f"--output={space.run('a')}", "--overwrite"]
    space.job_file("a").write_text(json.dumps({"words": stale, "process": 1, "process_start": "x", "exit_code": 2}))
    assert client.post("runs/a/rename", new="b")[0] == 303
    renamed = queue.read_job(space, "b")
    assert renamed is not None and f"--output={space.run('b')}" in renamed.words
    space.run("a").mkdir()
    space.run("b").mkdir()
    started: dict[str, list[str]] = {}
    monkeypatch.setattr(queue, "enqueue", lambda _, name, words, form="": started.setdefault(name, words))
    for words in (renamed.words, stale):  # the second ones are those of an earlier version
        space.job_file("b").write_text(json.dumps({**asdict(renamed), "words": words}))
        assert client.post("runs/b/restart")[0] == 303
        assert started.pop("b") == ["train", "--rank=3", f"--output={space.run('b')}", "--overwrite"]


@pytest.mark.parametrize(
    ("header", "row", "suggested"),
    [
        ("prompt,completion", "{n},b", {"objective": "sft"}),
        ("prompt,chosen,rejected", "{n},b,c", {"objective": "dpo"}),
        ("anchor,positive,negative", "{n},b,c", {"objective": "embed"}),
        ("prompt,completion,label", "{n},b,true", {"objective": "kto"}),
        ("query,document,label", "{n},b,1", {"objective": "rank"}),
        ("query,passage", "{n},b", {"objective": "embed", "prompt": "query", "completion": "passage"}),
        (
            "Prompt,Chosen,Rejected",
            "{n},b,c",
            {"objective": "dpo", "prompt": "Prompt", "chosen": "Chosen", "rejected": "Rejected"},
        ),
        (
            "Anchor,Positive,Negative",
            "{n},b,c",
            {"objective": "embed", "prompt": "Anchor", "completion": "Positive", "negative": "Negative"},
        ),
        (
            "Query,Document,Score",
            "{n},b,1",
            {"objective": "rank", "prompt": "Query", "completion": "Document", "score": "Score"},
        ),
        (
            "Question,Better reply,Worse reply",
            "is {n} bad?,no {n},yes {n}",
            {"objective": "dpo", "prompt": "Question", "chosen": "Better reply", "rejected": "Worse reply"},
        ),
        ("asked;good;bad", "is {n} bad?;no {n};yes {n}", {"objective": "dpo", "chosen": "good", "rejected": "bad"}),
        (
            "id,Title A,Title B,Duplicate",
            "{n},title {n},name of {n},{truth}",
            {"objective": "embed", "prompt": "Title A", "completion": "Title B", "score": "Duplicate"},
        ),
        ("text,label", "the text of {n},{n}.5", {"objective": "classify", "prompt": "text", "completion": "label"}),
        ("Entry;Effort", "the text of {n};{n},5", {"objective": "classify", "prompt": "Entry", "completion": "Effort"}),
        ("text,topics", 'the text of {n},"[""{k}""]"', {"objective": "classify", "completion": "topics"}),
        (
            "title,text,section",
            "title {n},text {n},{k}",
            {"objective": "decide", "state": "{title}\\n{text}", "question": "section"},
        ),
        (
            "Nr.,Case,Ticket text / Beschreibung,Team,",
            "{n},T-{n},the text of {n},{k},",
            {"objective": "decide", "state": "Ticket text / Beschreibung", "question": "Team"},
        ),
        (
            "id,Patient asks,I say",
            "{n},is {n} bad?,no {n}",
            {"objective": "sft", "prompt": "Patient asks", "completion": "I say"},
        ),
        (
            "Asked,Short,Long",
            "is {n} bad?,no {n},yes it is {n}",
            {"objective": "sft", "prompt": "Asked", "completion": None},
        ),
        (
            "Tweet;Mean",
            "the text of {n};{n},{n}85",
            {"objective": "classify", "prompt": "Tweet", "completion": "Mean"},
        ),
        (
            "Speech;By;Party",
            "the text of {n};{k} Smith;{k}",
            {"objective": "decide", "state": "Speech", "question": "Party"},
        ),
        (
            "Headword,Meaning,Group,Comment",
            "word {n},it means {n},{k},{seldom}",
            {"objective": "decide", "state": "{Headword}\\n{Meaning}", "question": "Group"},
        ),
        (
            "Query,Fitting text,Comment",
            "what is {n}?,it is {n},{seldom}",
            {"objective": "embed", "prompt": "Query", "completion": "Fitting text"},
        ),
    ],
)
def test_columns_suggest_what_to_learn(header: str, row: str, suggested: dict[str, str | None], tmp_path: Path) -> None:
    rows = [
        row.format(n=n, k="AB"[n % 2], truth=("yes", "no")[n % 2], seldom=("check", "OED", "", "", "")[n % 5])
        for n in range(20)
    ]
    (tmp_path / "rows.csv").write_text("\n".join([header, *rows]))
    first = first_rows(str(tmp_path / "rows.csv"))
    objective, columns = next(iter(first["suggested"].items()))
    found = {"objective": objective, **columns}
    assert {name: found.get(name) for name in suggested} == suggested and len(first["rows"]) == 5
    assert first["columns"] == re.split("[,;]", header)


@pytest.mark.parametrize("blemish", ["n/a", "unclear"])
def test_numbers_with_a_few_blemishes_are_no_part_of_the_text(blemish: str, tmp_path: Path) -> None:
    rows = [f"{n % 9 - 4},5;the tweet {n};{'down' if n % 9 < 4 else 'up'}" for n in range(60)]
    rows[5] = rows[5].replace("1,5", blemish)
    rows[7] = rows[7].replace("up", "Up")
    rows[11] = rows[11].replace("down", "")
    (tmp_path / "rows.csv").write_text("\n".join(["Mean;Tweet;Verdict", *rows]))
    assert first_rows(str(tmp_path / "rows.csv"))["suggested"]["decide"]["state"] == "Tweet"


def test_the_page_says_that_it_proposes_a_text_of_several_columns(client: Client) -> None:
    rows = "".join(f"word {n};it means {n};{'AB'[n % 2]}\n" for n in range(20))
    client.post("upload?name=words.csv", body=f"Headword;Meaning;Group\n{rows}".encode())
    said = "This text joins several columns"
    assert said in client.get("part/rows?data=rows-1.csv")[1]
    chosen = urlencode({"data": "rows-1.csv", "objective": "decide", "typed_state": "{Headword} {Meaning}"})
    assert said not in client.get(f"part/rows?{chosen}")[1]


def test_a_misspelt_column_in_braces_is_shown_at_its_field(client: Client, tiny: TinyRun) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    draft = {"typed_model": str(tiny.model), "data": "rows-1.csv", "objective": "sft"}
    query = urlencode(draft | {"typed_prompt": "{questoin} {answer}", "completion": "answer"})
    shown = part(client.get(f"part/rows?{query}")[1]).one("span", id="typed_prompt-error").text
    assert shown == "there is no column questoin: write question"
    status, text, _ = client.get(f"part/lint?{query}", X_Part="1")
    assert status == 409 and "Change it at the step" in text and "new/learn?" in text


def test_an_error_of_a_plan_names_no_step_whose_fields_do_not_cause_it(client: Client, tiny: TinyRun) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    draft = {"typed_model": str(tiny.model), "data": "rows-1.csv", "objective": "sft", "more.layers": "last:99"}
    text = client.get(f"part/plan?{urlencode(draft)}", X_Part="1")[1]
    assert "“layers” under More options: last:99 names layers" in text and "at the step" not in text


def test_a_column_with_two_questions_is_refused(client: Client, tiny: TinyRun) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    draft = {"typed_model": str(tiny.model), "data": "rows-1.csv", "objective": "decide", "state": "question"}
    draft |= {"question0": "answer", "question1": "answer", "asked1": "How many?"}
    status, text, _ = client.get(f"part/lint?{urlencode(draft)}", X_Part="1")
    error = part(text).one("pre", class_="error").text
    assert status == 409 and "“Column with the answers”: the column 'answer' is named twice" in error


def test_a_question_without_a_column_of_answers_is_refused_at_its_field(client: Client, tiny: TinyRun) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    draft = {"typed_model": str(tiny.model), "data": "rows-1.csv", "objective": "decide", "state": "question"}
    draft |= {"question0": "answer", "asked1": "How many?"}
    text = client.get(f"new/learn?{urlencode(draft)}")[1]
    assert "the question “How many?” has no answers: choose the column with its answers" in html.unescape(text)
    field = part(client.get(f"part/rows?{urlencode(draft)}", X_Part="1")[1])
    assert [one.text for one in field.every("span", id="asked1-error")] and not field.every("span", id="asked0-error")


def test_rows_with_text_instead_of_a_number_are_left_out_at_once(client: Client, tiny: TinyRun) -> None:
    rows = [f"the user asks {n},{n / 7:.2f}" for n in range(1, 41)]
    rows[4:7] = "the user asks,n/a", "a list,unknown", "is it,"
    client.post("upload?name=faq.csv", body="\n".join(["text,score", *rows]).encode())
    draft = {"typed_model": str(tiny.model), "data": "rows-1.csv", "objective": "classify"}
    draft |= {"prompt": "text", "completion": "score"}
    page = part(client.get(f"part/lint?{urlencode(draft)}", X_Part="1")[1])
    (link,) = (link for link in page.every("a") if link.text == "Leave out the 3 bad rows")
    query = urlsplit(str(link.attributes["href"])).query
    assert {("more.problem_type", "regression"), ("more.skip_bad", "True")} <= {*parse_qsl(query)}
    text = client.get(f"part/lint?{query}", X_Part="1")[1]
    assert "37 rows" in text and not part(text).every("pre", class_="error")


def test_rows_that_cannot_be_read_are_counted_below_the_first_ones(client: Client) -> None:
    client.post("upload?name=faq.csv", body=b"text,label\none,a\ntwo,b\nthree,a,c\nfour,b\n")
    text = client.get("part/rows?data=rows-1.csv", X_Part="1")[1]
    assert "1 row cannot be read, and is not shown above: faq.csv:4: " in text


def test_a_column_of_numbers_of_rows_is_not_counted_as_one_malformed_row(client: Client, tiny: TinyRun) -> None:
    rows = [f"{n + 100},the user asks {n}" for n in range(40)]
    client.post("upload?name=faq.csv", body="\n".join(["Id,text", *rows]).encode())
    draft = {"typed_model": str(tiny.model), "data": "rows-1.csv", "objective": "classify", "prompt": "text"}
    page = part(client.get(f"part/lint?{urlencode(draft | {'completion': 'Id', 'eval_fraction': '0.1'})}")[1])
    error = page.one("pre", class_="error").text
    assert "training would stop: 36 of 36 training rows have a label that no other training row has" in error
    assert "if they are quantities rather than row numbers, give “problem type” (regression)" in error


def test_an_answer_inside_the_text_is_a_warning(client: Client, tiny: TinyRun) -> None:
    rows = [f"the user asks {n},{'ab'[n % 2]}" for n in range(20)]
    client.post("upload?name=faq.csv", body="\n".join(["text,group", *rows]).encode())
    draft = {"typed_model": str(tiny.model), "data": "rows-1.csv", "objective": "decide", "question0": "group"}
    for state, warned in (("{text} {group}", True), ("text", False)):
        page = part(client.get(f"part/lint?{urlencode(draft | {'typed_state': state})}")[1])
        said = [one.text for one in page.every("div", class_="finding") if "The answer group is also in" in one.text]
        assert bool(said) is warned and bool(page.every("p", class_="good")) is not warned
        assert not warned or said[0].endswith("it answers: leave it out of “The text to decide about”")


def test_a_column_that_is_empty_in_most_rows_is_questioned(client: Client, tiny: TinyRun) -> None:
    rows = [f"the user asks {n},{'ab'[n % 2]},{'' if n % 4 else 'checked'}" for n in range(20)]
    client.post("upload?name=faq.csv", body="\n".join(["text,group,comment", *rows]).encode())
    draft = {"typed_model": str(tiny.model), "data": "rows-1.csv", "objective": "classify", "prompt": "text"}
    for column, asked in (("comment", True), ("group", False)):
        text = client.get(f"part/lint?{urlencode(draft | {'completion': column})}")[1]
        assert ("Is the right column chosen above?" in text) is asked
        assert not asked or "text, group.</p>" in text.partition("Leave out the 15 bad rows")[0]
    client.post("upload?name=faq.csv", body="\n".join(["text,group", *(f"asks {n}," for n in range(9))]).encode())
    query = urlencode(draft | {"data": "rows-2.csv", "completion": "group"})
    failure = part(client.get(f"part/lint?{query}", X_Part="1")[1])
    assert [link.text for link in failure.every("a")] == ["Change it at the step “What to learn”", "“Rows”"]


def test_an_encoder_is_offered_what_it_can_learn(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = b"prompt,completion\n" + b"".join(b"is it %d?,it is %d\n" % (n, n) for n in range(9))
    client.post("upload?name=faq.csv", body=rows)
    draft = {"model": MINILM, "data": "rows-1.csv"}
    text = client.get(f"part/lint?{urlencode(draft | {'objective': 'sft'})}", X_Part="1")[1]
    error = part(text).one("pre", class_="error").text
    assert error.startswith("error: the model: this bert model has no language-model head")
    assert "“What to learn” (Vectors for search, Rankings or Labels or a number)" in error
    assert [link.text for link in part(text).every("a")] == ["Change it at the step “Model”", "“What to learn”"]
    assert offered(client, draft) == ["embed", "rank", "classify"]  # also before the models have been listed
    run = Commands.run

    async def listed(commands: Commands, words: list[str], *rest: Any, **more: Any) -> Outcome:
        known = Outcome(0, json.dumps([LISTED | {"name": MINILM, "answers": False, "file_bytes": 1, "fits": True}]), "")
        return known if words[0] == "models" else await run(commands, words, *rest, **more)

    monkeypatch.setattr(Commands, "run", listed)
    client.get("part/models")
    assert offered(client, draft) == ["embed", "rank", "classify"]


def offered(client: Client, draft: dict[str, str]) -> list[str | None]:
    """Return the objectives that are offered for a model. The first one of an encoder is selected."""
    select = part(client.get(f"part/rows?{urlencode(draft)}")[1]).one("select", id="objective")
    options = [one.attributes for one in select.all() if one.tag == "option"]
    assert "selected" in options[0]
    return [one["value"] for one in options]


def test_the_check_reads_what_the_objective_needs(client: Client, tiny: TinyRun) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    draft = {"typed_model": str(tiny.model), "data": "rows-1.csv"}
    for objective, told in (
        ("dpo", "these columns do not fit pairs"),
        ("grpo", "no check is chosen"),
        ("bake", "there is no prompt"),
    ):
        status, text, _ = client.get(f"part/lint?{urlencode(draft | {'objective': objective})}", X_Part="1")
        assert status == 409 and told in text and "“What to learn”" in text
    context = client.post("new/learn", **draft, objective="bake", context_text="be brief")[2]["location"]
    text = client.get(f"part/lint?{context.partition('?')[2]}", X_Part="1")[1]
    assert "12 training documents" in text and "No row is held out" not in text  # the plan knows


def test_files_without_rows_are_no_rows(client: Client) -> None:
    for name, data, told in (
        ("a.csv", b"question,answer\n", "there is no row in the file"),
        ("b.json", b'{"data": [{"question": "q"}]}', "each row must be an object of its own"),
        ("c.csv", b"text~label\na~b\n", "save it again as CSV UTF-8"),
    ):
        upload = client.post(f"upload?name={name}", body=data)[1]
        assert told in client.get(f"part/rows?{urlencode({'data': upload})}", X_Part="1")[1]


def test_both_answers_of_a_pair_are_titled(client: Client, tiny: TinyRun) -> None:
    client.post("upload?name=p.csv", body=b"prompt,chosen,rejected\n" + b"a list of,names of users,other\n" * 4)
    draft = {"typed_model": str(tiny.model), "data": "rows-1.csv", "objective": "dpo"}
    text = client.get(f"part/lint?{urlencode(draft)}")[1]
    titles = [one.text.rpartition(": ")[2] for one in part(text).every("div", class_="asked")]
    assert titles == ["chosen", "rejected", "chosen"] and "more probable than the rejected one" in text


def test_a_report_names_the_uploaded_file(client: Client, space: Workspace, finished: Path) -> None:
    rows = Path(*(config := read_run(finished)).config["data"]["data"])
    client.post("upload?name=my%20faq.csv", body=rows.read_bytes())
    upload = space.rows / "rows-1.csv"
    for file in config.path.rglob("*"):
        if file.suffix in (".toml", ".json", ".jsonl"):
            file.write_text(file.read_text().replace(str(rows), str(upload)))
    assert main(["report", str(finished)]) == 0
    page = Page((finished / "report.html").read_bytes())
    assert "rows of my faq.csv" in page.one("p", class_="lead").text
    assert "my faq.csv, line" in page.one("main").text and "rows-1" not in page.one("section", id="data").text
    finished.rename(space.run("one"))
    assert "rows of my faq.csv" in client.get("runs/one/report")[1]


def test_a_table_whose_first_line_is_a_row_is_refused(tmp_path: Path) -> None:
    lines = ["The first concert of Bach;music", "a battle;history", "a concert;music", "an opera;music"]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match="no names of columns: its first row has 'music'") as refused:
        first_rows(str(tmp_path / "rows.csv"))
    assert "add a first row with the names of the columns" in str(refused.value)
    (tmp_path / "rows.csv").write_text("\n".join(["event;music", *lines[1:]]))
    assert first_rows(str(tmp_path / "rows.csv"))["columns"] == ["event", "music"], (
        "a column may be named after a label"
    )


def test_the_first_rows_of_a_table_with_dates_are_shown(tmp_path: Path) -> None:
    table = pa.table({"question": ["a b"], "answer": ["c"], "asked": [date(2024, 5, 1)]})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert first_rows(str(tmp_path / "rows.parquet"))["rows"][0]["asked"] == '"2024-05-01"'


def test_attacks_in_rows_and_columns_stay_text(client: Client, tiny: TinyRun) -> None:
    quoted = [attack.replace('"', '""') for attack in ATTACKS]
    table = "prompt,completion," + ",".join(f'"{attack}"' for attack in quoted)
    table += "\n" + ",".join(f'"{attack}"' for attack in ["a", "b", *quoted])
    client.post("upload?name=x.csv", body=table.encode())
    _, text, _ = client.get("part/rows?data=rows-1.csv")
    page = part(text)
    assert not page.every("img") and not page.every("script") and not page.every("iframe")
    for attack in ATTACKS:
        assert attack in [cell.text for cell in page.every("th")]
    query = urlencode(dict(zip(("objective", "prompt", "state", "asked0"), ATTACKS, strict=False)))
    for place in ("new", "new/rows", "new/learn", "new/start"):
        page = part(client.get(f"{place}?data=rows-1.csv&{query}")[1])
        assert not page.every("img") and not page.every("iframe") and len(page.every("script")) <= 1


ATTACK = " ".join(ATTACKS)
LINTED = {
    "train": {"rows": 1, "documents": 1, "tokens": 2, "supervised_tokens": 1, "notes": [ATTACK]},
    "held_out": None,
    "errors": 1,
    "skip_with": ["--skip-bad"],
    "findings": [{"severity": "error", "count": 9, "where": [ATTACK], "what": ATTACK, "remedy": ATTACK}],
    "labels": {ATTACK: 1},
    "template": [ATTACK],
    "shown": [{"source": ATTACK, "tokens": [{"text": ATTACK, "supervised": True}]}],
}
PLANNED = {"budget_bytes": None, "peak_bytes": 1, "train_s": None, "steps": 1, "rows": 1, "held_out_rows": 0}
LISTED = {"name": ATTACK, "path": ATTACK, "store": ATTACK, "family": ATTACK, "types": [ATTACK], "engine": "backhand"}
DECIDED = {"type": "choice", "choice": ATTACK, "probabilities": {ATTACK: 0.5, "x": 0.5}, "confidence": 0.5}


@pytest.mark.parametrize(
    ("place", "answer"),
    [
        (
            "part/rows",
            {"columns": [ATTACK], "rows": [{ATTACK: ATTACK}], "suggested": {"decide": {"state": ATTACK}}}
            | {"unread": 1, "first_unread": ATTACK},
        ),
        ("part/lint", LINTED),
        ("part/plan", PLANNED | {"notes": [ATTACK]}),
        ("part/models", [LISTED | {"file_bytes": 1, "memory_bytes": None, "fits": None, "note": ATTACK}]),
        ("runs/one/try", {"answers": {ATTACK: DECIDED}}),
        ("runs/one/export", {}),
    ],
)
def test_attacks_in_what_commands_answer_stay_text(
    place: str,
    answer: Any,
    client: Client,
    space: Workspace,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome = Outcome(0, json.dumps(answer), ATTACK)

    async def run(_: Commands, words: list[str], *__: object, **___: object) -> Outcome:
        if words[0] == "export":
            Path(words[-1].partition("=")[2]).touch()
        return outcome

    config = (finished / "config.toml").read_text()
    (finished / "config.toml").write_text(config.replace('objective = "sft"', 'objective = "decide"'))
    finished.rename(space.run("one"))
    client.post(f"upload?name={quote('x' + ATTACK[:150])}.csv", body=TABLE)
    monkeypatch.setattr(Commands, "run", run)
    query = urlencode(
        {"data": "rows-1.csv", "objective": "decide", "question0": ATTACK, "asked0": ATTACK, "state": ATTACK}
    )
    for code in (0, 3):
        outcome = replace(outcome, code=code)
        if place.startswith("runs"):
            status, text, _ = client.post(place, prompt=ATTACK, to="gguf")
        else:
            status, text, _ = client.get(f"{place}?{query}")
        page = part(text)
        hostile = [tag for tag in ("script", "img", "svg", "iframe", "style") if page.every(tag)]
        assert status in (200, 409) and "onerror" in page.root.text and hostile in ([], ["script"])
        assert all(one.attributes.get("src") for one in page.every("script"))
        assert not [one for one in page.root.all() if any(name.startswith("on") for name in one.attributes)]
    assert not part(client.get("new/rows")[1]).every("img")


def test_the_help_of_options_names_fields(client: Client) -> None:
    client.post("upload?name=faq.csv", body=TABLE)
    page = part(client.get(f"new/start?{urlencode({'data': 'rows-1.csv', 'objective': 'sft'})}")[1])
    helps = {str(one.attributes["id"]): one.text for one in page.every("span", class_="soft help")}
    assert "longer than “max length”" in helps["more.long_rows-help"]
    assert "for “Decisions” with at least" in helps["more.average_share-help"]
    assert not [text for text in helps.values() if "`" in text or "docs/" in text]


def test_messages_name_fields_instead_of_options() -> None:
    for option in (f"--{name.replace('_', '-')}" for names in MORE.values() for name in names):
        assert "--" not in on_page(f"leave out {option}, or give {option} 3")
    assert on_page("if whole texts are meant, add: --train-on text") == (
        "if whole texts are meant, set “train on” under More options to text"
    )
    assert on_page("give another --output, or train with --dropout 0.1 or --loss-type sigmoid, as it does") == (
        "give another name of the run, or train with “dropout” (0.1) under More options or “loss type” (sigmoid) "
        "under More options, as it does"
    )
    assert on_page("leave them out with --skip-bad") == "leave them out with “skip bad” under More options"
    assert on_page("add: --prompt a --train-on text") == (
        "choose a at “Question”, set “train on” under More options to text"
    )
    assert on_page("error: x\n  next: backhand plan --help explains every option") == "error: x"
    saved = on_page("continue with backhand train --resume --output /x/y")
    assert saved == "choose “Continue the run”" and on_page("start it with --allow /x") == "start it with --allow /x"
    assert (
        on_page("give --eval-fraction 0.3 or --eval-data FILE")
        == "give the share of held-out rows under “What to learn” (0.3)"
    )
    assert on_page("train it with --objective embed, rank or classify, or choose another") == (
        "train it with “What to learn” (Vectors for search, Rankings or Labels or a number), or choose another"
    )


@pytest.mark.parametrize(
    ("objective", "typed", "shown"),
    [
        (
            "decide",
            r"add --state '{a}\n{c}' --question d; --question COLUMN='…' also puts the question into words",
            (
                r"write {a}\n{c} in the field next to “The text to decide about”, choose d at “Column with the answers”"
                "; “The question that they answer” also puts the question into words"
            ),
        ),
        ("rank", "name them: --prompt COLUMN --completion COLUMN", "name them: “Query”, “Document”"),
        ("dpo", "such as --prompt 'it'\"'\"'s' --columns chosen=b", "such as it's at “Question”, b at “Better answer”"),
        ("kto", "name them with --columns NAME=COLUMN", "name them with “Question”, “Answer”, “Is it good?”"),
        (
            "embed",
            "instead of --state and --question",
            "instead of “The text to decide about” and “Column with the answers”",
        ),
        (
            "dpo",
            "error: rejected: chosen and rejected are the same text, 'rejected'",
            "error: “Worse answer”: “Better answer” and “Worse answer” are the same text, 'rejected'",
        ),
        ("dpo", "the chosen answers are cut", "the chosen answers are cut"),
        ("rank", "prompt and completion are the same text, 'a'", "“Query” and “Document” are the same text, 'a'"),
        (
            "decide",
            "error: state and question are the same text, 'a'",
            "error: “The text to decide about” and “Column with the answers” are the same text, 'a'",
        ),
        (
            "decide",
            "add --objective classify --problem-type regression, with the text as --prompt",
            (
                "set “What to learn” to Labels or a number, set “problem type” under More options to regression, "
                "with the text as “Text”"
            ),
        ),
        (
            "embed",
            "Author is empty, so that the row has no completion",
            "Author is empty, so that the row has no “Text that belongs to it”",
        ),
        (
            "classify",
            integers_note(["1", "2", "3"]),
            (
                "the 3 integers are read as names; "
                "to learn them as numbers, give “problem type” (regression) under More options"
            ),
        ),
        ("classify", "add --prompt a --completion b", "choose a at “Text”, b at “Label, or number to predict”"),
    ],
)
def test_messages_name_the_columns_of_the_objective(objective: str, typed: str, shown: str) -> None:
    assert on_page(typed, objective) == shown


def test_messages_name_buttons_instead_of_commands_or_mark_them_as_those_of_a_terminal() -> None:
    for command, shown in {
        "Next: backhand generate --adapter a --prompt '…'": "Next: “Try a prompt”",
        "backhand export --adapter a --to gguf --output b": "“Use the adapter elsewhere”",
        "  backhand evaluate --data FILE": "  in a terminal: backhand evaluate --data FILE",
        "use backhand merge": "use backhand merge in a terminal",
        "backhand lint --data x.csv --show 3": "in a terminal: backhand lint --data x.csv --show 3",
        "backhand train --data x.csv --epochs 2": "in a terminal: backhand train --data x.csv --epochs 2",
        "hf auth login, then: hf upload a/b 'x y/z'": "hf auth login, then: choose “Make the file” again",
        "`backhand lint` lists them": "the check of the rows lists them",
        "there is no file /x/backhand train.py": "there is no file /x/backhand train.py",
        "float32, backhand engine": "float32, backhand engine",
        "It rose. Try: backhand train c --learning-rate 0.1 --output o": (
            "It rose. Try: “Try again with the suggested change”"
        ),
        "Try: backhand train c --reward x.py:f --output o": (
            "Try: in a terminal: backhand train c --reward x.py:f --output o"
        ),
    }.items():
        assert on_page(command) == shown


def test_what_a_command_printed_is_shown_as_a_person_reads_it(client: Client, space: Workspace, finished: Path) -> None:
    finished.rename(space.run("one"))
    client.post("upload?name=faq.csv", body=TABLE)
    adapter = space.run("one") / "adapter"
    printed = f"\x1b[1mreading\x1b[0m {space.rows}/rows-1.csv\n 0%|\r 50%|\r100%|\nother by --learning-rate\n"
    printed += "still at work after 9 s: a\nstill at work after 19 s: b\n"
    printed += f"Adapter: {adapter}\nbackhand merge --adapter {adapter}\n"
    space.log_file("one").write_text(printed)
    shown = part(client.get("runs/one")[1]).one("details", id="log").text.partition("printed")[2]
    assert shown.splitlines() == [
        "reading faq.csv",
        "100%|",
        "other by “learning rate” under More options",
        "still at work after 19 s: b",
        "Adapter: runs/one/adapter",
        f"in a terminal: backhand merge --adapter {adapter}",
    ]


def test_the_result_names_buttons_and_marks_commands_of_a_terminal(
    client: Client, space: Workspace, finished: Path
) -> None:
    finished.rename(space.run("one"))
    summary = space.run("one") / "summary.json"
    before = summary.read_text()
    for options, allowed in (("--learning-rate 0.01", True), ("--reward x.py:f", False)):
        suggested = f"backhand train config.toml {options} --output again"
        summary.write_text(json.dumps(json.loads(before) | {"advice": "It rose.", "try_next": suggested}))
        page = part(client.get("runs/one")[1])
        buttons = {one.text for one in page.every("button")}
        assert ("Try again with the suggested change" in buttons) is allowed
        result = page.one("div", id="live-result").text
        assert ("Choose “Try again with the suggested change”, or in a terminal:" in result) is allowed
        assert allowed or "It rose. In a terminal:" in result
        assert "other rows may do worse" in result and "backhand evaluate" not in result
        assert "On this page: Try a prompt, Use the adapter elsewhere. In a terminal or in Python:" in result
    assert "In a terminal:" in page.one("div", id="live-repeat").text


def test_an_error_of_the_check_has_a_way_to_the_options(client: Client, tiny: TinyRun) -> None:
    rows = b"text,label\n" + b"".join(
        b"the user asks for %d names,%s\n" % (n, b"ab"[n % 2 : n % 2 + 1]) for n in range(40)
    )
    client.post("upload?name=x.csv", body=rows)
    draft = {"typed_model": str(tiny.model), "data": "rows-1.csv", "objective": "sft"}
    status, text, _ = client.get(f"part/lint?{urlencode(draft)}", X_Part="1")
    error = part(text).one("pre", class_="error").text
    assert status == 409 and "set “train on” under More options to text" in error and "--" not in error
    assert "new/start?" in text and "new/learn?" in text
    rows = b"Saying,Added,Author\n" + b"".join(b"asks for %d,2024-05-%02d,%d\n" % (n, n, n % 3) for n in range(1, 30))
    client.post("upload?name=y.csv", body=rows)
    for objective, advice in (
        ("decide", "choose Saying at “The text to decide about”, Author at “Column with the answers”;"),
        (
            "embed",
            "name the columns of anchors and positives: “First text, such as a question”, “Text that belongs to it”",
        ),
    ):
        query = urlencode(draft | {"data": "rows-2.csv", "objective": objective})
        text = client.get(f"part/lint?{query}", X_Part="1")[1]
        assert f"next: {advice}" in part(text).one("pre", class_="error").text
        assert [link.text for link in part(text).every("a")] == ["Change it at the step “What to learn”"]
