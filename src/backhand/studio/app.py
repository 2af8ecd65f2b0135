"""Addresses of the page, and the functions that answer them."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import wraps
from http import HTTPStatus
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from huggingface_hub import constants
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route

from backhand.data.options import has_columns
from backhand.data.sources import data_suffix
from backhand.errors import UsageError
from backhand.files import FileLayer, remove_tree
from backhand.reading import read_plain
from backhand.report.page import trained_adapter
from backhand.report.run_record import RunRecord, read_run
from backhand.runs.directory import CONFIG, REPORT
from backhand.studio import queue
from backhand.studio.access import SANDBOX_POLICY, Refused, refusal
from backhand.studio.commands import CommandError
from backhand.studio.draft import (
    MORE,
    Draft,
    FieldError,
    can_be_tried,
    changed_run,
    choices_of,
    default_of,
    fields_named,
    is_owned,
    more_for,
    of_answers,
    offered,
    other_objective,
    pages,
    roles_of,
)
from backhand.studio.runs import (
    MAX_NEW_TOKENS,
    ListedRun,
    activity_of,
    adapter_of,
    all_runs,
    asking_words,
    error_of,
    log_of,
    page_of,
    result_of,
    stop,
    usual_error,
    version_of,
)
from backhand.studio.site import Site, static
from backhand.studio.workspace import checked_name


class Download(NamedTuple):
    """A format of the export form."""

    text: str
    to: str  # value of `export --to`
    suffix: str  # of the file: `gguf`, or `zip` for a directory
    options: tuple[str, ...] = ()


_MERGE = ("--merge",)
EXPORTS = {
    "peft": Download("PEFT adapter, also for transformers{and_vllm} (zip)", "peft", "zip"),
    "decision": Download("Decision model for llama.cpp (GGUF)", "gguf", "gguf", ("--decision",)),
    "vectors": Download("Model for sentence-transformers (zip)", "sentence-transformers", "zip", _MERGE),
    "gguf": Download("Adapter for llama.cpp (GGUF)", "gguf", "gguf"),
    "merged": Download("Base model with the adapter, for llama.cpp and LM Studio (GGUF)", "gguf", "gguf", _MERGE),
    "ollama": Download("Adapter with a Modelfile for Ollama (zip)", "ollama", "zip"),
}
"""Formats of the export form, by name."""
_SHOWN_ROWS = 3
_MAX_SHOWN_TOKENS = 600
_PLANNED_ROWS = 2000
"""Number of rows of a larger file that the plan encodes."""


def make_app(site: Site) -> Starlette:
    """Return the application with all pages below the site's root."""
    runs = [
        _route(site, "/runs/{name}", _run_page),
        _route(site, "/runs/{name}/report", _report),
        _route(site, "/runs/{name}/try", _try, "POST"),
        _route(site, "/progress/{work}", _progress),
    ]
    changing = [
        _route(site, "/", _home),
        _route(site, "/new", _model_step),
        _route(site, "/new/rows", _rows_step),
        _route(site, "/new/learn", _learn_step),
        _route(site, "/new/learn", _learn, "POST"),
        _route(site, "/new/start", _start_step),
        _route(site, "/part/models", _models_part),
        _route(site, "/part/rows", _first_rows_part),
        _route(site, "/part/lint", _lint_part),
        _route(site, "/part/plan", _plan_part),
        _route(site, "/compare", _compare),
        _route(site, "/upload", _upload, "POST"),
        _route(site, "/delete-rows", _delete_rows, "POST"),
        _route(site, "/start", _start, "POST"),
        *(_route(site, f"/runs/{{name}}/{name}", action, "POST") for name, action in _ACTIONS.items()),
        _route(site, "/runs/{name}/export", _export, "POST"),
        _route(site, "/runs/{name}/download/{file}", _download),
    ]
    routes = [*runs, *(changing if site.workspace is not None else []), Route("/static/{file}", static)]
    if (watched := site.watched) is not None:
        routes.append(Route("/", lambda _: site.go_to_run(watched.name)))
    handlers: dict[Any, Any] = {HTTPException: site.failure, Refused: refusal}
    return Starlette(routes=[Mount(site.root, routes=routes)], exception_handlers=handlers)


