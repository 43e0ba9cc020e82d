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

import gc
import pathlib

import jax
import numpy as np
import pytest

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


@pytest.fixture(autouse=True, scope='module')
def few_programs():
  """Drops the compiled programs when there are many, which costs some of them a second compile."""
  yield
  if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
    jax.clear_caches()
    gc.collect()
