"""Chat templates: rendered as transformers renders them, and unable to do harm.

Each hostile template stands for a way to make much out of little. They all end in one line of PromptError or
BundleError, by a limit that is counted; the limit of seconds is tested with a clock that only moves when asked.
"""

from __future__ import annotations

import contextlib
import threading
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine import template as module
from siglance.engine.errors import BundleError, PromptError
from siglance.engine.template import MAX_SOURCE_CHARACTERS, ChatTemplate

from .tiny_tokenizer import GEMMA4_TEMPLATE

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}]
REFUSED = "^the chat template refused the conversation: "


def render(source: str, messages=MESSAGES, **variables) -> str:
    return ChatTemplate(source).render(messages, **variables)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{% if add_generation_prompt %}g{% endif %}", "<bos>g"),
        ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),  # trim_blocks, lstrip_blocks
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02345678"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'b': '<é>', 'a': [1, none, true]} | tojson }}", '{"b": "<é>", "a": [1, null, true]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ '<b>' }}{{ '<i>' | string }}{{ messages[0].content }}", "<b><i>hi"),  # nothing is escaped
        ("{{ 'a' ~ 1 ~ none ~ missing }}", "a1None"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ ', '.join(['a', 'b']) }}{{ 'aXbX'.replace('X', '-') }}{{ 'aXbX' | replace('X', '-') }}", "a, ba-b-a-b-"),
        ("{{ 'a,b'.split(',')[-1] }}{{ ' x '.strip() }}{{ messages[1:] | length }}{{ 'abc'[1:] }}", "bx1bc"),
        ("{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = ns.n * 2 %}{% endfor %}{{ ns.n }}", "4"),
        ("{% macro f(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ f(1) }}{{ f(3, y=4) }}", "[12][34]"),
        ("{% macro f(x) %}{{ x }}{{ caller() }}{% endmacro %}{% call f(3) %}c{% endcall %}", "3c"),
        ("{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{{ loop.last }};{% endfor %}", "a2False;b1True;"),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=user;content=hi;"),
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }} {% endfor %}", "1/2 2/2 "),
        ("{{ messages[0].get('x', 'd') }}{{ messages[0]['role'] }}{{ messages[0].role }}", "duseruser"),
        ("{% set x %}{{ 1 + 1 }}{% endset %}{{ x }}{% filter upper %}a{% endfilter %}", "2A"),
        ("{{ 7 // 2 }}{{ 7 % 2 }}{{ 2 ** 5 }}{{ 'a' * 3 }}{{ [1] + [2] }}{{ -3 | abs }}", "3132aaa[1, 2]3"),
        ("{{ messages is sequence }}{{ x is defined }}{{ 'a' in 'ab' }}{{ 'A' if x else 'B' }}", "TrueFalseTrueB"),
        ("{{ dict(a=1).a }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "11"),
        ("{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}", "123"),
        ("{% for x in missing %}x{% else %}none{% endfor %}", "none"),
    ],
)  # fmt: skip
def test_renders_like_apply_chat_template(source, expected):
    assert render(source, bos_token="<bos>", add_generation_prompt=True) == expected


def test_strftime_now():
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_a_full_template():
    messages = [
        {"role": "system", "content": " s "},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " q "}]},
    ]
    assert render(GEMMA4_TEMPLATE, messages, bos_token="<bos>", add_generation_prompt=True) == (
        "<bos><|turn>system\ns<turn|>\n<|turn>user\n<|image|>q<turn|>\n<|turn>model\n"
    )


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "roles must alternate"),
        ("{{ missing.name }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages() }}", "'list' object is not callable"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ raise_exception('x' * 5000) }}", "x{299}…$"),
    ],
)
def test_errors_are_one_line(source, reason):
    with pytest.raises(PromptError, match=REFUSED + reason) as caught:
        render(source)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% if %}", "does not compile, line 1: Expected an expression"),
        ("\n{{ 'x' | center(9) }}", "does not compile, line 2: No filter named 'center'"),
        ("{% include 'x' %}", "does not compile, line 1: a chat template cannot use 'include'"),
        ("{% block a %}{% endblock %}", "a chat template cannot use 'block'"),
        ("{% autoescape true %}{% endautoescape %}", "a chat template cannot use"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "does not compile: maximum recursion depth exceeded"),
        ("{{ " + "9" * 5000 + " }}", "does not compile: Exceeds the limit"),
        ("x" * (MAX_SOURCE_CHARACTERS + 1), "has 262145 characters, the limit is 262144 characters"),
    ],
)  # fmt: skip
def test_what_does_not_compile_is_a_bundle_error(source, reason):
    with pytest.raises(BundleError, match=reason):
        ChatTemplate(source)


# -- untrusted templates ---------------------------------------------------------------------------------------------

DOUBLING = "{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{{{{ ns.x }}}}"


