"""Record digests and texts of tiny runs of every objective and form of loss, and compare two recordings.

    python tools/bits.py record OLD.json --source ../old/src     # the package of another checkout
    python tools/bits.py record NEW.json                         # `--only dpo embed` records these objectives alone
    python tools/bits.py compare OLD.json NEW.json               # exits 1 if bits differ, and shows changed texts

Each run trains four steps of a random model with two layers:

- `one`: in one process. It is evaluated as well.
- `transformers`: with `--engine transformers`.
- `resumed`: stopped by an exception after step 3, and resumed after step 2.
- `two`: by two processes, as torchrun starts them.
- `start`: from the adapter of `one`.

The forms of `_QUICK` have two runs: `transformers`, and `resumed` by two processes.

`bits` contains digests of files without times, rates, memory and paths. `text` contains what the runs print, and
sentences and tables of their pages, which a change may reword. A way that is refused has the text of the error.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import hashlib
import html
import importlib
import json
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
_WORDS = ("user", "asks", "assistant", "answers", "json", "list", "names", "one", "number", "what")
_OF_PAIRS = ("sigmoid_norm", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot",
             "aot_unpaired", "discopop")  # fmt: skip
_SMOOTHED = ("exo_pair", "robust", "aot")


def _form(rows: str, **options: Any) -> dict[str, Any]:
    """Return options of `backhand.train` with rows of this kind."""
    return {"data": f"{rows}.jsonl", "eval_data": f"held_out_{rows}.jsonl", **options}


def _baked(**options: Any) -> dict[str, Any]:
    return _form("contexts", **{"context": "the assistant answers in json", **options})


def _rewarded(**options: Any) -> dict[str, Any]:
    return _form("answers", reward=("length:6", "regex:[a-m]"), group=3, max_new_tokens=8, **options)


FORMS = {
    "sft": _form("answers"),
    "sft/chats": _form("chats", weight_decay=0.1, micro_batch_rows=3),
    "sft/texts": _form("texts"),
    "sft/labels": _form("named"),
    "dpo": _form("pairs"),
    **{f"dpo/{loss}": _form("pairs", loss_type=loss) for loss in _OF_PAIRS},
    **{f"dpo/{loss}-smooth": _form("pairs", loss_type=loss, label_smoothing=0.1) for loss in _SMOOTHED},
    "ipo": _form("pairs", beta=0.2),
    "orpo": _form("pairs"),
    "simpo": _form("pairs"),
    "simpo/smooth": _form("pairs", label_smoothing=0.1, simpo_gamma=0.3),
    "kto": _form("unpaired", desirable_weight=1.5),
    "kto/apo_zero_unpaired": _form("unpaired", loss_type="apo_zero_unpaired"),
    "grpo": _rewarded(),
    **{f"grpo/{loss}": _rewarded(loss=loss) for loss in ("grpo", "dr_grpo", "rloo")},
    "grpo/clipped": _rewarded(beta=0.1, num_iterations=2, epsilon_high=0.3, scale_rewards="batch"),
    "decide": _form("choices", state="text", question={"team": "Which?", "mood": "Mood?"}),
    "decide/random": _form("choices", state="text", question={"team": "Which?"}, option_order="random", option_rows=0),
    "decide/shares": _form("shares"),
    "decide/smooth": _form("named", label_smoothing=0.1),
    "bake": _baked(max_new_tokens=6),
    "bake/student": _baked(answers_from="student", max_new_tokens=6),
    "bake/rows": _baked(answers_from="rows", divergence="reverse"),
    "bake/mixture": _baked(answers_from="rows", divergence="jensen-shannon", divergence_temperature=2.0),
    "bake/column": _baked(context="contexts", context_column="file", max_new_tokens=6),
    "sdft": _form("answers", max_new_tokens=6),
    "sdft/moving": _form("answers", max_new_tokens=6, teacher_update_rate=0.5, divergence="forward"),
    "embed": _form("vectors"),
    "embed/symmetric": _form("vectors", embedding_loss="symmetric", pooling="mean"),
    "embed/triplet": _form("vectors", embedding_loss="triplet", pooling="cls", model="encoder"),
    "embed/cosent": _form("scored"),
    "embed/labels": _form("labelled"),
    "embed/matryoshka": _form("vectors", matryoshka_dims=(16, 30), query_prompt="asks: ", micro_batch_rows=3),
    "embed/encoder": _form("vectors", model="encoder"),
    "rank": _form("ranked", positive_weight=2.0),
    "rank/listwise": _form("ranked", ranking_loss="listwise", instruction="find it"),
    "rank/listnet": _form("graded", ranking_loss="listnet"),
    "rank/encoder": _form("ranked", model="encoder"),
    "rank/encoder-listwise": _form("ranked", model="encoder", ranking_loss="listwise"),
    "rank/reranker": _form("graded", model="reranker", ranking_loss="listnet"),
    "classify": _form("labelled"),
    "classify/several": _form("several"),
    "classify/numbers": _form("numbers"),
    "classify/encoder": _form("labelled", model="encoder"),
}  # fmt: skip
"""Options of each run by its name, which begins with the objective."""
_QUICK = {*FORMS} - {"sft", "dpo", "ipo", "orpo", "simpo", "kto", "grpo", "decide", "bake", "bake/student", "sdft",
                     "embed", "rank", "rank/encoder", "classify"}  # fmt: skip
_OPTIONS = {
    "model": "decoder", "dtype": "float32", "threads": 1, "rank": 3, "learning_rate": 3e-3, "max_steps": 4,
    "batch_rows": 4, "micro_batch_rows": 2, "eval_every": 2, "save_every": 2,
}  # fmt: skip
_DIGESTED = (
    "adapter_model.safetensors", "adapter_config.json", "backhand.json", "metrics.jsonl", "summary.json",
    "reference.json", "teacher_answers.jsonl", "answers.jsonl", "state.safetensors", "evaluated.json",
)  # fmt: skip
_VARIABLE = (
    "computed_tokens",
    "first_token_ratios",
    "output",
    "adapter",
    "try_next",
    "packages",
    "adapter_config.json",
)
_VARIABLE_ENDINGS = ("_s", "_bytes")
_AMOUNT = re.compile(r"(about |above )?\d[\d,.]*(e-?\d+)? ?(s|ms|min|h|tokens/s|KiB|MiB|GiB)\b")
_RATES = re.compile(r"(  [\d,]+ tokens/s|; peak memory about|(?<=^Peak memory)|, and [^,]+ to the first token).*")
_VARIABLE_ROWS = ("time in steps", "tokens/s", "peak memory")


def _row_kinds(draw: random.Random) -> dict[str, dict[str, Any]]:
    """Return a random row of each kind."""

    def said(low: int, high: int) -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(low, high)))

    prompt, good, bad, other = said(2, 6), said(1, 3), said(2, 6), said(2, 5)
    word, team, share = draw.choice(["json", "list", "one"]), draw.choice(["red", "blue"]), draw.choice([0.2, 0.7])
    question = {"type": "choice", "instructions": "Which?", "criteria": {"red": "a", "blue": "b"}}
    answer = {"prompt": prompt, "completion": good}
    return {
        "answers": answer,
        "chats": {"messages": [{"role": role, "content": said(1, 4)} for role in ("user", "assistant") * 2]},
        "texts": {"text": f"{prompt} {good}"},
        "named": {"prompt": f"{prompt} {word}", "completion": word},
        "pairs": {"prompt": prompt, "chosen": good, "rejected": bad},
        "unpaired": {**answer, "label": draw.random() < 0.5},
        "contexts": {**answer, "file": draw.choice(["first", "second"])},
        "choices": {"text": f"{team} {prompt}", "team": team, "mood": draw.randrange(3)},
        "shares": {"state": prompt, "questions": {"q": question}, "answers": {"q": {"red": share, "blue": 1 - share}}},
        "vectors": {"anchor": prompt, "positive": f"{good} {word}", "negative": bad},
        "scored": {"sentence1": prompt, "sentence2": other, "score": draw.randrange(5) / 4},
        "labelled": {"text": f"{prompt} {word}", "label": word},
        "ranked": {"query": prompt, "positive": f"{good} {word}", "negatives": [bad, other]},
        "graded": {"query": prompt, "documents": [f"{good} a", f"{bad} b"], "scores": [1.0, draw.choice([0.0, 0.5])]},
        "several": {"text": prompt, "labels": [name for name in ("json", "list", "user") if name in prompt.split()]},
        "numbers": {"text": prompt, "label": len(prompt.split()) + 0.5},
    }


def _write_inputs(place: Path) -> None:
    """Write rows of each kind, contexts of the teacher, and three random models."""
    import transformers

    from tests.support.tiny_encoders import ENCODERS, random_encoder
    from tests.support.tiny_models import save_tiny, tiny_model
    from tests.support.tiny_tokenizer import pair_tokenizer, tiny_tokenizer

    draw = random.Random(0)
    for name, count in (("", 12), ("held_out_", 6)):
        rows = [_row_kinds(draw) for _ in range(count)]
        for kind in rows[0]:
            text = "".join(json.dumps(row[kind]) + "\n" for row in rows)
            (place / f"{name}{kind}.jsonl").write_text(text, encoding="utf-8")
    (place / "contexts").mkdir()
    for name in ("first", "second"):
        (place / "contexts" / f"{name}.txt").write_text(f"the {name} assistant answers in json", encoding="utf-8")
    save_tiny(tiny_model("llama-tied", num_hidden_layers=2, max_position_embeddings=512), place / "decoder")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.save_pretrained(place / "decoder")
    sizes: dict[str, Any] = {**ENCODERS["bert"][1], "vocab_size": 83, "type_vocab_size": 2, "num_hidden_layers": 2}
    of_scores = transformers.AutoModelForSequenceClassification
    for name, kind in (("encoder", transformers.AutoModel), ("reranker", of_scores)):
        config = transformers.AutoConfig.for_model("bert", **sizes, num_labels=1)
        random_encoder(config, auto=kind).save_pretrained(place / name)
        pair_tokenizer(place / name)


def _forked(printed: Path, call: Callable[[], object], **environment: str) -> int:
    """Start a process that calls this and prints to two files with this stem, and return its number."""
    if process := os.fork():
        return process
    code = 1
    try:
        os.environ.update(environment)
        for stream, ending in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(printed.with_suffix(ending), os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
        code = int(call() or 0)  # type: ignore[call-overload]
    except BaseException as error:  # noqa: BLE001 - the recording contains it
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        printed.with_suffix(".modules").write_text("\n".join(sys.modules))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(*processes: int) -> int:
    """Return the largest exit code."""
    return max(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes)


def _stop(record: Mapping[str, Any]) -> None:
    if record["step"] == 3:
        raise RuntimeError("stopped")


def _train(**options: Any) -> None:
    import backhand

    backhand.train(**options)


def _command(*words: str) -> int:
    from backhand.cli.main import main

    return main(words)


def _processes(printed: Path, count: int, **options: Any) -> int:
    """Train in this number of processes, and return the exit code."""
    if count == 1:
        return _wait(_forked(printed, lambda: _train(**options)))
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
    started = []
    for rank in range(count):
        ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        path = Path(f"rank-{rank}.printed") if rank else printed
        started.append(_forked(path, lambda: _train(**options), **place, **ranked))
    return _wait(*started)


def _run(way: str, options: dict[str, Any], quick: bool) -> int:
    """Train in one of the five ways in the directory of this name, and return the exit code."""
    options = {**options, "output": way, "answers": 0 if quick else 2}
    if way == "transformers":
        options["engine"] = "transformers"
    elif way == "start":
        options["from_adapter"] = "one/adapter"
    given = options
    if way == "resumed":
        _processes(Path("stopped.printed"), 1, **options, callbacks=_stop)
        given = {"output": way, "resume": True}
    code = _processes(Path(f"{way}.printed"), 2 if way == "two" or (quick and way == "resumed") else 1, **given)
    if way == ("resumed" if quick else "one") and code == 0:
        words = ["--model", options["model"], "--adapter", f"{way}/adapter", "--data", options["eval_data"], "--json"]
        words += [f"--reward={name}" for name in options.get("reward", ())]
        _wait(_forked(Path(way, "evaluated.json"), lambda: _command("evaluate", *words, "--dtype", "float32")))
        Path(way, "evaluated.out").rename(Path(way, "evaluated.json"))
    return code


def constant(value: Any) -> Any:
    """Return a JSON value without entries that differ between two equal runs."""
    if isinstance(value, dict):
        kept = [name for name in value if name not in _VARIABLE and not name.endswith(_VARIABLE_ENDINGS)]
        return {name: constant(value[name]) for name in kept}
    return [constant(one) for one in value] if isinstance(value, list) else value


def _digests(run: Path, place: str) -> dict[str, str]:
    found = {}
    newest = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]), default=run)
    for path in (*run.glob("*"), *run.glob("adapter/*"), newest / "state.safetensors"):
        if path.name not in _DIGESTED or not path.exists():
            continue
        content = path.read_bytes()
        if path.suffix != ".safetensors":
            text = content.decode().replace(place, ".")
            lines = [text] if path.suffix == ".json" else text.splitlines()
            content = "\n".join(json.dumps(constant(json.loads(line))) for line in lines).encode()
        found[path.name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def _elements(page: Path, tag: str, kind: str) -> list[str]:
    """Return the texts of the elements of a page with this tag and class, line by line."""
    found = re.findall(rf'(?s)<{tag} class="{kind}">(.*?)</{tag}>', page.read_text(encoding="utf-8"))
    lines = [re.sub(r"(\s*<[^>]+>\s*)+", " | ", line).strip(" |") for one in found for line in one.split("</tr>")]
    return [html.unescape(line) for line in lines if line]


def _printed(path: Path, place: str) -> list[str]:
    """Return the lines of a file without amounts of time and memory, rates of steps and signs of life."""
    lines = path.read_text(encoding="utf-8", errors="replace").replace(place, ".").splitlines()
    return [_AMOUNT.sub("#", _RATES.sub("", line)) for line in lines if not line.startswith("still at work")]


def _recorded(name: str, inputs: Path) -> dict[str, Any]:
    """Train a form in each way in the current directory, and return its digests and texts by way."""
    for path in inputs.iterdir():
        Path(path.name).symlink_to(path)
    options = {**_OPTIONS, **FORMS[name], "objective": name.partition("/")[0]}
    place = str(inputs.parent.resolve())
    found: dict[str, Any] = {}
    ways = ("resumed", "transformers") if name in _QUICK else ("one", "transformers", "resumed", "two", "start")
    for way in ways:
        code = _run(way, options, name in _QUICK)
        text = {"notes": _printed(Path(f"{way}.err"), place), "closing": _printed(Path(f"{way}.out"), place)}
        if (page := Path(way, "report.html")).is_file():
            text["lead"] = [_AMOUNT.sub("#", one.replace(place, ".")) for one in _elements(page, "p", "lead")]
        found[way] = {"code": code, "bits": _digests(Path(way), place), "text": text}
    compared = ways[0], ways[1] if found["transformers"]["code"] == 0 else ways[0]
    if compared[0] == compared[1]:
        shutil.copytree(compared[0], "again")
        compared = (compared[0], "again")
    _wait(_forked(Path("page.printed"), lambda: _command("report", *compared, "--output", "comparison.html")))
    rows = _elements(Path("comparison.html"), "table", "versus")
    found[ways[0]]["text"]["comparison"] = [row for row in rows if not row.startswith(_VARIABLE_ROWS)]
    return found


def record(names: Sequence[str], source: Path, keep: Path, jobs: int) -> dict[str, Any]:
    """Return the recording of these forms by the package in `source`, of which several run at the same time."""
    os.environ |= {
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "BACKHAND_ROWS_CACHE": "off",
        "PYTHONPATH": str(source), "MPLBACKEND": "agg",
    }  # fmt: skip
    sys.path[:0] = [str(source), str(PROJECT)]
    import torch

    import backhand.cli.main
    import backhand.report.train

    torch.set_num_threads(1)
    assert Path(backhand.__file__).is_relative_to(source), backhand.__file__
    (keep / "inputs").mkdir(parents=True)
    _write_inputs(keep / "inputs")
    running: list[int] = []
    for number, name in enumerate(names):
        place = keep / name.replace("/", "-")
        place.mkdir()

        def recorded(name: str = name, place: Path = place) -> None:
            os.chdir(place)
            Path("recorded.json").write_text(json.dumps(_recorded(name, keep / "inputs")), encoding="utf-8")

        running.append(_forked(place / "recorded", recorded))
        while len(running) >= (jobs if 0 < number < len(names) - 1 else 1):
            running.remove(os.wait()[0])
        if number == 0:  # what the first runs import, the others need not
            imported = {module for path in place.glob("*.modules") for module in path.read_text().split()}
            for module in sorted(imported - {*sys.modules}):
                with suppress(Exception):
                    importlib.import_module(module)
            gc.collect()
            gc.freeze()  # otherwise each run would look through it again
    return {name: json.loads((keep / name.replace("/", "-") / "recorded.json").read_text()) for name in names}


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Print the differences of two recordings, and return True if bits differ."""
    differ = False
    for name in [name for name in {**old, **new} if name in old and name in new]:
        for way in {**old[name], **new[name]}:
            before, after = (one[name].get(way, {"code": None, "bits": {}, "text": {}}) for one in (old, new))
            files = {**before["bits"], **after["bits"]}
            changed = [file for file in files if before["bits"].get(file) != after["bits"].get(file)]
            if before["code"] != after["code"] or changed:
                differ = True
                print(f"BITS of {name} {way}: exit code {before['code']} and {after['code']}; {' '.join(changed)}")
            for part in {**before["text"], **after["text"]}:
                lines, others = (one["text"].get(part, []) for one in (before, after))
                for line in [*difflib.unified_diff(lines, others, n=0, lineterm="")][2:]:
                    print(f"{name} {way} {part} {line}")
    print("bits differ" if differ else f"bits of {len({*old} & {*new})} forms are equal")
    return differ


