"""Files of sentence-transformers next to a model: what is read from them, refused, and left to the options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from backhand.data.options import RowSources
from backhand.errors import ArtifactError
from backhand.loop.embed import embed
from backhand.nn.loading.sentence_transformers import EmbeddingFiles, read_embedding_files
from backhand.nn.model_options import BaseModelOptions
from backhand.options.command_options import EmbedOptions, VectorOptions
from tests.support.tiny_encoders import tiny_encoder
from tests.support.tiny_models import save_tiny

TEXTS = ["user asks json", "a list of names and one number is what the user asks for"]
MEAN, MAX = {"pooling_mode_mean_tokens": True}, {"pooling_mode_max_tokens": True}


def write_files(directory: Path, pooling: dict[str, Any], transformer: str = "", **others: Any) -> Path:
    """Write the files of a model; `others` are contents of sentence_bert_config.json, or `prompts`."""
    kinds = {transformer: "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"name": kind, "path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()
    ]
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": 60, **pooling},
        "config_sentence_transformers.json": {"prompts": others.pop("prompts", {})},
        f"{transformer}/sentence_bert_config.json".lstrip("/"): others,
    }
    for name, contents in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(json.dumps(contents))
    return directory


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        ({**MEAN, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode_cls_token": True, "include_prompt": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"], "include_prompt": False}, "mean"),  # there is no prompt that it could leave out
    ],
)
def test_one_known_pooling_is_read(tmp_path: Path, pooling: dict[str, Any], name: str) -> None:
    assert read_embedding_files(write_files(tmp_path, pooling)) == EmbeddingFiles(name, "", "", None)


def test_prompts_and_length_are_read_from_a_subdirectory(tmp_path: Path) -> None:
    prompts = {"query": "ask: ", "passage": "text: "}
    write_files(tmp_path, MEAN, "0_Transformer", prompts=prompts, max_seq_length=256)
    expected = EmbeddingFiles("mean", "ask: ", "text: ", 256)
    assert read_embedding_files(tmp_path / "0_Transformer") == expected


@pytest.mark.parametrize(
    ("pooling", "others", "words"),
    [
        ({**MEAN, **MAX}, {}, "the pooling is mean_tokens and max_tokens"),
        (MAX, {}, "the pooling is max_tokens"),
        ({**MEAN, "pooling_mode_of_tomorrow": True}, {}, "the pooling is mean_tokens and of_tomorrow"),
        ({"pooling_mode": ["mean", "cls"]}, {}, "the pooling is mean and cls"),
        ({"pooling_mode_mean_tokens": False}, {}, "the pooling is not stated"),
        ({**MEAN, "include_prompt": False}, {"prompts": {"query": "ask: "}}, "leaves out the tokens of the prompt"),
        (MEAN, {"max_seq_length": -1}, "max_seq_length = -1"),
        (MEAN, {"max_seq_length": "long"}, "max_seq_length = 'long'"),
        (MEAN, {"prompts": ["ask: "]}, "cannot be read"),
        (MEAN, {"do_lower_case": True}, "lower case"),
    ],
)
def test_what_would_give_other_vectors_is_refused(
    tmp_path: Path, pooling: dict[str, Any], others: dict[str, Any], words: str
) -> None:
    with pytest.raises(ArtifactError) as raised:
        read_embedding_files(write_files(tmp_path, pooling, **others))
    assert words in f"{raised.value} {raised.value.why}" and raised.value.next_step


def test_texts_are_cut_where_sentence_transformers_cuts_them(tmp_path: Path) -> None:
    model = write_files(save_tiny(tiny_encoder("bert"), tmp_path / "model"), MEAN, max_seq_length=6)
    (tmp_path / "texts.csv").write_text("text\n" + "".join(f"{text}\n" for text in TEXTS))

    def vectors(**options: Any) -> torch.Tensor:
        base = BaseModelOptions(model=str(model), dtype="float32", threads=1)
        data = RowSources(data=(str(tmp_path / "texts.csv"),))
        return embed(EmbedOptions(data=data, model=base, vectors=VectorOptions(**options)))

    theirs = SentenceTransformer(str(model), device="cpu")
    expected = torch.nn.functional.normalize(torch.from_numpy(theirs.encode(TEXTS)), dim=1)
    assert float((vectors() - expected).abs().max()) <= 1e-5
    (model / "sentence_bert_config.json").unlink()  # then the tokenizer's limit holds
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 7}))
    limited = SentenceTransformer(str(model), device="cpu")
    assert limited.max_seq_length == 7
    cut = torch.from_numpy(limited.encode(TEXTS, normalize_embeddings=True))
    assert float((vectors() - cut).abs().max()) <= 1e-5 < float((cut - expected).abs().max())
    theirs.max_seq_length = 40
    assert not torch.allclose(torch.from_numpy(theirs.encode(TEXTS[1:], normalize_embeddings=True)), expected[1:])

    # With every option given, the files decide nothing: they may state what is not supported.
    write_files(model, MAX)
    with pytest.raises(ArtifactError, match="the pooling is max_tokens"):
        vectors(pooling="mean")
    assert vectors(pooling="mean", query_prompt="", document_prompt="").shape == (2, 60)
