"""backhand.json, an adapter's record: its base and data, the versions that wrote it, and the digests of its files.

Other tools ignore the file. If it is present, a file that has changed since, or another base, tokenizer or chat
template, is an error that names the difference.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from backhand.adapters.record_shapes import record_problems
from backhand.errors import ArtifactError
from backhand.nn.decoder.config_facts import config_differences, recorded_facts
from backhand.ops.weight_tiles import FrozenMatrix, frozen_tiles
from backhand.system import version_of

RECORD_VERSION = 1
_PACKAGES = ("backhand", "torch", "transformers", "tokenizers", "safetensors", "gguf")


_LATER: Mapping[str, Any] = {
    "labels": {}, "system": None, "model_config": {}, "decisions": {}, "embedding": {}, "classification": {},
    "bare": False,
}  # fmt: skip
"""Fields that the first files of this format lack, and that are omitted if they have their default."""


@dataclass(frozen=True)
class AdapterRecord:
    """The contents of backhand.json."""

    origin: str | None = None  # origin of the base weights: a path, a hub id or a package
    base_digest: str | None = None  # of the adapted base tensors, see `base_digest`
    # the fields of the base's configuration that its numbers depend on, see `nn.decoder.config_facts`
    model_config: Mapping[str, Any] = field(default_factory=dict)
    # tokenizer_digest, chat_template_digest: of the conversion from text to tokens
    tokenizer_digest: str | None = None
    chat_template_digest: str | None = None
    # data_digest, run_digest: of the training rows and the resolved configuration
    data_digest: str | None = None
    run_digest: str | None = None
    # every option of the run that decided the trained numbers, by `table.name`
    config: Mapping[str, Any] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)  # package versions that wrote the adapter
    files: Mapping[str, str] = field(default_factory=dict)  # digest of each file next to the record
    # token ids of each label, including the final token, if the rows' answers are labels
    labels: Mapping[str, Sequence[int]] = field(default_factory=dict)
    system: str | None = None  # the system message that all training rows have
    bare: bool = False  # True if all training rows were texts without a chat template, see `data.data_report`
    # blocks of single objectives, see `record_shapes`; empty for others
    decisions: Mapping[str, Any] = field(default_factory=dict)
    embedding: Mapping[str, Any] = field(default_factory=dict)
    classification: Mapping[str, Any] = field(default_factory=dict)

    @property
    def template_args(self) -> Mapping[str, Any] | None:
        """The chat template's variables in training; None if the record has no options of the rows."""
        says = any(name.startswith("data.") for name in self.config)
        found: Mapping[str, Any] | None = self.config.get("data.template_args", {}) if says else None
        return found


