"""A parsed chat template with counting put into it, where an operation of Python's own would go uncounted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from backhand.data.template_bounds import LONGEST_NUMBER, TemplateLimitError

# Filters of `backhand.data.bounded_template`. Their names hold a space, so that no template can mean them.
STEP, MADE, CHARGED, JOINED, COMPARED = "step of", "made value", "charged value", "joined texts", "compared values"


class TemplateRewriter(NodeTransformer):
    """Puts counting into a parsed template, where an operation of Python's own would go uncounted."""

    def visit_For(self, node: Any) -> Any:
        """Count at each turn, and at each that is left out."""
        steps = _step(1 + _size(node.body))
        test_steps = 1 + _size([node.test]) if node.test is not None else 0
        node = self.generic_visit(node)
        node.body.insert(0, steps)
        if node.test is not None:
            counted = nodes.Filter(nodes.Const(test_steps), STEP, [], [], None, None)
            node.test = nodes.And(nodes.Not(counted), node.test)
        return node

    def visit_Macro(self, node: Any) -> Any:
        """Count at each call."""
        return self._counting(node)

    def visit_CallBlock(self, node: Any) -> Any:
        """Count at each call."""
        return self._counting(node)

    def visit_Block(self, node: Any) -> Any:
        """Count at each call."""
        return self._counting(node)

    def _counting(self, node: Any) -> Any:
        steps = _step(1 + _size(node.body))
        node = self.generic_visit(node)
        node.body.insert(0, steps)
        return node

    def visit_Concat(self, node: Any) -> Any:
        """`~` makes a text."""
        node = self.generic_visit(node)
        return _called(JOINED, nodes.Tuple(node.nodes, "load"))

    def visit_List(self, node: Any) -> Any:
        """A literal makes a list."""
        return self._literal(node)

    def visit_Dict(self, node: Any) -> Any:
        """A literal makes a table; its keys are hashed."""
        node = self.generic_visit(node)
        for pair in node.items:
            if not isinstance(pair.key, nodes.Const):
                pair.key = _called(CHARGED, pair.key)
        constant = all(isinstance(pair.value, nodes.Const) for pair in node.items)
        return node if constant else _called(MADE, node)

    def visit_Tuple(self, node: Any) -> Any:
        """A literal makes a tuple; a target of an assignment does not."""
        return self._literal(node) if node.ctx == "load" else node

    def _literal(self, node: Any) -> Any:
        constant = all(isinstance(item, nodes.Const) for item in node.items)
        node = self.generic_visit(node)
        return node if constant else _called(MADE, node)

    def visit_Getitem(self, node: Any) -> Any:
        """A slice makes a copy; a key is hashed."""
        node = self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _called(CHARGED, node)
        if not isinstance(node.arg, nodes.Const):
            node.arg = _called(CHARGED, node.arg)
        return node

    def visit_Compare(self, node: Any) -> Any:
        """Comparing with a literal is short; with anything else it counts by the length."""
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        operators = tuple(operand.op for operand in node.ops)
        plain = all(
            _is_literal(right) or (isinstance(left, nodes.Const) and operator not in ("in", "notin"))
            for operator, left, right in zip(operators, operands, operands[1:], strict=False)
        )
        node = self.generic_visit(node)
        if plain:
            return node
        values = nodes.Tuple([node.expr, *(operand.expr for operand in node.ops)], "load")
        return _called(COMPARED, values, nodes.Const(operators))

    def visit_Const(self, node: Any) -> Any:
        """Numbers of any length can be written."""
        if isinstance(node.value, int) and node.value.bit_length() > LONGEST_NUMBER:
            raise TemplateLimitError("it writes a number of hundreds of digits")
        return node

    def visit_Include(self, _node: Any) -> Any:
        """There are no other templates."""
        raise jinja2.exceptions.SecurityError("it asks for another template, and chat templates stand alone")

    visit_Import = visit_FromImport = visit_Extends = visit_Include


def _is_literal(node: nodes.Node) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, nodes.Const)


def _size(parts: Iterable[nodes.Node]) -> int:
    """Steps that the parts of a template count for, each time they are run."""
    return sum(1 + sum(1 for _ in part.find_all(nodes.Node)) for part in parts) // 4


def _step(count: int) -> nodes.Node:
    return nodes.ExprStmt(_called(STEP, nodes.Const(count)))


def _called(name: str, value: nodes.Expr, *more: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(more), [], None, None)
