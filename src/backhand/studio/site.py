"""The common part of all pages: the workspace, the templates, and the answers to forms and errors."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from datetime import datetime
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, PackageLoader
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from backhand.errors import BackhandError
from backhand.report.rendering import environment
from backhand.studio.commands import CommandError, Commands, readable, shown
from backhand.studio.draft import IN_TERMINAL, Draft, help_on_page, of_answers, on_page
from backhand.studio.runs import ListedRun, listed_run, run_of
from backhand.studio.workspace import Workspace
from backhand.system import version_of
from backhand.words import upper_first

STATIC = {
    "page.css": ("backhand.report", "text/css"),
    "vega.min.js": ("backhand.report", "text/javascript"),
    "page.js": ("backhand.report", "text/javascript"),
    "studio.css": ("backhand.studio", "text/css"),
    "studio.js": ("backhand.studio", "text/javascript"),
}


class Site:
    """The pages' common part.

    Attributes:
        root: path below which all pages are.
        workspace: the studio's directory; None if only one run is shown.
        watched: that run, or None.
        commands: runs Backhand's commands.
        models: the models on this machine, once they have been listed.
        planned: the commands of plans that succeeded.
        opened: by name, whether a model that was opened predicts tokens; None if that is not known.
    """

    def __init__(self, root: str, shown: Workspace | Path) -> None:
        self.root = root
        self.workspace = shown if isinstance(shown, Workspace) else None
        self.watched = shown if isinstance(shown, Path) else None
        # The configuration of a run that was started elsewhere may name the model relative to the current directory.
        self.commands = Commands(shown.root if isinstance(shown, Workspace) else Path.cwd())
        self.models: list[dict[str, Any]] | None = None
        self.planned: set[tuple[str, ...]] = set()
        self.opened: dict[str, bool | None] = {}
        self._templates = _templates(self._on_page, in_studio=self.workspace is not None)

    @property
    def model_names(self) -> list[str]:
        """Names of the models that have been listed."""
        return [str(one["name"]) for one in self.models or ()]

    @property
    def space(self) -> Workspace:
        """The workspace. Raises HTTPException if only one run is shown."""
        if self.workspace is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "this page shows one run only")
        return self.workspace

    def run(self, request: Request) -> ListedRun:
        """Return the run in the address. Raises BackhandError or HTTPException if there is none."""
        name = str(request.path_params["name"])
        if self.watched is None:
            return run_of(self.space, name)
        if name != self.watched.name:
            raise HTTPException(HTTPStatus.NOT_FOUND, "this page shows one run only")
        return listed_run(self.watched)

    def page(self, template: str, values: Mapping[str, Any], status: int = HTTPStatus.OK) -> HTMLResponse:
        """Render a template."""
        text = self._templates.get_template(template).render(
            root=self.root,
            studio=self.workspace is not None,
            version=version_of("backhand"),
            rows_name=self._rows_name,
            restart=f"backhand studio --directory {shlex.quote(str(self.workspace.root))}"
            if self.workspace
            else f"backhand watch {shlex.quote(str(self.watched))}",
            **values,
        )
        return HTMLResponse(text.encode("utf-8", "backslashreplace"), status)

    def _rows_name(self, draft: Draft) -> str:
        """Return the name of the rows as the user knows it."""
        upload = self.space.uploads().get(draft.get("data"))
        return Path(draft.get("typed_data")).name or (upload.label if upload else "")

    def _on_page(self, text: object, objective: str = "") -> str:
        """Return what a command printed as a person reads it, with the names of the page and of the uploads."""
        own_names = self.workspace.own_names if self.workspace else str
        lines = (line.partition(IN_TERMINAL) for line in on_page(readable(str(text)), objective).split("\n"))
        return "\n".join(f"{own_names(said)}{mark}{command}" for said, mark, command in lines)

    def go(self, place: str) -> Response:
        """Return a redirect to a page, after a form."""
        return RedirectResponse(f"{self.root}/{place}", HTTPStatus.SEE_OTHER)

    def go_to_run(self, name: str) -> Response:
        """Return a redirect to a run's page."""
        return self.go(f"runs/{quote(name)}")

    def failure(
        self, request: Request, error: Exception, steps: Mapping[str, str] | None = None, objective: str = ""
    ) -> Response:
        """Return the message of an error: as a part of the page, or as a page.

        Args:
            steps: addresses of the steps of a new run that can mend it, by their names.
            objective: that of the new run.
        """
        status = HTTPStatus.CONFLICT
        if isinstance(error, HTTPException):
            status, text = HTTPStatus(error.status_code), error.detail
        elif isinstance(error, CommandError):
            text = error.text
        elif isinstance(error, BackhandError):
            text = f"error: {error}"
        elif isinstance(error, OSError):
            text = f"error: {error.strerror}: {error.filename or ''}"
        else:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            text = f"error: unexpected {type(error).__name__}: {error}\n  why: this is a bug in Backhand"
        part = request.headers.get("x-part") == "1"
        values = {"text": text, "title": "Error", "steps": steps or {}, "objective": objective}
        return self.page("message.html.j2" if part else "error.html.j2", values, status)

    def part(self, template: str, **values: Any) -> HTMLResponse:
        """Render a part of a page, which a script inserts."""
        return self.page(f"part_{template}.html.j2", values)


def static(request: Request) -> Response:
    """Answer with a style or script."""
    name = str(request.path_params["file"])
    if name not in STATIC:
        raise HTTPException(HTTPStatus.NOT_FOUND, "there is nothing here")
    package, kind = STATIC[name]
    data = files(package).joinpath("static", name).read_bytes()
    return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})


def _local_moment(text: object) -> str:
    """Format an ISO time in the machine's time zone."""
    try:
        when = datetime.fromisoformat(str(text)).astimezone()
    except (ValueError, OverflowError):
        return str(text)
    return f"{when.day} {when:%B %Y, %H:%M}"


def _templates(on_page: Callable[..., str], *, in_studio: bool) -> Environment:
    loader = ChoiceLoader([PackageLoader("backhand.studio"), PackageLoader("backhand.report")])
    templates = environment().overlay(loader=loader)
    templates.filters = {**templates.filters, "command": shown, "moment": _local_moment, "on_page": on_page}
    templates.filters |= {"of_answers": of_answers, "help_on_page": help_on_page}
    templates.filters["upper_first"] = upper_first
    if in_studio:  # a page of one run has no buttons, so that the report's commands stay
        templates.filters["worded"] = on_page
    return templates
