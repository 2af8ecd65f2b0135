"""A session with one model: it turns text into prompts, and answers into text, streamed or in bulk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from backhand.data.documents import RowRenderer
from backhand.data.examples import encode_document
from backhand.data.options import TemplateOptions
from backhand.data.rows import Completion, Conversation, Message, OneText
from backhand.errors import DataError
from backhand.generation.completer import Completer, require_finite
from backhand.generation.loading import LoadedModel
from backhand.generation.options import SamplingOptions

PROMPT = "prompt"


@dataclass(frozen=True)
class Answer:
    """An answer of a model."""

    text: str  # without control tokens, stop tokens and stop strings
    tokens: int  # number of generated tokens, including the stop token
    # `stop` if a stop token or string ended the answer, `length` if it reached the limit of tokens
    finish_reason: Literal["stop", "length"]


class GenerationSession:
    """A model with its tokenizer, chat template and stop tokens.

    Raises:
        UsageError: the chat template cannot be read, or a system message is given and there is no template.
    """

    def __init__(self, loaded: LoadedModel, template: TemplateOptions | None = None) -> None:
        template = template or TemplateOptions()
        self.model: Completer = loaded.model
        self.tokenizer: Any = loaded.tokenizer
        self.stop_ids = frozenset(loaded.stop_ids)
        self.renderer = RowRenderer(loaded.tokenizer, template)
        self.has_template = self.renderer.has_template

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids of one user turn and the start of its reply; without a chat template, of the text.

        Raises:
            DataError: the template refuses the text, or the result is empty.
        """
        return self._encode(Completion(prompt, None, "", None, PROMPT))

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation that ends with a user turn, and of the start of the reply.

        Raises:
            DataError: there is no chat template, or it refuses the conversation.
        """
        return self._encode(Conversation(tuple(messages), (False,) * len(messages), None, "conversation"))

    def answer(
        self, prompt_ids: Sequence[int], options: SamplingOptions, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """Answer one prompt.

        Args:
            prompt_ids: token ids of the prompt.
            options: sampling, and the end of the answer.
            on_text: receives every piece of the answer as soon as it is certain.

        Raises:
            DataError: the prompt leaves no room for an answer.
        """
        on_piece = None if on_text is None else lambda _, text: on_text(text)
        return self.answer_all([prompt_ids], options, on_text=on_piece)[0]

    def answer_all(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        *,
        sources: Sequence[str] | None = None,
        batch_rows: int = 64,
        on_text: Callable[[int, str], None] | None = None,
        on_done: Callable[[int], None] | None = None,
        on_answer: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """Answer many prompts at once. Each answer has its own random generator, so it does not depend on the others.

        Args:
            prompts: token ids of each prompt.
            options: sampling, and the end of an answer.
            sources: places of the prompts, for errors.
            batch_rows: maximum number of prompts computed together.
            on_text: receives (number of the prompt, piece of its answer) as soon as a piece is certain.
            on_done: receives the number of each prompt when its answer is complete.
            on_answer: receives the number of each prompt and its complete answer.

        Raises:
            DataError: a prompt leaves no room for an answer, or holds tokens that the model does not know.
            CheckError: the model computes NaN or infinity.
        """
        for number, prompt in enumerate(prompts):
            self.check(prompt, PROMPT if sources is None else sources[number])
        replies = [
            _Reply(TextStream(self.tokenizer, options.stop), self._room(prompt, options.max_new_tokens))
            for prompt in prompts
        ]
        generators = [torch.Generator().manual_seed((options.seed + number) % 2**63) for number in range(len(prompts))]

        def choose(numbers: Sequence[int], logits: Tensor) -> list[int]:
            require_finite(logits)
            if options.greedy or options.temperature == 0:
                greedy: list[int] = logits.argmax(-1).tolist()
                return greedy
            rows = zip(numbers, logits, strict=True)
            return [next_token(row_logits, options, generators[number]) for number, row_logits in rows]

        def finished(number: int, token: int) -> bool:
            reply = replies[number]
            text = reply.take(token, self.stop_ids)
            if text and on_text is not None:
                on_text(number, text)
            if reply.finish_reason is not None and on_done is not None:
                on_done(number)
            if reply.finish_reason is not None and on_answer is not None:
                on_answer(number, reply.answer())
            return reply.finish_reason is not None

        self.model.complete(prompts, choose, finished, max_new_tokens=options.max_new_tokens, batch_rows=batch_rows)
        return [reply.answer() for reply in replies]

    def _encode(self, row: OneText) -> list[int]:
        document, _ = self.renderer.prompt(row)
        ids: list[int] = encode_document(document, self.renderer.encoder).input_ids.tolist()
        if not ids:
            raise DataError("the prompt is empty", where=row.source)
        return ids

    def check(self, prompt: Sequence[int], source: str, answer_tokens: int = 1) -> None:
        """Check that a prompt can be answered.

        Args:
            prompt: token ids.
            source: place of the prompt, for errors.
            answer_tokens: number of tokens that must fit after the prompt.

        Raises:
            DataError: it is empty, leaves no room for an answer, or has tokens outside the vocabulary.
        """
        if not len(prompt):
            raise DataError("the prompt is empty", where=source)
        if max(prompt) >= self.model.vocab_size:
            raise DataError(
                f"the prompt holds token {max(prompt)}, and the model knows {self.model.vocab_size}",
                where=source,
                why="the tokenizer is not the one of this model",
            )
        if self._room(prompt, answer_tokens) < answer_tokens:
            label = f" with the {answer_tokens:,} of a label" if answer_tokens > 1 else ""
            raise DataError(
                f"the prompt has {len(prompt):,} tokens, and the model takes {self.model.context_tokens:,}{label}",
                where=source,
                next_step="shorten it; a reply needs room as well",
            )

    def _room(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """Return the maximum number of tokens of the answer to a prompt."""
        return max(0, min(max_new_tokens, self.model.context_tokens - len(prompt)))


class _Reply:
    """An answer that is being generated."""

    def __init__(self, stream: TextStream, room: int) -> None:
        self.stream = stream
        self.tokens = 0
        self.finish_reason: Literal["stop", "length"] | None = None
        self._room = room

    def take(self, token: int, stop_ids: frozenset[int]) -> str:
        """Add a token. Return the text that has become certain, and set finish_reason after the last token."""
        self.tokens += 1
        if token in stop_ids:
            self.finish_reason = "stop"
            return self.stream.finish()
        text = self.stream.push(token)
        if self.stream.stopped:
            self.finish_reason = "stop"
        elif self.tokens >= self._room:
            self.finish_reason = "length"
            text += self.stream.finish()
        return text

    def answer(self) -> Answer:
        """Return the answer so far."""
        return Answer(self.stream.text, self.tokens, self.finish_reason or "length")


# The choice of the next token: greedy, or drawn from an explicit generator.
#
# Drawing has the steps of transformers. First, logits are divided by the temperature: z' = z / temperature. Then top-k
# sets z'_i to -∞ unless it is at least the k-th largest; ties with it stay. Then top-p sorts p = softmax(z') in
# descending order. Token i stays while Σ_{j before i} p_j < top_p [arXiv:1904.09751, §3.1]. The token is drawn from the
# softmax of the remaining ones.
#
# The result depends only on logits, settings and generator.

# The nucleus is searched in this number of most probable tokens first, because sorting a vocabulary takes ten times as
# long.
NUCLEUS_FIRST_LOOK = 256


def next_token(logits: Tensor, sampling: SamplingOptions, generator: torch.Generator | None = None) -> int:
    """Choose a token: if greedy or at temperature 0 the most probable one, the lowest id among equals; else draw one.

    Args:
        logits: (vocab,), any floating dtype.
        sampling: temperature, top-k and top-p.
        generator: draws one number of torch.multinomial on the CPU; not needed if greedy.
    """
    if sampling.greedy or sampling.temperature == 0:
        return int(logits.argmax())
    # Drawn on the CPU, so that a seed gives the same token on every device.
    probabilities = kept_probabilities(logits.float().cpu(), sampling)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def kept_probabilities(logits: Tensor, sampling: SamplingOptions) -> Tensor:
    """Return the (vocab,) probabilities to draw from, which are 0 for tokens outside top-k or top-p.

    Args:
        logits: (vocab,) float32 or float64.
        sampling: temperature above 0, top_k at least 1, top_p in (0, 1].
    """
    scaled = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[0]:
        lowest_kept = scaled.topk(sampling.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < lowest_kept, float("-inf"))
    probabilities = scaled.softmax(-1)
    if sampling.top_p < 1:
        probabilities = _nucleus(probabilities, sampling.top_p)
    return probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the most probable tokens that together reach top_p, at least one, and normalise their probabilities."""
    vocab = probabilities.shape[0]
    values, indices = probabilities.topk(min(NUCLEUS_FIRST_LOOK, vocab))
    if float(values.sum()) < top_p:
        values, indices = probabilities.sort(descending=True, stable=True)
    before = values.cumsum(-1) - values
    kept = before < top_p
    kept[0] = True
    values = values * kept
    return torch.zeros_like(probabilities).scatter_(0, indices, values / values.sum())


