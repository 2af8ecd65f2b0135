"""backhand.json beside an adapter: what it was made from, by what, and the digests of the files next to it.

Other tools ignore the file. Where it is present, a file that has changed since, a wrong base, tokenizer or chat
template is an error that names the difference.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.nn.decoder.config_facts import config_differences, recorded_facts
from backhand.ops.weight_tiles import FrozenMatrix, frozen_tiles
from backhand.system import version_of

RECORD_VERSION = 1
_PACKAGES = ("backhand", "torch", "transformers", "tokenizers", "safetensors", "gguf")


_LATER: Mapping[str, Any] = {"labels": {}, "system": None, "model_config": {}}
"""What the first files of this format did not have, and what is left out where there is nothing to tell."""


@dataclass(frozen=True)
class AdapterRecord:
    """The contents of backhand.json."""

    origin: str | None = None  # where the base weights came from: a path, a hub id or a package
    base_digest: str | None = None  # of the adapted base tensors, see `base_digest`
    # the fields of the base's configuration that its numbers depend on, see `nn.decoder.config_facts`
    model_config: Mapping[str, Any] = field(default_factory=dict)
    # tokenizer_digest, chat_template_digest: of what makes tokens of text
    tokenizer_digest: str | None = None
    chat_template_digest: str | None = None
    # data_digest, run_digest: of the training rows and the resolved configuration
    data_digest: str | None = None
    run_digest: str | None = None
    # every option of the run that decided the trained numbers, by `table.name`
    config: Mapping[str, Any] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)  # versions that wrote the adapter
    files: Mapping[str, str] = field(default_factory=dict)  # digest of each file beside the record
    # of rows whose answers are labels, each label's token ids, the one that ends it among them
    labels: Mapping[str, Sequence[int]] = field(default_factory=dict)
    system: str | None = None  # the system message that all training rows have

    @property
    def template_args(self) -> Mapping[str, Any] | None:
        """Variables that the chat template was given; None where the record says nothing of the rows."""
        says = any(name.startswith("data.") for name in self.config)
        found: Mapping[str, Any] | None = self.config.get("data.template_args", {}) if says else None
        return found


def installed_packages() -> dict[str, str]:
    """Versions of Python and of the packages that decide what an adapter is."""
    versions = {package: version_of(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | {name: one for name, one in versions.items() if one is not None}


def record_bytes(record: AdapterRecord) -> bytes:
    """backhand.json; the same record gives the same bytes."""
    contents = {"format_version": RECORD_VERSION, **asdict(record)}
    for name in _LATER:
        if not contents[name] and contents[name] != "":
            del contents[name]
    return (json.dumps(contents, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def read_record(raw: Mapping[str, Any], where: str) -> AdapterRecord:
    """The record that the object in backhand.json holds.

    Raises:
        ArtifactError: a field is missing, unknown or of another type, or the file is of a newer format.
    """
    version = raw.get("format_version")
    if isinstance(version, int) and version > RECORD_VERSION:
        raise ArtifactError(
            f"is of format {version}; this version of Backhand reads up to {RECORD_VERSION}",
            where=where,
            next_step="upgrade Backhand",
        )
    raw = {"config": {}, **_LATER, **raw}
    known = {one.name for one in fields(AdapterRecord)}
    wrong = sorted((set(raw) ^ (known | {"format_version"})) | {name for name in known if not _well_typed(name, raw)})
    if version != RECORD_VERSION or wrong:
        raise ArtifactError(
            f"is damaged: {', '.join(wrong) or 'format_version'}",
            where=where,
            next_step="restore the file; without it the adapter loads, but nothing can be compared",
        )
    return AdapterRecord(**{name: raw[name] for name in known})


def _well_typed(name: str, raw: Mapping[str, Any]) -> bool:
    value = raw.get(name)
    if name in ("config", "model_config"):
        return isinstance(value, dict)
    if name == "labels":
        lists = list(value.values()) if isinstance(value, dict) else [None]
        return all(isinstance(ids, list) and ids and all(isinstance(one, int) for one in ids) for ids in lists)
    if name in ("packages", "files"):
        return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    return value is None or isinstance(value, str)


def changed_files(record: AdapterRecord, contents: Mapping[str, bytes]) -> list[str]:
    """A sentence for each file whose bytes are not those the record was written for."""
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
    """A sentence for each thing that is not what the adapter was trained with.

    Args:
        digests: of the model at hand, by their names in the record; what either side does not know is skipped.
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
    """A sentence where the chat template is given other variables than in training; no error, since it may have to be.

    A reply that begins where the prompt with the other `enable_thinking` ends was trained without that variable.
    """
    recorded = record.template_args
    if recorded is None or template_args is None or dict(recorded) == dict(template_args):
        return ()
    given, before = (json.dumps(dict(one), ensure_ascii=False, sort_keys=True) for one in (template_args, recorded))
    return (f"template_args: {given} here, and {before} when the adapter was trained",)


