"""Models that learn to be quantized: they train, and what is stored gives the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from model import checkpoint, hf, learned
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.learned import QatConfig
from model.train import step as step_lib
from model.train.data import PackedDataset
from model.train.partition import Selection
from model.train.step import Task
from model.transformer import Transformer, linears, matrices
from ops import qat, quantized, sparse
from ops.linear import innermost

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 8)))
CONFIGS = {
  'int8': QatConfig(format='int8'),
  'int4': QatConfig(format='int4', group_size=16),
  'int3 asymmetric': QatConfig(format='int3', group_size=16, symmetric=False, held=True),
  'int2 with trained scales': QatConfig(format='int2', group_size=16, held=True),
  'nf4': QatConfig(format='nf4', group_size=16),
  'fp8': QatConfig(format='fp8_e4m3'),
  'W8A8': QatConfig(format='int8', activation_bits=8),
}


def _model():
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=8), ffn=FeedForwardConfig(width=32)
  )
  config = ModelConfig(family='llama', vocab_size=32, width=16, layers=(layer,), max_positions=64)
  return Transformer(config, rngs=nnx.Rngs(0))


def _logits(model):
  return np.asarray(_run(*nnx.split(model), TOKENS))


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


def _trained(model, selection, updates=20):
  data = PackedDataset.from_ids(
    [[(s + i) % 30 for i in range(40)] for s in range(8)], eos_id=31, seq_len=16, batch_size=4
  )
  setup, state, frozen = step_lib.init(model, optax.adam(1e-2), Task(selection=selection))
  step = step_lib.make_step(setup, state)
  losses = []
  for n in range(updates):
    state, metrics = step(state, frozen, data.batch(n))
    losses.append(float(metrics['loss']))
  return setup.model(state.trained, frozen), losses


# tests/ops/qat_test.py has every format, on one matrix.
QUICK = ('int2 with trained scales', 'W8A8')


@pytest.mark.parametrize(
  'name', [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
)
def test_what_is_learned_is_stored_and_gives_the_same_logits_bit_for_bit(name, tmp_path):
  config = CONFIGS[name]
  scale = ('layers.*',) if 'scales' in name else ()
  model, losses = _trained(learned.attach(_model(), config), Selection(scale=scale))
  assert losses[-1] < 0.8 * losses[0]
  final = learned.finish(model)
  assert _logits(final).tobytes() == _logits(model).tobytes()
  for layer, w in matrices(final).items():
    if layer.startswith('layers.'):
      assert isinstance(innermost(w), quantized.QuantizedTensor)
  hf.save_pretrained(final, None, tmp_path / 'model')
  again, _ = hf.load_pretrained(tmp_path / 'model')
  assert _logits(again).tobytes() == _logits(model).tobytes()


def test_a_model_that_still_learns_is_saved_too(tmp_path):
  model = learned.attach(_model(), CONFIGS['int2 with trained scales'])
  checkpoint.save(tmp_path / 'state', model)
  assert _logits(checkpoint.load(tmp_path / 'state')).tobytes() == _logits(model).tobytes()


@pytest.mark.slow
def test_scales_move_where_they_are_trained_and_only_there():
  config = CONFIGS['int2 with trained scales']
  start = learned.attach(_model(), config)
  for scale, moves in (((), False), (('layers.*',), True)):
    model, _ = _trained(start, Selection(scale=scale), updates=2)
    for layer, w in matrices(model).items():
      if layer.startswith('layers.'):
        same = np.array_equal(w.scales, matrices(start)[layer].scales)
        assert same != moves


@pytest.fixture(scope='module')
def exact():
  """The losses of training with float products."""
  return _trained(_model(), Selection(), updates=40)[1]


@pytest.mark.parametrize('backward', ['inputs', 'all'])
@pytest.mark.quick(backward=('all',))
def test_int8_products_train_nearly_as_float_ones(backward, exact):
  start = learned.with_int8_products(_model(), backward)
  model, losses = _trained(start, Selection(), updates=40)
  assert losses != exact and losses[-1] < 0.6 * losses[0]
  assert losses[-1] == pytest.approx(exact[-1], rel=0.05)
  final = learned.finish(model)
  assert all(isinstance(w, jax.Array) for w in matrices(final).values())
  with pytest.raises(ValueError, match='is stored as a Int8Products already'):
    learned.with_int8_products(start)


@pytest.mark.slow
def test_n_of_m_values_learn_and_zeros_stay():
  plain = _model()
  for layer, linear in linears(plain).items():
    if layer.startswith('layers.'):
      w_IO = linear.weight.get_value()
      mask_IO = sparse.n_of_m_mask(jnp.abs(w_IO), 2, 4)
      linear.weight.set_value(sparse.compress(w_IO, mask_IO, 2, 4))
  model, _ = _trained(learned.attach(plain, QatConfig(format='int8')), Selection())
  final = learned.finish(model)
  assert _logits(final).tobytes() == _logits(model).tobytes()
  for layer, w in matrices(final).items():
    if layer.startswith('layers.'):
      assert isinstance(w.values, quantized.QuantizedTensor)
      assert isinstance(matrices(model)[layer].values, qat.QatTensor)
      assert np.mean(np.asarray(w.dense()) == 0) >= 0.5


def test_what_does_not_fit_is_named():
  with pytest.raises(ValueError, match=r"no layer matches 'layers\.9\.\*'"):
    learned.attach(_model(), QatConfig(targets=('layers.9.*',)))
  with pytest.raises(ValueError, match=r'layers\.0\.\S+: a group size of 48'):
    learned.attach(_model(), QatConfig(group_size=48))
  with pytest.raises(ValueError, match='activations have 8 or 4 bits, not 3'):
    QatConfig(activation_bits=3)
  quantized_model = learned.finish(learned.attach(_model(), QatConfig(format='int8')))
  with pytest.raises(ValueError, match='already quantized'):
    learned.attach(quantized_model, QatConfig(format='int8'))
