"""Every layout of a tokenizer's files against what transformers makes of the same folder."""

import io
import json

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from model import sentencepiece_model
from model.tokenizer import Tokenizer

CORPUS = [
  'def main(argv):\n    return 1234 + 5678  # and # the rest\n',
  "Grüße, 日本語 and 😀 emoji; naïve café. It's time that we can, and time can too.",
  '  leading, trailing  \n\n\ttabs, they are    spaced   ',
]
TEXTS = [
  *CORPUS,
  'time',
  ' time can',
  '▁time',
  '<s>hi',
  'a</s> b',
  '[INST] time [/INST]can',
  'x[INST]y  <pad>z',
  '<|im_start|>time<|im_end|>\n',
  'e\u0301 unseen: ☃ ʬ',
  '',
]
USER = ['[INST]', '[/INST]']


def _sentencepiece(**options):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([line for text in CORPUS for line in text.splitlines()] * 30),
    model_writer=model,
    **{
      'vocab_size': 400,
      'model_type': 'bpe',
      'byte_fallback': True,
      'normalization_rule_name': 'identity',
      'remove_extra_whitespaces': False,
      'hard_vocab_limit': False,
      'minloglevel': 2,
      **options,
    },
  )
  return model.getvalue()


@pytest.fixture(scope='module')
def spm():
  return _sentencepiece(user_defined_symbols=USER)


@pytest.fixture(scope='module')
def gemma_spm():
  return _sentencepiece(
    user_defined_symbols=['<mask>', '<start_of_turn>'],
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    bos_piece='<bos>',
    eos_piece='<eos>',
    add_dummy_prefix=False,
  )


def _byte_bpe(special=('<s>', '</s>')):
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=320,
    special_tokens=list(special),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(CORPUS * 5, trainer)
  return tokenizer


@pytest.fixture(scope='module')
def bpe():
  return _byte_bpe()


def _write(path, files):
  path.mkdir(parents=True, exist_ok=True)
  for name, value in files.items():
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    (path / name).write_bytes(data)
  return path


def _same(path, files) -> Tokenizer:
  """Compares the tokenizers of a folder, and of the folder that ours is saved to."""
  folder = _write(path / 'in', files)
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  ours = Tokenizer.load(folder)
  ours.save(path / 'out')  # without config.json
  for tokenizer in (ours, Tokenizer.load(path / 'out')):
    for text in TEXTS:
      raw = theirs(text, add_special_tokens=False)['input_ids']
      assert tokenizer.encode(text) == raw, text
      assert tokenizer.prompt(text) == theirs(text)['input_ids'], text
      for skip in (False, True):
        assert tokenizer.decode(raw, skip_special=skip) == theirs.decode(
          raw, skip_special_tokens=skip
        )
      ids, ends = tokenizer.encode_with_bytes(text)
      assert ids.tolist() == raw
      assert not raw or ends[-1] <= len(text.encode())
  return ours


SETTINGS = [
  {},
  {'legacy': True},
  {'legacy': False},
  {'add_prefix_space': False},
  {'add_prefix_space': False, 'legacy': True},
  {'add_bos_token': True},
  {'add_bos_token': True, 'add_eos_token': True, 'legacy': False},
  {
    'bos_token': '<s>',
    'eos_token': {'__type': 'AddedToken', 'content': '</s>', 'lstrip': True, 'rstrip': True},
  },
]


@pytest.mark.parametrize('settings', SETTINGS)
@pytest.mark.parametrize('kind', ['LlamaTokenizer', 'LlamaTokenizerFast', None])
@pytest.mark.parametrize('family', ['llama', 'mistral', 'phi3'])
def test_sentencepiece_alone(spm, tmp_path, family, kind, settings):
  config = {**settings, **({'tokenizer_class': kind} if kind else {})}
  files = {'tokenizer.model': spm, 'tokenizer_config.json': config}
  _same(tmp_path, files | {'config.json': {'model_type': family}})


@pytest.mark.parametrize('kind', ['GemmaTokenizer', 'GemmaTokenizerFast', None])
@pytest.mark.parametrize('add_bos', [True, False])
def test_sentencepiece_of_gemma(gemma_spm, tmp_path, kind, add_bos):
  config = {'add_bos_token': add_bos, **({'tokenizer_class': kind} if kind else {})}
  files = {'tokenizer.model': gemma_spm, 'tokenizer_config.json': config}
  ours = _same(tmp_path, files | {'config.json': {'model_type': 'gemma2'}})
  assert (ours.bos_id, ours.eos_ids) == (2, (1,))


@pytest.mark.parametrize('legacy', [True, False])
@pytest.mark.parametrize(
  'options',
  [
    {'model_type': 'unigram', 'vocab_size': 340, 'user_defined_symbols': USER},
    {'normalization_rule_name': 'nmt_nfkc', 'remove_extra_whitespaces': True},
    {'byte_fallback': False},
    {'add_dummy_prefix': False},
  ],
)
def test_sentencepiece_by_its_own_settings(tmp_path, options, legacy):
  files = {
    'tokenizer.model': _sentencepiece(**options),
    'tokenizer_config.json': {'legacy': legacy},
  }
  _same(tmp_path, files | {'config.json': {'model_type': 'llama'}})


