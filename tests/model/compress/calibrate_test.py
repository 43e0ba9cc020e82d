"""Streamed calibration equals a whole forward pass in transformers, one block at a time."""

import dataclasses
import fnmatch
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.compress import calibrate, pipeline, recipe, registry, statistics
from model.transformer import linears, parameters

NAMES = tuple(statistics.STATISTICS)
# Two float32 forward passes that add in different orders.
TOLERANCE = 2e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoSpec:
  """No options."""


@pytest.fixture
def probe(monkeypatch):
  """A technique that puts the norms of a layer's inputs in the place of its weights."""
  monkeypatch.setattr(registry, 'TECHNIQUES', dict(registry.TECHNIQUES))

  @registry.technique('probe', spec=NoSpec, statistics=('input_norm',), paper='')
  def probe(w, statistics, spec):
    return jnp.broadcast_to(statistics['input_norm'][:, None], w.shape)


def _recipe(*steps, sequential='blocks'):
  return recipe.parse({'name': 'x', 'steps': list(steps), 'sequential': sequential})


def _weight(model, path):
  return pipeline.matrices(model)[path]


def test_statistics_equal_those_of_hooks_in_transformers(tiny, tokens_BT, torch_inputs):
  model = tiny()
  stream = calibrate.Stream(model, calibrate.batches(tokens_BT, 4))
  inputs = torch_inputs(model, tokens_BT)
  for i, block in enumerate(model.layers):
    measured = stream.observe(block, NAMES)
    stream.advance(block)
    assert len(measured) == 7
    for name, found in measured.items():
      x_TI = inputs[f'layers.{i}.{name}'].astype(np.float64)
      size = np.abs(x_TI)
      squares = np.square(x_TI)
      moments = np.stack([x_TI.mean(0), squares.mean(0)])
      covariance = x_TI.T @ x_TI / len(x_TI)
      expected = len(x_TI), np.sqrt(squares.sum(0)), covariance, size.max(0), size.mean(0), moments
      for statistic, value in zip(NAMES, expected, strict=True):
        np.testing.assert_allclose(
          found[statistic], value, TOLERANCE, TOLERANCE, err_msg=f'{i} {name} {statistic}'
        )


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'gemma2', 'neox', 'qwen3'])
@pytest.mark.quick(name=('llama', 'gemma2'))
def test_layers_with_the_same_inputs_share_what_is_measured(tiny_of, tokens_BT, name):
  model = tiny_of(name)
  measured = calibrate.Stream(model, [tokens_BT]).observe(model.layers[0], ('input_covariance',))
  together = {}
  for layer, found in measured.items():
    together.setdefault(id(found), []).append(layer)
  stages = model.layers[0].layer.wiring.stages
  assert sorted(map(sorted, together.values())) == sorted(map(sorted, stages))
  assert list(measured) == list(linears(model.layers[0]))


@pytest.mark.parametrize('batch_size', [1, 4])
def test_batches_do_not_matter(tiny, tokens_BT, batch_size):
  model = tiny(layers=1)
  whole = calibrate.Stream(model, calibrate.batches(tokens_BT, 6))
  cut = calibrate.Stream(model, calibrate.batches(tokens_BT, batch_size))
  assert sum(len(tokens_BT) for tokens_BT, _ in cut.batches) == len(tokens_BT)
  found, expected = (one.observe(model.layers[0], NAMES) for one in (cut, whole))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), found, expected)


