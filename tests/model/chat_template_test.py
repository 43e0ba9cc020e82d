"""Tests where the text of generation blocks is; rendering itself is tested with tokenizers."""

import pytest

from model import chat_template

TEMPLATE = (
  "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}.\n"
  '{%- endgeneration %}\n{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}'
)
MESSAGES = [
  {'role': 'user', 'content': 'one'},
  {'role': 'assistant', 'content': 'two 日'},
  {'role': 'user', 'content': 'three'},
  {'role': 'assistant', 'content': ''},
]


def test_spans_are_the_text_of_the_blocks():
  text, spans = chat_template.render_with_spans(TEMPLATE, MESSAGES, {})
  assert text == chat_template.render(TEMPLATE, MESSAGES, {})
  assert [text[start:stop] for start, stop in spans] == ['two 日.', '.']
  assert spans[1][0] > spans[0][1]


@pytest.mark.parametrize('tag', ['{% generation %}', '{%- generation -%}', '{%generation%}'])
def test_blocks_are_found(tag):
  assert chat_template.has_generation_blocks(f'a{tag}b{{% endgeneration %}}')
  assert not chat_template.has_generation_blocks('{% if add_generation_prompt %}x{% endif %}')


def test_a_block_that_is_left_has_no_end():
  template = (
    '{% for m in messages %}{% generation %}{{ m.content }}{% break %}{% endgeneration %}'
    '{% endfor %}'
  )
  with pytest.raises(ValueError, match='do not begin and end in pairs'):
    chat_template.render_with_spans(template, MESSAGES, {})


def test_marks_in_the_messages_are_refused():
  messages = [{'role': 'assistant', 'content': 'a\ufdd0b'}]
  with pytest.raises(ValueError, match=r'U\+FDD0'):
    chat_template.render_with_spans(TEMPLATE, messages, {})
  assert chat_template.render(TEMPLATE, messages, {}) == 'A:a\ufdd0b.'


def test_a_message_that_only_calls_tools_has_its_content_there_and_other_keys_without_value_not():
  template = (
    "{% for m in messages %}{{ m['content'] is none }} {{ 'name' in m }} "
    "{{ m.get('content') or '' }}|{% endfor %}"
  )
  calling = {'role': 'assistant', 'content': None, 'name': None, 'tool_calls': []}
  text = chat_template.render(template, [calling, {'role': 'user', 'content': 'hi'}], {})
  assert text == 'True False |False False hi|'
