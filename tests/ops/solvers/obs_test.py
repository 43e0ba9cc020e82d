"""The solver against exact optimal brain surgery in float64, and what must hold for any Hessian.

The oracle inverts the Hessian over the free inputs anew at each step and looks weights up in a
table of all the values of the grid; of the code under test it shares the fit of scales alone.
"""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ops import formats, quantized, scales, selection, sparse
from ops.solvers import obs, walk

SAME = 1e-5  # float32 and a few hundred steps, against float64
GPTQ = (
  obs.Grid(format='int4', group=16),
  obs.Grid(format='int2', group=16, clip='signed_mse'),
  obs.Grid(format='int3', group=48, symmetric=False, clip='mse'),
  obs.Grid(format='int8', group=24, symmetric=False),
  obs.Grid(format='nf4', group=16),
  obs.Grid(format='nf4', group=24, double=True),
  obs.Grid(format='fp8_e4m3', group=48),
  obs.Grid(format='nvfp4', group=16),
)
MX = (obs.Grid(format='mxfp4', group=32), obs.Grid(format='mxfp8', group=32))  # of 64 inputs
PRUNINGS = (
  obs.Pruning(sparsity=0.5),
  obs.Pruning(sparsity=0.3, per_output=True),
  obs.Pruning(n=2, m=4),
  obs.Pruning(n=4, m=8),
  obs.Pruning(n=1, m=6),
)

SHARDED = {'half': {'pruning': PRUNINGS[0]}, 'joint': {'pruning': PRUNINGS[2], 'grid': GPTQ[0]}}

solve = jax.jit(obs.solve, static_argnames=('grid', 'pruning', 'act_order', 'damping'))


def _example(inputs, outputs, tokens=2000, seed=0):
  """Weights, and the covariance of inputs that are correlated and of very different sizes."""
  rng = np.random.default_rng(seed)
  mixed = rng.standard_normal((tokens, 12)) @ rng.standard_normal((12, inputs))
  x_TI = (mixed + rng.standard_normal((tokens, inputs))) * np.exp(rng.standard_normal(inputs))
  w_IO = rng.standard_normal((inputs, outputs)).astype(np.float32)
  return w_IO, (x_TI.T @ x_TI / tokens).astype(np.float32)


def _output_error(w_IO, other_IO, covariance_II):
  moved_IO = np.asarray(other_IO, np.float64) - np.asarray(w_IO, np.float64)
  return np.einsum('io,ij,jo->', moved_IO, np.asarray(covariance_II, np.float64), moved_IO)


# The oracle.


def _table(format):
  """All values of a format before scaling and without zero point."""
  if format == 'nf4':
    return np.asarray(quantized.NF4_CODEBOOK)
  if format in ('mxfp4', 'nvfp4'):
    every = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return np.unique(every)
  if format in ('fp8_e4m3', 'mxfp8'):
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return np.sort(every[np.isfinite(every)])
  bits = int(format[3:])
  return np.arange(2**bits) - 2.0 ** (bits - 1)


def _nearest(w_O, scale_O, zero_O, format):
  table = _table(format)
  codes = table[:, None] if zero_O is None else table[:, None] - table[0] - zero_O
  values = codes * np.asarray(scale_O, np.float64)
  return np.take_along_axis(values, np.abs(values - w_O).argmin(0)[None], 0)[0]


