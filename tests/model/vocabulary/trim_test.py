"""Trimmed vocabularies against the whole ones: the same cuts, the same bits, and tokens by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from model import hf
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from model.vocabulary import needed, renumber
from model.vocabulary.trim import trim
from ops import linear, quantized, transposed

WORDS = ['lower', 'lowest', 'newer', 'wider', 'widest', 'and', 'the', 'of', 'Grüße', 'naïve', '12']
UNSEEN = 'Ωmega 日本 zebra\n😀\t#!'


def _texts(seed, words, documents=20):
  random = np.random.default_rng(seed)
  return [' '.join(random.choice(words, 30)) for _ in range(documents)]


CORPUS = _texts(0, WORDS) + _texts(1, ['zebra', 'quagga', 'okapi', 'giraffe'], 10)
COVERED = _texts(2, WORDS[:7], 8)
SPECIAL = ['<s>', '</s>', '<pad>']


def _byte_level(ignore_merges=False):
  built = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
  built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  built.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  built.train_from_iterator(
    CORPUS,
    trainers.BpeTrainer(
      vocab_size=400, initial_alphabet=sorted(alphabet), special_tokens=SPECIAL, show_progress=False
    ),
  )
  return built


def _pieces(built):
  """As sentencepiece has it: '▁' for spaces, and bytes for what no piece spells."""
  built.normalizer = normalizers.Replace(' ', '▁')
  built.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  return built


def _sentencepiece():
  built = _pieces(tokenizers.Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True)))
  built.pre_tokenizer = pre_tokenizers.Split('▁', 'merged_with_next')
  special = ['<unk>', *SPECIAL, *(f'<0x{byte:02X}>' for byte in range(256))]
  built.train_from_iterator(
    CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
  )
  data = json.loads(built.to_str())
  data['added_tokens'] = [t for t in data['added_tokens'] if not t['content'].startswith('<0x')]
  return tokenizers.Tokenizer.from_str(json.dumps(data))


def _unigram(byte_fallback):
  built = _pieces(tokenizers.Tokenizer(models.Unigram()))
  built.pre_tokenizer = pre_tokenizers.Split('▁', 'merged_with_next')
  built.train_from_iterator(
    CORPUS,
    trainers.UnigramTrainer(
      vocab_size=120, unk_token='<unk>', special_tokens=['<unk>', *SPECIAL], show_progress=False
    ),
  )
  data = json.loads(built.to_str())
  if byte_fallback:
    pieces = data['model']['vocab']
    data['model'] |= {'byte_fallback': True}
    lowest = min(score for _, score in pieces)
    pieces += [[f'<0x{byte:02X}>', lowest - 1] for byte in range(256)]
  return tokenizers.Tokenizer.from_str(json.dumps(data))


KINDS = {
  'byte_level': _byte_level,
  'whole_words': lambda: _byte_level(ignore_merges=True),
  'sentencepiece': _sentencepiece,
  'unigram': lambda: _unigram(False),
  'unigram_bytes': lambda: _unigram(True),
}


def _tokenizer(built, **files):
  built.post_processor = processors.TemplateProcessing(
    single='<s> $A', pair=None, special_tokens=[('<s>', built.token_to_id('<s>'))]
  )
  ids = {'eos_token_id': [built.token_to_id('</s>')], 'pad_token_id': built.token_to_id('<pad>')}
  settings = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<pad>'}
  return Tokenizer.from_files(
    {
      'tokenizer.json': built.to_str().encode(),
      'tokenizer_config.json': json.dumps(settings).encode(),
      'generation_config.json': json.dumps(ids).encode(),
      **files,
    }
  )


def _model(tokenizer, tied=True, spare_rows=5):
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=8), ffn=FeedForwardConfig(width=32)
  )
  config = ModelConfig(
    family='llama',
    vocab_size=tokenizer.vocab_size + spare_rows,
    width=16,
    layers=(layer,),
    max_positions=64,
    tied=tied,
    bos_id=tokenizer.bos_id,
    eos_ids=tokenizer.eos_ids,
    pad_id=tokenizer.codec.id_of('<pad>'),
  )
  return Transformer(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope='module', params=KINDS)
def whole(request):
  tokenizer = _tokenizer(KINDS[request.param]())
  return tokenizer, _model(tokenizer)


def test_covered_text_is_cut_into_the_same_tokens(whole):
  tokenizer, model = whole
  smaller, trimmed, report = trim(model, tokenizer, COVERED, multiple=1)
  assert report.changed == 0 and report.documents == len(COVERED)
  assert trimmed.vocab_size == len(report.kept) < tokenizer.vocab_size
  assert report.tokens == (tokenizer.vocab_size + 5, trimmed.vocab_size)
  assert smaller.config.vocab_size == trimmed.vocab_size
  assert (np.diff(report.kept) > 0).all()
  for text in COVERED:
    assert report.kept[trimmed.encode(text)].tolist() == tokenizer.encode(text)
    assert trimmed.decode(trimmed.encode(text)) == text
  for i, old in enumerate(report.kept):
    assert trimmed.codec.token_of(i) == tokenizer.codec.token_of(int(old))


def test_every_special_token_has_moved_with_its_id(whole):
  tokenizer, model = whole
  smaller, trimmed, _ = trim(model, tokenizer, COVERED, multiple=1)
  named = lambda t: [t.codec.token_of(i) for i in (t.bos_id, *t.eos_ids)]
  assert named(trimmed) == named(tokenizer) == ['<s>', '</s>']
  assert [trimmed.codec.token_of(i) for i in trimmed.codec.prefix] == ['<s>']
  generation = json.loads(trimmed.files['generation_config.json'])
  assert trimmed.codec.token_of(generation['pad_token_id']) == '<pad>'
  config = smaller.config
  assert (config.bos_id, config.eos_ids) == (trimmed.bos_id, trimmed.eos_ids)
  assert config.pad_id == generation['pad_token_id']
  assert trimmed.encode('</s>') == list(trimmed.eos_ids)


def test_text_that_is_not_covered_still_has_tokens(whole):
  tokenizer, model = whole
  _, trimmed, _ = trim(model, tokenizer, COVERED, multiple=1)
  ids = trimmed.encode(UNSEEN)
  assert ids and max(ids) < trimmed.vocab_size
  if tokenizer.decode(tokenizer.encode(UNSEEN)) == UNSEEN:
    assert trimmed.decode(ids) == UNSEEN


@pytest.mark.parametrize('tied', [True, False])
def test_logits_of_kept_tokens_are_the_same_bits(tied):
  tokenizer = _tokenizer(_byte_level())
  model = _model(tokenizer, tied)
  smaller, trimmed, report = trim(model, tokenizer, COVERED, multiple=16)
  assert smaller.config.vocab_size % 16 == 0
  logits_of = jax.jit(lambda model, tokens_BT: model(tokens_BT))
  before = logits_of(model, jnp.asarray([tokenizer.encode(COVERED[0])[:24]]))
  after = logits_of(smaller, jnp.asarray([trimmed.encode(COVERED[0])[:24]]))
  np.testing.assert_array_equal(np.asarray(before)[..., report.kept], after)
  rows = report.tokens[0] - report.tokens[1]
  assert report.parameters[0] - report.parameters[1] == rows * 16 * (1 if tied else 2)


def test_the_folder_is_read_again(tmp_path):
  tokenizer = _tokenizer(_sentencepiece())
  smaller, trimmed, report = trim(_model(tokenizer), tokenizer, COVERED)
  hf.save_pretrained(smaller, trimmed, tmp_path / 'out')
  loaded, again = hf.load_pretrained(tmp_path / 'out')
  assert loaded.config == smaller.config
  assert again.encode_many(COVERED) == trimmed.encode_many(COVERED)
  table = loaded.embedding.table.get_value()
  np.testing.assert_array_equal(table, _model(tokenizer).embedding.table.get_value()[report.kept])


def test_merges_written_as_texts_and_added_tokens_beyond_the_rows():
  built = _byte_level()
  built.add_tokens(['<extra>'])
  data = json.loads(built.to_str())
  data['model']['merges'] = [' '.join(merge) for merge in data['model']['merges']]
  assert (
    needed.merge_pairs(data['model'])[0]
    == needed.merge_pairs(json.loads(built.to_str())['model'])[0]
  )
  tokenizer = _tokenizer(tokenizers.Tokenizer.from_str(json.dumps(data)))
  model = _model(tokenizer, spare_rows=-1)  # no row for <extra>
  smaller, trimmed, _ = trim(model, tokenizer, COVERED, multiple=1)
  assert trimmed.encode('<extra>') == [trimmed.vocab_size - 1]
  assert smaller.config.vocab_size == trimmed.vocab_size - 1


def test_rare_tokens_go_if_that_is_asked_for():
  tokenizer = _tokenizer(_byte_level())
  model = _model(tokenizer)
  texts = [*COVERED, *COVERED, 'okapi']
  _, _, report = trim(model, tokenizer, texts, multiple=1)
  _, fewer, rarer = trim(model, tokenizer, texts, multiple=1, min_count=2)
  assert (report.changed, rarer.changed) == (0, 1)
  assert len(fewer.encode(' okapi')) > len(tokenizer.encode(' okapi'))
  assert rarer.covered < rarer.occurrences == report.occurrences == report.covered
  assert fewer.decode(fewer.encode('okapi')) == 'okapi'


def test_the_words_of_the_chat_template_count_as_text():
  template = "{% for m in messages %}okapi {{ m['content'] }}{% endfor %}"
  plain = _tokenizer(_byte_level())
  chats = _tokenizer(_byte_level(), **{'chat_template.jinja': template.encode()})
  lengths = [
    len(trim(_model(one), one, COVERED, multiple=1)[1].encode('okapi')) for one in (plain, chats)
  ]
  assert lengths[1] == len(plain.encode('okapi')) < lengths[0]


def test_used_tokens_alone_would_not_be_enough():
  tokenizer = _tokenizer(_byte_level())
  data = renumber.contents(tokenizer)
  used = {i for ids in tokenizer.encode_many(COVERED) for i in ids}
  bytes_ = {i for token, i in needed.token_ids(data['model']).items() if len(token) == 1}
  kept = sorted(used | bytes_ | renumber.special_ids(tokenizer))
  cut = [
    np.array(kept)[ids].tolist()
    for ids in renumber.renumbered(tokenizer, kept).encode_many(COVERED)
  ]
  assert cut != tokenizer.encode_many(COVERED)


@pytest.mark.parametrize(
  'token, wanted',
  [
    ('abc', {'a', 'b', 'c', 'ab', 'abc'}),  # not by bc, which has a later rank
    ('bcb', {'b', 'c', 'bc', 'bcb'}),
    ('cab', {'cab'}),  # no merges lead to it
    ('a', {'a'}),
  ],
)
def test_derivations_by_hand(token, wanted):
  order = [('a', 'b'), ('b', 'c'), ('a', 'bc'), ('ab', 'c'), ('bc', 'b')]
  assert needed.derivation(token, {pair: rank for rank, pair in enumerate(order)}) == wanted


def test_a_low_piece_keeps_the_score_of_what_is_unknown():
  # Without 'x', the lowest piece, the unknown 'a' would score -22, and 'a' + 'bc' beat 'ab' + 'c'.
  pieces = [['<unk>', 0.0], ['ab', -12.0], ['c', -12.0], ['bc', -1.0], ['x', -60.0]]
  model = {'type': 'Unigram', 'vocab': pieces, 'unk_id': 0, 'byte_fallback': False}
  cut = lambda kept: models.Unigram([tuple(pieces[i]) for i in kept], 0).tokenize('abc')
  values = lambda kept: [token.value for token in cut(kept)]
  assert values(range(5)) == ['ab', 'c'] != values([0, 1, 2, 3])
  assert values(sorted(needed.closure(model, {1, 2, 3}))) == ['ab', 'c']


def test_wrong_input_is_named():
  tokenizer = _tokenizer(_byte_level())
  model = _model(tokenizer)
  with pytest.raises(ValueError, match='no token'):
    trim(model, tokenizer, [])
  with pytest.raises(ValueError, match='no token'):
    trim(model, tokenizer, ['', ''])
  with pytest.raises(ValueError, match='do not belong together'):
    trim(_model(tokenizer, spare_rows=-50), tokenizer, COVERED)
  with pytest.raises(ValueError, match='min_count must be at least 1, not 0'):
    trim(model, tokenizer, COVERED, min_count=0)
  words = tokenizers.Tokenizer(models.WordLevel({'<s>': 0, '</s>': 1, '<pad>': 2, 'a': 3}, '<pad>'))
  words.add_special_tokens(SPECIAL)
  with pytest.raises(ValueError, match='WordLevel is not changed'):
    trim(_model(_tokenizer(words)), _tokenizer(words), ['a'])
  grouped = _model(tokenizer)
  table = grouped.embedding.table.get_value()
  grouped.embedding.table.set_value(quantized.quantize(table, 'int8'))
  with pytest.raises(ValueError, match='does not store tokens one by one; trim first'):
    trim(grouped, tokenizer, COVERED)


def test_a_compressed_table_and_head_keep_their_codes():
  tokenizer = _tokenizer(_byte_level())
  model = _model(tokenizer, tied=False)
  table, head = model.embedding.table, model.head.weight
  coded = jax.jit(lambda w_DV: quantized.quantize(w_DV, 'int4', group_size=8))
  table.set_value(transposed.TransposedTensor(coded(table.get_value().T)))
  head.set_value(coded(head.get_value()))
  smaller, _, report = trim(model, tokenizer, COVERED)
  rows = report.kept[report.kept < model.config.vocab_size]
  found = smaller.embedding.table.get_value(), smaller.head.weight.get_value()
  assert [type(w).__name__ for w in found] == ['TransposedTensor', 'QuantizedTensor']
  widen = jax.jit(linear.dense)
  wanted = widen(table.get_value())[rows], widen(head.get_value())[:, rows]
  for one, other in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(widen(one), other)