Answer = Callable[[Site, Request], Awaitable[Response]]


def _route(site: Site, path: str, answer: Answer, method: str = "GET") -> Route:
    @wraps(answer)
    async def answered(request: Request) -> Response:
        try:
            return await answer(site, request)
        except (HTTPException, Refused):
            raise
        except FieldError as error:
            return await _step_with(site, request, error)
        except Exception as error:  # noqa: BLE001 - a browser gets an answer, whatever goes wrong
            return site.failure(request, error)

    return Route(path, answered, methods=[method])


# ---- the list of runs, and a run ---------------------------------------------------------------------------------


async def _home(site: Site, request: Request) -> Response:
    queue.start_worker(site.space)
    runs = all_runs(site.space)
    versions = [version_of(run, None) for run in runs]

    def page() -> Response:
        known = ((run, version) for run, version in zip(runs, versions, strict=True) if run.has_started)
        results = {run.name: result_of(run.path, version) for run, version in known}
        return site.page("home.html.j2", {"title": "Runs", "runs": runs, "results": results})

    return _unless_known(request, " ".join(versions), page)


async def _run_page(site: Site, request: Request) -> Response:
    run = site.run(request)
    log = site.workspace.log_file(run.name) if site.workspace is not None else None

    def page() -> Response:
        said = "" if log is None else log_of(log)
        values = page_of(run)
        record = values["run"] if values and "run" in values else None
        adapter = None if record is None else trained_adapter(record)
        usable = [] if adapter is None else adapter.exports()
        and_vllm = " and vLLM" if adapter is not None and adapter.vllm_reads else ""
        shared: dict[str, Any] = {
            "title": run.name,
            "listed": run,
            "log": said,
            "activity": activity_of(said) if run.at_work else "",
            "start_error": error_of(said) if run.start_failed else "",
            **_rows_to_give_again(site, run),
            "exports": {
                kind: one.text.format(and_vllm=and_vllm)
                for kind, one in EXPORTS.items()
                if (one.to, one.options) in usable
            },
            "objective": "" if record is None else record.objective,
            "offered": offered("" if record is None else record.objective),
            "trained_on": "" if record is None else _text_of_training(record),
            "can_try": record is not None and _can_be_tried(run, record.summary.get("try_next") or ""),
            "made": site.space.exported(run.name) if site.workspace is not None else [],
            "charts": {},
            "sections": [],
            "page": values,
        }
        return site.page("run_page.html.j2", shared | (values or {}))

    return _unless_known(request, version_of(run, log), page)


def _form_of(run: ListedRun) -> Draft:
    """Return the form that a run was started with, without fields if there is none."""
    return Draft.of(parse_qsl(run.job.form if run.job is not None else ""))


def _text_of_training(record: RunRecord) -> str:
    """Return the column of the texts of a run, or the text with columns in braces; "" if none is named."""
    text = record.config.get("data", {}).get(offered(record.objective).text_option)
    if not isinstance(text, str) or not text:
        return ""
    return f"the text {text}, with the columns in braces filled in" if has_columns(text) else f"the column {text}"


def _can_be_tried(run: ListedRun, suggested: str) -> bool:
    return can_be_tried(suggested) or other_objective(suggested, _form_of(run)) is not None


def _rows_to_give_again(site: Site, run: ListedRun) -> dict[str, Any]:
    """Return the deleted rows that a run needs to be continued, and the uploads among which they may be."""
    gone = run.can_continue and site.workspace is not None and queue.deleted_rows(site.space, run.name, [])
    return {"gone": [path.name for path in gone or ()], "uploads": site.space.uploads() if gone else {}}


def _unless_known(request: Request, version: str, page: Callable[[], Response]) -> Response:
    """Return the page, or 304 if the browser has this version of it."""
    if version and request.headers.get("if-none-match") == f'"{version}"':
        return Response(status_code=HTTPStatus.NOT_MODIFIED)
    response = page()
    response.headers["ETag"] = f'"{version}"'
    return response


async def _report(site: Site, request: Request) -> Response:
    path = site.run(request).path / REPORT
    if not path.is_file() or path.is_symlink():
        raise UsageError("there is no report yet", next_step="wait for the end of the run")
    return _shown_report(read_plain(path))