def installed_packages() -> dict[str, str]:
    """Return the versions of Python and of the packages that determine an adapter's values."""
    versions = {package: version_of(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | {name: one for name, one in versions.items() if one is not None}


def record_bytes(record: AdapterRecord) -> bytes:
    """Return backhand.json; the same record gives the same bytes."""
    contents = {"format_version": RECORD_VERSION, **asdict(record)}
    for name in _LATER:
        if not contents[name] and contents[name] != "":
            del contents[name]
    return (json.dumps(contents, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def read_record(raw: Mapping[str, Any], where: str) -> AdapterRecord:
    """Parse the object in backhand.json.

    Raises:
        ArtifactError: if a field is missing or unknown, has another shape or contradicts another field, or the file has
            a newer format.
    """
    version = raw.get("format_version")
    if isinstance(version, int) and version > RECORD_VERSION:
        raise ArtifactError(
            f"has format {version}; this version of Backhand reads formats up to {RECORD_VERSION}",
            where=where,
            next_step="upgrade Backhand",
        )
    if type(version) is not int or version != RECORD_VERSION:
        problems = [f"format_version is {version!r}, not {RECORD_VERSION}"]
    else:
        raw = {"config": {}, **_LATER, **{name: value for name, value in raw.items() if name != "format_version"}}
        problems = record_problems(raw)
    if problems:
        raise damaged_record(problems, where)
    return AdapterRecord(**raw)


def damaged_record(problems: Sequence[str], where: str) -> ArtifactError:
    """Return the error for a record that cannot be used, with all problems."""
    return ArtifactError(
        f"is damaged: {'; '.join(problems)}",
        where=where,
        next_step="restore the file; without it the adapter loads, but nothing can be compared",
    )


def changed_files(record: AdapterRecord, contents: Mapping[str, bytes]) -> list[str]:
    """Return a sentence per file whose bytes differ from those in the record."""
    return [
        f"{name}: not the bytes that backhand.json describes; restore the file, or, if it was changed on purpose, "
        "remove backhand.json"
        for name, data in contents.items()
        if record.files.get(name) != bytes_digest(data)
    ]


_COMPARED = {
    "base_digest": "base model: its adapted weights are",
    "tokenizer_digest": "tokenizer: its tokens or merges are",
    "chat_template_digest": "chat template: it is",
}


def base_differences(record: AdapterRecord, digests: Mapping[str, str | None]) -> list[str]:
    """Return a sentence per difference between the model and the record of training.

    Args:
        digests: of the model, by name in the record; digests that either side lacks are skipped.
    """
    origin = f" (trained on {record.origin})" if record.origin else ""
    return [
        f"{what} not what the adapter was trained with{origin}"
        for name, what in _COMPARED.items()
        if None not in (both := (getattr(record, name), digests.get(name))) and both[0] != both[1]
    ]


def other_model_config(record: AdapterRecord, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a sentence if the base has another configuration than in training; empty for records without one.

    No error, since a longer context or another rotary base may be meant.
    """
    if not record.model_config:
        return ()
    changed = config_differences(record.model_config, recorded_facts(facts), across_files=True)
    said = "base model: its configuration is not what the adapter was trained with"
    return () if changed is None else (f"{said}: {changed}",)


def other_template_args(record: AdapterRecord, template_args: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return a sentence if the chat template's variables differ from training; no error, since this may be intended.

    A reply that begins where the prompt with the other `enable_thinking` ends was trained without that variable.
    """
    recorded = record.template_args
    if recorded is None or template_args is None or dict(recorded) == dict(template_args):
        return ()
    given, before = (json.dumps(dict(one), ensure_ascii=False, sort_keys=True) for one in (template_args, recorded))
    return (f"template_args: {given} here, and {before} when the adapter was trained",)


def wrong_base(different: Sequence[str], where: str) -> ArtifactError:
    """Return the error for an adapter on another model than its own, with all differences."""
    return ArtifactError(
        "the adapter does not belong to this model",
        where=where,
        why="; ".join(different),
        next_step="give what it was trained with, or --force-base to use it all the same",
    )


def bytes_digest(data: bytes) -> str:
    """Return the SHA-256 of the data as `sha256:` and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def base_digest(names: Iterable[str], load: Callable[[str], FrozenMatrix]) -> str:
    """Return the digest of the names, shapes and values of base tensors.

    Values are hashed as fp32, which represents bf16, fp16 and dequantized numbers exactly. The same weights therefore
    agree for every file format, if they are given before any cast to the compute dtype. Each tensor is hashed by
    itself, in as many threads as torch has, and the digest is that of these hashes in the order of the names.

    Args:
        names: Hugging Face tensor names, in any order; usually the weights of the adapted modules.
        load: returns a tensor by name, or a quantized matrix, which is never dequantized as a whole; called from
            several threads.
    """
    ordered = sorted(names)
    hashes = in_threads(lambda name: tensor_hash(name, load(name)), ordered)
    return digest_of_hashes(dict(zip(ordered, hashes, strict=True)))


def digest_of_hashes(hashes: Mapping[str, bytes]) -> str:
    """Return the digest of tensors whose `tensor_hash` is known, by name."""
    return bytes_digest(b"".join(hashes[name] for name in sorted(hashes)))


def tensor_hash(name: str, tensor: FrozenMatrix) -> bytes:
    """Return the SHA-256 of a tensor's name, shape and values in fp32."""
    described = hashlib.sha256(json.dumps([name, list(tensor.shape)]).encode())
    for piece in pieces_of(tensor):
        described.update(piece.detach().to("cpu", torch.float32).contiguous().view(-1).numpy().data)
    return described.digest()


def pieces_of(tensor: FrozenMatrix) -> Iterable[Tensor]:
    """Iterate over the tensor itself, or the dense tiles of a quantized matrix, each valid until the next."""
    return (tensor,) if isinstance(tensor, Tensor) else (tile for _, tile in frozen_tiles(tensor))


T = TypeVar("T")


def in_threads(compute: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """Return `compute(name)` for each name, by as many threads as torch has."""
    count = min(torch.get_num_threads(), len(names))
    with ThreadPoolExecutor(count) if count > 1 else nullcontext() as threads:
        return list(map(compute, names) if threads is None else threads.map(compute, names))


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the digest of a fast tokenizer's token ids, merges, added and special tokens.

    It does not depend on their order in a file, or on settings of padding and truncation.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    special = sorted(tokenizer.all_special_tokens)
    return bytes_digest(json.dumps([vocabulary, merges, special], ensure_ascii=False).encode("utf-8", "replace"))


def text_digest(text: str | None) -> str | None:
    """Return the digest of a chat template, or None without one."""
    return None if text is None else bytes_digest(text.encode("utf-8", "replace"))
