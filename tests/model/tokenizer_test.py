"""Tokenizers against transformers, on folders laid out as published models have them."""

import functools
import io
import json
import sys

import hypothesis
import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import strategies as st

from model import tokenizer as tokenizer_lib
from model.tokenizer import END_OF_TEXT, Tokenizer

TEXTS = [
  'def main(argv):\n    return 1234 + 5678\n',
  'Grüße, 日本語 and 😀 emoji; naïve café.',
  "  leading, trailing  \n\n\ttabs, it's    spaced   ",
  'a combining e\u0301 and a family 👨‍👩‍👧',
]
CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
  {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
LLAMA2 = (
  "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
  "[/INST]{% else %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
  '{% endif %}{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}'
)
MESSAGES = [
  {'role': 'user', 'content': 'Is 1 < 2 & "so"? é日'},
  {'role': 'assistant', 'content': ' Yes. ', 'tool_calls': None},
  {'role': 'user', 'content': 'Thanks.'},
]


@pytest.fixture(scope='module')
def trained():
  return Tokenizer.train_bpe(TEXTS, 350)


@pytest.fixture(scope='module')
def sentencepiece_model():
  return _train_sentencepiece()


def _train_sentencepiece():
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([line for text in TEXTS for line in text.splitlines()] * 30),
    model_writer=model,
    vocab_size=380,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  return model.getvalue()


def _folder(path, files):
  path.mkdir(parents=True, exist_ok=True)
  for name, value in files.items():
    data = value if isinstance(value, bytes) else value.encode()
    (path / name).write_bytes(data)
  return path


def _with(trained, **settings):
  config = {**json.loads(trained.files['tokenizer_config.json']), **settings}
  return {'tokenizer.json': trained.files['tokenizer.json'], 'tokenizer_config.json': config}


def _write(path, files):
  dump = lambda v: v if isinstance(v, bytes | str) else json.dumps(v)
  return _folder(path, {name: dump(value) for name, value in files.items()})


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.text())
def test_trained_bpe_is_lossless(text):
  tokenizer = _shared_tokenizer()
  ids, ends = tokenizer.encode_with_bytes(text)
  assert tokenizer.decode(ids) == text
  assert list(ids) == tokenizer.encode(text)
  assert np.all(np.diff(ends) >= 0)
  assert (ends[-1] if len(ends) else 0) == len(text.encode())


@functools.cache  # hypothesis refuses fixtures of a function's scope
def _shared_tokenizer():
  return Tokenizer.train_bpe(TEXTS, 320)


def test_training_is_deterministic_and_splits_digits(trained):
  again = Tokenizer.train_bpe(TEXTS, 350)
  assert again.files == trained.files
  vocabulary = json.loads(trained.files['tokenizer.json'])['model']['vocab']
  assert not [t for t in vocabulary if len(t) > 1 and any(c.isdigit() for c in t)]
  assert trained.vocab_size == 350 == len(vocabulary)
  assert trained.bos_id == 0 and trained.eos_ids == (0,)
  assert trained.encode(f'a{END_OF_TEXT}b')[1] == 0


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
  with pytest.raises(ValueError, match='at least 257 tokens, not 256'):
    Tokenizer.train_bpe(TEXTS, 256)


def test_byte_ends_of_multi_byte_text(trained):
  text = 'é日😀 x'  # 2 + 3 + 4 + 1 + 1 bytes
  ids, ends = trained.encode_with_bytes(text)
  assert ids.dtype == np.int32 and ends.dtype == np.int64
  assert ends[-1] == 11
  prefix = text.encode()
  for i, end in enumerate(ends):
    # Every prefix of tokens spells a part of the bytes that it is said to cover.
    assert prefix[:end].decode().startswith(trained.decode(ids[: i + 1]).rstrip('\ufffd'))


def test_white_space_is_covered_whatever_the_post_processor(trained, tmp_path):
  data = json.loads(trained.files['tokenizer.json'])
  processor = tokenizers.processors.ByteLevel(trim_offsets=True)
  data['post_processor'] = json.loads(processor.__getstate__())
  data['truncation'] = {
    'max_length': 2,
    'stride': 0,
    'strategy': 'LongestFirst',
    'direction': 'Right',
  }
  loaded = Tokenizer.load(_write(tmp_path, {'tokenizer.json': json.dumps(data)}))
  text = '  \n a b  \n\n'
  assert loaded.encode_with_bytes(text)[1][-1] == len(text)
  assert loaded.encode(text) == trained.encode(text)


