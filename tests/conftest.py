"""Strict JAX for every test: no silent rank promotion, warnings are errors, 8 CPU devices."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
# The workers of the suite share the cores, which OpenBLAS's waiting threads would take from them.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
# Half of the suite's time would be optimizing what is compiled, and splitting each program into 32
# parts that are compiled side by side. XLA_FLAGS= compiles as users do.
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
  ' --xla_cpu_parallel_codegen_split_count=1',
)

import functools
import gc
import math
import pathlib

import jax
import numpy as np
import pytest
from jax._src import core
from jax.extend.core import primitives

from model.compress import programs

# Each compiled program takes a few memory maps. Linux allows a process 65,530 of them, and XLA
# crashes beyond that, as it did near the end of the whole suite.
MAPS, MOST_MAPS = pathlib.Path('/proc/self/maps'), 40_000

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


# Modules and collected tests stay. Looking for garbage among them again and again took a tenth of
# the time, and looking after every 700 new objects, of which a trace makes many, a twentieth.
gc.disable()
gc.set_threshold(10_000, 10, 10)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Marks slow what `@pytest.mark.quick(name=values)` does not list among its parameters."""
  for item in items:
    parameters = getattr(item, 'callspec', None)
    for mark in item.iter_markers('quick'):
      wanted = {
        name: v for name, v in mark.kwargs.items() if name in getattr(parameters, 'params', {})
      }
      if not all(parameters.params[name] in values for name, values in wanted.items()):
        item.add_marker('slow')


def pytest_collection_finish():
  gc.freeze()
  gc.enable()


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture(autouse=True, scope='session')
def quick_techniques():
  """Compiles techniques as quickly as all else; their own options would optimize a little."""
  with pytest.MonkeyPatch.context() as patch:
    if 'optimization_level=0' in os.environ['XLA_FLAGS']:
      patch.setitem(programs.QUICKEST, 'xla_backend_optimization_level', 0)
    yield


def _moved_by_numpy(primitive, by_numpy):
  """What runs a primitive outside of programs: numpy where it moves plain numbers, or XLA."""
  by_xla = primitive.impl

  def run(x, *others, **options):
    weak = getattr(getattr(x, 'aval', None), 'weak_type', False)
    plain = isinstance(x, np.ndarray | jax.Array) and isinstance(x.dtype, np.dtype)
    if others or weak or not plain or getattr(x, 'committed', False):
      return by_xla(x, *others, **options)
    moved = by_numpy(x, **options)
    return by_xla(x, **options) if moved is None else jax.device_put(np.array(moved))

  return run


def _broadcast(x, *, shape, broadcast_dimensions, sharding):
  if sharding is not None:
    return None
  sizes = dict(zip(broadcast_dimensions, x.shape))
  return np.broadcast_to(
    np.reshape(np.asarray(x), [sizes.get(i, 1) for i in range(len(shape))]), shape
  )


def _convert(x, *, new_dtype, weak_type, sharding):
  # Numbers that do not fit become others in numpy.
  kinds = x.dtype.kind + np.dtype(new_dtype).kind
  fits = kinds in ('ff', 'ii', 'uu', 'iu', 'ui', 'if', 'uf', 'bi', 'bu', 'bf', 'bb')
  half = np.float16 in (x.dtype, new_dtype)
  return None if half or weak_type or sharding or not fits else np.asarray(x).astype(new_dtype)


def _reshape(x, *, new_sizes, dimensions, sharding):
  return None if dimensions or sharding else np.reshape(np.asarray(x), new_sizes)


def _squeeze(x, *, dimensions):
  return np.squeeze(np.asarray(x), tuple(dimensions))


def _stage(x):
  return None if isinstance(x, jax.Array) else x


def _normal(draw, key, shape=(), dtype=None, **options):
  """`jax.random.normal`: the beginning of a longer row, so that few programs draw all shapes."""
  eager = not options and core.trace_state_clean() and not key.committed
  if not eager or not all(isinstance(size, int) for size in shape):
    return draw(key, shape, dtype, **options)
  row = np.asarray(draw(key, (max(4096, 1 << (math.prod(shape) - 1).bit_length()),), dtype))
  return jax.device_put(row[: math.prod(shape)].reshape(shape).copy())


MOVES = {
  primitives.broadcast_in_dim_p: _broadcast,
  primitives.convert_element_type_p: _convert,
  primitives.reshape_p: _reshape,
  primitives.squeeze_p: _squeeze,
  core.stage_p: _stage,
}
# Outside of a `jax.jit`, numbers are drawn, broadcast and reshaped without a program for each,
# which was most of what building a tiny model took. They are the same numbers, bit by bit.
jax.random.normal = functools.partial(_normal, jax.random.normal)
for each, by_numpy in MOVES.items():
  each.impl = _moved_by_numpy(each, by_numpy)


@pytest.fixture(autouse=True, scope='module')
def few_programs():
  """Drops the compiled programs when there are many, which costs some of them a second compile."""
  yield
  if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
    jax.clear_caches()
    gc.collect()