def test_sentencepiece_with_added_tokens(spm, tmp_path):
  size = len(sentencepiece_model.read(spm).pieces)
  for i, kind in enumerate(('LlamaTokenizer', 'PreTrainedTokenizerFast')):
    files = {
      'tokenizer.model': spm,
      'tokenizer_config.json': {'tokenizer_class': kind, 'pad_token': '<pad>'},
      'added_tokens.json': {'<|im_start|>': size, '<|im_end|>': size + 1, '<pad>': size + 2},
      'config.json': {'model_type': 'llama'},
    }
    ours = _same(tmp_path / str(i), files)
    assert ours.encode('<|im_end|><pad>') == [size + 1, size + 2]


def _token(text, **flags):
  return {
    'content': text,
    **dict.fromkeys(('lstrip', 'rstrip', 'normalized', 'single_word'), False),
    'special': True,
    **flags,
  }


@pytest.mark.parametrize(
  'beside',
  [
    {'added_tokens.json': {'<|im_start|>': 320, '<|im_end|>': 321}},
    {
      'tokenizer_config.json': {
        'added_tokens_decoder': {
          '321': _token('<|im_end|>', rstrip=True),
          '320': _token('<|im_start|>', special=False, lstrip=True),
        }
      }
    },
    {'tokenizer_config.json': {'additional_special_tokens': ['<|im_start|>', '<|im_end|>']}},
    {'tokenizer_config.json': {'extra_special_tokens': ['<|im_start|>', '<|im_end|>']}},
    {'tokenizer_config.json': {'extra_special_tokens': {'image_token': '<|im_start|>'}}},
    {'special_tokens_map.json': {'additional_special_tokens': ['<|im_end|>', '<|im_start|>']}},
    {'special_tokens_map.json': {'pad_token': '<pad>', 'cls_token': '<|im_start|>'}},
    {
      'tokenizer_config.json': {
        'pad_token': _token('<pad>', __type='AddedToken'),
        'boi_token': '<|im_end|>',
      }
    },
  ],
  ids=lambda beside: ' '.join(f'{name} {next(iter(value))}' for name, value in beside.items()),
)
def test_added_tokens_that_stand_beside_the_vocabulary(bpe, tmp_path, beside):
  files = {
    'tokenizer.json': bpe.to_str().encode(),
    'tokenizer_config.json': {},
    'config.json': {'model_type': 'llama'},
  } | beside
  ours = _same(tmp_path, files)
  assert ours.vocab_size > 320
  text = '<|im_start|>' if ours.codec.id_of('<|im_start|>') else '<pad>'
  assert len(ours.encode(text)) == 1


def test_tokens_of_the_vocabulary_become_added_tokens_where_they_are_named(tmp_path):
  whole = json.loads(_byte_bpe().to_str()) | {'added_tokens': []}
  files = {
    'tokenizer.json': whole,
    'tokenizer_config.json': {'bos_token': '<s>', 'eos_token': '</s>'},
    'config.json': {'model_type': 'llama'},
  }
  assert _same(tmp_path, files).encode('<s>time</s>')[0] == 0


def test_an_added_token_keeps_its_id_over_a_gap(bpe, tmp_path):
  files = {'tokenizer.json': bpe.to_str().encode(), 'added_tokens.json': {'<far>': 330}}
  ours = Tokenizer.load(_write(tmp_path / 'gap', files))
  assert ours.encode('<far>') == [330] and ours.vocab_size == 331
  files['added_tokens.json'] = {'<far>': 300}
  with pytest.raises(ValueError, match=r"'<far>' should have the id 300, but .* gives it 320"):
    Tokenizer.load(_write(tmp_path / 'taken', files))


BOS = {
  'template': processors.TemplateProcessing(
    single='<s> $A', pair='<s> $A <s> $B', special_tokens=[('<s>', 0)]
  ),
  'both ends': processors.TemplateProcessing(
    single='<s> $A </s>', pair='<s> $A $B', special_tokens=[('<s>', 0), ('</s>', 1)]
  ),
  'sequence': processors.Sequence(
    [
      processors.ByteLevel(trim_offsets=True),
      processors.TemplateProcessing(
        single='<s> $A', pair='<s> $A <s> $B', special_tokens=[('<s>', 0)]
      ),
    ]
  ),
  'bytes': processors.ByteLevel(trim_offsets=False),
  'none': None,
}


@pytest.mark.parametrize('setting', [{}, {'add_bos_token': True}, {'add_bos_token': False}])
@pytest.mark.parametrize('name', BOS)
def test_the_post_processor_says_what_a_prompt_begins_with(tmp_path, name, setting):
  tokenizer = _byte_bpe()
  if BOS[name] is not None:
    tokenizer.post_processor = BOS[name]
  files = {
    'tokenizer.json': tokenizer.to_str().encode(),
    'tokenizer_config.json': {'bos_token': '<s>', 'eos_token': '</s>', **setting},
    'config.json': {'model_type': 'llama'},
  }
  ours = _same(tmp_path, files)
  assert (ours.prompt('time')[0] == 0) == (name not in ('bytes', 'none'))


