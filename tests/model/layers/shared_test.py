"""Layers that read the keys and values of earlier ones, against a network written in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import config as configs
from model import hf, hf_names, kv_cache, stacked
from model.config import ModelConfig
from model.eval import cost, positions
from model.gguf import writer
from model.layers import lending
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.linformer import LinformerConfig
from model.layers.mixers.shared import SharedConfig
from model.stacked import Run
from model.transformer import Transformer, parameters
from ops import patterns

N, K, H, D, VOCABULARY, LENGTH = 4, 2, 8, 16, 40, 14
EXACT = 1e-5  # of logits, which are of order 1
CODED = 0.03  # of int8, as a root mean square; four layers with caches of their own have 0.02
HEADS = {'query_heads': N, 'kv_heads': K, 'head_width': H}
LENDER, OWN = AttentionConfig(**HEADS, lends=True), AttentionConfig(**HEADS)
WINDOW = {**HEADS, 'sparse': patterns.parse('window4+first1')}
read = lambda back, **traits: SharedConfig(**{**HEADS, **traits}, back=back)
MIXERS = {
  'CLA3': (LENDER, read(1), read(2), OWN),
  # Two lenders, crosswise: the windows share among themselves, and so do the others.
  'windows': (LENDER, AttentionConfig(**WINDOW, lends=True), read(2), read(2, **WINDOW)),
}
TOKENS_BT = np.random.default_rng(1).integers(0, VOCABULARY, (2, LENGTH), np.int32)


def _config(*mixers, **traits) -> ModelConfig:
  ffn = FeedForwardConfig(width=24)
  return ModelConfig(
    family='llama',
    vocab_size=VOCABULARY,
    width=D,
    layers=tuple(LayerConfig(mixer=mixer, ffn=ffn) for mixer in mixers),
    max_positions=64,
    **traits,
  )


def _model(*mixers) -> Transformer:
  made, rng = Transformer(_config(*mixers), rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for path, param in parameters(made).items():
    value = rng.standard_normal(param.get_value().shape) / 4 + ('norm' in path)
    param.set_value(jnp.asarray(value, 'float32'))
  return made


@pytest.fixture(scope='module', params=MIXERS)
def model(request):
  return _model(*MIXERS[request.param])


@pytest.fixture(scope='module')
def thrice():
  return _model(*MIXERS['CLA3'])


@jax.jit
def _logits(model, tokens_BT):
  return model(tokens_BT)


def _norm(x, scale):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def _rotated(x_TNH):
  angles = np.arange(len(x_TNH))[:, None] / 10000 ** (np.arange(H // 2) / (H // 2))
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
  a, b = np.split(x_TNH, 2, -1)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _by_hand(model, tokens_T) -> np.ndarray:
  """The logits of one text in float64, where each layer looks up the keys of the one it names."""
  w = {path: np.asarray(param.get_value(), np.float64) for path, param in parameters(model).items()}
  x, kept = w['embedding.table'][tokens_T], []
  t, s = np.arange(len(tokens_T))[:, None], np.arange(len(tokens_T))[None]
  for l, layer in enumerate(model.config.layers):
    at, mixer = f'layers.{l}.attention', layer.mixer
    h = _norm(x, w[f'{at}_norm.scale'])
    own = ('query',) if isinstance(mixer, SharedConfig) else ('query', 'key', 'value')
    q, *keys = [(h @ w[f'{at}.{part}.weight']).reshape(len(h), -1, H) for part in own]
    kept.append((_rotated(keys[0]), keys[1]) if keys else kept[l - mixer.back])
    k, v = (np.repeat(one, N // K, 1) for one in kept[l])
    seen = s <= t if mixer.pattern is None else (s <= t) & ((s > t - 4) | (s < 1))
    scores = np.einsum('tnh,snh->nts', _rotated(q), k) / H**0.5
    weights = np.exp(np.where(seen, scores, -np.inf))
    y = np.einsum('nts,snh->tnh', weights / weights.sum(-1, keepdims=True), v)
    x = x + y.reshape(len(h), -1) @ w[f'{at}.output.weight']
    at = f'layers.{l}.ffn'
    h = _norm(x, w[f'{at}_norm.scale'])
    gate = h @ w[f'{at}.gate.weight']
    x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f'{at}.up.weight'])) @ w[f'{at}.down.weight']
  return _norm(x, w['final_norm.scale']) @ w['head.weight']


def test_logits_are_those_of_the_network_by_hand(model):
  expected = np.stack([_by_hand(model, tokens_T) for tokens_T in TOKENS_BT])
  np.testing.assert_allclose(_logits(model, TOKENS_BT), expected, atol=EXACT)


def test_no_token_depends_on_what_follows(model):
  other_BT = np.array(TOKENS_BT)
  other_BT[:, 9:] = (other_BT[:, 9:] + 1) % VOCABULARY
  found, others = (np.asarray(_logits(model, one)) for one in (TOKENS_BT, other_BT))
  np.testing.assert_array_equal(found[:, :9], others[:, :9])
  assert np.abs(found[:, 9:] - others[:, 9:]).max() > 0.01


@jax.jit
def _step(model, caches, tokens_BT, positions_BT):
  x_BTD, caches = model.hidden(tokens_BT, positions_BT=positions_BT, cache=caches)
  return caches, model.logits(x_BTD)


def _feed(model, format, lengths) -> np.ndarray:
  """The logits of all tokens, so many at a time through a cache."""
  caches = kv_cache.init(model.config, 2, LENGTH, format=format)
  start, found = 0, []
  for length in lengths:
    positions_BT = np.broadcast_to(np.arange(start, start + length, dtype=np.int32), (2, length))
    now = slice(start, start + length)
    caches, logits = _step(model, caches, TOKENS_BT[:, now], positions_BT)
    found.append(np.asarray(logits))
    start += length
  return np.concatenate(found, 1)


@pytest.mark.parametrize(
  ('name', 'format'),
  [('CLA3', 'float'), ('windows', 'float'), ('windows', 'int8'), ('CLA3', 'int4')],
)
@pytest.mark.quick(name=('windows',), format=('int8',))
def test_decoding_equals_reading_at_once(name, format):
  """One by one and in parts, with windows that are left behind."""
  model = _model(*MIXERS[name])
  found = _feed(model, format, (5, 5, *(1,) * 4))
  # All tokens fit into the page of int4 that is exact.
  expected = _feed(model, format, (LENGTH,)) if format == 'int8' else _logits(model, TOKENS_BT)
  np.testing.assert_allclose(found, expected, atol=EXACT)
  errors = found - np.asarray(_logits(model, TOKENS_BT))
  assert np.sqrt(np.mean(errors**2)) < CODED


@pytest.mark.parametrize('format', ['float', 'bf16', 'int8', 'int4'])
def test_readers_hold_no_bytes(thrice, format):
  caches = kv_cache.init(thrice.config, 2, 64, format=format)
  held = [sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) for cache in caches]
  assert held[0] == held[3] > 0 and held[1:3] == [0, 0]
  own = thrice.config.replace(layers=(thrice.config.layers[3],) * 4)
  total = cost.kv_cache_bytes(thrice.config, 64, jnp.float32, format)
  assert total == sum(held) // 2 == cost.kv_cache_bytes(own, 64, jnp.float32, format) // 2
  # But a step reads what it holds once for each layer.
  read_bytes = [
    cost.decode_bytes_per_step(one, {}, 64, jnp.float32, format) for one in (thrice.config, own)
  ]
  assert read_bytes[0] == read_bytes[1]


def _grad(hidden, model):
  graphdef, params = nnx.split(model)

  def loss(params):
    x_BTD = hidden(nnx.merge(graphdef, params), TOKENS_BT)
    return jnp.sum(x_BTD**2 @ jnp.linspace(0, 1, D))

  return nnx.to_flat_state(jax.jit(jax.grad(loss))(params))


def test_loops_over_stacked_layers_keep_who_reads_whom():
  """Two pairs are alike, and the gradients are those of no loop."""
  model = _model(*(LENDER, read(1)) * 2)
  assert [type(layer).__name__ for layer in stacked.stack(model).layers] == ['Stack']
  plain = dict(_grad(lambda model, tokens_BT: model.hidden(tokens_BT)[0], model))
  for path, value in _grad(functools.partial(stacked.hidden, remat='block'), model):
    expected = np.asarray(plain[path].get_value())
    atol = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(value.get_value(), expected, atol=atol, err_msg=str(path))


@pytest.mark.parametrize(
  ('mixers', 'sizes'),
  [
    ((LENDER, read(1), LENDER, read(1), LENDER), [2, 2, 1]),
    ((OWN, LENDER, read(1), read(2), OWN), [1, 3, 1]),
    (MIXERS['windows'], [4]),
  ],
)
def test_no_loop_parts_a_reader_from_its_lender(mixers, sizes):
  assert lending.pieces(_config(*mixers).layers) == sizes
  # Pairs and one more layer: not the first layer and a loop.
  assert stacked.runs_of_layers('ABABA', [2, 2, 1]) == [Run(0, 2, 2), Run(4, 1, 1)]


def test_matrices_learn_from_all_layers_that_read_them():
  """The slope along a direction, by central differences in float64 of the network by hand."""
  model = _model(LENDER, read(1))
  w_IO, v_IO = (getattr(model.layers[0].attention, part).weight for part in ('key', 'value'))
  weigh_TV = np.random.default_rng(2).standard_normal((LENGTH, VOCABULARY))
  loss = lambda model: jnp.sum(model(TOKENS_BT[:1])[0] * jnp.asarray(weigh_TV, 'float32'))
  slopes = jax.jit(nnx.grad(loss))(model)
  for name, weight in (('key', w_IO), ('value', v_IO)):
    found = np.asarray(getattr(slopes['layers'][0]['attention'], name)['weight'].get_value())
    old, step = weight.get_value(), 2.0**-6
    values = []
    for sign in (1, -1):
      weight.set_value(old.at[3, 5].add(sign * step))
      values.append((_by_hand(model, TOKENS_BT[0]) * weigh_TV).sum())
    weight.set_value(old)
    np.testing.assert_allclose(found[3, 5], (values[0] - values[1]) / (2 * step), rtol=1e-2)


def test_a_saved_model_is_the_same_and_others_cannot_describe_it(thrice, tmp_path):
  assert configs.from_json(configs.to_json(thrice.config)) == thrice.config
  hf.save_pretrained(thrice, None, tmp_path / 'saved')
  again, _ = hf.load_pretrained(tmp_path / 'saved')
  assert again.config == thrice.config
  np.testing.assert_array_equal(_logits(again, TOKENS_BT), _logits(thrice, TOKENS_BT))
  with pytest.raises(ValueError, match="layers 1, 2: mixer = 'SharedConfig'"):
    hf_names.config_to_hf(thrice.config)
  with pytest.raises(ValueError, match="mixer = 'SharedConfig'"):
    writer.write(tmp_path / 'm.gguf', thrice, None, writer.Types(matrices='f32'))


def test_losses_by_position_hand_on_what_layers_lend(thrice):
  logits = np.asarray(_logits(thrice, TOKENS_BT))[:, :-1]
  nll = -np.take_along_axis(jax.nn.log_softmax(logits), TOKENS_BT[:, 1:, None], 2)[..., 0]
  np.testing.assert_allclose(positions.nll(thrice, TOKENS_BT), nll, atol=EXACT)


REFUSED = {
  'layer 0 reads the keys and values of the layer 1 before it, but there': (read(1), OWN),
  'layer 1 cannot read the keys and values of layer 0: that layer lends none': (OWN, read(1)),
  'kv_heads is 4 here and 2 there': (LENDER, read(1, kv_heads=4)),
  'it sees all keys here, and there no more than window4': (
    AttentionConfig(**WINDOW, lends=True),
    read(1),
  ),
}


@pytest.mark.parametrize('message', REFUSED)
def test_what_cannot_be_read_is_refused(message):
  with pytest.raises(ValueError, match=message.replace('+', r'\+')):
    _config(*REFUSED[message])


def test_other_bad_configs_are_refused():
  with pytest.raises(ValueError, match='back must be'):
    read(0)
  with pytest.raises(ValueError, match='of its own lends none'):
    read(1, lends=True)
  with pytest.raises(ValueError, match='it lends nothing to later layers'):
    LinformerConfig(**HEADS, window=8, chunk=4, summaries=1, lends=True)
