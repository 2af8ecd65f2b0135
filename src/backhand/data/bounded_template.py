"""Render chat templates within limits: a template is a program in a model's files and could use all time and memory.

Jinja's sandbox keeps a template away from the machine but does not limit its work. Three nested loops over
`range(99999)` never end, and `'a' * 20000000000` needs 20 GB. Therefore templates are rendered in worker processes
(`data.workers`), and the system ends a worker that exceeds its processor seconds or refuses it more memory.

The environment of the templates is the one that transformers provides to templates of the hub.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

from backhand.data import workers
from backhand.data.raw_rows import TABLE
from backhand.data.workers import Worker, WorkerEndedError
from backhand.system import limit_process
from backhand.words import shorten

LONGEST_SOURCE = 2**18
"""Largest number of characters of a template. The longest ones in use have about 30,000."""
LONGEST_RESULT = 2**26
"""Largest number of characters of a rendered conversation."""
MOST_SECONDS = 4
"""Processor seconds per conversation. The simplest templates need a hundred-thousandth of that."""
SECONDS_TOGETHER, SECONDS_EACH = 1.0, 0.05
"""Processor seconds for many conversations: a fixed amount, plus an amount per conversation."""
MOST_BYTES = 2**30
"""Memory that rendering a conversation may add."""


class TemplateLimitError(Exception):
    """The template exceeds a limit or is forbidden to do something, which the text of the error states."""


class TemplateSyntaxError(Exception):
    """The template is not valid Jinja."""


class TemplateRefusal(Exception):
    """An expression of the template failed, or the template refuses the conversation."""


class BoundedTemplate:
    """A chat template whose work is limited. It is compiled when it is first rendered.

    It is rendered in a worker process, which all templates share, or in this process if this is a worker.

    Raises:
        TemplateLimitError: it is too long.
    """

    def __init__(self, source: str) -> None:
        if len(source) > LONGEST_SOURCE:
            raise TemplateLimitError(f"it is {len(source):,} characters long; the limit is {LONGEST_SOURCE:,}")
        self._source = source
        self._number = next(_numbers)
        self._local: _LimitedTemplate | None = None

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the rendered text.

        Args:
            variables: by name. Values other than lists, tables, texts and numbers become the name of their type.

        Raises:
            TemplateLimitError: the template exceeds a limit, or its result is not valid text.
            TemplateSyntaxError: it is not valid Jinja.
            TemplateRefusal: one of its expressions failed, or it refuses the conversation.
        """
        if workers.inside():
            self._local = self._local or _LimitedTemplate(self._source)
            return self._local.render(variables)
        process = os.getpid()
        if process not in _shared:  # a forked process needs its own
            _shared.clear()
            _shared[process] = Worker(partial(_render, {}))
        try:
            plain = {name: _plain(value) for name, value in variables.items()}
            return _shared[process].call(self._number, self._source, plain)
        except WorkerEndedError as ended:
            end_worker()
            raise exceeded(ended) from None


_numbers = itertools.count()
_shared: dict[int, Worker[str]] = {}
_MOST_TEMPLATES = 16


def end_worker() -> None:
    """End the worker that templates share. The next one that is rendered starts another."""
    for worker in _shared.values():
        worker.close()
    _shared.clear()


def exceeded(ended: WorkerEndedError) -> TemplateLimitError:
    """Return the error for a template that ended its worker."""
    if ended.signal in (None, getattr(signal, "SIGXCPU", None)):
        return TemplateLimitError(f"it needs more than {MOST_SECONDS} s for one conversation")
    return TemplateLimitError(f"the process that renders it {ended}")


def _render(templates: dict[int, _LimitedTemplate], number: int, source: str, variables: Mapping[str, Any]) -> str:
    if number not in templates:
        if len(templates) == _MOST_TEMPLATES:
            del templates[min(templates)]
        templates[number] = _LimitedTemplate(source)
    return templates[number].render(variables)


class _LimitedTemplate:
    """A template in a worker process. The limits of this process stay set after rendering (`system.lift_limits`)."""

    def __init__(self, source: str) -> None:
        self._rendered, self._seconds = 0, 0.0
        self._template = self._within_limits(partial(_compile, source), "is nested too deeply")
        self._rendered, self._seconds = 0, 0.0  # the limit together is for rendering

    def render(self, variables: Mapping[str, Any]) -> str:
        if self._seconds > SECONDS_TOGETHER + SECONDS_EACH * self._rendered:
            raise TemplateLimitError(f"it needs {self._seconds:.1f} s for {self._rendered} conversations")
        text: str = self._within_limits(
            partial(self._template.render, variables), "recurses without end, or reads endlessly nested values"
        )
        if len(text) > LONGEST_RESULT:
            raise TemplateLimitError(f"it creates a value of more than {LONGEST_RESULT:,} characters")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise TemplateLimitError("it writes half of a surrogate pair, which is not a character") from None
        return text

    def _within_limits(self, work: Callable[[], Any], too_deep: str) -> Any:
        began = time.process_time()
        limit_process(int(began) + MOST_SECONDS, MOST_BYTES)
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - a template raises whatever its expressions raise
            raise _template_error(error, too_deep) from None
        finally:
            self._rendered += 1
            self._seconds += time.process_time() - began


def _template_error(error: Exception, too_deep: str) -> Exception:
    from jinja2 import TemplateSyntaxError as JinjaSyntaxError
    from jinja2.exceptions import SecurityError

    if isinstance(error, RecursionError):
        return TemplateLimitError(f"it {too_deep}")
    if isinstance(error, MemoryError):
        return TemplateLimitError(f"it needs more than {MOST_BYTES >> 30} GiB of memory for one conversation")
    if isinstance(error, SecurityError):
        return TemplateLimitError(shorten(str(error), 200))
    if isinstance(error, JinjaSyntaxError):
        return TemplateSyntaxError(f"{shorten(str(error.message), 200)}, in line {error.lineno}")
    if isinstance(error, SyntaxError):  # the generated Python has too many nested blocks
        return TemplateLimitError(f"it is nested too deeply: {error.msg}")
    return TemplateRefusal(shorten(f"{type(error).__name__}: {error}", 300))


def _plain(value: Any) -> Any:
    """Return a copy of plain types only, because the template could call methods of any other type."""
    kind = type(value)
    if kind is str or value is None or kind is bool or kind is int or kind is float:
        return value
    if isinstance(value, TABLE):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    return f"<{kind.__name__}>"


@lru_cache(maxsize=_MOST_TEMPLATES)
def _compile(source: str) -> Any:
    """Compile a template for Jinja's sandbox, with the functions that transformers provides."""
    from jinja2 import FunctionLoader, nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks assistant text for other programs. Only its content is rendered here."""

        tags = {"generation"}  # noqa: RUF012 - as the class above has it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Callable[[], str]) -> str:
            return caller()

    def refuse_other_templates(_name: str) -> None:
        raise SecurityError("it includes another template, which chat templates may not do")

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
        loader=FunctionLoader(refuse_other_templates),
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),  # noqa: DTZ005 - templates expect the user's local time
    }
    globals_ = dict(environment.make_globals(None))  # a plain dict, because a ChainMap is slow to read
    return environment.template_class.from_code(environment, environment.compile(source), globals_)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