@pytest.mark.parametrize(
  'first', [{'wanda': {'sparsity': 0.6}}, {'round_to_nearest': {'format': 'int4'}}]
)
@pytest.mark.quick(first=({'wanda': {'sparsity': 0.6}},))
def test_a_block_is_calibrated_on_what_the_compressed_ones_put_out(
  tiny, tokens_BT, torch_inputs, probe, first
):
  model = tiny()
  one = _recipe({**first, 'only': ['layers.0.*']}, {'probe': {}, 'only': ['layers.1.*']})
  compressed, _ = pipeline.compress(model, one, tokens_BT)
  half_done, _ = pipeline.compress(model, _recipe({**first, 'only': ['layers.0.*']}), tokens_BT)
  before, after = torch_inputs(model, tokens_BT), torch_inputs(half_done, tokens_BT)
  for path, x_TI in after.items():
    if path.startswith('layers.1.'):
      expected_I = np.sqrt((x_TI.astype(np.float64) ** 2).sum(0))
      np.testing.assert_allclose(_weight(compressed, path)[:, 0], expected_I, TOLERANCE, TOLERANCE)
      stale_I = np.sqrt((before[path].astype(np.float64) ** 2).sum(0))
      assert np.abs(expected_I / stale_I - 1).max() > 100 * TOLERANCE  # so it was a test


def test_a_step_is_calibrated_on_what_the_steps_before_left(tiny, tokens_BT, torch_inputs, probe):
  model = tiny(layers=1)
  steps = [{'magnitude': {'sparsity': 0.7}, 'only': ['*.up', '*.gate', '*.value']}]
  compressed, _ = pipeline.compress(
    model, _recipe(*steps, {'probe': {}, 'only': ['*.down']}), tokens_BT
  )
  inputs = torch_inputs(pipeline.compress(model, _recipe(*steps))[0], tokens_BT)
  expected_I = np.sqrt((inputs['layers.0.ffn.down'].astype(np.float64) ** 2).sum(0))
  found_I = _weight(compressed, 'layers.0.ffn.down')[:, 0]
  np.testing.assert_allclose(found_I, expected_I, TOLERANCE, TOLERANCE)


WANDA = {'wanda': {'sparsity': 0.6}}
STAGES = [
  (['*.query', '*.key', '*.value'], '*.output'),
  (['*.query', '*.key', '*.value', '*.output'], '*.up'),
  (['*.query', '*.key', '*.value', '*.output', '*.gate', '*.up'], '*.down'),
]


@pytest.mark.parametrize('before, layer', STAGES, ids=[layer for _, layer in STAGES])
@pytest.mark.parametrize(
  'sequential',
  ['layers', *(pytest.param(s, marks=pytest.mark.slow) for s in ('blocks', 'none'))],
)
def test_a_stage_meets_what_the_recipe_says(
  tiny, tokens_BT, torch_inputs, sequential, before, layer
):
  model = tiny(layers=2)
  compressed, _ = pipeline.compress(model, _recipe(WANDA, sequential=sequential), tokens_BT)
  path = f'layers.1.{"ffn" if layer in ("*.up", "*.down") else "attention"}{layer[1:]}'
  seen = {
    'layers': ['layers.0.*', *(f'layers.1.{one}' for one in before)],
    'blocks': ['layers.0.*'],
    'none': ['no layer'],
  }
  half_done = dict(pipeline.matrices(compressed))
  reference = nnx.clone(model)
  for name, linear in calibrate.linears(reference).items():
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in seen[sequential]):
      linear.weight.set_value(half_done[name])
  x_TI = torch_inputs(reference, tokens_BT)[path].astype(np.float64)
  w_IO = np.asarray(_weight(model, path), np.float64)
  score_IO = np.abs(w_IO) * np.sqrt((x_TI**2).sum(0))[:, None]
  rank_IO = score_IO.argsort(0).argsort(0)
  expected_IO = rank_IO >= round(0.6 * len(w_IO))
  disagree = (np.asarray(_weight(compressed, path) != 0) != expected_IO).mean()
  assert disagree < 0.01  # scores that differ by rounding alone


def test_the_input_orders_differ(tiny, tokens_BT):
  found = [
    pipeline.compress(tiny(), _recipe(WANDA, sequential=s), tokens_BT)[0] for s in recipe.SEQUENTIAL
  ]
  masks = [np.asarray(_weight(model, 'layers.1.ffn.down') != 0) for model in found]
  assert all((masks[i] != masks[j]).mean() > 0.01 for i, j in [(0, 1), (0, 2), (1, 2)])


