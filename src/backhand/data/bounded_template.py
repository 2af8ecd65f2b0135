"""Render chat templates with limits: a template is a program in a model's files and could use all time and memory.

Jinja's sandbox keeps a template away from the machine but does not limit its work. Three nested loops over
`range(99999)` never end, `'a' * 20000000000` is one instruction, and a text that is doubled forty times has a terabyte.
A limit from outside would need a process per render, which costs more than rendering a simple template
(docs/log.md has the measurements). So the template's syntax tree is rewritten before compilation, to count and limit
the template's own work:

- **Values are bounded before they are created.** Operators, literals, filters and methods that can create a longer text
  or list first compute the size of the result. The size of a list includes all its items. So no single operation takes
  long.
- **Steps are counted.** The body of a loop or macro counts its size each time it is entered. Operations on texts and
  lists count in proportion to their length.
- **Time and memory are checked at intervals**: CPU seconds of this thread, and the increase of the process's peak
  memory.

The rest of this file is the environment that transformers provides to templates of the hub.
"""

from __future__ import annotations

import json
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from backhand.data import template_bounds
from backhand.data.template_bounds import (
    ALL_AT_ONCE,
    GROWING,
    ITEM,
    LONGEST_NUMBER,
    ONCE,
    TEXT_METHODS,
    VIEWS,
    TemplateLimitError,
    Work,
    check_call,
    check_form,
    check_power,
    check_product,
    check_size,
    refuse_method,
    weight,
)

LONGEST_SOURCE = 2**18
"""Largest number of characters of a template. The longest ones in use have about 30,000."""


class BoundedTemplate:
    """A compiled template that counts and limits its own work.

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
            globals_ = dict(self._environment.make_globals(None))  # a plain dict, because a ChainMap is slow to read
            self._template = self._environment.template_class.from_code(self._environment, _code(source), globals_)
        except (RecursionError, MemoryError):
            raise TemplateLimitError("it is nested too deeply") from None
        except SyntaxError as error:  # the generated Python has too many nested blocks
            raise TemplateLimitError(f"it is nested too deeply: {error.msg}") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the rendered text.

        Args:
            variables: by name. The template gets plain copies of lists, tables, texts and numbers; other values become
                the name of their type.

        Raises:
            TemplateLimitError: the template exceeds a limit, or its result is not valid text.
            jinja2.SecurityError: the template uses something that templates may not use.
            Exception: any error of its expressions; jinja2.TemplateError if it refuses the conversation.
        """
        plain = {name: _plain(value) for name, value in variables.items()}
        with self._lock:
            if self._seconds > template_bounds.SECONDS_TOGETHER + template_bounds.SECONDS_EACH * self._rendered:
                raise TemplateLimitError(f"it needs {self._seconds:.1f} s for {self._rendered} conversations")
            self._environment.work.begin()
            began = time.thread_time()
            try:
                text = self._template.render(plain)
            except RecursionError:
                raise TemplateLimitError("it recurses without end, or reads endlessly nested values") from None
            except MemoryError:
                raise TemplateLimitError("it needs more memory than there is") from None
            finally:
                self._rendered += 1
                self._seconds += time.thread_time() - began
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise TemplateLimitError("it writes half of a surrogate pair, which is not a character") from None
        return text


@lru_cache(maxsize=8)
def _code(source: str) -> types.CodeType:
    """Compile a template. Instances share the code; limits and filters belong to the environment that runs it."""
    return _Environment().compile(source)


def _plain(value: Any) -> Any:
    """Return a copy of plain types only, because the template could call methods of any other type."""
    kind = type(value)
    if kind is str or value is None or kind is bool or kind is int or kind is float:
        return value
    if isinstance(value, dict | Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    return f"<{kind.__name__}>"


class _Generation(Extension):
    """`{% generation %}`, which marks assistant text for other programs. Only its content is rendered here."""

    tags = {"generation"}  # noqa: RUF012 - as the class above has it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """A namespace with attributes of the template only."""

    def __init__(self, /, *arguments: Any, **values: Any) -> None:  # positional, since an attribute may be named `self`
        attributes = dict(*arguments, **values)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # `weight` does not count the printed contents of a namespace


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r:.40}")


