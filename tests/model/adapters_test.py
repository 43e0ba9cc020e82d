"""Adapters on whole models: which layers get one, how they begin, and what merging leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import adapters
from model.adapters import AdapterConfig
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, linears, matrices
from ops import quantized, sparse
from ops.linear import dense
from ops.lora import DoraTensor, LoraTensor
from ops.masked import MaskedTensor

FLOAT32 = 2e-5
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 8)))


def _model(change=lambda w: w, layers=2):
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=8), ffn=FeedForwardConfig(width=32)
  )
  config = ModelConfig(
    family='llama', vocab_size=32, width=16, layers=(layer,) * layers, max_positions=64
  )
  model, change = Transformer(config, rngs=nnx.Rngs(0)), jax.jit(change)
  for path, linear in linears(model).items():
    if path.startswith('layers.'):
      w_IO = 10 * linear.weight.get_value()  # so that logits are of order 1
      linear.weight.set_value(change(w_IO))
  return model


def _attach(model, **config):
  return adapters.attach(model, AdapterConfig(rank=2, **config), key=jax.random.key(0))


def _logits(model):
  return np.asarray(_run(*nnx.split(model), TOKENS))


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


def _moved(model):
  """The model after its adapters have learned something."""
  rng = np.random.default_rng(1)
  for layer, w in adapters.adapted(model).items():
    leaves, structure = jax.tree.flatten(w)
    roles = adapters.roles(w)
    moved = [
      leaf + jnp.asarray(0.1 * rng.random(leaf.shape), leaf.dtype) if role == 'adapter' else leaf
      for leaf, role in zip(leaves, roles, strict=True)
    ]
    linears(model)[layer].weight.set_value(jax.tree.unflatten(structure, moved))
  return model


nf4 = lambda w_IO: quantized.quantize(w_IO, 'nf4', group_size=16, double=True)
two_of_four = lambda w_IO: sparse.compress(w_IO, sparse.n_of_m_mask(jnp.abs(w_IO), 2, 4), 2, 4)
pruned = lambda w_IO: jnp.where(
  sparse.unstructured_mask(jnp.abs(w_IO), 0.5, per_output=True), w_IO, 0
)
to_dense, rounded = jax.jit(dense), jax.jit(lambda w_IO: dense(nf4(w_IO)))
BASES = {'dense': lambda w: w, 'nf4': nf4, '2:4': two_of_four, 'pruned': pruned}


@pytest.mark.parametrize('base', ['dense', 'nf4', 'pruned'])
@pytest.mark.quick(base=('nf4', 'pruned'))
def test_the_model_starts_as_its_base_and_merges_into_an_equal_one(base):
  plain = _model(BASES[base])
  before = _logits(plain)
  model = _attach(plain)
  np.testing.assert_allclose(_logits(model), before, atol=FLOAT32)
  assert len(adapters.adapted(model)) == 14 and not adapters.adapted(plain)
  moved = _moved(model)
  assert np.abs(_logits(moved) - before).max() > 0.01
  merged = adapters.merge(moved)
  assert all(isinstance(w, jax.Array) for w in matrices(merged).values())
  np.testing.assert_allclose(_logits(merged), _logits(moved), atol=10 * FLOAT32)


@pytest.mark.parametrize('base', ['2:4', 'pruned'])
@pytest.mark.quick(base=('2:4',))
def test_zeros_stay_when_adapters_are_merged(base):
  plain = _model(BASES[base])
  model = _moved(_attach(plain))
  assert all(isinstance(w, MaskedTensor) for w in adapters.adapted(model).values())
  for into in ('dense', 'base'):
    after = matrices(adapters.merge(model, into))
    for layer, w in matrices(plain).items():
      if layer.startswith('layers.'):
        zeros = np.asarray(to_dense(w)) == 0
        np.testing.assert_array_equal(np.asarray(to_dense(after[layer]))[zeros], 0)
        assert 0.4 < zeros.mean() < 0.6


def test_a_quantized_base_is_quantized_anew_where_that_is_asked_for():
  model = _moved(_attach(_model(nf4)))
  again = adapters.merge(model, 'base')
  exact = matrices(adapters.merge(model))
  for layer, w in matrices(again).items():
    if layer.startswith('layers.'):
      assert isinstance(w, quantized.QuantizedTensor) and w.format == 'nf4'
      np.testing.assert_allclose(to_dense(w), rounded(exact[layer]), atol=FLOAT32)


def test_patterns_choose_layers_ranks_and_scales():
  model = _attach(
    _model(),
    alpha=6.0,
    targets=('layers.*.ffn.*', 'head'),
    ranks={'*.up': 3, 'layers.1.*.up': 4},
    alphas={'head': 1.0},
    rslora=True,
  )
  found = adapters.adapted(model)
  assert set(found) == {
    *(f'layers.{l}.ffn.{part}' for l in (0, 1) for part in ('gate', 'up', 'down')),
    'head',
  }
  ranks = {layer: w.a_IR.shape[1] for layer, w in found.items()}
  assert ranks['layers.0.ffn.up'] == 3 and ranks['layers.1.ffn.up'] == 4 and ranks['head'] == 2
  assert found['head'].scale == pytest.approx(1 / 2**0.5)
  assert found['layers.1.ffn.up'].scale == pytest.approx(6 / 4**0.5)


def test_starts_and_forms():
  original = matrices(_model(layers=1))
  dora = _attach(_model(layers=1), dora=True)
  assert all(isinstance(w, DoraTensor) for w in adapters.adapted(dora).values())
  np.testing.assert_allclose(_logits(dora), _logits(_model(layers=1)), atol=10 * FLOAT32)
  pissa = _attach(_model(layers=1), start='pissa')
  np.testing.assert_allclose(_logits(pissa), _logits(_model(layers=1)), atol=10 * FLOAT32)
  config = AdapterConfig(rank=4, start='loftq')
  key = jax.random.key(0)
  loftq = adapters.attach(_model(nf4, 1), config, key=key, originals=original)
  plain = _attach(_model(nf4, 1))
  error = lambda model, layer: float(
    jnp.linalg.norm(dense(matrices(model)[layer]) - original[layer])
  )
  for layer in adapters.adapted(loftq):
    assert isinstance(matrices(loftq)[layer], LoraTensor)
    assert error(loftq, layer) < 0.8 * error(plain, layer)


def test_an_adapter_of_a_changed_base_becomes_one_of_the_original():
  original = _model()
  start = _attach(original, start='pissa')
  trained = _moved(nnx.clone(start))
  found = adapters.for_original(trained, start, original)
  np.testing.assert_allclose(_logits(found), _logits(trained), atol=10 * FLOAT32)
  for layer, w in adapters.adapted(found).items():
    assert w.base is matrices(original)[layer] and w.a_IR.shape[1] == 4


def test_the_key_decides_the_draw_and_layers_differ():
  first, again = (_attach(_model()) for _ in range(2))
  other = adapters.attach(_model(), AdapterConfig(rank=2), key=jax.random.key(1))
  sides = lambda model: [np.asarray(w.a_IR) for w in adapters.adapted(model).values()]
  assert all(np.array_equal(a, b) for a, b in zip(sides(first), sides(again), strict=True))
  assert not any(np.array_equal(a, b) for a, b in zip(sides(first), sides(other), strict=True))
  assert len({a.tobytes() for a in sides(first)}) == 14


def test_what_does_not_fit_is_named():
  for bad in ({'rank': 0}, {'alpha': 0.0}, {'start': 'random'}, {'ranks': {'*': 1.5}}):
    with pytest.raises(ValueError, match='not'):
      AdapterConfig(**bad)
  with pytest.raises(ValueError, match=r"no layer matches 'layers\.9\.\*'; there are"):
    _attach(_model(), targets=('layers.9.*',))
  with pytest.raises(ValueError, match=r'layers\.0\.attention\.key: a rank lies between 1 and 8'):
    adapters.attach(_model(), AdapterConfig(rank=9), key=jax.random.key(0))
  with pytest.raises(ValueError, match='has an adapter already'):
    _attach(_attach(_model()))
  with pytest.raises(ValueError, match='plain LoRA that starts at zero'):
    _attach(_model(two_of_four), dora=True)
  with pytest.raises(ValueError, match='LoftQ needs a quantized weight'):
    _attach(_model(nf4), start='loftq')


def _shapes(model):
  graphdef, state = nnx.split(model)
  return nnx.merge(graphdef, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state))


@pytest.mark.parametrize('base', ['dense', 'nf4', '2:4'])
@pytest.mark.parametrize('into', ['base', 'dense', None])
@pytest.mark.quick(base=('nf4', '2:4'), into=('base', None))
def test_shapes_are_those_of_the_model_itself(base, into):
  plain, config = _model(BASES[base]), AdapterConfig(rank=2, targets=('*.up', '*.query'))
  found = adapters.shapes(_shapes(plain), config, into)
  model = adapters.attach(plain, config, key=jax.random.key(0))
  want = model if into is None else adapters.merge(model, into)
  assert jax.tree.all(jax.tree.map(_alike, matrices(found), matrices(want)))
  with pytest.raises(ValueError, match=r"no layer matches '\*\.upp'"):
    adapters.shapes(_shapes(plain), AdapterConfig(targets=('*.upp',)), into)
  with pytest.raises(ValueError, match=r'layers\.0\.\S+: a rank lies between 1 and 8, not 9'):
    adapters.shapes(_shapes(plain), AdapterConfig(rank=9), into)


def _alike(a, b):
  return (a.shape, a.dtype) == (b.shape, b.dtype)


def test_narrowed_adapters_have_the_dtype_of_the_weights():
  half = lambda w_IO: w_IO.astype(jnp.bfloat16)
  model = _moved(_attach(_model(lambda w_IO: nf4(half(w_IO)))))
  narrow = adapters.narrowed(model)
  for layer, w in adapters.adapted(narrow).items():
    was = matrices(model)[layer]
    assert w.a_IR.dtype == w.b_RO.dtype == jnp.bfloat16 and was.a_IR.dtype == jnp.float32
    np.testing.assert_array_equal(w.b_RO, half(was.b_RO))
    assert jax.tree.all(jax.tree.map(np.array_equal, w.base, was.base))
