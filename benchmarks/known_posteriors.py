"""Decisions about texts whose true probabilities are known, against the same rows trained as label text.

    python benchmarks/known_posteriors.py [--ways decide smoothed random text] [--epochs 2] [--output FILE]

A class is drawn, then six words from the distribution of this class, with hard answers. Bayes' rule gives the true
probability of every class. 600 texts train an adapter to decide, and another one to answer with the name of the class
(`text`). `smoothed` decides with a label smoothing of 0.1, and the prompts of `random` show the options in random
orders. 200 held-out texts choose the best step of each run and fit the temperature, and everything is measured on 400
others:

    accuracy   share of texts whose most probable class is the one drawn; Bayes' choice has the highest expected one
    ECE        Σ_bins (texts in the bin / texts) |mean confidence - mean true probability of the chosen class|
    KL         mean Σ_k p_k log(p_k / q_k), with p the true probabilities and q the model's
    changed    answers of `decide` that change if the options are given in another order
    flips      share of decisions that change if the prompt shows the options in a random order, of 100 texts

Naive Bayes and logistic regression on the counts of the words, fitted to the same 600 texts, show what can be learnt
from them. Ways that are not asked for keep their figures in the output file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from machine import describe_machine

import backhand

Floats = npt.NDArray[np.float64]

HERE = Path(__file__).parent
QUESTION = "Which team should handle this?"
OWN_WORDS = {
    "account": ("login", "password", "profile", "email"),
    "billing": ("invoice", "refund", "charge", "card"),
    "bug": ("crash", "error", "screen", "freeze"),
    "delivery": ("parcel", "courier", "late", "address"),
}
CLASSES = [*OWN_WORDS]
WORDS = (*(word for words in OWN_WORDS.values() for word in words), "please", "today", "again", "help")
OWN, COMMON, OTHER = 0.18, 0.05, 0.02
"""Shares of a class's own words, of words of no class, and of the words of other classes, before they are varied."""
WAYS = ["decide", "smoothed", "random", "text"]
TEXT_WORDS, BINS, FLIP_ROWS = 6, 10, 100


def word_shares() -> Floats:
    """Return the probability of every word in every class, (classes, words)."""
    draw, everywhere = np.random.default_rng(0), {word for words in OWN_WORDS.values() for word in words}
    shares = np.array(
        [
            [OWN if word in own else OTHER if word in everywhere else COMMON for word in WORDS]
            for own in OWN_WORDS.values()
        ]
    )
    shares *= draw.uniform(0.6, 1.4, shares.shape)
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def draw_rows(count: int, seed: int) -> tuple[list[dict[str, str]], Floats]:
    """Return rows with `text` and `label`, and the true probability of every class, (rows, classes)."""
    draw, shares = np.random.default_rng(seed), word_shares()
    rows, posteriors = [], []
    for _ in range(count):
        of_class = draw.integers(len(CLASSES))
        words = draw.choice(len(WORDS), size=TEXT_WORDS, p=shares[of_class])
        likelihood = np.exp(np.log(shares[:, words]).sum(axis=1))
        rows.append({"text": " ".join(WORDS[word] for word in words), "label": CLASSES[of_class]})
        posteriors.append(likelihood / likelihood.sum())
    return rows, np.array(posteriors)


def figures(p: Floats, truth: Floats, right: list[int]) -> dict[str, float]:
    """Return accuracy, ECE against the truth, KL and NLL of the probabilities p, (rows, classes)."""
    rows, chosen = np.arange(len(p)), p.argmax(axis=1)
    log_p = np.log(np.maximum(p, np.finfo(np.float64).tiny))
    order = np.argsort(p.max(axis=1), kind="stable")
    gaps = [
        len(part) * abs(p[part, chosen[part]].mean() - truth[part, chosen[part]].mean())
        for part in np.array_split(order, BINS)
    ]
    return {
        "accuracy": float(np.mean(chosen == right)),
        "ece": float(sum(gaps) / len(p)),
        "kl": float((truth * (np.log(truth) - log_p)).sum(axis=1).mean()),
        "nll": float(-log_p[rows, right].mean()),
    }


def changed_answers(texts: list[str], adapter: Path, first: list[dict[str, Any]], options: dict[str, Any]) -> int:
    """Return the number of answers that change, in any bit, if the request names the options in reversed order."""
    question = {"type": "choice", "instructions": QUESTION, "criteria": dict.fromkeys(reversed(OWN_WORDS))}
    turned = backhand.decide(states=texts, adapter=adapter, questions={"label": question}, **options)
    return sum(one != other for one, other in zip(first, turned, strict=True))


@dataclass(frozen=True)
class Task:
    """The rows, and the options that both trainings share."""

    rows: list[dict[str, str]]
    held_out: list[dict[str, str]]
    test: list[dict[str, str]]
    truth: Floats  # probability of every class for each test row
    model: dict[str, Any]  # options of the base model
    training: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        """The test texts."""
        return [row["text"] for row in self.test]

    def figures(self, p: Floats) -> dict[str, float]:
        """Return the figures of these probabilities on the test rows."""
        return figures(p, self.truth, [CLASSES.index(row["label"]) for row in self.test])