def _fit(w_IO, grid, inputs):
  """The grid of some groups of a matrix with so many inputs, in the precision it is stored in."""
  w_JgO = jnp.asarray(w_IO, jnp.float32).reshape(-1, grid.group, w_IO.shape[1])
  dtype = quantized.scale_dtype(grid.format, 1 if grid.double else inputs // grid.group)
  scales_JO, zeros_JO = formats.fit(w_JgO, grid.format, grid.symmetric, grid.clip, dtype)
  if grid.double:
    scales_JO = scales.quantize_scales(scales_JO).dense()
  if grid.format == 'nvfp4':
    scales_JO = scales.e4m3_scales(scales_JO).dense()
  zeros_JO = None if zeros_JO is None else np.asarray(zeros_JO, np.float64)
  return np.asarray(scales_JO, np.float64), zeros_JO


def _inverse_columns(hessian_II):
  """Of each input: the first column of the inverse over it and all after it."""
  first = lambda size: np.arange(size) == 0
  return [np.linalg.solve(h_II, first(len(h_II))) for h_II in _trailing(hessian_II)]


def _trailing(hessian_II):
  return [hessian_II[i:, i:] for i in range(len(hessian_II))]


def _best_pattern(score_IO, n):
  """Of all ways to keep n of m, the one that loses least, by enumeration."""
  patterns = list(itertools.combinations(range(len(score_IO)), n))
  totals = np.stack([score_IO[list(kept)].sum(0) for kept in patterns])
  kept_IO = np.zeros(score_IO.shape, bool)
  for o, best in enumerate(totals.argmax(0)):
    kept_IO[list(patterns[best]), o] = True
  return kept_IO


def _highest(score_IO, dropped, per_output):
  pool = score_IO if per_output else score_IO.reshape(-1, 1)
  kept = np.ones(pool.shape, bool)
  np.put_along_axis(kept, np.argsort(pool, 0)[:dropped], False, 0)
  return kept.reshape(score_IO.shape)


def _masked(score_IO, pruning):
  """The whole mask at once: what the scales of a whole column are fitted to."""
  if pruning.n is None:
    pool = len(score_IO) if pruning.per_output else score_IO.size
    return _highest(score_IO, round(pruning.sparsity * pool), pruning.per_output)
  groups = np.split(score_IO, len(score_IO) // pruning.m)
  return np.concatenate([_best_pattern(group, pruning.n) for group in groups])


def _exact(w_IO, covariance_II, grid=None, pruning=None, act_order=False, block=128, damping=0.01):
  """Optimal brain surgery in an order: invert, fix an input, move those left, repeat."""
  dtype, w_IO, covariance_II = w_IO.dtype, w_IO.astype(np.float64), covariance_II.astype(np.float64)
  inputs, outputs = w_IO.shape
  order = np.argsort(-np.diag(covariance_II), kind='stable') if act_order else np.arange(inputs)
  h_II = covariance_II + damping * np.diag(covariance_II).mean() * np.eye(inputs)
  h_II, w_IO = h_II[order][:, order], w_IO[order]
  columns, kept_IO = _inverse_columns(h_II), np.ones(w_IO.shape, bool)
  inverse_I = np.array([column[0] for column in columns])
  score = lambda rows: w_IO[rows] ** 2 / inverse_I[rows, None]
  together = grid is not None and (grid.double or grid.format == 'nvfp4')
  static = grid is not None and (act_order or together or grid.group == inputs)
  if static:
    original = w_IO[np.argsort(order)]
    visible = original if pruning is None else original * _masked(score(slice(None)), pruning)
    scales_JO, zeros_JO = _fit(visible, grid, inputs)
  pool = 1 if pruning is None or pruning.per_output else outputs
  for i in range(inputs):
    if pruning is not None and pruning.n is None and i % block == 0:
      rows = slice(i, min(i + block, inputs))
      dropped = round(pruning.sparsity * pool * rows.stop) - round(pruning.sparsity * pool * i)
      kept_IO[rows] = _highest(score(rows), dropped, pruning.per_output)
    if grid is not None and not static and i % grid.group == 0:
      rows = slice(i, i + grid.group)
      stays = (
        kept_IO[rows] if pruning is None or pruning.n is None else _masked(score(rows), pruning)
      )
      scales_JO, zeros_JO = _fit(w_IO[rows] * stays, grid, inputs)
    if pruning is not None and pruning.n is not None and i % pruning.m == 0:
      rows = slice(i, i + pruning.m)
      loss_IO = score(rows)
      if grid is not None:  # what dropping costs beyond rounding
        j = order[i] // grid.group if static else 0
        zero_O = None if zeros_JO is None else zeros_JO[j]
        rounded_IO = np.stack(
          [_nearest(w_O, scales_JO[j], zero_O, grid.format) for w_O in w_IO[rows]]
        )
        loss_IO = loss_IO - (w_IO[rows] - rounded_IO) ** 2 / inverse_I[rows, None]
      kept_IO[rows] = _best_pattern(loss_IO, pruning.n)
    value_O = np.where(kept_IO[i], w_IO[i], 0)
    if grid is None:
      value_O = value_O.astype(dtype).astype(np.float64)
    else:
      j = order[i] // grid.group if static else 0
      value_O = _nearest(
        value_O, scales_JO[j], None if zeros_JO is None else zeros_JO[j], grid.format
      )
    w_IO[i:] -= np.outer(columns[i] / columns[i][0], w_IO[i] - value_O)
    w_IO[i] = value_O
  back = np.argsort(order)
  return w_IO[back], kept_IO[back]


def _check(w_IO, covariance_II, solver=solve, block=128, **options):
  solution = solver(w_IO, covariance_II, **options)
  expected_IO, kept_IO = _exact(w_IO, covariance_II, block=block, **options)
  np.testing.assert_array_equal(solution.kept_IO, kept_IO)
  np.testing.assert_allclose(solution.w_IO, expected_IO, rtol=SAME, atol=SAME)
  return solution


# Against the oracle.


@pytest.mark.parametrize(
  'grid, act_order',
  [(grid, False) for grid in GPTQ + MX] + [(GPTQ[i], True) for i in (0, 3, 4, 7)] + [(MX[0], True)],
  ids=str,
)
@pytest.mark.quick(grid=(*GPTQ[:4], GPTQ[5], GPTQ[7], MX[0]))
@pytest.mark.quick(grid=(GPTQ[0], GPTQ[3], GPTQ[7], MX[0]))
def test_quantization_is_exact_surgery(grid, act_order):
  w_IO, covariance_II = _example(64 if grid in MX else 48, 5)
  solution = _check(w_IO, covariance_II, grid=grid, act_order=act_order)
  again = jax.jit(quantized.encode, static_argnums=3)(
    solution.w_IO, solution.scales, solution.zeros_JO, grid.format
  )
  np.testing.assert_allclose(again.dense(), solution.w_IO, rtol=1e-6)


@pytest.mark.parametrize('pruning', PRUNINGS, ids=str)
def test_pruning_is_exact_surgery(pruning):
  _check(*_example(48, 5), pruning=pruning)


@pytest.mark.parametrize('i, group', [(0, 16), (1, 48), (2, 16), (2, 48), (3, 16)])
@pytest.mark.quick(i=(0, 2, 3))
@pytest.mark.quick(group=(16,))
def test_both_in_one_pass_is_exact_surgery(i, group):
  grid = obs.Grid(format='int4', group=group, clip='mse')
  _check(*_example(48, 5), pruning=PRUNINGS[i], grid=grid)


@pytest.fixture
def small_blocks(monkeypatch):
  """The solver with blocks of 8 inputs that reach back 16, by 3 outputs, compiled anew."""
  monkeypatch.setattr(walk, 'BLOCK', 8)
  monkeypatch.setattr(walk, 'REACH', 16)
  monkeypatch.setattr(obs, 'OUTPUTS', 3)
  anew = lambda *arrays, **options: obs.solve(*arrays, **options)
  return jax.jit(anew, static_argnames=('grid', 'pruning', 'act_order', 'damping'))


@pytest.mark.parametrize(
  'options',
  [
    {'grid': obs.Grid(format='int4', group=65), 'act_order': True},
    {'grid': obs.Grid(format='int4', group=13)},
    {'grid': obs.Grid(format='int3', group=5, symmetric=False)},
    {'pruning': obs.Pruning(sparsity=0.5)},
    {'pruning': obs.Pruning(sparsity=0.4, per_output=True)},
    {'pruning': obs.Pruning(n=2, m=5), 'grid': obs.Grid(format='int4', group=65)},
  ],
  ids=str,
)
def test_blocks_and_chunks_that_do_not_divide_change_nothing(small_blocks, options):
  w_IO, covariance_II = _example(65, 7)
  _check(w_IO, covariance_II, solver=small_blocks, block=8, **options)


@pytest.mark.parametrize(
  'options',
  [
    {'grid': obs.Grid(format='int4', group=32)},
    {'grid': obs.Grid(format='int3', group=256, symmetric=False), 'act_order': True},
    {'pruning': obs.Pruning(sparsity=0.5)},
    {'pruning': obs.Pruning(n=2, m=4), 'grid': obs.Grid(format='int4', group=64)},
  ],
  ids=str,
)
@pytest.mark.quick(
  options=({'grid': obs.Grid(format='int4', group=32)}, {'pruning': obs.Pruning(sparsity=0.5)})
)
def test_float32_is_as_good_as_float64(options):
  w_IO, covariance_II = _example(256, 64)
  ours = _output_error(w_IO, solve(w_IO, covariance_II, **options).w_IO, covariance_II)
  exact = _output_error(w_IO, _exact(w_IO, covariance_II, **options)[0], covariance_II)
  assert abs(ours / exact - 1) < SAME


def test_the_form_of_the_papers_gives_the_same(rng):
  """GPTQ as published, by the Cholesky factor of the inverse, over blocks and reaches of ours."""
  w_IO, covariance_II = _example(700, 3)
  h_II = covariance_II.astype(np.float64)
  h_II += 0.01 * np.diag(h_II).mean() * np.eye(700)
  upper_II = np.linalg.cholesky(np.linalg.inv(h_II)).T
  grid = obs.Grid(format='int4', group=700)
  scales_JO, _ = _fit(w_IO, grid, len(w_IO))
  expected_IO = w_IO.astype(np.float64)
  for i in range(700):
    value_O = _nearest(expected_IO[i], scales_JO[0], None, 'int4')
    error_O = (expected_IO[i] - value_O) / upper_II[i, i]
    expected_IO[i:] -= np.outer(upper_II[i, i:], error_O)
    expected_IO[i] = value_O
  solution = solve(w_IO, covariance_II, grid=grid)
  np.testing.assert_allclose(solution.w_IO, expected_IO, rtol=SAME, atol=SAME)


# Theorems.


def test_the_pattern_of_an_isolated_group_is_the_best_of_all(rng):
  w_IO = rng.standard_normal((4, 50)).astype(np.float32)
  covariance_II = np.diag(np.exp(rng.standard_normal(4))).astype(np.float32)
  solution = solve(w_IO, covariance_II, pruning=obs.Pruning(n=2, m=4), damping=1e-6)
  for o in range(50):
    losses = {}
    for kept in itertools.combinations(range(4), 2):
      left = np.where(np.isin(range(4), kept), w_IO[:, o], 0)
      losses[kept] = _output_error(w_IO[:, o : o + 1], left[:, None], covariance_II)
    assert tuple(np.flatnonzero(solution.kept_IO[:, o])) == min(losses, key=losses.get)
  np.testing.assert_array_equal(solution.w_IO, np.where(solution.kept_IO, w_IO, 0))


def test_quantization_moves_weights_further_and_outputs_less_than_rounding():
  w_IO, covariance_II = _example(48, 5)
  for act_order in (False, True):
    solution = solve(w_IO, covariance_II, grid=GPTQ[0], act_order=act_order)
    nearest_IO = quantized.quantize(w_IO, 'int4', group_size=16).dense()
    further = np.linalg.norm(solution.w_IO - w_IO), np.linalg.norm(nearest_IO - w_IO)
    assert further[0] > further[1]
    ours, rounding = (_output_error(w_IO, q, covariance_II) for q in (solution.w_IO, nearest_IO))
    assert ours < 0.7 * rounding


@pytest.mark.parametrize('pruning', PRUNINGS[:4], ids=str)
@pytest.mark.quick(pruning=(PRUNINGS[0], PRUNINGS[2]))
def test_pruning_moves_outputs_less_than_masks_of_the_same_size(pruning):
  w_IO, covariance_II = _example(48, 5)
  ours = solve(w_IO, covariance_II, pruning=pruning)
  errors = [_output_error(w_IO, ours.w_IO, covariance_II)]
  magnitude_IO = sparse.magnitude_score(w_IO)
  norm_I = np.sqrt(np.diag(covariance_II))
  for score_IO in (sparse.wanda_score(w_IO, norm_I), magnitude_IO):
    if pruning.n is None:
      kept_IO = sparse.unstructured_mask(score_IO, pruning.sparsity, per_output=pruning.per_output)
    else:
      kept_IO = sparse.n_of_m_mask(score_IO, pruning.n, pruning.m)
    assert int(kept_IO.sum()) == int(ours.kept_IO.sum())
    errors.append(_output_error(w_IO, jnp.where(kept_IO, w_IO, 0), covariance_II))
  assert errors[0] < 0.8 * errors[1] < errors[2]


def test_one_pass_is_no_worse_than_one_after_the_other():
  w_IO, covariance_II = _example(256, 64)
  grid, pruning = obs.Grid(format='int4', group=64), obs.Pruning(n=2, m=4)
  together = solve(w_IO, covariance_II, grid=grid, pruning=pruning).w_IO
  pruned = solve(w_IO, covariance_II, pruning=pruning).w_IO
  after = solve(pruned, covariance_II, grid=grid).w_IO
  assert (np.asarray(after)[np.asarray(pruned) == 0] == 0).all()
  assert _output_error(w_IO, together, covariance_II) <= _output_error(w_IO, after, covariance_II)


# Counts and zeros.


@pytest.mark.parametrize('per_output', [False, True])
def test_counts_are_exact_in_each_block_and_in_all(per_output):
  w_IO, covariance_II = _example(300, 7)
  pruning = obs.Pruning(sparsity=0.37, per_output=per_output)
  kept_IO = np.asarray(solve(w_IO, covariance_II, pruning=pruning).kept_IO)
  if per_output:
    assert ((~kept_IO).sum(0) == round(0.37 * 300)).all()
    assert ((~kept_IO[:128]).sum(0) == round(0.37 * 128)).all()
  else:
    assert (~kept_IO).sum() == round(0.37 * 300 * 7)
    assert (~kept_IO[:128]).sum() == round(0.37 * 128 * 7)


@pytest.mark.parametrize(
  'options',
  [
    {'grid': GPTQ[0], 'act_order': True},
    {'grid': GPTQ[2]},
    {'pruning': PRUNINGS[0]},
    {'pruning': PRUNINGS[2]},
  ],
  ids=str,
)
def test_zeros_that_are_there_stay_and_count(options, rng):
  w_IO, covariance_II = _example(48, 5)
  w_IO[rng.random(w_IO.shape) < 0.3] = 0
  w_IO[:4, 0] = 0  # more than 2:4 would drop
  solution = solve(w_IO, covariance_II, **options)
  assert (np.asarray(solution.w_IO)[w_IO == 0] == 0).all()
  assert not np.asarray(solution.kept_IO)[w_IO == 0].any()
  if 'grid' in options:
    assert (np.asarray(solution.kept_IO) == (w_IO != 0)).all()
  elif options['pruning'].n is None:
    assert int(solution.kept_IO.sum()) == w_IO.size - round(0.5 * w_IO.size)
  else:
    count = np.asarray(solution.kept_IO).reshape(12, 4, 5).sum(1)
    np.testing.assert_array_equal(count, np.minimum((w_IO != 0).reshape(12, 4, 5).sum(1), 2))


@pytest.mark.parametrize('per_output', [False, True])
def test_selection_with_ties_against_sorting(per_output, rng):
  drop = jax.jit(selection.lowest_dropped, static_argnames='per_output')
  score_IO = rng.integers(0, 4, (40, 6)).astype(np.float32)
  pool = 40 if per_output else 240
  for share in (0, 0.3, 0.99):
    kept_IO = drop(score_IO, score_IO >= 0, round(share * pool), per_output=per_output)
    expected_IO = sparse.unstructured_mask(jnp.asarray(score_IO), share, per_output=per_output)
    np.testing.assert_array_equal(kept_IO, expected_IO)
  for n, m in ((2, 4), (1, 5)):
    kept_IO = selection.best_of_each(jnp.asarray(score_IO), jnp.ones((40, 6), bool), n, m)
    np.testing.assert_array_equal(kept_IO, sparse.n_of_m_mask(jnp.asarray(score_IO), n, m))


def test_kept_weights_are_rounded_to_the_dtype_within_the_walk():
  w_IO, covariance_II = _example(48, 5)
  w_IO = w_IO.astype(ml_dtypes.bfloat16)
  solution = _check(w_IO, covariance_II, pruning=PRUNINGS[2])
  np.testing.assert_array_equal(solution.w_IO, solution.w_IO.astype(jnp.bfloat16).astype('float32'))


# Sharding, and wrong input.


@pytest.mark.parametrize('use', SHARDED)
def test_outputs_over_eight_devices(use):
  w_IO, covariance_II = _example(48, 40)
  mesh = jax.make_mesh((8,), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'model'))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  sharded = solve(
    jax.device_put(w_IO, spread), jax.device_put(covariance_II, whole), **SHARDED[use]
  )
  alone = solve(w_IO, covariance_II, **SHARDED[use])
  np.testing.assert_array_equal(sharded.kept_IO, alone.kept_IO)
  np.testing.assert_allclose(sharded.w_IO, alone.w_IO, rtol=SAME, atol=SAME)
  assert len(sharded.w_IO.sharding.device_set) == 8
  assert sharded.w_IO.addressable_shards[0].data.shape == (48, 5)


@pytest.mark.parametrize(
  'message, options',
  [
    ('does not divide 48', {'grid': obs.Grid(format='int4', group=32)}),
    ('do not divide into groups of 5', {'pruning': obs.Pruning(n=2, m=5)}),
    ('group of 6 inputs', {'pruning': PRUNINGS[2], 'grid': obs.Grid(format='int4', group=6)}),
    ('leave act_order out', {'pruning': PRUNINGS[2], 'act_order': True}),
    ('damping is positive', {'pruning': PRUNINGS[2], 'damping': 0.0}),
  ],
)
def test_what_does_not_fit_is_refused(message, options):
  with pytest.raises(ValueError, match=message):
    obs.solve(*map(jnp.asarray, _example(48, 5)), **options)


def test_pruning_is_told_one_thing():
  for wrong in ({}, {'sparsity': 0.5, 'n': 2, 'm': 4}, {'n': 2}):
    with pytest.raises(ValueError, match='either a sparsity or n and m'):
      obs.Pruning(**wrong)
  with pytest.raises(ValueError, match='no covariance of shape'):
    obs.solve(jnp.ones((48, 5)), jnp.eye(40), pruning=PRUNINGS[0])
