"""Templates of strangers: what they cost at most, and that healthy ones do not notice."""

import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from jinja2 import ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from test_chat import IMAGE, model_config, open_chat, text, user
from tokenizers_tiny import CHATML, VICUNA, write_llama_like

from zipvl.errors import ModelError, OutOfMemory
from zipvl.model import sandbox
from zipvl.model.sandbox import Meter, Overrun

LOOP = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}"


def doubled(start: str, step: str, then: str = "{{ ns.x }}") -> str:
    return LOOP.replace("START", start).replace("STEP", step) + then


LARGE = [
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ (0,) * 10**9 }}",
    "{{ '%10000000000d' % 3 }}",
    "{{ '%*d' % (10**9, 3) }}",
    "{{ '%.1000000000f' % 3 }}",
    "{{ '%1000000000d' | format(3) }}",
    "{{ '{:>1000000000}'.format(3) }}",
    "{{ '{:{}}'.format(3, 10**9) }}",
    "{{ '{0:>{1}}'.format_map({'0': 3, '1': 10**9}) }}",
    "{{ ('%(a)s' * 10000) % {'a': 'a' * 100000} }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.rjust(width=10**9) or 'a'.zfill(10**9) }}",
    "{{ ('\t' * 10**6).expandtabs(10**6) }}",
    "{{ ('a' * 1000).translate({97: 'b' * 10**6}) }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ 'a\nb' | indent(10**9, true) }}",
    "{{ {'a': [1]} | tojson(indent=10**9) }}",
    "{{ ([[]] * 10**6) | tojson(separators=('x' * 10**6, ':')) }}",
    "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "{{ ('b' * 10**6) | join('a' * 10**6) }}",
    "{{ ('a ' * 10**7).split() }}",
    "{{ ('\u0416' * 10**7) | list }}",
    "{{ [1] | batch(10**9, 0) | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{{ (10**100000)**1000 }}",
    "{{ 3 | round(-10**9) }}{{ 'a' * 10**9 }}",
    "{{ range(99999) | map('string') | map('center', 99999) | list }}",
    "{{ range(99999) | map(attribute='x', default='a' * 10**6) | join }}",
    "{{ 'a' | indent('b' * 10**6) | indent('c' * 10**6) | wordcount }}{{ 'a' * 10**9 }}",
    doubled("'a'", "ns.x ~ ns.x"),
    doubled("'a'", "ns.x + ns.x"),
    doubled("'a'", "'%s%s' % (ns.x, ns.x)"),
    doubled("'a'", "[ns.x, ns.x] | join"),
    doubled("[1]", "ns.x + ns.x"),
    doubled("[1]", "[ns.x, ns.x]"),
    doubled("(1,)", "(ns.x, ns.x)", "{{ {ns.x: 1} }}"),
    doubled("{}", "{'a': ns.x, 'b': ns.x}"),
    doubled("{}", "dict(a=ns.x, b=ns.x)", "{{ ns.x | tojson }}"),
    doubled("3", "ns.x * ns.x") + doubled("3", "ns.x ** 99"),
    "{% set x %}{% for i in range(99999) %}" + "x" * 10000 + "{% endfor %}{% endset %}",
    "{% macro f(n) %}{{ 'x' * 10**6 }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "{% for i in range(99999) %}{{ messages }}" + "{{ messages }}" * 99 + "{% endfor %}",
]
LONG = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% for a in range(30) recursive %}{% if loop.depth < 30 %}{{ loop(range(30)) }}{% endif %}"
    "{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}{% if n %}{{ caller(n) }}{% call(x) f(n - 1) %}{% endcall %}{% call(x) f(n - 1) %}"
    "{% endcall %}{% endif %}{% endmacro %}{% call(x) f(60) %}{% endcall %}",
    "{% set t = range(99999) | list %}{{ range(99999) | select('in', t) | list | length }}",
    "{% set t = range(99999) | list %}{% for i in t %}{{ 'y' if 'x' in t }}{% endfor %}",
    "{{ ([[1]] * 20000) | sum(start=[]) | length }}" * 400,
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i.q | default(1) }}{% endfor %}"
    "{% endfor %}",
]
OTHER = [
    "{{ lipsum(10**9) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% for x in y %}" * 25 + "{% endfor %}" * 25,
    "{% if 1 %}" * 150 + "{% endif %}" * 150,
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{{ 1" + "+1" * 5000 + " }}",
    "{{ 1" + "0" * 5000 + " }}",
    "x" * (sandbox.TEMPLATE_SOURCE + 1),
    "{{ ('<' * 9) | striptags }}",
    "{{ raise_exception('a' * 1000) }}",
    "{% autoescape 'a' | center(10**10) %}{{ 0 / 0 }}{% endautoescape %}",
    "{{ range(10**9) | list }}",
]
RUN = """
import json, resource, sys, time
from zipvl.errors import ZipvlError
from zipvl.model import chat, sandbox

sandbox.TEMPLATE_SECONDS = float(sys.argv[1])
sandbox.TEMPLATE_SIZE = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
for source in json.load(sys.stdin):
    began, kind, size = time.process_time(), "", 0
    chat.BUILT_IN["own"] = source
    try:
        template = chat.load_template(None, None, "own", {})
        size = len(template.render([{"role": "user", "content": "Hello"}]))
    except ZipvlError as e:
        kind, size = type(e).__name__, len(str(e))
    except BaseException as e:
        kind = "raw " + type(e).__name__
    print(json.dumps([kind, size, time.process_time() - began]), flush=True)
rows = dict(line.split(":") for line in open("/proc/self/status"))
print(int(rows["VmHWM"].split()[0]) * 1024)
"""


