"""Merging: write the base with the adapter's updates as a model of its own, and prove it against base and adapter."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

from backhand.adapters.classifier_config import head_fields
from backhand.adapters.record import AdapterRecord
from backhand.data.held_out import neutral_texts
from backhand.errors import ArtifactError, not_none
from backhand.files import staged
from backhand.generation.loading import classification_of
from backhand.interop.gguf_adapter_writer import context_length
from backhand.interop.gguf_decision import gguf_decision, prove_decisions
from backhand.interop.gguf_model_writer import write_gguf_model
from backhand.interop.gguf_ranking import GGUFRanking, gguf_ranking, ranks
from backhand.interop.gguf_vectors import prove_gguf_vectors, text_end, vector_entries
from backhand.interop.huggingface_writer import write_huggingface
from backhand.interop.merged_weights import MergedHead, MergedWeights, ModuleLoss
from backhand.interop.opened_adapter import OpenedAdapter, for_gguf, open_adapter, refuse
from backhand.interop.options import (
    FLOAT32_TOLERANCE,
    ROUNDED_TOLERANCE,
    AdaptedModelOptions,
    MergeOptions,
    given,
)
from backhand.interop.proving import WRITING, BlockWalk, Prover, difference
from backhand.interop.sentence_transformers import kind_of, prove_sentence_transformers, write_files
from backhand.kernels.dequantize import native_dtype
from backhand.nn.decoder.config_facts import changed_fields, flat_config
from backhand.nn.families.class_heads import ClassHead
from backhand.nn.families.config_fields import UnsupportedModel
from backhand.nn.families.family import DecoderConfig, RotaryConfig
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.families.rotary_frequencies import inverse_frequencies
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.source import ModelSource
from backhand.printing import going_on
from backhand.terminal import console

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOAT32_NOISE = 3e-6
"""Relative difference of outputs that is due to float32 rounding alone."""


def merge_command(options: MergeOptions) -> Path:
    """Merge, print the rounding loss per layer, and prove the written model.

    Raises:
        UsageError: if an option is out of range, or `output` exists.
        ArtifactError: if model or adapter cannot be read, or do not belong together.
        ResourceError: if the output cannot be written.
        CheckError: if the written model differs from base plus adapter by more than the tolerance; it is removed.
    """
    options.validate()
    adapter, output = given("adapter", options.adapter), given("output", options.output)
    prover = Prover("merge", adapter, None if options.quiet else console())
    allow_pickle = options.reading.allow_pickle
    opened = open_adapter(options.model, adapter, force_base=options.force_base, allow_pickle=allow_pickle)
    with going_on(WRITING), staged(output) as path:
        merge_adapter(opened, options, path, prover, gguf=output.suffix == ".gguf")
    prover.write()
    prover.say(f"written: {shlex.quote(str(output))}")
    return output


def merge_adapter(
    opened: OpenedAdapter,
    options: AdaptedModelOptions,
    path: Path,
    prover: Prover,
    *,
    gguf: bool,
    decision: bool = False,
    vectors: bool = False,
) -> None:
    """Write the merged model at `path`, which must not exist, and prove it; `export --merge` calls this too.

    Args:
        options: `model`, `adapter` and `output` are ignored.
        gguf: write a GGUF file instead of a Hugging Face directory.
        decision: make the GGUF file a decision model of llama.cpp.
        vectors: make the directory a model of sentence-transformers.

    Raises:
        ArtifactError, CheckError: see `merge_command`.
    """
    prover.say_notes(opened.loaded)
    opened = for_gguf(opened) if gguf else opened
    if vectors:
        kind_of(opened)  # raises before anything is written
    pools = gguf and bool((opened.loaded.record or AdapterRecord()).embedding)
    more = gguf_decision(opened).add_to if decision else vector_entries(opened) if pools else None
    ranking: GGUFRanking | None = None
    base = describe_base(opened.source)
    prover.say(f"base: {base}")
    base = base.replace(
        str(opened.source.path), opened.source.path.name
    )  # files may be published, and paths are private
    weights = merged_weights(opened)
    if gguf and ranks(opened):
        ranking = gguf_ranking(opened, weights)
        if ranking is None:
            prover.say("note: llama.cpp's /v1/rerank knows no such score head of this architecture, only of Qwen3")
        else:
            more = ranking.add_to
    elif gguf and weights.head is not None:
        raise ArtifactError(
            "the adapter has a head for classification, for which a GGUF file has no place",
            where=str(opened.loaded.directory),
            why="llama.cpp answers with scores of documents alone",
            next_step="merge into a directory: leave out .gguf and --to gguf",
        )
    weights.walk = BlockWalk(opened.source, opened.documents, [None, opened.loaded.parameters()])
    if weights.unties_head:
        prover.say("note: the base's head is its embedding; the merged model has a head of its own")
    if gguf:
        description = f"LoRA adapter merged into {base}"
        tensors = None if ranking is None else ranking.tensors
        for note in write_gguf_model(
            path, weights, dtype=options.dtype, description=description, more=more, tensors=tensors
        ):
            prover.say(note)
    else:
        if options.dtype not in ("auto", *_DTYPES):
            raise ArtifactError(f"{options.dtype} is a type of GGUF files", where="dtype")
        stated = (f"{module}.{part}" for module in opened.config.outside for part in ("weight", "bias"))
        of_source = ((name, opened.source.head_tensor(name)) for name in stated)
        weights.outside = {name: tensor for name, tensor in of_source if tensor is not None}
        write_huggingface(
            path,
            weights,
            dtype=_DTYPES.get(options.dtype),
            max_shard_bytes=options.max_shard_bytes,
            card=merge_card(opened, base),
        )
    print_losses(weights.losses, prover)
    _prove(options, opened, weights, path, prover, text_end(opened) if pools else ())
    if pools:
        prove_gguf_vectors(str(path), opened, prover, exact=options.dtype == "float32")
    if ranking is not None:
        ranking.prove(path, prover, exact=options.dtype == "float32")
    if vectors:
        write_files(path, opened)
        prove_sentence_transformers(path, opened, prover, merged=True)
    if decision:
        prove_decisions(path, opened, prover, exact=options.dtype == "float32")


def merged_weights(opened: OpenedAdapter) -> MergedWeights:
    """Return the tensors of the merged model. Raises ArtifactError with the modules that cannot be merged."""
    loaded, head = opened.loaded, merged_head(opened)
    reasons = {}
    for shape in loaded.shapes:
        if shape.lora_bias is not None:
            reasons[shape.name] = "lora_B has a bias, for which the module has no parameter"
        elif shape.embedding and shape.magnitude is not None:
            reasons[shape.name] = "DoRA of an embedding is not merged here"
    refuse("a merged model", reasons, "use the adapter with PEFT, which opens its directory as it is")
    of_base = [tensor for tensor in loaded.trained if head is None or tensor.name not in head.parameters]
    trained = {tensor.name: loaded.factors[tensor.name] for tensor in of_base if tensor.token_ids is None}
    rows = [tensor for tensor in of_base if tensor.token_ids is not None]
    for tensor in rows:
        table = trained.get(tensor.base_name, opened.source.load(tensor.base_name)).float().clone()
        table[list(tensor.token_ids or ())] = loaded.factors[tensor.name].float()
        trained[tensor.base_name] = table
    return MergedWeights(opened.source, opened.factors, trained, keeps_head_tied=bool(rows), head=head)


def merged_head(opened: OpenedAdapter) -> MergedHead | None:
    """Return the head of an adapter for classification or for scores, completed by the base's; None without one.

    Raises:
        ArtifactError: neither the adapter nor the base has a parameter of the head.
    """
    loaded, source = opened.loaded, opened.source
    if not (classification := classification_of(loaded, opened.config)):
        return None
    head = opened.config.class_head
    trained = {tensor.name for tensor in loaded.trained}
    parameters = {}
    for name in head.parameters.values():
        tensor = loaded.factors[name] if name in trained else source.head_tensor(name)
        if tensor is None:
            raise ArtifactError(
                f"neither the adapter nor the base has {name}, a part of the head",
                where=str(loaded.directory),
                next_step="use the base with which the adapter was trained",
            )
        parameters[name] = tensor
    return MergedHead(parameters, head.prefix, head_fields(source, classification))


def _prove(
    options: AdaptedModelOptions,
    opened: OpenedAdapter,
    weights: MergedWeights,
    path: Path,
    prover: Prover,
    end: Sequence[int],
) -> None:
    """Compare the written model, read once, with the digests, and with the outputs of base and adapter."""
    base, wanted = not_none(weights.walk).outputs()
    written = open_model(path)
    check_same_model(weights.source, written, untied=weights.unties_head, text_end=end)
    walk = BlockWalk(written, opened.documents)
    wrong = weights.wrong_tensors(written, walk)
    statement = f"all {len(weights.digests)} tensors read back from the file bit by bit"
    prover.check(statement, len(wrong), 0, "write it again; the disk may be faulty")
    (found,) = walk.outputs()
    measured = difference(found, wanted, base)
    # In float32 or wider, no merged tensor lost more than float32 rounding.
    unrounded = all(loss.lost * loss.update < 1e-6 for loss in weights.losses)
    exact = options.dtype == "float32" or (options.dtype == "auto" and unrounded)
    usual = FLOAT32_TOLERANCE if exact else ROUNDED_TOLERANCE
    tolerance = usual if options.tolerance is None else options.tolerance
    output = opened.config.output_name
    prover.say(
        f"{output}, merged against base and adapter: relative difference {measured.relative:.2g}, "
        f"largest {measured.largest:.2g}"
    )
    prover.check(
        f"on {wanted.shape[0]} probe tokens the {output} of the merged model and of base with adapter differ by a "
        "small share of what the adapter changes",
        measured.share,
        tolerance,
        "store it in a wider type (--dtype float32), or, if so much may be lost, give a higher --tolerance",
        holds=measured.share <= tolerance or measured.relative <= _FLOAT32_NOISE,
    )


_AFTER_ALL_LAYERS = 1 << 30
_LONGER_THAN_ANY = 1 << 62
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def describe_base(source: ModelSource) -> str:
    """Describe the origin of the base and, if it is quantized, that the update was added to dequantized weights."""
    if not isinstance(source, GGUFModel):
        in_blocks = f"{source.origin}, experts quantized: MXFP4; the update was added to these dequantized weights"
        return in_blocks if source.quantized else source.origin
    matrices = [tensor for tensor in source.metadata.tensors.values() if len(tensor.shape) > 1]
    types = Counter(tensor.type_id for tensor in matrices if native_dtype(tensor.type_id) is None)
    if not types:
        return source.origin
    names = ", ".join(f"{GGMLQuantizationType(kind).name} ({count} tensors)" for kind, count in types.most_common())
    return f"{source.origin}, quantized: {names}; the update was added to these dequantized weights"


def print_losses(losses: Sequence[ModuleLoss], prover: Prover) -> None:
    """Print per layer the largest and mean rounding error relative to the update, and the update relative to W."""
    layers: dict[tuple[int, str], list[ModuleLoss]] = {}
    for loss in losses:
        match = _LAYER.search(loss.name)
        place = (int(match[1]), f"layer {match[1]}") if match else (_AFTER_ALL_LAYERS, loss.name)
        layers.setdefault(place, []).append(loss)
    prover.say("error of rounding over the size of the update, by layer:")
    for (_, layer), members in sorted(layers.items()):
        worst = max(members, key=lambda loss: loss.lost)
        mean = sum(loss.lost for loss in members) / len(members)
        size = max(loss.update for loss in members)
        prover.say(
            f"  {layer:>9}  mean {mean:.2g}  most {worst.lost:.2g} ({worst.name.rpartition('.')[2]})  "
            f"update {size:.2g} of the weight"
        )
    if any(loss.lost > 1 for loss in losses):
        prover.say(
            "above 1: the base's own numbers are rounded too, by more than the update; see the difference, below"
        )


def merge_card(opened: OpenedAdapter, base: str) -> str:
    """Return the README.md of a merged model."""
    hub_id, adapted = opened.source.hub_id, f"{len(opened.factors)} modules, folded into the weights by Backhand"
    of = f"base_model: {hub_id}\n" if hub_id else ""
    header = f'---\n{of}library_name: transformers\ntags: ["lora", "backhand"]\n---\n'
    return f"{header}\n# Merged model\n\nBase: {' '.join(base.split())}.\n\nAdapter: {adapted}.\n"


def check_same_model(source: ModelSource, written: ModelSource, *, untied: bool, text_end: Sequence[int] = ()) -> None:
    """Compare everything except the weights.

    Args:
        untied: True if the head was made a matrix of its own.
        text_end: tokens that the written tokenizer adds to every text, and that of the source does not.

    Raises:
        ArtifactError: if the format cannot express the configuration or the tokenizer.
    """
    ours = decoder_config(source.config)
    if isinstance(written, GGUFModel) and not isinstance(source, GGUFModel):
        ours = replace(ours, max_position_embeddings=context_length(ours, written.architecture))
    try:
        theirs = decoder_config(written.config)
    except UnsupportedModel as error:
        raise _cannot_hold(written, f"the written model has {'; '.join(error.problems)}") from None
    same_angles = _same_angles(ours, theirs)
    before, now = (flat_config(_comparable(config, untied, angles=not same_angles)) for config in (ours, theirs))
    changed = changed_fields(before, now, in_float32=isinstance(written, GGUFModel))
    if changed or not same_angles:
        fields = ", ".join(changed) or "the angles of the rotary embedding"
        raise _cannot_hold(written, f"the base and the written model differ: {fields}")
    try:
        tokenizer = source.tokenizer()
    except ArtifactError:
        return
    for text in neutral_texts():
        if [*tokenizer(text)["input_ids"], *text_end] != list(written.tokenizer()(text)["input_ids"]):
            raise ArtifactError(
                "the written tokenizer gives other tokens",
                where=written.path.name,
                why=f"for {text[:60]!r}",
                next_step="merge into a Hugging Face directory",
            )


def _cannot_hold(written: ModelSource, why: str) -> ArtifactError:
    return ArtifactError(
        "the format cannot hold this model's configuration",
        where=written.path.name,
        why=f"{why}; nothing was left at the output",
        next_step="merge into a Hugging Face directory",
    )


def _comparable(config: DecoderConfig, untied: bool, *, angles: bool) -> DecoderConfig:
    # Without windows, the files of Llama and Mistral are equal, angles may be stated in several ways, and gate and up
    # may be one module (Granite 4). Special ids may come from the config or from the tokenizer, and do not change the
    # computation. A file does not state the form of a score head, and an architecture has only one.
    tied = config.tied_head and not untied
    config = replace(config, family="", groups=(), rotary=config.rotary if angles else (), class_head=ClassHead())
    return replace(config, eos_token_ids=(), padding_id=None, tied_head=tied)


def _same_angles(ours: DecoderConfig, theirs: DecoderConfig) -> bool:
    def same(one: RotaryConfig, other: RotaryConfig, head_dim: int) -> bool:
        if (one.features or head_dim, one.interleaved) != (other.features or head_dim, other.interleaved):
            return False
        # Compare a short document, and one that is longer than the original length of any list of factors.
        pairs = [
            tuple(inverse_frequencies(each, head_dim, length=length) for each in (one, other))
            for length in (0, _LONGER_THAN_ANY)
        ]
        return math.isclose(one.attention_factor, other.attention_factor, rel_tol=1e-6) and all(
            torch.allclose(left, right, rtol=1e-6, atol=0) for left, right in pairs
        )

    return len(ours.rotary) == len(theirs.rotary) and all(
        same(*each) for each in zip(ours.rotary, theirs.rotary, ours.rotary_dims, strict=True)
    )
