"""Templates that need all time or memory are ended with an error; others render as in transformers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from backhand.data import bounded_template, workers
from backhand.data.bounded_template import (
    BoundedTemplate,
    TemplateLimitError,
    TemplateRefusal,
    TemplateSyntaxError,
    end_worker,
)
from backhand.data.options import DataOptions
from backhand.data.prepare import prepare
from backhand.data.workers import Worker, parallel_map
from backhand.errors import ArtifactError, DataError, ResourceError
from tests.support import tokenizer_kinds
from tests.support.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

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


@pytest.fixture
def own_worker() -> Iterator[None]:
    """A worker of the test's own, which has the limits that the test sets."""
    end_worker()
    yield
    end_worker()


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
        with pytest.raises(TemplateRefusal, match=f"^{type(error).__name__}: "):
            BoundedTemplate(source).render(ours)
    else:
        assert BoundedTemplate(source).render(ours) == expected


GROWING = "{% set ns = namespace(v='aaaaaaaa') %}{% for i in range(60) %}{% set ns.v = ns.v ~ ns.v %}{% endfor %}"
TIME, MEMORY = r"^it needs more than \d s for one conversation$", "^it needs more than 1 GiB of memory for one"
HOSTILE = {
    "loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
        + "{% endfor %}" * 2,
        TIME,
    ),
    "calls twice": (
        "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(100) }}",
        TIME,
    ),
    "comparing": (
        "{% set s = 'ab ' * 5000000 %}{% for i in range(99999) %}{% if s == s[1:] %}{% endif %}{% endfor %}",
        TIME,
    ),
    "power, which is one instruction": ("{% set n = 9 %}{{ n ** 9999999999 }}", TIME),
    "power, when it is compiled": ("{{ 9 ** 9999999999 }}", TIME),
    "recurses": ("{% macro f(n) %}{{ f(n+1) }}{% endmacro %}{{ f(1) }}", "^it recurses without end"),
    "times": ("{% set n = 20000000000 %}{{ 'a' * n }}", MEMORY),
    "times, when it is compiled": ("{{ 'a' * 20000000000 }}", MEMORY),
    "list times": ("{{ [messages] * 20000000000 }}", MEMORY),
    "center": ("{{ 'a'.center(20000000000) }}", MEMORY),
    "format": ("{{ '%9999999999d' % 1 }}", MEMORY),
    "doubled": (GROWING, MEMORY),
    "a long text": ("{{ 'a' * 100000000 }}", "^it creates a value of more than 67,108,864 characters$"),
    "half a pair": ("{{ '\\ud800' }}", "half of a surrogate pair"),
    "class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "hidden name": ("{{ (''|attr('__class__')).mro }}", "unsafe"),
    "include": ("{% include 'x' %}", "another template"),
    "extends": ("{% extends 'x' %}", "another template"),
    "import": ("{% import 'x' as y %}", "another template"),
    "changing": ("{{ messages.append(1) }}", "unsafe"),
    "ifs": ("{% if a %}" * 5000 + "{% endif %}" * 5000, "nested too deeply"),
    "brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    "blocks": ("{% for a in range(9) %}" * 50 + "x" + "{% endfor %}" * 50, "nested too deeply"),
    "sums": ("{{ " + " + ".join(["'a'"] * 20000) + " }}", "nested too deeply"),
    "long": ("x" * 300_000, "300,000 characters long"),
}


@pytest.mark.usefixtures("own_worker")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_with_its_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Filling a gigabyte takes seconds where other work shares the caches.
    monkeypatch.setattr(bounded_template, "MOST_SECONDS", 1 if HOSTILE[name][1] == TIME else 30)
    source, reason = HOSTILE[name]
    with pytest.raises(TemplateLimitError, match=reason):
        BoundedTemplate(source).render(variables())


def test_a_template_goes_on_after_an_error() -> None:
    template = BoundedTemplate("{{ raise_exception('no') if no else '%s' % {'a': 1 } }}{{ 1 / n }}")
    for number, error in ((0, "ZeroDivisionError: "), (1, ""), (0, "ZeroDivisionError: ")):
        if error:
            with pytest.raises(TemplateRefusal, match=error):
                template.render({"n": number})
        else:
            assert template.render({"n": number}) == "{'a': 1}1.0"
    with pytest.raises(TemplateRefusal, match=r"^TemplateError: no$"):
        template.render({"no": True})