def _shown_report(page: bytes) -> Response:
    return Response(page, media_type="text/html", headers={"Content-Security-Policy": SANDBOX_POLICY})


async def _compare(site: Site, request: Request) -> Response:
    names = request.query_params.getlist("run")
    if not names:
        raise UsageError("no run is marked", next_step="go back, and mark two runs or more in the list")
    paths = [str(site.space.run(name)) for name in names]
    with tempfile.TemporaryDirectory(dir=site.space.exports) as folder:
        output = Path(folder) / "comparison.html"
        await site.commands.checked(["report", *paths, f"--output={output}"], request.is_disconnected)
        return _shown_report(output.read_bytes())


async def _progress(site: Site, request: Request) -> Response:
    return Response(site.commands.progress.get(str(request.path_params["work"]), ""), media_type="text/plain")


async def _try(site: Site, request: Request) -> Response:
    run = site.run(request)
    form = await request.form()
    texts = [str(form[name]) for name in ("prompt", "other") if name in form]  # the other text is one to compare
    if not texts or not all(map(str.strip, texts)):
        raise UsageError(f"the {'text' if len(texts) > 1 else 'prompt'} is empty")
    words, page = asking_words(run, texts[0]), offered(read_run(run.path).objective)
    if len(texts) != (2 if page.compares else 1):
        raise UsageError("two texts are compared, and one prompt is answered", next_step="reload the page")
    # The prompt goes to standard input, because other users can see the words of a process.
    column, *options = page.asked
    text = "".join(json.dumps({column: one}) + "\n" for one in texts)
    try:
        outcome = await site.commands.checked([*words[:-1], "--data=-", *options], request.is_disconnected, text=text)
    except CommandError as error:
        raise CommandError(of_answers(error.text)) from None
    answers: dict[str, Any] = {"words": words, "notes": outcome.notes, "max_new_tokens": MAX_NEW_TOKENS}
    answers["usual_error"] = usual_error(run)
    decisions = read_run(run.path).summary.get("adapted_decisions") or {}
    answers["constant"] = [name for name, one in decisions.items() if one.get("constant")]
    if len(texts) > 1:  # the vectors have length 1
        one, other = (json.loads(line)["embedding"] for line in outcome.output.splitlines())
        return site.part("answers", **answers, cosine=sum(map(mul, one, other)))
    return site.part("answers", **answers, answer=outcome.json())


# ---- a new run ---------------------------------------------------------------------------------------------------


Errors = Mapping[str, str]
"""Errors of the fields of a step, by the name of the field."""


async def _step_with(site: Site, request: Request, error: FieldError) -> Response:
    """Return the step that has the field of an error; in a part of a page, the error with the way to this step."""
    given = await request.form() if request.method == "POST" else request.query_params
    draft = Draft.of((name, value) for name, value in given.items() if isinstance(value, str))
    if request.headers.get("x-part") == "1":
        return site.failure(request, error, _steps(draft, [error.field]))
    text = f"{error.what}: {error.next_step}" if error.next_step else error.what
    response = _step_of(error.field)[1](site, draft, draft.errors() | {error.field: text})
    response.status_code = HTTPStatus.CONFLICT
    return response


async def _model_step(site: Site, request: Request) -> Response:
    return _model_page(site, Draft.of(request.query_params.items()), {})


def _model_page(site: Site, draft: Draft, errors: Errors) -> Response:
    return site.page("new_model.html.j2", {"title": "New run: the model", "draft": draft, "errors": errors})


async def _models_part(site: Site, request: Request) -> Response:
    words = ["models", "--json"]
    outcome = await site.commands.checked(words, request.is_disconnected, work=_work(request))
    listed = list(outcome.json())
    # Models that fit come first, the smallest first.
    listed.sort(key=lambda one: (one["engine"] is None, not one["fits"], one["file_bytes"] or 0))
    site.models = listed
    draft = Draft.of(request.query_params.items())
    return site.part("models", models=listed, draft=draft, words=words[:1])


async def _rows_step(site: Site, request: Request) -> Response:
    draft = Draft.of(request.query_params.items())
    await _with_models(site, request, draft)
    await _predicts_tokens(site, request, draft)
    return _rows_page(site, draft, {})


