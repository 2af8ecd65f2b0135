"""Ways to damage bytes, JSON values and GGUF files, all drawn from one generator, so that a seed repeats them."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

ODD_NUMBERS = (
    *(0, 1, -1, 2, 7, 255, 256, 4096, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
    *(10**30, 0.5, -0.0, 1e-320, 1e308, 1e-8),
)
ODD_TEXTS = (
    *("", " ", "\0", "x" * 300, "\ud800", "../../x", "/etc/passwd", "a/b", "auto", "none", "null", "true", "NaN", "-1"),
    *(
        "\u2028",
        "é" * 50,
        "🙂",
        "{{ x }}",
        "%s%n",
        "[" * 200,
        "q_proj",
        "lm_head",
        "(a+)+$",
        ".*",
        "<|im_end|>",
        "default",
    ),
    *("\x1b[31mred\x1b[0m", "line\nerror: forged", "\u202egpj", "\x9b2J", "a\u2066b"),
)


ODD_NAMES = (
    *(
        "a",
        "tiny",
        "a b",
        "%s",
        "-x",
        "--help",
        "~",
        "a:b",
        "sha256",
        "x" * 250,
        "é" * 100,
        "🙂",
        "model.gguf",
        "...",
        "[red]x",
    ),
    *(
        "\x1b[31mred",
        "\x1b]0;title\x07",
        "a\x1b[2J",
        "line\nerror: forged",
        "\r\rover",
        "\x9b31m",
        "\u202egpj",
        "\u2066a\u2069",
    ),
    *(
        "\u200bzero",
        "\u2028line",
        "\ufeffmark",
        "\x7f",
        "tab\tbed",
        "\udcff",
        "\U000e0041tag",
        "<script>",
        "'; ls",
        "$(id)",
    ),
)
"""Names of files and models: what a terminal obeys, what looks like an option, what no encoding has."""


def odd_value(draw: random.Random, depth: int = 0) -> Any:
    """A value of the wrong kind for its place."""
    kind = draw.randrange(9)
    if kind < 3:
        return draw.choice(ODD_NUMBERS)
    if kind < 5:
        return draw.choice(ODD_TEXTS)
    if kind == 5:
        return draw.choice([None, True, False])
    if kind == 6:
        return float(draw.choice(["nan", "inf", "-inf"]))
    if depth > 2:
        return []
    if kind == 7:
        return [odd_value(draw, depth + 1) for _ in range(draw.choice([0, 1, 2, 3, 50]))]
    return {draw.choice(ODD_TEXTS): odd_value(draw, depth + 1) for _ in range(draw.choice([0, 1, 3]))}


def mutated_bytes(draw: random.Random, data: bytes) -> bytes:
    """Flipped, cut, doubled, overwritten or replaced in a few places; mostly near the beginning, where headers are."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 4, 16])):
        size = len(changed)
        if not size:
            return bytes(changed)
        at = draw.randrange(min(size, draw.choice([64, 1024, size])) or 1)
        match draw.randrange(8):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                changed[at] = draw.randrange(256)
            case 2:
                del changed[at:]
            case 3:
                del changed[at : at + draw.choice([1, 4, 8, 100])]
            case 4:
                changed[at:at] = changed[at : at + draw.choice([1, 8, 100])]
            case 5:
                width = draw.choice([4, 8])
                number = draw.choice([n for n in ODD_NUMBERS if isinstance(n, int)]) % 2 ** (8 * width)
                changed[at : at + width] = number.to_bytes(width, "little")
            case 6:
                changed[at:at] = draw.randbytes(draw.choice([1, 3, 40]))
            case 7:
                changed[at : at + 30] = bytes(30)
    return bytes(changed)


def mutated_json(draw: random.Random, value: Any, *, most: int = 3) -> str:
    """JSON text of a value changed in a few places; sometimes with a key that occurs twice, or damaged itself."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, most)):
        places = list(_places(value))
        if not places:
            break
        holder, key = draw.choice(places)
        match draw.randrange(7):
            case 0 | 1 | 2:
                holder[key] = odd_value(draw)
            case 3:
                del holder[key]
            case 4:
                other, other_key = draw.choice(places)
                try:
                    holder[key] = json.loads(json.dumps(other[other_key]))
                except (KeyError, IndexError, TypeError):
                    holder[key] = None
            case 5:
                holder[key] = [holder[key]]
            case 6 if isinstance(holder, dict):
                holder[draw.choice(ODD_TEXTS)] = holder[key]
    text = json.dumps(value, ensure_ascii=draw.random() < 0.8, separators=(",", ":"))
    if draw.random() < 0.05 and ":" in text:
        text = text.replace("{", '{"r":1,"r":2,', 1)
    if draw.random() < 0.02:
        text = "[" * draw.choice([10, 3000, 100_000]) + text
    if draw.random() < 0.05:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(['"', "\\", ",", "}", "9" * 5000, "\x00"]) + text[at:]
    return text


def _places(value: Any) -> Any:
    """(container, key) of every place in a JSON value, the container's own included; at most some thousands."""
    waiting, seen = [value], 0
    while waiting and seen < 3000:
        holder = waiting.pop()
        keys: Any = list(holder) if isinstance(holder, dict) else range(min(len(holder), 50))
        for key in keys:
            seen += 1
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])


