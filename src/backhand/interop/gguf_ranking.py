"""GGUF files of rerankers: the score head, and a check of llama.cpp's scores.

llama.cpp's server answers at `/v1/rerank` (`llama-server --reranking`) if a file has the pooling `rank` and a head.

- **Qwen3.** The head is the rows of `yes` and `no` of the model's head, `cls.output.weight`, as llama.cpp's converter
  writes them for Qwen3-Reranker. The prompt is the chat template `rerank`, in which the server replaces `{query}` and
  `{document}`. The score is the softmax over both rows: the probability of `yes` against `no`.
- **BERT and ModernBERT.** The score head of the encoder is stored with the model's own tensors: `cls`, `cls.norm` and
  `cls.output`. The server puts [CLS] and [SEP] around the texts itself. The score is the logit.

llama.cpp gives all tokens the token type 0, and each architecture has one form of head. Other encoders are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from backhand.adapters.record import AdapterRecord
from backhand.data.documents import RowRenderer
from backhand.data.held_out import neutral_texts
from backhand.data.ranking_examples import RankingEncoder, RankingFormat
from backhand.data.rows import RankingRow
from backhand.data.text_encoder import TextEncoder
from backhand.errors import ArtifactError, CheckError, not_none
from backhand.generation.completer import EngineCompleter
from backhand.generation.loading import LoadedModel, ranking_of, recorded_template
from backhand.interop.llama_cpp_server import start_server
from backhand.interop.merged_weights import MergedWeights
from backhand.interop.opened_adapter import OpenedAdapter
from backhand.interop.proving import Prover
from backhand.loop.rank import Reranker
from backhand.loop.ranking_loss import pair_format
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.families.class_heads import BERT_CLASS_HEAD, ClassHead
from backhand.nn.loading.gguf_tensors import SCORE_HEAD, gguf_architecture
from backhand.nn.loading.opening import open_model
from backhand.runs.uses import SCORED_DECODERS

BOUND = 1e-3
"""Largest difference of a score from llama.cpp's, if all weights are float32: of logits above 1 in size, relative."""
_HEADS = {
    "bert": BERT_CLASS_HEAD,
    "modern-bert": ClassHead(
        "classifier", True, "mean", "head.dense", activation="gelu", norm="head.norm", prefix="model"
    ),
}
"""The score head that llama.cpp computes, by architecture."""
_TEMPLATE = "tokenizer.chat_template.rerank"
_QUERY_WORDS, _DOCUMENTS = 4, 8
_LONGEST_PROMPT = 2048
"""Context of the server, in tokens. Neutral texts are short."""


@dataclass(frozen=True)
class GGUFRanking:
    """The entries of a file that make it a reranker of llama.cpp."""

    opened: OpenedAdapter
    prompt: str | None = None  # of a decoder, with {query} and {document}; None for an encoder
    tensors: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)  # further tensors by name in the file
    two_separators: bool = False  # the tokenizer of an encoder separates the texts by the token after both, and [SEP]

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Add the metadata."""
        keys = gguf.Keys.LLM.POOLING_TYPE, gguf.Keys.Classifier.OUTPUT_LABELS, gguf.Keys.Tokenizer.ADD_SEP, _TEMPLATE
        for key in keys:
            writer.kv_data[0].pop(key.format(arch=writer.arch), None)
        writer.add_pooling_type(gguf.PoolingType.RANK)
        if self.prompt is None:
            writer.add_add_sep_token(self.two_separators)
        else:
            writer.add_classifier_output_labels(["yes", "no"])
            writer.add_string(_TEMPLATE, self.prompt)

    def prove(self, path: Path, prover: Prover, *, exact: bool) -> None:
        """Compare llama.cpp's scores of neutral texts with ours: probabilities of a decoder, logits of an encoder.

        Args:
            path: the written file.
            exact: all weights are float32, so that the difference has a bound. Otherwise it is stated.

        Raises:
            CheckError: the scores differ, or llama.cpp does not answer.
        """
        texts, record = neutral_texts(), not_none(self.opened.loaded.record)
        query, documents = " ".join(texts[0].split()[:_QUERY_WORDS]), texts[1 : 1 + _DOCUMENTS]
        decoder = Decoder.from_source(open_model(str(path)), dtype=torch.float32, device=torch.device("cpu"))
        # llama.cpp reads whole texts, whatever the longest pair of training was.
        ranking = {name: value for name, value in ranking_of(record).items() if name != "max_length"}
        loaded = LoadedModel(EngineCompleter(decoder), self.opened.source.tokenizer(), (), ranking=ranking)
        server = start_server(str(path), min(loaded.model.context_tokens, _LONGEST_PROMPT), prover, reranking=True)
        if server is None:
            return
        reranker = Reranker.of(loaded, recorded_template(record), len(documents))
        (scores,) = reranker.scores([RankingRow(query, tuple(documents), (), "neutral_texts.txt")])
        logits = torch.tensor(scores, dtype=torch.float64)
        ours = logits if self.prompt is None else logits.sigmoid()
        answered = server.handle_rerank({"query": query, "documents": documents})
        if "results" not in answered:
            raise CheckError("llama.cpp does not answer", where=str(path), why=str(answered)[:500])
        in_order = sorted(answered["results"], key=lambda one: one["index"])
        theirs = torch.tensor([one["relevance_score"] for one in in_order], dtype=torch.float64)
        if self.prompt is None:
            prover.say("note: llama.cpp's scores of an encoder are logits, which rank in the same order")
        largest = float(((ours - theirs).abs() / ours.abs().clamp_min(1)).max())
        statement = f"llama.cpp's /v1/rerank gives the same scores of {len(documents)} documents"
        if exact:
            prover.check(statement, largest, BOUND, "report it with the model's name")
        else:
            prover.say(f"largest difference of a score from llama.cpp's: {largest:.2g}, bound in float32 {BOUND}")


def gguf_ranking(opened: OpenedAdapter, weights: MergedWeights) -> GGUFRanking | None:
    """Return the entries of a merged model, or None if llama.cpp has no score head for decoders of its architecture.

    Args:
        opened: base and adapter, trained to rank.
        weights: the merged model.

    Raises:
        ArtifactError: llama.cpp computes other scores for this encoder.
    """
    if not opened.config.causal:
        return GGUFRanking(opened, two_separators=_two_separators(opened, gguf_architecture(opened.source.config)))
    return _of_decoder(opened, weights) if can_rank(opened) else None


def can_rank(opened: OpenedAdapter) -> bool:
    """Return True if llama.cpp has a score head for encoders, or for decoders of the base's architecture."""
    return not opened.config.causal or gguf_architecture(opened.source.config) in SCORED_DECODERS


