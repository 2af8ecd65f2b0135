"""The docstring under each field of an options dataclass, which is the help of its option and the text in the docs."""

from __future__ import annotations

import ast
import inspect
import textwrap


def field_docs(options: type) -> dict[str, str]:
    """Map field names to the string literal that stands under the field, lines joined into one paragraph.

    Fields of base classes are included; a field without a docstring is left out.
    """
    docs: dict[str, str] = {}
    for base in reversed(options.__mro__[:-1]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        (class_definition,) = tree.body
        assert isinstance(class_definition, ast.ClassDef)
        for statement, follower in zip(class_definition.body, class_definition.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            match follower:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[statement.target.id] = " ".join(text.split())
    return docs