def main() -> int:
    """Record or compare, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("recordings", nargs="+", type=Path)
    parser.add_argument("--source", type=Path, default=PROJECT / "src", help="directory that contains the package")
    parser.add_argument("--only", nargs="+", default=[], help="objectives or forms")
    parser.add_argument("--keep", type=Path, help="new directory for all files of the runs, to look at differences")
    parser.add_argument("--jobs", type=int, default=2, help="forms at the same time")
    given = parser.parse_args()
    if given.action == "compare":
        old, new = (json.loads(path.read_text(encoding="utf-8")) for path in given.recordings)
        return int(compare(old, new))
    names = [name for name in FORMS if not given.only or {name, name.partition("/")[0]} & {*given.only}]
    began, (target,) = time.monotonic(), given.recordings
    with tempfile.TemporaryDirectory() as directory:
        keep = (given.keep or Path(directory, "runs")).resolve()
        found = record(names, given.source.resolve(), keep, given.jobs)
    target.write_text(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, ways in found.items():
        for way in {"resumed", "two"} & {*ways} if "one" in ways else ():
            if changed := [file for file in ways[way]["bits"] if ways[way]["bits"][file] != ways["one"]["bits"][file]]:
                print(f"{name}: {way} differs from one in {' '.join(changed)}")
    print(f"{len(names)} forms recorded in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