def test_save_is_read_by_transformers_and_again(trained, tmp_path):
  trained.save(tmp_path)
  llama = transformers.LlamaConfig(
    vocab_size=350, bos_token_id=0, eos_token_id=0, hidden_size=8, num_attention_heads=1
  )
  for with_config in (False, True):
    if with_config:
      llama.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (
      (again.bos_id, again.eos_ids) == (theirs.bos_token_id, (theirs.eos_token_id,)) == (0, (0,))
    )
    for text in TEXTS:
      ids = trained.encode(text)
      assert ids == theirs.encode(text, add_special_tokens=False) == again.encode(text)
      assert theirs.decode(ids) == text
    assert again.encode_many(TEXTS) == [trained.encode(text) for text in TEXTS]


def test_save_keeps_fields_that_are_not_read(trained, tmp_path):
  files = _with(trained, model_max_length=77, extra={'a': [1]})
  loaded = Tokenizer.load(_write(tmp_path / 'in', files))
  loaded.save(tmp_path / 'out')
  written = json.loads((tmp_path / 'out' / 'tokenizer_config.json').read_text())
  assert written == files['tokenizer_config.json']


@pytest.mark.parametrize('tools', [None, [{'name': 'f', 'description': '<b> & é'}]])
@pytest.mark.parametrize('template', [CHATML, LLAMA2])
@pytest.mark.parametrize('prompt', [True, False])
def test_chat_template_equals_transformers(trained, tmp_path, template, prompt, tools):
  token = {'content': END_OF_TEXT, 'lstrip': False, 'normalized': False, '__type': 'AddedToken'}
  files = _with(trained, eos_token=token, chat_template=template)
  ours = Tokenizer.load(_write(tmp_path, files))
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  want = theirs.apply_chat_template(
    MESSAGES, tokenize=False, add_generation_prompt=prompt, tools=tools
  )
  got = ours.apply_chat_template(MESSAGES, add_generation_prompt=prompt, tools=tools)
  assert got == want
  assert ours.encode(got) == theirs.encode(want, add_special_tokens=False)


def test_chat_template_of_its_own_file_wins_and_named_ones_are_found(trained, tmp_path):
  named = [{'name': 'tool_use', 'template': 'no'}, {'name': 'default', 'template': 'default'}]
  files = _with(trained, chat_template=named)
  assert Tokenizer.load(_write(tmp_path, files)).apply_chat_template(MESSAGES) == 'default'
  folder = _write(tmp_path, {'chat_template.jinja': 'file'})
  assert Tokenizer.load(folder).apply_chat_template(MESSAGES) == 'file'


@pytest.mark.parametrize(
  'template, match',
  [
    (CHATML, 'unknown role robot'),
    ('{{ messages.append(1) }}', 'append'),
    ("{{ ''.__class__.__mro__ }}", '__class__|unsafe'),
    ('{% for %}', 'chat template failed: TemplateSyntaxError'),
    ('{{ 1 / 0 }}', 'chat template failed: ZeroDivisionError: division by zero'),
    ("{{ 'a' + 1 }}", 'chat template failed: TypeError'),
    ('{{ messages[0].content.nothing.at_all }}', 'chat template failed: UndefinedError'),
    ("{{ {}['x'] | int('a') + [] }}", 'chat template failed'),
    ('{% for i in range(10 ** 9) %}{% endfor %}', 'chat template failed: OverflowError'),
    ("{{ '%d' % 'x' }}", 'chat template failed: TypeError'),
    ("{{ 'x'.encode('ascii').decode(3) }}", 'chat template failed: TypeError'),
    ('{{ strftime_now(3) }}', 'chat template failed: TypeError'),
    ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'chat template failed: RecursionError'),
    ('{{ messages | tojson(indent=[]) }}', 'chat template failed: TypeError'),
    (3, 'a chat template is a text, not int'),
    ([{'name': 'default'}], "chat template is corrupt: KeyError\\('template'\\)"),
    (['x'], 'chat template is corrupt: TypeError'),
  ],
)
def test_chat_templates_fail_as_value_errors(trained, tmp_path, template, match):
  ours = Tokenizer.load(_write(tmp_path, _with(trained, chat_template=template)))
  with pytest.raises(ValueError, match=match):
    ours.apply_chat_template([{'role': 'robot', 'content': 'x'}])


