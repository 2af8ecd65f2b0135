"""Chat templates under limits: a template is a program inside a model's files, and may ask for all time and memory.

Jinja's sandbox keeps a template away from the machine, but not from its processor: three nested loops over
`range(99999)` never end, `'a' * 20000000000` is one instruction, and a text that is joined to itself forty times is a
terabyte. Stopping a render from outside would need a process of its own for it, which costs more than plain templates
take to render (docs/log.md has the figures). So the template is rewritten before it is compiled, and counts for itself:

- **Every value is bounded when it is made.** What makes a text or a list longer than what it is made of (operators,
  literals, filters, methods) first asks how large the result will be, lists by all that they hold. So no single
  operation takes long.
- **Every step is counted.** The body of a loop and of a macro counts its own size whenever it is entered; operations
  on texts and lists count by their lengths.
- **Now and then a look at the clock and at the memory**: processor seconds of this thread, and how far the peak of the
  process has moved.

What is here besides is what templates of the Hub are written for: the environment that transformers gives them.
"""

from __future__ import annotations

import json
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context

from backhand.data import template_bounds
from backhand.data.template_bounds import (
    ALL_AT_ONCE,
    FILTERS,
    ITEM,
    LARGEST_VALUE,
    TEXT_METHODS,
    VIEWS,
    WIDE_BRACES,
    WIDE_PERCENT,
    TemplateLimitError,
    Work,
    check_form,
    check_power,
    check_product,
    check_size,
    refuse_method,
    too_large,
    weight,
)
from backhand.data.template_rewriting import CHARGED, COMPARED, JOINED, MADE, STEP, TemplateRewriter

LONGEST_SOURCE = 2**18
"""Characters of a template. The longest ones in use have about 30,000."""


class BoundedTemplate:
    """A template, compiled once.

    Raises:
        jinja2.TemplateSyntaxError: it is not valid Jinja.
        TemplateLimitError: it is too long or too deeply nested.
    """

    def __init__(self, source: str) -> None:
        if len(source) > LONGEST_SOURCE:
            raise TemplateLimitError(f"it is {len(source):,} characters long; the limit is {LONGEST_SOURCE:,}")
        self._lock = threading.Lock()
        self._rendered, self._seconds = 0, 0.0
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
            self._template.globals = dict(self._template.globals)  # a chain of tables is slow, and read at every render
        except (RecursionError, MemoryError):
            raise TemplateLimitError("it is nested too deeply") from None
        except SyntaxError as error:  # of the Python that it is compiled to: too many blocks in one another
            raise TemplateLimitError(f"it is nested too deeply: {error.msg}") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text.

        Args:
            variables: by name; the template gets plain copies of lists, tables, texts and numbers, and of anything
                else the name of its type.

        Raises:
            TemplateLimitError: it asks for too much, or renders what is no text.
            jinja2.SecurityError: it asks for what templates must not have.
            Exception: whatever its expressions raise; jinja2.TemplateError where it refuses the conversation.
        """
        plain = {name: _plain(value) for name, value in variables.items()}
        with self._lock:
            if self._seconds > template_bounds.SECONDS_TOGETHER + template_bounds.SECONDS_EACH * self._rendered:
                raise TemplateLimitError(f"it takes {self._seconds:.1f} s for {self._rendered} conversations")
            self._environment.work.begin()
            began = time.thread_time()
            try:
                text = self._template.render(plain)
            except RecursionError:
                raise TemplateLimitError("it calls itself without end, or reads values nested without end") from None
            except MemoryError:
                raise TemplateLimitError("it asks for more memory than there is") from None
            finally:
                self._rendered += 1
                self._seconds += time.thread_time() - began
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise TemplateLimitError("it writes half of a surrogate pair, which is not a character") from None
        return text


def _plain(value: Any) -> Any:
    """A copy of nothing but plain types: methods of any other could be called by the template."""
    kind = type(value)
    if kind is str or value is None or kind is bool or kind is int or kind is float:
        return value
    if isinstance(value, dict | Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    return f"<{kind.__name__}>"


class _Generation(Extension):
    """`{% generation %}`: marks what the assistant says, for those who look for it; here only its content counts."""

    tags = {"generation"}  # noqa: RUF012 - as the class above has it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """A namespace whose names are the template's own."""

    def __init__(*arguments: Any, **values: Any) -> None:
        # A template may name an attribute `self`.
        itself, *rest = arguments
        attributes = dict(*rest, **values)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(itself, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # what namespaces hold is not weighed


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r:.40}")