def outcomes(sources: list[str], seconds: float, size: int) -> tuple[list[list], int]:
    """[error, length, seconds] of each template in a child of 2 GiB, and the memory it took."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(seconds), str(size)],
        input=json.dumps(sources), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(sources) + 1, f"{sources[len(rows)][:200]}: {done.stderr[-500:]}"
    return rows[:-1], rows[-1]


def check(seconds: float, size: int, slack: float, memory: float) -> None:
    sources = [*LARGE, *LONG, *OTHER]
    kinds = ["Overrun"] * len(LARGE + LONG) + ["ModelError"] * len(OTHER)
    found, taken = outcomes(sources, seconds, size)
    for source, want, (kind, length, took) in zip(sources, kinds, found, strict=True):
        assert kind in (want, "Overrun"), source[:200]
        assert length < 600, source[:200]
        assert took < seconds + slack, source[:200]
    assert taken < memory


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process")
def test_templates_have_ceilings() -> None:
    check(seconds=0.05, size=2**20, slack=2, memory=200e6)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process")
def test_the_real_ceilings() -> None:
    check(sandbox.TEMPLATE_SECONDS, sandbox.TEMPLATE_SIZE, slack=5, memory=1e9)


def test_a_caller_may_raise_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Meter().compiled("{{ 'a' * 100 }}")
    monkeypatch.setattr(sandbox, "TEMPLATE_SIZE", 99)
    with pytest.raises(Overrun, match="too much text"):
        run()
    monkeypatch.setattr(sandbox, "TEMPLATE_SIZE", 1000)
    assert len(run()) == 100
    assert len(run()) == 100  # each rendering has its own


HEALTHY = [
    VICUNA,
    CHATML,
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ m.role|title }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.revindex }}{% else %}none{% endfor %}",
    "{% for m in messages[1:] %}{% if loop.first %}{% continue %}{% endif %}{{ m['content'] }}{% endfor %}",
    "{% for m in messages[::-1] %}{% set i = (messages|length - 1) - loop.index0 %}{{ i }}{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ messages[0] | dictsort }}",
    "{% set x = messages | selectattr('role', 'equalto', 'nobody') %}{{ 'true' if x }}{{ x | list }}",
    "{% set x = messages | map(attribute='role') %}{{ 'user' in x }}{{ x | list }}",
    "{{ messages | map(attribute='content') | map('upper') | join('|') }}",
    "{{ messages | groupby('role') | map('first') | join(',') }}{{ messages | length is divisibleby 2 }}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ 1.5 | tojson }}{{ none | tojson }}",
    "{{ '%s-%02d' % ('a', 3) }}{{ '%s' | format('q') }}{{ '{} {x:>5}'.format(1, x=2) }}",
    "{{ 'a,b'.split(',') }}{{ 'abc' | replace('b', '<b>') }}{{ 'a\nb' | indent(2) }}{{ 'a' | center(9) }}",
    "{{ 'x' * 3 ~ [1, 2] * 2 ~ (1, 'a') ~ {'a': none} }}{{ 2**10 }}{{ 7 % 4 }}{{ 7 // 2 }}{{ 1.26 | round(1) }}",
    "{{ [1, 2, 3] | sum }}{{ [{'a': 2}] | sum('a') }}{{ [[1], [2]] | sum(start=[]) }}",
    "{% macro say(m, end='.') %}{{ m.content }}{{ end }}{{ caller() if caller }}{% endmacro %}"
    "{{ say(messages[0]) }}{% call say(messages[1], end='!') %}called{% endcall %}",
    "{% set ns = namespace(n=0, all=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.all = ns.all + [m.content] %}{% endfor %}{{ ns.n }}{{ ns.all }}",
    "{% set x %}<{{ messages[0].role }}>{% endset %}{{ x | trim | upper }}{% filter upper %}a{% endfilter %}",
    "{% autoescape true %}<b>{{ '<' }}{{ messages[0].role ~ '<' ~ ('<' | safe) }}{% endautoescape %}{{ '<' }}",
    "{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }},{% endfor %}",
    "{{ missing }}{{ missing is defined }}{{ missing | default('d') }}{{ messages[9] is undefined }}",
    "  {%- if messages[0]['role'] in ['user', 'system'] -%}  yes  {%- endif %}\n  {# note #}\n x",
    "{{ range(3) | list }}{{ dict(a=1) }}{{ cycler('a', 'b').next() }}{{ strftime_now('%Y') }}\n",
    "{{ messages | unique(attribute='role') | list }}{{ 'b a'.split() | sort }}{{ [3, 1] | min }}",
    "{{ 1 if messages else 2 }}{{ not messages }}{{ 1 < 2 < 3 }}{{ 'a' 'b' }}{{ -3 | abs }}",
    "{{ 'aXb'.lower().startswith('a') }}{{ ' a '.strip() }}{{ 'ab'[::-1] }}{{ [1, 2][:1] }}",
]


@pytest.mark.parametrize("source", HEALTHY)
def test_healthy_templates_do_not_notice(source: str) -> None:
    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols]
    )
    plain.filters["tojson"] = lambda value, **o: json.dumps(value, ensure_ascii=False, **o)
    plain.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    want, found = plain.from_string(source), Meter().compiled(source)
    for content in ("Hello 你好\n<b>", [{"type": "image"}, {"type": "text", "text": "Hi"}]):
        messages = [
            {"role": r, "content": content} for r in ("system", "user", "assistant", "user")
        ]
        given = {"messages": messages, "add_generation_prompt": True, "eos_token": "</s>"}
        assert found(**given) == want.render(**given)


def test_the_meter_is_cheap() -> None:
    turns = [
        {"role": role, "content": [text("words " * 2000)]} for role in ["user", "assistant"] * 10
    ]
    for source in (VICUNA, CHATML):
        taken = []
        for _ in range(3):  # a collection of garbage may fall into one
            began = time.process_time()
            run = Meter().compiled(source)
            run(messages=turns, add_generation_prompt=True, eos_token="</s>")
            taken.append(time.process_time() - began)
        assert min(taken) < 0.05


def test_a_template_at_fault_is_told_at_load(tmp_path: Path) -> None:
    ids = write_llama_like(tmp_path)
    config = model_config(image=ids["<image>"])
    path = tmp_path / "chat_template.jinja"
    for source, clue in (
        ("{{ raise_exception('only tools') }}", "only tools"),
        ("{{ 'a' * 10**10 }}", "too much text"),
        ("{{ 1 / 0 }}", "division by zero"),
    ):
        path.write_text(source)
        with pytest.raises(ModelError, match=clue) as e:
            open_chat(tmp_path, config)
        assert str(path) in str(e.value)
    wants_a_picture = "{% if '<image>' not in messages[0].content %}{{ 1 / 0 }}{% endif %}"
    path.write_text(wants_a_picture + "{{ messages[0].content }}")
    assert open_chat(tmp_path, config).render([user(IMAGE, text("q"))]) == "<image>\nq"


def test_no_memory_is_no_fault_of_the_template(tmp_path: Path) -> None:
    def starve() -> None:
        raise MemoryError

    write_llama_like(tmp_path, [])
    chat = open_chat(tmp_path, model_config("llama", "original"))
    object.__setattr__(chat.template, "source", lambda **names: starve())
    with pytest.raises(OutOfMemory, match="vicuna_v1"):
        chat.render([user(text("q"))])
