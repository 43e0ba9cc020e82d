"""Perplexity, KL, flips and bits per byte against torch and transformers on the same text."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from model import hf
from model.eval import perplexity
from model.tokenizer import Tokenizer, window_bos

# The whole protocol in float32, by two libraries that add in different orders.
TOLERANCE = 1e-4
SEQ_LEN = 24
TEXTS = [
  'The quick brown fox jumps over the lazy dog; the dog does not mind. ' * 3,
  'def add(a, b):\n  """Adds two numbers."""\n  return a + b\n\n\nprint(add(1, 2))\n' * 3,
  'Größe, naïveté, 東京 and Кириллица take more than one byte a character. 🎉 ' * 4,
]
TINY = {
  'hidden_size': 48,
  'intermediate_size': 80,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
}
CASES = {
  'Llama': TINY,
  'Qwen3': {**TINY, 'head_dim': 24},
  'Gemma2': {**TINY, 'head_dim': 24, 'query_pre_attn_scalar': 24},
  'GPT2': {'n_embd': 48, 'n_layer': 2, 'n_head': 4, 'n_positions': 64},
}


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer.train_bpe(TEXTS, 300)


def _folder(path, family, tokenizer, seed=0):
  """A checkpoint as transformers writes it, with weights large enough to matter."""
  torch.manual_seed(seed)
  special = {'bos_token_id': 0, 'eos_token_id': 0, 'pad_token_id': None}
  config = getattr(transformers, f'{family}Config')(
    vocab_size=tokenizer.vocab_size, **special, **CASES[family]
  )
  name = 'GPT2LMHeadModel' if family == 'GPT2' else f'{family}ForCausalLM'
  model = getattr(transformers, name)(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(torch.randn(parameter.shape) * 0.1)
  model.save_pretrained(path)
  tokenizer.save(path)
  return model


def _torch_logits(model, ids_T):
  count = len(ids_T) // SEQ_LEN
  windows = torch.tensor(ids_T[: count * SEQ_LEN], dtype=torch.long).reshape(count, SEQ_LEN)
  with torch.no_grad():
    return windows, model(windows).logits[:, :-1].double()


def _torch_nll(model, ids_T):
  windows, logits = _torch_logits(model, ids_T)
  flat = logits.reshape(-1, logits.shape[-1])
  return torch.nn.functional.cross_entropy(flat, windows[:, 1:].reshape(-1), reduction='sum')


def _windows(tokenizer, text, **options):
  return perplexity.windows(*tokenizer.encode_with_bytes(text), SEQ_LEN, **options)


@pytest.mark.parametrize('family', CASES)
@pytest.mark.quick(family=('Qwen3', 'GPT2'))
def test_perplexity_is_that_of_transformers(family, tokenizer, tmp_path):
  other = _folder(tmp_path, family, tokenizer)
  model, own_tokenizer = hf.load_pretrained(tmp_path)
  text = ''.join(TEXTS)
  quality = perplexity.evaluate(model, _windows(own_tokenizer, text))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ids_T = theirs(text, add_special_tokens=False)['input_ids']
  nll = float(_torch_nll(other, ids_T))
  count = len(ids_T) // SEQ_LEN * (SEQ_LEN - 1)
  assert quality.tokens == count
  assert quality.nll_sum == pytest.approx(nll, rel=TOLERANCE)
  assert quality.ppl == pytest.approx(math.exp(nll / count), rel=TOLERANCE)
  assert (quality.kl_sum, quality.flips, quality.kl_to_base, quality.flip_rate) == (None,) * 4


def test_kl_and_flips_are_those_of_torch(tokenizer, tmp_path):
  others = [_folder(tmp_path / str(i), 'Llama', tokenizer, seed=i) for i in range(2)]
  models = [hf.load_pretrained(tmp_path / str(i))[0] for i in range(2)]
  text = ''.join(TEXTS)
  ids_T = tokenizer.encode(text)
  (_, base), (_, own) = (_torch_logits(other, ids_T) for other in others)
  quality = perplexity.evaluate(models[1], _windows(tokenizer, text), base=models[0])
  log_p, log_q = base.log_softmax(-1), own.log_softmax(-1)
  kl = float((log_p.exp() * (log_p - log_q)).sum())
  flips = int((base.argmax(-1) != own.argmax(-1)).sum())
  assert quality.kl_sum == pytest.approx(kl, rel=TOLERANCE)
  assert quality.flips == flips
  assert 0 < flips <= quality.tokens
  assert quality.flip_rate == flips / quality.tokens
  assert quality.kl_to_base == pytest.approx(kl / quality.tokens, rel=TOLERANCE)
  assert sum(quality.kl_B) == pytest.approx(kl, rel=TOLERANCE)
  assert len(quality.kl_B) == len(quality.nll_B)
  assert quality.nll_sum == pytest.approx(float(_torch_nll(others[1], ids_T)), rel=TOLERANCE)


@pytest.fixture(scope='module')
def llama(tokenizer, tmp_path_factory):
  folder = tmp_path_factory.mktemp('llama')
  _folder(folder, 'Llama', tokenizer)
  return hf.load_pretrained(folder)[0]


def test_a_model_is_its_own_base(llama, tokenizer):
  text = _windows(tokenizer, TEXTS[1])
  quality = perplexity.evaluate(llama, text, base=nnx.clone(llama))
  assert quality.kl_sum == pytest.approx(0, abs=1e-4 * quality.tokens)
  assert quality.flips == 0
  assert quality.nll_sum == pytest.approx(perplexity.evaluate(llama, text).nll_sum, rel=1e-6)


def test_bits_per_byte_count_the_bytes_of_the_predicted_tokens(llama, tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  letters = transformers.AutoTokenizer.from_pretrained(tmp_path)
  text = TEXTS[0] + TEXTS[2]
  windows = _windows(tokenizer, text)
  quality = perplexity.evaluate(llama, windows)
  size = 0
  for row in windows.tokens_BT:
    # A byte-level token is written with one letter a byte.
    size += sum(map(len, letters.convert_ids_to_tokens(row[1:].tolist())))
  # Where a window cuts a character, all of its bytes count on one side: at most 3 an edge.
  assert windows.predicted_bytes == pytest.approx(size, abs=6 * len(windows.tokens_BT))
  bits = quality.nll_sum / math.log(2) / windows.predicted_bytes
  assert quality.bits_per_byte == pytest.approx(bits, rel=1e-12)


def test_bytes_of_plain_text_are_exact(tokenizer):
  windows = _windows(tokenizer, TEXTS[1])
  size = sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in windows.tokens_BT)
  assert windows.predicted_bytes == size


def test_batches_and_chunks_do_not_matter(llama, tokenizer, monkeypatch):
  text = _windows(tokenizer, ''.join(TEXTS))
  base = nnx.clone(llama)
  table = base.embedding.table
  table.set_value(table.get_value() * 1.1)
  expected = perplexity.evaluate(llama, text, base=base)
  for tokens, chunk in ((SEQ_LEN, 512), (5 * SEQ_LEN, 7)):
    monkeypatch.setattr(perplexity, 'TOKENS_A_BATCH', tokens)
    monkeypatch.setattr(perplexity, 'CHUNK', chunk)
    perplexity._sums.clear_cache()
    found = perplexity.evaluate(llama, text, base=base)
    kept = perplexity.hidden_states(base, text)
    assert perplexity.evaluate(llama, text, base=base, base_hidden=kept) == found
    assert found.nll_sum == pytest.approx(expected.nll_sum, rel=1e-6)
    assert found.kl_sum == pytest.approx(expected.kl_sum, rel=1e-5)
    assert (found.flips, found.tokens) == (expected.flips, expected.tokens)
  perplexity._sums.clear_cache()


def test_windows_follow_the_protocol():
  ends_T = np.cumsum(np.arange(1, 12))
  text = perplexity.windows(np.arange(11), ends_T, 4)
  assert text.tokens_BT.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert text.predicted == 6
  assert text.predicted_bytes == (2 + 3 + 4) + (6 + 7 + 8)
  assert perplexity.windows(np.arange(11), ends_T, 4, max_windows=1).tokens_BT.shape == (1, 4)
  assert perplexity.windows(np.arange(11), ends_T, 4, max_windows=9).tokens_BT.shape == (2, 4)
  assert perplexity.windows(np.arange(4), ends_T, 4).tokens_BT.shape == (1, 4)


def test_windows_with_a_bos_predict_all_of_their_text():
  ends_T = np.cumsum(np.arange(1, 12))
  text = perplexity.windows(np.arange(11), ends_T, 4, bos_id=77)
  assert text.tokens_BT.tolist() == [[77, 0, 1, 2], [77, 3, 4, 5], [77, 6, 7, 8]]
  assert (text.seq_len, text.text_len, text.bos) == (4, 3, 'window')
  assert text.predicted == 9
  assert text.predicted_bytes == sum(range(1, 10))
  one = perplexity.windows(np.arange(11), ends_T, 4, 1, 77)
  assert one.tokens_BT.shape == (1, 4) and one.predicted_bytes == 1 + 2 + 3
  assert perplexity.windows(np.arange(3), ends_T[:3], 4, bos_id=77).predicted == 3
  plain = perplexity.windows(np.arange(11), ends_T, 4)
  assert (plain.text_len, plain.bos) == (4, 'none')
  with pytest.raises(ValueError, match='2 tokens, fewer than one window of 3'):
    perplexity.windows(np.arange(2), ends_T[:2], 4, bos_id=77)


def test_gemma_is_measured_after_a_bos(tokenizer, tmp_path):
  other = _folder(tmp_path, 'Gemma2', tokenizer)
  model, own = hf.load_pretrained(tmp_path)
  bos_id = window_bos(own, model.config, 'auto')
  assert bos_id == 0 and window_bos(own, model.config, 'none') is None
  quality = perplexity.evaluate(model, _windows(own, TEXTS[0], bos_id=bos_id))
  ids_T, nll, count = tokenizer.encode(TEXTS[0]), 0.0, 0
  for start in range(0, len(ids_T) - SEQ_LEN + 2, SEQ_LEN - 1):
    row = torch.tensor([[0, *ids_T[start : start + SEQ_LEN - 1]]])
    with torch.no_grad():
      logits = other(row).logits[0, :-1].double()
    nll += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction='sum'))
    count += SEQ_LEN - 1
  assert (quality.tokens, quality.bos) == (count, 'window')
  assert quality.nll_sum == pytest.approx(nll, rel=TOLERANCE)


def test_a_window_bos_is_what_the_family_needs(llama, tokenizer):
  assert window_bos(tokenizer, llama.config, 'auto') is None
  assert window_bos(tokenizer, llama.config, 'window') == 0
  config = json.dumps({'bos_token': None, 'eos_token': None}).encode()
  bare = Tokenizer.from_files({**tokenizer.files, 'tokenizer_config.json': config})
  assert window_bos(bare, llama.config.replace(family='gemma2'), 'auto') is None
  with pytest.raises(ValueError, match='bos=window needs a BOS, but the tokenizer has none'):
    window_bos(bare, llama.config, 'window')
  with pytest.raises(ValueError, match="one of auto, none, window, not 'all'"):
    window_bos(tokenizer, llama.config, 'all')


def test_a_token_that_the_model_lacks_is_refused(llama):
  text = perplexity.windows(np.full(8, 300), np.arange(8), 4)
  with pytest.raises(ValueError, match='the text has token 300, but the model has a vocabulary of'):
    perplexity.evaluate(llama, text)


@pytest.mark.parametrize('tokens', [0, 1, SEQ_LEN - 1])
def test_text_shorter_than_a_window_is_refused(tokens):
  with pytest.raises(
    ValueError, match=f'the text has {tokens} tokens, fewer than one window of 24'
  ):
    perplexity.windows(np.arange(tokens), np.arange(tokens), SEQ_LEN)


def test_a_window_of_one_token_is_refused():
  with pytest.raises(ValueError, match='at least 2 tokens'):
    perplexity.windows(np.arange(9), np.arange(9), 1)


def test_windows_beyond_learned_positions_are_refused(llama, tokenizer, tmp_path):
  _folder(tmp_path, 'GPT2', tokenizer)
  model, _ = hf.load_pretrained(tmp_path)
  long = perplexity.windows(np.zeros(65, np.int32), np.arange(65), 65)
  with pytest.raises(ValueError, match='windows of 65 tokens are longer than the 64 learned'):
    perplexity.evaluate(model, long)
  with pytest.raises(ValueError, match='windows of 65 tokens'):
    perplexity.evaluate(llama, long, base=model)


def test_progress_sees_every_batch(llama, tokenizer, monkeypatch):
  monkeypatch.setattr(perplexity, 'TOKENS_A_BATCH', SEQ_LEN)
  text, seen = _windows(tokenizer, TEXTS[1]), []

  def progress(items):
    seen.extend(items)
    return iter(items)

  perplexity.evaluate(llama, text, progress=progress)
  assert len(seen) == len(text.tokens_BT)


def test_a_hopeless_model_has_an_infinite_perplexity():
  quality = perplexity.Quality(nll_sum=8000.0, tokens=10, predicted_bytes=10, seq_len=11)
  assert quality.ppl == math.inf
  assert quality.bits_per_byte == pytest.approx(800 / math.log(2))


def test_windows_have_likelihoods_of_their_own(llama, tokenizer, monkeypatch):
  text = _windows(tokenizer, TEXTS[2])
  assert len(text.tokens_BT) > 2
  monkeypatch.setattr(perplexity, 'TOKENS_A_BATCH', 2 * SEQ_LEN)  # the last batch is smaller
  quality = perplexity.evaluate(llama, text)
  for tokens_T, nll in zip(text.tokens_BT, quality.nll_B, strict=True):
    alone = perplexity.Windows(tokens_BT=tokens_T[None], predicted_bytes=1)
    assert nll == pytest.approx(perplexity.evaluate(llama, alone).nll_sum, rel=TOLERANCE)
  assert sum(quality.nll_B) == pytest.approx(quality.nll_sum)


def test_a_ratio_of_perplexities_has_the_standard_error_of_its_pairs_of_windows():
  rng = np.random.default_rng(0)
  tokens, count = 50, 40
  other_B = rng.normal(150, 30, count)  # windows differ far more than the two models do
  own_B = other_B + rng.normal(0.5, 0.2, count)
  own, other = (
    perplexity.Quality(
      nll_sum=nll_B.sum(),
      tokens=count * tokens,
      predicted_bytes=1,
      seq_len=tokens + 1,
      nll_B=tuple(nll_B),
    )
    for nll_B in (own_B, other_B)
  )
  found = perplexity.ratio(own, other)
  # The bootstrap: the ratio of windows that are drawn again, pairs kept together.
  drawn = rng.integers(count, size=(4000, count))
  ratios = np.exp((own_B - other_B)[drawn].mean(1) / tokens)
  assert found.value == pytest.approx(np.exp((own_B - other_B).mean() / tokens))
  assert found.standard_error == pytest.approx(ratios.std(), rel=0.05)
  assert math.isnan(perplexity.ratio(_alone(own_B[:1]), _alone(other_B[:1])).standard_error)
  with pytest.raises(ValueError, match='40 windows of 2000 tokens are no pairs with 1 of 50'):
    perplexity.ratio(own, _alone(other_B[:1]))


def test_standard_errors_are_those_of_windows():
  rng = np.random.default_rng(1)
  tokens, count = 50, 40
  nll_B, kl_B = rng.normal(150, 10, count), rng.exponential(2, count)
  quality = perplexity.Quality(
    nll_sum=nll_B.sum(),
    tokens=count * tokens,
    predicted_bytes=1,
    seq_len=tokens + 1,
    kl_sum=kl_B.sum(),
    nll_B=tuple(nll_B),
    kl_B=tuple(kl_B),
  )
  drawn = rng.integers(count, size=(4000, count))  # the bootstrap
  ppls, kls = np.exp(nll_B[drawn].mean(1) / tokens), kl_B[drawn].mean(1) / tokens
  assert quality.ppl_error == pytest.approx(ppls.std(), rel=0.05)
  assert quality.kl_error == pytest.approx(kls.std(), rel=0.05)
  assert math.isnan(_alone(nll_B[:1]).ppl_error)


def _alone(nll_B):
  return perplexity.Quality(
    nll_sum=nll_B.sum(), tokens=50, predicted_bytes=1, seq_len=51, nll_B=tuple(nll_B)
  )
