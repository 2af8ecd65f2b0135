"""A GGUF file as a decision model of llama.cpp: its type, its prompt template and its temperatures.

llama.cpp's type `lfm2-d1` reads the labels of `data.decisions` (tools/server/server-decision.cpp): letters in the order
of the request's options, `yes` and `no`, digits. The score of an option is the largest logit of its label's spellings.
`/v1/systemone` renders the template in the file once per question, with the variables `type`, `instructions`, `state`
and `options`, each of which has `label`, `key` and `description`. The text is the one that the adapter was trained on.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch

from backhand.adapters.record import AdapterRecord
from backhand.data.chat import thoughts_off
from backhand.data.decision_examples import DecisionEncoder
from backhand.data.decisions import CLOSINGS, LABELS, Asked, DecisionRow, Question, question_of
from backhand.data.documents import RowRenderer
from backhand.data.held_out import neutral_texts
from backhand.data.rows import Completion
from backhand.errors import CheckError, UsageError, not_none
from backhand.generation.completer import EngineCompleter
from backhand.generation.loading import LoadedModel, recorded_template
from backhand.interop.llama_cpp_server import start_server
from backhand.interop.opened_adapter import OpenedAdapter
from backhand.interop.proving import Prover
from backhand.loop.decide import Decider
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading.opening import open_model
from backhand.words import count_of

TYPE = "lfm2-d1"
BOUND = 1e-3
"""Largest difference of a probability from llama.cpp's, if all weights are float32."""
_STATES, _STATE_WORDS = 16, 12
"""Number and length of the pieces of neutral texts that both programs decide."""
_BODY = "the-text-of-the-message"
"""Placeholder of the user's message while the chat template is rendered."""

_TEMPLATE = (
    "{begin}{% if state is string %}{{ state }}{% else %}{{ state | tojson }}{% endif %}"
    '{{ "\\n\\n" }}{% if instructions %}{{ "Question: " }}{{ instructions }}{{ "\\n" }}{% endif %}'
    "{% for option in options %}"
    '{% if type == "choice" %}{{ option.label }}{{ ": " }}{{ option.key }}'
    '{% if option.description %}{{ " - " }}{{ option.description }}{% endif %}{{ "\\n" }}'
    "{% elif option.description %}"
    '{% if type == "score" %}{{ option.key }}{% elif option.key == "true" %}{{ "yes" }}{% else %}{{ "no" }}{% endif %}'
    '{{ ": " }}{{ option.description }}{{ "\\n" }}'
    "{% endif %}{% endfor %}"
    '{% if type == "choice" %}{choice}{% elif type == "noul" %}{noul}{% else %}{score}{% endif %}{end}'
)


