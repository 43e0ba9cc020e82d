"""Transplanted vocabularies: rows computed by hand, and where each token's row comes from."""

import json

import numpy as np
import pytest
import tokenizers
from flax import nnx
from tokenizers import decoders, models, normalizers

from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer, parameters
from model.vocabulary import cooccurrence, spelling
from model.vocabulary.retrain import retrain
from model.vocabulary.transplant import METHODS, Plan, transplant

OLD_TEXT = ['the lower the newer and the wider of the lowest'] * 9
NEW_TEXT = ['the giraffe and the okapi of the newest zebra; the zebra'] * 9


@pytest.fixture(scope='module')
def old():
  return Tokenizer.train_bpe(OLD_TEXT, 280)


@pytest.fixture(scope='module')
def new(old):
  return retrain(old, NEW_TEXT, 290)


@pytest.fixture(scope='module')
def model(old):
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=8), ffn=FeedForwardConfig(width=16)
  )
  config = ModelConfig(
    family='llama',
    vocab_size=old.vocab_size,
    width=16,
    layers=(layer,),
    max_positions=64,
    bos_id=old.bos_id,
    eos_ids=old.eos_ids,
  )
  return Transformer(config, rngs=nnx.Rngs(0))


def _rows(model):
  """The embedding, and the head with a row for each token, in float64."""
  values = model.embedding.table.get_value(), model.head.weight.get_value().T
  return [np.asarray(value, np.float64) for value in values]


def _space(tokens, width=12):
  return np.random.default_rng(0).normal(size=(tokens, width)).astype(np.float32)


@pytest.mark.parametrize('method', METHODS)
def test_tokens_of_both_keep_their_rows(model, old, new, method):
  plan = Plan(method=method, space_VD=_space(new.vocab_size), atoms=4)
  result, tokenizer, report = transplant(model, old, new, plan)
  assert tokenizer is new and result.config.vocab_size == new.vocab_size
  assert report.shared + report.made + report.averaged == new.vocab_size
  shared = [(i, old.codec.id_of(new.codec.token_of(i))) for i in range(new.vocab_size)]
  shared = [(ours, theirs) for ours, theirs in shared if theirs is not None]
  assert 257 < report.shared == len(shared) < new.vocab_size
  for before, after in zip(_rows(model), _rows(result), strict=True):
    np.testing.assert_array_equal(
      *([rows[[pair[at] for pair in shared]] for at, rows in ((1, before), (0, after))])
    )
  same = 'layers.0.attention.query.weight'
  np.testing.assert_array_equal(
    parameters(result)[same].get_value(), parameters(model)[same].get_value()
  )


def _made(old, new):
  return [i for i in range(new.vocab_size) if old.codec.id_of(new.codec.token_of(i)) is None]


def test_the_mean_is_that_of_the_tokens_that_spell_the_new_one(model, old, new):
  result, _, report = transplant(model, old, new, Plan(method='mean'))
  made = _made(old, new)
  assert report.made == len(made) > 5 and report.averaged == 0
  for before, after in zip(_rows(model), _rows(result), strict=True):
    for i in made:
      ids = old.encode(new.decode([i]))
      assert len(ids) > 1
      np.testing.assert_allclose(after[i], before[ids].mean(0), rtol=1e-5, atol=1e-7)


def test_the_average_and_the_draw_have_the_moments_of_the_old_rows(model, old, new):
  made, before = _made(old, new), _rows(model)[0]
  average = _rows(transplant(model, old, new, Plan(method='average'))[0])[0]
  np.testing.assert_allclose(average[made], np.tile(before.mean(0), (len(made), 1)), atol=1e-6)
  draws = [
    _rows(transplant(model, old, new, Plan(method='random', seed=seed))[0])[0][made]
    for seed in range(8)
  ]
  np.testing.assert_allclose(np.concatenate(draws).std(), before.std(), rtol=0.1)
  assert not np.allclose(draws[0], draws[1])


def test_sums_found_in_the_space_are_taken_of_the_old_rows(model, old, new):
  """A donor whose new rows are sums of few shared ones by construction."""
  made = _made(old, new)
  shared = [i for i in range(new.vocab_size) if i not in made]
  space = np.zeros((new.vocab_size, len(shared)), np.float32)
  space[shared] = np.eye(len(shared))
  for n, i in enumerate(made):
    space[i] = 0.5 * space[shared[n]] - 2 * space[shared[n + 7]]
  plan = Plan(method='omp', space_VD=space, atoms=3)
  result, _, report = transplant(model, old, new, plan)
  assert report.made == len(made)
  theirs = [old.codec.id_of(new.codec.token_of(i)) for i in shared]
  for before, after in zip(_rows(model), _rows(result), strict=True):
    wanted = [0.5 * before[theirs[n]] - 2 * before[theirs[n + 7]] for n in range(len(made))]
    np.testing.assert_allclose(after[made], wanted, rtol=1e-5, atol=1e-6)


def test_centred_sums_are_of_distances_from_the_mean(model, old, new):
  """The same donor, moved away from its origin: only centred sums are found again."""
  made = _made(old, new)
  shared = [i for i in range(new.vocab_size) if i not in made]
  space = np.zeros((new.vocab_size, len(shared)), np.float32)
  space[shared] = np.eye(len(shared)) - 1 / len(shared)
  for n, i in enumerate(made):
    space[i] = 2 * space[shared[n]]
  plan = Plan(method='omp', space_VD=space + 3, atoms=1, centred=True)
  after = _rows(transplant(model, old, new, plan)[0])[0]
  before = _rows(model)[0]
  theirs, mean = [old.codec.id_of(new.codec.token_of(i)) for i in shared], before.mean(0)
  wanted = [mean + 2 * (before[theirs[n]] - mean) for n in range(len(made))]
  np.testing.assert_allclose(after[made], wanted, atol=1e-5)


