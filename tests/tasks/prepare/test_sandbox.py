"""A hostile template ends with an error, soon, and keeps its hands off everything."""

import resource
import time

import pytest

from regrow.tasks.prepare.example import RowError
from regrow.tasks.prepare.rendering import ChatTemplate

DIALOGUE = [{"role": "user", "content": "x"}]
LOOP = "{% for i in range(99999) %}"
HOSTILE = {
    "loops in loops": LOOP + LOOP + "{% set x = i %}{% endfor %}{% endfor %}",
    "calls of calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "endless calls": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "sorting again and again": "{% set x = range(99999) | list %}" + LOOP + "{{ x | sort | join }}"
    "{% endfor %}",
    "large product": "{{ 'a' * 1000000000 }}",
    "large power": "{{ 10 ** 100000000 }}",
    "doubling": "{% set n = namespace(x='aaaa') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "long output": "{% set x = 'a' * 1000000 %}" + LOOP + "{{ x }}{% endfor %}",
    "wide method": "{{ 'a'.ljust(10000000000) }}",
    "wide filter": "{{ 'a' | center(10000000000) }}",
    "wide format": "{{ '%9999999999d' % 3 }}",
    "wide format filter": "{{ '%9999999999d' | format(3) }}",
    "wide brace format": "{{ '{:>9999999999}'.format('a') }}",
    "width in an argument": "{{ '{:>{}}'.format('a', '9999999999') }}",
    "exact brace format": "{{ '{:.9999999999f}'.format(1.5) }}",
    "wide in a map": "{{ '{x:>9999999999}'.format_map({'x': 'a'}) }}",
    "many brace fields": "{{ ('{0:>99999}' * 100000).format('a') }}",
    "many fields": "{{ ('%(x)99999d' * 100000) % {'x': 3} }}",
    "width of an argument": "{{ '%*d' % (999999999, 3) }}",
    "wide JSON": "{{ range(100000) | list | tojson(indent=100000000) }}",
    "long join": "{{ ''.join(['a' * 1000000] * 10000) }}",
    "long replacement": "{{ ('a' * 10000000).replace('a', 'a' * 10000000) }}",
    "long replacement filter": "{{ ('a' * 10000000) | replace('a', 'a' * 10000000) }}",
    "text of its own": "{{ lipsum(100000) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_ends_with_an_error(name):
    template = ChatTemplate(HOSTILE[name], {})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    with pytest.raises(RowError, match="refuses this conversation"):
        template.render(DIALOGUE)
    assert time.process_time() - begin < 10
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000, "kilobytes of memory"


def test_limits_leave_long_dialogues_alone():
    """1000 messages of 10 000 characters, looked through by loops as real templates have them."""
    text = (
        "{%- for m in messages[::-1] -%}{%- set x = m.content.split('</think>')[-1] -%}"
        "{%- endfor -%}"
        "{%- for m in messages if m.role == 'user' -%}{{ m.content | trim }}{%- endfor -%}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    )
    messages = [{"role": "user", "content": "word " * 2000}] * 1000
    assert ChatTemplate(text, {}).render(messages).endswith("1000")


def test_usual_formatting_works():
    text = (
        "{{ '%s-%03d' % ('a', 7) }} {{ 7 % 4 }} {{ 3 * 2 }} {{ '=' * 3 }} {{ '{:>4}'.format('x') }}"
    )
    assert ChatTemplate(text, {}).render(DIALOGUE) == "a-007 3 6 ===    x"