def wrong_base(different: Sequence[str], where: str) -> ArtifactError:
    """The error of an adapter on another model than its own, with everything that differs."""
    return ArtifactError(
        "the adapter does not belong to this model",
        where=where,
        why="; ".join(different),
        next_step="give what it was trained with, or --force-base to use it all the same",
    )


def bytes_digest(data: bytes) -> str:
    """`sha256:` and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def base_digest(names: Iterable[str], load: Callable[[str], FrozenMatrix]) -> str:
    """Digest of base tensors: of their names, shapes and values.

    The values are taken as fp32, which holds bf16, fp16 and dequantised numbers exactly, so that the same weights agree
    whatever file they come from; give them as the source has them, before any cast to the compute dtype. Every tensor
    is hashed on its own, by as many threads as torch has, and the digest is of these hashes in the order of the names.

    Args:
        names: Hugging Face tensor names, in any order; usually the weights of the adapted modules.
        load: gives a tensor by its name, or a quantized matrix, which is never expanded in full; called from several
            threads.
    """
    ordered = sorted(names)
    hashes = in_threads(lambda name: tensor_hash(name, load(name)), ordered)
    return digest_of_hashes(dict(zip(ordered, hashes, strict=True)))


def digest_of_hashes(hashes: Mapping[str, bytes]) -> str:
    """Return the digest of tensors whose `tensor_hash` is known, by name."""
    return bytes_digest(b"".join(hashes[name] for name in sorted(hashes)))


def tensor_hash(name: str, tensor: FrozenMatrix) -> bytes:
    """SHA-256 of a tensor's name, shape and values in fp32."""
    described = hashlib.sha256(json.dumps([name, list(tensor.shape)]).encode())
    for piece in pieces_of(tensor):
        described.update(piece.detach().to("cpu", torch.float32).contiguous().view(-1).numpy().data)
    return described.digest()


def pieces_of(tensor: FrozenMatrix) -> Iterable[Tensor]:
    """The tensor itself, or the dense tiles of a quantized matrix, each valid until the next."""
    return (tensor,) if isinstance(tensor, Tensor) else (tile for _, tile in frozen_tiles(tensor))


T = TypeVar("T")


def in_threads(compute: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """Return `compute(name)` for each name, by as many threads as torch has."""
    count = min(torch.get_num_threads(), len(names))
    with ThreadPoolExecutor(count) if count > 1 else nullcontext() as threads:
        return list(map(compute, names) if threads is None else threads.map(compute, names))


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what a transformers fast tokenizer does with text: token ids, merges, added and special tokens.

    The order in which a file happens to list them, and settings of padding or truncation, do not count.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    special = sorted(tokenizer.all_special_tokens)
    return bytes_digest(json.dumps([vocabulary, merges, special], ensure_ascii=False).encode("utf-8", "replace"))


def text_digest(text: str | None) -> str | None:
    """Digest of a chat template; None where there is none."""
    return None if text is None else bytes_digest(text.encode("utf-8", "replace"))