def test_a_token_that_the_space_lacks_is_the_average(model, old, new):
  space, made = _space(new.vocab_size), _made(old, new)
  space[made[0]] = 0
  plan = Plan(method='omp', space_VD=space, atoms=2)
  result, _, report = transplant(model, old, new, plan)
  assert (report.made, report.averaged) == (len(made) - 1, 1)
  before, after = _rows(model)[0], _rows(result)[0]
  np.testing.assert_allclose(after[made[0]], before.mean(0), atol=1e-6)


def _mutual_information(documents, tokens):
  """Counted pair by pair."""
  pairs = np.zeros((tokens, tokens))
  for ids in documents:
    for at, token in enumerate(ids):
      for other in range(max(0, at - 4), min(len(ids), at + 5)):
        pairs[token, ids[other]] += other != at
  near = pairs.sum(0) ** 0.75 / (pairs.sum(0) ** 0.75).sum()
  with np.errstate(divide='ignore', invalid='ignore'):
    found = np.log(pairs / (pairs.sum(1, keepdims=True) * near))
  return np.where(pairs > 0, np.maximum(found, 0), 0)


def test_neighbours_tell_tokens_apart():
  """Tokens 0 and 1 stand between the same neighbours, token 2 between others."""
  documents = [np.array([3, one, 4, 5, 2, 6] * 5) for one in (0, 1)]
  vectors = cooccurrence.vectors(documents, 8, 6)
  cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  assert cosine(vectors[0], vectors[1]) > 0.9 > cosine(vectors[0], vectors[2])
  assert not vectors[7].any()
  left, sizes, _ = np.linalg.svd(_mutual_information(documents, 8))
  wanted = (left * sizes) @ left.T  # products of vectors U S^(1/2)
  lengths = np.sqrt(np.maximum(np.diag(wanted), 1e-30))
  np.testing.assert_allclose(vectors @ vectors.T, wanted / np.outer(lengths, lengths), atol=1e-4)
  with pytest.raises(ValueError, match='no two tokens beside each other'):
    cooccurrence.vectors([np.array([1])], 8, 6)


def test_vocabularies_are_compared_by_bytes(old):
  vocab = {'<unk>': 0, '▁the': 1, '▁': 2, 't': 3, 'h': 4, 'e': 5, '▁t': 6, '▁th': 7}
  vocab |= {f'<0x{byte:02X}>': 8 + byte for byte in range(256)}
  merges = [('▁', 't'), ('▁t', 'h'), ('▁th', 'e')]
  built = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=merges, unk_token='<unk>', byte_fallback=True)
  )
  built.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  built.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback()])
  pieces = Tokenizer.from_files({'tokenizer.json': built.to_str().encode()})
  found = spelling.token_bytes(pieces)
  assert (found[1], found[3], found[8 + 0xE6]) == (b' the', b't', b'\xe6')
  ours = spelling.token_bytes(old)
  assert ours[old.encode(' the')[0]] == b' the' and ours[old.bos_id] is None
  speller = spelling.Speller(pieces)
  assert speller.spell(b' the') == [1]
  assert speller.spell(b'the') == [3, 4, 5]  # without the space that the tokenizer puts in front
  assert speller.spell(b'\xe6e') == [8 + 0xE6, 5]


def test_retraining_keeps_special_tokens_and_templates():
  template = b"{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
  first = Tokenizer.train_bpe(OLD_TEXT, 280)
  built = tokenizers.Tokenizer.from_str(first.codec.to_json())
  built.add_special_tokens(['<|im_start|>', '<|im_end|>'])
  settings = {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>'}
  tokenizer = Tokenizer.from_files(
    {
      'tokenizer.json': built.to_str().encode(),
      'tokenizer_config.json': json.dumps(settings).encode(),
      'generation_config.json': json.dumps(
        {'eos_token_id': [built.token_to_id('<|im_end|>'), 0]}
      ).encode(),
      'chat_template.jinja': template,
    }
  )
  result = retrain(tokenizer, NEW_TEXT, 300)
  names = lambda one: [one.codec.token_of(i) for i in (one.bos_id, *one.eos_ids)]
  assert names(result) == names(tokenizer) == ['<|im_start|>', '<|im_end|>', '<|endoftext|>']
  prompt = result.apply_chat_template([{'content': 'the zebra'}])
  assert result.encode(prompt)[0] == result.bos_id
  assert len(result.encode(prompt)) < len(tokenizer.encode(prompt))
  assert result.decode(result.encode('Ωmega 日本\n')) == 'Ωmega 日本\n'
  with pytest.raises(ValueError, match='no text'):
    retrain(tokenizer, ['', ''], 300)


def test_wrong_input_is_named(model, old, new):
  with pytest.raises(ValueError, match='do not belong together'):
    transplant(model, new, old, Plan())
  with pytest.raises(ValueError, match="not 'omg'"):
    Plan(method='omg')
  with pytest.raises(ValueError, match='omp needs vectors'):
    Plan(method='omp')
  with pytest.raises(ValueError, match='take a donor of the new vocabulary'):
    transplant(model, old, new, Plan(method='omp', space_VD=_space(5)))
  words = {'<unk>': 0, 'zzz': 1}
  stranger = tokenizers.Tokenizer(models.BPE(vocab=words, merges=[], unk_token='<unk>'))
  stranger = Tokenizer.from_files({'tokenizer.json': stranger.to_str().encode()})
  with pytest.raises(ValueError, match='no token in common'):
    transplant(model, old, stranger, Plan())
