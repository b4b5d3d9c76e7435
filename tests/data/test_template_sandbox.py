"""Templates that would take hours or all memory are refused; what real templates do has its usual result."""

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmctl.config.errors import RequestError
from llmctl.data import template_sandbox
from llmctl.data.template_sandbox import Sandbox

TALK = [{"role": "user", "content": "a  b"}, {"role": "assistant", "content": "c", "tool_calls": [{"n": 1}]}]


def render(text, **values):
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    return sandbox.render(sandbox.from_string(text), {"messages": TALK, **values})


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{{ loop.index }}{{ m['role'] + ': ' + m.content | trim }}{% endfor %}",
        (
            "{% set n = namespace(x=1) %}{% for m in messages[::-1] if m.role != 'tool' %}{% set n.x = n.x ~ m.role %}"
            "{% endfor %}{{ n.x }}"
        ),
        "{% macro f(context, obj=2) %}{{ context }}{{ obj }}{% endmacro %}{{ f(1, obj=3) }}",
        "{% macro f(a) %}{{ a }}{{ caller() }}{% endmacro %}{% call f(4) %}x{% endcall %}",
        "{{ messages | tojson(indent=2) }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ messages | join('-', attribute='content') }}",
        "{{ '%-5s|%03d' % ('a', 7) }}{{ 'a %s' | format(3) }}",
        "{{ '{:>5}|{a!r:{w}}|{x[0]}'.format(1, a='b', w=6, x=[8]) }}",
        "{{ 'abc'.center(9) }}{{ 'a-b'.split('-') }}{{ 'aXbX'.replace('X', '--') }}{{ ','.join(['a', 'b']) }}",
        "{% if 'role' in messages[0] and messages[1].tool_calls is defined %}{{ 7 // 2 + 7 % 4 ** 2 }}{% endif %}",
        "{% set x %}a{{ 1 }}{% endset %}{{ x | upper | indent(2, true) }}{% filter lower %}B{% endfilter %}",
        "{{ {'a': 1, 'b': [2]} | dictsort }}{{ [3, 1] | sort }}{{ [1, 2] | sum }}{{ 'a' is in 'abc' }}{{ none }}",
        "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{{ '\n' * 2 }}{% endfor %}{{ x.y }}",
        "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}",
        "{{ 1.5 | round(1) }}{{ 2.345 | round(2) }}{{ 'a b c' | truncate(3) }}{{ [1, 2, 3] | batch(2) | list }}",
    ],
)
def test_ordinary_templates_are_as_in_jinja(text):
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    assert render(text, x={}) == plain.from_string(text).render(messages=TALK, x={})


NEST = "".join(f"{{% for {c} in range(99999) %}}" for c in "abcd") + "{% if false %}x{% endif %}" + "{% endfor %}" * 4
DOUBLE = "{% set n = namespace(x=START) %}{% for i in range(200) %}{% set n.x = STEP %}{% endfor %}"


@pytest.mark.parametrize(
    "text",
    [
        NEST,
        "{% for a in range(99999) %}{% for b in range(99999) if false %}x{% endfor %}{% endfor %}",
        "{% macro a(n) %}{{ a(n - 1) ~ a(n - 1) if n }}{% endmacro %}{{ a(60) }}",
        "{% block a %}{% for i in range(99999) %}{{ i }}{% endfor %}{% endblock %}{{ self.a() * 9 }}{{ self.a() }}",
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ ([0] * 10**10) | length }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 1.0 | round(10**10, 'ceil') }}",
        "{{ '%09999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '%.9999999999f' | format(1.0) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=9999999999) }}",
        "{{ 'a'.ljust(10**10) }}{{ 'a'.zfill(10**10) }}",
        "{{ '\t'.expandtabs(10**10) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a\nb' | indent(10**10) }}",
        "{{ [1] | batch(10**10, 0) | list }}",
        "{{ [1] | tojson(indent=10**10) }}",
        "{% set a = 'a' * 10**6 %}{{ a.replace('a', a) }}",
        "{% set a = 'a' * 10**6 %}{{ a | replace('a', a) }}",
        "{% set a = 'a' * 10**6 %}{{ a.join(range(99999) | map('string')) }}",
        "{{ range(99999) | join('a' * 10**6) }}",
        "{% set a = [{'x': 'a' * 10**6}] * 10**5 %}{{ a | join(attribute='x') }}",
        "{% set a = 'a' * 10**6 %}{{ ((a,) * 100) | string }}",
        "{% set a = 'a' * 10**6 %}{{ ('{0}' * 10**5).format(a) }}",
        "{% set a = 'a' * 10**6 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
        "{% set x %}{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}{% endset %}",
        "{% set a, b = 'a' * 10**7, 'a' * 10**7 %}{% for i in range(99999) %}{% if a == b %}{% endif %}{% endfor %}",
        "{% set a = 'a' * 10**7 %}{% for i in range(99999) %}{% set b = a[::-1] %}{% endfor %}",
        DOUBLE.replace("START", "'ab'").replace("STEP", "n.x ~ n.x"),
        DOUBLE.replace("START", "'ab'").replace("STEP", "n.x + n.x"),
        DOUBLE.replace("START", "[]").replace("STEP", "[n.x, n.x]") + "{{ n.x }}",
        DOUBLE.replace("START", "[]").replace("STEP", "[n.x, n.x]") + "{{ n.x | tojson }}",
        DOUBLE.replace("START", "()").replace("STEP", "(n.x, n.x)") + "{{ {n.x: 1} }}",
        DOUBLE.replace("START", "[]").replace("STEP", "[n.x, n.x]") + "{{ n.x == n.x }}",
        DOUBLE.replace("START", "[]").replace("STEP", "[n.x, n.x]") + "{{ '' ~ n.x }}",
        DOUBLE.replace("START", "0").replace("STEP", "namespace(a=n.x, b=n.x)") + "{{ n.x }}",
        "{% set a = 'a' * 10**7 %}{% for i in range(999) %}{{ a.rfind('b' + 'a' * 10**6) }}{% endfor %}",
        "a" * 1_000_001,
    ],
)
def test_templates_without_end_are_refused(text, monkeypatch):
    monkeypatch.setattr(template_sandbox, "TEMPLATE_STEPS", 300_000)  # as the full count, in less time
    with pytest.raises(RequestError, match=r"the template (takes|makes|has)"):
        render(text)


@pytest.mark.parametrize(
    "text",
    ["{{ lipsum(n=10**9) }}", "{{ 'a'.translate({97: 'b'}) }}", "{{ (1).to_bytes(10**10) }}", "{{ 'a' | urlize }}"],
)
def test_what_no_template_needs_is_not_there(text):
    with pytest.raises((TemplateError, TypeError)):
        render(text)


def test_a_long_conversation_is_far_from_the_limits():
    talk = [{"role": "user", "content": "word " * 200}] * 2000
    text = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content | trim }}{% endif %}{% endfor %}"
    assert len(render(text, messages=talk)) == 2000 * 999
