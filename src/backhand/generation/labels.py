"""Answers that are one of a few labels: finding the labels, and their probabilities under a model.

    log p(label | prompt) = Σ log p(token | all before it),   over the label's tokens and the one that ends the answer
    p(label)              = p(label | prompt) / Σ p(other | prompt) over all labels

The sum is not divided by the number of tokens. It is the log-probability that the model answers with exactly this
label, so p is the distribution of sampled answers if all other answers are rejected. The sum includes the token that
ends the answer. Without it, `good` would be as probable as all answers that begin with `good`.

A prompt is computed once for all labels, and so are the first tokens that labels have in common (`data.packing`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backhand.data.documents import RowRenderer
from backhand.data.examples import Example, encode_document
from backhand.data.pack import pack
from backhand.data.packing import micro_batches
from backhand.data.rows import Completion
from backhand.errors import UsageError
from backhand.generation.completer import Completer, require_finite
from backhand.nn.batch import pad_to_bucket
from backhand.words import shorten

Labels = Mapping[str, Sequence[int]]
"""Tokens of each label by its stripped text; the last token is the one that ends the answer."""

AUTO, NONE = "auto", "none"
MOST_LABELS, LONGEST_LABEL, ROWS_A_LABEL = 64, 60, 3
RULE = (
    f"answers are labels where they are 2 to {MOST_LABELS} different lines of at most {LONGEST_LABEL} characters, "
    f"each of them the answer of {ROWS_A_LABEL} rows on average"
)


def found_labels(
    examples: Iterable[Example], tokenizer: Any, stop_ids: Collection[int], names: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Find the labels of rows whose last answers follow `RULE`, sorted; empty if they do not.

    Answers that were cut before their end are ignored.

    Args:
        examples: the rows.
        tokenizer: decodes their answers.
        stop_ids: tokens that end an answer.
        names: look for these labels, and ignore the rule.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    for example in examples:
        begin, end = example.last_answer
        ids = example.input_ids[begin:end].tolist()
        stop = next((place for place, token in enumerate(ids) if token in stop_ids), None)
        if not ids or (len(counts) > 2 * MOST_LABELS and not names):
            return {}
        if stop is not None:
            counts[tuple(ids[: stop + 1])] += 1
    labels: dict[str, tuple[int, ...]] = {}
    for answer, _ in counts.most_common():  # if a label is tokenized in two ways, the frequent one
        labels.setdefault(str(tokenizer.decode(answer[:-1], skip_special_tokens=True)).strip(), answer)
    if names:
        return {name: labels[name] for name in names if name in labels}
    few = 2 <= len(labels) <= MOST_LABELS and ROWS_A_LABEL * len(labels) <= counts.total()
    short = all(text and len(text) <= LONGEST_LABEL and "\n" not in text for text in labels)
    return dict(sorted(labels.items())) if few and short else {}


def written_label(renderer: RowRenderer, text: str) -> tuple[int, ...]:
    """Tokenize a label that no row has; without a chat template, it begins with a space."""
    answer = text if renderer.has_template else f" {text}"
    (document,) = renderer.documents(Completion("?", answer, "", None, "labels"))
    example = encode_document(document, renderer.encoder)
    begin, end = example.last_answer
    return tuple(example.input_ids[begin:end].tolist())


def named_labels(names: Sequence[str], known: Labels, renderer: Callable[[], RowRenderer]) -> Labels:
    """Return the labels of these names: known ones as they are, others as the chat template writes them.

    Args:
        names: texts of the labels.
        known: labels whose tokens are known, from rows or from an adapter's record.
        renderer: creates a renderer of the chat template; called once, and only if a name is unknown.
    """
    unknown = [name for name in names if name not in known]
    made = renderer() if unknown else None
    written = {} if made is None else {name: written_label(made, name) for name in unknown}
    return {name: known[name] if name in known else written[name] for name in names}


def check_labels(labels: Labels, model: Completer) -> None:
    """Raise UsageError for a label that is longer than the context, or has tokens outside the vocabulary."""
    for name, ids in labels.items():
        if len(ids) >= model.context_tokens:
            raise UsageError(
                f"the label {shorten(name)!r} has {len(ids):,} tokens, and the model takes {model.context_tokens:,}",
                where="labels",
                next_step="give a shorter one; the prompt needs room as well",
            )
        if max(ids) >= model.vocab_size:
            raise UsageError(
                f"the label {shorten(name)!r} has token {max(ids)}, and the model knows {model.vocab_size}",
                where="labels",
                why="the tokenizer is not the one of this model",
            )


def longest_label(labels: Labels) -> int:
    """Return the number of tokens of the longest label, 0 without labels."""
    return max(map(len, labels.values()), default=0)


def label_log_probabilities(
    model: Completer,
    prompts: Sequence[Sequence[int]],
    labels: Labels,
    *,
    batch_rows: int = 16,
    on_done: Callable[[], object] = lambda: None,
) -> Tensor:
    """Return (prompts, labels) log-probabilities in nats, float64, on the CPU.

    Args:
        model: the model.
        prompts: token ids, at least one each.
        labels: the labels.
        batch_rows: prompts per pass; without shared prefixes, pairs of a prompt and a label per pass.
        on_done: called once per prompt.

    Raises:
        CheckError: the model computes NaN or infinity.
    """
    endings = [np.asarray(ids, dtype=np.int32) for ids in labels.values()]
    together = len(endings) if model.shares_prefixes else 1
    parts = [endings[start : start + together] for start in range(0, len(endings), together)]
    units = [(number, part) for number in range(len(prompts)) for part in range(len(parts))]
    lengths = [len(prompts[number]) + sum(map(len, parts[part])) for number, part in units]
    log_p = torch.zeros(len(units), together, dtype=torch.float64)
    for group in micro_batches(range(len(units)), lengths, max_rows=batch_rows):
        documents = [_document(prompts[units[unit][0]], ending) for unit in group for ending in parts[units[unit][1]]]
        batch = pad_to_bucket(pack(documents, share=model.shares_prefixes)).to(model.device)
        nats = model.token_losses(batch, exact=True).double().cpu().split(batch.document_tokens)
        log_p[group] = -torch.stack([losses.sum() for losses in nats]).view(len(group), together)
        for unit in group:
            if units[unit][1] == len(parts) - 1:
                on_done()
    require_finite(log_p)
    return log_p.view(len(prompts), len(endings))


def choose_labels(
    model: Completer, prompts: Sequence[Sequence[int]], labels: Labels, on_done: Callable[[], object] = lambda: None
) -> list[dict[str, float]]:
    """Return for each prompt the probabilities of all labels, the most probable first. They sum to 1."""
    probabilities = label_log_probabilities(model, prompts, labels, on_done=on_done).softmax(1).tolist()
    named = (dict(zip(labels, row, strict=True)) for row in probabilities)
    return [dict(sorted(row.items(), key=lambda label: -label[1])) for row in named]


def _document(prompt: Sequence[int], ending: np.ndarray[Any, Any]) -> Example:
    ids = np.concatenate((np.asarray(prompt, dtype=np.int32), ending))
    return Example(ids, np.arange(len(ids)) >= len(prompt), "")