def task_of(given: argparse.Namespace) -> Task:
    """Draw the rows, and collect the options."""
    counts = (given.rows, given.held_out_rows, given.test_rows)
    (rows, _), (held_out, _), (test, truth) = (draw_rows(count, seed) for seed, count in enumerate(counts, 1))
    model = {"model": given.model, "dtype": given.dtype, "threads": given.threads}
    rate = given.learning_rate if given.learning_rate == "auto" else float(given.learning_rate)
    training = {"epochs": given.epochs, "batch_rows": given.batch_rows, "learning_rate": rate}
    training |= {"layers": given.layers, "seed": given.seed, "answers": 0, "quiet": True}
    return Task(rows, held_out, test, truth, model, model | training)


def train_to_decide(task: Task, output: Path, **options: Any) -> float:
    """Train the adapter that decides, and return the seconds."""
    began = time.perf_counter()
    backhand.train(
        data=task.rows,
        eval_data=task.held_out,
        objective="decide",
        question={"label": QUESTION},
        output=output,
        **options,
        **task.training,
    )
    return time.perf_counter() - began


def measure_decisions(task: Task, adapter: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return the figures with and without the temperature."""
    answers = backhand.decide(states=task.texts, adapter=adapter, **task.model)
    p = np.array([[one["label"]["probabilities"][name] for name in CLASSES] for one in answers])
    record = json.loads((adapter / "backhand.json").read_text(encoding="utf-8"))
    temperature = record["decisions"]["temperatures"]["choice"]
    uncalibrated = p**temperature / (p**temperature).sum(axis=1, keepdims=True)
    evaluated = backhand.evaluate(data=task.test[:FLIP_ROWS], adapter=adapter, **task.model).adapted
    more = {
        "temperature": temperature,
        "changed": changed_answers(task.texts, adapter, answers, task.model),
        "flips": evaluated.decisions["label"].flips,
    }
    return task.figures(p) | more, task.figures(uncalibrated)


def train_label_text(task: Task, output: Path) -> float:
    """Train the adapter that answers with the name of the class, and return the seconds."""
    began = time.perf_counter()
    backhand.train(
        data=task.rows,
        eval_data=task.held_out,
        prompt="{text}\n" + QUESTION,
        completion="label",
        output=output,
        **task.training,
    )
    return time.perf_counter() - began


def measure_label_text(task: Task, adapter: Path) -> dict[str, float]:
    """Return the figures of the probabilities of the names, without a temperature."""
    prompts = [f"{text}\n{QUESTION}" for text in task.texts]
    answers = backhand.classify(prompts=prompts, labels=CLASSES, adapter=adapter, quiet=True, **task.model)
    return task.figures(np.array([[one[name] for name in CLASSES] for one in answers]))


def counted(task: Task) -> dict[str, dict[str, float]]:
    """Return the figures of classifiers on the counts of the words."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import MultinomialNB

    def counts(rows: list[dict[str, str]]) -> Floats:
        return np.array([[row["text"].split().count(word) for word in WORDS] for row in rows], dtype=np.float64)

    labels = [row["label"] for row in task.rows]
    fitted = {
        "naive Bayes on counts": MultinomialNB().fit(counts(task.rows), labels),
        "logistic regression on counts": LogisticRegression(max_iter=1000).fit(counts(task.rows), labels),
    }
    return {name: task.figures(one.predict_proba(counts(task.test))) for name, one in fitted.items()}


def measure(given: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Train the adapters and return their figures with those of Bayes' rule."""
    task = task_of(given)
    result = {"Bayes' rule": task.figures(task.truth)} | counted(task)
    decided: dict[str, tuple[str, dict[str, Any]]] = {
        "decide": ("decide", {}),
        "smoothed": ("decide, label smoothing 0.1", {"label_smoothing": 0.1}),
        "random": ("decide, random orders", {"option_order": "random"}),
    }
    for way, (name, options) in decided.items():
        if way in given.ways:
            seconds = train_to_decide(task, folder / way, **options)
            calibrated, uncalibrated = measure_decisions(task, folder / way / "adapter")
            result |= {name: calibrated | {"seconds": seconds}, f"{name}, uncalibrated": uncalibrated}
    if "text" in given.ways:
        seconds = train_label_text(task, folder / "named")
        named = measure_label_text(task, folder / "named" / "adapter")
        result["label text, uncalibrated"] = named | {"seconds": seconds}
    return result


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--held-out-rows", type=int, default=200)
    parser.add_argument("--test-rows", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--learning-rate", default="auto", help="a number, or auto")
    parser.add_argument("--layers", default="last:10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "known_posteriors.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(given, Path(folder))
    for name, one in result.items():
        print(f"{name:26}", "  ".join(f"{figure} {value:.4g}" for figure, value in one.items()))
    stored = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    del stored["output"], stored["ways"]
    whole = {"machine": describe_machine(), "options": stored, "figures": result}
    if given.output.exists() and (old := json.loads(given.output.read_text(encoding="utf-8")))["options"] == stored:
        whole["figures"] = old["figures"] | result
    given.output.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
