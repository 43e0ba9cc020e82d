"""Compiles the programs of a compression: each runs a few times, so compiling must be cheap.

XLA:CPU compiles a solver's nested loops in half the time without its fusion emitters, and they run
no slower. The option is given to each program alone, and left out where a version of XLA does not
know it.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax

from model.compress.registry import Outcome
from ops.linear import Matrix, core, with_core

QUICK = {'xla_cpu_use_fusion_emitters': False}


def compiled(function: Callable, **settings) -> Callable:
  """Returns `jax.jit(function, **settings)`, compiled by `QUICK` on a CPU.

  It cannot be called inside another traced function. Its `eval_shape` keeps the trace, which serves
  when the program is compiled.
  """

  @functools.cache
  def program(platform: str):
    return jax.jit(function, compiler_options=_options(platform), **settings)

  @functools.wraps(function)
  def run(*args):
    return program(jax.default_backend())(*args)

  run.eval_shape = lambda *args: program(jax.default_backend()).eval_shape(*args)
  return run


@functools.cache
def _options(platform: str) -> dict | None:
  if platform != 'cpu':
    return None
  try:
    jax.jit(lambda: 0, compiler_options=QUICK)()
  except jax.errors.JaxRuntimeError:  # this version has no such option
    return None
  return QUICK


@functools.partial(compiled, static_argnums=(0, 1))
def execute(row, spec, w: Matrix, measured) -> Outcome:
  """Runs a technique on one matrix; `measured` are the statistics of its inputs."""
  outcome = row(core(w), measured, spec)
  return dataclasses.replace(outcome, weight=with_core(w, outcome.weight))