# ---- GGUF: read into a structure, changed there, and written again with right lengths ----------------------------

_FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
Entry = list[Any]
"""[key, type, value]; the value of an array is [item type, items]."""


class LooseGGUF:
    """A GGUF file as lists that may hold anything."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 4
        self.version = self._number("<I")
        tensors, entries = self._number("<Q"), self._number("<Q")
        self.entries: list[Entry] = []
        for _ in range(entries):
            key, kind = self._text(), self._number("<I")
            self.entries.append([key, kind, self._value(kind)])
        self.tensors = []
        for _ in range(tensors):
            name = self._text()
            sizes = [self._number("<Q") for _ in range(self._number("<I"))]
            self.tensors.append([name, sizes, self._number("<I"), self._number("<Q")])
        self.rest = data[-(-self._at // 32) * 32 :]

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _text(self) -> bytes:
        size = self._number("<Q")
        self._at += size
        return self._data[self._at - size : self._at]

    def _value(self, kind: int) -> Any:
        if kind == 8:
            return self._text()
        if kind == 9:
            inner, count = self._number("<I"), self._number("<Q")
            return [inner, [self._value(inner) for _ in range(count)]]
        return self._number(_FORMS[kind])

    def to_bytes(self) -> bytes:
        out = [b"GGUF", struct.pack("<IQQ", self.version & 0xFFFFFFFF, len(self.tensors), len(self.entries))]
        for key, kind, value in self.entries:
            out += [_packed_text(key), struct.pack("<I", kind), _packed(kind, value)]
        for name, sizes, kind, offset in self.tensors:
            out += [_packed_text(name), struct.pack("<I", len(sizes))]
            out += [struct.pack("<Q", size % 2**64) for size in sizes]
            out += [struct.pack("<IQ", kind % 2**32, offset % 2**64)]
        head = b"".join(out)
        return head + bytes(-len(head) % 32) + self.rest


def _packed_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _packed(kind: int, value: Any) -> bytes:
    if kind == 8:
        return _packed_text(value)
    if kind == 9:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_packed(inner, item) for item in items)
    return struct.pack(_FORMS[kind], value)


def odd_entry(draw: random.Random) -> tuple[int, Any]:
    """A metadata value of any type."""
    kind = draw.choice([*_FORMS, 8, 9])
    if kind == 8:
        return 8, draw.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")
    if kind == 9:
        inner = draw.choice([4, 5, 6, 8])
        count = draw.choice([0, 1, 2, 300])
        return 9, [inner, [_odd_number(draw, inner) if inner != 8 else b"x" for _ in range(count)]]
    return kind, _odd_number(draw, kind)


def _odd_number(draw: random.Random, kind: int) -> Any:
    form = _FORMS[kind]
    if form in ("<f", "<d"):
        return draw.choice([0.0, -1.0, float("nan"), float("inf"), 1e-30, 1e30, 1.5])
    bits = 8 * struct.calcsize(form)
    value = int(draw.choice([n for n in ODD_NUMBERS if isinstance(n, int)])) % 2**bits
    return value - 2**bits if form in ("<b", "<h", "<i", "<q") and value >= 2 ** (bits - 1) else value


def mutated_gguf(draw: random.Random, data: bytes) -> bytes:
    """A GGUF file with some entries or tensors changed."""
    if draw.random() < 0.3:
        return mutated_bytes(draw, data)
    file = LooseGGUF(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        match draw.randrange(10):
            case 0 | 1 | 2 | 3:
                entry = draw.choice(file.entries)
                same_kind = draw.random() < 0.5 and entry[1] in _FORMS
                entry[1:] = [entry[1], _odd_number(draw, entry[1])] if same_kind else list(odd_entry(draw))
            case 4:
                file.entries.remove(draw.choice(file.entries))
            case 5:
                file.entries.append(list(draw.choice(file.entries)))
                if draw.random() < 0.7:
                    file.entries[-1][0] = b"llama.odd" if draw.random() < 0.5 else b"tokenizer.ggml.scores"
            case 6:
                tensor = draw.choice(file.tensors)
                tensor[1] = [
                    draw.choice([0, 1, 8, 64, 2**31, 2**62, *tensor[1]]) for _ in range(draw.choice([0, 1, 2, 4, 5]))
                ]
            case 7:
                tensor = draw.choice(file.tensors)
                tensor[3] = draw.choice([0, 1, 32, 2**40, 2**63, draw.choice(file.tensors)[3]])
            case 8:
                draw.choice(file.tensors)[2] = draw.choice([0, 1, 2, 3, 8, 12, 30, 99, 2**31])
            case 9:
                tensor = draw.choice(file.tensors)
                if draw.random() < 0.5:
                    file.tensors.remove(tensor)
                else:
                    tensor[0] = draw.choice([b"", b"x", b"blk.99.attn_q.weight", draw.choice(file.tensors)[0], b"\xff"])
    return file.to_bytes()