class _Dict:
    """`dict` for templates: it makes tables, and is not the class itself."""

    def __call__(self, *arguments: Any, **values: Any) -> dict[Any, Any]:
        return dict(*arguments, **values)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


def _raise_exception(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 200:
        raise TemplateLimitError("it asks for a date in a form of more than 200 characters")
    return datetime.now().strftime(form)  # noqa: DTZ005 - the user's own clock is what templates mean


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_LEFT_OUT = ("lipsum", "pprint", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters and functions for web pages whose cost has no simple bound; no chat template needs them."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with operators, calls, filters, tests and output that count."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.work = Work()
        self.concat = self._concat  # type: ignore[method-assign]
        for name in _LEFT_OUT:
            self.filters.pop(name, None)
            self.globals.pop(name, None)
        self.filters["tojson"] = _tojson
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        for name, plain in self.filters.items():
            self.filters[name] = self._bounded_filter(name, plain)
        for name in _COMPARING_TESTS:
            plain_test: Any = self.tests[name]
            self.tests[name] = self._bounded_test(plain_test)
        for name in (STEP, MADE, CHARGED, JOINED, COMPARED):
            self.filters[name] = getattr(self, f"_{name.split()[0]}")

    # What the rewritten template calls; see `data.template_rewriting`.

    @pass_context
    def _step(self, _context: Any, count: int) -> None:
        self.work.step(count)

    @pass_context
    def _made(self, _context: Any, value: Any) -> Any:
        return self._checked(value)

    @pass_context
    def _charged(self, _context: Any, value: Any) -> Any:
        self._charge(value)
        return value

    @pass_context
    def _joined(self, _context: Any, values: tuple[Any, ...]) -> str:
        texts = [value if isinstance(value, str) else str(value) for value in values]
        return self._concat(texts)

    @pass_context
    def _compared(self, _context: Any, values: tuple[Any, ...], operators: tuple[str, ...]) -> bool:
        for operator, left, right in zip(operators, values, values[1:], strict=False):
            if operator in ("in", "notin") and not isinstance(right, Mapping):
                self._charge(right)
            elif not isinstance(left, int) and not isinstance(right, int):
                self._charge(left)
            if not _COMPARISONS[operator](left, right):
                return False
        return True

    def _concat(self, parts: Iterable[str]) -> str:
        kept, size = [], 0
        for part in parts:
            size += len(part)
            kept.append(part)
            if size > LARGEST_VALUE:
                raise too_large()
        self.work.step(1 + (size >> 8))
        return "".join(kept)

    def _checked(self, value: Any) -> Any:
        """A value that was just made: counted, and refused where it is too large."""
        if isinstance(value, str | bytes):
            check_size(len(value))
            self.work.step(1 + (len(value) >> 8))
        elif isinstance(value, list | tuple | dict | set | frozenset):
            self.work.step(1 + weight(value) // ITEM)
        elif isinstance(value, types.GeneratorType):
            return self._counted(value)
        else:
            self.work.step(1)
        return value

    def _charge(self, value: Any) -> None:
        """Count what looking at all of a value costs."""
        if isinstance(value, str | bytes):
            self.work.step(1 + (len(value) >> 8))
        elif isinstance(value, (list, tuple, dict, set, frozenset, range, *VIEWS)):
            self.work.step(1 + (len(value) if isinstance(value, range) else weight(value) // ITEM))
        else:
            self.work.step(1)

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.work.step(4)
            yield self._checked(item)

    # Operators

    def call_binop(self, _context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator that may make more of what it is given."""
        if operator == "+":
            if isinstance(left, str) and isinstance(right, str):
                size = len(left) + len(right)
                if size > LARGEST_VALUE:
                    raise too_large()
                self.work.step(1 + (size >> 8))
                return left + right
            return self._checked(left + right)
        if operator == "%" and isinstance(left, str | bytes):
            self._check_percent(left, right)
            return self._checked(left % right)
        if operator == "*":
            check_product(left, right)
        if operator == "**":
            check_power(left, right)
        return self._checked(self.binop_table[operator](left, right))

    def _check_percent(self, form: str | bytes, values: Any) -> None:
        if isinstance(form, bytes):
            raise jinja2.exceptions.SecurityError("bytes are not for templates")
        check_form(form, "%", weight(values), WIDE_PERCENT)

    # Calls

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`format` and `format_map` of a text, with bounds."""
        if not isinstance(value, types.BuiltinMethodType):
            return None
        wrapped: Any = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form = str(value.__self__)

        def bounded(*arguments: Any, **values: Any) -> str:
            check_form(form, "{", weight(arguments) + weight(values), WIDE_BRACES)
            self.work.step(1 + len(form))
            return str(self._checked(wrapped(*arguments, **values)))

        return bounded

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Anything that the template calls."""
        self.work.step(2)
        if isinstance(obj, types.BuiltinMethodType):
            self._check_method(obj, args, kwargs)
        return self._checked_result(super().call(context, obj, *args, **kwargs))

    def _checked_result(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, VIEWS):
            self.work.step(1 + len(value))
            return value
        return self._checked(value)

    def _check_method(self, method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        owner, name = method.__self__, method.__name__
        if isinstance(owner, str):
            check = TEXT_METHODS.get(name, refuse_method)
            if check is not None:
                # Jinja passes what a loop or block has set beside the arguments, and takes it out again itself.
                checked: Any = check
                checked(owner, *args, **{key: kwargs[key] for key in kwargs if not key.startswith("_")})
            self.work.step(len(owner) >> 8)
        elif isinstance(owner, list | tuple) or (isinstance(owner, Mapping) and name != "get"):
            self._charge(owner)
        elif isinstance(owner, bytes | int | float | types.GeneratorType):
            refuse_method(owner, name)

    # Filters and tests

    def _bounded_filter(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        kind = getattr(plain, "jinja_pass_arg", None)
        first = 0 if kind is None else 1
        check = FILTERS.get(name)
        whole = name in ALL_AT_ONCE

        def bounded(*args: Any, **kwargs: Any) -> Any:
            value = args[first] if len(args) > first else None
            if whole and isinstance(value, types.GeneratorType):
                value = self._checked(list(value))
                args = (*args[:first], value, *args[first + 1 :])
            if whole:
                self._charge(value)
            elif isinstance(value, str | list | tuple | dict):
                self.work.step(1 + (len(value) >> 4))
            else:
                self.work.step(1)
            if check is not None:
                check(*args[first:], **kwargs)
            return self._checked_result(plain(*args, **kwargs))

        if kind is not None:
            bounded.jinja_pass_arg = kind  # type: ignore[attr-defined]
        return bounded

    def _bounded_test(self, plain: Callable[..., bool]) -> Callable[..., bool]:
        def bounded(value: Any, *others: Any) -> bool:
            for item in (value, *others):
                self._charge(item)
            return plain(value, *others)

        return bounded

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(TemplateRewriter().visit(source), *args, **kwargs)


_COMPARING_TESTS = (
    *("in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">=", "<", "lt", "lessthan", "<=", "le"),
    *("lower", "upper"),
)
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "gteq": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "lteq": lambda a, b: a <= b,
    "in": lambda a, b: a in b,
    "notin": lambda a, b: a not in b,
}