def test_a_template_that_is_no_jinja_names_its_line() -> None:
    with pytest.raises(TemplateSyntaxError, match=r"in line 2$"):
        BoundedTemplate("a\n{{ x }").render({})


@pytest.mark.usefixtures("own_worker")
def test_compiling_does_not_count_as_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_template, "SECONDS_TOGETHER", 0.0)
    assert BoundedTemplate("{{ 'a' * 9 }}").render(variables()) == "a" * 9


@pytest.mark.usefixtures("own_worker")
def test_many_conversations_share_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_template, "SECONDS_TOGETHER", 0.01)
    monkeypatch.setattr(bounded_template, "SECONDS_EACH", 0.0)
    template = BoundedTemplate("{% for i in range(90000) %}{{ i }}{% endfor %}")
    conversations = [variables() for _ in range(1000)]
    with pytest.raises(TemplateLimitError, match=r"^it needs \d\.\d s for \d+ conversations$"):
        list(map(template.render, conversations))


def test_values_are_plain_for_the_template() -> None:
    class Text(str):
        __slots__ = ()

        def erase(self) -> str:
            return "erased"

    text = BoundedTemplate("{{ a.erase is defined }} {{ a }} {{ b }}").render({"a": Text("x"), "b": object()})
    assert text == "False x <object>"


@pytest.mark.usefixtures("own_worker")
@pytest.mark.parametrize("count", [1, 600], ids=["a few rows", "rows for several workers"])
def test_a_run_names_the_template_and_not_the_rows(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_template, "MOST_SECONDS", 2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"prompt": "q", "completion": "a"}) + "\n") * count)
    tokenizer = tiny_tokenizer()
    for name, reason in (("times", "memory"), ("loops", "2 s"), ("half a pair", "surrogate"), ("class", "unsafe")):
        end_worker()
        tokenizer.chat_template = HOSTILE[name][0]
        with pytest.raises(ArtifactError, match="exceeds the limits for templates") as raised:
            prepare(DataOptions(data=(str(rows),), skip_bad=True), tokenizer)
        assert raised.value.where == "tokenizer"
        assert reason in str(raised.value.why)
        assert "rows.jsonl" not in str(raised.value)


def square(number: int) -> int:
    if number == 13:
        raise DataError("thirteen", where="f:13")
    return number**2


def test_results_of_workers_are_in_order_and_errors_are_raised() -> None:
    assert list(parallel_map(square, range(12))) == [number**2 for number in range(12)]
    results = parallel_map(square, range(20))
    assert [next(results) for _ in range(13)] == [number**2 for number in range(13)]
    with pytest.raises(DataError, match="thirteen") as raised:
        next(results)
    assert raised.value.where == "f:13"


@pytest.mark.usefixtures("own_worker")
def test_a_worker_is_started_without_a_fork_where_forking_is_not_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FORKS", False)
    assert BoundedTemplate("{{ a }}").render({"a": [1]}) == "[1]"
    assert list(parallel_map(square, [1, 2])) == [1, 4]


def kill_this(number: int) -> int:
    os.kill(os.getpid(), number)
    return 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_worker_that_is_killed_is_reported() -> None:
    with pytest.raises(ResourceError, match="was killed"):
        Worker(kill_this).call(signal.SIGKILL)
    with pytest.raises(workers.WorkerEndedError, match=f"ended with signal {signal.SIGUSR1:d}"):
        Worker(kill_this).call(signal.SIGUSR1)


@pytest.mark.skipif(sys.platform != "linux", reason="the state of a process is read from /proc")
def test_workers_end_with_their_parent() -> None:
    code = (
        "import os, time\n"
        "from backhand.data.workers import Worker\n"
        "workers = [Worker(os.getpid) for _ in range(3)]\n"
        "print(*(worker.call() for worker in workers), flush=True)\n"
        "input()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    numbers = [int(word) for word in parent.stdout.readline().split()]
    assert len(numbers) == 3 and all(Path(f"/proc/{number}").exists() for number in numbers)
    parent.kill()
    parent.communicate()
    until = time.monotonic() + 30
    while any(Path(f"/proc/{number}/exe").exists() for number in numbers):
        assert time.monotonic() < until
        time.sleep(0.01)
