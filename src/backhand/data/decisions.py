"""Questions with a fixed set of answers about a state, and the prompt in which servers ask them.

    {state}

    Question: {instructions}
    A: {option} - {description}
    B: {option}
    Answer with the letter of one option only.

This is version 1 of SGLang's decision prompt (`serving_decisions.py`) and the prompt of vLLM's structured decisions
(`question_types.py`). The reply is one label, which must be one token: a letter for a choice, `yes` or `no` for a yes
or no question, a digit for the level of a score. SGLang words yes or no questions in another way. llama.cpp's decision
type `lfm2-d1` reads the same labels from a prompt that the model's file contains.

Options have a canonical order: those of a choice are sorted by name, yes comes before no, and levels ascend. Evaluation
and `backhand decide` use this order only. Training can show the options of a choice in orders that are drawn from seed,
epoch and the row's own text (`option_order`).

llama.cpp takes the larger of the logits of `yes`, `Yes` and `YES`, and vLLM adds the probabilities of `yes` and `Yes`.
Therefore these other spellings are options that are never right (`SPELLINGS`). Training makes them improbable, so that
all servers agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import ascii_uppercase, digits
from typing import Any, Literal, TypeVar, get_args

from backhand.data.label_names import as_list, joined_labels
from backhand.data.raw_rows import describe, number_of
from backhand.data.rows import Completion, OneText, Row
from backhand.errors import DataError, not_none
from backhand.other_names import value_suggestion
from backhand.words import begin_alike, label_text, name_list, nearest_names, shorten

Document = TypeVar("Document")

PROMPT_VERSION = 1
"""Version of the prompt's wording and labels, as SGLang counts them."""

QuestionType = Literal["choice", "noul", "score"]
"""A choice between named options; yes or no; a level of an ordered scale. The names are those of the protocol."""

LABELS: dict[QuestionType, tuple[str, ...]] = {
    "choice": tuple(ascii_uppercase),
    "noul": ("yes", "no"),
    "score": tuple(digits),
}
SPELLINGS: dict[QuestionType, tuple[str, ...]] = {"choice": (), "noul": ("Yes", "No", "YES", "NO"), "score": ()}
"""Other spellings of labels that servers read as well."""
CLOSINGS: dict[QuestionType, str] = {
    "choice": "Answer with the letter of one option only.",
    "noul": "Answer with yes or no only.",
    "score": "Answer with the number of one level only.",
}
TRUE, FALSE = "true", "false"
_YES = {"true": TRUE, "yes": TRUE, "1": TRUE, "false": FALSE, "no": FALSE, "0": FALSE}
_QUESTION_KEYS = ("type", "instructions", "criteria")
_OTHER_KEYS = {
    **dict.fromkeys(("question", "text", "prompt"), "instructions"),
    **dict.fromkeys(("options", "choices", "labels", "levels"), "criteria"),
}
"""Keys of a question by names that are not similar to them."""
_SUM_ERROR = 1e-3
"""Largest difference of the sum of given probabilities from 1."""


