"""Encode rows of decisions: one document per label of each question, all with the same prompt.

    state and question 1   →   prompt tokens A,   prompt tokens B
    state and question 2   →   prompt tokens yes,   prompt tokens no

The last token of each document is its only supervised token. The documents of a row begin with the same tokens, which
are computed once (`data.prefix_forest`).

As in vLLM and SGLang, the template's thoughts are switched off (`chat.thoughts_off`). The label comes after everything
that the template writes before an answer, such as an empty thought or the name of a channel.

Training rows also have the names of the options of each choice as answers to its prompt. A model knows what *billing*
means, and learns from few rows which texts it fits. The letters learn from the same hidden states. Without the names,
a small model takes more steps, and decides other rows worse.

For the same reason, further rows have the name of an option as their text, and this option as their answer
(`rows_of_options`). From them the model learns early which letter each name has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice

import numpy as np

from backhand.data.decisions import Asked, DecisionRow, LabelTokens, decision_text
from backhand.data.documents import RowRenderer
from backhand.data.examples import Example, encode_document
from backhand.data.rows import Completion
from backhand.data.stored_examples import ExampleWriter, StoredExamples
from backhand.data.text_encoder import TokenIds

_ROWS_AT_ONCE = 256


class DecisionEncoder:
    """Make the documents of rows of decisions.

    Args:
        renderer: renders prompts and replies.
        max_length: largest number of tokens of a document.
    """

    def __init__(self, renderer: RowRenderer, max_length: int) -> None:
        self._renderer, self._max_length = renderer, max_length
        self._labels = LabelTokens(Replies(renderer))

    @property
    def prompt_end(self) -> str:
        """The text between the prompt of generation and the answer."""
        return self._renderer.decode(self._labels.lead)

    def example(self, row: DecisionRow, orders: Sequence[Sequence[int]], encoded: Sequence[Example]) -> Example | None:
        """Return the example of a row, or None if a prompt is longer than `max_length`.

        Its documents are in the order of the questions and, within a question, of the options in canonical order. The
        other spellings of labels come last.

        Args:
            orders: per question, the index of the option that has each label.
            encoded: per question, the encoded `decision_text` in this order.

        Raises:
            DataError: a label is not one token.
        """
        documents: list[Example] = []
        spellings: list[int] = []
        for asked, order, one in zip(row.asked, orders, encoded, strict=True):
            begin, _ = one.last_answer
            prompt = one.input_ids[: begin + len(self._labels.lead)]
            if len(prompt) >= self._max_length:
                return None
            tokens, others = self._labels.of(asked.question)
            by_option = [tokens[order.index(option)] for option in asked.question.canonical_order]
            documents += [ending_in(prompt, (token,), row.source) for token in (*by_option, *others)]
            spellings.append(len(others))
        return replace(documents[0], others=tuple(documents[1:]), facts=replace(row, spellings=tuple(spellings)))

    def encode(self, rows: Sequence[DecisionRow], *draw: int) -> list[Example | None]:
        """Encode rows together; None for a row whose prompt is longer than `max_length`.

        Args:
            draw: numbers that determine random orders of the options of choices, together with the row's text; none for
                the canonical order.
        """
        orders = [
            [one.question.random_order(row.state, *draw) if draw else one.question.canonical_order for one in row.asked]
            for row in rows
        ]
        texts = [
            decision_text(row, place, order)
            for row, of_row in zip(rows, orders, strict=True)
            for place, order in enumerate(of_row)
        ]
        encoder = self._renderer.encoder
        documents = list(chain.from_iterable(map(self._renderer.documents, texts)))
        pairs = zip(documents, encoder.encode_plain(documents), strict=True)
        encoded = (encode_document(document, encoder, encoding) for document, encoding in pairs)
        return [
            self.example(row, of_row, list(islice(encoded, len(of_row))))
            for row, of_row in zip(rows, orders, strict=True)
        ]

    def for_training(
        self, examples: StoredExamples, draws: Sequence[Sequence[int]], option_rows: int = 0
    ) -> StoredExamples:
        """Return the examples with the names of options as further answers, and the rows of options after them.

        Args:
            draws: the orders of the options of every choice, see `encode`. A row that becomes too long keeps its order.
                All examples are returned once for each of them.
            option_rows: see `rows_of_options`.
        """
        of_options = [one for one in self.encode(rows_of_options(examples, option_rows)) if one is not None]
        writer = ExampleWriter()
        for draw in draws:
            starts = range(0, len(examples), _ROWS_AT_ONCE)
            for part in chain((examples[start : start + _ROWS_AT_ONCE] for start in starts), [of_options]):
                turned: Sequence[Example | None] = part
                if draw:
                    turned = self.encode([one.facts_as(DecisionRow) for one in part], *draw)
                writer.add_all(self._with_names(other or example) for example, other in zip(part, turned, strict=True))
        return writer.stored()

    def _with_names(self, example: Example) -> Example:
        """Return the example with the names of options.

        The example is unchanged if it has no choice, would become too long, or has a name whose tokens merge with the
        end of the prompt.
        """
        row, documents = example.facts_as(DecisionRow), example.documents
        names: list[Example] = []
        first = 0
        for asked, size in zip(row.asked, row.sizes, strict=True):
            if asked.question.type == "choice":
                prompt = documents[first].input_ids[:-1]
                answers = [self._labels.answer(key) for key in asked.question.keys]
                names += [ending_in(prompt, answer, row.source) for answer in answers if answer is not None]
                if None in answers:
                    return example
            first += size
        if max(map(len, names), default=0) > self._max_length:
            return example
        return replace(example, others=(*example.others, *names), facts=replace(row, by_name=True))


def rows_of_options(examples: StoredExamples, copies: int) -> list[DecisionRow]:
    """Return rows that ask for an option with its own name as their text.

    Args:
        copies: rows of each option of each choice. There are fewer if all of them would be more than a quarter of the
            examples.
    """
    questions = dict.fromkeys(asked.question for row in examples.facts(DecisionRow) for asked in row.asked)
    choices = [one for one in questions if one.type == "choice"]
    copies = min(copies, len(examples) // (4 * max(1, sum(len(one.keys) for one in choices))))
    return [
        DecisionRow(
            text, (Asked(question, question.targets(key, question.name)),), f"the option {key} of {question.name}"
        )
        for question in choices
        for key, text in zip(question.keys, question.option_texts, strict=True)
        for _ in range(copies)
    ]


class Replies:
    """The tokens of short replies.

    Args:
        renderer: renders them.
    """

    def __init__(self, renderer: RowRenderer) -> None:
        self._renderer = renderer
        self._known: dict[str, tuple[int, ...]] = {}

    def __call__(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a reply with this text, including those that end it."""
        if text not in self._known:
            (document,) = self._renderer.documents(Completion("?", text, "\n", None, "labels"))
            example = encode_document(document, self._renderer.encoder)
            begin, end = example.last_answer
            self._known[text] = tuple(example.input_ids[begin:end].tolist())
        return self._known[text]


def ending_in(prompt: TokenIds, answer: Sequence[int], source: str) -> Example:
    """Return a document of a prompt and an answer, which is supervised."""
    ids = np.append(prompt, np.array(answer, dtype=np.int32))
    return Example(ids, np.arange(len(ids)) >= len(prompt), source)
