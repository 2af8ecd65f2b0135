"""One model with its tokenizer, template and stop tokens: prompts from text, answers as text, streamed or in bulk."""

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
from backhand.generate.completer import Completer, require_finite
from backhand.generate.loading import LoadedModel
from backhand.generate.options import SamplingOptions

PROMPT = "prompt"


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str  # without control tokens, stop tokens and stop strings
    tokens: int  # how many were generated, the stop token among them
    # `stop` where the model or a stop string ended it, `length` where it ran out of tokens
    finish_reason: Literal["stop", "length"]


class GenerationSession:
    """Asks one model.

    Raises:
        UsageError: the chat template cannot be read, or a system message is given where no template could take it.
    """

    def __init__(self, loaded: LoadedModel, template: TemplateOptions | None = None) -> None:
        template = template or TemplateOptions()
        self.model: Completer = loaded.model
        self.tokenizer: Any = loaded.tokenizer
        self.stop_ids = frozenset(loaded.stop_ids)
        self.renderer = RowRenderer(loaded.tokenizer, template)
        self.has_template = self.renderer.has_template

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of one user turn and the beginning of its reply; without a chat template, of the text as it stands.

        Raises:
            DataError: the template refuses it, or nothing of it is left.
        """
        return self._encode(Completion(prompt, None, "", None, PROMPT))

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that ends with a user turn, and of the beginning of the reply.

        Raises:
            DataError: there is no chat template, or it refuses the conversation.
        """
        return self._encode(Conversation(tuple(messages), (False,) * len(messages), None, "conversation"))

    def answer(
        self, prompt_ids: Sequence[int], options: SamplingOptions, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """Answer one prompt.

        Args:
            on_text: given every piece of the answer as soon as it is certain.

        Raises:
            DataError: the prompt leaves no room for an answer.
        """
        told = None if on_text is None else lambda _, text: on_text(text)
        return self.answer_all([prompt_ids], options, on_text=told)[0]

    def answer_all(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        *,
        sources: Sequence[str] | None = None,
        batch_rows: int = 64,
        on_text: Callable[[int, str], None] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Answer prompts, many at once; each is drawn from its own generator, so that the others change nothing.

        Args:
            on_text: given (number of the prompt, piece of its answer) as soon as a piece is certain.
            on_done: given the number of each prompt when its answer is complete.

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
                likeliest: list[int] = logits.argmax(-1).tolist()
                return likeliest
            rows = zip(numbers, logits, strict=True)
            return [next_token(row_logits, options, generators[number]) for number, row_logits in rows]

        def finished(number: int, token: int) -> bool:
            reply = replies[number]
            text = reply.take(token, self.stop_ids)
            if text and on_text is not None:
                on_text(number, text)
            if reply.finish_reason is not None and on_done is not None:
                on_done(number)
            return reply.finish_reason is not None

        self.model.complete(prompts, choose, finished, max_new_tokens=options.max_new_tokens, batch_rows=batch_rows)
        return [Answer(reply.stream.text, reply.tokens, reply.finish_reason or "length") for reply in replies]

    def _encode(self, row: OneText) -> list[int]:
        document, _ = self.renderer.prompt(row)
        ids: list[int] = encode_document(document, self.renderer.encoder).input_ids.tolist()
        if not ids:
            raise DataError("the prompt is empty", where=row.source)
        return ids

    def check(self, prompt: Sequence[int], source: str, answer_tokens: int = 1) -> None:
        """Check that a prompt can be answered.

        Args:
            answer_tokens: tokens that the shortest possible answer needs room for.

        Raises:
            DataError: it is empty, leaves no room for an answer, or holds tokens that the model does not know.
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
        """Tokens that the answer to a prompt may have."""
        return max(0, min(max_new_tokens, self.model.context_tokens - len(prompt)))


class _Reply:
    """One answer as it comes."""

    def __init__(self, stream: TextStream, room: int) -> None:
        self.stream = stream
        self.tokens = 0
        self.finish_reason: Literal["stop", "length"] | None = None
        self._room = room

    def take(self, token: int, stop_ids: frozenset[int]) -> str:
        """Take a token; return the text that has become certain, and set finish_reason when it was the last one."""
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


# The next token from logits: greedy, or drawn after temperature, top-k and top-p, from an explicit generator.
#
#     z' = z / temperature
#     top-k:  z'_i ← -∞ unless z'_i is at least the k-th largest (ties with it stay)
#     top-p:  p = softmax(z'), sorted descending; token i stays while Σ_{j before i} p_j < top_p
#             [arXiv:1904.09751, §3.1]
#     draw from softmax of what is left
#
# in this order, which is transformers'. The result depends on logits, settings and generator only.

# The nucleus is looked for among so many likeliest tokens first; sorting a whole vocabulary costs ten times as much.
NUCLEUS_FIRST_LOOK = 256


def next_token(logits: Tensor, sampling: SamplingOptions, generator: torch.Generator | None = None) -> int:
    """Choose a token: the likeliest, the lowest id among equals, if greedy or at temperature 0; else a drawn one.

    Args:
        logits: (vocab,), any floating dtype.
        generator: on the CPU, draws one number of torch.multinomial; only greedy goes without.
    """
    if sampling.greedy or sampling.temperature == 0:
        return int(logits.argmax())
    # Drawn on the CPU whatever the device, so that a seed means the same everywhere.
    probabilities = kept_probabilities(logits.float().cpu(), sampling)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def kept_probabilities(logits: Tensor, sampling: SamplingOptions) -> Tensor:
    """(vocab,) probabilities that the token is drawn from; zero where top-k or top-p cut.

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
    """The likeliest tokens that together reach top_p, at least one, their probabilities summing to 1 again."""
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
# Tokens at least that are decoded again to the left of new ones: tokenizers treat the first of a text in their own way.
CONTEXT_TOKENS = 4


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """All tokens to text, control tokens left out, nothing tidied up."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TextStream:
    """Tokens in, text out as soon as it is certain; the parts put together are the decoded whole, up to a stop string.

    Args:
        stop: strings that end the text; they are not part of it.

    Attributes:
        stopped: whether a stop string was met; nothing comes after it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(string for string in stop if string)
        # Tokens whose text has been given out, in units that each ended with a whole character.
        self._context: list[list[int]] = []
        self._pending: list[int] = []
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take one token; return the text that has become certain, often "" and sometimes several tokens' worth."""
        if self.stopped:
            return ""
        self._pending.append(token_id)
        decoded = self._decode_pending()
        if decoded.endswith(REPLACEMENT):
            # Perhaps the first bytes of a character whose others are still to come.
            return ""
        self._context.append(self._pending)
        self._pending = []
        while sum(map(len, self._context[1:])) >= CONTEXT_TOKENS:
            del self._context[0]
        return self._release(decoded, final=False)

    def finish(self) -> str:
        """The end: what was held back, unfinished characters as U+FFFD."""
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
        """Characters at the end that a stop string may begin with."""
        longest = max((len(string) for string in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._stop):
                return length
        return 0
