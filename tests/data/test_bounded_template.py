"""Templates that ask for all time and memory end, and name themselves; plain ones render as transformers has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from backhand.data import template_bounds
from backhand.data.bounded_template import BoundedTemplate
from backhand.data.options import DataOptions
from backhand.data.prepare import prepare
from backhand.data.template_bounds import TemplateLimitError
from backhand.errors import ArtifactError
from support import tokenizer_kinds
from support.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief, é 🙂"},
    {"role": "user", "content": "what is the answer for 3 < 4 & 5?"},
    {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\na list",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, None, True]}}}],
    },
    {"role": "tool", "content": "12", "name": "f"},
    {"role": "assistant", "content": "", "reasoning_content": "so"},
    {"role": "user", "content": "thanks"},
]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}

FEATURES = (
    "{% for m in messages[::-1] %}{{ loop.index }} {{ loop.last }} {{ loop.length }} {{ loop.revindex0 }}{% endfor %}",
    "{% for m in messages if m.role != 'user' %}{{ m['role'] ~ ': ' ~ m.content|length }}|{% else %}none{% endfor %}",
    (
        "{% macro show(v, depth=0) %}{% if v is mapping %}{% for k, x in v|items %}{{ k }}={{ show(x, depth + 1) }};"
        "{% endfor %}{% elif v is iterable and v is not string %}[{% for x in v %}{{ show(x, depth+1) }},{% endfor %}]"
        "{% else %}{{ v }}{% endif %}{% endmacro %}{{ show(tools) }}{{ show(messages) }}"
    ),
    (
        "{% set ns = namespace(found=false, last=-1, text='') %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.found = true %}{% set ns.last = loop.index0 %}{% endif %}{% set ns.text = ns.text + m.role[:1] %}"
        "{% endfor %}{{ ns.found }} {{ ns.last }} {{ ns.text }} {{ messages[ns.last].content }}"
    ),
    "{{ messages|tojson(indent=2) }}{{ tools|tojson }}{{ tools|map(attribute='function.name')|join(', ') }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list }}",
    "{{ messages|rejectattr('role', 'in', ['user', 'tool'])|list|length }} {{ messages|groupby('role')|list|length }}",
    "{{ 'a-b-c'.split('-')[-1].strip().upper() ~ 'x'.replace('x', 'yy') + 'abc'[1:] }}{{ '%s: %d' % ('a', 3) }}",
    "{{ '{:>5}|{a}'.format('x', a=1) }}{{ 'q'.join(['1', '2']) }}{{ 'ab'.center(6) }}{{ 'a\nb'|indent(2) }}",
    "{{ 3 * 4 ** 2 % 7 + 1 - 2 / 4 // 1 }} {{ 'ab' * 3 }} {{ [1, 2] + [messages|length] }} {{ (1, 2) < (1, 3) }}",
    "{% if 1 < messages|length <= 6 and 'user' in messages|map(attribute='role') and 'z' not in 'abc' %}yes{% endif %}",
    "{% set block %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ block|trim|length }}{{ block|e }}",
    (
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% if m.role == 'tool' %}{% break %}"
        "{% endif %}{{ m.role }}{% endfor %}"
    ),
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ dict(a=1, b=[2]) }}",
    "{{ messages[4].thinking is defined }} {{ messages[4].reasoning_content }} {{ undefined_thing }} {{ none }}",
    "{{ messages|batch(2, 'none')|list|length }} {{ range(3)|sum }} {{ 3.14159|round(2) }} {{ '12'|int + 1 }}",
    "{% macro wrapped() %}[{{ caller('y') }}]{% endmacro %}{% call(x) wrapped() %}<{{ x }}>{% endcall %}",
    (
        "{% filter upper %}{{ messages[0].role }}{% endfilter %}{% with a = 3 %}{{ a }}{% endwith %}"
        "{% raw %}{{ x }}{% endraw %}"
    ),
    (
        "{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}"
        "{{ {'a': messages[0]}['a'].role }}"
    ),
    (
        "{{ messages|sort(attribute='content')|first|tojson }}"
        "{{ ['b', 'a', 'b']|unique|list }}{{ tools|string }}{{ messages }}"
    ),
)
KINDS = {
    "chatml": CHAT_TEMPLATE,
    **{
        name: getattr(tokenizer_kinds, name)
        for name in ("RETHINKING", "THINKING", "ALTERNATING", "INSTRUCTION_BRACKETS", "WITHOUT_END", "WITH_TOOLS")
    },
    **{f"feature {number}": source for number, source in enumerate(FEATURES)},
}


def as_templates_read(message: dict[str, Any]) -> dict[str, Any]:
    return {"thinking": message["reasoning_content"], **message} if "reasoning_content" in message else message


def variables(**more: Any) -> dict[str, Any]:
    return {**NAMES, "messages": MESSAGES, "tools": TOOLS, "documents": None, "add_generation_prompt": True, **more}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:3], MESSAGES[1:2]], ids=["long", "answered", "asked"])
def test_renders_as_transformers_does(name: str, messages: list[dict[str, Any]]) -> None:
    source = KINDS[name]

    def theirs() -> str:
        return str(
            render_jinja_template(
                [messages], tools=TOOLS, chat_template=source, add_generation_prompt=True, **NAMES
            )[0][0]
        )  # fmt: skip

    ours = variables(messages=[as_templates_read(message) for message in messages])
    try:
        expected = theirs()
    except Exception as error:  # noqa: BLE001 - what they refuse we refuse
        with pytest.raises(type(error)):
            BoundedTemplate(source).render(ours)
    else:
        assert BoundedTemplate(source).render(ours) == expected


NS = "{% set ns = namespace(v=%s) %}{% for i in range(60) %}{% set ns.v = %s %}{% endfor %}{{ ns.v }}"


def growing(start: str, next_one: str) -> str:
    return NS.replace("%s", start, 1).replace("%s", next_one, 1)


LONG = "{% set s = 'ab ' * 5000000 %}{% for i in range(99999) %}{% if BODY %}{% endif %}{% endfor %}"
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "written loops": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if b == -a %}x{% endfor %}{% endfor %}",
    "long bodies": "{% for i in range(99999) %}" + "{{ messages[0].content }}" * 2000 + "{% endfor %}",
    "calls twice": "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "recurses": "{% macro f(n) %}{{ f(n+1) }}{% endmacro %}{{ f(1) }}",
    "recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "lazy filters": "{% for i in range(99999) %}{% if 'x' in range(99999)|map('string') %}{% endif %}{% endfor %}",
    "lengths of loops": "{% for x in range(99999) %}{% for y in range(99999)|map('string') %}{{ loop.length }}"
    "{% endfor %}{% endfor %}",
    "comparing": LONG.replace("BODY", "s == s[1:]"),
    "searching": LONG.replace("BODY", "'ba' in s"),
    "slicing": LONG.replace("BODY", "s[i:]"),
    "upper case": LONG.replace("BODY", "s.upper()"),
    "reversing": LONG.replace("BODY", "s|reverse"),
    "sorting": "{% set l = range(99999)|list %}{% for i in range(99999) %}{% if l|sort %}{% endif %}{% endfor %}",
    "keys": "{% set ns = namespace(t=(1,)) %}{% for i in range(17) %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
    "{% for i in range(99999) %}{{ {}[ns.t] }}{% endfor %}",
    "deep": "{% set ns = namespace(l=[1]) %}{% for i in range(2000) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}",
}
HUGE = {
    "times": "{{ 'a' * 20000000000 }}",
    "times, swapped": "{{ 20000000000 * 'a' }}",
    "list times": "{{ [messages] * 20000000000 }}",
    "center filter": "{{ 'a'|center(20000000000) }}",
    "center": "{{ 'a'.center(20000000000) }}",
    "center by attr": "{{ ('a'|attr('center'))(20000000000) }}",
    "ljust": "{{ 'a'.ljust(20000000000) }}",
    "zfill": "{{ 'a'.zfill(20000000000) }}",
    "tabs": "{{ '\t\t'.expandtabs(9999999999) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (9999999999, 1) }}",
    "precision": "{{ '%.999999999f' % 1.0 }}",
    "format filter": "{{ '%999999999s'|format('a') }}",
    "format": "{{ '{:>9999999999}'.format('a') }}",
    "format nested": "{{ '{:>{}}'.format('a', 9999999999) }}",
    "format map": "{{ '{a:>9999999999}'.format_map({'a': 'x'}) }}",
    "format of copies": "{% set s = '%(a)s' * 9999999 %}{{ s % {'a': 'x' * 9999999} }}",
    "braces of copies": "{% set s = '{a}' * 9999999 %}{{ s.format(a='x' * 9999999) }}",
    "braces of copies, with a name as loops have them": (
        "{% set s = '{_a}' * 9999999 %}{{ s.format(_a='x' * 9999999) }}"
    ),
    "braces of a namespace's": ("{% set ns = namespace(a='x' * 9999999) %}{{ ('{0.a}' * 99999).format(ns) }}"),
    "markup": "{{ ('a'|safe).ljust(20000000000) }}",
    "markup's braces": "{{ ('{:>9999999999}'|safe).format('a') }}",
    "reversed": "{{ ('x' * 99999).join(range(99999)|map('string')|list|reverse) }}",
    "reversed, by the filter": "{{ range(99999)|map('string')|list|reverse|join('x' * 99999) }}",
    "indent": "{{ 'a\nb'|indent(9999999999) }}",
    "tojson": "{{ [1, [2]]|tojson(indent=9999999999) }}",
    "tojson separators": "{{ range(99999)|list|tojson(separators=('x' * 99999, 'y')) }}",
    "batch": "{{ [1]|batch(9999999999, 'x')|list }}",
    "slice": "{{ [1]|slice(9999999999)|list }}",
    "split": "{{ ('a ' * 30000000).split()|length }}",
    "lines": "{{ ('a\n' * 30000000).splitlines()|length }}",
    "letters": "{{ ('a' * 60000000)|list|length }}",
    "strip": "{{ ('a' * 9999999).strip('b' * 9999999 ~ 'a') }}",
    "escape": "{{ ('<' * 60000000)|e|length }}",
    "quoted": "{{ ('é' * 20000000)|urlencode|length }}",
    "power": "{{ 9 ** 9999999999 }}",
    "products": growing("99", "ns.v * ns.v"),
    "round": "{{ 1.5|round(999999999) }}",
    "digits": "{{ ('f' * 60000000)|int(base=16) }}",
    "sum of lists": "{{ [[1]]|sum(start=[]) }}",
    "kept": "{% set ns = namespace(l=[]) %}{% set s = 'ab' * 20000 %}{% for i in range(99999) %}"
    "{% set ns.l = ns.l + [s ~ i] %}{% endfor %}",
    "kept on the stack": "{% macro f(n, t) %}{% if n %}{{ f(n-1, t ~ n) }}{% endif %}{% endmacro %}"
    "{{ f(200, 'ab' * 20000000) }}",
    "doubled": growing("'aaaaaaaa'", "ns.v + ns.v"),
    "doubled by ~": growing("'aaaaaaaa'", "ns.v ~ ns.v"),
    "doubled by join": growing("'aaaaaaaa'", "[ns.v, ns.v]|join"),
    "doubled by join method": growing("'aaaaaaaa'", "''.join([ns.v, ns.v])"),
    "doubled by replace": growing("'aaaaaaaa'", "ns.v|replace('a', ns.v)"),
    "doubled list": growing("[1]", "ns.v + ns.v"),
    "lists of lists": growing("['lol']", "[ns.v, ns.v, ns.v]"),
    "tables of tables": growing("'lol'", "{'a': ns.v, 'b': ns.v}"),
    "dict of dicts": growing("'lol'", "dict(a=ns.v, b=ns.v)"),
    "batches of batches": growing("['lol']", "ns.v|batch(5, ns.v)|list"),
    "from keys": growing("'lol'", "dict.fromkeys(range(1000), ns.v)"),
    "doubled block": "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set x %}{{ ns.s }}{{ ns.s }}"
    "{% endset %}{% set ns.s = x %}{% endfor %}",
    "half a pair": "{{ '\\ud800' }}",
}
FORBIDDEN = {
    "class": "{{ ''.__class__.__mro__ }}",
    "hidden name": "{{ (''|attr('__class__')).mro }}",
    "include": "{% include 'x' %}",
    "extends": "{% extends 'x' %}",
    "import": "{% import 'x' as y %}",
    "bytes": "{{ 'a'.encode() }}",
    "int bytes": "{{ (1).to_bytes(99999999999, 'big') }}",
    "translate": "{{ 'aaa'.translate({97: 'b' * 9999999}) }}",
    "generator": "{{ (messages|map('string')).close() }}",
    "changing": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("name", [*ENDLESS, *HUGE])
def test_ends_and_says_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Smaller limits show the same, and the tests stay short.
    monkeypatch.setattr(template_bounds, "MOST_STEPS", 2**19)
    monkeypatch.setattr(template_bounds, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(template_bounds, "_STEPS_BETWEEN_LOOKS", 2**10)
    monkeypatch.setattr(template_bounds, "LARGEST_VALUE", 2**24)
    monkeypatch.setattr(template_bounds, "MOST_BYTES", 2**28)
    template = BoundedTemplate({**ENDLESS, **HUGE}[name])
    with pytest.raises(
        TemplateLimitError, match=r"^it (needs|creates|pads|computes|recurses|nests|rounds|reads|sums|contains|writes)"
    ):
        template.render(variables())


def test_many_conversations_share_what_one_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template just below the limit for one conversation is not let take it for each of a thousand."""
    template = BoundedTemplate("{% for i in range(2000) %}{{ i }}{% endfor %}")
    template.render(variables())
    monkeypatch.setattr(template_bounds, "SECONDS_TOGETHER", 0.01)
    monkeypatch.setattr(template_bounds, "SECONDS_EACH", 0.0)
    given = [variables() for _ in range(1000)]
    with pytest.raises(TemplateLimitError, match=r"^it needs 0\.\d s for \d+ conversations$"):
        list(map(template.render, given))
    another = BoundedTemplate("{% for i in range(2000) %}{{ i }}{% endfor %}")
    assert another.render(variables()).startswith("0123"), "of the same source, with a count of its own"
    monkeypatch.setattr(template_bounds, "SECONDS_EACH", 1.0)
    assert template.render(variables()).startswith("0123")