REPLACEMENT = "\ufffd"
# Fewest tokens that are decoded again before new ones, because tokenizers treat the first token of a text differently.
CONTEXT_TOKENS = 4


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Decode tokens without control tokens and without cleaning up spaces."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TextStream:
    """Incremental decoder of tokens that ends at a stop string.

    It returns text as soon as it is certain. All parts together are the decoded tokens, up to the first stop string.

    Args:
        tokenizer: decodes tokens.
        stop: strings that end the text; they are not part of it.

    Attributes:
        text: all text so far.
        stopped: True after a stop string; no text follows it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(string for string in stop if string)
        # Tokens whose text has been returned, in units that end at character boundaries.
        self._context: list[list[int]] = []
        self._pending: list[int] = []
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add one token. Return the text that has become certain, which may be empty or span several tokens."""
        if self.stopped:
            return ""
        self._pending.append(token_id)
        decoded = self._decode_pending()
        if decoded.endswith(REPLACEMENT):
            # These may be the first bytes of a character that later tokens complete.
            return ""
        self._context.append(self._pending)
        self._pending = []
        while sum(map(len, self._context[1:])) >= CONTEXT_TOKENS:
            del self._context[0]
        return self._release(decoded, final=False)

    def finish(self) -> str:
        """Return the text that was held back, with incomplete characters as U+FFFD."""
        if self.stopped:
            return ""
        return self._release(self._decode_pending() if self._pending else "", final=True)

    def _decode_pending(self) -> str:
        context = [token_id for unit in self._context for token_id in unit]
        before = decode(self._tokenizer, context)
        return decode(self._tokenizer, context + self._pending)[len(before) :]

    def _release(self, new: str, *, final: bool) -> str:
        self._held += new
        ends = [at for at in (self._held.find(string) for string in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            certain, self._held = self._held[: min(ends)], ""
        else:
            kept = 0 if final else self._possible_stop()
            certain, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self.text += certain
        return certain

    def _possible_stop(self) -> int:
        """Return the number of characters at the end that may be the start of a stop string."""
        longest = max((len(string) for string in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._stop):
                return length
        return 0