@dataclass(frozen=True)
class Question:
    """One question about a state, with its options in canonical order."""

    name: str
    type: QuestionType
    instructions: str
    keys: tuple[
        str, ...
    ]  # names of the options; `true` and `false` for yes or no, the numbers of the levels for a score
    descriptions: tuple[str | None, ...]  # per option; for a score, the names of the levels

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order in which options are shown."""
        return LABELS[self.type][: len(self.keys)]

    def prompt(self, state: str, order: Sequence[int]) -> str:
        """Return the prompt with the options in the given order.

        Args:
            order: index of the option that has each label.
        """
        lines = [f"Question: {self.instructions}"] if self.instructions else []
        for label, option in zip(self.labels, order, strict=True):
            if text := self.option_texts[option]:
                lines.append(f"{label}: {text}")
        return "\n".join((state, "", *lines, CLOSINGS[self.type]))

    @property
    def option_texts(self) -> tuple[str, ...]:
        """The text of each option in the prompt: its description, for a choice with its name. It can be empty."""
        described = tuple(text or "" for text in self.descriptions)
        if self.type != "choice":
            return described
        return tuple(f"{key} - {text}" if text else key for key, text in zip(self.keys, described, strict=True))

    @property
    def has_letters(self) -> bool:
        """True if the options are single letters, which llama.cpp uses as labels in another prompt."""
        return self.type == "choice" and all(len(key) == 1 and key.isalpha() for key in self.keys)

    @property
    def canonical_order(self) -> tuple[int, ...]:
        """The order in which evaluation and `backhand decide` show the options."""
        return tuple(range(len(self.keys)))

    def random_order(self, state: str, *draw: int) -> tuple[int, ...]:
        """Return an order drawn from `draw`, question and state. Only the options of a choice change their order."""
        if self.type != "choice":
            return self.canonical_order
        keyed = [
            hashlib.sha256(repr((draw, self.name, state, key)).encode(errors="replace")).digest() for key in self.keys
        ]
        return tuple(sorted(self.canonical_order, key=keyed.__getitem__))

    @property
    def option_names(self) -> tuple[str, ...]:
        """The options in the words of the rows: yes and no, or the names of levels. No two are equal."""
        if self.type == "noul":
            return self.labels
        if self.type == "choice":
            return self.keys
        names = tuple(name or key for name, key in zip(self.descriptions, self.keys, strict=True))
        if len({*names}) == len(names):
            return names
        return tuple(f"{key}: {name}" for key, name in zip(self.keys, names, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return the question in the protocol's form."""
        criteria: Any = dict(zip(self.keys, self.descriptions, strict=True))
        if self.type == "score":
            criteria = list(self.descriptions)
        elif self.type == "noul":
            criteria = {key: description for key, description in criteria.items() if description}
        return {"type": self.type, "instructions": self.instructions, "criteria": criteria}

    def targets(self, answer: Any, source: str) -> tuple[float, ...]:
        """Return the probability of every option.

        Args:
            answer: an option, a level, true or false, or probabilities by option; for yes or no also the probability of
                yes as a fraction.

        Raises:
            DataError: the answer is none of these.
        """
        if isinstance(answer, Mapping):
            return self._probabilities(answer, source)
        if self.type == "noul" and isinstance(answer, float) and 0 < answer < 1:
            return answer, 1 - answer
        key = as_key(answer)
        if self.type == "noul":
            key = _YES.get(key.lower(), key)
        elif self.type == "score" and key not in self.keys and key in self.descriptions:
            key = self.keys[self.descriptions.index(key)]
        if key not in self.keys:
            raise DataError(
                f"the answer {shorten(key)!r} to {self.name} is none of its options",
                where=source,
                why=f"the options are {name_list(map(label_text, self.keys))}",
                next_step="correct the answer, or add the option to the question",
            )
        return tuple(float(key == one) for one in self.keys)

    def answer(self, p: Sequence[float]) -> dict[str, Any]:
        """Return the answer with these probabilities in the protocol's form.

        The confidence is llama.cpp's: 0 for equal probabilities of all options, 1 for a certain answer.
        """
        if self.type == "noul":
            return {"type": "noul", "noul": p[0]}
        best, count = max(range(len(p)), key=p.__getitem__), len(p)
        probabilities = dict(zip(self.keys, p, strict=True))
        if self.type == "choice":
            confidence = max(0.0, (p[best] - 1 / count) / (1 - 1 / count))
            chosen = self.keys[best]
            return {"type": "choice", "choice": chosen, "probabilities": probabilities, "confidence": confidence}
        distance = sum(one * abs(level - best) for level, one in enumerate(p))
        largest = sum(abs(level - (count - 1) / 2) for level in range(count)) / count
        return {
            "type": "score",
            "score": sum(level * one for level, one in enumerate(p)),
            "legend": dict(zip(self.keys, self.descriptions, strict=True)),
            "probabilities": probabilities,
            "confidence": max(0.0, 1 - distance / largest),
        }

    def _probabilities(self, answer: Mapping[Any, Any], source: str) -> tuple[float, ...]:
        given = {as_key(key): p for key, p in answer.items()}
        if self.type == "noul":
            given = {_YES.get(key.lower(), ""): p for key, p in given.items()}
        values = [given.get(key, 0.0) for key in self.keys]
        numbers = all(isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p <= 1 for p in values)
        if given.keys() - {*self.keys} or not numbers or abs(sum(values) - 1) > _SUM_ERROR:
            raise DataError(
                f"the probabilities of {self.name} are not numbers from 0 to 1 with the sum 1, one for each option",
                where=source,
                why=f"the options are {name_list(map(label_text, self.keys))}",
            )
        return tuple(float(p) / sum(values) for p in values)


def questions_of(specs: Any, source: str) -> dict[str, Question]:
    """Read a table of questions by name in the protocol's form.

    Raises:
        DataError: it is no table or empty, or a question is malformed; see `question_of`.
    """
    if not isinstance(specs, Mapping) or not specs:
        wrong = "empty" if isinstance(specs, Mapping) else f"{describe(specs)}, not a table of questions by name"
        raise DataError(f"questions is {wrong}", where=source)
    return {str(name): question_of(str(name), spec, source) for name, spec in specs.items()}


