"""Tests the assistant's tokens against transformers and against pictures of known templates."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
import tokenizers
import transformers

from model.tokenizer import Tokenizer
from model.train import chats
from model.train.chats import Chat

SPECIAL = (
  *('<|im_start|>', '<|im_end|>', '<start_of_turn>', '<end_of_turn>', '<bos>'),
  *('<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'),
)
CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + "
  "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
  "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
  "'<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
  '{% endif %}'
)
GEMMA = (
  "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
  "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else "
  "m['role'] %}{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PLAIN = (
  "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Forgets what the assistant said in earlier turns, as templates of reasoning models do.
FORGETFUL = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + (m['content'] if loop.last or "
  "m['role'] == 'user' else '') + '<|im_end|>\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GENERATION = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
  "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
  "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)
USER = {'role': 'user', 'content': 'Hi é日?'}
REPLY = {'role': 'assistant', 'content': 'Yes, 日本 😀.'}
TURNS = (USER, REPLY, {'role': 'user', 'content': ' a b '}, {'role': 'assistant', 'content': 'c\n'})


def _tokenizer(template, vocab_size=300):
  """Byte-level tokens and a few merges, with the special tokens of all templates."""
  text = 'user assistant Yes, model: 日本 \n\n Hi é日?'
  base = Tokenizer.train_bpe([text] * 3, vocab_size)
  inner = tokenizers.Tokenizer.from_str(base.files['tokenizer.json'].decode())
  inner.add_special_tokens(list(SPECIAL))
  settings = json.loads(base.files['tokenizer_config.json']) | {'chat_template': template}
  return Tokenizer.from_files(
    {
      'tokenizer.json': inner.to_str().encode(),
      'tokenizer_config.json': json.dumps(settings).encode(),
    }
  )


PICTURES = {
  'ChatML': (
    CHATML,
    TURNS,
    [
      ('<|im_start|>user\nHi é日?<|im_end|>\n<|im_start|>assistant\n', 0),
      ('Yes, 日本 😀.<|im_end|>', 1),
      ('\n<|im_start|>user\n a b <|im_end|>\n<|im_start|>assistant\n', 0),
      ('c\n<|im_end|>', 1),
      ('\n', 0),
    ],
  ),
  'Llama 3': (
    LLAMA3,
    ({'role': 'system', 'content': 'S'}, *TURNS[:3]),
    [
      ('<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>', 0),
      ('<|start_header_id|>user<|end_header_id|>\n\nHi é日?<|eot_id|>', 0),
      ('<|start_header_id|>assistant<|end_header_id|>\n\n', 0),
      ('Yes, 日本 😀.<|eot_id|>', 1),
      ('<|start_header_id|>user<|end_header_id|>\n\na b<|eot_id|>', 0),
    ],
  ),
  'Gemma': (
    GEMMA,
    TURNS,
    [
      ('<bos><start_of_turn>user\nHi é日?<end_of_turn>\n<start_of_turn>model\n', 0),
      ('Yes, 日本 😀.<end_of_turn>', 1),
      ('\n<start_of_turn>user\na b<end_of_turn>\n<start_of_turn>model\n', 0),
      ('c<end_of_turn>', 1),
      ('\n', 0),
    ],
  ),
  'no special tokens': (
    PLAIN,
    TURNS[:2],
    [('user: Hi é日?\nassistant: ', 0), ('Yes, 日本 😀.\n', 1)],
  ),
}


@pytest.mark.parametrize('name', PICTURES)
def test_the_assistants_tokens_in_a_picture(name):
  template, messages, pieces = PICTURES[name]
  tokenizer = _tokenizer(template, vocab_size=257)  # bytes, so that no token spans two pieces
  document = chats.encode(Chat(messages, 'here'), tokenizer)
  parts = [(tokenizer.encode(text), mark) for text, mark in pieces]
  assert document.ids.tolist() == [i for ids, _ in parts for i in ids]
  assert document.trained.tolist() == [bool(mark) for ids, mark in parts for _ in ids]


@pytest.mark.parametrize('vocab_size', [257, 300])
def test_generation_blocks_give_the_mask_of_transformers(vocab_size, tmp_path):
  tokenizer = _tokenizer(GENERATION, vocab_size)
  tokenizer.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for messages in (TURNS, TURNS[:3], ({'role': 'system', 'content': ''}, *TURNS)):
    want = theirs.apply_chat_template(
      list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    got = chats.encode(Chat(messages, 'here'), tokenizer)
    assert got.ids.tolist() == want['input_ids']
    assert got.trained.tolist() == [bool(mark) for mark in want['assistant_masks']]
    assert 0 < got.trained.sum() < len(got.ids)


def test_a_token_that_begins_before_the_reply_is_the_assistants():
  tokenizer = _tokenizer(PLAIN)
  document = chats.encode(Chat(TURNS[:2], 'here'), tokenizer)
  first = document.ids[document.trained][:1]
  assert tokenizer.decode(first)[:1] == ' ' and len(tokenizer.decode(first)) > 1


def test_both_ways_of_finding_the_assistant_agree():
  marked, plain = _tokenizer(GENERATION), _tokenizer(CHATML)
  for messages in (TURNS, TURNS[:2], TURNS[:3]):
    a, b = (chats.encode(Chat(messages, 'here'), t) for t in (marked, plain))
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.trained, b.trained)


@pytest.mark.parametrize(
  'template, messages, match',
  [
    (FORGETFUL, TURNS, r'here: the chat template does not put message 2 after an unchanged'),
    (CHATML, TURNS[1:], 'here: the conversation begins with the assistant'),
    (GEMMA, ({'role': 'system', 'content': 'S'}, *TURNS), 'here: .* no system role'),
    (None, TURNS, 'here: this tokenizer has no chat template'),
  ],
)
def test_templates_that_refuse_are_named(template, messages, match):
  with pytest.raises(ValueError, match=match):
    chats.encode(Chat(messages, 'here'), _tokenizer(template))


def test_a_forgetful_template_suits_single_turns():
  document = chats.encode(Chat(TURNS[:2], 'here'), _tokenizer(FORGETFUL))
  assert document.labels == len(_tokenizer(FORGETFUL).encode('Yes, 日本 😀.<|im_end|>'))


def _line(*messages):
  return json.dumps({'messages': messages, 'source': 'x'}, ensure_ascii=False)


@pytest.mark.parametrize('name, opening', [('a.jsonl', open), ('b.jsonl.gz', gzip.open)])
def test_files_are_read_with_their_lines(name, opening, tmp_path):
  with opening(tmp_path / name, 'wb') as file:
    file.write(('\ufeff' + _line(USER, REPLY) + '\n\n' + _line(*TURNS) + '\r\n').encode())
  first, second = chats.load(tmp_path / name)
  assert first.messages == (USER, REPLY) and second.messages == TURNS
  assert first.where.endswith(f'{name}, line 1') and second.where.endswith(f'{name}, line 3')
  assert chats.holds_chats(tmp_path / name)
  assert first.content != second.content
  assert first.content == dataclasses.replace(first, where='elsewhere').content


def test_files_of_text_hold_no_chats(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "x"}\n')
  (tmp_path / 'b.txt').write_text(_line(USER, REPLY))
  assert not any(chats.holds_chats(tmp_path / name) for name in ('a.jsonl', 'b.txt', 'c.jsonl'))


@pytest.mark.parametrize(
  'line, match',
  [
    ('{"messages": [', r'line 2: not JSON'),
    ('["a"]', r'line 2: expected an object with a list "messages"'),
    ('{"text": "a"}', r'line 2: expected an object with a list "messages"'),
    ('{"messages": []}', r'line 2: .*not empty'),
    (_line('a'), r'line 2, message 1: expected an object with "role"'),
    (_line(USER, {'role': 'bot', 'content': ''}), r"line 2, message 2: the role 'bot' is not one"),
    (_line({'content': 'a'}), r'line 2, message 1: the role None'),
    (_line(USER, {'role': 'assistant', 'content': None}), r'message 2: the content is NoneType'),
    (_line(USER, {'role': 'assistant', 'content': [1]}), r'message 2: the content is list'),
    (_line(USER), r"line 2: no message is the assistant's"),
  ],
)
def test_bad_lines_are_named(line, match, tmp_path):
  path = tmp_path / 'chats.jsonl'
  path.write_text(_line(USER, REPLY) + '\n' + line + '\n')
  with pytest.raises(ValueError, match=rf'chats\.jsonl, {match}|chats\.jsonl, line 2, {match}'):
    chats.load(path)


def test_missing_and_empty_files_are_named(tmp_path):
  with pytest.raises(ValueError, match=r'none\.jsonl: no such file'):
    chats.load(tmp_path / 'none.jsonl')
  (tmp_path / 'empty.jsonl').write_text('\n')
  with pytest.raises(ValueError, match=r'empty\.jsonl: the file holds no conversations'):
    chats.load(tmp_path / 'empty.jsonl')


def test_a_dataset_learns_what_the_assistant_says():
  tokenizer = _tokenizer(CHATML)
  conversations = [Chat((USER, REPLY), 'one'), Chat(TURNS, 'two')]
  dataset = chats.dataset(conversations, tokenizer, seq_len=120, batch_size=2)
  learned = []
  for batch in dataset.sequential():
    for labels in batch.labels_BT:
      learned.append(tokenizer.decode(labels[labels >= 0]))
  assert sorted(''.join(learned).split('<|im_end|>')) == [
    '',
    'Yes, 日本 😀.',
    'Yes, 日本 😀.',
    'c\n',
  ]
  counts = dataset.counts
  assert (counts.documents, counts.truncated, counts.dropped) == (2, 0, 0)
  assert counts.labels == sum(chats.encode(c, tokenizer).labels for c in conversations)
