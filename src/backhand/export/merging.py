"""Merging: the base with the adapter folded in, as a model of its own, proved against base and adapter side by side."""

from __future__ import annotations

from pathlib import Path

import torch

from backhand.errors import ArtifactError
from backhand.export.gguf_model_writer import write_gguf_model
from backhand.export.huggingface_writer import write_huggingface
from backhand.export.merge_report import describe_base, merge_card, print_losses
from backhand.export.merged_weights import MergedWeights, ModuleLoss
from backhand.export.opened_adapter import OpenedAdapter, open_adapter
from backhand.export.options import FLOAT32_TOLERANCE, ROUNDED_TOLERANCE, MergeOptions, given
from backhand.export.probes import difference, probe_logits
from backhand.export.proving import Prover
from backhand.export.refusal import refuse
from backhand.export.same_model import check_same_model
from backhand.export.staging import staged
from backhand.nn.loading.opening import open_model
from backhand.terminal import console

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOAT32_NOISE = 3e-6
"""Relative difference of logits that float32 itself makes: it says nothing about the merge."""


def merge_command(options: MergeOptions) -> Path:
    """Merge, print per layer what rounding lost, and prove what was written.

    Returns:
        the output.

    Raises:
        UsageError: an option out of range, or `output` exists.
        ArtifactError: model and adapter cannot be read, or do not belong together.
        ResourceError: the output cannot be written.
        CheckError: what was written is not base plus adapter within the tolerance; it is removed.
    """
    options.validate()
    adapter, output = given("adapter", options.adapter), given("output", options.output)
    prover = Prover("merge", adapter, None if options.quiet else console())
    with staged(output) as path:
        merge_adapter(options, path, prover, gguf=output.suffix == ".gguf")
    prover.write()
    prover.say(f"written: {output}")
    return output


def merge_adapter(options: MergeOptions, path: Path, prover: Prover, *, gguf: bool) -> list[ModuleLoss]:
    """Write the merged model at `path`, which does not exist, and prove it; `export --merge` calls this too.

    Args:
        options: what to merge and how; `output` is not looked at.
        path: where the model goes.
        prover: told what was checked.
        gguf: whether it becomes a GGUF file, else a Hugging Face directory.

    Returns:
        what each merged module lost to rounding.

    Raises:
        ArtifactError, CheckError: see `merge_command`.
    """
    opened = open_adapter(
        options.model,
        given("adapter", options.adapter),
        force_base=options.force_base,
        allow_pickle=options.reading.allow_pickle,
    )
    prover.say_notes(opened.loaded)
    base = describe_base(opened.source)
    prover.say(f"base: {base}")
    weights = merged_weights(opened)
    if weights.unties_head:
        prover.say("note: the base's head is its embedding; the merged model has a head of its own")
    if gguf:
        description = f"{opened.loaded.directory} merged into {base}"
        for note in write_gguf_model(path, weights, dtype=options.dtype, description=description):
            prover.say(note)
    else:
        if options.dtype not in ("auto", *_DTYPES):
            raise ArtifactError(f"{options.dtype} is a type of GGUF files", where="dtype")
        write_huggingface(
            path,
            weights,
            dtype=_DTYPES.get(options.dtype),
            max_shard_bytes=options.max_shard_bytes,
            card=merge_card(opened, base),
        )
    print_losses(weights.losses, prover)
    _prove(options, opened, weights, path, prover)
    return weights.losses


def merged_weights(opened: OpenedAdapter) -> MergedWeights:
    """The tensors of the merged model.

    Raises:
        ArtifactError: modules whose update no weight can hold, by name.
    """
    loaded = opened.loaded
    reasons = {}
    for shape in loaded.shapes:
        if shape.lora_bias is not None:
            reasons[shape.name] = "lora_B has a bias, for which the module has no parameter"
        elif shape.embedding and shape.magnitude is not None:
            reasons[shape.name] = "DoRA of an embedding is not merged here"
    refuse("a merged model", reasons, merge=False)
    trained = {tensor.name: loaded.factors[tensor.name] for tensor in loaded.trained if tensor.token_ids is None}
    rows = [tensor for tensor in loaded.trained if tensor.token_ids is not None]
    for tensor in rows:
        table = trained.get(tensor.base_name, opened.source.load(tensor.base_name)).float().clone()
        table[list(tensor.token_ids or ())] = loaded.factors[tensor.name].float()
        trained[tensor.base_name] = table
    return MergedWeights(opened.source, opened.factors, trained, keeps_head_tied=bool(rows))


def _prove(options: MergeOptions, opened: OpenedAdapter, weights: MergedWeights, path: Path, prover: Prover) -> None:
    written = open_model(path)
    check_same_model(opened.source, written, untied=weights.unties_head)
    wrong = weights.wrong_tensors(written)
    prover.check(
        f"all {len(weights.digests)} tensors read back from the file bit by bit",
        len(wrong),
        0,
        "write it again; the disk may be faulty",
    )
    base, wanted = probe_logits(opened.source, opened.documents, [None, opened.loaded.parameters()])
    (found,) = probe_logits(written, opened.documents)
    measured = difference(found, wanted, base)
    exact = options.dtype == "float32" or (options.dtype == "auto" and _is_exact(weights))
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = FLOAT32_TOLERANCE if exact else ROUNDED_TOLERANCE
    prover.say(
        f"logits, merged against base and adapter: relative difference {measured.relative:.2g}, "
        f"largest {measured.largest:.2g}"
    )
    prover.check(
        f"on {wanted.shape[0]} probe tokens the merged model does what base and adapter do, "
        "but for this share of what the adapter changes",
        measured.share,
        tolerance,
        "store it in a wider type (--dtype float32), or, if so much may be lost, give a higher --tolerance",
        holds=measured.share <= tolerance or measured.relative <= _FLOAT32_NOISE,
    )


def _is_exact(weights: MergedWeights) -> bool:
    """Whether every merged tensor was stored in float32 or better: no more than float32 rounding was lost."""
    return all(loss.lost * loss.update < 1e-6 for loss in weights.losses)