@dataclass(frozen=True)
class GGUFDecision:
    """The entries of a file that make it a decision model."""

    template: str
    temperatures: Mapping[str, float]  # by type of question

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Add the entries."""
        writer.add_string(f"{writer.arch}.decision.type", TYPE)
        for kind, temperature in self.temperatures.items():
            writer.add_float32(f"{writer.arch}.decision.temperature.{kind}", temperature)
        writer.add_string("tokenizer.chat_template.systemone", self.template)


def gguf_decision(opened: OpenedAdapter) -> GGUFDecision:
    """Return the entries for an adapter.

    Raises:
        UsageError: the adapter was not trained to decide, or llama.cpp would ask one of its questions otherwise.
    """
    record = opened.loaded.record or AdapterRecord()
    if not record.decisions:
        raise UsageError(
            "this adapter was not trained to decide", where="decision", next_step="train one with --objective decide"
        )
    for question in _questions(record.decisions):
        if question.has_letters:
            raise UsageError(
                f"the options of {question.name} are single letters",
                where="decision",
                why="llama.cpp uses such options as labels themselves, in another prompt than the one trained on",
                next_step="give the options longer names, and train again",
            )
    tokenizer = opened.source.tokenizer()
    renderer = RowRenderer(tokenizer, thoughts_off(recorded_template(record), tokenizer))
    document, _ = renderer.prompt(Completion(_BODY, LABELS["choice"][0], "\n", None, "decision"))
    begin, _, end = document.text.partition(_BODY)
    if document.prefix:
        begin = renderer.decode(renderer.encoder.prefix_ids) + begin
    end += DecisionEncoder(renderer, _LONGEST_PROMPT).prompt_end
    texts: list[tuple[str, str]] = [("begin", begin), ("end", end), *CLOSINGS.items()]
    template = _TEMPLATE
    for name, text in texts:
        template = template.replace(f"{{{name}}}", f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}")
    return GGUFDecision(template, record.decisions["temperatures"])


def _questions(decisions: Mapping[str, Any]) -> list[Question]:
    return [question_of(name, spec, "backhand.json") for name, spec in decisions["questions"].items()]


def example_request(record: AdapterRecord) -> str:
    """Return the command that asks llama.cpp's server the adapter's questions, or a placeholder for unknown ones."""
    questions: Any = {question.name: question.to_json() for question in _questions(record.decisions)}
    body = json.dumps({"state": "…", "questions": questions or {"…": "…"}}, ensure_ascii=False)
    return f"curl http://localhost:8080/v1/systemone -d {shlex.quote(body)}"


def prove_decisions(path: Path, opened: OpenedAdapter, prover: Prover, *, exact: bool) -> None:
    """Compare llama.cpp's probabilities with ours for the adapter's questions about neutral texts.

    Args:
        path: the written file.
        exact: all weights are float32, so that the difference has a bound. Otherwise it is stated.

    Raises:
        CheckError: the probabilities differ, or llama.cpp cannot answer.
    """
    record = not_none(opened.loaded.record)
    questions = _questions(record.decisions)
    if not questions:
        prover.say("note: not compared with llama.cpp: the questions of the training rows differ from row to row")
        return
    asked = tuple(Asked(question, None) for question in questions)
    words = " ".join(neutral_texts()).split()
    states = [" ".join(words[start : start + _STATE_WORDS]) for start in range(0, len(words), _STATE_WORDS)]
    rows = [DecisionRow(state, asked, "neutral_texts.txt") for state in states[:_STATES]]
    written = open_model(str(path))
    decoder = Decoder.from_source(written, dtype=torch.float32, device=torch.device("cpu"))
    loaded = LoadedModel(EngineCompleter(decoder), opened.source.tokenizer(), (), decisions=record.decisions)
    server = start_server(str(path), min(loaded.model.context_tokens, _LONGEST_PROMPT), prover)
    if server is None:
        return
    ours = list(Decider.of(loaded, recorded_template(record), len(rows)).answers(rows))
    body = {question.name: question.to_json() for question in questions}
    largest = 0.0
    for row, mine in zip(rows, ours, strict=True):
        answered = server.handle_systemone({"state": row.state, "questions": body})
        if "answers" not in answered:
            raise CheckError("llama.cpp does not answer", where=row.state, why=str(answered)[:500])
        for name, answer in mine["answers"].items():
            theirs = answered["answers"][name]
            pairs = (
                [(answer["noul"], theirs["noul"])]
                if "noul" in answer
                else [(p, theirs["probabilities"][key]) for key, p in answer["probabilities"].items()]
            )
            largest = max(largest, *(abs(one - other) for one, other in pairs))
    compared = count_of(len(rows), "state")
    statement = f"llama.cpp's /v1/systemone gives the same probabilities for {compared}, with -fa off -ctk f32 -ctv f32"
    if exact:
        prover.check(statement, largest, BOUND, "train more steps: another spelling of a label may be more probable")
    else:
        said = f"largest difference of a probability from llama.cpp's in {compared}: {largest:.2g}"
        prover.say(f"{said}; others may differ more (with --dtype float32, the bound is {BOUND})")


_LONGEST_PROMPT = 2048
"""Context of the server, in tokens. Neutral texts are short."""
