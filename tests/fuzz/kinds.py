"""The kinds of files that are fuzzed: for each, how one is drawn, and which command reads it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.mutate import ODD_NAMES, ODD_TEXTS, mutated_bytes, mutated_gguf, mutated_json
from tests.support import tokenizer_kinds
from tests.support.tiny_adapters import save_tiny_adapter
from tests.support.tiny_gguf import add_sentencepiece_tokenizer, write_tiny_gguf, write_vocabulary_gguf
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import write_rows
from tests.support.tiny_tokenizer import CHAT_TEMPLATE

ASK = ("--prompt", "what is", "--max-new-tokens", "2", "--greedy", "--threads", "1", "--dtype", "float32")


@dataclass(frozen=True)
class World:
    """Good files to start from, made once."""

    model: Path
    gguf: Path
    pieces: Path
    adapter: Path
    rows: Path


@dataclass(frozen=True)
class Case:
    """One hostile file and the command that is to read it.

    Attributes:
        files: by name, bytes to write; the hostile one first.
        links: by name, a directory whose files are linked there, those of `files` left out.
        command: words after `backhand`.
        copies: by name, a directory whose files are copied there, those of `files` left out: the command may write.
    """

    files: dict[str, bytes]
    command: tuple[str, ...]
    links: dict[str, Path]
    copies: dict[str, Path] = field(default_factory=dict)


def make_world(place: Path) -> World:
    """A tiny model as a directory and as two GGUF files, an adapter of it, and rows."""
    model = tiny_model("llama-tied", num_hidden_layers=2)
    directory = save_tiny(model, place / "model")
    gguf = write_tiny_gguf(tiny_model("llama", num_hidden_layers=2), place / "tiny.gguf")
    letters = [chr(code) for code in range(97, 123)]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{b:02X}>", 0.0, 6) for b in range(256))]
    pieces += [("\u2581", -1.0, 1), *((letter, -2.0 - i, 1) for i, letter in enumerate(letters)), ("\u2581a", -0.5, 1)]
    by_piece = write_vocabulary_gguf(
        place / "pieces.gguf",
        len(pieces),
        lambda writer: add_sentencepiece_tokenizer(writer, pieces, space_prefix=True, add_bos=True),
    )
    adapter = save_tiny_adapter(model, place / "adapter", alpha=8)
    return World(directory, gguf, by_piece, adapter, write_rows(place / "rows.jsonl", 4, seed=0))


def text_bytes(text: str) -> bytes:
    """A text that may hold halves of surrogate pairs."""
    return text.encode("utf-8", "surrogatepass")


def gguf_case(draw: random.Random, world: World) -> Case:
    """A GGUF file as a base model."""
    source = draw.choice([world.gguf, world.gguf, world.pieces])
    data = mutated_gguf(draw, source.read_bytes())
    command = ("generate", "--model", "hostile.gguf", *ASK)
    if draw.random() < 0.2:
        data_words = ("--data", str(world.rows), "--max-steps", "1", "--threads", "1", "--quiet")
        command = ("train", "--model", "hostile.gguf", *data_words, "--output", "out")
    return Case({"hostile.gguf": data}, command, {})


def safetensors_case(draw: random.Random, world: World) -> Case:
    """The tensors of an adapter, or of a base model."""
    of_model = draw.random() < 0.3
    source = world.model / "model.safetensors" if of_model else world.adapter / "adapter_model.safetensors"
    data = source.read_bytes()
    if draw.random() < 0.3:
        data = mutated_bytes(draw, data)
    else:
        (length,) = struct.unpack_from("<Q", data)
        header = text_bytes(mutated_json(draw, json.loads(data[8 : 8 + length])))
        stated = len(header) if draw.random() < 0.9 else draw.choice([0, 1, 2**40, 2**63, len(header) + 1])
        body = data[8 + length :]
        body = body if draw.random() < 0.8 else body[: draw.randrange(len(body))]
        data = struct.pack("<Q", stated) + header + body
    if of_model:
        return Case({"m/model.safetensors": data}, ("generate", "--model", "m", *ASK), {"m": world.model})
    return _of_adapter(draw, world, "adapter_model.safetensors", data)


def adapter_config_case(draw: random.Random, world: World) -> Case:
    """adapter_config.json."""
    source = json.loads((world.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    data = text_bytes(mutated_json(draw, source))
    return _of_adapter(draw, world, "adapter_config.json", mutated_bytes(draw, data) if draw.random() < 0.1 else data)


def _of_adapter(draw: random.Random, world: World, name: str, data: bytes) -> Case:
    command = (
        ("inspect", "a") if draw.random() < 0.6 else ("generate", "--model", str(world.model), "--adapter", "a", *ASK)
    )
    return Case({f"a/{name}": data}, command, {"a": world.adapter})


def config_case(draw: random.Random, world: World) -> Case:
    """config.json of a base model, or another of its small files."""
    name = draw.choice(["config.json", "config.json", "config.json", "generation_config.json", "tokenizer_config.json"])
    path = world.model / name
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"eos_token_id": 2, "do_sample": True}
    data = text_bytes(mutated_json(draw, value))
    command = ("generate", "--model", "m", *ASK)
    if name == "config.json" and draw.random() < 0.3:
        command = ("plan", "--model", "m", "--data", str(world.rows))
    return Case({f"m/{name}": data}, command, {"m": world.model})


def tokenizer_case(draw: random.Random, world: World) -> Case:
    """tokenizer.json."""
    value = json.loads((world.model / "tokenizer.json").read_text(encoding="utf-8"))
    if draw.random() < 0.4:
        regex = draw.choice(
            ["(a+)+$", "(\\w|\\w)*x", "(.*)*y", "(?:[a-z ]+)*\\d", "\\p{L}+", "(", "a{99999}", "x" * 5000]
        )
        step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        value["pre_tokenizer"] = draw.choice(
            [step, {"type": "Sequence", "pretokenizers": [step, value["pre_tokenizer"]]}]
        )
        if draw.random() < 0.3:
            value["normalizer"] = {
                "type": "Replace",
                "pattern": {"Regex": regex},
                "content": draw.choice(["", "xx" * 50]),
            }
    text = mutated_json(draw, value) if draw.random() < 0.8 else json.dumps(value)
    data = mutated_bytes(draw, text_bytes(text)) if draw.random() < 0.1 else text_bytes(text)
    return Case({"m/tokenizer.json": data}, ("lint", "--model", "m", "--data", str(world.rows)), {"m": world.model})


# ---- chat templates ----------------------------------------------------------------------------------------------

_VALUES = (
    *("messages", "messages[0]", "message", "message.content", "message['role']", "tools", "none", "true", "x", "ns.v"),
    *(
        "'a'",
        "'ab\\n' * 9",
        "''",
        "1",
        "-1",
        "0",
        "2.5",
        "99999",
        "20000000000",
        "[]",
        "{}",
        "range(99999)",
        "loop.index",
    ),
    *(
        "bos_token",
        "namespace(v=1)",
        "dict(a=1)",
        "messages[::-1]",
        "[1, [2, [3]]]",
        "'%s'",
        "'{}'",
        "add_generation_prompt",
    ),
)
_FILTERS = (
    *("trim", "upper", "length", "tojson", "list", "join", "first", "last", "string", "int", "float", "sort", "unique"),
    *(
        "reverse",
        "e",
        "title",
        "items",
        "dictsort",
        "sum",
        "batch(3)",
        "slice(2)",
        "indent(4)",
        "center(99)",
        "round(2)",
    ),
    *(
        "replace('a', 'bb')",
        "map('upper')",
        "map(attribute='role')",
        "selectattr('role')",
        "groupby('role')",
        "urlencode",
    ),
    *(
        "tojson(indent=2)",
        "batch(99999, 'x')",
        "center(999999999)",
        "indent(99999999)",
        "join('x' * 999)",
        "safe",
        "random",
    ),
    *("default('x')", "format(1)", "truncate(5)", "wordcount", "min", "max", "abs", "attr('upper')", "filesizeformat"),
)
_METHODS = (
    *(
        "strip()",
        "upper()",
        "split('a')",
        "split()",
        "replace('', 'ab')",
        "center(9999999999)",
        "join(messages)",
        "items()",
    ),
    *(
        "format(1, 2)",
        "format_map({})",
        "encode()",
        "zfill(99)",
        "splitlines()",
        "startswith('a')",
        "get('x')",
        "keys()",
    ),
    *("append(1)", "__class__", "__init__.__globals__", "title()", "expandtabs(99999999)", "translate({97: 'x' * 99})"),
)
_OPERATORS = ("+", "-", "*", "**", "/", "//", "%", "~", "==", "<", "in", "and", "or", "is", "not in")


def _expression(draw: random.Random, depth: int = 0) -> str:
    kind = draw.randrange(9) if depth < 4 else 0
    inner = lambda: _expression(draw, depth + 1)  # noqa: E731 - three letters where they are read
    match kind:
        case 0 | 1:
            return draw.choice(_VALUES)
        case 2 | 3:
            return f"({inner()}) {draw.choice(_OPERATORS)} ({inner()})"
        case 4 | 5:
            return f"({inner()})|{draw.choice(_FILTERS)}"
        case 6:
            return f"({inner()}).{draw.choice(_METHODS)}"
        case 7:
            return f"[{inner()}, {inner()}]"
    return f"({inner()})[{inner()}]"


def _statement(draw: random.Random, depth: int = 0) -> str:
    body = lambda: "".join(_statement(draw, depth + 1) for _ in range(draw.randint(1, 2)))  # noqa: E731 - as above
    match draw.randrange(9) if depth < 5 else 0:
        case 0 | 1:
            return "{{ " + _expression(draw) + " }}"
        case 2 | 3:
            over = draw.choice(["messages", "range(99999)", "range(9)", _expression(draw)])
            return "{% for message in " + over + " %}" + body() + "{% endfor %}"
        case 4:
            return "{% if " + _expression(draw) + " %}" + body() + "{% else %}" + body() + "{% endif %}"
        case 5:
            return (
                "{% set ns.v = "
                + draw.choice(["ns.v + ns.v", "[ns.v, ns.v]", "ns.v ~ ns.v", _expression(draw)])
                + " %}"
            )
        case 6:
            return "{% set x = " + _expression(draw) + " %}"
        case 7:
            return (
                "{% macro f(x, y=1) %}"
                + body()
                + draw.choice(["", "{{ f(x) }}"])
                + "{% endmacro %}{{ f("
                + _expression(draw)
                + ") }}"
            )
    return "{% set x %}" + body() + "{% endset %}"


_REAL = (
    CHAT_TEMPLATE,
    tokenizer_kinds.RETHINKING,
    tokenizer_kinds.THINKING,
    tokenizer_kinds.ALTERNATING,
    tokenizer_kinds.WITH_TOOLS,
)


def template_case(draw: random.Random, world: World) -> Case:
    """A chat template, of the model or given as an option."""
    if draw.random() < 0.25:
        text = mutated_bytes(draw, draw.choice(_REAL).encode()).decode("utf-8", "replace")
    else:
        text = "{% set ns = namespace(v='ab') %}" + "".join(_statement(draw) for _ in range(draw.randint(1, 4)))
        text += draw.choice(["", CHAT_TEMPLATE])
    words = ("lint", "--data", str(world.rows))
    if draw.random() < 0.5:
        files = {"t.jinja": text_bytes(text)}
        return Case(files, (*words, "--model", str(world.model), "--chat-template", "t.jinja"), {})
    return Case({"m/chat_template.jinja": text_bytes(text)}, (*words, "--model", "m"), {"m": world.model})


# ---- rows --------------------------------------------------------------------------------------------------------

_GOOD_ROWS = (
    {"messages": [{"role": "user", "content": "what is"}, {"role": "assistant", "content": "a list"}]},
    {"prompt": "what", "completion": "a name"},
    {"text": "the user asks the assistant"},
    {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a"}], "tools": "[]"},
    {"instruction": "what", "input": "", "output": "json"},
)


def rows_case(draw: random.Random, world: World) -> Case:
    """A file of rows."""
    suffix = draw.choice(["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "txt", "json"])
    rows = [draw.choice(_GOOD_ROWS) for _ in range(draw.randint(1, 4))]
    if suffix in ("csv", "tsv"):
        comma = "," if suffix == "csv" else "\t"
        cells = [
            draw.choice(["prompt", "completion", '"a', 'a"b', "", *ODD_TEXTS]) for _ in range(draw.choice([2, 4, 40]))
        ]
        text = f"prompt{comma}completion\n" + "".join(c + draw.choice([comma, "\n", "\r", '"']) for c in cells)
    elif suffix == "json":
        text = mutated_json(draw, rows)
    else:
        text = "\n".join(mutated_json(draw, row) for row in rows)
    data = text_bytes(text)
    if suffix == "parquet":
        data = _parquet(draw, rows)
    if suffix.endswith(".gz"):
        data = gzip.compress(data)
    if draw.random() < 0.3:
        data = mutated_bytes(draw, data)
    skip = ("--skip-bad",) if draw.random() < 0.5 else ()
    name = f"rows.{suffix}"
    return Case({name: data}, ("lint", "--model", str(world.model), "--data", name, *skip), {})


def _parquet(draw: random.Random, rows: list[dict[str, object]]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    count = len(rows)
    table = pa.table({"prompt": ["what"] * count, "completion": ["a"] * count})
    if draw.random() < 0.7:
        number = draw.choice([0, 1, 2**31 - 1, 2**62, -(2**62)])
        values = draw.choice(
            [
                pa.array([number] * count, pa.int64()),
                pa.array([number] * count, pa.int64()).view(pa.timestamp(draw.choice(["us", "ns", "ms"]))),
                pa.array([number % 2**31] * count, pa.int32()).view(pa.date32()),
                pa.array([b"\xff\x00"] * count),
                pa.array([float("nan")] * count),
                pa.array([[{"role": "user", "content": "q"}, None]] * count),
                pa.nulls(count),
            ]
        )
        table = table.append_column(draw.choice(["prompt", "completion", "messages", "more"]), values)
    out = io.BytesIO()
    parquet.write_table(table, out)
    return out.getvalue()


# ---- names, and the stores of other programs ---------------------------------------------------------------------


def stores_case(draw: random.Random, world: World) -> Case:
    """Trees of Ollama and LM Studio below a home, and a name that is asked for in them."""
    files: dict[str, bytes] = {}
    data, names = world.gguf.read_bytes(), []
    for _ in range(draw.randint(0, 3)):
        name, tag = draw.choice(ODD_NAMES), draw.choice(["latest", *ODD_NAMES])
        digest = hashlib.sha256(data).hexdigest()
        manifest = {"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}]}
        text = json.dumps(manifest) if draw.random() < 0.5 else mutated_json(draw, manifest)
        place = draw.choice(["registry.ollama.ai/library", "hf.co/someone", draw.choice(ODD_NAMES) + "/a", "b"])
        files[f"home/.ollama/models/manifests/{place}/{name}/{tag}"] = text_bytes(text)
        files[f"home/.ollama/models/blobs/sha256-{digest}"] = data if draw.random() < 0.8 else mutated_gguf(draw, data)
        names.append(f"ollama:{name}:{tag}")
    for _ in range(draw.randint(0, 2)):
        publisher, name = draw.choice(ODD_NAMES), draw.choice(ODD_NAMES)
        files[f"home/.lmstudio/models/{publisher}/m/{name[:200]}.gguf"] = data
        names.append(f"lmstudio:{draw.choice([publisher, name, f'{publisher}/m'])}")
    if draw.random() < 0.5:
        pointer = draw.choice(
            ["", "/", "\0", "x" * 5000, "/" + "x" * 300, "a/b", "/proc/self", "\x1b[2J", "~", "/dev/null"]
        )
        files["home/.lmstudio-home-pointer"] = pointer.encode()
    files.setdefault("home/.keep", b"")
    if draw.random() < 0.3:
        return Case(files, ("models", *(["--json"] if draw.random() < 0.3 else [])), {})
    odd = draw.choice(ODD_NAMES) * draw.choice([1, 1, 1, 40])
    names += [f"ollama:{odd}", f"lmstudio:{odd}", f"ollama:{odd}/{odd}:{odd}", odd]
    return Case(files, ("generate", f"--model={draw.choice(names)}", *ASK), {})


def names_case(draw: random.Random, world: World) -> Case:
    """Names of files and columns, and what an adapter calls its base."""
    name = draw.choice(ODD_NAMES)
    match draw.randrange(4):
        case 0:
            odd = draw.choice(ODD_NAMES)
            rows = [{odd: "a", "b": name}, {"prompt": name}, "{", {"messages": [{"role": name, "content": odd}]}]
            data = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in draw.sample(rows, 2))
            file = f"{name[:200]}.jsonl"
            return Case({file: text_bytes(data)}, ("lint", "--model", str(world.model), f"--data=./{file}"), {})
        case 1:
            config = json.loads((world.adapter / "adapter_config.json").read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = name * draw.choice([1, 1, 300])
            config[draw.choice(ODD_NAMES)] = draw.choice(ODD_NAMES)
            return _of_adapter(draw, world, "adapter_config.json", json.dumps(config).encode())
        case 2:
            return Case({f"d/{name}": b"{}"}, ("inspect", f"d/{name}"), {})
        case _:
            toml = (
                f"[run]\n{json.dumps(name)} = 1\n"
                if draw.random() < 0.5
                else f"{'a.' * draw.choice([1, 40, 50000])}b = 1"
            )
            return Case({"run.toml": text_bytes(toml)}, ("train", "run.toml", f"--{name}"), {})


KINDS: dict[str, Callable[[random.Random, World], Case]] = {
    "gguf": gguf_case,
    "safetensors": safetensors_case,
    "adapter_config": adapter_config_case,
    "template": template_case,
    "rows": rows_case,
    "tokenizer": tokenizer_case,
    "config": config_case,
    "stores": stores_case,
    "names": names_case,
}


def lay_out(case: Case, place: Path) -> None:
    """Write a case's files into an empty directory, and link those that belong with them."""
    for name, data in case.files.items():
        with suppress(FileExistsError, IsADirectoryError, NotADirectoryError):  # drawn as a folder, too
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
    for folder, source in case.links.items():
        for path in source.iterdir():
            if not (place / folder / path.name).exists():
                os.link(path, place / folder / path.name)
    for folder, source in case.copies.items():
        for path in sorted(source.rglob("*")):
            target = place / folder / path.relative_to(source)
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
