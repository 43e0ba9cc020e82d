"""An example of every weight type, for the tests of what all of them have to do."""

import dataclasses
import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import (
  activations,
  int8_training,
  lora,
  low_rank,
  masked,
  qat,
  quantized,
  rotated,
  scales,
  sparse,
  transposed,
)
from ops.kernels import fused
from ops.kernels.cpu import layout
from ops.linear import Weight

INPUTS, OUTPUTS = 64, 32
# Sums of 64 products of order 1 in float32, and with 8 bits of mantissa.
TOLERANCE = {'float32': 2e-5, 'bfloat16': 2**-6}


def _quantized(name, **options):
  return lambda w_IO: quantized.quantize(w_IO, name, **options)


def _floating_zeros(w_IO):
  scales_JO, zeros_JO = quantized.fit(w_IO, 'int4', group_size=32, symmetric=False)
  return quantized.encode(w_IO, scales_JO, zeros_JO.astype(jnp.float16) + 0.25, 'int4')


def _sparse(n, m, fn=None):
  def make(w_IO):
    w = sparse.compress(w_IO, sparse.n_of_m_mask(jnp.abs(w_IO), n, m), n, m)
    return w if fn is None else w.map_values(fn)

  return make


def _lora(fn):
  def make(w_IO):
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape) / 8
    return lora.LoraTensor(fn(w_IO), draw(1, INPUTS, 4), draw(2, 4, OUTPUTS), 0.5)

  return make


def _dora(fn):
  lengths_O = jnp.linspace(0.5, 2, OUTPUTS)
  return lambda w_IO: lora.DoraTensor(_lora(fn)(w_IO), lengths_O)


def _activations(fn, bits=8, absmax=None):
  limit = None if absmax is None else jnp.float32(absmax)
  return lambda w_IO: activations.quantize_activations(fn(w_IO), bits, absmax=limit)


def _transposed(fn):
  return lambda w_IO: transposed.TransposedTensor(fn(w_IO.T))


EXAMPLES = {
  'int8': _quantized('int8'),
  'int8 asymmetric groups': _quantized('int8', group_size=32, symmetric=False),
  'int4': _quantized('int4', group_size=16),
  'int3': _quantized('int3', clip='signed'),
  'int2 asymmetric': _quantized('int2', group_size=16, symmetric=False, clip='mse'),
  'int4 floating zeros': _floating_zeros,
  'nf4 double': _quantized('nf4', double=True),
  'fp8': _quantized('fp8_e4m3'),
  'mxfp4': _quantized('mxfp4'),
  'mxfp8': _quantized('mxfp8'),
  'nvfp4': _quantized('nvfp4'),
  'scales': lambda w_IO: scales.quantize_scales(jnp.abs(w_IO)),
  'e4m3 scales': lambda w_IO: scales.e4m3_scales(jnp.abs(w_IO)),
  '2:4': _sparse(2, 4),
  '8:16': _sparse(8, 16),
  '2:4 of int8': _sparse(2, 4, _quantized('int8')),
  '2:4 of mxfp4': _sparse(2, 4, _quantized('mxfp4')),
  'packed': lambda w_IO: layout.encode(_quantized('int4', group_size=16)(w_IO), 'float'),
  'fused': lambda w_IO: fused.pack(_quantized('int4', group_size=32)(w_IO), 'tpu'),
  'inputs': _activations(_quantized('int8')),
  'inputs static': _activations(_quantized('int4', group_size=-1), absmax=6),
  'inputs of 4 bits over int4': _activations(_quantized('int4', group_size=16), 4),
  'masked': lambda w_IO: masked.masked(w_IO, jnp.abs(w_IO) > 0.1),
  'masked int8': lambda w_IO: masked.masked(w_IO, jnp.abs(w_IO) > 0.1).map_values(
    _quantized('int8')
  ),
  'learned int4': lambda w_IO: qat.learn(w_IO, 'int4', group_size=16),
  'learned int8 with inputs': _activations(lambda w_IO: qat.learn(w_IO, 'int8', held=True)),
  'learned 2:4': _sparse(2, 4, lambda v: qat.learn(v, 'int8', held=True)),
  'int8 products': int8_training.Int8Products,
  'transposed int4': _transposed(_quantized('int4', group_size=16, symmetric=False)),
  'low rank': lambda w_IO: low_rank.factorise(w_IO, 8),
  'low rank of int4': lambda w_IO: low_rank.factorise(w_IO, 16).map_values(
    _quantized('int4', group_size=16)
  ),
  'rotated': lambda w_IO: rotated.RotatedTensor(w_IO, 1),
  'rotated heads of int8': lambda w_IO: rotated.RotatedTensor(_quantized('int8')(w_IO), 16),
  'lora': _lora(lambda w_IO: w_IO),
  'dora': _dora(lambda w_IO: w_IO),
  'dora over nf4': _dora(_quantized('nf4', double=True)),
  'lora under a mask': lambda w_IO: lora.keep_zeros(_lora(_sparse(2, 4))(w_IO)),
  'lora over nf4': _lora(_quantized('nf4', double=True)),
  'lora over 2:4 of int4': _lora(_sparse(2, 4, _quantized('int4', group_size=16))),
}
# Their gradients and their stored form are not those of the rounded matrix, and have own tests.
ONLY_TRAINED = ('int8 products',)
to_dense = jax.jit(lambda w: w.dense())