async def _predicts_tokens(site: Site, request: Request, draft: Draft) -> bool | None:
    """Return False if the model of the draft is an encoder, and None if that is not known.

    Raises:
        FieldError: the model cannot be opened.
    """
    draft.model_words(site.space, site.model_names)
    name = draft.model
    listed = {one["name"]: one.get("answers") for one in site.models or ()}
    # With a network, only the hub knows whether `owner/model` exists.
    if is_owned(name) and not constants.HF_HUB_OFFLINE and not (site.space.root / name).exists():
        return listed.get(name)
    if name not in listed and name not in site.opened:
        outcome = await site.commands.run([name], request.is_disconnected, module="backhand.studio.named_model")
        facts = outcome.json()
        if error := facts.get("error"):
            raise FieldError("typed_model" if draft.get("typed_model") else "model", **error)
        site.opened[name] = facts.get("answers")
    return listed[name] if name in listed else site.opened[name]


def _rows_page(site: Site, draft: Draft, errors: Errors) -> Response:
    values = {"title": "New run: the rows", "draft": draft, "uploads": site.space.uploads(), "errors": errors}
    values["unreadable"] = site.space.unreadable()
    return site.page("new_rows.html.j2", values)


async def _upload(site: Site, request: Request) -> Response:
    name = await site.space.save_upload(request.query_params.get("name", ""), request.stream())
    return Response(name, media_type="text/plain")


async def _delete_rows(site: Site, request: Request) -> Response:
    form = await request.form()
    rows = site.space.upload(str(form.get("data", "")))
    if users := queue.users_of(site.space, rows):
        raise UsageError(
            f"these rows are needed by {', '.join(users)}",
            next_step="wait for the end of the run, or stop it",
        )
    unfinished = (run.name for run in all_runs(site.space) if run.can_continue)
    stopped = [name for name in unfinished if queue.refers_to(site.space, name, rows)]
    if stopped and form.get("sure") != "yes":
        raise UsageError(
            f"{', '.join(stopped)} can be continued, and needs these rows",
            next_step="continue the run first, or mark the box which says that it need not be continued",
        )
    site.space.delete_upload(rows.name)
    return site.go(f"new/rows?{form.get('query', '')}")


async def _learn_step(site: Site, request: Request) -> Response:
    draft = Draft.of(request.query_params.items())
    draft.rows_path(site.space)
    return _learn_page(site, draft, draft.errors())


def _learn_page(site: Site, draft: Draft, errors: Errors) -> Response:
    errors = {name: text for name, text in errors.items() if not name.startswith("more.")}
    return site.page("new_learn.html.j2", {"title": "New run: what to learn", "draft": draft, "errors": errors})


async def _learn(site: Site, request: Request) -> Response:
    """Store the prompt of a form, which is too long for an address, and show the checked rows."""
    form = await request.form()
    draft = Draft.of((name, value) for name, value in form.items() if isinstance(value, str))
    text = draft.get("context_text")
    context = site.space.save_context(text) if text else ""
    return site.go(f"new/learn?{draft.query(context_text='', context=context)}")


async def _first_rows_part(site: Site, request: Request) -> Response:
    draft = Draft.of(request.query_params.items())
    path = draft.rows_path(site.space)
    outcome = await site.commands.run([str(path)], request.is_disconnected, module="backhand.studio.first_rows")
    if not draft.get("typed_data"):
        site.space.mark_unreadable(draft.get("data"), unreadable=outcome.code != 0)
    try:
        first = outcome.json()
    except CommandError as error:
        return site.failure(request, error, _steps(draft, ["data"]))
    possible = pages()
    if await _is_encoder(site, request, draft):
        possible = {name: page for name, page in possible.items() if page.fits_encoders}
    objective = next(name for name in first["suggested"] if name in possible)
    first |= {"objective": objective, **first["suggested"][objective]}
    context = site.space.context(draft.get("context")).read_text("utf-8") if draft.get("context") else ""
    values = {"first": first, "draft": draft, "pages": possible, "roles": roles_of()}
    values["errors"] = draft.errors() | draft.missing_columns(first["columns"])
    is_table = data_suffix(path) in (".csv", ".tsv")
    return site.part("rows", **values, context=context, is_table=is_table)


