"""Compiles the programs of a compression: each runs a few times, so compiling must be cheap.

XLA:CPU compiles a solver's nested loops in half the time without its fusion emitters, and they run
no slower. The options are given to each program alone. Where a version of XLA does not know them,
programs are compiled without. Programs that are known to be needed are compiled in threads, ahead
of their first call.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from model.compress import statistics
from model.compress.recipe import Step
from model.compress.registry import PREPARED, Outcome
from ops import experts
from ops.linear import Matrix, core, with_core

QUICK = {'xla_cpu_use_fusion_emitters': False}
QUICKEST = {**QUICK, 'xla_backend_optimization_level': 1}  # where nearly all work is products
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
COMPILERS = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix='compile')


def compiled(function: Callable, quick: dict = QUICK, **settings) -> Callable:
  """Returns `jax.jit(function, **settings)`, compiled by the options `quick` on a CPU.

  It cannot be called inside another traced function. Its `eval_shape` keeps the trace, which serves
  when the program is compiled. Its `ahead` takes arguments like a call, arrays or their shapes, and
  begins to compile the program for them in a thread; a call waits for that, or compiles by itself
  if the threads have not come to it.
  """
  begun = {}

  @functools.cache
  def program(platform: str):
    return jax.jit(function, compiler_options=_known(platform, **quick), **settings)

  @functools.wraps(function)
  def run(*args):
    compiling = begun.get(_signature(args)) if begun else None
    if compiling and not compiling.cancel():
      concurrent.futures.wait([compiling])  # if it failed, the call fails alike
    return program(jax.default_backend())(*args)

  def ahead(*args):
    key, wanted = _signature(args), program(jax.default_backend())
    if key not in begun:
      begun[key] = COMPILERS.submit(_compile, wanted, _shapes(args))

  run.eval_shape = lambda *args: program(jax.default_backend()).eval_shape(*args)
  run.ahead = ahead
  return run


def _compile(program, args: tuple) -> None:
  program.lower(*args).compile()  # JAX keeps it


def _signature(args: tuple):
  """What tells programs of a function apart: the shapes of arrays, and all other arguments."""
  leaves, structure = jax.tree.flatten(_shapes(args))
  return structure, tuple(leaves)


def _shapes(args: tuple):
  """The arguments with shapes in the place of arrays, which nothing may hold until they compile."""
  of = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if isinstance(a, _ARRAYS) else a
  return jax.tree.map(of, args)


@functools.cache
def _known(platform: str, **options) -> dict | None:
  if platform != 'cpu':
    return None
  try:
    jax.jit(lambda: 0, compiler_options=options)()
  except jax.errors.JaxRuntimeError:  # this version of XLA lacks an option
    return None
  return options


@functools.partial(compiled, quick=QUICKEST, static_argnums=(0, 1))
def execute(row, spec, w: Matrix, measured) -> Outcome:
  """Runs a technique on one matrix; `measured` are the statistics of its inputs."""
  outcome = row(core(w), measured, spec)
  events = {**outcome.events, **statistics.starved(measured)}
  return Outcome(with_core(w, outcome.weight), events)


@functools.partial(compiled, quick=QUICKEST, static_argnums=(0, 1, 2))
def prepare(row, spec, mapped: bool, measured):
  """Computes what a technique derives from the statistics alone, for layers that share them.

  `mapped`: for each expert by itself.
  """
  one = lambda measured: row.prepare(measured, spec)
  return experts.each(one, measured) if mapped else one(measured)


def has_experts(w: Matrix) -> bool:
  """Whether what is done to a weight is done to each of its experts."""
  return experts.count(w) is not None


class Prepared:
  """What a step derives from statistics, kept for the next layer in case it has the same inputs."""

  def __init__(self, step: Step):
    self._step, self._statistics, self._arrays = step, None, None

  def join(self, measured: Mapping[str, Any], w: Matrix) -> dict[str, Any]:
    """A layer's statistics and what the step derives from them, in a new dictionary."""
    row, spec = self._step.row, self._step.spec
    if row.prepare is None:
      return dict(measured)
    if measured is not self._statistics:
      self._statistics = self._arrays = None  # frees them first
      own = {name: measured[name] for name in row.statistics}
      self._arrays = prepare(row, spec, has_experts(w), own)
      self._statistics = measured
    return {**measured, PREPARED: self._arrays}
