"""Tests the stacked forward pass against the plain one, and how layers are divided into runs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from model import presets, sharding, stacked, transformer
from model.layers.mixers.delta import GatedDeltaConfig
from model.layers.mixers.linear import linear_attention
from model.stacked import Run
from model.train import optimizer, partition
from model.train.optimizer import OptimizerConfig
from model.transformer import Transformer
from ops import lora, quantized

# Float32 sums in another order, relative to the largest element of an array.
TOLERANCE = 2e-5
BATCH, LENGTH = 2, 12
SEGMENTS = np.array([[1] * 5 + [2] * 7, [1] * 12], np.int32)
POSITIONS = np.array([[*range(5), *range(7)], range(12)], np.int32)


def _config(name, depth, **changes):
  config = presets.preset(name)
  layers = itertools.islice(itertools.cycle(config.layers), depth)
  return config.replace(layers=tuple(layers), vocab_size=64, **changes)


def _uneven():
  config = _config('tiny-llama', 5)
  narrow = config.layers[2].with_ffn(width=40)
  return config.replace(layers=(*config.layers[:2], narrow, *config.layers[3:]))


def _recurrent():
  config = _config('tiny-llama', 4)
  mixers = (
    GatedDeltaConfig(key_heads=1, value_heads=2, key_width=8, value_width=8),
    linear_attention(2, 8, 8),
  )
  layers = (dataclasses.replace(config.layers[0], mixer=one) for one in mixers * 2)
  return config.replace(layers=tuple(layers))


CONFIGS = {
  'alike': _config('tiny-llama', 3),
  'alternating windows': _config('tiny-gemma2', 4),
  'learned positions': _config('tiny-gpt2', 3),
  'parallel': _config('tiny-neox', 2),
  'uneven': _uneven(),
  'recurrent': _recurrent(),
}


def _tokens(rows=BATCH):
  return np.random.default_rng(0).integers(0, 64, (rows, LENGTH)).astype(np.int32)


def _split(config):
  """A random model, whose norms and biases are random too, as structure and state."""
  model = Transformer(config, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(1)
  for param in transformer.parameters(model).values():
    value = param.get_value()
    param.set_value(value + jnp.asarray(0.1 * rng.normal(size=value.shape), value.dtype))
  return nnx.split(model)


def _plain(model, tokens_BT, **context):
  return model.hidden(tokens_BT, **context)[0]


def _value_and_grad(graphdef, state, forward, **context):
  weights_D = jnp.cos(jnp.arange(64.0))
  pooled = lambda x_BTD: jnp.sum(jnp.sin(x_BTD) * weights_D[None, None])
  fn = lambda state: pooled(forward(nnx.merge(graphdef, state), _tokens(), **context))
  return jax.jit(jax.value_and_grad(fn, allow_int=True))(state)


def _assert_equal(got, want):
  pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
  for (path, a), b in pairs:
    if a.dtype == jax.dtypes.float0:
      continue
    # At least 0.1, because the gradient of a key's bias is zero but for rounding.
    scale = max(float(np.abs(b).max()), 0.1)
    tolerance = max(TOLERANCE, float(jnp.finfo(b.dtype).eps)) * scale  # some scales are float16
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.quick(name=('alternating windows',))
def test_values_and_gradients_are_those_of_the_plain_forward_pass(name):
  graphdef, state = _split(CONFIGS[name])
  context = {'positions_BT': POSITIONS, 'segments_BT': SEGMENTS}
  want = _value_and_grad(graphdef, state, _plain, **context)
  assert jnp.abs(want[0]) > 1e-2
  got = _value_and_grad(graphdef, state, stacked.hidden, **context)
  _assert_equal(got, want)


@pytest.mark.slow
def test_rematerialization_changes_no_number():
  graphdef, state = _split(_uneven())
  want = _value_and_grad(graphdef, state, _plain)
  got = _value_and_grad(graphdef, state, lambda *a: stacked.hidden(*a, remat='dots'))
  _assert_equal(got, want)


def test_weight_types_are_stacked_where_they_are_alike():
  config = _config('tiny-llama', 4)
  model = Transformer(config, rngs=nnx.Rngs(0))
  key = jax.random.key(0)
  for i, block in enumerate(model.layers):
    weight = block.ffn.up.weight
    w = quantized.quantize(weight.get_value(), 'int4' if i < 2 else 'int8', group_size=32)
    a_IR = jax.random.normal(jax.random.fold_in(key, i), (64, 2))
    weight.set_value(lora.LoraTensor(w, a_IR, jnp.ones((2, 152)), 0.5))
  kinds = [stacked.kind(block) for block in model.layers]
  assert stacked.runs(kinds) == [Run(0, 1, 2), Run(2, 1, 2)]
  graphdef, state = nnx.split(model)
  want = _value_and_grad(graphdef, state, _plain)
  got = _value_and_grad(graphdef, state, lambda *a: stacked.hidden(*a, remat='block'))
  _assert_equal(got, want)


def test_sharded_parameters_give_the_same_hidden_states():
  graphdef, state = _split(CONFIGS['alternating windows'])
  want = stacked.hidden(nnx.merge(graphdef, state), _tokens(8))
  mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
  model = nnx.merge(graphdef, state)
  sharding.shard(model, mesh)
  _, placed = nnx.split(model)
  tokens = jax.device_put(_tokens(8), sharding.batch_sharding(mesh))
  got = jax.jit(lambda s, t: stacked.hidden(nnx.merge(graphdef, s), t, remat='block'))(
    placed, tokens
  )
  _assert_equal(got, want)


def _paths(model):
  return {path: param.get_value() for path, param in transformer.parameters(model).items()}


@pytest.mark.parametrize('name', ['alternating windows', 'uneven'])
def test_a_model_comes_back_from_its_stacks(name):
  graphdef, state = _split(CONFIGS[name])
  model = nnx.merge(graphdef, state)
  packed = stacked.stack(model)
  assert len(packed.layers) < len(model.layers) and stacked.stack(packed) is packed
  again = stacked.unstack(packed)
  assert nnx.split(again)[0] == graphdef
  jax.tree.map(np.testing.assert_array_equal, nnx.split(again)[1], state)
  assert not any(map(stacked.is_stacked, _paths(model)))
  for path, array in _paths(packed).items():
    repeats = packed.layers[int(path.split('.')[1])].repeats if stacked.is_stacked(path) else None
    assert repeats is None or array.shape[0] == repeats > 1


def test_a_model_that_is_consumed_is_not_held_twice():
  model = Transformer(CONFIGS['alike'], rngs=nnx.Rngs(0))
  expected = stacked.stack(model)
  found = stacked.stack(model, consume=True)
  for a, b in zip(jax.tree.leaves(nnx.state(found)), jax.tree.leaves(nnx.state(expected))):
    np.testing.assert_array_equal(a, b)
  freed = [leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(model.layers))]
  assert all(freed) and not model.embedding.table.get_value().is_deleted()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_stacked_model_is_trained_as_an_ordinary_one(name):
  graphdef, state = _split(CONFIGS['alternating windows'])
  # A tiny eps would divide rounding errors of gradients near zero by their own size.
  settings = OptimizerConfig(name=name, steps=9, learning_rate=1e-2, weight_decay=0.5, eps=1e-3)
  tx = optimizer.make(settings)

  def trained(model, forward):
    structure, arrays, _ = partition.partition(model, partition.Selection())
    loss = lambda arrays: jnp.mean(jnp.sin(forward(structure.model(arrays), _tokens())))

    @jax.jit
    def step(arrays, opt_state):
      updates, opt_state = tx.update(jax.grad(loss)(arrays), opt_state, arrays)
      return optax.apply_updates(arrays, updates), opt_state

    opt_state = tx.init(arrays)
    for _ in range(2):
      arrays, opt_state = step(arrays, opt_state)
    return structure.model(arrays)

  want = trained(nnx.merge(graphdef, state), _plain)
  got = trained(stacked.stack(nnx.merge(graphdef, state)), stacked.hidden)
  moved = [jnp.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (nnx.split(want)[1], state)))]
  assert min(moved) > 1e-5
  _assert_equal(nnx.split(stacked.unstack(got))[1], nnx.split(want)[1])


@pytest.mark.parametrize(
  'kinds, want',
  [
    ('AAAAA', [Run(0, 1, 5)]),
    ('ABABAB', [Run(0, 2, 3)]),
    ('AABAABAAB', [Run(0, 3, 3)]),
    ('CABABAB', [Run(0, 1, 1), Run(1, 2, 3)]),
    ('AAAB', [Run(0, 1, 3), Run(3, 1, 1)]),
    ('ABCD', [Run(0, 4, 1)]),
    ('A', [Run(0, 1, 1)]),
    ('ABABA', [Run(0, 2, 2), Run(4, 1, 1)]),
  ],
)
def test_runs_compile_the_fewest_blocks(kinds, want):
  found = stacked.runs(kinds)
  blocks = lambda runs: (sum(run.period for run in runs), len(runs))
  covered = [kinds[run.start : run.start + run.period] * run.repeats for run in found]
  assert ''.join(covered) == kinds
  assert blocks(found) == blocks(want)
  if kinds != 'ABABA':  # two divisions are equally good
    assert found == want


def _dots(depth, name='tiny-gemma2'):
  """The number of matrix products in the traced forward and backward pass."""
  graphdef, state = nnx.split(transformer.abstract(_config(name, depth)))
  fn = lambda s: jnp.sum(stacked.hidden(nnx.merge(graphdef, s), _tokens()))
  return str(jax.make_jaxpr(jax.grad(fn))(state)).count('dot_general')


def test_the_program_has_as_many_products_at_any_depth():
  assert _dots(4) == _dots(10) == 2 * _dots(3, 'tiny-llama') > 0


def _equations(depth):
  """The number of equations of the traced update of a stacked model."""
  make = lambda: stacked.stack(Transformer(_config('tiny-llama', depth), rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(nnx.eval_shape(make))
  tx = optimizer.make(OptimizerConfig(steps=9, learning_rate=1))

  def update(state, opt_state):
    loss = lambda s: jnp.sum(stacked.hidden(nnx.merge(graphdef, s), _tokens(), remat='block'))
    return tx.update(jax.grad(loss)(state), opt_state, state)

  return str(jax.make_jaxpr(update)(state, jax.eval_shape(tx.init, state))).count(' = ')


def test_the_update_of_a_stacked_model_has_one_size_at_any_depth():
  assert _equations(3) == _equations(12) > 100


def _temporary_bytes(remat):
  config = _config('tiny-llama', 8)
  make = lambda: stacked.stack(Transformer(config, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(nnx.eval_shape(make))
  tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)
  fn = lambda s, t: jnp.sum(stacked.hidden(nnx.merge(graphdef, s), t, remat=remat))
  return jax.jit(jax.grad(fn)).lower(state, tokens).compile().memory_analysis().temp_size_in_bytes


def test_rematerialization_saves_memory():
  block, dots, none = map(_temporary_bytes, ('block', 'dots', 'none'))
  assert 1.5 * block < dots and 1.5 * dots < none


def test_unknown_policies_are_named():
  with pytest.raises(ValueError, match="remat 'all' is not one of none, block, dots"):
    stacked.hidden(nnx.merge(*_split(_config('tiny-llama', 2))), _tokens(), remat='all')
