"""One page an op, in the best order of reading: its derivation, its backward pass, what the proof rejects."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from backhand.ops.registry import OPS
from backhand.verify.runner import proofs_in
from tools.docsite.mathematics import derivation

# LoRA first, then what a decoder is made of from bottom to top, then the ops for other nets.
READING_ORDER = (
    "lora_linear",
    "lora_group",
    "dropout",
    "lora_bias",
    "dora",
    "dora_linear",
    "token_rows",
    "embedding",
    "rms_norm",
    "rotary",
    "attention",
    "glu",
    "linear_cross_entropy",
    "linear",
    "elementwise",
    "mse",
    "lora_embedding",
    "lora_conv",
)
# Built of ops, and derived and proved like them.
COMPOSITES = ("block", "decoder")


def op_pages(package: Path) -> dict[str, str]:
    """Page name → Markdown, for every file of `ops` that the registry names, and for the block and the decoder.

    Args:
        package: the directory `backhand`.
    """
    files = dict.fromkeys(OPS.values())
    order = [name for name in READING_ORDER if name in files]
    order += [name for name in files if name not in order]
    pages = {name: _page(package, "ops", name, [op for op, file in OPS.items() if file == name]) for name in order}
    return pages | {name: _page(package, "nn/decoder", name, [name]) for name in COMPOSITES}


def _page(package: Path, room: str, name: str, ops: list[str]) -> str:
    source = (package / room / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    docstring = ast.get_docstring(tree)
    assert docstring, f"{room}/{name}.py has no docstring"
    # The derivation is about the functions; NamedTuples of what they take and return come after.
    public = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    backward = [node for node in public if isinstance(node, ast.FunctionDef) and node.name.endswith("_backward")]
    members = sorted(public, key=lambda node: isinstance(node, ast.ClassDef))
    return "\n\n".join(
        [
            f"# {docstring.splitlines()[0].rstrip('.')}",
            f"`src/backhand/{room}/{name}.py` · " + ", ".join(f"`backhand verify --op {op}`" for op in ops),
            derivation(docstring),
            *_sections(source),
            *(_code(source, backward) if backward else ()),
            "## Wrong versions that the proof must reject",
            *_mutants(name, ops),
            "## Functions",
            *(f"::: backhand.{room.replace('/', '.')}.{name}.{node.name}" for node in members),
            "",
        ]
    )


def _sections(source: str) -> list[str]:
    """The comments that head a file's sections, which may derive another op, as the docstring derives the first."""
    parts: list[str] = []
    for block in re.findall(r"^# -{20,}\n((?:#.*\n)+)", source, re.MULTILINE):
        text = re.sub(r"^# ?", "", block, flags=re.MULTILINE)
        parts += [f"## {text.splitlines()[0].rstrip('.')}", derivation(text)]
    return parts


def _code(source: str, functions: list[ast.FunctionDef]) -> list[str]:
    segments = [ast.get_source_segment(source, node) for node in functions]
    return [
        "## The backward pass in code",
        "```python\n" + "\n\n\n".join(map(str, segments)) + "\n```",
    ]


def _mutants(name: str, ops: list[str]) -> list[str]:
    """A table of the mistakes in each gradient; of one op where several share a file and its mutants."""
    proofs = proofs_in(name)
    by_gradient: dict[str, list[str]] = {}
    for proof in proofs:
        for mutant in proof.mutants:
            mistakes = by_gradient.setdefault(mutant.gradient, [])
            if mutant.name not in mistakes:
                mistakes.append(mutant.name)
    rows = [f"| `{gradient}` | {', '.join(mistakes)} |" for gradient, mistakes in by_gradient.items()]
    counts = [f"{len(proof.mutants)} of `{proof.op}`" for proof in proofs if proof.op in ops]
    return [
        "Each is the backward pass with one mistake in it, and must fail by value in some case: "
        + ", ".join(counts)
        + ".",
        "\n".join(["| gradient | mistakes |", "|---|---|", *rows]),
    ]