def doubling(start: str, step: str) -> str:
    return DOUBLING.format(start=start, step=step)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ ('f' * 100000) | int(base=16) * 2 }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ (10 ** 9) * (0, 0) }}",
        doubling("'ab'", "{% set ns.x = ns.x + ns.x %}"),
        doubling("'ab'", "{% set ns.x = ns.x ~ ns.x %}"),
        doubling("'ab'", "{% set ns.x = [ns.x, ns.x] | join %}"),
        doubling("'ab'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        doubling("['ab']", "{% set ns.x = [ns.x, ns.x] %}"),
        doubling("('ab',)", "{% set ns.x = (ns.x, ns.x) %}"),
        doubling("{}", "{% set ns.x = {1: ns.x, 2: ns.x} %}"),
        doubling("{}", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
        doubling("2", "{% set ns.x = ns.x * ns.x %}"),
        "{% macro f(n) %}{% if n < 30 %}{{ f(n + 1) ~ f(n + 1) ~ 'x' * 999 }}{% endif %}{% endmacro %}{{ f(0) }}",
        "{{ ('a' * 100000).replace('', 'b' * 1000) }}",
        "{{ ('a' * 100000) | replace('', 'b' * 1000) }}",
        "{{ ('b' * 10000).join(range(100000) | map('string')) }}",
        "{{ range(100000) | join('b' * 10000) }}",
        "{{ range(100000) | map('string') | map('replace', '', 'a' * 1000) | list | length }}",
        "{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}",
        "{% for i in range(100000) %}" + "x" * 10000 + "{% endfor %}",
        "{% set x %}{% for i in range(100000) %}" + "x" * 10000 + "{% endfor %}{% endset %}",
        "{% set s = 'x' * 900000 %}{% set ns = namespace(n=0) %}"
        "{% for i in range(100000) %}{% set ns.n = namespace(n=ns.n, s=s[i:]) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(100) recursive %}{{ loop(range(100)) }}{% endfor %}",
        "{{ range(10 ** 9) | list }}",
        "{{ '{:>1000000000}'.format('x') }}",
        "{{ '{x:>1000000000}'.format_map({'x': 1}) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'x'.center(10 ** 9) }}",
        "{{ 'x'['ljust'](10 ** 9) }}",
        "{{ (1).to_bytes(10 ** 9) }}",
        "{{ messages | tojson(indent=10 ** 9) }}",
        "{{ range(9) | list | tojson(separators=('x' * 100, 'y')) }}",
        "{{ strftime_now('%Y' * 1000) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__['x'] }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ lipsum(n=10 ** 6) }}",
        "{{ cycler(1) }}",
    ],
)
def test_hostile_templates_end_in_one_line(monkeypatch, source):
    monkeypatch.setattr(module, "_VALUE_FLOOR", 100_000)  # a tenth, for speed
    template = ChatTemplate(source)
    with pytest.raises(PromptError, match=REFUSED) as caught:
        template.render(MESSAGES)
    assert "\n" not in str(caught.value)
    assert "seconds" not in str(caught.value)  # the counted limits come first
    assert MESSAGES[0] == {"role": "user", "content": "hi"}


class Clock:
    """A clock that moves by `step` seconds each time it is read."""

    def __init__(self, step: float):
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(3000) %}{% endfor %}",  # prints nothing, calls nothing
        "{% for i in range(3000) %}{% if 'xy' in messages[0].content %}{% endif %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(9) }}",
        "{{ range(3000) | map('string') | join }}",
    ],
)
def test_time_is_limited_wherever_it_is_spent(monkeypatch, source):
    template = ChatTemplate(source)
    template.render(MESSAGES)
    monkeypatch.setattr(module, "time", Clock(0.01))
    with pytest.raises(PromptError, match="the template runs for more than 5 seconds"):
        template.render(MESSAGES)


def test_the_limits_grow_with_the_conversation():
    text = "word " * 400_000
    messages = [{"role": "user", "content": text}]
    rendered = render(GEMMA4_TEMPLATE, messages, bos_token="<bos>", add_generation_prompt=True)
    assert rendered == f"<bos><|turn>user\n{text.strip()}<turn|>\n<|turn>model\n"


def test_a_template_may_walk_a_long_history_for_each_message():
    """Gemma 4's own template looks back from each message; 300 messages are 45,000 steps."""
    back = "{% for i in range(loop.index0) %}{% if messages[i].role %}{% endif %}{% endfor %}"
    look_back = f"{{% for m in messages %}}{back}{{% endfor %}}ok"
    assert render(look_back, MESSAGES * 150) == "ok"


def test_after_a_refusal_the_template_works_again():
    template = ChatTemplate("{{ 'x' * n }}")
    for _ in range(3):
        with pytest.raises(PromptError):
            template.render(MESSAGES, n=10**9)
        assert template.render(MESSAGES, n=3) == "xxx"


def test_threads_take_turns():
    template = ChatTemplate("{% for i in range(200) %}{{ name }}{% endfor %}")
    found: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: template.render(MESSAGES, name=name)}))
        for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: name * 200 for name in "abcd"}


SCRAPS = ["{{", "}}", "{%", "%}", " x ", "for i in range(9)", "endfor", "|", "'a'", "~", "(", ")"]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(SCRAPS), max_size=10).map("".join))
def test_any_source_compiles_and_renders_or_is_refused(source):
    with contextlib.suppress(BundleError, PromptError):
        assert isinstance(render(source), str)
