"""`backhand export`: write an adapter in another program's format, prove it, and move it to its place."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from backhand.adapters.contents import CLASSIFIER_FILE, read_adapter_directory
from backhand.adapters.loading import match_linear_adapter, read_adapter
from backhand.adapters.module_factors import Factors, factors_of
from backhand.adapters.peft_saving import loading_code
from backhand.adapters.record import AdapterRecord
from backhand.data.chat import read_template
from backhand.data.template_report import default_system
from backhand.errors import ArtifactError, BackhandError, ResourceError, UsageError, not_none, short_reason
from backhand.files import staged, write_atomically
from backhand.interop.gguf_adapter_writer import llama_cpp_notes, write_gguf_adapter
from backhand.interop.gguf_decision import example_request
from backhand.interop.gguf_ranking import can_rank
from backhand.interop.gguf_vectors import text_end
from backhand.interop.huggingface_writer import write_tokenizer
from backhand.interop.merging import merge_adapter
from backhand.interop.opened_adapter import OpenedAdapter, for_gguf, open_adapter, refuse
from backhand.interop.options import ExportOptions, given
from backhand.interop.other_formats import (
    ADAPTER_FILE,
    MODEL_FILE,
    described_for_peft,
    factors_for_kohya,
    kohya_bytes,
    mlx_files,
    ollama_base,
    peft_directory_files,
    read_kohya_file,
    read_mlx_files,
    write_modelfile,
)
from backhand.interop.proving import WRITING, Prover, prove_export
from backhand.interop.sentence_transformers import (
    embedding_of,
    for_sentence_transformers,
    kind_of,
    prove_sentence_transformers,
    write_files,
)
from backhand.nn.loading.gguf_layouts import stored_sizes
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.gguf_tensors import gguf_architecture
from backhand.nn.loading.source import ModelSource
from backhand.printing import going_on
from backhand.runs.uses import TrainedAdapter, sentence_transformers_code
from backhand.terminal import console
from backhand.words import labelled


def export_command(options: ExportOptions) -> Path:
    """Export, and print the proofs.

    Raises:
        UsageError: if an option is out of range, or `output` exists.
        ArtifactError: if model or adapter cannot be read, do not belong together, or the format cannot express them.
        ResourceError: if the output cannot be written, or cannot be uploaded; in the latter case it is kept.
        CheckError: if the written files do not compute what the adapter does; they are removed.
    """
    options.validate()
    adapter, output = given("adapter", options.adapter), given("output", options.output)
    prover = Prover("export", adapter, None if options.quiet else console())
    lines: tuple[str, ...] = ()
    if options.to == "kohya":
        with going_on(WRITING):
            _export_kohya(options, adapter, output, prover)
    else:
        allow_pickle = options.reading.allow_pickle
        opened = open_adapter(options.model, adapter, force_base=options.force_base, allow_pickle=allow_pickle)
        if options.to == "ollama":
            _check_ollama(opened, merge=options.merge)
        with going_on(WRITING):
            (_export_merged if options.merged else _export_adapter)(options, opened, output, prover)
        lines = _how_to_use(options, opened, shlex.quote(str(output)))
    prover.write()
    prover.say(f"written: {shlex.quote(str(output))}")
    for line in lines:
        prover.say(line)
    if options.push is not None:
        with going_on(f"uploading to {options.push}"):
            prover.say(f"uploaded: {_push(output, options.push)}")
    return output


def _check_ollama(opened: OpenedAdapter, *, merge: bool) -> None:
    """Raise ArtifactError if Ollama cannot compute what the adapter was trained for."""
    reasons = {
        "decide": ("it computes no probabilities of answers", "give --to gguf --decision, for llama.cpp"),
        "rank": ("it computes no scores of documents", "use backhand rank, or export to another format"),
        "embed": ("it takes the pooling of vectors from the file of the model", "give --merge"),
    }
    trained = _trained(opened)
    if ("ollama", ("--merge",) if merge else ()) not in trained.exports():
        why, next_step = reasons[trained.objective]
        raise ArtifactError(
            f"the adapter was trained with --objective {opened.objective}, for which Ollama cannot use it",
            where="to",
            why=why,
            next_step=next_step,
        )


def _trained(opened: OpenedAdapter) -> TrainedAdapter:
    """Return the adapter for the commands that use it."""
    return TrainedAdapter(
        *(opened.objective or "sft", opened.base_name, str(opened.loaded.directory)),
        has_template=not _completes_texts(opened),
    )


def _how_to_use(options: ExportOptions, opened: OpenedAdapter, output: str) -> tuple[str, ...]:
    """Return the commands to run next or the code that loads the output, or a note that they need another export."""
    objective = opened.objective
    if options.to == "peft" and not options.merged:
        described, wrapper = described_for_peft(opened, text_model=options.text_model)
        return _next(*loading_code(described, wrapper, str(options.output)).split("\n"))
    if options.to == "sentence-transformers":
        return _next(*sentence_transformers_code(str(options.output), vectors=kind_of(opened) == "vectors").split("\n"))
    if options.to == "ollama":
        return _next(*_trained(opened).in_ollama(output))
    if options.to == "mlx" and objective not in ("decide", "embed", "rank", "classify"):
        base = opened.loaded.described.base_model or opened.base_name
        return _next(f"mlx_lm.generate --model {shlex.quote(base)} --adapter-path {output} --prompt '…'")
    if options.to != "gguf":
        return ()
    if objective == "decide" and not options.decision:
        return (labelled("the adapter decides questions; llama.cpp does so with a decision model: add --decision"),)
    if objective == "rank" and not can_rank(opened):
        note = labelled("the adapter ranks documents; llama.cpp cannot rank with this base: use backhand rank")
        return () if options.merged else (note,)
    if objective == "rank" and not options.merged:
        return (labelled("the adapter ranks documents; llama.cpp does so with a merged model: add --merge"),)
    if objective == "embed" and not options.merged and text_end(opened):
        return (
            labelled("the base's tokenizer does not end texts as in training, and a merged model's does: add --merge"),
        )
    trained = _trained(opened)
    if options.merged:
        asking = [example_request(not_none(opened.loaded.record))] if options.decision else []
        return _next(trained.in_llama_cpp(f"-m {output}"), *asking)
    base = shlex.quote(str(opened.source.path)) if isinstance(opened.source, GGUFModel) else "BASE.gguf"
    pooling = f"--pooling {embedding_of(opened)['pooling']} " if objective == "embed" else ""
    return _next(trained.in_llama_cpp(f"{pooling}-m {base} --lora {output}"))


def _next(*lines: str) -> tuple[str, ...]:
    """Return the lines that name the commands to run next, or the lines of code."""
    return tuple(f"{'      ' if number else 'next: '}{line}".rstrip() for number, line in enumerate(lines))


_ANSWER_S = 120.0
"""Patience for one answer of the hub, in seconds. The library itself has no limit."""


def _push(output: Path, repository: str) -> str:
    """Upload a directory or a file, and return the repository's address.

    Raises:
        ResourceError: the hub refuses or cannot be reached; names the command that uploads the output later.
    """
    from huggingface_hub import HfApi, get_session

    hub = HfApi()
    try:
        get_session().timeout = _ANSWER_S
        address = hub.create_repo(repository, private=True, exist_ok=True)
        if output.is_dir():
            hub.upload_folder(repo_id=repository, folder_path=output)
        else:
            hub.upload_file(repo_id=repository, path_or_fileobj=output, path_in_repo=output.name)
        return str(address)
    except Exception as error:  # noqa: BLE001 - the library raises what its network stack raises
        later = f"hf upload {repository} {shlex.quote(str(output))}"
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        why = short_reason(error)
        # The library raises these while it reads an answer that is not a hub's.
        if isinstance(error, ValueError | LookupError | TypeError | AttributeError):
            why = f"{hub.endpoint} does not answer as a hub does: {why}"
        raise ResourceError(
            f"{output} is written, and could not be uploaded to {repository}",
            why=why,
            next_step=f"hf auth login, then: {later}" if refused else f"once the hub can be reached: {later}",
        ) from None


def _export_adapter(options: ExportOptions, opened: OpenedAdapter, output: Path, prover: Prover) -> None:
    prover.say_notes(opened.loaded)
    # PEFT's files could contain more than factors, but the proofs here cover factors alone.
    head = {one.name for one in opened.loaded.trained} & {*opened.config.class_head.parameters.values()}
    refused = _more_than_factors(options, opened)
    if head and options.to != "peft":  # GGUF files have no place for a head, even of a merged model
        refuse(str(options.to), refused, _formats_with_head(options, opened))
    refuse(str(options.to), refused)
    opened = for_gguf(opened) if options.to in ("gguf", "ollama") else opened
    architecture = gguf_architecture(opened.source.config)
    if options.to in ("gguf", "ollama") and architecture:
        for note in llama_cpp_notes(opened.config, architecture, context_ends=False):
            prover.say(note)
        if opened.config.family == "bamba" and not isinstance(opened.source, GGUFModel):
            prover.say(
                "note: the adapter does not fit a file of this model from llama.cpp's converter, which pairs rows of q "
                "and k otherwise than llama.cpp rotates them: give --merge, or train on the file"
            )
    if options.to == "sentence-transformers":
        kind_of(opened)  # raises before anything is written
    with staged(output) as path:
        read = _write(options, opened, path)
        prove_export(prover, opened.factors, read, opened)
        if options.to in ("peft", "sentence-transformers") and opened.loaded.trained:
            _prove_head(opened, path, prover)
        if options.to == "sentence-transformers":
            prove_sentence_transformers(path, opened, prover, merged=False)


def _prove_head(opened: OpenedAdapter, path: Path, prover: Prover) -> None:
    """Compare the parameters of the head in the written files with those of the adapter, bit by bit."""
    written = match_linear_adapter(read_adapter(path, opened.source), opened.shapes).factors
    names = [tensor.name for tensor in opened.loaded.trained]
    wrong = sum(not torch.equal(written[name], opened.loaded.factors[name]) for name in names)
    prover.check(f"{len(names)} parameters of the head read back from the file bit by bit", wrong, 0, "write it again")


def _more_than_factors(options: ExportOptions, opened: OpenedAdapter) -> dict[str, str]:
    """Return reasons by module that cannot be exported; GGUF files accept plain factors of embeddings and experts."""
    refused = opened.loaded.beyond_factors
    if options.to in ("peft", "sentence-transformers") and not options.uniform:
        of_head = {name.rpartition(".")[0] for name in opened.config.class_head.parameters.values()}
        refused = {name: reason for name, reason in refused.items() if name not in of_head}
    if options.to in ("gguf", "ollama"):
        for shape in opened.loaded.shapes:
            if (shape.embedding or shape.experts) and shape.magnitude is None and shape.lora_bias is None:
                del refused[shape.name]
    return refused


def _formats_with_head(options: ExportOptions, opened: OpenedAdapter) -> str:
    """Return the commands that can express an adapter with a head."""
    if _more_than_factors(replace(options, to="peft"), opened):
        return "use backhand merge"
    other = " or --to sentence-transformers" if opened.objective == "rank" else ""
    return f"give --to peft{other}, or use backhand merge"


def _write(options: ExportOptions, opened: OpenedAdapter, path: Path) -> Factors:
    """Write the output at `path`, and read it back."""
    if options.to == "gguf":
        _write_gguf(opened, path)
        return _read(opened, path)
    path.mkdir()
    if options.to == "ollama":
        _write_gguf(opened, path / ADAPTER_FILE)
        _write_modelfile(opened, path, ollama_base(opened.source, path), adapter=ADAPTER_FILE)
        return _read(opened, path / ADAPTER_FILE)
    if options.to == "mlx":
        files = mlx_files(opened)
    else:
        if options.to == "sentence-transformers":
            opened = for_sentence_transformers(opened)
        files = peft_directory_files(opened, uniform=options.uniform, text_model=options.text_model)
    if options.to == "sentence-transformers":
        files.pop(CLASSIFIER_FILE, None)  # with it, transformers looks for the weights of a whole model
    for name, data in files.items():
        write_atomically(path / name, data)
    if options.to == "sentence-transformers":
        write_tokenizer(path, opened.source)
        write_files(path, opened)
    return read_mlx_files(path) if options.to == "mlx" else _read(opened, path)


def _completes_texts(opened: OpenedAdapter) -> bool:
    """Return True if prompts have no chat template, since the adapter's rows or the base had none."""
    if opened.loaded.record is not None and opened.loaded.record.bare:
        return True
    with suppress(BackhandError):  # no tokenizer, or no usable one
        return read_template(None, opened.source.tokenizer()) is None
    return False