async def _is_encoder(site: Site, request: Request, draft: Draft) -> bool:
    """Return True if the chosen model is an encoder, as far as it can be opened."""
    try:
        return await _predicts_tokens(site, request, draft) is False
    except (FieldError, CommandError):  # the check of the rows has the error
        return False


def _work(request: Request) -> str:
    """Return the page's name of its request, under which it asks for progress."""
    return request.headers.get("x-work", "")


async def _draft(site: Site, request: Request) -> Draft:
    """Return the draft in the address, with the models listed as `_with_models` does."""
    return await _with_models(site, request, Draft.of(request.query_params.items()))


async def _with_models(site: Site, request: Request, draft: Draft) -> Draft:
    """Return the draft; list the models first if its model may be one of them."""
    if site.models is None and not draft.get("typed_model") and os.sep in draft.get("model"):
        site.models = list((await site.commands.checked(["models", "--json"], request.is_disconnected)).json())
    return draft


async def _lint_part(site: Site, request: Request) -> Response:
    draft = await _draft(site, request)
    words = draft.lint_words(site.space, site.model_names)
    outcome = await site.commands.run(
        [*words, "--json", f"--show={_SHOWN_ROWS}"], request.is_disconnected, work=_work(request)
    )
    try:
        report = outcome.json()
    except CommandError as error:
        # Leaving out bad rows, at the last step, does not help if all rows are bad.
        fields = [name for name in _fields_of(draft, error) if name != "more.skip_bad"]
        return site.failure(request, error, _steps(draft, fields or ["", "data"]), draft.objective)
    train, held_out = report["train"], report["held_out"] or {"rows": 0}
    complete, mostly_bad = [], report["errors"] > train["rows"] + held_out["rows"]
    if mostly_bad:
        rows = [str(draft.rows_path(site.space))]
        outcome_of_rows = await site.commands.run(rows, request.is_disconnected, module="backhand.studio.first_rows")
        first = outcome_of_rows.json()
        if {*(draft.columns() or first["columns"])} - {*first["complete"]}:  # else other values than those are missing
            complete = first["complete"]
    values = {"report": report, "messages": outcome.messages if outcome.code else "", "most": _MAX_SHOWN_TOKENS}
    given = (option.removeprefix("--").partition("=") for option in report["skip_with"])
    leave_out = draft.query(**{f"more.{name.replace('-', '_')}": value or "True" for name, _, value in given})
    values |= {
        "words": words,
        "leave_out": leave_out,
        "other_file": draft.query(data=""),
        "objective": draft.objective,
        "offered": offered(draft.objective),
        "complete": complete,
    }
    can_leave_out = report["errors"] and report["skip_with"] and (complete or not mostly_bad)
    return site.part("lint", **values, can_leave_out=can_leave_out)


def _fields_of(draft: Draft, error: CommandError) -> list[str]:
    """Return the fields that the error of a command names; its first line names a model by its name alone."""
    return ["model"] if draft.model and draft.model in error.text.partition("\n")[0] else fields_named(error.text)


async def _start_step(site: Site, request: Request) -> Response:
    draft = await _draft(site, request)
    draft.train_words(site.space, site.model_names, site.space.run("NAME"))
    return _start_page(site, draft, {})


def _start_page(site: Site, draft: Draft, errors: Errors) -> Response:
    label = draft.get("typed_data") or site.space.uploads()[draft.get("data")].label
    values = {
        "title": "New run: start",
        "draft": draft,
        "errors": errors,
        "words": [] if errors else draft.train_words(site.space, site.model_names, site.space.run("NAME")),
        "more": more_for(draft.objective),
        "titles": MORE,
        "choices": choices_of,
        "default": default_of,
        "name": draft.get("name") or site.space.free_name(Path(label).stem),
        "busy": any(run.at_work or run.state == "waiting" for run in all_runs(site.space)),
    }
    return site.page("new_start.html.j2", values)


