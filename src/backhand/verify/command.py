"""`backhand verify`: prove every op, block and family, or a user's model on their rows."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from backhand.data.pack import pack
from backhand.data.raw_rows import any_in_memory
from backhand.errors import CheckError, UsageError
from backhand.nn.compute import compute_settings, resolve_threads
from backhand.options.config_file import load_config
from backhand.options.objectives import ObjectiveOptions
from backhand.printing import say as tell
from backhand.runs.directory import ADAPTER, CONFIG, opened, proof_log
from backhand.terminal import console_for_tables, working
from backhand.verify.invariances import prove_invariances
from backhand.verify.merging import prove_merging
from backhand.verify.model_gradients import GradientProofs
from backhand.verify.model_setup import load_setup
from backhand.verify.options import VerifiedModelOptions, VerifyOptions, VerifyRunOptions
from backhand.verify.report import MODEL, MUTANTS, PROOFS, VerifyReport
from backhand.verify.runner import PROOF_FILES, load_proofs, prove_case, reject_mutants
from backhand.verify.tables import print_report
from backhand.words import nearest_names

_WIDTH_WITHOUT_TERMINAL = 140
Say = Callable[[str], None]


def verify_command(options: VerifyOptions) -> VerifyReport:
    """Run the proofs, print tables or one JSON object, and append the results to a run.

    Raises:
        UsageError, DataError, ArtifactError: if op, model, rows, adapter or run do not exist or cannot be used.
        CheckError: if a proof fails. The results have been printed and written to the run before.
    """
    options, objective = _resolved(options)
    if options.verify.run or options.proves_model:
        tell(
            "computing every gradient in float64, by hand and by autograd, then in the dtype of training; "
            "this takes minutes for 100 million parameters"
        )
    report = _proved(options, objective)
    if options.verify.json:
        sys.stdout.write(json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n")
    else:
        print_report(console_for_tables(_WIDTH_WITHOUT_TERMINAL), report, every_mutant=options.verify.op is not None)
    _raise_failures(report)
    return report


def verify(
    options: VerifyOptions, say: Say = lambda _: None, *, objective: ObjectiveOptions | None = None
) -> VerifyReport:
    """Run the proofs without printing.

    Args:
        say: receives the name of each part before it is proved.
        objective: the loss of the rows, if it is one of decisions or rankings; None for another one.

    Raises:
        UsageError, DataError, ArtifactError: if op, model, rows or adapter do not exist or cannot be used.
    """
    options.validate()
    start = time.perf_counter()
    if options.verify.large:
        report = _verify_real_sizes(options, say)
    else:
        report = _verify_model(options, say, objective) if options.proves_model else _verify_ops(options, say)
    report.time_s = time.perf_counter() - start
    return report


def prove_run(run: Path, *, max_tokens: int) -> VerifyReport:
    """Prove gradients and invariances of a run's adapter on about `max_tokens` tokens of its rows, without printing.

    Every result is appended to the run's proofs.jsonl.

    Raises:
        UsageError, DataError, ArtifactError: if run, rows, model or adapter do not exist or cannot be used.
        CheckError: if a proof fails.
    """
    report = _proved(*_resolved(VerifyOptions(verify=VerifyRunOptions(run=run, max_tokens=max_tokens))))
    _raise_failures(report)
    return report


def _resolved(options: VerifyOptions) -> tuple[VerifyOptions, ObjectiveOptions | None]:
    """Return the options, with model, rows and adapter of the run if that is proved, and its objective or None.

    Raises:
        UsageError: an option cannot be used, there is no run, or its rows are in no file.
    """
    options.validate()
    run = options.verify.run
    if run is None:
        return options, None
    if not (run / CONFIG).exists():
        raise UsageError(f"there is no run in {run}", where="run", next_step="give a run directory with config.toml")
    return _of_run(options, run) if options.verify.op is None and not options.model.model else (options, None)


def _proved(options: VerifyOptions, objective: ObjectiveOptions | None) -> VerifyReport:
    """Run the proofs with a status line on the terminal, and append each result to the run's proofs.jsonl."""
    with working() as shown:

        def say(what: str) -> None:
            shown(f"proving {what}")

        run = options.verify.run
        if run is None:
            return verify(options, say)
        with opened(run, resume=True, overwrite=False) as directory:
            report = verify(options, say, objective=objective)
            log = proof_log(directory)
            for proof in report.proofs():
                log(proof)
    return report