def test_the_first_block_sees_the_embedding_as_compressed(tiny, tokens_BT, probe):
  model = tiny(layers=1)
  one = _recipe({'cast': {}}, {'probe': {}, 'only': ['*.query']})
  table_VD = model.embedding.table.get_value()
  model.embedding.table.set_value(table_VD + 3)  # where bfloat16 is coarse
  compressed, _ = pipeline.compress(model, one, tokens_BT)
  x_TD = np.asarray((table_VD + 3).astype(jnp.bfloat16).astype(jnp.float32))[tokens_BT.reshape(-1)]
  normed_TD = x_TD / np.sqrt((x_TD**2).mean(1, keepdims=True) + model.config.norm_eps)
  expected_D = np.sqrt((normed_TD.astype(np.float64) ** 2).sum(0))
  found_D = _weight(compressed, 'layers.0.attention.query')[:, 0]
  np.testing.assert_allclose(np.asarray(found_D, np.float32), expected_D, rtol=1e-5)


def test_nan_is_named_by_layer(tiny, tokens_BT):
  model = tiny()
  weight = model.layers[1].ffn.up.weight
  weight.set_value(weight.get_value().at[0, 0].set(jnp.nan))
  with pytest.raises(ValueError, match=r'inputs of layers\.1\.ffn\.down are not finite'):
    pipeline.compress(model, _recipe({'wanda': {}}), tokens_BT)


def _held_bytes(stream):
  return sum(x_BTD.nbytes for _, x_BTD in stream.batches)


def test_memory_does_not_grow_with_depth(tiny, tokens_BT, monkeypatch):
  """Statistics and hidden states, told from weights by their shapes, at every block's end."""
  monkeypatch.setattr(registry, 'TECHNIQUES', dict(registry.TECHNIQUES))

  @registry.technique('probe', spec=NoSpec, statistics=NAMES, paper='')
  def probe(w, statistics, spec):
    return w * jnp.trace(statistics['input_covariance'])

  def live_bytes():
    gc.collect()  # modules hold each other in cycles
    weights = {(48, 64), (48, 32), (64, 48), (48, 80), (80, 48), (61, 48), (48, 61), (48,)}
    return sum(a.nbytes for a in jax.live_arrays() if a.ndim and a.shape not in weights)

  def peak(layers):
    model, found = tiny(layers=layers), []
    start = live_bytes()

    def progress(parts):
      for part in parts:
        yield part
        found.append(live_bytes() - start)

    pipeline.compress(model, _recipe({'probe': {}}), tokens_BT, progress=progress)
    assert len(found) == layers + 3
    return max(found)

  gc.freeze()  # what is there already is not looked through at every block
  try:
    assert peak(6) == peak(2)
  finally:
    gc.unfreeze()


def test_a_stream_holds_one_set_of_hidden_states(tiny, tokens_BT):
  model = tiny(layers=3)
  stream = calibrate.Stream(model, calibrate.batches(tokens_BT, 4))
  assert _held_bytes(stream) == tokens_BT.size * model.config.width * 4
  for block in model.layers:
    stream.advance(block)
    assert _held_bytes(stream) == tokens_BT.size * model.config.width * 4
  expected_BTD = model.final_norm(jnp.concatenate([x for _, x in stream.batches]))
  graphdef, state = nnx.split(model)
  hidden_BTD, _ = jax.jit(lambda state, t: nnx.merge(graphdef, state).hidden(t))(state, tokens_BT)
  np.testing.assert_allclose(expected_BTD, hidden_BTD, TOLERANCE, TOLERANCE)


def test_half_precision_activations_stay_so(tiny, tokens_BT):
  half = tiny(layers=1)
  half.dtype = jnp.dtype(jnp.bfloat16)  # of the activations
  stream = calibrate.Stream(half, calibrate.batches(tokens_BT, 4))
  measured = stream.observe(half.layers[0], ('input_norm',))
  stream.advance(half.layers[0])
  assert all(x_BTD.dtype == jnp.bfloat16 for _, x_BTD in stream.batches)
  assert all(m['input_norm'].dtype == jnp.float32 for m in measured.values())