def question_of(name: str, spec: Any, source: str) -> Question:
    """Read a question in the protocol's form.

    Raises:
        DataError: the question is malformed, has an unknown key, or has more options than there are labels.
    """
    if not isinstance(spec, Mapping):
        form = {"type": "choice", "instructions": "Which?", "criteria": {"a": "…", "b": "…"}}
        raise DataError(
            f"the question {name!r} is {describe(spec)}, not a table of {name_list(_QUESTION_KEYS)}",
            where=source,
            next_step=f"write it as {json.dumps({name: form}, ensure_ascii=False)}",
        )
    if unknown := [str(key) for key in spec if key not in _QUESTION_KEYS]:
        near = _OTHER_KEYS.get(unknown[0]) or next(iter(nearest_names(unknown[0], _QUESTION_KEYS, cutoff=0.6)), None)
        raise DataError(
            f"the question {name!r} has the unknown key {shorten(unknown[0])!r}",
            where=source,
            why=f"the keys of a question are {name_list(_QUESTION_KEYS)}",
            next_step=f"did you mean {near}?" if near else None,
        )
    kind: Any = spec.get("type")
    if kind not in (types := get_args(QuestionType)):
        wrong = "no type" if kind is None else f"the unknown type {shorten(str(kind))!r}"
        raise DataError(
            f"the question {name!r} has {wrong}",
            where=source,
            why="a type is choice, noul (yes or no) or score",
            next_step=value_suggestion(kind, types),
        )
    criteria, instructions = spec.get("criteria"), spec.get("instructions")
    if kind == "score" and isinstance(criteria, list):
        options = {str(level): text for level, text in enumerate(criteria)}
    elif kind == "choice" and isinstance(criteria, Mapping):
        options = {str(key): criteria[key] for key in sorted(criteria)}
    elif kind == "noul" and isinstance(criteria, Mapping | None):
        described = {_YES.get(str(key).lower()): text for key, text in (criteria or {}).items()}
        if None in described:
            raise DataError(f"the criteria of {name!r} are neither true nor false", where=source)
        options = {TRUE: described.get(TRUE), FALSE: described.get(FALSE)}
    else:
        expected = "list of levels" if kind == "score" else "table of options"
        raise DataError(f"the criteria of {name!r} are no {expected}", where=source)
    descriptions = tuple(None if text is None else as_key(text) for text in options.values())
    return _checked(Question(name, kind, as_key(instructions or ""), tuple(options), descriptions), source)


def inferred_question(name: str, instructions: str, answers: Sequence[Any], source: str) -> Question:
    """Return the question whose answers these are.

    `true` and `false`, `yes` and `no`, or 0 and 1 make a yes or no question. Three to ten successive whole numbers make
    a score. Everything else is a choice.

    Args:
        answers: all different answers.

    Raises:
        DataError: there is one answer only, or there are more than labels.
    """
    keys = sorted({as_key(answer) for answer in answers})
    meant = {_YES.get(key.lower()) for key in keys}
    if meant == {TRUE, FALSE} and len(keys) <= len(LABELS["noul"]):
        return Question(name, "noul", instructions, (TRUE, FALSE), (None, None))
    numbers = sorted(int(key) for key in keys if key.isdecimal())
    successive = len(numbers) == len(keys) and len(numbers) == len({*numbers})
    if successive and len(LABELS["score"]) >= len(keys) > 2 and numbers[-1] - numbers[0] == len(keys) - 1:
        levels = tuple(map(str, numbers))
        return Question(name, "score", instructions, tuple(map(str, range(len(levels)))), levels)
    return _checked(Question(name, "choice", instructions, tuple(keys), (None,) * len(keys)), source)


def _checked(question: Question, source: str) -> Question:
    labels = LABELS[question.type]
    if len(question.keys) > len(labels):
        joined = joined_labels(question.keys)
        raise DataError(
            f"{question.name} has {len(question.keys):,} options, but there are labels for {len(labels)}",
            where=source,
            why=f"the labels {labels[0]} to {labels[-1]} are one token each, as servers read them",
            next_step="name another column with --question; or, if they are quantities rather than row numbers, "
            "add --objective classify --problem-type regression, with the text as --prompt and the number as "
            "--completion"
            if all(number_of(key) is not None for key in question.keys)
            else f"train several labels of a text with --objective classify, and {as_list(next(iter(joined.values())))}"
            if joined
            else "merge rare options, or ask two questions",
        )
    if len(question.keys) < 2:
        only = shorten(question.keys[0]) if question.keys else "none"
        raise DataError(
            f"{question.name} has one answer only: {only}",
            where=source,
            next_step="give rows with other answers, or leave the question out",
        )
    return question