def _of_run(options: VerifyOptions, run: Path) -> tuple[VerifyOptions, ObjectiveOptions]:
    """Return the options with the run's model, rows and adapter, and its objective."""
    config = load_config(run / CONFIG)
    shared = {name: getattr(config.model, name) for name in VerifiedModelOptions.__dataclass_fields__}
    adapter = options.verify.adapter or run / ADAPTER
    if not options.data.data and any_in_memory(config.data.data):
        neutral = f"backhand verify --adapter {shlex.quote(str(adapter))}"
        raise UsageError(
            "the rows of this run were given by a program, and are in no file",
            where="run",
            next_step=f"give rows as --data FILE, or prove the gradients on neutral texts: {neutral}",
        )
    of_run = replace(
        options,
        model=VerifiedModelOptions(**shared),
        data=config.data if not options.data.data else options.data,
        verify=replace(options.verify, adapter=adapter),
    )
    return of_run, config.objective


def _verify_ops(options: VerifyOptions, say: Say) -> VerifyReport:
    op = options.verify.op
    if op is not None and op not in PROOF_FILES:
        near = nearest_names(op, PROOF_FILES)
        raise UsageError(
            f"there is no op {op!r}",
            where="op",
            next_step=f"did you mean {' or '.join(near)}?" if near else f"give one of {', '.join(PROOF_FILES)}",
        )
    device = options.model.device if options.model.device != "auto" else "cpu"
    report = VerifyReport()
    threads = torch.get_num_threads()
    # The cases are so small that a second thread costs time, especially on a busy machine.
    torch.set_num_threads(options.model.threads or 1)
    try:
        for proof in load_proofs(op):
            for case in proof.cases:
                say(f"{proof.op}: {case.name}")
                report.results.extend(prove_case(proof, case, device))
            say(f"{proof.op}: mutants")
            report.results.extend(reject_mutants(proof, device))
    finally:
        torch.set_num_threads(threads)
    return report


def _verify_real_sizes(options: VerifyOptions, say: Say) -> VerifyReport:
    from backhand.verify.real_sizes import prove_real_size, real_sizes

    report = VerifyReport()
    with compute_settings(options.model, resolve_threads(options.model), torch.float32, torch.device("cpu")):
        for size in real_sizes():
            say(f"{size.op.name}: {size.case.name}")
            report.results.extend(prove_real_size(size))
    return report


def _verify_model(options: VerifyOptions, say: Say, objective: ObjectiveOptions | None) -> VerifyReport:
    run = options.verify
    name = options.model.model or str(run.adapter)
    say(f"{name}: loading")
    setup = load_setup(options.model, options.data, run.adapter, run.max_tokens, objective)
    decoder = setup.decoder
    report = VerifyReport(notes=setup.notes)
    threads = resolve_threads(options.model)
    with compute_settings(options.model, threads, decoder.dtype, decoder.device):
        batch = pack(setup.examples, device=decoder.device)
        gradients = GradientProofs(decoder, batch, setup.dropout_seed, setup.rows, objective, setup.head_loss)
        say(f"{name}: block by block in float64")
        report.results.extend(gradients.by_block())
        say(f"{name}: a training step")
        report.results.append(gradients.training_step())
        say(f"{name}: invariances")
        bound = gradients.rounding_bound
        report.results.extend(prove_invariances(decoder, setup.examples, bound, setup.head_loss))
        say(f"{name}: merging")
        report.results.extend(prove_merging(gradients.step))
    return report


def _raise_failures(report: VerifyReport) -> None:
    if failed := report.failed(PROOFS):
        worst = max(failed, key=lambda one: one.severity)
        raise CheckError(
            f"{len(failed)} of {len(report.of(PROOFS))} proofs fail, the worst is {worst.tensor} of {worst.op}",
            where=f"{worst.op}: {worst.case}, {worst.dtype}",
            why=f"relative error {worst.error:.1e}, bound {worst.bound:.1e}; {worst.detail or 'no single row'}",
            next_step=f"run backhand verify --op {worst.op}",
        )
    if failed := report.failed(MUTANTS):
        raise CheckError(
            f"{len(failed)} deliberately wrong versions were not rejected, the first is {failed[0].mutant!r}",
            where=f"{failed[0].op}: {failed[0].tensor}",
            next_step="add a case that reveals the mistake",
        )
    if failed := report.failed(MODEL):
        worst = max(failed, key=lambda one: one.severity)
        why = f"measured {worst.error:.1e}, bound {worst.bound:.1e}; {worst.detail}"
        raise CheckError(f"does not hold: {worst.case}", why=why)
    if not report.passed:
        raise CheckError("nothing was proved")