def _of_decoder(opened: OpenedAdapter, weights: MergedWeights) -> GGUFRanking:
    record = not_none(opened.loaded.record)
    renderer = RowRenderer(opened.source.tokenizer(), recorded_template(record))
    encoder = RankingEncoder(renderer, RankingFormat(ranking_of(record)["instruction"]), _LONGEST_PROMPT)
    document, _ = renderer.prompt(encoder.text("{query}", "{document}", "ranking"))
    begin = renderer.decode(renderer.encoder.prefix_ids) if document.prefix else ""
    rows = weights.head_rows((encoder.answers.yes, encoder.answers.no))
    tensors = {SCORE_HEAD: rows.float().contiguous().numpy()}
    return GGUFRanking(opened, begin + document.text + encoder.prompt_end, tensors)


def _two_separators(opened: OpenedAdapter, architecture: str | None) -> bool:
    """Return True if the tokenizer puts two tokens between the texts. Raises ArtifactError as `gguf_ranking`."""
    tokenizer, head = opened.source.tokenizer(), opened.config.class_head
    pair = TextEncoder(tokenizer).pair_tokens
    separators = {(*pair.after,): False, (*pair.after, tokenizer.sep_token_id): True}
    if (expected := _HEADS.get(str(architecture))) != head:
        reason = "no score head for this architecture"
        if expected is not None:
            parts = zip(head._fields, head, expected, strict=True)
            found = [f"{name} {ours!r} instead of {theirs!r}" for name, ours, theirs in parts if ours != theirs]
            reason = f"one form of score head for this architecture, and this model's has {', '.join(found)}"
        raise _other_scores(opened, f"llama.cpp has {reason}", "")
    if pair_format(opened.config, None).token_types and pair.of_first is not None:
        more = "; or train with a copy of the model whose tokenizer gives no token types: see docs/rankings.md"
        raise _other_scores(opened, "llama.cpp gives both texts the token type 0, and here the second one has 1", more)
    if pair.between not in separators or len(pair.before) > 1 or len(pair.after) > 1:
        raise _other_scores(opened, "llama.cpp puts other tokens around the two texts than the tokenizer", "")
    return separators[pair.between]


def _other_scores(opened: OpenedAdapter, why: str, more: str) -> ArtifactError:
    return ArtifactError(
        "llama.cpp's /v1/rerank computes other scores for this encoder",
        where=str(opened.loaded.directory),
        why=why,
        next_step="merge into a directory (--to sentence-transformers --merge), which sentence-transformers loads and "
        f"vLLM serves at /v1/rerank{more}",
    )


def ranks(opened: OpenedAdapter) -> bool:
    """Return True if the adapter was trained to rank."""
    return bool(ranking_of(opened.loaded.record or AdapterRecord()))