_STEP_OF: dict[str, tuple[tuple[str, str], Callable[[Site, Draft, Errors], Response]]] = {
    "more.": (("new/start", "Start"), _start_page),
    **dict.fromkeys(("data", "typed_data"), (("new/rows", "Rows"), _rows_page)),
    **dict.fromkeys(("model", "typed_model"), (("new", "Model"), _model_page)),
    "": (("new/learn", "What to learn"), _learn_page),
}
"""Address, name and page of the step that has a field, by the beginning of its name."""


def _step_of(field: str) -> tuple[tuple[str, str], Callable[[Site, Draft, Errors], Response]]:
    return next(one for start, one in _STEP_OF.items() if field.startswith(start))


def _steps(draft: Draft, fields: Sequence[str]) -> dict[str, str]:
    """Return the addresses of the steps that have these fields, by the names of the steps."""
    steps = dict(_step_of(field)[0] for field in fields)
    return {name: f"{place}?{draft.query()}" for place, name in steps.items()}


async def _plan_part(site: Site, request: Request) -> Response:
    draft = await _draft(site, request)
    words = ["plan", *draft.run_words(site.space, site.model_names), f"--sample={_PLANNED_ROWS}"]
    try:
        outcome = await site.commands.checked([*words, "--json"], request.is_disconnected, work=_work(request))
    except CommandError as error:
        return _not_possible(site, request, draft, error)
    site.planned.add(tuple(words))
    busy = any(run.at_work for run in all_runs(site.space))
    return site.part(
        "plan", plan=outcome.json(), words=words, busy=busy, objective=draft.objective, traits=draft.traits
    )


def _not_possible(site: Site, request: Request, draft: Draft, error: CommandError) -> Response:
    """Return the error of a plan, with the way to the steps that can mend it. The last step's fields are next to it."""
    fields = [name for name in _fields_of(draft, error) if not name.startswith("more.")]
    return site.failure(request, error, _steps(draft, fields), draft.objective)


async def _start(site: Site, request: Request) -> Response:
    form = await request.form()
    draft = Draft.of((name, value) for name, value in form.items() if isinstance(value, str))
    name = checked_name(draft.get("name").strip())
    output = site.space.run(name)
    if site.space.taken(name):
        raise UsageError(f"there is a run {name} already", next_step="give another name")
    await _with_models(site, request, draft)
    words = draft.train_words(site.space, site.model_names, output)
    plan = ["plan", *draft.run_words(site.space, site.model_names), f"--sample={_PLANNED_ROWS}"]
    if tuple(plan) not in site.planned:  # an option that the model refuses must not leave a run that cannot start
        try:
            await site.commands.checked([*plan, "--no-calibrate"], request.is_disconnected, work=_work(request))
        except CommandError as error:
            return _not_possible(site, request, draft, error)
    queue.enqueue(site.space, name, words, draft.query(name=""))
    return site.go_to_run(name)


# ---- actions on a run --------------------------------------------------------------------------------------------


async def _stop(site: Site, request: Request) -> Response:
    run = site.run(request)
    if not queue.cancel(site.space, run.name):
        stop(run)
        return site.go_to_run(run.name)
    return site.go("")


async def _resume(site: Site, request: Request) -> Response:
    run = site.run(request)
    form = run.job.form if run.job is not None else ""
    words = ["train", "--resume", f"--output={run.path}"]
    if gone := queue.deleted_rows(site.space, run.name, []):
        given = str((await request.form()).get("data", ""))
        if not given or len(gone) > 1:
            raise UsageError(
                f"the rows of this run were deleted: {', '.join(path.name for path in gone)}",
                next_step="upload the same file again at New run, Rows, and choose it here",
            )
        words.append(f"--data={site.space.upload(given)}")
        form = form and Draft.of(parse_qsl(form)).query(data=given)
    queue.enqueue(site.space, run.name, words, form)
    return site.go_to_run(run.name)


async def _restart(site: Site, request: Request) -> Response:
    run = site.run(request)
    if not run.can_restart or run.job is None:
        raise UsageError(f"the run {run.name} cannot be started again", next_step="continue it, or start another one")
    words = queue.with_output([word for word in run.job.words if word != "--overwrite"], run.path)
    if gone := queue.deleted_rows(site.space, run.name, words):
        raise UsageError(
            f"the rows of this run were deleted: {', '.join(path.name for path in gone)}",
            next_step="choose Change the settings, and upload them again",
        )
    queue.enqueue(site.space, run.name, [*words, *["--overwrite"] * run.path.exists()], run.job.form)
    return site.go_to_run(run.name)