def test_half_precision_blocks_are_observed_and_run_natively_to_the_same_numbers(
  tiny, tokens_BT, monkeypatch
):
  half = tiny(layers=1)
  half.dtype = jnp.dtype(jnp.bfloat16)
  for param in parameters(half).values():
    param.set_value(param.get_value().astype(jnp.bfloat16))
  widened, found = [], []
  for pack in (calibrate.layout.pack_widened, lambda w: widened.append(w) or w):
    monkeypatch.setattr(calibrate.layout, 'pack_widened', pack)
    stream = calibrate.Stream(half, calibrate.batches(tokens_BT, 4))
    found.append(stream.observe(half.layers[0], NAMES))
    stream.advance(half.layers[0])
    found.append(np.concatenate([x_BTD for _, x_BTD in stream.batches]).astype(np.float32))
  assert len(widened) == 2 * 7
  rounding = 2**-6  # some of bfloat16's, one after the other
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rounding, rounding * np.abs(b).max()),
    found[:2],
    found[2:],
  )


@dataclasses.dataclass(frozen=True)
class Nudge:
  """Adds an array to the down projection."""

  def __call__(self, parameters, arrays, k):
    learned, fixed = arrays
    path = 'ffn.down.weight'
    return {path: parameters[path] + fixed + learned}


def _down_hill(learned, slopes, rate):
  return learned - 10 * rate * slopes


def test_descent_follows_the_slope_of_the_blocks_error(tiny, tokens_BT, torch_inputs):
  """The output is linear in the down projection, so numpy has the slope from its inputs."""
  model, steps = tiny(layers=1), 4
  stream = calibrate.Stream(model, calibrate.batches(tokens_BT, 4))
  h_TI = torch_inputs(model, tokens_BT)['layers.0.ffn.down'].astype(np.float64)
  start_IO = np.random.default_rng(1).standard_normal((80, 48))
  moved_IO = start_IO.copy()
  for i in range(steps):
    slope_IO = 2 * h_TI.T @ (h_TI @ moved_IO) / (len(h_TI) * 48)
    moved_IO -= 10 * (1 - i / steps) / steps * slope_IO
  assert np.abs(moved_IO - start_IO).max() > 0.1
  descent = calibrate.Descent(candidate=Nudge(), update=_down_hill, steps=steps, batch=9, seed=0)
  learned_IO = jnp.asarray(start_IO - 0.5, jnp.float32)
  found_IO = stream.descend(model.layers[0], descent, learned_IO, jnp.float32(0.5))
  np.testing.assert_allclose(found_IO + 0.5, moved_IO, TOLERANCE, TOLERANCE)


def test_every_row_is_drawn_before_one_comes_again(tiny, tokens_BT):
  stream = calibrate.Stream(tiny(layers=1), calibrate.batches(tokens_BT, 4))
  descent = calibrate.Descent(candidate=Nudge(), update=_down_hill, steps=9, batch=2, seed=3)
  drawn = stream._draws(descent)
  assert drawn.shape == (9, 2)
  assert all(sorted(drawn[i : i + 3].flat) == list(range(6)) for i in (0, 3, 6))
  assert not np.array_equal(drawn[:3], drawn[3:6])
  drawn_BT, x_BTD = calibrate._picked(stream.batches, np.array([5, 1, 4]))
  np.testing.assert_array_equal(drawn_BT, tokens_BT[[5, 1, 4]])
  whole_BTD = np.concatenate([x_BTD for _, x_BTD in stream.batches])
  np.testing.assert_array_equal(x_BTD, whole_BTD[[5, 1, 4]])


def test_errors_of_some_rows_are_those_of_a_stream_of_them(tiny, tokens_BT):
  model, nudge = tiny(layers=1), (jnp.float32(0.01), jnp.float32(0))
  error = lambda tokens_BT, rows: calibrate.Stream(model, calibrate.batches(tokens_BT, 4)).errors(
    model.layers[0], Nudge(), nudge, 1, rows
  )
  some = error(tokens_BT, 3)
  np.testing.assert_allclose(some, error(tokens_BT[::2], None), rtol=1e-5)
  assert abs(some / error(tokens_BT, None) - 1) > 1e-3