def test_bad_messages_and_a_missing_template(trained, tmp_path):
  with pytest.raises(ValueError, match='no chat template'):
    trained.apply_chat_template(MESSAGES)
  ours = Tokenizer.load(_write(tmp_path, _with(trained, chat_template='x')))
  with pytest.raises(ValueError, match='at least one message'):
    ours.apply_chat_template([])
  circular = {'role': 'user'}
  circular['content'] = circular
  for messages in (['x'], [3], 'hello', 3, [circular], [{('a',): 1}]):
    with pytest.raises(ValueError, match='messages'):
      ours.apply_chat_template(messages)
  with pytest.raises(ValueError, match='JSON'):
    ours.apply_chat_template([{'role': 'user', 'content': object()}])


@pytest.mark.parametrize(
  'settings, generation, model, want',
  [
    ({}, {'eos_token_id': [5, 0, 9], 'bos_token_id': 7}, None, (0, (0, 5, 9))),
    ({'bos_token': None}, {'bos_token_id': 7}, None, (None, (0,))),
    ({'eos_token': {'content': 'a'}}, {'eos_token_id': 3}, None, (0, ('a', 3))),
    (None, None, {'bos_token_id': 1, 'eos_token_id': [2, 3]}, (1, (2, 3))),
    (None, {'eos_token_id': 4}, {'bos_token_id': 1, 'eos_token_id': [2, 3]}, (None, (4,))),
    (None, None, None, (None, ())),
  ],
)
def test_special_ids(trained, tmp_path, settings, generation, model, want):
  files = _with(trained, **(settings or {}))
  if settings is None:
    del files['tokenizer_config.json']
  files |= {'generation_config.json': generation} if generation else {}
  files |= {'config.json': model} if model else {}
  loaded = Tokenizer.load(_write(tmp_path / 'in', files))
  number = lambda i: trained.encode(i)[0] if isinstance(i, str) else i
  want = want[0], tuple(map(number, want[1]))
  assert (loaded.bos_id, loaded.eos_ids) == want
  loaded.save(tmp_path / 'out')  # without config.json
  again = Tokenizer.load(tmp_path / 'out')
  assert (again.bos_id, again.eos_ids) == want


def test_special_tokens_map_is_read(trained, tmp_path):
  files = _with(trained) | {'special_tokens_map.json': {'eos_token': {'content': END_OF_TEXT}}}
  del files['tokenizer_config.json']
  assert Tokenizer.load(_write(tmp_path, files)).eos_ids == (0,)


def test_encode_adds_nothing_and_a_prompt_what_its_files_say(trained, tmp_path):
  ids = trained.encode('ab')
  assert trained.prompt('ab') == ids and 0 not in ids
  files = _with(trained)
  data = json.loads(files['tokenizer.json'])
  processor = tokenizers.processors.TemplateProcessing(
    single=f'{END_OF_TEXT} $A', pair=None, special_tokens=[(END_OF_TEXT, 0)]
  )
  data['post_processor'] = json.loads(processor.__getstate__())
  with_bos = Tokenizer.load(_write(tmp_path, files | {'tokenizer.json': data}))
  assert with_bos.prompt('ab') == [0, *ids] and with_bos.prompt('') == [0]
  assert with_bos.encode('ab') == ids and with_bos.encode_many(['ab']) == [ids]
  assert with_bos.encode_with_bytes('ab')[0].tolist() == ids
  assert with_bos.decode([0, *ids], skip_special=True) == 'ab'


def test_sentencepiece_equals_the_library_and_round_trips(sentencepiece_model, tmp_path):
  files = {
    'tokenizer.model': sentencepiece_model,
    'added_tokens.json': {'<|im_start|>': 380, '<|im_end|>': 381},
    'tokenizer_config.json': {
      'eos_token': '<|im_end|>',
      'bos_token': '<s>',
      'additional_special_tokens': ['<|im_start|>'],
    },
  }
  ours = Tokenizer.load(_write(tmp_path / 'in', files))
  library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
  assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, (381,), 382)
  for text in TEXTS:
    ids, ends = ours.encode_with_bytes(text)
    assert list(ids) == library.encode(text) and ours.decode(ids) == text
    assert np.all(np.diff(ends) >= 0) and ends[-1] == len(text.encode())
  ids, ends = ours.encode_with_bytes('<|im_start|>é<s>x<|im_end|>')
  assert [ids[0], ids[-1]] == [380, 381] and 1 in ids
  assert [ends[0], ends[-1]] == [12, len('<|im_start|>é<s>x<|im_end|>'.encode())]
  assert ours.decode([380, *library.encode('é'), 381]) == '<|im_start|> é<|im_end|>'
  assert ours.decode([380, *library.encode('é'), 381], skip_special=True) == 'é'
  ours.save(tmp_path / 'out')
  assert Tokenizer.load(tmp_path / 'out').files == ours.files
  assert (tmp_path / 'out' / 'tokenizer.model').read_bytes() == sentencepiece_model


