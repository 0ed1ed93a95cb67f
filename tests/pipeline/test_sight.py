"""Which templates keep a text in sight."""

from __future__ import annotations

import pytest

from pipeline.sight import in_sight

_CONTENT = "messages[0].content"
_IN_SIGHT = {
    "roles and generation prompt": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    ),
    "what Llama 3.1's does with tools": (
        "{%- if tools is not none %}{{- 'Tools: ' + builtin_tools | reject('equalto', 'code') | join(', ') + '\n' }}"
        "{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}"
        "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}{%- endif %}"
        "{%- for m in messages %}{%- if 'tool_calls' in m %}{%- if not m.tool_calls|length == 1 %}{{- raise_exception('one') }}{%- endif %}"
        "{%- elif builtin_tools is defined and m.tool_calls[0].function.name in builtin_tools %}{{- m.tool_calls[0].function.name }}"
        "{%- elif m.role == 'tool' or m.role in ['ipython', 'x'] %}{{- m.content | tojson }}{%- else %}{{- m.content | trim + '<|e|>' }}"
        "{%- endif %}{%- endfor %}"
    ),
    "turns that alternate": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    ),
    "a namespace": (
        "{% set ns = namespace(found=false) %}{% for m in messages %}"
        "{% set ns.found = true %}{% if ns.found %}{% break %}{% endif %}{% endfor %}"
    ),
    "a text joined where it is put out": f"{{{{ 'a' ~ {_CONTENT} + 'b' }}}}",
    "a method with constants": f"{{{{ {_CONTENT}.split('</think>')[-1] }}}}",
}
_OUT_OF_SIGHT = {
    "a macro": "{% macro say(text) %}{{ text }}{% endmacro %}{{ say(messages[0].content) }}",
    "a call": "{% macro b() %}{{ caller() }}{% endmacro %}{% call b() %}{{ messages[0].content }}{% endcall %}",
    "a set with a body": "{% set text %}{{ messages[0].content }}{% endset %}{{ text }}",
    "a filter with a body": "{% filter trim %}{{ messages[0].content }}{% endfilter %}",
    "a block": "{% block b %}{{ messages[0].content }}{% endblock %}{{ self.b() }}",
    "an include": "{% include 'other' %}",
    "joined, then looked at": f"{{{{ ('a' ~ {_CONTENT}).startswith('ab') }}}}",
    "joined, then kept": f"{{% set x = 'a' ~ {_CONTENT} %}}{{{{ x }}}}",
    "joined by a filter, then looked at": f"{{{{ ([{_CONTENT}] | join).startswith('a') }}}}",
    "joined by a method": f"{{{{ ''.join([{_CONTENT}]) }}}}",
    "formatted": f"{{{{ '%s' % {_CONTENT} }}}}",
    "formatted by a method": f"{{{{ '{{}}'.format({_CONTENT}) }}}}",
    "called safe": f"{{{{ ({_CONTENT} | safe).startswith('a') }}}}",
    "counted in words": f"{{% if {_CONTENT} | wordcount > 3 %}}long{{% endif %}}",
    "read as a number": f"{{% if {_CONTENT} | int == 5 %}}five{{% endif %}}",
    "as JSON, then looked at": f"{{% if ({_CONTENT} | tojson)[1] == 'a' %}}a{{% endif %}}",
    "looked up in a text": f"{{% if {_CONTENT} in 'some words' %}}known{{% endif %}}",
    "a kept text, looked up in a text": (
        "{% set ns = namespace(name='') %}{% set ns.name = messages[0].content %}{% if ns.name in 'some words' %}known{% endif %}"
    ),
    "a text in a mapping, looked up in a text": "{% if {'name': messages[0].content}['name'] in 'some words' %}known{% endif %}",
    "a text under a made-up key": "{% if {'na' + 'me': messages[0].content}.name in 'some words' %}known{% endif %}",
    "looked up in a text by a test": f"{{% if {_CONTENT} is in 'some words' %}}known{{% endif %}}",
    "looked up in a text by a filter": f"{{{{ [{_CONTENT}] | select('in', 'some words') | list }}}}",
    "looked up by a method": f"{{{{ 'some words'.find({_CONTENT}) }}}}",
    "put into another by a filter": f"{{{{ ('x' | replace('x', {_CONTENT})).startswith('a') }}}}",
    "a filter by its name": f"{{{{ [{_CONTENT}] | map('wordcount') | list }}}}",
    "a time's format": f"{{{{ strftime_now({_CONTENT}).startswith('a') }}}}",
    "a function that is not known": f"{{{{ lipsum({_CONTENT}) }}}}",
    "a loop in itself": "{% for m in messages recursive %}{{ loop(m.content) }}{% endfor %}",
    "no template at all": "{% if %}",
    "an extension's tag": "{% generation %}x{% endgeneration %}",
}


@pytest.mark.parametrize("template", _IN_SIGHT.values(), ids=_IN_SIGHT)
def test_a_text_that_only_its_own_methods_look_at_is_in_sight(template: str) -> None:
    assert in_sight(template)


@pytest.mark.parametrize("template", _OUT_OF_SIGHT.values(), ids=_OUT_OF_SIGHT)
def test_a_text_of_which_a_copy_may_be_looked_at_is_out_of_sight(template: str) -> None:
    assert not in_sight(template)