async def _again(site: Site, request: Request) -> Response:
    run = site.run(request)
    name = site.space.free_name(run.name)
    suggested = read_run(run.path).summary.get("try_next") or ""
    if (draft := other_objective(suggested, _form_of(run))) is not None:
        return site.go(f"new/start?{draft.query()}")
    words = changed_run(suggested, run.path / CONFIG, site.space.run(name))
    if run.job is not None and run.job.form:  # the page of the start shows the change and its plan
        options = (word.removeprefix("--").partition("=") for word in words[2:-1])
        changes = {f"more.{option.replace('-', '_')}": value for option, _, value in options}
        return site.go(f"new/start?{_form_of(run).query(**changes)}")
    queue.enqueue(site.space, name, words)
    return site.go_to_run(name)


async def _rename(site: Site, request: Request) -> Response:
    run = _at_rest(site, request)
    new = checked_name(str((await request.form()).get("new", "")).strip())
    if new != run:
        queue.rename(site.space, run, new)
        if (path := site.space.run(new)).joinpath(REPORT).is_file():  # it names the directory
            await site.commands.run(["report", str(path)], request.is_disconnected)
    return site.go_to_run(new)


async def _delete(site: Site, request: Request) -> Response:
    run = _at_rest(site, request)
    if (await request.form()).get("sure") != "yes":
        raise UsageError(
            f"the run {run} is not deleted", next_step="mark the box next to the button, which confirms it"
        )
    await run_in_threadpool(site.space.delete, run)
    return site.go("")


def _at_rest(site: Site, request: Request) -> str:
    run = site.run(request)
    if run.at_work or run.state == "waiting":
        raise UsageError(f"the run {run.name} {run.state_words}", next_step="stop it first")
    if run.job is not None and run.job.running:
        raise UsageError(f"the process of the run {run.name} has not ended yet", next_step="wait for its end")
    return run.name


_ACTIONS: dict[str, Answer] = {
    "stop": _stop,
    "resume": _resume,
    "restart": _restart,
    "again": _again,
    "rename": _rename,
    "delete": _delete,
}


async def _export(site: Site, request: Request) -> Response:
    run = site.run(request)
    form = await request.form()
    kind = str(form.get("to", ""))
    if kind not in EXPORTS:
        raise UsageError("this is not a format of the page", next_step="choose one of the list")
    export = EXPORTS[kind]
    model = read_run(run.path).config.get("model", {}).get("model", "smollm2-135m")
    output = site.space.exports / run.name / (f"{run.name}-{kind}" + (".gguf" if export.suffix == "gguf" else ""))
    words = ["export", f"--model={model}", f"--adapter={adapter_of(run)}", f"--to={export.to}", *export.options]
    words.append(f"--output={output}")
    if repository := str(form.get("push", "")).strip():
        if form.get("sure") != "yes":
            raise UsageError("nothing is uploaded", next_step="mark the box below the repository, which confirms it")
        words.append(f"--push={repository}")
    path = output.with_name(f"{output.name}.zip") if export.suffix == "zip" else output
    output.parent.mkdir(mode=0o700, exist_ok=True)
    for earlier in {output, path}:
        await run_in_threadpool(remove_tree, FileLayer(), earlier)
    outcome = await site.commands.checked(words, request.is_disconnected)
    if export.suffix == "zip":
        await run_in_threadpool(_zip, output, path)
    messages = outcome.output + outcome.messages
    return site.part("export", file=path, run=run.name, size=path.stat().st_size, messages=messages, words=words)


def _zip(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))


async def _download(site: Site, request: Request) -> Response:
    folder = site.space.exports / site.run(request).name
    name = str(request.path_params["file"])
    if not folder.is_dir() or name not in {path.name for path in folder.iterdir() if path.is_file()}:
        raise UsageError("this file has not been made yet", next_step="press the button of its format")
    return FileResponse(folder / name, media_type="application/octet-stream", filename=name)