def test_saved_sentencepiece_folder_loads_in_transformers(sentencepiece_model, tmp_path):
  files = {
    'tokenizer.model': sentencepiece_model,
    'tokenizer_config.json': {
      'tokenizer_class': 'LlamaTokenizer',
      'bos_token': '<s>',
      'eos_token': '</s>',
      'unk_token': '<unk>',
    },
  }
  ours = Tokenizer.load(_write(tmp_path / 'in', files))
  ours.save(tmp_path / 'out')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  text = 'def main(argv): return 1 + 日本 😀'
  assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
  assert ours.bos_id == theirs.bos_token_id and ours.eos_ids == (theirs.eos_token_id,)


def test_sentencepiece_files_need_no_other_library(sentencepiece_model, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'sentencepiece', None)
  monkeypatch.setitem(sys.modules, 'google.protobuf', None)
  assert Tokenizer.load(_write(tmp_path, {'tokenizer.model': sentencepiece_model})).encode('x')


@pytest.mark.parametrize(
  'files, match',
  [
    ({'tokenizer.json': '{"version": '}, 'tokenizer.json is corrupt'),
    ({'tokenizer.json': b'\xff\xfe'}, 'tokenizer.json is corrupt'),
    ({'tokenizer.model': b'junk'}, 'tokenizer.model is corrupt'),
    ({'tokenizer.model': b''}, 'tokenizer.model is corrupt'),
    ({'tokenizer_config.json': '{'}, 'tokenizer_config.json is corrupt'),
    ({'tokenizer_config.json': '[]'}, 'should hold an object, not list'),
    ({'tokenizer_config.json': '{"eos_token": "<nope>"}'}, "eos_token '<nope>' is not in the voc"),
    ({'generation_config.json': '{"eos_token_id": ["a"]}'}, 'should be an id or a list of ids'),
  ],
)
def test_corrupt_files_are_named(trained, tmp_path, files, match):
  base = {} if 'tokenizer.model' in files else {'tokenizer.json': trained.files['tokenizer.json']}
  with pytest.raises(ValueError, match=match) as error:
    Tokenizer.load(_write(tmp_path, base | files))
  assert str(tmp_path) in str(error.value)


def test_a_folder_without_a_tokenizer_gives_none(tmp_path):
  assert Tokenizer.load(_write(tmp_path, {'tokenizer_config.json': '{}'})) is None


@pytest.mark.parametrize('data', [b'', b' \n', b'{}'])
def test_an_empty_generation_config_says_nothing(trained, tmp_path, data):
  files = _with(trained) | {'generation_config.json': data}
  loaded = Tokenizer.load(_write(tmp_path, files))
  assert (loaded.bos_id, loaded.eos_ids) == (0, (0,))


def test_a_pad_token_beyond_the_models_rows_is_no_matter(trained, tmp_path):
  loaded = Tokenizer.load(_write(tmp_path / 'pad', _with(trained, pad_token='[PAD]')))
  assert loaded.encode('[PAD]') == [350]
  tokenizer_lib.check(loaded, 350)
  with pytest.raises(ValueError, match='ids up to 349, but the model has a vocabulary of 349'):
    tokenizer_lib.check(loaded, 349)
  files = _with(trained, eos_token='<end>') | {'added_tokens.json': {'<end>': 350}}
  with pytest.raises(ValueError, match='ids up to 350, but the model has a vocabulary of 350'):
    tokenizer_lib.check(Tokenizer.load(_write(tmp_path / 'end', files)), 350)


def test_check_names_both_sizes(trained):
  tokenizer_lib.check(trained, 350)
  tokenizer_lib.check(trained, 512)  # published models pad their vocabularies
  with pytest.raises(ValueError, match='ids up to 349, but the model has a vocabulary of 300'):
    tokenizer_lib.check(trained, 300)
