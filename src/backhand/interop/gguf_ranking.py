"""GGUF files of rerankers: the score head and the prompt, and a check of llama.cpp's scores.

llama.cpp's server answers at `/v1/rerank` (`llama-server --reranking`) for Qwen3 models with these entries, which its
converter writes for Qwen3-Reranker:

1. the rows of `yes` and `no` of the head, as `cls.output.weight`;
2. the pooling `rank`;
3. the prompt as the chat template `rerank`, in which the server replaces `{query}` and `{document}`.

The score is the softmax over both rows: the probability of `yes` against `no`.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from backhand.errors import CheckError, not_none
from backhand.generation.completer import EngineCompleter
from backhand.generation.loading import LoadedModel, ranking_of, recorded_template
from backhand.interop.llama_cpp_server import start_server
from backhand.interop.merged_weights import MergedWeights
from backhand.interop.opened_adapter import OpenedAdapter
from backhand.interop.proving import Prover
from backhand.loop.rank import Reranker
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading.gguf_tensors import SCORE_HEAD, gguf_architecture
from backhand.nn.loading.opening import open_model

BOUND = 1e-3
"""Largest difference of a score from llama.cpp's, if all weights are float32."""
_ARCHITECTURES = ("qwen3",)
_TEMPLATE = "tokenizer.chat_template.rerank"
_QUERY_WORDS, _DOCUMENTS = 4, 8
_LONGEST_PROMPT = 2048
"""Context of the server, in tokens. Neutral texts are short."""


class GGUFRanking:
    """The entries of a file that make it a reranker of llama.cpp.

    Args:
        opened: base and adapter.
        weights: the merged model.
    """

    def __init__(self, opened: OpenedAdapter, weights: MergedWeights) -> None:
        record = not_none(opened.loaded.record)
        self._opened, self._template = opened, recorded_template(record)
        renderer = RowRenderer(opened.source.tokenizer(), self._template)
        text_format = RankingFormat(ranking_of(record)["instruction"])
        encoder = RankingEncoder(renderer, text_format, _LONGEST_PROMPT)
        document, _ = renderer.prompt(encoder.text("{query}", "{document}", "ranking"))
        begin = renderer.decode(renderer.encoder.prefix_ids) if document.prefix else ""
        self.template = begin + document.text + encoder.prompt_end
        answers = encoder.answers.yes, encoder.answers.no
        self.tensors: Mapping[str, np.ndarray[Any, Any]] = {
            SCORE_HEAD: weights.head_rows(answers).float().contiguous().numpy()
        }

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Add the metadata."""
        for key in (gguf.Keys.LLM.POOLING_TYPE, gguf.Keys.Classifier.OUTPUT_LABELS):
            writer.kv_data[0].pop(key.format(arch=writer.arch), None)
        writer.kv_data[0].pop(_TEMPLATE, None)
        writer.add_pooling_type(gguf.PoolingType.RANK)
        writer.add_classifier_output_labels(["yes", "no"])
        writer.add_string(_TEMPLATE, self.template)

    def prove(self, path: Path, prover: Prover, *, exact: bool) -> None:
        """Compare llama.cpp's scores of neutral texts with ours.

        Args:
            path: the written file.
            exact: all weights are float32, so that the difference has a bound. Otherwise it is stated.

        Raises:
            CheckError: the scores differ, or llama.cpp does not answer.
        """
        texts = neutral_texts()
        query, documents = " ".join(texts[0].split()[:_QUERY_WORDS]), texts[1 : 1 + _DOCUMENTS]
        decoder = Decoder.from_source(open_model(str(path)), dtype=torch.float32, device=torch.device("cpu"))
        ranking = ranking_of(not_none(self._opened.loaded.record))
        loaded = LoadedModel(EngineCompleter(decoder), self._opened.source.tokenizer(), (), ranking=ranking)
        server = start_server(str(path), min(loaded.model.context_tokens, _LONGEST_PROMPT), prover, reranking=True)
        if server is None:
            return
        reranker = Reranker.of(loaded, self._template, len(documents))
        (scores,) = reranker.scores([RankingRow(query, tuple(documents), (), "neutral_texts.txt")])
        ours = torch.tensor(scores, dtype=torch.float64).sigmoid()
        answered = server.handle_rerank({"query": query, "documents": documents})
        if "results" not in answered:
            raise CheckError("llama.cpp does not answer", where=str(path), why=str(answered)[:500])
        in_order = sorted(answered["results"], key=lambda one: one["index"])
        theirs = torch.tensor([one["relevance_score"] for one in in_order], dtype=torch.float64)
        largest = float((ours - theirs).abs().max())
        prover.say("note: llama-server --reranking serves this file at /v1/rerank")
        statement = f"llama.cpp's /v1/rerank gives the same scores of {len(documents)} documents"
        if exact:
            prover.check(statement, largest, BOUND, "report it with the model's name")
        else:
            prover.say(f"largest difference of a score from llama.cpp's: {largest:.2g}, bound in float32 {BOUND}")


def ranks(opened: OpenedAdapter) -> bool:
    """Return True if the adapter was trained to rank."""
    return bool(ranking_of(opened.loaded.record or AdapterRecord()))


def llama_cpp_ranks(opened: OpenedAdapter) -> bool:
    """Return True if llama.cpp has a score head for models of this architecture."""
    return gguf_architecture(opened.source.config) in _ARCHITECTURES