def test_a_llama_tokenizer_json_of_transformers(spm, tmp_path):
  for i, settings in enumerate(({}, {'add_prefix_space': False})):
    config = {'tokenizer_class': 'LlamaTokenizer', 'add_bos_token': True, **settings}
    source = _write(tmp_path / f'{i}s', {'tokenizer.model': spm, 'tokenizer_config.json': config})
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / f'{i}')
    names = ('tokenizer.json', 'tokenizer_config.json')
    files = {name: (tmp_path / f'{i}' / name).read_bytes() for name in names}
    _same(tmp_path / f'{i}c', files | {'config.json': {'model_type': 'llama'}})


@pytest.mark.parametrize(
  'family, config',
  [
    ('gpt2', {}),
    ('gpt2', {'add_prefix_space': True}),
    ('gpt2', {'add_bos_token': True}),
    ('gpt2', {'tokenizer_class': 'GPT2Tokenizer', 'unk_token': '</s>'}),
    ('gpt_neox', {}),
    ('qwen2', {}),
    ('qwen2', {'tokenizer_class': 'Qwen2Tokenizer', 'eos_token': '<|im_end|>'}),
    ('qwen3', {'tokenizer_class': 'Qwen2TokenizerFast'}),
    ('llama', {'tokenizer_class': 'GPT2TokenizerFast', 'add_bos_token': True}),
  ],
)
def test_vocabulary_and_merges_alone(tmp_path, family, config):
  tokenizer = _byte_bpe(['<|endoftext|>', '<|padding|>', '<|im_end|>', '</s>'])
  tokenizer.model.save(str(tmp_path))
  names = ('vocab.json', 'merges.txt')
  files = {name: (tmp_path / name).read_bytes() for name in names}
  if config:
    files['tokenizer_config.json'] = config
  ours = _same(tmp_path, files | {'config.json': {'model_type': family}})
  assert ours.eos_ids


def test_generic_sentencepiece_is_what_the_library_gives(spm, tmp_path):
  library = sentencepiece.SentencePieceProcessor(model_proto=spm)
  ours = Tokenizer.load(_write(tmp_path, {'tokenizer.model': spm}))
  assert (ours.bos_id, ours.eos_ids) == (library.bos_id(), (library.eos_id(),))
  for text in TEXTS:
    if not any(special in text for special in ('<s>', '</s>', *USER)):
      assert ours.encode(text) == library.encode(text), text


def test_the_file_is_read_as_the_protocol_buffer_says(gemma_spm):
  from sentencepiece import sentencepiece_model_pb2

  for data in (gemma_spm, _sentencepiece(model_type='unigram', vocab_size=340)):
    proto = sentencepiece_model_pb2.ModelProto.FromString(data)
    found = sentencepiece_model.read(data)
    assert [(p.text, p.score, p.kind) for p in found.pieces] == [
      (p.piece, p.score, p.type) for p in proto.pieces
    ]
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    assert found.algorithm == trainer.model_type
    assert found.byte_fallback == trainer.byte_fallback
    assert found.unknown_id == trainer.unk_id
    assert found.names == {k: getattr(trainer, f'{k}_piece') for k in ('unk', 'bos', 'eos')}
    assert found.character_map == normalizer.precompiled_charsmap
    assert found.prefix_space == normalizer.add_dummy_prefix
    assert found.remove_extra_spaces == normalizer.remove_extra_whitespaces
    assert found.escape_spaces == normalizer.escape_whitespaces


@pytest.mark.parametrize('cut', [1, 7, 100, 2000])
def test_a_truncated_sentencepiece_model_is_refused(spm, tmp_path, cut):
  files = {'tokenizer.model': spm[:-cut]}
  with pytest.raises(ValueError, match=r'tokenizer\.model is corrupt'):
    Tokenizer.load(_write(tmp_path, files))


@pytest.mark.parametrize(
  'files, match',
  [
    ({'added_tokens.json': {'<a>': 'x'}}, 'added tokens should have ids'),
    ({'tokenizer_config.json': {'added_tokens_decoder': [3]}}, 'added tokens should have ids'),
    ({'tokenizer_config.json': {'added_tokens_decoder': {'3': 4}}}, 'should be a text, not 4'),
    ({'tokenizer_config.json': {'extra_special_tokens': 4}}, 'should be a list of tokens, not 4'),
    ({'vocab.json': {'a': 0, 'b': 1}, 'merges.txt': b'a c'}, 'vocab.json or merges.txt is corrupt'),
    ({'vocab.json': [], 'merges.txt': b''}, 'vocab.json should hold an object'),
  ],
)
def test_damaged_files_are_named(bpe, tmp_path, files, match):
  base = {} if 'vocab.json' in files else {'tokenizer.json': bpe.to_str().encode()}
  with pytest.raises(ValueError, match=match):
    Tokenizer.load(_write(tmp_path, base | files))