class _Dict:
    """`dict` for templates, which creates tables but is not the class itself."""

    def __call__(self, *arguments: Any, **values: Any) -> dict[Any, Any]:
        return dict(*arguments, **values)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


def _raise_exception(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 200:
        raise TemplateLimitError("it uses a date format of more than 200 characters")
    return datetime.now().strftime(form)  # noqa: DTZ005 - templates expect the user's local time


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_REMOVED = ("lipsum", "pprint", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters and functions for web pages that have no simple bound of cost. No chat template needs them."""
_COMPARING_TESTS = (
    *("in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">=", "<", "lt", "lessthan", "<=", "le"),
    *("lower", "upper"),
)
_HOLDING: tuple[Any, ...] = (list, tuple, dict, set, frozenset, *VIEWS)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with operators, calls, filters, tests and output that are counted."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.work = Work()
        self.concat = self._concat  # type: ignore[method-assign]
        for name in _REMOVED:
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
        # Filters that the rewritten template calls.
        self.filters |= {_STEP: self._step, _COUNTED: self._counted_operand, _JOINED: self._joined}

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Rewriter().visit(source), *args, **kwargs)

    # Jinja does not evaluate functions with a context at compile time.

    @pass_context
    def _step(self, _context: Any, count: int) -> None:
        self.work.step(count)

    @pass_context
    def _counted_operand(self, _context: Any, value: Any, by_key: bool = False) -> Any:
        return value if by_key and isinstance(value, Mapping) else self._counted(value)

    @pass_context
    def _joined(self, _context: Any, values: tuple[Any, ...]) -> str:
        return self._concat(value if isinstance(value, str) else str(value) for value in values)

    def _concat(self, parts: Iterable[str]) -> str:
        kept, size = [], 0
        for part in parts:
            size += len(part)
            kept.append(part)
            check_size(size)
        self.work.step(1 + (size >> 8))
        return "".join(kept)

    def _counted(self, value: Any) -> Any:
        """Count a value that was created or is read as a whole, and return it. Raise if it is too large."""
        cost = 0
        if isinstance(value, str):
            check_size(len(value))
            cost = len(value) >> 8
        elif isinstance(value, _HOLDING):
            cost = weight(value) // ITEM
        elif isinstance(value, range):
            cost = len(value)
        elif isinstance(value, ONCE):
            value = self._counted_items(value)
        self.work.step(1 + cost)
        return value

    def _counted_items(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.work.step(4)
            yield self._counted(item)

    def call_binop(self, _context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator after checking the size of its result."""
        if operator == "%" and isinstance(left, str):
            check_form(left, "%", right)
        elif operator == "*":
            check_product(left, right)
        elif operator == "**":
            check_power(left, right)
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            check_size(len(left) + len(right))
        return self._counted(self.binop_table[operator](left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function for the template and count it."""
        self.work.step(2)
        method = getattr(obj, "__wrapped__", obj)  # Jinja wraps `format`
        if isinstance(method, types.BuiltinMethodType | types.MethodType):  # methods of Markup are written in Python
            self._check_method(method.__self__, method.__name__, args, kwargs)
        return self._counted(super().call(context, obj, *args, **kwargs))

    def _check_method(self, owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if isinstance(owner, str) and name in TEXT_METHODS:
            # Jinja adds internal keyword arguments of loops and blocks, which start with an underscore, and removes
            # them again. All keyword arguments of `format` are the template's.
            given = kwargs if name == "format" else {key: kwargs[key] for key in kwargs if not key.startswith("_")}
            check_call(f".{name}", owner, args, given)
            self.work.step(len(owner) if name.startswith("format") else len(owner) >> 8)
        elif isinstance(owner, list | tuple) or (isinstance(owner, Mapping) and name != "get"):
            self._counted(owner)
        elif isinstance(owner, str | bytes | int | float | types.GeneratorType):
            refuse_method(owner)

    def _bounded_filter(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        kind = getattr(plain, "jinja_pass_arg", None)
        first = 0 if kind is None else 1

        def bounded(*args: Any, **kwargs: Any) -> Any:
            value = args[first] if len(args) > first else None
            if name in ALL_AT_ONCE:
                if isinstance(value, ONCE):
                    value = list(value)
                    args = (*args[:first], value, *args[first + 1 :])
                self._counted(value)
            else:
                self.work.step(1 + (len(value) >> 4 if isinstance(value, str | list | tuple | dict) else 0))
            if name in GROWING:
                check_call(name, value, args[first + 1 :], kwargs)
            return self._counted(plain(*args, **kwargs))

        if kind is not None:
            bounded.jinja_pass_arg = kind  # type: ignore[attr-defined]
        return bounded

    def _bounded_test(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def bounded(*values: Any) -> Any:
            for value in values:
                self._counted(value)
            return plain(*values)

        return bounded


_STEP, _COUNTED, _JOINED = "step of", "counted value", "joined texts"
"""Internal filters. Their names contain a space, so no template can call them."""


class _Rewriter(NodeTransformer):
    """Insert counting into a parsed template wherever Python itself would do uncounted work."""

    def visit_For(self, node: Any) -> Any:
        """Count each iteration, and each item that the loop's condition skips."""
        test_steps = 1 + _size([node.test]) if node.test is not None else 0
        node = self._with_steps(node)
        if node.test is not None:
            node.test = nodes.And(nodes.Not(_called(_STEP, nodes.Const(test_steps))), node.test)
        return node

    def _with_steps(self, node: Any) -> Any:
        """Count each entry into the body."""
        steps = _called(_STEP, nodes.Const(1 + _size(node.body)))
        node = self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(steps))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _with_steps

    def visit_Concat(self, node: Any) -> Any:
        """Bound the text that `~` creates."""
        self.generic_visit(node)
        return _called(_JOINED, nodes.Tuple(node.nodes, "load"))

    def visit_List(self, node: Any) -> Any:
        """Bound the list that a literal creates."""
        constant = _is_literal(node)
        node = self.generic_visit(node)
        return node if constant else _called(_COUNTED, node)

    def visit_Tuple(self, node: Any) -> Any:
        """Bound the tuple that a literal creates, but not the target of an assignment."""
        return self.visit_List(node) if node.ctx == "load" else node

    def visit_Dict(self, node: Any) -> Any:
        """Bound the table that a literal creates, and its keys, which are hashed."""
        node = self.generic_visit(node)
        for pair in node.items:
            if not isinstance(pair.key, nodes.Const):
                pair.key = _called(_COUNTED, pair.key)
        constant = all(isinstance(pair.value, nodes.Const) for pair in node.items)
        return node if constant else _called(_COUNTED, node)

    def visit_Getitem(self, node: Any) -> Any:
        """Bound the copy that a slice creates, and a key, which is hashed."""
        node = self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _called(_COUNTED, node)
        if not isinstance(node.arg, nodes.Const):
            node.arg = _called(_COUNTED, node.arg)
        return node

    def visit_Compare(self, node: Any) -> Any:
        """Count comparisons by the length of their operands. Comparing with a literal or a table's key is short."""
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        plain = all(
            _is_literal(right) or (isinstance(left, nodes.Const) and operand.op not in ("in", "notin"))
            for operand, left, right in zip(node.ops, operands, operands[1:], strict=False)
        )
        node = self.generic_visit(node)
        if not plain:
            node.expr = _called(_COUNTED, node.expr)
            for operand in node.ops:
                operand.expr = _called(_COUNTED, operand.expr, nodes.Const(operand.op in ("in", "notin")))
        return node

    def visit_Const(self, node: Any) -> Any:
        """Refuse long numbers."""
        if isinstance(node.value, int) and node.value.bit_length() > LONGEST_NUMBER:
            raise TemplateLimitError("it contains a number of hundreds of digits")
        return node

    def visit_Include(self, _node: Any) -> Any:
        """Refuse other templates."""
        raise jinja2.exceptions.SecurityError("it includes another template, which chat templates may not do")

    visit_Import = visit_FromImport = visit_Extends = visit_Include


def _is_literal(node: nodes.Node) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, nodes.Const)


def _size(parts: Iterable[nodes.Node]) -> int:
    """Return the number of steps that parts of a template count each time they run."""
    return sum(1 + sum(1 for _ in part.find_all(nodes.Node)) for part in parts) // 4


def _called(name: str, value: nodes.Expr, *more: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(more), [], None, None)