@dataclasses.dataclass(frozen=True)
class Example:
  """A weight of `EXAMPLES`, and its parts, each of which is made once."""

  name: str

  @functools.cached_property
  def make(self) -> Callable[[jax.Array], Weight]:
    """The function from a matrix to the weight, compiled."""
    return jax.jit(EXAMPLES[self.name])

  @functools.cached_property
  def weight(self) -> Weight:
    return self.make(self.matrix())

  @functools.cached_property
  def dense(self) -> np.ndarray:
    """What the example stands for, in float64."""
    return np.asarray(to_dense(self.weight), np.float64)

  @functools.cached_property
  def experts(self) -> tuple[list[Weight], Weight]:
    """Three experts: made one by one, and together as one weight."""
    w_EIO = self.matrix(3)
    return [self.make(w_IO) for w_IO in w_EIO], jax.jit(jax.vmap(EXAMPLES[self.name]))(w_EIO)

  @functools.cached_property
  def dense_experts(self) -> np.ndarray:
    """What its experts stand for, made one by one, in float64 [E, I, O]."""
    return np.stack([np.asarray(to_dense(one), np.float64) for one in self.experts[0]])

  @property
  def only_trained(self) -> bool:
    return self.name in ONLY_TRAINED

  def matrix(self, *lead, seed=0) -> jax.Array:
    rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
    return jnp.asarray(rng.normal(size=(*lead, INPUTS, OUTPUTS)) / 8, jnp.float32)

  def seen(self, x) -> np.ndarray:
    """The inputs as the product takes them, in float64: most weights leave them as they are."""
    return np.asarray(self.weight.round_inputs(x), np.float64)


_example = functools.cache(Example)


@pytest.fixture(params=EXAMPLES)
def example(request):
  return _example(request.param)


@pytest.fixture(scope='session')
def example_of():
  """A function (name) -> the example of that name."""
  return _example


@pytest.fixture(scope='session')
def all_examples():
  return {name: _example(name) for name in EXAMPLES}


@pytest.fixture(scope='session')
def inputs_of():
  """A function (*lead, dtype) -> inputs of the examples."""
  draw = lambda lead: np.random.default_rng(1).normal(size=(*lead, INPUTS))
  return lambda *lead, dtype=jnp.float32: jnp.asarray(draw(lead), dtype)


@pytest.fixture(scope='session')
def assert_near():
  """A function (actual, expected, dtype) that compares within the rounding of sums."""

  def check(actual, expected, dtype='float32'):
    actual = np.asarray(jnp.asarray(actual, jnp.float32), np.float64)
    atol = TOLERANCE[dtype] * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, atol=atol, rtol=0)

  return check


@pytest.fixture(scope='session')
def assert_same():
  """A function (actual, expected) that compares two pytrees bit by bit."""

  def check(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
      assert a.dtype == b.dtype and a.shape == b.shape
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

  return check