def as_key(value: Any) -> str:
    """Return a value as the name of an option: text without surrounding space, whole numbers without a fraction."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False)


def state_text(state: Any) -> str:
    """Return a state as text: text unchanged, everything else as JSON, with dates and other objects as text."""
    return state if isinstance(state, str) else json.dumps(state, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class Asked:
    """A question of a row, with its answer."""

    question: Question
    targets: tuple[float, ...] | None  # probability of each option, in canonical order; None without an answer


@dataclass(frozen=True)
class DecisionRow(Row):
    """A state with questions about it."""

    state: str
    asked: tuple[Asked, ...]
    source: str
    # number of spellings that each question has as options that are never right
    spellings: tuple[int, ...] = ()
    by_name: bool = False  # True if every choice is asked a second time, with the names of its options as answers

    kind = "decisions"
    has_targets = True

    @property
    def parts(self) -> tuple[OneText, ...]:
        return tuple(decision_text(self, place, one.question.canonical_order) for place, one in enumerate(self.asked))

    @property
    def key(self) -> str:
        return json.dumps(
            [self.state, [[one.question.name, one.question.to_json(), one.targets] for one in self.asked]]
        )

    def placeholders(self, documents: int) -> int:  # noqa: ARG002
        return 0

    def answered(self, documents: Sequence[Document]) -> list[Document]:
        """Return the documents that end in the label of the row's own answer, one per question.

        Args:
            documents: all documents of the row.
        """
        first, answered = 0, []
        for asked, size in zip(self.asked, self.sizes, strict=True):
            targets = not_none(asked.targets)
            answered.append(documents[first + targets.index(max(targets))])
            first += size
        return answered

    def shown(self, documents: Sequence[Any]) -> list[tuple[Any, str]]:
        return [(document, "") for document in self.answered(documents)]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of scored labels of each question: its options, then the other spellings."""
        return tuple(len(one.question.keys) + extra for one, extra in zip(self.asked, self.spellings, strict=True))

    @property
    def named(self) -> tuple[Asked, ...]:
        """The questions that are asked a second time, after all others."""
        return tuple(one for one in self.asked if one.question.type == "choice") if self.by_name else ()

    @property
    def name_sizes(self) -> tuple[int, ...]:
        """Number of names of each question that is asked a second time."""
        return tuple(len(one.question.keys) for one in self.named)


def decision_text(row: DecisionRow, place: int, order: Sequence[int]) -> Completion:
    """Return the prompt of a question of a row with its first label as the completion.

    Args:
        place: index of the question in the row.
        order: index of the option that has each label.
    """
    question = row.asked[place].question
    return Completion(question.prompt(row.state, order), question.labels[0], "\n", None, row.source)


class LabelTokens:
    """The token of every label at the start of an answer.

    Args:
        reply: returns the tokens of a reply with this text, including those that end it.
    """

    def __init__(self, reply: Callable[[str], tuple[int, ...]]) -> None:
        self._reply = reply
        self._known: dict[str, int | None] = {}

    @property
    def lead(self) -> tuple[int, ...]:
        """The tokens that the chat template writes before every answer. They belong to the prompt."""
        return self._around[0]

    def answer(self, text: str) -> tuple[int, ...] | None:
        """Return the tokens of an answer with this text, including those that end the reply.

        Returns:
            None if the reply does not begin with `lead`: the tokenizer merges the end of the lead with the text.
        """
        reply, length = self._reply(text), len(self.lead)
        return reply[length:] if reply[:length] == self.lead else None

    def of(self, question: Question) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens of the labels of a question, and of its other spellings that are one token.

        Raises:
            DataError: a label is not one token, or two labels have the same token.
        """
        tokens = [self._token(label) for label in question.labels]
        for label, token in zip(question.labels, tokens, strict=True):
            if token is None or tokens.count(token) > 1:
                raise DataError(
                    f"the label {label!r} is not one token of its own at the start of a reply",
                    where=question.name,
                    why="a decision is the probability of one token, so this tokenizer cannot be used for "
                    f"{question.type} questions of {len(question.keys)} options",
                    next_step="use another base model, or questions with fewer options",
                )
        others = [self._token(text) for text in SPELLINGS[question.type]]
        spare = dict.fromkeys(token for token in others if token is not None and token not in tokens)
        return tuple(token for token in tokens if token is not None), tuple(spare)

    @cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens before and after every answer. The shorter of two answers is one token."""
        one, other = self._reply("A"), self._reply("0")
        lead = one[: begin_alike(one, other)]
        return lead, min(one, other, key=len)[len(lead) + 1 :]

    def _token(self, label: str) -> int | None:
        """Return the token of a label, or None if it is not one token."""
        if label not in self._known:
            first, *rest = self.answer(label) or (None,)
            self._known[label] = first if tuple(rest) == self._around[1] else None
        return self._known[label]