def _write_modelfile(opened: OpenedAdapter, path: Path, base: str, *, adapter: str | None = None) -> None:
    texts = _completes_texts(opened)
    system = None if texts else _system(opened.loaded.record, opened.source)
    write_modelfile(path, base, adapter=adapter, system=system, bare_prompt=texts)


def _system(record: AdapterRecord | None, source: ModelSource) -> str | None:
    """Return the system message of training: that of the rows, or the one that the chat template writes by default."""
    if record is not None and record.system is not None:
        return record.system
    with suppress(BackhandError):  # no tokenizer, or no usable template
        return default_system(source.tokenizer())
    return None


def _write_gguf(opened: OpenedAdapter, path: Path) -> None:
    architecture = gguf_architecture(opened.source.config)
    if architecture is None:
        raise UsageError(
            f"no GGUF format of this {opened.config.family} is known",
            where="to",
            next_step="give --to peft, or --merge",
        )
    write_gguf_adapter(
        path,
        opened.factors,
        architecture=architecture,
        sizes=stored_sizes(opened.source.config),
        tied_head=opened.config.tied_head,
        record=opened.loaded.record or AdapterRecord(),
        name=opened.loaded.directory.resolve().stem,
    )


def _read(opened: OpenedAdapter, path: Path) -> Factors:
    # The base has been compared already, or was forced, so that it is not read again.
    return factors_of(match_linear_adapter(read_adapter(path, opened.source), opened.shapes))


def _export_kohya(options: ExportOptions, adapter: Path, output: Path, prover: Prover) -> None:
    contents = read_adapter_directory(adapter, allow_pickle=options.reading.allow_pickle)
    factors = factors_for_kohya(contents)
    data = kohya_bytes(factors)
    with staged(output) as path:
        write_atomically(path, data)
        prove_export(prover, factors, read_kohya_file(path, factors))


def _export_merged(options: ExportOptions, opened: OpenedAdapter, output: Path, prover: Prover) -> None:
    with staged(output) as path:
        if options.to == "ollama":
            path.mkdir()
            merge_adapter(opened, options, path / MODEL_FILE, prover, gguf=True)
            _write_modelfile(opened, path, f"./{MODEL_FILE}")
        else:
            vectors, gguf = options.to == "sentence-transformers", options.to == "gguf"
            merge_adapter(opened, options, path, prover, gguf=gguf, decision=options.decision, vectors=vectors)