@pytest.mark.parametrize("name", FORBIDDEN)
def test_refuses_what_no_template_may_have(name: str) -> None:
    with pytest.raises(jinja2.exceptions.SecurityError):
        BoundedTemplate(FORBIDDEN[name]).render(variables())


@pytest.mark.parametrize(
    "source",
    [
        "{% if a %}" * 5000 + "{% endif %}" * 5000,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for a in range(9) %}" * 50 + "x" + "{% endfor %}" * 50,
        "{{ " + " + ".join(["'a'"] * 20000) + " }}",
        "x" * 300_000,
        f"{{{{ 0x{'f' * 5000} }}}}",
    ],
    ids=["ifs", "brackets", "loops", "sums", "long", "number"],
)
def test_refuses_before_rendering(source: str) -> None:
    with pytest.raises(TemplateLimitError):
        BoundedTemplate(source)


def test_a_limit_of_one_render_is_not_that_of_all() -> None:
    template = BoundedTemplate("{% for i in range(n) %}x{% endfor %}")
    assert len(template.render({"n": 90_000})) == 90_000
    for _ in range(500):
        assert len(template.render({"n": 9_000})) == 9_000


def test_values_are_plain_for_the_template() -> None:
    class Text(str):
        __slots__ = ()

        def erase(self) -> str:
            return "erased"

    text = BoundedTemplate("{{ a.erase is defined }} {{ a }} {{ b }}").render({"a": Text("x"), "b": object()})
    assert text == "False x <object>"


def test_a_run_names_the_template_and_not_the_rows(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "q", "completion": "a"}))
    tokenizer = tiny_tokenizer()
    for template, reason in (
        (HUGE["times"], "characters"),
        (HUGE["half a pair"], "surrogate"),
        (FORBIDDEN["class"], "unsafe"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(ArtifactError, match="exceeds the limits for templates") as raised:
            prepare(DataOptions(data=(str(rows),), skip_bad=True), tokenizer)
        assert raised.value.where == "tokenizer"
        assert reason in str(raised.value.why)
        assert "rows.jsonl" not in str(raised.value)
